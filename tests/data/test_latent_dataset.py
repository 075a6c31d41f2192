"""A dataset folder: each sample once per epoch, cut clips, what other tools read, and datasets that are refused."""

import json
import zlib

import numpy as np
import pytest
import torch
import webdataset

from data_prep.card import read_card
from data_prep.index import write_index
from data_prep.shards import Entry, SampleError, ShardWriter, npy_bytes
from data_prep.stream import stream_samples
from data_prep.verify import problems
from rf_train.config import Stage
from rf_train.data.latent_dataset import LatentDataset
from tests.conftest import change_card, tiny_settings, write_dataset


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


def captioned(folder):
    """A dataset of 12 samples of 1 to 4 captions: texts of caption c are full of c."""
    write_dataset(folder)
    records = []
    for part, begin in enumerate(range(0, 12, 5)):
        writer = ShardWriter(folder / f"shard-{part:06d}-0000.tar")
        for index in range(begin, min(begin + 5, 12)):
            captions = [str(number) for number in range(1 + index % 4)]
            texts = [np.full((1 + int(caption), 12), int(caption)) for caption in captions]
            more = {"captions": captions} if len(captions) > 1 else {}
            writer.add(index, 0, np.zeros((4, 9, 4, 6)), texts[0], {"caption": "0", **more}, texts[1:])
        records.append(writer.finish())
    shards = [{key: record[key] for key in ("file", "samples", "bytes", "sha256")} for record in records]
    change_card(folder, lambda card: card.update(index=write_index(folder, records), shards=shards))
    return folder


def test_one_of_several_captions_is_drawn_by_seed_sample_and_epoch(tmp_path):
    folder = captioned(tmp_path / "d")
    assert not list(problems(folder))
    dataset = LatentDataset(folder, tiny_settings())
    streamed = [len(sample.texts) for _, sample in stream_samples(folder, read_card(folder))]
    assert streamed == [1 + index % 4 for index in range(12)]
    clips = {position: dataset.clip_at(0, position) for position in range(12 * 100)}
    drawn = {index: [] for index in range(12)}
    for clip in clips.values():
        number = int(clip.text[0, 0])
        assert clip.meta["caption"] == str(number) and clip.text.shape == (1 + number, 12)
        drawn[int(clip.id[:6])].append(number)
    for index, numbers in drawn.items():
        counts = np.bincount(numbers, minlength=1 + index % 4)
        assert len(counts) == 1 + index % 4 and counts.min() > 60 / len(counts)
    fresh = LatentDataset(folder, tiny_settings())
    for position in (700, 3, 1100):  # in any order, on any rank
        assert torch.equal(fresh.clip_at(0, position).text, clips[position].text)
    other = [int(fresh.clip_at(1, position).text[0, 0]) for position in range(100)]
    assert other != [int(clips[position].text[0, 0]) for position in range(100)]
    assert all(fresh.read(index)[1][0, 0] == 0 and fresh.read(index)[2]["caption"] == "0" for index in range(12))


def test_captions_that_are_not_as_many_as_texts_are_damage(tmp_path):
    folder = write_dataset(tmp_path / "d", 2)
    writer = ShardWriter(folder / "shard-000000-0000.tar")
    latent, text = np.zeros((4, 9, 4, 6)), np.zeros((1, 12))
    writer.add(0, 0, latent, text, {"caption": "a", "captions": ["a", "b", "c"]}, [text])
    writer.add(1, 0, latent, text, {"caption": "a", "captions": "ab"}, [text])
    record = writer.finish()
    change_card(folder, lambda card: card.update(index=write_index(folder, [record])))
    dataset = LatentDataset(folder, tiny_settings())
    for index in range(2):
        with pytest.raises(SampleError, match="not one caption for each of 2 texts"):
            dataset.read(index)


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


def edit_card(folder, change):
    path = folder / "dataset.json"
    card = json.loads(path.read_text())
    change(card)
    path.write_text(json.dumps(card))


def edited_std(folder):
    edit_card(folder, lambda card: card["latent"]["std"].__setitem__(0, 2.0))


def unknown_schema(folder):
    edit_card(folder, lambda card: card.update(schema=99))


def no_card(folder):
    (folder / "dataset.json").unlink()


def no_index(folder):
    (folder / "samples.npy").unlink()


def index_with_a_flipped_bit(folder):
    flip(folder / "samples.npy", -10)


@pytest.mark.parametrize(
    "damage, message",
    [
        (edited_std, "edited or damaged"),
        (unknown_schema, "schema 99"),
        (no_card, "not a dataset"),
        (no_index, "samples.npy: missing"),
        (index_with_a_flipped_bit, "samples.npy: not the index that the card names"),
    ],
)
def test_a_dataset_with_a_damaged_card_or_index_is_refused(tmp_path, damage, message):
    folder = write_dataset(tmp_path / "d")
    LatentDataset(folder, tiny_settings())
    damage(folder)
    with pytest.raises(ValueError, match=message):
        LatentDataset(folder, tiny_settings())


