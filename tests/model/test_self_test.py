"""The self-test passes on a sound model, a fresh one too, and names the check that a broken one fails."""

import pytest
import torch
import torch.nn.functional as F

from rf_train.model import kv_cache, rope, routing, transformer
from rf_train.model import self_test as self_test_module
from rf_train.model.chunks import Attention, Dense, Routed, Window
from rf_train.model.kv_cache import LayerKVCache
from rf_train.model.self_test import SelfTestError, check_equal, self_test
from rf_train.model.transformer import CausalWan
from tests.conftest import kernel_dtype, tiny_settings

ATTENTIONS = [Dense(), Routed(top_k=2), Window(window=1)]


PRECISIONS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@PRECISIONS
@pytest.mark.parametrize("chunks", [1, 2, 7])
@pytest.mark.parametrize("first_chunk", [3, 1])
def test_a_sound_model_passes(tiny_model, monkeypatch, device, chunks, first_chunk, dtype):
    compared = []
    monkeypatch.setattr(
        self_test_module, "check_equal", lambda *given: (compared.append(given[0]), check_equal(*given))[1]
    )
    self_test(tiny_model(device, first_chunk=first_chunk).to(dtype), chunks, ATTENTIONS)
    once = len(ATTENTIONS) * min(chunks, 4) + 2  # every chunk under every attention, and routing
    assert len(compared) == (once if dtype == torch.float32 else 2 * once)  # in bf16, the first blocks again


@PRECISIONS
def test_a_fresh_model_passes(device, dtype):
    """Its output is all zero: only its features can be compared."""
    model = CausalWan(tiny_settings()).to(device, dtype)
    assert not model.proj_out.weight.any()
    self_test(model, 7, ATTENTIONS)


def test_it_leaves_no_gradients_and_no_hooks(tiny_model, device):
    model = tiny_model(device)
    self_test(model, 4, ATTENTIONS)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not model.proj_out._forward_pre_hooks


# ---- ways to break a model


def noisy_reads_its_own_history(monkeypatch):
    visible = Attention.visible

    def visible_and_itself(self, query, chunks):
        own = [position for position, chunk in enumerate(chunks) if chunk == query]
        return sorted({*visible(self, query, chunks), *own})

    monkeypatch.setattr(Attention, "visible", visible_and_itself)


def history_is_not_read(monkeypatch):
    monkeypatch.setattr(Attention, "visible", lambda self, query, chunks: [])


def everything_is_read(monkeypatch):
    whole = lambda q, k, v, *_: F.scaled_dot_product_attention(q, k, v)
    monkeypatch.setattr(transformer, "two_stream_attention", whole)


def rotary_positions_start_at_zero_in_every_pass(monkeypatch):
    monkeypatch.setattr(transformer, "rotary_table", lambda first, *rest: rope.rotary_table(0, *rest))


def cached_captions_are_lost(monkeypatch):
    class Forgetting(LayerKVCache):
        """Gives zeros for a caption's keys and values as soon as it holds history."""

        @property
        def text(self):
            return tuple(torch.zeros_like(x) for x in self.kept) if self.chunks else None

        @text.setter
        def text(self, value):
            self.kept = value

    monkeypatch.setattr(kv_cache, "LayerKVCache", Forgetting)


def cache_appends_are_lost(monkeypatch):
    append = LayerKVCache.append
    zeros = lambda self, k, v, chunks: append(self, torch.zeros_like(k), torch.zeros_like(v), chunks)
    monkeypatch.setattr(LayerKVCache, "append", zeros)


def routing_keeps_one_too_few(monkeypatch):
    choose = routing.choose_slots

    def one_fewer(*given):
        slots = choose(*given)
        return slots[..., 1:] if slots.shape[-1] > 2 else slots

    monkeypatch.setattr(self_test_module, "choose_slots", one_fewer)


def routed_parts_are_merged_without_their_weights(monkeypatch):
    merge = routing.merge_slots
    same = lambda parts, place, sums, *own: merge(parts, place, torch.zeros_like(sums), *own)
    monkeypatch.setattr(routing, "merge_slots", same)


@pytest.mark.parametrize(
    "damage, check",
    [
        (noisy_reads_its_own_history, "causal"),
        (history_is_not_read, "causal"),
        (everything_is_read, "causal"),
        (rotary_positions_start_at_zero_in_every_pass, "cached = parallel"),
        (cached_captions_are_lost, "cached = parallel"),
        (cache_appends_are_lost, "cached = parallel"),
        (routing_keeps_one_too_few, "routed with top_k >= N = dense"),
        (routed_parts_are_merged_without_their_weights, "routed with top_k >= N = dense"),
    ],
)
@PRECISIONS
def test_a_broken_model_is_stopped_and_the_check_named(tiny_model, monkeypatch, device, damage, check, dtype):
    damage(monkeypatch)
    model = tiny_model(device).to(dtype)
    if damage is routed_parts_are_merged_without_their_weights:
        model.to(kernel_dtype(device))  # else a GPU makes no parts
    with pytest.raises(SelfTestError, match=f"self-test '{check}' failed"):
        self_test(model, 4, ATTENTIONS)


def test_the_copy_in_fp32_has_the_first_blocks_and_leaves_the_random_numbers_alone(tiny_model, device):
    model, before = tiny_model(device, layers=3).to(torch.bfloat16), torch.get_rng_state()
    copy = self_test_module.first_blocks_in_fp32(model)
    assert torch.equal(torch.get_rng_state(), before) and len(copy.blocks) == 2
    weights = dict(model.named_parameters())
    assert all(torch.equal(parameter, weights[name].float()) for name, parameter in copy.named_parameters())


def test_features_that_are_not_finite_are_stopped(tiny_model, device):
    model = tiny_model(device)
    model.blocks[1].ffn.net[2].bias.data[0] = float("nan")
    with pytest.raises(SelfTestError, match="finite"):
        self_test(model, 4, ATTENTIONS)


@pytest.mark.parametrize("seed", range(3))
def test_ties_between_chunks_do_not_stop_a_sound_model_in_bf16(monkeypatch, device, seed):
    """Two passes round differently, so near ties fall differently."""
    where = []
    noted = lambda *given: (where.append(given[1]), check_equal(*given))[1]
    monkeypatch.setattr(self_test_module, "check_equal", noted)
    torch.manual_seed(seed)
    settings = tiny_settings(layers=6, dim=64, heads=4, ffn_dim=128, chunk=1, first_chunk=1)
    self_test(CausalWan(settings).to(device, torch.bfloat16), 4, [Routed(1), Routed(5), Routed(5, window=1, sink=1)])
    assert "(routed attention), chunk 4" in where  # it was compared, and no error was raised


def test_routing_is_made_to_choose_in_the_short_probe():
    for attention in (Routed(5), Routed(1, window=2, sink=1)):
        assert self_test_module.small_enough(attention, 4).read_chunks < 3
    assert self_test_module.small_enough(Routed(1, window=1), 4) == Routed(1, window=1)
    assert self_test_module.small_enough(Window(3), 4) == Window(3)
