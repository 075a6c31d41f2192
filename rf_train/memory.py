"""Memory that a stage of a recipe takes on a GPU, item by item and phase by phase, counted from what the code keeps; nothing is fitted. In bytes.

Letters: W ranks, S ranks a clip (run.sequence), B clips a micro-batch, T tokens of both streams on this rank (1 / S of each frame),
N those of the noisy stream, D model.dim, F model.ffn_dim, a bytes of a weight or activation (2 for bf16, 4 for fp32).
"""

from functools import lru_cache

import torch

from rf_train.cache import cache_bytes
from rf_train.costs import Case, jobs

ROOM = 0.10  # of a GPU's memory, left to the CUDA context, NCCL and the allocator's fragments


def states(case: Case) -> dict[str, int]:
    """Bytes on a GPU from the first step to the last (Rajbhandari et al., ZeRO, section 3.1, with fp32 gradient sums and an average added)."""
    zero, a, own = case.zero, case.a, case.slice
    on_gpu = 0 if zero.offload_optimizer else own
    return {
        "parameters": case.parameters * a if zero.stage == 2 else 0 if zero.offload_parameters else own * a,
        "gradients": 4 * on_gpu if zero.stage == 3 else 0,  # the sum over micro-batches, fp32; ZeRO-2 has it from the first backward to the step
        "optimizer": 12 * on_gpu,  # fp32 master and two moments
        "average": 4 * on_gpu,
        "second copy (hpZ)": case.parameters * a // zero.secondary if zero.secondary > 1 else 0,
        "bucket": bucket_bytes(case) if zero.stage == 3 else 0,  # ZeRO-2 has it during backward
        "clips": clip_bytes(case),
    }


def bucket_bytes(case: Case) -> int:
    """Bytes of the buffer in which gradients go to be reduced; two of them under ZeRO-2 with overlap_comm. On a CPU what was never written isn't resident."""
    size = case.zero.bucket * (2 if case.zero.stage == 2 and case.zero.overlap else 1)
    return (size if case.cluster.device == "cuda" else min(size, case.parameters)) * (case.zero.communication or case.a)


