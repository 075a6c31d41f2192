"""The K/V cache: what it keeps, what it makes once, and the memory that it asks for."""

import pytest
import torch

from rf_train.model.chunks import Chunk, Dense, Window
from rf_train.model.kv_cache import KVCache, LayerKVCache, kv_cache_bytes
from tests.conftest import random_clip
from tests.model.passes import cached_pass


@torch.no_grad()
def test_the_keys_of_a_caption_are_made_once_per_cache(tiny_model, device):
    model, calls = tiny_model(device), []
    model.blocks[1].attn2.to_k.register_forward_hook(lambda *_: calls.append(1))
    x, t, text = random_clip(9, 1, model.settings, device=device)
    cached_pass(model, x, x, t, text, Dense())
    assert len(calls) == 1


def test_the_bytes_of_a_cache_are_known_before_it_is_made():
    """Wan 1.3B in bf16: 184,320 bytes per token, 18.1 GB for 63 latent frames."""
    one_token = kv_cache_bytes(layers=30, batch=1, heads=12, tokens=1, head_dim=128, dtype=torch.bfloat16)
    assert one_token == 184_320 and round(63 * 1560 * one_token / 1e9, 1) == 18.1


def test_a_cache_larger_than_memory_is_refused_with_the_bytes_needed(device):
    message = f"a K/V cache of 1073741825 tokens takes 12582912.01 GiB, which {device} can't give"
    with pytest.raises(ValueError, match=message):
        KVCache(
            layers=64, batch=16, heads=12, capacity=2**30, scratch=1, head_dim=128, dtype=torch.float32,
            device=device,
        )  # fmt: skip


@torch.no_grad()
def test_with_a_window_the_cache_keeps_only_chunks_that_can_still_be_read(tiny_model, device):
    model = tiny_model(device)
    attention = Window(window=2, sink=1)
    cache = model.new_kv_cache(1, 6, 63, attention)
    x, _, text = random_clip(63, 1, model.settings, device=device)
    for index in range(20):
        span = slice(3 * index, 3 * index + 3)
        model(noisy=None, t=None, history=x[:, :, span], text=text, attention=attention, kv_cache=cache)
    assert cache.layers[0].chunks == [0, 17, 18, 19] and cache.layers[0].capacity == 4 * 18


def test_a_full_cache_drops_its_oldest_chunks_but_keeps_the_first_ones(device):
    """The keys that stay are those of the chunks that stay. A chunk larger than the rest of the cache is refused."""
    cache = LayerKVCache(1, 1, capacity=9, scratch=2, head_dim=1, sink=1, dtype=torch.float32, device=device)
    for index, length in enumerate([1, 4, 4, 4]):
        keys = torch.full((1, 1, length, 1), float(index), device=device)
        cache.append(keys, -keys, [Chunk(index, length)])
    assert cache.chunks == [0, 2, 3] and cache.lengths == [1, 4, 4]
    assert cache.k.flatten().tolist() == [0, 2, 2, 2, 2, 3, 3, 3, 3]
    assert torch.equal(cache.v, -cache.k)
    with pytest.raises(ValueError, match="a chunk of 9 tokens does not fit a cache of 9 tokens"):
        cache.append(*torch.zeros(2, 1, 1, 9, 1, device=device), [Chunk(4, 9)])


@pytest.mark.parametrize("tokens", [2, 5], ids=["in the scratch space", "larger than the scratch space"])
def test_the_keys_of_a_noisy_chunk_follow_those_of_history_and_are_not_kept(device, tokens):
    cache = LayerKVCache(1, 1, capacity=4, scratch=2, head_dim=1, sink=0, dtype=torch.float32, device=device)
    history, noisy = torch.ones(1, 1, 4, 1, device=device), torch.full((1, 1, tokens, 1), 2.0, device=device)
    cache.append(history, -history, [Chunk(0, 4)])
    k, v = cache.followed_by(noisy, -noisy)
    assert k.flatten().tolist() == [1] * 4 + [2] * tokens and torch.equal(v, -k)
    assert cache.tokens == 4 and cache.chunks == [0]
