"""Everything that knows DeepSpeed: starting ranks, the engine and its state, parameters held for the rollout, sequence parallelism, sums over ranks."""

import json
import os
import socket
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Callable

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor

from rf_train import config
from rf_train.model import Block, CausalWan

PROJECT = Path(__file__).resolve().parent.parent

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


def read_json(file: str) -> tuple[Path, dict]:
    """A DeepSpeed JSON that training can run on, and where it lies. Raises ValueError, in one line, for any other."""
    path = find(file)
    try:
        settings = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    sections = ("zero_optimization", "bf16", "fp16", "data_types", "amp", "torch_autocast")
    nested = [(f"zero_optimization.{key}", "zero_optimization", key) for key in ("offload_optimizer", "offload_param")]
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: expected an object of settings, got {json.dumps(settings)[:60]}")
    for name, holder, key in [(key, None, key) for key in sections] + nested:
        inside = settings if holder is None else settings["zero_optimization"]
        if not isinstance(inside.setdefault(key, {}), dict):
            raise ValueError(f"{path}: {name} is {json.dumps(inside[key])}, expected an object")
        if not inside[key] and key != "zero_optimization":
            del inside[key]
    stage = settings["zero_optimization"].get("stage")
    if stage not in (2, 3) or isinstance(stage, bool):
        raise ValueError(f"{path}: zero_optimization.stage is {json.dumps(stage)}; training runs on ZeRO stage 2 or 3")
    return path, settings


def engine_settings(recipe: config.Recipe, device: torch.device, world: int) -> dict:
    """DeepSpeed's settings: the JSON, completed from the recipe. Raises ValueError, with both values, where the JSON says something else."""
    path, settings = read_json(recipe.run.deepspeed)
    o, s, replicas = recipe.optimizer, recipe.stages[0], world // recipe.run.sequence
    bf16 = recipe.run.precision == "bf16" or (recipe.run.precision == "auto" and device.type == "cuda")
    # DeepSpeed counts every rank as one that has clips of its own; those that share a clip see the same one.
    decided = {
        "train_micro_batch_size_per_gpu": ("optimizer.micro_batch", o.micro_batch),
        "gradient_clipping": ("optimizer.clip", o.clip),
        "train_batch_size": (f"stages.0.batch x run.sequence (stage {s.name})", s.batch * recipe.run.sequence),
        "gradient_accumulation_steps": (f"what follows from batch, micro_batch and ranks (stage {s.name})", s.batch // (o.micro_batch * replicas)),
    }
    for key, (name, value) in decided.items():
        there = settings.get(key, value)
        if there not in (value, "auto") or isinstance(there, bool):
            raise ValueError(f"{path}: {key} is {json.dumps(settings[key])} there, but {value} in the recipe: {name}; remove it from the JSON")
        settings[key] = value
    for key, enabled in (("bf16", bf16), ("fp16", False)):
        if settings.get(key, {}).get("enabled", enabled) not in (enabled, "auto"):
            there = json.dumps(settings[key]["enabled"])
            raise ValueError(f"{path}: {key}.enabled is {there} there, but run.precision={recipe.run.precision} on {device.type} makes it {json.dumps(enabled)}; remove it from the JSON")
        settings[key] = {**settings.get(key, {}), "enabled": enabled}
    for key, ours in (("optimizer", f"AdamW, lr {s.lr:g}, betas {o.beta1:g} and {o.beta2:g}"), ("scheduler", f"stage {s.name}: lr {s.lr:g}, warmup {s.warmup}"),
                      ("sequence_parallel_size", f"run.sequence={recipe.run.sequence}"), ("data_parallel_size", f"{replicas}, from ranks and run.sequence")):  # fmt: skip
        if key in settings:
            raise ValueError(f"{path}: {key} is {json.dumps(settings[key])} there, but the recipe decides it ({ours}); remove it from the JSON")
    for section, key, ours in (("data_types", "grad_accum_dtype", "fp32"), ("amp", "enabled", False), ("torch_autocast", "enabled", False)):
        if settings.get(section, {}).get(key, ours) != ours:
            there = json.dumps(settings[section][key])
            raise ValueError(f"{path}: {section}.{key} is {there} there, but training makes it {json.dumps(ours)}: run.precision decides; remove it from the JSON")
    settings["data_types"] = {"grad_accum_dtype": "fp32"}
    settings["zero_allow_untested_optimizer"] = True
    settings["zero_force_ds_cpu_optimizer"] = False
    settings.setdefault("wall_clock_breakdown", False)
    settings.setdefault("steps_per_print", 10**9)
    return settings


def build_engine(recipe: config.Recipe, device: torch.device, world: int):
    """The sharded model and AdamW in a DeepSpeed engine; each transformer block is gathered as a whole."""
    import deepspeed
    from deepspeed.utils import set_z3_leaf_modules

    settings = engine_settings(recipe, device, world)
    zero = settings["zero_optimization"]
    torch.manual_seed(recipe.run.seed)
    if zero["stage"] == 3:
        with deepspeed.zero.Init(config_dict_or_path=settings):
            model = CausalWan(recipe.model)
        set_z3_leaf_modules(model, [Block])
    else:
        with device:
            model = CausalWan(recipe.model)
    if recipe.run.sequence > 1:
        model.sequence = Sequence(recipe.run.sequence)
    o = recipe.optimizer
    offloaded = zero.get("offload_optimizer", {}).get("device", "none") != "none"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-8, betas=(o.beta1, o.beta2), eps=o.eps, weight_decay=o.weight_decay, fused=offloaded or None)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine


