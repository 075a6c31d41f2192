"""Trains a recipe:  deepspeed --module rf_train.train RECIPE.yaml a.b=c ...

The same command resumes from the run's newest checkpoint. A finished run is left as it is.
"""

import argparse
import json
import logging
import math
import os
import shlex
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from torch import Tensor

from data_prep.command import BAD_INPUT, INTERRUPTED, UNFORESEEN, one_line, printable
from data_prep.files import write_atomic
from rf_train import config
from rf_train.config import Recipe, Stage
from rf_train.data.batches import Datasets, longest_wait, micro_steps, open_datasets, steps
from rf_train.data.damage import Damage, DamageLog
from rf_train.diffusion.batch import Batch
from rf_train.diffusion.histories import History, make_history
from rf_train.diffusion.history_check import check_history
from rf_train.diffusion.loss import training_loss
from rf_train.engine import checkpoint
from rf_train.engine.checkpoint import TrainingState
from rf_train.engine.collectives import (
    PeerLost,
    Ranks,
    RunError,
    check_same_on_ranks,
    check_same_settings,
    gather_lines,
    naming_lost_peers,
    ranks_on_this_machine,
    start_ranks,
    true_on_any_rank,
)
from rf_train.engine.deepspeed_json import complete_settings
from rf_train.engine.devices import memory_of, use_deterministic_kernels
from rf_train.engine.zero import Engine, RolloutMismatch, build_engine
from rf_train.evaluation.during_training import TrainingEvaluation
from rf_train.metrics import MicroStepResult, StepMetrics
from rf_train.model.self_test import self_test
from rf_train.planning.costs import GIB, Clip, Cluster, StageCase, read_zero
from rf_train.planning.memory import ROOM, fits, memory, with_kept_blocks
from rf_train.planning.search import best
from rf_train.run_log import RunLog
from rf_train.settings import differences
from rf_train.weights import WeightFiles


class TooManySkippedSteps(RunError):
    """Too many steps in a row were skipped because their gradient isn't finite."""


class OutOfMemory(RunError):
    """A GPU has too little memory for the recipe."""


def train(recipe: Recipe) -> None:
    """Trains all steps of `recipe` that come after its newest checkpoint. Called on every rank."""
    if recipe.run.deterministic:
        use_deterministic_kernels()
    ranks = start_ranks(longest_wait(recipe))
    datasets = open_datasets(recipe)
    check_split(recipe, datasets, ranks)
    check_same_settings(
        recipe=config.to_dict(recipe),
        deepspeed=complete_settings(recipe, ranks.device.type, ranks.world_size),
        data={name: dataset.summary() for name, dataset in datasets.items()},
    )
    Path(recipe.run.out).mkdir(parents=True, exist_ok=True)
    cases = planned_cases(recipe, datasets, ranks)
    check_memory(cases, ranks.rank)
    engine = build_engine(recipe, ranks)
    state = TrainingState(engine, recipe.optimizer.ema)
    first = restore(recipe, state)
    check_same_on_ranks("at the start", **{"steps that are done": first})
    check_model(recipe, engine, datasets)
    evaluation = TrainingEvaluation(recipe, engine, datasets) if recipe.evaluation.every else None
    if ranks.rank == 0:
        write_recipe(recipe)
    dist.barrier()
    log = RunLog(recipe, first, ranks.rank)
    log.print_line(describe(recipe, engine, state, first))
    # One entry per skipped step since the last step that wasn't skipped: the clips whose loss isn't finite.
    skipped: list[list[str]] = []
    damage = DamageLog(recipe.run.out, recipe.data.max_damaged)

    try:
        waiting = time.perf_counter()
        for step, batches in steps(recipe, datasets, first, engine.replica, engine.replicas):
            waited = time.perf_counter() - waiting
            stage, begin, _ = recipe.span_at(step)
            engine.set_batch(stage.batch)
            engine.model.kept_blocks = cases[recipe.stages.index(stage)].kept_blocks
            engine.set_learning_rate(learning_rate(stage, step - begin))
            metrics, not_finite = train_step(engine, step, batches, recipe, stage)
            if metrics["skipped"]:
                skipped.append(not_finite)
                clips = ", ".join(not_finite) or "none"
                log.print_line(
                    f"step {step + 1}: skipped, its gradient is not finite; clips with non-finite loss: {clips}"
                )
            else:
                state.update_average()
                skipped.clear()
            metrics |= {"lr": engine.learning_rate, "data_wait_s": waited}
            report_damage(step + 1, batches, stage.batch, metrics["damaged"], damage, log)
            if evaluation and evaluation.is_due(step + 1):
                metrics["evaluation"] = evaluation.evaluate(step + 1, state)
            log.log(step, stage.name, stage.batch, metrics)
            damage.check()
            if len(skipped) >= recipe.optimizer.max_skipped:
                raise TooManySkippedSteps(skipped_message(recipe, step, skipped))
            if checkpoint_is_due(recipe, step + 1, bool(skipped)):
                saved = checkpoint.save(Path(recipe.run.out), step + 1, state)
                if ranks.rank == 0:
                    ends = {span.end for span in recipe.stage_spans}
                    checkpoint.prune(Path(recipe.run.out), recipe.run.keep, ends)
                log.print_line(f"saved {saved}")
            waiting = time.perf_counter()
    except BaseException:
        log.close(failed=True)
        raise
    log.close()


