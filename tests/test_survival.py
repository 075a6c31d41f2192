"""Runs that survive, through the real launcher: signals, dead launchers, two jobs, gone checkpoints, NaN to the end."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml

from data_prep.command import GO_ON
from rf_train import config, train
from rf_train.engine import checkpoint
from rf_train.engine.collectives import start_ranks
from rf_train.engine.processes import command, parent
from rf_train.engine.run_folder import read_events
from rf_train.engine.stopping import Stop, Stopped
from rf_train.engine.watching import Watch
from rf_train.failures import report_failure
from rf_train.run_log import read_rows
from tests.distributed import PROJECT, free_port, run_distributed
from tests.engine.runs import (
    STEPS,
    assert_close,
    assert_same_state,
    losses_of,
    recipe_dict,
    rewound,
    train_on_ranks,
    watched_steps,
)
from tests.test_train import train_with_nan_on_this_rank

pytestmark = pytest.mark.slow


def processes_of(recipe: Path) -> dict[str, list[int]]:
    """The runner, the launcher and the ranks that train `recipe`, by their commands."""
    found: dict[str, list[int]] = {"runner": [], "launcher": [], "ranks": []}
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        words = command(pid)
        if str(recipe) in words and not any("multiprocessing" in word for word in words):
            rank = any(word.startswith("--local_rank=") for word in words)
            kind = "ranks" if rank else "launcher" if "deepspeed.launcher.launch" in words else "runner"
            found[kind].append(pid)
    found["ranks"].sort()
    return found


def wait_for(condition: Callable[[], object], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


@pytest.fixture
def launched(plain_run, tmp_path) -> Iterator[Callable]:
    """`launched(steps)`: starts a run of so many steps on two ranks. (the launcher's process, recipe, run's folder)."""
    path, out = tmp_path / "recipe.yaml", tmp_path / "run"

    def launch(steps: int, **run) -> subprocess.Popen:
        recipe = recipe_dict(plain_run.data, out, **run)
        recipe["stages"] = [{**recipe["stages"][0], "steps": steps}]
        path.write_text(yaml.safe_dump(recipe))
        deepspeed = Path(sys.executable).with_name("deepspeed")
        arguments = ["--num_accelerators", "2", "--master_port", free_port(), "--module", "rf_train.train", path]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        environment["PATH"] = f"{deepspeed.parent}:{os.environ['PATH']}"
        with open(tmp_path / "log", "a") as log:
            return subprocess.Popen(
                [sys.executable, deepspeed, *map(str, arguments)], cwd=PROJECT, env=environment, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    yield launch, path, out
    for pids in processes_of(path).values():
        for pid in pids:
            os.kill(pid, signal.SIGKILL)


def rows(out: Path) -> int:
    return len(read_rows(out / "metrics.jsonl"))


# (signal, to whom, the exit code of the launcher if it is known)
SIGNALS = {
    "terminated ranks": (signal.SIGTERM, "ranks", GO_ON),
    "terminated launcher": (signal.SIGTERM, "launcher", None),
    "killed runner": (signal.SIGKILL, "runner", None),
    "interrupted group": (signal.SIGINT, "group", None),
}


@pytest.mark.parametrize("number, whom, code", SIGNALS.values(), ids=SIGNALS)
def test_a_run_that_is_asked_to_stop_saves_and_leaves_no_process(launched, number, whom, code):
    launch, path, out = launched
    runner = launch(100_000)
    wait_for(lambda: rows(out) >= 3)
    begin = time.monotonic()
    if whom == "group":
        os.killpg(runner.pid, number)
    else:
        for pid in processes_of(path)[whom]:
            os.kill(pid, number)
    runner.wait(timeout=60)
    wait_for(lambda: not any(processes_of(path).values()), 60)
    assert time.monotonic() - begin < 60 and (code is None or runner.returncode == code)
    assert checkpoint.steps_saved(out) == [rows(out)] == [checkpoint.verified(checkpoint.latest(out))["step"]]
    start, saved, end = read_events(out)
    assert (start["event"], start["ranks"], saved["event"], end["event"]) == ("start", 2, "saved", "end")
    assert end["why"].startswith("stopped by ") and end["step"] == saved["step"] == rows(out)
    assert not (out / "lock.json").exists() and not list(out.glob("checkpoints/*.making"))


@pytest.mark.parametrize("whom", ["launcher", "runner"])
def test_ranks_whose_launcher_dies_while_they_still_import_leave_too(launched, whom):
    """By the time that they look, their parent is another process."""
    launch, path, out = launched
    launch(100_000)
    wait_for(lambda: len(processes_of(path)["ranks"]) == 2)
    for pid in processes_of(path)[whom]:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not any(processes_of(path).values()), 60)
    assert rows(out) == 0


def train_until_on_this_rank(recipe: dict, until: int) -> dict:
    """Trains until it is asked to stop after so many steps. Returns what this rank was given at each step."""

    class Asked(Stop):
        done = len(read_rows(Path(recipe["run"]["out"]) / "metrics.jsonl"))

        def agreed(self) -> int:
            self.done += 1
            return signal.SIGTERM if self.done >= until else 0

    given = watched_steps()
    with contextlib.suppress(Stopped):
        train.train(config.from_dict(recipe), Asked())
    return given


def test_a_run_goes_on_with_other_ranks_and_engines_as_if_nothing_had_happened(plain_run, two_rank_run, tmp_path):
    """On 2 ranks, 1, 4, and 2 with ZeRO-2: the same clips and draws, losses, average and moments."""
    out, given = tmp_path / "run", {}
    turns = [(2, {}, 7), (1, {}, 12), (4, {}, 17), (2, {"deepspeed": "ds_configs/zero2.json"}, STEPS)]
    for ranks, run, until in turns:
        recipe = recipe_dict(plain_run.data, out, **run)
        for one in run_distributed(train_until_on_this_rank, ranks, recipe=recipe, until=until):
            for step, clips in one.items():
                given.setdefault(step, {}).update(clips)
        assert rows(out) == until and checkpoint.steps_saved(out)[-1] == until
    assert given == plain_run.clips
    assert_close(losses_of(out), plain_run.losses, 1e-4)
    for kind in checkpoint.KINDS:
        ours, theirs = (checkpoint.read_weights(checkpoint.latest(run), kind) for run in (out, two_rank_run[0]))
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-5)


def train_without_data_on_this_rank(recipe: dict, step: int, asked: int = 1) -> str:
    """Trains. The data of `step` doesn't come to rank 1, and rank `asked` is asked to stop. Returns how it ended."""
    stop, steps = Stop(), train.steps

    def missing(*arguments):
        for number, micro_batches in steps(*arguments):
            if number == step and os.environ["RANK"] == str(asked):
                stop.reason = signal.SIGTERM
            if number == step and os.environ["RANK"] == "1":
                wait_for(arguments[-1], 60)
                yield number, []
                return
            yield number, micro_batches

    train.steps, train.longest_wait = missing, lambda recipe: 5.0
    try:
        train.train(config.from_dict(recipe), stop)
    except Stopped as error:
        return str(error)
    return "finished"


