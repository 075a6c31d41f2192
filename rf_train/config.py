"""Settings: frozen dataclasses; defaults < YAML < ``a.b=c`` on the command line.

Every key is checked: an unknown one fails with its dotted path and the nearest right name.
Lists are addressed by position: ``stages.1.steps=200``.
"""

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml

HISTORIES = ("clean", "noise", "parallel", "autoregressive")
CHECKPOINTINGS = ("none", "block", "selective")
ATTENTIONS = ("dense", "window", "routed")


def require(condition: bool, message: str) -> None:
    """Raises ``ValueError(message)`` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class Model:
    """The causal DiT. Wan2.1 1.3B is dim 1536, ffn_dim 8960, heads 12, layers 30."""

    dim: int = 1536
    ffn_dim: int = 8960
    heads: int = 12
    layers: int = 30
    channels: int = 16  # latent channels, in and out
    text_dim: int = 4096  # width of the text encoder's vectors
    text_len: int = 512  # captions are zero-padded to this many positions, as Wan was trained
    freq_dim: int = 256  # width of the sinusoidal time embedding
    patch: int = 2  # spatial patch, in latent pixels; the temporal patch is 1
    chunk: int = 3  # latent frames in a chunk
    first_chunk: int = 3  # latent frames in the first chunk; 1 lets a single image start a video
    eps: float = 1e-6
    checkpointing: str = "block"  # recompute each block's activations in backward; selective: all but its self-attention; none

    def validate(self) -> None:
        require(self.dim % self.heads == 0, f"model.dim={self.dim} is not a multiple of model.heads={self.heads}")
        head = self.dim // self.heads
        require(head % 2 == 0 and head >= 8, f"a head is {head} wide (model.dim / model.heads); it must be even and at least 8")
        require(self.chunk >= 1 and self.first_chunk >= 1, "model.chunk and model.first_chunk must be at least 1")
        require(self.checkpointing in CHECKPOINTINGS, f"model.checkpointing={self.checkpointing!r}: choose one of {', '.join(CHECKPOINTINGS)}")
        require(self.freq_dim % 2 == 0, f"model.freq_dim={self.freq_dim} must be even")


@dataclass(frozen=True)
class Data:
    train: str = ""  # dataset folder, written by data_prep.encode
    evaluation: str = ""  # dataset folder of long held-out clips, same codec and text encoder


@dataclass(frozen=True)
class Flow:
    """Training noise levels (one t a chunk) and sampling."""

    t_distribution: str = "logit_normal"  # or "uniform"
    t_shift: float = 5.0  # timestep shift of training's t
    caption_dropout: float = 0.1
    sampling_steps: int = 32  # Euler steps a chunk
    sampling_shift: float = 5.0
    guidance: float = 5.0

    def validate(self) -> None:
        require(self.t_distribution in ("logit_normal", "uniform"), f"flow.t_distribution={self.t_distribution!r}: choose logit_normal or uniform")
        require(self.t_shift > 0 and self.sampling_shift > 0, "flow.t_shift and flow.sampling_shift must be positive")
        require(0 <= self.caption_dropout <= 1, f"flow.caption_dropout={self.caption_dropout} is not in [0, 1]")
        require(self.sampling_steps >= 1, "flow.sampling_steps must be at least 1")


@dataclass(frozen=True)
class Stage:
    """One stretch of training; all stages run in one job, in order."""

    name: str = "stage"
    steps: int = 1000
    history: str = "autoregressive"  # how history is made: clean | noise | parallel | autoregressive
    attention: str = "dense"  # dense | window | routed
    k: int = 5  # routed: earlier chunks kept by each query token and head
    window: int = 6  # window: earlier chunks visible
    sink: int = 0  # window: the first chunks that stay visible besides
    frames: int = 0  # latent frames of a clip; 0 = the dataset's
    data: str = ""  # dataset folder; "" = data.train
    batch: int = 64  # clips in a step, over all ranks
    lr: float = 5e-5
    lr_end: float = 0.0  # the rate falls linearly to this by the stage's end; 0 = it stays
    warmup: int = 0  # steps of linear learning-rate warm-up at the start of the stage
    s: float = 0.6  # shift of the resampling level t_s
    solver_steps: int = 1  # Euler steps of the rollout

    def validate(self) -> None:
        require(self.history in HISTORIES, f"history={self.history!r}: choose one of {', '.join(HISTORIES)}")
        require(self.attention in ATTENTIONS, f"attention={self.attention!r}: choose one of {', '.join(ATTENTIONS)}")
        require(self.steps >= 1 and self.batch >= 1 and self.solver_steps >= 1, "steps, batch and solver_steps must be at least 1")
        require(self.k >= 1 and self.window >= 1 and self.sink >= 0, "k and window must be at least 1, sink at least 0")
        require(self.s > 0 and self.lr > 0 and self.lr_end >= 0, "s and lr must be positive, lr_end not negative")


@dataclass(frozen=True)
class Optimizer:
    """AdamW, with the settings of the paper's neighbours."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0  # gradient norm; 0 = not clipped
    ema: float = 0.999  # decay of the weights' average; 0 = none
    max_skipped: int = 10  # steps in a row whose gradient isn't finite and that are skipped; then the run stops
    micro_batch: int = 1  # clips a rank and pass; accumulation follows from the stage's batch

    def validate(self) -> None:
        require(self.micro_batch >= 1 and self.max_skipped >= 1, "optimizer.micro_batch and optimizer.max_skipped must be at least 1")
        require(self.clip >= 0, "optimizer.clip must not be negative; 0 = no clipping")
        require(0 <= self.ema < 1, f"optimizer.ema={self.ema} is not in [0, 1)")


