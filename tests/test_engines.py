"""The same run on any engine: 30 steps through all stages equal one process without DeepSpeed, whatever the ranks, ZeRO stage, offload or split.

Losses are compared to 1e-4 relative in fp32; the clips and random numbers of every step bit for bit.
"""

import hashlib
import json
import time
from pathlib import Path

import pytest
import torch

from rf_train import checkpoint, config, data
from rf_train.metrics import read_metrics
from tests.conftest import tiny_settings, write_dataset
from tests.distributed import run_distributed
from tests.test_distributed import losses_of, rewound, train_plainly


def recipe_dict(folder: Path, out: Path, **run) -> dict:
    micro_batch = run.pop("micro_batch", 1)
    return {
        "model": vars(tiny_settings()), "data": {"train": str(folder / "short")}, "flow": {"caption_dropout": 0.3},
        "optimizer": {"micro_batch": micro_batch, "ema": 0.9}, "run": {"out": str(out), "wandb": "disabled", "save_every": 1000, "seed": 4, **run},
        "stages": [
            {"name": "forcing", "history": "clean", "steps": 8, "batch": 4, "lr": 2e-3, "lr_end": 1e-3, "warmup": 2},
            {"name": "resampling", "history": "autoregressive", "steps": 9, "batch": 4, "lr": 1e-3},
            {"name": "long", "history": "autoregressive", "attention": "window", "window": 2, "sink": 1, "steps": 6, "batch": 4, "lr": 1e-3, "data": str(folder / "long")},
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


def count_attention_on_this_rank(recipe: dict) -> list[int]:
    """How often each training pass, forward and backward, runs attention."""
    from rf_train import attention, train

    calls, meet, train.self_test = [], attention.merged_attention, lambda *_: None
    attention.merged_attention = lambda *arguments: calls.append(1) or meet(*arguments)
    train_and_tell(recipe)
    return len(calls)


@pytest.mark.parametrize("checkpointing, times", [("none", 1), ("block", 2), ("selective", 1)])
def test_recomputation_under_zero3_changes_nothing(plain_run, tmp_path, checkpointing, times):
    folder, losses, norms, _ = plain_run
    recipe = recipe_dict(folder, tmp_path)
    recipe["model"], recipe["stages"] = {**recipe["model"], "checkpointing": checkpointing}, recipe["stages"][:1]
    calls = run_distributed(count_attention_on_this_rank, 2, recipe=recipe)
    torch.testing.assert_close(torch.tensor(losses_of(tmp_path)), torch.tensor(losses[:8]), rtol=1e-4, atol=0)
    found = [row["grad_norm"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(norms[:8]), rtol=1e-3, atol=0)
    assert calls == [8 * 2 * 2 * times] * 2  # steps, micro-batches, blocks


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


@pytest.mark.parametrize("file", ["zero3", "zero2", "zero3_offload"])
def test_in_bf16_losses_stay_near(plain_run, tmp_path, file):
    """Weights and activations in bf16, all else in fp32: the same run to bf16's rounding."""
    folder, losses, _, _ = plain_run
    run_distributed(train_and_tell, 2, recipe=recipe_dict(folder, tmp_path, precision="bf16", deepspeed=f"ds_configs/{file}.json"))
    torch.testing.assert_close(torch.tensor(losses_of(tmp_path)), torch.tensor(losses), rtol=0.03, atol=0)


def spread_on_this_rank(heads: int, world: int) -> dict:
    """The model's passes with and without sequence parallelism on this rank: largest differences of velocity, cached velocity and averaged gradient."""
    import torch.distributed as dist

    from rf_train import distributed
    from rf_train.chunks import Attention
    from rf_train.model import CausalWan
    from rf_train.selftest import self_test
    from tests.conftest import randomise
    from tests.test_model import cached_pass, parallel_pass, random_clip

    distributed.start()
    model = CausalWan(tiny_settings(dim=12 * heads, heads=heads, ffn_dim=64, checkpointing="selective"))
    randomise(model)
    x, t, text = random_clip(11, 1, model.settings, height=8, width=2 * world)
    history = random_clip(11, 1, model.settings, 8, 2 * world, seed=2)[0]
    sequence, found = distributed.Sequence(world), {}
    for sight in (Attention(), Attention("window", window=1, sink=1), Attention("routed", k=1)):
        velocities, gradients = [], []
        for spread in (None, sequence):
            model.sequence = spread
            model.zero_grad()
            velocities.append(parallel_pass(model, x, history, t, text, sight))
            velocities[-1].square().mean().backward()
            gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
        dist.all_reduce(gradients[1])
        with torch.no_grad():
            cached = cached_pass(model, x, history, t, text, sight)
        scale = gradients[0].abs().max()
        for name, one, other in (("velocity", *velocities), ("cached", velocities[0], cached), ("gradient", gradients[0] / scale, gradients[1] / world / scale)):
            found[name] = max(found.get(name, 0.0), (one - other).abs().max().item())
    model.sequence = sequence
    self_test(model, 7, [Attention("window", window=1, sink=1), Attention("routed", k=1)])
    cache = model.new_cache(1, 4 * world, 11)
    return {**found, "cache_heads": cache.layers[0].k.shape[1]}


@pytest.mark.parametrize("heads, ranks", [(12, 2), (12, 3), (12, 4), (12, 6), (40, 8)])
def test_sequence_parallel_passes_equal_plain_ones(heads, ranks):
    for result in run_distributed(spread_on_this_rank, ranks, heads=heads, world=ranks):
        assert result["velocity"] <= 2e-5 and result["cached"] <= 2e-5 and result["gradient"] <= 1e-5, result
        assert result["cache_heads"] == heads // ranks


def count_passes_on_this_rank(recipe: dict, held: bool) -> dict:
    """Gathers of five steps (elements and how they came about), and whether the training pass kept its trace."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator
    from deepspeed.utils import z3_leaf_module

    from rf_train import distributed
    from rf_train.resampling import make_history, training_loss

    recipe = config.from_dict(recipe)
    rank, world, device = distributed.start()
    datasets = data.open_datasets(recipe)
    engine = distributed.build_engine(recipe, device, world)
    stage, chunking = recipe.stages[3], engine.module.chunking
    counts = {"ahead": 0, "at once": 0, "invalidated": 0, "recording": 0}
    gather, invalidate, fetch = Coordinator._PartitionedParameterCoordinator__all_gather_params, Coordinator._invalidate_trace, Coordinator.fetch_sub_module
    asked = []

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
        return gather(self, params, forward)

    def watched_invalidate(self):
        counts["invalidated"] += 1
        return invalidate(self)

    Coordinator.fetch_sub_module = watched_fetch
    Coordinator._PartitionedParameterCoordinator__all_gather_params = watched_gather
    Coordinator._invalidate_trace = watched_invalidate
    told, losses = [], []
    for step in range(6):
        batch = data.step_batches(recipe, datasets, step, rank, world)[0]
        with distributed.rollout_model(engine, held) as model:
            history, _ = make_history(model, batch.x, batch.text, batch.draws, stage, chunking)
        rollout = dict(counts)
        result = training_loss(distributed.EngineModel(engine), batch.x, batch.text, history, batch.draws, recipe.flow, stage, chunking)
        engine.backward(result.loss)
        engine.step()
        losses.append(result.loss.item())
        told.append({name: counts[name] - rollout[name] for name in counts})
        counts.update(dict.fromkeys(counts, 0))
    return {"steps": told, "losses": losses}


def test_a_held_rollout_leaves_trainings_trace_and_prefetch_alone(plain_run, tmp_path):
    folder = plain_run[0]
    held, plain = (run_distributed(count_passes_on_this_rank, 2, recipe=recipe_dict(folder, tmp_path), held=held) for held in (True, False))
    for with_it, without in zip(held, plain):
        for step in with_it["steps"][2:]:  # from the third step on
            assert step["invalidated"] == 0 and step["recording"] == 0, with_it
            assert step["ahead"] > 0, with_it
        assert any(step["invalidated"] or step["recording"] for step in without["steps"][2:]), without  # what holding avoids
        torch.testing.assert_close(torch.tensor(with_it["losses"]), torch.tensor(without["losses"]), rtol=0, atol=1e-6)


def train_with_damage(recipe: dict, rank_with_nan: int, steps: list[int]) -> None:
    """Trains; the loss of one rank is NaN at the given 0-based steps."""
    import os

    from rf_train import train as trainer

    make, current = trainer.training_loss, []

    def broken(*arguments):
        result = make(*arguments)
        if int(os.environ["RANK"]) == rank_with_nan and current[-1] in steps:
            result.loss = result.loss * float("nan")
            result.by_chunk[:] = float("nan")
        return result

    train_step = trainer.train_step
    trainer.training_loss = broken
    trainer.train_step = lambda engine, step, *rest: (current.append(step), train_step(engine, step, *rest))[1]
    try:
        trainer.train(config.from_dict(recipe))
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize("run", [{}, {"deepspeed": "ds_configs/zero2.json"}, {"precision": "bf16"}, {"precision": "bf16", "deepspeed": "ds_configs/zero2.json"}], ids=str)
def test_a_nan_on_one_rank_skips_the_step_on_all_and_training_goes_on(plain_run, tmp_path, run):
    folder, losses, _, _ = plain_run
    recipe = recipe_dict(folder, tmp_path, **run)
    recipe["stages"] = recipe["stages"][:1]
    said = run_distributed(train_with_damage, 2, recipe=recipe, rank_with_nan=1, steps=[2])
    assert said == [None, None]
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [0, 0, 1, 0, 0, 0, 0, 0] and rows[2]["clips_not_finite"] == 2 and rows[3]["clips_not_finite"] == 0
    manifest = checkpoint.verified(checkpoint.latest(tmp_path))
    assert manifest["optimizer_steps"] == manifest["average_steps"] == 7
    assert all(tensor.isfinite().all() for kind in checkpoint.KINDS for tensor in checkpoint.read_weights(checkpoint.latest(tmp_path), kind).values())
    if not run:
        torch.testing.assert_close(torch.tensor([row["loss"] for row in rows[:2]]), torch.tensor(losses[:2]), rtol=1e-4, atol=0)
        assert rows[2]["loss"] is not None and rows[-1]["loss"] < rows[0]["loss"]


def test_ten_in_a_row_stop_the_run_with_the_clips_named_and_nothing_saved(plain_run, tmp_path):
    folder = plain_run[0]
    recipe = recipe_dict(folder, tmp_path, save_every=2)
    said = run_distributed(train_with_damage, 2, recipe=recipe, rank_with_nan=1, steps=list(range(5, 40)))
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert len(rows) == 15 and [row["skipped"] for row in rows] == [0] * 5 + [1] * 10
    given = {name for step in range(5, 15) for batch in data.step_batches(config.from_dict(recipe), data.open_datasets(config.from_dict(recipe)), step, 1, 2) for name in batch.ids}
    for text in said:
        assert text.startswith("step 15: 10 steps in a row") and "step-00000004" in text
        assert all(name in text for name in given)
    assert checkpoint.latest(tmp_path).name == "step-00000004"  # neither every second step nor the first stage's end, all of them skipped


def average_on_this_rank(recipe: dict) -> float:
    """The largest difference, after 50 steps, of the sharded average from one kept in fp32 on gathered weights."""
    from deepspeed.utils import safe_get_full_fp32_param

    from rf_train.train import train

    kept, update = {}, checkpoint.Shards.update_average

    def both(self):
        update(self)
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        for name, parameter in self.engine.module.named_parameters():
            whole = safe_get_full_fp32_param(parameter)
            kept.setdefault(name, self_start[name].clone()).lerp_(whole, 1 - decay)

    self_start, make = {}, checkpoint.Shards.__init__

    def start(self, engine, decay):
        make(self, engine, decay)
        self_start.update({name: safe_get_full_fp32_param(parameter).clone() for name, parameter in engine.module.named_parameters()})

    checkpoint.Shards.update_average, checkpoint.Shards.__init__ = both, start
    recipe = config.from_dict(recipe)
    train(recipe)
    ours = checkpoint.read_weights(checkpoint.latest(Path(recipe.run.out)), "ema")
    moved = max((kept[name] - self_start[name]).abs().max().item() for name in kept)
    assert kept.keys() == ours.keys() and moved > 1e-2
    return max((ours[name] - kept[name].view_as(ours[name])).abs().max().item() for name in kept)


@pytest.mark.parametrize("run", [{}, {"precision": "bf16"}, {"deepspeed": "ds_configs/zero2.json"}], ids=str)
def test_the_sharded_average_is_a_plain_one(plain_run, tmp_path, run):
    recipe = recipe_dict(plain_run[0], tmp_path, **run)
    recipe["stages"] = [{**recipe["stages"][0], "steps": 50}]
    assert max(run_distributed(average_on_this_rank, 2, recipe=recipe)) <= 1e-7


def disagreeing_on_this_rank(recipe: dict, changed: dict, frames: int) -> str:
    """Trains with other settings on rank 1, and with clips that are cut to `frames` there; the error."""
    import os

    from rf_train.train import train

    if os.environ["RANK"] == "1":
        recipe = {**recipe, **{section: {**recipe[section], **values} for section, values in changed.items()}}
        steps = data.steps
        data.steps = lambda *arguments: ((step, [cut(batch, frames) for batch in batches]) for step, batches in steps(*arguments))
    try:
        train(config.from_dict(recipe))
    except ValueError as error:
        return str(error)
    return "no error"


def cut(batch: data.Batch, frames: int) -> data.Batch:
    batch.x = batch.x[:, :, :frames]
    batch.draws.noise, batch.draws.history_noise = batch.draws.noise[:, :, :frames], batch.draws.history_noise[:, :, :frames]
    batch.draws.t_normal, batch.draws.t_uniform = batch.draws.t_normal[:, : frames // 3], batch.draws.t_uniform[:, : frames // 3]
    return batch


@pytest.mark.parametrize("held", [True, False])
def test_ranks_that_disagree_on_the_number_of_chunks_stop_at_once(plain_run, tmp_path, held):
    folder = plain_run[0]
    recipe, begin = recipe_dict(folder, tmp_path, held=held), time.perf_counter()
    said = run_distributed(disagreeing_on_this_rank, 2, timeout=90, recipe=recipe, changed={}, frames=6)
    assert said == ["step 1: ranks disagree on chunks: 3 on rank 0, 2 on rank 1; all must read the same recipe and data"] * 2
    said = run_distributed(disagreeing_on_this_rank, 2, timeout=90, recipe=recipe, changed={"model": {"chunk": 2}, "run": {"seed": 5}}, frames=9)
    assert said == ["ranks disagree: recipe.model.chunk is 3 on rank 0, 2 on rank 1; recipe.run.seed is 4 on rank 0, 5 on rank 1"] * 2
    assert time.perf_counter() - begin < 90


def on_a_node_of_its_own(recipe: dict, files: dict) -> str:
    """Trains where rank 1 finds other files under the same names; the error."""
    import os

    from rf_train import distributed
    from rf_train.train import train

    if os.environ["RANK"] == "1":
        find, open_latents = distributed.find, data.Latents
        distributed.find = lambda path: find(files.get(path, path))
        data.Latents = lambda folder, model: open_latents(files.get(str(folder), folder), model)
    try:
        train(config.from_dict(recipe))
    except ValueError as error:
        return str(error)
    return "no error"


def test_ranks_with_other_files_under_the_same_names_stop_at_once(plain_run, tmp_path):
    folder = plain_run[0]
    recipe = recipe_dict(folder, tmp_path)
    files = {"ds_configs/zero3.json": "ds_configs/zero2.json"}
    for said in run_distributed(on_a_node_of_its_own, 2, timeout=90, recipe=recipe, files=files):
        assert said.startswith("ranks disagree: ") and "deepspeed.zero_optimization.stage is 3 on rank 0, 2 on rank 1" in said
    write_dataset(tmp_path / "other", count=16)
    for said in run_distributed(on_a_node_of_its_own, 2, timeout=90, recipe=recipe, files={str(folder / "short"): str(tmp_path / "other")}):
        assert said.startswith(f"ranks disagree: data.{folder / 'short'}.samples is 12 on rank 0, 16 on rank 1; data.{folder / 'short'}.card is ")


def test_a_sequence_that_does_not_split_a_frame_is_refused_before_anything_is_built(plain_run, tmp_path):
    recipe = recipe_dict(plain_run[0], tmp_path, sequence=4)
    recipe["model"] = {**recipe["model"], "heads": 4}
    for said in run_distributed(on_a_node_of_its_own, 4, timeout=90, recipe=recipe, files={}):
        assert said == f"run.sequence=4: a latent frame of {plain_run[0] / 'short'} has 6 tokens, which don't split evenly over 4 ranks"


@pytest.mark.parametrize("run", [{"deepspeed": "ds_configs/zero2.json"}, {"sequence": 2}, {"precision": "bf16"}, {"deepspeed": "ds_configs/zero3_offload.json"}], ids=str)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(plain_run, tmp_path, run):
    recipe = recipe_dict(plain_run[0], tmp_path / "whole", save_every=4, **run)
    recipe["stages"] = [{**stage, "steps": 4} for stage in recipe["stages"][:2]]
    run_distributed(train_and_tell, 2, recipe=recipe)
    rewound(tmp_path / "whole", tmp_path / "again", 4)
    run_distributed(train_and_tell, 2, recipe={**recipe, "run": {**recipe["run"], "out": str(tmp_path / "again")}})
    assert len(losses_of(tmp_path / "again")) == 8 and losses_of(tmp_path / "again") == losses_of(tmp_path / "whole")
    for kind in checkpoint.KINDS:
        ours, theirs = (checkpoint.read_weights(checkpoint.latest(tmp_path / name), kind) for name in ("again", "whole"))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), kind


@pytest.mark.parametrize("before, after", [(({}, 2), ({"deepspeed": "ds_configs/zero2.json"}, 4)), (({"deepspeed": "ds_configs/zero2.json"}, 2), ({}, 1))], ids=["3 to 2", "2 to 3"])
def test_a_run_goes_on_under_another_stage_and_number_of_ranks(plain_run, tmp_path, before, after):
    folder, losses, _, _ = plain_run
    first = recipe_dict(folder, tmp_path / "first", **before[0])
    first["stages"] = first["stages"][:1]
    run_distributed(train_and_tell, before[1], recipe=first)
    whole = recipe_dict(folder, tmp_path / "second", **after[0])
    whole["start"], whole["stages"] = {"run": str(tmp_path / "first")}, whole["stages"][:2]
    run_distributed(train_and_tell, after[1], recipe=whole)
    again = recipe_dict(folder, tmp_path / "third", **before[0])
    again["start"], again["stages"] = whole["start"], whole["stages"]
    run_distributed(train_and_tell, before[1], recipe=again)
    assert len(losses_of(tmp_path / "second")) == 9
    torch.testing.assert_close(torch.tensor(losses_of(tmp_path / "second")), torch.tensor(losses_of(tmp_path / "third")), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "there, message",
    [
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5 there, but 1.0 in the recipe: optimizer.clip"),
        ({"train_batch_size": 32}, "train_batch_size is 32 there, but 4 in the recipe: stages.0.batch"),
        ({"train_micro_batch_size_per_gpu": 3}, "train_micro_batch_size_per_gpu is 3 there, but 1 in the recipe: optimizer.micro_batch"),
        ({"gradient_accumulation_steps": 7}, "gradient_accumulation_steps is 7 there, but 2 in the recipe"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is true there, but run.precision=auto on cpu makes it false"),
        ({"fp16": {"enabled": True}}, "fp16.enabled is true there"),
        ({"optimizer": {"type": "Adam", "params": {"lr": 0.1}}}, 'optimizer is .*"lr": 0.1.* there, but the recipe decides it .AdamW, lr 0.002'),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size is 2 there, but the recipe decides it .run.sequence=1"),
        ({"gradient_clipping": True}, "gradient_clipping is true there, but 1.0"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, 'data_types.grad_accum_dtype is "bf16" there, but training makes it "fp32"'),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast.enabled is true there, but training makes it false"),
        ({"amp": {"enabled": True}}, "amp.enabled is true there"),
        ({"zero_optimization": {"stage": 1}}, "stage is 1"),
        ({"zero_optimization": None}, "zero_optimization is null, expected an object"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": True}}, "zero_optimization.offload_optimizer is true, expected an object"),
        ({"bf16": True}, "bf16 is true, expected an object"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_json_that_contradicts_the_recipe_is_refused_with_both_values(plain_run, tmp_path, there, message):
    from rf_train.distributed import engine_settings

    settings = {"zero_optimization": {"stage": 3}, **there}
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    recipe = config.from_dict(recipe_dict(plain_run[0], tmp_path, deepspeed=str(tmp_path / "ds.json")))
    with pytest.raises(ValueError, match=message):
        engine_settings(recipe, torch.device("cpu"), 2)
    (tmp_path / "ds.json").write_text("[3]")
    with pytest.raises(ValueError, match=r"expected an object of settings, got \[3\]"):
        engine_settings(recipe, torch.device("cpu"), 2)
    agreeing = {"zero_optimization": {"stage": 3}, "gradient_clipping": 1.0, "train_batch_size": 4, "bf16": {"enabled": False}, "gradient_accumulation_steps": "auto"}
    (tmp_path / "ds.json").write_text(json.dumps(agreeing))
    assert engine_settings(recipe, torch.device("cpu"), 2)["gradient_accumulation_steps"] == 2
