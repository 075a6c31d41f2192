"""Checks datasets byte by byte.

    python -m data_prep.verify DATASET [DATASET ...]

The card, the index, the built-in codec if it is there, every shard's size and hash, every sample's bytes, shapes and
values. Each problem is one line; the exit code is 2 if there is any. A shard is streamed by webdataset, and hashed on
the way. One that is not whole is read again at the places of its samples, to name what is wrong.
"""

import argparse
import hashlib
import sys
import zlib
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

from tqdm import tqdm

from data_prep.card import check_sample, read_card
from data_prep.codecs import dataset_codec
from data_prep.command import printable, run_command
from data_prep.default_codec import CODEC_FILE
from data_prep.index import SampleIndex
from data_prep.places import Place, pieces, place_of, size_and_sha256
from data_prep.shards import Entry, SampleError, read_sample
from data_prep.stream import stream_shard


def problems(folder: str | Place) -> Iterator[str]:
    """Yields one line for everything that is wrong in a dataset. Reads whole shards once, damaged ones thrice."""
    try:
        card = read_card(folder)
        index = SampleIndex(folder, card)
    except ValueError as error:
        yield str(error)
        return
    place = place_of(folder)
    if card["codec"]["name"] == "default" and isinstance(place, Path) and (place / CODEC_FILE).exists():
        try:
            dataset_codec(folder)
        except ValueError as error:
            yield str(error)
    keys: set[str] = set()
    for number, shard in enumerate(tqdm(card["shards"], desc="verify", unit="shard", leave=False, disable=None)):
        path, entries = place / shard["file"], index.of_shard(number)
        for entry in entries:
            if entry.key in keys:
                yield f"{path}: {entry.key}: not the only sample of this name"
            keys.add(entry.key)
        if not is_whole(path, shard, entries, card):
            yield from problems_of_shard(path, shard, entries, card)


def is_whole(path: Place, shard: dict, entries: list[Entry], card: dict) -> bool:
    """Whether a shard is as it was written: its bytes those of the card and of the index, its samples as they must be.

    It is read once, and streamed by webdataset. Raises RemoteError when a server stays away.
    """
    ends = list(accumulate(entry.bytes for entry in entries))
    if [entry.offset + entry.bytes for entry in entries] != ends:
        return False
    file = Hashed(path, ends)
    try:
        keys = [key for key, _ in stream_shard(file, path, card, exact=True)]
        file.finish()
    except (SampleError, OSError):
        return False
    same_bytes = (file.size, file.sha256.hexdigest()) == (shard["bytes"], shard["sha256"])
    return same_bytes and [*zip(keys, file.crcs)] == [(entry.stored_key, entry.crc32) for entry in entries]


class Hashed:
    """A file that is read once, from begin to end, and hashed on the way.

    `crcs` has the CRC-32 of the spans that end at `ends`, which follow one another from the begin of the file on.
    """

    def __init__(self, place: Place, ends: list[int]):
        self.size, self.sha256, self.crcs = 0, hashlib.sha256(), [0] * len(ends)
        self._pieces, self._ends, self._span = pieces(place), ends, 0
        self._piece, self._at = b"", 0

    def read(self, size: int) -> bytes:
        """The next `size` bytes, fewer at the end. Raises as `read_range` does."""
        data = self._piece[self._at : self._at + size]
        self._at += len(data)
        return data + self.read(size - len(data)) if len(data) < size and self._next() else data

    def finish(self) -> None:
        """Reads the rest."""
        while self._next():
            pass

    def _next(self) -> bool:
        """Reads and hashes a piece. False at the end."""
        self._piece, self._at = next(self._pieces, b""), 0
        self.sha256.update(self._piece)
        view = memoryview(self._piece)
        while view and self._span < len(self._ends):
            part = view[: self._ends[self._span] - self.size]
            self.crcs[self._span] = zlib.crc32(part, self.crcs[self._span])
            self.size, view = self.size + len(part), view[len(part) :]
            self._span += self.size == self._ends[self._span]
        self.size += len(view)
        return bool(self._piece)


def problems_of_shard(path: Place, shard: dict, entries: list[Entry], card: dict) -> Iterator[str]:
    """Yields one line for everything that is wrong in a shard.

    Every sample is read at its place: one that is broken does not hide those behind it.
    """
    for entry in entries:
        try:
            check_sample(card, f"{path}: {entry.key}", read_sample(path, entry))
        except SampleError as error:
            yield str(error)
            if error.reason in ("missing", "unreadable"):
                return
    size, digest = size_and_sha256(path)
    if size != shard["bytes"]:
        yield f"{path}: {size} bytes, the card says {shard['bytes']}"
    elif digest != shard["sha256"]:
        yield f"{path}: its sha256 is not the card's"


def verify(folder: str | Place) -> int:
    """Checks a whole dataset. Returns the number of samples. Raises ValueError with the first problem."""
    for problem in problems(folder):
        raise ValueError(problem)
    return read_card(folder)["counts"]["samples"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="data_prep.verify", description="Checks datasets byte by byte.")
    parser.add_argument("datasets", nargs="+", metavar="DATASET")
    options = parser.parse_args(arguments)
    return run_command(lambda: verify_as_asked(options.datasets))


def verify_as_asked(folders: list[str]) -> None:
    """What the command line asks for. Raises ValueError after the last dataset if any has a problem."""
    found = 0
    for folder in folders:
        own = 0
        for problem in problems(folder):
            tqdm.write(printable(problem))
            own += 1
        found += own
        if not own:
            print(f"{folder}: all {read_card(folder)['counts']['samples']} samples are as they were written")
    if found:
        raise ValueError(f"{found} problem{'s' if found > 1 else ''} found")


if __name__ == "__main__":
    sys.exit(main())
