"""A dataset's card, `dataset.json`: what made the dataset, and what it holds.

It is written last: a folder without it is not a dataset.
"""

import json
import os
from pathlib import Path

import numpy as np

from data_prep.files import sha256_of_file, write_atomic
from data_prep.geometry import LatentGeometry
from data_prep.shards import index_shard, read_sample

SCHEMA = 1
CARD = "dataset.json"

# What a card must hold: section -> {key: type}.
_NUMBER = (int, float)
_CARD_KEYS: dict[str, dict] = {
    "codec": {"name": str, "hash": str, "settings": dict},
    "latent": {
        "channels": int,
        "frames": int,
        "height": int,
        "width": int,
        "dtype": str,
        "strides": list,
        "mean": list,
        "std": list,
    },
    "video": {"fps": _NUMBER, "frames": int, "height": int, "width": int},
    "text": {"name": str, "dim": int, "max_tokens": int, "hash": str},
    "counts": {"videos": int, "samples": int, "shards": int, "skipped": dict},
    "source": {"path": str, "settings": dict},
}


def write_card(folder: str | Path, card: dict) -> None:
    """Validates the card and writes dataset.json, as a whole or not at all: the last step of making a dataset."""
    validate_card(card, f"{folder}/{CARD}")
    write_atomic(Path(folder) / CARD, json.dumps(card, indent=1, ensure_ascii=False) + "\n")


def read_card(folder: str | Path) -> dict:
    """Reads and validates the card of a dataset. Its shards must exist and have the recorded sizes.

    Raises a one-line ValueError otherwise. `verify_dataset` checks what the shards hold.
    """
    path = Path(folder) / CARD
    if not path.is_file():
        if not Path(folder).is_dir():
            raise ValueError(f"{folder}: no such folder")
        raise ValueError(f"{folder}: not a dataset, it has no {CARD} (or its encoding was interrupted)")
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    validate_card(card, path)
    for shard in card["shards"]:
        file = Path(folder) / shard["file"]
        if not file.is_file():
            raise ValueError(f"{file}: missing, but listed in {CARD}")
        if file.stat().st_size != shard["bytes"]:
            raise ValueError(f"{file}: {file.stat().st_size} bytes, but {CARD} says {shard['bytes']}")
    return card


def card_geometry(card: dict) -> LatentGeometry:
    """How the dataset's latents relate to video frames."""
    time, rows, columns = card["latent"]["strides"]
    return LatentGeometry(card["latent"]["channels"], (time, rows, columns))


def validate_card(card: object, where: str | Path) -> None:
    """Raises a ValueError that names `where` and the key, if `card` is not a card of this schema."""
    if not isinstance(card, dict):
        raise ValueError(f"{where}: not a dataset card")
    if card.get("schema") != SCHEMA:
        raise ValueError(f"{where}: schema {card.get('schema')!r}, this version reads {SCHEMA}")
    for section, keys in _CARD_KEYS.items():
        if not isinstance(card.get(section), dict):
            raise ValueError(f"{where}: no section {section!r}")
        for key, kind in keys.items():
            if not isinstance(card[section].get(key), kind):
                raise ValueError(f"{where}: {section}.{key} is missing or of the wrong type")
    latent, dim, empty = card["latent"], card["text"]["dim"], card.get("empty_caption")
    if len(latent["mean"]) != latent["channels"] or len(latent["std"]) != latent["channels"]:
        raise ValueError(f"{where}: latent.mean and latent.std must hold {latent['channels']} numbers")
    if len(latent["strides"]) != 3 or not all(isinstance(stride, int) and stride > 0 for stride in latent["strides"]):
        raise ValueError(f"{where}: latent.strides must hold 3 whole numbers: of frames, rows, columns")
    rows = empty if isinstance(empty, list) else []
    if not rows or any(not isinstance(row, list) or len(row) != dim for row in rows):
        raise ValueError(f"{where}: empty_caption must be a list of rows of text.dim = {dim} numbers")
    if not isinstance(card.get("shards"), list) or not card["shards"]:
        raise ValueError(f"{where}: no shards")
    for shard in card["shards"]:
        if not isinstance(shard, dict) or not {"file", "samples", "bytes", "sha256"} <= shard.keys():
            raise ValueError(f"{where}: a shard without file, samples, bytes or sha256")
        if os.path.basename(shard["file"]) != shard["file"]:
            raise ValueError(f"{where}: shard {shard['file']!r} is not a plain file name")


def verify_dataset(folder: str | Path) -> int:
    """Checks a whole dataset against its card: hashes, counts, shapes, finite values. Returns the number of samples.

    Raises a one-line ValueError at the first difference.
    """
    card = read_card(folder)
    keys: set[str] = set()
    for shard in card["shards"]:
        path = Path(folder) / shard["file"]
        if sha256_of_file(path) != shard["sha256"]:
            raise ValueError(f"{path}: its sha256 is not the card's")
        samples = index_shard(path)
        if len(samples) != shard["samples"]:
            raise ValueError(f"{path}: {len(samples)} samples, the card says {shard['samples']}")
        for key, members in samples:
            latent, text, meta = read_sample(path, members)
            check_sample(card, f"{path}: {key}", latent, text)
            if meta.get("key") != key or key in keys:
                raise ValueError(f"{path}: {key} is not unique or its JSON has another key")
            keys.add(key)
    if len(keys) != card["counts"]["samples"]:
        raise ValueError(f"{folder}: {len(keys)} samples, the card says {card['counts']['samples']}")
    return len(keys)


def check_sample(card: dict, where: str, latent: np.ndarray, text: np.ndarray) -> None:
    """Raises a ValueError that names `where` unless a sample fits the card: shapes, dtypes, finite values."""
    sizes, words = card["latent"], card["text"]
    shape = (sizes["channels"], sizes["frames"], sizes["height"], sizes["width"])
    if latent.shape != shape or latent.dtype != np.float16:
        raise ValueError(f"{where} latent {latent.dtype} {latent.shape}, the card says float16 {shape}")
    fits = text.ndim == 2 and 1 <= len(text) <= words["max_tokens"] and text.shape[1] == words["dim"]
    if not fits or text.dtype != np.float16:
        raise ValueError(f"{where} text {text.dtype} {text.shape} does not fit the card")
    if not (np.isfinite(latent).all() and np.isfinite(text).all()):
        raise ValueError(f"{where} has values that are not finite")
