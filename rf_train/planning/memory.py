"""Memory that a stage of a recipe takes on a GPU, item by item and phase by phase, in bytes.

It is counted from what the code keeps; nothing is fitted. In formulas, D is model.dim, and `a` is the bytes of a weight
or activation.
"""

import itertools
import math
from dataclasses import dataclass, replace
from functools import cache

import torch

from rf_train.diffusion.randomness import LOSS_DRAWS
from rf_train.model.chunks import ModelPass, Routed, Window
from rf_train.model.kernels import best_on_hopper
from rf_train.model.kv_cache import kv_cache_bytes
from rf_train.model.routing import TILE, bytes_per_query, piece_size, tiles_in
from rf_train.planning.costs import StageCase, query_counts

ROOM = 0.10  # of a GPU's memory, left to the CUDA context, NCCL and the allocator's fragments


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes on a GPU. The peak is the states plus the largest phase, because phases never overlap."""

    states: dict[str, int]  # what is there from the first step to the last
    phases: dict[str, dict[str, int]]  # {phase: items}
    host: int  # bytes of host memory per GPU

    @property
    def phase(self) -> str:
        """The phase of the peak."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> int:
        return sum(self.states.values()) + sum(self.phases[self.phase].values())


@cache
def memory(case: StageCase) -> MemoryNeed:
    """The memory that a stage needs."""
    copies, zero = gathered_bytes(case), case.zero
    summed = (
        4 * case.parameters_per_rank if zero.stage == 2 and case.micro_steps > 1 and not zero.offload_optimizer else 0
    )
    phases = {}
    if case.rolls_out:
        phases["rollout"] = {
            "K/V cache": rollout_cache_bytes(case),
            "gathered": copies["rollout"],
            "working": rollout_working_bytes(case),
            "gradients": summed,
        }
    for name, (kept, working) in activation_bytes(case).items():
        phases[name] = {
            "activations": kept,
            "working": working,
            "gathered": copies[name],
            "reducing": reducing_bytes(case) if name == "backward" else 0,
            "gradients": summed,
        }
    phases["step"] = {"working": step_working_bytes(case)}
    return MemoryNeed(state_bytes(case), phases, host_bytes(case))


def fits(case: StageCase) -> bool:
    return memory(case).peak <= (1 - ROOM) * case.cluster.memory


# ---- what is always there


def state_bytes(case: StageCase) -> dict[str, int]:
    """What is there from the first step to the last.

    As in Rajbhandari et al., ZeRO, section 3.1, plus fp32 gradient sums and the average.
    """
    zero, a, own = case.zero, case.value_bytes, case.parameters_per_rank
    on_gpu = 0 if zero.offload_optimizer else own
    whole_or_own = case.parameters if zero.stage == 2 else 0 if zero.offload_parameters else own
    return {
        "parameters": whole_or_own * a,
        # The sum over micro-steps, fp32. ZeRO-2 has it from the first backward to the step.
        "gradients": 4 * on_gpu if zero.stage == 3 else 0,
        "optimizer": 12 * on_gpu,  # fp32 master and two moments
        "average": 4 * on_gpu,
        "second copy (hpZ)": case.parameters * a // zero.secondary if zero.secondary > 1 else 0,
        "bucket": bucket_bytes(case) if zero.stage == 3 else 0,  # ZeRO-2 has it during backward
        "clips": clip_bytes(case),
    }


def bucket_bytes(case: StageCase) -> int:
    """The buffer in which gradients are reduced; two of them under ZeRO-2 with overlap_comm.

    On a CPU, memory that was never written isn't resident.
    """
    size = case.zero.bucket * (2 if case.zero.stage == 2 and case.zero.overlap else 1)
    used = size if case.cluster.device == "cuda" else min(size, case.parameters)
    return used * (case.zero.communication or case.value_bytes)


