"""The micro-batches of a step: a function of seed and step, the same for any number of replicas and any micro-batch."""

import threading
from dataclasses import replace

import pytest
import torch

from rf_train import config
from rf_train.data import batches
from rf_train.data.batches import micro_steps, open_datasets, step_batches, steps
from tests.conftest import change_card, plain_settings, write_dataset


def recipe_for(folder, **stage) -> config.Recipe:
    """Two stages of four steps. `stage` changes settings of the first."""
    first = {"name": "a", "steps": 4, "batch": 4, "history": "mixed", **stage}
    return config.from_dict(
        {
            "model": plain_settings(),
            "data": {"train": str(folder)},
            "stages": [first, {"name": "b", "steps": 4, "batch": 4, "history": "clean"}],
            "flow": {"caption_dropout": 0.5},
        }
    )


@pytest.mark.parametrize("step", [1, 5])
def test_clips_and_draws_are_the_same_for_any_number_of_replicas_and_any_micro_batch(tmp_path, step):
    """Step 1 reads across the end of an epoch; step 5 is in another stage. A stage has the draws of its own history."""
    recipe = recipe_for(write_dataset(tmp_path / "d", 6))
    datasets = open_datasets(recipe)
    history = recipe.span_at(step).stage.history
    seen = {}
    for replicas, micro_batch in ((1, 1), (1, 4), (2, 1), (2, 2), (4, 1)):
        split = config.from_dict({**config.to_dict(recipe), "optimizer": {"micro_batch": micro_batch}})
        order = {}
        for replica in range(replicas):
            for micro_step, batch in enumerate(step_batches(split, datasets, step, replica, replicas)):
                assert len(batch.ids) == micro_batch
                order[micro_step, replica] = batch.ids
                assert set(batch.draws) == {"noise", "t", "t_uniform", "caption_dropout", *history.draws}
                for row, name in enumerate(batch.ids):
                    values = [batch.x[row], batch.text[row], *(draw[row] for draw in batch.draws.values())]
                    for one, other in zip(seen.setdefault(name, values), values):
                        assert torch.equal(one, other)
        assert [name for place in sorted(order) for name in order[place]] == list(seen)  # also in the same order
    assert len(seen) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_the_threads_that_read_ahead_pin_what_they_read(tmp_path, monkeypatch, workers):
    """Page-locked memory needs a GPU, so it is only noted here what is pinned, and where."""
    pinned: dict[int, str] = {}

    def pin(tensor):
        pinned[id(tensor)] = threading.current_thread().name
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    recipe = recipe_for(write_dataset(tmp_path / "d"))
    recipe = replace(recipe, data=replace(recipe.data, workers=workers))
    datasets = open_datasets(recipe)
    assert list(steps(recipe, datasets, 6, 0, 2)) and not pinned
    read = [batch for _, found in steps(recipe, datasets, 6, 0, 2, True) for batch in found]
    tensors = [tensor for batch in read for tensor in (batch.x, batch.text, *batch.draws.values())]
    assert {id(tensor) for tensor in tensors} <= pinned.keys()
    assert all(name.startswith("reader") for name in pinned.values())


@pytest.mark.parametrize("workers", [0, 1, 3, 20])
def test_reading_ahead_changes_nothing(tmp_path, workers):
    recipe = recipe_for(write_dataset(tmp_path / "d"))
    recipe = replace(recipe, data=replace(recipe.data, workers=workers))
    datasets = open_datasets(recipe)
    read = []
    for step, found in steps(recipe, datasets, 2, 0, 2):
        read.append(step)
        again = step_batches(recipe, datasets, step, 0, 2)
        assert [batch.ids for batch in found] == [batch.ids for batch in again]
    assert read == [2, 3, 4, 5, 6, 7]
    assert not list(steps(recipe, datasets, 8, 0, 2))


def test_each_dataset_goes_on_where_the_stage_before_left_it(tmp_path):
    """Stages a and c read the same dataset, stage b another one. Together a and c make two epochs."""
    folder, other = write_dataset(tmp_path / "d", 10), write_dataset(tmp_path / "other", 10, seed=1)
    stages = [
        {"name": "a", "steps": 2, "batch": 4},
        {"name": "b", "steps": 2, "batch": 5, "data": str(other)},
        {"name": "c", "steps": 6, "batch": 2},
    ]
    recipe = config.from_dict({"model": plain_settings(), "data": {"train": str(folder)}, "stages": stages})
    datasets = open_datasets(recipe)
    ids = [[name for b in step_batches(recipe, datasets, step, 0, 1) for name in b.ids] for step in range(recipe.steps)]
    shared = [name for step in (0, 1, *range(4, 10)) for name in ids[step]]
    assert shared == [name for _, name in datasets[str(folder)].samples_at(0, 0, 20)]
    assert ids[2] + ids[3] == [name for _, name in datasets[str(other)].samples_at(0, 0, 10)]


