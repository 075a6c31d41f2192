"""The exported folder: its example gives our sampler's videos, with diffusers' own transformer and scheduler."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from data_prep.video import read_frames
from rf_train import config
from rf_train.diffusion import sampling
from rf_train.diffusion.randomness import normal
from rf_train.diffusion.sampling import VideoRequest
from rf_train.generation.causal_sample import CausalAttention, sample
from rf_train.generation.model_card import describe
from rf_train.model.chunks import attention_at_any_length
from rf_train.weights import diffusers_config

diffusers = pytest.importorskip("diffusers")

PLANS = {  # attention of the last stage, chunks of a training clip, other settings of the model; what would be wrong
    "dense": ("dense", 3, {}, {"window": 1}),
    "window": ({"kind": "window", "window": 2}, 5, {"first_chunk": 1}, {"window": 3}),
    "sinks that move": ({"kind": "window", "window": 2, "sink": 1}, 4, {}, {"farthest_sink": None}),
    "routed": ({"kind": "routed", "top_k": 2}, 5, {}, {"top_k": 1}),
    "routed after a long first chunk": ({"kind": "routed", "top_k": 1}, 4, {"first_chunk": 6}, {"reach": 9}),
    "routed with window and sink": (
        {"kind": "routed", "top_k": 1, "window": 1, "sink": 1}, 5, {"first_chunk": 2}, {"reach": 3},
    ),
}  # fmt: skip


def exported(generator, folder: Path, chunks: int, licence: str = "") -> tuple[Path, config.Recipe]:
    """A run's export: its recipe trained on clips of `chunks` chunks, and is full of what must not be told."""
    recipe, chunking = generator.recipe, generator.model.chunking
    stage = replace(recipe.stages[0], frames=chunking.start(chunks), name="only")
    recipe = replace(recipe, stages=(stage,), start=replace(recipe.start, weights="/home/someone/secret/wan"))
    folder.mkdir()
    tensors = {name: tensor.contiguous() for name, tensor in generator.model.state_dict().items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(diffusers_config(recipe.model)))
    describe(folder, recipe, 7, "ema", licence)
    return folder, recipe


def share_that_differs(found: list, expected: list) -> float:
    """The share of numbers that differ by more than rounding."""
    differs = [(x - y).abs() > 1e-4 for x, y in zip(found, expected)]
    return torch.cat([part.flatten() for part in differs]).float().mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_the_example_gives_our_samplers_video(tiny_generator, tmp_path, plan):
    """Ten chunks, so that windows move, sinks too, and routing chooses. With other settings it is another video.

    Rounding may turn a choice of routing that is nearly even; nothing else differs.
    """
    attention, chunks, changes, wrong = PLANS[plan]
    generator = tiny_generator(attention, flow={"guidance": 3.0, "sampling_steps": 3}, **changes)
    folder, recipe = exported(generator, tmp_path / "out", chunks)
    model, seeds = generator.model, [3, 4]
    frames = model.chunking.start(10)
    texts = generator.embed(["a red cross", "a boat"])
    request = VideoRequest.like(generator.card, recipe.model, generator.device, texts, frames, seeds)
    trained = recipe.stages[0].attention
    ours = list(sampling.sample_chunks(model, request, recipe.flow, attention_at_any_length(trained, chunks)))
    shapes = [(16, size, request.height, request.width) for size in model.chunking.sizes(frames)]
    noise = [
        torch.stack([normal(shape, seed, index, "sample", "generation") for seed in seeds])
        for index, shape in enumerate(shapes)
    ]
    transformer = diffusers.WanTransformer3DModel.from_pretrained(folder)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    settings = json.loads((folder / "causal.json").read_text())

    def found(**changes) -> list:
        changed = {**settings, **changes}
        return list(sample(transformer, scheduler, request.text, request.empty_text, noise, changed))

    share = share_that_differs(found(), ours)
    assert share < 0.001 if settings["attention"]["top_k"] else share == 0
    kept = [len(block.attn1.processor.kept) for block in transformer.blocks]
    assert all(isinstance(block.attn1.processor, CausalAttention) for block in transformer.blocks)
    assert max(kept) <= settings["attention"]["sink"] + max(settings["attention"]["window"], chunks - 1) + 1
    assert share_that_differs(found(attention={**settings["attention"], **wrong}), ours) > 10 * max(share, 0.001)
    assert share_that_differs(found(guidance=2.0), ours) > 0.1


@pytest.mark.slow
def test_the_copied_script_writes_a_video(tiny_generator, tmp_path):
    folder, _ = exported(tiny_generator(), tmp_path / "out", 3)
    command = [sys.executable, "sample.py", "--prompt", "a boat", "--seconds", "0.8", "--out", str(tmp_path / "a.mp4")]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    frames = list(read_frames(tmp_path / "a.mp4", 16))
    assert len(frames) == 13 and frames[0].shape == (32, 48, 3)


def test_the_card_says_what_it_is_and_nothing_about_the_machine(tiny_generator, tmp_path):
    folder, recipe = exported(tiny_generator(), tmp_path / "out", 3, licence="cc-by-4.0")
    text = (folder / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "cc-by-4.0" and front["library_name"] == "diffusers"
    for said in ("step 7", "12 | 12 | 33 frames of 32x48 at 16 fps", "the moving average", "weights of another model"):
        assert said in text.replace("Step", "step"), said
    shown = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    assert shown["model"] == config.to_dict(recipe)["model"] and shown["stages"][0]["frames"] == 9
    assert not {"data", "start"} & set(shown) and "data" not in shown["stages"][0]
    everything = "".join(path.read_text() for path in folder.rglob("*") if path.suffix in {".md", ".json"})
    assert "secret" not in everything and recipe.data.train not in everything and str(tmp_path) not in everything


def test_a_licence_is_text_and_not_yaml(tiny_generator, tmp_path):
    folder, _ = exported(tiny_generator(), tmp_path / "out", 3, licence="mine\nlibrary_name: evil")
    front = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
    assert front["library_name"] == "diffusers" and front["license"] == "mine\nlibrary_name: evil"


def test_without_its_data_a_run_is_exported_and_the_card_says_so(tiny_generator, tmp_path, capsys):
    generator = tiny_generator()
    generator.recipe = replace(generator.recipe, data=replace(generator.recipe.data, train=str(tmp_path / "gone")))
    folder, _ = exported(generator, tmp_path / "out", 3)
    text = (folder / "README.md").read_text()
    assert f"no codec, no sample.py, and no data in the card: {tmp_path / 'gone'}: no such" in capsys.readouterr().err
    assert "could not be read any more" in text and "sample.py" not in text and "Not stated" in text
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "config.json", "diffusion_pytorch_model.safetensors",
    }  # fmt: skip
    assert str(tmp_path) not in text
