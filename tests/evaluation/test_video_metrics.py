"""The metrics of a generated segment: right on cases whose answer is known."""

import numpy as np
import pytest

from rf_train.evaluation.frechet import Gaussian, frechet_distance, latent_features
from rf_train.evaluation.video_metrics import (
    GENERAL_METRICS,
    VIDEO_METRICS,
    Segment,
    VideoPair,
    colour_histogram,
    compare,
)


def moving_square(frames=8, colour=(200, 40, 40), side=8, shift=0) -> np.ndarray:
    """A video of a square that moves to the right, one pixel per frame, from `shift` on."""
    clip = np.full((frames, 32, 32, 3), 20, np.uint8)
    for n in range(frames):
        clip[n, 4 : 4 + side, n + shift : n + shift + side] = colour
    return clip


def measured(made: np.ndarray, true: np.ndarray) -> dict[str, float]:
    latents = np.zeros((1, 1, 1, 1)), np.full((1, 1, 1, 1), 2.0)
    return compare(Segment(VideoPair(made, true, *latents, given=1), slice(0, len(made)), slice(0, 1)))


def test_every_metric_is_measured_under_its_name():
    found = measured(moving_square(), moving_square())
    assert list(found) == [metric.name for metric in VIDEO_METRICS]
    assert all(isinstance(found[metric.name], float) for metric in GENERAL_METRICS)
    assert {metric.better for metric in VIDEO_METRICS} <= {"lower", "higher", "near 0", "near 1"}


def test_the_truth_itself():
    found = measured(moving_square(), moving_square())
    assert found["colour_distance"] < 1e-6 and found["psnr"] > 100
    assert found["sharpness"] == 1 and found["flicker"] == 1
    assert found["latent_mse"] == 4  # latents of zeros and twos


def test_colours_and_areas_count_wherever_they_are_and_positions_do_not():
    others = (moving_square(shift=10), moving_square(colour=(40, 40, 200)), moving_square(side=0))
    moved, recoloured, gone = (measured(other, moving_square())["colour_distance"] for other in others)
    assert moved < 0.01 < gone and recoloured > 0.2 and gone > 0.15
    assert measured(moving_square(shift=10), moving_square())["psnr"] < 20


def test_colours_with_nothing_in_common_are_at_distance_1():
    black, white = np.zeros((2, 4, 4, 3), np.uint8), np.full((2, 4, 4, 3), 255, np.uint8)
    assert measured(black, white)["colour_distance"] == 1


def test_a_histogram_splits_a_colour_between_the_nearest_levels():
    """With two levels, 0 and 255: a red of 51 is one fifth of the upper one."""
    shares = colour_histogram(np.full((1, 2, 2, 3), (51, 0, 255), np.uint8), levels=2)
    assert shares.tolist() == pytest.approx([0, 0.8, 0, 0, 0, 0.2, 0, 0]) and shares.sum() == pytest.approx(1)


def test_blur_and_noise_move_sharpness_to_either_side_of_one():
    true = moving_square()
    shifted = [np.roll(true, step, axis) for axis in (1, 2) for step in (1, -1)]
    blurred = (true.astype(float) + sum(other.astype(float) for other in shifted)) / 5
    noisy = np.clip(true + np.random.default_rng(0).normal(0, 20, true.shape), 0, 255)
    blurred_sharpness, noisy_sharpness = (measured(x.astype(np.uint8), true)["sharpness"] for x in (blurred, noisy))
    assert blurred_sharpness < 0.9 < 1.5 < noisy_sharpness


def test_a_picture_that_stands_still_does_not_flicker():
    true = moving_square()
    assert measured(np.repeat(true[:1], 8, 0), true)["flicker"] == 0
    assert measured(true[:1], true[:1])["flicker"] == 0  # a single frame


@pytest.mark.parametrize("error, decibels", [(255, 0.0), (51, 20 * np.log10(5))])
def test_psnr_is_in_decibels(error, decibels):
    made, true = np.zeros((2, 4, 4, 3), np.uint8), np.full((2, 4, 4, 3), error, np.uint8)
    assert measured(made, true)["psnr"] == pytest.approx(decibels)


def test_the_frechet_distance_of_two_gaussians_whose_answer_is_known():
    """Means m apart and standard deviations a and b along each of two axes: m^2 + (a - b)^2 summed."""
    random = np.random.default_rng(0)
    one = random.normal(0, 1, (200_000, 2)) * (1, 2)
    other = random.normal(0, 1, (200_000, 2)) * (3, 2) + (4, 0)
    assert frechet_distance(Gaussian.of(one), Gaussian.of(other)) == pytest.approx(16 + 4, rel=0.02)
    assert frechet_distance(Gaussian.of(one), Gaussian.of(one)) == pytest.approx(0, abs=1e-8)


def test_gaussians_of_parts_add_up_and_survive_json():
    features = np.random.default_rng(0).normal(size=(10, 3))
    whole, parts = Gaussian.of(features), [Gaussian.of(features[:4]), Gaussian.of(features[4:])]
    joined = Gaussian(**parts[0].record()) + Gaussian(**parts[1].record())
    assert joined.count == 10
    np.testing.assert_allclose(joined.mean, whole.mean)
    np.testing.assert_allclose(joined.covariance, whole.covariance)


def test_latent_features_see_motion_but_not_place():
    random = np.random.default_rng(0)
    latent = random.normal(size=(2, 5, 4, 4))
    assert latent_features(latent).shape == (4 * 4 * 4, 4)
    flipped = latent_features(latent[:, :, ::-1])
    assert frechet_distance(Gaussian.of(latent_features(latent)), Gaussian.of(flipped)) == pytest.approx(0, abs=1e-9)
    still = latent_features(np.repeat(latent[:, :1], 5, axis=1))
    assert frechet_distance(Gaussian.of(latent_features(latent)), Gaussian.of(still)) > 0.5
