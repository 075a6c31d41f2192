"""Flow matching as pure functions, and the distribution of the resampling level."""

import math
from itertools import pairwise

import pytest
import torch

from rf_train.diffusion import flow_matching
from rf_train.diffusion.flow_matching import FlowSettings
from rf_train.diffusion.randomness import generator
from tests.conftest import assert_close


def test_the_path_runs_from_clean_to_noise_and_its_derivative_is_the_target(device):
    x, eps = torch.randn(2, 2, 4, 3, 2, 2, dtype=torch.float64).to(device)
    t = torch.rand(2, 3, dtype=torch.float64).to(device)
    assert torch.equal(flow_matching.interpolate(x, eps, torch.zeros_like(t)), x)
    assert torch.equal(flow_matching.interpolate(x, eps, torch.ones_like(t)), eps)
    slope = (flow_matching.interpolate(x, eps, t + 1e-6) - flow_matching.interpolate(x, eps, t)) / 1e-6
    torch.testing.assert_close(slope, flow_matching.target_velocity(x, eps), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shift", [0.6, 1.0, 5.0])
def test_with_the_right_velocity_euler_brings_noise_back_to_the_clip_on_any_schedule(device, shift):
    x, eps = torch.randn(2, 1, 2, 3, 2, 2).to(device)
    levels = flow_matching.schedule(7, shift).to(device).float()
    assert levels[0] == 1 and levels[-1] == 0 and (levels.diff() < 0).all()
    x_t, v = eps, flow_matching.target_velocity(x, eps)
    for t, t_next in pairwise(levels):
        x_t = flow_matching.euler_step(x_t, v, t.expand(1, 3), t_next.expand(1, 3))
    assert_close(x_t, x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shift", [0.1, 0.6, 3.0])
def test_the_resampling_level_has_the_distribution_of_the_paper(shift):
    """Kolmogorov-Smirnov on 1e5 draws: logit of the unshifted level is standard normal (eq. 5)."""
    draws = torch.from_numpy(generator(0, 0, "ks", "t_s").standard_normal(100_000))
    t_s = flow_matching.shifted(torch.sigmoid(draws), shift).sort().values
    unshifted = t_s / (shift + t_s - shift * t_s)  # the inverse of s t / (1 + (s - 1) t)
    cdf = 0.5 * (1 + torch.erf(torch.logit(unshifted) / math.sqrt(2)))
    distance = (cdf - torch.arange(1, 100_001) / 100_000).abs().max()
    assert distance < 1.63 / math.sqrt(100_000)  # the 1 % level
    assert abs(t_s.median() - shift / (1 + shift)) < 0.01


def test_each_chunk_weighs_the_same_in_the_loss(device):
    by_frame = torch.tensor([[1.0, 1, 1, 2, 2, 2, 9]], device=device)
    by_chunk = flow_matching.mean_by_chunk(by_frame, [3, 3, 1])
    assert by_chunk.tolist() == [[1, 2, 9]]
    assert flow_matching.mean_of_present(by_chunk, [3, 3, 1]) == 4


def test_missing_frames_do_not_count_in_the_mean_of_a_chunk(device):
    by_frame = torch.arange(18.0, device=device).view(2, 9)
    present = torch.ones(2, 9, dtype=torch.bool, device=device)
    present[0, 1] = False
    present[1, 6:] = False
    by_chunk = flow_matching.mean_by_chunk(by_frame, [3, 3, 3], present)
    assert by_chunk.tolist() == [[1.0, 4.0, 7.0], [10.0, 13.0, 0.0]]
    assert flow_matching.mean_of_present(by_chunk, [3, 3, 3], present) == (4.0 + 11.5) / 2


def test_the_number_of_a_chunk_is_spread_over_its_frames(device):
    spread = flow_matching.spread_over_frames(torch.tensor([[1.0, 2], [3, 4]], device=device), [1, 3])
    assert spread.tolist() == [[1, 2, 2, 2], [3, 4, 4, 4]]


def test_training_levels_are_logit_normal_or_uniform_and_shifted(device):
    draws = {"t": torch.tensor([[0.0, 2.0]]).to(device), "t_uniform": torch.tensor([[0.25, 0.5]]).to(device)}
    logit_normal = flow_matching.training_levels(draws, FlowSettings(t_distribution="logit_normal", t_shift=1.0))
    assert_close(logit_normal, torch.sigmoid(draws["t"]))
    uniform = flow_matching.training_levels(draws, FlowSettings(t_distribution="uniform", t_shift=3.0))
    assert_close(uniform, 3 * draws["t_uniform"] / (1 + 2 * draws["t_uniform"]))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"t_distribution": "cosine"}, "flow.t_distribution='cosine': choose logit_normal or uniform"),
        ({"t_shift": 0.0}, "_?shift=.* must be positive"),
        ({"sampling_shift": -1.0}, "_?shift=.* must be positive"),
        ({"caption_dropout": 1.5}, r"flow.caption_dropout=1.5 is not in \[0, 1\]"),
        ({"sampling_steps": 0}, "sampling_steps=0 must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    FlowSettings().validate()
    with pytest.raises(ValueError, match=message):
        FlowSettings(**changes).validate()
