"""Measures parts of the project:  python -m rf_train.bench NAME

Each prints a table for people and, as its last line, one JSON object with the same figures. Things that are compared
are measured in turn, in one run. Figures are ratios of medians, because machines are noisy.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from data_prep.command import Help, run_command
from rf_train.bench_checkpoint import bench_checkpoint
from rf_train.bench_data import MANY, bench_data
from rf_train.bench_generate import bench_generate
from rf_train.bench_gpu import bench_gpu, random_batch, two_streams, visible
from rf_train.bench_self_forcing import MODEL_FILE
from rf_train.bench_traffic import bench_traffic
from rf_train.config import Recipe, Stage
from rf_train.diffusion.batch import Batch
from rf_train.diffusion.flow_matching import FlowSettings
from rf_train.diffusion.histories import make_history
from rf_train.diffusion.loss import training_loss
from rf_train.engine.collectives import start_ranks
from rf_train.engine.zero import build_engine
from rf_train.evaluation.routing_choices import RoutingChoices, counted_choices
from rf_train.model.attention import PassLayout, two_stream_attention
from rf_train.model.chunks import Attention, Chunk, Dense, Routed, attention_at_any_length
from rf_train.model.kv_cache import LayerKVCache, chunk_means
from rf_train.model.routing import RoutedRows, RoutingPlan, choose_slots, masked_routing
from rf_train.model.settings import ModelSettings
from rf_train.model.transformer import CausalWan
from rf_train.planning.costs import Clip

Result = tuple[list[str], dict]  # lines for people, and the figures

MULTIPLICATIONS, SIZE = 8, 1024  # how many products of SIZE x SIZE matrices measure the matmul rate


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype() -> torch.dtype:
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def machine(name: str) -> dict:
    """The first figures of every result: the benchmark, the device, its threads."""
    return {"bench": name, "device": str(device()), "threads": torch.get_num_threads()}


def timed(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each function, called in turn `rounds` times after one warm-up each."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            begin = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    return {name: median(values) for name, values in seconds.items()}


def multiply_matrices(a: Tensor, b: Tensor) -> None:
    for _ in range(MULTIPLICATIONS):
        a @ b


def attention_flop(heads: int, head_dim: int, chunk: int, chunks: int) -> float:
    """Forward FLOP of two-stream attention over N chunks of S tokens.

    Counted from 1, history chunk i < N reads i chunks, and noisy chunk i <= N reads i. That makes N^2 pairs of chunks,
    of 4 S^2 heads head_dim FLOP each.
    """
    return 4.0 * heads * head_dim * chunk**2 * chunks**2


def random_qkv(heads: int, head_dim: int, layout: PassLayout) -> list[Tensor]:
    tokens = sum(chunk.length for chunk in (*layout.history, *layout.noisy))
    shape = (1, heads, tokens, head_dim)
    return [torch.randn(shape, dtype=dtype(), device=device(), requires_grad=True) for _ in range(3)]


def bench_attention(options: argparse.Namespace) -> Result:
    """Compares two-stream attention with attention under a dense mask, and with the device's matrix-multiply rate."""
    heads, chunk, chunks = options.heads, options.tokens, options.chunks
    head_dim = 128 if torch.cuda.is_available() else 64
    layout, mask = two_streams(chunk, chunks, Dense()), visible(chunk, chunks).to(device())
    q, k, v = random_qkv(heads, head_dim, layout)
    grad = torch.randn_like(q)
    a, b = (torch.randn(SIZE, SIZE, dtype=dtype(), device=device()) for _ in range(2))
    functions = {
        "existing pairs": lambda: two_stream_attention(q, k, v, layout).backward(grad),
        "dense mask": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask).backward(grad),
        "matmul": lambda: multiply_matrices(a, b),
    }
    seconds = timed(functions, options.rounds)
    flop = 3.5 * attention_flop(heads, head_dim, chunk, chunks)  # backward: five products to forward's two
    rate = MULTIPLICATIONS * 2 * SIZE**3 / seconds["matmul"]
    few, many = (chunks + 1) // 2, chunks
    small, large = (peak_bytes(heads, head_dim, chunk, n) for n in (few, many))
    token_growth = (2 * many - 1) / (2 * few - 1)
    own = seconds["existing pairs"]
    figures = {
        **machine("attention"),
        "chunks": chunks,
        "tokens_per_chunk": chunk,
        "heads": heads,
        "head_dim": head_dim,
        "speedup_over_dense_mask": seconds["dense mask"] / own,
        "share_of_matmul_rate": flop / own / rate,
        "seconds": own,
        "memory_growth": large / small,
        "token_growth": token_growth,
        "square_growth": token_growth**2,
    }
    of = f"{chunks} chunks of {chunk} tokens, {heads} heads of {head_dim}, {dtype()}, {device()}"
    growth = f"x {large / small:.2f} (tokens x {token_growth:.2f}, their square x {token_growth**2:.2f})"
    lines = [
        f"two-stream attention, forward and backward, {of}",
        f"  existing pairs      {own * 1e3:9.1f} ms   {flop / own / 1e9:8.1f} GFLOP/s",
        f"  dense mask          {seconds['dense mask'] * 1e3:9.1f} ms   "
        f"{figures['speedup_over_dense_mask']:.2f} x as long",
        f"  matrix multiply                    {rate / 1e9:8.1f} GFLOP/s   "
        f"attention runs at {figures['share_of_matmul_rate']:.2f} of it",
        f"  peak memory, {few} -> {many} chunks: {small / 2**20:.1f} -> {large / 2**20:.1f} MiB, {growth}",
    ]
    return lines, figures


