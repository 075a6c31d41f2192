"""The dataset on disk: plain tar shards in webdataset's layout, and the card `dataset.json`.

    OUT/shard-000000.tar     KEY.latent.npy  float16 [C, T, H, W], normalised
                             KEY.text.npy    float16 [L, D], L the caption's true number of tokens
                             KEY.json        caption, source, start, end, fps, height, width, frames, codec, key
    OUT/dataset.json         the card, written last: a folder without it is not a dataset

Shards are a function of their samples alone (no times, no owners), so the same input gives the same bytes.
"""

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np

SCHEMA = 1
CARD = "dataset.json"
MEMBERS = ("latent.npy", "text.npy", "json")

# What a card must hold: section -> {key: type}. `validate_card` says which is missing or of the wrong kind.
_NUMBER = (int, float)
_CARD_KEYS = {
    "codec": {"name": str, "hash": str, "settings": dict},
    "latent": {"channels": int, "frames": int, "height": int, "width": int,
               "dtype": str, "strides": list, "mean": list, "std": list},
    "video": {"fps": _NUMBER, "frames": int, "height": int, "width": int},
    "text": {"name": str, "dim": int, "max_tokens": int, "hash": str},
    "counts": {"videos": int, "samples": int, "shards": int, "skipped": dict},
    "source": {"path": str, "settings": dict},
}


def to_float16(array, what):
    """`array` as float16. Raises ValueError naming `what` where a value is not finite in float16."""
    with np.errstate(over="ignore"):
        half = np.asarray(array).astype(np.float16)
    if not np.isfinite(half).all():
        bad = int((~np.isfinite(half)).sum())
        raise ValueError(f"{what}: {bad} of {half.size} values are not finite as float16")
    return half


def npy_bytes(array):
    """A numpy array as the bytes of a .npy file (never pickled)."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def npy_array(data, what="array"):
    """The inverse of `npy_bytes`. Raises ValueError, naming `what`, for anything that is not a plain npy array."""
    try:
        return np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{what}: not a plain npy array ({error})") from None


def file_sha256(path):
    """sha256 of a file, hex, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def file_hash(paths, settings):
    """sha256, hex, of files (by name and content) and of a JSON-able dict of settings."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in sorted(paths):
        digest.update(f"{path.name}:{file_sha256(path)}".encode())
    return digest.hexdigest()


def write_atomic(path, data):
    """Write bytes to `path` so that a reader sees the old file or the whole new one, also after a power cut."""
    temporary = Path(f"{path}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class ShardWriter:
    """Writes samples to `folder/shard-000000.tar`, ..., at most `samples_per_shard` in each.

    A shard appears under its name only when it is whole. Use as a context manager; afterwards `shards` lists
    {"file", "samples", "bytes", "sha256"} for the card. An exception inside leaves at most one `.tmp` file.
    """

    def __init__(self, folder, samples_per_shard):
        if samples_per_shard < 1:
            raise ValueError(f"samples per shard must be at least 1, not {samples_per_shard}")
        self.folder = Path(folder)
        self.samples_per_shard = samples_per_shard
        self.shards = []
        self._tar = None
        self._samples = 0

    def __enter__(self):
        return self

    def __exit__(self, kind, value, traceback):
        if kind is None:
            self._finish_shard()
        elif self._tar is not None:
            self._tar.close()

    def add(self, key, latent, text, meta):
        """Append one sample.

        key:    str without dots or slashes
        latent: [C, T, H, W], text: [L, D] with L >= 1; both are stored as float16
        meta:   dict for the JSON member; "key" is added
        """
        if not key or "." in key or "/" in key:
            raise ValueError(f"sample key {key!r}: must be a name without dots and slashes")
        latent = to_float16(latent, f"sample {key}: latent")
        text = to_float16(text, f"sample {key}: text")
        if latent.ndim != 4 or text.ndim != 2 or len(text) < 1:
            raise ValueError(f"sample {key}: latent {latent.shape} and text {text.shape}, "
                             "expected [C, T, H, W] and [L >= 1, D]")
        if self._tar is None:
            self._name = f"shard-{len(self.shards):06d}.tar"
            self._temporary = self.folder / f"{self._name}.tmp"
            self._tar = tarfile.open(self._temporary, "w:", format=tarfile.USTAR_FORMAT)
        self._put(f"{key}.latent.npy", npy_bytes(latent))
        self._put(f"{key}.text.npy", npy_bytes(text))
        self._put(f"{key}.json", json.dumps({**meta, "key": key}, sort_keys=True, ensure_ascii=False).encode())
        self._samples += 1
        if self._samples == self.samples_per_shard:
            self._finish_shard()

    def _put(self, name, data):
        info = tarfile.TarInfo(name)     # mtime, uid, gid are 0 by default
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))

    def _finish_shard(self):
        if self._tar is None:
            return
        self._tar.close()
        self.shards.append({"file": self._name, "samples": self._samples,
                            "bytes": self._temporary.stat().st_size, "sha256": file_sha256(self._temporary)})
        os.replace(self._temporary, self.folder / self._name)
        self._tar, self._samples = None, 0


def index_shard(path):
    """The samples of a shard, from its tar headers alone.

    Returns [(key, {member: (offset, size)})] in file order, member one of MEMBERS, offsets in bytes from the start
    of the file. Raises ValueError in one line for a file that is missing, no tar, cut short, or not of this layout.
    """
    try:
        size = os.path.getsize(path)
        with tarfile.open(path, "r:") as tar:
            members = [(info.name, info.offset_data, info.size) for info in tar if info.isfile()]
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except tarfile.TarError as error:
        raise ValueError(f"{path}: not a tar file, or cut short ({error})") from None
    samples = {}
    for name, offset, length in members:
        if offset + length > size:
            raise ValueError(f"{path}: cut short inside {name}")
        key, _, member = os.path.basename(name).partition(".")
        samples.setdefault(key, {})[member] = (offset, length)
    for key, found in samples.items():
        missing = [member for member in MEMBERS if member not in found]
        if missing:
            raise ValueError(f"{path}: sample {key} has no {', '.join(missing)}")
    return list(samples.items())


def read_member(path, span):
    """The bytes of one member. span: (offset, size) from `index_shard`."""
    offset, size = span
    with open(path, "rb") as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) != size:
        raise ValueError(f"{path}: cut short, {len(data)} of {size} bytes at {offset}")
    return data


def read_sample(path, members):
    """One sample of a shard as (latent float16 [C, T, H, W], text float16 [L, D], meta dict).

    members: {member: (offset, size)} from `index_shard`.
    """
    latent = npy_array(read_member(path, members["latent.npy"]), f"{path}: latent")
    text = npy_array(read_member(path, members["text.npy"]), f"{path}: text")
    try:
        meta = json.loads(read_member(path, members["json"]))
    except ValueError as error:
        raise ValueError(f"{path}: a sample's JSON does not parse ({error})") from None
    return latent, text, meta


def write_card(folder, card):
    """Write dataset.json, atomically: the last act of making a dataset. The card is validated first."""
    validate_card(card, f"{folder}/{CARD}")
    data = json.dumps(card, indent=1, ensure_ascii=False).encode()
    write_atomic(Path(folder) / CARD, data + b"\n")


def read_card(folder):
    """The card of a dataset, validated, its shards present at their recorded sizes.

    Raises ValueError in one line for anything else; contents are checked by `verify_dataset`.
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


