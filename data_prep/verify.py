"""Checks datasets byte by byte.

    python -m data_prep.verify DATASET [DATASET ...]

The card, the index, every shard's size and hash, every sample's bytes, shapes and values. Each problem is one line; the
exit code is 2 if there is any.
"""

import argparse
import sys
from collections.abc import Iterator

from tqdm import tqdm

from data_prep.card import check_sample, read_card
from data_prep.command import printable, run_command
from data_prep.index import SampleIndex
from data_prep.places import Place, place_of, size_and_sha256
from data_prep.shards import SampleError, read_sample


def problems(folder: str | Place) -> Iterator[str]:
    """Yields one line for everything that is wrong in a dataset. Reads the whole dataset twice at most."""
    try:
        card = read_card(folder)
        index = SampleIndex(folder, card)
    except ValueError as error:
        yield str(error)
        return
    keys: set[str] = set()
    for number, shard in enumerate(tqdm(card["shards"], desc="verify", unit="shard", leave=False, disable=None)):
        path = place_of(folder) / shard["file"]
        entries = index.of_shard(number)
        for entry in entries:
            if entry.key in keys:
                yield f"{path}: {entry.key}: not the only sample of this name"
            keys.add(entry.key)
            try:
                sample = read_sample(path, entry)
                check_sample(card, f"{path}: {entry.key}", sample)
                if sample.meta.get("codec") not in (None, card["codec"]["hash"]):
                    raise SampleError(f"{path}: {entry.key}", "malformed", "made by another codec than the card's")
            except SampleError as error:
                yield str(error)
                if error.reason in ("missing", "unreadable"):
                    break
        else:
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