def clip_bytes(case: Case) -> int:
    """A micro-batch as every rank has it, in fp32, and the rotary tables.

    Clip, two noises, captions, noised clip and history, unless that is the clip itself. The tables, complex, stay once made: those of both
    streams and of the rollout's chunks; a pass joins them.
    """
    model, clip = case.recipe.model, case.clip
    latent = case.micro * model.channels * clip.height * clip.width
    history = 0 if case.stage.history == "clean" else case.history_frames
    numbers = 3 * latent * clip.frames + case.micro * model.text_len * model.text_dim + latent * (clip.frames + history)
    tables = 2 * (case.history_frames + clip.frames) + (case.history_frames if case.rolls_out else 0)
    return 4 * (numbers + tables * case.frame * model.dim // model.heads)


def host_bytes(case: Case) -> int:
    """Bytes of host memory a rank takes with offloading: masters, moments, average, gradient sums twice (DeepSpeed's buffer and AdamW's); bf16 parameters."""
    return 24 * case.slice * case.zero.offload_optimizer + case.a * case.slice * case.zero.offload_parameters


def rms_saved(case: Case, tokens: int) -> int:
    """nn.RMSNorm over D: fused on a GPU (input, 1 / rms); elsewhere the input and the normalised input, both fp32, and 1 / rms."""
    width = case.recipe.model.dim
    return tokens * (case.a * width + 4) if case.cluster.device == "cuda" else tokens * (8 * width + 4)


def attention_saved(case: Case, last: bool) -> dict[str, int]:
    """Bytes that self-attention keeps for backward in one block; `last`: the noisy stream alone asks."""
    model, a = case.recipe.model, case.a
    noisy, both = case.tokens(case.clip.frames), case.tokens(case.clip.frames + case.history_frames)
    asks, heads = noisy if last else both, model.heads
    kept = {
        "attention q, k, v": a * model.dim * (asks + 2 * both),  # q in the order of the kernel calls
        "attention output": a * model.dim * asks + 4 * heads * asks,  # and log-sums
    }
    if case.attention.kind == "routed":
        keys, mask = routed_extra(case, last)
        kept["attention keys copied a chunk"] = keys
        kept["attention mask"] = mask
    return kept


def routed_extra(case: Case, last: bool) -> tuple[int, int]:
    """Routing's (copies of keys and values, masks), as `attention.routed_job` makes them, one job a chunk.

    History and own chunk of a noisy chunk don't stand together, so both are copied; where there are more than k earlier chunks, SDPA
    makes of the bool mask [B, H, queries, keys] one in the activations' type, and keeps it.
    """
    model, a, copied, masks = case.recipe.model, case.a, 0, 0
    for index, noisy, asks, keys in jobs(case, last):
        if noisy and index:
            copied += 2 * a * model.dim * case.micro * keys * case.frame // case.sequence
        if index > case.attention.k:
            masks += a * case.micro * (model.heads // case.sequence) * asks * keys * case.frame**2
    return copied, masks


def block_saved(case: Case, last: bool) -> dict[str, int]:
    """Bytes that one block keeps for backward without recomputation, by class of tensor, in the order in which they are made (`model.Block`).

    `last`: the last block, whose history tokens end at keys and values. With fp32 weights `.float()` copies nothing, with bf16 it is a copy of
    its own; layer norms and modulations compute in fp32 in both. Linear layers keep their inputs, `addcmul` its factors.
    """
    model, a, clips = case.recipe.model, case.a, case.micro
    dim, text = model.dim, clips * model.text_len
    all_frames = case.clip.frames + case.history_frames
    t = case.tokens(all_frames)
    n = case.tokens(case.clip.frames) if last else t
    n_frames = case.clip.frames if last else all_frames
    return {
        "modulation": 4 * clips * dim * (7 * all_frames + n_frames),  # six vectors a frame, and 1 + scale twice
        "block input": 4 * t * dim + 8 * t,  # with mean and deviation
        "norm 1": 4 * t * dim,
        "q, k, v input": a * dim * (t + (n if last and clips > 1 else 0)),  # the noisy part of several clips is a copy
        "q and k norms": rms_saved(case, n) + rms_saved(case, t),
        **attention_saved(case, last),
        "output projection": a * n * dim + 4 * n * dim,  # its input and its result
        "norm 2": a * n * dim + 8 * n + a * n * dim,
        "cross-attention q": rms_saved(case, n) + a * n * dim,
        "cross-attention output": a * n * dim + 4 * model.heads * n,
        "caption's k and v": rms_saved(case, text) + 2 * a * text * dim,
        "norm 3": 8 * n * dim + 8 * n + a * n * dim,  # input, result, ffn's input
        "ffn hidden": 2 * a * n * model.ffn_dim,  # before and after GELU
        "ffn output": 4 * n * dim,
    }


def ends_saved(case: Case) -> tuple[int, int]:
    """Bytes kept by (what comes before the blocks, what comes after)."""
    model, a, clips = case.recipe.model, case.a, case.micro
    frames, text = case.clip.frames + case.history_frames, clips * model.text_len
    latent = clips * model.channels * case.clip.height * case.clip.width
    cast = 0 if a == 4 else 1
    before = (
        cast * a * latent * frames  # the patches' input, when it isn't fp32 itself
        + a * clips * frames * (model.freq_dim + 4 * model.dim)  # time embedding
        + (0 if model.checkpointing == "none" else 24 * clips * frames * model.dim)  # modulation, an input of recomputed blocks
        + cast * a * text * model.text_dim + 3 * a * text * model.dim  # caption
    )  # fmt: skip
    n = case.tokens(case.clip.frames)
    after = n * model.dim * (8 + a) + 8 * n + 4 * clips * case.clip.frames * model.dim  # norm, modulation, proj_out's input; 1 + scale
    after += latent * case.clip.frames * (a + 4 * cast + 4)  # velocity and its error
    return before, after


def activations(case: Case) -> dict[str, tuple[int, int]]:
    """Bytes of a training pass, as (what blocks keep, the rest), where they may peak: {"forward": at its end, "backward": in a block}.

    In backward a block has most at its ffn's second layer: nothing of it is freed yet, and the gradients of the residual stream, of the ffn's output, of its
    hidden layer and of that layer's weight are there. It is the last block or, whose history tokens go all the way, the one before.
    """
    model, a = case.recipe.model, case.a
    before, after = ends_saved(case)
    full, last = block_saved(case, False), block_saved(case, True)
    frames = case.clip.frames + case.history_frames
    t, n = case.tokens(frames), case.tokens(case.clip.frames)
    conditions = 4 * case.micro * frames * 6 * model.dim + a * case.micro * model.text_len * model.dim  # gradients of modulation and caption

    def gradients(tokens: int) -> int:
        return tokens * (a * model.ffn_dim + (4 + a) * model.dim) + a * model.dim * model.ffn_dim + conditions

    whole_full, whole_last = sum(full.values()), sum(last.values())
    in_last, in_full = gradients(n) - last["ffn output"], gradients(t) - full["ffn output"]
    if model.checkpointing == "none":
        kept = before + (model.layers - 1) * whole_full + whole_last
        in_blocks = [(kept, in_last), (kept - whole_last, in_full)]
    else:
        inputs, results_full, results_last = a * t * model.dim, 0, 0
        if model.checkpointing == "selective" and case.attention.kind != "routed":
            results_full, results_last = full["attention output"], last["attention output"]
        shared = inputs if a == 4 else 0  # an fp32 block input is kept once
        kept = before + model.layers * inputs + (model.layers - 1) * results_full + results_last
        in_blocks = [(kept, whole_last - shared - results_last + in_last), (kept - inputs - results_last, whole_full - shared - results_full + in_full)]
    return {"forward": (kept, after), "backward": max(in_blocks[: model.layers], key=sum)}


def gathered(case: Case) -> dict[str, int]:
    """Bytes of gathered parameters at the peak of "rollout", "forward" and "backward".

    A gather fills a flat buffer and copies each parameter out of it. The buffer of a prefetch stays until the last of its parameters is used. One rank
    alone gathers nothing.
    """
    zero, a, total = case.zero, case.a, case.parameters
    if zero.stage == 2 or (case.cluster.gpus == 1 and not zero.offload_parameters):
        return dict.fromkeys(("rollout", "forward", "backward"), 0)
    ends, ahead = total - case.recipe.model.layers * case.block, min(total, zero.prefetch)
    live = min(total, case.reused + case.block + ahead + ends)
    buffer = max(case.block, ahead)
    if case.held or not case.rolls_out:
        return {"rollout": a * (total + case.block), "forward": a * (live + buffer), "backward": a * (live + (buffer if live < total else 0))}
    return {"rollout": a * (live + buffer), **dict.fromkeys(("forward", "backward"), a * (live + case.block))}  # rollouts spoil the trace for prefetch


def cache_need(case: Case) -> int:
    """Bytes of the rollout's K/V cache as `CausalWan.new_cache` sizes it, and of the captions' keys and values."""
    if not (case.rolls_out and case.stage.history == "autoregressive"):
        return 0
    model, largest = case.recipe.model, max(case.recipe.model.chunk, case.recipe.model.first_chunk)
    frames, scratch = case.history_frames, largest
    if case.attention.kind == "window":
        frames = min(frames, (case.attention.window + 1 + case.attention.sink) * largest)
    elif case.cluster.device == "cpu":  # written: all history but the newest chunk, and that one as the noisy one
        scratch = 0
    dtype = torch.bfloat16 if case.a == 2 else torch.float32
    keys = cache_bytes(model.layers, case.micro, model.heads // case.sequence, (frames + scratch) * case.frame, model.dim // model.heads, dtype)
    return keys + 2 * case.a * model.layers * case.micro * model.text_len * model.dim


def rollout_working(case: Case) -> int:
    """Bytes of one pass of a rollout besides cache and parameters: the larger of what attention and the ffn hold at once; routing's mask of one job."""
    if not case.rolls_out:
        return 0
    model, a, sizes = case.recipe.model, case.a, case.sizes
    if case.stage.history == "parallel":
        tokens = case.tokens(case.history_frames + sum(sizes[:-2]))
        attention = 6 * a + 4 + (a + 4) / 2  # y, q, k, v, q in kernel order, output; its fp32 sum; half of a call's result twice
    else:
        tokens = case.tokens(max(x + y for x, y in zip([0, *sizes[:-2]], sizes[:-1])))  # the newest history chunk and the noisy one
        attention = 6 * a + 8  # x, y, q, k, v, output; fp32 copy and product of the rotation
    ffn = 3 * a + 2 * a * model.ffn_dim / model.dim  # x, y, result; hidden layer before and after GELU
    mask = 0
    if case.attention.kind == "routed" and len(sizes) - 2 > case.attention.k:
        mask = (a + 2) * case.micro * model.heads // case.sequence * sizes[-2] * sum(sizes[:-1]) * case.frame**2  # bool twice, and as SDPA wants it
    return int(tokens * model.dim * max(attention, ffn)) + mask


def step_working(case: Case) -> int:
    """Bytes of the optimizer step: gradients of a sub-group flattened, and AdamW's temporaries: one as large on a GPU (foreach), two on a CPU.

    Or, if more, of the end of backward: the last bucket is copied on its way to be reduced, and once more by gloo, whose reduce-scatter is an all-reduce of
    a copy; ZeRO-2 then has its bucket and new gradients beside the sum.
    """
    zero, elements = case.zero, 0 if case.zero.offload_optimizer else case.slice
    copies = 2 if zero.stage == 3 and case.cluster.device == "cpu" and case.cluster.gpus > 1 else 1
    reducing = copies * min(zero.bucket, case.parameters) * (zero.communication or case.a)
    if zero.stage == 2:
        reducing += bucket_bytes(case) + 4 * elements * (2 if case.accumulation > 1 else 1)
    else:
        elements = min(elements, zero.sub_group)
    return max(4 * elements * (2 if case.cluster.device == "cuda" else 3), reducing)


@lru_cache(maxsize=None)
def memory(case: Case) -> dict:
    """Bytes on a GPU: {"states": items, "phases": {phase: items}, "peak": bytes, "phase": its name, "host": bytes of host memory}.

    The peak is the largest phase with the states, not the sum of what is never there at once.
    """
    always, copies, zero = states(case), gathered(case), case.zero
    summed = 4 * case.slice if zero.stage == 2 and case.accumulation > 1 and not zero.offload_optimizer else 0
    reducing = 0
    if case.cluster.device == "cuda":  # elsewhere nothing overlaps, and a bucket is empty when activations peak
        if zero.overlap:  # the previous block's gradients and the flat copy of a bucket
            reducing += case.block * case.a + min(zero.bucket, case.parameters) * (zero.communication or case.a)
        if zero.stage == 2:
            reducing += bucket_bytes(case)
    phases = {}
    if case.rolls_out:
        phases["rollout"] = {"K/V cache": cache_need(case), "gathered": copies["rollout"], "working": rollout_working(case), "gradients": summed}
    for name, (kept, working) in activations(case).items():
        phases[name] = {
            "activations": kept, "working": working, "gathered": copies[name], "reducing": reducing if name == "backward" else 0, "gradients": summed,
        }  # fmt: skip
    phases["step"] = {"working": step_working(case)}
    phase = max(phases, key=lambda name: sum(phases[name].values()))
    return {"states": always, "phases": phases, "phase": phase, "peak": sum(always.values()) + sum(phases[phase].values()), "host": host_bytes(case)}


def fits(case: Case) -> bool:
    return memory(case)["peak"] <= (1 - ROOM) * case.cluster.memory
