"""The evaluation: segments cover what was made, means are over clips, and training's history is compared rightly."""

import pytest
import torch

from data_prep.geometry import WAN_2_1
from rf_train.diffusion.histories import Autoregressive, make_history
from rf_train.evaluate import pixel_frames, segments, solver_distance, summary, table
from rf_train.model.chunks import Dense
from rf_train.video_metrics import VIDEO_METRICS
from tests.conftest import random_batch


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
    """Rows of an evaluation in which all metrics of clip i and segment j are values[i][j]."""
    return [{"segments": [{metric.name: value for metric in VIDEO_METRICS} for value in clip]} for clip in values]


def test_the_summary_is_the_mean_and_the_spread_over_clips():
    found = summary(rows_of([[1.0, 5.0], [3.0, 5.0]]), 2)
    assert list(found) == [metric.name for metric in VIDEO_METRICS]
    for cells in found.values():
        assert cells == [{"mean": 2.0, "std": pytest.approx(2**0.5)}, {"mean": 5.0, "std": 0.0}]
    assert summary(rows_of([[1.0]]), 1)["psnr"] == [{"mean": 1.0, "std": 0.0}]  # one clip has no spread


def test_the_table_has_a_line_per_metric_and_one_per_distance_of_the_history():
    history = {"solver_steps": 1, "fine_solver_steps": 8, "t_shift": 0.6}
    history |= {"solver": [0.125], "truth": [0.25], "truth_fine": [0.5]}
    result = {"step": 7, "segments_seconds": [[1.0, 2.0]], "metrics": summary(rows_of([[1.5]]), 1), "history": history}
    heads, *lines = table(result).splitlines()
    assert "step 7" in heads and "1.0-2.0 s" in heads
    assert [line.split()[0] for line in lines[: len(VIDEO_METRICS)]] == [metric.name for metric in VIDEO_METRICS]
    assert all("1.500 ± 0.000" in line for line in lines[: len(VIDEO_METRICS)])
    assert "t_shift 0.6" in lines[-4] and [line.split()[-1] for line in lines[-3:]] == ["0.125", "0.250", "0.500"]
    assert len(table({**result, "history": None}).splitlines()) == 1 + len(VIDEO_METRICS)


@torch.no_grad()
def test_the_distance_of_the_one_step_history_from_the_fine_one(tiny_model):
    """Against two histories made here. Equal solvers are at no distance."""
    model = tiny_model()
    batch = random_batch(model.settings, 9)
    found = solver_distance(model, Autoregressive(t_shift=3.0), 8, batch, Dense())
    one, fine = (make_history(Autoregressive(3.0, steps), batch, Dense(), model)[0] for steps in (1, 8))
    truth = batch.x[:, :, :6]
    for chunk in range(2):
        part = slice(3 * chunk, 3 * chunk + 3)
        for name, a, b in (("solver", one, fine), ("truth", one, truth), ("truth_fine", fine, truth)):
            expected = (a - b)[:, :, part].square().mean(dim=(1, 2, 3, 4)).sqrt()
            torch.testing.assert_close(found[name][:, chunk], expected)
    assert found["solver"].min() > 1e-3
    assert not solver_distance(model, Autoregressive(t_shift=3.0), 1, batch, Dense())["solver"].any()