@dataclass(frozen=True)
class Run:
    out: str = "runs/run"
    seed: int = 0
    deepspeed: str = "ds_configs/zero3.json"
    sequence: int = 1  # ranks that share each clip's attention heads (sequence parallelism); must divide the ranks and the heads
    held: bool = True  # gather all parameters once for a rollout; false where a full copy doesn't fit: gathered again in every pass
    precision: str = "auto"  # bf16 | fp32 | auto: bf16 on a GPU, fp32 on a CPU; masters, gradient sums and the average are fp32 always
    save_every: int = 500  # steps; a checkpoint is also made at the end of each stage
    keep: int = 2  # newest checkpoints kept besides the ends of stages
    wandb: str = "offline"  # offline | online | disabled
    wandb_project: str = "rf_train"

    def validate(self) -> None:
        require(self.wandb in ("offline", "online", "disabled"), f"run.wandb={self.wandb!r}: choose offline, online or disabled")
        require(self.precision in ("auto", "bf16", "fp32"), f"run.precision={self.precision!r}: choose auto, bf16 or fp32")
        require(self.sequence >= 1, "run.sequence must be at least 1")
        require(self.save_every >= 1 and self.keep >= 1, "run.save_every and run.keep must be at least 1")


@dataclass(frozen=True)
class Start:
    """Where the weights come from when the run has no checkpoint of its own; at random if nothing is set."""

    weights: str = ""  # Wan weights: a diffusers WanTransformer3DModel folder, or the original checkpoint
    run: str = ""  # go on from another run's checkpoint: weights, optimizer, average, step
    step: int = 0  # which of its checkpoints; 0 = its newest

    def validate(self) -> None:
        require(not (self.weights and self.run), "start.weights and start.run are both set; a run starts from one of them")


