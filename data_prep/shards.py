"""Shards on disk: plain tar files in webdataset's layout.

    shard-000000.tar     KEY.latent.npy  float16 [C, T, H, W], normalised
                         KEY.text.npy    float16 [L, D], L the caption's number of tokens, not padded
                         KEY.json        caption, source, start, end, fps, height, width, frames, codec, key

Shards depend on their samples alone and hold no times or owners, so the same input gives the same bytes.
"""

import io
import json
import os
import tarfile
from pathlib import Path
from types import TracebackType

import numpy as np

from data_prep.files import sha256_of_file

MEMBERS = ("latent.npy", "text.npy", "json")

ByteSpan = tuple[int, int]  # (offset, size) in a file
Members = dict[str, ByteSpan]  # where each of MEMBERS is


def to_float16(array: np.ndarray, what: str) -> np.ndarray:
    """`array` as float16. Raises a ValueError that names `what` when a value is not finite in float16."""
    with np.errstate(over="ignore"):
        half = np.asarray(array).astype(np.float16)
    if not np.isfinite(half).all():
        bad = int((~np.isfinite(half)).sum())
        raise ValueError(f"{what}: {bad} of {half.size} values are not finite as float16")
    return half


def npy_bytes(array: np.ndarray) -> bytes:
    """A numpy array as the bytes of a .npy file (never pickled)."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def npy_array(data: bytes, what: str = "array") -> np.ndarray:
    """The inverse of `npy_bytes`. Raises a ValueError that names `what` for anything but a plain npy array."""
    try:
        return np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{what}: not a plain npy array ({error})") from None


class ShardWriter:
    """Writes samples to `folder/shard-000000.tar`, ..., at most `samples_per_shard` in each.

    A shard appears under its name only when it is whole. Use it as a context manager. Afterwards `shards` lists
    {"file", "samples", "bytes", "sha256"} for the card. An exception inside leaves at most one `.tmp` file.
    """

    def __init__(self, folder: str | Path, samples_per_shard: int):
        if samples_per_shard < 1:
            raise ValueError(f"samples per shard must be at least 1, not {samples_per_shard}")
        self.folder = Path(folder)
        self.samples_per_shard = samples_per_shard
        self.shards: list[dict] = []
        self._tar: tarfile.TarFile | None = None
        self._samples = 0

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish_shard()
        elif self._tar is not None:
            self._tar.close()

    def add(self, key: str, latent: np.ndarray, text: np.ndarray, meta: dict) -> None:
        """Appends one sample: latent [C, T, H, W] and text [L >= 1, D], both stored as float16.

        `key` has no dots and no slashes. `meta` is the JSON member; "key" is added to it.
        """
        if not key or "." in key or "/" in key:
            raise ValueError(f"sample key {key!r}: must be a name without dots and slashes")
        latent = to_float16(latent, f"sample {key}: latent")
        text = to_float16(text, f"sample {key}: text")
        if latent.ndim != 4 or text.ndim != 2 or len(text) < 1:
            expected = "expected [C, T, H, W] and [L >= 1, D]"
            raise ValueError(f"sample {key}: latent {latent.shape} and text {text.shape}, {expected}")
        if self._tar is None:
            self._name = f"shard-{len(self.shards):06d}.tar"
            self._temporary = self.folder / f"{self._name}.tmp"
            self._tar = tarfile.open(self._temporary, "w:", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        json_bytes = json.dumps({**meta, "key": key}, sort_keys=True, ensure_ascii=False).encode()
        for member, data in zip(MEMBERS, (npy_bytes(latent), npy_bytes(text), json_bytes)):
            info = tarfile.TarInfo(f"{key}.{member}")  # mtime, uid, gid are 0 by default
            info.size = len(data)
            self._tar.addfile(info, io.BytesIO(data))
        self._samples += 1
        if self._samples == self.samples_per_shard:
            self._finish_shard()

    def _finish_shard(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        size, digest = self._temporary.stat().st_size, sha256_of_file(self._temporary)
        self.shards.append({"file": self._name, "samples": self._samples, "bytes": size, "sha256": digest})
        os.replace(self._temporary, self.folder / self._name)
        self._tar, self._samples = None, 0


def index_shard(path: str | Path) -> list[tuple[str, Members]]:
    """The samples of a shard, from its tar headers alone: [(key, {member: (offset, size)})] in file order.

    Offsets and sizes are bytes in the file. Raises a one-line ValueError for a file that is missing, not a tar, cut
    short, or not of this layout.
    """
    try:
        size = os.path.getsize(path)
        with tarfile.open(path, "r:") as tar:
            members = [(info.name, info.offset_data, info.size) for info in tar if info.isfile()]
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except tarfile.TarError as error:
        raise ValueError(f"{path}: not a tar file, or cut short ({error})") from None
    samples: dict[str, Members] = {}
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


def read_member(path: str | Path, span: ByteSpan) -> bytes:
    """The bytes of one member, at a span that `index_shard` gave."""
    offset, size = span
    with open(path, "rb") as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) != size:
        raise ValueError(f"{path}: cut short, {len(data)} of {size} bytes at {offset}")
    return data


def read_sample(path: str | Path, members: Members) -> tuple[np.ndarray, np.ndarray, dict]:
    """One sample of a shard: latent float16 [C, T, H, W], text float16 [L, D], and its JSON."""
    latent = npy_array(read_member(path, members["latent.npy"]), f"{path}: latent")
    text = npy_array(read_member(path, members["text.npy"]), f"{path}: text")
    try:
        meta = json.loads(read_member(path, members["json"]))
    except ValueError as error:
        raise ValueError(f"{path}: a sample's JSON does not parse ({error})") from None
    return latent, text, meta
