"""The work of making a dataset, cut so that any number of jobs can share it and any of them can be killed.

    DATASET/work.json                  what is made, and from what: settings and a fingerprint of the source
    DATASET/shard-PPPPPP-NNNN.json     the record of shard N of part P, written after the shard itself

A part is `videos_per_part` consecutive videos of the source. It makes shards of at most `samples_per_shard` clips. Each
record says where the next shard of its part begins. So a job goes on behind the last whole shard, and the result does
not depend on how many jobs there were, or on when they ended. A record holds its own hash: one that is damaged or
edited counts for nothing, and its shard is made again.
"""

import contextlib
import json
import os
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.card import CARD, card_hash, read_card
from data_prep.default_codec import CODEC_FILE
from data_prep.files import is_abandoned, write_atomic
from data_prep.index import INDEX
from data_prep.rows import DUPLICATE, Row, fingerprints
from data_prep.shards import ShardWriter

WORK, LOCK, FAILURES = "work.json", "work.lock", "failures.jsonl"
LISTING = "listing-"  # so begin the files of `tar_sources.py`


class Place(NamedTuple):
    """Where a part goes on: with this shard of the part, at this clip of this row of the source."""

    shard: int
    row: int
    clip: int


@dataclass(frozen=True)
class Work:
    """The work on a dataset: its folder, its videos in the order of the source, and how these are cut into parts.

    A dataset of a bucket has some videos of the source only: its parts have gaps.
    """

    folder: Path
    rows: list[Row]
    videos_per_part: int
    source_videos: int = 0  # of the whole source; 0: all are in `rows`

    @property
    def parts(self) -> int:
        """Number of parts."""
        return -(-(self.source_videos or len(self.rows)) // self.videos_per_part)

    def rows_of(self, part: int) -> list[Row]:
        """The videos of a part, in order."""
        return self.rows_from(part, Place(0, part * self.videos_per_part, 0))

    def rows_from(self, part: int, place: Place) -> list[Row]:
        """The videos of a part from `place` on."""
        begin, end = (
            bisect_left(self.rows, index, key=lambda row: row.index)
            for index in (place.row, (part + 1) * self.videos_per_part)
        )
        return self.rows[begin:end]

    def shard(self, part: int, number: int) -> Path:
        """The path of shard `number` of a part."""
        return self.folder / f"shard-{part:06d}-{number:04d}.tar"

    def records(self, part: int) -> tuple[list[dict], Place | None]:
        """The records of the whole shards of a part, in order, and where it goes on. None: the part is done."""
        records: list[dict] = []
        row, clip = part * self.videos_per_part, 0
        while record := _whole(self.shard(part, len(records))):
            records.append(record)
            if record["next"] is None:
                return records, None
            row, clip = record["next"]
        return records, Place(len(records), row, clip)

    def sizes_of(self, part: int) -> str:
        """A hash of the sizes of a part's files. Another bucket, or being a duplicate, is another size, too."""
        rows = self.rows_of(part)
        duplicates = "".join(f" {row.index}" for row in rows if row.reason == DUPLICATE)
        return fingerprints(rows)["source_sizes"] + duplicates

    def forget_failures(self, parts: range) -> int:
        """Removes the shards of these parts from the first failure on, and the card. Returns how many shards.

        In a part whose files have other sizes than when it was made, all shards go: any video may be another one.
        """
        removed = 0
        for part in parts:
            records, _ = self.records(part)
            failed = [number for number, record in enumerate(records) if failures_in(record)]
            if any(record.get("source_sizes") != self.sizes_of(part) for record in records):
                failed = [0]
            for number in range(failed[0], len(records)) if failed else ():
                (self.folder / CARD).unlink(missing_ok=True)
                self.shard(part, number).with_suffix(".json").unlink(missing_ok=True)
                self.shard(part, number).unlink(missing_ok=True)
                removed += 1
        return removed


def failures_in(record: dict) -> int:
    """Videos that failed in a shard. A duplicate is left out on purpose."""
    return sum(failure["reason"] != DUPLICATE for failure in record["failures"])


def _whole(shard: Path) -> dict | None:
    """The record of a shard, or None when the shard is not whole."""
    try:
        record = json.loads(shard.with_suffix(".json").read_bytes())
        there = record["file"] is None or (record["file"] == shard.name and shard.stat().st_size == record["bytes"])
        if there and record["hash"] == card_hash(record):
            return record
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return None


class PartWriter:
    """Writes the shards of a part, from a place on, each with its record. As a context manager it leaves no half shard.

    After the last video call `finish`: without it the part isn't done.
    """

    def __init__(self, work: Work, part: int, place: Place, samples_per_shard: int):
        self._work, self._part, self._number, self._limit = work, part, place.shard, samples_per_shard
        self._shard: ShardWriter | None = None
        self._failures: list[dict] = []
        self._dropped = 0.0
        self._sizes = work.sizes_of(part)

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(self, *error: object) -> None:
        if self._shard is not None:
            self._shard.abandon()

    def add(self, row: Row, clip: int, latent: np.ndarray, texts: list[np.ndarray], meta: dict) -> None:
        """Appends clip number `clip` of a video. Raises ValueError for values that are not finite in float16."""
        if self._shard is None:
            self._shard = ShardWriter(self._work.shard(self._part, self._number))
        self._shard.add(row.index, clip, latent, texts[0], meta, texts[1:])
        if len(self._shard) == self._limit:
            self._finish_shard([row.index, clip + 1])

    @property
    def room(self) -> int:
        """Samples that the shard has room for."""
        return self._limit - (len(self._shard) if self._shard is not None else 0)

    def end_video(self, dropped: float, failure: dict | None) -> None:
        """Notes what became of a video: seconds of its remainder, and why it failed if it did."""
        self._dropped += dropped
        self._failures += [failure] if failure else []

    def finish(self) -> None:
        """Writes the last shard. The part is done."""
        self._finish_shard(None)

    def _finish_shard(self, go_on: list[int] | None) -> None:
        """Writes the shard, if there are clips, and then its record. A shard without a record is made again."""
        content: dict = {"file": None, "samples": 0, "bytes": 0, "sha256": "", "index": []}
        if self._shard is not None:
            if len(self._shard):
                content = self._shard.finish()
            else:
                self._shard.abandon()
        path = self._work.shard(self._part, self._number).with_suffix(".json")
        notes = {"failures": self._failures, "dropped_seconds": self._dropped, "source_sizes": self._sizes}
        record = {**content, "next": go_on, **notes}
        write_atomic(path, json.dumps({**record, "hash": card_hash(record)}))
        self._shard, self._number, self._failures, self._dropped = None, self._number + 1, [], 0.0


def stands_already(out: Path, record: dict, retry: bool = False) -> bool:
    """True if `out` holds the finished dataset with these settings and this source.

    `retry`: files may have other sizes than before. Raises ValueError if it holds another dataset, finished or not, or
    anything else.
    """
    if (out / CARD).exists():
        _check_same(out, read_card(out)["source"]["settings"], record, retry)
        return True
    if (out / WORK).exists():
        check_same_work(out, record, retry)
        return False
    refuse_foreign(out)
    return False


def refuse_foreign(out: Path) -> None:
    """Raises ValueError if `out` holds anything but a dataset, finished or not."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file, expected a folder to write")
    ours = (LOCK, WORK, CODEC_FILE, CARD, LISTING)
    foreign = [name for name in sorted(os.listdir(out)) if not name.startswith(ours)] if out.is_dir() else []
    if foreign and not ((out / WORK).exists() or (out / CARD).exists()):  # another job may have begun meanwhile
        raise ValueError(f"{out}: not empty and no dataset (it holds {foreign[0]}); choose another folder")


def check_same_work(out: Path, record: dict, retry: bool) -> None:
    """Raises ValueError if the unfinished dataset in `out` is made with other settings or from another source."""
    _check_same(out, read_work(out), record, retry)


def read_work(out: Path) -> dict:
    """The settings and the source of the unfinished dataset in `out`. Raises ValueError if they can't be read."""
    try:
        found = json.loads((out / WORK).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{out / WORK}: not JSON ({error}); remove {out} and start again") from None
    return found if isinstance(found, dict) else {}


def _check_same(out: Path, found: dict, record: dict, retry: bool) -> None:
    differ = [key for key in sorted({*record, *found}) if record.get(key) != found.get(key)]
    differ = [key for key in differ if not (retry and key == "source_sizes")]
    if record.get("batch") == 0:  # whatever the first job has chosen
        differ = [key for key in differ if key != "batch"]
    if differ:
        hashes = ("source", "source_sizes")
        changes = ", ".join(
            key if key in hashes else f"{key} ({found.get(key)}, now {record.get(key)})" for key in differ
        )
        advice = ""
        if "source" in differ:
            advice = ": the source has other videos, captions or spans now; encode it into another folder"
        elif differ == ["source_sizes"]:
            advice = ": files of the source have other sizes now; if they were mended, run it with --retry"
        raise ValueError(f"{out}: holds another dataset, it differs in {changes}{advice}")


def parse_job(text: str) -> tuple[int, int]:
    """(i, n) from "i/n": job i of n, counted from 0."""
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and int(number) < int(count)):
        raise ValueError(f"job {text!r}: expected I/N, job I of N, counted from 0, such as 0/4")
    return int(number), int(count)


def clear(out: Path) -> None:
    """Removes all that `encode` wrote into `out`, which holds no finished dataset."""
    remove_leftovers(out)
    for name in (CODEC_FILE, INDEX, FAILURES, WORK, LOCK):
        (out / name).unlink(missing_ok=True)
    for path in (*out.glob("shard-*"), *out.glob("survey-*"), *out.glob(f"{LISTING}*")):
        path.unlink(missing_ok=True)


def discard(out: Path) -> None:
    """Removes the dataset of a bucket, if there is one, finished or not."""
    (out / CARD).unlink(missing_ok=True)
    clear(out)
    with contextlib.suppress(OSError):  # not there, or something else is in it
        out.rmdir()


def remove_leftovers(out: Path) -> None:
    """Removes the temporary files that killed jobs left in `out`."""
    for path in out.glob("*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            if is_abandoned(path):
                path.unlink()