@dataclass(frozen=True)
class Recipe:
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    flow: Flow = field(default_factory=Flow)
    optimizer: Optimizer = field(default_factory=Optimizer)
    run: Run = field(default_factory=Run)
    start: Start = field(default_factory=Start)
    stages: tuple[Stage, ...] = ()

    def validate(self) -> None:
        require(len(self.stages) > 0, "stages: a recipe needs at least one")
        names = [stage.name for stage in self.stages]
        require(self.model.heads % self.run.sequence == 0, f"run.sequence={self.run.sequence} does not divide model.heads={self.model.heads}")
        require(len(set(names)) == len(names), f"stages: names must differ, got {names}")

    @property
    def steps(self) -> int:
        """Steps of all stages together."""
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> tuple[int, Stage, int]:
        """(position, stage, step inside the stage) of the 0-based global `step`."""
        for position, stage in enumerate(self.stages):
            if step < stage.steps:
                return position, stage, step
            step -= stage.steps
        raise ValueError(f"step {step} is past the recipe's end")


def recipe_path(name: str) -> Path:
    """A recipe file, or the shipped recipe of that name (`demo`)."""
    shipped = Path(__file__).parent / "recipes"
    if not Path(name).exists():
        for file in (Path(name).name, f"{Path(name).name}.yaml"):
            if (shipped / file).is_file():
                return shipped / file
    return Path(name)


def load(path: str | Path, overrides: typing.Sequence[str] = ()) -> Recipe:
    """Reads a recipe. `overrides` are ``dotted.key=value`` strings, values in YAML.

    Raises ValueError, in one line that names the file and the key, on anything that isn't right.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such recipe file")
    try:
        raw = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: a recipe is a mapping of sections, got {type(raw).__name__}")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ValueError(f"{override!r}: an override is written a.b=c")
        try:
            _set(raw, key.split("."), yaml.safe_load(value), key)
        except yaml.YAMLError:
            raise ValueError(f"{override!r}: the value is not YAML") from None
    return from_dict(raw)


def from_dict(raw: dict) -> Recipe:
    """Builds and validates a recipe from plain dicts and lists."""
    return _build(Recipe, raw, "")


def to_dict(recipe: Recipe) -> dict:
    """Plain dicts and lists, ready for YAML or JSON; `from_dict` gives the recipe back."""
    plain = dataclasses.asdict(recipe)
    plain["stages"] = list(plain["stages"])
    return plain


def _set(node, keys: list[str], value, dotted: str) -> None:
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                raise ValueError(f"{dotted}: {key!r} is not a position in a list of {len(node)}")
            key = int(key)
        elif not isinstance(node, dict):
            raise ValueError(f"{dotted}: {'.'.join(keys[:depth])} is a value, it has no keys")
        if last:
            node[key] = value
        else:
            if isinstance(node, dict) and node.get(key) is None:
                node[key] = {}
            node = node[key]


def _build(kind, raw, where: str):
    """An instance of the dataclass `kind` from the mapping `raw` found at the dotted path `where`."""
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise ValueError(f"{where}: expected a mapping, got {raw!r}")
    hints = typing.get_type_hints(kind)
    values = {}
    for key, value in raw.items():
        dotted = f"{where}.{key}" if where else str(key)
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.0)[0]
            raise ValueError(f"{dotted}: unknown setting; did you mean {where + '.' if where else ''}{near}?")
        values[key] = _convert(hints[key], value, dotted)
    made = kind(**values)
    if hasattr(made, "validate"):
        try:
            made.validate()
        except ValueError as error:
            section = where.split(".")[0]
            raise ValueError(str(error) if str(error).startswith(section or "\0") or not where else f"{where}: {error}") from None
    return made


def _convert(hint, value, dotted: str):
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, dotted)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{dotted}: expected a list, got {value!r}")
        inner = typing.get_args(hint)[0]
        return tuple(_convert(inner, item, f"{dotted}.{i}") for i, item in enumerate(value))
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _convert(typing.get_args(hint)[0], value, dotted)
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:  # YAML reads 1e-4 as a string
            return float(value)
        except ValueError:
            pass
    if hint is str and value is None:  # `key=` on the command line
        return ""
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{dotted}: expected {hint.__name__}, got {value!r}")
    return value
