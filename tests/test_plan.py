"""The plan: counts equal the model's own, memory equals what a step takes, and what it recommends runs."""

import json
from dataclasses import replace

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from rf_train import config, costs, memory, plan
from rf_train.chunks import Chunking
from rf_train.model import CausalWan, parameter_count
from rf_train.randomness import draw
from rf_train.resampling import make_history, training_loss
from tests.conftest import random_clip, tiny_settings, write_dataset

HISTORIES = (("clean", "dense"), ("autoregressive", "dense"), ("autoregressive", "window"), ("autoregressive", "routed"), ("parallel", "dense"))
RECOMPUTED = ("none", "selective", "block", "selective", "block")


def tiny_case(history="autoregressive", attention="dense", device="cpu", zero="ds_configs/zero3.json", gpus=1, frames=9, micro=2, **model) -> costs.Case:
    """A tiny model on clips of 4 x 6 latent pixels; a micro-batch a rank and step."""
    stage = {"name": "s", "history": history, "attention": attention, "k": 1, "window": 2, "frames": frames, "batch": micro * gpus, "steps": 1}
    recipe = config.from_dict({"model": vars(tiny_settings(**model)), "stages": [stage], "optimizer": {"micro_batch": micro}, "run": {"deepspeed": zero}})
    return costs.Case(recipe, recipe.stages[0], costs.Clip(frames, 4, 6), costs.read_zero(zero), costs.Cluster(gpus=gpus, node=min(8, gpus), device=device))


def step_of(case: costs.Case, model: CausalWan):
    """Rollout and loss of a step, as training makes them."""
    settings, clip = case.recipe.model, case.clip
    x, _, text = random_clip(clip.frames, case.micro, settings, clip.height, clip.width)
    chunking = Chunking(settings.chunk, settings.first_chunk)
    draws = draw(0, 0, [str(i) for i in range(case.micro)], tuple(x.shape[1:]), len(case.sizes))
    history, _ = make_history(model, x, text, draws, case.stage, chunking)
    return training_loss(model, x, text, history, draws, config.Flow(), case.stage, chunking).loss


