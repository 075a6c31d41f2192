"""The attention kernels of each device, behind two seams that all attention goes through.

Dense kernels take [B, H, L, D]. Segment kernels take sequences of unequal length, as routing needs them. Both give
log-sum-exps, so that results over different keys can be merged, and both have a backward that takes the output and the
log-sum-exps of a whole row: it recomputes the softmax from them, so the gradients of each part are right on their own.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# ---- dense

Kernels = tuple[Callable[..., Any], Callable[..., Any]]  # forward and backward, see `flash_kernels`


def flash_kernels(q: Tensor, kernel: str = "auto") -> Kernels | None:
    """(forward, backward) of the device's kernel named `kernel`; "auto" is the fastest that we know for the device.

    forward(q, k, v) -> (out, log-sum-exps [B, H, L] in fp32, the rest that backward needs);
    backward(grad, q, k, v, out, log-sum-exps, the rest) -> gradients of q, k and v.
    None if no kernel can take q's device, dtype or head width. On a CPU there is one kernel.
    """
    if q.device.type == "cpu" and q.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return _cpu_forward, _cpu_backward
    if q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0:
        repeatable = torch.are_deterministic_algorithms_enabled()
        return CUDA_KERNELS[_best_on_cuda(q.device, q.shape[-1], repeatable) if kernel == "auto" else kernel]
    return None


@lru_cache
def _best_on_cuda(device: torch.device, head_dim: int, repeatable: bool) -> str:
    """cuDNN's kernel is the faster one from Hopper on, for the head widths that it was made for.

    The gradients of its queries differ from run to run. FlashAttention-2 has a mode in which they don't.
    """
    hopper = torch.cuda.get_device_capability(device) >= (9, 0) and torch.backends.cudnn.is_available()
    return best_on_hopper(head_dim, repeatable) if hopper else "fa2"


def best_on_hopper(head_dim: int, repeatable: bool) -> str:
    """What "auto" stands for on Hopper's GPUs and newer ones: see `_best_on_cuda`."""
    return "cudnn" if head_dim in (64, 128) and not repeatable else "fa2"


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, tuple]:
    out, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return out, log_sums, ()


def _cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, _: tuple
) -> tuple[Tensor, Tensor, Tensor]:
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return backward(grad, q, k, v, out, log_sums, 0.0, False)


def _flash_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, tuple]:
    """FlashAttention-2, or -3 once `use_kernel("fa3")` has registered it in its place."""
    out, log_sums, *rest, _ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
    return out, log_sums, tuple(rest)


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, rest: tuple
) -> tuple[Tensor, Tensor, Tensor]:
    cum_q, cum_k, max_q, max_k, seed, offset = rest
    log_sums = log_sums.contiguous()  # this kernel assumes contiguous memory
    backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
    return backward(grad, q, k, v, out, log_sums, cum_q, cum_k, max_q, max_k, 0.0, False, seed, offset)


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, tuple]:
    out, log_sums, *rest, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
    return out, log_sums.reshape(q.shape[:3]), tuple(rest)


def _cudnn_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, rest: tuple
) -> tuple[Tensor, Tensor, Tensor]:
    cum_q, cum_k, max_q, max_k, seed, offset = rest
    # PyTorch 2.11 keeps cuDNN's graphs by the layout of q, k and v alone. So the others must always have the same one:
    # else a graph would read them with the strides of an earlier call.
    grad, out = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (grad, out))
    log_sums = log_sums.contiguous()[..., None]
    backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
    return backward(grad, q, k, v, out, log_sums, seed, offset, None, cum_q, cum_k, max_q, max_k, 0.0, False)


CUDA_KERNELS: dict[str, Kernels] = {
    "fa2": (_flash_forward, _flash_backward),
    "cudnn": (_cudnn_forward, _cudnn_backward),
    "fa3": (_flash_forward, _flash_backward),
}


