"""Flow matching as pure functions, and the distribution of the resampling level."""

import math

import numpy as np
import pytest
import torch

from rf_train import flow
from rf_train.randomness import generator


def test_the_path_runs_from_clean_to_noise_and_its_derivative_is_the_target():
    x, eps = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64), torch.randn(2, 4, 3, 2, 2, dtype=torch.float64)
    t = torch.rand(2, 3, dtype=torch.float64)
    assert torch.equal(flow.interpolate(x, eps, torch.zeros(2, 3)), x)
    assert torch.equal(flow.interpolate(x, eps, torch.ones(2, 3)), eps)
    slope = (flow.interpolate(x, eps, t + 1e-6) - flow.interpolate(x, eps, t)) / 1e-6
    torch.testing.assert_close(slope, flow.target_velocity(x, eps), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shift", [0.6, 1.0, 5.0])
def test_euler_on_any_schedule_brings_noise_back_to_the_clip_when_the_velocity_is_right(shift):
    x, eps = torch.randn(1, 2, 3, 2, 2), torch.randn(1, 2, 3, 2, 2)
    levels = flow.schedule(7, shift).float()
    assert levels[0] == 1 and levels[-1] == 0 and (levels.diff() < 0).all()
    x_t = eps
    for t, t_next in zip(levels, levels[1:]):
        x_t = flow.euler_step(x_t, flow.target_velocity(x, eps), t.expand(1, 3), t_next.expand(1, 3))
    torch.testing.assert_close(x_t, x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("s", [0.1, 0.6, 3.0])
def test_the_resampling_level_has_the_papers_distribution(s):
    """Kolmogorov-Smirnov on 1e5 draws: logit of the unshifted level is standard normal (eq. 5)."""
    draws = torch.from_numpy(generator(0, 0, "ks", "t_s").standard_normal(100_000))
    t_s = flow.shifted(torch.sigmoid(draws), s).sort().values
    unshifted = t_s / (s + t_s - s * t_s)  # the inverse of s t / (1 + (s - 1) t)
    cdf = 0.5 * (1 + torch.erf(torch.logit(unshifted) / math.sqrt(2)))
    distance = (cdf - torch.arange(1, 100_001) / 100_000).abs().max()
    assert distance < 1.63 / math.sqrt(100_000)  # the 1 % level
    assert abs(t_s.median() - s / (1 + s)) < 0.01


def test_every_chunk_weighs_the_same_in_the_loss():
    by_frame = torch.tensor([[1.0, 1, 1, 2, 2, 2, 9]])
    assert flow.mean_over_chunks(by_frame, [3, 3, 1]).tolist() == [[1, 2, 9]]


def test_training_levels():
    normal, uniform = torch.tensor([[0.0, 2.0]]), torch.tensor([[0.25, 0.5]])
    torch.testing.assert_close(flow.level(normal, uniform, "logit_normal", 1.0), torch.sigmoid(normal))
    torch.testing.assert_close(flow.level(normal, uniform, "uniform", 3.0), 3 * uniform / (1 + 2 * uniform))
    with pytest.raises(ValueError, match="cosine"):
        flow.level(normal, uniform, "cosine", 1.0)


def test_draws_depend_on_seed_step_sample_and_purpose_and_nothing_else():
    from rf_train.randomness import draw

    one = draw(0, 5, ["a", "b"], (4, 6, 2, 2), 2)
    other = draw(0, 5, ["b"], (4, 6, 2, 2), 2)
    for name in vars(one):
        assert torch.equal(getattr(one, name)[1:], getattr(other, name)), name
    for changed in (draw(1, 5, ["b"], (4, 6, 2, 2), 2), draw(0, 6, ["b"], (4, 6, 2, 2), 2)):
        assert not torch.equal(changed.noise, other.noise)
    assert not torch.equal(one.noise[1], one.history_noise[1])
    assert abs(np.mean([draw(0, i, ["a"], (1, 1, 1, 1), 1).drop_caption.item() for i in range(400)]) - 0.5) < 0.07
