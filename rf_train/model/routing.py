"""History routing (eq. 8-9): each query token and head reads the chunks whose mean key matches it best.

    chosen = the top k earlier chunks j by q . mean(K_j)       no parameters, no gradient
    out    = one softmax over the tokens of the chosen chunks and of the own chunk

`masked_routing` is the plain reference. `RoutedAttention` does only the selected work, key chunk by key chunk: it
gathers, for each head and key chunk, the queries that read it, runs one kernel call over all these sequences of unequal
length, and merges each query's parts by their log-sum-exps. Sizes: B batch, H heads, R queries, L keys, D head width,
n slots of a query: the chunks that it reads.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rf_train.model.chunks import Routed

SMALL_PAIRS = 2**19  # queries x keys of a head, up to which a CPU is faster with a mask than with many small calls
GRID = 65535  # sequences in one call of a GPU's variable-length kernel
GATHERED_BYTES = {"cpu": 16 * 2**20, "cuda": 2**30}  # of the rows that a group of heads gathers at once

observers: list[Callable[[Tensor, "RoutingPlan"], None]] = []  # called with the choices of every routed attention


@dataclass(frozen=True)
class RoutedRows:
    """Consecutive queries of one chunk that choose among the same earlier chunks."""

    queries: int
    earlier: int  # the history chunks before it: key chunks 0 .. earlier - 1
    own: int  # the number of its own key chunk


@dataclass(frozen=True)
class RoutingPlan:
    """Who reads what in a pass. Key chunk c holds the keys bounds[c] .. bounds[c + 1] - 1: all keys are in a chunk."""

    rows: tuple[RoutedRows, ...]
    bounds: tuple[int, ...]
    attention: Routed

    @property
    def slots(self) -> int:
        """Chunks that a query reads, its own included."""
        return self.attention.read_chunks + 1


@torch.no_grad()
def choose_slots(q: Tensor, means: Tensor, plan: RoutingPlan) -> Tensor:
    """The key chunks that each query reads: int16 [B, H, R, n]; int32 with very many chunks.

    q [B, H, R, D]: the queries of `plan.rows`. means [B, H, chunks, D]: see `chunk_means`. Scores are computed in fp32.
    """
    found, begin, attention = [], 0, plan.attention
    dtype = torch.int16 if len(plan.bounds) < 2**15 else torch.int32
    for rows in plan.rows:
        asking = q[:, :, begin : begin + rows.queries].to(means.dtype)
        first, last = attention.sink, rows.earlier - attention.window
        scores = asking @ means[:, :, first:last].transpose(2, 3)
        chosen = first + scores.topk(attention.top_k, dim=3).indices
        # Made on the device: a copy from the host would wait for it.
        always = [torch.arange(*ends, device=q.device) for ends in ((0, first), (last, rows.earlier))]
        always.append(torch.full((1,), rows.own, device=q.device))
        found.append(torch.cat([chosen, *(part.expand(*chosen.shape[:3], -1) for part in always)], dim=3).to(dtype))
        begin += rows.queries
    return torch.cat(found, dim=2)


def masked_routing(q: Tensor, k: Tensor, v: Tensor, plan: RoutingPlan, slots: Tensor) -> Tensor:
    """The plain reference: attention under a mask [B, H, R, L]."""
    lengths = torch.tensor([end - begin for begin, end in pairwise(plan.bounds)], device=q.device)
    reads = torch.zeros(*slots.shape[:3], len(lengths), dtype=torch.bool, device=q.device)
    reads.scatter_(3, slots.long(), True)
    mask = reads.repeat_interleave(lengths, dim=3, output_size=plan.bounds[-1])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def routed_attention(
    q: Tensor, k: Tensor, v: Tensor, means: Tensor, plan: RoutingPlan, stash: dict | None = None
) -> Tensor:
    """Routed attention of the queries of `plan.rows`: q [B, H, R, D], k and v [B, H, L, D] -> [B, H, R, D]."""
    kernels = segment_kernels(q)
    if stash and "slots" in stash:  # a second choice could differ by rounding from the first one
        slots = stash.pop("slots")
    else:
        slots = choose_slots(q, means, plan)
        if stash is not None:
            stash["slots"] = slots
    for observe in observers:
        observe(slots, plan)
    if kernels is None or (q.device.type == "cpu" and q.shape[2] * k.shape[2] <= SMALL_PAIRS):
        return masked_routing(q, k, v, plan, slots)
    return RoutedAttention.apply(q, k, v, slots, plan, kernels, stash)


# ---- the fast path


class Segments(NamedTuple):
    """Sequences of unequal length: for each of G heads and each key chunk, the gathered queries that read it."""

    begins: Tensor  # int32 [G x chunks + 1], ascending: where the queries of each sequence begin
    bounds: tuple[int, ...]  # the keys of each chunk, the same for each head
    longest: int  # no sequence has more queries: a query reads a chunk once


# forward(q [T, D], k [G, L, D], v, segments) -> (out [T, D], log-sum-exps fp32 [T], the rest that backward needs)
# backward(grad, q, k, v, out, log-sum-exps, segments, rest) -> gradients of q [T, D], k and v [G, L, D]
SegmentKernels = tuple[Callable[..., Any], Callable[..., Any]]


def segment_kernels(q: Tensor) -> SegmentKernels | None:
    """The device's kernels for `Segments`; None if they can't take q's device, dtype or head width."""
    if q.device.type == "cpu" and q.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return _cpu_forward, _cpu_backward
    if q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0:
        return _cuda_forward, _cuda_backward
    return None


