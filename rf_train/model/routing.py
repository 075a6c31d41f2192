"""History routing (eq. 8-9): each query token and head reads the chunks whose mean key matches it best.

    chosen = the top k earlier chunks j by q . mean(K_j)       no parameters, no gradient
    out    = one softmax over the tokens of the chosen chunks and of the own chunk

`masked_routing` is the plain reference. `RoutedAttention` does only the selected work. A query's own chunk is dense
attention. The chosen chunks go key chunk by key chunk: it gathers, for each head and key chunk, the queries that read
it, and runs one kernel call over all these sequences of unequal length. On a GPU whose dense kernel is faster than its
kernel for such sequences, they are cut into tiles of equal size, which are a batch. Each query's parts are merged by
their log-sum-exps. Sizes: B batch, H heads, R queries, L keys, D head width, n slots of a query: the chunks that it
reads.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rf_train.model.chunks import Routed
from rf_train.model.elementwise import add_slots, merge_slots
from rf_train.model.kernels import (
    CUDA_KERNELS,
    Kernels,
    SegmentKernels,
    Segments,
    Tiles,
    flash_kernels,
    segment_kernels,
    tiled,
)
from rf_train.model.kv_cache import consecutive_slices
from rf_train.model.threads import in_threads
from rf_train.model.windows import Call, batches

SMALL_PAIRS = 2**19  # queries x keys of a head, up to which a CPU is faster with a mask than with many small calls
GRID = 65535  # sequences in one call of a GPU's variable-length kernel
GATHERED_BYTES = {"cpu": 2**24, "cuda": 2**31}  # of the rows that are gathered at once; on a CPU by each thread
TILE = {"cpu": 0, "cuda": 3072}  # queries in a tile; 0: no tiles. cuDNN's kernel is 1.6 times as fast on them

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
    def gathered(self) -> tuple[int, ...]:
        """The bounds of the key chunks that are chosen from: those before some query's own chunk."""
        return self.bounds[: max(rows.earlier for rows in self.rows) + 1]

    def own_calls(self) -> list[Call]:
        """The queries of each chunk and its own keys, in batches."""
        queries = consecutive_slices([rows.queries for rows in self.rows])
        return batches(zip(queries, (slice(*self.bounds[rows.own : rows.own + 2]) for rows in self.rows)))


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
    q: Tensor, k: Tensor, v: Tensor, means: Tensor, plan: RoutingPlan, stash: dict | None = None, kernel: str = "auto"
) -> Tensor:
    """Routed attention of the queries of `plan.rows`: q [B, H, R, D], k and v [B, H, L, D] -> [B, H, R, D].

    `kernel`: see `flash_kernels`.
    """
    kernels = routing_kernels(q, kernel)
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


class RoutingKernels(NamedTuple):
    """The kernels for the own chunk, and for the chosen ones."""

    dense: Kernels
    segmented: SegmentKernels
    tile: int  # where the dense kernel is the faster one for the chosen chunks, too: see `Tiles`; else 0

    def of(self, segments: Segments) -> SegmentKernels:
        """Those for the chosen chunks, as their queries are laid out."""
        return tiled(self.dense) if segments.tiles else self.segmented


def routing_kernels(q: Tensor, kernel: str = "auto") -> RoutingKernels | None:
    """The device's kernels; None if they can't take q's device, dtype or head width."""
    dense, segmented = flash_kernels(q, kernel), segment_kernels(q)
    if not dense or not segmented:
        return None
    faster = q.device.type == "cpu" or dense is CUDA_KERNELS["cudnn"]
    return RoutingKernels(dense, segmented, TILE[q.device.type] if faster else 0)


