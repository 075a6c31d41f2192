"""Long videos: segments cover what was made, and what rows say together is right."""

import pytest

from data_prep.geometry import WAN_2_1
from rf_train.evaluation.frechet import Gaussian
from rf_train.evaluation.long_videos import drawn_kinds, pixel_frames, segments, summary
from rf_train.evaluation.video_metrics import GENERAL_METRICS, VIDEO_METRICS


@pytest.mark.parametrize(
    "frames, given, length, expected",
    [
        (63, 6, 21, [(6, 21), (21, 42), (42, 63)]),
        (45, 0, 15, [(0, 15), (15, 30), (30, 45)]),
        (47, 6, 15, [(6, 15), (15, 30), (30, 47)]),
        (10, 3, 21, [(3, 10)]),
        (42, 21, 21, [(21, 42)]),
    ],
)
def test_segments_cover_what_was_made(frames, given, length, expected):
    assert segments(frames, given, length) == expected


def test_latent_spans_in_video_frames():
    assert pixel_frames((0, 21), WAN_2_1) == slice(0, 81)
    assert pixel_frames((21, 42), WAN_2_1) == slice(81, 165)
    assert pixel_frames((6, 7), WAN_2_1) == slice(21, 25)


def rows_of(values: list[list[float]]) -> list[dict]:
    """Rows of an evaluation in which all general metrics of clip i and segment j are values[i][j].

    The latents of the generated videos are 2 away from the true ones.
    """
    features = {
        "made": Gaussian(1, [2.0], [[5.0]]).record(),
        "true": Gaussian(1, [0.0], [[1.0]]).record(),
    }
    general = {metric.name for metric in GENERAL_METRICS}
    names = [metric.name for metric in VIDEO_METRICS]
    return [
        {
            "segments": [{name: value if name in general else None for name in names} for value in clip],
            "features": [features] * len(clip),
        }
        for clip in values
    ]


def test_the_summary_is_the_mean_and_the_spread_over_clips():
    found = summary(rows_of([[1.0, 5.0], [3.0, 5.0]]), 2)
    assert list(found["metrics"]) == [metric.name for metric in GENERAL_METRICS]  # the others were not measured
    for cells in found["metrics"].values():
        assert cells == [{"mean": 2.0, "std": pytest.approx(2**0.5)}, {"mean": 5.0, "std": 0.0}]
    assert all(slope["slope"] == 3.0 and slope["low"] == 2.0 for slope in found["slopes"].values())
    assert found["frechet"] == pytest.approx([4.0, 4.0])
    assert summary(rows_of([[1.0]]), 1)["metrics"]["psnr"] == [{"mean": 1.0, "std": 0.0}]  # one clip has no spread


def test_latents_that_are_not_finite_have_no_frechet_distance():
    rows = rows_of([[1.0]])
    rows[0]["features"][0]["made"] = Gaussian(1, [float("nan")], [[1.0]]).record()
    assert summary(rows, 1)["frechet"] == [None]


def test_a_dataset_is_of_the_drawn_world_if_all_its_captions_are():
    one, other = "a red square moving up", "a blue circle moving down in front of a red square moving left"
    assert drawn_kinds([one]) == ("square",) and drawn_kinds([other, one]) == ("circle", "square")
    assert drawn_kinds([one, "a dog on a beach"]) == () and drawn_kinds([]) == ()
