"""Routing's choices are counted by distance, layer and head, as a count by hand says."""

from dataclasses import replace

import pytest
import torch

from rf_train import config
from rf_train.diffusion.sampling import VideoRequest, sample_chunks
from rf_train.evaluation.routing_choices import RoutingChoices, counted_choices
from rf_train.model import routing
from rf_train.model.chunks import Dense, Routed
from rf_train.model.routing import RoutedRows, RoutingPlan
from tests.conftest import random_clip


def test_choices_are_counted_by_distance_layer_and_head():
    plan = RoutingPlan((RoutedRows(2, 4, 5), RoutedRows(1, 5, 6)), (0, 1, 2, 3, 4, 5, 6), Routed(1))
    choices = RoutingChoices(layers=2, heads=2, chunks=6)
    slots = torch.tensor([[[0, 9], [3, 9], [0, 9]], [[1, 9], [1, 9], [4, 9]]], dtype=torch.int16)[None]
    for _ in range(2):  # once per layer
        choices.add(slots, plan)
    for layer in range(2):
        assert choices.by_distance[layer, 0, :, 0].tolist() == [1, 0, 0, 1, 1, 0]
        assert choices.by_distance[layer, 1, :, 0].tolist() == [1, 0, 2, 0, 0, 0]
        assert choices.by_distance[layer, 1, :, 1].tolist() == [3, 3, 3, 3, 1, 0]
        assert choices.first[layer].tolist() == [[2, 3], [0, 3]]
    found = choices.summary()
    assert found["by_distance"] == pytest.approx([4 / 12, 0, 4 / 12, 2 / 12, 2 / 4])
    assert found["first_chunk"] == pytest.approx(4 / 12)
    assert found["mean_distance"] == [[pytest.approx(10 / 3), pytest.approx(7 / 3)]] * 2


def test_chunks_that_every_query_reads_are_no_choice():
    plan = RoutingPlan((RoutedRows(1, 5, 5),), tuple(range(7)), Routed(1, window=2, sink=1))
    choices = RoutingChoices(1, 1, 6)
    choices.add(torch.tensor([[[[2, 0, 3, 4, 5]]]], dtype=torch.int16), plan)
    assert choices.by_distance[0, 0].tolist() == [[0, 0], [0, 0], [1, 1], [0, 1], [0, 0], [0, 0]]
    assert choices.summary()["first_chunk"] is None


def test_generation_is_counted_and_other_attention_is_not(tiny_model):
    model = tiny_model(chunk=1, first_chunk=1)
    x, _, text = random_clip(7)
    flow = replace(config.from_dict({"stages": [{}]}).flow, sampling_steps=2, guidance=1.0)
    request = VideoRequest(text, text, [0], 7, *x.shape[-2:])
    for attention, counted in ((Routed(top_k=2), True), (Dense(), False)):
        choices = RoutingChoices(model.settings.layers, model.settings.heads, 7)
        with counted_choices(choices):
            list(sample_chunks(model, request, flow, attention))
        assert (choices.summary() is not None) == counted and routing.observers == []
        if counted:
            # Chunks 4 to 7 choose at each of two steps; as history, chunks 4 to 6 choose once, but in the last layer.
            tokens = 6
            queries = choices.by_distance[0, 0, :, 0].sum() / 2
            assert queries == tokens * (2 * 4 + 3) and choices.by_distance[-1, 0, :, 0].sum() / 2 == tokens * 2 * 4
