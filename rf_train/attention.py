"""The attention of both streams, over the blocks that exist and no others (Figure 3c).

    history chunk i reads history chunks <= i
    noisy chunk i   reads history chunks <  i, and itself

So each chunk's queries meet a few runs of neighbouring keys, mostly one or two: a job. A whole pass takes its jobs together, in few
and large calls of the flash kernel; with a cache each job is a call. No mask is built except for routing, whose choice differs by
query token. Suffixes: B batch, H heads, L tokens, D head width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rf_train.chunks import Attention


@dataclass(frozen=True)
class Job:
    """One chunk's queries and the keys they meet, as places along L."""

    queries: slice
    earlier: tuple[slice, ...]  # runs of history
    own: slice
    noisy: bool
    lengths: tuple[int, ...]  # tokens of each earlier chunk, in order

    @property
    def keys(self) -> tuple[slice, ...]:
        return contiguous([*self.earlier, self.own])


def spans(lengths: list[int], begin: int = 0) -> list[slice]:
    """Consecutive slices of the given lengths."""
    found = []
    for length in lengths:
        found.append(slice(begin, begin + length))
        begin += length
    return found


def contiguous(pieces: list[slice]) -> tuple[slice, ...]:
    """Joins neighbouring slices."""
    joined: list[slice] = []
    for piece in pieces:
        if joined and piece.start == joined[-1].stop:
            joined[-1] = slice(joined[-1].start, piece.stop)
        else:
            joined.append(piece)
    return tuple(joined)


def take(x: Tensor, pieces: tuple[slice, ...]) -> Tensor:
    """The tokens of the pieces of x [B, H, L, D]: a view of one piece, a copy of several."""
    parts = [x[:, :, piece] for piece in pieces]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.transpose(1, 2) for part in parts], dim=1).transpose(1, 2)  # as projections lay it out: heads next to each other


def put_back(x: Tensor, pieces: tuple[slice, ...]) -> Tensor:
    """Undoes `take` of pieces that are an order of all tokens."""
    places = spans([piece.stop - piece.start for piece in pieces])
    return take(x, tuple(place for _, place in sorted(zip(pieces, places), key=lambda pair: pair[0].start)))


def two_stream_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    history: list[tuple[int, int]],
    noisy: list[tuple[int, int]],
    attention: Attention,
    memory=None,
    noisy_only: bool = False,
    kept: dict | None = None,
) -> Tensor:
    """Attention of a run of history chunks followed by a run of noisy chunks.

    q, k, v [B, H, L, D] hold the history chunks' tokens, then the noisy ones', in the order of `history` and `noisy`: pairs of
    (chunk index, tokens). `memory`, a `LayerCache`, holds earlier history and is given the new history chunks. With `noisy_only`
    q has no history tokens and only noisy outputs are returned. With selective recomputation `kept`, empty at first, carries the
    result from the forward pass to its repetition in backward (not with routing). Returns [B, H, L of q, D].
    """
    tokens = [count for _, count in history]
    past = sum(tokens)
    if memory is not None:
        memory.append(k[:, :, :past], v[:, :, :past], history)
        held, places = memory.held, memory.spans
        k, v = memory.followed_by(k[:, :, past:], v[:, :, past:])
        own_history, own_noisy = places[len(places) - len(history) :], spans([count for _, count in noisy], sum(memory.lengths))
    else:
        held, places = [index for index, _ in history], spans(tokens)
        own_history, own_noisy = places, spans([count for _, count in noisy], past)
    asking = [] if noisy_only else [(*chunk, own, False) for chunk, own in zip(history, own_history)]
    asking += [(*chunk, own, True) for chunk, own in zip(noisy, own_noisy)]
    jobs = jobs_of(asking, held, places, attention)
    if not jobs:
        return q[:, :, :0]
    if attention.kind == "routed":
        return torch.cat([routed_job(q, k, v, job, attention.k) for job in jobs], dim=2)
    if memory is None and (kernels := fused_kernels(q)):
        return JobAttention.apply(q, k, v, jobs, kernels, kept)
    return torch.cat([F.scaled_dot_product_attention(q[:, :, job.queries], take(k, job.keys), take(v, job.keys)) for job in jobs], dim=2)


def jobs_of(asking: list[tuple[int, int, slice, bool]], held: list[int], places: list[slice], attention: Attention) -> list[Job]:
    """A job for each (chunk index, tokens, its own keys, whether it is noisy), in the order of the queries; history chunks `held` stand at `places`."""
    jobs, begin = [], 0
    for index, count, own, noisy in asking:
        seen = [places[position] for position in attention.visible(index, held)]
        jobs.append(Job(slice(begin, begin + count), contiguous(seen), own, noisy, tuple(place.stop - place.start for place in seen)))
        begin += count
    return jobs


def routed_job(q: Tensor, k: Tensor, v: Tensor, job: Job, keep: int) -> Tensor:
    """One chunk's attention with history routing."""
    q, k, v = q[:, :, job.queries], take(k, job.keys), take(v, job.keys)
    mask = routed_mask(q, k, list(job.lengths), keep) if len(job.lengths) > keep else None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def routed_mask(q: Tensor, k: Tensor, lengths: list[int], keep: int) -> Tensor:
    """History routing (eq. 8-9): True where a query token may look.

    For each query and head the `keep` earlier chunks j with the largest q . mean(K_j), and its own chunk. q [B, H, S, D];
    k [B, H, L, D], keys as attention sees them (after rotary embedding): earlier chunks of the given lengths, then the own chunk. Returns
    bool [B, H, S, L]. The choice is not differentiated.
    """
    with torch.no_grad():
        earlier = sum(lengths)
        means = torch.stack([part.mean(dim=2) for part in k[:, :, :earlier].split(lengths, dim=2)], dim=2)  # (B, H, n, D)
        scores = q @ means.transpose(2, 3)  # (B, H, S, n)
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(3, scores.topk(keep, dim=3).indices, True)
        mask = chosen.repeat_interleave(torch.tensor(lengths, device=q.device), dim=3, output_size=earlier)
        return F.pad(mask, (0, k.shape[2] - earlier), value=True)