def validate_card(card, where):
    """Raise ValueError, naming `where` and the key, if `card` is no card of this schema."""
    if not isinstance(card, dict):
        raise ValueError(f"{where}: not a dataset card")
    if card.get("schema") != SCHEMA:
        raise ValueError(f"{where}: schema {card.get('schema')!r}, this version reads {SCHEMA}")
    for section, keys in _CARD_KEYS.items():
        if not isinstance(card.get(section), dict):
            raise ValueError(f"{where}: no section {section!r}")
        for key, kind in keys.items():
            if not isinstance(card[section].get(key), kind):
                raise ValueError(f"{where}: {section}.{key} is missing or of the wrong kind")
    channels = card["latent"]["channels"]
    if len(card["latent"]["mean"]) != channels or len(card["latent"]["std"]) != channels:
        raise ValueError(f"{where}: latent.mean and latent.std must hold {channels} numbers")
    empty = card.get("empty_caption")
    if not isinstance(empty, list) or not empty or any(
            not isinstance(row, list) or len(row) != card["text"]["dim"] for row in empty):
        raise ValueError(f"{where}: empty_caption must be a list of rows of text.dim = {card['text']['dim']} numbers")
    if not isinstance(card.get("shards"), list) or not card["shards"]:
        raise ValueError(f"{where}: no shards")
    for shard in card["shards"]:
        if not isinstance(shard, dict) or not {"file", "samples", "bytes", "sha256"} <= shard.keys():
            raise ValueError(f"{where}: a shard without file, samples, bytes or sha256")
        if os.path.basename(shard["file"]) != shard["file"]:
            raise ValueError(f"{where}: shard {shard['file']!r} is not a plain file name")


def verify_dataset(folder):
    """Read a whole dataset against its card: hashes, counts, shapes, finiteness. Returns the number of samples.

    Raises ValueError in one line at the first difference.
    """
    card = read_card(folder)
    sizes = card["latent"]
    shape = (sizes["channels"], sizes["frames"], sizes["height"], sizes["width"])
    keys = set()
    for shard in card["shards"]:
        path = Path(folder) / shard["file"]
        if file_sha256(path) != shard["sha256"]:
            raise ValueError(f"{path}: its sha256 is not the card's")
        samples = index_shard(path)
        if len(samples) != shard["samples"]:
            raise ValueError(f"{path}: {len(samples)} samples, the card says {shard['samples']}")
        for key, members in samples:
            latent, text, meta = read_sample(path, members)
            if latent.shape != shape or latent.dtype != np.float16:
                raise ValueError(f"{path}: {key} latent {latent.dtype} {latent.shape}, the card says float16 {shape}")
            if text.ndim != 2 or not 1 <= len(text) <= card["text"]["max_tokens"] \
                    or text.shape[1] != card["text"]["dim"] or text.dtype != np.float16:
                raise ValueError(f"{path}: {key} text {text.dtype} {text.shape} does not fit the card")
            if not (np.isfinite(latent).all() and np.isfinite(text).all()):
                raise ValueError(f"{path}: {key} has values that are not finite")
            if meta.get("key") != key or key in keys:
                raise ValueError(f"{path}: {key} is not unique or its JSON names another")
            keys.add(key)
    if len(keys) != card["counts"]["samples"]:
        raise ValueError(f"{folder}: {len(keys)} samples, the card says {card['counts']['samples']}")
    return len(keys)