def _of_head(head: int, segments: Segments) -> Iterator[tuple[slice, slice]]:
    """(queries, keys) of each sequence of a head that has queries."""
    chunks = len(segments.bounds) - 1
    begins = segments.begins[head * chunks : (head + 1) * chunks + 1].tolist()
    for queries, keys in zip(pairwise(begins), pairwise(segments.bounds)):
        if queries[0] < queries[1]:
            yield slice(*queries), slice(*keys)


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor, tuple]:
    out, log_sums = torch.empty_like(q), q.new_empty(len(q), dtype=torch.float32)
    for head in range(len(k)):
        for queries, keys in _of_head(head, segments):
            one = [x[None, None] for x in (q[queries], k[head, keys], v[head, keys])]
            part, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*one)
            out[queries], log_sums[queries] = part[0, 0], sums.flatten()
    return out, log_sums, ()


def _cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, segments: Segments, _: tuple
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    for head in range(len(k)):
        for queries, keys in _of_head(head, segments):
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


def _cuda_forward(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor, tuple]:
    lengths = _cuda_lengths(k, segments)
    rows = (q[:, None], *(x.reshape(-1, 1, x.shape[-1]) for x in (k, v)))
    out, log_sums, seed, unused, _ = torch.ops.aten._flash_attention_forward(*rows, *lengths, 0.0, False, False)
    return out[:, 0], log_sums[0], (*lengths, seed, unused)


def _cuda_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, segments: Segments, rest: tuple
) -> tuple[Tensor, Tensor, Tensor]:
    *lengths, seed, unused = rest
    rows = (grad[:, None], q[:, None], *(x.reshape(-1, 1, x.shape[-1]) for x in (k, v)), out[:, None])
    backward = torch.ops.aten._flash_attention_backward
    dq, dk, dv = backward(*rows, log_sums[None].contiguous(), *lengths, 0.0, False, seed, unused)
    return dq[:, 0], dk.view(k.shape), dv.view(v.shape)


