"""Measures parts of the project:  python -m rf_train.bench NAME

Each prints a table for people and, as its last line, one JSON object with the same figures. Things that are compared
are measured in turn, in one run. Figures are ratios of medians, because machines are noisy.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from data_prep.command import Help, run_command
from rf_train.bench_attention import attention_flop, bench_attention, bench_routing
from rf_train.bench_checkpoint import bench_checkpoint
from rf_train.bench_data import MANY, bench_data
from rf_train.bench_generate import bench_generate
from rf_train.bench_gpu import bench_gpu, random_batch
from rf_train.bench_self_forcing import MODEL_FILE
from rf_train.bench_timing import Result, device, dtype, machine, timed
from rf_train.bench_traffic import bench_traffic
from rf_train.config import Recipe, Stage
from rf_train.diffusion.batch import Batch
from rf_train.diffusion.flow_matching import FlowSettings
from rf_train.diffusion.histories import make_history
from rf_train.diffusion.loss import training_loss
from rf_train.engine.collectives import start_ranks
from rf_train.engine.zero import build_engine
from rf_train.model.chunks import Dense
from rf_train.model.settings import ModelSettings
from rf_train.model.transformer import CausalWan
from rf_train.planning.costs import Clip


def linear_parameters(model: torch.nn.Module) -> int:
    """Parameters of the blocks' linear layers that run over the clip's tokens: all but cross-attention's k and v."""
    over_text = ("attn2.to_k", "attn2.to_v")
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if name.startswith("blocks.") and parameter.dim() == 2 and not any(part in name for part in over_text)
    )


def bench_model(options: argparse.Namespace) -> Result:
    """Compares the FLOP/s of a two-stream training step with those of diffusers' Wan: same size, as many tokens."""
    from diffusers import WanTransformer3DModel

    chunks, side, chunk = options.chunks, options.side, options.frames
    settings = ModelSettings(
        dim=384, ffn_dim=1536, heads=6, layers=4, text_dim=64, text_len=64, chunk=chunk, first_chunk=chunk,
        checkpointing="none",
    )  # fmt: skip
    ours = CausalWan(settings).to(device(), dtype())
    theirs = WanTransformer3DModel(
        num_attention_heads=settings.heads, attention_head_dim=settings.head_dim, in_channels=settings.channels,
        out_channels=settings.channels, text_dim=settings.text_dim, freq_dim=settings.freq_dim,
        ffn_dim=settings.ffn_dim, num_layers=settings.layers,
    ).to(device(), dtype())  # fmt: skip
    tokens, clean, own = side * side, (chunks - 1) * chunk, chunks * chunk
    frames = clean + own
    x = torch.randn(1, settings.channels, frames, 2 * side, 2 * side, device=device(), dtype=dtype())
    text = torch.randn(1, settings.text_len, settings.text_dim, device=device(), dtype=dtype())
    t, timestep = torch.rand(1, own, device=device()), 500 * torch.ones(1, device=device())

    def step_of_ours() -> None:
        v = ours(noisy=x[:, :, :own], t=t, history=x[:, :, :clean], text=text, attention=Dense())
        v.float().square().mean().backward()

    def step_of_theirs() -> None:
        v = theirs(hidden_states=x, timestep=timestep, encoder_hidden_states=text, return_dict=False)[0]
        v.float().square().mean().backward()

    seconds = timed({"two streams": step_of_ours, "diffusers": step_of_theirs}, options.rounds)
    parameters = linear_parameters(ours)
    linear = 2.0 * parameters * frames * tokens
    # In the last block, history tokens only give keys and values.
    skipped = 2.0 * (parameters - 2 * settings.dim**2) / settings.layers * clean * tokens
    cross = 4.0 * settings.dim * settings.text_len * tokens  # per frame and block
    ours_per_block = attention_flop(settings.heads, settings.head_dim, chunk * tokens, chunks)
    theirs_per_block = 4.0 * settings.dim * (frames * tokens) ** 2
    blocks = settings.layers - 1 + (chunks + 1) / (2 * chunks)  # the last one: N (N + 1) / 2 pairs of chunks, not N^2
    flop = {
        "two streams": 3 * (linear - skipped + cross * (frames * settings.layers - clean) + ours_per_block * blocks),
        "diffusers": 3 * (linear + cross * frames * settings.layers + theirs_per_block * settings.layers),
    }
    rate = {name: flop[name] / seconds[name] for name in seconds}
    figures = {
        **machine("model"),
        "chunks": chunks,
        "tokens_per_chunk": chunk * tokens,
        "flop_rate_over_diffusers": rate["two streams"] / rate["diffusers"],
        "seconds_over_diffusers": seconds["two streams"] / seconds["diffusers"],
        "gflop_per_s": rate["two streams"] / 1e9,
    }
    size = f"{frames} latent frames of {tokens} tokens, width {settings.dim}, {settings.layers} layers"
    lines = [f"a training step, {size}, {dtype()}, {device()}"]
    for name, value in seconds.items():
        ms, gflop, gflops = value * 1e3, flop[name] / 1e9, rate[name] / 1e9
        lines.append(f"  {name:<12} {ms:9.1f} ms   {gflop:8.1f} GFLOP   {gflops:8.1f} GFLOP/s")
    rate_share, time_share = figures["flop_rate_over_diffusers"], figures["seconds_over_diffusers"]
    lines.append(f"  two streams run at {rate_share:.2f} of diffusers' FLOP/s, in {time_share:.2f} of its time")
    return lines, figures


