"""Trains a recipe:  deepspeed --module rf_train.train RECIPE.yaml a.b=c ...

The same command resumes from the run's newest checkpoint. A finished run is left as it is.
"""

import argparse
import json
import logging
import math
import os
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from data_prep.command import printable
from rf_train import config
from rf_train.config import Recipe, Stage
from rf_train.data.batches import Datasets, longest_wait, open_datasets, steps
from rf_train.data.damage import Damage, DamageLog, TooMuchDamage
from rf_train.diffusion.batch import Batch, on_device
from rf_train.diffusion.histories import History, make_history
from rf_train.diffusion.loss import training_loss
from rf_train.engine.collectives import (
    Ranks,
    check_same_on_ranks,
    check_same_settings,
    gather_lines,
    naming_lost_peers,
    on_rank_0,
    start_ranks,
    true_on_any_rank,
)
from rf_train.engine.deepspeed_json import complete_settings
from rf_train.engine.devices import Moment, use_deterministic_kernels
from rf_train.engine.run_folder import Events, job_name, one_writer
from rf_train.engine.state import TrainingState
from rf_train.engine.stopping import FOLDER_LOST, Interrupted, Stop
from rf_train.engine.watching import Watch
from rf_train.engine.zero import Engine, build_engine
from rf_train.evaluation.during_training import TrainingEvaluation
from rf_train.failures import kept_alive, report_failure
from rf_train.metrics import MicroStepResult, StepMetrics
from rf_train.resuming import check_stages, checkpoint_to_go_on_from, finished, restore, tell_unused, write_recipe
from rf_train.run_log import RunLog
from rf_train.saves import Saves, TooManySkippedSteps
from rf_train.start_checks import check_memory, check_model, check_split, planned_cases

LONGEST_START = 1800.0  # seconds that the first step of a stage may take longer: kernels are chosen and compiled


def train(recipe: Recipe, stop: Stop | None = None, watch: Watch | None = None) -> None:
    """Trains all steps of `recipe` that come after its newest checkpoint. Called on every rank."""
    stop, watch = stop or Stop(), watch or Watch(recipe.run.hang_timeout)
    if recipe.run.deterministic:
        use_deterministic_kernels()
    ranks = start_ranks(longest_wait(recipe))
    watch.asked = lambda: stop.reason
    with closing(watch):
        watch.begin(ranks)
        if not finished(recipe):
            train_on(ranks, recipe, stop, watch)
        elif ranks.rank == 0:
            print(f"{recipe.run.out}: all {recipe.steps} steps are done already")
            tell_unused(recipe)


def train_on(ranks: Ranks, recipe: Recipe, stop: Stop, watch: Watch) -> None:
    """Trains on ranks that have found one another."""
    datasets = open_datasets(recipe)
    check_split(recipe, datasets, ranks)
    check_same_settings(
        recipe=config.to_dict(recipe),
        deepspeed=complete_settings(recipe, ranks.device.type, ranks.world_size),
        data={name: dataset.summary() for name, dataset in datasets.items()},
    )
    out, lost = Path(recipe.run.out), lambda: stop.ask(FOLDER_LOST)
    with one_writer(out, ranks.rank, lost, watch.reason) as events, naming_lost_peers():
        found = checkpoint_to_go_on_from(recipe, events)
        on_rank_0(lambda: check_stages(recipe, found[1]["step"] if found else 0))
        cases = planned_cases(recipe, datasets, ranks)
        check_memory(cases, ranks.rank)
        engine = build_engine(recipe, ranks)
        state = TrainingState(engine, recipe.optimizer.ema)
        first = restore(recipe, state, found)
        check_same_on_ranks("at the start", **{"steps that are done": first})
        check_model(recipe, engine, datasets)
        evaluation = TrainingEvaluation(recipe, engine, datasets) if recipe.evaluation.every else None
        if ranks.rank == 0:
            write_recipe(recipe)
        dist.barrier()
        write_start(events, first, ranks)
        log = RunLog(recipe, first, ranks.rank)
        log.print_line(describe(recipe, engine, state, first))
        saves, damage = Saves(recipe, state, first, events, log), DamageLog(recipe.run.out, recipe.data.max_damaged)
        stop.saves, watch.on_leaving = True, events.end
        try:
            given = timed_steps(recipe, datasets, first, engine, watch, stop, saves)
            for step, stage, batches, waited in given:
                engine.set_batch(stage.batch)
                engine.model.kept_blocks = cases[recipe.stages.index(stage)].kept_blocks
                engine.set_learning_rate(learning_rate(stage, step - recipe.span_at(step).begin))
                metrics, not_finite = train_step(engine, step, batches, recipe, stage)
                if not metrics["skipped"]:
                    state.update_average()
                metrics |= {"lr": engine.learning_rate, "data_wait_s": waited}
                report_damage(step + 1, batches, stage.batch, metrics["damaged"], damage, log)
                if evaluation and evaluation.is_due(step + 1):
                    metrics |= evaluated(evaluation, step + 1, state, watch, stop)
                log.log(step, stage.name, stage.batch, metrics)
                events.step = step + 1
                saves.after_step(step, metrics["skipped"], not_finite)
                damage.check()
                watch.at(f"agreeing after step {step + 1}")
                stopped_by = stop.agreed()
                if stopped_by or saves.is_due(step + 1):
                    watch.without_limit(f"saving after step {step + 1}")
                saves.between_steps(step + 1, stopped_by)
            watch.without_limit("saving at the end")
            saves.at_the_end()
        except (TooManySkippedSteps, TooMuchDamage):  # on all ranks
            saves.finish()
            log.close(failed=True)
            raise
        except BaseException:
            log.close(failed=True)
            raise
        log.close()
        events.end("finished")


