"""A dataset's card: read back as written, and one clear line for whatever does not fit."""

import hashlib
import json

import numpy as np
import pytest

from data_prep import places, verify
from data_prep.card import SCHEMA, NotADataset, card_geometry, card_hash, read_card, write_card
from data_prep.geometry import WAN_2_1
from data_prep.index import write_index, write_rows
from tests.data_prep.test_shards import write as write_shards


def write(folder, count=5):
    """A dataset of `count` samples. Returns its card."""
    records = write_shards(folder, count)
    shards = [{key: record[key] for key in ("file", "samples", "bytes", "sha256")} for record in records]
    latent = {"channels": 16, "frames": 2, "height": 3, "width": 4, "dtype": "float16", "strides": [4, 8, 8]}
    card = {
        "schema": SCHEMA,
        "codec": {"name": "default", "hash": "0", "settings": {}, "folder": None},
        "latent": {**latent, "mean": [0.0] * 16, "std": [1.0] * 16},
        "video": {"fps": 16, "frames": 5, "height": 24, "width": 32},
        "text": {"name": "default", "dim": 5, "max_tokens": 8, "hash": "0", "folder": None},
        "empty_caption": [[0.0] * 5],
        "counts": {"videos": count, "samples": count, "shards": len(shards), "skipped": {}, "dropped_seconds": 0.0},
        "shards": shards,
        "index": write_index(folder, records),
        "source": {"path": "videos", "settings": {}},
    }
    return write_card(folder, card)


def test_round_trip(tmp_path):
    card = write(tmp_path)
    assert read_card(tmp_path) == card
    assert card_geometry(card) == WAN_2_1
    assert verify.verify(tmp_path) == 5


