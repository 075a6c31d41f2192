"""Trains a recipe:  deepspeed --module rf_train.train RECIPE.yaml a.b=c ...

The same command goes on from the run's newest checkpoint; a finished run is left as it is.
"""

import argparse
import json
import logging
import math
import os
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from torch import Tensor

from rf_train import checkpoint, config, data, distributed
from rf_train.checkpoint import Shards
from rf_train.distributed import EngineModel
from rf_train.metrics import Metrics
from rf_train.resampling import StepLoss, make_history, stage_attention, training_loss
from rf_train.selftest import self_test
from rf_train.weights import WeightFiles


def train(recipe: config.Recipe) -> None:
    """Runs all stages of `recipe` that its checkpoints don't hold already. Called on every rank."""
    rank, world, device = distributed.start()
    sequence = recipe.run.sequence
    if world % sequence:
        raise ValueError(f"run.sequence={sequence} does not divide the {world} ranks")
    replica, replicas = rank // sequence, world // sequence  # neighbouring ranks share clips
    out = Path(recipe.run.out)
    datasets = data.open_datasets(recipe)
    for stage in recipe.stages:
        data.accumulation(stage, recipe.optimizer.micro_batch, replicas)
    for dataset in datasets.values():
        if dataset.tokens % sequence:
            raise ValueError(f"run.sequence={sequence}: a latent frame of {dataset.folder} has {dataset.tokens} tokens, which don't split evenly over {sequence} ranks")
    check_same(recipe=config.to_dict(recipe), deepspeed=distributed.engine_settings(recipe, device, world), data={name: dataset.summary() for name, dataset in datasets.items()})
    engine = distributed.build_engine(recipe, device, world)
    shards = Shards(engine, recipe.optimizer.ema)
    first = restore(recipe, shards)
    distributed.agree("at the start", **{"steps that are done": first})
    chunks = max(len(engine.module.chunking.sizes(datasets[stage.data or recipe.data.train].frames(stage))) for stage in recipe.stages)
    with distributed.held(engine, blocks=None if recipe.run.held else 2) as model:
        self_test(model, chunks, [stage_attention(stage) for stage in recipe.stages])
    if rank == 0:
        prepare_folder(recipe, out, datasets)
    dist.barrier()
    metrics = Metrics(recipe, first, rank)
    metrics.say(describe(recipe, engine, shards, world, device, first))
    ends = stage_ends(recipe)
    skipped: list[list[str]] = []  # of the last steps in a row that were: the clips whose loss wasn't finite

    try:
        for step, batches in data.steps(recipe, datasets, first, replica, replicas):
            _, stage, inside = recipe.stage_at(step)
            distributed.set_accumulation(engine, stage, sequence)
            set_learning_rate(engine, stage, inside)
            figures, bad = train_step(engine, step, batches, recipe, stage)
            if figures["skipped"]:
                skipped.append(sorted(set(distributed.gather_texts(bad))))
                metrics.say(f"step {step + 1}: skipped, its gradient is not finite; clips with such a loss: {', '.join(skipped[-1]) or 'none'}")
            else:
                shards.update_average()
                skipped.clear()
            metrics.log(step, stage.name, stage.batch, {**figures, "lr": engine.optimizer.param_groups[0]["lr"]})
            if len(skipped) >= recipe.optimizer.max_skipped:
                raise RuntimeError(not_finite(step, skipped, checkpoint.latest(out)))
            done = step + 1
            if (done in ends or done % recipe.run.save_every == 0) and (not skipped or done == recipe.steps):
                saved = checkpoint.save(out, done, shards)
                if rank == 0:
                    checkpoint.prune(out, recipe.run.keep, ends)
                metrics.say(f"saved {saved}")
    finally:
        metrics.close()


def check_same(**settings: dict) -> None:
    """Raises ValueError, on every rank, that names all settings in which a rank differs from rank 0."""
    everyone = [json.loads(text) for text in distributed.gather_texts([json.dumps(settings)])]
    for rank, other in enumerate(everyone):
        found = changes(everyone[0], other)
        if found:
            raise ValueError(f"ranks disagree: {'; '.join(f'{key} is {one!r} on rank 0, {two!r} on rank {rank}' for key, one, two in found)}")


def not_finite(step: int, skipped: list[list[str]], saved: Path | None) -> str:
    """What a run says that stops at the 0-based `step`: the clips of the skipped steps, and the newest checkpoint."""
    clips = sorted({clip for clips in skipped for clip in clips})
    return (
        f"step {step + 1}: {len(skipped)} steps in a row had a gradient that is not finite and were skipped; nothing was saved over them. "
        f"Clips whose loss was not finite: {', '.join(clips) or 'none, the gradient alone'}. The newest checkpoint is {saved or 'not there yet'}; "
        "look at these clips, or go on from it with a lower learning rate"
    )