def fused_kernels(q: Tensor):
    """(forward, backward) of the device's flash kernel, the one under `scaled_dot_product_attention`; None where it can't take q's type.

    forward(q, k, v) -> (out, log-sums [B, H, L] in fp32, what else backward wants);
    backward(grad, q, k, v, out, log-sums, the rest) -> gradients of q, k and v.
    """
    if q.device.type == "cpu" and q.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return _cpu_forward, _cpu_backward
    if q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0:
        return _cuda_forward, _cuda_backward
    return None


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, tuple]:
    return *torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v), ()


def _cpu_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, _: tuple) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, log_sum, 0.0, False)


def _cuda_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, tuple]:
    out, log_sum, *rest, _ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
    return out, log_sum, tuple(rest)


def _cuda_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, rest: tuple) -> tuple[Tensor, Tensor, Tensor]:
    cum_q, cum_k, max_q, max_k, seed, offset = rest
    log_sum = log_sum.contiguous()  # this kernel takes it to be packed
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(grad, q, k, v, out, log_sum, cum_q, cum_k, max_q, max_k, 0.0, False, seed, offset)


def kernel_calls(jobs: list[Job]) -> tuple[tuple[slice, ...], list[tuple[slice, slice]]]:
    """The jobs in few, large kernel calls: (an order of the queries, pairs (queries in that order, keys)).

    History chunk i and noisy chunk i + 1 read the same history: one row of the causal triangle, whose queries stand together in
    the new order. A triangle is its lower half's rows against the keys of its upper half, a rectangle, and two triangles of half
    the size. A noisy chunk meets itself in a call of its own.
    """
    def reads(job: Job) -> list[tuple[int, int]]:
        return [(keys.start, keys.stop) for keys in (job.earlier if job.noisy else job.keys)]

    jobs = sorted(jobs, key=reads)
    order, rows, found = tuple(job.queries for job in jobs), {}, []
    for job, queries in zip(jobs, spans([piece.stop - piece.start for piece in order])):
        for start, stop in reads(job):
            row = rows.setdefault(start, {}).setdefault(stop, [queries.start, queries.stop])
            row[1] = queries.stop
        if job.noisy:
            found.append((queries, job.own))
    for start, triangle in rows.items():
        _cover(start, [(stop, *queries) for stop, queries in triangle.items()], found)
    return order, found


def _cover(start: int, rows: list[tuple[int, int, int]], found: list[tuple[slice, slice]]) -> None:
    """Adds a triangle to `found`: rows of (where the keys stop, queries from, to), ascending and next to each other; all keys begin at `start`."""
    half = len(rows) // 2
    corner = rows[max(half - 1, 0)][0]
    found.append((slice(rows[half][1], rows[-1][2]), slice(start, corner)))
    if half:
        _cover(start, rows[:half], found)
        _cover(corner, rows[half:], found)


def merged_attention(q: Tensor, k: Tensor, v: Tensor, pairs: list[tuple[slice, slice]], kernel) -> tuple[Tensor, Tensor, list]:
    """Runs the kernel on each pair of queries and keys and merges: (output, log-sums, what else each call's backward wants)."""
    out, sums, rest = torch.zeros_like(q, dtype=torch.float32), q.new_full(q.shape[:3], float("-inf"), dtype=torch.float32), []
    for queries, keys in pairs:
        made, log_sum, more = kernel(q[:, :, queries], k[:, :, keys], v[:, :, keys])
        out[:, :, queries].lerp_(made.float(), torch.sigmoid(log_sum - sums[:, :, queries])[..., None])
        sums[:, :, queries] = torch.logaddexp(sums[:, :, queries], log_sum)
        rest.append(more)
    return out.to(q.dtype), sums, rest


class JobAttention(torch.autograd.Function):
    """All jobs of a pass. Backward needs q, k, v, the output and its log-sums: memory grows with tokens, not with their square.

    A query meets its keys in several calls, whose results merge by their log-sums. Flash attention's backward makes the softmax
    again from the whole row's output and log-sum, so each call's gradients come out right on their own.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, jobs: list[Job], kernels, kept: dict | None) -> Tensor:
        order, pairs = kernel_calls(jobs)
        q = take(q, order)
        if kept:
            out, sums, rest = kept.pop("attention")
        else:
            out, sums, rest = merged_attention(q, k, v, pairs, kernels[0])
            if kept is not None:
                kept["attention"] = out, sums, rest
        ctx.save_for_backward(q, k, v, out, sums)
        ctx.order, ctx.pairs, ctx.rest, ctx.backward_kernel = order, pairs, rest, kernels[1]
        return put_back(out, order)

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, out, sums = ctx.saved_tensors
        grad = take(grad, ctx.order)
        grad_q, grad_k, grad_v = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
        for (queries, keys), rest in zip(ctx.pairs, ctx.rest):
            asked, made, wanted, log_sum = (x[:, :, queries] for x in (q, out, grad, sums))
            dq, dk, dv = ctx.backward_kernel(wanted, asked, k[:, :, keys], v[:, :, keys], made, log_sum, rest)
            grad_q[:, :, queries] += dq
            grad_k[:, :, keys] += dk
            grad_v[:, :, keys] += dv
        return put_back(grad_q, ctx.order).to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), None, None, None
