"""Videos as a stream of frames: each chunk is sampled, decoded and handed out before the next one begins.

    generator = open_run("runs/mine")
    video = stream(generator, "a boat on a lake", seconds=3600)
    write(video, "boat.mp4", video.fps)

What is kept does not grow with the video's length: the K/V cache holds what can still be read, the decoder its causal
state, the file's writer a few frames.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from data_prep.video import VideoWriter
from rf_train.diffusion.sampling import VideoRequest, sample_chunks
from rf_train.engine.shared_work import ranks_here
from rf_train.generation.generator import Generator
from rf_train.generation.memory import BatchPlan, Memory, memory_needed
from rf_train.generation.prompts import Prompts
from rf_train.model.transformer import pad_text

ENDLESS = 10**9  # seconds of a video that goes on until somebody stops it


@dataclass(frozen=True)
class Videos:
    """B videos that are made together, of equal length.

    `given` [B, C, F, H, W]: latents of whole chunks that they begin with. `live` is asked before each chunk for a new
    prompt of all videos, or None; where ranks make the videos together, its answer on the leader counts.
    """

    generator: Generator
    prompts: Sequence[Prompts]
    seeds: Sequence[int]
    seconds: float
    negative: str = ""  # what guidance leads away from; "" is the empty caption
    given: Tensor | None = None
    guidance_in_one_batch: bool = False
    live: Callable[[], str | None] | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for a prompt that is never shown."""
        if any(len(prompts.times) > 1 for prompts in self.prompts):
            given = 0 if self.given is None else len(self.generator.model.chunking.sizes(self.given.shape[2]))
            for prompts in self.prompts:
                prompts.check_shown(self.begins, given, self.chunk_count)

    @property
    def fps(self) -> float:
        return self.generator.fps

    def begins(self, chunk: int) -> float:
        """The second at which a chunk begins."""
        return self.generator.geometry.video_frames(self.generator.model.chunking.start(chunk)) / self.fps

    def text_of_frames(self, video: int, frames: int) -> list[str]:
        """The prompt of each of a video's first frames: that of the frame's chunk."""
        prompts = self.prompts[video]
        found: list[str] = []
        for chunk in range(self.chunk_count):
            end = self.generator.geometry.video_frames(self.generator.model.chunking.start(chunk + 1))
            found += [prompts.texts[prompts.at(self.begins(chunk))]] * (min(end, frames) - len(found))
        return found

    @property
    def frames(self) -> int:
        """Frames of each video."""
        return max(1, round(self.seconds * self.fps))

    @property
    def latent_frames(self) -> int:
        return self.generator.geometry.latent_frames(self.frames)

    @property
    def chunk_count(self) -> int:
        chunking, frames = self.generator.model.chunking, self.latent_frames
        return 1 + max(0, -(-(frames - chunking.first) // chunking.chunk))

    @property
    def memory(self) -> Memory:
        """What one video needs, and what is free."""
        return memory_needed(self.generator, self.latent_frames, ranks_here())

    def chunks(self) -> Iterator[list[np.ndarray]]:
        """Yields for each chunk the frames of each video: uint8 [f, H, W, 3]. On the leader; others take `latents`."""
        generator, made = self.generator, 0
        decoders = [generator.codec.decoder() for _ in self.prompts]
        for chunk, latent in enumerate(self.latents()):
            if not latent.isfinite().all():
                reason = "the weights have diverged, or flow.guidance is too large"
                raise ValueError(
                    f"chunk {chunk} (at {self.begins(chunk):.4g} s) has numbers that are not finite: {reason}"
                )
            frames = [decode(part) for decode, part in zip(decoders, latent.float().cpu())]
            frames = [part[: self.frames - made] for part in frames]
            made += len(frames[0])
            if len(frames[0]):
                yield frames

    def latents(self) -> Iterator[Tensor]:
        """Yields the videos' latents chunk by chunk, each [B, C, f, H, W] in fp32; on all ranks that make them."""
        generator, (text, renewed) = self.generator, self._captions()
        request = VideoRequest.like(
            generator.card, generator.recipe.model, generator.device, text, self.latent_frames, list(self.seeds),
            self.given,
        )  # fmt: skip
        request = replace(request, new_text=renewed)
        if self.negative:
            negative = generator.embed([self.negative]) * len(self.prompts)
            request = replace(request, empty_text=pad_text(negative, generator.recipe.model).to(generator.device))
        yield from sample_chunks(
            generator.velocity, request, generator.recipe.flow, generator.attention, self.guidance_in_one_batch
        )

    def _captions(self) -> tuple[list[Tensor], Callable[[int], Tensor | None]]:
        """The captions that the videos begin with, and a function that gives those from a later chunk on, if new."""
        generator, settings = self.generator, self.generator.recipe.model
        known = dict.fromkeys(text for prompts in self.prompts for text in prompts.texts)
        vectors = dict(zip(known, generator.embed(list(known))))
        now = [0] * len(self.prompts)

        def renewed(chunk: int) -> Tensor | None:
            typed = None if self.live is None else generator.tell(self.live)
            if typed is not None:
                return pad_text(generator.embed([typed]) * len(self.prompts), settings)
            numbers = [prompts.at(self.begins(chunk)) for prompts in self.prompts]
            if numbers == now:
                return None
            now[:] = numbers
            return pad_text([vectors[p.texts[n]] for p, n in zip(self.prompts, numbers)], settings)

        return [vectors[prompts.texts[0]] for prompts in self.prompts], renewed


class Stream:
    """One video: iterate to get each chunk's frames, uint8 [f, H, W, 3], as soon as they are made."""

    def __init__(self, videos: Videos, live: Callable[[], str | None] | None = None):
        """`live`: see `Videos`. Raises ValueError when the memory that is free does not suffice."""
        self.memory = videos.memory
        self.plan: BatchPlan = self.memory.plan(1)
        self.videos = replace(videos, guidance_in_one_batch=self.plan.guidance_in_one_batch, live=live)
        self.fps, self.frames, self.chunk_count = videos.fps, videos.frames, videos.chunk_count

    def __iter__(self) -> Iterator[np.ndarray]:
        return (frames for [frames] in self.videos.chunks())


def stream(
    generator: Generator,
    prompt: str | list[str] = "",
    seconds: float = 15.0,
    seed: int = 0,
    negative: str = "",
    given: Tensor | None = None,
) -> Stream:
    """A video of `seconds`, made while you iterate. `prompt`: a text, or several like "0: a boat" and "5: a storm".

    `given` [1, C, F, H, W]: the latents of whole chunks that it begins with (see `given.py`). Raises ValueError for
    prompts that can't be read, and when the memory that is free does not suffice.
    """
    return Stream(Videos(generator, [Prompts.of(prompt)], [seed], seconds, negative, given))


def write(chunks: Iterable[np.ndarray], path: str | Path, fps: float) -> int:
    """Writes the chunks' frames, uint8 [f, H, W, 3], as an mp4 while they come. The file appears when it is whole.

    Returns the number of its frames.
    """
    with VideoWriter(path, fps) as writer:
        for frames in chunks:
            writer.write(frames)
    return writer.frames
