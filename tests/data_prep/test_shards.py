"""Shards: webdataset's layout, the same bytes every time, and one clear reason for whatever is broken."""

import hashlib
import io
import os
import subprocess
import tarfile
import zlib

import numpy as np
import pytest
import webdataset

from data_prep import shards
from data_prep.index import SampleIndex, write_index
from data_prep.shards import Entry, SampleError, ShardWriter


def sample(n):
    rng = np.random.default_rng(n)
    return rng.standard_normal((16, 2, 3, 4)), rng.standard_normal((1 + n % 3, 5)), {"caption": f"clip {n}, größer"}


def write(folder, count=5, per_shard=2):
    """Writes `count` samples, of clip 7 of as many videos. Returns the records of the shards."""
    folder.mkdir(exist_ok=True)
    records = []
    for shard, begin in enumerate(range(0, count, per_shard)):
        writer = ShardWriter(folder / f"shard-{shard:06d}-0000.tar")
        for n in range(begin, min(begin + per_shard, count)):
            writer.add(n, 7, *sample(n))
        records.append(writer.finish())
    return records


def test_round_trip(tmp_path):
    written = write(tmp_path / "data")
    assert [record["samples"] for record in written] == [2, 2, 1]
    n = 0
    for record in written:
        path = tmp_path / "data" / record["file"]
        data = path.read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (record["bytes"], record["sha256"])
        for entry in (Entry(*row) for row in record["index"]):
            latent, (text,), meta = shards.read_sample(path, entry)
            expected = sample(n)
            assert entry.key == f"{n:06d}_0007" and meta == {**expected[2], "key": entry.key}
            assert latent.dtype == text.dtype == np.float16
            assert np.array_equal(latent, expected[0].astype(np.float16))
            assert np.array_equal(text, expected[1].astype(np.float16))
            n += 1
    assert n == 5


def test_further_captions_are_further_members(tmp_path):
    """A dozen: the order of the tar is that of names, where 10 comes before 2."""
    latent, text, meta = sample(0)
    more = [text + number for number in range(1, 12)]
    meta = {**meta, "captions": [str(number) for number in range(12)]}
    writer = ShardWriter(tmp_path / "shard-000000-0000.tar")
    writer.add(0, 0, latent, text, meta, more)
    entry = Entry(*writer.finish()["index"][0])
    texts = shards.read_sample(writer.path, entry).texts
    assert len(texts) == 12
    assert all(np.array_equal(found, one.astype(np.float16)) for found, one in zip(texts, [text, *more]))
    with tarfile.open(writer.path) as tar:
        names = tar.getnames()
    assert names == sorted(names) and f"{entry.key}.text.11.npy" in names
    read = next(iter(webdataset.WebDataset(str(writer.path), shardshuffle=False).decode()))
    assert np.array_equal(read["text.11.npy"], texts[11])
    with pytest.raises(ValueError, match="text: 1 of"):
        ShardWriter(tmp_path / "bad.tar").add(0, 0, latent, text, meta, [np.array([[np.inf]])])


def test_the_index_finds_every_sample(tmp_path):
    records = write(tmp_path / "data")
    card = {"shards": records, "index": write_index(tmp_path / "data", records)}
    index = SampleIndex(tmp_path / "data", card)
    assert len(index) == 5 and index.rows.itemsize == 24
    assert [index[n] for n in range(5)] == [
        (record["file"], Entry(*entry)) for record in records for entry in record["index"]
    ]
    assert [entry.key for shard in range(3) for entry in index.of_shard(shard)] == [index.key(n) for n in range(5)]
    with pytest.raises(ValueError, match="the card's shards have 4 samples"):
        SampleIndex(tmp_path / "data", {**card, "shards": records[:2]})


def test_the_same_samples_make_the_same_bytes(tmp_path):
    assert write(tmp_path / "a") == write(tmp_path / "b")


def test_webdataset_and_tar_read_it(tmp_path):
    write(tmp_path / "data")
    path = tmp_path / "data" / "shard-000001-0000.tar"
    read = list(webdataset.WebDataset(str(path), shardshuffle=False).decode())
    assert [entry["__key__"] for entry in read] == ["000002_0007", "000003_0007"]
    assert np.array_equal(read[0]["latent.npy"], sample(2)[0].astype(np.float16))
    assert read[1]["text.npy"].shape == (1, 5) and read[1]["json"]["caption"] == "clip 3, größer"
    listed = subprocess.run(["tar", "tf", str(path)], capture_output=True, text=True, check=True).stdout.split()
    assert listed == [f"00000{n}_0007.{member}" for n in (2, 3) for member in shards.MEMBERS]


