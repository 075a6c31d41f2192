"""Wan's weights in and out: diffusers' format and the original names, into a plain and a partitioned model, and back bit for bit."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from rf_train import config
from rf_train.model import CausalWan
from rf_train.weights import WeightFiles, export, from_wan_name, load_weights
from tests.conftest import tiny_settings, tiny_wan
from tests.distributed import run_distributed

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module", params=["one file", "several files with an index"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("wan") / "transformer"
    tiny_wan().save_pretrained(path, max_shard_size="1GB" if request.param == "one file" else "60KB")
    assert (len(list(path.glob("*.safetensors"))) > 1) == (request.param != "one file")
    return path


def to_wan_name(name: str) -> str:
    """The original Wan name of a diffusers one, written out independently of the code under test."""
    table = {
        "condition_embedder.time_embedder.linear_1": "time_embedding.0", "condition_embedder.time_embedder.linear_2": "time_embedding.2",
        "condition_embedder.text_embedder.linear_1": "text_embedding.0", "condition_embedder.text_embedder.linear_2": "text_embedding.2",
        "condition_embedder.time_proj": "time_projection.1", "proj_out": "head.head", "attn1": "self_attn", "attn2": "cross_attn", "to_out.0": "o",
        "to_q": "q", "to_k": "k", "to_v": "v", "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2", "norm2": "norm3",
    }  # fmt: skip
    for ours, theirs in table.items():
        name = re.sub(rf"(^|\.){re.escape(ours)}(\.|$)", rf"\g<1>{theirs}\g<2>", name)
    return "head.modulation" if name == "scale_shift_table" else name.replace("scale_shift_table", "modulation")


def test_diffusers_weights_load(folder):
    model = CausalWan(tiny_settings())
    load_weights(model, folder)
    expected = tiny_wan().state_dict()
    assert all(torch.equal(parameter, expected[name]) for name, parameter in model.named_parameters())


def test_the_original_names_load_and_are_what_diffusers_makes_of_them(tmp_path):
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    weights = dict(tiny_wan().state_dict())
    original = {to_wan_name(name): tensor.clone() for name, tensor in weights.items()}
    assert "blocks.1.self_attn.o.weight" in original and "blocks.0.norm3.bias" in original and "head.modulation" in original
    assert {from_wan_name(name) for name in original} == set(weights) == set(convert_wan_transformer_to_diffusers(dict(original)))
    save_file(original, tmp_path / "diffusion_pytorch_model.safetensors")
    model = CausalWan(tiny_settings())
    load_weights(model, tmp_path)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())


def test_every_slice_of_every_tensor(folder):
    files, expected = WeightFiles(folder), tiny_wan().state_dict()
    for name, tensor in expected.items():
        for size in (1, 5, 48, tensor.numel()):
            pieces = torch.cat([files.flat(name, begin, min(begin + size, tensor.numel())) for begin in range(0, tensor.numel(), size)])
            assert torch.equal(pieces.view(tensor.shape), tensor)


def test_what_does_not_fit_is_named_all_at_once(tmp_path):
    weights = dict(tiny_wan().state_dict())
    del weights["proj_out.bias"], weights["blocks.0.attn1.to_q.weight"]
    weights["blocks.7.extra"] = torch.zeros(2)
    weights["blocks.1.ffn.net.2.weight"] = torch.zeros(48, 95)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as caught:
        load_weights(CausalWan(tiny_settings()), tmp_path)
    for part in ("proj_out.bias is missing", "blocks.0.attn1.to_q.weight is missing", "blocks.7.extra is not in the model", "blocks.1.ffn.net.2.weight is [48, 95], the model's is [48, 96]"):
        assert part in str(caught.value)


def test_folders_that_are_no_checkpoints(tmp_path, folder):
    with pytest.raises(ValueError, match="no such folder"):
        WeightFiles(tmp_path / "none")
    with pytest.raises(ValueError, match="holds 0 safetensors"):
        WeightFiles(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(ValueError, match="a.safetensors: not a whole safetensors file"):
        WeightFiles(tmp_path)
    (tmp_path / "a.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../b.safetensors", "y": "c.safetensors"}}))
    with pytest.raises(ValueError, match="lists files that are not in the folder: ../b.safetensors, c.safetensors"):
        WeightFiles(tmp_path)


def load_and_save_on_this_rank(weights: str, run: str, **settings) -> dict:
    """Loads into an engine, saves a checkpoint, and tells the largest number of elements that this rank held at once and the sums of the gathered weights."""
    from pathlib import Path

    import deepspeed
    import yaml

    from rf_train import checkpoint, distributed

    recipe = config.from_dict({"model": vars(tiny_settings()), "optimizer": {"micro_batch": 1}, "stages": [{"batch": 2}], "run": settings})
    rank, world, device = distributed.start()
    engine = distributed.build_engine(recipe, device, world)
    shards = checkpoint.Shards(engine, 0.9)
    largest = 0
    files = WeightFiles(weights)
    read = files.flat

    def watched(name, begin, end):
        nonlocal largest
        largest = max(largest, end - begin)
        return read(name, begin, end)

    files.flat = watched
    shards.load_weights(files)
    checkpoint.save(Path(run), 1, shards)
    if rank == 0:
        (Path(run) / "recipe.yaml").write_text(yaml.safe_dump(config.to_dict(recipe)))
    sums = {}
    for name, parameter in engine.module.named_parameters():
        if not hasattr(parameter, "ds_shape"):
            sums[name] = parameter.double().sum().item()
            continue
        with deepspeed.zero.GatheredParameters(parameter):
            sums[name] = parameter.double().sum().item()
    return {"largest": largest, "sums": sums}


@pytest.mark.parametrize("settings", [{}, {"precision": "bf16"}, {"precision": "bf16", "deepspeed": "ds_configs/zero2.json"}], ids=str)
def test_into_a_partitioned_model_and_out_again_bit_for_bit(folder, tmp_path, settings):
    """Masters are the file's fp32 values, also where passes compute with bf16 ones; under ZeRO-3 no rank reads more than its slices."""
    results = run_distributed(load_and_save_on_this_rank, 2, weights=str(folder), run=str(tmp_path / "run"), **settings)
    expected = tiny_wan().state_dict()
    dtype = torch.bfloat16 if settings else torch.float32
    for result in results:
        if "deepspeed" not in settings:
            assert result["largest"] == max(-(-tensor.numel() // 2) for tensor in expected.values())
        for name, tensor in expected.items():
            assert result["sums"][name] == pytest.approx(tensor.to(dtype).double().sum().item(), abs=1e-9)
    for shard_bytes in (1 << 30, 50_000):
        out = export(tmp_path / "run", tmp_path / f"out{shard_bytes}", kind="master", shard_bytes=shard_bytes)
        again = diffusers.WanTransformer3DModel.from_pretrained(out)
        assert again.config.num_layers == 2
        assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())
    assert len(list((tmp_path / "out50000").glob("*.safetensors"))) > 1
    assert load_file(next((tmp_path / f"out{1 << 30}").glob("*.safetensors"))).keys() == expected.keys()
    with pytest.raises(ValueError, match="exists already"):
        export(tmp_path / "run", out)
