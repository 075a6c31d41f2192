"""Runs on several ranks, and the same run in one process without DeepSpeed to compare them with."""

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rf_train import config, train
from rf_train.config import Recipe
from rf_train.data import batches
from rf_train.diffusion.batch import Batch
from rf_train.diffusion.histories import make_history
from rf_train.diffusion.loss import training_loss
from rf_train.engine import checkpoint
from rf_train.model.transformer import CausalWan
from rf_train.run_log import read_rows
from tests.conftest import plain_settings
from tests.distributed import run_distributed

STEPS = 30


def recipe_dict(data: Path, out: Path, micro_batch: int = 1, **run) -> dict:
    """A recipe of 30 steps through every kind of stage. `run` replaces settings of its section `run`.

    One stage has another batch, and not at a multiple of its micro-steps.
    """
    resampling = {"kind": "autoregressive"}
    long = {"batch": 4, "lr": 1e-3, "data": str(data / "long")}
    return {
        "model": plain_settings(),
        "data": {"train": str(data / "short")},
        "flow": {"caption_dropout": 0.3},
        "optimizer": {"micro_batch": micro_batch, "ema": 0.9, "weight_decay": 0.1, "eps": 1e-5},
        "run": {"out": str(out), "wandb": "disabled", "save_every": 1000, "seed": 4, **run},
        "stages": [
            {"name": "forcing", "history": "clean", "steps": 8, "batch": 4, "lr": 2e-3, "lr_end": 1e-3, "warmup": 2},
            {"name": "resampling", "history": resampling, "steps": 5, "batch": 12, "lr": 1e-3, "lr_end": 5e-4},
            {"name": "mixed", "history": {"kind": "mixed", "probability": 0.3}, "steps": 6, "batch": 4, "lr": 1e-3},
            {"name": "long", "history": resampling, "attention": {"kind": "window", "window": 2, "sink": 1}, "steps": 5}
            | long,
            {"name": "routed", "history": resampling, "attention": {"kind": "routed", "top_k": 2}, "steps": 6} | long,
        ],
    }


@dataclass
class PlainRun:
    """The recipe's run in one process without DeepSpeed."""

    data: Path  # folder of the datasets
    losses: list[float]
    norms: list[float]  # of the gradient, before clipping
    weights: dict[str, Tensor]
    average: dict[str, Tensor]
    clips: dict[str, dict[str, str]]  # {step: {clip: hash of what it reads}}


def train_plainly(recipe: Recipe, data: Path) -> PlainRun:
    """Trains `recipe` with plain PyTorch."""
    datasets = batches.open_datasets(recipe)
    torch.manual_seed(recipe.run.seed)
    model, o = CausalWan(recipe.model), recipe.optimizer
    optimizer = torch.optim.AdamW(model.parameters(), betas=(o.beta1, o.beta2), eps=o.eps, weight_decay=o.weight_decay)
    average = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    run = PlainRun(data, [], [], {}, average, {})
    for step, micro_batches in batches.steps(recipe, datasets, 0, 0, 1):
        stage, begin, _ = recipe.span_at(step)
        optimizer.param_groups[0]["lr"] = train.learning_rate(stage, step - begin)
        run.clips[str(step)] = fingerprints(micro_batches)
        total = 0.0
        for batch in micro_batches:
            history, _ = make_history(stage.history, batch, stage.attention, model)
            loss = training_loss(model, batch, history, recipe.flow, stage.attention).loss / len(micro_batches)
            loss.backward()
            total += loss.item()
        run.norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), o.max_grad_norm).item())
        optimizer.step()
        optimizer.zero_grad()
        decay = min(o.ema, (2 + step) / (11 + step))
        for name, parameter in model.named_parameters():
            average[name].lerp_(parameter.detach(), 1 - decay)
        run.losses.append(total)
    run.weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return run


def fingerprints(micro_batches: list[Batch]) -> dict[str, str]:
    """{clip: hash of its latent, caption and random numbers} of a replica's step."""
    found = {}
    for batch in micro_batches:
        for row, name in enumerate(batch.ids):
            tensors = (batch.x, batch.text, *batch.draws.values())
            found[name] = hashlib.sha256(b"".join(tensor[row].numpy().tobytes() for tensor in tensors)).hexdigest()
    return found


def watched_steps() -> dict[str, dict[str, str]]:
    """What this rank is given at each step of the training that comes: it fills while it trains."""
    given: dict[str, dict[str, str]] = {}
    steps = batches.steps

    def watched(*arguments):
        for step, micro_batches in steps(*arguments):
            given[str(step)] = fingerprints(micro_batches)
            yield step, micro_batches

    train.steps = watched
    return given


def train_on_this_rank(recipe: dict) -> dict:
    """Trains. Returns what this rank was given at each step."""
    given = watched_steps()
    train.train(config.from_dict(recipe))
    return given


def train_on_ranks(ranks: int, recipe: dict) -> list[dict]:
    return run_distributed(train_on_this_rank, ranks, recipe=recipe)


def losses_of(run: Path) -> list[float]:
    return [row["loss"] for row in read_rows(run / "metrics.jsonl")]


def norms_of(run: Path) -> list[float]:
    return [row["grad_norm"] for row in read_rows(run / "metrics.jsonl")]


def assert_close(found: list[float], expected: list[float], relative: float) -> None:
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=relative, atol=0)


def assert_same_state(one: Path, other: Path) -> None:
    """The newest checkpoints of two runs hold the same bits."""
    for kind in checkpoint.KINDS:
        ours, theirs = (checkpoint.read_weights(checkpoint.latest(run), kind) for run in (one, other))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), kind


def rewound(run: Path, to: Path, step: int) -> Path:
    """A copy of a run as it stood after `step`."""
    shutil.copytree(run, to)
    for later in [saved for saved in checkpoint.steps_saved(to) if saved > step]:
        shutil.rmtree(checkpoint.folder_of_step(to, later))
    (to / "latest").write_text(checkpoint.folder_of_step(to, step).name)
    return to