def test_values_beyond_float16_are_refused_by_name_and_the_shard_goes_on(tmp_path):
    latent, text, meta = sample(0)
    writer = ShardWriter(tmp_path / "shard-000000-0000.tar")
    writer.add(0, 0, latent, text, meta)
    latent[3, 1, 2, 0] = 1e6
    with pytest.raises(ValueError, match="sample 000001_0002: latent: 1 of 384 values"):
        writer.add(1, 2, latent, text, meta)
    writer.add(2, 0, *sample(2))
    record = writer.finish()
    keys = [shards.read_sample(writer.path, Entry(*entry)).meta["key"] for entry in record["index"]]
    assert keys == ["000000_0000", "000002_0000"]
    with pytest.raises(ValueError, match="nan: 1 of 2"):
        shards.to_float16([0.0, float("nan")], "nan")


def test_a_shard_has_its_name_only_when_it_is_whole(tmp_path):
    writer = ShardWriter(tmp_path / "shard-000000-0000.tar")
    writer.add(0, 0, *sample(0))
    assert [path.suffix for path in tmp_path.iterdir()] == [".tmp"]
    writer.abandon()
    assert list(tmp_path.iterdir()) == []


def broken(change):
    """What reading the third sample says after `change` of the shard's bytes; `change` may also give a new entry."""

    def read(folder):
        record = write(folder, 4, 4)[0]
        path, entry = folder / record["file"], Entry(*record["index"][2])
        data = bytearray(path.read_bytes())
        entry = change(data, entry) or entry
        path.write_bytes(data)
        return path, entry

    return read


def flipped(data, entry):
    data[entry.offset + entry.bytes // 2] ^= 1


def cut(data, entry):
    del data[entry.offset + 600 :]


def other_key(data, entry):
    """A whole sample, and the CRC-32 fits, but it is another one."""
    return Entry(0, entry.offset // 2, zlib.crc32(data[: entry.offset // 2]), entry.video, entry.clip)


def of_json(text):
    def change(data, entry):
        size = len(data[entry.offset + 512 :].split(b"\0")[0])
        assert len(text) <= size
        data[entry.offset + 512 : entry.offset + 512 + size] = text.ljust(size)
        part = data[entry.offset : entry.offset + entry.bytes]
        return entry._replace(crc32=zlib.crc32(part))

    return change


def pickled(data, entry):
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    place = data.index(b"\x93NUMPY", entry.offset)
    data[place : place + len(buffer.getvalue())] = buffer.getvalue()
    return entry._replace(crc32=zlib.crc32(data[entry.offset : entry.offset + entry.bytes]))


@pytest.mark.parametrize(
    "change, reason, says",
    [
        (flipped, "damaged", "CRC-32"),
        (cut, "cut short", "600 of "),
        (other_key, "malformed", "it holds 000000_0007.json, 000000_0007.latent.npy, 000000_0007.text.npy"),
        (of_json(b"{"), "malformed", "Expecting property name"),
        (of_json(b"[1]"), "malformed", "its JSON is not an object"),
        (pickled, "malformed", "latent: not a plain npy array"),
    ],
)
def test_what_is_broken_has_a_reason(tmp_path, change, reason, says):
    path, entry = broken(change)(tmp_path)
    with pytest.raises(SampleError) as caught:
        shards.read_sample(path, entry)
    assert caught.value.reason == reason and says in caught.value.detail
    assert str(caught.value).startswith(f"{path}: 000002_0007: {reason} (") and "\n" not in str(caught.value)


def test_what_is_missing_or_unreadable_has_a_reason(tmp_path):
    for path, reason in ((tmp_path / "none.tar", "missing"), (tmp_path, "unreadable")):
        with pytest.raises(SampleError) as caught:
            shards.read_sample(path, Entry(0, 10, 0, 0, 0))
        assert caught.value.reason == reason


def test_pickles_are_never_loaded(tmp_path):
    bad = tmp_path / "pickle.npy"
    np.save(bad, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="not a plain npy array"):
        shards.npy_array(bad.read_bytes())
    with pytest.raises(ValueError, match="not a plain npy array"):
        shards.npy_array(b"")


def test_members_carry_no_time_or_owner(tmp_path):
    write(tmp_path)
    with tarfile.open(tmp_path / "shard-000000-0000.tar") as tar:
        assert {(info.mtime, info.uid, info.gid, info.uname, info.gname) for info in tar} == {(0, 0, 0, "", "")}


def test_a_full_disk_leaves_no_shard(tmp_path, monkeypatch):
    writer = ShardWriter(tmp_path / "shard-000000-0000.tar")
    writer.add(0, 0, *sample(0))

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        writer.finish()
    writer.abandon()
    assert list(tmp_path.iterdir()) == []
