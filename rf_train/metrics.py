"""Every figure of a run: `metrics.jsonl`, a progress bar on rank 0, and wandb in the mode that the recipe sets."""

import json
import math
import time
from pathlib import Path

from tqdm import tqdm

from rf_train import config


class Metrics:
    """Rank 0 writes; on other ranks every call does nothing."""

    def __init__(self, recipe: config.Recipe, first_step: int, rank: int):
        self.active = rank == 0
        if not self.active:
            return
        out = Path(recipe.run.out)
        self.path = out / "metrics.jsonl"
        keep_before(self.path, first_step)
        self.file = open(self.path, "a", buffering=1)
        self.bar = tqdm(total=recipe.steps, initial=first_step, unit="step", dynamic_ncols=True, smoothing=0.1, mininterval=0.5)
        self.wandb = None
        if recipe.run.wandb != "disabled":
            import wandb

            self.wandb = wandb.init(
                project=recipe.run.wandb_project, name=out.name, id=None, dir=str(out), mode=recipe.run.wandb, config=config.to_dict(recipe),
                settings=wandb.Settings(silent=True, console="off"),
            )  # fmt: skip
        self.clock = time.perf_counter()

    def log(self, step: int, stage: str, samples: int, figures: dict) -> None:
        """Figures of the finished 0-based `step`, which took `samples` clips. Numbers, or lists of numbers; None for what could not be measured."""
        if not self.active:
            return
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        row = {"step": step + 1, "stage": stage, "seconds": seconds, "samples_per_s": samples / seconds, **figures}
        row = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}  # JSON has no NaN
        self.file.write(json.dumps(row, allow_nan=False) + "\n")
        self.bar.update()
        loss = "none" if row["loss"] is None else f"{row['loss']:.4f}"
        self.bar.set_postfix_str(f"{stage} loss {loss} {row['samples_per_s']:.1f} samples/s", refresh=False)
        if self.wandb is not None:
            flat = {k: v for k, v in row.items() if not isinstance(v, list)}
            flat.update({f"{k}/{i}": v for k, vs in row.items() if isinstance(vs, list) for i, v in enumerate(vs)})
            self.wandb.log({k: v for k, v in flat.items() if v is not None}, step=step + 1)

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        if self.active:
            self.bar.write(text)

    def close(self) -> None:
        if self.active:
            self.bar.close()
            self.file.close()
            if self.wandb is not None:
                self.wandb.finish()


def read_metrics(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl; a last line that was cut by a crash is left out."""
    rows = []
    if path.is_file():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


def keep_before(path: Path, first_step: int) -> None:
    """Drops rows of steps that are about to be done again."""
    rows = [row for row in read_metrics(path) if row["step"] <= first_step]
    if path.is_file():
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        temporary.replace(path)
