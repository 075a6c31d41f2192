"""What a step costs: FLOP are those that torch counts, traffic is the minimum."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from rf_train import config
from rf_train.diffusion.histories import History, Mixed
from rf_train.model.chunks import Attention
from rf_train.model.settings import CHECKPOINTINGS
from rf_train.model.transformer import CausalWan
from rf_train.planning.costs import (
    Clip,
    Traffic,
    all_to_all,
    clip_of,
    collective_traffic,
    flop,
    seconds,
    step_traffic,
    times,
)
from tests.conftest import plain_settings, tiny_settings, write_dataset
from tests.planning.cases import ATTENTIONS, Step, tiny_case, with_run


@pytest.mark.parametrize("gpus", [1, 7])
def test_parameters_are_the_models(gpus):
    case = tiny_case(gpus=gpus)
    model = CausalWan(case.recipe.model)
    assert case.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert case.block_parameters == sum(parameter.numel() for parameter in model.blocks[1].parameters())
    assert case.parameters_per_rank == sum(-(-parameter.numel() // gpus) for parameter in model.parameters())


# ---- FLOP


def flop_counter() -> FlopCounterMode:
    """Counts operation by operation; the CPU's flash kernel as the attention that it is."""
    aten = torch.ops.aten
    forward = aten._scaled_dot_product_flash_attention_for_cpu
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    counts = {
        forward: lambda q, k, v, *_, out_shape=None, **__: sdpa_flop_count(q, k, v),
        backward: lambda grad, q, k, v, *_, out_shape=None, **__: sdpa_backward_flop_count(grad, q, k, v),
    }
    return FlopCounterMode(display=False, custom_mapping=counts)


def counted_flop(case) -> tuple[int, int]:
    """FLOP that torch counts in (making the history with the model at hand, loss and backward)."""
    model, step = CausalWan(case.recipe.model), Step(case)
    with flop_counter() as in_rollout:
        step.make_history(model)
    with flop_counter() as in_training:
        step.loss(model).backward()
    return in_rollout.get_total_flops(), in_training.get_total_flops()


def check_flop(case) -> None:
    """The plan counts what is run, to 1 in 1000: rollout, recomputation and backward included."""
    rollout, training = counted_flop(case)
    planned = flop(case)
    assert bool(rollout) == case.rolls_out
    assert planned["rollout"] == pytest.approx(rollout * case.rollout_probability, rel=1e-3)
    assert sum(planned.values()) == pytest.approx(training + rollout * case.rollout_probability, rel=1e-3)


def test_every_kind_of_attention_is_tried():
    assert set(ATTENTIONS) == set(Attention.kinds)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("history", History.kinds)
def test_flop_of_every_history_are_those_that_a_step_runs(history, attention):
    check_flop(tiny_case(history, ATTENTIONS[attention], checkpointing="none"))


@pytest.mark.parametrize("checkpointing", CHECKPOINTINGS)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_flop_of_recomputation_are_those_that_a_step_runs(attention, checkpointing):
    """Histories are made without gradient: recomputation is the same for all of them."""
    check_flop(tiny_case("autoregressive", ATTENTIONS[attention], frames=9, checkpointing=checkpointing))


@pytest.mark.parametrize("history", [name for name, cls in History.kinds.items() if hasattr(cls, "solver_steps")])
def test_flop_grow_with_solver_steps_and_a_short_last_chunk_is_counted_as_it_is(history):
    check_flop(tiny_case({"kind": history, "solver_steps": 3}, frames=11, first_chunk=1))


@pytest.mark.parametrize("history", History.kinds)
def test_a_clip_of_a_single_chunk_has_no_rollout(history):
    case = tiny_case(history, frames=3)
    check_flop(case)
    assert not case.rolls_out and flop(case)["rollout"] == 0


@pytest.mark.parametrize("probability, same", [(1.0, "autoregressive"), (0.0, "clean")])
def test_a_mixed_history_costs_what_it_does_in_the_end(probability, same):
    mixed, other = (tiny_case(kind, gpus=16, device="cuda") for kind in (Mixed(probability=probability), same))
    assert flop(mixed) == flop(other) and step_traffic(mixed) == step_traffic(other)
    assert times(mixed) == times(other) and mixed.rollout_probability == float(same == "autoregressive")


