"""What a run writes while it trains: `metrics.jsonl`, a progress bar on rank 0, and wandb."""

import json
import math
import threading
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep.files import write_atomic
from rf_train import config
from rf_train.config import Recipe


class RunLog:
    """The log of a run. Only rank 0 writes; on other ranks every call does nothing."""

    patience = 3.0  # seconds that wandb has to end after a failure

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
        self.wandb: Any = None
        if recipe.run.wandb != "disabled":
            import wandb

            self.wandb = wandb.init(
                project=recipe.run.wandb_project,
                name=out.name,
                dir=str(out),
                mode=recipe.run.wandb,  # type: ignore[arg-type]
                config=config.to_dict(recipe),
                settings=wandb.Settings(silent=True, console="off"),
            )
        self.clock = time.perf_counter()

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
        self.file.write(json.dumps(row, allow_nan=False) + "\n")
        self.bar.update()
        loss = "none" if row["loss"] is None else f"{row['loss']:.4f}"
        self.bar.set_postfix_str(f"{stage} loss {loss} {row['samples_per_s']:.1f} samples/s", refresh=False)
        if self.wandb is not None:
            self.wandb.log(_flat(row), step=step + 1)

    def print_line(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if self.active:
            self.bar.write(text)

    def close(self, failed: bool = False) -> None:
        """Ends the log. After a failure wandb has little time: other ranks may wait for the end of this process."""
        if not self.active:
            return
        self.bar.close()
        self.file.close()
        if self.wandb is not None and failed:
            ending = threading.Thread(target=self.wandb.finish, kwargs={"exit_code": 1}, daemon=True)
            ending.start()
            ending.join(self.patience)
        elif self.wandb is not None:
            self.wandb.finish()


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
    """The rows of a metrics.jsonl. A last line that was cut by a crash is left out."""
    rows: list[dict] = []
    if path.is_file():
        for line in path.read_text(errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                break
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                break
            rows.append(row)
    return rows


def drop_rows_after(path: Path, step: int) -> None:
    """Removes the rows of steps after `step`, which the run is about to repeat."""
    if path.is_file():
        rows = [row for row in read_rows(path) if row["step"] <= step]
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))
