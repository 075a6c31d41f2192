"""What a run writes while it trains: `metrics.jsonl`, a progress bar on rank 0, and wandb."""

import json
import math
import re
import sys
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep.command import one_line, printable
from data_prep.files import write_atomic
from rf_train import config
from rf_train.config import Recipe

WANDB_START = 30.0  # seconds that wandb's server has to answer at the start


class RunLog:
    """The log of a run. Only rank 0 writes; on other ranks every call does nothing."""

    patience, patience_after_failure = 60.0, 3.0  # seconds that wandb has to end

    def __init__(self, recipe: Recipe, first_step: int, rank: int):
        self.active = rank == 0
        if not self.active:
            return
        out = Path(recipe.run.out)
        self.path = out / "metrics.jsonl"
        drop_rows_after(self.path, first_step)
        self.file = open(self.path, "a", buffering=1)  # noqa: SIM115  closed by `close`
        bar = {"unit": "step", "dynamic_ncols": True, "smoothing": 0.1, "mininterval": 0.5}
        self.bar = tqdm(total=recipe.steps, initial=first_step, **bar)
        self.wandb = start_wandb(recipe) if recipe.run.wandb != "disabled" else None
        self.clock = time.perf_counter()
        self.lost = False  # whether a row could not be written

    def log(self, step: int, stage: str, clips: int, metrics: dict) -> None:
        """Writes the metrics of the 0-based `step` of `clips` clips: numbers, lists, None for what wasn't measured.

        "evaluation" is a dict of such. The time that it took doesn't count as the step's.
        """
        if not self.active:
            return
        now = time.perf_counter()
        evaluation = metrics.get("evaluation")
        seconds, self.clock = now - self.clock - (evaluation["seconds"] if evaluation else 0.0), now
        row = {"step": step + 1, "stage": stage, "seconds": seconds, "samples_per_s": clips / seconds, **metrics}
        row = _without_nan(row)
        self._write(json.dumps(row, allow_nan=False) + "\n")
        with suppress(OSError):  # who read it is gone
            self.bar.update()
        loss = "none" if row["loss"] is None else f"{row['loss']:.4f}"
        self.bar.set_postfix_str(f"{stage} loss {loss} {row['samples_per_s']:.1f} samples/s", refresh=False)
        if self.wandb is not None:
            try:
                self.wandb.log(_flat(row), step=step + 1)
            except Exception as error:  # of any kind: training matters more
                self.print_line(printable(f"wandb has failed, and gets nothing more: {error}"))
                self.wandb = None

    def _write(self, line: str) -> None:
        """Writes a row. A full disk is no reason to stop; it is told once."""
        try:
            self.file.write(line)
        except OSError as error:
            if not self.lost:
                self.print_line(printable(f"{self.path}: rows are lost: {error}"))
            self.lost = True

    def print_line(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if self.active:
            with suppress(OSError):
                self.bar.write(text)

    def close(self, failed: bool = False) -> None:
        """Ends the log. wandb has little time: its server may be away, and other ranks may wait for this process."""
        if not self.active:
            return
        for end in (self.bar.close, self.file.close):
            with suppress(OSError):
                end()
        if self.wandb is not None:
            ending = threading.Thread(target=self.wandb.finish, kwargs={"exit_code": int(failed)}, daemon=True)
            ending.start()
            ending.join(self.patience_after_failure if failed else self.patience)
            if ending.is_alive() and not failed:
                print("wandb's server doesn't answer; `wandb sync` sends what is in the run's folder", file=sys.stderr)


def start_wandb(recipe: Recipe) -> Any:
    """wandb's run; None when wandb fails. A run that is resumed goes on in the same one, whose id is in RUN/wandb_id.

    wandb leaves out the rows of steps that are done again. When its server is away, the run is logged offline.
    """
    import wandb

    out = Path(recipe.run.out)
    path = out / "wandb_id"
    name = path.read_text(errors="replace").strip() if path.is_file() else ""
    if not re.fullmatch(r"\w{1,64}", name):
        name = uuid.uuid4().hex[:16]
        write_atomic(path, name)
    modes = ["online", "offline"] if recipe.run.wandb == "online" else ["offline"]
    for mode in modes:
        try:
            return wandb.init(
                project=recipe.run.wandb_project,
                id=name,
                resume="allow" if mode == "online" else None,
                name=out.name,
                dir=str(out),
                mode=mode,  # type: ignore[arg-type]
                config=config.to_dict(recipe),
                settings=wandb.Settings(silent=True, console="off", init_timeout=WANDB_START),
            )
        except Exception as error:  # of any kind: training matters more
            what = "wandb.online failed; logging offline, for `wandb sync`" if mode == "online" else "wandb failed"
            print(f"{what}: {one_line(error)}", file=sys.stderr)
            wandb.teardown()
    return None


def _without_nan(value: Any) -> Any:
    """The same with None for what isn't finite: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(row: dict) -> dict:
    """A row as wandb takes it: lists as "name/0", "name/1", ..., dicts as "name/key", and nothing that is None."""
    flat = {}
    for key, value in row.items():
        if isinstance(value, list):
            value = {str(i): part for i, part in enumerate(value)}
        if isinstance(value, dict):
            flat.update({f"{key}/{name}": part for name, part in _flat(value).items()})
        elif value is not None:
            flat[key] = value
    return flat


def read_rows(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl. Lines that aren't readable, such as one that a crash has cut, are left out."""
    rows: list[dict] = []
    if path.is_file():
        for line in path.read_text(errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


def drop_rows_after(path: Path, step: int) -> None:
    """Removes the rows of steps after `step`, which the run is about to repeat. Says which lines are not readable."""
    if path.is_file():
        found = read_rows(path)
        rows = [row for row in found if row["step"] <= step]
        lost = len(path.read_text(errors="replace").rstrip("\n").splitlines()) - len(found)
        if lost:
            print(f"{path}: {lost} lines are not readable, and are left out", file=sys.stderr)
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))
