"""Generation: the cached sampler against a sampler without a cache, guidance, given chunks, seeds."""

from itertools import pairwise

import pytest
import torch

from rf_train.diffusion import flow_matching
from rf_train.diffusion.flow_matching import FlowSettings
from rf_train.diffusion.randomness import normal
from rf_train.diffusion.sampling import VideoRequest, sample, sample_chunks
from rf_train.model.chunks import Dense, Routed, RoutedWithin, Window, attention_at_any_length
from tests.conftest import assert_close, random_clip, tolerance


def request_for(model, frames, seeds, given=None) -> VideoRequest:
    """Videos of 4 x 6 latent pixels with a caption of their own each."""
    _, _, text = random_clip(3, len(seeds), model.settings, device=model.proj_out.weight.device)
    return VideoRequest(text, torch.zeros_like(text), seeds, frames, 4, 6, given)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("first_chunk", [3, 1])
@torch.no_grad()
def test_the_cached_sampler_equals_one_that_gives_the_whole_history_each_time(
    tiny_model, device, guidance, first_chunk
):
    model = tiny_model(device, first_chunk=first_chunk)
    flow = FlowSettings(sampling_steps=3, sampling_shift=5.0, guidance=guidance)
    request = request_for(model, 8, [7, 8])
    ours = sample(model, request, flow, Dense())
    levels, made = flow_matching.schedule(3, 5.0).tolist(), []
    for index, size in enumerate(model.chunking.sizes(8)):
        shape = (model.settings.channels, size, 4, 6)
        x = torch.stack([normal(shape, seed, index, "sample", "generation") for seed in (7, 8)]).to(device)
        for t, t_next in pairwise(levels):
            history = torch.cat(made, dim=2) if made else None
            level = torch.full((2, size), t, device=device)
            v, v_empty = (
                model(noisy=x, t=level, history=history, text=text, attention=Dense(), noisy_chunk=index)
                for text in (request.text, request.empty_text)
            )
            x = x + (t_next - t) * (v_empty + guidance * (v - v_empty))
        made.append(x)
    assert (ours - torch.cat(made, dim=2)).abs().max() < tolerance(device, 1e-4)


@torch.no_grad()
def test_chunks_come_one_by_one_and_joined_are_the_video(tiny_model, device):
    model, flow = tiny_model(device, first_chunk=1), FlowSettings(sampling_steps=2, guidance=1.0)
    request = request_for(model, 6, [0])
    chunks = list(sample_chunks(model, request, flow, Dense()))
    assert [chunk.shape[2] for chunk in chunks] == [1, 3, 2]
    assert torch.equal(torch.cat(chunks, dim=2), sample(model, request, flow, Dense()))


@torch.no_grad()
def test_given_chunks_stand_at_the_start_and_are_read(tiny_model, device):
    model = tiny_model(device)
    flow, window = FlowSettings(sampling_steps=2, guidance=1.0), Window(window=2)
    given = random_clip(6, 1, model.settings, seed=5, device=device)[0]
    made = sample(model, request_for(model, 12, [0], given), flow, window)
    other = sample(model, request_for(model, 12, [0], given.flip(2)), flow, window)
    assert torch.equal(made[:, :, :6], given)
    assert (made[:, :, 6:] - other[:, :, 6:]).abs().max() > 1e-3


@torch.no_grad()
def test_a_generated_video_goes_on_in_the_same_way_when_its_first_chunks_are_given(tiny_model, device):
    model, flow = tiny_model(device), FlowSettings(sampling_steps=2, guidance=2.0)
    video = sample(model, request_for(model, 12, [0]), flow, Dense())
    again = sample(model, request_for(model, 12, [0], video[:, :, :6]), flow, Dense())
    assert_close(again, video, atol=1e-4, rtol=0)


@torch.no_grad()
def test_given_frames_that_are_not_whole_chunks_are_refused(tiny_model):
    model = tiny_model()
    given = random_clip(5, 1, model.settings, seed=5)[0]
    with pytest.raises(ValueError, match="5 given latent frames are not a whole number of chunks"):
        sample(model, request_for(model, 12, [0], given), FlowSettings(sampling_steps=2), Dense())


@torch.no_grad()
def test_a_longer_video_begins_as_a_shorter_one_and_a_video_does_not_depend_on_its_batch(tiny_model, device):
    model = tiny_model(device)
    flow, window = FlowSettings(sampling_steps=2, guidance=2.0), Window(window=1)
    pair = request_for(model, 6, [1, 2])
    short = sample(model, pair, flow, window)
    long = sample(model, request_for(model, 15, [1, 2]), flow, window)
    second = VideoRequest(pair.text[1:], pair.empty_text[1:], [2], 6, 4, 6)
    assert_close(long[:, :, :6], short)
    assert_close(short[1:], sample(model, second, flow, window), atol=1e-5, rtol=1e-5)
    other_seed = sample(model, request_for(model, 6, [1, 3]), flow, window)
    assert (other_seed[1] - short[1]).abs().max() > 1e-2


def test_after_training_the_distances_stay_those_of_training():
    assert attention_at_any_length(Routed(2), 7) == RoutedWithin(2, reach=6)
    assert attention_at_any_length(Routed(2, window=1, sink=1), 7) == RoutedWithin(2, 1, 1, reach=6)
    assert attention_at_any_length(Routed(6), 7) == Window(window=6)  # it made no choice
    assert attention_at_any_length(Dense(), 7) == Window(window=6)
    assert attention_at_any_length(Window(window=3, sink=1), 7) == Window(window=3, sink=1)
    assert attention_at_any_length(Dense(), 1) == Dense()


@pytest.mark.parametrize("sink", [0, 1])
@torch.no_grad()
def test_routing_in_generation_reaches_as_far_as_in_training(tiny_model, device, monkeypatch, sink):
    """Within its reach it is the routing of training. Beyond, older chunks leave the cache, but the first `sink`."""
    model, flow = tiny_model(device), FlowSettings(sampling_steps=2, guidance=1.0)
    request, caches = request_for(model, 27, [3]), []
    new_cache = type(model).new_kv_cache
    monkeypatch.setattr(type(model), "new_kv_cache", lambda *rest: caches.append(new_cache(*rest)) or caches[-1])
    near = list(sample_chunks(model, request, flow, RoutedWithin(2, 0, sink, reach=5)))
    kept = caches[-1].layers[0].chunks
    far = list(sample_chunks(model, request, flow, Routed(2, 0, sink)))
    assert kept == [*range(sink), 3, 4, 5, 6, 7]
    assert all(torch.equal(one, other) for one, other in zip(near[:6], far[:6]))
    assert not torch.equal(near[8], far[8])
