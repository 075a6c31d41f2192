"""The K/V cache of chunk-by-chunk passes: preallocated, appended chunk by chunk.

Pass it to the model by keyword. ZeRO-3's hooks rebuild positional lists and tuples, and appends to the copies are lost.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rf_train.model.chunks import Chunk
from rf_train.model.rope import rotary_table, rotate


def consecutive_slices(lengths: Sequence[int], begin: int = 0) -> list[slice]:
    """Slices of the given lengths, one after another."""
    slices = []
    for length in lengths:
        slices.append(slice(begin, begin + length))
        begin += length
    return slices


def chunk_means(k: Tensor, lengths: Sequence[int]) -> Tensor:
    """The mean key of each chunk: k [B, H, L, D] in chunks of `lengths` tokens -> fp32 (or fp64) [B, H, chunks, D]."""
    wide = torch.promote_types(k.dtype, torch.float32)
    return torch.stack([part.mean(dim=2, dtype=wide) for part in k.split(list(lengths), dim=2)], dim=2)


class LayerKVCache:
    """Keys and values of one layer's history, in buffers [B, H, capacity + scratch, D] that are filled from the front.

    `chunks` are the indices of the cached chunks, `lengths` their tokens. When a new chunk doesn't fit, or would be one
    more than `most`, the oldest chunks are dropped, except the first `sink` ones. The caller makes the buffer so large
    that no later chunk may read the dropped ones. After the history there is room for `scratch` tokens of a noisy
    chunk. So the keys of history and noisy chunk are contiguous without a copy.

    Keys are at their rotary positions in the video, except those of sinks after `move_sinks`.
    """

    def __init__(
        self, batch: int, heads: int, capacity: int, scratch: int, head_dim: int, sink: int, dtype: torch.dtype,
        device: torch.device, most: int | None = None,
    ):  # fmt: skip
        self.buffer_k = torch.empty(batch, heads, capacity + scratch, head_dim, dtype=dtype, device=device)
        self.buffer_v = torch.empty_like(self.buffer_k)
        self.capacity, self.sink, self.most = capacity, sink, most
        self.chunks: list[int] = []
        self.lengths: list[int] = []
        self._sink_k: Tensor | None = None  # the sinks' keys at their own positions, once they are moved
        self._means: Tensor | None = None  # of the first cached chunks, as many as were asked for
        self.text: tuple[Tensor, Tensor] | None = None  # cross-attention's keys and values, computed once per caption

    @property
    def tokens(self) -> int:
        """Cached tokens."""
        return sum(self.lengths)

    @property
    def k(self) -> Tensor:
        return self.buffer_k[:, :, : self.tokens]

    @property
    def v(self) -> Tensor:
        return self.buffer_v[:, :, : self.tokens]

    @property
    def chunk_slices(self) -> list[slice]:
        """The tokens of each cached chunk, as slices."""
        return consecutive_slices(self.lengths)

    def means(self) -> Tensor:
        """The mean key of each cached chunk, fp32 [B, H, chunks, D], for routing. Each is computed once."""
        known = 0 if self._means is None else self._means.shape[2]
        if known < len(self.lengths):
            begin = sum(self.lengths[:known])
            new = chunk_means(self.k[:, :, begin:], self.lengths[known:])
            self._means = new if self._means is None else torch.cat([self._means, new], dim=2)
        assert self._means is not None
        return self._means

    def append(self, k: Tensor, v: Tensor, chunks: Sequence[Chunk]) -> None:
        """Adds history chunks (lengths in tokens) with their keys and values `k`, `v` [B, H, tokens, D]."""
        for chunk, piece in zip(chunks, consecutive_slices([chunk.length for chunk in chunks])):
            self._make_room(chunk.length)
            place = slice(self.tokens, self.tokens + chunk.length)
            self.buffer_k[:, :, place] = k[:, :, piece]
            self.buffer_v[:, :, place] = v[:, :, piece]
            self.chunks.append(chunk.index)
            self.lengths.append(chunk.length)

    def followed_by(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of history, followed by those of noisy chunks, `k` and `v` [B, H, tokens, D].

        Those of noisy chunks don't stay in the cache.
        """
        end = self.tokens + k.shape[2]
        if end > self.buffer_k.shape[2]:
            return torch.cat([self.k, k], dim=2), torch.cat([self.v, v], dim=2)
        self.buffer_k[:, :, self.tokens : end] = k
        self.buffer_v[:, :, self.tokens : end] = v
        return self.buffer_k[:, :, :end], self.buffer_v[:, :, :end]

    def move_sinks(self, rotation: Tensor) -> None:
        """Rotates the sinks' keys on from their own positions: fp32 [1, D / 2, 2], see `rotary_table`.

        Attention sees differences of positions only. So this is the same as to move all other chunks, and the queries,
        the other way. It rotates the keys as they were written: rounding errors don't add up. The sinks' mean keys stay
        as they were, because every query reads the sinks, and none scores them.
        """
        tokens = sum(length for index, length in zip(self.chunks, self.lengths) if index < self.sink)
        if self._sink_k is None:
            self._sink_k = self.buffer_k[:, :, :tokens].clone()
        assert self._sink_k.shape[2] == tokens, "sinks are moved when all of them are there"
        self.buffer_k[:, :, :tokens] = rotate(self._sink_k, rotation)

    def _make_room(self, tokens: int) -> None:
        """Drops the oldest chunks until a chunk of `tokens` tokens fits."""
        while self.tokens + tokens > self.capacity or len(self.chunks) == self.most:
            oldest = sum(index < self.sink for index in self.chunks)
            if oldest >= len(self.chunks):
                raise ValueError(f"a chunk of {tokens} tokens does not fit a cache of {self.capacity} tokens")
            hole, filled = self.chunk_slices[oldest], self.tokens
            for buffer in (self.buffer_k, self.buffer_v):
                buffer[:, :, hole.start : filled - (hole.stop - hole.start)] = buffer[:, :, hole.stop : filled].clone()
            del self.chunks[oldest], self.lengths[oldest]
            if self._means is not None:
                self._means = torch.cat([self._means[:, :, :oldest], self._means[:, :, oldest + 1 :]], dim=2)


