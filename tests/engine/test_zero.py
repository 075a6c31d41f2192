"""The same run on any engine: 30 steps equal one process without DeepSpeed, whatever the ranks, ZeRO stage or offload.

Losses are compared to 1e-4 relative in fp32; the clips and random numbers of every step bit for bit.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from rf_train import config, start_checks, train
from rf_train.data import batches
from rf_train.diffusion.histories import Autoregressive, make_history
from rf_train.diffusion.loss import training_loss
from rf_train.engine import checkpoint
from rf_train.engine.collectives import start_ranks
from rf_train.engine.deepspeed_json import PROJECT
from rf_train.engine.zero import build_engine
from rf_train.model import attention, rope
from tests.distributed import run_distributed
from tests.engine.runs import (
    STEPS,
    assert_close,
    losses_of,
    norms_of,
    recipe_dict,
    train_on_ranks,
    train_on_this_rank,
)

ENGINES = {
    "one rank": (1, {"micro_batch": 4}),
    "accumulation over 4": (1, {}),
    "four ranks": (4, {}),
    "gathered in every pass": (2, {"gather_for_rollout": False}),
    "ZeRO-2": (2, {"deepspeed": "ds_configs/zero2.json"}),
    "offload": (2, {"deepspeed": "ds_configs/zero3_offload.json"}),
    "hpZ over nodes of two": (4, {"hpz": 2}),
    "CPU": (2, {"deepspeed": "ds_configs/cpu.json"}),
    "sequence 2 x data 2": (4, {"sequence_parallel_size": 2}),
    "sequence 2, ZeRO-2": (2, {"sequence_parallel_size": 2, "deepspeed": "ds_configs/zero2.json"}),
}


def assert_the_same_run(plain_run, out: Path, given: list[dict], sequence_parallel_size: int = 1) -> None:
    """Losses, gradient norms (Adam doesn't see a scaled gradient, so losses wouldn't), and what clips were given."""
    assert len(plain_run.losses) == STEPS
    assert_close(losses_of(out), plain_run.losses, 1e-4)
    assert_close(norms_of(out), plain_run.norms, 1e-3)
    for step, clips in plain_run.clips.items():
        of_replicas = [rank[step] for rank in given[::sequence_parallel_size]]
        assert sum(len(rank) for rank in of_replicas) == len(clips)
        assert {name: value for rank in of_replicas for name, value in rank.items()} == clips, step


def test_two_zero3_ranks_equal_one_process_without_deepspeed(plain_run, two_rank_run):
    """Also the weights and their average."""
    out, given = two_rank_run
    assert_the_same_run(plain_run, out, given)
    assert plain_run.losses[-1] < plain_run.losses[0]
    for kind, plain in (("master", plain_run.weights), ("ema", plain_run.average)):
        ours = checkpoint.read_weights(checkpoint.latest(out), kind)
        assert ours.keys() == plain.keys()
        for name, tensor in plain.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=3e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_makes_the_same_run(plain_run, tmp_path, name):
    ranks, run = ENGINES[name]
    if "hpz" in run:
        settings = json.loads((PROJECT / "ds_configs/zero3_hpz.json").read_text())
        settings["zero_optimization"]["zero_hpz_partition_size"] = run["hpz"]
        (tmp_path / "hpz.json").write_text(json.dumps(settings))
        run = {"deepspeed": str(tmp_path / "hpz.json")}
    given = train_on_ranks(ranks, recipe_dict(plain_run.data, tmp_path, **run))
    assert_the_same_run(plain_run, tmp_path, given, run.get("sequence_parallel_size", 1))


@pytest.mark.slow
@pytest.mark.parametrize("file", ["zero3", "zero2", "zero3_offload"])
def test_in_bf16_losses_stay_near(plain_run, tmp_path, file):
    """Weights and activations in bf16, all else in fp32: the same run to bf16's rounding."""
    settings = {"precision": "bf16", "deepspeed": f"ds_configs/{file}.json"}
    train_on_ranks(2, recipe_dict(plain_run.data, tmp_path, **settings))
    assert_close(losses_of(tmp_path), plain_run.losses, 0.03)


def count_attention_on_this_rank(recipe: dict) -> int:
    """How often the training passes, forward and backward, run attention."""
    calls, merge = [], attention.merged_attention
    start_checks.self_test = lambda *_: None
    attention.merged_attention = lambda *arguments: calls.append(1) or merge(*arguments)
    train_on_this_rank(recipe)
    return len(calls)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing, times", [("none", 1), ("block", 2), ("selective", 1)])