def clip_bytes(case: StageCase) -> int:
    """A micro-batch as every rank has it, in fp32, and the rotary tables.

    The micro-batch: clips, their noise, captions, noised clips, and the history unless it is the clip itself. The
    complex tables of both streams and of the rollout's chunks are cached, and a training pass joins those of both
    streams into another one.
    """
    model, clip, history = case.recipe.model, case.clip, case.stage.history
    latent = case.micro_batch * model.channels * clip.height * clip.width
    noises = sum(draw.per == "latent" for draw in [*LOSS_DRAWS.values(), *history.draws.values()])
    history_frames = 0 if history.is_the_clip else case.history_frames
    numbers = (
        latent * ((2 + noises) * clip.frames + history_frames) + case.micro_batch * model.text_len * model.text_dim
    )
    tables = 2 * (case.history_frames + clip.frames) + (case.history_frames if case.rolls_out else 0)
    return 4 * (numbers + tables * case.tokens_per_frame * model.head_dim)


def host_bytes(case: StageCase) -> int:
    """Host memory of a rank with offloading.

    An offloaded optimizer: masters, moments, average, and gradient sums twice (DeepSpeed's buffer and AdamW's).
    Offloaded parameters: this rank's slices.
    """
    optimizer = 24 * case.parameters_per_rank * case.zero.offload_optimizer
    return optimizer + case.value_bytes * case.parameters_per_rank * case.zero.offload_parameters


# ---- what backward needs


def rms_saved(case: StageCase, tokens: int) -> int:
    """What nn.RMSNorm over D keeps for backward.

    Fused, on a GPU or compiled: input and 1 / rms. Else: input and normalised input, both fp32, and 1 / rms.
    """
    width, fused = case.recipe.model.dim, case.cluster.device == "cuda" or case.recipe.run.compile
    return tokens * (case.value_bytes * width + 4) if fused else tokens * (8 * width + 4)


def attention_saved(case: StageCase, last: bool) -> dict[str, int]:
    """What one block's self-attention keeps for backward. `last`: the last block, with only noisy queries."""
    model, a = case.recipe.model, case.value_bytes
    noisy, both = case.tokens(case.clip.frames), case.tokens(case.clip.frames + case.history_frames)
    asking = noisy if last else both
    kept = {
        "attention q, k, v": a * model.dim * (asking + 2 * both),  # q in the order of the kernel calls
        "attention output": a * model.dim * asking + 4 * model.heads * asking,  # and log-sums
    }
    if isinstance(case.attention, Routed):
        slots = case.attention.read_chunks + 1
        heads = model.heads // case.sequence_ranks
        kept["attention slots"] = 2 * case.micro_batch * heads * routed_queries(case, case.training_pass, last) * slots
    return kept


def routed_queries(case: StageCase, model_pass: ModelPass, last: bool) -> int:
    """The tokens of a pass that choose chunks, of one clip: those of chunks with more earlier ones than they read."""
    if not isinstance(case.attention, Routed):
        return 0
    counts = query_counts(case, model_pass, last)
    return case.tokens_per_frame * sum(
        count.chunk.length for count in counts if count.chunk.index > case.attention.read_chunks
    )


def routing_working_bytes(case: StageCase, model_pass: ModelPass) -> int:
    """What routed attention gathers at once and, in bf16, the sums of the keys' gradients in fp32."""
    queries = routed_queries(case, model_pass, False)
    if not isinstance(case.attention, Routed) or not queries:
        return 0
    model, slots = case.recipe.model, case.attention.read_chunks
    one = bytes_per_query(slots, model.head_dim, case.value_bytes)
    heads = model.heads // case.sequence_ranks
    size = piece_size(heads, queries, len(case.chunk_sizes), one, case.cluster.device)
    sums = 0 if case.value_bytes == 4 else 8 * model.head_dim * size[0] * case.tokens_per_frame * case.clip.frames
    kernel, repeatable = model.attention_kernel, case.recipe.run.deterministic
    kernel = best_on_hopper(model.head_dim, repeatable) if kernel == "auto" else kernel
    tile = TILE[case.cluster.device] if kernel == "cudnn" else 0
    rows, bounds = slots * math.prod(size), (0, *itertools.accumulate(case.chunk_sizes[:-1]))
    if tiles := tiles_in(rows, size[0], bounds, tile):
        # padding; and of each tile its keys and values, their gradients, one of them in fp32
        rows, keys = tiles * tile, tiles * model.chunking.largest * case.tokens_per_frame
        sums += keys * model.head_dim * (4 * case.value_bytes + 4)
    return one * rows // slots + sums


