"""What a run writes while it trains: a row per step that any JSON reader takes, on rank 0 alone, also after a crash."""

import json
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from rf_train import config, run_log
from rf_train.config import Recipe
from rf_train.run_log import RunLog, read_rows
from tests.conftest import plain_settings


@pytest.fixture
def recipe(tmp_path) -> Recipe:
    run = {"out": str(tmp_path), "wandb": "disabled"}
    return config.from_dict({"model": plain_settings(), "run": run, "stages": [{"name": "a", "steps": 4}]})


class Wandb:
    """Stands for a wandb run, and notes what it is given."""

    def __init__(self):
        self.rows, self.finished = {}, False

    def log(self, row: dict, step: int) -> None:
        self.rows[step] = row

    def finish(self, exit_code: int) -> None:
        self.finished = exit_code == 0


def write_steps(recipe: Recipe, first: int, end: int, **metrics) -> Wandb:
    log = RunLog(recipe, first, rank=0)
    log.wandb = Wandb()
    for step in range(first, end):
        log.log(step, "a", 8, {"loss": 0.5, **metrics})
    log.close()
    return log.wandb


def test_a_row_per_step_with_its_metrics(recipe, tmp_path):
    write_steps(recipe, 0, 2, lr=0.1, loss_by_chunk=[1.0, None])
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["stage"] == "a" and row["loss_by_chunk"] == [1.0, None] and row["lr"] == 0.1 for row in rows)
    assert all(row["samples_per_s"] == pytest.approx(8 / row["seconds"]) for row in rows)


def test_what_is_not_finite_is_null(recipe, tmp_path):
    """JSON has no NaN."""
    write_steps(recipe, 0, 1, loss=float("nan"), grad_norm=float("inf"))
    line = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(line, parse_constant=lambda name: pytest.fail(name))
    assert row["loss"] is None and row["grad_norm"] is None


def test_wandb_gets_numbers_alone(recipe):
    """A list as one number per position. Nothing for what wasn't measured."""
    wandb = write_steps(recipe, 0, 1, t_s=None, loss_by_chunk=[1.0, None, 3.0])
    row = wandb.rows[1]
    assert row["loss_by_chunk/0"] == 1.0 and row["loss_by_chunk/2"] == 3.0
    assert not {"loss_by_chunk", "loss_by_chunk/1", "t_s"} & set(row) and wandb.finished


def test_a_resumed_run_drops_the_rows_of_the_steps_that_it_does_again(recipe, tmp_path):
    """And a last line that was cut by a crash."""
    write_steps(recipe, 0, 3, loss=1.0)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 4, "sta')
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3]
    write_steps(recipe, 2, 4, loss=2.0)
    assert [(row["step"], row["loss"]) for row in read_rows(path)] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]


def test_after_a_failure_a_slow_wandb_does_not_keep_other_ranks_waiting(recipe):
    log, end, told = RunLog(recipe, 0, rank=0), threading.Event(), []
    log.patience_after_failure = 0.1
    log.wandb = SimpleNamespace(finish=lambda exit_code: (told.append(exit_code), end.wait(60)))
    begin = time.monotonic()
    log.close(failed=True)
    assert time.monotonic() - begin < 10 and told == [1]
    end.set()


def test_a_line_that_was_damaged_in_the_middle_loses_no_other(recipe, tmp_path, capsys):
    write_steps(recipe, 0, 4, loss=1.0)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:9] + "\x00", *lines[2:], "[]"]) + "\n")
    assert [row["step"] for row in read_rows(path)] == [1, 3, 4]
    write_steps(recipe, 4, 5, loss=1.0)
    assert [row["step"] for row in read_rows(path)] == [1, 3, 4, 5]
    assert f"{path}: 2 lines are not readable, and are left out\n" in capsys.readouterr().err


@pytest.mark.slow
def test_without_its_server_wandb_logs_offline_and_a_resumed_run_keeps_its_name(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setattr(run_log, "WANDB_START", 3.0)
    names = []
    for mode in ("online", "offline"):
        begin = time.monotonic()
        log = RunLog(replace(recipe, run=replace(recipe.run, wandb=mode)), 0, rank=0)
        log.log(0, "a", 8, {"loss": 0.5})
        names.append(log.wandb.id)
        log.close()
        assert time.monotonic() - begin < 60
    assert names[0] == names[1] == (tmp_path / "wandb_id").read_text()
    said = capsys.readouterr().err
    assert said.count("wandb.online failed; logging offline") == 1
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2


def test_a_wandb_that_fails_does_not_stop_training(recipe, tmp_path, capsys):
    def fail(row: dict, step: int) -> None:
        raise RuntimeError("no\nluck")

    log = RunLog(recipe, 0, rank=0)
    log.wandb = SimpleNamespace(log=fail)
    log.log(0, "a", 8, {"loss": 0.5})
    log.log(1, "a", 8, {"loss": 0.5})
    log.close()
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2]
    assert "wandb has failed, and gets nothing more: no" in "".join(capsys.readouterr())


def test_other_ranks_write_nothing(recipe, tmp_path):
    recipe = replace(recipe, run=replace(recipe.run, out=str(tmp_path / "none")))
    log = RunLog(recipe, 0, rank=1)
    log.log(0, "a", 8, {"loss": 0.5})
    log.print_line("a line")
    log.close()
    assert not (tmp_path / "none").exists()


def test_the_time_of_an_evaluation_is_not_the_step_s(recipe, tmp_path):
    wandb = write_steps(recipe, 0, 1, evaluation={"seconds": -100.0, "psnr": [1.0, float("nan")]})
    (row,) = read_rows(tmp_path / "metrics.jsonl")
    assert row["seconds"] > 100 and row["evaluation"]["psnr"] == [1.0, None]
    assert wandb.rows[1]["evaluation/psnr/0"] == 1.0 and "evaluation/psnr/1" not in wandb.rows[1]


def test_a_full_disk_costs_rows_and_not_the_run(recipe, tmp_path, capsys):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    write_steps(recipe, 0, 3)
    assert capsys.readouterr().out.count("rows are lost: [Errno 28] No space left on device") == 1


def test_a_wandb_id_that_is_no_text_is_replaced(recipe, tmp_path, monkeypatch):
    (tmp_path / "wandb_id").write_bytes(b"\xff\xfe")
    monkeypatch.setattr("wandb.init", lambda **settings: settings)
    settings = run_log.start_wandb(replace(recipe, run=replace(recipe.run, wandb="offline")))
    assert settings["id"] == (tmp_path / "wandb_id").read_text() and settings["id"].isalnum()
