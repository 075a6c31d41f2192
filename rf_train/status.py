"""A run's health at a glance:  python -m rf_train.status RUN [RUN ...]

Where it is, how fast, its loss, its last checkpoint, what went wrong, and whether a job writes it now.
"""

import argparse
import json
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from data_prep.command import run_command
from rf_train.run_status import RECENT, Checkpoint, Status, status_of


def duration(seconds: float | None) -> str:
    """Such as "3 d 4 h", "2 h 5 min", "41 s"."""
    if seconds is None:
        return "-"
    units = ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"))
    for size, name, smaller, its_name in units:
        if seconds >= size:
            rest = int(seconds % size / smaller)
            return f"{int(seconds // size)} {name}" + (f" {rest} {its_name}" if rest and size > 60 else "")
    return f"{seconds:.0f} s"


def reasons(ends: list[dict]) -> str:
    """Such as "killed 2 times, stopped by SIGTERM": the five most frequent."""
    counts = Counter(end["why"] for end in ends)
    told = [why + (f" {count} times" if count > 1 else "") for why, count in counts.most_common(5)]
    return ", ".join(told) + (f", {len(counts) - 5} other reasons" if len(counts) > 5 else "")


def loss_text(status: Status) -> str:
    change = f" ({status.loss_change:+.4f})" if status.loss_change is not None else ""
    return "-" if status.loss is None else f"{status.loss:.4f}{change}"


def checkpoint_text(found: Checkpoint | None) -> str:
    if found is None:
        return "none"
    sound = "verified" if found.check == "sha256" else "whole by its sizes"
    return f"step {found.step}, " + ("DAMAGED" if found.damage else f"{duration(found.age)} old, {sound}")


def block(status: Status) -> str:
    """A run in a few lines."""
    of_steps = "unknown" if status.steps is None else f"{status.steps:,}"
    share = f" ({status.step / status.steps:.0%})" if status.steps else ""
    lines = {"state": status.state}
    if status.writer is not None:
        job = f", job {status.writer.job}" if status.writer.job else ""
        seen = "beat" if status.writer.alive else "last beat"
        about = f"{status.writer.host}, process {status.writer.pid}{job}"
        lines["writer"] = f"{about}; {seen} {duration(status.writer.silent)} ago"
    lines["stage"] = status.stage or "none yet"
    lines["step"] = f"{status.step:,} of {of_steps}{share}"
    if status.seconds_per_step is not None:
        speed = f"{status.seconds_per_step:.3g} s per step"
        lines["speed"] = speed + (f", {status.samples_per_s:.3g} samples/s" if status.samples_per_s else "")
        if status.seconds_left:
            lines["time left"] = f"{duration(status.seconds_left)} of training at this speed"
    since = f" (against the {RECENT} steps before)" if status.loss_change is not None else ""
    lines["loss"] = loss_text(status) + since
    lines["checkpoint"] = checkpoint_text(status.checkpoint)
    lines["skipped steps"], lines["damaged samples"] = str(status.skipped), str(status.damaged)
    ended = f"; ended: {reasons(status.ends)}" if status.ends else ""
    lines["starts"] = f"{status.starts}{ended}"
    told = [f"  {name:<16}{value}" for name, value in lines.items()]
    return "\n".join([status.run, *told, *(f"  problem: {problem}" for problem in problems_of(status))])


def problems_of(status: Status) -> list[str]:
    damage = status.checkpoint.damage if status.checkpoint is not None else None
    return [*status.problems, *([damage] if damage else [])]


def table(found: list[Status]) -> str:
    """A line for each run, then the problems of all."""
    heads = ["run", "state", "stage", "step", "s/step", "loss", "left", "checkpoint", "skipped", "damaged", "starts"]
    rows = [
        [
            status.run,
            status.state if len(status.state) <= 30 else f"{status.state[:27]}...",
            status.stage or "-",
            f"{status.step}/{'?' if status.steps is None else status.steps}",
            "-" if status.seconds_per_step is None else f"{status.seconds_per_step:.3g}",
            loss_text(status),
            duration(status.seconds_left),
            checkpoint_text(status.checkpoint),
            *map(str, (status.skipped, status.damaged, status.starts)),
        ]
        for status in found
    ]
    widths = [max(len(row[column]) for row in [heads, *rows]) for column in range(len(heads))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in [heads, *rows]]
    return "\n".join([*lines, *(f"{status.run}: {problem}" for status in found for problem in problems_of(status))])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="rf_train.status", description="The health of one or more runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--json", action="store_true", help="a JSON object for each run, one per line")
    parser.add_argument(
        "--verify", action="store_true", help="read and hash the newest checkpoint; without it only sizes are checked"
    )
    options = parser.parse_args(arguments)
    return run_command(lambda: show(options))


def show(options: argparse.Namespace) -> None:
    """Prints the runs. Raises ValueError, after that, that names the paths that are none."""
    found, wrong = [], []
    for run in options.runs:
        try:
            found.append(status_of(Path(run), options.verify))
        except ValueError as error:
            wrong.append(str(error))
    if options.json:
        for status in found:
            print(json.dumps(asdict(status)))
    elif found:
        print(block(found[0]) if len(options.runs) == 1 else table(found))
    if wrong:
        raise ValueError("; ".join(wrong))


if __name__ == "__main__":
    sys.exit(main())
