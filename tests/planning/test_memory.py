"""What a stage keeps in memory: the tensors that autograd saves, the model's own cache, and ZeRO's shares."""

from dataclasses import replace

import pytest
import torch

from rf_train.diffusion.histories import History
from rf_train.model.chunks import Routed
from rf_train.model.elementwise import compiled as compiling
from rf_train.model.routing import TILE
from rf_train.model.transformer import CausalWan
from rf_train.planning.memory import (
    ROOM,
    activation_bytes,
    block_saved,
    ends_saved,
    fits,
    gathered_bytes,
    memory,
    rollout_cache_bytes,
    routing_working_bytes,
    state_bytes,
)
from tests.planning.cases import ATTENTIONS, Step, tiny_case, with_run

PRECISIONS = pytest.mark.parametrize("precision, dtype", [("bf16", torch.bfloat16), ("fp32", torch.float32)])


@PRECISIONS
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("clips", [1, 2])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
def test_activations_are_what_autograd_keeps(attention, precision, dtype, clips, compiled):
    """Every tensor saved for backward, each storage once, to 1 %; compiled, to 2 %: the compiler chooses some of it.

    Latents and rotary tables are counted elsewhere.
    """
    run = {"precision": precision, "compile": compiled}
    case = tiny_case(attention=ATTENTIONS[attention], micro_batch=clips, run=run)
    settings, model, step = case.recipe.model, CausalWan(case.recipe.model).to(dtype), Step(case)
    step.make_history(model)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        latent = tensor.dim() == 5 and tensor.shape[1] == settings.channels
        rotary = tensor.is_complex() or (tensor.dim() == 3 and tensor.shape[1:] == (settings.head_dim // 2, 2))
        if storage.data_ptr() not in parameters and not latent and not rotary:
            kept[storage.data_ptr()] = (storage.nbytes(), storage)
        return tensor

    with compiling(compiled), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = step.loss(model)
    frames = case.clip.frames
    latent = case.micro_batch * case.clip.height * case.clip.width * settings.channels
    latents = latent * (8 * frames if precision == "fp32" else 2 * (frames + case.history_frames) + 10 * frames)
    planned = activation_bytes(case)["forward"][0] + ends_saved(case)[1] - latents
    allowed = 0.02 if compiled else 0.01
    assert loss.requires_grad and planned == pytest.approx(sum(size for size, _ in kept.values()), rel=allowed)


# ---- the cache of a rollout


@pytest.mark.parametrize("history", History.kinds)
def test_the_cache_is_counted_where_the_passes_of_a_rollout_are_cached(history):
    case = tiny_case(history, device="cuda")
    cached = any(model_pass.cache is not None for model_pass in case.stage.history.rollout_passes([3, 3, 3, 3]))
    assert (rollout_cache_bytes(case) > 0) == cached
    assert ("rollout" in memory(case).phases) == case.rolls_out
    if case.rolls_out:
        assert memory(case).phases["rollout"]["K/V cache"] == rollout_cache_bytes(case)


@pytest.mark.parametrize("history", [name for name, cls in History.kinds.items() if cls().rollout_passes([1, 1, 1])])
def test_the_counted_cache_is_the_one_that_is_made(history):
    """Noted when the rollout makes it; none where it makes none. Of several, made one after another, the largest."""
    case, made = tiny_case(history, device="cuda", run={"precision": "fp32"}), []
    model = CausalWan(case.recipe.model)
    new_kv_cache = model.new_kv_cache
    model.new_kv_cache = lambda *arguments: made.append(new_kv_cache(*arguments)) or made[-1]
    Step(case).make_history(model)

    def bytes_of(cache) -> int:
        return cache.bytes + sum(2 * layer.text[0].numel() * layer.text[0].element_size() for layer in cache.layers)

    assert rollout_cache_bytes(case) == max(map(bytes_of, made), default=0)


@pytest.mark.parametrize("attention", ["dense", "window"])
@PRECISIONS
def test_the_cache_is_the_models(attention, precision, dtype):
    case = tiny_case(attention=ATTENTIONS[attention], device="cuda", frames=15, run={"precision": precision})
    settings = case.recipe.model
    model = CausalWan(settings).to(dtype)
    cache = model.new_kv_cache(case.micro_batch, case.tokens_per_frame, case.history_frames, case.attention)
    captions = 2 * settings.layers * case.micro_batch * settings.text_len * settings.dim * dtype.itemsize
    assert rollout_cache_bytes(case) == cache.bytes + captions


# ---- how ranks share


def test_memory_scales_with_ranks_as_zero_says():
    one, many = (tiny_case(gpus=gpus, device="cuda", dim=128) for gpus in (1, 8))
    states, shared = state_bytes(one), state_bytes(many)
    for name in ("parameters", "gradients", "optimizer", "average"):
        assert shared[name] == pytest.approx(states[name] / 8, rel=0.01)
    kinds = ("optimizer", "average", "gradients", "parameters")
    assert [states[kind] for kind in kinds] == [count * one.parameters for count in (12, 4, 4, 2)]
    assert gathered_bytes(one)["rollout"] == 0
    assert gathered_bytes(many)["rollout"] == 2 * (many.parameters + many.block_parameters)
    whole = state_bytes(tiny_case(gpus=8, device="cuda", dim=128, zero="ds_configs/zero2.json"))
    assert whole["parameters"] == states["parameters"]
    assert whole["optimizer"] == pytest.approx(states["optimizer"] / 8, rel=0.01)
    away = state_bytes(tiny_case(gpus=8, device="cuda", dim=128, zero="ds_configs/zero3_offload.json"))
    assert away["parameters"] == away["optimizer"] == away["average"] == away["gradients"] == 0


def test_sequence_ranks_share_tokens_heads_and_cache():
    alone = tiny_case(gpus=2, device="cuda", frames=9)
    shared = with_run(alone, sequence_parallel_size=2)
    assert block_saved(shared, False)["ffn hidden"] == block_saved(alone, False)["ffn hidden"] / 2
    captions = 2 * 2 * 2 * alone.micro_batch * alone.recipe.model.text_len * alone.recipe.model.dim
    assert rollout_cache_bytes(shared) - captions == (rollout_cache_bytes(alone) - captions) / 2


# ---- the peak


def test_the_peak_is_the_largest_phase_with_what_is_always_there():
    need = memory(tiny_case(gpus=8, device="cuda"))
    sizes = {name: sum(items.values()) for name, items in need.phases.items()}
    assert set(sizes) == {"rollout", "forward", "backward", "step"}
    assert need.peak == sum(need.states.values()) + max(sizes.values()) and sizes[need.phase] == max(sizes.values())


def test_a_case_fits_when_room_is_left():
    case = tiny_case(gpus=8, device="cuda")
    need = memory(case).peak
    for share, fitting in ((1.001, True), (0.999, False)):
        cluster = replace(case.cluster, memory=share * need / (1 - ROOM))
        assert fits(replace(case, cluster=cluster)) == fitting


@pytest.mark.parametrize(
    "kernel, head_dim, deterministic, tiles",
    [
        ("auto", 64, False, True),
        ("cudnn", 64, False, True),
        ("fa2", 64, False, False),
        ("auto", 64, True, False),
        ("auto", 32, False, False),
    ],
)
def test_tiles_of_routing_are_counted_where_it_has_them(monkeypatch, kernel, head_dim, deterministic, tiles):
    """As `routing_kernels` chooses on a GPU of today."""
    run = {"precision": "bf16", "deterministic": deterministic}
    model = {"dim": 2 * head_dim, "heads": 2, "attention_kernel": kernel}
    case = tiny_case(attention=Routed(top_k=1), device="cuda", run=run, **model)
    without = routing_working_bytes(case, case.training_pass)
    monkeypatch.setitem(TILE, "cuda", 2)
    assert (routing_working_bytes(case, case.training_pass) > without) == tiles
