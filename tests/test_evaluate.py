"""The evaluation's table, and how far training's history is from a finer one."""

import torch

from rf_train.diffusion.histories import Autoregressive, make_history
from rf_train.evaluation.history_distance import solver_distance
from rf_train.evaluation.long_videos import summary
from rf_train.evaluation.results import table
from rf_train.model.chunks import Dense
from tests.conftest import random_batch
from tests.evaluation.test_long_videos import rows_of


def test_the_table_has_a_line_per_metric_and_one_per_distance_of_the_history():
    history = {"solver_steps": 1, "fine_solver_steps": 8, "t_shift": 0.6}
    history |= {"solver": [0.125], "truth": [0.25], "truth_fine": [0.5]}
    found = summary(rows_of([[1.5, 2.5]]), 2)
    result = {"step": 7, "segments_seconds": [[1.0, 2.0], [2.0, 3.0]], **found, "history": history}
    heads, *lines = table(result).splitlines()
    names = list(found["metrics"])
    assert "step 7" in heads and "1.0-2.0 s" in heads and "per segment" in heads
    assert [line.split()[0] for line in lines[: len(names)]] == names
    assert all(
        "1.500 ± 0.000" in line and "1.000 (-, -)" in line for line in lines[: len(names)]
    )  # one clip: no interval
    assert lines[len(names)].split() == ["frechet", "4.000", "4.000"]
    assert "t_shift 0.6" in lines[-4] and [line.split()[-1] for line in lines[-3:]] == ["0.125", "0.250", "0.500"]
    assert len(table({**result, "history": None}).splitlines()) == 2 + len(names)


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
