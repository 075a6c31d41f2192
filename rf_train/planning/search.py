"""The recommended settings: of all ways to run a recipe on a cluster, the fastest that fits."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from rf_train.config import Recipe
from rf_train.engine.deepspeed_json import shipped_jsons
from rf_train.model.settings import CHECKPOINTINGS
from rf_train.planning.costs import GIB, Clip, Cluster, StageCase, ZeroSettings, read_zero, seconds, times
from rf_train.planning.memory import ROOM, fits, memory, with_kept_blocks


@dataclass(frozen=True)
class Found:
    """What a search found. If no settings run and fit, `cases` is empty, and `why` gives the smallest need."""

    cases: tuple[StageCase, ...]  # the recipe's stages with the recommended settings
    why: str

    @property
    def overrides(self) -> list[str] | None:
        return overrides(self.cases[0].recipe) if self.cases else None

    @property
    def peak(self) -> int:
        return peak_of(self.cases)

    def plain(self) -> dict:
        """The same as plain values, ready for JSON."""
        if not self.cases:
            return {"overrides": None, "why": self.why}
        costs = {"seconds": [seconds(case) for case in self.cases], "peak": self.peak}
        return {"overrides": self.overrides, **costs, "why": self.why}


def overrides(recipe: Recipe) -> list[str]:
    """The settings that a search varies, as `a.b=c` for the command line."""
    run = recipe.run
    return [
        f"run.deepspeed={run.deepspeed}",
        f"run.gather_for_rollout={str(run.gather_for_rollout).lower()}",
        f"run.sequence_parallel_size={run.sequence_parallel_size}",
        f"optimizer.micro_batch={recipe.optimizer.micro_batch}",
        f"model.checkpointing={recipe.model.checkpointing}",
    ]


def stage_cases(recipe: Recipe, clips: list[Clip], cluster: Cluster, zero: ZeroSettings) -> tuple[StageCase, ...]:
    """A case for each stage. With model.checkpointing=auto, each with as many kept blocks as fit."""
    return tuple(
        with_kept_blocks(StageCase(recipe, stage, clip, zero, cluster)) for stage, clip in zip(recipe.stages, clips)
    )


def candidates(recipe: Recipe, clips: list[Clip], cluster: Cluster) -> Iterator[tuple[StageCase, ...]]:
    """Yields every combination of settings that can run all stages, as one case per stage."""
    own = read_zero(recipe.run.deepspeed)
    zeros = {zero.file: zero for zero in [own, *map(read_zero, shipped_jsons())]}
    usable = [zero for zero in zeros.values() if zero.secondary == 1 or zero.secondary < cluster.gpus]
    rolls_out = any(case.rolls_out for case in stage_cases(recipe, clips, cluster, own))
    for size in _divisors(math.gcd(cluster.gpus, recipe.model.heads)):
        batch = math.gcd(*(stage.batch for stage in recipe.stages))
        clips_per_replica, rest = divmod(batch * size, cluster.gpus)
        for micro_batch in _divisors(clips_per_replica) if not rest else ():
            for checkpointing in CHECKPOINTINGS:
                for zero in usable:
                    for gather in (True, False) if zero.stage == 3 and rolls_out else (True,):
                        tried = replace(
                            recipe,
                            model=replace(recipe.model, checkpointing=checkpointing),
                            optimizer=replace(recipe.optimizer, micro_batch=micro_batch),
                            run=replace(
                                recipe.run,
                                deepspeed=zero.file,
                                sequence_parallel_size=size,
                                gather_for_rollout=gather,
                            ),
                        )
                        cases = stage_cases(tried, clips, cluster, zero)
                        if not any(case.tokens_per_frame % size or cluster.gpus % zero.secondary for case in cases):
                            yield cases


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def price(cases: tuple[StageCase, ...]) -> tuple:
    """What a search minimises: seconds of all steps, then seconds on links, overlapped or not, then peak memory."""
    total = sum(case.stage.steps * seconds(case) for case in cases)
    moving = sum(case.stage.steps * (sum(times(case).values()) - times(case)["compute"]) for case in cases)
    return float(f"{total:.9g}"), float(f"{moving:.9g}"), peak_of(cases)


def peak_of(cases: tuple[StageCase, ...]) -> int:
    return max(memory(case).peak for case in cases)


def best(recipe: Recipe, clips: list[Clip], cluster: Cluster) -> Found:
    """The best settings (see `price`) that fit, in one job for all stages."""
    priced = sorted(candidates(recipe, clips, cluster), key=price)
    limit = f"{(1 - ROOM) * cluster.memory / GIB:.1f} GiB"
    if not priced:
        batches = ", ".join(str(batch) for batch in sorted({stage.batch for stage in recipe.stages}))
        rule = (
            f"run.sequence_parallel_size must divide the ranks, the {recipe.model.heads} heads and the tokens of a "
            "latent frame, and the number of replicas (ranks / run.sequence_parallel_size) must divide the batch"
        )
        return Found((), f"no setting splits batch {batches} over {cluster.gpus} ranks: {rule}")
    chosen = next((cases for cases in priced if all(fits(case) for case in cases)), None)
    if chosen is None:
        least = min(priced, key=peak_of)
        need, settings = f"{peak_of(least) / GIB:.1f}", " ".join(overrides(least[0].recipe))
        return Found((), f"nothing fits in {limit}: the smallest need is {need}, with {settings}")
    why = f"the fastest of {len(priced)} settings"
    faster = priced[: priced.index(chosen)]
    if faster:
        nearest = min(faster, key=peak_of)
        pairs = zip(overrides(nearest[0].recipe), overrides(chosen[0].recipe))
        changed = " ".join(theirs for theirs, ours in pairs if theirs != ours)
        why = f"{len(faster)} of {len(priced)} would rank before it but don't fit in {limit}; "
        why += f"the smallest of these, with {changed}, needs {peak_of(nearest) / GIB:.1f}"
    return Found(chosen, why)


def best_by_stage(recipe: Recipe, clips: list[Clip], cluster: Cluster) -> list[Found]:
    """The best settings for each stage in a job of its own."""
    return [best(replace(recipe, stages=(stage,)), [clip], cluster) for stage, clip in zip(recipe.stages, clips)]
