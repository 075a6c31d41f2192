"""What must be known of all videos before the first one is encoded: sizes of pictures for buckets, and duplicates.

    DATASET/survey-000000.json     what was found of PIECE videos, with its own hash

One job makes the survey, under the lock of the dataset, and the others wait. A killed one goes on behind the last whole
piece. What was found once is kept: all jobs put a video into the same bucket, and leave out the same duplicates.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from data_prep.buckets import Size, nearest_bucket
from data_prep.card import card_hash
from data_prep.decoder import Decoders
from data_prep.decoder_worker import Span
from data_prep.files import write_atomic
from data_prep.places import Place, pieces
from data_prep.rows import DUPLICATE, Row, bytes_of
from data_prep.tars import Region
from data_prep.video import Problem

PIECE = 1024  # videos


File = tuple[Place, tuple[int, int] | None]  # a row's path and region


class Fact(NamedTuple):
    """What is known of a video: bytes of its file, its picture's (height, width), the SHA-256 of its bytes."""

    bytes: int | None
    picture: Size | None = None
    sha256: str | None = None
    problem: Problem | None = None  # why something can't be known


def file_of(row: Row) -> File:
    """Where a video's bytes are."""
    return row.path, row.region


def survey(
    folder: Path, rows: list[Row], buckets: Sequence[Size], drop_duplicates: bool, workers: int, retry: bool = False
) -> list[Row]:
    """The same rows, each with the size of its bucket; duplicates, and what can't be read, with the reason.

    Videos that can't be read are of the first bucket. Of videos with the same bytes and span the first one stays. Only
    files of equal size are read for that. `retry`: what could not be read, or has another size now, is looked at again.
    """
    if not buckets and not drop_duplicates:
        return rows
    bytes_by_file = {file_of(row): bytes_of(row) for row in rows}
    files_by_bytes = Counter(bytes_by_file.values())
    found: list[Row] = []
    first: dict[tuple, Row] = {}
    for number in tqdm(range(0, len(rows), PIECE), desc="survey", unit="piece", leave=False, disable=None):
        piece = rows[number : number + PIECE]
        unsure = [drop_duplicates and files_by_bytes[bytes_by_file[file_of(row)]] > 1 for row in piece]
        facts = piece_of(folder / f"survey-{number // PIECE:06d}.json", piece, unsure, bool(buckets), workers, retry)
        for row, fact in zip(piece, facts):
            if fact.problem:
                row = replace(row, reason=fact.problem.reason, problem=fact.problem.detail)
            if buckets:
                row = replace(row, size=nearest_bucket(fact.picture, buckets) if fact.picture else buckets[0])
            if drop_duplicates and not row.trouble:
                same = first.setdefault((fact.sha256 or file_of(row), row.start, row.end), row)
                if same is not row:
                    row = replace(row, reason=DUPLICATE, problem=f"of {same.source}")
            found.append(row)
    return found


def piece_of(path: Path, rows: list[Row], unsure: list[bool], pictures: bool, workers: int, retry: bool) -> list[Fact]:
    """The facts of the videos of a piece, from its file, or else found and written there.

    `unsure`: of which the hash is needed. `pictures`: whether sizes of pictures are.
    """
    known: Sequence[Fact | None] = read_piece(path, len(rows)) or [None] * len(rows)
    todo: dict[File, Row] = {}  # a row of each file to look at, however many spans of it there are
    to_hash: set[File] = set()
    for row, fact, hash_it in zip(rows, known, unsure):
        stale = fact is None or (retry and (fact.problem is not None or fact.bytes != bytes_of(row)))
        if stale or (hash_it and fact is not None and not (fact.sha256 or fact.problem)):
            todo[file_of(row)] = row
            to_hash |= {file_of(row)} if hash_it else set()
    if todo:
        found = {file: Fact(bytes_of(row), problem=row.trouble) for file, row in todo.items()}
        for wanted, ask in ((set(todo) if pictures else set(), find_pictures), (to_hash, hashes)):
            files = [file for file in todo if file in wanted and not found[file].problem]
            for file, answer in zip(files, ask([todo[file] for file in files], workers) if files else ()):
                found[file] = found[file]._replace(**answer)
        known = [found.get(file_of(row), fact) for row, fact in zip(rows, known)]
        write_piece(path, known)
    return [fact for fact in known if fact is not None]


def find_pictures(rows: list[Row], workers: int) -> list[dict]:
    """The (height, width) of each video's picture, or a problem, found in processes of their own."""
    spans = (Span(row.path, 1, (1, 1), 1, region=row.region, only_size=True) for row in rows)
    found: list[dict] = []
    with Decoders(workers) as decoders:
        for video in decoders.videos(spans):
            next(video, None)  # there is no clip: it waits for the end
            found.append({"picture": video.picture} if video.picture else {"problem": video.problem})
    return found


def hashes(rows: list[Row], workers: int) -> list[dict]:
    """The SHA-256 of each video's bytes, or a problem."""

    def one(row: Row) -> dict:
        digest = hashlib.sha256()
        try:
            for piece in row.video.pieces() if isinstance(row.video, Region) else pieces(row.video):
                digest.update(piece)
        except FileNotFoundError:
            return {"problem": Problem("missing", "")}
        except OSError as error:
            return {"problem": Problem("unreadable", error.strerror or str(error))}
        return {"sha256": digest.hexdigest()}

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(one, rows))


def write_piece(path: Path, facts: Sequence[Fact | None]) -> None:
    """Writes the facts of a piece, as a whole."""
    entries = [fact and [*fact[:3], fact.problem and [fact.problem.reason, fact.problem.detail]] for fact in facts]
    record = {"videos": entries}
    write_atomic(path, json.dumps({**record, "hash": card_hash(record)}))


def read_piece(path: Path, count: int) -> list[Fact] | None:
    """The facts of a piece of `count` videos. None if there is no whole file of them."""
    try:
        record = json.loads(path.read_bytes())
        if record["hash"] != card_hash(record) or len(record["videos"]) != count:
            return None
        return [
            Fact(size, picture and (picture[0], picture[1]), sha256, problem and Problem(*problem))
            for size, picture, sha256, problem in record["videos"]
        ]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