def train_step(engine, step: int, batches: list[data.Batch], recipe: config.Recipe, stage: config.Stage) -> tuple[dict, list[str]]:
    """One optimizer step over this rank's micro-batches, moved to its device one by one: figures that are the same on every rank, and this rank's clips whose loss isn't finite.

    When any rank's gradient isn't finite, the step is skipped on all of them.
    """
    chunking = engine.module.chunking
    device = distributed.current_device()
    clip = batches[0].x.shape
    names = ("batch", "channels", "latent frames", "latent height", "latent width")
    distributed.agree(f"step {step + 1}", step=step, **{"micro-batches": len(batches)}, chunks=len(chunking.sizes(clip[2])), **dict(zip(names, clip)))
    sums, bad, rollout_seconds, begin = 0, [], 0.0, clock(device)
    for batch in batches:
        batch = batch.to(device)
        t0 = clock(device)
        if stage.history in ("parallel", "autoregressive"):
            with distributed.rollout_model(engine, recipe.run.held) as model:
                history, t_s = make_history(model, batch.x, batch.text, batch.draws, stage, chunking)
        else:
            history, t_s = make_history(engine.module, batch.x, batch.text, batch.draws, stage, chunking)
        rollout_seconds += clock(device) - t0
        result = training_loss(EngineModel(engine), batch.x, batch.text, history, batch.draws, recipe.flow, stage, chunking)
        engine.backward(result.loss)
        engine.step()
        bad += [name for name, good in zip(batch.ids, result.by_chunk.isfinite().all(dim=1).tolist()) if not good]
        sums = sums + packed(result, history_error(batch.x, history, chunking), t_s)
    skipped = not engine.was_step_applied()
    seconds = clock(device) - begin
    figures = unpacked(distributed.sum_over_ranks(sums) / recipe.run.sequence)
    return {**figures, "skipped": int(skipped), "grad_norm": float(engine.get_global_grad_norm() or 0.0), "rollout_share": rollout_seconds / seconds}, bad


def clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def history_error(x: Tensor, history: Tensor | None, chunking) -> Tensor:
    """[B, N]: root mean square distance of x~ from x by chunk; 0 for the last chunk, which has no history copy."""
    sizes = chunking.sizes(x.shape[2])
    error = x.new_zeros(len(x), len(sizes))
    if history is not None:
        square = (history.float() - x[:, :, : history.shape[2]]).square().mean(dim=(1, 3, 4))
        for index, part in enumerate(square.split(sizes[:-1], dim=1)):
            error[:, index] = part.mean(dim=1).sqrt()
    return error


BINS = 10  # of noise levels, [0, 1] in equal parts


def packed(result: StepLoss, error: Tensor, t_s: Tensor) -> Tensor:
    """Sums over clips in one fp64 vector; one reduction a step. Clips whose loss isn't finite are left out.

    Their number, that of the others, t_s, then by bin of noise level: clips by t_s, chunks by t, their loss; then loss and history error by chunk.
    """
    good = result.by_chunk.isfinite().all(dim=1)
    by_chunk, t, error, t_s = (x[good].double() for x in (result.by_chunk, result.t, error, t_s))

    def by_bin(level: Tensor, value: Tensor) -> Tensor:
        return torch.zeros(BINS, dtype=torch.float64, device=level.device).index_add_(0, (level * BINS).long().clamp(0, BINS - 1).flatten(), value.flatten())

    counts = torch.stack([(~good).sum().double(), good.sum().double(), t_s.sum()])
    return torch.cat([counts, by_bin(t_s, torch.ones_like(t_s)), by_bin(t, torch.ones_like(t)), by_bin(t, by_chunk), by_chunk.sum(0), error.sum(0)])


def unpacked(total: Tensor) -> dict:
    """The figures of a step from `packed` sums; what has no clips to be measured on is None."""
    bad, count, t_s, *rest = total.tolist()
    by_t_s, by_t, loss_by_t, by_chunk = rest[:BINS], rest[BINS : 2 * BINS], rest[2 * BINS : 3 * BINS], rest[3 * BINS :]
    chunks = len(by_chunk) // 2
    loss, error = ([share(value, count) for value in part] for part in (by_chunk[:chunks], by_chunk[chunks:]))
    return {
        "loss": sum(loss) / chunks if count else None, "loss_by_chunk": loss, "loss_by_t": [share(value, number) for value, number in zip(loss_by_t, by_t)],
        "t_s": share(t_s, count), "t_s_histogram": [round(value) for value in by_t_s], "history_error_by_chunk": error[:-1], "clips_not_finite": round(bad),
    }  # fmt: skip


