"""A dataset's card: read back as written, and one clear line for whatever does not fit."""

import json

import pytest

from data_prep.card import card_geometry, read_card, verify_dataset, write_card
from data_prep.geometry import WAN_2_1
from tests.data_prep.test_shards import write as write_shards


def write(folder, count=5):
    """A dataset of `count` samples. Returns its card."""
    shards = write_shards(folder, count)
    latent = {"channels": 16, "frames": 2, "height": 3, "width": 4, "dtype": "float16", "strides": [4, 8, 8]}
    card = {
        "schema": 1,
        "codec": {"name": "default", "hash": "0", "settings": {}, "folder": None},
        "latent": {**latent, "mean": [0.0] * 16, "std": [1.0] * 16},
        "video": {"fps": 16, "frames": 5, "height": 24, "width": 32},
        "text": {"name": "default", "dim": 5, "max_tokens": 8, "hash": "0", "folder": None},
        "empty_caption": [[0.0] * 5],
        "counts": {"videos": count, "samples": count, "shards": len(shards), "skipped": {}, "dropped_seconds": 0.0},
        "skipped": [],
        "shards": shards,
        "source": {"path": "videos", "settings": {}},
    }
    write_card(folder, card)
    return card


def test_round_trip(tmp_path):
    card = write(tmp_path)
    assert read_card(tmp_path) == card
    assert card_geometry(card) == WAN_2_1
    assert verify_dataset(tmp_path) == 5


def test_a_folder_without_a_card_is_no_dataset(tmp_path):
    with pytest.raises(ValueError, match="not a dataset"):
        read_card(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        read_card(tmp_path / "none")


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda card: card.update(schema=2), "schema 2"),
        (lambda card: card.pop("latent"), "no section 'latent'"),
        (lambda card: card["video"].pop("fps"), "video.fps"),
        (lambda card: card["latent"].update(std=[1.0]), "16 numbers"),
        (lambda card: card["latent"].update(strides=[4, 8]), "3 whole numbers"),
        (lambda card: card.update(shards=[]), "no shards"),
        (lambda card: card["shards"][0].update(file="../x.tar"), "plain file name"),
        (lambda card: card["shards"][0].update(bytes=1), "dataset.json says 1"),
        (lambda card: card["shards"][0].update(file="gone.tar"), "missing"),
        (lambda card: card.update(empty_caption=[[0.0]]), "empty_caption"),
    ],
)
def test_a_card_that_does_not_fit_says_what_is_wrong(tmp_path, change, says):
    write(tmp_path)
    card = json.loads((tmp_path / "dataset.json").read_text())
    change(card)
    (tmp_path / "dataset.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match=says):
        read_card(tmp_path)


def test_verify_finds_a_flipped_bit(tmp_path):
    write(tmp_path)
    path = tmp_path / "shard-000001.tar"
    data = bytearray(path.read_bytes())
    data[800] ^= 1
    path.write_bytes(data)
    read_card(tmp_path)  # sizes still fit
    with pytest.raises(ValueError, match=r"shard-000001\.tar: its sha256"):
        verify_dataset(tmp_path)
