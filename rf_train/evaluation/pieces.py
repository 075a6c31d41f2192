"""An evaluation in pieces, which any number of processes make, and which survive a kill.

    OUT/evaluation.json    what all pieces say together; it appears when all of them are there
    OUT/.pieces/           job.json: what is evaluated, and how; and a file for each piece, whole when it is there
    OUT/.locks/            who makes what now

A piece is the same whoever makes it, and the result is made from the files of all pieces. So it is the same bytes for
any number of processes, killed or not.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.files import write_json
from rf_train.engine.shared_work import Busy, claimed, held

RESULT, PREVIOUS = "evaluation.json", "evaluation.previous.json"


@dataclass(frozen=True)
class Pieces:
    """The pieces `names` of the evaluation that `identity` describes: plain JSON, all that the pieces depend on."""

    out: Path
    identity: dict[str, Any]
    names: Sequence[str]

    @property
    def folder(self) -> Path:
        return self.out / ".pieces"

    @property
    def locks(self) -> Path:
        return self.out / ".locks"

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Begins the evaluation, or joins it. What another evaluation left is removed; its result gets another name.

        Raises ValueError when a process makes another evaluation in this folder now.
        """
        with ExitStack() as stack:
            with held(self.locks / "start"):
                if _read(self.folder / "job.json") != self.identity:
                    try:
                        with held(self.locks / "running", wait=False):
                            self._begin()
                    except Busy:
                        other = "another evaluation is being made in this folder, with other settings or weights"
                        raise ValueError(f"{self.out}: {other}; wait until it has ended, or stop it") from None
                stack.enter_context(held(self.locks / "running", shared=True))
            yield

    def _begin(self) -> None:
        with suppress(FileNotFoundError):
            os.replace(self.out / RESULT, self.out / PREVIOUS)
            print(f"another evaluation was here; it is {self.out / PREVIOUS} now", file=sys.stderr)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        write_json(self.folder / "job.json", self.identity)

    def missing(self, rank: int, world_size: int) -> Iterator[str]:
        """Yields the pieces that are not there, each while its lock is held. The caller makes it, and calls `add`.

        Rank 0 comes back to those that others made, and makes what a killed process left.
        """
        first = rank * len(self.names) // world_size
        for number in claimed(self.locks, self.names, first, wait=rank == 0):
            # In this order: pieces are removed when the result is there.
            if self.read(self.names[number]) is None and not (self.out / RESULT).exists():
                yield self.names[number]

    def add(self, name: str, piece: dict[str, Any]) -> None:
        write_json(self.folder / f"{name}.json", piece)

    def read(self, name: str) -> dict[str, Any] | None:
        """A piece; None when it is not there, or not readable."""
        return _read(self.folder / f"{name}.json")

    @property
    def there(self) -> int:
        """How many pieces there are."""
        return sum((self.folder / f"{name}.json").exists() for name in self.names)

    def whole(self) -> dict[str, dict[str, Any]]:
        """All pieces by name, in order, on a rank that `missing` has left without any."""
        found = {name: self.read(name) for name in self.names}
        return {name: piece for name, piece in found.items() if piece is not None}

    def finish(self, result: dict[str, Any]) -> None:
        """Writes the result, and removes the pieces."""
        write_json(self.out / RESULT, result)
        shutil.rmtree(self.folder, ignore_errors=True)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