def bench_routing(options: argparse.Namespace) -> Result:
    """Compares routed attention with dense attention and with routing under a mask; memory; a generated chunk."""
    heads, chunk, top_k = options.heads, options.tokens, options.top_k
    head_dim = 128 if torch.cuda.is_available() else 64
    few, many = options.chunks, 4 * options.chunks
    if few < 2:
        raise ValueError(f"--chunks {few}: routing needs at least 2, so that there is an earlier one to read")
    seconds: dict[str, float] = {}
    for chunks in (few, many):
        qkv = random_qkv(heads, head_dim, two_streams(chunk, chunks, Dense()))
        grad = torch.randn_like(qkv[0])
        functions: dict[str, Callable[[], object]] = {
            name: partial(forward_and_backward, qkv, two_streams(chunk, chunks, attention), grad)
            for name, attention in ((f"routed {chunks}", Routed(top_k)), (f"dense {chunks}", Dense()))
        }
        if chunks == few:
            functions[f"mask {few}"] = partial(masked_by_chunk, qkv, chunk, few, top_k, grad)
        else:
            choices = RoutingChoices(1, heads, many)
            functions[f"counted {many}"] = partial(counting, choices, functions[f"routed {many}"])
        seconds |= timed(functions, options.rounds)
    early, late = 16, 128  # chunks of history
    steps: dict[str, Callable[[], object]] = {}
    for name, reach in (("chunk", few - 1), ("among all", late)):
        attention = attention_at_any_length(Routed(top_k), reach + 1)
        steps |= {f"{name} {n}": generated_chunk(heads, head_dim, chunk, n, attention, reach) for n in (early, late)}
    seconds |= timed(steps, 4 * options.rounds)
    small, large = (peak_bytes(heads, head_dim, chunk, n, top_k) for n in (few, many))
    read = 2 * sum(min(i, top_k + 1) for i in range(1, many + 1)) - min(many, top_k + 1)
    promise = many**2 / read
    speedups = {n: seconds[f"dense {n}"] / seconds[f"routed {n}"] for n in (few, many)}
    figures = {
        **machine("routing"),
        "tokens_per_chunk": chunk,
        "heads": heads,
        "head_dim": head_dim,
        "top_k": top_k,
        f"speedup_over_dense_{few}": speedups[few],
        f"speedup_over_dense_{many}": speedups[many],
        f"speedup_over_mask_{few}": seconds[f"mask {few}"] / seconds[f"routed {few}"],
        f"share_of_promise_{many}": speedups[many] / promise,
        f"memory_growth_{few}_to_{many}": large / small,
        f"chunk_price_{late}_over_{early}": seconds[f"chunk {late}"] / seconds[f"chunk {early}"],
        "price_of_statistics": seconds[f"counted {many}"] / seconds[f"routed {many}"],
        "price_among_all": seconds[f"among all {late}"] / seconds[f"among all {early}"],
        "seconds": seconds,
    }
    lines = [
        f"routed attention, top {top_k}, {heads} heads of {head_dim}, chunks of {chunk} tokens, {dtype()}, {device()}"
    ]
    lines += [f"  {name:<14} {value * 1e3:8.1f} ms" for name, value in seconds.items()]
    lines.append(
        f"  {many} chunks: {speedups[many]:.2f} x as fast as dense; the saved arithmetic promises {promise:.2f} x"
    )
    lines.append(f"  peak memory, {few} -> {many} chunks: {small / 2**20:.1f} -> {large / 2**20:.1f} MiB")
    return lines, figures


def counting(choices: RoutingChoices, function: Callable[[], object]) -> None:
    with counted_choices(choices):
        function()


