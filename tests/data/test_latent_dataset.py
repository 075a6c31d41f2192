"""A dataset folder: each sample once per epoch, cut clips, what other tools read, and datasets that are refused."""

import json

import pytest
import torch
import webdataset

from rf_train.config import Stage
from rf_train.data.latent_dataset import LatentDataset
from tests.conftest import tiny_settings, write_dataset


def test_every_sample_comes_once_per_epoch_in_a_fresh_order(tmp_path):
    dataset = LatentDataset(write_dataset(tmp_path / "d", 12), tiny_settings())

    def keys(seed: int, first: int) -> list[str]:
        return [name.split("@")[0] for _, name in dataset.samples_at(seed, first, 12)]

    assert sorted(keys(0, 0)) == sorted(keys(0, 12)) == sorted(dataset.key(index) for index in range(12))
    assert len(set(keys(0, 0))) == 12
    assert keys(0, 0) != keys(0, 12) and keys(0, 0) != keys(1, 0)


def test_samples_go_on_across_the_end_of_an_epoch(tmp_path):
    dataset = LatentDataset(write_dataset(tmp_path / "d", 12), tiny_settings())
    across = dataset.samples_at(0, 10, 4)
    assert across == dataset.samples_at(0, 10, 2) + dataset.samples_at(0, 12, 2)
    assert [name.split("@")[1] for _, name in across] == ["0", "0", "1", "1"]
    assert all(name == f"{dataset.key(index)}@{epoch}" for (index, name), epoch in zip(across, (0, 0, 1, 1)))


def test_a_shorter_clip_is_the_first_frames(tmp_path):
    dataset = LatentDataset(write_dataset(tmp_path / "d"), tiny_settings())
    assert torch.equal(dataset.read(0, 6)[0], dataset.read(0)[0][:, :6])
    assert dataset.read(0)[0].shape[1] == 9


def test_the_frames_of_a_clip_are_those_of_the_stage_or_all(tmp_path):
    dataset = LatentDataset(write_dataset(tmp_path / "d"), tiny_settings())
    assert dataset.clip_frames(Stage(frames=6)) == 6 and dataset.clip_frames(Stage()) == 9
    with pytest.raises(ValueError, match=r"stage long: frames=10, but .* holds clips of 9 latent frames"):
        dataset.clip_frames(Stage(name="long", frames=10))


def test_plain_webdataset_reads_the_shards(tmp_path):
    folder = write_dataset(tmp_path / "d", 7)
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    found = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    dataset = LatentDataset(folder, tiny_settings())
    assert [sample["__key__"] for sample in found] == [dataset.key(index) for index in range(7)]
    latent, text, meta = dataset.read(3)
    assert torch.equal(torch.from_numpy(found[3]["latent.npy"]).float(), latent) and found[3]["json"] == meta
    assert torch.equal(torch.from_numpy(found[3]["text.npy"]).float(), text)


def test_the_summary_changes_with_the_data(tmp_path):
    one, same, other = (
        LatentDataset(write_dataset(tmp_path / name, seed=seed), tiny_settings()).summary()
        for name, seed in (("one", 0), ("same", 0), ("other", 1))
    )
    assert one == same and one["samples"] == other["samples"] == 12
    assert one["card"] != other["card"]


def test_a_dataset_that_does_not_fit_the_model_is_refused_with_every_difference(tmp_path):
    folder = write_dataset(tmp_path / "d")
    with pytest.raises(ValueError) as caught:
        LatentDataset(folder, tiny_settings(channels=8, text_dim=20, text_len=4, patch=4))
    for part in (
        "4 channels, model.channels is 8",
        "12 wide, model.text_dim is 20",
        "up to 6 tokens, model.text_len is 4",
        "4x6, not a multiple of model.patch 4",
    ):
        assert part in str(caught.value)


def no_tar_file(folder):
    shard = folder / "shard-000001.tar"
    shard.write_bytes(b"no tar at all".ljust(shard.stat().st_size, b"."))


def cut_shard(folder):
    shard = folder / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-1024])


def change_card(folder, change):
    path = folder / "dataset.json"
    card = json.loads(path.read_text())
    change(card)
    path.write_text(json.dumps(card))


def unknown_schema(folder):
    change_card(folder, lambda card: card.update(schema=99))


def wrong_count(folder):
    change_card(folder, lambda card: card["counts"].update(samples=13))


def no_card(folder):
    (folder / "dataset.json").unlink()


@pytest.mark.parametrize(
    "damage, message",
    [
        (no_tar_file, "shard-000001.tar: not a tar file"),
        (cut_shard, "shard-000001.tar: .* bytes, but"),
        (unknown_schema, "schema 99"),
        (wrong_count, "the card counts 13 samples, the shards hold 12"),
        (no_card, "not a dataset"),
    ],
)
def test_a_damaged_dataset_is_refused(tmp_path, damage, message):
    folder = write_dataset(tmp_path / "d")
    LatentDataset(folder, tiny_settings())
    damage(folder)
    with pytest.raises(ValueError, match=message):
        LatentDataset(folder, tiny_settings())
