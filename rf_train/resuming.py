"""What a run goes on from: its newest checkpoint, or what `start` names; and the recipe that it was trained with."""

import sys
from pathlib import Path

import yaml

from data_prep.command import printable
from data_prep.files import write_atomic
from rf_train import config
from rf_train.config import Recipe
from rf_train.engine import checkpoint
from rf_train.engine.checkpoint import Damaged
from rf_train.engine.collectives import on_rank_0
from rf_train.engine.restoring import newest_whole, verified_together
from rf_train.engine.run_folder import Events, read_events
from rf_train.engine.state import TrainingState
from rf_train.settings import differences
from rf_train.weights import WeightFiles


def checkpoint_to_go_on_from(recipe: Recipe, events: Events) -> tuple[Path, dict] | None:
    """The run's newest whole checkpoint, or else the one that `start` names, and its manifest. A collective.

    Raises ValueError when the run was saved before, and none of its checkpoints is whole.
    """
    out = Path(recipe.run.out)

    def say(event: str, step: int, why: str) -> None:
        print(printable(why), file=sys.stderr)
        events.write(event, step, why=why)

    found = newest_whole(out, recipe.run.on_damage == "go_back", say)
    if found:
        return found
    if on_rank_0(lambda: checkpoint.was_saved(out) or any(row["event"] == "saved" for row in read_events(out))):
        raise ValueError(
            f"{out}: it was saved before, and no whole checkpoint is left. Bring one back into {out / 'checkpoints'}, "
            "or train into another folder (run.out)"
        )
    if recipe.start.run:
        folder = checkpoint.at_step(Path(recipe.start.run), recipe.start.step)
        if checkpoint.step_of(folder) >= recipe.steps:
            raise ValueError(
                f"start.run: {folder} has done {checkpoint.step_of(folder)} steps, which count, and this recipe's "
                f"stages end after {recipe.steps}: nothing is left to train. Lengthen the last stage, or append one"
            )
        return folder, verified_together(folder)
    return None


def restore(recipe: Recipe, state: TrainingState, found: tuple[Path, dict] | None) -> int:
    """Loads a checkpoint, or else the weights that `start` names. Returns the number of steps already done."""
    if found is not None:
        folder, manifest = found
        state.load(folder, manifest)
        return manifest["step"]
    if recipe.start.weights:
        files = WeightFiles(recipe.start.weights)
        files.check(state.shapes)
        state.load_weights(files.flat, files.whole)
    return 0


def finished(recipe: Recipe) -> bool:
    """Whether the checkpoint of the recipe's last step is there, and whole. A collective."""
    folder = on_rank_0(lambda: checkpoint.latest(Path(recipe.run.out)))
    if folder is None or checkpoint.step_of(folder) < recipe.steps:
        return False
    try:
        return bool(verified_together(folder))
    except Damaged:
        return False


def check_stages(recipe: Recipe, done: int) -> None:
    """Raises ValueError when steps that are done would belong to another stage than the one that trained them."""
    path = Path(recipe.run.out) / "recipe.yaml"
    try:
        before = config.load(path) if path.is_file() else recipe
    except ValueError:  # `write_recipe` says it
        return
    was, now = ([span.end for span in one.stage_spans if span.end < done] for one in (before, recipe))
    if was != now:
        raise ValueError(
            f"{recipe.run.out}: {done} steps are done, in stages that ended after {was or 'none'} of them; by this "
            f"recipe they end after {now or 'none'}. Keep the length of stages that are over, and lengthen the last "
            "one or append one; or train into another folder (run.out)"
        )


def write_recipe(recipe: Recipe) -> None:
    """Writes the complete recipe into the run's folder. Prints what has changed since the run began."""
    out = Path(recipe.run.out)
    out.mkdir(parents=True, exist_ok=True)
    path, new = out / "recipe.yaml", config.to_dict(recipe)
    if path.is_file():
        for key, was, now in recipe_changes(path, new):
            print(f"the recipe has changed since this run began: {key}: {was!r} -> {now!r}", file=sys.stderr)
    write_atomic(path, yaml.safe_dump(new, sort_keys=False))


def tell_unused(recipe: Recipe) -> None:
    """Prints what differs from the recipe of a run that is finished: nothing is trained with it."""
    path = Path(recipe.run.out) / "recipe.yaml"
    if path.is_file():
        for key, was, now in recipe_changes(path, config.to_dict(recipe)):
            print(f"not used, since this run is finished: {key}: {was!r} -> {now!r}", file=sys.stderr)


def recipe_changes(path: Path, new: dict) -> list[tuple[str, object, object]]:
    """(dotted path, old value, new value) of what differs from the recipe in `path`.

    A setting that is missing in the file had its default.
    """
    try:
        old = config.load(path)
    except ValueError as error:
        print(f"what has changed since this run began is not known: {error}", file=sys.stderr)
        return []
    return differences(config.to_dict(old), new)
