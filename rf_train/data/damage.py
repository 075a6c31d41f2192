"""Samples that can't be read as they were written: named, counted, listed for repair; too many of them end the run."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rf_train.engine.collectives import RunError

LIST = "damaged.jsonl"
SPARED = 10  # so few never end a run


class TooMuchDamage(RunError):
    """Too large a share of the samples that a run read is damaged."""


@dataclass(frozen=True)
class Damage:
    """A sample that could not be read as it was written, and the one that took its place."""

    id: str  # of the place: sample and epoch
    dataset: str
    shard: str
    sample: str
    reason: str
    detail: str
    replaced_by: str

    def line(self) -> str:
        """As a line of JSON."""
        return json.dumps(asdict(self))

    def __str__(self) -> str:
        detail = f" ({self.detail})" if self.detail else ""
        return f"{self.dataset}/{self.shard}: {self.sample}: {self.reason}{detail}; replaced by {self.replaced_by}"


class DamageLog:
    """What a run has found damaged since it started. All ranks count the same."""

    def __init__(self, out: str | Path, largest_share: float):
        self.path, self.largest_share = Path(out) / LIST, largest_share
        self.read = self.damaged = 0

    def add(self, clips: int, damaged: int) -> None:
        """Counts a step: the clips that all ranks read, and the damaged samples among what they tried."""
        self.read += clips
        self.damaged += damaged

    def write(self, step: int, found: list[Damage]) -> None:
        """Appends to RUN/damaged.jsonl what was found in a 1-based step. For rank 0."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps({"step": step, **asdict(damage)}) + "\n" for damage in found)

    def check(self) -> None:
        """Raises TooMuchDamage, on every rank, when the share of damaged samples is too large."""
        if self.damaged > max(SPARED, self.largest_share * self.read):
            raise TooMuchDamage(
                f"{self.damaged} damaged samples among {self.read} clips since the start, more than "
                f"data.max_damaged={self.largest_share:g} of them; {self.path} lists them. Check the datasets with "
                "`python -m data_prep.verify`, restore the shards, and run the same command again"
            )
