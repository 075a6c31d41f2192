"""Where the project's measurements live:  python -m rf_train.bench NAME

Each prints a table for people and, as its last line, one JSON object with the same figures. What is compared is measured in turn in one
run, and figures are ratios of medians, since machines are noisy. NAME: attention, model, step, rollout.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from statistics import median
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rf_train import config
from rf_train.attention import two_stream_attention
from rf_train.chunks import Attention, Chunking
from rf_train.model import CausalWan
from rf_train.randomness import draw
from rf_train.resampling import make_history, training_loss


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def timed(functions: dict[str, Callable[[], object]], rounds: int = 7) -> dict[str, float]:
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


def matmul_rate(dtype: torch.dtype, size: int = 1024) -> Callable[[], float]:
    """A function that multiplies two square matrices, and its FLOP as an attribute."""
    a, b = (torch.randn(size, size, dtype=dtype, device=device()) for _ in range(2))

    def multiply():
        for _ in range(8):
            a @ b

    multiply.flop = 8 * 2 * size**3
    return multiply


def attention_flop(heads: int, width: int, chunk: int, chunks: int) -> float:
    """Forward FLOP of two-stream attention: history i meets i chunks (i < N), noisy i meets i: N^2 blocks of 4 S^2 heads width."""
    return 4.0 * heads * width * chunk**2 * chunks**2


def dense_mask(chunk: int, chunks: int) -> Tensor:
    """bool [L, L] over history chunks 1 .. N - 1 and noisy chunks 1 .. N: what a masked implementation builds."""
    index = torch.cat([torch.arange(chunks - 1), torch.arange(chunks)]).repeat_interleave(chunk)
    noisy = torch.arange(len(index)) >= (chunks - 1) * chunk
    q, k = index[:, None], index[None]
    return torch.where(noisy[:, None], (~noisy[None] & (k < q)) | (noisy[None] & (k == q)), ~noisy[None] & (k <= q)).to(device())


def streams(chunk: int, chunks: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    return [(i, chunk) for i in range(chunks - 1)], [(i, chunk) for i in range(chunks)]


def bench_attention(options) -> tuple[list[str], dict]:
    """Two-stream attention against one with a dense mask, and against the device's matrix-multiply rate."""
    heads, width, chunk, chunks = options.heads, 128 if torch.cuda.is_available() else 64, options.tokens, options.chunks
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    length = (2 * chunks - 1) * chunk
    inputs = [torch.randn(1, heads, length, width, dtype=dtype, device=device(), requires_grad=True) for _ in range(3)]
    grad = torch.randn_like(inputs[0])
    mask = dense_mask(chunk, chunks)
    history, noisy = streams(chunk, chunks)

    def ours():
        two_stream_attention(*inputs, history, noisy, Attention()).backward(grad)

    def masked():
        F.scaled_dot_product_attention(*inputs, attn_mask=mask).backward(grad)

    multiply = matmul_rate(dtype)
    seconds = timed({"blocks": ours, "dense mask": masked, "matmul": multiply}, options.rounds)
    flop = 3.5 * attention_flop(heads, width, chunk, chunks)  # backward: five products to forward's two
    rate = multiply.flop / seconds["matmul"]
    memory = {n: peak_bytes(heads, width, chunk, n) for n in ((chunks + 1) // 2, chunks)}
    (few, small), (many, large) = memory.items()
    figures = {
        "bench": "attention", "device": str(device()), "threads": torch.get_num_threads(), "chunks": chunks, "tokens_per_chunk": chunk, "heads": heads, "head_dim": width,
        "speedup_over_dense_mask": seconds["dense mask"] / seconds["blocks"],
        "share_of_matmul_rate": flop / seconds["blocks"] / rate,
        "seconds": seconds["blocks"],
        "memory_growth": large / small, "token_growth": (2 * many - 1) / (2 * few - 1), "square_growth": ((2 * many - 1) / (2 * few - 1)) ** 2,
    }  # fmt: skip
    lines = [
        f"two-stream attention, forward and backward, {chunks} chunks of {chunk} tokens, {heads} heads of {width}, {dtype}, {device()}",
        f"  blocks that exist   {seconds['blocks'] * 1e3:9.1f} ms   {flop / seconds['blocks'] / 1e9:8.1f} GFLOP/s",
        f"  dense mask          {seconds['dense mask'] * 1e3:9.1f} ms   {figures['speedup_over_dense_mask']:.2f} x as long",
        f"  matrix multiply                    {rate / 1e9:8.1f} GFLOP/s   attention runs at {figures['share_of_matmul_rate']:.2f} of it",
        f"  peak memory, {few} -> {many} chunks: {small / 2**20:.1f} -> {large / 2**20:.1f} MiB, x {large / small:.2f} (tokens x {figures['token_growth']:.2f}, their square x {figures['square_growth']:.2f})",
    ]
    return lines, figures


def peak_bytes(heads: int, width: int, chunk: int, chunks: int) -> int:
    """Peak memory that forward and backward of two-stream attention add, in bytes; on a CPU measured in a process of its own."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _one_attention(heads, width, chunk, chunks)
        return torch.cuda.max_memory_allocated() - before
    code = (
        "import resource, sys; from rf_train.bench import _one_attention; h, w, s, n = map(int, sys.argv[1:]);"
        "held = lambda: int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize(); _one_attention(h, w, 16, 2);"
        "open('/proc/self/clear_refs', 'w').write('5'); a = held(); _one_attention(h, w, s, n);"  # 5 resets the peak
        "print(int(next(x for x in open('/proc/self/status') if x.startswith('VmHWM')).split()[1]) * 1024 - a)"
    )
    # Freed memory goes back to the system at once, so that the peak is what is held, not what the allocator keeps.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", code, *map(str, (heads, width, chunk, chunks))], capture_output=True, text=True, check=True, env=environment)
    return int(done.stdout.split()[-1])


def _one_attention(heads: int, width: int, chunk: int, chunks: int) -> None:
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    inputs = [torch.randn(1, heads, (2 * chunks - 1) * chunk, width, dtype=dtype, device=device(), requires_grad=True) for _ in range(3)]
    two_stream_attention(*inputs, *streams(chunk, chunks), Attention()).sum().backward()


def linear_parameters(model: torch.nn.Module) -> int:
    """Parameters of the blocks' token-wise linear layers (those of cross-attention's keys and values, which run over text, left out)."""
    total = 0
    for name, parameter in model.named_parameters():
        if name.startswith("blocks.") and parameter.dim() == 2 and not any(part in name for part in ("attn2.to_k", "attn2.to_v")):
            total += parameter.numel()
    return total


def bench_model(options) -> tuple[list[str], dict]:
    """A two-stream training step's FLOP/s against that of diffusers' own Wan on as many tokens, no checkpointing, same weights' shapes."""
    from diffusers import WanTransformer3DModel

    chunks, side, frames_a_chunk = options.chunks, options.side, options.frames
    settings = config.Model(dim=384, ffn_dim=1536, heads=6, layers=4, text_dim=64, text_len=64, chunk=frames_a_chunk, first_chunk=frames_a_chunk, checkpointing="none")
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    ours = CausalWan(settings).to(device(), dtype)
    theirs = WanTransformer3DModel(
        num_attention_heads=settings.heads, attention_head_dim=settings.dim // settings.heads, in_channels=16, out_channels=16, text_dim=settings.text_dim,
        freq_dim=settings.freq_dim, ffn_dim=settings.ffn_dim, num_layers=settings.layers,
    ).to(device(), dtype)  # fmt: skip
    tokens, clean, own = side * side, (chunks - 1) * frames_a_chunk, chunks * frames_a_chunk
    frames = clean + own
    x = torch.randn(1, 16, frames, 2 * side, 2 * side, device=device(), dtype=dtype)
    text = torch.randn(1, settings.text_len, settings.text_dim, device=device(), dtype=dtype)
    t = torch.rand(1, own, device=device())

    def two_streams():
        ours(noisy=x[:, :, :own], t=t, history=x[:, :, :clean], text=text, attention=Attention()).float().square().mean().backward()

    def one_stream():
        theirs(hidden_states=x, timestep=500 * torch.ones(1, device=device()), encoder_hidden_states=text, return_dict=False)[0].float().square().mean().backward()

    seconds = timed({"two streams": two_streams, "diffusers": one_stream}, options.rounds)
    linear = 2.0 * linear_parameters(ours) * frames * tokens
    skipped = 2.0 * (linear_parameters(ours) - 2 * settings.dim**2) / settings.layers * clean * tokens  # the last block's history, but its keys and values
    cross = 4.0 * settings.dim * settings.text_len * tokens  # a frame and block
    ours_a_block = attention_flop(settings.heads, settings.dim // settings.heads, frames_a_chunk * tokens, chunks)
    theirs_a_block = 4.0 * settings.dim * (frames * tokens) ** 2
    blocks = settings.layers - 1 + (chunks + 1) / (2 * chunks)  # the last one: N (N + 1) / 2 pairs of chunks, not N^2
    flop = {
        "two streams": 3 * (linear - skipped + cross * (frames * settings.layers - clean) + ours_a_block * blocks),
        "diffusers": 3 * (linear + cross * frames * settings.layers + theirs_a_block * settings.layers),
    }
    rate = {name: flop[name] / seconds[name] for name in seconds}
    figures = {
        "bench": "model", "device": str(device()), "threads": torch.get_num_threads(), "chunks": chunks, "tokens_per_chunk": frames_a_chunk * tokens,
        "flop_rate_over_diffusers": rate["two streams"] / rate["diffusers"], "seconds_over_diffusers": seconds["two streams"] / seconds["diffusers"],
        "gflop_per_s": rate["two streams"] / 1e9,
    }  # fmt: skip
    lines = [f"a training step, {frames} latent frames of {tokens} tokens, width {settings.dim}, {settings.layers} layers, {dtype}, {device()}"]
    for name in seconds:
        lines.append(f"  {name:<12} {seconds[name] * 1e3:9.1f} ms   {flop[name] / 1e9:8.1f} GFLOP   {rate[name] / 1e9:8.1f} GFLOP/s")
    lines.append(f"  two streams run at {figures['flop_rate_over_diffusers']:.2f} of diffusers' FLOP/s, in {figures['seconds_over_diffusers']:.2f} of its time")
    return lines, figures


def bench_step(options) -> tuple[list[str], dict]:
    """The rollout's share of a self-resampling step, one process, no sharding."""
    settings = config.Model(dim=256, ffn_dim=1024, heads=4, layers=4, text_dim=64, text_len=64, checkpointing="block")
    model = CausalWan(settings).to(device(), torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    chunking, stage = Chunking(3, 3), config.Stage(history="autoregressive")
    figures, lines = {"bench": "step", "device": str(device()), "threads": torch.get_num_threads()}, ["a self-resampling step, with recomputation in backward"]
    for chunks in (7, 21):
        x = torch.randn(1, 16, 3 * chunks, 2 * options.side, 2 * options.side, device=device())
        text = torch.randn(1, settings.text_len, settings.text_dim, device=device())
        draws = draw(0, 0, ["a"], tuple(x.shape[1:]), chunks).to(device())
        history = x[:, :, : 3 * (chunks - 1)]

        def rollout():
            make_history(model, x, text, draws, stage, chunking)

        def training():
            training_loss(model, x, text, history, draws, config.Flow(), stage, chunking).loss.backward()

        seconds = timed({"rollout": rollout, "training": training}, options.rounds)
        share = seconds["rollout"] / sum(seconds.values())
        figures[f"rollout_share_{chunks}"] = share
        lines.append(f"  {chunks:>2} chunks: rollout {seconds['rollout'] * 1e3:8.1f} ms, training pass {seconds['training'] * 1e3:8.1f} ms, the rollout's share {100 * share:.1f} %")
    return lines, figures


def bench_rollout(options) -> tuple[list[str], dict]:
    """A sharded rollout with parameters held against one that gathers them in every pass, and the training pass after each. Run it under a launcher."""
    import torch.distributed as dist

    from rf_train import distributed

    rank, world, where = distributed.start()
    settings = config.Model(dim=256, ffn_dim=1024, heads=4, layers=8, text_dim=64, text_len=64)
    recipe = config.Recipe(model=settings, stages=(config.Stage(batch=world),))
    chunks = min(options.chunks, 7)
    x, text = torch.randn(1, 16, 3 * chunks, 16, 16, device=where), torch.randn(1, settings.text_len, settings.text_dim, device=where)
    draws = draw(0, 0, ["a"], tuple(x.shape[1:]), chunks).to(where)
    seconds: dict[str, list[float]] = {}
    engines = {name: distributed.build_engine(recipe, where, world) for name in ("held", "plain")}
    losses = {}
    for turn in range(options.rounds + 3):  # the first three settle ZeRO-3's trace
        for name, engine in engines.items():
            dist.barrier()
            begin = time.perf_counter()
            with distributed.rollout_model(engine, name == "held") as model:
                history, _ = make_history(model, x, text, draws, recipe.stages[0], engine.module.chunking)
            between = time.perf_counter()
            result = training_loss(distributed.EngineModel(engine), x, text, history, draws, recipe.flow, recipe.stages[0], engine.module.chunking)
            engine.backward(result.loss)
            engine.step()
            end = time.perf_counter()
            losses.setdefault(name, []).append(result.loss.item())
            if turn >= 3:
                seconds.setdefault(f"{name} rollout", []).append(between - begin)
                seconds.setdefault(f"{name} training", []).append(end - between)
    middle = {name: median(values) for name, values in seconds.items()}
    figures = {
        "bench": "rollout", "device": str(where), "ranks": world, "chunks": chunks,
        "rollout_plain_over_held": middle["plain rollout"] / middle["held rollout"], "training_plain_over_held": middle["plain training"] / middle["held training"],
        "largest_difference_of_loss": max(abs(a - b) for a, b in zip(*losses.values())),
    }  # fmt: skip
    lines = [f"a rollout of {chunks} chunks and the training pass after it, {settings.layers} blocks, ZeRO-3 on {world} ranks"]
    for name in engines:
        lines.append(f"  {name:<6} rollout {middle[name + ' rollout'] * 1e3:8.1f} ms, training pass {middle[name + ' training'] * 1e3:8.1f} ms")
    lines.append(f"  plain takes {figures['rollout_plain_over_held']:.2f} x as long for the rollout; losses differ by {figures['largest_difference_of_loss']:.1e} at most")
    return (lines, figures) if rank == 0 else ([], {})


BENCHES = {"attention": bench_attention, "model": bench_model, "step": bench_step, "rollout": bench_rollout}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="rf_train.bench", description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=BENCHES)
    parser.add_argument("--chunks", type=int, default=21)
    parser.add_argument("--tokens", type=int, default=128, help="attention: tokens a chunk")
    parser.add_argument("--heads", type=int, default=4, help="attention: heads")
    parser.add_argument("--side", type=int, default=8, help="model, step: a latent frame is side x side tokens")
    parser.add_argument("--frames", type=int, default=3, help="model: latent frames a chunk")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the launcher
    options = parser.parse_args(arguments)
    lines, figures = BENCHES[options.name](options)
    if figures:
        print("\n".join([*lines, json.dumps(figures)]), flush=True)
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # ranks leave without taking gloo apart, as in rf_train.train