@pytest.mark.parametrize("gpus", [1, 7])
def test_parameters_are_the_models(gpus):
    case = tiny_case(gpus=gpus)
    model = CausalWan(case.recipe.model)
    assert case.parameters == parameter_count(case.recipe.model)
    assert case.block == sum(parameter.numel() for parameter in model.blocks[1].parameters())
    assert case.slice == sum(-(-parameter.numel() // gpus) for parameter in model.parameters())


@pytest.mark.parametrize("history, attention, checkpointing", [(*kind, how) for kind, how in zip(HISTORIES, RECOMPUTED)])
def test_flop_are_those_that_a_step_runs(history, attention, checkpointing):
    """To 1 in 1000, counted by torch operation by operation, rollout, recomputation and backward included."""
    case = tiny_case(history, attention, checkpointing=checkpointing)
    aten = torch.ops.aten
    forward, backward = aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_flash_attention_for_cpu_backward
    counted = FlopCounterMode(display=False, custom_mapping={
        forward: lambda q, k, v, *_, out_shape=None, **__: sdpa_flop_count(q, k, v),
        backward: lambda grad, q, k, v, *_, out_shape=None, **__: sdpa_backward_flop_count(grad, q, k, v),
    })  # fmt: skip
    with counted:
        step_of(case, CausalWan(case.recipe.model)).backward()
    assert sum(costs.flop(case).values()) == pytest.approx(counted.get_total_flops(), rel=1e-3)


@pytest.mark.parametrize("precision, dtype", [("bf16", torch.bfloat16), ("fp32", torch.float32)])
@pytest.mark.parametrize("history, attention", HISTORIES[1:4])
@pytest.mark.parametrize("clips", [1, 2])
def test_activations_are_what_autograd_keeps(history, attention, precision, dtype, clips):
    """Every tensor saved for backward, once a storage, against `block_saved` and `ends_saved`: within 1 %. Latents and rotary tables are counted elsewhere."""
    case = tiny_case(history, attention, frames=12, micro=clips)
    case = replace(case, recipe=replace(case.recipe, run=replace(case.recipe.run, precision=precision)))
    model, kept = CausalWan(case.recipe.model).to(dtype), {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        latent = tensor.dim() == 5 and tensor.shape[1] == case.recipe.model.channels
        if storage.data_ptr() not in parameters and not latent and not tensor.is_complex():
            kept[storage.data_ptr()] = (storage.nbytes(), storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = step_of(case, model)
    latent, frames = case.micro * case.clip.height * case.clip.width * case.recipe.model.channels, case.clip.frames
    latents = latent * (8 * frames if precision == "fp32" else 2 * (frames + case.history_frames) + 10 * frames)
    planned = memory.activations(case)["forward"][0] + memory.ends_saved(case)[1] - latents
    assert loss.requires_grad and planned == pytest.approx(sum(size for size, _ in kept.values()), rel=0.01)


@pytest.mark.parametrize("attention", ["dense", "window"])
@pytest.mark.parametrize("precision, dtype", [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_the_cache_is_the_models(attention, precision, dtype):
    case = tiny_case("autoregressive", attention, device="cuda")
    case = replace(case, recipe=replace(case.recipe, run=replace(case.recipe.run, precision=precision)))
    settings = case.recipe.model
    cache = CausalWan(settings).to(dtype).new_cache(case.micro, case.frame, case.history_frames, case.attention)
    captions = 2 * settings.layers * case.micro * settings.text_len * settings.dim * dtype.itemsize
    assert memory.cache_need(case) == cache.bytes + captions


def test_memory_scales_with_ranks_as_zero_says():
    one, many = (tiny_case(gpus=gpus, device="cuda", dim=128) for gpus in (1, 8))
    states, shared = memory.states(one), memory.states(many)
    for name in ("parameters", "gradients", "optimizer", "average"):
        assert shared[name] == pytest.approx(states[name] / 8, rel=0.01)
    assert (states["optimizer"], states["average"], states["gradients"], states["parameters"]) == tuple(n * one.parameters for n in (12, 4, 4, 2))
    assert memory.gathered(one)["rollout"] == 0 and memory.gathered(many)["rollout"] == 2 * (many.parameters + many.block)
    whole = memory.states(tiny_case(gpus=8, device="cuda", dim=128, zero="ds_configs/zero2.json"))
    assert whole["parameters"] == states["parameters"] and whole["optimizer"] == pytest.approx(states["optimizer"] / 8, rel=0.01)
    away = memory.states(tiny_case(gpus=8, device="cuda", dim=128, zero="ds_configs/zero3_offload.json"))
    assert away["parameters"] == away["optimizer"] == away["average"] == away["gradients"] == 0


def test_sequence_ranks_share_tokens_heads_and_cache():
    alone = tiny_case(gpus=2, device="cuda")
    shared = replace(alone, recipe=replace(alone.recipe, run=replace(alone.recipe.run, sequence=2)))
    assert shared.accumulation == 2 * alone.accumulation
    assert memory.block_saved(shared, False)["ffn hidden"] == memory.block_saved(alone, False)["ffn hidden"] / 2
    captions = 2 * 2 * 2 * alone.micro * alone.recipe.model.text_len * alone.recipe.model.dim
    assert memory.cache_need(shared) - captions == (memory.cache_need(alone) - captions) / 2
    assert costs.all_to_all(alone) == (0, 0) and costs.all_to_all(shared)[0] > 0
    assert sum(costs.flop(shared).values()) == sum(costs.flop(alone).values())


def test_what_a_gpu_receives_is_the_least_there_can_be():
    inside, between = costs.spread(64e9, 64, 8)
    assert between == 64e9 * 7 / 8 / 8 and inside + between == 64e9 * 63 / 64
    assert costs.spread(64e9, 8, 8) == (56e9, 0) and costs.spread(64e9, 1, 1) == (0, 0)


def recipe_file(folder, **changes):
    stages = [
        {"name": "warm", "history": "clean", "frames": 9, "batch": 8, "steps": 10},
        {"name": "self", "history": "autoregressive", "frames": 9, "batch": 16, "steps": 20},
    ]
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model": vars(tiny_settings(dim=64, heads=4)), "stages": stages, **changes}))
    return str(path)


def test_the_command_prints_settings_that_run_and_fit(tmp_path, capsys):
    """The recommended overrides are put in, and the same command then says that each stage fits and keeps its batch."""
    path = recipe_file(tmp_path)
    usual = ["--gpus", "8", "--size", "64x64", "--gpu-memory", "0.5", "--json"]
    assert plan.main([path, *usual]) == 0
    printed = capsys.readouterr().out.splitlines()
    figures = json.loads(printed[-1])
    assert any("settings to take" in line for line in printed) and [stage["stage"] for stage in figures["stages"]] == ["warm", "self"]
    assert plan.main([path, *figures["best"]["overrides"], *usual]) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert all(stage["fits"] for stage in again["stages"]) and again["best"]["overrides"] == figures["best"]["overrides"]
    assert max(stage["peak"] for stage in again["stages"]) == figures["best"]["peak"] <= 0.9 * 0.5 * 2**30


def test_less_memory_takes_other_settings_and_then_none(tmp_path, capsys):
    path = recipe_file(tmp_path)
    days = []
    for _ in range(2):  # the second time a little less than the first settings take
        memory = days[0][1] / 2**30 if days else 8
        plan.main([path, "--gpus", "8", "--size", "1536x1536", "--gpu-memory", str(memory), "--json"])
        found = json.loads(capsys.readouterr().out.splitlines()[-1])["stages"][1]["best"]
        days.append((found["seconds"], found["peak"]))
    assert days[1][0] >= days[0][0] and days[1][1] < 0.9 * days[0][1]
    assert plan.main([path, "--gpus", "8", "--size", "512x512", "--gpu-memory", "0.1"]) == 0
    assert "nothing fits in 0.1 GiB: the smallest need is" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, said", [
    (["no_such_recipe"], "no_such_recipe: no such recipe file"),
    (["wan_1.3b", "--gpus", "12"], "--gpus 12 is not a multiple of --node 8"),
    (["wan_1.3b", "--gpus", "8", "run.sequence=5"], "run.sequence=5 does not divide"),
    (["wan_1.3b", "--gpus", "8", "run.sequence=3"], "run.sequence=3 does not divide the 8 ranks"),
    (["wan_1.3b", "--gpus", "8", "optimizer.micro_batch=3"], "batch=64 is not a multiple of optimizer.micro_batch=3 x 8 ranks"),
    (["wan_1.3b", "--gpus", "512"], "no setting splits batch 64 over 512 ranks"),
    (["wan_14b", "--gpus", "512"], "what would run: run.deepspeed="),
    (["wan_1.3b", "stages.1.frames=0", "data.train="], "stage self_resampling: frames is 0"),
    (["wan_1.3b", "--size", "480x830"], "must be multiples of 16"),
    (["wan_1.3b", "--size", "480"], "HEIGHTxWIDTH"),
    (["wan_1.3b", "--mfu", "0"], "--mfu must be positive"),
    (["wan_1.3b", "run.deepspeed=nowhere.json"], "nowhere.json: no such file"),
])  # fmt: skip
def test_bad_input_is_one_clear_line(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert plan.main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("error: ") and error.count("\n") == 1


def test_a_datasets_card_decides_the_clip(tmp_path):
    write_dataset(tmp_path / "data", frames=9, settings=tiny_settings())
    stages = [{"name": "a"}, {"name": "b", "frames": 6}, {"name": "c", "frames": 12}]
    recipe = config.from_dict({"model": vars(tiny_settings()), "data": {"train": str(tmp_path / "data")}, "stages": stages})
    assert costs.clip_of(recipe, 0, (480, 832)) == costs.Clip(9, 4, 6)
    assert costs.clip_of(recipe, 1, (480, 832)) == costs.Clip(6, 4, 6)
    with pytest.raises(ValueError, match="frames=12, but .* holds clips of 9"):
        costs.clip_of(recipe, 2, (480, 832))


def test_planned_is_what_a_step_really_takes(tmp_path, capsys):
    """Real steps through DeepSpeed in a process of their own: within 10 % of its peak."""
    stage = {"name": "self", "history": "autoregressive", "frames": 15, "batch": 2, "steps": 1}
    path = recipe_file(tmp_path, model=vars(tiny_settings(dim=256, ffn_dim=1024, heads=4, layers=4)), stages=[stage], optimizer={"micro_batch": 2})
    assert plan.main([path, "--measure", "--size", "96x96", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["stages"][0]["measured"] > 150 * 2**20
    assert 0.9 < figures["ratio"] < 1.1
