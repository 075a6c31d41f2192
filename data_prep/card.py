"""A dataset's card, `dataset.json`: what made the dataset, and what it holds.

It is written last: a folder without it is not a dataset. It holds its own hash, so an edited card is refused.
"""

import contextlib
import difflib
import hashlib
import json
import os
from pathlib import Path

import numpy as np

from data_prep.files import write_atomic
from data_prep.geometry import LatentGeometry
from data_prep.places import Place, no_such_folder, place_of, read_whole
from data_prep.shards import Sample, SampleError, is_finite

SCHEMA = 2
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
    "index": {"file": str, "bytes": int, "sha256": str},
    "source": {"path": str, "settings": dict},
}


def write_card(folder: str | Path, card: dict) -> dict:
    """Validates the card and writes dataset.json, as a whole or not at all: the last step of making a dataset.

    Returns the card with its hash.
    """
    card = {**card, "hash": card_hash(card)}
    validate_card(card, f"{folder}/{CARD}")
    write_atomic(Path(folder) / CARD, json.dumps(card, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    return card


def card_hash(card: dict) -> str:
    """SHA-256, in hexadecimal, of all that a card, or a shard's record, says besides its own hash."""
    rest = {key: value for key, value in card.items() if key != "hash"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


class NotADataset(ValueError):
    """There is no dataset at an address."""


def read_card(folder: str | Place) -> dict:
    """Reads and validates the card of a dataset, local or remote.

    Raises a one-line ValueError otherwise, and NotADataset where there is none. What the shards hold is checked
    whenever a sample is read, and by `python -m data_prep.verify`.
    """
    place = place_of(folder)
    path = place / CARD
    if no_such_folder(place):
        raise NotADataset(f"{folder}: no such folder{datasets_near(place)}")
    try:
        text = read_whole(path)
    except FileNotFoundError:
        what = f"not a dataset, it has no {CARD} (or its encoding is not finished)"
        raise NotADataset(f"{place}: {what}{datasets_near(place)}") from None
    except OSError as error:
        raise ValueError(f"{path}: not readable ({error.strerror or error})") from None
    try:
        card = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    validate_card(card, path)
    return card


def datasets_near(place: Place) -> str:
    """What to read in place of a local folder that is no dataset: those in it, or names like its own; "" if none."""
    if not isinstance(place, Path):
        return ""
    within = place.is_dir()
    with contextlib.suppress(OSError):
        folder = place if within else place.parent
        names = sorted(path.parent.name for path in folder.glob(f"*/{CARD}"))
        if within and names:
            more = ", ..." if len(names) > 5 else ""
            return f"; there are datasets in it: {', '.join(names[:5])}{more}"
        near = difflib.get_close_matches(place.name, names, 3)
        if near and not within:
            return f"; near it is {', '.join(str(place.parent / name) for name in near)}"
    return ""


def card_geometry(card: dict) -> LatentGeometry:
    """How the dataset's latents relate to video frames."""
    time, rows, columns = card["latent"]["strides"]
    return LatentGeometry(card["latent"]["channels"], (time, rows, columns))


def validate_card(card: object, where: str | Place) -> None:
    """Raises a ValueError that names `where` and the key, if `card` is not a card of this schema."""
    if not isinstance(card, dict):
        raise ValueError(f"{where}: not a dataset card")
    if card.get("schema") != SCHEMA:
        raise ValueError(
            f"{where}: schema {card.get('schema')!r}, this version reads {SCHEMA}; encode the videos again"
        )
    if card.get("hash") != card_hash(card):
        raise ValueError(
            f"{where}: edited or damaged, its hash is not that of what it says; encode again to write it anew"
        )
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
        if not isinstance(shard.get("first_video", 0), int):
            raise ValueError(f"{where}: first_video of a shard is not a whole number")
    for name in (card["index"]["file"], *(shard["file"] for shard in card["shards"])):
        if not isinstance(name, str) or os.path.basename(name) != name:
            raise ValueError(f"{where}: {name!r} is not a plain file name")
    if sum(shard["samples"] for shard in card["shards"]) != card["counts"]["samples"]:
        raise ValueError(f"{where}: counts.samples is not the sum over the shards")


def check_sample(card: dict, where: str, sample: Sample) -> None:
    """Raises SampleError that names `where` unless a sample fits the card: shapes, dtypes, finite values, codec."""
    latent, sizes, words = sample.latent, card["latent"], card["text"]
    shape = (sizes["channels"], sizes["frames"], sizes["height"], sizes["width"])
    if latent.shape != shape or latent.dtype != np.float16:
        raise SampleError(where, "malformed", f"latent {latent.dtype} {latent.shape}, the card says float16 {shape}")
    for text in sample.texts:
        fits = text.ndim == 2 and 1 <= len(text) <= words["max_tokens"] and text.shape[1] == words["dim"]
        if not fits or text.dtype != np.float16:
            raise SampleError(where, "malformed", f"text {text.dtype} {text.shape} does not fit the card")
    captions = sample.meta.get("captions", [""])
    if not isinstance(captions, list) or len(captions) != len(sample.texts):
        raise SampleError(where, "malformed", f"its JSON has not one caption for each of {len(sample.texts)} texts")
    for name, values in (("latent", latent), *(("text", text) for text in sample.texts)):
        if not is_finite(values):
            raise SampleError(where, "not finite", f"{int((~np.isfinite(values)).sum())} values of its {name}")
    if sample.meta.get("codec") not in (None, card["codec"]["hash"]):
        raise SampleError(where, "malformed", "made by another codec than the card's")
