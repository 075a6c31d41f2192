"""The training engine: a sharded model and its optimizer.

`Engine` wraps DeepSpeed's own engine. Nothing outside this package touches the inner one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rf_train.config import Recipe
from rf_train.engine.collectives import Ranks, RunError
from rf_train.engine.deepspeed_json import complete_settings
from rf_train.engine.sequence_parallel import Ulysses
from rf_train.model.chunks import Attention
from rf_train.model.elementwise import use_compiled
from rf_train.model.kernels import use_kernel
from rf_train.model.kv_cache import KVCache
from rf_train.model.transformer import Block, CausalWan, VelocityModel


class RolloutMismatch(RunError):
    """A rollout made more or fewer passes than it announced. Ranks would wait for one another forever."""


@dataclass(frozen=True)
class Fragment:
    """What a rank keeps of a parameter in fp32: flat views of the engine's own tensors."""

    begin: int  # position of the first element in the flattened parameter
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


class Engine:
    """A causal DiT and AdamW, sharded over all ranks. It is called like the model: it is a `VelocityModel`.

    This rank belongs to replica number `replica` (0-based) of `replicas`. Ranks that share clips are one replica.
    """

    def __init__(self, inner: Any, ranks: Ranks, sequence_parallel_size: int):
        self._inner = inner
        self.ranks = ranks
        self.sequence_parallel_size = sequence_parallel_size
        self.replica = ranks.rank // sequence_parallel_size
        self.replicas = ranks.world_size // sequence_parallel_size
        model = self.model
        self.settings, self.chunking = model.settings, model.chunking

    @property
    def model(self) -> CausalWan:
        """The model itself. Under ZeRO-3 its parameters are partitioned: see `gathered_parameters`."""
        return self._inner.module

    @property
    def zero_stage(self) -> int:
        return self._inner.zero_optimization_stage()

    # ---- the training step

    def __call__(self, **arguments: Any) -> Tensor:
        """`CausalWan.forward`, with ZeRO-3's gathers around each block."""
        return self._inner(**arguments)

    def new_kv_cache(self, batch: int, tokens_per_frame: int, frames: int, attention: Attention) -> KVCache:
        return self.model.new_kv_cache(batch, tokens_per_frame, frames, attention)

    def set_batch(self, clips: int) -> None:
        """Sets the number of clips of the next step, a stage's batch. Call it before each step."""
        inner = self._inner
        inner.set_train_batch_size(clips * self.sequence_parallel_size)  # DeepSpeed gives each rank clips of its own
        inner.optimizer.gradient_accumulation_steps = inner.gradient_accumulation_steps()
        # DeepSpeed counts micro-steps from the run's beginning. After a change of the batch its steps would end late.
        inner.micro_steps = 0

    def set_learning_rate(self, rate: float) -> None:
        for group in self._inner.optimizer.param_groups:
            group["lr"] = rate

    @property
    def learning_rate(self) -> float:
        return self._inner.optimizer.param_groups[0]["lr"]

    def backward(self, loss: Tensor) -> None:
        """Backward of one micro-batch; gradients are summed until the step."""
        self._inner.backward(loss)

    def step(self) -> bool:
        """Ends a micro-step. After the last micro-step of a step, the optimizer changes the weights.

        Returns whether it did. If the gradient isn't finite on some rank, the step is skipped on all ranks.
        """
        self._inner.step()
        return self._inner.was_step_applied()

    @property
    def gradient_norm(self) -> float:
        """Norm of the last step's gradient over all ranks, before clipping."""
        return float(self._inner.get_global_grad_norm() or 0.0)

    # ---- passes without gradient

    @contextmanager
    def rollout(self, passes: int, gather: bool) -> Iterator[VelocityModel]:
        """Yields the model for a rollout of exactly `passes` passes without gradient.

        Every rank must enter, with the same number. With `gather`, parameters are gathered once, else in every pass.
        Raises RolloutMismatch on a rank that makes more or fewer passes than it announced, so that its peers don't wait
        for it forever.
        """
        if gather and self.zero_stage == 3:
            with self.gathered_parameters() as model:
                counted = _CountedPasses(model, passes)
                yield counted
                counted.check_all_made()
        else:
            with torch.no_grad():
                counted = _CountedPasses(self, passes)
                yield counted
                counted.check_all_made()

    @contextmanager
    def gathered_parameters(self, blocks: int | None = None) -> Iterator[CausalWan]:
        """Gathers every parameter once, block by block, and yields the plain model for passes without gradient.

        ZeRO-3's module hooks are removed meanwhile. So these passes don't enter the trace of the training passes, which
        prefetching needs. With `blocks` the model has only that many first blocks meanwhile: for checks when a whole
        copy doesn't fit. Under ZeRO-2 parameters are always whole.
        """
        model = self.model
        if self.zero_stage != 3:
            with torch.no_grad():
                yield model
            return
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        self._inner.optimizer.parameter_offload.partition_all_parameters()
        all_blocks = model.blocks
        in_blocks = {id(parameter) for parameter in all_blocks.parameters()}
        # Any: ZeRO-3 gives parameters methods of its own
        groups: list[list[Any]] = [list(block.parameters()) for block in all_blocks[:blocks]]
        groups.append([parameter for parameter in model.parameters() if id(parameter) not in in_blocks])
        kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
        hooks_aside = [(module, kind, getattr(module, kind)) for module in model.modules() for kind in kinds]
        try:
            for group in groups:
                group[0].all_gather_coalesced(group).wait()
            for module, kind, hooks in hooks_aside:
                setattr(module, kind, type(hooks)())
            model.blocks = all_blocks[:blocks]
            with torch.no_grad():
                yield model
        finally:
            model.blocks = all_blocks
            for module, kind, hooks in hooks_aside:
                setattr(module, kind, hooks)
            everything = [parameter for group in groups for parameter in group]
            gathered = [parameter for parameter in everything if parameter.ds_status == ZeroParamStatus.AVAILABLE]
            if gathered:
                gathered[0].partition(param_list=gathered, has_been_updated=False)

    # ---- the state of a run

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the whole parameters by name, partitioned or not."""
        return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self.model.named_parameters()}

    def fragments(self) -> dict[str, Fragment]:
        """This rank's fragments by parameter name.

        Under ZeRO-3, rank r of W has elements [r n, (r + 1) n) of each flattened parameter, n = ceil(numel / W); the
        last slice is padded.
        """
        zero = self._inner.optimizer
        flats = zero.fp32_partitioned_groups_flat if self.zero_stage == 3 else zero.single_partition_of_fp32_groups
        for flat in flats:
            self._make_moments(flat)
        find = self._zero3_fragment if self.zero_stage == 3 else self._zero2_fragment
        found = {name: find(parameter) for name, parameter in self.model.named_parameters()}
        return {name: fragment for name, fragment in found.items() if fragment is not None}

    def _make_moments(self, flat: Tensor) -> None:
        """Makes the moments that AdamW would make at its first step, to load or save a state before that."""
        adam = self._inner.optimizer.optimizer
        if "exp_avg" not in adam.state[flat]:
            moments = {kind: torch.zeros_like(flat) for kind in ("exp_avg", "exp_avg_sq")}
            steps_on = flat.device if adam.param_groups[0]["fused"] else torch.device("cpu")
            adam.state[flat] = {"step": torch.tensor(0.0, device=steps_on), **moments}

    def _zero3_fragment(self, parameter: Any) -> Fragment:
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        master = safe_get_local_fp32_param(parameter)
        moments = (safe_get_local_optimizer_state(parameter, kind) for kind in ("exp_avg", "exp_avg_sq"))
        return Fragment(self.ranks.rank * master.numel(), master, *moments)

    def _zero2_fragment(self, parameter: Any) -> Fragment | None:
        """None when this rank has nothing of the parameter."""
        zero, mapping = self._inner.optimizer, parameter._hp_mapping
        if mapping is None:
            return None
        place = mapping.hp_fragment_address
        state = zero.optimizer.state[zero.single_partition_of_fp32_groups[mapping.param_group_index]]
        moments = (state[kind].narrow(0, place.start, place.numel) for kind in ("exp_avg", "exp_avg_sq"))
        return Fragment(mapping.lp_fragment_address.start, mapping.hp_fragment, *moments)

    def adam_steps(self) -> list[Tensor]:
        """AdamW's step counters."""
        return [state["step"] for state in self._inner.optimizer.optimizer.state.values()]

    @torch.no_grad()
    def copy_masters_to_weights(self, fragments: dict[str, Fragment], whole: Callable[[str], Tensor]) -> None:
        """Copies changed fp32 masters to the weights that passes compute with.

        `whole(name)` gives the new value of a whole parameter; it is called only under ZeRO-2.
        """
        for name, parameter in self.model.named_parameters():
            if self.zero_stage != 3:
                parameter.data.copy_(whole(name))
                continue
            partitioned: Any = parameter
            if partitioned.ds_status.name == "AVAILABLE":
                partitioned.partition()
            partitioned.ds_tensor.data.copy_(fragments[name].master.view_as(partitioned.ds_tensor))
        if self.zero_stage == 3:
            self._inner.optimizer.invalidate_secondary_tensor()

    def destroy(self) -> None:
        """Frees the engine's memory."""
        self._inner.destroy()


