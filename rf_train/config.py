"""Recipes: all settings of a run. YAML overrides the defaults, and `a.b=c` on the command line overrides both.

Every key is checked. An unknown key is an error that names its dotted path and the most similar valid name. The
settings of the model and of the noise levels are beside what they configure: `rf_train/model/settings.py` and
`rf_train/diffusion/`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from data_prep.places import PATIENCE, check_address
from rf_train.diffusion.flow_matching import FlowSettings
from rf_train.diffusion.histories import Autoregressive, History
from rf_train.model.chunks import Attention, Dense
from rf_train.model.settings import ModelSettings
from rf_train.settings import (
    from_plain,
    parse_yaml,
    require,
    require_at_least,
    require_positive,
    set_by_path,
    to_plain,
)

SHIPPED = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class MixturePart:
    """A dataset of a mixture, and its share of the clips, or of the steps."""

    data: str = ""  # dataset folder
    weight: float = 0.0  # relative to the other parts'; 0 = its number of samples

    def validate(self) -> None:
        require(bool(self.data), "a part needs data, the folder of a dataset")
        require_at_least(0, self, "weight")


@dataclass(frozen=True)
class Mixture:
    """Datasets mixed by weight: `data.train` and the stages' `data` name it as they name a folder."""

    name: str = ""
    by: str = "clip"  # clip | step: all clips of a step are of one dataset, so pictures may differ in size
    parts: tuple[MixturePart, ...] = ()

    def validate(self) -> None:
        require(bool(self.name), "name is empty; data.train names the mixture by it")
        require(self.by in ("clip", "step"), f"{self.name}: by={self.by!r}: choose clip or step")
        weighted = [part for part in self.parts if part.weight]
        require(len(weighted) in (0, len(self.parts)), f"{self.name}: give all parts a weight, or none")
        require(len(self.parts) > 0, f"{self.name}: a mixture needs at least one part")
        folders = [part.data for part in self.parts]
        require(len(set(folders)) == len(folders), f"{self.name}: the parts must differ, got {folders}")


@dataclass(frozen=True)
class DataSettings:
    """Datasets, written by `data_prep.encode`: local folders, or https://, http://, s3:// and gs:// addresses."""

    train: str = ""  # a folder, or the name of a mixture
    mixtures: tuple[Mixture, ...] = ()
    evaluation: str = ""  # long held-out clips, with the same codec and text encoder
    workers: int = 2  # threads of each rank that read ahead, a step each; 0 = nothing is read ahead
    max_damaged: float = 0.01  # the run stops when a larger share of the clips that it reads is damaged
    patience: float = PATIENCE  # seconds that a read waits for the server of a remote dataset when it is away

    def validate(self) -> None:
        require_at_least(0, self, "workers")
        for mixture in self.mixtures:
            for part in mixture.parts:
                check_address("data.mixtures", part.data)
        check_address("data.train", self.train)
        check_address("data.evaluation", self.evaluation)
        require(0 <= self.patience <= 1e7, f"data.patience={self.patience} is not a number of seconds from 0 to 1e7")
        require(0 <= self.max_damaged <= 1, f"data.max_damaged={self.max_damaged} is not a share from 0 to 1")
        names = [mixture.name for mixture in self.mixtures]
        require(len(set(names)) == len(names), f"data.mixtures: names must differ, got {names}")


