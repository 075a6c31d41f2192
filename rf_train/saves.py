"""When a run saves, and what becomes of a run that can't: skipped steps, requests to stop, saves that fail."""

from pathlib import Path

from data_prep.command import printable
from rf_train.config import Recipe
from rf_train.engine import checkpoint
from rf_train.engine.collectives import RunError
from rf_train.engine.run_folder import Events
from rf_train.engine.saving import NotSaved, Saved, Saver
from rf_train.engine.state import TrainingState
from rf_train.engine.stopping import FOLDER_LOST, Stopped, words
from rf_train.run_log import RunLog


class TooManySkippedSteps(RunError):
    """Too many steps in a row were skipped because their gradient isn't finite."""


class Saves:
    """Saves a run's checkpoints when they are due. Every method is a collective, with the same outcome on all ranks."""

    def __init__(self, recipe: Recipe, state: TrainingState, first: int, events: Events, log: RunLog):
        """`first`: the steps that are done already."""
        self.newest = first  # what needs no saving
        self.recipe, self.events, self.log, self.run = recipe, events, log, Path(recipe.run.out)
        self.ends = {span.end for span in recipe.stage_spans}
        self.saver = Saver(self.run, state, recipe.run.keep, self.ends)
        # One entry per skipped step since the last step that wasn't skipped: the clips whose loss isn't finite.
        self.skipped: list[list[str]] = []

    def after_step(self, step: int, skipped: bool, not_finite: list[str]) -> None:
        """Counts steps that are skipped in a row. Raises TooManySkippedSteps. `step` is 0-based."""
        if not skipped:
            self.skipped.clear()
            return
        self.skipped.append(not_finite)
        clips = ", ".join(not_finite) or "none"
        self.log.print_line(
            f"step {step + 1}: skipped, its gradient is not finite; clips with non-finite loss: {clips}"
        )
        if len(self.skipped) >= self.recipe.optimizer.max_skipped:
            raise TooManySkippedSteps(self._skipped_message(step + 1))

    def between_steps(self, done: int, stopped_by: int) -> None:
        """Saves if it is time to. Raises Stopped, when all is saved, if there is a reason to stop."""
        if stopped_by == FOLDER_LOST:
            raise RunError(f"{self.run}: another job has taken this folder")
        if self.saver.pending is not None:
            self._report(self.saver.poll())
        if self.is_due(done) or (stopped_by and not self.skipped):
            self._report(self.saver.finish())
            if done != self.newest:
                self.saver.begin(done)
        if stopped_by and done < self.recipe.steps:
            self._report(self.saver.finish(), needed=not self.skipped)
            self.saver.close()
            newest = checkpoint.latest(self.run)
            where = f"from {newest.name}" if newest else "from the start"
            why = f"stopped by {words(stopped_by)}"
            raise Stopped(why, f"{why} after step {done}; the same command goes on {where}")

    def is_due(self, done: int) -> bool:
        """Whether to save a checkpoint after `done` steps.

        While steps are skipped, none is saved; but one skipped step is no reason not to save the last.
        """
        due = done % self.recipe.run.save_every == 0 or done in self.ends
        return due and (not self.skipped or (len(self.skipped) == 1 and done == self.recipe.steps))

    def at_the_end(self) -> None:
        """Waits for the last checkpoint. Raises TooManySkippedSteps when the last steps were all skipped."""
        self._report(self.saver.finish(), needed=True)
        if len(self.skipped) > 1:
            raise TooManySkippedSteps(self._skipped_message(self.recipe.steps))
        self.saver.close()

    def finish(self) -> None:
        """Waits for a save that is under way."""
        self._report(self.saver.finish())

    def _report(self, saved: Saved | None, needed: bool = False) -> None:
        """Says how a save went. Raises NotSaved when too many failed in a row, or this one is `needed`."""
        if saved is None:
            return
        if not saved.error:
            self.newest = saved.step
            numbers = {"seconds": round(saved.seconds, 2), "stall": round(saved.stall, 3)}
            self.events.write("saved", saved.step, **numbers)
            stall = f"training stood still for {saved.stall:.2f} s"
            self.log.print_line(f"saved {saved.folder} in {saved.seconds:.1f} s; {stall}")
            return
        self.events.write("save failed", saved.step, why=saved.error)
        self.log.print_line(printable(f"step {saved.step}: not saved: {saved.error}"))
        failures = self.saver.failures
        if needed or failures >= self.recipe.run.max_failed_saves:
            count = f"{failures} saves in a row have failed" if failures > 1 else "the checkpoint could not be saved"
            newest = checkpoint.latest(self.run) or "none"
            raise NotSaved(
                f"step {saved.step}: {count}: {saved.error}. Newest checkpoint: {newest}. When this is mended, the "
                "same command goes on"
            )

    def _skipped_message(self, done: int) -> str:
        """The error of a run that stops after `done` steps: clips of the skipped steps, and the newest checkpoint."""
        clips = ", ".join(sorted({clip for clips in self.skipped for clip in clips})) or "none, only the gradient"
        return (
            f"step {done}: {len(self.skipped)} steps in a row were skipped, because their gradient is not finite; "
            f"no checkpoint was saved meanwhile. Clips whose loss is not finite: {clips}. Newest checkpoint: "
            f"{checkpoint.latest(self.run) or 'none'}. Look at these clips, or resume with a lower learning rate"
        )