def block_saved(case: StageCase, last: bool) -> dict[str, int]:
    """What one block keeps for backward without recomputation, by class of tensor, in the order of `transformer.Block`.

    `last`: the last block, in which history tokens only give keys and values. With fp32 weights `.float()` copies
    nothing; with bf16 it is a copy. Layer norms and modulations compute in fp32 in both cases. Linear layers keep their
    inputs, `addcmul` keeps its factors.
    """
    model, a, clips = case.recipe.model, case.value_bytes, case.micro_batch
    dim, text = model.dim, clips * model.text_len
    all_frames = case.clip.frames + case.history_frames
    both = case.tokens(all_frames)
    asking = case.tokens(case.clip.frames) if last else both
    asking_frames = case.clip.frames if last else all_frames
    # Compiled, the work between the matrix multiplications keeps its inputs, in their own dtype.
    compiled = case.recipe.run.compile
    wide = a if compiled else 4
    return {
        "modulation": 4 * clips * dim * (7 * all_frames + asking_frames),  # six vectors per frame, and 1 + scale twice
        "block input": wide * both * dim + 8 * both,  # with mean and deviation
        "norm 1": 0 if compiled else 4 * both * dim,
        # the noisy part of several clips is a copy
        "q, k, v input": a * dim * (both + (asking if last and clips > 1 else 0)),
        "q and k norms": rms_saved(case, asking) + rms_saved(case, both),
        **attention_saved(case, last),
        "output projection": a * asking * dim + wide * asking * dim,  # its input and its result
        "norm 2": a * asking * dim + 8 * asking + a * asking * dim,
        "cross-attention q": rms_saved(case, asking) + a * asking * dim,
        "cross-attention output": a * asking * dim + 4 * model.heads * asking,
        "caption's k and v": rms_saved(case, text) + 2 * a * text * dim,
        # input, result, ffn's input
        "norm 3": (a if compiled else 8) * asking * dim + 8 * asking + a * asking * dim,
        "ffn hidden": 2 * a * asking * model.ffn_dim,  # before and after GELU
        "ffn output": wide * asking * dim,
    }


def ends_saved(case: StageCase) -> tuple[int, int]:
    """What is kept for backward by (the layers before the blocks, the layers after them)."""
    model, a, clips = case.recipe.model, case.value_bytes, case.micro_batch
    frames, text = case.clip.frames + case.history_frames, clips * model.text_len
    latent = clips * model.channels * case.clip.height * case.clip.width
    cast = 0 if a == 4 else 1
    before = cast * a * latent * frames  # the patches' input, when it isn't fp32 itself
    before += 4 * clips * frames * (model.freq_dim + 4 * model.dim)  # time embedding, fp32 as its weights then are
    before += cast * 4 * model.dim * (model.freq_dim + 7 * model.dim)
    before += 0 if model.checkpointing == "none" else 24 * clips * frames * model.dim  # modulation, an input of blocks
    before += cast * a * text * model.text_dim + 3 * a * text * model.dim  # caption
    tokens = case.tokens(case.clip.frames)
    if case.recipe.run.compile:
        after = tokens * model.dim * 2 * a + 8 * tokens  # the norm's input, proj_out's input
    else:
        # norm, modulation, proj_out's input; 1 + scale
        after = tokens * model.dim * (8 + a) + 8 * tokens + 4 * clips * case.clip.frames * model.dim
    after += latent * case.clip.frames * (a + 4 * cast + 4)  # velocity and its error
    return before, after


