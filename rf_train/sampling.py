"""Generation, chunk after chunk through a K/V cache; each guidance branch has a cache of its own."""

from typing import Iterator

import torch
from torch import Tensor

from rf_train import flow
from rf_train.chunks import Attention
from rf_train.config import Flow
from rf_train.randomness import normal


@torch.no_grad()
def sample_chunks(
    model,
    text: Tensor,
    empty_text: Tensor,
    frames: int,
    size: tuple[int, int],
    settings: Flow,
    attention: Attention,
    seeds: list[int],
    given: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yields clips chunk by chunk, each [B, C, f, H, W] fp32, until `frames` latent frames stand; the given ones come first.

    text, empty_text [B, text_len, text_dim]; size = latent (H, W); one seed a clip. `given` [B, C, F, H, W] holds whole chunks that the
    video begins with. Noise of chunk i of a clip is a function of (seed, i) alone, so a longer video begins as a shorter one does.
    A level's velocity is v_empty + guidance (v_text - v_empty); with guidance 1 the empty branch isn't run.
    """
    sizes = model.chunking.sizes(frames)
    given_sizes = [] if given is None else model.chunking.sizes(given.shape[2])
    if given_sizes and given_sizes != sizes[: len(given_sizes)]:
        raise ValueError(f"{given.shape[2]} given latent frames are not a whole number of chunks (chunk {model.chunking.chunk}, first {model.chunking.first})")
    batch, channels, device = len(text), model.settings.channels, text.device
    tokens = size[0] // model.settings.patch * (size[1] // model.settings.patch)
    branches = [(text, 1.0)] if settings.guidance == 1 else [(text, settings.guidance), (empty_text, 1 - settings.guidance)]
    caches = [model.new_cache(batch, tokens, frames, attention) for _ in branches]
    levels = flow.schedule(settings.sampling_steps, settings.sampling_shift).to(device)

    newest = None  # the last chunk made, not yet in the caches
    for index, length in enumerate(sizes):
        if index < len(given_sizes):
            begin = model.chunking.start(index)
            if newest is not None:
                append(model, caches, branches, newest, attention)
            newest = given[:, :, begin : begin + length].float()
            yield newest
            continue
        rows = [normal((channels, length, *size), seed, index, "sample", "generation") for seed in seeds]
        x = torch.stack(rows).to(device)
        for step in range(settings.sampling_steps):
            t, t_next = (levels[step + i].float().expand(batch, length) for i in (0, 1))
            written = newest if step == 0 else None  # the first step's pass also writes the newest chunk's keys and values
            v = 0
            for (condition, weight), cache in zip(branches, caches):
                out = model(noisy=x, t=t, history=written, text=condition, attention=attention, noisy_chunk=index, cache=cache)
                v = v + weight * out.float()
            x = flow.euler_step(x, v, t, t_next)
        newest = x
        yield newest


def append(model, caches: list, branches: list, chunk: Tensor, attention: Attention) -> None:
    """Writes a clean chunk's keys and values into every branch's cache."""
    for (condition, _), cache in zip(branches, caches):
        model(noisy=None, t=None, history=chunk, text=condition, attention=attention, cache=cache)


def sample(*arguments, **keywords) -> Tensor:
    """`sample_chunks`, joined: [B, C, frames, H, W]."""
    return torch.cat(list(sample_chunks(*arguments, **keywords)), dim=2)
