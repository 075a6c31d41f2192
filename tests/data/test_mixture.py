"""Datasets mixed by weight: exact shares, each sample once per epoch, and the same stream however it is split."""

from collections import Counter
from dataclasses import replace

import pytest

from rf_train import config
from rf_train.data.batches import open_datasets, step_batches
from rf_train.data.latent_dataset import LatentDataset
from rf_train.data.mixture import PERIOD, MixedDataset, shares
from tests.conftest import plain_settings, tiny_settings, write_dataset

STEPS, BATCH = 20, 12


def recipe_for(folders, weights=(3, 1), by="clip", batches=(BATCH, BATCH), **changes) -> config.Recipe:
    parts = [{"data": str(folder), "weight": weight} for folder, weight in zip(folders, weights)]
    data = {"train": "mixed", "mixtures": [{"name": "mixed", "by": by, "parts": parts}]}
    stages = [
        {"name": name, "steps": STEPS // 2, "batch": batch, "history": "clean"} for name, batch in zip("ab", batches)
    ]
    return config.from_dict({"model": plain_settings(), "data": data, "stages": stages, **changes})


@pytest.fixture
def folders(tmp_path):
    return [write_dataset(tmp_path / "large", 30), write_dataset(tmp_path / "small", 7, seed=1)]


def ids_of(recipe, replicas, steps=range(STEPS)) -> list[list[str]]:
    """The ids of each step, in the order of its positions."""
    datasets, found = open_datasets(recipe), []
    for step in steps:
        batches = [step_batches(recipe, datasets, step, replica, replicas) for replica in range(replicas)]
        found.append([name for micro in zip(*batches) for batch in micro for name in batch.ids])
    return found


@pytest.mark.parametrize("by", ["clip", "step"])
@pytest.mark.parametrize("micro_batch, replicas", [(1, 1), (3, 2), (1, 4), (12, 1)])
def test_the_stream_is_the_same_for_any_number_of_replicas_and_any_micro_batch(folders, by, micro_batch, replicas):
    recipe = recipe_for(folders, by=by)
    other = recipe_for(folders, by=by, optimizer={"micro_batch": micro_batch})
    assert ids_of(other, replicas) == ids_of(recipe, 1)


@pytest.mark.parametrize("by", ["clip", "step"])
def test_a_step_depends_on_nothing_before_it(folders, by):
    recipe = recipe_for(folders, by=by)
    assert ids_of(recipe, 2, [13, 4]) == [ids_of(recipe, 1)[step] for step in (13, 4)]


@pytest.mark.parametrize("batches", [(12, 12), (12, 4)])
def test_by_step_a_step_has_one_size_and_every_sample_comes_once_per_epoch(folders, tmp_path, batches):
    """Pictures of two sizes; the second stage may have smaller steps."""
    wide = write_dataset(tmp_path / "wide", 9, height=2, width=12, seed=2)
    recipe = recipe_for([folders[0], wide], (1, 1), by="step", batches=batches)
    datasets = open_datasets(recipe)
    assert datasets["mixed"].card["latent"]["width"] == 6 and len(datasets["mixed"]) == 39
    shapes = {}
    for step in range(STEPS):
        for batch in step_batches(recipe, datasets, step, 0, 1):
            assert len({name.split(":")[0] for name in batch.ids}) == 1
            shapes[batch.ids[0][0]] = tuple(batch.x.shape[2:])
    assert shapes == {"0": (9, 4, 6), "1": (9, 2, 12)}
    stream = [name.split(":") for step in ids_of(recipe, 1) for name in step]
    for number, folder in (("0", folders[0]), ("1", wide)):
        names = [name for part, name in stream if part == number]
        expected = LatentDataset(folder, tiny_settings()).samples_at(0, 0, len(names))
        assert names == [name for _, name in expected]


def test_without_weights_each_dataset_counts_by_its_size(folders):
    mixed = open_datasets(recipe_for(folders, (0, 0)))["mixed"]
    assert mixed.shares == [811, 189]  # of 30 and 7 samples


def test_within_a_dataset_every_sample_comes_once_per_epoch(folders):
    recipe = recipe_for(folders)
    stream = [name.split(":") for step in ids_of(recipe, 1) for name in step]
    for number, size in (("0", 30), ("1", 7)):
        names = [name for part, name in stream if part == number]
        expected = LatentDataset(folders[int(number)], tiny_settings()).samples_at(0, 0, len(names))
        assert names == [name for _, name in expected] and len(names) > 2 * size
    assert len({name for step in ids_of(recipe, 1) for name in step}) == STEPS * BATCH


def test_shares_are_exact_in_every_period_and_their_order_is_new(folders):
    mixed = open_datasets(recipe_for(folders, (2, 1)))["mixed"]
    periods = [[mixed.place_of(5, PERIOD * n + i) for i in range(PERIOD)] for n in (0, 7)]
    for found in periods:
        assert Counter(number for number, _ in found) == {0: 667, 1: 333}
    assert [number for number, _ in periods[0]] != [number for number, _ in periods[1]]
    assert [place for number, place in periods[1] if number == 1] == list(range(7 * 333, 8 * 333))
    assert mixed.place_of(6, 3) != mixed.place_of(5, 3) or mixed.place_of(6, 4) != mixed.place_of(5, 4)


def test_shares_add_up():
    assert shares([1, 1, 1]) == [334, 333, 333]
    assert shares([0.5, 0.25, 0.25]) == [500, 250, 250]
    assert shares([1e6, 1]) == [1000, 0]


def test_what_cannot_be_mixed_is_refused(folders, tmp_path):
    with pytest.raises(ValueError, match="small has less than 1/1000 of the weight"):
        open_datasets(recipe_for(folders, (1e6, 1)))
    larger = write_dataset(tmp_path / "larger", 6, height=8)
    with pytest.raises(ValueError, match=r"latents differ in height: 8 in .*larger, 4 in .*large"):
        open_datasets(recipe_for([folders[0], larger]))


@pytest.mark.parametrize(
    "mixtures, says",
    [
        ([{"name": "m", "parts": []}], "m: a mixture needs at least one part"),
        ([{"name": "", "parts": [{"data": "a"}]}], "name is empty"),
        ([{"name": "m", "parts": [{"data": "a"}, {"data": "a"}]}], "the parts must differ"),
        ([{"name": "m", "parts": [{"data": "a", "weight": -1}]}], "weight=-1"),
        ([{"name": "m", "parts": [{"data": "a", "weight": 1}, {"data": "b"}]}], "give all parts a weight, or none"),
        ([{"name": "m", "by": "day", "parts": [{"data": "a"}]}], "by='day': choose clip or step"),
        ([{"name": "m", "parts": [{"weight": 1}]}], "a part needs data"),
        (2 * [{"name": "m", "parts": [{"data": "a"}]}], "names must differ"),
    ],
)
def test_bad_mixtures_are_one_line(mixtures, says):
    with pytest.raises(ValueError, match=says) as caught:
        config.from_dict({"data": {"train": "m", "mixtures": mixtures}, "stages": [{}]})
    assert "\n" not in str(caught.value) and "data.mixtures" in str(caught.value)


def test_a_mixture_of_one_is_that_dataset(folders):
    alone = config.from_dict(
        {
            "model": plain_settings(),
            "data": {"train": str(folders[0])},
            "stages": [{"steps": STEPS, "batch": BATCH, "history": "clean"}],
        }
    )
    assert ids_of(recipe_for(folders[:1], (1,)), 1) == [[f"0:{name}" for name in step] for step in ids_of(alone, 1)]
    assert isinstance(open_datasets(recipe_for(folders[:1], (1,)))["mixed"], MixedDataset)


def test_a_mistyped_mixture_names_the_mixtures(folders):
    recipe = recipe_for(folders)
    recipe = replace(recipe, data=replace(recipe.data, train="mixd"))
    with pytest.raises(ValueError, match=r"mixd: no such folder; data\.mixtures has mixed"):
        open_datasets(recipe)
