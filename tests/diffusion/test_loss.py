"""The loss against a plain one, chunk by chunk; missing frames; and no gradient through the history."""

from dataclasses import replace

import pytest
import torch

from rf_train.diffusion.flow_matching import FlowSettings
from rf_train.diffusion.histories import Autoregressive, Clean, History, make_history
from rf_train.diffusion.loss import training_loss
from rf_train.model.chunks import Dense
from tests.conftest import assert_close, random_batch

FLOW = FlowSettings(t_shift=2.0)


@torch.no_grad()
def test_the_loss_is_the_mean_over_chunks_of_the_velocity_error(tiny_model, device):
    model = tiny_model(device)
    batch = random_batch(model.settings, 8, device=device)
    x, noise = batch.x, batch.draws["noise"]
    history, _ = make_history(Autoregressive(), batch, Dense(), model)
    t = torch.sigmoid(batch.draws["t"])
    t = 2 * t / (1 + t)
    by_chunk = []
    for index, (begin, end) in enumerate([(0, 3), (3, 6), (6, 8)]):
        level = t[:, index].view(-1, 1, 1, 1, 1)
        clean, eps = x[:, :, begin:end], noise[:, :, begin:end]
        v = model(
            noisy=(1 - level) * clean + level * eps,
            t=t[:, index : index + 1].expand(-1, end - begin),
            history=history[:, :, :begin] if index else None,
            text=batch.text,
            attention=Dense(),
            noisy_chunk=index,
        )
        by_chunk.append(((eps - clean) - v).square().mean(dim=(1, 2, 3, 4)))
    result = training_loss(model, batch, history, FLOW, Dense())
    assert_close(result.t, t)
    assert_close(result.by_chunk, torch.stack(by_chunk, dim=1), rtol=1e-5, atol=1e-5)
    assert_close(result.loss, torch.stack(by_chunk).mean(), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_missing_frames_leave_no_trace_in_the_loss(tiny_model, device):
    """The loss of a clip whose last chunk is missing is that of the shorter clip, whatever stands in its place."""
    model = tiny_model(device)
    batch = random_batch(model.settings, 9, device=device)
    history, _ = make_history(Clean(), batch, Dense(), model)
    history = history.clone()  # a view of the clip, which changes below
    whole = training_loss(model, batch, history, FLOW, Dense())
    present = torch.ones(2, 9, dtype=torch.bool, device=device)
    present[1, 6:] = False
    batch.x[1, :, 6:] = 7.0
    batch.draws["noise"][1, :, 6:] = 0.0
    result = training_loss(model, replace(batch, present=present), history, FLOW, Dense())
    assert_close(result.by_chunk[0], whole.by_chunk[0])
    assert_close(result.by_chunk[1, :2], whole.by_chunk[1, :2])
    assert_close(result.loss, (whole.by_chunk[0].mean() + whole.by_chunk[1, :2].mean()) / 2)


@torch.no_grad()
def test_a_chunk_that_is_there_in_part_counts_with_the_frames_it_has(tiny_model, device):
    model = tiny_model(device)
    batch = random_batch(model.settings, 6, clips=1, device=device)
    history, _ = make_history(Clean(), batch, Dense(), model)
    whole = training_loss(model, batch, history, FLOW, Dense())
    single = []
    for frame in range(3):
        present = torch.tensor([[True] * 3 + [other == frame for other in range(3)]], device=device)
        single.append(training_loss(model, replace(batch, present=present), history, FLOW, Dense()).by_chunk)
    assert_close(torch.stack(single).mean(dim=0), whole.by_chunk)
    assert (single[0][0, 1] - single[1][0, 1]).abs() > 1e-3


@pytest.mark.parametrize("kind", History.kinds)
def test_nothing_flows_back_through_the_history(tiny_model, device, kind):
    """By value: the gradient is that of the same history given as plain numbers."""
    model, gradients = tiny_model(device), []
    batch = random_batch(model.settings, 9, device=device)
    history, _ = make_history(History.kinds[kind](), batch, Dense(), model)
    for given in (history, torch.tensor(history.tolist(), device=device)):
        model.zero_grad()
        training_loss(model, batch, given, FLOW, Dense()).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other in zip(*gradients):
        assert_close(one, other, rtol=0, atol=0)
    assert any(gradient.any() for gradient in gradients[0])
