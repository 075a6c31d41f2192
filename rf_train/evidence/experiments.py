"""The experiments of `experiments.yaml`: which runs they need, and the settings of each run."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from data_prep.card import NotADataset, read_card
from rf_train import config
from rf_train.config import Recipe
from rf_train.planning import costs
from rf_train.planning.costs import Cluster, StageCase
from rf_train.settings import from_plain, require, require_at_least

FILE = Path(__file__).parent / "experiments.yaml"
QUICK_STEPS = 40  # by which `--quick` divides the steps of each stage


@dataclass(frozen=True)
class Arm:
    """One way to train: a recipe with changed settings. See the head of experiments.yaml."""

    name: str = ""
    title: str = ""
    recipe: str = "demo"
    start: str = ""  # the arm whose first stage this one shares
    settings: tuple[str, ...] = ()  # a.b=c
    equal_compute: str = ""  # the arm that costs as many FLOP; of what `start` shares, nothing counts
    clips: str = ""  # dataset of the held-out clips; empty: that of the file's `clips`

    def validate(self) -> None:
        require_name(self.name)


@dataclass(frozen=True)
class Experiment:
    """A question, and the arms whose comparison answers it."""

    name: str = ""
    question: str = ""
    arms: tuple[str, ...] = ()
    seeds: int = 3
    needs: str = ""  # what to give, if `make evidence` alone does not make the data

    def validate(self) -> None:
        require_name(self.name)
        require_at_least(1, self, "seeds")


def require_name(name: str) -> None:
    """Names are parts of paths."""
    require(
        re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name) is not None, f"name {name!r}: use letters, digits, _ . -"
    )


@dataclass(frozen=True)
class Clips:
    """The held-out clips that every run is evaluated on."""

    data: str = ""
    count: int = 16

    def validate(self) -> None:
        require_at_least(1, self, "count")


@dataclass(frozen=True)
class Evidence:
    """All arms and experiments."""

    arms: tuple[Arm, ...] = ()
    experiments: tuple[Experiment, ...] = ()
    clips: Clips = field(default_factory=Clips)

    def validate(self) -> None:
        names = {arm.name for arm in self.arms}
        used = [name for arm in self.arms for name in (arm.start, arm.equal_compute) if name]
        used += [name for experiment in self.experiments for name in experiment.arms]
        unknown = sorted(set(used) - names)
        require(not unknown, f"arms: there is no {', '.join(unknown)}")
        for kind, some in (("arms", self.arms), ("experiments", self.experiments)):
            twice = {one.name for one in some if [other.name for other in some].count(one.name) > 1}
            require(not twice, f"{kind}: the name {', '.join(sorted(twice))} is there twice")
        for arm in self.arms:
            for key in ("start", "equal_compute"):
                other = getattr(arm, key)
                require(not other or not getattr(self.arm[other], key), f"arms: {arm.name}: {key} {other} has a {key}")

    @cached_property
    def arm(self) -> dict[str, Arm]:
        return {arm.name: arm for arm in self.arms}


@dataclass(frozen=True)
class Plan:
    """How the experiments are run: where, on how many ranks, and whether only to see that they run."""

    evidence: Evidence
    out: Path
    ranks: int = 2
    quick: bool = False

    def folder(self, arm: str, seed: int) -> Path:
        """Where the run of an arm with a seed is."""
        return self.out / "runs" / arm / f"seed{seed}"

    def recipe(self, arm: Arm) -> Recipe:
        """The arm's recipe, with the steps that it really takes."""
        plain = config.load(config.recipe_path(arm.recipe), arm.settings)
        batch = plain.stages[0].batch
        require(batch % self.ranks == 0, f"--ranks {self.ranks} does not divide the batch of {batch} clips")
        plain = replace(plain, optimizer=replace(plain.optimizer, micro_batch=batch // self.ranks))
        if self.quick:
            stages = tuple(replace(stage, steps=max(2, stage.steps // QUICK_STEPS)) for stage in plain.stages)
            plain = replace(plain, stages=stages)
        if arm.equal_compute:
            other, begin = self.recipe(self.evidence.arm[arm.equal_compute]), -1 if arm.start else 0
            share = sum(self.stage_flop(other)[begin:]) / sum(self.stage_flop(plain)[begin:])
            own = [replace(stage, steps=max(1, round(stage.steps * share))) for stage in plain.stages[begin:]]
            plain = replace(plain, stages=(*plain.stages[:begin], *own))
        return plain

    def stage_flop(self, recipe: Recipe) -> list[float]:
        """FLOP of each stage; a rollout counts."""
        return [step_flop(recipe, self.ranks, i) * stage.steps for i, stage in enumerate(recipe.stages)]

    def overrides(self, arm: Arm, seed: int) -> list[str]:
        """The settings on the command line of the training of an arm with a seed."""
        recipe = self.recipe(arm)
        split = [f"stages.{i}.steps={stage.steps}" for i, stage in enumerate(recipe.stages)]
        split.append(f"optimizer.micro_batch={recipe.optimizer.micro_batch}")
        own = [f"run.out={self.folder(arm.name, seed)}", f"run.seed={seed}", "evaluation.every=0"]
        if arm.start:
            own += [f"start.run={self.folder(arm.start, seed)}", f"start.step={recipe.stages[0].steps}"]
        return [*arm.settings, *split, *own]

    def identity(self, arm: Arm, seed: int) -> dict:
        """What decides the result of a run, as plain JSON: not where it is, nor on how many ranks it runs."""
        start = self.evidence.arm[arm.start] if arm.start else None
        return {
            "recipe": what_is_trained(self.recipe(arm)),
            "start": what_is_trained(self.recipe(start)) if start else None,
            "seed": seed,
            "clips": [self.clips_of(arm), self.clips],
            **({"videos": [source_of(folder) for folder in dict.fromkeys(self.datasets(arm))]} if arm.clips else {}),
        }

    def clips_of(self, arm: Arm) -> str:
        """The dataset that an arm is evaluated on."""
        return arm.clips or self.evidence.clips.data

    def datasets(self, arm: Arm) -> list[str]:
        """All datasets that an arm needs: first the one that it is evaluated on, then those it is trained on."""
        recipe = config.load(config.recipe_path(arm.recipe), arm.settings)
        names = [recipe.dataset_of(stage) for stage in recipe.stages]
        return [self.clips_of(arm), *(folder for name in names for folder in recipe.folders_of(name))]

    @property
    def clips(self) -> int:
        """Clips that each run is evaluated on."""
        return 2 if self.quick else self.evidence.clips.count

    def training(self, arm: Arm, seed: int) -> list[str]:
        """The command that trains an arm with a seed, after that of `arm.start`."""
        launcher = ["deepspeed", "--num_accelerators", str(self.ranks), "--module", "rf_train.train"]
        return [*launcher, arm.recipe, *self.overrides(arm, seed)]

    def evaluation(self, arm: Arm, seed: int) -> list[str]:
        """The command that evaluates this run."""
        clips = ["--data", self.clips_of(arm), "--clips", str(self.clips), "--batch", "16", "--videos", "2"]
        return ["python", "-m", "rf_train.evaluate", str(self.folder(arm.name, seed)), *clips]

    def tflop(self, arm: Arm) -> float:
        """TFLOP of the whole training of an arm, its first stage included; a rollout counts."""
        return sum(self.stage_flop(self.recipe(arm))) / 1e12


def what_is_trained(recipe: Recipe) -> dict:
    """The sections of a recipe that decide what is trained, without how it is split."""
    plain = config.to_dict(recipe)
    del plain["optimizer"]["micro_batch"]
    return {section: plain[section] for section in ("model", "data", "flow", "optimizer", "stages")}


def source_of(dataset: str) -> str:
    """A fingerprint of the videos that a dataset is made of: their names and sizes. Empty if it isn't there."""
    try:
        settings = read_card(dataset)["source"].get("settings", {})
    except NotADataset:
        return ""
    return " ".join(settings.get(key, "")[:16] for key in ("source", "source_sizes"))


def step_flop(recipe: Recipe, ranks: int, position: int) -> float:
    """FLOP of a step of a stage, as `rf_train.plan` counts them."""
    clip = costs.clip_of(recipe, position, (32, 32))
    zero = costs.read_zero(recipe.run.deepspeed)
    return sum(costs.flop(StageCase(recipe, recipe.stages[position], clip, zero, Cluster(ranks))).values())


def read_evidence(path: Path) -> Evidence:
    """The experiments. Raises a one-line ValueError for a file that isn't right."""
    return from_plain(Evidence, config.read_plain(path))


def chosen(evidence: Evidence, names: Sequence[str]) -> list[Experiment]:
    """The experiments of these names; all without any. Raises ValueError for a name that isn't there."""
    known = {experiment.name: experiment for experiment in evidence.experiments}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no experiment {unknown[0]!r}; there are {', '.join(known)}")
    return [known[name] for name in names or known]
