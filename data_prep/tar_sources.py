"""Webdataset shards of videos as a list of videos: local tars, and remote ones, whose lists are kept.

    DATASET/listing-HASH.json     the videos in one remote tar: places, captions, spans; with the tar's size and version

The headers of a remote tar are read once for all jobs. Jobs that start at once list different tars first, and take what
others have listed. A tar that has another size or version than its list is listed anew.
"""

import hashlib
import json
import os
import random
import re
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm
from webdataset.shardlists import expand_urls

from data_prep.card import CARD, card_hash
from data_prep.files import write_atomic
from data_prep.places import Place, Remote, place_of, size_and_version
from data_prep.rows import SUFFIXES, Row, as_utf8, captions_of, cuts_of, span_in
from data_prep.tars import LARGEST_TEXT, Member, tar_members
from data_prep.work import LISTING, WORK

LISTERS = 8  # remote tars that are listed at once
KEPT = ("caption", "start", "end", "problem", "captions", "region", "cuts")  # of a row, besides its name in the tar


def is_address(text: str) -> bool:
    """Whether webdataset would take `text` for a command or an address elsewhere."""
    return text.startswith("pipe:") or re.match(r"[a-z][a-z0-9+.-]*:/", text, re.IGNORECASE) is not None


def expand(pattern: str) -> list[Place]:
    """The .tar files of a pattern in webdataset's notation. Raises ValueError unless all local ones exist."""
    try:
        names = expand_urls(pattern)
    except (ValueError, AssertionError) as error:  # unbalanced braces; a variable of the environment that isn't set
        raise ValueError(f"{pattern}: not a pattern of .tar files ({error})") from None
    places = [place_of(name) if is_address(name) else Path(name) for name in names]
    missing = [place for place in places if isinstance(place, Path) and not place.is_file()]
    if missing or not places:
        more = f", nor are {len(missing) - 1} others of {len(places)}" if len(missing) > 1 else ""
        raise ValueError(f"{missing[0] if missing else pattern}: no such .tar file{more}")
    for place in places:
        if not place.name.lower().endswith(".tar"):
            hint = "; a folder there can't be listed" if isinstance(place, Remote) else ""
            raise ValueError(f"{place}: expected .tar files only{hint}, such as {{000000..000999}}.tar")
    names = [os.path.normpath(place) if isinstance(place, Path) else str(place) for place in places]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]}: {pattern} names it twice")
    return places


def rows_of_tars(tars: Sequence[Place], base: Path | None = None, listings: Path | None = None) -> list[Row]:
    """The rows of shards, in order, named `shard.tar/KEY.mp4` with the shard's path from `base` on.

    Without `base` it is the lowest folder that all are in. Lists of remote ones are kept in the folder `listings`,
    unless this holds a dataset of other shards. Raises ValueError for what is no tar; waits for servers that are away.
    """
    names = [place.path if isinstance(place, Remote) else place.as_posix() for place in tars]
    if len({place.scheme if isinstance(place, Remote) else "" for place in tars}) > 1:  # from several worlds
        names = [str(place) for place in tars]
    else:
        within = base or os.path.commonpath([os.path.dirname(name) for name in names]) if names else ""
        names = [os.path.relpath(name, within) for name in names]
    if any(isinstance(place, Remote) for place in tars):
        found = list_remote(tars, names, listings)
    else:
        found = [list(rows_of_tar(place, name)) for place, name in zip(tars, names)]
    return [replace(row, index=index) for index, row in enumerate(row for rows in found for row in rows)]


def rows_of_tar(path: Place, shard: str) -> Iterator[Row]:
    """The rows of one shard, numbered 0. If the shard is cut short or damaged, the last row says so.

    Then the last sample before the damage is not used: its caption may be behind.
    """
    try:
        members = list(tar_members(path))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
    counts = Counter(member.name for member in members)
    named = {member.name: member for member in members}  # the last of a name, as for tar
    unsure = os.path.splitext(members[-2].name)[0] if len(members) > 1 and not members[-1].name else None
    for name, member in named.items():
        key, suffix = os.path.splitext(name)
        if not name:
            yield Row(0, path, as_utf8(shard), "", problem=member.problem)
        elif suffix.lower() in SUFFIXES:
            beside = [named[key + end] for end in (".txt", ".json") if key + end in named]
            start, end, problem = 0.0, None, ""
            captions: tuple[str, ...] = ("",)
            cuts: tuple[float, ...] = ()
            try:
                for one in (member, *beside):
                    if one.problem or counts[one.name] > 1:
                        what = "" if one is member else f"{one.name[len(key) :]}: "
                        raise ValueError(what + (one.problem or "the tar holds it twice"))
                if key == unsure:
                    raise ValueError("cut short: behind it the tar ends or is damaged")
                captions, start, end, cuts = annotation(beside)
            except ValueError as error:
                problem = str(error)
            several, region = captions[1:] and captions, (member.offset, member.size)
            yield Row(0, path, as_utf8(f"{shard}/{name}"), captions[0], start, end, problem, several, region, cuts)


