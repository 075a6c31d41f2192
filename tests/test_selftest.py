"""The self-test passes on a sound model, a fresh one too, and names the check that a broken one fails."""

import pytest
import torch

from rf_train import attention, model as model_module, rope, selftest
from rf_train.cache import LayerCache
from rf_train.chunks import Attention
from rf_train.model import CausalWan
from rf_train.selftest import SelfTestError, compare, self_test
from tests.conftest import tiny_settings

STAGES = [Attention(), Attention("routed", k=2), Attention("window", window=1)]


@pytest.mark.parametrize("chunks", [1, 2, 7])
@pytest.mark.parametrize("first_chunk", [3, 1])
def test_a_sound_model_passes(tiny_model, monkeypatch, chunks, first_chunk):
    compared = []
    monkeypatch.setattr(selftest, "compare", lambda *found: (compared.append(found[0]), compare(*found)))
    self_test(tiny_model(first_chunk=first_chunk), chunks, STAGES)
    assert len(compared) == len(STAGES) * min(chunks, 4) + 1  # every chunk under every attention, and routing


def test_a_fresh_model_and_one_in_bf16_pass():
    for dtype in (torch.float32, torch.bfloat16):
        model = CausalWan(tiny_settings()).to(dtype)
        assert not model.proj_out.weight.any()  # its output is all zero: only its features can be compared
        self_test(model, 7, STAGES)


def test_it_leaves_no_gradients_and_no_hooks(tiny_model):
    model = tiny_model()
    self_test(model, 4, STAGES)
    assert all(parameter.grad is None for parameter in model.parameters()) and not model.proj_out._forward_pre_hooks


def noisy_reads_its_own_history(monkeypatch):
    visible = Attention.visible
    monkeypatch.setattr(Attention, "visible", lambda self, query, held: sorted({*visible(self, query, held), *(p for p, c in enumerate(held) if c == query)}))


def history_is_not_read(monkeypatch):
    monkeypatch.setattr(Attention, "visible", lambda self, query, held: [])


def everything_is_read(monkeypatch):
    whole = lambda q, k, v, *rest, noisy_only=False, **more: torch.nn.functional.scaled_dot_product_attention(q, k, v)
    monkeypatch.setattr(model_module, "two_stream_attention", whole)


def rotary_positions_start_at_zero_in_every_pass(monkeypatch):
    table = rope.rotary_table
    monkeypatch.setattr(model_module, "rotary_table", lambda first, *rest: table(0, *rest))


def cached_captions_are_lost(monkeypatch):
    class Forgetting(LayerCache):
        text = property(lambda self: None if not self.held else tuple(torch.zeros_like(x) for x in self.kept), lambda self, value: setattr(self, "kept", value))

    monkeypatch.setattr("rf_train.cache.LayerCache", Forgetting)


def cache_appends_are_lost(monkeypatch):
    append = LayerCache.append
    monkeypatch.setattr(LayerCache, "append", lambda self, k, v, chunks: append(self, torch.zeros_like(k), torch.zeros_like(v), chunks))


def routing_keeps_one_too_few(monkeypatch):
    masked = attention.routed_job
    monkeypatch.setattr(attention, "routed_job", lambda q, k, v, job, keep: masked(q, k, v, job, max(1, keep - 1)))


@pytest.mark.parametrize(
    "damage, check",
    [
        (noisy_reads_its_own_history, "causal"),
        (history_is_not_read, "causal"),
        (everything_is_read, "causal"),
        (rotary_positions_start_at_zero_in_every_pass, "cached = parallel"),
        (cached_captions_are_lost, "cached = parallel"),
        (cache_appends_are_lost, "cached = parallel"),
        (routing_keeps_one_too_few, "routed with k >= N = dense"),
    ],
)
def test_a_broken_model_is_stopped_and_the_check_named(tiny_model, monkeypatch, damage, check):
    damage(monkeypatch)
    with pytest.raises(SelfTestError, match=check):
        self_test(tiny_model(), 4, STAGES)


def test_features_that_are_not_finite(tiny_model):
    model = tiny_model()
    model.blocks[1].ffn.net[2].bias.data[0] = float("nan")
    with pytest.raises(SelfTestError, match="finite"):
        self_test(model, 4, STAGES)
