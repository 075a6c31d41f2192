"""The causal DiT: equal to diffusers' Wan on one chunk, causal by gradient, and the same whether run in parallel or chunk by chunk."""

import pytest
import torch

from rf_train import attention, config
from rf_train.attention import JobAttention, jobs_of, two_stream_attention
from rf_train.cache import Cache, cache_bytes
from rf_train.chunks import Attention
from rf_train.model import CausalWan, parameter_count
from tests.conftest import random_clip, tiny_settings, tiny_wan

ATTENTIONS = [Attention(), Attention("window", window=2), Attention("window", window=2, sink=1), Attention("routed", k=2)]


def parallel_pass(model, x, history, t, text, attention):
    frames = sum(model.chunking.sizes(x.shape[2])[:-1])
    return model(noisy=x, t=t, history=history[:, :, :frames] if frames else None, text=text, attention=attention)


def cached_pass(model, x, history, t, text, attention):
    """Chunk after chunk: each pass appends the newest history chunk to the cache and predicts the next noisy one."""
    sizes = model.chunking.sizes(x.shape[2])
    cache = model.new_cache(len(x), x.shape[3] // 2 * (x.shape[4] // 2), x.shape[2], attention)
    out, begin = [], 0
    for index, size in enumerate(sizes):
        newest = history[:, :, begin - sizes[index - 1] : begin] if index else None
        span = slice(begin, begin + size)
        out.append(model(noisy=x[:, :, span], t=t[:, span], history=newest, text=text, attention=attention, noisy_chunk=index, cache=cache))
        begin += size
    return torch.cat(out, dim=2)


@pytest.mark.parametrize("attention", ATTENTIONS, ids=lambda a: f"{a.kind}{a.sink or ''}")
@pytest.mark.parametrize("frames, first_chunk, batch", [(3, 3, 1), (6, 3, 1), (21, 3, 1), (20, 3, 3), (10, 1, 3), (1, 1, 1), (63, 3, 1)])
@torch.no_grad()
def test_the_parallel_pass_equals_the_cached_pass(tiny_model, attention, frames, first_chunk, batch):
    model = tiny_model(first_chunk=first_chunk)
    x, t, text = random_clip(frames, batch, model.settings)
    history = random_clip(frames, batch, model.settings, seed=2)[0]
    one, many = parallel_pass(model, x, history, t, text, attention), cached_pass(model, x, history, t, text, attention)
    assert one.std() > 0.1
    assert (one - many).abs().max() <= 1e-5


@pytest.mark.parametrize("attention", ATTENTIONS[:1] + ATTENTIONS[3:], ids=lambda a: a.kind)
def test_a_noisy_chunk_reads_earlier_history_and_itself_and_nothing_else(tiny_model, attention):
    model = tiny_model()
    frames, count = 12, 4
    x, t, text = random_clip(frames, 1, model.settings)
    history = random_clip(frames - 3, 1, model.settings, seed=2)[0]
    for chunk in range(count):
        noisy, past = x.clone().requires_grad_(), history.clone().requires_grad_()
        v = model(noisy=noisy, t=t, history=past, text=text, attention=attention)
        v[:, :, 3 * chunk : 3 * chunk + 3].square().sum().backward()
        for other in range(count):
            span = slice(3 * other, 3 * other + 3)
            assert bool(noisy.grad[:, :, span].any()) == (other == chunk), f"noisy {chunk} and noisy {other}"
            if other < count - 1:
                assert bool(past.grad[:, :, span].any()) == (other < chunk), f"noisy {chunk} and history {other}"


def test_a_window_hides_what_is_older(tiny_model):
    model = tiny_model(layers=1)
    x, t, text = random_clip(15, 1, model.settings)
    history = random_clip(12, 1, model.settings, seed=2)[0].requires_grad_()
    v = model(noisy=x, t=t, history=history, text=text, attention=Attention("window", window=2, sink=1))
    v[:, :, 12:].sum().backward()
    seen = [bool(history.grad[:, :, 3 * j : 3 * j + 3].any()) for j in range(4)]
    assert seen == [True, False, True, True]


def test_routing_with_enough_chunks_is_dense(tiny_model):
    model = tiny_model()
    x, t, text = random_clip(15, 2, model.settings)
    dense, wide, narrow = (parallel_pass(model, x, x, t, text, a) for a in (Attention(), Attention("routed", k=4), Attention("routed", k=1)))
    torch.testing.assert_close(dense, wide, rtol=0, atol=1e-5)
    assert (dense - narrow).abs().max() > 1e-3


def test_checkpointing_changes_nothing_and_the_selective_one_runs_no_attention_twice(tiny_model, monkeypatch):
    gradients, calls = {}, {}
    meet = attention.merged_attention
    monkeypatch.setattr(attention, "merged_attention", lambda *given: calls.__setitem__(kind, calls.get(kind, 0) + 1) or meet(*given))
    for kind in config.CHECKPOINTINGS:
        model = tiny_model(checkpointing=kind)
        x, t, text = random_clip(9, 1, model.settings)
        parallel_pass(model, x, x, t, text, Attention()).square().mean().backward()
        gradients[kind] = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert calls == {"none": 2, "block": 4, "selective": 2}
    assert gradients["none"]["blocks.0.attn1.to_k.weight"].abs().max() > 0
    for kind in ("block", "selective"):
        torch.testing.assert_close(gradients[kind], gradients["none"])


def dense_reference(q, k, v, history, noisy, sight):
    """Two-stream attention with a mask over everything, one query chunk and key chunk at a time from Figure 3c, in fp64."""
    chunks = [(index, count, False) for index, count in history] + [(index, count, True) for index, count in noisy]
    rows = []
    for query, size, query_noisy in chunks:
        row = []
        for key, length, key_noisy in chunks:
            near = sight.kind == "dense" or key >= query - sight.window or key < sight.sink
            seen = (key == query) if query_noisy == key_noisy and key == query else (not key_noisy and key < query and near)
            row.append(torch.full((size, length), seen))
        rows.append(torch.cat(row, dim=1))
    scores = (q.double() @ k.double().transpose(2, 3)) / q.shape[-1] ** 0.5
    return scores.masked_fill(~torch.cat(rows), float("-inf")).softmax(-1) @ v.double()


@pytest.mark.parametrize("sight", ATTENTIONS[:3], ids=lambda a: f"{a.kind}{a.sink or ''}")
@pytest.mark.parametrize("sizes", [[4], [4, 4], [1, 4, 4, 3], [4] * 7, [4] * 20 + [2]], ids=len)
@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 4e-2)], ids=["fp32", "fp64", "bf16"])
def test_attention_and_its_gradients_equal_those_under_a_dense_mask(sizes, sight, dtype, near):
    history, noisy = list(enumerate(sizes[:-1])), list(enumerate(sizes))
    length = 2 * sum(sizes) - sizes[-1]
    stream = torch.Generator().manual_seed(len(sizes))
    q, k, v = (torch.randn(2, 3, length, 16, generator=stream).to(dtype).requires_grad_() for _ in range(3))
    weight = torch.randn(2, 3, length, 16, generator=stream)
    ours = two_stream_attention(q, k, v, history, noisy, sight)
    reference = dense_reference(q, k, v, history, noisy, sight)
    got, wanted = (torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (ours, reference))
    for one, other in zip((ours, *got), (reference, *wanted)):
        assert (one.double() - other.double()).abs().max() <= near * other.abs().max()


