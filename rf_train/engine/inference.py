"""Models for inference: read weight by weight, on one device, or over the ranks that make a video together.

Heads are split by Ulysses, so each rank has a share of the K/V caches and of the work. Weights are whole on every rank,
or split by ZeRO-3, which gathers each block when it is needed. DeepSpeed does both.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rf_train.engine.collectives import Ranks, on_rank_0, start_ranks
from rf_train.engine.sequence_parallel import Ulysses
from rf_train.engine.zero import Engine
from rf_train.model.settings import ModelSettings
from rf_train.model.transformer import Block, CausalWan, VelocityModel, parameter_shapes

T = TypeVar("T")
PATIENCE = 7 * 24 * 3600.0  # seconds that ranks wait for one another: a video may take days


@dataclass(frozen=True)
class VideoRanks:
    """The ranks that make a video together: `ulysses.size` neighbours, of all. The first of them leads.

    The leader alone reads prompts and writes files; `tell` gives the others what it knows.
    """

    ranks: Ranks
    ulysses: Ulysses

    @property
    def size(self) -> int:
        return self.ulysses.size

    @property
    def leads(self) -> bool:
        return self.ulysses.rank == 0

    @property
    def number(self) -> int:
        """Of these ranks among all such groups."""
        return self.ranks.rank // self.size

    @property
    def groups(self) -> int:
        return self.ranks.world_size // self.size

    def tell(self, action: Callable[[], T]) -> T:
        """Runs `action` on the leader, and returns its result, or raises its error, on every rank. A collective."""
        return on_rank_0(action, self.ulysses.group)

    def smallest(self, number: int) -> int:
        """The smallest of the ranks' numbers, on every rank. A collective."""
        found = torch.tensor(number, dtype=torch.int64, device=self.ranks.device)
        dist.all_reduce(found, dist.ReduceOp.MIN, group=self.ulysses.group)
        return int(found)

    def end(self) -> None:
        """Waits for all ranks: the first one serves the others' connections."""
        dist.barrier()
        dist.destroy_process_group()


def start_video_ranks(size: int) -> VideoRanks:
    """Joins the ranks that the launcher started, `size` of which make each video.

    Raises ValueError when `size` doesn't divide them.
    """
    ranks = start_ranks(PATIENCE)
    if ranks.world_size % size:
        how = f"start it as  deepspeed --num_accelerators {size} --module rf_train.generate ..."
        raise ValueError(f"--sequence-parallel {size}: it does not divide the {ranks.world_size} rank(s); {how}")
    return VideoRanks(ranks, Ulysses(size))


def check_split(settings: ModelSettings, tokens_per_frame: int, size: int) -> None:
    """Raises ValueError when heads or tokens don't split over `size` ranks."""
    for number, what in ((settings.heads, "heads"), (tokens_per_frame, "tokens of a latent frame")):
        if number % size:
            raise ValueError(f"--sequence-parallel {size}: the {number} {what} don't split evenly over {size} ranks")


def inference_model(
    settings: ModelSettings, device: torch.device, weights: Mapping[str, Callable[[], Tensor]]
) -> CausalWan:
    """The model on a device, in bf16 on a GPU and fp32 on a CPU. Only one weight at a time is in memory besides it.

    `weights`: a function for each parameter that reads it, fp32. They must be those of `parameter_shapes`.
    """
    with torch.device("meta"):
        model = CausalWan(settings)
    assert not list(model.buffers())
    model = model.to(torch.bfloat16 if device.type == "cuda" else torch.float32).to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name]())
    return model.eval()


def split_model(
    settings: ModelSettings, together: VideoRanks, weights: Mapping[str, Callable[[], Tensor]]
) -> tuple[CausalWan, VelocityModel]:
    """The same with each weight split over all ranks, and what to call for a pass: a collective of all ranks.

    Rank 0 alone reads the weights. Raises ValueError when not all ranks make one video together.
    """
    import deepspeed
    from deepspeed.utils import set_z3_leaf_modules

    ranks = together.ranks
    if together.groups > 1:
        wanted = f"give --sequence-parallel {ranks.world_size}, or start {together.size} ranks"
        raise ValueError(f"--split-weights: all {ranks.world_size} ranks must make one video together; {wanted}")
    config = _zero3_settings(settings, ranks.device)
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = CausalWan(settings)
    set_z3_leaf_modules(model, [Block])
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            if ranks.rank == 0:
                parameter.copy_(weights[name]())
    inner, *_ = deepspeed.initialize(model=model.eval(), config=config)
    inner.eval()
    return model, Engine(inner, ranks, together.size)


def block_elements(settings: ModelSettings) -> int:
    """Elements of a block's weights."""
    return sum(math.prod(shape) for name, shape in parameter_shapes(settings).items() if name.startswith("blocks.0."))


def _zero3_settings(settings: ModelSettings, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's settings: one block is computed while the next one is gathered."""
    block = block_elements(settings)
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 2 * block,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": block,
        },
        "bf16": {"enabled": device.type == "cuda"},
        "fp16": {"enabled": False},
        "steps_per_print": 10**9,
    }
