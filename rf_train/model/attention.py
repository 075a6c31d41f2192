"""The attention of both streams. Only the pairs of chunks in which one reads the other are computed (Figure 3c).

    history chunk i reads history chunks <= i
    noisy chunk i   reads history chunks <  i, and itself

The queries of one chunk, together with the keys that they read, are a `QueryBlock`. A pass without a cache computes all
its query blocks in few, large calls of the flash kernel. With a cache, each query block is one call. No mask is built.
Routing, where each query token makes its own choice, is in `routing.py`. Sizes: B batch, H heads, L tokens, D head
width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rf_train.model.chunks import Attention, Chunk, Routed
from rf_train.model.elementwise import merge_windows
from rf_train.model.kernels import Kernels, flash_kernels
from rf_train.model.kv_cache import LayerKVCache, chunk_means, consecutive_slices
from rf_train.model.routing import RoutedRows, RoutingPlan, routed_attention
from rf_train.model.windows import Call, Rectangle, batches, length


@dataclass(frozen=True)
class PassLayout:
    """The chunks of each stream of a pass, lengths in tokens, and what they may read.

    The order of the tokens is: history chunks, then noisy chunks. With `noisy_queries_only` (the last block) only noisy
    chunks have queries, because nothing reads the history that the last block would compute.
    """

    history: tuple[Chunk, ...]
    noisy: tuple[Chunk, ...]
    attention: Attention
    noisy_queries_only: bool = False
    kernel: str = "auto"  # see `flash_kernels`

    @property
    def history_tokens(self) -> int:
        return sum(chunk.length for chunk in self.history)

    def of_last_block(self) -> "PassLayout":
        return replace(self, noisy_queries_only=True)


@dataclass(frozen=True)
class QueryBlock:
    """The queries of one chunk and the keys that they read, as slices along L."""

    queries: slice
    chunks: tuple[slice, ...]  # the history chunks that it may read, in order
    own: slice  # its own keys
    noisy: bool

    @property
    def earlier(self) -> tuple[slice, ...]:
        """The history chunks that it may read, neighbours joined."""
        return join_neighbours(self.chunks)

    @property
    def keys(self) -> tuple[slice, ...]:
        return join_neighbours([*self.earlier, self.own])


def two_stream_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: PassLayout, kv_cache: LayerKVCache | None = None, stash: dict | None = None
) -> Tensor:
    """Attention of the history and noisy chunks of a pass.

    q, k, v [B, H, L, D]: the tokens of `layout`, in its order; with `layout.noisy_queries_only` q has only the noisy
    ones. `kv_cache` holds earlier history; the history chunks of this pass are appended to it. `stash` is for selective
    recomputation: the forward pass puts the result into it, and the recomputation in backward takes it from there. So
    attention doesn't run twice. Returns [B, H, L of q, D].
    """
    history, noisy, new_tokens = layout.history, layout.noisy, layout.history_tokens
    noisy_lengths = [chunk.length for chunk in noisy]
    if kv_cache is None:
        chunks = [chunk.index for chunk in history]
        chunk_slices = consecutive_slices([chunk.length for chunk in history])
        noisy_keys = consecutive_slices(noisy_lengths, new_tokens)
    else:
        kv_cache.append(k[:, :, :new_tokens], v[:, :, :new_tokens], history)
        k, v = kv_cache.followed_by(k[:, :, new_tokens:], v[:, :, new_tokens:])
        chunks, chunk_slices = kv_cache.chunks, kv_cache.chunk_slices
        noisy_keys = consecutive_slices(noisy_lengths, kv_cache.tokens)
    history_keys = chunk_slices[len(chunk_slices) - len(history) :]

    asking = [] if layout.noisy_queries_only else [(*pair, False) for pair in zip(history, history_keys)]
    asking += [(*pair, True) for pair in zip(noisy, noisy_keys)]
    blocks = query_blocks(asking, chunks, chunk_slices, layout.attention)
    if not blocks:
        return q[:, :, :0]
    dense, routed = _split_by_choice(blocks, layout.attention)
    together = kv_cache is None
    if not routed:
        return _dense(q, k, v, blocks, layout.kernel, together, stash)
    if kv_cache is None:
        means = chunk_means(k[:, :, :new_tokens], [length(piece) for piece in chunk_slices])
    else:
        means = kv_cache.means()
    assert isinstance(layout.attention, Routed)
    bounds = (*(piece.start for piece in (*chunk_slices, *noisy_keys)), k.shape[2])
    plan = routing_plan(routed, bounds, layout.attention)
    of_dense, of_routed = (join_neighbours([block.queries for block in part]) for part in (dense, routed))
    found = [routed_attention(select_tokens(q, of_routed), k, v, means, plan, stash, layout.kernel)]
    if dense:
        places = consecutive_slices([length(block.queries) for block in dense])
        moved = [replace(block, queries=place) for block, place in zip(dense, places)]
        found.append(_dense(select_tokens(q, of_dense), k, v, moved, layout.kernel, together, stash))
    return restore_order(torch.cat(found, dim=2), (*of_routed, *of_dense))


def _split_by_choice(blocks: list[QueryBlock], attention: Attention) -> tuple[list[QueryBlock], list[QueryBlock]]:
    """(those that read all that they may read, those that choose chunks)."""
    parts: tuple[list[QueryBlock], list[QueryBlock]] = ([], [])
    for block in blocks:
        parts[isinstance(attention, Routed) and len(block.chunks) > attention.read_chunks].append(block)
    return parts


def routing_plan(blocks: list[QueryBlock], bounds: tuple[int, ...], attention: Routed) -> RoutingPlan:
    """The plan of the query blocks that choose. `bounds`: where each key chunk begins, and where the last one ends."""
    number = {begin: chunk for chunk, begin in enumerate(bounds)}
    rows = [RoutedRows(length(block.queries), len(block.chunks), number[block.own.start]) for block in blocks]
    return RoutingPlan(tuple(rows), bounds, attention)


def _dense(
    q: Tensor, k: Tensor, v: Tensor, blocks: list[QueryBlock], kernel: str, together: bool, stash: dict | None
) -> Tensor:
    """Every query block reads all that it may read: together in few kernel calls, or one by one."""
    kernels = flash_kernels(q, kernel)
    if kernels and together:
        return TwoStreamAttention.apply(q, k, v, blocks, kernels, stash)
    return torch.cat([_plain_block(q, k, v, block, kernels) for block in blocks], dim=2)


def query_blocks(
    asking: list[tuple[Chunk, slice, bool]], chunks: list[int], chunk_slices: list[slice], attention: Attention
) -> list[QueryBlock]:
    """A query block for each (chunk, its own keys, whether it is noisy) in `asking`, in the order of the queries.

    The keys of history chunk `chunks[n]` (an index in the clip) are at `chunk_slices[n]`.
    """
    blocks, begin = [], 0
    for chunk, own, noisy in asking:
        seen = [chunk_slices[position] for position in attention.visible(chunk.index, chunks)]
        blocks.append(QueryBlock(slice(begin, begin + chunk.length), tuple(seen), own, noisy))
        begin += chunk.length
    return blocks


def join_neighbours(pieces: Sequence[slice]) -> tuple[slice, ...]:
    """Joins slices that touch one another."""
    joined: list[slice] = []
    for piece in pieces:
        if joined and piece.start == joined[-1].stop:
            joined[-1] = slice(joined[-1].start, piece.stop)
        else:
            joined.append(piece)
    return tuple(joined)


def select_tokens(x: Tensor, pieces: tuple[slice, ...]) -> Tensor:
    """The tokens of x [B, H, L, D] in `pieces`, joined: a view of one piece, a copy of several."""
    parts = [x[:, :, piece] for piece in pieces]
    if len(parts) == 1:
        return parts[0]
    # In memory the heads of a token stand next to each other, as the linear layers write them.
    return torch.cat([part.transpose(1, 2) for part in parts], dim=1).transpose(1, 2)


def restore_order(x: Tensor, pieces: tuple[slice, ...]) -> Tensor:
    """Undoes `select_tokens` of pieces that hold every token once."""
    slices = consecutive_slices([piece.stop - piece.start for piece in pieces])
    return select_tokens(x, tuple(now for _, now in sorted(zip(pieces, slices), key=lambda pair: pair[0].start)))


def _plain_block(q: Tensor, k: Tensor, v: Tensor, block: QueryBlock, kernels: Kernels | None) -> Tensor:
    """One query block by itself."""
    q, k, v = q[:, :, block.queries], select_tokens(k, block.keys), select_tokens(v, block.keys)
    if kernels is None or torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v)
    return kernels[0](q, k, v)[0]


# ---- all query blocks of a pass in few calls of the flash kernel


def kernel_calls(blocks: list[QueryBlock]) -> tuple[tuple[slice, ...], list[Call]]:
    """Splits the query blocks into few, large kernel calls: (order of the queries, [(queries in that order, keys)]).

    History chunk i and noisy chunk i + 1 read the same history, chunks 0 .. i. Their queries are put next to each
    other, as one row of the causal triangle. A triangle of rows splits into one rectangle (queries of the lower rows,
    keys of the upper ones) and two smaller triangles. At the end each row reads its newest chunk, and each noisy chunk
    itself. Equal rectangles are one batch.
    """

    def reads(block: QueryBlock) -> list[tuple[int, int]]:
        return [(keys.start, keys.stop) for keys in (block.earlier if block.noisy else block.keys)]

    blocks = sorted(blocks, key=reads)
    order = tuple(block.queries for block in blocks)
    triangles: dict[int, dict[int, list[int]]] = {}  # first key -> last key -> queries [from, to]
    of_itself: list[Rectangle] = []
    for block, queries in zip(blocks, consecutive_slices([piece.stop - piece.start for piece in order])):
        for start, stop in reads(block):
            row = triangles.setdefault(start, {}).setdefault(stop, [queries.start, queries.stop])
            row[1] = queries.stop
        if block.noisy:
            of_itself.append((queries, block.own))
    newest: list[Rectangle] = []
    earlier: list[Rectangle] = []
    for start, triangle in triangles.items():
        _split_triangle(start, [(stop, *queries) for stop, queries in triangle.items()], newest, earlier)
    return order, [call for rectangles in (of_itself, newest, earlier) for call in batches(rectangles)]


def _split_triangle(start: int, rows: list[tuple[int, ...]], newest: list[Rectangle], earlier: list[Rectangle]) -> None:
    """Adds the rectangles of a triangle: to `newest` those of a single row.

    `rows`: (end of the keys, begin and end of the queries), ascending; all keys begin at `start`. The upper part has a
    power of two of them, so that many rectangles are equal.
    """
    if len(rows) == 1:
        [(stop, *queries)] = rows
        newest.append((slice(*queries), slice(start, stop)))
        return
    upper = 1 << (len(rows) - 1).bit_length() - 1
    corner = rows[upper - 1][0]
    earlier.append((slice(rows[upper][1], rows[-1][2]), slice(start, corner)))
    _split_triangle(start, rows[:upper], newest, earlier)
    _split_triangle(corner, rows[upper:], newest, earlier)


def merged_attention(
    q: Tensor, k: Tensor, v: Tensor, calls: list[Call], forward: Callable[..., Any]
) -> tuple[Tensor, Tensor, list[tuple]]:
    """Runs the kernel on each call's queries and keys, and merges the results per query by their log-sum-exps.

    Returns (output, log-sum-exps [B, H, L] in fp32, the rest that the backward of each call needs).
    """
    out = torch.zeros_like(q, dtype=torch.float32)
    log_sums = q.new_full(q.shape[:3], float("-inf"), dtype=torch.float32)
    rests = []
    for queries, keys in calls:
        part, part_sums, rest = forward(queries.batch(q), keys.batch(k), keys.batch(v))
        merge_windows(queries.of(out), queries.of(log_sums), queries.by_clip(part), queries.by_clip(part_sums))
        rests.append(rest)
    return out.to(q.dtype), log_sums, rests


class TwoStreamAttention(torch.autograd.Function):
    """The attention of all query blocks of a pass, in the kernel calls of `kernel_calls`.

    Backward needs q, k, v, the output and its log-sum-exps, so memory grows with tokens, not with their square. The
    backward of flash attention recomputes the softmax from the output and log-sum-exp of the whole row. So the
    gradients of each call are right on their own, and are added.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: list[QueryBlock], kernels: Kernels, stash: dict | None
    ) -> Tensor:
        order, calls = kernel_calls(blocks)
        q = select_tokens(q, order)
        if stash and "attention" in stash:
            out, log_sums, rests = stash.pop("attention")
        else:
            out, log_sums, rests = merged_attention(q, k, v, calls, kernels[0])
            if stash is not None:
                stash["attention"] = out, log_sums, rests
        ctx.save_for_backward(q, k, v, out, log_sums)
        ctx.order, ctx.calls, ctx.rests, ctx.backward_kernel = order, calls, rests, kernels[1]
        return restore_order(out, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sums = ctx.saved_tensors
        grad = select_tokens(grads[0], ctx.order)
        grad_q, grad_k, grad_v = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
        for (queries, keys), rest in zip(ctx.calls, ctx.rests):
            part_grad, part_q, part_out, part_sums = (queries.batch(x) for x in (grad, q, out, log_sums))
            given = part_grad, part_q, keys.batch(k), keys.batch(v), part_out, part_sums, rest
            dq, dk, dv = (queries.by_clip(part) for part in ctx.backward_kernel(*given))
            queries.of(grad_q).add_(dq)
            keys.of(grad_k).add_(dk)
            keys.of(grad_v).add_(dv)
        grad_q = restore_order(grad_q, ctx.order).to(q.dtype)
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None, None, None