@pytest.mark.parametrize("sight", ATTENTIONS[:3], ids=lambda a: f"{a.kind}{a.sink or ''}")
def test_no_pair_of_tokens_is_computed_twice_and_calls_are_few(sight):
    """Kernel calls of a pass: every visible pair once and no other; for dense, as many calls as rows and rectangles of the triangle."""
    seen = torch.zeros(41, 41, dtype=torch.int)

    def kernel(q, k, v):
        seen[q.flatten().long()[:, None], k.flatten().long()[None]] += 1
        return v.new_zeros(q.shape), v.new_zeros(q.shape[:3]), ()

    place = torch.arange(41.0).reshape(1, 1, 41, 1)
    history, noisy = [(i, 1) for i in range(20)], [(i, 1) for i in range(21)]
    asking = [(i, 1, slice(i, i + 1), False) for i in range(20)] + [(i, 1, slice(20 + i, 21 + i), True) for i in range(21)]
    jobs, calls = jobs_of(asking, list(range(20)), [slice(i, i + 1) for i in range(20)], sight), []
    JobAttention.apply(place, place, place, jobs, (lambda *given: calls.append(1) or kernel(*given), None), None)
    reference = dense_reference(torch.zeros(1, 1, 41, 1), torch.zeros(1, 1, 41, 1), torch.eye(41)[None, None], history, noisy, sight)[0, 0] > 0
    assert torch.equal(seen.bool(), reference) and seen.max() == 1
    assert len(calls) == 60 if sight.kind == "dense" else len(calls) <= 21 + 2 * 41