def annotation(members: list[Member]) -> tuple[tuple[str, ...], float, float | None, tuple[float, ...]]:
    """(captions, start, end, cuts) from a sample's .txt and .json. Raises ValueError if they make no sense."""
    text, entry = "", {}
    for member in members:
        suffix = os.path.splitext(member.name)[1]
        if member.size > LARGEST_TEXT:
            raise ValueError(f"{suffix}: {member.size} bytes are too many, at most {LARGEST_TEXT}")
        if suffix == ".txt":
            text = member.text.decode(errors="replace")
            continue
        try:
            entry = json.loads(member.text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{suffix}: does not parse ({error})") from None
        if not isinstance(entry, dict):
            raise ValueError(f"{suffix}: not an object")
    first = text.strip() or entry.get("caption") or entry.get("text") or ""
    return captions_of(str(first), entry), *span_in(entry), cuts_of(entry)


# ---- lists of remote tars


def list_remote(tars: Sequence[Place], names: list[str], listings: Path | None) -> list[list[Row]]:
    """The rows of each tar, several tars at once, from the lists in `listings` where these are up to date."""
    kept = {place: listings / listing_name(place) for place in tars} if listings else {}
    taken = listings is not None and ((listings / WORK).exists() or (listings / CARD).exists())
    if taken and not any(path.exists() for path in kept.values()):
        kept = {}  # another dataset, or one whose lists are gone: nothing is written into it
    order = random.SystemRandom().sample(range(len(tars)), len(tars))
    jobs: list[Future[list[Row]]] = [Future() for _ in tars]

    def work() -> None:
        while True:
            try:
                number = order.pop()
            except IndexError:  # nothing is left
                return
            try:
                jobs[number].set_result(list_one(tars[number], kept.get(tars[number])))
            except Exception as error:
                jobs[number].set_exception(error)

    for _ in range(min(LISTERS, len(tars))):  # daemons: who is interrupted does not wait for a server that is away
        threading.Thread(target=work, name="lister", daemon=True).start()
    try:
        found = [job.result() for job in tqdm(jobs, desc="list", unit="tar", leave=False, disable=None)]
    finally:
        order.clear()
    return [[replace(row, source=as_utf8(name) + row.source) for row in rows] for name, rows in zip(names, found)]


def listing_name(place: Place) -> str:
    """The name of the file that keeps the list of a tar."""
    return f"{LISTING}{hashlib.sha256(str(place).encode()).hexdigest()[:24]}.json"


def list_one(place: Place, path: Path | None) -> list[Row]:
    """The rows of one tar, with names from the tar's own on, such as "/KEY.mp4"; from its list, or read and kept."""
    if isinstance(place, Path):
        return list(rows_of_tar(place, ""))
    try:
        size, version = size_and_version(place)
    except OSError as error:
        raise ValueError(f"{place}: cannot be read ({error.strerror or error})") from None
    of = {"tar": str(place), "bytes": size, "version": version}
    rows = read_listing(path, place, of) if path else None
    if rows is None:
        rows = list(rows_of_tar(place, ""))
        if path:
            record = {**of, "videos": [[row.source, *(getattr(row, name) for name in KEPT)] for row in rows]}
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps({**record, "hash": card_hash(record)}))
    return rows


def read_listing(path: Path, place: Place, of: dict) -> list[Row] | None:
    """The rows that a list holds. None if it is not there, not whole, or of another tar than `of` says."""
    try:
        record = json.loads(path.read_bytes())
        if record["hash"] != card_hash(record) or any(record[key] != value for key, value in of.items()):
            return None
        rows = []
        for source, *values in record["videos"]:
            own: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value for name, value in zip(KEPT, values)
            }
            rows.append(Row(0, place, source, **own))
        return rows
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
