"""Generation: which chunks a video's chunks read, at any length."""

from pathlib import Path

import pytest
import torch

from rf_train.config import from_dict
from rf_train.generation.generator import Generator
from rf_train.model.chunks import RoutedWithin, Window, WindowWithin
from tests.conftest import plain_settings


@pytest.mark.parametrize(
    "frames, trained_with, expected",
    [
        (12, "dense", Window(window=3)),  # four chunks: the last read three
        (12, {"kind": "window", "window": 2}, Window(window=2)),
        (12, {"kind": "window", "window": 2, "sink": 1}, WindowWithin(window=2, sink=1, farthest_sink=3)),
        (12, {"kind": "window", "window": 3, "sink": 1}, Window(window=3)),  # it never saw so many
        (12, {"kind": "routed", "top_k": 1}, RoutedWithin(top_k=1, reach=3)),
        (12, {"kind": "routed", "top_k": 3}, Window(window=3)),  # it never chose
        (3, "dense", Window(window=1)),  # it read none, and a bound keeps memory flat
    ],
)
def test_a_video_reads_as_far_back_as_the_last_stage_did(tiny_model, frames, trained_with, expected):
    recipe = from_dict({"model": plain_settings(), "stages": [{"attention": trained_with}]})
    generator = Generator(recipe, tiny_model(), 1, {}, frames, None, Path(), torch.device("cpu"))
    assert generator.attention == expected
