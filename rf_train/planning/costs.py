"""What a stage of a recipe costs on a cluster: FLOP, bytes over links, and the least time of a step.

Every figure follows from what the code keeps and computes; nothing is fitted. `rf_train.plan` prints the figures,
searches with them, and compares them with measurements. For memory see `rf_train.planning.memory`. Units: bytes, FLOP,
seconds.
"""

import contextlib
import math
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import NamedTuple

from data_prep.card import NotADataset, read_card
from data_prep.geometry import WAN_2_1, LatentGeometry
from data_prep.places import place_of
from rf_train.config import Recipe, Stage
from rf_train.data.batches import micro_steps
from rf_train.data.latent_dataset import check_card, clip_frames
from rf_train.engine.deepspeed_json import read_deepspeed_json
from rf_train.model.chunks import Attention, Chunk, ModelPass, Routed
from rf_train.model.settings import ModelSettings
from rf_train.model.transformer import parameter_shapes

GIB = 2**30


@dataclass(frozen=True)
class Cluster:
    """GPUs and the links between them.

    Bandwidths are bytes per second, in one direction, per GPU. The defaults are H200 SXM's.
    """

    gpus: int = 64
    memory: float = 139 * GIB  # sold as 141 GB; about 139 GiB of it can be allocated
    gpus_per_node: int = 8
    inside: float = 450e9  # inside a node: NVLink 4
    between: float = 50e9  # between nodes: 400 Gbit/s per GPU
    host: float = 50e9  # PCIe 5.0 x16 in practice; host memory is assumed to keep up
    flops: float = 989e12  # dense bf16
    mfu: float = 0.4  # share of `flops` that is reached, counting recomputed FLOP too
    device: str = "cuda"


@dataclass(frozen=True)
class ZeroSettings:
    """The settings of a DeepSpeed JSON that decide memory and traffic.

    Sizes are in elements. A setting that the JSON lacks has DeepSpeed's default.
    """

    file: str
    stage: int
    offload_optimizer: bool
    offload_parameters: bool
    secondary: int  # ranks over which hpZ spreads its second copy of the parameters; 1 = no second copy
    bucket: int
    prefetch: int
    reuse: int
    sub_group: int
    overlap: bool
    communication: int  # bytes per gradient element when gradients are reduced; 0 = as parameters

    @property
    def offloads(self) -> bool:
        return self.offload_optimizer or self.offload_parameters


def read_zero(file: str) -> ZeroSettings:
    """Reads a DeepSpeed JSON. Raises ValueError when training can't run on it."""
    _, settings = read_deepspeed_json(file)
    zero = settings["zero_optimization"]

    def offloaded(what: str) -> bool:
        return zero.get(what, {}).get("device", "none") != "none"

    return ZeroSettings(
        file=file,
        stage=zero["stage"],
        offload_optimizer=offloaded("offload_optimizer"),
        offload_parameters=offloaded("offload_param"),
        secondary=int(zero.get("zero_hpz_partition_size", 1)),
        bucket=int(zero.get("reduce_bucket_size", 5e8)),
        prefetch=int(zero.get("stage3_prefetch_bucket_size", 5e7)),
        reuse=int(zero.get("stage3_max_reuse_distance", 1e9)),
        sub_group=int(zero.get("sub_group_size", 1e9)),
        overlap=bool(zero.get("overlap_comm", zero["stage"] == 3)),
        communication={"fp32": 4, "fp16": 2, "bf16": 2}.get(settings.get("communication_data_type", ""), 0),
    )


@dataclass(frozen=True)
class Clip:
    """Shape of a stage's clips, in latent frames and latent pixels."""

    frames: int
    height: int
    width: int


