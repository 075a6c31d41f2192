"""What a report is made from: a run's recipe, metrics and evaluation. All is checked: files may come from others."""

import os
from pathlib import Path
from typing import Any, NamedTuple

from rf_train import config, metrics
from rf_train.evaluation.pieces import RESULT
from rf_train.evaluation.results import CLIPS, PROMPTS, read_result
from rf_train.run_log import read_rows


class Maybe(NamedTuple):
    """A shape whose value may be None."""

    shape: Any


class Every(NamedTuple):
    """The shape of all values of a mapping."""

    shape: Any


MAYBE = Maybe(float)  # a number, or None for what wasn't measured
SERIES = [MAYBE]
# What rf_train.evaluate writes, as far as the report reads it. A file's name may be missing.
EVALUATION = {
    "clips": float,
    "fps": float,
    "given_seconds": float,
    "trained_seconds": float,
    "segments_seconds": [[float]],
    "metrics": Every([{"mean": MAYBE, "std": MAYBE}]),
    "slopes": Every({"slope": MAYBE, "low": MAYBE, "high": MAYBE}),
    "frechet": SERIES,
}
EVALUATION_ROW = {CLIPS: {"clip": str, "caption": str}, PROMPTS: {"prompt": str, "sample": float}}
HISTORY = {
    "solver_steps": float,
    "fine_solver_steps": float,
    "solver": [float],
    "truth": [float],
    "truth_fine": [float],
}
ROUTING = {"by_distance": SERIES, "first_chunk": MAYBE, "entropy": MAYBE, "mean_distance": [SERIES]}
# Of each row of metrics.jsonl.
ROW = {
    "step": float, "stage": str, "loss": MAYBE, "seconds": float, "samples_per_s": float, "rollout_share": float,
}  # fmt: skip


def check_shape(value: Any, shape: Any, where: str) -> None:
    """Raises ValueError, which names the place, when a value of a JSON file doesn't have the shape.

    A shape is `float` (any finite number that can be meant), `str`, [shape of each item], {key: shape}, or one of the
    above classes.
    """
    if isinstance(shape, Maybe):
        if value is not None:
            check_shape(value, shape.shape, where)
    elif isinstance(shape, (Every, dict)):
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected a mapping")
        for key in value if isinstance(shape, Every) else shape:
            if key not in value:
                raise ValueError(f"{where}: has no {key}")
            check_shape(value[key], shape.shape if isinstance(shape, Every) else shape[key], f"{where}: {key}")
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise ValueError(f"{where}: expected a list")
        for item in value:
            check_shape(item, shape[0], where)
    elif shape is str:
        if not isinstance(value, str):
            raise ValueError(f"{where}: expected a text")
    elif isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e15:
        raise ValueError(f"{where}: expected a number that can be meant")


def check_evaluation(found: dict, path: Path) -> None:
    """Raises ValueError when an evaluation.json isn't as rf_train.evaluate writes it."""
    where = f"{path}: not as rf_train.evaluate writes it; remove it, and evaluate again"
    check_shape(found, {**EVALUATION, "rows": [EVALUATION_ROW[path.parent.name]]}, where)
    for key, shape in (("history", HISTORY), ("routing", ROUTING)):
        check_shape(found.get(key), Maybe(shape), f"{where}: {key}")
    segments = len(found["segments_seconds"])
    lengths = {len(cells) for cells in found["metrics"].values()} | {len(found["frechet"])}
    if lengths != {segments} or any(len(span) != 2 for span in found["segments_seconds"]):
        raise ValueError(f"{where}: expected values for each of its {segments} segments")
    if not found["metrics"].keys() <= found["slopes"].keys():
        raise ValueError(f"{where}: a metric has no slope")


class RunRecord:
    """The content of a run's folder: recipe, metrics and, if it was evaluated, its evaluation.

    `evaluated`: CLIPS or PROMPTS, what the evaluation is of.
    """

    def __init__(self, folder: str, colour: str, evaluated: str = CLIPS):
        self.folder, self.colour = Path(folder), colour
        if not (self.folder / "recipe.yaml").is_file():
            raise ValueError(f"{folder}: not a run, it has no recipe.yaml")
        self.name = os.fsencode(self.folder.resolve().name).decode(errors="replace")
        # matplotlib leaves names that begin with _ out of its legends
        self.label = f"\u200b{self.name}" if self.name.startswith("_") else self.name
        self.recipe = config.load(self.folder / "recipe.yaml")
        self.rows = self.read_rows()
        self.evaluation_folder = self.folder / evaluated
        self.evaluation = read_result(self.evaluation_folder)
        if self.evaluation:
            check_evaluation(self.evaluation, self.evaluation_folder / RESULT)

    @property
    def of_prompts(self) -> bool:
        """Whether the evaluation is of videos from prompts alone, without a truth."""
        return self.evaluation_folder.name == PROMPTS

    def read_rows(self) -> list[dict]:
        """The rows of steps with a finite loss. Raises ValueError without any, and for one that can't be drawn."""
        path = self.folder / "metrics.jsonl"
        rows = read_rows(path)
        if not rows:
            raise ValueError(f"{self.folder}: its metrics.jsonl holds no steps yet")
        missing = [key for key in ROW if any(key not in row for row in rows)]
        if missing:
            raise ValueError(f"{self.folder}: its metrics.jsonl has rows without {', '.join(missing)}")
        for row in rows:
            where = f"{path}: step {row['step']}"
            check_shape(row, ROW, where)
            check_shape(row.get("evaluation"), Maybe({"clips": float}), f"{where}: evaluation")
            for key, series in (row.get("evaluation") or {}).items():
                usual = SERIES if isinstance(series, list) else MAYBE
                shape = {"segments_seconds": [[float]], "routing": Maybe({})}.get(key, usual)
                check_shape(series, shape, f"{where}: evaluation: {key}")
            for metric in metrics.METRICS:
                if metric.plot is not None and row.get(metric.name):
                    check_shape(row[metric.name], SERIES, f"{where}: {metric.name}")
        rows = [row for row in rows if row["loss"] is not None]
        if not rows:
            raise ValueError(f"{self.folder}: its metrics.jsonl holds no step with a finite loss")
        return rows

    def rows_between(self, begin: int, end: int) -> list[dict]:
        """The rows of steps begin + 1 .. end."""
        return [row for row in self.rows if begin < row["step"] <= end]

    @property
    def last_rows(self) -> list[dict]:
        """The last fifth of the last stage's rows."""
        rows = [row for row in self.rows if row["stage"] == self.rows[-1]["stage"]]
        return rows[-max(1, len(rows) // 5) :]

    def video(self, path: Path) -> Path:
        """A video of this run. Raises ValueError when it is a link that leads out of the run's folder.

        So a run that someone else has made can't put other files of this machine into a report.
        """
        if not path.resolve().is_relative_to(self.folder.resolve()) or path.suffix != ".mp4":
            raise ValueError(f"{path}: not an mp4 inside the run's folder; put a copy there, or remove it")
        return path

    def evaluation_video(self, name: object) -> Path:
        """A video that the evaluation names. Raises ValueError for anything but the name of a file beside it."""
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{self.evaluation_folder / RESULT}: {name!r} is not the name of a video beside it")
        return self.video(self.evaluation_folder / name)