def evaluated(
    evaluation: TrainingEvaluation, done: int, state: TrainingState, watch: Watch, stop: Stop
) -> dict[str, dict]:
    """{"evaluation": the result}; {} when the run is to stop, which then has no time for it."""

    def progress() -> None:
        watch.at(f"evaluation after step {done}", LONGEST_START)
        stop.interrupt()

    try:
        return {"evaluation": evaluation.evaluate(done, state, progress)}
    except Interrupted:  # the weights are still the average: nothing computes with them any more
        return {}


def timed_steps(
    recipe: Recipe, datasets: Datasets, first: int, engine: Engine, watch: Watch, stop: Stop, saves: Saves
) -> Iterator[tuple[int, Stage, list[Batch], float]]:
    """Yields (step, its stage, this rank's micro-batches, seconds that they were waited for) from step `first` on.

    While ranks wait for a server, any of them can be asked to stop: then all ranks save, and raise Stopped.
    """
    begin, patience = time.perf_counter(), longest_wait(recipe)
    watch.at("waiting for data", patience + LONGEST_START)
    on_gpu = engine.ranks.device.type == "cuda"

    def interrupted() -> object:
        return patience and (stop.reason or watch.asked_anywhere)

    given = steps(recipe, datasets, first, engine.replica, engine.replicas, on_gpu, interrupted)
    for step, batches in given:
        stage, first_of_stage, _ = recipe.span_at(step)
        if patience:
            watch.at(f"waiting for all ranks' data after step {step}", patience + LONGEST_START)
            if stopped_by := stop.agreed(elsewhere=not batches):
                watch.without_limit(f"saving after step {step}")
                saves.between_steps(step, stopped_by)
        watch.at(f"step {step + 1}", LONGEST_START if step in (first, first_of_stage) else 0.0)
        yield step, stage, batches, time.perf_counter() - begin
        begin = time.perf_counter()
        watch.at(f"waiting for data after step {step + 1}", patience)


def train_step(engine: Engine, step: int, batches: list[Batch], recipe: Recipe, stage: Stage) -> tuple[dict, list[str]]:
    """One optimizer step over this rank's micro-batches.

    If the gradient isn't finite on some rank, the step is skipped on all ranks. Returns the metrics over all ranks and,
    for a skipped step, the ids of the clips whose loss isn't finite, on all ranks.
    """
    device = engine.ranks.device
    check_same_shapes(step, batches, stage.history)
    rolls_out = true_on_any_rank([stage.history.needs_rollout(batch) for batch in batches])
    metrics, rollouts, begin, applied = StepMetrics(), list[tuple[Moment, Moment]](), Moment(device), True
    for batch, needed in zip(on_device(batches, device), rolls_out):
        rollout_begin = Moment(device)
        history, level = degraded_history(engine, batch, recipe, stage, needed)
        rollouts.append((rollout_begin, Moment(device)))
        result = training_loss(engine, batch, history, recipe.flow, stage.attention)
        engine.backward(result.loss)
        applied = engine.step()
        metrics.add(batch.ids, MicroStepResult.of(batch, history, level, result), len(batch.damaged))
    end = Moment(device)
    share = sum(first.until(last) for first, last in rollouts) / begin.until(end)
    own = {"skipped": int(not applied), "grad_norm": engine.gradient_norm, "rollout_share": share}
    return {**metrics.reduced(engine.sequence_parallel_size), **own}, [] if applied else metrics.clips_not_finite()