def test_a_folder_without_a_card_is_no_dataset(tmp_path):
    with pytest.raises(ValueError, match="not a dataset"):
        read_card(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        read_card(tmp_path / "none")


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda card: card.update(schema=1), "schema 1, this version reads 2; encode the videos again"),
        (lambda card: card.pop("latent"), "no section 'latent'"),
        (lambda card: card["video"].pop("fps"), "video.fps"),
        (lambda card: card["latent"].update(std=[1.0]), "16 numbers"),
        (lambda card: card["latent"].update(strides=[4, 8]), "3 whole numbers"),
        (lambda card: card.update(shards=[]), "no shards"),
        (lambda card: card["shards"][0].update(file="../x.tar"), "plain file name"),
        (lambda card: card["index"].update(file="/etc/passwd"), "plain file name"),
        (lambda card: card["counts"].update(samples=6), "counts.samples is not the sum"),
        (lambda card: card.update(empty_caption=[[0.0]]), "empty_caption"),
    ],
)
def test_a_card_that_does_not_fit_says_what_is_wrong(tmp_path, change, says):
    write(tmp_path)
    card = json.loads((tmp_path / "dataset.json").read_text())
    change(card)
    card["hash"] = card_hash(card)
    (tmp_path / "dataset.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match=says):
        read_card(tmp_path)


@pytest.mark.parametrize(
    "edit",
    [
        lambda card: card["latent"].update(height=4),
        lambda card: card["latent"]["std"].__setitem__(3, 2.0),
        lambda card: card["counts"].update(samples=6),
        lambda card: card.update(remark="mine"),
        lambda card: card.pop("hash"),
    ],
)
def test_an_edited_card_is_refused(tmp_path, edit):
    write(tmp_path)
    card = json.loads((tmp_path / "dataset.json").read_text())
    edit(card)
    (tmp_path / "dataset.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match="edited or damaged"):
        read_card(tmp_path)


def flip(folder):
    path = folder / "shard-000001-0000.tar"
    data = bytearray(path.read_bytes())
    data[2000] ^= 1
    path.write_bytes(data)


def append(folder):
    with open(folder / "shard-000001-0000.tar", "ab") as file:
        file.write(b"more")


def flip_at_the_end(folder):
    path = folder / "shard-000001-0000.tar"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage, lines",
    [
        (flip, ["shard-000001-0000.tar: 000002_0007: damaged (its CRC-32", "shard-000001-0000.tar: its sha256"]),
        (append, ["shard-000001-0000.tar: 10244 bytes, the card says 10240"]),
        (flip_at_the_end, ["shard-000001-0000.tar: its sha256"]),
        (lambda folder: (folder / "shard-000001-0000.tar").unlink(), ["shard-000001-0000.tar: 000002_0007: missing"]),
    ],
)
def test_verify_names_all_that_is_wrong(tmp_path, damage, lines, capsys):
    write(tmp_path)
    assert verify.main([str(tmp_path)]) == 0
    assert "all 5 samples are as they were written" in capsys.readouterr().out
    damage(tmp_path)
    read_card(tmp_path)  # the card itself still fits
    found = list(verify.problems(tmp_path))
    assert len(found) == len(lines) and all(f"{tmp_path}/{line}" in one for one, line in zip(found, lines))
    assert verify.main([str(tmp_path), str(tmp_path / "none")]) == 2
    said = capsys.readouterr()
    assert all(line in said.out for line in [*lines, "no such folder"])
    assert said.err.splitlines()[-1] == f"error: {len(lines) + 1} problems found"


def test_verify_streams_whole_shards_once_and_reads_by_place_only_what_is_damaged(tmp_path, monkeypatch):
    write(tmp_path)
    asked, by_place = [], []
    reading, at_place = verify.pieces, verify.read_sample
    monkeypatch.setattr(verify, "pieces", lambda place: asked.append(place.name) or reading(place))
    monkeypatch.setattr(verify, "read_sample", lambda *a: by_place.append(a[0].name) or at_place(*a))
    monkeypatch.setattr(places, "PIECE", 1000)  # samples and their members lie across pieces
    assert not list(verify.problems(tmp_path)) and not by_place
    shards = [f"shard-{number:06d}-0000.tar" for number in range(3)]
    assert asked == shards
    flip(tmp_path)
    assert len(list(verify.problems(tmp_path))) == 2
    assert set(by_place) == {shards[1]} and asked == shards * 2


def forged(folder, change):
    """A shard with a change, and an index and a card that fit its bytes: what an honest writer never makes."""
    (folder / "x").mkdir()
    card = write(folder / "x")
    path = folder / "x" / "shard-000001-0000.tar"
    data, rows = change(path.read_bytes(), np.load(folder / "x" / "samples.npy"))
    path.write_bytes(data)
    card["shards"][1] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    card["index"] = write_rows(folder / "x", rows)
    write_card(folder / "x", card)
    return folder / "x"


def moved(data, rows):
    rows["offset"][2] += 512
    return data, rows


def other_crc(data, rows):
    rows["crc32"][3] ^= 1
    return data, rows


@pytest.mark.parametrize("change, says", [(moved, "damaged"), (other_crc, "damaged (its CRC-32 is not the index's)")])
def test_verify_compares_the_stream_with_the_index(tmp_path, change, says):
    """The card's hashes fit; only the index tells."""
    found = list(verify.problems(forged(tmp_path, change)))
    assert len(found) >= 1 and all("shard-000001-0000.tar: " in line and says in line for line in found)


def test_a_mistyped_name_says_what_is_near_it(tmp_path):
    for name in ("films", "clips", "buckets/32x48", "buckets/48x32"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "dataset.json").write_text("{}")
    (tmp_path / "filters").mkdir()
    for name, says in (
        ("flims", f"flims: no such folder; near it is {tmp_path / 'films'}"),
        ("buckets", "buckets: not a dataset, .*; there are datasets in it: 32x48, 48x32"),
    ):
        with pytest.raises(NotADataset, match=says):
            read_card(tmp_path / name)
    for name in ("unlike", "filters", "no/films"):
        with pytest.raises(NotADataset) as error:
            read_card(tmp_path / name)
        assert "near" not in str(error.value) and "in it" not in str(error.value)