def bench_step(options: argparse.Namespace) -> Result:
    """Measures the rollout's share of a self-resampling step, in one process, without sharding."""
    settings = ModelSettings(
        dim=256, ffn_dim=1024, heads=4, layers=4, text_dim=64, text_len=64, checkpointing="block"
    )  # fmt: skip
    model, stage, flow = CausalWan(settings).to(device(), dtype()), Stage(), FlowSettings()
    figures, lines = machine("step"), ["a self-resampling step, with recomputation in backward"]

    def rollout(batch: Batch) -> object:
        return make_history(stage.history, batch, stage.attention, model)

    def training_pass(batch: Batch) -> None:
        history = batch.x[:, :, : batch.history_frames]
        training_loss(model, batch, history, flow, stage.attention).loss.backward()

    for chunks in (7, 21):
        side = settings.patch * options.side
        batch = random_batch(settings, Clip(chunks * settings.chunk, side, side)).to(device())
        seconds = timed({"rollout": partial(rollout, batch), "training": partial(training_pass, batch)}, options.rounds)
        share = seconds["rollout"] / sum(seconds.values())
        figures[f"rollout_share_{chunks}"] = share
        rollout_ms, training_ms = seconds["rollout"] * 1e3, seconds["training"] * 1e3
        lines.append(
            f"  {chunks:>2} chunks: rollout {rollout_ms:8.1f} ms, training pass {training_ms:8.1f} ms, "
            f"the rollout's share {100 * share:.1f} %"
        )
    return lines, figures


def bench_rollout(options: argparse.Namespace) -> Result:
    """Compares a sharded rollout that gathers parameters once with one that gathers them in every pass.

    It also times the training pass after each. Run it under a launcher.
    """
    ranks = start_ranks()
    settings = ModelSettings(dim=256, ffn_dim=1024, heads=4, layers=8, text_dim=64, text_len=64)
    recipe = Recipe(model=settings, stages=(Stage(batch=ranks.world_size),))
    stage, chunks = recipe.stages[0], min(options.chunks, 7)
    batch = random_batch(settings, Clip(chunks * settings.chunk, 16, 16)).to(device())
    passes = len(stage.history.rollout_passes(batch.chunk_sizes))
    gathers = {"once": True, "in every pass": False}
    engines = {name: build_engine(recipe, ranks) for name in gathers}
    seconds: dict[str, list[float]] = {}
    losses: dict[str, list[float]] = {name: [] for name in gathers}
    for turn in range(options.rounds + 3):  # the first three settle ZeRO-3's trace
        for name, engine in engines.items():
            dist.barrier()
            begin = time.perf_counter()
            with engine.rollout(passes, gathers[name]) as model:
                history, _ = make_history(stage.history, batch, stage.attention, model)
            between = time.perf_counter()
            result = training_loss(engine, batch, history, recipe.flow, stage.attention)
            engine.backward(result.loss)
            engine.step()
            end = time.perf_counter()
            losses[name].append(result.loss.item())
            if turn >= 3:
                seconds.setdefault(f"rollout {name}", []).append(between - begin)
                seconds.setdefault(f"training {name}", []).append(end - between)
    middle = {name: median(values) for name, values in seconds.items()}
    ratio = {part: middle[f"{part} in every pass"] / middle[f"{part} once"] for part in ("rollout", "training")}
    difference = max(abs(a - b) for a, b in zip(*losses.values()))
    figures = {
        **machine("rollout"),
        "ranks": ranks.world_size,
        "chunks": chunks,
        "rollout_gathered_per_pass_over_once": ratio["rollout"],
        "training_gathered_per_pass_over_once": ratio["training"],
        "largest_difference_of_loss": difference,
    }
    size = f"{settings.layers} blocks, ZeRO-3 on {ranks.world_size} ranks"
    lines = [f"a rollout of {chunks} chunks and the training pass after it, {size}"]
    for name in gathers:
        rollout_ms, training_ms = middle[f"rollout {name}"] * 1e3, middle[f"training {name}"] * 1e3
        lines.append(f"  gathered {name:<13} rollout {rollout_ms:8.1f} ms, training pass {training_ms:8.1f} ms")
    lines.append(
        f"  gathering in every pass takes {ratio['rollout']:.2f} x as long for the rollout; "
        f"losses differ by {difference:.1e} at most"
    )
    return (lines, figures) if ranks.rank == 0 else ([], {})