def test_a_rank_that_is_asked_to_stop_while_one_waits_for_data_takes_all_along(plain_run, tmp_path):
    recipe = recipe_dict(plain_run.data, tmp_path, save_every=4)
    recipe["stages"] = recipe["stages"][:1]
    for step, asked, saved in ((2, 0, [2]), (4, 1, [2, 4]), (4, 0, [2, 4])):  # at last nothing new is to be saved
        told = run_distributed(train_without_data_on_this_rank, 2, recipe=recipe, step=step, asked=asked)
        assert told == [f"stopped by SIGTERM after step {step}; the same command goes on from step-{step:08d}"] * 2
        assert checkpoint.steps_saved(tmp_path) == saved
    assert run_distributed(train_without_data_on_this_rank, 2, recipe=recipe, step=99) == ["finished"] * 2
    assert_close(losses_of(tmp_path), plain_run.losses[: rows(tmp_path)], 1e-4)


def test_a_second_job_in_the_folder_is_refused_and_the_first_goes_on(launched, plain_run, tmp_path):
    launch, path, out = launched
    first = launch(100_000)
    wait_for(lambda: rows(out) >= 2)
    [owner, _] = processes_of(path)["ranks"]
    assert parent(owner) in processes_of(path)["launcher"]
    told = run_distributed(error_of_training, 2, recipe=yaml.safe_load(path.read_text()))
    assert told[0] == told[1] and f"process {owner} on " in told[0] and "trains in this folder" in told[0]
    before = rows(out)
    wait_for(lambda: rows(out) > before)
    assert first.poll() is None and len(read_events(out)) == 1


def error_of_training(recipe: dict) -> str:
    try:
        train.train(config.from_dict(recipe))
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "no error"


def test_a_damaged_newest_checkpoint_needs_no_person(plain_run, two_rank_run, tmp_path):
    """Also that of a finished run: it isn't done. The end is that of a run without damage, bit for bit."""
    run = shutil.copytree(two_rank_run[0], tmp_path / "run")
    newest = checkpoint.latest(run) / "rank-00000.safetensors"
    os.truncate(newest, newest.stat().st_size - 1)
    train_on_ranks(2, recipe_dict(plain_run.data, run, save_every=10, keep=10))
    assert losses_of(run) == losses_of(two_rank_run[0])
    assert_same_state(run, two_rank_run[0])
    told = [(row["event"], row["step"]) for row in read_events(run)][-4:]
    assert told == [("set aside", 30), ("start", 24), ("saved", 30), ("end", 30)]
    assert (run / "checkpoints" / "step-00000030.damaged").is_dir()


