"""The same run on any engine: 30 steps through all stages equal one process without DeepSpeed, whatever the ranks, ZeRO stage, offload or split.

Losses are compared to 1e-4 relative in fp32; the clips and random numbers of every step bit for bit.
"""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from rf_train import checkpoint, config, data
from rf_train.metrics import read_metrics
from tests.conftest import tiny_settings, write_dataset
from tests.distributed import run_distributed
from tests.test_distributed import losses_of, train_plainly


def recipe_dict(folder: Path, out: Path, **run) -> dict:
    micro_batch = run.pop("micro_batch", 1)
    return {
        "model": vars(tiny_settings()), "data": {"train": str(folder / "short")}, "flow": {"caption_dropout": 0.3},
        "optimizer": {"micro_batch": micro_batch, "ema": 0.9}, "run": {"out": str(out), "wandb": "disabled", "save_every": 1000, "seed": 4, **run},
        "stages": [
            {"name": "forcing", "history": "clean", "steps": 8, "batch": 4, "lr": 2e-3, "lr_end": 1e-3, "warmup": 2},
            {"name": "resampling", "history": "autoregressive", "steps": 9, "batch": 4, "lr": 1e-3},
            {"name": "long", "history": "autoregressive", "attention": "window", "window": 2, "steps": 6, "batch": 4, "lr": 1e-3, "data": str(folder / "long")},
            {"name": "routed", "history": "autoregressive", "attention": "routed", "k": 2, "steps": 7, "batch": 4, "lr": 5e-4, "data": str(folder / "long")},
        ],
    }  # fmt: skip


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    """(folder of the datasets, losses, gradient norms, {step: {clip: hash of its draws}}) of one process without DeepSpeed."""
    folder = tmp_path_factory.mktemp("engines")
    write_dataset(folder / "short")
    write_dataset(folder / "long", count=7, frames=14, seed=1)
    recipe = config.from_dict(recipe_dict(folder, folder, micro_batch=4))
    losses, norms, _, _ = train_plainly(recipe)
    datasets = data.open_datasets(recipe)
    return folder, losses, norms, {str(step): fingerprints(data.step_batches(recipe, datasets, step, 0, 1)) for step in range(recipe.steps)}


def fingerprints(batches: list[data.Batch]) -> dict[str, str]:
    """{clip: hash of its latent, caption and draws} of a rank's step."""
    found = {}
    for batch in batches:
        for row, name in enumerate(batch.ids):
            tensors = (batch.x, batch.text, *vars(batch.draws).values())
            found[name] = hashlib.sha256(b"".join(tensor[row].numpy().tobytes() for tensor in tensors)).hexdigest()
    return found


def train_and_tell(recipe: dict) -> dict:
    """Trains on this rank; what it was given at each step."""
    from rf_train.train import train

    given, steps = {}, data.steps

    def watched(*arguments):
        for step, batches in steps(*arguments):
            given[str(step)] = fingerprints(batches)
            yield step, batches

    data.steps = watched
    train(config.from_dict(recipe))
    return given


ENGINES = {
    "one rank": (1, {"micro_batch": 4}),
    "accumulation over 4": (1, {}),
    "two ranks": (2, {}),
    "four ranks": (4, {}),
    "not held": (2, {"held": False}),
    "ZeRO-2": (2, {"deepspeed": "ds_configs/zero2.json"}),
    "offload": (2, {"deepspeed": "ds_configs/zero3_offload.json"}),
    "hpZ over nodes of two": (4, {"hpz": 2}),
    "CPU": (2, {"deepspeed": "ds_configs/cpu.json"}),
    "sequence 2 x data 2": (4, {"sequence": 2}),
    "sequence 2, ZeRO-2": (2, {"sequence": 2, "deepspeed": "ds_configs/zero2.json"}),
}


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_makes_the_same_run(plain_run, tmp_path, name):
    folder, losses, norms, draws = plain_run
    ranks, run = ENGINES[name]
    if "hpz" in run:
        settings = json.loads(Path("ds_configs/zero3_hpz.json").read_text())
        settings["zero_optimization"]["zero_hpz_partition_size"] = run["hpz"]
        (tmp_path / "hpz.json").write_text(json.dumps(settings))
        run = {"deepspeed": str(tmp_path / "hpz.json")}
    told = run_distributed(train_and_tell, ranks, recipe=recipe_dict(folder, tmp_path, **run))
    assert len(losses) == 30
    torch.testing.assert_close(torch.tensor(losses_of(tmp_path)), torch.tensor(losses), rtol=1e-4, atol=0)
    found = [row["grad_norm"] for row in read_metrics(tmp_path / "metrics.jsonl")]  # losses alone don't see a scaled gradient: Adam doesn't
    torch.testing.assert_close(torch.tensor(found), torch.tensor(norms), rtol=1e-3, atol=0)
    sequence = run.get("sequence", 1)
    for step, clips in draws.items():
        given = [rank[step] for rank in told[::sequence]]
        assert sum(len(rank) for rank in given) == len(clips)
        assert {name: value for rank in given for name, value in rank.items()} == clips, step
