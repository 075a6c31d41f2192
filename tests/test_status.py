"""The status of a run: what its files say, and nothing worse than a named problem when they are damaged or hostile."""

import json
import os
import shutil
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from rf_train import config, status, train
from rf_train.engine import checkpoint
from rf_train.engine.processes import machine, started
from rf_train.run_status import RECENT, status_of
from tests.conftest import write_dataset
from tests.distributed import run_distributed
from tests.engine.runs import recipe_dict

STEPS = 12


def train_recipe(recipe: dict) -> None:
    train.train(config.from_dict(recipe))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run that was trained on one rank, with two checkpoints. No test may change it."""
    folder = tmp_path_factory.mktemp("trained")
    write_dataset(folder / "short")
    recipe = recipe_dict(folder, folder / "run", save_every=6)
    recipe["stages"] = [{"name": "forcing", "history": "clean", "steps": STEPS, "batch": 2}]
    run_distributed(train_recipe, 1, recipe=recipe)
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of it, without events."""
    shutil.copytree(trained, tmp_path / "run")
    for name in ("events.jsonl", "lock.json"):
        (tmp_path / "run" / name).unlink(missing_ok=True)
    return tmp_path / "run"


def at(seconds_ago: float) -> str:
    return (datetime.now(timezone.utc) - timedelta(seconds=seconds_ago)).isoformat()


def write_events(run: Path, *events: dict) -> None:
    lines = [json.dumps({"time": at(60), "step": 0, **event}) + "\n" for event in events]
    (run / "events.jsonl").write_text("".join(lines))


def write_lock(run: Path, silent: float, **more) -> None:
    """A lock that was renewed `silent` seconds ago."""
    lock = {"host": "node-7", "pid": 4321, "job": "88.2", "time": at(999), "beat": 7, **more}
    (run / "lock.json").write_text(json.dumps(lock))
    os.utime(run / "lock.json", (time.time() - silent,) * 2)