@dataclass(frozen=True)
class Stage:
    """One part of a training run, with its own settings. All stages run in one job, in order."""

    name: str = "stage"
    steps: int = 1000
    history: History = field(default_factory=Autoregressive)  # one of rf_train/diffusion/histories.py
    attention: Attention = field(default_factory=Dense)  # dense | window | routed
    frames: int = 0  # latent frames of a clip; 0 = the dataset's
    data: str = ""  # dataset folder or address, or the name of a mixture; "" = data.train
    batch: int = 64  # clips per step, over all ranks
    lr: float = 5e-5
    lr_end: float = 0.0  # the learning rate falls linearly to this by the end of the stage; 0 = it stays
    warmup: int = 0  # steps of linear learning-rate warm-up at the start of the stage

    def validate(self) -> None:
        check_address("data", self.data)
        require_at_least(1, self, "steps", "batch")
        require_at_least(0, self, "frames", "warmup", "lr_end")
        require_positive(self, "lr")


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW. The defaults are those of related papers."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # larger gradients are scaled down to this norm; 0 = never
    ema: float = 0.999  # decay of the weights' average; 0 = none
    max_skipped: int = 10  # the run stops after this many steps in a row whose gradient isn't finite
    micro_batch: int = 1  # clips per replica and micro-step; the number of micro-steps follows from the stage's batch

    def validate(self) -> None:
        require_at_least(1, self, "micro_batch", "max_skipped")
        require_at_least(0, self, "max_grad_norm", "weight_decay")
        require_positive(self, "eps")
        for name in ("beta1", "beta2", "ema"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{name}={value} is not in [0, 1)")


@dataclass(frozen=True)
class RunSettings:
    """Where a run writes, and how it is spread over ranks."""

    out: str = "runs/run"
    seed: int = 0
    deepspeed: str = "ds_configs/zero3.json"
    sequence_parallel_size: int = 1  # ranks that share each clip; must divide the ranks and the heads
    gather_for_rollout: bool = True  # gather all parameters once per rollout; false: in each pass, to save memory
    precision: str = "auto"  # bf16 | fp32 | auto: bf16 on a GPU, fp32 on a CPU; masters, gradient sums, EMA are fp32
    compile: bool = False  # fuse norms, modulation, residuals and rotary positions with torch.compile
    deterministic: bool = False  # on a GPU: kernels that give the same bits every time, where PyTorch has them; slower
    save_every: int = 500  # steps; a checkpoint is also made at the end of each stage
    keep: int = 2  # how many of the newest checkpoints are kept, besides those at the ends of stages
    max_failed_saves: int = 3  # saves in a row that may fail, as with a full disk, before the run stops
    on_damage: str = "go_back"  # go_back | stop: a damaged newest checkpoint is set aside, and the one before it taken
    hang_timeout: float = 900.0  # seconds without progress in a step after which the run ends
    wandb: str = "offline"  # offline | online | disabled
    wandb_project: str = "rf_train"

    def validate(self) -> None:
        require(
            self.wandb in ("offline", "online", "disabled"),
            f"run.wandb={self.wandb!r}: choose offline, online or disabled",
        )
        require(
            self.precision in ("auto", "bf16", "fp32"), f"run.precision={self.precision!r}: choose auto, bf16 or fp32"
        )
        require(self.on_damage in ("go_back", "stop"), f"run.on_damage={self.on_damage!r}: choose go_back or stop")
        require_at_least(1, self, "sequence_parallel_size", "save_every", "keep", "max_failed_saves", "hang_timeout")
        require(bool(self.out), "run.out is empty; it is the folder that the run writes")


@dataclass(frozen=True)
class EvaluationSettings:
    """Evaluation during training: the average (EMA) continues the first clips of data.evaluation, as `evaluate` does.

    All ranks share the clips. The training itself stays the same, bit for bit.
    """

    every: int = 0  # steps; 0 = never
    clips: int = 8
    given_chunks: int = 2  # true chunks that each clip begins with

    def validate(self) -> None:
        require_at_least(0, self, "every")
        require_at_least(1, self, "clips", "given_chunks")


@dataclass(frozen=True)
class StartSettings:
    """Where the weights come from when the run has no checkpoint of its own; random if nothing is set."""

    weights: str = ""  # Wan weights: a diffusers WanTransformer3DModel folder, or the original checkpoint
    run: str = ""  # another run, to continue from its checkpoint: weights, optimizer, average, step
    step: int = 0  # which of its checkpoints; 0 = its newest

    def validate(self) -> None:
        require_at_least(0, self, "step")
        require(
            not (self.weights and self.run), "start.weights and start.run are both set; a run starts from one of them"
        )


class StageSpan(NamedTuple):
    """A stage and its steps: `begin` steps are done before it starts, `end` when it ends."""

    stage: Stage
    begin: int
    end: int


@dataclass(frozen=True)
class Recipe:
    """All settings of a run, one field per section of the YAML file."""

    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    flow: FlowSettings = field(default_factory=FlowSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    run: RunSettings = field(default_factory=RunSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    start: StartSettings = field(default_factory=StartSettings)
    stages: tuple[Stage, ...] = ()

    def validate(self) -> None:
        require(len(self.stages) > 0, "stages: a recipe needs at least one")
        names = [stage.name for stage in self.stages]
        require(len(set(names)) == len(names), f"stages: names must differ, got {names}")
        require(
            not self.evaluation.every or bool(self.data.evaluation),
            "evaluation.every is set, and data.evaluation is empty: it is the dataset of long held-out clips",
        )
        require(
            not (self.run.deterministic and self.model.attention_kernel == "cudnn"),
            "run.deterministic=true: cuDNN's gradients differ from run to run; set model.attention_kernel=auto or fa2",
        )
        heads, size = self.model.heads, self.run.sequence_parallel_size
        require(heads % size == 0, f"run.sequence_parallel_size={size} does not divide model.heads={heads}")

    @property
    def steps(self) -> int:
        """Steps of all stages together."""
        return sum(stage.steps for stage in self.stages)

    @property
    def stage_spans(self) -> list[StageSpan]:
        """Every stage with the steps that it covers, in order."""
        spans, begin = [], 0
        for stage in self.stages:
            spans.append(StageSpan(stage, begin, begin + stage.steps))
            begin += stage.steps
        return spans

    def span_at(self, step: int) -> StageSpan:
        """The stage of the 0-based global `step`, with its steps."""
        for span in self.stage_spans:
            if step < span.end:
                return span
        raise ValueError(f"step {step} is past the recipe's end")

    def dataset_of(self, stage: Stage) -> str:
        """The dataset that a stage trains on: a folder, an address, or the name of a mixture."""
        return stage.data or self.data.train

    def mixture(self, name: str) -> Mixture | None:
        """The mixture of this name, if there is one."""
        return next((mixture for mixture in self.data.mixtures if mixture.name == name), None)

    def folders_of(self, name: str) -> list[str]:
        """The dataset folders behind a name: a mixture's, or the folder itself."""
        mixture = self.mixture(name)
        return [part.data for part in mixture.parts] if mixture else [name]


def recipe_path(name: str) -> Path:
    """The recipe file `name`, or else the shipped recipe of that name (`demo`)."""
    if not Path(name).exists():
        for file in (Path(name).name, f"{Path(name).name}.yaml"):
            if (SHIPPED / file).is_file():
                return SHIPPED / file
    return Path(name)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe. `overrides` are `dotted.key=value` strings, values in YAML.

    Raises a one-line ValueError that names the file or the key, for anything that isn't right.
    """
    path = Path(path)
    raw = read_plain(path)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not all(key.split(".")):
            raise ValueError(f"{override!r}: an override is written a.b=c")
        try:
            parsed = parse_yaml(value)
        except ValueError as error:
            raise ValueError(f"{key}: the value is {error}") from None
        set_by_path(raw, key, parsed)
    try:
        return from_dict(raw)
    except ValueError as error:
        raise ValueError(f"{error} (recipe {path})") from None


def read_plain(path: Path) -> dict:
    """A recipe file as plain dicts and lists, unchecked. Raises ValueError for anything but a YAML mapping."""
    if not path.is_file():
        raise ValueError(f"{path}: no such recipe file")
    try:
        raw = parse_yaml(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: a recipe is a mapping of sections, got {type(raw).__name__}")
    return raw


def from_dict(raw: dict) -> Recipe:
    """Builds and validates a recipe from plain dicts and lists."""
    return from_plain(Recipe, raw)


def to_dict(recipe: Recipe) -> dict:
    """Plain dicts and lists, ready for YAML or JSON. `from_dict` gives the recipe back."""
    return to_plain(recipe)