def test_without_any_checkpoint_a_run_that_was_saved_is_not_started_again(plain_run, two_rank_run, tmp_path):
    recipe = recipe_dict(plain_run.data, tmp_path / "run")
    for gone in (["latest"], [], ["latest", "events.jsonl"]):
        run = rewound(two_rank_run[0], tmp_path / "run", 30)
        for step in checkpoint.steps_saved(run):
            folder = checkpoint.folder_of_step(run, step)
            shutil.rmtree(folder) if "events.jsonl" not in gone else (folder / "manifest.json").unlink()
        for name in gone:
            (run / name).unlink()
        before = rows(run)
        [told] = run_distributed(error_of_training, 1, recipe=recipe)
        assert "was saved before, and no whole checkpoint is left" in told
        assert rows(run) == before > 0
        shutil.rmtree(run)


def test_a_start_from_a_run_that_has_done_all_steps_says_that_nothing_is_left(plain_run, two_rank_run, tmp_path):
    recipe = recipe_dict(plain_run.data, tmp_path / "run")
    recipe["start"] = {"run": str(two_rank_run[0])}
    [told] = run_distributed(error_of_training, 1, recipe=recipe)
    assert f"has done {STEPS} steps" in told and "nothing is left to train" in told
    assert checkpoint.steps_saved(tmp_path / "run") == []


def test_steps_that_are_skipped_to_the_end_are_no_finished_run(plain_run, tmp_path):
    recipe = recipe_dict(plain_run.data, tmp_path, save_every=2)
    recipe["stages"] = recipe["stages"][:1]
    broken = {"recipe": recipe, "rank_with_nan": 0}
    [told] = run_distributed(train_with_nan_on_this_rank, 1, **broken, steps=[5, 6, 7])
    assert told.startswith("step 8: 3 steps in a row were skipped") and "step-00000004" in told
    assert checkpoint.steps_saved(tmp_path) == [2, 4]
    assert read_events(tmp_path)[-1]["why"].startswith("error: step 8: 3 steps")
    assert run_distributed(train_with_nan_on_this_rank, 1, **broken, steps=[7]) == [None]
    assert checkpoint.steps_saved(tmp_path)[-1] == 8 and read_events(tmp_path)[-1]["why"] == "finished"


def train_with_failing_saves_on_this_rank(recipe: dict, failing: list[int]) -> str:
    """Trains; writing the checkpoints of these steps fails on rank 1, as on a full disk. Returns the error."""
    from rf_train.engine import saving

    write = saving.write_tensors

    def full(path: Path, tensors: dict) -> dict:
        if os.environ["RANK"] == "1" and checkpoint.step_of(path.parent.with_suffix("")) in failing:
            raise OSError(28, "No space left on device", str(path))
        return write(path, tensors)

    saving.write_tensors = full
    return error_of_training(recipe)


def test_a_full_disk_costs_a_checkpoint_and_three_in_a_row_the_run(plain_run, tmp_path):
    recipe = recipe_dict(plain_run.data, tmp_path / "run", save_every=2, keep=10)
    recipe["stages"] = recipe["stages"][:1]
    failing = {"recipe": recipe, "failing": [2, 6]}
    assert run_distributed(train_with_failing_saves_on_this_rank, 2, **failing) == ["no error"] * 2
    assert checkpoint.steps_saved(tmp_path / "run") == [4, 8]
    told = [(row["event"], row["step"]) for row in read_events(tmp_path / "run")]
    assert told == [("start", 0), ("save failed", 2), ("saved", 4), ("save failed", 6), ("saved", 8), ("end", 8)]
    recipe["run"]["out"] = str(tmp_path / "other")
    told = run_distributed(train_with_failing_saves_on_this_rank, 2, recipe=recipe, failing=[4, 6, 8])
    assert told[0] == told[1] and "the checkpoint could not be saved" not in told[0]
    assert told[0].startswith("step 8: 3 saves in a row have failed: rank 1: [Errno 28] No space left on device")
    assert checkpoint.steps_saved(tmp_path / "other") == [2]
    [last] = run_distributed(error_of_training, 1, recipe=recipe)
    assert last == "no error" and checkpoint.steps_saved(tmp_path / "other") == [2, 4, 6, 8]


def leaves_on_this_rank() -> float:
    """Seconds until a rank that was stopped may leave, when rank 0 cleans up for three."""
    ranks, watch, begin = start_ranks(), Watch(), time.monotonic()
    watch.begin(ranks)
    if ranks.rank == 0:
        time.sleep(3)
    assert report_failure(Stopped("a signal", "stopped"), ranks.rank, watch, []) == GO_ON
    return time.monotonic() - begin


def test_ranks_that_were_stopped_leave_together():
    """Else the launcher, or its watch, ends rank 0 while it removes old checkpoints."""
    assert min(run_distributed(leaves_on_this_rank, 2)) > 2.5
