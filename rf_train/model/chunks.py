"""Chunks, the autoregressive units of a clip, and which earlier chunks a chunk may read."""

from collections.abc import Iterator
from dataclasses import dataclass

from rf_train.settings import Kind, require_at_least

# How far away sinks are in videos that are longer than the training clips. relative: never farther than in training.
# absolute: as far as they are. Other chunks are read at relative distances that training had, either way.
POSITIONS = ("relative", "absolute")


@dataclass(frozen=True)
class Chunk:
    """A chunk in a pass: its index in the clip (0-based), and its length (latent frames or tokens)."""

    index: int
    length: int


@dataclass(frozen=True)
class Chunking:
    """How a clip is cut into chunks, in latent frames.

    The first chunk may differ (1: a single image starts the video).
    """

    chunk: int
    first: int

    def start(self, index: int) -> int:
        """First latent frame of chunk `index` (0-based)."""
        return 0 if index == 0 else self.first + (index - 1) * self.chunk

    def sizes(self, frames: int, begin: int = 0) -> list[int]:
        """Latent frames of each chunk in `frames` frames that begin with chunk `begin`. The last may be partial."""
        return list(self.each_size(frames, begin))

    def each_size(self, frames: int, begin: int = 0) -> Iterator[int]:
        """The same one by one, for videos of which nobody knows the end."""
        index = begin
        while frames > 0:
            size = min(self.chunk if index else self.first, frames)
            yield size
            index, frames = index + 1, frames - size

    def chunks(self, frames: int, begin: int = 0) -> tuple[Chunk, ...]:
        """The chunks of `frames` latent frames that begin with chunk `begin`."""
        return tuple(Chunk(begin + i, size) for i, size in enumerate(self.sizes(frames, begin)))

    @property
    def largest(self) -> int:
        """Latent frames of the largest chunk."""
        return max(self.chunk, self.first)


@dataclass(frozen=True)
class ModelPass:
    """The chunks of one forward pass of the model. Chunk lengths are latent frames."""

    noisy: tuple[Chunk, ...]
    history: tuple[Chunk, ...]  # history that this pass computes
    cache: int | None = None  # number of the K/V cache that earlier history is read from; None: no cache

    @property
    def frames(self) -> int:
        """Latent frames of both streams."""
        return sum(chunk.length for chunk in self.noisy + self.history)


class Attention(Kind):
    """Which earlier chunks a chunk reads, besides itself. One subclass per kind."""

    def visible(self, query: int, chunks: list[int]) -> list[int]:
        """Positions in `chunks` (chunk indices, ascending) of the earlier chunks that chunk `query` may read."""
        return [position for position, chunk in enumerate(chunks) if chunk < query]


@dataclass(frozen=True)
class Dense(Attention, kind="dense"):
    """All earlier chunks."""


@dataclass(frozen=True)
class Window(Attention, kind="window"):
    """The last `window` earlier chunks, and the first `sink` chunks of the video."""

    window: int = 6
    sink: int = 0

    def validate(self) -> None:
        require_at_least(1, self, "window")
        require_at_least(0, self, "sink")

    def visible(self, query: int, chunks: list[int]) -> list[int]:
        seen = super().visible(query, chunks)
        return [
            position for position in seen if chunks[position] >= query - self.window or chunks[position] < self.sink
        ]


@dataclass(frozen=True)
class Routed(Attention, kind="routed"):
    """For each query token and head, the `top_k` earlier chunks whose mean key matches the query best (eq. 8-9).

    Besides these, every query reads the last `window` earlier chunks, and the first `sink` chunks of the video.
    """

    top_k: int = 5
    window: int = 0
    sink: int = 0

    def validate(self) -> None:
        require_at_least(1, self, "top_k")
        require_at_least(0, self, "window", "sink")

    @property
    def read_chunks(self) -> int:
        """The earlier chunks that a query reads. With no more of them it reads all, and makes no choice."""
        return self.top_k + self.window + self.sink


@dataclass(frozen=True)
class RoutedWithin(Routed):
    """Routing in generation: among the last `reach` earlier chunks only, and the first `sink` ones.

    The K/V cache keeps no others. A chunk that becomes history is one of them, and reads one chunk less than a noisy
    one, as in the clips trained on.
    """

    reach: int = 1
    farthest_sink: int | None = None  # as in `WindowWithin`; None: sinks stay at their own positions


@dataclass(frozen=True)
class WindowWithin(Window):
    """A window in generation: to a chunk from `farthest_sink` + 1 on, the sinks look as to chunk `farthest_sink`.

    So the rotary positions of sinks move along with the video. Distances stay those of training when `farthest_sink`
    is the last chunk of the clips trained on.
    """

    farthest_sink: int = 1


def attention_at_any_length(trained: Attention, chunks: int, positions: str = "relative") -> Attention:
    """The attention of generation after training with `trained` on clips of `chunks` chunks.

    After routing it is routing itself, if the clips had so many chunks that it made a choice, among as many chunks as
    the history seen in training. Else it is a window as wide as that history, or training's own window if that is
    narrower. So a window's relative positions stay inside what was trained, however long the video gets: farther ones
    spoil it. `positions`: what happens to the sinks', one of `POSITIONS`.
    """
    seen = chunks - 1
    sink = trained.sink if isinstance(trained, (Window, Routed)) else 0
    farthest = seen if sink and positions == "relative" else None
    if isinstance(trained, Routed) and trained.read_chunks < seen:
        return RoutedWithin(trained.top_k, trained.window, trained.sink, reach=seen, farthest_sink=farthest)
    if isinstance(trained, Window) and trained.window + trained.sink <= seen:
        return trained if farthest is None else WindowWithin(trained.window, trained.sink, farthest_sink=farthest)
    return Window(window=max(1, seen))
