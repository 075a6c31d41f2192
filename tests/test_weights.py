"""Wan's weights, by diffusers' names and the original ones: into a plain and a partitioned model, and back, exactly."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from rf_train import config
from rf_train.engine import checkpoint
from rf_train.engine.collectives import start_ranks
from rf_train.engine.saving import Saver
from rf_train.engine.state import TrainingState
from rf_train.engine.zero import build_engine
from rf_train.model.transformer import CausalWan
from rf_train.weights import WeightFiles, export, export_generator, from_wan_name, load_weights, to_wan_name
from tests.conftest import plain_settings, tiny_settings, tiny_wan
from tests.distributed import run_distributed

diffusers = pytest.importorskip("diffusers")


LAYOUTS = {"one-file": "1GB", "several-files-with-an-index": "60KB"}  # how the same weights are stored


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The tiny model's weights in each layout: {layout: folder}."""
    found, model = {}, tiny_wan()
    for layout, shard_size in LAYOUTS.items():
        found[layout] = tmp_path_factory.mktemp("wan") / "transformer"
        model.save_pretrained(found[layout], max_shard_size=shard_size)
        assert (len(list(found[layout].glob("*.safetensors"))) > 1) == (layout != "one-file")
    return found


@pytest.fixture(params=LAYOUTS)
def folder(request, folders):
    return folders[request.param]


def expected_wan_name(name: str) -> str:
    """The original Wan name of a diffusers one, written out independently of the code under test."""
    table = {
        "condition_embedder.time_embedder.linear_1": "time_embedding.0",
        "condition_embedder.time_embedder.linear_2": "time_embedding.2",
        "condition_embedder.text_embedder.linear_1": "text_embedding.0",
        "condition_embedder.text_embedder.linear_2": "text_embedding.2",
        "condition_embedder.time_proj": "time_projection.1",
        "proj_out": "head.head",
        "attn1": "self_attn",
        "attn2": "cross_attn",
        "to_out.0": "o",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "ffn.net.0.proj": "ffn.0",
        "ffn.net.2": "ffn.2",
        "norm2": "norm3",
    }
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
    original = {expected_wan_name(name): tensor.clone() for name, tensor in weights.items()}
    assert {"blocks.1.self_attn.o.weight", "blocks.0.norm3.bias", "head.modulation"} <= set(original)
    assert {from_wan_name(name) for name in original} == set(weights)
    assert {to_wan_name(name) for name in weights} == set(original)
    assert set(convert_wan_transformer_to_diffusers(dict(original))) == set(weights)
    save_file(original, tmp_path / "diffusion_pytorch_model.safetensors")
    model = CausalWan(tiny_settings())
    load_weights(model, tmp_path)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())


def test_every_slice_of_every_tensor(folder):
    """In pieces of one size after another. Single elements only of tensors that are not too large."""
    files, expected = WeightFiles(folder), tiny_wan().state_dict()
    for name, tensor in expected.items():
        for size in (1, 5, 48, tensor.numel()):
            if size == 1 and tensor.numel() > 2000:
                continue
            begins = range(0, tensor.numel(), size)
            pieces = [files.flat(name, begin, min(begin + size, tensor.numel())) for begin in begins]
            assert torch.equal(torch.cat(pieces).view(tensor.shape), tensor)
    assert sum(tensor.dim() > 1 and tensor.numel() <= 2000 for tensor in expected.values()) > 3


def test_what_does_not_fit_is_named_all_at_once(tmp_path):
    weights = dict(tiny_wan().state_dict())
    del weights["proj_out.bias"], weights["blocks.0.attn1.to_q.weight"]
    weights["blocks.7.extra"] = torch.zeros(2)
    weights["blocks.1.ffn.net.2.weight"] = torch.zeros(48, 95)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as caught:
        load_weights(CausalWan(tiny_settings()), tmp_path)
    for part in (
        "proj_out.bias is missing",
        "blocks.0.attn1.to_q.weight is missing",
        "blocks.7.extra is not in the model",
        "blocks.1.ffn.net.2.weight is [48, 95], the model's is [48, 96]",
    ):
        assert part in str(caught.value)


