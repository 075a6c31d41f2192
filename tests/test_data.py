"""The clips of a step: a function of seed and step, the same at any world size, every sample once an epoch; bad datasets are refused."""

import json

import pytest
import torch
import webdataset

from rf_train import config
from rf_train.data import Latents, accumulation, open_datasets, step_batches, steps
from tests.conftest import tiny_settings, write_dataset


def recipe_for(folder, **stage) -> config.Recipe:
    model = {key: value for key, value in vars(tiny_settings()).items()}
    stages = [{"name": "a", "steps": 4, "batch": 4, **stage}, {"name": "b", "steps": 4, "batch": 4, "history": "clean"}]
    return config.from_dict({"model": model, "data": {"train": str(folder)}, "stages": stages, "flow": {"caption_dropout": 0.5}})


def test_every_sample_once_an_epoch_in_a_fresh_order(tmp_path):
    data = Latents(write_dataset(tmp_path / "d", 12), tiny_settings())
    first, second = ([name.split("@")[0] for _, name in data.drawn(0, begin, 12)] for begin in (0, 12))
    assert sorted(first) == sorted(second) and len(set(first)) == 12
    assert first != second and first != [name.split("@")[0] for _, name in data.drawn(1, 0, 12)]
    across = data.drawn(0, 10, 4)
    assert across == data.drawn(0, 10, 2) + data.drawn(0, 12, 2)


def test_the_same_clips_and_draws_at_any_world_size_and_micro_batch(tmp_path):
    recipe = recipe_for(write_dataset(tmp_path / "d", 6))
    datasets = open_datasets(recipe)
    seen = {}
    for world, micro in ((1, 1), (1, 4), (2, 1), (2, 2), (4, 1)):
        split = config.from_dict({**config.to_dict(recipe), "optimizer": {"micro_batch": micro}})
        for rank in range(world):
            for batch in step_batches(split, datasets, 5, rank, world):
                for row, name in enumerate(batch.ids):
                    value = (batch.x[row], batch.text[row], batch.draws.noise[row], batch.draws.t_s_normal[row])
                    for a, b in zip(seen.setdefault(name, value), value):
                        assert torch.equal(a, b)
    assert len(seen) == 4


def test_reading_ahead_changes_nothing(tmp_path):
    recipe = recipe_for(write_dataset(tmp_path / "d"))
    datasets = open_datasets(recipe)
    for step, batches in steps(recipe, datasets, 2, 0, 2):
        again = step_batches(recipe, datasets, step, 0, 2)
        assert [batch.ids for batch in batches] == [batch.ids for batch in again]
    assert step == 7


def test_dropped_captions_become_the_datasets_empty_one(tmp_path):
    recipe = recipe_for(write_dataset(tmp_path / "d"))
    datasets = open_datasets(recipe)
    batches = [batch for step in range(8) for batch in step_batches(recipe, datasets, step, 0, 1)]
    rows = torch.cat([batch.text for batch in batches])
    dropped = torch.cat([batch.draws.drop_caption for batch in batches]) < 0.5
    assert 0 < dropped.sum() < len(dropped)
    assert (rows[dropped, 0] == 0.1).all() and not rows[dropped, 1:].any()
    assert (rows[~dropped, 0] != 0.1).any(dim=1).all()


def test_shorter_clips_are_the_first_frames(tmp_path):
    folder = write_dataset(tmp_path / "d")
    data = Latents(folder, tiny_settings())
    assert torch.equal(data.read(0, 6)[0], data.read(0)[0][:, :6])
    with pytest.raises(ValueError, match="frames=10, but .* holds clips of 9"):
        open_datasets(recipe_for(folder, frames=10))


def test_a_batch_that_does_not_split(tmp_path):
    with pytest.raises(ValueError, match="batch=4 is not a multiple of optimizer.micro_batch=1 x 3 ranks"):
        accumulation(recipe_for(tmp_path).stages[0], 1, 3)


def test_plain_webdataset_reads_the_shards(tmp_path):
    folder = write_dataset(tmp_path / "d", 7)
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    found = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    ours = Latents(folder, tiny_settings())
    assert [sample["__key__"] for sample in found] == [key for _, key, _ in ours.places]
    latent, text, meta = ours.read(3)
    assert torch.equal(torch.from_numpy(found[3]["latent.npy"]).float(), latent) and found[3]["json"] == meta
    assert found[3]["text.npy"].shape == text.shape


def test_a_dataset_that_does_not_fit_says_everything_that_differs(tmp_path):
    folder = write_dataset(tmp_path / "d")
    with pytest.raises(ValueError) as caught:
        Latents(folder, tiny_settings(channels=8, text_dim=20, text_len=4, patch=4))
    for part in ("4 channels, model.channels is 8", "12 wide, model.text_dim is 20", "up to 6 tokens, model.text_len is 4", "4x6, not a multiple of model.patch 4"):
        assert part in str(caught.value)


def test_damaged_datasets_are_refused(tmp_path):
    folder = write_dataset(tmp_path / "d")
    shard = folder / "shard-000001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(b"no tar at all".ljust(len(whole), b"."))
    with pytest.raises(ValueError, match="shard-000001.tar: not a tar file"):
        Latents(folder, tiny_settings())
    shard.write_bytes(whole[:-1024])
    with pytest.raises(ValueError, match="shard-000001.tar: .* bytes, but"):
        Latents(folder, tiny_settings())
    shard.write_bytes(whole)
    card = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**card, "schema": 99}))
    with pytest.raises(ValueError, match="schema 99"):
        Latents(folder, tiny_settings())
    (folder / "dataset.json").unlink()
    with pytest.raises(ValueError, match="not a dataset"):
        Latents(folder, tiny_settings())