def test_dropped_captions_become_the_empty_one_of_the_dataset(tmp_path):
    recipe = recipe_for(write_dataset(tmp_path / "d"))
    datasets = open_datasets(recipe)
    batches = [batch for step in range(8) for batch in step_batches(recipe, datasets, step, 0, 1)]
    text = torch.cat([batch.text for batch in batches])
    dropped = torch.cat([batch.draws["caption_dropout"] for batch in batches]) < 0.5
    assert 0 < dropped.sum() < len(dropped)
    assert (text[dropped, 0] == 0.1).all() and not text[dropped, 1:].any()
    assert (text[~dropped, 0] != 0.1).any(dim=1).all()


def test_the_clips_of_a_stage_have_its_frames(tmp_path):
    recipe = recipe_for(write_dataset(tmp_path / "d"), frames=8)
    datasets = open_datasets(recipe)
    first, second = (step_batches(recipe, datasets, step, 0, 1)[0] for step in (0, 4))
    assert first.x.shape[2] == 8 and first.chunk_sizes == [3, 3, 2] and first.history_frames == 6
    assert second.x.shape[2] == 9 and second.chunk_sizes == [3, 3, 3]


def test_a_batch_that_does_not_split_evenly_is_refused(tmp_path):
    stage = recipe_for(tmp_path).stages[0]
    assert micro_steps(stage, 1, 2) == 2
    message = "stage a: batch=4 is not a multiple of optimizer.micro_batch=1 x 3 replicas"
    with pytest.raises(ValueError, match=message):
        micro_steps(stage, 1, 3)


def test_clips_shorter_than_a_stage_wants_are_refused(tmp_path):
    folder = write_dataset(tmp_path / "d")
    with pytest.raises(ValueError, match=r"stage a: frames=10, but .* holds clips of 9"):
        open_datasets(recipe_for(folder, frames=10))


def test_a_recipe_without_a_dataset_is_refused():
    with pytest.raises(ValueError, match=r"data\.train: no dataset folder is set"):
        open_datasets(recipe_for(""))


@pytest.mark.parametrize("part", ["codec", "text"])
def test_datasets_of_different_codecs_or_text_encoders_are_refused(tmp_path, part):
    folder, other = write_dataset(tmp_path / "d"), write_dataset(tmp_path / "other", seed=1)
    recipe = recipe_for(folder, data=str(other))
    assert set(open_datasets(recipe)) == {str(folder), str(other)}
    change_card(other, lambda card: card[part].update(hash="another"))
    with pytest.raises(ValueError, match=f"its {part} is not that of"):
        open_datasets(recipe)


def test_held_out_clips_of_another_size_are_refused_before_training(tmp_path):
    plain = config.to_dict(recipe_for(write_dataset(tmp_path / "d", 6)))
    plain["data"]["evaluation"] = str(write_dataset(tmp_path / "large", 6, height=8))
    assert len(open_datasets(config.from_dict(plain))) == 1
    plain["evaluation"]["every"] = 4
    with pytest.raises(ValueError, match=r"large has latents of 8x6, .*d of 4x6"):
        open_datasets(config.from_dict(plain))


@pytest.mark.parametrize("workers", [1, 3])
def test_steps_are_read_ahead_but_not_far(tmp_path, monkeypatch, workers):
    """While step n is computed, the next `workers` steps are read; an error comes with its own step."""
    recipe = recipe_for(write_dataset(tmp_path / "d"))
    recipe = replace(recipe, data=replace(recipe.data, workers=workers))
    begun, real = [], batches.step_batches

    def watched(recipe, datasets, step, *rest):
        begun.append(step)
        if step == 5:
            raise OSError("step 5")
        return real(recipe, datasets, step, *rest)

    monkeypatch.setattr(batches, "step_batches", watched)
    stream = steps(recipe, open_datasets(recipe), 0, 0, 1)
    assert [next(stream)[0] for _ in range(2)] == [0, 1]
    assert len(begun) <= 2 + workers
    assert [next(stream)[0] for _ in range(3)] == [2, 3, 4]
    with pytest.raises(OSError, match="step 5"):
        next(stream)
