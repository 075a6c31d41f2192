"""The figures of the evaluation: right on cases whose answer is known."""

import numpy as np
import pytest
import torch

from rf_train import config
from rf_train.evaluate import compare, pixels_of, segments, solver_distance
from rf_train.randomness import draw
from rf_train.resampling import make_history
from tests.conftest import random_clip


def world(frames=8, colour=(200, 40, 40), side=8, shift=0):
    clip = np.full((frames, 32, 32, 3), 20, np.uint8)
    for n in range(frames):
        clip[n, 4 : 4 + side, n + shift : n + shift + side] = colour
    return clip


def figures(made, true):
    return compare(made, true, np.zeros((1, 1, 1, 1)), np.full((1, 1, 1, 1), 2.0))


def test_the_truth_itself():
    found = figures(world(), world())
    assert found["colour_distance"] < 1e-6 and found["sharpness"] == 1 and found["flicker"] == 1 and found["psnr"] > 100 and found["latent_mse"] == 4


def test_colours_and_areas_count_wherever_they_are_and_positions_do_not():
    moved, recoloured, gone = (figures(w, world())["colour_distance"] for w in (world(shift=10), world(colour=(40, 40, 200)), world(side=0)))
    assert moved < 0.01 < gone and recoloured > 0.2 and gone > 0.15
    assert figures(world(shift=10), world())["psnr"] < 20


def test_blur_and_noise_move_sharpness_to_either_side_of_one():
    true = world()
    blurred = (true.astype(float) + np.roll(true, 1, 1) + np.roll(true, -1, 1) + np.roll(true, 1, 2) + np.roll(true, -1, 2)) / 5
    noisy = np.clip(true + np.random.default_rng(0).normal(0, 20, true.shape), 0, 255)
    assert figures(blurred.astype(np.uint8), true)["sharpness"] < 0.9 < 1.5 < figures(noisy.astype(np.uint8), true)["sharpness"]
    assert figures(np.repeat(true[:1], 8, 0), true)["flicker"] == 0


@pytest.mark.parametrize(
    "frames, given, length, expected",
    [(63, 6, 21, [(6, 21), (21, 42), (42, 63)]), (45, 0, 15, [(0, 15), (15, 30), (30, 45)]), (47, 6, 15, [(6, 15), (15, 30), (30, 47)]), (10, 3, 21, [(3, 10)]), (42, 21, 21, [(21, 42)])],
)
def test_segments_cover_what_was_made(frames, given, length, expected):
    assert segments(frames, given, length) == expected


def test_latent_spans_in_video_frames():
    assert pixels_of((0, 21)) == slice(0, 81) and pixels_of((21, 42)) == slice(81, 165) and pixels_of((6, 7)) == slice(21, 25)


@torch.no_grad()
def test_the_distance_of_the_one_step_history_from_the_fine_one(tiny_model):
    """Against two histories made here; equal solvers are at no distance."""
    model = tiny_model()
    x, _, text = random_clip(9, 2, model.settings)
    draws, stage = draw(0, 0, ["a", "b"], tuple(x.shape[1:]), 3), config.Stage(history="clean", s=3.0)
    found = solver_distance(model, stage, 8, x, text, draws)
    one, fine = (make_history(model, x, text, draws, config.Stage(s=3.0, solver_steps=n), model.chunking)[0] for n in (1, 8))
    for chunk in range(2):
        part = slice(3 * chunk, 3 * chunk + 3)
        for name, a, b in (("solver", one, fine), ("truth", one, x), ("truth_fine", fine, x)):
            expected = (a - b[:, :, :6])[:, :, part].square().mean(dim=(1, 2, 3, 4)).sqrt()
            torch.testing.assert_close(found[name][:, chunk], expected)
    assert found["solver"].min() > 1e-3 and not solver_distance(model, stage, 1, x, text, draws)["solver"].any()