def clip_of(recipe: Recipe, position: int, size: tuple[int, int], stride: int = WAN_2_1.strides[1]) -> Clip:
    """The clip of a stage: that of its dataset if the folder exists, else `stage.frames` at `size`.

    `size` = (height, width) in pixels, of which a latent pixel has `stride` x `stride`. Raises ValueError when neither
    gives a valid clip.
    """
    stage, model = recipe.stages[position], recipe.model
    folder = recipe.folders_of(recipe.dataset_of(stage))[0]
    if folder:
        with contextlib.suppress(NotADataset):
            card = read_card(place_of(folder, recipe.data.patience))
            check_card(card, model, folder)
            return Clip(clip_frames(card, stage, folder), card["latent"]["height"], card["latent"]["width"])
    if not stage.frames:
        missing = f"frames is 0, the dataset's, but there is no dataset at {folder or 'data.train'}"
        raise ValueError(f"stage {stage.name}: {missing}; set stages.{position}.frames to latent frames per clip")
    try:
        LatentGeometry(model.channels, (WAN_2_1.strides[0], stride, stride)).check_patches(*size, model.patch)
    except ValueError as error:
        raise ValueError(f"--size: {error}") from None
    return Clip(stage.frames, size[0] // stride, size[1] // stride)


@lru_cache
def _shapes(model: ModelSettings) -> dict[str, tuple[int, ...]]:
    return parameter_shapes(model)


@dataclass(frozen=True)
class StageCase:
    """A stage of a recipe on a cluster, and the sizes that follow from it."""

    recipe: Recipe
    stage: Stage
    clip: Clip
    zero: ZeroSettings
    cluster: Cluster
    kept_blocks: int = 0  # with checkpointing auto: the last blocks, which recompute nothing in backward

    def validate(self) -> None:
        """Raises ValueError when this can't run, however much memory there is."""
        gpus, size, name = self.cluster.gpus, self.sequence_ranks, self.stage.name
        if gpus % size:
            raise ValueError(f"run.sequence_parallel_size={size} does not divide the {gpus} ranks")
        if self.recipe.model.heads % size:
            raise ValueError(f"run.sequence_parallel_size={size} does not divide model.heads={self.recipe.model.heads}")
        if self.tokens_per_frame % size:
            tokens = f"a latent frame's {self.tokens_per_frame} tokens"
            raise ValueError(f"stage {name}: run.sequence_parallel_size={size} does not divide {tokens}")
        micro_steps(self.stage, self.micro_batch, gpus // size)
        if gpus % self.zero.secondary:
            secondary = f"zero_hpz_partition_size={self.zero.secondary}"
            raise ValueError(f"{self.zero.file}: {secondary} does not divide the {gpus} ranks")

    # ---- how the work is split

    @property
    def sequence_ranks(self) -> int:
        """Ranks that share a clip."""
        return self.recipe.run.sequence_parallel_size

    @property
    def replicas(self) -> int:
        return self.cluster.gpus // self.sequence_ranks

    @property
    def micro_batch(self) -> int:
        """Clips per replica in a micro-step."""
        return self.recipe.optimizer.micro_batch

    @property
    def micro_steps(self) -> int:
        """Micro-steps per step."""
        return self.stage.batch * self.sequence_ranks // (self.micro_batch * self.cluster.gpus)

    # ---- sizes

    @cached_property
    def value_bytes(self) -> int:
        """Bytes of a weight or an activation: 2 for bf16, 4 for fp32."""
        precision = self.recipe.run.precision
        return 2 if precision == "bf16" or (precision == "auto" and self.cluster.device == "cuda") else 4

    @cached_property
    def chunk_sizes(self) -> list[int]:
        """Latent frames of each chunk."""
        return self.recipe.model.chunking.sizes(self.clip.frames)

    @property
    def attention(self) -> Attention:
        return self.stage.attention

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of a latent frame, on all ranks of a clip together."""
        return self.recipe.model.tokens_per_frame(self.clip.height, self.clip.width)

    @property
    def history_frames(self) -> int:
        return sum(self.chunk_sizes[:-1])

    def tokens(self, frames: int) -> int:
        """Tokens of `frames` latent frames of a micro-batch, on this rank."""
        return self.micro_batch * frames * self.tokens_per_frame // self.sequence_ranks

    # ---- passes

    @cached_property
    def training_pass(self) -> ModelPass:
        chunks = self.recipe.model.chunking.chunks(self.clip.frames)
        return ModelPass(chunks, chunks[:-1])

    @cached_property
    def rollout_passes(self) -> list[ModelPass]:
        """The passes of a rollout; none when the model isn't needed, or when a clip is a single chunk."""
        return self.stage.history.rollout_passes(self.chunk_sizes)

    @property
    def rolls_out(self) -> bool:
        return bool(self.rollout_passes)

    @property
    def rollout_probability(self) -> float:
        """The share of micro-steps that roll out: those in which some replica has a clip that needs it."""
        return self.stage.history.rollout_probability(self.micro_batch * self.replicas) if self.rolls_out else 0.0

    @property
    def gather_for_rollout(self) -> bool:
        return self.recipe.run.gather_for_rollout

    # ---- parameters

    @cached_property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in _shapes(self.recipe.model).values())

    @cached_property
    def block_parameters(self) -> int:
        """Parameters of a transformer block: what is gathered at once."""
        shapes = _shapes(self.recipe.model).items()
        return sum(math.prod(shape) for name, shape in shapes if name.startswith("blocks.0."))

    @cached_property
    def parameters_per_rank(self) -> int:
        """Parameters that a rank keeps: 1 / W of each, rounded up (ZeRO-3's partition over W ranks)."""
        return sum(-(-math.prod(shape) // self.cluster.gpus) for shape in _shapes(self.recipe.model).values())

    @cached_property
    def reused_parameters(self) -> int:
        """Parameters that ZeRO-3 keeps gathered from forward to backward.

        A block stays gathered if fewer than stage3_max_reuse_distance elements are used before it is needed again.
        These are the elements of the blocks after it: once in forward, and in backward once, or twice with
        recomputation. Rollouts under ZeRO-3's hooks spoil the trace that this needs.
        """
        if self.zero.stage == 2 or (self.rolls_out and not self.gather_for_rollout):
            return 0
        layers, block = self.recipe.model.layers, self.block_parameters
        rest = self.parameters - layers * block
        passes = 2 if self.recipe.model.checkpointing == "none" else 3
        return block * max(0, min(layers, math.ceil((self.zero.reuse - rest) / (passes * block))))


# ---- arithmetic


class QueryCount(NamedTuple):
    """The queries of one chunk in a pass, and the keys that they read, in latent frames."""

    chunk: Chunk
    noisy: bool
    keys: int  # of the chunk itself too


def query_counts(case: StageCase, model_pass: ModelPass, last_block: bool) -> list[QueryCount]:
    """The queries of a pass. In the last block only noisy chunks have queries."""
    first = model_pass.history[0].index if model_pass.history else model_pass.noisy[0].index
    earlier = list(range(first)) if model_pass.cache is not None else []
    chunks = earlier + [chunk.index for chunk in model_pass.history]
    asking = [(chunk, False) for chunk in model_pass.history if not last_block]
    asking += [(chunk, True) for chunk in model_pass.noisy]
    found = []
    for chunk, noisy in asking:
        seen = [chunks[position] for position in case.attention.visible(chunk.index, chunks)]
        if isinstance(case.attention, Routed) and len(seen) > case.attention.read_chunks:
            seen = seen[-case.attention.read_chunks :]  # whichever they are: only the first chunk may be shorter
        found.append(QueryCount(chunk, noisy, chunk.length + sum(case.chunk_sizes[index] for index in seen)))
    return found


def pass_flop(case: StageCase, model_pass: ModelPass, captions: bool) -> dict[str, float]:
    """Forward FLOP of one clip's pass, by part.

    A linear layer takes 2 FLOP per weight and token, attention 4 D per pair of tokens. `captions`: whether
    cross-attention's keys and values are computed; with a cache only the first pass computes them. Parts: "first", the
    layers that read the inputs; "ends", the other layers outside the blocks; "linear", "cross" and "attention", those
    in the blocks.
    """
    m, square = case.recipe.model, case.tokens_per_frame**2
    pairs, pairs_last = (
        square * sum(count.chunk.length * count.keys for count in query_counts(case, model_pass, last))
        for last in (False, True)
    )
    noisy = sum(chunk.length for chunk in model_pass.noisy) * case.tokens_per_frame
    both, frames, blocks, text = model_pass.frames * case.tokens_per_frame, model_pass.frames, m.layers - 1, m.text_len
    weights, ffn = m.dim**2, 2 * m.dim * m.ffn_dim
    linear = blocks * both * (6 * weights + ffn) + both * 2 * weights + noisy * (4 * weights + ffn)
    linear += captions * m.layers * text * 2 * weights
    cross = m.dim * text * (blocks * both + noisy)
    first = both * m.channels * m.patch**2 * m.dim + frames * m.freq_dim * m.dim + text * m.text_dim * m.dim
    ends = frames * 7 * weights + text * weights + noisy * m.dim * m.channels * m.patch**2
    return {
        "first": 2.0 * first,  # their inputs need no gradient
        "ends": 2.0 * ends,
        "linear": 2.0 * linear,
        "cross": 4.0 * cross,
        "attention": 4.0 * m.dim * (blocks * pairs + pairs_last),
    }


def makes_captions(passes: list[ModelPass], position: int) -> bool:
    """Whether a pass computes the captions' keys and values: each without a cache, and the first with each cache."""
    own = passes[position].cache
    return own is None or all(earlier.cache != own for earlier in passes[:position])


@cache
def flop(case: StageCase) -> dict[str, float]:
    """FLOP of a step, all ranks: forward, its recomputation, backward and rollout.

    Backward takes twice the FLOP of forward in linear layers, and 5 products to forward's 2 in attention. Attention
    counts the pairs of tokens that are read. Routing's scores, one product per query and chunk, are left out.
    """
    forward = pass_flop(case, case.training_pass, captions=True)
    backward = forward["first"] + 2 * (forward["ends"] + forward["linear"])
    backward += 2.5 * (forward["cross"] + forward["attention"])
    whole_block = forward["linear"] + forward["cross"] + forward["attention"]
    all_but_attention = forward["linear"] + forward["cross"]
    share = 1 - case.kept_blocks / case.recipe.model.layers
    recomputed = {
        "none": 0.0, "block": whole_block, "selective": all_but_attention, "auto": share * all_but_attention
    }[case.recipe.model.checkpointing]  # fmt: skip
    rollout = sum(
        sum(pass_flop(case, model_pass, captions=makes_captions(case.rollout_passes, position)).values())
        for position, model_pass in enumerate(case.rollout_passes)
    )
    parts = {
        "linear": forward["first"] + forward["ends"] + forward["linear"],
        "cross-attention": forward["cross"],
        f"attention ({case.attention.kind})": forward["attention"],
        "backward": backward,
        "recomputation": recomputed,
        "rollout": rollout * case.rollout_probability,
    }
    return {name: case.stage.batch * value for name, value in parts.items()}


# ---- traffic


class Traffic(NamedTuple):
    """Bytes that a GPU receives over the links inside its node, and between nodes."""

    inside: float
    between: float

    def times(self, factor: float) -> "Traffic":
        return Traffic(self.inside * factor, self.between * factor)


@dataclass(frozen=True)
class StepTraffic:
    """Bytes that a GPU receives in a step, by purpose, and bytes to and from host memory."""

    by_purpose: dict[str, Traffic]
    host: float

    @property
    def inside(self) -> float:
        return sum(traffic.inside for traffic in self.by_purpose.values())

    @property
    def between(self) -> float:
        return sum(traffic.between for traffic in self.by_purpose.values())


def collective_traffic(total: float, group: int, gpus_per_node: int) -> Traffic:
    """Bytes that a GPU receives when a group of ranks gathers `total` bytes, or reduces and scatters them.

    This is a lower bound: a node fetches the share of the other nodes once, through the links of all its GPUs, and
    distributes it inside.
    """
    nodes = max(1, group // gpus_per_node)
    between = total * (nodes - 1) / nodes / min(group, gpus_per_node)
    return Traffic(total * (group - 1) / group - between, between)


@cache
def step_traffic(case: StageCase) -> StepTraffic:
    """What a GPU receives in a step."""
    zero, value_bytes, cluster = case.zero, case.value_bytes, case.cluster
    total, turns, gpus, node = case.parameters, case.micro_steps, cluster.gpus, cluster.gpus_per_node
    rollout_gathers = 1 if case.gather_for_rollout else len(case.rollout_passes)
    rollout = total * rollout_gathers * case.rollout_probability
    found: dict[str, Traffic] = {}
    if zero.stage == 3:
        training = 2 * total - case.reused_parameters
        if zero.secondary > 1:  # the first gather after a step crosses the nodes, the others read the second copy
            rest = turns * (training + rollout) - total
            far = collective_traffic(value_bytes * total, gpus, node)
            near = collective_traffic(value_bytes * rest, zero.secondary, node)
            whole = Traffic(far.inside + near.inside, far.between + near.between)
            share = turns * rollout / (rest + total)
            found["gathers in rollouts"] = whole.times(share)
            found["gathers in training"] = whole.times(1 - share)
        else:
            found["gathers in rollouts"] = collective_traffic(value_bytes * turns * rollout, gpus, node)
            found["gathers in training"] = collective_traffic(value_bytes * turns * training, gpus, node)
    else:
        found["gathers after the step"] = collective_traffic(value_bytes * total, gpus, node)
    found["gradients"] = collective_traffic((zero.communication or value_bytes) * turns * total, gpus, node)
    found["all-to-all"] = all_to_all(case)
    host = 0.0
    if zero.offload_optimizer:
        # Gradient sums go to the host; to add to them, they come back first. AdamW reads four numbers per parameter
        # and writes three. Then the EMA is updated, and the weights come back.
        host += case.parameters_per_rank * (4 * (2 * turns - 1) + 28 + 12 + value_bytes)
    if zero.offload_parameters:
        fetched = 2 - case.reused_parameters / total + rollout / total
        host += value_bytes * case.parameters_per_rank * turns * fetched
    return StepTraffic(found, host)


def all_to_all(case: StageCase) -> Traffic:
    """What a GPU receives for Ulysses (Jacobs et al., section 3.2).

    With R ranks per clip, a rank sends (R - 1) / R of the q, k, v and output of its tokens in each block's forward, as
    much in its backward, and again where it is recomputed.
    """
    model, ranks = case.recipe.model, case.sequence_ranks
    if ranks == 1:
        return Traffic(0.0, 0.0)
    both, noisy = case.tokens(case.training_pass.frames), case.tokens(case.clip.frames)
    once = 4 * both * (model.layers - 1) + 2 * (both + noisy)
    recomputed = {"none": 0.0, "auto": 1 - case.kept_blocks / model.layers}.get(model.checkpointing, 1.0)
    tokens: float = once * (2 + recomputed)
    tokens += 4 * model.layers * case.tokens(sum(p.frames for p in case.rollout_passes)) * case.rollout_probability
    total = case.micro_steps * case.value_bytes * model.dim * tokens
    near = min(ranks, case.cluster.gpus_per_node)
    return Traffic(total * (near - 1) / ranks, total * (ranks - near) / ranks)


# ---- time


def times(case: StageCase) -> dict[str, float]:
    """Lower bounds for the seconds of a step: the time of each resource alone. The step takes at least the largest."""
    cluster, traffic = case.cluster, step_traffic(case)
    return {
        "compute": sum(flop(case).values()) / (cluster.gpus * cluster.flops * cluster.mfu),
        "inside": traffic.inside / cluster.inside,
        "between": traffic.between / cluster.between,
        "host": traffic.host / cluster.host,
    }


def seconds(case: StageCase) -> float:
    """The least time of a step: the largest of computing and the links, as if they overlapped; then the host.

    DeepSpeed's optimizer step on the host begins when the backward is over.
    """
    found = times(case)
    return found.pop("host") + max(found.values())