def train_step(engine: Engine, step: int, batches: list[Batch], recipe: Recipe, stage: Stage) -> tuple[dict, list[str]]:
    """One optimizer step over this rank's micro-batches.

    If the gradient isn't finite on some rank, the step is skipped on all ranks. Returns the metrics over all ranks and,
    for a skipped step, the ids of the clips whose loss isn't finite, on all ranks.
    """
    device = engine.ranks.device
    check_same_shapes(step, batches, stage.history)
    rolls_out = true_on_any_rank([stage.history.needs_rollout(batch) for batch in batches])
    metrics, rollout_seconds, begin, applied = StepMetrics(), 0.0, clock(device), True
    for batch, needed in zip(batches, rolls_out):
        batch = batch.to(device)
        history_begin = clock(device)
        history, level = degraded_history(engine, batch, recipe, stage, needed)
        rollout_seconds += clock(device) - history_begin
        result = training_loss(engine, batch, history, recipe.flow, stage.attention)
        engine.backward(result.loss)
        applied = engine.step()
        metrics.add(batch.ids, MicroStepResult.of(batch, history, level, result), len(batch.damaged))
    seconds = clock(device) - begin
    own = {"skipped": int(not applied), "grad_norm": engine.gradient_norm, "rollout_share": rollout_seconds / seconds}
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


