"""Generation: the cached sampler against a sampler without a cache, guidance, given chunks, seeds."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from rf_train.diffusion import flow_matching
from rf_train.diffusion.flow_matching import FlowSettings
from rf_train.diffusion.randomness import normal
from rf_train.diffusion.sampling import (
    Branch,
    VideoRequest,
    count_passes,
    denoise_chunk,
    sample,
    sample_chunks,
)
from rf_train.model.chunks import Dense, Routed, RoutedWithin, Window, WindowWithin, attention_at_any_length
from tests.conftest import assert_close, random_clip, tolerance


def request_for(model, frames, seeds, given=None) -> VideoRequest:
    """Videos of 4 x 6 latent pixels with a caption of their own each."""
    _, _, text = random_clip(3, len(seeds), model.settings, device=model.proj_out.weight.device)
    return VideoRequest(text, torch.zeros_like(text), seeds, frames, 4, 6, given)


# With its reach no shorter than the video, routing in generation is that of training.
ATTENTIONS = [Dense(), Window(window=1), Window(window=1, sink=1), Routed(top_k=1), RoutedWithin(1, 0, 1, reach=4)]


def sampled_without_a_cache(model, request: VideoRequest, flow: FlowSettings, attention) -> torch.Tensor:
    """Integrates the parallel model: all chunks so far are in every pass, and nothing is kept from pass to pass."""
    levels, made = flow_matching.schedule(flow.sampling_steps, flow.sampling_shift).tolist(), []
    device, seeds = request.text.device, request.seeds
    for index, size in enumerate(model.chunking.sizes(request.frames)):
        shape = (model.settings.channels, size, request.height, request.width)
        x = torch.stack([normal(shape, seed, index, "sample", "generation") for seed in seeds]).to(device)
        past = torch.cat(made, dim=2) if made else None
        text = request.text
        if request.new_text is not None:
            text = next((t for i in range(index, -1, -1) if (t := request.new_text(i)) is not None), text)

        def velocity(x, t, past=past, index=index, text=text):
            level = torch.full((len(seeds), x.shape[2]), t, device=device)
            v, v_empty = (
                model(noisy=x, t=level, history=past, text=each, attention=attention, noisy_chunk=index)
                for each in (text, request.empty_text)
            )
            return v_empty + flow.guidance * (v - v_empty)

        for t, t_next in pairwise(levels):
            v = velocity(x, t)
            if flow.solver == "heun" and t_next > 0:
                v = (v + velocity(x + (t_next - t) * v, t_next)) / 2
            x = x + (t_next - t) * v
        made.append(x)
    return torch.cat(made, dim=2)


@pytest.mark.parametrize("attention", ATTENTIONS, ids=lambda attention: f"{type(attention).__name__}{attention}")
@pytest.mark.parametrize(
    "guidance, in_one_batch, solver", [(1.0, False, "euler"), (3.0, False, "heun"), (3.0, True, "euler")]
)
@pytest.mark.parametrize("first_chunk", [3, 1])
@torch.no_grad()
def test_chunk_by_chunk_with_the_cache_is_integrating_the_parallel_model(
    tiny_model, device, attention, guidance, in_one_batch, solver, first_chunk
):
    model = tiny_model(device, first_chunk=first_chunk)
    flow = FlowSettings(sampling_steps=3, sampling_shift=5.0, guidance=guidance, solver=solver)
    request = request_for(model, 11, [7, 8])
    ours = torch.cat(list(sample_chunks(model, request, flow, attention, in_one_batch)), dim=2)
    expected = sampled_without_a_cache(model, request, flow, attention)
    assert expected.shape[2] == 11 and (ours - expected).abs().max() < tolerance(device, 1e-4)


@pytest.mark.parametrize("in_one_batch", [False, True])
@torch.no_grad()
def test_a_caption_that_changes_is_read_from_its_chunk_on(tiny_model, device, in_one_batch):
    """One layer: there the keys and values of earlier chunks do not depend on the caption under which they are made."""
    model, flow = tiny_model(device, layers=1), FlowSettings(sampling_steps=2, guidance=3.0)
    request = request_for(model, 12, [7, 8])
    changed = replace(request, new_text=lambda chunk: request.text.flip(0) if chunk == 2 else None)
    ours = torch.cat(list(sample_chunks(model, changed, flow, Dense(), in_one_batch)), dim=2)
    assert (ours - sampled_without_a_cache(model, changed, flow, Dense())).abs().max() < tolerance(device, 1e-4)
    same = sample(model, request, flow, Dense())
    assert_close(ours[:, :, :6], same[:, :, :6], atol=1e-4, rtol=0)
    assert (ours - same)[:, :, 6:9].abs().amax() > 1e-2


@torch.no_grad()
def test_heun_is_of_second_order_and_euler_of_first():
    """dx/dt = t - x from t = 1 to 0.2, x(1) = 1, in 8 and 16 steps: the error falls by 4, and by 2."""

    class Linear:
        settings = None

        def __call__(self, *, noisy, t, **_):
            return t[:, None, :, None, None] - noisy

    exact = 0.2 - 1 + math.exp(1 - 0.2)  # x = t - 1 + exp(1 - t)
    errors: dict[str, list[float]] = {"euler": [], "heun": []}
    for solver, found in errors.items():
        for steps in (8, 16):
            levels = [level.expand(1) for level in torch.linspace(1, 0.2, steps + 1, dtype=torch.float64)]
            # Heun's last step is Euler's: one more, of no length, stands in for it.
            levels.append(levels[-1])
            branches = [Branch(torch.zeros(1), (1.0,), None)]
            x = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)
            found.append(abs(denoise_chunk(Linear(), branches, Dense(), 0, x, levels, None, solver).item() - exact))
    assert 1.8 < errors["euler"][0] / errors["euler"][1] < 2.2
    assert 3.5 < errors["heun"][0] / errors["heun"][1] < 4.5


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@torch.no_grad()
def test_passes_are_counted_as_they_are_made(tiny_model, guidance, solver):
    model, flow = tiny_model(), FlowSettings(sampling_steps=3, guidance=guidance, solver=solver)
    made = []
    model.register_forward_hook(lambda *_: made.append(1))
    sample(model, request_for(model, 12, [0], random_clip(6, 1, model.settings)[0]), flow, Window(window=2))
    assert len(made) == count_passes(model.chunking, flow, 12, 6)


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
    assert attention_at_any_length(Routed(2, window=1), 7) == RoutedWithin(2, 1, reach=6)
    assert attention_at_any_length(Routed(6), 7) == Window(window=6)  # it made no choice
    assert attention_at_any_length(Dense(), 7) == Window(window=6)
    assert attention_at_any_length(Window(window=3), 7) == Window(window=3)
    assert attention_at_any_length(Dense(), 1) == Window(window=1)


@pytest.mark.parametrize("first_chunk", [3, 1, 7])
@pytest.mark.parametrize("sink", [0, 1])
@torch.no_grad()
def test_routing_in_generation_reaches_as_far_as_in_training(tiny_model, device, monkeypatch, sink, first_chunk):
    """Within its reach it is the routing of training. Beyond, older chunks leave the cache, but the first `sink`.

    However long the first chunk is: it may leave room for several others.
    """
    model, flow = tiny_model(device, first_chunk=first_chunk), FlowSettings(sampling_steps=2, guidance=1.0)
    request, caches = request_for(model, model.chunking.start(9), [3]), []
    new_cache = type(model).new_kv_cache
    monkeypatch.setattr(type(model), "new_kv_cache", lambda *rest: caches.append(new_cache(*rest)) or caches[-1])
    near = list(sample_chunks(model, request, flow, RoutedWithin(2, 0, sink, reach=5)))
    kept = caches[-1].layers[0].chunks
    far = list(sample_chunks(model, request, flow, Routed(2, 0, sink)))
    assert kept == [*range(sink), 3, 4, 5, 6, 7]
    assert all(torch.equal(one, other) for one, other in zip(near[:6], far[:6]))
    assert not torch.equal(near[8], far[8])


@pytest.mark.parametrize("first_chunk", [3, 1])
@torch.no_grad()
def test_relative_positions_show_the_sink_where_training_had_it(tiny_model, device, first_chunk):
    """With one layer, chunk 9 of a long video is chunk 4 of a clip that has the sink, and the last two chunks.

    One layer, because keys of its history depend on the history's own content alone.
    """
    model, flow = tiny_model(device, layers=1, first_chunk=first_chunk), FlowSettings(sampling_steps=2, guidance=1.0)
    request, long = request_for(model, model.chunking.start(10), [3]), WindowWithin(2, 1, farthest_sink=4)
    made = sample(model, request, flow, long)
    start = model.chunking.start
    x, t, _ = random_clip(3, 1, model.settings, seed=9, device=device)

    def velocity(chunks: list[int], index: int, attention) -> torch.Tensor:
        """Of noisy chunk `index`, after a clip of these chunks of the video; the one before it comes with the pass."""
        cache = model.new_kv_cache(1, 6, 60, attention)
        rest = {"text": request.text, "attention": attention, "kv_cache": cache}
        for chunk in chunks[:-1]:
            model(noisy=None, t=None, history=made[:, :, start(chunk) : start(chunk + 1)], **rest)
        newest = made[:, :, start(chunks[-1]) : start(chunks[-1] + 1)]
        return model(noisy=x, t=t, history=newest, noisy_chunk=index, **rest)

    relative = velocity(list(range(9)), 9, long)
    short = velocity([0, 5, 7, 8], 4, Window(2, 1))  # the second one isn't read
    absolute = velocity(list(range(9)), 9, Window(2, 1))
    assert (relative - short).abs().max() < tolerance(device, 1e-5)
    assert (absolute - short).abs().max() > 1e-4


@pytest.mark.parametrize(
    "absolute, relative",
    [
        (Window(1, 1), WindowWithin(1, 1, farthest_sink=3)),
        (RoutedWithin(1, 0, 1, reach=3), RoutedWithin(1, 0, 1, reach=3, farthest_sink=3)),
    ],
)
@torch.no_grad()
def test_relative_positions_are_absolute_ones_inside_the_trained_length(tiny_model, device, absolute, relative):
    """Bit for bit up to the last chunk of training. Beyond, the sink looks nearer. Without a sink nothing moves."""
    model, flow = tiny_model(device), FlowSettings(sampling_steps=2, guidance=2.0)
    videos = [sample(model, request_for(model, 30, [3]), flow, kind) for kind in (absolute, relative)]
    assert torch.equal(videos[0][:, :, :12], videos[1][:, :, :12])
    assert (videos[0] - videos[1])[:, :, 12:].abs().amax() > 1e-4
    without = [replace(kind, sink=0) for kind in (absolute, relative)]
    one, other = (sample(model, request_for(model, 30, [3]), flow, kind) for kind in without)
    assert torch.equal(one, other)


def test_how_sinks_are_read_at_any_length():
    assert attention_at_any_length(Window(3, 1), 7) == WindowWithin(3, 1, farthest_sink=6)
    assert attention_at_any_length(Routed(2, 0, 1), 7) == RoutedWithin(2, 0, 1, 6, farthest_sink=6)
    assert attention_at_any_length(Window(3, 1), 7, "absolute") == Window(3, 1)
    assert attention_at_any_length(Routed(2, 0, 1), 7, "absolute") == RoutedWithin(2, 0, 1, 6)
