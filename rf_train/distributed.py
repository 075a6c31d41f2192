"""Everything that knows DeepSpeed: starting ranks, the ZeRO-3 engine, parameters held for the rollout, sums over ranks."""

import json
import os
import socket
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from rf_train import config
from rf_train.model import Block, CausalWan

PROJECT = Path(__file__).resolve().parent.parent

# What the recipe decides; a DeepSpeed JSON that sets one of these contradicts it.
FROM_THE_RECIPE = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "optimizer", "scheduler", "bf16", "fp16",
)  # fmt: skip


def start() -> tuple[int, int, torch.device]:
    """Joins the ranks that the launcher started, or stands alone without one. Returns (rank, world, device)."""
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        __compatible_ops__["deepspeed_shm_comm"] = False  # else the first run compiles it for over a minute
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))))
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    deepspeed.init_distributed("nccl" if on_gpu else "gloo", auto_mpi_discovery=False, verbose=False, timeout=timedelta(minutes=30))
    return dist.get_rank(), dist.get_world_size(), device


def find(path: str) -> Path:
    """`path` as given, or else below the project's folder, so that a run may start anywhere."""
    for candidate in (Path(path), PROJECT / path):
        if candidate.is_file():
            return candidate
    raise ValueError(f"{path}: no such file, neither here nor in {PROJECT}")


def engine_settings(recipe: config.Recipe, device: torch.device, world: int, accumulation: int) -> dict:
    """DeepSpeed's settings: the JSON, completed from the recipe."""
    path = find(recipe.run.deepspeed)
    try:
        settings = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    for key in FROM_THE_RECIPE:
        if key in settings:
            raise ValueError(f"{path}: {key} is set there to {json.dumps(settings[key])}; the recipe decides it, remove it from the JSON")
    stage = settings.get("zero_optimization", {}).get("stage")
    if stage != 3:
        raise ValueError(f"{path}: zero_optimization.stage is {stage!r}; training runs on ZeRO stage 3")
    settings.update(
        train_micro_batch_size_per_gpu=recipe.optimizer.micro_batch,
        gradient_accumulation_steps=accumulation,
        train_batch_size=recipe.optimizer.micro_batch * accumulation * world,
        gradient_clipping=recipe.optimizer.clip,
        zero_allow_untested_optimizer=True,
        bf16={"enabled": device.type == "cuda"},
    )
    settings.setdefault("data_types", {"grad_accum_dtype": "fp32"})
    settings.setdefault("wall_clock_breakdown", False)
    settings.setdefault("steps_per_print", 10**9)
    return settings


def build_engine(recipe: config.Recipe, device: torch.device, world: int, accumulation: int):
    """The sharded model and AdamW in a DeepSpeed engine; each transformer block is gathered as a whole."""
    import deepspeed
    from deepspeed.utils import set_z3_leaf_modules

    settings = engine_settings(recipe, device, world, accumulation)
    torch.manual_seed(recipe.run.seed)
    with deepspeed.zero.Init(config_dict_or_path=settings):
        model = CausalWan(recipe.model)
    set_z3_leaf_modules(model, [Block])
    o = recipe.optimizer
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-8, betas=(o.beta1, o.beta2), eps=o.eps, weight_decay=o.weight_decay)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine


def set_accumulation(engine, stage: config.Stage) -> None:
    """Makes the engine's step as large as the stage's batch."""
    engine.set_train_batch_size(stage.batch)
    if engine.gradient_accumulation_steps() * engine.train_micro_batch_size_per_gpu() * dist.get_world_size() != stage.batch:
        raise ValueError(f"stage {stage.name}: the engine refused batch {stage.batch}")


@contextmanager
def held(engine):
    """Gathers every parameter once, block by block, for the passes inside, which make no gradient of parameters; yields the plain model.

    ZeRO-3's module hooks are parked meanwhile, so the trace that training's prefetch lives on sees none of these passes.
    """
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    model = engine.module
    engine.optimizer.parameter_offload.partition_all_parameters()
    groups = [list(block.parameters()) for block in model.blocks]
    inside = {id(parameter) for group in groups for parameter in group}
    groups.append([parameter for parameter in model.parameters() if id(parameter) not in inside])
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    parked = [(module, kind, getattr(module, kind)) for module in model.modules() for kind in kinds]
    try:
        for group in groups:
            group[0].all_gather_coalesced(group).wait()
        for module, kind, hooks in parked:
            setattr(module, kind, type(hooks)())
        with torch.no_grad():
            yield model
    finally:
        for module, kind, hooks in parked:
            setattr(module, kind, hooks)
        gathered = [parameter for group in groups for parameter in group if parameter.ds_status == ZeroParamStatus.AVAILABLE]
        if gathered:
            gathered[0].partition(param_list=gathered, has_been_updated=False)


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of an fp64 vector over all ranks, on every rank."""
    total = tensor.clone()
    dist.all_reduce(total)
    return total