class Gather(NamedTuple):
    """How the rows of a piece are gathered, key chunk by key chunk: G heads, R queries. T = G R n rows, and padding."""

    source: Tensor  # int64 [T]: the query of each row, in [0, G R); 0 for padding
    place: Tensor  # int64 [G R, n]: the rows of each query, one per slot
    segments: Segments
    padding: Tensor | None = None  # bool [T]: the rows that stand for no query

    @classmethod
    def of(cls, slots: Tensor, plan: RoutingPlan, tile: int = 0) -> "Gather":
        """slots [G, R, n + 1]: see `choose_slots`. The last one, the own chunk, is left out.

        `tile`: queries in a tile, where tiles are the faster way: see `tiles_in`.
        """
        heads, queries, slots_and_own = slots.shape
        chunks, count = len(plan.gathered) - 1, slots_and_own - 1
        key = slots[..., :-1].long() + chunks * torch.arange(heads, device=slots.device)[:, None, None]
        ordered, order = key.flatten().sort(stable=True)
        every = torch.arange(heads * chunks + 1, device=slots.device)
        begins = torch.searchsorted(ordered, every, out_int32=True)
        row, source, padding, cut = torch.arange(len(order), device=order.device), order // count, None, None
        if tiles := tiles_in(len(order), heads, plan.gathered, tile):
            cut = Tiles.of(begins, tile, tiles)
            row += (cut.first * tile - begins[:-1])[ordered]
            padding = torch.ones(tiles * tile, dtype=torch.bool, device=row.device)
            padding[row] = False
            source = order.new_zeros(tiles * tile).index_copy_(0, row, source)
        place = torch.empty_like(order)
        place[order] = row
        return cls(source, place.view(-1, count), Segments(begins, plan.gathered, queries, cut), padding)


def tiles_in(rows: int, heads: int, bounds: tuple[int, ...], tile: int) -> int:
    """The number of tiles for so many gathered rows; 0 where tiles would be no faster, or impossible.

    The chunks must have the same length. And their padding, half a tile for each head and chunk, must be little.
    """
    lengths, sequences = {end - begin for begin, end in pairwise(bounds)}, heads * (len(bounds) - 1)
    if not tile or len(lengths) > 1 or rows < 2 * tile * sequences:
        return 0
    return Tiles.most(rows, sequences, tile)


def bytes_per_query(slots: int, width: int, itemsize: int) -> int:
    """Bytes that one query of one head gathers: itself, its outputs, one slot's in fp32, and the order of the rows."""
    return slots * (width * (2 * itemsize + 4) + 40)


