"""The attention of both streams, over the blocks that exist and no others (Figure 3c).

    history chunk i reads history chunks <= i
    noisy chunk i   reads history chunks <  i, and itself

Suffixes: B batch, H heads, L tokens, D head width. No mask is built except for routing, whose choice differs by query token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rf_train.chunks import Attention


def spans(lengths: list[int]) -> list[slice]:
    """Consecutive slices of the given lengths."""
    found, begin = [], 0
    for length in lengths:
        found.append(slice(begin, begin + length))
        begin += length
    return found


def chunk_attention(
    q: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    index: int,
    memory_k: Tensor,
    memory_v: Tensor,
    held: list[int],
    memory_spans: list[slice],
    attention: Attention,
) -> Tensor:
    """One chunk's queries against the earlier chunks in memory that `attention` lets it read, and its own keys.

    q, own_k, own_v [B, H, S, D]; memory_k, memory_v [B, H, M, D]; `held` names the chunk of each of `memory_spans`. Returns [B, H, S, D].
    """
    seen = attention.visible(index, held)
    if not seen:
        return F.scaled_dot_product_attention(q, own_k, own_v)
    pieces = contiguous([memory_spans[position] for position in seen])
    k = torch.cat([memory_k[:, :, piece] for piece in pieces] + [own_k], dim=2)
    v = torch.cat([memory_v[:, :, piece] for piece in pieces] + [own_v], dim=2)
    mask = None
    if attention.kind == "routed" and len(seen) > attention.k:
        lengths = [memory_spans[position].stop - memory_spans[position].start for position in seen]
        mask = routed_mask(q, k, lengths, own_k.shape[2], attention.k)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def routed_mask(q: Tensor, k: Tensor, lengths: list[int], own: int, keep: int) -> Tensor:
    """History routing (eq. 8-9): True where a query token may look.

    For each query and head the `keep` earlier chunks j with the largest q . mean(K_j), and its own chunk. q [B, H, S, D];
    k [B, H, sum(lengths) + own, D], keys as attention sees them (after rotary embedding). Returns bool [B, H, S, sum(lengths) + own].
    The choice is not differentiated.
    """
    with torch.no_grad():
        means = torch.stack([part.mean(dim=2) for part in k[:, :, : k.shape[2] - own].split(lengths, dim=2)], dim=2)  # (B, H, n, D)
        scores = q @ means.transpose(2, 3)  # (B, H, S, n)
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(3, scores.topk(keep, dim=3).indices, True)
        repeats = torch.tensor(lengths, device=q.device)
        mask = chosen.repeat_interleave(repeats, dim=3, output_size=sum(lengths))
        return F.pad(mask, (0, own), value=True)


def contiguous(pieces: list[slice]) -> list[slice]:
    """Joins neighbouring slices."""
    joined = [pieces[0]]
    for piece in pieces[1:]:
        if piece.start == joined[-1].stop:
            joined[-1] = slice(joined[-1].start, piece.stop)
        else:
            joined.append(piece)
    return joined


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
    history_tokens = sum(tokens for _, tokens in history)
    history_spans = spans([tokens for _, tokens in history])
    if memory is not None:
        memory.append(k[:, :, :history_tokens], v[:, :, :history_tokens], history)
        memory_k, memory_v, held, memory_spans = memory.k, memory.v, memory.held, memory.spans
    else:
        memory_k, memory_v, held, memory_spans = k, v, [index for index, _ in history], history_spans
    outputs = []
    if not noisy_only:
        for (index, _), span in zip(history, history_spans):
            outputs.append(chunk_attention(q[:, :, span], k[:, :, span], v[:, :, span], index, memory_k, memory_v, held, memory_spans, attention))
    skipped = history_tokens if noisy_only else 0
    begin = history_tokens
    for index, tokens in noisy:
        span = slice(begin, begin + tokens)
        queries = q[:, :, begin - skipped : begin - skipped + tokens]
        outputs.append(chunk_attention(queries, k[:, :, span], v[:, :, span], index, memory_k, memory_v, held, memory_spans, attention))
        begin += tokens
    return torch.cat(outputs, dim=2) if outputs else q[:, :, :0]
