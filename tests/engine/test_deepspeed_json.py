"""DeepSpeed's JSON: completed from the recipe; whatever contradicts it is refused, with both values."""

import json

import pytest

from rf_train import config
from rf_train.engine.deepspeed_json import complete_settings, find_file, shipped_jsons
from tests.conftest import plain_settings


@pytest.fixture
def recipe(tmp_path):
    stage = {"name": "forcing", "history": "clean", "steps": 8, "batch": 4, "lr": 2e-3, "warmup": 2}
    run = {"deepspeed": str(tmp_path / "ds.json")}
    return config.from_dict({"model": plain_settings(), "stages": [stage], "run": run})


@pytest.mark.parametrize(
    "there, message",
    [
        (
            {"gradient_clipping": 0.5},
            "gradient_clipping is 0.5 there, but 1.0 in the recipe: optimizer.max_grad_norm",
        ),
        ({"train_batch_size": 32}, "train_batch_size is 32 there, but 4 in the recipe: stages.0.batch"),
        (
            {"train_micro_batch_size_per_gpu": 3},
            "train_micro_batch_size_per_gpu is 3 there, but 1 in the recipe: optimizer.micro_batch",
        ),
        ({"gradient_accumulation_steps": 7}, "gradient_accumulation_steps is 7 there, but 2 in the recipe"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is true there, but run.precision=auto on cpu makes it false"),
        ({"fp16": {"enabled": True}}, "fp16.enabled is true there"),
        (
            {"optimizer": {"type": "Adam", "params": {"lr": 0.1}}},
            'optimizer is .*"lr": 0.1.* there, but the recipe decides it .AdamW, lr 0.002',
        ),
        (
            {"sequence_parallel_size": 2},
            "sequence_parallel_size is 2 there, but the recipe decides it .run.sequence_parallel_size=1",
        ),
        ({"gradient_clipping": True}, "gradient_clipping is true there, but 1.0"),
        (
            {"data_types": {"grad_accum_dtype": "bf16"}},
            'data_types.grad_accum_dtype is "bf16" there, but training makes it "fp32"',
        ),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast.enabled is true there, but training makes it false"),
        ({"amp": {"enabled": True}}, "amp.enabled is true there"),
        ({"zero_optimization": {"stage": 1}}, "stage is 1"),
        (
            {"zero_optimization": {"stage": 2, "compute_grad_norm": False}},
            "zero_optimization.compute_grad_norm is false there, but training makes it true: the norm tells",
        ),
        (
            {"bf16": {"check_grad_overflow": False}},
            "bf16.check_grad_overflow is false there, but training makes it true: the norm tells",
        ),
        ({"zero_optimization": None}, "zero_optimization is null, expected an object"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": True}},
            "zero_optimization.offload_optimizer is true, expected an object",
        ),
        ({"bf16": True}, "bf16 is true, expected an object"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_contradicts_the_recipe_is_refused_with_both_values(recipe, there, message):
    with open(recipe.run.deepspeed, "w") as file:
        json.dump({"zero_optimization": {"stage": 3}, **there}, file)
    with pytest.raises(ValueError, match=message) as caught:
        complete_settings(recipe, "cpu", 2)
    assert "\n" not in str(caught.value)


def test_what_agrees_is_completed(recipe):
    agreeing = {
        "zero_optimization": {"stage": 3},
        "gradient_clipping": 1.0,
        "train_batch_size": 4,
        "bf16": {"enabled": False},
        "gradient_accumulation_steps": "auto",
    }
    with open(recipe.run.deepspeed, "w") as file:
        json.dump(agreeing, file)
    assert complete_settings(recipe, "cpu", 2)["gradient_accumulation_steps"] == 2


def test_a_file_that_holds_no_object(recipe):
    with open(recipe.run.deepspeed, "w") as file:
        file.write("[3]")
    with pytest.raises(ValueError, match=r"expected an object of settings, got \[3\]"):
        complete_settings(recipe, "cpu", 2)


@pytest.mark.parametrize("file", shipped_jsons())
def test_shipped_files_are_found_from_any_folder(recipe, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_file(file).is_file()
