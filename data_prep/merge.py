"""Makes one dataset of several, without reading a latent.

    python -m data_prep.merge OUT DATASET DATASET ...

Shards are hard-linked, or copied where that is impossible, and numbered anew. Cards and indices become one: videos are
counted on from dataset to dataset, so names stay unique. What the shards hold stays as it was; `first_video` of a shard
in the card says by how much its videos are counted on.

The datasets must be made by the same codec and text encoder, with the same sizes. Running the command again does
nothing, or finishes an interrupted merge. The card is written last.
"""

import argparse
import contextlib
import json
import os
import shutil
import sys
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from data_prep.card import CARD, SCHEMA, read_card, write_card
from data_prep.command import GOES_ON, printable, run_command
from data_prep.default_codec import CODEC_FILE
from data_prep.files import locked, sha256_of_file, sync, temporary_beside, write_atomic, write_json
from data_prep.index import SampleIndex, write_rows
from data_prep.places import local_folder
from data_prep.work import FAILURES, LOCK, WORK, remove_leftovers

SAME = ("codec", "latent", "video", "text", "empty_caption")  # sections of the card that must agree
LAST_VIDEO = 2**32 - 1  # the index has 32 bits for a video's number


class Part(NamedTuple):
    """A dataset to merge: its folder, card and index, and the number that its video 0 has in the merged one."""

    folder: Path
    card: dict
    samples: SampleIndex
    first_video: int

    @property
    def name(self) -> dict:
        """As the merged dataset's card records it."""
        return {"path": str(self.folder.absolute()), "card": self.card["hash"]}


def merge(out: str | Path, folders: list[str] | list[Path], copy: bool = False) -> dict:
    """Merges datasets into the folder `out`, in this order. Returns the card.

    `copy`: shards are copied, not linked. Raises a one-line ValueError for datasets that don't fit one another, and for
    an `out` that holds anything else.
    """
    out = Path(out)
    if len(folders) < 2:
        raise ValueError("merge needs two datasets at least")
    parts = open_parts([Path(folder) for folder in folders])
    record = {"merged": [part.name for part in parts]}
    if stands_already(out, record):
        print(f"{out}: this merge exists already, nothing to do")
        return read_card(out)
    with locked(out / LOCK, lambda: print(f"{out}: waiting for another merge into it", file=sys.stderr)):
        if stands_already(out, record):
            return read_card(out)
        write_json(out / WORK, record)
        shards = merge_shards(out, parts, copy)
        sync(out)
        merge_failures(out, parts)
        merge_codec(out, parts, copy)
        rows = np.concatenate([shifted(part) for part in parts])
        first = parts[0].card
        card = {
            "schema": SCHEMA,
            **{section: first[section] for section in SAME},
            "counts": {**total([part.card["counts"] for part in parts]), "shards": len(shards)},
            "shards": shards,
            "index": write_rows(out, rows),
            "source": {"path": "", "settings": record},
        }
        card = write_card(out, card)
        remove_leftovers(out)
    return card


def open_parts(folders: list[Path]) -> list[Part]:
    """The datasets, checked against one another. Raises ValueError that says what differs, and where."""
    parts: list[Part] = []
    first_video = 0
    for folder in folders:
        card = read_card(folder)
        part = Part(folder, card, SampleIndex(folder, card), first_video)
        parts.append(part)
        # The highest number counts, too: a damaged card must not make two samples of one name.
        first_video += max(card["counts"]["videos"], int(part.samples.rows["video"].max()) + 1)
        if first_video - 1 > LAST_VIDEO:
            raise ValueError(f"{folder}: more than {LAST_VIDEO + 1} videos together, the index can't number them")
        differs = differences(parts[0].card, card)
        if differs:
            raise ValueError(f"{parts[0].folder} and {folder} don't fit together, they differ in {', '.join(differs)}")
        for shard in card["shards"]:
            path = folder / shard["file"]
            if not path.is_file() or path.stat().st_size != shard["bytes"]:
                raise ValueError(f"{path}: missing or not of the {shard['bytes']} bytes that the card says")
    for one, other in combinations(parts, 2):
        known = {shard["sha256"]: shard["file"] for shard in one.card["shards"]}
        for shard in other.card["shards"]:
            if shard["sha256"] in known:
                twice = f"{one.folder / known[shard['sha256']]} and {other.folder / shard['file']}"
                raise ValueError(f"{twice} are the same shard; merged, its clips would be there twice")
    return parts


def differences(one: dict, other: dict) -> list[str]:
    """What must agree in two cards and does not: such as "video.fps (16, 8)". Where weights lie does not matter."""
    found = []
    for section in SAME:
        mine, its = one[section], other[section]
        if not isinstance(mine, dict):
            found += [] if mine == its else [section]
            continue
        for key in sorted({*mine, *its} - {"folder"}):
            a, b = mine.get(key), its.get(key)
            if a != b:
                short = all(isinstance(value, (str, int, float)) for value in (a, b))
                found.append(f"{section}.{key}" + (f" ({a!s:.12}, {b!s:.12})" if short else ""))
    return found