def cut_steps(run: Path, steps: int) -> None:
    """Makes the run one of which only so many steps are done."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:steps]))
    shutil.rmtree(checkpoint.folder_of_step(run, STEPS))


def said(capsys, *arguments: str | Path) -> tuple[int, str, str]:
    capsys.readouterr()
    code = status.main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


# ---- a run as training leaves it


def test_a_run_as_training_leaves_it(trained, capsys):
    code, out, _ = said(capsys, trained, "--verify", "--json")
    found = json.loads(out)
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert code == 0 and out.count("\n") == 1
    assert (found["state"], found["stage"], found["step"], found["steps"]) == ("finished", "forcing", STEPS, STEPS)
    assert found["loss"] == pytest.approx(sum(row["loss"] for row in rows) / STEPS) and found["loss_change"] is None
    assert found["seconds_per_step"] > 0 and found["seconds_left"] == 0
    newest = found["checkpoint"]
    assert (newest["step"], newest["check"], newest["damage"]) == (STEPS, "sha256", None) and newest["age"] < 600
    assert found["skipped"] == found["damaged"] == 0 and not found["problems"] and found["writer"] is None


def test_speed_loss_and_time_left_are_those_of_the_recent_steps(run):
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    rows = [
        {**row, "step": step, "seconds": 9.0 if step < 100 else 0.5, "loss": 3.0 if step <= 100 else 2.0}
        for step in range(1, 101 + RECENT)
    ]
    rows[-1].update(skipped=1, damaged=3, loss=None)
    rows[-5]["seconds"] = 99.0  # a pause doesn't count
    rows[7].update(skipped=1, damaged=1)
    (run / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    recipe = (run / "recipe.yaml").read_text().replace(f"steps: {STEPS}", "steps: 350")
    (run / "recipe.yaml").write_text(recipe)
    found = status_of(run)
    assert found.seconds_per_step == 0.5 and found.loss == 2.0 and found.loss_change == -1.0
    assert found.seconds_left == (350 - 100 - RECENT) * 0.5
    assert found.skipped == 2 and found.damaged == 4


# ---- who writes it, and why it ended


def test_a_job_that_renews_its_lock_is_training(run):
    write_events(run, {"event": "start"}, {"event": "end", "step": 3, "why": "stopped by SIGTERM"}, {"event": "start"})
    write_lock(run, 5)
    found = status_of(run)
    assert found.state == "training" and found.writer.alive and 4 < found.writer.silent < 30
    assert (found.writer.host, found.writer.pid, found.writer.job) == ("node-7", 4321, "88.2")
    assert found.starts == 2 and [end["why"] for end in found.ends] == ["stopped by SIGTERM"]


def test_a_job_of_this_machine_whose_process_is_gone_is_dead_at_once(run):
    process = {**machine(), "pid": os.getpid(), "started": started(os.getpid())}
    write_lock(run, 1, **process)
    assert status_of(run).writer.alive
    write_lock(run, 1, **process | {"started": process["started"] + 1})  # another process had the number
    assert not status_of(run).writer.alive


def test_a_job_that_has_gone_silent_was_killed(run):
    cut_steps(run, 7)
    write_events(run, {"event": "start"}, {"event": "start", "step": 4})
    write_lock(run, 3600)
    found = status_of(run)
    assert found.state == "killed" and not found.writer.alive
    assert [(end["why"], end["step"]) for end in found.ends] == [("killed", 0), ("killed", 7)]


@pytest.mark.parametrize("why", ["stopped by SIGTERM", "error: no luck"])
def test_a_run_says_why_it_ended(run, capsys, why):
    cut_steps(run, 7)
    started = {"event": "start"}
    write_events(run, started, started, {"event": "end", "step": 7, "why": why}, started, {"event": "end", "why": why})
    assert status_of(run).state == why
    code, out, _ = said(capsys, run)
    assert code == 0 and f"3; ended: {why} 2 times, killed" in out and "7 of 12 (58%)" in out


def test_failed_saves_and_damaged_checkpoints_are_problems(run):
    failed, saved = {"event": "save failed", "why": "No space left on device"}, {"event": "saved", "seconds": 1.0}
    write_events(run, {**failed, "step": 2}, saved, {**failed, "step": 6}, {**failed, "step": 8})
    assert status_of(run).problems == ["2 saves have failed since the last checkpoint; step 8: No space left on device"]
    write_events(run, {**failed, "step": 6}, saved, {"event": "set aside", "step": 6, "why": "rank 0 is damaged"})
    assert status_of(run).problems == ["the checkpoint of step 6 was damaged, and is set aside: rank 0 is damaged"]


# ---- checkpoints


@pytest.mark.parametrize(
    "damage, seen_by_size",
    [
        (lambda folder: os.truncate(next(folder.glob("*.safetensors")), 100), True),
        (lambda folder: next(folder.glob("*.safetensors")).unlink(), True),
        (lambda folder: (folder / "manifest.json").unlink(), True),
        (lambda folder: (folder / "manifest.json").write_text("[" * 100_000), True),
        (lambda folder: (folder / "manifest.json").write_text('{"files": [{"file": "../../recipe.yaml"}]}'), True),
        (lambda folder: (folder / "manifest.json").write_text('{"files": [7]}'), True),
        (lambda folder: next(folder.glob("*.safetensors")).open("r+b").write(b"x" * 99), False),
    ],
    ids=["cut", "missing", "no manifest", "deep manifest", "outside", "odd", "changed"],
)
def test_a_damaged_checkpoint_is_named(run, capsys, damage, seen_by_size):
    damage(checkpoint.folder_of_step(run, STEPS))
    assert (status_of(run).checkpoint.damage is not None) == seen_by_size
    code, out, _ = said(capsys, run, "--verify")
    assert code == 0 and "step 12, DAMAGED" in out and "problem: " in out


def test_checkpoints_under_odd_names_are_no_checkpoints(run):
    for name in ("step-00000099.damaged", "step-00000099.making", "step-x"):
        (run / "checkpoints" / name).mkdir()
    (run / "latest").write_text("nothing")
    assert status_of(run).checkpoint.step == STEPS


# ---- damaged and hostile files

HOSTILE = "\x1b[31mred\r\nX\u202e" + "n" * 500
ODD = [
    b"{", b"null\n", b"7\n", b"[]\n", b"\xff\xfe\n", b'{"step": 1e999}\n', b"[" * 99_999 + b"\n", b'{"step": true}\n',
    b'{"step": ' + b"9" * 5000 + b"}\n", b'{"event": {}}\n', b'{"event": "start", "time": 5, "step": "x"}\n',
    b'{"step": -5, "stage": 7, "loss": "low", "seconds": [1], "skipped": 1e300, "damaged": null}\n',
    b'{"event": "end", "why": [1]}\n', b"x" * (3 << 20) + b"\n", b'{"beat": 1e300}',
    b'{"beat": "9999-99-99", "pid": "7"}', b'{"beat": "0001-01-01T00:00:00+23:59"}',
]  # fmt: skip


@pytest.mark.parametrize("name", ["recipe.yaml", "metrics.jsonl", "events.jsonl", "lock.json"])
def test_no_content_of_a_file_ends_the_command(run, capsys, name):
    for content in [*ODD, b"".join(ODD)]:
        (run / name).write_bytes(content)
        for options in ([], ["--json"]):
            code, out, err = said(capsys, run, *options)
            assert code == 0 and not err and out
            assert all(line.isprintable() for line in out.splitlines())


def test_unreadable_lines_are_counted_and_the_others_read(run):
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join([*lines[:5], lines[5][:40] + b"\n", *lines[6:], b'{"step": 13, "lo']))
    found = status_of(run)
    assert found.step == STEPS and found.problems == ["metrics.jsonl: 1 unreadable lines"]


def test_hostile_words_are_printed_as_one_line_each(run, capsys):
    cut_steps(run, 7)
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    (run / "metrics.jsonl").write_text(json.dumps({**row, "stage": HOSTILE, "step": 10**14}) + "\n")
    write_lock(run, 5, host=HOSTILE, job=HOSTILE)
    write_events(run, {"event": "end", "why": HOSTILE}, {"event": "save failed", "why": HOSTILE})
    plain = len(said(capsys, run)[1].splitlines())
    code, out, _ = said(capsys, run, run)
    assert code == 0 and plain < 20 and all(line.isprintable() for line in out.splitlines())
    assert "\\x1b[31mred X\\u202e" in out and max(map(len, out.splitlines())) < 1200


# ---- several runs, and what is none


def test_several_runs_are_a_table(run, trained, capsys):
    cut_steps(run, 7)
    code, out, _ = said(capsys, run, trained)
    heads, first, second = out.splitlines()
    assert code == 0 and heads.split()[:4] == ["run", "state", "stage", "step"]
    assert "7/12" in first and "12/12" in second and "finished" in second
    assert first.index("7/12") == second.index("12/12") == heads.index("step")


def test_a_run_that_has_not_begun(tmp_path, capsys):
    (tmp_path / "events.jsonl").write_text("")
    code, out, _ = said(capsys, tmp_path)
    assert code == 0 and "0 of unknown" in out and "checkpoint      none" in out


def test_what_is_no_run_is_one_line_after_those_that_are(run, tmp_path, capsys):
    for path in (tmp_path, tmp_path / "none", run / "metrics.jsonl"):
        code, out, err = said(capsys, run, path, "--json")
        assert code == 2 and json.loads(out)["step"] == STEPS
        assert err.startswith(f"error: {path}: not a run") and err.count("\n") == 1