def use_kernel(kernel: str) -> None:
    """Prepares the process for an attention kernel. Raises ValueError where it isn't installed.

    FlashAttention-3 is a package of its own. PyTorch registers it in the place of FlashAttention-2, routing included,
    until another kernel is used.
    """
    from torch.nn import attention

    if kernel != "fa3":
        if attention.current_flash_attention_impl() == "FA3":
            attention.restore_flash_attention_impl()
        return
    try:
        attention.activate_flash_attention_impl("FA3")
    except (ImportError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"model.attention_kernel=fa3: FlashAttention-3 can't be used: {reason}") from None


# ---- segments


class Segments(NamedTuple):
    """Sequences of unequal length: for each of G heads and each key chunk, the gathered queries that read it."""

    begins: Tensor  # int32 [G x chunks + 1], ascending: where the queries of each sequence begin
    bounds: tuple[int, ...]  # the keys of each chunk, the same for each head
    longest: int  # no sequence has more queries: a query reads a chunk once
    tiles: "Tiles | None" = None  # if the queries are laid out for `tiled`


class Tiles(NamedTuple):
    """Sequences cut into tiles of equal size, the last tile of each padded. Tiles at the end may be padding alone."""

    size: int  # queries
    segment: Tensor  # int64 [tiles]: the sequence of each tile, ascending
    counts: Tensor  # int32 [G x chunks]: the tiles of each sequence
    first: Tensor  # int64 [G x chunks]: the first of them

    @classmethod
    def of(cls, begins: Tensor, size: int, tiles: int) -> "Tiles":
        """`begins`: those of `Segments`. `tiles`: how many to make, at least as many as `most` says."""
        counts = (begins.diff() + size - 1) // size
        ends = counts.cumsum(0)
        number = torch.arange(tiles, device=begins.device)
        segment = torch.searchsorted(ends, number, right=True).clamp_(max=len(ends) - 1)
        return cls(size, segment, counts, ends - counts)

    @staticmethod
    def most(rows: int, sequences: int, size: int) -> int:
        """The tiles that so many queries may fill, however they are spread over the sequences."""
        return (rows + sequences * (size - 1)) // size


# forward(q [T, D], k [G, L, D], v, segments) -> (out [T, D], log-sum-exps fp32 [T], the rest that backward needs)
# backward(grad, q, k, v, out, log-sum-exps, segments, rest) -> gradients of q [T, D], k and v [G, L, D]
SegmentKernels = tuple[Callable[..., Any], Callable[..., Any]]


def segment_kernels(q: Tensor) -> SegmentKernels | None:
    """The device's kernels for `Segments`; None if they can't take q's device, dtype or head width."""
    if q.device.type == "cpu" and q.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return _one_by_one_forward, _one_by_one_backward
    if q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0:
        return _varlen_forward, _varlen_backward
    return None


def tiled(dense: Kernels) -> SegmentKernels:
    """Segment kernels made of a dense one, for segments with `tiles`: each tile is a clip of a batch.

    Each tile has a copy of its chunk's keys, so all chunks must have the same length. Padding must come with gradients
    and log-sum-exps that give zero: in backward, log-sum-exps of infinity.
    """

    def forward(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor, tuple]:
        out, log_sums, rest = dense[0](*_in_tiles(segments, (q,), (k, v)))
        return out.flatten(0, 2), log_sums.flatten(), rest

    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, segments: Segments, rest: tuple
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad, q, out, log_sums, k, v = _in_tiles(segments, (grad, q, out, log_sums), (k, v))
        dq, dk, dv = dense[1](grad, q, k, v, out, log_sums, rest)
        return dq.flatten(0, 2), _over_tiles(dk, segments), _over_tiles(dv, segments)

    return forward, backward


def _in_tiles(segments: Segments, of_queries: tuple[Tensor, ...], of_keys: tuple[Tensor, ...]) -> list[Tensor]:
    """[T, ...] -> [tiles, 1, queries of a tile, ...]; [G, L, D] -> [tiles, 1, keys of its chunk, D]."""
    assert segments.tiles is not None
    size, segment = segments.tiles.size, segments.tiles.segment
    chunks = len(segments.bounds) - 1
    found = [x.unflatten(0, (-1, 1, size)) for x in of_queries]
    for x in of_keys:  # contiguous first: it is copied at the rate of memory, and its copies too
        by_chunk = x.contiguous().view(len(x) * chunks, -1)
        found.append(by_chunk.index_select(0, segment).view(len(segment), 1, -1, x.shape[-1]))
    return found