BENCHES: dict[str, Callable[[argparse.Namespace], Result]] = {
    "attention": bench_attention,
    "routing": bench_routing,
    "model": bench_model,
    "step": bench_step,
    "rollout": bench_rollout,
    "generate": bench_generate,
    "data": bench_data,
    "checkpoint": bench_checkpoint,
    "traffic": bench_traffic,
    "gpu": bench_gpu,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="rf_train.bench", formatter_class=Help, description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("name", choices=BENCHES)
    read_by = dict[str, tuple[str, ...]]()
    timed_in_turn = tuple(name for name in BENCHES if name not in ("traffic", "gpu"))

    def add(flag: str, benches: tuple[str, ...], text: str, **settings: Any) -> None:
        """An option that these benchmarks read."""
        read_by[parser.add_argument(flag, help=f"{', '.join(benches)}: {text}", **settings).dest] = benches

    add("--chunks", ("attention", "routing", "model", "rollout"), "chunks of a clip", type=int, default=21)
    add("--tokens", ("attention", "routing"), "tokens per chunk", type=int, default=128)
    add("--heads", ("attention", "routing"), "heads", type=int, default=4)
    add("--top-k", ("routing",), "chunks that a query chooses", type=int, default=5)
    add("--side", ("model", "step"), "a latent frame is side x side tokens", type=int, default=8)
    add("--frames", ("model",), "latent frames per chunk", type=int, default=3)
    add("--rounds", timed_in_turn, "times that each is measured", type=int, default=5)
    add("--video-frames", ("generate",), "frames of the long video", type=int, default=10_000)
    add("--samples", ("data",), "samples of Wan's size that are read", type=int, default=64)
    add("--steps", ("data",), "training steps of the demo's model", type=int, default=20)
    add("--index-samples", ("data",), "made-up samples of the large index", type=int, default=MANY)
    add("--layers", ("checkpoint",), "blocks of 68 MiB each", type=int, default=15)
    add("--minutes", ("gpu",), "no part begins after this time", type=float, default=10.0)
    add("--part", ("gpu",), "only parts that begin so; can be given again", action="append", default=[])
    add("--out", ("gpu", "checkpoint"), "the folder to write into (default: runs/bench_NAME)")
    add("--self-forcing", ("gpu",), "a copy of Self-Forcing's repository, to compare with", type=Path)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the launcher
    options = parser.parse_args(arguments)
    unread = [name for name, benches in read_by.items() if options.name not in benches]
    changed = [name for name in unread if getattr(options, name) != parser.get_default(name)]
    return run_command(lambda: run_bench(options, changed))


def run_bench(options: argparse.Namespace, unread: list[str]) -> None:
    """Prints what a benchmark finds. Raises ValueError for options that make no sense, or that it does not read."""
    if unread:
        raise ValueError(f"--{unread[0].replace('_', '-')}: {options.name} does not read it; see --help")
    for name, value in vars(options).items():
        if isinstance(value, int) and name != "local_rank" and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    if options.self_forcing is not None and not (options.self_forcing / MODEL_FILE).is_file():
        raise ValueError(f"--self-forcing {options.self_forcing}: has no {MODEL_FILE}")
    if options.out and Path(options.out).is_file():
        raise ValueError(f"--out {options.out}: a file is there; give a folder")
    if not 0 <= options.minutes < float("inf"):
        raise ValueError(f"--minutes {options.minutes}: must be at least 0")
    lines, figures = BENCHES[options.name](options)
    if figures:
        print("\n".join([*lines, json.dumps(figures)]), flush=True)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # ranks exit without tearing down gloo, as in rf_train.train