def activation_bytes(case: StageCase) -> dict[str, tuple[int, int]]:
    """A training pass where it may peak, at the end of "forward" and in "backward": (what blocks keep, the rest).

    In backward a block needs most at the second layer of its ffn, because nothing of the block is freed yet. It also
    has the gradients of the residual stream, of the ffn's output, of its hidden layer and of that layer's weight. The
    peak is in the last block or in the block before it, where history tokens go through all layers.
    """
    model, a = case.recipe.model, case.value_bytes
    before, after = ends_saved(case)
    full, last = block_saved(case, False), block_saved(case, True)
    frames = case.clip.frames + case.history_frames
    both, noisy = case.tokens(frames), case.tokens(case.clip.frames)
    # gradients of modulation and caption
    conditions = 4 * case.micro_batch * frames * 6 * model.dim + a * case.micro_batch * model.text_len * model.dim

    def gradients(tokens: int) -> int:
        return tokens * (a * model.ffn_dim + (4 + a) * model.dim) + a * model.dim * model.ffn_dim + conditions

    whole_full, whole_last = sum(full.values()), sum(last.values())
    in_last, in_full = gradients(noisy) - last["ffn output"], gradients(both) - full["ffn output"]
    routing = routing_working_bytes(case, case.training_pass)  # in attention, while the ffn's gradients are freed
    in_last, in_full = max(in_last, routing), max(in_full, routing)
    inputs, results_full, results_last = a * both * model.dim, 0, 0
    if model.checkpointing in ("selective", "auto"):
        results_full, results_last = full["attention output"], last["attention output"]
    shared = inputs if a == 4 else 0  # an fp32 block input is kept once
    first_kept = model.layers - {"none": model.layers, "auto": case.kept_blocks}.get(model.checkpointing, 0)

    def in_backward(position: int) -> tuple[int, int]:
        """(what blocks keep, the rest) in the backward of the block at `position`, when later blocks are freed."""
        is_last = position == model.layers - 1
        whole, results, working = (
            (whole_last, results_last, in_last) if is_last else (whole_full, results_full, in_full)
        )
        earlier = before + min(position, first_kept) * (inputs + results_full)
        earlier += max(0, position - first_kept) * whole_full
        if position >= first_kept:
            return earlier + whole, working
        return earlier + inputs + results, whole - shared - results + working

    # the last block, the one before it, and the last one that is recomputed
    positions = {model.layers - 1, model.layers - 2, first_kept - 1} & set(range(model.layers))
    kept = in_backward(model.layers - 1)[0]
    return {"forward": (kept, after), "backward": max(map(in_backward, positions), key=sum)}


def with_kept_blocks(case: StageCase) -> StageCase:
    """With model.checkpointing=auto: the same with as many kept blocks as fit, none if nothing fits."""
    if case.recipe.model.checkpointing != "auto":
        return case
    fitting = (count for count in range(case.recipe.model.layers, 0, -1) if fits(replace(case, kept_blocks=count)))
    return replace(case, kept_blocks=next(fitting, 0))


def reducing_bytes(case: StageCase) -> int:
    """Memory that reducing gradients takes while activations peak in backward."""
    if case.cluster.device != "cuda":  # elsewhere nothing overlaps, and a bucket is empty when activations peak
        return 0
    zero, reducing = case.zero, 0
    if zero.overlap:  # the previous block's gradients, and the flat copy of a bucket
        reducing += case.block_parameters * case.value_bytes
        reducing += min(zero.bucket, case.parameters) * (zero.communication or case.value_bytes)
    return reducing + (bucket_bytes(case) if zero.stage == 2 else 0)


# ---- parameters, rollout, optimizer step