def forward_and_backward(qkv: list[Tensor], layout: PassLayout, grad: Tensor) -> None:
    two_stream_attention(qkv[0], qkv[1], qkv[2], layout).backward(grad)


def masked_by_chunk(qkv: list[Tensor], chunk: int, chunks: int, top_k: int, grad: Tensor) -> None:
    """Routing under a mask, one chunk's queries after another, each over the keys that they may read."""
    q, k, v = qkv
    history, outs = (chunks - 1) * chunk, []
    means = chunk_means(k[:, :, :history], [chunk] * (chunks - 1))
    for number in range(2 * chunks - 1):
        earlier = number if number < chunks - 1 else number - (chunks - 1)
        own = slice(number * chunk, (number + 1) * chunk)
        rows = q[:, :, own]
        keys, values = (torch.cat([x[:, :, : earlier * chunk], x[:, :, own]], dim=2) for x in (k, v))
        if earlier <= top_k:
            outs.append(F.scaled_dot_product_attention(rows, keys, values))
            continue
        bounds = tuple(range(0, (earlier + 2) * chunk, chunk))
        plan = RoutingPlan((RoutedRows(chunk, earlier, earlier),), bounds, Routed(top_k))
        outs.append(masked_routing(rows, keys, values, plan, choose_slots(rows, means, plan)))
    torch.cat(outs, dim=2).backward(grad)


def generated_chunk(
    heads: int, head_dim: int, chunk: int, history: int, attention: Attention, reach: int
) -> Callable[[], object]:
    """One layer's attention of a denoising step after `history` chunks, of which the last `reach` are cached."""
    place: dict[str, Any] = {"dtype": dtype(), "device": device()}
    cache = LayerKVCache(1, heads, reach * chunk, chunk, head_dim, sink=0, **place)
    for index in range(history):
        keys = torch.randn(1, heads, chunk, head_dim, **place)
        cache.append(keys, keys, [Chunk(index, chunk)])
    layout = PassLayout((), (Chunk(history, chunk),), attention)
    q, k, v = (torch.randn(1, heads, chunk, head_dim, **place) for _ in range(3))
    return torch.no_grad()(lambda: two_stream_attention(q, k, v, layout, cache))


def run_attention(heads: int, head_dim: int, chunk: int, chunks: int, top_k: int = 0) -> None:
    """One forward and backward of two-stream attention, routed if `top_k` is set."""
    layout = two_streams(chunk, chunks, Routed(top_k) if top_k else Dense())
    q, k, v = random_qkv(heads, head_dim, layout)
    two_stream_attention(q, k, v, layout).sum().backward()


# Runs in a process of its own. Writing 5 to clear_refs resets the peak of resident memory.
_PEAK_ON_CPU = """
import resource, sys
from rf_train.bench import run_attention
heads, head_dim, chunk, chunks, top_k = map(int, sys.argv[1:])
run_attention(heads, head_dim, 16, 2 + 2 * top_k, top_k)
open("/proc/self/clear_refs", "w").write("5")
before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
run_attention(heads, head_dim, chunk, chunks, top_k)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]) * 1024 - before)
"""


def peak_bytes(heads: int, head_dim: int, chunk: int, chunks: int, top_k: int = 0) -> int:
    """Peak memory, in bytes, that forward and backward of two-stream attention add."""
    numbers = (heads, head_dim, chunk, chunks, top_k)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run_attention(*numbers)
        return torch.cuda.max_memory_allocated() - before
    # Freed memory goes back to the system at once. So the peak is what is used, not what the allocator keeps.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", _PEAK_ON_CPU, *map(str, numbers)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(done.stdout.split()[-1])


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
    every, read_by = tuple(BENCHES), dict[str, tuple[str, ...]]()

    def add(flag: str, benches: tuple[str, ...], text: str, **settings: Any) -> None:
        """An option that these benchmarks read."""
        named = text if benches == every else f"{', '.join(benches)}: {text}"
        read_by[parser.add_argument(flag, help=named, **settings).dest] = benches

    add("--chunks", ("attention", "routing", "model", "rollout"), "chunks of a clip", type=int, default=21)
    add("--tokens", ("attention", "routing"), "tokens per chunk", type=int, default=128)
    add("--heads", ("attention", "routing"), "heads", type=int, default=4)
    add("--top-k", ("routing",), "chunks that a query chooses", type=int, default=5)
    add("--side", ("model", "step"), "a latent frame is side x side tokens", type=int, default=8)
    add("--frames", ("model",), "latent frames per chunk", type=int, default=3)
    add("--rounds", every, "times that each is measured", type=int, default=5)
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
