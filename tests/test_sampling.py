"""Generation: the cached sampler against a sampler without a cache, guidance, given chunks, seeds."""

import pytest
import torch

from rf_train import flow
from rf_train.chunks import Attention
from rf_train.config import Flow
from rf_train.randomness import normal
from rf_train.sampling import sample
from tests.conftest import random_clip


def texts(model, batch):
    _, _, text = random_clip(3, batch, model.settings)
    return text, torch.zeros_like(text)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("first_chunk", [3, 1])
@torch.no_grad()
def test_the_cached_sampler_equals_one_that_gives_the_whole_history_each_time(tiny_model, guidance, first_chunk):
    model = tiny_model(first_chunk=first_chunk)
    settings = Flow(sampling_steps=3, sampling_shift=5.0, guidance=guidance)
    text, empty = texts(model, 2)
    ours = sample(model, text, empty, 8, (4, 6), settings, Attention(), [7, 8])
    levels, made = flow.schedule(3, 5.0).tolist(), []
    for index, size in enumerate(model.chunking.sizes(8)):
        x = torch.stack([normal((model.settings.channels, size, 4, 6), seed, index, "sample", "generation") for seed in (7, 8)])
        for t, t_next in zip(levels, levels[1:]):
            history = torch.cat(made, dim=2) if made else None
            level = torch.full((2, size), t)
            v, v_empty = (model(noisy=x, t=level, history=history, text=c, attention=Attention(), noisy_chunk=index) for c in (text, empty))
            x = x + (t_next - t) * (v_empty + guidance * (v - v_empty))
        made.append(x)
    assert (ours - torch.cat(made, dim=2)).abs().max() < 1e-4


@torch.no_grad()
def test_given_chunks_stand_at_the_start_and_are_read(tiny_model):
    model = tiny_model()
    text, empty = texts(model, 1)
    settings = Flow(sampling_steps=2, guidance=1.0)
    given = random_clip(6, 1, model.settings, seed=5)[0]
    made = sample(model, text, empty, 12, (4, 6), settings, Attention("window", window=2), [0], given)
    other = sample(model, text, empty, 12, (4, 6), settings, Attention("window", window=2), [0], given.flip(2))
    assert torch.equal(made[:, :, :6], given)
    assert (made[:, :, 6:] - other[:, :, 6:]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="5 given latent frames are not a whole number of chunks"):
        sample(model, text, empty, 12, (4, 6), settings, Attention(), [0], given[:, :, :5])


@torch.no_grad()
def test_a_longer_video_begins_as_a_shorter_one_and_a_clip_does_not_depend_on_its_batch(tiny_model):
    model = tiny_model()
    text, empty = texts(model, 2)
    settings, window = Flow(sampling_steps=2, guidance=2.0), Attention("window", window=1)
    short = sample(model, text, empty, 6, (4, 6), settings, window, [1, 2])
    long = sample(model, text, empty, 15, (4, 6), settings, window, [1, 2])
    alone = sample(model, text[1:], empty[1:], 6, (4, 6), settings, window, [2])
    torch.testing.assert_close(long[:, :, :6], short)
    torch.testing.assert_close(short[1:], alone, atol=1e-5, rtol=1e-5)
    assert (sample(model, text, empty, 6, (4, 6), settings, window, [1, 3])[1] - short[1]).abs().max() > 1e-2