def gathered_bytes(case: StageCase) -> dict[str, int]:
    """Gathered parameters at the peak of "rollout", "forward" and "backward".

    A gather fills a flat buffer and copies each parameter out of it. The buffer of a prefetch stays until the last of
    its parameters is used. A single rank gathers nothing.
    """
    zero, a, total = case.zero, case.value_bytes, case.parameters
    if zero.stage == 2 or (case.cluster.gpus == 1 and not zero.offload_parameters):
        return dict.fromkeys(("rollout", "forward", "backward"), 0)
    block = case.block_parameters
    ends, ahead = total - case.recipe.model.layers * block, min(total, zero.prefetch)
    live = min(total, case.reused_parameters + block + ahead + ends)
    buffer = max(block, ahead)
    if case.gather_for_rollout or not case.rolls_out:
        in_backward = a * (live + (buffer if live < total else 0))
        return {"rollout": a * (total + block), "forward": a * (live + buffer), "backward": in_backward}
    # Rollouts under ZeRO-3's hooks spoil the trace that prefetching needs.
    return {"rollout": a * (live + buffer), **dict.fromkeys(("forward", "backward"), a * (live + block))}


def rollout_cache_bytes(case: StageCase) -> int:
    """The rollout's K/V cache, as `CausalWan.new_kv_cache` sizes it, and the keys and values of captions."""
    if not any(model_pass.cache is not None for model_pass in case.rollout_passes):
        return 0
    model, largest = case.recipe.model, case.recipe.model.chunking.largest
    frames, scratch = case.history_frames, largest
    if isinstance(case.attention, Window):
        frames = min(frames, (case.attention.window + 1 + case.attention.sink) * largest)
    elif case.cluster.device == "cpu":  # only what is written: cached history, and the newest chunk as a noisy one
        scratch = 0
    dtype = torch.bfloat16 if case.value_bytes == 2 else torch.float32
    tokens, heads = (frames + scratch) * case.tokens_per_frame, model.heads // case.sequence_ranks
    keys = kv_cache_bytes(model.layers, case.micro_batch, heads, tokens, model.head_dim, dtype)
    return keys + 2 * case.value_bytes * model.layers * case.micro_batch * model.text_len * model.dim


def rollout_working_bytes(case: StageCase) -> int:
    """One pass of a rollout without cache and parameters: the larger of attention and ffn, and routing's rows."""
    if not case.rolls_out:
        return 0
    model, a = case.recipe.model, case.value_bytes
    largest = max(case.rollout_passes, key=lambda model_pass: model_pass.frames)
    tokens = case.tokens(largest.frames)
    # cached: x, y, q, k, v, output; fp32 copy and product of the rotation
    # else: y, q, k, v, q in the order of the kernel calls, output; its fp32 sum; a call's result twice
    attention = 6 * a + 8 if largest.cache is not None else 6 * a + 4 + (a + 4)
    ffn = 3 * a + 2 * a * model.ffn_dim / model.dim  # x, y, result; hidden layer before and after GELU
    return int(tokens * model.dim * max(attention, ffn)) + routing_working_bytes(case, largest)


def step_working_bytes(case: StageCase) -> int:
    """The optimizer step: the flattened gradients of a sub-group, and AdamW's temporaries.

    There is none on a GPU (fused), and two of the same size on a CPU. If the end of backward needs more, it counts
    instead: the last bucket is copied to be reduced. gloo copies it again, because its reduce-scatter is an
    all-reduce of a copy. Under ZeRO-2 the bucket and the new gradients are there, too, besides the sum.
    """
    zero, elements = case.zero, 0 if case.zero.offload_optimizer else case.parameters_per_rank
    copies = 2 if zero.stage == 3 and case.cluster.device == "cpu" and case.cluster.gpus > 1 else 1
    reducing = copies * min(zero.bucket, case.parameters) * (zero.communication or case.value_bytes)
    if zero.stage == 2:
        reducing += bucket_bytes(case) + 4 * elements * (2 if case.micro_steps > 1 else 1)
    else:
        elements = min(elements, zero.sub_group)
    return max(4 * elements * (1 if case.cluster.device == "cuda" else 3), reducing)