def stands_already(out: Path, record: dict) -> bool:
    """Whether `out` holds this merge, finished. Raises ValueError if it holds anything else, finished or not."""
    if (out / CARD).exists():
        found = read_card(out)["source"]["settings"]
    elif (out / WORK).exists():
        try:
            found = json.loads((out / WORK).read_bytes())
        except ValueError as error:
            raise ValueError(f"{out / WORK}: not JSON ({error}); remove {out} and start again") from None
    else:
        names = sorted(set(os.listdir(out)) - {LOCK}) if out.is_dir() else []
        names = [name for name in names if not name.startswith(WORK)]  # a merge that was killed at its very start
        if names or (out.exists() and not out.is_dir()):
            raise ValueError(f"{out}: exists and is no dataset; choose another folder")
        return False
    if found != record:
        raise ValueError(f"{out}: holds another dataset than this merge; choose another folder")
    return (out / CARD).exists()


def merge_shards(out: Path, parts: list[Part], copy: bool) -> list[dict]:
    """Links or copies all shards. Returns their entries for the card."""
    entries: list[dict] = []
    found = [(part, shard) for part in parts for shard in part.card["shards"]]
    for part, shard in tqdm(found, "merge", unit="shard", leave=False, disable=None):
        path = out / f"shard-{len(entries):06d}.tar"
        if not path.exists() or path.stat().st_size != shard["bytes"]:
            place(part.folder / shard["file"], path, shard["sha256"], copy)
        first_video = part.first_video + shard.get("first_video", 0)
        content = {key: shard[key] for key in ("samples", "bytes", "sha256")}
        entries.append({"file": path.name, **content, "first_video": first_video})
    return entries


def place(source: Path, path: Path, sha256: str, copy: bool) -> None:
    """Gives a file a second name, or copies it where that is impossible. A copy is checked against `sha256`."""
    path.unlink(missing_ok=True)
    if not copy:
        with contextlib.suppress(OSError):  # another file system, or one without links
            os.link(os.path.realpath(source), path)
            return
    temporary = temporary_beside(path)
    try:
        shutil.copyfile(source, temporary)
        sync(temporary)
        if sha256 and sha256_of_file(temporary) != sha256:
            raise ValueError(f"{source}: its sha256 is not the card's")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def merge_failures(out: Path, parts: list[Part]) -> None:
    """Writes the failures of all datasets; "dataset" says of which. One that is merged itself has said so already."""
    lines = []
    for part in parts:
        path = part.folder / FAILURES
        if not path.is_file():
            if part.card["counts"]["skipped"]:
                print(printable(f"{path}: not here; its failures are counted, but not listed"), file=sys.stderr)
            continue
        for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
            try:
                failure = json.loads(line or "{}")
                if failure:
                    lines.append(json.dumps({"dataset": part.name["path"], **failure}, ensure_ascii=False) + "\n")
            except (ValueError, TypeError, RecursionError) as error:
                raise ValueError(f"{path} line {number}: not a failure ({error})") from None
    write_atomic(out / FAILURES, "".join(lines))


def merge_codec(out: Path, parts: list[Part], copy: bool) -> None:
    """Takes over the built-in codec, which has the same hash in all datasets, from the first that has it."""
    if parts[0].card["codec"]["name"] != "default":
        return
    have = [part.folder / CODEC_FILE for part in parts if (part.folder / CODEC_FILE).is_file()]
    if have:
        place(have[0], out / CODEC_FILE, "", copy)
    else:
        print(f"{CODEC_FILE}: in none of the datasets; what is merged can't be decoded without it", file=sys.stderr)


def shifted(part: Part) -> np.ndarray:
    """The rows of a dataset's index, with its videos counted on."""
    rows = np.array(part.samples.rows)
    rows["video"] += np.uint32(part.first_video)
    return rows


def total(counts: list[dict[str, Any]]) -> dict[str, Any]:
    """The sums of counts, also of those within counts. One that is missing counts as 0."""
    summed: dict[str, Any] = {}
    for one in counts:
        for key, value in one.items():
            if isinstance(value, dict):
                summed[key] = dict(sorted(total([summed.get(key, {}), value]).items()))
            else:
                summed[key] = round(summed.get(key, 0) + value, 6)
    return summed


def main(arguments: list[str] | None = None) -> int:
    description = "Makes one dataset of several, without reading a latent."
    parser = argparse.ArgumentParser(prog="data_prep.merge", description=description)
    parser.add_argument("out", help="folder to write the merged dataset to")
    parser.add_argument("datasets", nargs="+", metavar="DATASET", help="two or more, in this order")
    parser.add_argument("--copy", action="store_true", help="copy the shards; else they are hard-linked if possible")
    options = parser.parse_args(arguments)
    return run_command(lambda: merge_as_asked(options), GOES_ON)


def merge_as_asked(options: argparse.Namespace) -> None:
    """What the command line asks for. Prints a line on what was made."""
    datasets = [local_folder(folder, "data_prep.merge") for folder in options.datasets]
    counts = merge(options.out, datasets, options.copy)["counts"]
    print(
        f"{options.out}: {counts['samples']} samples in {counts['shards']} shards, of {len(options.datasets)} datasets"
    )


if __name__ == "__main__":
    sys.exit(main())