def build_engine(recipe: Recipe, ranks: Ranks) -> Engine:
    """The sharded model and AdamW of a recipe, with weights from its seed.

    Under ZeRO-3 each block is gathered as a whole.
    """
    import deepspeed
    from deepspeed.utils import set_z3_leaf_modules

    settings = complete_settings(recipe, ranks.device.type, ranks.world_size)
    zero = settings["zero_optimization"]
    use_compiled(recipe.run.compile)
    use_kernel(recipe.model.attention_kernel)
    torch.manual_seed(recipe.run.seed)
    if zero["stage"] == 3:
        with deepspeed.zero.Init(config_dict_or_path=settings):
            model = CausalWan(recipe.model)
        set_z3_leaf_modules(model, [Block])
    else:
        with ranks.device:
            model = CausalWan(recipe.model)
    if recipe.run.sequence_parallel_size > 1:
        model.sequence_parallel = Ulysses(recipe.run.sequence_parallel_size)
    o = recipe.optimizer
    offloaded = zero.get("offload_optimizer", {}).get("device", "none") != "none"
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=1e-8,  # every step sets its own
        betas=(o.beta1, o.beta2),
        eps=o.eps,
        weight_decay=o.weight_decay,
        fused=offloaded or ranks.device.type == "cuda" or None,
    )
    inner, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    if zero["stage"] == 2:
        # DeepSpeed looks at each parameter's gradient for values that aren't finite, in a dozen kernels each: 0.1 s per
        # step on a GPU. The gradient's norm, which it computes next, shows them all, and is checked in the same way.
        inner.optimizer.check_overflow = lambda partition_gradients=True: None
    return Engine(inner, ranks, recipe.run.sequence_parallel_size)


class _CountedPasses:
    """A model that may be called exactly `announced` times."""

    def __init__(self, model: VelocityModel, announced: int):
        self._model, self._announced, self._made = model, announced, 0
        self.settings, self.chunking, self.new_kv_cache = model.settings, model.chunking, model.new_kv_cache

    def __call__(self, **arguments: Any) -> Tensor:
        self._made += 1
        if self._made > self._announced:
            raise RolloutMismatch(self._message("more"))
        return self._model(**arguments)

    def check_all_made(self) -> None:
        if self._made != self._announced:
            raise RolloutMismatch(self._message(str(self._made)))

    def _message(self, made: str) -> str:
        rank = dist.get_rank() if dist.is_initialized() else 0
        return (
            f"a rollout announced {self._announced} passes and made {made} on rank {rank}: all ranks must make exactly "
            "the passes that the history's rollout_passes declares"
        )
