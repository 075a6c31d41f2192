"""Everything that is to be measured on a GPU, in one command of about ten minutes:  python -m rf_train.bench gpu

What matters most comes first. Each part writes its figures to `--out` when it is done, so a run that is cut short keeps
them. A part that fails is reported, and the next one goes on. Without a GPU all parts run at toy sizes: a test.
"""

import argparse
import gc
import json
import re
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.files import write_atomic
from rf_train.bench_self_forcing import self_forcing_step
from rf_train.config import EvaluationSettings, OptimizerSettings, Recipe, RunSettings, Stage
from rf_train.diffusion.batch import Batch
from rf_train.diffusion.histories import Autoregressive
from rf_train.diffusion.loss import training_loss
from rf_train.diffusion.randomness import LOSS_DRAWS, make_draws
from rf_train.engine.collectives import Ranks, start_ranks
from rf_train.engine.devices import clock, memory_of
from rf_train.engine.zero import Engine, build_engine
from rf_train.model import elementwise
from rf_train.model.attention import PassLayout, two_stream_attention
from rf_train.model.chunks import Chunk, Dense, Routed
from rf_train.model.kernels import CUDA_KERNELS, use_kernel
from rf_train.model.kv_cache import chunk_means
from rf_train.model.routing import (
    RoutedAttention,
    RoutedRows,
    RoutingPlan,
    choose_slots,
    masked_routing,
    routing_kernels,
)
from rf_train.model.self_test import self_test
from rf_train.model.settings import ModelSettings
from rf_train.model.transformer import PassContext
from rf_train.planning.costs import GIB, Clip, Cluster, StageCase, flop, read_zero
from rf_train.planning.memory import memory, with_kept_blocks
from rf_train.train import degraded_history

PEAK_FLOPS = Cluster().flops  # dense bf16 of an H100 or H200

# Kernel names, by what they do; the first that matches counts.
KERNEL_GROUPS = {
    "attention": r"flash|fmha|sdpa|attention",
    "matrix multiplication": r"gemm|gemv|cutlass|nvjet|cublas|xmma|splitk|mkldnn|addmm|::mm|::bmm",
    "compiled elementwise": r"triton|cpp_fused",
    "copy": r"memcpy|memset",
    "communication": r"nccl",
    "other elementwise": r"",
}


@dataclass(frozen=True)
class Sizes:
    """What is measured: Wan 1.3B at the paper's sizes, or a toy."""

    model: ModelSettings
    short: Clip  # the 5 s stages
    long: Clip  # the 15 s stages
    minute: Clip  # 84 chunks
    top_k: int
    probe: int  # tokens of a chunk where values are compared

    @classmethod
    def of_device(cls, on_gpu: bool) -> "Sizes":
        if on_gpu:
            short, long, minute = (Clip(frames, 60, 104) for frames in (21, 63, 252))
            return cls(ModelSettings(checkpointing="auto"), short, long, minute, 5, 256)
        small = ModelSettings(
            dim=64, ffn_dim=128, heads=2, layers=3, text_dim=16, text_len=8, freq_dim=32, checkpointing="auto"
        )
        return cls(small, Clip(9, 4, 4), Clip(15, 4, 4), Clip(18, 4, 4), 2, 32)