def set_accumulation(engine, stage: config.Stage, sequence: int) -> None:
    """Makes the engine's step as large as the stage's batch."""
    engine.set_train_batch_size(stage.batch * sequence)


@contextmanager
def rollout_model(engine, held_whole: bool):
    """The model for passes without gradient: with parameters held (`held`), or through the engine, which gathers block by block in every pass."""
    if engine.zero_optimization_stage() == 3 and held_whole:
        with held(engine) as model:
            yield model
    else:
        with torch.no_grad():
            yield EngineModel(engine)


class EngineModel:
    """The engine, called as the model is: ZeRO-3's gathers and DeepSpeed's bookkeeping happen around the model's forward."""

    def __init__(self, engine):
        self.engine, model = engine, engine.module
        self.settings, self.chunking, self.new_cache = model.settings, model.chunking, model.new_cache

    def __call__(self, **arguments) -> Tensor:
        return self.engine(**arguments)


@contextmanager
def held(engine, blocks: int | None = None):
    """Gathers every parameter once, block by block, for the passes inside, which make no gradient of parameters; yields the plain model.

    ZeRO-3's module hooks are parked meanwhile, so the trace that training's prefetch lives on sees none of these passes. With `blocks`
    the model has only its first ones meanwhile, for where all don't fit. Under ZeRO-2 parameters are whole at all times.
    """
    if engine.zero_optimization_stage() != 3:
        with torch.no_grad():
            yield engine.module
        return
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    model = engine.module
    engine.optimizer.parameter_offload.partition_all_parameters()
    all_blocks = model.blocks
    inside = {id(parameter) for parameter in all_blocks.parameters()}
    groups = [list(block.parameters()) for block in all_blocks[:blocks]]
    groups.append([parameter for parameter in model.parameters() if id(parameter) not in inside])
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    parked = [(module, kind, getattr(module, kind)) for module in model.modules() for kind in kinds]
    try:
        for group in groups:
            group[0].all_gather_coalesced(group).wait()
        for module, kind, hooks in parked:
            setattr(module, kind, type(hooks)())
        model.blocks = all_blocks[:blocks]
        with torch.no_grad():
            yield model
    finally:
        model.blocks = all_blocks
        for module, kind, hooks in parked:
            setattr(module, kind, hooks)
        gathered = [parameter for group in groups for parameter in group if parameter.ds_status == ZeroParamStatus.AVAILABLE]
        if gathered:
            gathered[0].partition(param_list=gathered, has_been_updated=False)


class Sequence:
    """Sequence parallelism (DeepSpeed's Ulysses): neighbouring ranks share a clip.

    Outside attention each of the `size` ranks has an equal share of every latent frame's tokens; inside self-attention it has all
    tokens of a share of the heads, and its K/V cache holds those. DeepSpeed is not told: it averages gradients over all ranks, and
    `whole` weighs them so that the average is the clip's gradient.
    """

    def __init__(self, size: int):
        self.size, self.rank = size, dist.get_rank() % size
        for first in range(0, dist.get_world_size(), size):
            group = dist.new_group(list(range(first, first + size)))
            if first <= dist.get_rank() < first + size:
                self.group = group

    def share(self, x: Tensor, dim: int) -> Tensor:
        """This rank's share of the tokens of each frame. Raises ValueError when they don't split evenly."""
        if x.shape[dim] % self.size:
            raise ValueError(f"run.sequence={self.size}: a latent frame's {x.shape[dim]} tokens don't split evenly over {self.size} ranks")
        return x.chunk(self.size, dim)[self.rank]

    def attend(self, attention: Callable, q: Tensor, k: Tensor, v: Tensor, tokens: int) -> Tensor:
        """Runs `attention` on all tokens of a share of the heads. q, k, v [B, L, H, D] of this rank's `tokens` of each frame; so is the result."""
        from deepspeed.sequence.layer import DistributedAttention

        def by_frame(x: Tensor) -> Tensor:  # gathered rank after rank -> frame after frame
            return rearrange(x, "b (r f p) h d -> b (f r p) h d", r=self.size, p=tokens)

        def on_heads(*qkv: Tensor) -> Tensor:
            return rearrange(attention(*(by_frame(x) for x in qkv)), "b (f r p) h d -> b (r f p) h d", r=self.size, p=tokens)

        return DistributedAttention(on_heads, self.group, scatter_idx=2, gather_idx=1)(q, k, v, 0)

    def whole(self, x: Tensor, dim: int) -> Tensor:
        """The tokens of all ranks, on every rank."""
        return _Whole.apply(x, dim, self)


