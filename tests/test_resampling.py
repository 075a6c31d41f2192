"""The rollout against a literal, cache-free reading of Algorithm 1, and what the four histories are."""

import pytest
import torch

from rf_train import config, flow
from rf_train.chunks import Attention
from rf_train.randomness import draw
from rf_train.resampling import make_history, training_loss
from tests.conftest import random_clip

SETTINGS = config.Flow(t_shift=2.0)


def clip_and_draws(model, frames, batch=2):
    x, _, text = random_clip(frames, batch, model.settings)
    return x, text, draw(0, 3, [f"s{i}" for i in range(batch)], tuple(x.shape[1:]), len(model.chunking.sizes(frames)))


def literal_algorithm_1(model, x, text, draws, s, solver_steps, chunk):
    """Algorithm 1 as it is written: for each chunk the whole history is given again, nothing is cached, every chunk is made."""
    t_s = torch.sigmoid(draws.t_s_normal)
    t_s = s * t_s / (1 + (s - 1) * t_s)
    made = []
    for begin in range(0, x.shape[2], chunk):
        clean, eps = x[:, :, begin : begin + chunk], draws.history_noise[:, :, begin : begin + chunk]
        level = t_s.view(-1, 1, 1, 1, 1)
        x_t = (1 - level) * clean + level * eps
        for step in range(solver_steps):
            t = level * (1 - step / solver_steps)
            history = torch.cat(made, dim=2) if made else None
            frames_t = t.view(-1, 1).expand(-1, clean.shape[2])
            v = model(noisy=x_t, t=frames_t, history=history, text=text, attention=Attention(), noisy_chunk=begin // chunk)
            x_t = x_t - level / solver_steps * v
        made.append(x_t)
    return torch.cat(made, dim=2), t_s


@pytest.mark.parametrize("solver_steps", [1, 3])
@pytest.mark.parametrize("frames", [3, 6, 12, 11])
@torch.no_grad()
def test_autoregressive_history_is_algorithm_1(tiny_model, frames, solver_steps):
    model = tiny_model()
    x, text, draws = clip_and_draws(model, frames)
    stage = config.Stage(history="autoregressive", solver_steps=solver_steps)
    ours, t_s = make_history(model, x, text, draws, stage, model.chunking)
    theirs, their_t_s = literal_algorithm_1(model, x, text, draws, 0.6, solver_steps, 3)
    torch.testing.assert_close(t_s, their_t_s)
    if frames == 3:
        assert ours is None
    else:
        assert (ours - theirs[:, :, : ours.shape[2]]).abs().max() <= 1e-5
        assert (ours - x[:, :, : ours.shape[2]]).abs().max() > 0.1


@torch.no_grad()
def test_the_loss_is_the_mean_over_chunks_of_the_velocitys_error(tiny_model):
    model = tiny_model()
    x, text, draws = clip_and_draws(model, 8)
    history, _ = make_history(model, x, text, draws, config.Stage(), model.chunking)
    t = torch.sigmoid(draws.t_normal)
    t = 2 * t / (1 + t)
    by_chunk = []
    for index, (begin, end) in enumerate([(0, 3), (3, 6), (6, 8)]):
        level = t[:, index].view(-1, 1, 1, 1, 1)
        clean, eps = x[:, :, begin:end], draws.noise[:, :, begin:end]
        past = history[:, :, :begin] if index else None
        v = model(noisy=(1 - level) * clean + level * eps, t=t[:, index : index + 1].expand(-1, end - begin), history=past, text=text, attention=Attention(), noisy_chunk=index)
        by_chunk.append(((eps - clean) - v).square().mean(dim=(1, 2, 3, 4)))
    result = training_loss(model, x, text, history, draws, SETTINGS, config.Stage(), model.chunking)
    torch.testing.assert_close(result.by_chunk, torch.stack(by_chunk, dim=1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.loss, torch.stack(by_chunk).mean(), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_missing_frames_leave_no_trace_in_the_loss(tiny_model):
    """The loss of a clip whose last chunks are missing is that of the shorter clip; so it is when a chunk is there in part."""
    model = tiny_model()
    x, text, draws = clip_and_draws(model, 9)
    history, _ = make_history(model, x, text, draws, config.Stage(history="clean"), model.chunking)
    whole = training_loss(model, x, text, history, draws, SETTINGS, config.Stage(), model.chunking)
    present = torch.ones(2, 9, dtype=torch.bool)
    present[1, 6:] = False
    x[1, :, 6:] = float("nan")  # what is missing may be anything
    draws.noise[1, :, 6:] = 0.0
    history = history.clone()
    result = training_loss(model, x.nan_to_num(7.0), text, history, draws, SETTINGS, config.Stage(), model.chunking, present)
    torch.testing.assert_close(result.by_chunk[0], whole.by_chunk[0])
    torch.testing.assert_close(result.by_chunk[1, :2], whole.by_chunk[1, :2])
    torch.testing.assert_close(result.loss, (whole.by_chunk[0].mean() + whole.by_chunk[1, :2].mean()) / 2)
    present[0, 1] = False
    by_frame = torch.arange(18.0).view(2, 9)
    assert flow.mean_over_chunks(by_frame, [3, 3, 3], present).tolist() == [[1.0, 4.0, 7.0], [10.0, 13.0, 0.0]]


@torch.no_grad()
def test_the_other_histories(tiny_model):
    model = tiny_model()
    x, text, draws = clip_and_draws(model, 9)
    made = {kind: make_history(model, x, text, draws, config.Stage(history=kind), model.chunking)[0] for kind in config.HISTORIES}
    clean = x[:, :, :6]
    assert torch.equal(made["clean"], clean)
    level = draws.history_uniform.view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(made["noise"], (1 - level) * clean + level * draws.history_noise[:, :, :6])
    torch.testing.assert_close(made["parallel"][:, :, :3], made["autoregressive"][:, :, :3], atol=1e-5, rtol=0)  # the first chunk has no history
    assert (made["parallel"][:, :, 3:] - made["autoregressive"][:, :, 3:]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", config.HISTORIES)
def test_nothing_flows_back_through_the_history(tiny_model, kind):
    """By value: the gradient is that of the same history given as plain numbers."""
    model = tiny_model()
    x, text, draws = clip_and_draws(model, 9)
    stage, gradients = config.Stage(history=kind), []
    history, _ = make_history(model, x, text, draws, stage, model.chunking)
    for given in (history, torch.tensor(history.tolist())):
        model.zero_grad()
        training_loss(model, x, text, given, draws, SETTINGS, stage, model.chunking).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert any(gradient.any() for gradient in gradients[0])


@torch.no_grad()
def test_the_rollout_takes_one_pass_a_chunk(tiny_model):
    """N - 1 passes for N - 1 chunks: a pass denoises one chunk and writes the keys of the one before."""
    model, passes = tiny_model(), []

    class Counting:
        settings, chunking, new_cache = model.settings, model.chunking, model.new_cache

        def __call__(self, **arguments):
            passes.append((arguments["noisy"].shape[2], 0 if arguments["history"] is None else arguments["history"].shape[2]))
            return model(**arguments)

    x, text, draws = clip_and_draws(model, 21)
    make_history(Counting(), x, text, draws, config.Stage(), model.chunking)
    assert passes == [(3, 0)] + [(3, 3)] * 5