def test_folders_that_are_no_checkpoints(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        WeightFiles(tmp_path / "none")
    with pytest.raises(ValueError, match="holds 0 safetensors"):
        WeightFiles(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(ValueError, match=r"a\.safetensors: not a whole safetensors file"):
        WeightFiles(tmp_path)
    index = {"weight_map": {"x": "../b.safetensors", "y": "c.safetensors"}}
    (tmp_path / "a.safetensors.index.json").write_text(json.dumps(index))
    missing = re.escape("lists files that are not in the folder: ../b.safetensors, c.safetensors")
    with pytest.raises(ValueError, match=missing):
        WeightFiles(tmp_path)


def load_and_save_on_this_rank(folders: list[str], run: str, **settings) -> list[dict]:
    """Loads the weights of each folder into an engine and saves a checkpoint: the first folder's is step 1.

    Returns for each the largest number of elements that this rank read at once, and the sums of the gathered weights.
    """
    stages, optimizer = [{"batch": 2}], {"micro_batch": 1}
    recipe = config.from_dict({"model": plain_settings(), "optimizer": optimizer, "stages": stages, "run": settings})
    ranks = start_ranks()
    engine = build_engine(recipe, ranks)
    state, results = TrainingState(engine, 0.9), []
    saver = Saver(Path(run), state, keep=2, always=set())
    if ranks.rank == 0:
        Path(run).mkdir()
        (Path(run) / "recipe.yaml").write_text(yaml.safe_dump(config.to_dict(recipe)))
    for step, folder in enumerate(folders, start=1):
        files, read = WeightFiles(folder), []

        def watched(name: str, begin: int, end: int, files: WeightFiles = files, read: list[int] = read):
            read.append(end - begin)
            return files.flat(name, begin, end)

        for tensor in [*state.by_kind()["master"].values(), *state.ema.values()]:
            tensor.data.fill_(float("nan"))  # all of it must be read
        state.load_weights(watched, files.whole)
        saver.begin(step)
        saved = saver.finish()
        assert saved is not None and not saved.error
        with engine.gathered_parameters() as model:
            sums = {name: parameter.double().sum().item() for name, parameter in model.named_parameters()}
        results.append({"largest": max(read), "sums": sums})
    return results


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{}, {"precision": "bf16"}, {"precision": "bf16", "deepspeed": "ds_configs/zero2.json"}], ids=str
)
def test_into_a_partitioned_model_and_out_again_bit_for_bit(folders, tmp_path, settings):
    """Masters are the file's fp32 values, also where passes compute with bf16 ones; and the average starts there.

    Under ZeRO-3 no rank reads more than its slices.
    """
    run, paths = tmp_path / "run", [str(folder) for folder in folders.values()]
    results = run_distributed(load_and_save_on_this_rank, 2, folders=paths, run=str(run), **settings)
    expected = tiny_wan().state_dict()
    dtype = torch.bfloat16 if settings else torch.float32
    for result in [result for rank in results for result in rank]:
        if "deepspeed" not in settings:
            assert result["largest"] == max(-(-tensor.numel() // 2) for tensor in expected.values())
        for name, tensor in expected.items():
            assert result["sums"][name] == pytest.approx(tensor.to(dtype).double().sum().item(), abs=1e-9)
    for step, shard_bytes, kind in (
        (1, 1 << 30, "master"),
        (1, 50_000, "master"),
        (2, 50_000, "master"),
        (2, 1 << 30, "ema"),
    ):
        out = export(run, tmp_path / f"out-{step}-{shard_bytes}", step=step, kind=kind, shard_bytes=shard_bytes)
        again = diffusers.WanTransformer3DModel.from_pretrained(out)
        assert again.config.num_layers == 2
        assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())
        files = list(out.glob("*.safetensors"))
        assert (len(files) > 1) == (shard_bytes == 50_000)
        assert {name for file in files for name in load_file(file)} == set(expected)
    with pytest.raises(ValueError, match="exists already"):
        export(run, out)


# ---- Self-Forcing's files


def their_file(path: Path, **kinds: dict) -> Path:
    """A .pt file with these kinds of weights, as their trainer saves it: names of Wan, behind their wrapper's."""
    named = {
        kind: {f"model.{expected_wan_name(name)}": tensor for name, tensor in weights.items()}
        for kind, weights in kinds.items()
    }
    torch.save(named, path)
    return path


def test_self_forcings_generator_loads_and_the_average_comes_first(tmp_path):
    generator, average = dict(tiny_wan(3).state_dict()), dict(tiny_wan(4).state_dict())
    fsdp = {name.replace("blocks.1.", "blocks.1._fsdp_wrapped_module."): tensor for name, tensor in generator.items()}
    for kinds, expected in (
        ({"generator": generator}, generator),
        ({"generator": generator, "generator_ema": average}, average),
        ({"generator": fsdp}, generator),
    ):
        model = CausalWan(tiny_settings())
        load_weights(model, their_file(tmp_path / "model.pt", **kinds))
        assert all(torch.equal(parameter, expected[name]) for name, parameter in model.named_parameters())
    files = WeightFiles(tmp_path / "model.pt")
    name = "blocks.0.ffn.net.0.proj.weight"
    assert torch.equal(files.flat(name, 50, 1000), generator[name].flatten()[50:1000])


class Harmful:
    """What a pickle may hide: it would create a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_files_that_are_not_their_generators(tmp_path):
    torch.save({"generator": Harmful(tmp_path / "harm")}, tmp_path / "harmful.pt")
    (tmp_path / "cut.pt").write_bytes(
        their_file(tmp_path / "a.pt", generator=dict(tiny_wan().state_dict())).read_bytes()[:5000]
    )
    torch.save({"critic": {}}, tmp_path / "critic.pt")
    for name, says in (
        ("harmful", "not a .pt file of tensors alone"),
        ("cut", "not a .pt file of tensors alone"),
        ("critic", "holds no tensors under `generator`"),
    ):
        with pytest.raises(ValueError, match=rf"{name}\.pt: {says}") as caught:
            WeightFiles(tmp_path / f"{name}.pt")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "harm").exists()


@pytest.mark.slow
def test_a_run_becomes_their_generator_and_comes_back_bit_for_bit(two_rank_run, tmp_path):
    run, _ = two_rank_run
    for kind in ("ema", "master"):
        out = export_generator(run, tmp_path / f"{kind}.pt", kind=kind)
        stored = torch.load(out, weights_only=True)
        assert (
            set(stored) == {"generator", "generator_ema"} and "model.blocks.0.self_attn.q.weight" in stored["generator"]
        )
        expected = checkpoint.read_weights(checkpoint.at_step(run, 0), kind)
        model = CausalWan(config.load(run / "recipe.yaml").model)
        load_weights(model, out)
        assert all(torch.equal(parameter, expected[name]) for name, parameter in model.named_parameters())
    assert not torch.equal(
        *(
            torch.load(tmp_path / f"{kind}.pt", weights_only=True)["generator"]["model.head.head.weight"]
            for kind in ("ema", "master")
        )
    )
    with pytest.raises(ValueError, match="exists already"):
        export_generator(run, out)
    assert len(list(tmp_path.iterdir())) == 2
