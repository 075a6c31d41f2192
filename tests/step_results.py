"""Random results of micro-steps, and a group of one rank to sum them over."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from rf_train.metrics import MicroStepResult

SIZES = [3, 3, 2]  # latent frames of each chunk


@contextmanager
def one_rank() -> Iterator[None]:
    """This process as the only rank of a gloo group: what is summed over ranks needs one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def random_result(clips: int, seed: int) -> MicroStepResult:
    """A micro-batch in three chunks, the last of them shorter. The first clip's history is the truth."""
    stream = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=stream)

    x, frames = random(clips, 2, sum(SIZES), 4, 6), sum(SIZES[:-1])
    level = random(clips)
    level[0] = 0
    history = x[:, :, :frames] + level.view(-1, 1, 1, 1, 1) * random(clips, 2, frames, 4, 6)
    return MicroStepResult(x, history, level, random(clips, len(SIZES)), random(clips, len(SIZES)), SIZES)