def piece_size(heads: int, queries: int, chunks: int, query_bytes: int, device: str) -> tuple[int, int]:
    """The (heads, queries) that are computed at once, each at least one.

    What they gather stays within GATHERED_BYTES, their sequences within a grid. Several heads, or a part of one head's
    queries, all parts about equal. `query_bytes`: see `bytes_per_query`.
    """
    room = max(1, GATHERED_BYTES[device] // max(1, query_bytes))
    at_once = max(1, min(heads, room // max(1, queries), GRID // max(1, chunks)))
    return at_once, math.ceil(queries / math.ceil(queries / room)) if queries > room else queries


def pieces(q: Tensor, plan: RoutingPlan) -> list[tuple[int, slice, list[slice]]]:
    """(clip, heads, their queries piece by piece) of each group of heads: q [B, H, R, D]."""
    batch, heads, queries, width = q.shape
    one = bytes_per_query(plan.attention.read_chunks, width, q.element_size())
    group, part = piece_size(heads, queries, len(plan.gathered), one, q.device.type)
    of_queries = [slice(begin, min(begin + part, queries)) for begin in range(0, queries, part)]
    return [(clip, slice(head, head + group), of_queries) for clip in range(batch) for head in range(0, heads, group)]


class RoutedAttention(torch.autograd.Function):
    """The attention of all queries that choose. `apply(q, k, v, slots, plan, kernels, stash)` -> [B, H, R, D].

    q [B, H, R, D]: the queries of `plan.rows`; k, v [B, H, L, D]: all keys. Backward runs the kernels' backward on each
    part with the output and the log-sum-exp of the whole row, which is exact. `stash` is for selective recomputation:
    see `two_stream_attention`. Sums over parts are fp32 and in a fixed order.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, slots: Tensor, plan: RoutingPlan, kernels: RoutingKernels,
        stash: dict | None,
    ) -> Tensor:  # fmt: skip
        if stash and "routing" in stash:
            out, log_sums, rests = stash.pop("routing")
        else:
            out, log_sums = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
            own_rests = []
            for queries, keys in plan.own_calls():
                part, sums, rest = kernels.dense[0](queries.batch(q), keys.batch(k), keys.batch(v))
                queries.of(out).copy_(queries.by_clip(part))
                queries.of(log_sums).copy_(queries.by_clip(sums))
                own_rests.append(rest)

            def add_chosen(clip: int, heads: slice, parts_of_queries: list[slice]) -> list[tuple]:
                rests, of_keys = [], (clip, heads, slice(0, plan.gathered[-1]))
                for piece in parts_of_queries:
                    at = clip, heads, piece
                    gather = Gather.of(slots[at], plan, kernels.tile)
                    rows = q[at].flatten(0, 1).index_select(0, gather.source)
                    forward, _ = kernels.of(gather.segments)
                    parts, sums, rest = forward(rows, k[of_keys], v[of_keys], gather.segments)
                    rests.append(rest)
                    own = out[at].flatten(0, 1), log_sums[at].flatten()
                    merged, total = merge_slots(parts, gather.place, sums, *own)
                    out[at], log_sums[at] = merged.view_as(out[at]), total.view_as(log_sums[at])
                return rests

            rests = own_rests, in_threads(add_chosen, pieces(q, plan), q.device)
            if stash is not None:
                # Detached: `out` will hold the graph, and the graph holds the stash.
                stash["routing"] = out.detach(), log_sums, rests
        ctx.save_for_backward(q, k, v, out, log_sums, slots)
        ctx.plan, ctx.kernels, ctx.rests = plan, kernels, rests
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sums, slots = ctx.saved_tensors
        plan, kernels, grad, (own_rests, rests_of_groups) = ctx.plan, ctx.kernels, grads[0], ctx.rests
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (queries, keys), rest in zip(plan.own_calls(), own_rests):
            of_queries = [queries.batch(x) for x in (grad, q, out, log_sums)]
            parts = kernels.dense[1](*of_queries[:2], keys.batch(k), keys.batch(v), *of_queries[2:], rest)
            for windows, whole, part in zip((queries, keys, keys), (dq, dk, dv), parts):
                windows.of(whole).copy_(windows.by_clip(part))

        def add_gradients(rests: list[tuple], clip: int, heads: slice, parts_of_queries: list[slice]) -> None:
            of_keys = clip, heads, slice(0, plan.gathered[-1])
            own_dk, own_dv = dk[of_keys], dv[of_keys]
            sum_dk, sum_dv = own_dk.float(), own_dv.float()  # fp32 needs no copies
            for piece, rest in zip(parts_of_queries, rests):
                at = clip, heads, piece
                gather = Gather.of(slots[at], plan, kernels.tile)
                each = (x[at].flatten(0, 1) for x in (grad, q, out, log_sums))
                part_grad, *rows, sums = (x.index_select(0, gather.source) for x in each)
                if gather.padding is not None:
                    sums.masked_fill_(gather.padding, float("inf"))  # so that it has no weight
                given = part_grad, rows[0], k[of_keys], v[of_keys], rows[1], sums, gather.segments, rest
                _, backward = kernels.of(gather.segments)
                parts, part_dk, part_dv = backward(*given)
                dq[at] = add_slots(dq[at].flatten(0, 1), parts, gather.place).view_as(dq[at])
                sum_dk += part_dk
                sum_dv += part_dv
            own_dk.copy_(sum_dk)
            own_dv.copy_(sum_dv)

        groups = [(rests, *group) for rests, group in zip(rests_of_groups, pieces(q, plan))]
        in_threads(add_gradients, groups, q.device)
        return dq, dk, dv, None, None, None, None
