"""Shards on disk: plain tar files in webdataset's layout, with a record beside each.

    shard-000000-0000.tar     KEY.json        caption, source, start, end, fps, height, width, frames, codec, key
                              KEY.latent.npy  float16 [C, T, H, W], normalised
                              KEY.text.npy    float16 [L, D], L the caption's number of tokens, not padded
                              KEY.text.N.npy  the same for further caption N = 1, 2, ..., if there are any
    shard-000000-0000.json    the record: size, hash, and the place and CRC-32 of every sample

KEY is `{video:06d}_{clip:04d}`. Shards depend on their samples alone and hold no times or owners, so the same input
gives the same bytes. A sample's members lie side by side: one read gets them, and one CRC-32 covers them.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import webdataset

from data_prep.files import naming, sync, temporary_beside
from data_prep.places import Place, Remote, place_of, read_range

HEADER_BYTES = 4096  # no header of an array is longer
MEMBERS = ("json", "latent.npy", "text.npy")  # of a sample with one caption, in the order of the file


class Entry(NamedTuple):
    """Where a sample is in its shard: `bytes` bytes from `offset` on, with this CRC-32; and its video and clip.

    In a merged dataset videos are counted on: `first_video` of it is video 0 of the shard.
    """

    offset: int
    bytes: int
    crc32: int
    video: int
    clip: int
    first_video: int = 0

    @property
    def key(self) -> str:
        """The sample's name in the dataset."""
        return sample_key(self.video, self.clip)

    @property
    def stored_key(self) -> str:
        """Its name in the shard."""
        return sample_key(self.video - self.first_video, self.clip)


class Sample(NamedTuple):
    """One sample: latent float16 [C, T, H, W], text float16 [L, D] of each of its captions, and its JSON."""

    latent: np.ndarray
    texts: list[np.ndarray]
    meta: dict

    @property
    def text(self) -> np.ndarray:
        """The text of the first caption."""
        return self.texts[0]


class SampleError(ValueError):
    """A sample that cannot be read as it was written. The message is one line and names the file and the sample.

    reason: "missing", "unreadable", "cut short", "damaged", "malformed" or "not finite"
    """

    def __init__(self, where: str, reason: str, detail: str = ""):
        self.where, self.reason, self.detail = where, reason, detail
        super().__init__(f"{where}: {reason}{f' ({detail})' if detail else ''}")


def caption_of(sample: Sample) -> str:
    """The caption of a sample, in one line; "" without one."""
    return " ".join(str(sample.meta.get("caption") or "").split())


def span_of(sample: Sample) -> str:
    """A sample's span of time in its video, such as "2.06–4.12 s"; "" if its JSON does not say."""
    start, end = sample.meta.get("start"), sample.meta.get("end")
    known = isinstance(start, (int, float)) and isinstance(end, (int, float))
    return f"{start:.2f}–{end:.2f} s" if known else ""


def sample_key(video: int, clip: int) -> str:
    """The name of a sample: of clip `clip` of video `video`, both counted from 0."""
    return f"{video:06d}_{clip:04d}"


def text_members(count: int) -> list[str]:
    """The names of the texts of `count` captions, first caption first."""
    return [f"text.{number}.npy" if number else "text.npy" for number in range(count)]


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


def npy_array(data: bytes | bytearray | memoryview, what: str = "array") -> np.ndarray:
    """The inverse of `npy_bytes`: an array over the same memory.

    Raises a ValueError that names `what` for anything but a plain npy array.
    """
    try:
        header = io.BytesIO(data[:HEADER_BYTES])
        version = np.lib.format.read_magic(header)
        if version != (1, 0):
            raise ValueError(f"version {version}")
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(header)
        if fortran_order or dtype.hasobject:
            raise ValueError("it holds objects, or is in Fortran's order")
        return np.frombuffer(data, dtype, math.prod(shape), header.tell()).reshape(shape)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{what}: not a plain npy array ({error})") from None


def is_finite(half: np.ndarray) -> bool:
    """Whether all values of a float16 array are finite: ten times as fast as numpy's own."""
    return not ((half.view(np.uint16) & 0x7C00) == 0x7C00).any()


