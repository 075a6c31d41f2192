"""Training's clips from a server: those of the disk, whatever happens to the server meanwhile."""

import threading
import time

import pytest
import torch

from data_prep.places import RemoteError
from rf_train import config
from rf_train.data.batches import open_datasets, step_batches, steps
from tests.conftest import plain_settings, write_dataset
from tests.data.test_latent_dataset import flip
from tests.servers import needs_aiohttp, served

pytestmark = [needs_aiohttp, pytest.mark.usefixtures("own_cache")]


def recipe_for(address, patience: float = 30, workers: int = 2, **optimizer) -> config.Recipe:
    return config.from_dict(
        {
            "model": plain_settings(),
            "data": {"train": str(address), "patience": patience, "workers": workers, "max_damaged": 1},
            "optimizer": optimizer,
            "stages": [{"name": "a", "steps": 6, "batch": 4, "history": "clean"}],
        }
    )


def batches_of(recipe: config.Recipe) -> list:
    return [batch for _, batches in steps(recipe, open_datasets(recipe), 0, 0, 1) for batch in batches]


def assert_same(found: list, expected: list) -> None:
    assert [batch.ids for batch in found] == [batch.ids for batch in expected]
    for one, other in zip(found, expected):
        assert torch.equal(one.x, other.x) and torch.equal(one.text, other.text)
        assert [line.partition("shard-")[2] for line in one.damaged] == [
            line.partition("shard-")[2] for line in other.damaged
        ]


@pytest.fixture
def server(tmp_path):
    write_dataset(tmp_path / "data" / "d", 12)
    with served(tmp_path / "data") as running:
        yield running


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_the_clips_are_those_of_the_disk_and_are_read_at_once(server, tmp_path, micro_batch):
    """Two epochs. A request takes so long that all of a step's clips are asked for meanwhile."""
    expected = batches_of(recipe_for(tmp_path / "data" / "d", micro_batch=micro_batch))
    server.fault = lambda path: time.sleep(0.05)
    assert_same(batches_of(recipe_for(f"{server.address}/d", micro_batch=micro_batch)), expected)
    assert server.most_at_once >= 4  # two steps are read at once


@pytest.mark.slow
def test_a_server_that_is_killed_and_comes_back_changes_nothing(server, tmp_path, capsys):
    expected = batches_of(recipe_for(tmp_path / "data" / "d", micro_batch=2))
    recipe, found = recipe_for(f"{server.address}/d", micro_batch=2), []
    for step, batches in steps(recipe, open_datasets(recipe), 0, 0, 1):
        found += batches
        if step == 2:
            server.stop()
            threading.Timer(1.5, server.start).start()
    assert_same(found, expected)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("127.0.0.1:")]
    assert len(lines) == 2 and "not reachable" in lines[0] and "back after" in lines[1]


def test_a_server_that_stays_away_ends_the_reading_in_one_line(server):
    recipe = recipe_for(f"{server.address}/d", patience=0.5)
    datasets = open_datasets(recipe)
    server.stop()
    try:
        with pytest.raises(RemoteError, match=r"^http://.*/d/shard-00000.-0000\.tar: not reachable for 0\.5 s \(.*\)$"):
            step_batches(recipe, datasets, 0, 0, 1)
    finally:
        server.start()


def test_missing_and_damaged_samples_are_replaced_as_they_are_on_disk(server, tmp_path):
    folder = tmp_path / "data" / "d"
    (folder / "shard-000001-0000.tar").unlink()
    flip(folder / "shard-000000-0000.tar", 2000)
    expected = batches_of(recipe_for(folder))
    assert {
        reason for batch in expected for line in batch.damaged for reason in ("missing", "damaged") if reason in line
    }
    assert_same(batches_of(recipe_for(f"{server.address}/d")), expected)


@pytest.mark.parametrize("workers", [0, 1])
def test_who_is_interrupted_gets_no_batches_instead_of_waiting_for_a_server(server, workers):
    recipe = recipe_for(f"{server.address}/d", patience=5, workers=workers)
    datasets, asked = open_datasets(recipe), [False, False, True]
    reading = steps(recipe, datasets, 0, 0, 1, False, lambda: asked.pop(0))
    assert len(next(reading)[1]) > 0 and len(asked) == 3  # data that is there is taken
    server.fault = lambda path: 503
    begin, given = time.monotonic(), list(reading)
    assert given[-1][1] == [] and all(batches for _, batches in given[:-1]) and not asked
    assert time.monotonic() - begin < 4
    server.fault = lambda path: None


def test_who_stops_does_not_wait_for_a_server_that_is_away(server):
    recipe = recipe_for(f"{server.address}/d", patience=5, workers=1)
    datasets, healthy = open_datasets(recipe), [1] * 4
    server.fault = lambda path: None if healthy and healthy.pop() else 503
    reading = steps(recipe, datasets, 0, 0, 1)
    next(reading)
    begin = time.monotonic()
    reading.close()
    assert time.monotonic() - begin < 1
    server.fault = lambda path: None