class Bench:
    """The parts, and what they have in common. `results` holds their figures by part."""

    def __init__(self, out: Path, seconds: float, self_forcing: Path | None = None):
        self.ranks: Ranks = start_ranks()
        self.device = self.ranks.device
        self.on_gpu = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32
        self.sizes = Sizes.of_device(self.on_gpu)
        self.kernels = list(CUDA_KERNELS) if self.on_gpu else ["auto"]
        self.out, self.path, self.end = out, out / "results.json", time.monotonic() + seconds
        self.self_forcing = self_forcing  # a copy of its repository, to compare with
        self.results: dict[str, Any] = {}
        self._engine: Engine | None = None

    # ---- running the parts

    def run(self, wanted: list[str]) -> None:
        """Runs the parts that are named in full or by how they begin; all, if none is named."""
        parts = self.parts()
        unknown = [word for word in wanted if not any(name.startswith(word) for name in parts)]
        if unknown:
            raise ValueError(f"--part {unknown[0]}: no such part; the parts are: {'; '.join(parts)}")
        self.out.mkdir(parents=True, exist_ok=True)
        self.path = next(path for path in map(self.numbered, count(1)) if not path.exists())
        for name, part in parts.items():
            if wanted and not any(name == word or (word not in parts and name.startswith(word)) for word in wanted):
                continue
            if time.monotonic() >= self.end:
                self.results[name] = {"skipped": "no time left"}
                self.write()
                continue
            begin = time.monotonic()
            try:
                figures = part()
            except Exception as error:
                traceback.print_exc()
                figures = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
            self.results[name] = {**figures, "part_seconds": time.monotonic() - begin}
            print(f"{name}: {json.dumps(rounded(self.results[name]))}", flush=True)
            self.write()

    def numbered(self, call: int) -> Path:
        """The file of the results of the folder's n-th call: earlier ones are kept."""
        return self.out / ("results.json" if call == 1 else f"results-{call}.json")

    def write(self) -> None:
        write_atomic(self.path, json.dumps(self.results, indent=1))

    def parts(self) -> dict[str, Callable[[], dict]]:
        """The parts by name, the most important ones first."""
        short, long, routed, step = self.sizes.short, self.sizes.long, Routed(self.sizes.top_k), self.step
        found: dict[str, Callable[[], dict]] = {"machine": self.machine}
        found |= {f"values {kernel}": partial(self.kernel_values, kernel) for kernel in self.kernels}
        found |= {"values routed": self.routed_values}
        found |= {f"speed {name}": partial(self.kernel_speed, clip) for name, clip in (("5 s", short), ("15 s", long))}
        found |= {
            "self-test": self.run_self_test,
            "step 5 s": partial(step, short, Dense()),
            "step 15 s, routed": partial(step, long, routed),
            "step 15 s": partial(step, long, Dense(), warm_up=False),
            "block": partial(self.block, True),
            "block, eager": partial(self.block, False),
            "step 5 s, selective": partial(step, short, Dense(), checkpointing="selective"),
            "step 5 s, eager": partial(step, short, Dense(), compiled=False),
            "step 5 s, eager, fa2": partial(step, short, Dense(), compiled=False, kernel="fa2"),
            "speed 60 s": partial(self.kernel_speed, self.sizes.minute, 1),
        }
        if self.self_forcing is not None:
            found["Self-Forcing's step"] = partial(self.step_of_self_forcing, self.self_forcing)
        return found

    # ---- the parts

    def machine(self) -> dict:
        """The device, and its rates in matrix products and in copies."""
        size, bytes_copied = (8192, 2**32) if self.on_gpu else (512, 2**24)
        a, b = (torch.randn(size, size, device=self.device, dtype=self.dtype) for _ in range(2))
        x = torch.empty(bytes_copied, dtype=torch.uint8, device=self.device)
        y = torch.empty_like(x)
        about = {"device": torch.cuda.get_device_name() if self.on_gpu else "cpu", "torch": torch.__version__}
        return {
            **about,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if self.on_gpu else None,
            "matmul_tflops": 2 * size**3 / self.seconds(lambda: a @ b) / 1e12,
            "copy_tb_per_s": 2 * bytes_copied / self.seconds(lambda: y.copy_(x)) / 1e12,
        }

    def kernel_values(self, kernel: str) -> dict:
        """Two-stream attention and its gradients with a kernel, against fp32 under a mask: relative rms errors."""
        use_kernel(kernel)
        heads, head_dim, chunk, chunks = 2, self.sizes.model.head_dim, self.sizes.probe, 7
        layout = two_streams(chunk, chunks, Dense(), kernel)
        tokens = (2 * chunks - 1) * chunk
        q, k, v, weight = (
            torch.randn(1, heads, tokens, head_dim, device=self.device, dtype=self.dtype).requires_grad_()
            for _ in range(4)
        )
        wide = [x.detach().float().requires_grad_() for x in (q, k, v)]
        scores = wide[0] @ wide[1].transpose(2, 3) / head_dim**0.5
        reference = scores.masked_fill(~visible(chunk, chunks).to(self.device), float("-inf")).softmax(-1) @ wide[2]
        ours = two_stream_attention(q, k, v, layout)
        grads = torch.autograd.grad((ours.float() * weight.float()).sum(), (q, k, v))
        expected = torch.autograd.grad((reference * weight.float()).sum(), wide)
        pairs = zip(("out", "dq", "dk", "dv"), (ours, *grads), (reference, *expected))
        return {name: relative(one, other) for name, one, other in pairs}

    def routed_values(self) -> dict:
        """The fast path of routing and its gradients against the masked reference, with the same choices."""
        heads, head_dim, chunk, chunks = 3, self.sizes.model.head_dim, self.sizes.probe, 8
        shape = (1, heads, (chunks + 1) * chunk, head_dim)
        q, k, v, weight = (torch.randn(shape, device=self.device, dtype=self.dtype).requires_grad_() for _ in range(4))
        q, weight = (x[:, :, -chunk:].detach().clone().requires_grad_() for x in (q, weight))
        bounds = tuple(range(0, (chunks + 2) * chunk, chunk))
        plan = RoutingPlan((RoutedRows(chunk, chunks, chunks),), bounds, Routed(self.sizes.top_k))
        slots = choose_slots(q, chunk_means(k[:, :, : chunks * chunk], [chunk] * chunks), plan)
        kernels = routing_kernels(q)
        assert kernels is not None
        wide = [x.detach().float().requires_grad_() for x in (q, k, v)]
        one = RoutedAttention.apply(q, k, v, slots, plan, kernels, None)
        other = masked_routing(wide[0], wide[1], wide[2], plan, slots)
        grads = torch.autograd.grad((one.float() * weight.float()).sum(), (q, k, v))
        expected = torch.autograd.grad((other * weight.float()).sum(), wide)
        pairs = zip(("out", "dq", "dk", "dv"), (one, *grads), (other, *expected))
        return {name: relative(mine, theirs) for name, mine, theirs in pairs}

    def kernel_speed(self, clip: Clip, rounds: int = 3) -> dict:
        """Two-stream attention of one block, compiled: seconds, TFLOP/s of dense kernels, and routing beside them."""
        model, found = self.sizes.model, dict[str, dict[str, Any]]()
        chunk, chunks = model.chunk * model.tokens_per_frame(clip.height, clip.width), clip.frames // model.chunk
        shape = (1, (2 * chunks - 1) * chunk, model.heads, model.head_dim)  # in memory as the linear layers write it
        q, k, v, grad = (torch.randn(shape, device=self.device, dtype=self.dtype).transpose(1, 2) for _ in range(4))
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        work, dense = 4.0 * model.dim * chunk**2 * chunks**2, dict[str, float]()
        cases = [(kernel, Dense()) for kernel in self.kernels] + [("auto", Routed(self.sizes.top_k))]
        for kernel, attention in cases:
            layout = two_streams(chunk, chunks, attention, kernel)
            run, routed = partial(two_stream_attention, q, k, v, layout), isinstance(attention, Routed)
            try:
                use_kernel(kernel)
                with elementwise.compiled(True):
                    forward = self.seconds(torch.no_grad()(run), rounds)
                    both = self.seconds(partial(backward_of, run, grad), rounds)
            except (ValueError, RuntimeError) as error:
                found["routed" if routed else kernel] = {"failed": str(error).splitlines()[0]}
                continue
            backward = both - forward if both > forward else None  # at toy sizes noise is larger
            figures = {"forward_s": forward, "backward_s": backward}
            if routed:
                found["routed"] = {**figures, "promised_speedup": promised_speedup(chunks, self.sizes.top_k)}
                found["routed"] |= {f"speedup_over_{name}": seconds / both for name, seconds in dense.items()}
            else:
                dense[kernel] = both
                rates = {
                    "forward_tflops": work / forward / 1e12,
                    "backward_tflops": 2.5 * work / backward / 1e12 if backward else None,
                }
                found[kernel] = {**figures, **rates}
        return found

    def run_self_test(self) -> dict:
        """The run's own self-test at the model's full size."""
        engine = self.engine()
        with engine.gathered_parameters() as model:
            begin = clock(self.device)
            share = self_test(model, 7, [Dense(), Routed(self.sizes.top_k)])
        return {"seconds": clock(self.device) - begin, "largest_share_of_limit": share}

    def step(
        self, clip: Clip, attention: Dense | Routed, compiled: bool = True, kernel: str = "auto",
        checkpointing: str = "auto", warm_up: bool = True,
    ) -> dict:  # fmt: skip
        """A self-resampling step of one clip: seconds by part, MFU, peak memory against the plan, kernels by group."""
        engine, recipe = self.engine(), self.recipe(clip, attention, compiled, checkpointing)
        cluster = Cluster(gpus=1, device=self.device.type, memory=memory_of(self.device, 1))
        zero = read_zero(recipe.run.deepspeed)
        case = with_kept_blocks(StageCase(recipe, recipe.stages[0], clip, zero, cluster))
        engine.model.settings = replace(engine.model.settings, attention_kernel=kernel, checkpointing=checkpointing)
        engine.model.kept_blocks = case.kept_blocks
        batch = random_batch(recipe.model, clip).to(self.device)
        with elementwise.compiled(compiled):
            before = elementwise.graphs_compiled()
            warm = self.step_seconds(engine, recipe, batch) if warm_up else {}
            graphs = elementwise.graphs_compiled() - before
            if self.on_gpu:
                torch.cuda.reset_peak_memory_stats()
            with kernel_seconds(self.on_gpu) as groups:
                parts = self.step_seconds(engine, recipe, batch)
            again = elementwise.graphs_compiled() - before - graphs
        work = flop(case)
        training = sum(value for name, value in work.items() if name not in ("recomputation", "rollout"))
        seconds = sum(parts.values())
        figures = {
            "kept_blocks": case.kept_blocks,
            "seconds": seconds,
            "first_step_seconds": sum(warm.values()),
            **{f"{name}_s": value for name, value in parts.items()},
            "mfu_of_training_pass": training / (seconds - parts["rollout"]) / PEAK_FLOPS,
            "mfu": (training + work["rollout"]) / seconds / PEAK_FLOPS,
            "graphs_compiled": graphs,
            "graphs_compiled_later": again,
            "kernels_s": groups,
        }
        if self.on_gpu:
            peak, planned = torch.cuda.max_memory_allocated(), memory(case).peak
            figures |= {"peak_gib": peak / GIB, "planned_gib": planned / GIB, "planned_over_peak": planned / peak}
        return figures

    def step_seconds(self, engine: Engine, recipe: Recipe, batch: Batch) -> dict[str, float]:
        """One real step, timed by part."""
        stage, times = recipe.stages[0], [clock(self.device)]
        with torch.no_grad():  # a new model's output is zero, and so would be all gradients but the last layer's
            engine.model.proj_out.weight.normal_(std=0.02)
        history, _ = degraded_history(engine, batch, recipe, stage, True)
        times.append(clock(self.device))
        loss = training_loss(engine, batch, history, recipe.flow, stage.attention).loss
        times.append(clock(self.device))
        engine.backward(loss)
        times.append(clock(self.device))
        engine.step()
        times.append(clock(self.device))
        names = ("rollout", "forward", "backward", "optimizer")
        return {name: after - before for name, before, after in zip(names, times, times[1:])}

    def block(self, compiled: bool) -> dict:
        """Forward and backward of one block at 5 s without recomputation: seconds, kernels by group, memory kept."""
        engine, clip, model = self.engine(), self.sizes.short, self.sizes.model
        frames, tokens = 2 * clip.frames - model.chunk, model.tokens_per_frame(clip.height, clip.width)
        chunks = engine.chunking.chunks(clip.frames)
        scaled = tuple(Chunk(chunk.index, chunk.length * tokens) for chunk in chunks)
        rotary = torch.randn(frames * tokens, model.head_dim // 2, 2, device=self.device)
        context = PassContext(PassLayout(scaled[:-1], scaled, Dense()), rotary, clip.frames - model.chunk, tokens, None)
        x = torch.randn(1, frames, tokens, model.dim, device=self.device, dtype=self.dtype, requires_grad=True)
        modulation = torch.randn(1, frames, 6, model.dim, device=self.device, requires_grad=True)
        text = torch.randn(1, model.text_len, model.dim, device=self.device, dtype=self.dtype)
        kept: list[int] = []
        with engine.gathered_parameters() as whole:
            block = whole.blocks[0]

            def run() -> None:
                with torch.enable_grad():
                    begin = torch.cuda.memory_allocated() if self.on_gpu else 0
                    out = block(x, modulation, text, context)
                    kept.append((torch.cuda.memory_allocated() if self.on_gpu else 0) - begin)
                    torch.autograd.grad(out.float().square().mean(), (x, modulation, *block.parameters()))

            with elementwise.compiled(compiled):
                seconds = self.seconds(run, 3)
                with kernel_seconds(self.on_gpu) as groups:
                    run()
        return {"seconds": seconds, "kept_gib": kept[-1] / GIB, "kernels_s": groups}

    def step_of_self_forcing(self, folder: Path) -> dict:
        """Forward and backward of Self-Forcing's model at 5 s; how many times as fast ours are, if they were timed."""
        if self._engine is not None:  # its memory is needed
            self._engine.destroy()
            self._engine = None
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
        figures = self_forcing_step(folder, self.sizes.model, self.sizes.short, self.device, self.dtype)
        ours = self.results.get("step 5 s", {})
        if "backward_s" in ours:
            figures["our_speedup"] = figures["seconds"] / (ours["forward_s"] + ours["backward_s"])
        return figures

    # ---- what the parts share

    def seconds(self, function: Callable[[], object], rounds: int = 5) -> float:
        """Median seconds of a call, after one to warm up."""
        found = []
        for turn in range(rounds + 1):
            begin = clock(self.device)
            function()
            if turn:
                found.append(clock(self.device) - begin)
        return sorted(found)[len(found) // 2]

    def recipe(
        self, clip: Clip, attention: Dense | Routed, compiled: bool = True, checkpointing: str = "auto"
    ) -> Recipe:
        stage = Stage(history=Autoregressive(), attention=attention, frames=clip.frames, batch=1, lr=1e-5)
        return Recipe(
            model=replace(self.sizes.model, checkpointing=checkpointing),
            optimizer=OptimizerSettings(ema=0.0),
            evaluation=EvaluationSettings(),
            run=RunSettings(deepspeed="ds_configs/zero2.json", compile=compiled),
            stages=(stage,),
        )

    def engine(self) -> Engine:
        """One engine for all parts: the model's size is the same in all."""
        if self._engine is None:
            gc.collect()
            self._engine = build_engine(self.recipe(self.sizes.short, Dense()), self.ranks)
            self._engine.set_batch(1)
        return self._engine


def random_batch(model: ModelSettings, clip: Clip) -> Batch:
    """One random clip, with the draws of self-resampling."""
    shape = (model.channels, clip.frames, clip.height, clip.width)
    sizes = model.chunking.sizes(clip.frames)
    draws = make_draws({**LOSS_DRAWS, **Autoregressive.draws}, 0, 0, ["a"], shape, len(sizes))
    return Batch(["a"], torch.randn(1, *shape), torch.randn(1, model.text_len, model.text_dim), draws, sizes)


def two_streams(chunk: int, chunks: int, attention: Dense | Routed, kernel: str = "auto") -> PassLayout:
    """A training pass of N chunks of `chunk` tokens."""
    every = tuple(Chunk(index, chunk) for index in range(chunks))
    return PassLayout(every[:-1], every, attention, kernel=kernel)


def backward_of(run: Callable[[], Tensor], grad: Tensor) -> None:
    run().backward(grad)


def promised_speedup(chunks: int, top_k: int) -> float:
    """Pairs of chunks that dense attention reads, over those that routing reads: both streams of N chunks."""
    read = [min(index, top_k + 1) for index in range(1, chunks + 1)]
    return chunks**2 / (2 * sum(read) - read[-1])


def visible(chunk: int, chunks: int) -> Tensor:
    """bool [L, L] over history chunks 1 .. N - 1, then noisy chunks 1 .. N: who reads whom (Figure 3c)."""
    index = torch.cat([torch.arange(chunks - 1), torch.arange(chunks)]).repeat_interleave(chunk)
    noisy = torch.arange(len(index)) >= (chunks - 1) * chunk
    q, k = index[:, None], index[None]
    of_noisy = (~noisy[None] & (k < q)) | (noisy[None] & (k == q))
    return torch.where(noisy[:, None], of_noisy, ~noisy[None] & (k <= q))


def relative(one: Tensor, other: Tensor) -> float:
    """|one - other| / |other|, in fp32."""
    return ((one.float() - other.float()).norm() / other.float().norm()).item()


@contextmanager
def kernel_seconds(on_gpu: bool) -> Iterator[dict[str, Any]]:
    """Yields a dict. After the context it holds the device's seconds by group of kernels, and the longest kernels."""
    from torch.profiler import ProfilerActivity, profile

    found: dict[str, Any] = {}
    activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with profile(activities=activities, acc_events=True) as profiler:
        yield found
        if on_gpu:
            torch.cuda.synchronize()
    by_name: dict[str, float] = {}
    for row in profiler.key_averages():
        microseconds = row.self_device_time_total if on_gpu else row.self_cpu_time_total
        name = row.key.lower()
        group = next(group for group, words in KERNEL_GROUPS.items() if re.search(words, name))
        found[group] = found.get(group, 0.0) + microseconds / 1e6
        by_name[f"{row.count} x {row.key[:90]}"] = microseconds / 1e6
    found["longest"] = dict(sorted(by_name.items(), key=lambda item: -item[1])[:25])


def rounded(value: Any) -> Any:
    """Numbers with four digits, for people."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def bench_gpu(options: argparse.Namespace) -> tuple[list[str], dict]:
    bench = Bench(Path(options.out or "runs/bench_gpu"), 60 * options.minutes, options.self_forcing)
    bench.run(options.part)
    lines = [f"  {name}: {json.dumps(rounded(figures))}" for name, figures in bench.results.items()]
    return [f"results in {bench.path}", *lines], {"bench": "gpu", **bench.results}
