"""Restoring: the newest whole checkpoint is found without a person, and damage is named and set aside."""

import json
import os
import shutil
from pathlib import Path

import pytest

from rf_train.engine import checkpoint
from rf_train.engine.collectives import start_ranks
from rf_train.engine.restoring import newest_whole
from tests.distributed import run_distributed
from tests.engine.runs import rewound


def finds_on_this_rank(runs: list[str], go_back: bool) -> list:
    """For each run: [name of the checkpoint to go on from or the error, what was said on this rank]."""
    start_ranks()
    found = []
    for run in runs:
        said: list = []
        try:
            newest = newest_whole(Path(run), go_back, lambda *event, said=said: said.append(event))
            found.append([newest[0].name if newest else None, said])
        except checkpoint.Damaged as damage:
            found.append([str(damage), said])
    return found


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def swap(one: Path, other: Path) -> None:
    aside = one.with_suffix(".aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def change_manifest(folder: Path, change) -> None:
    """As an older version may have written it: without a hash."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    del manifest["hash"]
    path.write_text(json.dumps(manifest))


# A run with checkpoints 8, 10, 13, 19, 20, of which `latest` names 20, and what is done to it.
DAMAGES = {
    "flipped": (lambda newest: flip(newest / "rank-00001.safetensors"), "rank-00001.safetensors: damaged"),
    "truncated": (lambda newest: os.truncate(newest / "rank-00000.safetensors", 99), "rank-00000.safetensors: damaged"),
    "removed": (lambda newest: (newest / "rank-00000.safetensors").unlink(), "rank-00000.safetensors: missing"),
    "swapped": (
        lambda newest: swap(newest / "rank-00000.safetensors", newest / "rank-00001.safetensors"),
        "rank-00000.safetensors: damaged",
    ),
    "no manifest": (lambda newest: (newest / "manifest.json").unlink(), "manifest.json: missing"),
    "manifest flipped": (lambda newest: flip(newest / "manifest.json"), "manifest.json: "),
    "manifest nested": (lambda newest: (newest / "manifest.json").write_text("[" * 200_000), "manifest.json: "),
    "manifest of words": (
        lambda newest: change_manifest(newest, lambda manifest: manifest.update(files=["a", "b"])),
        "manifest.json: ",
    ),
    "manifest without sizes": (
        lambda newest: change_manifest(newest, lambda manifest: manifest["files"][0].pop("bytes")),
        "rank-00000.safetensors: damaged",
    ),
    "manifest without files": (
        lambda newest: change_manifest(newest, lambda manifest: manifest.update(files=[])),
        "manifest.json: ",
    ),
    "manifest without counts": (
        lambda newest: change_manifest(newest, lambda manifest: manifest.update(optimizer_steps=None)),
        "manifest.json: ",
    ),
    "manifest without shapes": (
        lambda newest: change_manifest(newest, lambda manifest: manifest.update(shapes={})),
        "manifest.json: ",
    ),
    "manifest a folder": (
        lambda newest: ((newest / "manifest.json").unlink(), (newest / "manifest.json").mkdir()),
        "manifest.json: ",
    ),
    "empty": (lambda newest: (shutil.rmtree(newest), newest.mkdir()), "manifest.json: missing"),
}
POINTERS = {"none": None, "empty": "", "nothing": "step-00000999", "not text": "\x00\xff", "back": "step-00000013"}


@pytest.fixture(scope="module")
def saved(two_rank_run, tmp_path_factory):
    return rewound(two_rank_run[0], tmp_path_factory.mktemp("restoring") / "run", 20)


def test_damage_is_named_and_set_aside_and_the_one_before_it_taken(saved, tmp_path):
    for name, (damage, _) in DAMAGES.items():
        damage(checkpoint.latest(shutil.copytree(saved, tmp_path / name)))
    steps = checkpoint.steps_saved(saved)
    told = run_distributed(finds_on_this_rank, 2, runs=[str(tmp_path / name) for name in DAMAGES], go_back=True)
    for (name, (_, words)), (found, said), (other, silent) in zip(DAMAGES.items(), *told):
        assert found == other == f"step-{steps[-2]:08d}", name
        [(event, step, why)] = said
        assert event == "set aside" and step == steps[-1] and words in why and silent == [], name
        assert "step-00000020.damaged" in os.listdir(tmp_path / name / "checkpoints")
        assert checkpoint.steps_saved(tmp_path / name) == steps[:-1]


def test_pointers_to_nothing_and_leftovers(saved, tmp_path):
    for name, text in POINTERS.items():
        run = shutil.copytree(saved, tmp_path / name)
        (run / "latest").unlink() if text is None else (run / "latest").write_text(text)
        (run / "checkpoints" / "step-00000022.making").mkdir()
    told = run_distributed(finds_on_this_rank, 1, runs=[str(tmp_path / name) for name in POINTERS], go_back=True)[0]
    found = dict(zip(POINTERS, told))
    assert {name: one for name, (one, _) in found.items()} == {
        **dict.fromkeys(POINTERS, "step-00000020"), "back": "step-00000013",
    }  # fmt: skip
    assert {name: len(said) for name, (_, said) in found.items()} == {
        "none": 1, "empty": 1, "nothing": 1, "not text": 1, "back": 1,
    }  # fmt: skip
    assert "names no checkpoint" in found["nothing"][1][0][2]
    _, step, why = found["back"][1][0]
    newer = [step for step in checkpoint.steps_saved(saved) if step > 13]
    assert step == 13 and all(f"step-{one:08d}.aside" in why for one in newer) and newer
    assert checkpoint.steps_saved(tmp_path / "back")[-1] == 13
    assert not list(tmp_path.glob("*/checkpoints/*.making"))


def test_a_newer_checkpoint_than_latest_names_is_the_last_resort(saved, tmp_path):
    """As after a kill between the naming of a checkpoint and that of `latest`."""
    run = shutil.copytree(saved, tmp_path / "run")
    first, second = checkpoint.steps_saved(run)[:2]
    (run / "latest").write_text(checkpoint.folder_of_step(run, first).name)
    (run / "recipe.yaml.elsewhere.1.tmp").write_text("")
    flip(checkpoint.folder_of_step(run, first) / "rank-00000.safetensors")
    [[found, said]] = run_distributed(finds_on_this_rank, 1, runs=[str(run)], go_back=True)[0]
    assert found == "step-00000020" and [(event, step) for event, step, _ in said] == [("set aside", first)]
    assert second in checkpoint.steps_saved(run)


def test_a_recipe_may_say_that_damage_stops_the_run(saved, tmp_path):
    run = shutil.copytree(saved, tmp_path / "run")
    flip(checkpoint.latest(run) / "rank-00001.safetensors")
    told = run_distributed(finds_on_this_rank, 2, runs=[str(run), str(tmp_path / "none")], go_back=False)
    for (damage, _), nothing in told:
        assert "rank-00001.safetensors: damaged" in damage and nothing == [None, []]
    assert "step-00000020" in os.listdir(run / "checkpoints")
