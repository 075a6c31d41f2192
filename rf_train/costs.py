"""What a stage of a recipe costs on a cluster: FLOP, bytes over links, and the least time of a step. For memory see `rf_train.memory`.

Every figure is arithmetic from what the code keeps and computes; nothing is fitted. `rf_train.plan` prints it, searches with it and measures it.
Units: bytes, FLOP, seconds.

Letters: W ranks, S ranks a clip (run.sequence), B clips a micro-batch, T tokens of both streams on this rank (1 / S of each frame),
N those of the noisy stream, D model.dim, F model.ffn_dim, a bytes of a weight or activation (2 for bf16, 4 for fp32).
"""

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import torch

from data_prep.shards import read_card
from rf_train import config, distributed
from rf_train.chunks import Attention, Chunking
from rf_train.data import check_card
from rf_train.model import CausalWan
from rf_train.resampling import stage_attention

GIB = 2**30


@dataclass(frozen=True)
class Cluster:
    """GPUs and the links between them; bandwidths are bytes a second, one direction, a GPU. The defaults are an H200 SXM's."""

    gpus: int = 64
    memory: float = 139 * GIB  # sold as 141 GB; about 139 GiB of it can be allocated
    node: int = 8  # GPUs a node
    inside: float = 450e9  # NVLink 4
    between: float = 50e9  # 400 Gbit/s a GPU
    host: float = 50e9  # PCIe 5.0 x16 in practice; host memory is taken to keep up
    flops: float = 989e12  # dense bf16
    mfu: float = 0.4  # share of it that is reached, over all FLOP that are run, recomputed ones too
    device: str = "cuda"


@dataclass(frozen=True)
class Zero:
    """What of a DeepSpeed JSON decides memory and traffic; defaults are DeepSpeed's. Sizes in elements."""

    file: str
    stage: int
    offload_optimizer: bool
    offload_parameters: bool
    secondary: int  # ranks over which hpZ spreads its second copy of the parameters; 1 = there is none
    bucket: int
    prefetch: int
    reuse: int
    sub_group: int
    overlap: bool
    communication: int  # bytes of a gradient's element on its way; 0 = as parameters

    @property
    def offloads(self) -> bool:
        return self.offload_optimizer or self.offload_parameters


def read_zero(file: str) -> Zero:
    """Reads a DeepSpeed JSON. Raises ValueError when training doesn't run on it."""
    _, settings = distributed.read_json(file)
    zero = settings["zero_optimization"]

    def offloaded(what: str) -> bool:
        return zero.get(what, {}).get("device", "none") != "none"

    return Zero(
        file, zero["stage"], offloaded("offload_optimizer"), offloaded("offload_param"), int(zero.get("zero_hpz_partition_size", 1)),
        int(zero.get("reduce_bucket_size", 5e8)), int(zero.get("stage3_prefetch_bucket_size", 5e7)), int(zero.get("stage3_max_reuse_distance", 1e9)),
        int(zero.get("sub_group_size", 1e9)), bool(zero.get("overlap_comm", zero["stage"] == 3)),
        {"fp32": 4, "fp16": 2, "bf16": 2}.get(settings.get("communication_data_type"), 0),
    )  # fmt: skip


@dataclass(frozen=True)
class Clip:
    """Shape of a stage's clips, in latent frames and latent pixels."""

    frames: int
    height: int
    width: int


