"""Datasets mixed by weight: exact shares, each sample once per epoch, and the same stream however it is split."""

from collections import Counter

import pytest

from rf_train import config
from rf_train.data.batches import open_datasets, step_batches
from rf_train.data.latent_dataset import LatentDataset
from rf_train.data.mixture import PERIOD, MixedDataset, places
from tests.conftest import plain_settings, tiny_settings, write_dataset

STEPS, BATCH = 20, 12


def recipe_for(folders, weights=(3, 1), **changes) -> config.Recipe:
    parts = [{"data": str(folder), "weight": weight} for folder, weight in zip(folders, weights)]
    data = {"train": "mixed", "mixtures": [{"name": "mixed", "parts": parts}]}
    stages = [{"name": name, "steps": STEPS // 2, "batch": BATCH, "history": "clean"} for name in "ab"]
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


@pytest.mark.parametrize("micro_batch, replicas", [(1, 1), (3, 2), (1, 4), (12, 1)])
def test_the_mixed_stream_is_the_same_for_any_number_of_replicas_and_any_micro_batch(folders, micro_batch, replicas):
    recipe = recipe_for(folders)
    other = recipe_for(folders, optimizer={"micro_batch": micro_batch})
    assert ids_of(other, replicas) == ids_of(recipe, 1)


def test_a_step_depends_on_nothing_before_it(folders):
    recipe = recipe_for(folders)
    assert ids_of(recipe, 2, [13, 4]) == [ids_of(recipe, 1)[step] for step in (13, 4)]


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


def test_places_add_up():
    assert places([1, 1, 1]) == [334, 333, 333]
    assert places([0.5, 0.25, 0.25]) == [500, 250, 250]
    assert places([1e6, 1]) == [1000, 0]


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
        ([{"name": "m", "parts": [{"data": "a", "weight": 0}]}], "weight=0"),
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