def test_a_mixed_history_rolls_out_as_soon_as_one_clip_of_a_micro_step_needs_it():
    always, mixed = (tiny_case(kind, gpus=4) for kind in ("autoregressive", Mixed(probability=0.25)))
    share = 1 - 0.75**8  # two clips on each of four ranks
    assert mixed.rollout_probability == share and flop(mixed)["rollout"] == share * flop(always)["rollout"]
    gathers, all_gathers = (step_traffic(case).by_purpose["gathers in rollouts"] for case in (mixed, always))
    assert gathers.inside == pytest.approx(share * all_gathers.inside)


def test_flop_scale_with_the_batch_and_not_with_the_ranks():
    one, four = tiny_case(), tiny_case(gpus=4)
    assert sum(flop(four).values()) == pytest.approx(4 * sum(flop(one).values()))
    same = replace(four, cluster=one.cluster)
    assert flop(same) == flop(four)


# ---- traffic


def test_what_a_gpu_receives_is_the_least_there_can_be():
    inside, between = collective_traffic(64e9, 64, 8)
    assert between == 64e9 * 7 / 8 / 8 and inside + between == 64e9 * 63 / 64
    assert collective_traffic(64e9, 8, 8) == (56e9, 0) and collective_traffic(64e9, 1, 1) == (0, 0)


def test_without_a_gather_per_rollout_each_pass_gathers():
    once = tiny_case(gpus=8, device="cuda")
    each = with_run(once, gather_for_rollout=False)
    gathers = [step_traffic(case).by_purpose["gathers in rollouts"].inside for case in (once, each)]
    assert gathers[1] == 3 * gathers[0] > 0  # three chunks are made
    assert gathers[0] == pytest.approx(2 * once.parameters * 7 / 8)


def test_sequence_ranks_send_tokens_and_share_the_work():
    alone = tiny_case(gpus=2, device="cuda")
    shared = with_run(alone, sequence_parallel_size=2)
    assert shared.micro_steps == 2 * alone.micro_steps and shared.replicas == 1
    assert all_to_all(alone) == Traffic(0, 0)
    assert all_to_all(shared).inside > 0 and all_to_all(shared).between == 0
    assert sum(flop(shared).values()) == sum(flop(alone).values())


def test_a_step_takes_as_long_as_its_slowest_part():
    case = tiny_case(gpus=16, device="cuda")
    slow_links = replace(case, cluster=replace(case.cluster, between=1.0))
    slow_gpus = replace(case, cluster=replace(case.cluster, flops=1.0))
    assert seconds(slow_links) == times(slow_links)["between"] == step_traffic(case).between
    assert seconds(slow_gpus) == times(slow_gpus)["compute"]
    assert times(slow_gpus)["compute"] == pytest.approx(sum(flop(case).values()) / 16 / case.cluster.mfu)


# ---- the clip of a stage


def test_a_datasets_card_decides_the_clip(tmp_path):
    write_dataset(tmp_path / "data", frames=9, settings=tiny_settings())
    stages = [{"name": "a"}, {"name": "b", "frames": 6}, {"name": "c", "frames": 12}]
    recipe = config.from_dict({"model": plain_settings(), "data": {"train": str(tmp_path / "data")}, "stages": stages})
    assert clip_of(recipe, 0, (480, 832)) == Clip(9, 4, 6)
    assert clip_of(recipe, 1, (480, 832)) == Clip(6, 4, 6)
    with pytest.raises(ValueError, match=r"frames=12, but .* holds clips of 9"):
        clip_of(recipe, 2, (480, 832))


def test_without_a_dataset_the_size_decides_the_clip():
    recipe = config.from_dict({"model": plain_settings(), "stages": [{"frames": 6}]})
    assert clip_of(recipe, 0, (480, 832)) == Clip(6, 60, 104)
    assert clip_of(recipe, 0, (704, 1280), 16) == Clip(6, 44, 80)
    with pytest.raises(ValueError, match=r"--size: size 720x1280: must be multiples of 32, such as 704x1280"):
        clip_of(recipe, 0, (720, 1280), 16)