def _over_tiles(x: Tensor, segments: Segments) -> Tensor:
    """Sums over the tiles of each chunk, in fp32 and in a fixed order: [tiles, 1, keys, D] -> [G, L, D]."""
    assert segments.tiles is not None
    rows, counts = x.flatten(1).float(), segments.tiles.counts
    sums = torch.segment_reduce(rows, "sum", lengths=counts, axis=0, unsafe=True, initial=0)
    return sums.view(-1, segments.bounds[-1] - segments.bounds[0], x.shape[-1])


def _each(segments: Segments, heads: int) -> Iterator[tuple[int, slice, slice]]:
    """(head, queries, keys) of each sequence that has queries."""
    pairs = pairwise(segments.begins.tolist())
    for head in range(heads):
        for keys, (begin, end) in zip(pairwise(segments.bounds), pairs):
            if begin < end:
                yield head, slice(begin, end), slice(*keys)


def _one_by_one_forward(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor, tuple]:
    out, log_sums = torch.empty_like(q), q.new_empty(len(q), dtype=torch.float32)
    for head, queries, keys in _each(segments, len(k)):
        one = [x[None, None] for x in (q[queries], k[head, keys], v[head, keys])]
        part, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*one)
        out[queries], log_sums[queries] = part[0, 0], sums[0, 0]
    return out, log_sums, ()


def _one_by_one_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, segments: Segments, _: tuple
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    for head, queries, keys in _each(segments, len(k)):
        rows = [x[queries][None, None] for x in (grad, q, out, log_sums)]
        own = [x[head, keys][None, None] for x in (k, v)]
        parts = backward(rows[0], rows[1], *own, rows[2], rows[3], 0.0, False)
        dq[queries], dk[head, keys], dv[head, keys] = (part[0, 0] for part in parts)
    return dq, dk, dv


@lru_cache(maxsize=64)
def _key_begins(heads: int, bounds: tuple[int, ...], device: torch.device) -> Tensor:
    """int32: where the keys of each sequence begin, head after head. Kept, because a copy from the host waits."""
    begins = torch.tensor(bounds[:-1], dtype=torch.int32) + bounds[-1] * torch.arange(heads, dtype=torch.int32)[:, None]
    return F.pad(begins.flatten(), (0, 1), value=heads * bounds[-1]).to(device)


def _cuda_lengths(k: Tensor, segments: Segments) -> tuple[Tensor, Tensor, int, int]:
    """What FlashAttention's variable-length kernels want: begins of queries and of keys, and the longest of both."""
    longest = max(end - begin for begin, end in pairwise(segments.bounds))
    return segments.begins, _key_begins(len(k), segments.bounds, k.device), segments.longest, longest


def _varlen_forward(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor, tuple]:
    lengths = _cuda_lengths(k, segments)
    rows = (q[:, None], *(x.reshape(-1, 1, x.shape[-1]) for x in (k, v)))
    out, log_sums, seed, unused, _ = torch.ops.aten._flash_attention_forward(*rows, *lengths, 0.0, False, False)
    return out[:, 0], log_sums[0], (*lengths, seed, unused)


def _varlen_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, segments: Segments, rest: tuple
) -> tuple[Tensor, Tensor, Tensor]:
    *lengths, seed, unused = rest
    rows = (grad[:, None], q[:, None], *(x.reshape(-1, 1, x.shape[-1]) for x in (k, v)), out[:, None])
    backward = torch.ops.aten._flash_attention_backward
    dq, dk, dv = backward(*rows, log_sums[None].contiguous(), *lengths, 0.0, False, seed, unused)
    return dq[:, 0], dk.view(k.shape), dv.view(v.shape)
