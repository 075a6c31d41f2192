"""Benchmarks of attention: two-stream attention against a dense mask, routing against both; their memory."""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rf_train.bench_gpu import two_streams, visible
from rf_train.bench_timing import Result, device, dtype, machine, timed
from rf_train.evaluation.routing_choices import RoutingChoices, counted_choices
from rf_train.model.attention import PassLayout, two_stream_attention
from rf_train.model.chunks import Attention, Chunk, Dense, Routed, attention_at_any_length
from rf_train.model.kv_cache import LayerKVCache, chunk_means
from rf_train.model.routing import RoutedRows, RoutingPlan, choose_slots, masked_routing

MULTIPLICATIONS, SIZE = 8, 1024  # how many products of SIZE x SIZE matrices measure the matmul rate


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
from rf_train.bench_attention import run_attention
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
