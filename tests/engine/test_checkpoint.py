"""Checkpoints: resumed equal to uninterrupted bit for bit, under another stage or number of ranks, and damage found."""

from pathlib import Path

import pytest
import torch

from rf_train import config
from rf_train.engine import checkpoint
from rf_train.engine.state import TrainingState
from rf_train.train import train
from tests.distributed import run_distributed
from tests.engine.runs import assert_close, assert_same_state, losses_of, recipe_dict, rewound, train_on_ranks


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(plain_run, two_rank_run, tmp_path):
    """From the middle of a stage, through two more."""
    again = rewound(two_rank_run[0], tmp_path / "again", 10)
    train_on_ranks(2, recipe_dict(plain_run.data, again, save_every=10, keep=10))
    assert losses_of(again) == losses_of(two_rank_run[0])
    assert_same_state(again, two_rank_run[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "run",
    [
        {"deepspeed": "ds_configs/zero2.json"},
        {"sequence_parallel_size": 2},
        {"precision": "bf16"},
        {"deepspeed": "ds_configs/zero3_offload.json"},
    ],
    ids=str,
)
def test_so_it_is_on_other_engines(plain_run, tmp_path, run):
    recipe = recipe_dict(plain_run.data, tmp_path / "whole", save_every=4, **run)
    recipe["stages"] = [{**stage, "steps": 4} for stage in recipe["stages"][:2]]
    train_on_ranks(2, recipe)
    rewound(tmp_path / "whole", tmp_path / "again", 4)
    train_on_ranks(2, {**recipe, "run": {**recipe["run"], "out": str(tmp_path / "again")}})
    assert len(losses_of(tmp_path / "again")) == 8
    assert losses_of(tmp_path / "again") == losses_of(tmp_path / "whole")
    assert_same_state(tmp_path / "again", tmp_path / "whole")


def test_one_rank_goes_on_from_what_two_wrote(plain_run, two_rank_run, tmp_path):
    recipe = recipe_dict(plain_run.data, tmp_path / "fork")
    recipe["start"] = {"run": str(two_rank_run[0]), "step": 20}
    train_on_ranks(1, recipe)
    assert_close(losses_of(tmp_path / "fork"), losses_of(two_rank_run[0])[20:], 1e-4)


ZERO_2 = {"deepspeed": "ds_configs/zero2.json"}


@pytest.mark.slow
@pytest.mark.parametrize("before, after", [(({}, 2), (ZERO_2, 4)), ((ZERO_2, 2), ({}, 1))], ids=["3 to 2", "2 to 3"])
def test_a_run_goes_on_under_another_stage_and_number_of_ranks(plain_run, tmp_path, before, after):
    first = recipe_dict(plain_run.data, tmp_path / "first", **before[0])
    stages = first["stages"][:2]
    first["stages"] = stages[:1]
    train_on_ranks(before[1], first)
    for name, (run, ranks) in (("other", after), ("same", before)):
        recipe = recipe_dict(plain_run.data, tmp_path / name, **run)
        recipe["start"], recipe["stages"] = {"run": str(tmp_path / "first")}, stages
        train_on_ranks(ranks, recipe)
    assert len(losses_of(tmp_path / "other")) == stages[1]["steps"]
    assert_close(losses_of(tmp_path / "other"), losses_of(tmp_path / "same"), 1e-4)


def test_damage_to_a_checkpoint_is_found_and_named(two_rank_run, tmp_path):
    run = rewound(two_rank_run[0], tmp_path / "run", 10)
    newest = checkpoint.latest(run)
    path = newest / "rank-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"rank-00001.safetensors: damaged"):
        checkpoint.verified(newest)
    for text in ("{}", "[]", "{"):
        (newest / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=r"manifest.json"):
            checkpoint.verified(newest)
    for name in ("step-00000077", "", "../checkpoints", "\x00\xff"):
        (run / "latest").write_text(name)
        assert checkpoint.latest(run) == newest


def make_folders(run: Path, *steps: int) -> Path:
    for step in steps:
        checkpoint.folder_of_step(run, step).mkdir(parents=True)
    return run


def test_without_its_pointer_a_run_goes_on_from_the_newest_checkpoint(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    run = make_folders(tmp_path, 2, 4, 10)
    (run / "checkpoints" / "step-00000012.making").mkdir()
    assert checkpoint.latest(run) == checkpoint.folder_of_step(run, 10)
    assert checkpoint.step_of(checkpoint.latest(run)) == 10


def test_pruning_keeps_what_latest_names_and_what_was_saved_after_going_back(tmp_path):
    run = make_folders(tmp_path, 2, 4, 6, 8, 9, 10, 12)
    (run / "latest").write_text("step-00000009")  # gone back to 8, and one step on
    checkpoint.prune(run, 2, {4})
    assert checkpoint.steps_saved(run) == [4, 8, 9, 10, 12]
    assert checkpoint.step_of(checkpoint.latest(run)) == 9


def test_only_its_own_name_makes_a_folder_a_checkpoint(tmp_path):
    """Others are not found under the name of their step."""
    run = make_folders(tmp_path, 2)
    for name in ("step-5", "step-0000000007", "step-²", "step-00000009.old", "step-"):
        (run / "checkpoints" / name).mkdir()
    assert checkpoint.steps_saved(run) == [2]


# ---- the average


def average_on_this_rank(recipe: dict) -> float:
    """The largest difference, after 50 steps, of the sharded average from one kept in fp32 on gathered weights."""
    from deepspeed.utils import safe_get_full_fp32_param

    state, start, average = TrainingState, {}, {}
    make, update = state.__init__, state.update_average

    def make_both(self, engine, decay):
        make(self, engine, decay)
        whole = {name: safe_get_full_fp32_param(p).clone() for name, p in engine.model.named_parameters()}
        start.update(whole)
        average.update({name: tensor.clone() for name, tensor in whole.items()})

    def update_both(self):
        update(self)
        decay = min(self.ema_decay, (1 + self.average_steps) / (10 + self.average_steps))
        for name, parameter in self.engine.model.named_parameters():
            average[name].lerp_(safe_get_full_fp32_param(parameter), 1 - decay)

    state.__init__, state.update_average = make_both, update_both
    recipe = config.from_dict(recipe)
    train(recipe)
    ours = checkpoint.read_weights(checkpoint.latest(Path(recipe.run.out)), "ema")
    assert average.keys() == ours.keys()
    assert max((average[name] - start[name]).abs().max().item() for name in average) > 1e-2  # it has moved
    return max((ours[name] - average[name].view_as(ours[name])).abs().max().item() for name in average)


@pytest.mark.slow
@pytest.mark.parametrize("run", [{}, {"precision": "bf16"}, ZERO_2], ids=str)
def test_the_sharded_average_is_a_plain_one(plain_run, tmp_path, run):
    recipe = recipe_dict(plain_run.data, tmp_path, **run)
    recipe["stages"] = [{**recipe["stages"][0], "steps": 50}]
    assert max(run_distributed(average_on_this_rank, 2, recipe=recipe)) <= 1e-7


def test_the_shapes_of_another_model_are_all_named():
    theirs, ours = {"a": [2, 3], "c": [1]}, {"a": (3, 2), "b": (1,)}
    found = checkpoint.shape_differences(theirs, ours)
    assert found == "b is missing; c is not in the model; a is [2, 3], the model's is [3, 2]"
    assert checkpoint.shape_differences({"a": [2]}, {"a": torch.zeros(2).shape}) == ""
