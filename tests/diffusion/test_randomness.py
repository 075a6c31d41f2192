"""The random numbers of a step: functions of seed, step, sample and purpose, with the distribution that is named."""

import pytest
import torch

from rf_train.diffusion.randomness import Draw, make_draws
from tests.conftest import every_draw

SHAPE = (4, 6, 2, 2)  # [C, F, H, W] of a latent, in two chunks


@pytest.mark.parametrize("purpose", every_draw())
def test_draws_depend_on_seed_step_and_sample_and_nothing_else(purpose):
    wanted = every_draw()
    pair = make_draws(wanted, 0, 5, ["a", "b"], SHAPE, 2)[purpose]
    alone = make_draws({purpose: wanted[purpose]}, 0, 5, ["b"], SHAPE, 2)[purpose]
    assert torch.equal(pair[1:], alone)
    assert not torch.equal(pair[:1], alone)
    for seed, step in ((1, 5), (0, 6)):
        assert not torch.equal(make_draws(wanted, seed, step, ["b"], SHAPE, 2)[purpose], alone)


def test_no_two_purposes_share_their_numbers():
    draws = make_draws({purpose: Draw("normal", "latent") for purpose in every_draw()}, 0, 5, ["a"], SHAPE, 2)
    first_numbers = [tensor.flatten()[0].item() for tensor in draws.values()]
    assert len(set(first_numbers)) == len(every_draw())


@pytest.mark.parametrize("per, shape", [("latent", (3, *SHAPE)), ("chunk", (3, 2)), ("clip", (3,))])
def test_there_is_one_number_per_latent_chunk_or_clip(per, shape):
    draws = make_draws({"x": Draw("normal", per)}, 0, 0, ["a", "b", "c"], SHAPE, 2)
    assert draws["x"].shape == shape and draws["x"].dtype == torch.float32


@pytest.mark.parametrize(
    "distribution, mean, std, low, high", [("uniform", 0.5, 12**-0.5, 0, 1), ("normal", 0, 1, -6, 6)]
)
def test_draws_have_the_distribution_that_is_named(distribution, mean, std, low, high):
    numbers = torch.cat([make_draws({"x": Draw(distribution, "clip")}, 0, n, ["a"], SHAPE, 2)["x"] for n in range(400)])
    assert abs(numbers.mean() - mean) < 0.1 * std and abs(numbers.std() - std) < 0.1 * std
    assert numbers.min() >= low and numbers.max() < high
