"""The memory traffic of a block of Wan 1.3B, counted, not timed:  python -m rf_train.bench traffic

Bytes that the operations of a block read and write in forward and backward, on a clip of 5 s in bf16. Matrix
multiplications and attention's kernels are bound by arithmetic, and are counted apart. All else is bound by memory:
this is what compilation is for (`model/elementwise.py`). What compiled functions read and write is what PyTorch's
compiler says of the kernels that it makes here.

Bytes grow linearly with tokens, because attention's kernels read each key once for each call. So it counts with two
small frames, and goes on along the line.
"""

import argparse
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import Mock, patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from rf_train.model import elementwise
from rf_train.model.attention import PassLayout
from rf_train.model.chunks import Chunk, Chunking, Dense
from rf_train.model.rope import rotary_table
from rf_train.model.settings import ModelSettings
from rf_train.model.transformer import Block, PassContext

WAN = ModelSettings(dim=1536, ffn_dim=8960, heads=12, layers=1)
FRAMES, TOKENS = 21, 1560  # a clip of 5 s at 480 x 832
SMALL = (4, 8)  # tokens of a latent frame that bytes are counted with
BOUND_BY_ARITHMETIC = ("mm", "addmm", "bmm", "attention")
FREE = ("empty", "empty_like", "new_empty", "_unsafe_view", "detach")  # they move no bytes


class Traffic(TorchDispatchMode):
    """Counts the bytes that operations read and write: `read_and_written`, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.read_and_written: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        aliases = [returned.alias_info for returned in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        if not is_view and name not in FREE:
            tensors = [leaf for leaf in tree_leaves([args, kwargs, found]) if isinstance(leaf, Tensor)]
            self.read_and_written[name] += sum(map(stored_bytes, tensors))
        return found

    def elementwise(self) -> int:
        """Bytes of all operations that aren't bound by arithmetic."""
        moved = self.read_and_written.items()
        return sum(count for name, count in moved if not any(part in name for part in BOUND_BY_ARITHMETIC))


def stored_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's elements, each once: an expanded tensor reads the same ones again, from the cache."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


@contextmanager
def recorded_functions(calls: list[tuple[Callable[..., Any], tuple]]) -> Iterator[None]:
    """Lists the calls of fusible functions meanwhile, and runs them uncompiled."""

    def recorder(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls.append((function, tree_map(fresh, arguments)))
            return function(*arguments)

        return call

    with patch.object(elementwise, "_compile", recorder), elementwise.compiled(True):
        yield


def fresh(value: Any) -> Any:
    """A tensor of the same kind, without a graph: what a function's own traffic is counted with."""
    return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def run(function: Callable[..., Any], arguments: tuple) -> None:
    """Forward, and backward where there is a gradient."""
    out = [leaf for leaf in tree_leaves(function(*arguments)) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if out:
        torch.autograd.backward(out, [torch.ones_like(leaf) for leaf in out])


def block_call(tokens: int) -> Callable[[], None]:
    """Forward and backward of a block on both streams of a clip, with `tokens` for each latent frame."""
    torch.manual_seed(0)
    chunking: Chunking = WAN.chunking
    streams = [chunking.chunks(frames) for frames in (FRAMES - chunking.sizes(FRAMES)[-1], FRAMES)]
    history, noisy = (tuple(Chunk(c.index, c.length * tokens) for c in stream) for stream in streams)
    counts = [sum(c.length for c in stream) for stream in streams]
    table = torch.cat([rotary_table(0, count, 1, tokens, WAN.head_dim, torch.device("cpu")) for count in counts])
    context = PassContext(PassLayout(history, noisy, Dense()), table, counts[0], tokens, None)
    block = Block(WAN).bfloat16()
    x = torch.randn(1, sum(counts), tokens, WAN.dim, dtype=torch.bfloat16, requires_grad=True)
    modulation = torch.randn(1, sum(counts), 6, WAN.dim, requires_grad=True)
    text = torch.randn(1, WAN.text_len, WAN.dim, dtype=torch.bfloat16, requires_grad=True)
    return lambda: run(block, (x, modulation, text, context))


def count(tokens: int) -> dict[str, float]:
    """Bytes of a block with `tokens` for each latent frame: of all operations, by operation, and by function."""
    call, calls = block_call(tokens), list[tuple[Callable[..., Any], tuple]]()
    call()  # gradients are there from now on
    with recorded_functions(calls):
        call()
    with Traffic() as traffic:
        call()
    bytes_of = {f"op {name}": float(moved) for name, moved in traffic.read_and_written.items()}
    found = {"all": float(traffic.read_and_written.total()), "not compiled": float(traffic.elementwise())}
    compiled, known = found["not compiled"], dict[str, tuple[int, int]]()
    for function, arguments in calls:
        name = f"function {function.__name__}"
        kind = name + str([(x.shape, x.dtype, x.requires_grad) if isinstance(x, Tensor) else x for x in arguments])
        if kind not in known:
            known[kind] = (own_bytes(function, arguments), kernel_bytes(function, arguments))
        for way, moved in zip(("not compiled", "compiled"), known[kind]):
            bytes_of[f"{name}, {way}"] = bytes_of.get(f"{name}, {way}", 0.0) + moved
        compiled += known[kind][1] - known[kind][0]
    return {**found, "compiled": compiled, **bytes_of}


def own_bytes(function: Callable[..., Any], arguments: tuple) -> int:
    """Bytes that a function's operations read and write when they run one by one, forward and backward."""
    with Traffic() as traffic:
        run(function, arguments)
    return traffic.elementwise()


def kernel_bytes(function: Callable[..., Any], arguments: tuple) -> int:
    """Bytes that the compiler's kernels for a function read and write, forward and backward."""
    from torch._inductor import compile_fx, config, metrics

    torch._dynamo.reset()
    metrics.reset()
    # The compiler counts for its log, and only for kernels that it makes anew.
    with warnings.catch_warnings(), config.patch(force_disable_caches=True):
        warnings.simplefilter("ignore")
        with patch.object(compile_fx, "inductor_metrics_log", Mock()):
            run(torch.compile(function, dynamic=False), arguments)
    assert metrics.num_bytes_accessed > 0
    return metrics.num_bytes_accessed


def bench_traffic(options: argparse.Namespace) -> tuple[list[str], dict]:
    """Lines for people, and the figures: GB of a block, forward and backward, without recomputation."""
    elementwise.check_compiler()
    few, many = (count(tokens) for tokens in SMALL)
    per_token = {name: (many[name] - few[name]) / (SMALL[1] - SMALL[0]) for name in many}
    gb = {name: (few[name] + slope * (TOKENS - SMALL[0])) / 1e9 for name, slope in per_token.items()}
    lines = [
        f"a block of Wan 1.3B, {FRAMES} latent frames of {TOKENS} tokens, both streams, bf16, forward and backward",
        f"  all operations, nothing compiled    {gb['all']:8.1f} GB",
        f"  not bound by arithmetic             {gb['not compiled']:8.1f} GB",
        f"  the same, run.compile=true          {gb['compiled']:8.1f} GB",
    ]
    parts = sorted((name for name in gb if " " in name and name != "not compiled"), key=gb.__getitem__, reverse=True)
    lines += [f"    {name:<44}{gb[name]:8.1f} GB" for name in parts if gb[name] >= 0.5]
    figures = {
        "bench": "traffic",
        "gb_all": gb["all"],
        "gb_elementwise": gb["not compiled"],
        "gb_elementwise_compiled": gb["compiled"],
        "share_left": gb["compiled"] / gb["not compiled"],
        "gb": {name: gb[name] for name in parts},
    }
    return lines, figures
