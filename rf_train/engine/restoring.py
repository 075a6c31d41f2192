"""Finding the checkpoint to go on from. Ranks share the work of checking it: each hashes some of its files."""

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch.distributed as dist

from data_prep.files import is_abandoned
from rf_train.engine.checkpoint import (
    ASIDE,
    DAMAGED,
    Damaged,
    check_file,
    folder_of_step,
    latest,
    leftovers,
    pointer,
    read_manifest,
    step_of,
    steps_saved,
)
from rf_train.engine.collectives import gather_lines, on_rank_0


def newest_whole(run: Path, go_back: bool, say: Callable[[str, int, str], None]) -> tuple[Path, dict] | None:
    """The checkpoint to go on from, and its manifest; None without any. A collective, with one result on all ranks.

    It is the one that `RUN/latest` names; when that is no checkpoint, the newest. With `go_back`, a damaged one is
    renamed, `say(event, step, why)` is told on rank 0, and the one before it taken. Else it raises Damaged. Newer ones
    than the one that is taken are renamed, too: the run is about to make them again. Unfinished ones are removed.
    """

    def candidates() -> list[int]:
        for folder in leftovers(run):
            shutil.rmtree(folder, ignore_errors=True)
        for file in run.glob("*.tmp"):
            if is_abandoned(file):
                file.unlink(missing_ok=True)
        begin = latest(run)
        if begin is not None and pointer(run) != begin.name:
            say("note", step_of(begin), f"{run / 'latest'} names no checkpoint; the newest is {begin.name}")
        saved = steps_saved(run)[::-1]
        # A newer one than `latest` names is the last resort: that may be a person's wish to go back.
        return sorted(saved, key=lambda step: begin is not None and step > step_of(begin))

    for step in on_rank_0(candidates):
        folder = folder_of_step(run, step)
        try:
            manifest = verified_together(folder)
            on_rank_0(partial(_set_newer_aside, run, step, say))
            return folder, manifest
        except Damaged as damage:
            if not go_back:
                raise
            on_rank_0(partial(_set_aside, folder, str(damage), say))
    return None


def _set_aside(folder: Path, damage: str, say: Callable[[str, int, str], None]) -> None:
    """Renames a damaged checkpoint, and says so."""
    name = _rename(folder, DAMAGED)
    say("set aside", step_of(folder), f"{damage.split('; go back')[0]}; it is called {name} now")


def _set_newer_aside(run: Path, step: int, say: Callable[[str, int, str], None]) -> None:
    """Renames the checkpoints that come after `step`, and says so."""
    newer = [folder_of_step(run, one) for one in steps_saved(run) if one > step]
    names = [_rename(folder, ASIDE) for folder in newer]
    if names:
        say("note", step, f"going on from step {step}; newer checkpoints are called {', '.join(names)} now")


def _rename(folder: Path, end: str) -> str:
    """Adds `end`, and a number if need be, to a folder's name. Returns the new name."""
    number, name = 1, folder.name + end
    while folder.with_name(name).exists():
        number += 1
        name = f"{folder.name}{end}{number}"
    os.rename(folder, folder.with_name(name))
    return name


def verified_together(folder: Path) -> dict:
    """The manifest of a checkpoint, after its files were checked. A collective: each rank hashes some of them.

    Raises Damaged, on every rank, that names the first damaged file.
    """
    manifest = on_rank_0(lambda: read_manifest(folder))
    damages, failures = [], []
    try:
        for entry in manifest["files"][dist.get_rank() :: dist.get_world_size()]:
            check_file(folder, entry)
    except Damaged as damage:
        damages.append(str(damage))
    except OSError as error:  # the file may be whole
        failures.append(str(error))
    if failures := gather_lines(failures):
        raise OSError(failures[0])
    if damages := gather_lines(damages):
        raise Damaged(damages[0])
    return manifest