class KVCache:
    """One `LayerKVCache` per layer, and the number of history chunks written so far.

    Each guidance branch has its own cache.
    """

    def __init__(
        self, layers: int, batch: int, heads: int, capacity: int, scratch: int, head_dim: int, dtype: torch.dtype,
        device: torch.device, sink: int = 0, most: int | None = None,
    ):  # fmt: skip
        """`capacity` and `scratch` in tokens; `sink` and `most`: see `LayerKVCache`.

        Raises a ValueError that gives the size in GiB when the device doesn't have enough memory.
        """
        self.bytes = kv_cache_bytes(layers, batch, heads, capacity + scratch, head_dim, dtype)
        layer = (batch, heads, capacity, scratch, head_dim, sink, dtype, device, most)
        try:
            self.layers = [LayerKVCache(*layer) for _ in range(layers)]
        except RuntimeError as error:  # torch's out-of-memory errors are RuntimeErrors
            needed = f"a K/V cache of {capacity + scratch} tokens takes {self.bytes / 2**30:.2f} GiB"
            reason = str(error).splitlines()[0]
            raise ValueError(f"{needed}, which {device} can't give: {reason}") from None
        self.chunks_written = 0
        self.sinks_moved = 0  # latent frames

    def move_sinks(self, frames: int) -> None:
        """Moves the rotary positions of all sinks by this many latent frames from their own."""
        if frames == self.sinks_moved:
            return
        buffer = self.layers[0].buffer_k
        rotation = rotary_table(frames, 1, 1, 1, buffer.shape[3], buffer.device)
        for layer in self.layers:
            layer.move_sinks(rotation)
        self.sinks_moved = frames

    def forget_text(self) -> None:
        """Drops cross-attention's keys and values: the next pass makes them, from the caption that it is given."""
        for layer in self.layers:
            layer.text = None


def kv_cache_bytes(layers: int, batch: int, heads: int, tokens: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of `tokens` tokens."""
    return 2 * layers * batch * heads * tokens * head_dim * dtype.itemsize
