"""Chunks: the autoregressive units of a clip, and which of them a chunk may read."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chunking:
    """Latent frames a chunk; the first one may be shorter or longer (1: an image starts the video)."""

    chunk: int
    first: int

    def start(self, index: int) -> int:
        """First latent frame of chunk `index` (0-based)."""
        return 0 if index == 0 else self.first + (index - 1) * self.chunk

    def sizes(self, frames: int, begin: int = 0) -> list[int]:
        """Latent frames of each chunk of a run of `frames` that begins with chunk `begin`; the last may be partial."""
        sizes = []
        while frames > 0:
            full = self.first if begin + len(sizes) == 0 else self.chunk
            sizes.append(min(full, frames))
            frames -= sizes[-1]
        return sizes


@dataclass(frozen=True)
class Attention:
    """Which earlier chunks a chunk reads, besides its own.

    kind "dense": all. "window": the last `window`, and the first `sink` chunks. "routed": for each query token and head the `k`
    whose mean key has the largest product with the query (eq. 8-9).
    """

    kind: str = "dense"
    window: int = 0
    sink: int = 0
    k: int = 0

    def visible(self, query: int, held: list[int]) -> list[int]:
        """Positions in `held` (chunk indices, ascending) of the earlier chunks that chunk `query` may read."""
        return [
            position
            for position, chunk in enumerate(held)
            if chunk < query and (self.kind != "window" or chunk >= query - self.window or chunk < self.sink)
        ]
