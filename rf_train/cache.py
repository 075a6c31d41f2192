"""The K/V cache of chunk-by-chunk passes: preallocated, appended chunk by chunk.

Pass it by keyword: ZeRO-3's hooks rebuild positional lists and tuples, and appends to the copies are lost.
"""

import torch
from torch import Tensor

from rf_train.attention import spans


class LayerCache:
    """Keys and values of one layer's history: buffers [B, H, capacity, D], filled from the front.

    `held` are the chunk indices in the buffer. When a new chunk doesn't fit, the oldest chunks that are not among the first `sink`
    are dropped: the caller sizes the buffer so that they are out of every later chunk's window. Past the capacity there is room for
    `scratch` tokens of a noisy chunk, so that it and the history before it are one run of keys without a copy.
    """

    def __init__(self, batch: int, heads: int, capacity: int, scratch: int, head_dim: int, sink: int, dtype: torch.dtype, device: torch.device):
        self.buffer_k = torch.empty(batch, heads, capacity + scratch, head_dim, dtype=dtype, device=device)
        self.buffer_v = torch.empty_like(self.buffer_k)
        self.capacity, self.sink = capacity, sink
        self.held: list[int] = []
        self.lengths: list[int] = []
        self.text: tuple[Tensor, Tensor] | None = None  # cross-attention's keys and values of the caption, made once

    @property
    def k(self) -> Tensor:
        return self.buffer_k[:, :, : sum(self.lengths)]

    @property
    def v(self) -> Tensor:
        return self.buffer_v[:, :, : sum(self.lengths)]

    @property
    def spans(self) -> list[slice]:
        return spans(self.lengths)

    def append(self, k: Tensor, v: Tensor, chunks: list[tuple[int, int]]) -> None:
        """Adds the history chunks `chunks`, pairs of (index, tokens), whose keys and values are `k`, `v` [B, H, tokens, D]."""
        begin = 0
        for index, tokens in chunks:
            self._make_room(tokens)
            filled = sum(self.lengths)
            self.buffer_k[:, :, filled : filled + tokens] = k[:, :, begin : begin + tokens]
            self.buffer_v[:, :, filled : filled + tokens] = v[:, :, begin : begin + tokens]
            self.held.append(index)
            self.lengths.append(tokens)
            begin += tokens

    def followed_by(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """History's keys and values with those of noisy chunks [B, H, tokens, D] behind them; these are not kept."""
        filled, tokens = sum(self.lengths), k.shape[2]
        if filled + tokens > self.buffer_k.shape[2]:
            return torch.cat([self.k, k], dim=2), torch.cat([self.v, v], dim=2)
        self.buffer_k[:, :, filled : filled + tokens] = k
        self.buffer_v[:, :, filled : filled + tokens] = v
        return self.buffer_k[:, :, : filled + tokens], self.buffer_v[:, :, : filled + tokens]

    def _make_room(self, tokens: int) -> None:
        while sum(self.lengths) + tokens > self.capacity:
            victim = sum(1 for index in self.held if index < self.sink)
            if victim >= len(self.held):
                raise ValueError(f"a chunk of {tokens} tokens does not fit a cache of {self.capacity} tokens")
            hole, filled = self.spans[victim], sum(self.lengths)
            for buffer in (self.buffer_k, self.buffer_v):
                buffer[:, :, hole.start : filled - (hole.stop - hole.start)] = buffer[:, :, hole.stop : filled].clone()
            del self.held[victim], self.lengths[victim]


class Cache:
    """One `LayerCache` a layer, and the number of history chunks written so far. One cache serves one guidance branch."""

    def __init__(self, layers: int, batch: int, heads: int, capacity: int, scratch: int, head_dim: int, dtype: torch.dtype, device: torch.device, sink: int = 0):
        """`capacity` and `scratch` in tokens. Raises ValueError with the bytes needed when the device can't give them."""
        self.bytes = cache_bytes(layers, batch, heads, capacity + scratch, head_dim, dtype)
        try:
            self.layers = [LayerCache(batch, heads, capacity, scratch, head_dim, sink, dtype, device) for _ in range(layers)]
        except RuntimeError as error:  # torch's out-of-memory errors are RuntimeErrors
            raise ValueError(f"a K/V cache of {capacity + scratch} tokens takes {self.bytes / 2**30:.2f} GiB, which {device} can't give: {error}".splitlines()[0]) from None
        self.chunks = 0


def cache_bytes(layers: int, batch: int, heads: int, capacity: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values of a cache of `capacity` tokens."""
    return 2 * layers * batch * heads * capacity * head_dim * dtype.itemsize
