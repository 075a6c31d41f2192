"""The attention of both streams, over the blocks that exist and no others (Figure 3c).

    history chunk i reads history chunks <= i
    noisy chunk i   reads history chunks <  i, and itself

So each chunk's queries meet a few runs of neighbouring keys, mostly one or two: a job. No mask is built except for routing, whose
choice differs by query token. Suffixes: B batch, H heads, L tokens, D head width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rf_train.chunks import Attention


@dataclass(frozen=True)
class Job:
    """One chunk's queries and the keys they meet, as places along L; the last run of keys is the chunk's own."""

    queries: slice
    keys: tuple[slice, ...]
    earlier: tuple[int, ...]  # tokens of each earlier chunk among the keys, in order


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


def run(x: Tensor, pieces: tuple[slice, ...]) -> Tensor:
    """The tokens of the pieces of x [B, H, L, D]: a view of one piece, a copy of several."""
    parts = [x[:, :, piece] for piece in pieces]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def two_stream_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    history: list[tuple[int, int]],
    noisy: list[tuple[int, int]],
    attention: Attention,
    memory=None,
    noisy_only: bool = False,
) -> Tensor:
    """Attention of a run of history chunks followed by a run of noisy chunks.

    q, k, v [B, H, L, D] hold the history chunks' tokens, then the noisy ones', in the order of `history` and `noisy`: pairs of
    (chunk index, tokens). `memory`, a `LayerCache`, holds earlier history and is given the new history chunks. With `noisy_only`
    q has no history tokens and only noisy outputs are returned. Returns [B, H, L of q, D].
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
    jobs, begin = [], 0
    asking = list(zip(noisy, own_noisy)) if noisy_only else [*zip(history, own_history), *zip(noisy, own_noisy)]
    for (index, count), own in asking:
        seen = [places[position] for position in attention.visible(index, held)]
        jobs.append(Job(slice(begin, begin + count), contiguous([*seen, own]), tuple(place.stop - place.start for place in seen)))
        begin += count
    if not jobs:
        return q[:, :, :0]
    if attention.kind == "routed":
        return torch.cat([routed_job(q, k, v, job, attention.k) for job in jobs], dim=2)
    if torch.is_grad_enabled() and (kernels := fused_kernels(q)):
        return JobAttention.apply(q, k, v, jobs, kernels)
    return torch.cat([F.scaled_dot_product_attention(q[:, :, job.queries], run(k, job.keys), run(v, job.keys)) for job in jobs], dim=2)


def routed_job(q: Tensor, k: Tensor, v: Tensor, job: Job, keep: int) -> Tensor:
    """One chunk's attention with history routing."""
    q, k, v = q[:, :, job.queries], run(k, job.keys), run(v, job.keys)
    mask = routed_mask(q, k, list(job.earlier), keep) if len(job.earlier) > keep else None
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
    """(forward, backward) of the device's flash kernel, the one under `scaled_dot_product_attention`; None where it can't take q's type."""
    if q.device.type == "cpu" and q.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return _cpu_forward, _cpu_backward
    if q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0:
        return _cuda_forward, _cuda_backward
    return None


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple]:
    out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return out, (log_sum,)


def _cpu_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: tuple) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, *saved, 0.0, False)


def _cuda_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple]:
    out, log_sum, cum_q, cum_k, max_q, max_k, seed, offset, _ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
    return out, (log_sum, cum_q, cum_k, max_q, max_k, seed, offset)


def _cuda_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: tuple) -> tuple[Tensor, Tensor, Tensor]:
    log_sum, cum_q, cum_k, max_q, max_k, seed, offset = saved
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(grad, q, k, v, out, log_sum, cum_q, cum_k, max_q, max_k, 0.0, False, seed, offset)


class JobAttention(torch.autograd.Function):
    """All jobs of a pass. Backward needs q, k, v, the output and its log-sums, and gathers each job's keys again: memory grows with tokens, not with their square."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, jobs: list[Job], kernels) -> Tensor:
        results = [kernels[0](q[:, :, job.queries], run(k, job.keys), run(v, job.keys)) for job in jobs]
        out = torch.cat([out for out, _ in results], dim=2)
        ctx.save_for_backward(q, k, v, out)
        ctx.jobs, ctx.backward_kernel, ctx.saved = jobs, kernels[1], [saved for _, saved in results]
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, out = ctx.saved_tensors
        grad_q, grad_k, grad_v = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (q, k, v))
        for job, saved in zip(ctx.jobs, ctx.saved):
            asked, piece, made = (x[:, :, job.queries] for x in (q, grad, out))
            dq, dk, dv = ctx.backward_kernel(piece, asked, run(k, job.keys), run(v, job.keys), made, saved)
            grad_q[:, :, job.queries] = dq
            begin = 0
            for place in job.keys:
                part = slice(begin, begin + place.stop - place.start)
                grad_k[:, :, place] += dk[:, :, part]
                grad_v[:, :, place] += dv[:, :, part]
                begin = part.stop
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), None, None
