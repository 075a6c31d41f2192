"""Shards: webdataset's layout, the same bytes every time, and one clear line for whatever is broken."""

import hashlib
import subprocess
import tarfile

import numpy as np
import pytest

from data_prep import shards
from data_prep.shards import ShardWriter


def sample(n):
    rng = np.random.default_rng(n)
    return rng.standard_normal((16, 2, 3, 4)), rng.standard_normal((1 + n % 3, 5)), {"caption": f"clip {n}, größer"}


def write(folder, count=5, per_shard=2):
    """Writes `count` samples. Returns the list of shards."""
    folder.mkdir(exist_ok=True)
    with ShardWriter(folder, per_shard) as writer:
        for n in range(count):
            writer.add(f"{n:06d}_0000", *sample(n))
    return writer.shards


def test_round_trip(tmp_path):
    written = write(tmp_path / "data")
    assert [shard["samples"] for shard in written] == [2, 2, 1]
    n = 0
    for shard in written:
        path = tmp_path / "data" / shard["file"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == shard["sha256"]
        for key, members in shards.index_shard(path):
            latent, text, meta = shards.read_sample(path, members)
            expected = sample(n)
            assert key == f"{n:06d}_0000" and meta == {**expected[2], "key": key}
            assert latent.dtype == text.dtype == np.float16
            assert np.array_equal(latent, expected[0].astype(np.float16))
            assert np.array_equal(text, expected[1].astype(np.float16))
            n += 1
    assert n == 5


def test_the_same_samples_make_the_same_bytes(tmp_path):
    assert write(tmp_path / "a") == write(tmp_path / "b")


def test_webdataset_and_tar_read_it(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    write(tmp_path / "data")
    path = tmp_path / "data" / "shard-000001.tar"
    read = list(webdataset.WebDataset(str(path), shardshuffle=False).decode())
    assert [entry["__key__"] for entry in read] == ["000002_0000", "000003_0000"]
    assert np.array_equal(read[0]["latent.npy"], sample(2)[0].astype(np.float16))
    assert read[1]["text.npy"].shape == (1, 5) and read[1]["json"]["caption"] == "clip 3, größer"
    listed = subprocess.run(["tar", "tf", str(path)], capture_output=True, text=True, check=True).stdout.split()
    assert listed == [f"00000{n}_0000.{member}" for n in (2, 3) for member in shards.MEMBERS]


def test_values_beyond_float16_are_refused_by_name(tmp_path):
    latent, text, meta = sample(0)
    latent[3, 1, 2, 0] = 1e6
    refused = pytest.raises(ValueError, match="sample 000000_0000: latent: 1 of 384 values")
    with refused, ShardWriter(tmp_path, 2) as writer:
        writer.add("000000_0000", latent, text, meta)
    assert not list(tmp_path.glob("*.tar"))
    with pytest.raises(ValueError, match="nan: 1 of 2"):
        shards.to_float16([0.0, float("nan")], "nan")


def test_an_interrupted_shard_never_has_its_name(tmp_path):
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, 10) as writer:
        writer.add("000000_0000", *sample(0))
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["shard-000000.tar.tmp"]


@pytest.mark.parametrize("key", ["", "a.b", "a/b"])
def test_keys_that_webdataset_would_split_are_refused(tmp_path, key):
    with ShardWriter(tmp_path, 10) as writer, pytest.raises(ValueError, match="sample key"):
        writer.add(key, *sample(0))


def test_bad_shards_are_told_in_one_line(tmp_path):
    write(tmp_path / "data")
    good = (tmp_path / "data" / "shard-000000.tar").read_bytes()
    bad = tmp_path / "bad.tar"

    def says(data, text):
        bad.write_bytes(data)
        with pytest.raises(ValueError, match=text) as caught:
            shards.index_shard(bad)
        assert str(bad) in str(caught.value) and "\n" not in str(caught.value)

    says(b"this is no tar" * 100, "not a tar file")
    says(b"", "not a tar file")
    says(good[:700], "cut short")
    says(good[:1536], "no text.npy, json")
    with pytest.raises(ValueError, match="No such file"):
        shards.index_shard(tmp_path / "none.tar")


def test_pickles_are_never_loaded(tmp_path):
    bad = tmp_path / "pickle.npy"
    np.save(bad, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="not a plain npy array"):
        shards.npy_array(bad.read_bytes())
    with pytest.raises(ValueError, match="not a plain npy array"):
        shards.npy_array(b"")


def test_members_carry_no_time_or_owner(tmp_path):
    write(tmp_path)
    with tarfile.open(tmp_path / "shard-000000.tar") as tar:
        assert {(info.mtime, info.uid, info.gid, info.uname) for info in tar} == {(0, 0, 0, "")}
