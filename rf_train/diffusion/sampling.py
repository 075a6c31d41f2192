"""Denoising chunk by chunk with a K/V cache (`denoise_chunk`, which rollouts use too), and generation with it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise

import torch
from torch import Tensor

from rf_train.diffusion import flow_matching
from rf_train.diffusion.flow_matching import FlowSettings
from rf_train.diffusion.randomness import normal
from rf_train.model.chunks import Attention, Chunking
from rf_train.model.kv_cache import KVCache
from rf_train.model.settings import ModelSettings
from rf_train.model.transformer import VelocityModel, pad_text


@dataclass
class Branch:
    """Terms of a guided velocity that are computed in one batch, with a K/V cache of their own.

    `text` [G B, text_len, text_dim] has the captions of all videos for the first term, then for the next one; the cache
    has the same order. `weights` are those of the G terms. Two branches of one term each give the same as one branch of
    two, up to rounding: they take twice as many passes, with half the activations at a time.
    """

    text: Tensor
    weights: tuple[float, ...]
    kv_cache: KVCache

    def velocity(
        self, model: VelocityModel, x: Tensor, t: Tensor, history: Tensor | None, attention: Attention, index: int
    ) -> Tensor:
        """The weighted sum of the velocities of chunk `index`, fp32: x [B, C, f, H, W] at t [B, f].

        `history` [B, C, f', H, W], the chunk before it, is appended to the cache.
        """
        out = model(
            noisy=self._for_each_term(x),
            t=self._for_each_term(t),
            history=None if history is None else self._for_each_term(history),
            text=self.text,
            attention=attention,
            noisy_chunk=index,
            kv_cache=self.kv_cache,
        )
        total: Tensor | float = 0.0
        for weight, part in zip(self.weights, out.float().chunk(len(self.weights))):
            total = total + weight * part
        return torch.as_tensor(total)

    def append(self, model: VelocityModel, chunk: Tensor, attention: Attention) -> None:
        """Writes the keys and values of a clean chunk [B, C, f, H, W] into the cache."""
        history = self._for_each_term(chunk)
        model(noisy=None, t=None, history=history, text=self.text, attention=attention, kv_cache=self.kv_cache)

    def change_text(self, text: Tensor) -> None:
        """Other captions of the first term, [B, text_len, text_dim]. Keys and values of text are made again."""
        self.text = torch.cat([text, self.text[len(text) :]])
        self.kv_cache.forget_text()

    def _for_each_term(self, x: Tensor) -> Tensor:
        return x if len(self.weights) == 1 else torch.cat([x] * len(self.weights))


def denoise_chunk(
    model: VelocityModel,
    branches: list[Branch],
    attention: Attention,
    index: int,
    x: Tensor,
    levels: list[Tensor],
    newest: Tensor | None,
    solver: str = "euler",
) -> Tensor:
    """Integrates dx/dt = v from levels[0] to levels[-1] for chunk `index`, conditioned on the cached chunks.

    x [B, C, f, H, W] is at levels[0]; each level is [B]. `newest` is the chunk before this one, clean and not yet in
    the caches. The first pass also writes its keys and values, which saves one pass per chunk. The velocity is the sum
    over branches. `solver`: one of `flow_matching.SOLVERS`. Returns the chunk at levels[-1].
    """
    frames, passes = x.shape[2], 0

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        nonlocal passes
        history, passes = (newest if passes == 0 else None), passes + 1
        found = [branch.velocity(model, x, t, history, attention, index) for branch in branches]
        return found[0] if len(found) == 1 else torch.stack(found).sum(0)

    spans = list(pairwise(level[:, None].expand(-1, frames) for level in levels))
    for step, (t, t_next) in enumerate(spans):
        v = velocity(x, t)
        moved = flow_matching.euler_step(x, v, t, t_next)
        if solver == "heun" and step < len(spans) - 1:
            moved = flow_matching.euler_step(x, (v + velocity(moved, t_next)) / 2, t, t_next)
        x = moved
    return x


@dataclass(frozen=True)
class VideoRequest:
    """B videos to sample, `frames` latent frames of `height` x `width` latent pixels each."""

    text: Tensor  # [B, text_len, text_dim] the captions
    empty_text: Tensor  # [B, text_len, text_dim] the empty caption, for guidance
    seeds: list[int]  # one per video
    frames: int
    height: int
    width: int
    given: Tensor | None = None  # [B, C, F, H, W] whole chunks that the videos begin with
    # Called before chunk i is generated: other captions [B, text_len, text_dim] from this chunk on, or None.
    new_text: Callable[[int], Tensor | None] | None = None

    @classmethod
    def like(
        cls,
        card: dict,
        settings: ModelSettings,
        device: torch.device,
        texts: list[Tensor],
        frames: int,
        seeds: list[int],
        given: Tensor | None = None,
    ) -> "VideoRequest":
        """Videos of the latent size of a dataset, whose card this is, for captions' embeddings, each [L, text_dim]."""
        empty = torch.tensor(card["empty_caption"], dtype=torch.float32)
        return cls(
            text=pad_text(texts, settings).to(device),
            empty_text=pad_text([empty] * len(texts), settings).to(device),
            seeds=seeds,
            frames=frames,
            height=card["latent"]["height"],
            width=card["latent"]["width"],
            given=None if given is None else given.to(device),
        )


def count_passes(chunking: Chunking, flow: FlowSettings, frames: int, given: int) -> int:
    """The model's passes in `sample_chunks` for `frames` latent frames, of which the first `given` are given.

    With one branch after the other.
    """
    known = len(chunking.sizes(given)) if given else 0
    branches = 1 if flow.guidance == 1 else 2
    per_chunk = flow.sampling_steps if flow.solver == "euler" else 2 * flow.sampling_steps - 1
    return branches * (max(0, known - 1) + (len(chunking.sizes(frames)) - known) * per_chunk)


@torch.no_grad()
def sample_chunks(
    model: VelocityModel,
    request: VideoRequest,
    flow: FlowSettings,
    attention: Attention,
    guidance_in_one_batch: bool = False,
) -> Iterator[Tensor]:
    """Yields the videos chunk by chunk, each [B, C, f, H, W] in fp32; the given chunks come first.

    The noise of chunk i of a video depends only on (seed, i), so a longer video begins like a shorter one. The velocity
    is v_empty + guidance (v_text - v_empty). With guidance 1 the empty branch isn't run. What is kept from chunk to
    chunk doesn't grow, except with attention that reads all earlier chunks.
    """
    given = _given_chunks(model, request)
    batch, device, size = len(request.text), request.text.device, (request.height, request.width)
    branches = make_branches(model, request, flow, attention, guidance_in_one_batch)
    schedule = flow_matching.schedule(flow.sampling_steps, flow.sampling_shift).to(device).float()
    levels = [level.expand(batch) for level in schedule]

    newest = None  # the newest chunk, not yet in the caches
    for index, frames in enumerate(model.chunking.each_size(request.frames)):
        if index < len(given):
            if newest is not None:
                for branch in branches:
                    branch.append(model, newest, attention)
            newest = given[index]
        else:
            text = request.new_text(index) if request.new_text is not None else None
            if text is not None:
                branches[0].change_text(text.to(device))
            shape = (model.settings.channels, frames, *size)
            noise = [normal(shape, seed, index, "sample", "generation") for seed in request.seeds]
            x = torch.stack(noise).to(device)
            newest = denoise_chunk(model, branches, attention, index, x, levels, newest, flow.solver)
        yield newest


def make_branches(
    model: VelocityModel, request: VideoRequest, flow: FlowSettings, attention: Attention, in_one_batch: bool
) -> list[Branch]:
    """The terms of the guided velocity: in one branch, or in one each. The captions come first."""
    tokens = model.settings.tokens_per_frame(request.height, request.width)
    terms = [(request.text, 1.0)]
    if flow.guidance != 1:
        terms = [(request.text, flow.guidance), (request.empty_text, 1 - flow.guidance)]
    groups = [terms] if in_one_batch else [[term] for term in terms]
    branches = []
    for group in groups:
        text = torch.cat([text for text, _ in group])
        cache = model.new_kv_cache(len(text), tokens, request.frames, attention)
        branches.append(Branch(text, tuple(weight for _, weight in group), cache))
    return branches


def _given_chunks(model: VelocityModel, request: VideoRequest) -> list[Tensor]:
    """The given latents, cut into chunks, in fp32. Raises ValueError when they are not whole chunks."""
    if request.given is None:
        return []
    frames = request.given.shape[2]
    given_sizes = model.chunking.sizes(frames)
    expected = islice(model.chunking.each_size(request.frames), len(given_sizes))
    if given_sizes != list(expected):
        chunking = f"chunk {model.chunking.chunk}, first {model.chunking.first}"
        raise ValueError(f"{frames} given latent frames are not a whole number of chunks ({chunking})")
    return list(request.given.float().split(given_sizes, dim=2))


def sample(model: VelocityModel, request: VideoRequest, flow: FlowSettings, attention: Attention) -> Tensor:
    """`sample_chunks`, joined: [B, C, frames, H, W]."""
    return torch.cat(list(sample_chunks(model, request, flow, attention)), dim=2)
