"""What is checked before the first step: batches that split evenly, memory that suffices, a model that is right."""

import torch
import torch.distributed as dist

from rf_train.config import Recipe
from rf_train.data.batches import Datasets, micro_steps
from rf_train.diffusion.history_check import check_history
from rf_train.engine.collectives import Ranks, ranks_on_this_machine
from rf_train.engine.devices import memory_of
from rf_train.engine.zero import Engine
from rf_train.model.self_test import self_test
from rf_train.planning.costs import GIB, Clip, Cluster, StageCase, read_zero
from rf_train.planning.memory import ROOM, fits, memory, with_kept_blocks
from rf_train.planning.search import best


def check_split(recipe: Recipe, datasets: Datasets, ranks: Ranks) -> None:
    """Raises ValueError when ranks, batches or tokens don't split evenly."""
    size = recipe.run.sequence_parallel_size
    if ranks.world_size % size:
        raise ValueError(f"run.sequence_parallel_size={size} does not divide the {ranks.world_size} ranks")
    for stage in recipe.stages:
        micro_steps(stage, recipe.optimizer.micro_batch, ranks.world_size // size)
    for dataset in (part for named in datasets.values() for part in named.parts):
        if dataset.tokens_per_frame % size:
            tokens = f"a latent frame of {dataset.folder} has {dataset.tokens_per_frame} tokens"
            raise ValueError(f"run.sequence_parallel_size={size}: {tokens}, which don't split evenly over {size} ranks")


def planned_cases(recipe: Recipe, datasets: Datasets, ranks: Ranks) -> list[StageCase]:
    """The plan of each stage on the ranks of this run. All ranks have the same: the smallest memory counts."""
    here = ranks_on_this_machine()
    memory_here = torch.tensor(memory_of(ranks.device, here), device=ranks.device)
    dist.all_reduce(memory_here, dist.ReduceOp.MIN)
    cluster = Cluster(
        gpus=ranks.world_size,
        gpus_per_node=min(here, ranks.world_size),
        memory=float(memory_here),
        device=ranks.device.type,
    )
    zero, cases = read_zero(recipe.run.deepspeed), []
    for stage in recipe.stages:
        dataset = datasets[recipe.dataset_of(stage)]
        latent = dataset.card["latent"]
        clip = Clip(dataset.clip_frames(stage), latent["height"], latent["width"])
        cases.append(with_kept_blocks(StageCase(recipe, stage, clip, zero, cluster)))
    return cases


def check_memory(cases: list[StageCase], rank: int) -> None:
    """Raises ValueError, on every rank, when a stage needs more memory than a GPU has. Rank 0 says what would fit."""
    for case in cases:
        if case.cluster.device == "cuda" and not fits(case):
            need = f"stage {case.stage.name} needs {memory(case).peak / GIB:.0f} GiB on each GPU"
            has = f"it has {case.cluster.memory / GIB:.0f} GiB, {ROOM:.0%} of them kept free"
            raise ValueError(f"{need}; {has}" + ("" if rank else f"; {what_fits(cases)}"))


def what_fits(cases: list[StageCase]) -> str:
    """The recommended settings for all stages, and the host memory that they take."""
    found = best(cases[0].recipe, [case.clip for case in cases], cases[0].cluster)
    if not found.overrides:
        return found.why
    host = max(memory(case).host for case in found.cases)
    taking = f", with {host / GIB:.0f} GiB of host memory for each GPU" if host else ""
    return f"these settings fit{taking}: {' '.join(found.overrides)}"


def check_model(recipe: Recipe, engine: Engine, datasets: Datasets) -> None:
    """Runs the self-test on the engine's model, and makes the history of each stage once, on random clips."""
    frames = [datasets[recipe.dataset_of(stage)].clip_frames(stage) for stage in recipe.stages]
    chunks = [len(engine.chunking.sizes(count)) for count in frames]
    with engine.gathered_parameters(blocks=None if recipe.run.gather_for_rollout else 2) as model:
        self_test(model, max(chunks), [stage.attention for stage in recipe.stages])
        for stage, count in zip(recipe.stages, chunks):
            check_history(stage.history, model, stage.attention, count)
