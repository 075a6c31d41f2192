"""Ulysses: passes that ranks share equal plain ones."""

import pytest
import torch
import torch.distributed as dist

from rf_train import config
from rf_train.engine.collectives import start_ranks
from rf_train.engine.sequence_parallel import Ulysses
from rf_train.model.chunks import Dense, Routed, Window
from rf_train.model.self_test import self_test
from rf_train.model.transformer import CausalWan
from rf_train.train import train
from tests.conftest import random_clip, randomise, tiny_settings
from tests.distributed import run_distributed
from tests.engine.runs import recipe_dict
from tests.model.passes import cached_pass, parallel_pass


def compare_on_this_rank(heads: int, ranks: int) -> dict:
    """The largest differences of velocity, cached velocity and averaged gradient, shared and not."""
    start_ranks()
    model = CausalWan(tiny_settings(dim=8 * heads, heads=heads, ffn_dim=64, checkpointing="selective"))
    randomise(model)
    x, t, text = random_clip(11, 1, model.settings, height=8, width=2 * ranks)
    history = random_clip(11, 1, model.settings, 8, 2 * ranks, seed=2)[0]
    ulysses, found = Ulysses(ranks), {}
    for attention in (Dense(), Window(window=1, sink=1), Routed(top_k=1)):
        velocities, gradients = [], []
        for sequence_parallel in (None, ulysses):
            model.sequence_parallel = sequence_parallel
            model.zero_grad()
            velocities.append(parallel_pass(model, x, history, t, text, attention))
            velocities[-1].square().mean().backward()
            gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
        dist.all_reduce(gradients[1])
        with torch.no_grad():
            cached = cached_pass(model, x, history, t, text, attention)
        scale = gradients[0].abs().max()
        pairs = {
            "velocity": velocities,
            "cached": [velocities[0], cached],
            "gradient": [gradients[0] / scale, gradients[1] / ranks / scale],
        }
        for name, (one, other) in pairs.items():
            found[name] = max(found.get(name, 0.0), (one - other).abs().max().item())
    self_test(model, 7, [Window(window=1, sink=1), Routed(top_k=1)])
    cache = model.new_kv_cache(1, 4 * ranks, 11, Dense())
    return {**found, "cache_heads": cache.layers[0].k.shape[1]}


@pytest.mark.slow
@pytest.mark.parametrize("heads, ranks", [(12, 2), (12, 3), (12, 4), (12, 6), (40, 8)])
def test_shared_passes_equal_plain_ones(heads, ranks):
    for result in run_distributed(compare_on_this_rank, ranks, heads=heads, ranks=ranks):
        assert result["velocity"] <= 2e-5 and result["cached"] <= 2e-5 and result["gradient"] <= 1e-5, result
        assert result["cache_heads"] == heads // ranks


def error_on_this_rank(recipe: dict) -> str:
    try:
        train(config.from_dict(recipe))
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.slow
def test_a_size_that_does_not_split_a_frame_is_refused_before_anything_is_built(plain_run, tmp_path):
    recipe = recipe_dict(plain_run.data, tmp_path, sequence_parallel_size=4)
    recipe["model"] = {**recipe["model"], "heads": 4}
    tokens = f"a latent frame of {plain_run.data / 'short'} has 6 tokens"
    for said in run_distributed(error_on_this_rank, 4, timeout=90, recipe=recipe):
        assert said == f"run.sequence_parallel_size=4: {tokens}, which don't split evenly over 4 ranks"