def check_split(recipe: Recipe, datasets: Datasets, ranks: Ranks) -> None:
    """Raises ValueError when ranks, batches or tokens don't split evenly."""
    size = recipe.run.sequence_parallel_size
    if ranks.world_size % size:
        raise ValueError(f"run.sequence_parallel_size={size} does not divide the {ranks.world_size} ranks")
    for stage in recipe.stages:
        micro_steps(stage, recipe.optimizer.micro_batch, ranks.world_size // size)
    for dataset in (part for named in datasets.values() for part in named.parts):
        if dataset.tokens_per_frame % size:
            tokens = f"a latent frame of {dataset.folder} has {dataset.tokens_per_frame} tokens"
            raise ValueError(f"run.sequence_parallel_size={size}: {tokens}, which don't split evenly over {size} ranks")


def planned_cases(recipe: Recipe, datasets: Datasets, ranks: Ranks) -> list[StageCase]:
    """The plan of each stage on the ranks of this run. All ranks have the same: the smallest memory counts."""
    here = ranks_on_this_machine()
    memory_here = torch.tensor(memory_of(ranks.device, here), device=ranks.device)
    dist.all_reduce(memory_here, dist.ReduceOp.MIN)
    cluster = Cluster(
        gpus=ranks.world_size,
        gpus_per_node=min(here, ranks.world_size),
        memory=float(memory_here),
        device=ranks.device.type,
    )
    zero, cases = read_zero(recipe.run.deepspeed), []
    for stage in recipe.stages:
        dataset = datasets[recipe.dataset_of(stage)]
        latent = dataset.card["latent"]
        clip = Clip(dataset.clip_frames(stage), latent["height"], latent["width"])
        cases.append(with_kept_blocks(StageCase(recipe, stage, clip, zero, cluster)))
    return cases


def check_memory(cases: list[StageCase], rank: int) -> None:
    """Raises ValueError, on every rank, when a stage needs more memory than a GPU has. Rank 0 says what would fit."""
    for case in cases:
        if case.cluster.device == "cuda" and not fits(case):
            need = f"stage {case.stage.name} needs {memory(case).peak / GIB:.0f} GiB on each GPU"
            has = f"it has {case.cluster.memory / GIB:.0f} GiB, {ROOM:.0%} of them kept free"
            raise ValueError(f"{need}; {has}" + ("" if rank else f"; {what_fits(cases)}"))


def what_fits(cases: list[StageCase]) -> str:
    """The recommended settings for all stages, and the host memory that they take."""
    found = best(cases[0].recipe, [case.clip for case in cases], cases[0].cluster)
    if not found.overrides:
        return found.why
    host = max(memory(case).host for case in found.cases)
    taking = f", with {host / GIB:.0f} GiB of host memory for each GPU" if host else ""
    return f"these settings fit{taking}: {' '.join(found.overrides)}"


def check_model(recipe: Recipe, engine: Engine, datasets: Datasets) -> None:
    """Runs the self-test on the engine's model, and makes the history of each stage once, on random clips."""
    frames = [datasets[recipe.dataset_of(stage)].clip_frames(stage) for stage in recipe.stages]
    chunks = [len(engine.chunking.sizes(count)) for count in frames]
    with engine.gathered_parameters(blocks=None if recipe.run.gather_for_rollout else 2) as model:
        self_test(model, max(chunks), [stage.attention for stage in recipe.stages])
        for stage, count in zip(recipe.stages, chunks):
            check_history(stage.history, model, stage.attention, count)


def clock(device: torch.device) -> float:
    """The time in seconds, after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def learning_rate(stage: Stage, step_in_stage: int) -> float:
    """Rises linearly over the first `warmup` steps; falls linearly to `lr_end` by the stage's end if that is set."""
    end = stage.lr_end or stage.lr
    falling = stage.lr + (end - stage.lr) * step_in_stage / max(1, stage.steps - 1)
    return falling * min(1.0, (step_in_stage + 1) / (stage.warmup + 1))


def checkpoint_is_due(recipe: Recipe, done: int, skipped: bool) -> bool:
    """Whether to save a checkpoint after `done` steps. While steps are skipped, none is saved but at the last step."""
    due = done % recipe.run.save_every == 0 or done in {span.end for span in recipe.stage_spans}
    return due and (not skipped or done == recipe.steps)


def skipped_message(recipe: Recipe, step: int, skipped: list[list[str]]) -> str:
    """The error of a run that stops at the 0-based `step`: clips of the skipped steps, and the newest checkpoint."""
    clips = ", ".join(sorted({clip for clips in skipped for clip in clips})) or "none, only the gradient"
    newest = checkpoint.latest(Path(recipe.run.out)) or "none"
    return (
        f"step {step + 1}: {len(skipped)} steps in a row were skipped, because their gradient is not finite; "
        f"no checkpoint was saved meanwhile. Clips whose loss is not finite: {clips}. Newest checkpoint: {newest}. "
        "Look at these clips, or resume with a lower learning rate"
    )


def restore(recipe: Recipe, state: TrainingState) -> int:
    """Loads the run's newest checkpoint, or else what `start` names. Returns the number of steps already done."""
    folder = checkpoint.latest(Path(recipe.run.out))
    if folder is None and recipe.start.run:
        folder = checkpoint.at_step(Path(recipe.start.run), recipe.start.step)
    if folder is not None:
        manifest = checkpoint.verified(folder)
        state.load(folder, manifest)
        return manifest["step"]
    if recipe.start.weights:
        files = WeightFiles(recipe.start.weights)
        files.check(state.shapes)
        state.load_weights(files.flat, files.whole)
    return 0


def finished(recipe: Recipe) -> bool:
    """True when the run's newest checkpoint is the recipe's last step."""
    folder = checkpoint.latest(Path(recipe.run.out))
    return folder is not None and checkpoint.step_of(folder) >= recipe.steps


def write_recipe(recipe: Recipe) -> None:
    """Writes the complete recipe into the run's folder. Prints what has changed since the run began."""
    out = Path(recipe.run.out)
    out.mkdir(parents=True, exist_ok=True)
    path, new = out / "recipe.yaml", config.to_dict(recipe)
    if path.is_file():
        for key, was, now in recipe_changes(path, new):
            print(f"the recipe has changed since this run began: {key}: {was!r} -> {now!r}", file=sys.stderr)
    write_atomic(path, yaml.safe_dump(new, sort_keys=False))


def recipe_changes(path: Path, new: dict) -> list[tuple[str, object, object]]:
    """(dotted path, old value, new value) of what differs from the recipe in `path`.

    A setting that is missing in the file had its default.
    """
    old = config.read_plain(path)
    try:
        old = config.to_dict(config.from_dict(old))
    except ValueError as error:  # written by another version
        print(f"{path} was written by another version ({error})", file=sys.stderr)
        return []
    return differences(old, new)


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
    return (
        f"ZeRO stage {engine.zero_stage}, {ranks.world_size} ranks on {ranks.device.type} ({dist.get_backend()}); "
        f"{total:,} parameters, {own:,} on this rank; {start}\nstages: {', '.join(stages)}"
    )


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
    try:
        recipe = config.load(config.recipe_path(options.recipe), options.overrides)
        if finished(recipe):
            if rank == 0:
                print(f"{recipe.run.out}: all {recipe.steps} steps are done already")
            return 0
        with naming_lost_peers():
            train(recipe)
        # Only after success: with NCCL it waits for kernels that peers may never join.
        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException as error:
        _kept_alive.append(error)
        return report_failure(error, rank, [options.recipe, *options.overrides])
    return 0


FORESEEN = (ValueError, RunError, OSError)  # their message is for people

# The errors of this process. Their frames hold the engine, and DeepSpeed's destructor waits for the GPU.
_kept_alive: list[BaseException] = []


def report_failure(error: BaseException, rank: int, recipe: list[str]) -> int:
    """Prints what ended the training. Returns the exit code. `recipe` is its part of the command line."""
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr, flush=True)
        return INTERRUPTED
    if isinstance(error, torch.cuda.OutOfMemoryError):
        error = OutOfMemory(out_of_memory_message(error, recipe))
    print_error(error, rank)
    return BAD_INPUT if isinstance(error, FORESEEN) else UNFORESEEN


