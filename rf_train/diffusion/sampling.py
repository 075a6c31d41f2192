"""Denoising chunk by chunk with a K/V cache (`denoise_chunk`, which rollouts use too), and generation with it."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from rf_train.diffusion import flow_matching
from rf_train.diffusion.flow_matching import FlowSettings
from rf_train.diffusion.randomness import normal
from rf_train.model.chunks import Attention, Chunking
from rf_train.model.kv_cache import KVCache
from rf_train.model.settings import ModelSettings
from rf_train.model.transformer import VelocityModel, pad_text


@dataclass(frozen=True)
class Branch:
    """One term of a guided velocity: captions [B, text_len, text_dim], their weight, and their own K/V cache."""

    text: Tensor
    weight: float
    kv_cache: KVCache


def denoise_chunk(
    model: VelocityModel,
    branches: list[Branch],
    attention: Attention,
    index: int,
    x: Tensor,
    levels: list[Tensor],
    newest: Tensor | None,
) -> Tensor:
    """Integrates dx/dt = v from levels[0] to levels[-1] for chunk `index`, conditioned on the cached chunks.

    x [B, C, f, H, W] is at levels[0]; each level is [B]. `newest` is the chunk before this one, clean and not yet in
    the caches. The first pass also writes its keys and values, which saves one pass per chunk. The velocity is the
    weighted sum over branches. Returns the chunk at levels[-1].
    """
    frames = x.shape[2]
    for step, (t, t_next) in enumerate(pairwise(level[:, None].expand(-1, frames) for level in levels)):
        v: Tensor | float = 0.0
        for branch in branches:
            out = model(
                noisy=x,
                t=t,
                history=newest if step == 0 else None,
                text=branch.text,
                attention=attention,
                noisy_chunk=index,
                kv_cache=branch.kv_cache,
            )
            v = v + branch.weight * out.float()
        x = flow_matching.euler_step(x, torch.as_tensor(v), t, t_next)
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
    """The model's passes in `sample_chunks` for `frames` latent frames, of which the first `given` are given."""
    known = len(chunking.sizes(given)) if given else 0
    branches = 1 if flow.guidance == 1 else 2
    return branches * (max(0, known - 1) + (len(chunking.sizes(frames)) - known) * flow.sampling_steps)


@torch.no_grad()
def sample_chunks(
    model: VelocityModel, request: VideoRequest, flow: FlowSettings, attention: Attention
) -> Iterator[Tensor]:
    """Yields the videos chunk by chunk, each [B, C, f, H, W] in fp32; the given chunks come first.

    The noise of chunk i of a video depends only on (seed, i), so a longer video begins like a shorter one. The velocity
    is v_empty + guidance (v_text - v_empty). With guidance 1 the empty branch isn't run.
    """
    sizes = model.chunking.sizes(request.frames)
    given = _given_chunks(model, request, sizes)
    batch, device, size = len(request.text), request.text.device, (request.height, request.width)
    tokens = model.settings.tokens_per_frame(*size)
    weights = [(request.text, 1.0)]
    if flow.guidance != 1:
        weights = [(request.text, flow.guidance), (request.empty_text, 1 - flow.guidance)]
    branches = [
        Branch(text, weight, model.new_kv_cache(batch, tokens, request.frames, attention)) for text, weight in weights
    ]
    schedule = flow_matching.schedule(flow.sampling_steps, flow.sampling_shift).to(device).float()
    levels = [level.expand(batch) for level in schedule]

    newest = None  # the newest chunk, not yet in the caches
    for index, frames in enumerate(sizes):
        if index < len(given):
            if newest is not None:
                append_chunk(model, branches, attention, newest)
            newest = given[index]
        else:
            shape = (model.settings.channels, frames, *size)
            noise = [normal(shape, seed, index, "sample", "generation") for seed in request.seeds]
            x = torch.stack(noise).to(device)
            newest = denoise_chunk(model, branches, attention, index, x, levels, newest)
        yield newest


def _given_chunks(model: VelocityModel, request: VideoRequest, sizes: list[int]) -> list[Tensor]:
    """The given latents, cut into chunks, in fp32. Raises ValueError when they are not whole chunks."""
    if request.given is None:
        return []
    frames = request.given.shape[2]
    given_sizes = model.chunking.sizes(frames)
    if given_sizes != sizes[: len(given_sizes)]:
        chunking = f"chunk {model.chunking.chunk}, first {model.chunking.first}"
        raise ValueError(f"{frames} given latent frames are not a whole number of chunks ({chunking})")
    return list(request.given.float().split(given_sizes, dim=2))


def append_chunk(model: VelocityModel, branches: list[Branch], attention: Attention, chunk: Tensor) -> None:
    """Writes a clean chunk's keys and values into every branch's cache."""
    for branch in branches:
        model(
            noisy=None, t=None, history=chunk, text=branch.text, attention=attention, kv_cache=branch.kv_cache
        )  # fmt: skip


def sample(model: VelocityModel, request: VideoRequest, flow: FlowSettings, attention: Attention) -> Tensor:
    """`sample_chunks`, joined: [B, C, frames, H, W]."""
    return torch.cat(list(sample_chunks(model, request, flow, attention)), dim=2)