class ShardWriter:
    """Writes one shard. It appears under its name only when it is whole.

    Raises OSError, after `add` or `finish`, when the disk is full; `abandon` then leaves nothing.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._temporary = temporary_beside(self.path)
        self._spans: list[tuple[int, int]] = []  # video and clip of each sample
        self._ends = [0]  # where each sample ends
        self._file = open(self._temporary, "w+b")  # noqa: SIM115
        self._tar = webdataset.TarWriter(self._file, user="", group="", mode=0o644, mtime=0, encoder=False)

    def add(
        self,
        video: int,
        clip: int,
        latent: np.ndarray,
        text: np.ndarray,
        meta: dict,
        more_texts: Sequence[np.ndarray] = (),
    ) -> None:
        """Appends one sample: latent [C, T, H, W] and text [L >= 1, D], stored as float16.

        `more_texts` are those of further captions, `meta` is the JSON member; "key" is added to it. Raises ValueError
        for wrong shapes, or values that are not finite in float16; then nothing is appended.
        """
        key = sample_key(video, clip)
        latent = to_float16(latent, f"sample {key}: latent")
        texts = [to_float16(one, f"sample {key}: text") for one in (text, *more_texts)]
        for one in texts:
            if latent.ndim != 4 or one.ndim != 2 or len(one) < 1:
                expected = "expected [C, T, H, W] and [L >= 1, D]"
                raise ValueError(f"sample {key}: latent {latent.shape} and text {one.shape}, {expected}")
        json_bytes = json.dumps({**meta, "key": key}, sort_keys=True, ensure_ascii=False).encode()
        parts = {"json": json_bytes, "latent.npy": npy_bytes(latent)}
        parts |= zip(text_members(len(texts)), map(npy_bytes, texts))
        with naming(self.path):
            self._tar.write({"__key__": key, **parts})  # it sorts them by name
        self._spans.append((video, clip))
        self._ends.append(self._tar.tarstream.offset)

    def __len__(self) -> int:
        return len(self._spans)

    def finish(self) -> dict:
        """Gives the whole shard its name. Returns {"file", "samples", "bytes", "sha256", "index"}.

        The index has a list per sample: offset, bytes, crc32, video, clip, as in an Entry.
        """
        with naming(self.path):
            self._tar.close()
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.seek(0)
        digest, index = hashlib.sha256(), []
        for (video, clip), begin, end in zip(self._spans, self._ends, self._ends[1:]):
            data = self._file.read(end - begin)
            digest.update(data)
            index.append([begin, len(data), zlib.crc32(data), video, clip])
        digest.update(self._file.read())
        size = self._file.tell()
        self._file.close()
        os.replace(self._temporary, self.path)
        sync(self.path.parent)
        content = {"bytes": size, "sha256": digest.hexdigest(), "index": index}
        return {"file": self.path.name, "samples": len(index), **content}

    def abandon(self) -> None:
        """Removes what was written of the shard."""
        with contextlib.suppress(OSError, ValueError):  # its own buffer may not fit on the disk
            self._tar.close()
        self._file.close()
        self._temporary.unlink(missing_ok=True)


def read_sample(path: str | Place, entry: Entry) -> Sample:
    """Reads one sample of a local or remote shard and checks its bytes.

    Raises SampleError when it is not as it was written. A wrong answer of a server is asked for again first. Raises
    RemoteError when the server stays away.
    """
    place = place_of(path)
    where = f"{place}: {entry.key}"
    if isinstance(place, Remote):
        try:
            return parse_sample(_read(place, entry, where), entry, where)
        except SampleError as error:
            if error.reason not in ("cut short", "damaged"):
                raise
    return parse_sample(_read(place, entry, where), entry, where)


def _read(place: Place, entry: Entry, where: str) -> bytearray:
    try:
        return bytearray(read_range(place, entry.offset, entry.bytes))
    except FileNotFoundError:
        raise SampleError(where, "missing", "no such file") from None
    except OSError as error:
        raise SampleError(where, "unreadable", error.strerror or str(error)) from None


def parse_sample(data: bytearray, entry: Entry, where: str) -> Sample:
    """A sample from its bytes in the shard; its arrays lie in them. Raises SampleError that names `where`."""
    if len(data) != entry.bytes:
        raise SampleError(where, "cut short", f"{len(data)} of {entry.bytes} bytes")
    if zlib.crc32(data) != entry.crc32:
        raise SampleError(where, "damaged", "its CRC-32 is not the index's")
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            members = [(info.name, info.offset_data, info.size) for info in tar]
        texts, key = text_members(max(1, len(members) - 2)), entry.stored_key
        if [name for name, _, _ in members] != [f"{key}.{name}" for name in sorted([*MEMBERS[:2], *texts])]:
            raise ValueError(f"it holds {', '.join(name for name, _, _ in members) or 'nothing'}")
        parts = {name[len(key) + 1 :]: memoryview(data)[at : at + size] for name, at, size in members}
        meta = json.loads(bytes(parts["json"]))
        if not isinstance(meta, dict):
            raise ValueError("its JSON is not an object")
        return Sample(
            npy_array(parts["latent.npy"], "latent"), [npy_array(parts[name], "text") for name in texts], meta
        )
    except (ValueError, tarfile.TarError, RecursionError) as error:
        raise SampleError(where, "malformed", str(error)) from None
