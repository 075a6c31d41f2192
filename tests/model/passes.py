"""The two ways to run a model over a clip, in parallel and chunk by chunk with a cache; and the attentions to try."""

import torch
from torch import Tensor

from rf_train.model.chunks import Attention, Dense, Routed, Window

ATTENTIONS = [Dense(), Window(window=2), Window(window=2, sink=1), Routed(top_k=2)]


def kind_and_sink(attention: Attention) -> str:
    """The name of an attention in a test's id."""
    return f"{attention.kind}{getattr(attention, 'sink', 0) or ''}"


def parallel_pass(model, x: Tensor, history: Tensor, t: Tensor, text: Tensor, attention: Attention) -> Tensor:
    """The velocity of all chunks in one pass."""
    frames = sum(model.chunking.sizes(x.shape[2])[:-1])
    past = history[:, :, :frames] if frames else None
    return model(noisy=x, t=t, history=past, text=text, attention=attention)


def cached_pass(model, x: Tensor, history: Tensor, t: Tensor, text: Tensor, attention: Attention) -> Tensor:
    """The same chunk after chunk. Each pass appends the newest history chunk to the cache."""
    sizes = model.chunking.sizes(x.shape[2])
    cache = model.new_kv_cache(len(x), model.settings.tokens_per_frame(*x.shape[3:]), x.shape[2], attention)
    made, begin = [], 0
    for index, size in enumerate(sizes):
        newest = history[:, :, begin - sizes[index - 1] : begin] if index else None
        span = slice(begin, begin + size)
        made.append(
            model(
                noisy=x[:, :, span], t=t[:, span], history=newest, text=text, attention=attention, noisy_chunk=index,
                kv_cache=cache,
            )
        )  # fmt: skip
        begin += size
    return torch.cat(made, dim=2)
