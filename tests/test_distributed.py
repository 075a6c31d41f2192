"""ZeRO-3 on two ranks: equal to one process without DeepSpeed, resumed equal to uninterrupted, and gathered once for the rollout."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from rf_train import checkpoint, config
from rf_train.metrics import read_metrics
from tests.conftest import tiny_settings, write_dataset
from tests.distributed import PROJECT, run_distributed


def recipe_dict(folder: Path, out: Path, **changes) -> dict:
    stages = [
        {"name": "forcing", "history": "clean", "steps": 3, "batch": 4, "lr": 3e-3, "lr_end": 2e-3, "warmup": 1},
        {"name": "resampling", "history": "autoregressive", "steps": 3, "batch": 4, "lr": 2e-3},
        {"name": "routed", "history": "autoregressive", "attention": "routed", "k": 1, "steps": 2, "batch": 4, "lr": 1e-3},
    ]
    return {
        "model": vars(tiny_settings()), "data": {"train": str(folder)}, "stages": stages, "flow": {"caption_dropout": 0.3},
        "optimizer": {"micro_batch": 1, "ema": 0.9}, "run": {"out": str(out), "wandb": "disabled", "save_every": 2, "keep": 10, "seed": 4}, **changes,
    }  # fmt: skip


def train_on_this_rank(recipe: dict) -> None:
    from rf_train.train import train

    train(config.from_dict(recipe))


def train_plainly(recipe: config.Recipe) -> tuple[list[float], list[float], dict, dict]:
    """The recipe in one process without DeepSpeed: losses, gradient norms, weights and their average."""
    from rf_train import data
    from rf_train.model import CausalWan
    from rf_train.resampling import make_history, training_loss
    from rf_train.train import learning_rate

    datasets = data.open_datasets(recipe)
    torch.manual_seed(recipe.run.seed)
    model = CausalWan(recipe.model)
    o = recipe.optimizer
    optimizer = torch.optim.AdamW(model.parameters(), betas=(o.beta1, o.beta2), eps=o.eps, weight_decay=o.weight_decay)
    average = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    losses, norms = [], []
    for step, batches in data.steps(recipe, datasets, 0, 0, 1):
        _, stage, inside = recipe.stage_at(step)
        optimizer.param_groups[0]["lr"] = learning_rate(stage, inside)
        total = 0.0
        for batch in batches:
            history, _ = make_history(model, batch.x, batch.text, batch.draws, stage, model.chunking)
            loss = training_loss(model, batch.x, batch.text, history, batch.draws, recipe.flow, stage, model.chunking).loss / len(batches)
            loss.backward()
            total += loss.item()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip).item())
        optimizer.step()
        optimizer.zero_grad()
        decay = min(o.ema, (2 + step) / (11 + step))
        for name, parameter in model.named_parameters():
            average[name].lerp_(parameter.detach(), 1 - decay)
        losses.append(total)
    return losses, norms, dict(model.named_parameters()), average


def losses_of(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run / "metrics.jsonl")]


@pytest.fixture(scope="module")
def two_rank_run(tmp_path_factory):
    """(dataset, run): the recipe trained on two ranks."""
    folder = tmp_path_factory.mktemp("two")
    write_dataset(folder / "data")
    run_distributed(train_on_this_rank, 2, recipe=recipe_dict(folder / "data", folder / "run"))
    return folder / "data", folder / "run"


def test_two_zero3_ranks_equal_one_process_without_deepspeed(two_rank_run, tmp_path):
    """Losses through all stages to 1e-4 relative; weights and their average too."""
    data, run = two_rank_run
    losses, _, weights, average = train_plainly(config.from_dict(recipe_dict(data, tmp_path)))
    assert len(losses) == 8 and losses[-1] != losses[0]
    torch.testing.assert_close(torch.tensor(losses_of(run)), torch.tensor(losses), rtol=1e-4, atol=0)
    folder = checkpoint.latest(run)
    for kind, plain in (("master", weights), ("ema", average)):
        ours = checkpoint.read_weights(folder, kind)
        assert ours.keys() == plain.keys()
        for name in plain:
            torch.testing.assert_close(ours[name], plain[name].detach(), rtol=1e-3, atol=2e-4, msg=lambda m: f"{kind} {name}: {m}")


def rewound(run: Path, to: Path, step: int) -> Path:
    """A copy of a run as it stood after `step`."""
    shutil.copytree(run, to)
    for folder in (to / "checkpoints").iterdir():
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)
    (to / "latest").write_text(f"step-{step:08d}")
    return to


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(two_rank_run, tmp_path):
    data, run = two_rank_run
    again = rewound(run, tmp_path / "again", 4)
    run_distributed(train_on_this_rank, 2, recipe=recipe_dict(data, again))
    assert losses_of(again) == losses_of(run)
    for kind in checkpoint.KINDS:
        ours, theirs = (checkpoint.read_weights(checkpoint.latest(folder), kind) for folder in (again, run))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), kind


def test_one_rank_goes_on_from_what_two_wrote(two_rank_run, tmp_path):
    data, run = two_rank_run
    recipe = recipe_dict(data, tmp_path / "fork", start={"run": str(run), "step": 4})
    run_distributed(train_on_this_rank, 1, recipe=recipe)
    torch.testing.assert_close(torch.tensor(losses_of(tmp_path / "fork")), torch.tensor(losses_of(run)[4:]), rtol=1e-4, atol=0)


def test_damage_to_a_checkpoint_is_found_and_named(two_rank_run, tmp_path):
    _, run = two_rank_run
    again = rewound(run, tmp_path / "again", 4)
    path = checkpoint.latest(again) / "rank-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="rank-00001.safetensors: damaged"):
        checkpoint.verified(checkpoint.latest(again))
    for name in ("step-00000077", "", "../checkpoints"):
        (again / "latest").write_text(name)
        with pytest.raises(ValueError, match=f"latest names '{name}', which is not in"):
            checkpoint.latest(again)
    (checkpoint.latest(run) / "manifest.json").rename(again / "kept")
    for text in ("{}", "[]", "{"):
        (checkpoint.latest(run) / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match="manifest.json"):
            checkpoint.verified(checkpoint.latest(run))
    (again / "kept").rename(checkpoint.latest(run) / "manifest.json")


def folders(run: Path, *steps: int) -> Path:
    for step in steps:
        (run / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    return run


def test_without_its_pointer_a_run_goes_on_from_the_newest_checkpoint(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    run = folders(tmp_path, 2, 4, 10)
    (run / "checkpoints" / "step-00000012.making").mkdir()
    assert checkpoint.latest(run).name == "step-00000010"


def test_pruning_keeps_what_latest_names_and_what_was_saved_after_going_back(tmp_path):
    run = folders(tmp_path, 2, 4, 6, 8, 9, 10, 12)
    (run / "latest").write_text("step-00000009")  # gone back to 8, and one step on
    checkpoint.prune(run, 2, {4})
    assert checkpoint.steps_held(run) == [4, 8, 9, 10, 12] and checkpoint.latest(run).name == "step-00000009"


def count_gathers_on_this_rank(recipe: dict) -> dict:
    """Elements gathered by a held rollout, and whether weights, training losses and partitions are untouched by it."""
    from rf_train import data, distributed
    from rf_train.resampling import make_history, training_loss
    from rf_train.train import EngineModel

    recipe = config.from_dict(recipe)
    rank, world, device = distributed.start()
    datasets = data.open_datasets(recipe)
    engine = distributed.build_engine(recipe, device, world)
    stage, model = recipe.stages[1], engine.module
    batch = data.step_batches(recipe, datasets, 0, rank, world)[0]
    import deepspeed
    import numpy as np

    from rf_train.rope import rotary_table

    with deepspeed.zero.Init(dtype=torch.bfloat16):  # forces tensors made inside to bf16
        table = rotary_table.__wrapped__(999, 1, 1, 1, 24, torch.device("cpu"))
    exact = np.exp(1j * 999 * 10000.0 ** (-np.arange(0, 8, 2) / 8))
    rotary_error = float(np.abs(table[0, :4].numpy() - exact).max())
    parameters = list(model.parameters())
    gathered = []

    def counting(own):
        def gather(params, *arguments, **keywords):
            gathered.append(sum(parameter.ds_numel for parameter in params))
            return own(params, *arguments, **keywords)

        return gather

    for parameter in parameters:  # DeepSpeed sets the method on each of them
        parameter.all_gather_coalesced = counting(parameter.all_gather_coalesced)
    losses = []
    for _ in range(3):
        with distributed.held(engine) as plain:
            history, _ = make_history(plain, batch.x, batch.text, batch.draws, stage, model.chunking)
        held, passes = sum(gathered), len(gathered)
        gathered.clear()
        result = training_loss(EngineModel(engine), batch.x, batch.text, history, batch.draws, recipe.flow, stage, model.chunking)
        engine.backward(result.loss)
        engine.step()
        gathered.clear()
        losses.append(result.loss.item())
    try:
        with distributed.held(engine):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    partitioned = all(parameter.numel() == 0 for parameter in parameters)
    return {"held": held, "calls": passes, "model": sum(parameter.ds_numel for parameter in parameters), "losses": losses, "partitioned": partitioned, "rotary_error": rotary_error}


def test_the_rollout_gathers_the_model_once_and_gives_it_back(two_rank_run, tmp_path):
    data, _ = two_rank_run
    for result in run_distributed(count_gathers_on_this_rank, 2, recipe=recipe_dict(data, tmp_path)):
        assert result["held"] == result["model"]
        assert result["calls"] == 3  # two blocks and the rest
        assert result["losses"][2] < result["losses"][0]
        assert result["partitioned"]
        assert result["rotary_error"] < 1e-6


def test_when_a_rank_is_killed_the_other_says_so_in_one_line_and_leaves(two_rank_run, tmp_path):
    recipe = recipe_dict(two_rank_run[0], tmp_path / "run")
    recipe["stages"][0]["steps"] = 10_000
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(2):
        environment = {
            **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        ranks.append(subprocess.Popen([sys.executable, "-m", "rf_train.train", tmp_path / "recipe.yaml"], cwd=PROJECT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
    try:
        begin = time.monotonic()
        while len(read_metrics(tmp_path / "run" / "metrics.jsonl")) < 3 and time.monotonic() - begin < 120 and ranks[0].poll() is None:
            time.sleep(0.2)
        ranks[1].kill()
        said = ranks[0].communicate(timeout=60)[1]
    finally:
        for process in ranks:
            process.kill()
    assert ranks[0].returncode == 2 and said.splitlines()[-1].startswith("error: another rank has stopped") and "Traceback" not in said