def test_recomputation_under_zero3_changes_nothing(plain_run, tmp_path, checkpointing, times):
    recipe = recipe_dict(plain_run.data, tmp_path)
    recipe["model"], recipe["stages"] = {**recipe["model"], "checkpointing": checkpointing}, recipe["stages"][:1]
    calls = run_distributed(count_attention_on_this_rank, 2, recipe=recipe)
    assert_close(losses_of(tmp_path), plain_run.losses[:8], 1e-4)
    assert_close(norms_of(tmp_path), plain_run.norms[:8], 1e-3)
    assert calls == [8 * 2 * 2 * times] * 2  # steps, micro-batches, blocks


@pytest.mark.slow
@pytest.mark.parametrize("engine, sequence", [("zero2", 1), ("zero3", 2)])
def test_compiled_blocks_change_no_run(plain_run, tmp_path, engine, sequence):
    """Through every stage: teacher forcing, rollouts, a window, routing. Also where ranks share each clip."""
    settings = {"deepspeed": f"ds_configs/{engine}.json", "sequence_parallel_size": sequence}
    recipe = recipe_dict(plain_run.data, tmp_path, compile=True, **settings)
    recipe["model"] = {**recipe["model"], "checkpointing": "auto"}
    train_on_ranks(2, recipe)
    assert_close(losses_of(tmp_path), plain_run.losses, 1e-4)
    assert_close(norms_of(tmp_path), plain_run.norms, 1e-3)


# ---- the rollout's gathers


def count_gathers_on_this_rank(recipe: dict) -> dict:
    """What a rollout gathers, and whether weights, losses and partitions are untouched by it."""
    import deepspeed

    recipe, ranks = config.from_dict(recipe), start_ranks()
    datasets = batches.open_datasets(recipe)
    engine = build_engine(recipe, ranks)
    stage, model = recipe.stages[1], engine.model
    batch = batches.step_batches(recipe, datasets, 10, ranks.rank, ranks.world_size)[0]
    with deepspeed.zero.Init(dtype=torch.bfloat16):  # forces tensors that are made inside to bf16
        table = rope.rotary_table.__wrapped__(999, 1, 1, 1, 24, torch.device("cpu"))
    exact = np.exp(1j * 999 * 10000.0 ** (-np.arange(0, 8, 2) / 8))
    parameters, gathered = list(model.parameters()), []

    def counting(own):
        def gather(params, *arguments, **keywords):
            gathered.append(sum(parameter.ds_numel for parameter in params))
            return own(params, *arguments, **keywords)

        return gather

    for parameter in parameters:  # DeepSpeed sets the method on each of them
        parameter.all_gather_coalesced = counting(parameter.all_gather_coalesced)
    losses = []
    for _ in range(3):
        with engine.gathered_parameters() as plain:
            history, _ = make_history(stage.history, batch, stage.attention, plain)
        elements, calls = sum(gathered), len(gathered)
        gathered.clear()
        result = training_loss(engine, batch, history, recipe.flow, stage.attention)
        engine.backward(result.loss)
        engine.step()
        gathered.clear()
        losses.append(result.loss.item())
    try:
        with engine.gathered_parameters():
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    return {
        "elements": elements,
        "calls": calls,
        "model": sum(parameter.ds_numel for parameter in parameters),
        "losses": losses,
        "partitioned": all(parameter.numel() == 0 for parameter in parameters),
        "rotary_error": float(np.abs(torch.view_as_complex(table[0, :4]).numpy() - exact).max()),
    }


def test_the_rollout_gathers_the_model_once_and_gives_it_back(plain_run, tmp_path):
    for result in run_distributed(count_gathers_on_this_rank, 2, recipe=recipe_dict(plain_run.data, tmp_path)):
        assert result["elements"] == result["model"]
        assert result["calls"] == 3  # two blocks and the rest
        assert result["losses"][2] < result["losses"][0]
        assert result["partitioned"]
        assert result["rotary_error"] < 1e-6