class Gather(NamedTuple):
    """How the rows of a group of G heads are gathered, key chunk by key chunk. T = G R n rows."""

    source: Tensor  # int64 [T]: the query of each row, in [0, G R)
    place: Tensor  # int64 [G R, n]: the rows of each query, one per slot
    segments: Segments

    @classmethod
    def of(cls, slots: Tensor, plan: RoutingPlan) -> "Gather":
        """slots [G, R, n]: see `choose_slots`."""
        heads, chunks = len(slots), len(plan.bounds) - 1
        key = slots.long() + chunks * torch.arange(heads, device=slots.device)[:, None, None]
        ordered, order = key.flatten().sort(stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        every = torch.arange(heads * chunks + 1, device=slots.device)
        begins = torch.searchsorted(ordered, every, out_int32=True)
        return cls(
            order // slots.shape[2], place.view(-1, slots.shape[2]), Segments(begins, plan.bounds, slots.shape[1])
        )


def bytes_per_head(queries: int, slots: int, width: int, itemsize: int) -> int:
    """Bytes that one head gathers: queries, their outputs, one slot's in fp32, and the order of the rows."""
    return queries * slots * (width * (2 * itemsize + 4) + 40)


def heads_at_once(heads: int, chunks: int, head_bytes: int, device: str) -> int:
    """The heads of a group, at least one: what it gathers stays within GATHERED_BYTES, its sequences within a grid."""
    return max(1, min(heads, GATHERED_BYTES[device] // max(1, head_bytes), GRID // max(1, chunks)))


def head_groups(q: Tensor, plan: RoutingPlan) -> list[tuple[int, slice]]:
    """(clip, heads) of each group of heads that is computed at once: q [B, H, R, D]."""
    batch, heads, queries, width = q.shape
    one = bytes_per_head(queries, plan.slots, width, q.element_size())
    size = heads_at_once(heads, len(plan.bounds), one, q.device.type)
    return [(clip, slice(begin, begin + size)) for clip in range(batch) for begin in range(0, heads, size)]


class RoutedAttention(torch.autograd.Function):
    """The attention of all queries that choose. `apply(q, k, v, slots, plan, kernels, stash)` -> [B, H, R, D].

    q [B, H, R, D]: the queries of `plan.rows`; k, v [B, H, L, D]: all keys. Backward runs the kernel's backward on each
    part with the output and the log-sum-exp of the whole row, which is exact: see `TwoStreamAttention`. `stash` is for
    selective recomputation, as there. Sums over a query's parts are fp32 and in a fixed order.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, slots: Tensor, plan: RoutingPlan, kernels: SegmentKernels,
        stash: dict | None,
    ) -> Tensor:  # fmt: skip
        if stash and "routing" in stash:
            out, log_sums, rests = stash.pop("routing")
        else:
            rests = []
            out, log_sums = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
            for clip, heads in head_groups(q, plan):
                gather = Gather.of(slots[clip, heads], plan)
                rows = q[clip, heads].flatten(0, 1).index_select(0, gather.source)
                parts, sums, rest = kernels[0](rows, k[clip, heads], v[clip, heads], gather.segments)
                rests.append(rest)
                sums = sums[gather.place]  # (G R, n)
                total = sums.logsumexp(dim=1)
                merged = _weighted_sum(parts, gather.place, (sums - total[:, None]).exp())
                out[clip, heads] = merged.view_as(out[clip, heads]).to(q.dtype)
                log_sums[clip, heads] = total.view_as(log_sums[clip, heads])
            if stash is not None:
                # Detached: `out` will hold the graph, and the graph holds the stash.
                stash["routing"] = out.detach(), log_sums, rests
        ctx.save_for_backward(q, k, v, out, log_sums, slots)
        ctx.plan, ctx.backward_kernel, ctx.rests = plan, kernels[1], rests
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sums, slots = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for (clip, heads), rest in zip(head_groups(q, ctx.plan), ctx.rests):
            gather = Gather.of(slots[clip, heads], ctx.plan)
            each = (x[clip, heads].flatten(0, 1) for x in (grads[0], q, out, log_sums))
            grad, *rows, sums = (x.index_select(0, gather.source) for x in each)
            parts, dk[clip, heads], dv[clip, heads] = ctx.backward_kernel(
                grad, rows[0], k[clip, heads], v[clip, heads], rows[1], sums, gather.segments, rest
            )
            dq[clip, heads] = _weighted_sum(parts, gather.place, None).view_as(dq[clip, heads]).to(q.dtype)
        return dq, dk, dv, None, None, None, None


def _weighted_sum(parts: Tensor, place: Tensor, weights: Tensor | None) -> Tensor:
    """sum_j weights[:, j] parts[place[:, j]] in fp32: parts [T, D], place and weights [rows, n] -> [rows, D]."""
    total = None
    for slot in range(place.shape[1]):
        part = parts.index_select(0, place[:, slot]).float()
        if weights is not None:
            part *= weights[:, slot, None]
        total = part if total is None else total.add_(part)
    assert total is not None
    return total