def flip(path, place):
    """Flips a bit of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


def inside_latent(folder, dataset):
    """Flips a bit in the middle of the latent of sample 7, in the second shard."""
    file, entry = dataset.index[7]
    flip(folder / file, entry.offset + 3 * 512 + 300)


def cut_shard(folder, dataset):
    path = folder / dataset.index[7][0]
    path.write_bytes(path.read_bytes()[: dataset.index[7][1].offset + 100])


def no_shard(folder, dataset):
    (folder / dataset.index[7][0]).unlink()


def a_folder_instead(folder, dataset):
    path = folder / dataset.index[7][0]
    path.unlink()
    path.mkdir()


def zeros(folder, dataset):
    path = folder / dataset.index[7][0]
    path.write_bytes(bytes(path.stat().st_size))


def empty(folder, dataset):
    (folder / dataset.index[7][0]).write_bytes(b"")


def of_another_dataset(folder, dataset):
    other = write_dataset(folder.parent / "other", 12, seed=5)
    (folder / dataset.index[7][0]).write_bytes((other / dataset.index[7][0]).read_bytes())


def swapped_with_another_shard(folder, dataset):
    one, other = (folder / dataset.index[number][0] for number in (7, 2))
    a, b = one.read_bytes(), other.read_bytes()
    one.write_bytes(b)
    other.write_bytes(a)


DAMAGES = {
    inside_latent: ("damaged", [7]),
    cut_shard: ("cut short", [7, 8, 9]),
    no_shard: ("missing", [5, 6, 7, 8, 9]),
    a_folder_instead: ("unreadable", [5, 6, 7, 8, 9]),
    zeros: ("damaged", [5, 6, 7, 8, 9]),
    empty: ("cut short", [5, 6, 7, 8, 9]),
    of_another_dataset: ("damaged", [5, 6, 7, 8, 9]),
    swapped_with_another_shard: ("damaged", list(range(10))),
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_samples_are_named_and_replaced_and_the_others_delivered(tmp_path, damage):
    folder = write_dataset(tmp_path / "d", 12)
    dataset = LatentDataset(folder, tiny_settings())
    healthy = [dataset.clip_at(3, position) for position in range(24)]
    damage(folder, dataset)
    reason, bad = DAMAGES[damage]
    bad_keys = {dataset.key(index) for index in bad}
    replaced = 0
    for position, before in enumerate(healthy):
        clip = dataset.clip_at(3, position)
        if before.id.split("@")[0] not in bad_keys:
            assert clip.id == before.id and torch.equal(clip.latent, before.latent) and not clip.damage
            continue
        replaced += 1
        assert {one.reason for one in clip.damage} == {reason}
        assert clip.damage[0].sample == before.id.split("@")[0] and clip.damage[0].id == before.id
        assert clip.id == f"{before.id}>{clip.damage[0].replaced_by}"
        assert clip.meta["key"] == clip.damage[0].replaced_by not in bad_keys
    assert replaced == 2 * len(bad)
    found = list(problems(folder))
    assert found and all(str(folder) in line for line in found)


def test_values_that_are_not_finite_or_do_not_fit_the_card_are_damage(tmp_path):
    folder = write_dataset(tmp_path / "d", 12)
    path = folder / "shard-000000-0000.tar"
    writer = ShardWriter(path)
    latent, text = np.zeros((4, 9, 4, 6), np.float16), np.zeros((2, 12), np.float16)
    for clip in range(5):
        other = {"codec": "of another dataset"} if clip == 3 else {}
        writer.add(clip, 0, latent[:, : 9 - (clip == 1)], text, {"caption": "", **other})
    broken = npy_bytes(np.full_like(latent, np.nan))
    record = writer.finish()
    entry = Entry(*record["index"][2])
    data = bytearray(path.read_bytes())
    whole = bytes(data[entry.offset : entry.offset + entry.bytes])
    data[entry.offset : entry.offset + entry.bytes] = whole.replace(npy_bytes(latent), broken)
    path.write_bytes(data)
    record["index"][2][2] = zlib.crc32(data[entry.offset : entry.offset + entry.bytes])
    others = [list(map(int, row)) for row in np.load(folder / "samples.npy")[5:]]
    index = write_index(folder, [record, {"index": others}])
    change_card(folder, lambda card: card.update(index=index))
    dataset = LatentDataset(folder, tiny_settings())
    with pytest.raises(SampleError, match=r"000001_0000: malformed \(latent float16 \(4, 8, 4, 6\)"):
        dataset.read(1)
    with pytest.raises(SampleError, match=r"000002_0000: not finite \(864 values of its latent"):
        dataset.read(2)
    with pytest.raises(SampleError, match=r"000003_0000: malformed \(made by another codec than the card's"):
        dataset.read(3)
    assert dataset.read(4)[0].shape == (4, 9, 4, 6)


def test_a_dataset_without_any_healthy_sample_ends_with_a_name(tmp_path):
    folder = write_dataset(tmp_path / "d", 12)
    dataset = LatentDataset(folder, tiny_settings())
    for path in folder.glob("*.tar"):
        path.unlink()
    with pytest.raises(ValueError, match=r"missing \(no such file\); and so are the next 11 samples"):
        dataset.clip_at(0, 0)
