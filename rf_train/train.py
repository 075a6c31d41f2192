"""Trains a recipe:  deepspeed --module rf_train.train RECIPE.yaml a.b=c ...

The same command goes on from the run's newest checkpoint; a finished run is left as it is.
"""

import argparse
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
from rf_train.metrics import Metrics
from rf_train.resampling import make_history, stage_attention, training_loss
from rf_train.selftest import self_test
from rf_train.weights import WeightFiles


def train(recipe: config.Recipe) -> None:
    """Runs all stages of `recipe` that its checkpoints don't hold already. Called on every rank."""
    rank, world, device = distributed.start()
    out = Path(recipe.run.out)
    datasets = data.open_datasets(recipe)
    for stage in recipe.stages:
        data.accumulation(stage, recipe.optimizer.micro_batch, world)
    engine = distributed.build_engine(recipe, device, world, data.accumulation(recipe.stages[0], recipe.optimizer.micro_batch, world))
    shards = Shards(engine, recipe.optimizer.ema)
    first = restore(recipe, shards)
    chunks = max(len(engine.module.chunking.sizes(datasets[stage.data or recipe.data.train].frames(stage))) for stage in recipe.stages)
    with distributed.held(engine) as model:
        self_test(model, chunks, [stage_attention(stage) for stage in recipe.stages])
    if rank == 0:
        prepare_folder(recipe, out, datasets)
    dist.barrier()
    metrics = Metrics(recipe, first, rank)
    metrics.say(describe(recipe, engine, shards, world, device, first))
    ends = stage_ends(recipe)

    try:
        for step, batches in data.steps(recipe, datasets, first, rank, world):
            _, stage, inside = recipe.stage_at(step)
            distributed.set_accumulation(engine, stage)
            set_learning_rate(engine, stage, inside)
            figures = train_step(engine, [batch.to(device) for batch in batches], recipe.flow, stage)
            if not math.isfinite(figures["loss"]):
                raise RuntimeError(f"step {step + 1}: the loss is {figures['loss']} on clips {[i for batch in batches for i in batch.ids]} of this rank; nothing was saved")
            shards.update_average()
            metrics.log(step, stage.name, stage.batch, {**figures, "lr": engine.optimizer.param_groups[0]["lr"]})
            done = step + 1
            if done in ends or done % recipe.run.save_every == 0:
                saved = checkpoint.save(out, done, shards)
                if rank == 0:
                    checkpoint.prune(out, recipe.run.keep, ends)
                metrics.say(f"saved {saved}")
    finally:
        metrics.close()


def train_step(engine, batches: list[data.Batch], flow: config.Flow, stage: config.Stage) -> dict:
    """One optimizer step over this rank's micro-batches; returns figures that are the same on every rank."""
    chunking = engine.module.chunking
    device = batches[0].x.device
    sums, rollout_seconds, begin = 0, 0.0, clock(device)
    for batch in batches:
        t0 = clock(device)
        if stage.history in ("parallel", "autoregressive"):
            with distributed.held(engine) as model:
                history, t_s = make_history(model, batch.x, batch.text, batch.draws, stage, chunking)
        else:
            history, t_s = make_history(engine.module, batch.x, batch.text, batch.draws, stage, chunking)
        rollout_seconds += clock(device) - t0
        result = training_loss(EngineModel(engine), batch.x, batch.text, history, batch.draws, flow, stage, chunking)
        engine.backward(result.loss)
        engine.step()
        sums = sums + packed(result.by_chunk, history_error(batch.x, history, chunking), t_s)
    seconds = clock(device) - begin
    return {**unpacked(distributed.sum_over_ranks(sums)), "grad_norm": float(engine.get_global_grad_norm() or 0.0), "rollout_share": rollout_seconds / seconds}


def clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class EngineModel:
    """The engine, called as the model is: ZeRO-3's gathers and DeepSpeed's bookkeeping happen around the model's forward."""

    def __init__(self, engine):
        self.engine, self.settings = engine, engine.module.settings

    def __call__(self, **arguments) -> Tensor:
        return self.engine(**arguments)


def history_error(x: Tensor, history: Tensor | None, chunking) -> Tensor:
    """[B, N]: root mean square distance of x~ from x by chunk; 0 for the last chunk, which has no history copy."""
    sizes = chunking.sizes(x.shape[2])
    error = x.new_zeros(len(x), len(sizes))
    if history is not None:
        square = (history.float() - x[:, :, : history.shape[2]]).square().mean(dim=(1, 3, 4))
        for index, part in enumerate(square.split(sizes[:-1], dim=1)):
            error[:, index] = part.mean(dim=1).sqrt()
    return error


def packed(by_chunk: Tensor, error: Tensor, t_s: Tensor) -> Tensor:
    """Sums over clips in one fp64 vector: count, t_s, then loss and history error by chunk. One reduction a step."""
    count = torch.tensor([float(len(by_chunk))], dtype=torch.float64, device=by_chunk.device)
    return torch.cat([count, t_s.double().sum()[None], by_chunk.double().sum(0), error.double().sum(0)])


def unpacked(total: Tensor) -> dict:
    mean = (total[1:] / total[0]).tolist()
    chunks = (len(mean) - 1) // 2
    loss, error = mean[1 : 1 + chunks], mean[1 + chunks :]
    return {"loss": sum(loss) / chunks, "loss_by_chunk": loss, "t_s": mean[0], "history_error_by_chunk": error[:-1]}


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
    mine = sum(slice.numel() for slice in shards.master.values())
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
        if isinstance(error, RuntimeError) and not str(error).startswith("step "):
            raise
        if rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
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