def watch_the_trace_on_this_rank(recipe: dict, gather: bool) -> dict:
    """Gathers of six steps by how they came about, and whether the training pass kept ZeRO-3's trace."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator
    from deepspeed.utils import z3_leaf_module

    recipe, ranks = config.from_dict(recipe), start_ranks()
    datasets = batches.open_datasets(recipe)
    engine = build_engine(recipe, ranks)
    stage = recipe.stages[-1]
    counts = {"ahead": 0, "at once": 0, "invalidated": 0, "recording": 0}
    gather_name = "_PartitionedParameterCoordinator__all_gather_params"
    gather_params, invalidate = getattr(Coordinator, gather_name), Coordinator._invalidate_trace
    fetch, asked = Coordinator.fetch_sub_module, []

    def watched_fetch(self, module, forward):
        asked.append({id(p) for p in module.parameters(recurse=z3_leaf_module(module))})
        counts["recording"] += self.is_record_trace()
        try:
            return fetch(self, module, forward)
        finally:
            asked.pop()

    def watched_gather(self, params, forward):
        own = all(id(p) in asked[-1] for p in params)
        counts["at once" if own else "ahead"] += 1
        return gather_params(self, params, forward)

    def watched_invalidate(self):
        counts["invalidated"] += 1
        return invalidate(self)

    Coordinator.fetch_sub_module = watched_fetch
    setattr(Coordinator, gather_name, watched_gather)
    Coordinator._invalidate_trace = watched_invalidate
    told, losses = [], []
    first = recipe.stage_spans[-1].begin
    for step in range(first, first + 6):
        batch = batches.step_batches(recipe, datasets, step, ranks.rank, ranks.world_size)[0]
        with engine.rollout(len(stage.history.rollout_passes(batch.chunk_sizes)), gather) as model:
            history, _ = make_history(stage.history, batch, stage.attention, model)
        rollout = dict(counts)
        result = training_loss(engine, batch, history, recipe.flow, stage.attention)
        engine.backward(result.loss)
        engine.step()
        losses.append(result.loss.item())
        told.append({name: counts[name] - rollout[name] for name in counts})
        counts.update(dict.fromkeys(counts, 0))
    return {"steps": told, "losses": losses}


@pytest.mark.slow
def test_a_rollout_on_gathered_parameters_leaves_trainings_trace_and_prefetch_alone(plain_run, tmp_path):
    recipe = recipe_dict(plain_run.data, tmp_path)
    once, per_pass = (
        run_distributed(watch_the_trace_on_this_rank, 2, recipe=recipe, gather=gather) for gather in (True, False)
    )
    for with_it, without in zip(once, per_pass):
        for step in with_it["steps"][2:]:  # from the third step on
            assert step["invalidated"] == 0 and step["recording"] == 0, with_it
            assert step["ahead"] > 0, with_it
        # what gathering once avoids
        assert any(step["invalidated"] or step["recording"] for step in without["steps"][2:]), without
        torch.testing.assert_close(torch.tensor(with_it["losses"]), torch.tensor(without["losses"]), rtol=0, atol=1e-6)


# ---- rollouts that ranks make differently


def roll_out_differently_on_this_rank(recipe: dict, kind: str) -> str:
    """Trains with a history that does on rank 1 what it must not; the error."""
    import os

    class SkipsPasses(Autoregressive, kind="skips_passes"):
        """Makes no pass on rank 1."""

        def make(self, batch, level, attention, model):
            if os.environ["RANK"] == "1":
                return batch.x[:, :, : batch.history_frames]
            return super().make(batch, level, attention, model)

    class AddsPasses(Autoregressive, kind="adds_passes"):
        """Makes a pass more than it declares on rank 1."""

        def make(self, batch, level, attention, model):
            made = super().make(batch, level, attention, model)
            if os.environ["RANK"] == "1":
                super().make(batch, level, attention, model)
            return made

    class NeedsItOnOneRank(Autoregressive, kind="needs_it_on_one_rank"):
        """Says on rank 1 that it needs no rollout: the most obvious way to skip one."""

        def needs_rollout(self, batch):
            return os.environ["RANK"] == "0"

    class DeclaresOthers(Autoregressive, kind="declares_others"):
        """Declares twice the passes on rank 1."""

        def rollout_passes(self, sizes):
            return super().rollout_passes(sizes) * (1 + int(os.environ["RANK"]))

    assert {SkipsPasses, AddsPasses, NeedsItOnOneRank, DeclaresOthers}
    start_checks.check_history = lambda *_: None  # it would find some of them at the start
    recipe["stages"] = [{**recipe["stages"][1], "history": kind}]
    try:
        train.train(config.from_dict(recipe))
    except (RuntimeError, ValueError) as error:
        dist.destroy_process_group()  # its peer sees the end, as when the command's process ends
        return str(error)
    return "no error"


@pytest.mark.slow
@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("kind", ["skips_passes", "adds_passes", "needs_it_on_one_rank", "declares_others"])
def test_a_rank_that_rolls_out_differently_is_told_within_seconds(plain_run, tmp_path, kind, gather):
    recipe = recipe_dict(plain_run.data, tmp_path, gather_for_rollout=gather)
    said = run_distributed(roll_out_differently_on_this_rank, 2, timeout=60, recipe=recipe, kind=kind)
    if kind == "needs_it_on_one_rank":
        assert said == ["no error"] * 2  # all roll out when one needs it
    elif kind == "declares_others":
        assert ["ranks disagree on passes of a rollout: 2 on rank 0, 4 on rank 1" in error for error in said] == [
            True
        ] * 2
    else:
        assert said[1].startswith("a rollout announced 2 passes and made ") and "on rank 1" in said[1]
        assert "closed by peer" in said[0] or "reset by peer" in said[0]
