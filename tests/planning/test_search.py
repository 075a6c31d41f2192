"""The recommended settings: all that run are tried, and the best that fit are found."""

from dataclasses import replace

import pytest
import yaml

from rf_train import config
from rf_train.config import Recipe
from rf_train.engine.deepspeed_json import shipped_jsons
from rf_train.model.settings import CHECKPOINTINGS
from rf_train.planning.costs import GIB, Clip, Cluster, seconds, times
from rf_train.planning.memory import ROOM, fits
from rf_train.planning.search import best, best_by_stage, candidates, overrides, peak_of
from rf_train.settings import set_by_path
from tests.conftest import plain_settings


def two_stages(**changes) -> Recipe:
    """A warm-up of teacher forcing, then self-resampling with a larger batch."""
    stages = [
        {"name": "warm", "history": "clean", "frames": 9, "batch": 8, "steps": 10},
        {"name": "self", "history": "autoregressive", "frames": 9, "batch": 16, "steps": 20},
    ]
    return config.from_dict({"model": plain_settings(dim=64, heads=4), "stages": stages, **changes})


def clips(side: int = 8) -> list[Clip]:
    return [Clip(9, side, side)] * 2


def cluster(gib: float = 8.0) -> Cluster:
    return Cluster(gpus=8, memory=gib * GIB)


def test_every_candidate_can_run_and_says_how():
    """Its overrides, put into the recipe, are the candidate; no two are the same, and none can't run."""
    recipe, found = two_stages(), set()
    for cases in candidates(recipe, clips(), cluster()):
        for case, stage in zip(cases, recipe.stages):
            case.validate()
            assert case.stage == stage and case.recipe == cases[0].recipe
        tried, plain = cases[0].recipe, config.to_dict(recipe)
        for setting in overrides(tried):
            key, _, value = setting.partition("=")
            set_by_path(plain, key, yaml.safe_load(value))
        assert config.from_dict(plain) == tried
        found.add(tuple(overrides(tried)))
    chosen = [dict(setting.split("=") for setting in settings) for settings in found]
    assert {settings["run.deepspeed"] for settings in chosen} >= {"ds_configs/zero2.json", "ds_configs/zero3.json"}
    assert {settings["run.deepspeed"] for settings in chosen} <= set(shipped_jsons())
    assert {settings["run.sequence_parallel_size"] for settings in chosen} == {"1", "2", "4"}
    assert {settings["optimizer.micro_batch"] for settings in chosen} == {"1", "2", "4"}
    assert {settings["model.checkpointing"] for settings in chosen} == set(CHECKPOINTINGS)
    assert {settings["run.gather_for_rollout"] for settings in chosen} == {"true", "false"}
    assert len(found) == len(list(candidates(recipe, clips(), cluster())))


def test_without_a_rollout_there_is_nothing_to_gather_for():
    recipe = two_stages()
    recipe = replace(recipe, stages=recipe.stages[:1])
    assert all(cases[0].gather_for_rollout for cases in candidates(recipe, clips()[:1], cluster()))


@pytest.mark.parametrize("gib", [8.0, 0.8, 0.757])
def test_the_best_is_the_cheapest_of_all_that_fit(gib):
    """The fastest, and of those as fast the one with the least traffic. Everything fits in the first case only."""
    recipe, large = two_stages(), clips(side=192)
    found, tried = best(recipe, large, cluster(gib)), list(candidates(recipe, large, cluster(gib)))
    fitting = [cases for cases in tried if all(map(fits, cases))]
    assert (len(fitting) == len(tried)) == (gib == 8.0)

    def total(cases) -> float:
        return sum(case.stage.steps * seconds(case) for case in cases)

    def on_links(cases) -> float:
        links = ("inside", "between", "host")
        return sum(case.stage.steps * times(case)[link] for case in cases for link in links)

    fastest = [cases for cases in fitting if total(cases) <= min(map(total, fitting)) * (1 + 1e-8)]
    assert found.cases in fastest and len(fastest) > 1 and found.peak <= (1 - ROOM) * gib * GIB
    assert on_links(found.cases) == pytest.approx(min(map(on_links, fastest)), rel=1e-6)
    assert found.plain() == {
        "overrides": found.overrides, "seconds": [seconds(case) for case in found.cases], "peak": found.peak,
        "why": found.why,
    }  # fmt: skip


def test_less_memory_takes_other_settings_and_then_none():
    """The second time there is a little less than what the first settings take."""
    recipe, large = two_stages(), clips(side=192)
    roomy = best_by_stage(recipe, large, cluster())[1]
    tight = best_by_stage(recipe, large, cluster(roomy.peak / GIB))[1]
    assert seconds(tight.cases[0]) >= seconds(roomy.cases[0]) and tight.peak < 0.9 * roomy.peak
    assert tight.overrides != roomy.overrides and "would rank before it but don't fit" in tight.why
    none = best(recipe, clips(side=64), cluster(0.1))
    least = min(map(peak_of, candidates(recipe, clips(side=64), cluster(0.1))))
    assert none.overrides is None and none.cases == () and none.plain() == {"overrides": None, "why": none.why}
    assert none.why.startswith(f"nothing fits in 0.1 GiB: the smallest need is {least / GIB:.1f}, with run.deepspeed=")


def test_a_batch_that_does_not_split_over_the_ranks_is_named():
    found = best(two_stages(), clips(), replace(cluster(), gpus=24))
    assert found.overrides is None
    assert found.why.startswith("no setting splits batch 8, 16 over 24 ranks: run.sequence_parallel_size must divide")