def out_of_memory_message(error: torch.cuda.OutOfMemoryError, recipe: list[str]) -> str:
    """What happened, what to look at, and what to change."""
    memory_here = f" --gpu-memory {torch.cuda.mem_get_info()[1] / GIB:.0f}" if torch.cuda.is_available() else ""
    plan = f"python -m rf_train.plan {shlex.join(recipe)} --gpus {os.environ.get('WORLD_SIZE', 1)}{memory_here}"
    said = ". ".join(one_line(error).split(". ")[:3])
    return (
        f"out of memory ({said}). This shows what the recipe needs: {plan}. Lower optimizer.micro_batch, set "
        "model.checkpointing=block, or raise run.sequence_parallel_size"
    )


def print_error(error: BaseException, rank: int) -> None:
    """Prints an error in one line, after the traceback of an unforeseen one.

    Rank 0 prints an error that all ranks share. The others wait for it first, and the launcher may end them meanwhile.
    """
    foreseen = isinstance(error, FORESEEN)
    if rank and foreseen and not isinstance(error, (PeerLost, RolloutMismatch, OutOfMemory)):
        time.sleep(5)
    trace, kind = ("", "") if foreseen else ("".join(traceback.format_exception(error)), f"{type(error).__name__}: ")
    where = f" on rank {rank}" if rank else ""
    print(f"{trace}error{where}: {kind}{one_line(error)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # All is saved and closed. A normal exit would sometimes abort in gloo's threads, or wait for lost peers.
    os._exit(code)