def share(total: float, count: float) -> float | None:
    return total / count if count else None


def set_learning_rate(engine, stage: config.Stage, inside: int) -> None:
    """The stage's rate at its 0-based step `inside`."""
    rate = learning_rate(stage, inside)
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


def learning_rate(stage: config.Stage, inside: int) -> float:
    """Rises linearly over the first `warmup` steps; falls linearly to `lr_end` by the stage's end when one is set."""
    end = stage.lr_end or stage.lr
    falling = stage.lr + (end - stage.lr) * inside / max(1, stage.steps - 1)
    return falling * min(1.0, (inside + 1) / (stage.warmup + 1))


def stage_ends(recipe: config.Recipe) -> set[int]:
    """Steps done at the end of each stage."""
    ends, done = set(), 0
    for stage in recipe.stages:
        done += stage.steps
        ends.add(done)
    return ends


def restore(recipe: config.Recipe, shards: Shards) -> int:
    """Loads the run's newest checkpoint, or the one or the weights it starts from; returns the number of steps already done."""
    folder = checkpoint.latest(Path(recipe.run.out))
    if folder is None and recipe.start.run:
        folder = checkpoint.at_step(Path(recipe.start.run), recipe.start.step)
    if folder is None:
        if recipe.start.weights:
            shards.load_weights(WeightFiles(recipe.start.weights))
        return 0
    manifest = checkpoint.verified(folder)
    shards.load(folder, manifest)
    return manifest["step"]


def finished(recipe: config.Recipe) -> bool:
    """True when the run's newest checkpoint is the recipe's last step."""
    folder = checkpoint.latest(Path(recipe.run.out))
    return folder is not None and int(folder.name[5:]) >= recipe.steps


def prepare_folder(recipe: config.Recipe, out: Path, datasets: dict) -> None:
    """Writes the recipe beside the run, and the dataset's card that generation needs. Says what changed in a resumed run's recipe."""
    out.mkdir(parents=True, exist_ok=True)
    path, new = out / "recipe.yaml", config.to_dict(recipe)
    if path.is_file():
        old = yaml.safe_load(path.read_text())
        for key, was, now in changes(old, new):
            print(f"the recipe has changed since this run began: {key}: {was!r} -> {now!r}", file=sys.stderr)
    checkpoint.write_text(path, yaml.safe_dump(new, sort_keys=False))


def changes(old, new, where: str = "") -> list[tuple[str, object, object]]:
    """(dotted key, old value, new value) of everything that differs between two nested settings."""
    if isinstance(old, list) and isinstance(new, list):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(dict.fromkeys([*old, *new]))
        return [c for key in keys for c in changes(old.get(key), new.get(key), f"{where}.{key}" if where else str(key))]
    return [] if old == new else [(where, old, new)]


def describe(recipe: config.Recipe, engine, shards: Shards, world: int, device: torch.device, first: int) -> str:
    total = sum(math.prod(shape) for shape in shards.shapes.values())
    mine = sum(fragment.master.numel() for fragment in shards.mine.values())
    stages = ", ".join(f"{s.name} ({s.history}, {s.attention}, {s.steps} steps of {s.batch})" for s in recipe.stages)
    start = f"going on after step {first}" if first else "from the start"
    return (
        f"ZeRO stage {engine.zero_optimization_stage()}, {world} ranks on {device.type} ({dist.get_backend()}); "
        f"{total:,} parameters, {mine:,} on this rank; {start}\nstages: {stages}"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="rf_train.train", description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped one (demo)")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that replace the recipe's")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the launcher
    options = parser.parse_args(arguments)
    rank = int(os.environ.get("RANK", 0))
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's calls, one line each
    try:
        recipe = config.load(config.recipe_path(options.recipe), options.overrides)
        if finished(recipe):
            if rank == 0:
                print(f"{recipe.run.out}: all {recipe.steps} steps are done already")
            return 0
        train(recipe)
    except (ValueError, RuntimeError) as error:
        lost = any(words in str(error) for words in ("closed by peer", "reset by peer"))
        if isinstance(error, RuntimeError) and not lost and not str(error).startswith("step "):
            raise
        if lost:
            error = f"another rank has stopped, and told why if it could ({str(error).splitlines()[0]})"
        elif rank:
            time.sleep(5)  # rank 0 tells of what went wrong on all; this rank tells only if the launcher leaves it the time
        print(f"error: {error}" if rank == 0 else f"error on rank {rank}: {error}", file=sys.stderr, flush=True)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # all is saved and closed; gloo's threads, held by DeepSpeed's objects, now and then abort a process that takes itself apart