class _Whole(torch.autograd.Function):
    """Every rank has the same loss of the whole, so a share's gradient is its part, times the ranks that gradients are averaged over."""

    @staticmethod
    def forward(ctx, x: Tensor, dim: int, sequence: Sequence) -> Tensor:
        ctx.dim, ctx.sequence = dim, sequence
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(sequence.size)]
        dist.all_gather(parts, x.contiguous(), group=sequence.group)
        return torch.cat(parts, dim)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.sequence.share(grad, ctx.dim) * ctx.sequence.size, None, None


@dataclass
class Fragment:
    """What a rank keeps of a parameter in fp32: flat views of the engine's own tensors, and the first element's place in the flattened parameter."""

    begin: int
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


def parameter_shapes(engine) -> dict[str, tuple[int, ...]]:
    """Shapes of the whole parameters by name, partitioned or not."""
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters()}


def fragments(engine) -> dict[str, Fragment]:
    """This rank's fragments by parameter name. Under ZeRO-3 slice r of W: elements [r n, (r + 1) n), n = ceil(numel / W), the last one padded."""
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

    zero, found = engine.optimizer, {}
    partitioned = engine.zero_optimization_stage() == 3
    state = zero.optimizer.state
    for flat in zero.fp32_partitioned_groups_flat if partitioned else zero.single_partition_of_fp32_groups:
        if "exp_avg" not in state[flat]:  # what AdamW makes at its first step: so a state can be loaded or saved before it
            state[flat] = {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(flat), "exp_avg_sq": torch.zeros_like(flat)}
    for name, p in engine.module.named_parameters():
        if partitioned:
            moments = (safe_get_local_optimizer_state(p, kind) for kind in ("exp_avg", "exp_avg_sq"))
            master = safe_get_local_fp32_param(p)
            found[name] = Fragment(dist.get_rank() * master.numel(), master, *moments)
        elif p._hp_mapping is not None:
            place = p._hp_mapping.hp_fragment_address
            flat = zero.single_partition_of_fp32_groups[p._hp_mapping.param_group_index]
            moments = (state[flat][kind].narrow(0, place.start, place.numel) for kind in ("exp_avg", "exp_avg_sq"))
            found[name] = Fragment(p._hp_mapping.lp_fragment_address.start, p._hp_mapping.hp_fragment, *moments)
    return found


def adam_steps(engine) -> list[Tensor]:
    """AdamW's step counters."""
    return [state["step"] for state in engine.optimizer.optimizer.state.values()]


@torch.no_grad()
def use_masters(engine, mine: dict[str, Fragment], whole: Callable[[str], Tensor]) -> None:
    """Makes the weights that passes compute with those of the fp32 masters, which were changed; `whole` gives a parameter's new value in its shape."""
    for name, p in engine.module.named_parameters():
        if engine.zero_optimization_stage() != 3:
            p.data.copy_(whole(name))
            continue
        if p.ds_status.name == "AVAILABLE":
            p.partition()
        p.ds_tensor.data.copy_(mine[name].master.view_as(p.ds_tensor))
    if engine.zero_optimization_stage() == 3:
        engine.optimizer.invalidate_secondary_tensor()


def agree(what: str, **figures: int) -> None:
    """Raises ValueError, on every rank, when ranks don't have the same figures; else they would wait for one another for ever."""
    mine = torch.tensor(list(figures.values()), dtype=torch.int64, device=current_device())
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    for name, values in zip(figures, torch.stack(everyone, dim=1).tolist()):
        if len(set(values)) > 1:
            other = next(rank for rank, value in enumerate(values) if value != values[0])
            raise ValueError(f"{what}: ranks disagree on {name}: {values[0]} on rank 0, {values[other]} on rank {other}; all must read the same recipe and data")


def gather_texts(mine: list[str]) -> list[str]:
    """All ranks' lines, on every rank, in the order of the ranks."""
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return [line for lines in everyone for line in lines]


def current_device() -> torch.device:
    """The device that this rank computes on."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of an fp64 vector over all ranks, on every rank."""
    total = tensor.clone()
    dist.all_reduce(total)
    return total