def clip_of(recipe: config.Recipe, position: int, size: tuple[int, int]) -> Clip:
    """The clip of a stage: its dataset's where that folder exists, else stage.frames at `size`, pixels (height, width), of which a latent has 1/8."""
    stage, model = recipe.stages[position], recipe.model
    folder = stage.data or recipe.data.train
    if folder and (Path(folder) / "dataset.json").is_file():
        card = read_card(Path(folder))
        check_card(card, model, folder)
        latent = card["latent"]
        if stage.frames > latent["frames"]:
            raise ValueError(f"stage {stage.name}: frames={stage.frames}, but {folder} holds clips of {latent['frames']} latent frames")
        return Clip(stage.frames or latent["frames"], latent["height"], latent["width"])
    if not stage.frames:
        missing = f"frames is 0, the dataset's, but there is no dataset at {folder or 'data.train'}"
        raise ValueError(f"stage {stage.name}: {missing}; set stages.{position}.frames to latent frames a clip")
    if any(side % (8 * model.patch) for side in size):
        raise ValueError(f"--size {size[0]}x{size[1]}: both must be multiples of {8 * model.patch}")
    return Clip(stage.frames, size[0] // 8, size[1] // 8)


@lru_cache
def shapes(model: config.Model) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter, from the model itself."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in CausalWan(model).named_parameters()}


@dataclass(frozen=True)
class Case:
    """A stage of a recipe on a cluster, with all that follows from them."""

    recipe: config.Recipe
    stage: config.Stage
    clip: Clip
    zero: Zero
    cluster: Cluster

    def validate(self) -> None:
        """Raises ValueError when this can't run, whatever its size."""
        gpus, sequence, name = self.cluster.gpus, self.sequence, self.stage.name
        if gpus % sequence:
            raise ValueError(f"run.sequence={sequence} does not divide the {gpus} ranks")
        if self.recipe.model.heads % sequence:
            raise ValueError(f"run.sequence={sequence} does not divide model.heads={self.recipe.model.heads}")
        if self.frame % sequence:
            raise ValueError(f"stage {name}: run.sequence={sequence} does not divide a latent frame's {self.frame} tokens")
        replicas = gpus // sequence
        if self.stage.batch % (self.micro * replicas):
            raise ValueError(
                f"stage {name}: batch={self.stage.batch} is not a multiple of optimizer.micro_batch={self.micro} x {replicas} ranks with clips of their own "
                f"({gpus} / run.sequence={sequence})"
            )
        if gpus % self.zero.secondary:
            raise ValueError(f"{self.zero.file}: zero_hpz_partition_size={self.zero.secondary} does not divide the {gpus} ranks")

    @cached_property
    def a(self) -> int:
        precision = self.recipe.run.precision
        return 2 if precision == "bf16" or (precision == "auto" and self.cluster.device == "cuda") else 4

    @property
    def sequence(self) -> int:
        return self.recipe.run.sequence

    @property
    def micro(self) -> int:
        return self.recipe.optimizer.micro_batch

    @property
    def accumulation(self) -> int:
        return self.stage.batch * self.sequence // (self.micro * self.cluster.gpus)

    @cached_property
    def sizes(self) -> list[int]:
        """Latent frames of each chunk."""
        return Chunking(self.recipe.model.chunk, self.recipe.model.first_chunk).sizes(self.clip.frames)

    @cached_property
    def attention(self) -> Attention:
        return stage_attention(self.stage)

    @property
    def frame(self) -> int:
        """Tokens of a latent frame, on all ranks of a clip together."""
        return (self.clip.height // self.recipe.model.patch) * (self.clip.width // self.recipe.model.patch)

    @property
    def history_frames(self) -> int:
        return sum(self.sizes[:-1])

    @property
    def rolls_out(self) -> bool:
        return self.stage.history in ("parallel", "autoregressive") and len(self.sizes) > 1

    @property
    def held(self) -> bool:
        return self.recipe.run.held

    def tokens(self, frames: int) -> int:
        """Tokens of `frames` latent frames of a micro-batch, on this rank."""
        return self.micro * frames * self.frame // self.sequence

    @cached_property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in shapes(self.recipe.model).values())

    @cached_property
    def block(self) -> int:
        """Parameters of a transformer block: what is gathered at once."""
        return sum(math.prod(shape) for name, shape in shapes(self.recipe.model).items() if name.startswith("blocks.0."))

    @cached_property
    def slice(self) -> int:
        """Parameters that a rank keeps: 1 / W of each, rounded up (ZeRO-3's partition)."""
        return sum(-(-math.prod(shape) // self.cluster.gpus) for shape in shapes(self.recipe.model).values())

    @cached_property
    def reused(self) -> int:
        """Parameters that ZeRO-3 keeps gathered from forward to backward.

        A block stays while less than stage3_max_reuse_distance elements are used before it is needed again: the blocks after it, and
        these again in backward, once, or twice with recomputation. Rollouts under hooks spoil the trace that this rests on.
        """
        if self.zero.stage == 2 or (self.rolls_out and not self.held):
            return 0
        model, rest = self.recipe.model, self.parameters - self.recipe.model.layers * self.block
        passes = 2 if model.checkpointing == "none" else 3
        return self.block * max(0, min(model.layers, math.ceil((self.zero.reuse - rest) / (passes * self.block))))


def jobs(case: Case, last: bool) -> list[tuple[int, bool, int, int]]:
    """(chunk index, whether noisy, latent frames of the queries, of the keys) of a two-stream pass."""
    sizes, held = case.sizes, list(range(len(case.sizes) - 1))
    found = []
    for noisy in (False, True):
        for index in range(len(sizes) if noisy else len(held)):
            if noisy or not last:
                seen = sum(sizes[position] for position in case.attention.visible(index, held))
                found.append((index, noisy, sizes[index], seen + sizes[index]))
    return found


def pass_flop(case: Case, noisy: int, history: int, pairs: float, pairs_last: float, frames: int, captions: bool) -> dict[str, float]:
    """Forward FLOP of one clip's pass. A linear layer takes 2 FLOP a weight and token, attention 4 D a pair.

    `noisy`, `history`: tokens; `pairs`: of a query and a key, `pairs_last` in the last block; `frames` of both streams; `captions`: their k and v are made.
    """
    m = case.recipe.model
    both, blocks, text = noisy + history, m.layers - 1, m.text_len
    square, ffn = m.dim**2, 2 * m.dim * m.ffn_dim
    linear = 2.0 * (blocks * both * (6 * square + ffn) + both * 2 * square + noisy * (4 * square + ffn) + captions * m.layers * text * 2 * square)
    cross = 4.0 * m.dim * text * (blocks * both + noisy)
    first = 2.0 * (both * m.channels * m.patch**2 * m.dim + frames * m.freq_dim * m.dim + text * m.text_dim * m.dim)  # their inputs want no gradient
    linear_ends = 2.0 * (frames * 7 * square + text * square + noisy * m.dim * m.channels * m.patch**2)
    return {"first": first, "ends": linear_ends, "linear": linear, "cross": cross, "attention": 4.0 * m.dim * (blocks * pairs + pairs_last)}


@lru_cache(maxsize=None)
def flop(case: Case) -> dict[str, float]:
    """FLOP of a step, all ranks: forward, its recomputation, backward (linear layers twice forward; attention 5 products to forward's 2) and rollout.

    Attention counts pairs of tokens that are computed: dense and window those that may be read; routed, as it is done today, all that a dense
    stage reads: SDPA multiplies what its mask forbids.
    """
    stage, sizes, attention = case.stage, case.sizes, case.attention
    square = case.frame**2
    pairs, pairs_last = (square * sum(asks * keys for _, _, asks, keys in jobs(case, last)) for last in (False, True))
    noisy, history = case.clip.frames * case.frame, case.history_frames * case.frame
    forward = pass_flop(case, noisy, history, pairs, pairs_last, case.clip.frames + case.history_frames, True)
    backward = forward["first"] + 2 * (forward["ends"] + forward["linear"]) + 2.5 * (forward["cross"] + forward["attention"])
    again = {"none": 0.0, "block": forward["linear"] + forward["cross"] + forward["attention"], "selective": forward["linear"] + forward["cross"]}
    if attention.kind == "routed":
        again["selective"] = again["block"]
    rollout = 0.0
    if case.rolls_out and stage.history == "parallel":
        short = dataclasses.replace(case, clip=dataclasses.replace(case.clip, frames=case.history_frames))
        both = [square * sum(asks * keys for _, _, asks, keys in jobs(short, last)) for last in (False, True)]
        once = pass_flop(case, history, short.history_frames * case.frame, *both, case.history_frames + short.history_frames, True)
        rollout = stage.solver_steps * sum(once.values())
    elif case.rolls_out:
        for index in range(len(sizes) - 1):
            def keys(chunk: int) -> int:
                return sizes[chunk] + sum(sizes[position] for position in attention.visible(chunk, list(range(index))))

            own = square * sizes[index] * keys(index)
            for step in range(stage.solver_steps):
                newest = sizes[index - 1] if index and not step else 0
                older = square * newest * keys(index - 1) if newest else 0
                tokens, older_tokens = sizes[index] * case.frame, newest * case.frame
                once = pass_flop(case, tokens, older_tokens, own + older, own, sizes[index] + newest, index == 0 and step == 0)
                rollout += sum(once.values())
    parts = {
        "linear": forward["first"] + forward["ends"] + forward["linear"], "cross-attention": forward["cross"],
        f"attention ({attention.kind})": forward["attention"], "backward": backward,
        "recomputation": again[case.recipe.model.checkpointing], "rollout": rollout,
    }  # fmt: skip
    return {name: stage.batch * value for name, value in parts.items()}


def passes(case: Case) -> int:
    """Forward passes of a rollout."""
    if not case.rolls_out:
        return 0
    return case.stage.solver_steps * (len(case.sizes) - 1 if case.stage.history == "autoregressive" else 1)


def spread(total: float, group: int, node: int) -> tuple[float, float]:
    """Bytes a GPU receives (inside its node, between nodes) when a group of ranks gathers `total` bytes, or reduces and scatters them.

    The least there can be: a node fetches the other nodes' share once, through all its GPUs' links, and hands it around inside.
    """
    nodes = max(1, group // node)
    between = total * (nodes - 1) / nodes / min(group, node)
    return total * (group - 1) / group - between, between


@lru_cache(maxsize=None)
def links(case: Case) -> dict:
    """Bytes that a GPU receives in a step: {"links": {purpose: (inside a node, between nodes)}, "inside", "between": sums, "host": to and from host memory}."""
    zero, a, cluster, total, turns = case.zero, case.a, case.cluster, case.parameters, case.accumulation
    gpus, node = cluster.gpus, cluster.node
    found = {}
    if zero.stage == 3:
        training = 2 * total - case.reused
        rollout = (total if case.held else total * passes(case)) if case.rolls_out else 0
        rest = turns * (training + rollout) - total
        if zero.secondary > 1:  # the first gather after a step crosses the nodes, the others read the second copy
            far, near = spread(a * total, gpus, node), spread(a * rest, zero.secondary, node)
            part = turns * rollout / (rest + total)
            whole = (far[0] + near[0], far[1] + near[1])
            found["gathers in rollouts"] = (whole[0] * part, whole[1] * part)
            found["gathers in training"] = (whole[0] * (1 - part), whole[1] * (1 - part))
        else:
            found["gathers in rollouts"] = spread(a * turns * rollout, gpus, node)
            found["gathers in training"] = spread(a * turns * training, gpus, node)
    else:
        found["gathers after the step"] = spread(a * total, gpus, node)
    found["gradients"] = spread((zero.communication or a) * turns * total, gpus, node)
    found["all-to-all"] = all_to_all(case)
    host = 0.0
    if zero.offload_optimizer:  # gradient sums out, and in to be added to; AdamW reads four numbers a parameter and writes three; the average; weights back
        host += case.slice * (4 * (2 * turns - 1) + 28 + 12 + a)
    if zero.offload_parameters:
        host += a * case.slice * turns * (2 - case.reused / total + ((1 if case.held else passes(case)) if case.rolls_out else 0))
    return {"links": found, "inside": sum(x for x, _ in found.values()), "between": sum(y for _, y in found.values()), "host": host}


def all_to_all(case: Case) -> tuple[float, float]:
    """Ulysses (Jacobs et al., section 3.2): in each block's pass a rank sends (S - 1) / S of its tokens' q, k, v and output, and as much in backward."""
    m, s, frames = case.recipe.model, case.sequence, case.clip.frames + case.history_frames
    if s == 1:
        return 0.0, 0.0
    t, n = case.tokens(frames), case.tokens(case.clip.frames)
    once = 4 * t * (m.layers - 1) + 2 * (t + n)
    tokens = once * (2 if m.checkpointing == "none" else 3)
    if case.rolls_out:
        made = case.tokens(case.history_frames)
        if case.stage.history == "parallel":
            tokens += case.stage.solver_steps * 4 * m.layers * case.tokens(case.history_frames + sum(case.sizes[:-2]))
        else:
            tokens += 4 * m.layers * (case.stage.solver_steps * made + case.tokens(sum(case.sizes[:-2])))
    total = case.accumulation * case.a * m.dim * tokens
    near = min(s, case.cluster.node)
    return total * (near - 1) / s, total * (s - near) / s


def times(case: Case) -> dict[str, float]:
    """Seconds of a step at least, each as if nothing else were in its way; the step's floor is the largest."""
    cluster, moved = case.cluster, links(case)
    return {
        "compute": sum(flop(case).values()) / (cluster.gpus * cluster.flops * cluster.mfu),
        "inside": moved["inside"] / cluster.inside, "between": moved["between"] / cluster.between, "host": moved["host"] / cluster.host,
    }  # fmt: skip


def seconds(case: Case) -> float:
    return max(times(case).values())
