"""Saving: files that safetensors reads, hashed on their way; failures that leave older checkpoints whole."""

import hashlib
import json
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from rf_train.engine import checkpoint, saving
from rf_train.engine.collectives import start_ranks
from rf_train.engine.restoring import newest_whole
from rf_train.engine.saving import Saver, write_tensors
from tests.distributed import run_distributed


def test_a_file_is_what_safetensors_reads_and_its_hash_that_of_its_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "PIECE", 100)  # so that tensors are written in several pieces
    tensors = {"a": torch.randn(7, 11), "ema/b.c": torch.randn(300), "none": torch.zeros(0), "one": torch.randn(1)}
    entry = write_tensors(tmp_path / "x.safetensors", tensors)
    content = (tmp_path / "x.safetensors").read_bytes()
    assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)


class State:
    """What a `Saver` needs of a training state."""

    shapes = {"w": (10,)}
    optimizer_steps = average_steps = 0

    def __init__(self, value: float):
        self.tensor = torch.full((5,), value)

    def by_kind(self) -> dict:
        return {kind: {"w": self.tensor} for kind in checkpoint.KINDS}

    def copy_to_host(self) -> dict:
        return {f"{kind}/w": self.tensor.clone() for kind in checkpoint.KINDS}

    def begins(self) -> None:
        return None


def saves_on_this_rank(run: str) -> list:
    """Saves while the state changes; a full disk on rank 1; too little space; and after all that again."""
    ranks = start_ranks()
    state, folder, told = State(1.0), Path(run), []
    saver = Saver(folder, state, keep=2, always=set())
    free, write = threading.Event(), saving.write_tensors

    def slow(path: Path, tensors: dict) -> dict:
        free.wait(60)
        return write(path, tensors)

    def full(path: Path, tensors: dict) -> dict:
        if ranks.rank == 1:
            raise OSError(28, "No space left on device", str(path))
        return write(path, tensors)

    saving.write_tensors = slow
    saver.begin(1)
    told.append(saver.poll() is None and checkpoint.steps_saved(folder) == [])
    state.tensor.fill_(2.0)  # training goes on
    free.set()
    told.append(saver.finish().error)
    saving.write_tensors = full
    saver.begin(2)
    told.append(saver.finish().error)
    saving.write_tensors, saver.bytes = write, 1 << 60
    saver.begin(3)
    told.append(saver.poll().error)
    told.append(saver.failures)
    saver.bytes = 1
    for step in (4, 5, 6):
        saver.begin(step)
        told.append(saver.finish().error)
    saver.close()
    told.append(saver.failures)
    return told


def test_what_is_saved_is_the_state_at_the_beginning_and_failures_leave_the_older_ones_whole(tmp_path):
    run = tmp_path / "run"
    told = run_distributed(saves_on_this_rank, 2, run=str(run))
    assert told[0] == told[1]
    beside, first, full, large, failures, *again, failures_at_the_end = told[0]
    assert beside is True and first == ""
    assert full.startswith("rank 1: [Errno 28] No space left on device") and "step-00000002.making" in full
    assert large == f"{run}: a checkpoint takes {1 << 40:,.0f} MiB, {large.split(', ')[-1]}" and "MiB are free" in large
    assert failures == 2 and again == ["", "", ""] and failures_at_the_end == 0
    assert sorted(os.listdir(run / "checkpoints")) == ["step-00000005", "step-00000006"]
    assert (run / "latest").read_text() == "step-00000006"
    weights = checkpoint.read_weights(checkpoint.latest(run))
    assert weights["w"].tolist() == [2.0] * 10


def saves_once(run: str) -> None:
    start_ranks()
    saver = Saver(Path(run), State(1.0), keep=1, always=set())
    saver.begin(1)
    saver.finish()
    saver.close()


def test_the_manifest_covers_its_own_numbers(tmp_path):
    run_distributed(saves_once, 1, run=str(tmp_path))
    folder = checkpoint.latest(tmp_path)
    path = folder / "manifest.json"
    text = path.read_text()
    assert checkpoint.verified(folder)["step"] == 1
    for before, after in (('"optimizer_steps": 0', '"optimizer_steps": 9'), ("rank-00000", "../../x")):
        path.write_text(text.replace(before, after))
        with pytest.raises(checkpoint.Damaged, match=r"manifest.json: edited or damaged"):
            checkpoint.verified(folder)
    without_hash = {**json.loads(text), "shapes": 3}
    without_hash.pop("hash")
    path.write_text(json.dumps(without_hash))
    with pytest.raises(checkpoint.Damaged, match=r"manifest.json: edited or damaged"):
        checkpoint.verified(folder)
    path.write_text(text)
    folder.rename(folder.with_name("step-00000002"))
    with pytest.raises(checkpoint.Damaged, match=r"holds the checkpoint of step 1"):
        checkpoint.verified(folder.with_name("step-00000002"))


def saves_while_an_old_one_is_removed(run: str) -> list[str]:
    """There is space for the next checkpoint only when the oldest is gone."""
    start_ranks()
    saver, prune, removed = Saver(Path(run), State(1.0), keep=1, always=set()), saving.prune, threading.Event()

    def slow(*arguments) -> None:
        time.sleep(0.5)
        prune(*arguments)
        removed.set()

    saving.prune = slow
    saving.shutil.disk_usage = lambda path: SimpleNamespace(free=1 << 40 if removed.is_set() else 0)
    saver.bytes, errors = 0, []
    for step in (1, 2):
        saver.begin(step)
        errors.append(saver.finish().error)
        saver.bytes = 1 << 30
    saver.close()
    return errors


def test_a_removal_that_makes_space_is_waited_for(tmp_path):
    """Else a signal during a save, on a disk with space for one more, would save nothing."""
    assert run_distributed(saves_while_an_old_one_is_removed, 1, run=str(tmp_path)) == [["", ""]]


def saves_killed_while_naming(run: str, killed_in: str) -> list:
    """Saves step 1, is killed while it names step 2, and goes on. The step that it finds, and the folders then."""
    start_ranks()
    saver = Saver(Path(run), State(1.0), keep=9, always=set())
    saver.begin(1)
    saver.finish()

    def killed(*_):
        raise SystemExit

    saver.begin(2)
    holder = saving if killed_in == "write_atomic" else saving.os
    with mock.patch.object(holder, killed_in, killed), pytest.raises(SystemExit):
        saver.finish()
    found = newest_whole(Path(run), True, lambda *_: None)
    assert found is not None
    return [found[1]["step"], sorted(os.listdir(Path(run) / "checkpoints"))]


@pytest.mark.parametrize("killed_in", ["write_atomic", "rename"])
def test_a_kill_while_a_checkpoint_gets_its_name_sets_none_aside(tmp_path, killed_in):
    [[step, folders]] = run_distributed(saves_killed_while_naming, 1, run=str(tmp_path), killed_in=killed_in)
    assert step == 1 and not [name for name in folders if name.endswith(".aside")]