@pytest.mark.parametrize("batch, frames, height, width", [(1, 3, 4, 6), (2, 5, 8, 4), (3, 1, 6, 6)])
@torch.no_grad()
def test_one_chunk_equals_diffusers_wan(batch, frames, height, width):
    """Same weights by the same names, one chunk spanning the clip, no history: Wan's own velocity."""
    settings = tiny_settings(chunk=frames, first_chunk=frames)
    reference = tiny_wan()
    model = CausalWan(settings)
    model.load_state_dict({name: tensor for name, tensor in reference.state_dict().items()}, strict=True)
    x, _, text = random_clip(frames, batch, settings, height, width)
    t = torch.rand(batch)
    ours = model(noisy=x, t=t[:, None].expand(-1, frames), history=None, text=text, attention=Attention())
    theirs = reference(hidden_states=x, timestep=1000 * t, encoder_hidden_states=text, return_dict=False)[0]
    assert theirs.std() > 0.1
    assert (ours - theirs).abs().max() <= 1e-5


@torch.no_grad()
def test_in_bf16_one_chunk_equals_diffusers_wan_within_bf16s_rounding():
    """Both in bf16, diffusers with the parts it keeps in fp32: as far from one another as bf16 is from fp32."""
    settings = tiny_settings(chunk=5, first_chunk=5)
    reference = tiny_wan()
    model = CausalWan(settings)
    model.load_state_dict(reference.state_dict())
    x, _, text = random_clip(5, 2, settings, 8, 4)
    t = torch.rand(2)
    exact = reference(hidden_states=x, timestep=1000 * t, encoder_hidden_states=text, return_dict=False)[0]
    for name, module in reference.named_modules():
        keep = any(part in name for part in reference._keep_in_fp32_modules)
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data if keep else parameter.data.bfloat16()
    half = torch.bfloat16
    ours = model.to(half)(noisy=x.to(half), t=t[:, None].expand(-1, 5), history=None, text=text, attention=Attention()).float()
    theirs = reference(hidden_states=x.to(half), timestep=1000 * t, encoder_hidden_states=text.to(half), return_dict=False)[0].float()
    rounding = (theirs - exact).square().mean().sqrt()
    assert 1e-4 < rounding < 0.1 * exact.std()
    assert (ours - exact).square().mean().sqrt() < 2 * rounding


@torch.no_grad()
def test_the_captions_keys_are_made_once_a_cache(tiny_model):
    model, calls = tiny_model(), []
    model.blocks[1].attn2.to_k.register_forward_hook(lambda *_: calls.append(1))
    x, t, text = random_clip(9, 1, model.settings)
    cached_pass(model, x, x, t, text, Attention())
    assert len(calls) == 1


def test_a_caches_bytes_are_known_before_it_is_made():
    """Wan 1.3B in bf16: 184,320 bytes a token (18.1 GB for 63 latents)."""
    one = cache_bytes(layers=30, batch=1, heads=12, capacity=1, head_dim=128, dtype=torch.bfloat16)
    assert one == 184_320 and round(63 * 1560 * one / 1e9, 1) == 18.1
    with pytest.raises(ValueError, match=r"a K/V cache of 1073741825 tokens takes 12582912.01 GiB, which cpu can't give"):
        Cache(layers=64, batch=16, heads=12, capacity=2**30, scratch=1, head_dim=128, dtype=torch.float32, device=torch.device("cpu"))


@torch.no_grad()
def test_a_window_keeps_only_what_can_still_be_read(tiny_model):
    model = tiny_model()
    attention = Attention("window", window=2, sink=1)
    cache = model.new_cache(1, 6, 63, attention)
    x, t, text = random_clip(63, 1, model.settings)
    for index in range(20):
        span = slice(3 * index, 3 * index + 3)
        model(noisy=None, t=None, history=x[:, :, span], text=text, attention=attention, cache=cache)
    assert cache.layers[0].held == [0, 17, 18, 19] and cache.layers[0].capacity == 4 * 18


def test_parameter_counts_are_wans():
    assert parameter_count(config.Model()) == 1_418_996_800
    assert parameter_count(config.Model(dim=5120, ffn_dim=13824, heads=40, layers=40)) == 14_288_491_584
