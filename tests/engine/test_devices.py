"""Which GPU a rank gets, what refuses to run, and what is set before CUDA starts. No test needs a GPU."""

import os
from pathlib import Path

import pytest
import torch

from rf_train import generate, plan
from rf_train.engine import checkpoint, devices
from rf_train.engine.collectives import start_ranks
from tests.distributed import run_distributed
from tests.engine.runs import assert_same_state, losses_of, recipe_dict, train_on_this_rank


@pytest.mark.parametrize(
    "local_rank, visible, named, expected",
    [
        (3, 8, "", 3),
        (1, 2, "4,5", 1),
        (3, 1, "3", 0),  # Slurm's --gpus-per-task
        (3, 1, "", 0),
        (0, 1, "0,1", 0),  # DeepSpeed's launcher names two, and the machine has one
    ],
)
def test_a_rank_gets_a_gpu_that_it_sees(local_rank, visible, named, expected):
    assert devices.gpu_of_rank(local_rank, 8, visible, named) == expected


@pytest.mark.parametrize("local_rank, visible, named", [(4, 4, ""), (1, 1, "0,1")])
def test_a_rank_without_a_gpu_is_told_in_one_line(local_rank, visible, named):
    with pytest.raises(ValueError, match=rf"^{visible} GPUs are visible .* the launcher started 5 ranks") as caught:
        devices.gpu_of_rank(local_rank, 5, visible, named)
    assert "\n" not in str(caught.value)


def local_rank_with_one_gpu() -> str:
    """Starts a rank on a pretended single GPU, with gloo. Returns LOCAL_RANK, as DeepSpeed then finds it."""
    import deepspeed

    os.environ["CUDA_VISIBLE_DEVICES"] = "0"
    torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
    chosen: list[str] = []
    torch.cuda.set_device = lambda device: chosen.append(str(device))
    deepspeed.init_distributed = lambda *_, **__: chosen.append(os.environ["LOCAL_RANK"])
    torch.distributed.get_rank = torch.distributed.get_world_size = lambda: 0
    start_ranks()
    return " ".join(chosen)


def test_ranks_with_one_visible_gpu_each_tell_deepspeed_so():
    assert run_distributed(local_rank_with_one_gpu, 2) == ["cuda:0 0"] * 2


# ---- GPUs that can't be used


@pytest.fixture
def driver(tmp_path) -> Path:
    """A root folder with the files of NVIDIA's driver."""
    (tmp_path / "proc/driver/nvidia/gpus/0000:1b:00.0").mkdir(parents=True)
    return tmp_path


def test_gpus_are_found_by_the_drivers_files(tmp_path, driver):
    assert devices.gpus_offered({}, driver) and devices.gpus_offered({"CUDA_VISIBLE_DEVICES": "0"}, driver)
    assert not any(devices.gpus_offered({"CUDA_VISIBLE_DEVICES": hidden}, driver) for hidden in ("", "-1"))
    other = tmp_path / "other"
    (other / "dev").mkdir(parents=True)
    (other / "proc/driver/nvidia/gpus").mkdir(parents=True)
    assert not devices.gpus_offered({}, other)
    (other / "dev/nvidia0").touch()
    assert devices.gpus_offered({}, other)


@pytest.fixture
def environment(monkeypatch) -> dict[str, str]:
    """The environment variables of this process, without those that matter here; changes end with the test."""
    ours = ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    variables = {name: value for name, value in os.environ.items() if name not in ours}
    monkeypatch.setattr(os, "environ", variables)
    return variables


@pytest.fixture
def unusable_gpus(monkeypatch, driver):
    """This machine has GPUs, and PyTorch can't use them."""
    offered = devices.gpus_offered
    monkeypatch.setattr(devices, "gpus_offered", lambda environment: offered(environment, driver))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("unusable_gpus", "environment")
def test_nothing_falls_back_to_the_cpu_unnoticed(monkeypatch, tmp_path, capsys):
    with pytest.raises(ValueError, match=r'this machine has GPUs, but .* set CUDA_VISIBLE_DEVICES="", or DS_ACC'):
        start_ranks()
    (tmp_path / "recipe.yaml").write_text("stages: [{}]")
    monkeypatch.setattr(checkpoint, "at_step", lambda *_: tmp_path)
    assert generate.main([str(tmp_path), str(tmp_path / "out.mp4"), "--prompt", "a"]) == 2
    assert plan.main([str(tmp_path / "recipe.yaml"), "stages.0.frames=3", "--measure"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("error: this machine has GPUs") for line in lines)


@pytest.mark.usefixtures("unusable_gpus")
@pytest.mark.parametrize("name, value", [("CUDA_VISIBLE_DEVICES", ""), ("DS_ACCELERATOR", "cpu")])
def test_the_cpu_can_be_chosen(environment, name, value):
    environment["CUDA_VISIBLE_DEVICES"] = "0,1"  # by DeepSpeed's launcher
    environment[name] = value
    assert not devices.gpu_is_usable() and environment["CUDA_VISIBLE_DEVICES"] == ""


# ---- what is set before CUDA starts


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_segments_grow_unless_the_user_has_set_the_allocator(environment, name):
    environment |= {"CUDA_VISIBLE_DEVICES": "", name: "max_split_size_mb:64"}
    for expected in ({name: "max_split_size_mb:64"}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}):
        devices.gpu_is_usable()
        assert {key: value for key, value in environment.items() if key.endswith("_ALLOC_CONF")} == expected
        environment.pop(name, None)


def train_and_tell_determinism(recipe: dict) -> list:
    train_on_this_rank(recipe)
    return [torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")]


@pytest.mark.slow
def test_deterministic_kernels_are_chosen_on_every_rank_and_change_nothing_on_a_cpu(plain_run, tmp_path):
    told = {}
    for chosen in (False, True):
        recipe = recipe_dict(plain_run.data, tmp_path / str(chosen), deterministic=chosen)
        recipe["stages"] = [{**stage, "steps": 3} for stage in recipe["stages"][:2]]
        told[chosen] = run_distributed(train_and_tell_determinism, 2, recipe=recipe)
    assert told == {False: [[False, None]] * 2, True: [[True, ":4096:8"]] * 2}
    assert losses_of(tmp_path / "True") == losses_of(tmp_path / "False")
    assert_same_state(tmp_path / "True", tmp_path / "False")