def report_damage(step: int, batches: list[Batch], clips: int, damaged: int, damage: DamageLog, log: RunLog) -> None:
    """Counts a step's damaged samples. Rank 0 names and lists them. A collective, if there are any on some rank."""
    damage.add(clips, damaged)
    if damaged:
        lines = gather_lines([line for batch in batches for line in batch.damaged])
        found = [Damage(**json.loads(line)) for line in sorted(set(lines))]
        if log.active:
            damage.write(step, found)
        for one in found:
            log.print_line(printable(f"step {step}: damaged: {one}"))


def degraded_history(
    engine: Engine, batch: Batch, recipe: Recipe, stage: Stage, rollout: bool
) -> tuple[Tensor | None, Tensor]:
    """Makes the history of a micro-batch, with the model if `rollout`. Returns it and its noise level, [B].

    A rollout is a collective: all ranks have the same `rollout`.
    """
    if not rollout:
        return make_history(stage.history, batch, stage.attention, None)
    passes = len(stage.history.rollout_passes(batch.chunk_sizes))
    with engine.rollout(passes, recipe.run.gather_for_rollout) as model:
        return make_history(stage.history, batch, stage.attention, model)


def check_same_shapes(step: int, batches: list[Batch], history: History) -> None:
    """Raises ValueError, on every rank, when ranks have batches of different shapes."""
    names = ("batch", "channels", "latent frames", "latent height", "latent width")
    chunks = len(batches[0].chunk_sizes)
    shape = dict(zip(names, batches[0].x.shape))
    counts = {"micro-steps": len(batches), "passes of a rollout": len(history.rollout_passes(batches[0].chunk_sizes))}
    check_same_on_ranks(f"step {step + 1}", step=step, **counts, chunks=chunks, **shape)


def learning_rate(stage: Stage, step_in_stage: int) -> float:
    """Rises linearly over the first `warmup` steps; falls linearly to `lr_end` by the stage's end if that is set."""
    end = stage.lr_end or stage.lr
    falling = stage.lr + (end - stage.lr) * step_in_stage / max(1, stage.steps - 1)
    return falling * min(1.0, (step_in_stage + 1) / (stage.warmup + 1))


def write_start(events: Events, first: int, ranks: Ranks) -> None:
    here = {"host": socket.gethostname(), "job": job_name(os.environ), "pid": os.getpid()}
    events.write("start", first, ranks=ranks.world_size, **here)


def describe(recipe: Recipe, engine: Engine, state: TrainingState, first: int) -> str:
    """The lines that a run prints at its start."""
    ranks = engine.ranks
    total = sum(math.prod(shape) for shape in state.shapes.values())
    own = sum(fragment.master.numel() for fragment in state.local_fragments.values())
    start = f"resuming after step {first}" if first else "from the start"
    stages = [
        f"{stage.name} ({stage.history.kind}, {stage.attention.kind}, {stage.steps} steps of {stage.batch})"
        for stage in recipe.stages
    ]
    lines = [
        f"ZeRO stage {engine.zero_stage}, {ranks.world_size} ranks on {ranks.device.type} ({dist.get_backend()}); "
        f"{total:,} parameters, {own:,} on this rank; {start}",
        f"stages: {', '.join(stages)}",
    ]
    if recipe.run.compile:
        lines.append("run.compile: the first step of each stage compiles, which can take minutes")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="rf_train.train", description="Trains a recipe.")
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped one (demo)")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that replace the recipe's")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the launcher
    options = parser.parse_args(arguments)
    rank = int(os.environ.get("RANK", 0))
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed's own calls cause one such line each.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    stop, watch = Stop(), Watch()
    with stop.listening():
        try:
            recipe = config.load(config.recipe_path(options.recipe), options.overrides)
            watch.hang_timeout = recipe.run.hang_timeout
            with naming_lost_peers():
                train(recipe, stop, watch)
                # Only after success: with NCCL it waits for kernels that peers may never join.
                if dist.is_initialized():
                    dist.barrier()
                    dist.destroy_process_group()
        except BaseException as error:
            stop.saves = True  # a signal is the launcher's answer now, and no news
            kept_alive.append(error)
            return report_failure(error, rank, watch, [options.recipe, *options.overrides])
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # All is saved and closed. A normal exit would sometimes abort in gloo's threads, or wait for lost peers.
    os._exit(code)
