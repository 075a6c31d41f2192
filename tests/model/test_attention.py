"""Two-stream attention against attention under one dense mask, its gradients, and which pairs of tokens it computes."""

import pytest
import torch
from torch import Tensor

from rf_train.model.attention import PassLayout, TwoStreamAttention, query_blocks, two_stream_attention
from rf_train.model.chunks import Attention, Chunk, Window
from tests.conftest import DEVICES, assert_close, tolerance
from tests.model.passes import ATTENTIONS, kind_and_sink

UNROUTED = ATTENTIONS[:3]  # whose choice of chunks doesn't depend on the tokens


def chunks_of(sizes: list[int]) -> tuple[Chunk, ...]:
    return tuple(Chunk(index, size) for index, size in enumerate(sizes))


def masked_attention(q: Tensor, k: Tensor, v: Tensor, layout: PassLayout) -> Tensor:
    """The reference: a mask over all tokens, one block for each pair of chunks (Figure 3c), in fp64."""
    chunks = [(chunk, False) for chunk in layout.history] + [(chunk, True) for chunk in layout.noisy]
    rows = []
    for query, query_noisy in chunks:
        row = []
        for key, key_noisy in chunks:
            itself = key.index == query.index and key_noisy == query_noisy
            earlier = not key_noisy and key.index < query.index and in_sight(query.index, key.index, layout.attention)
            row.append(torch.full((query.length, key.length), itself or earlier))
        rows.append(torch.cat(row, dim=1))
    scores = (q.double() @ k.double().transpose(2, 3)) / q.shape[-1] ** 0.5
    return scores.masked_fill(~torch.cat(rows).to(q.device), float("-inf")).softmax(-1) @ v.double()


def in_sight(query: int, key: int, attention: Attention) -> bool:
    """Whether chunk `query` may read the earlier chunk `key`."""
    return not isinstance(attention, Window) or key >= query - attention.window or key < attention.sink


@pytest.mark.parametrize("attention", UNROUTED, ids=kind_and_sink)
@pytest.mark.parametrize("sizes", [[4], [4, 4], [1, 4, 4, 3], [4] * 7, [4] * 20 + [2]], ids=len)
@pytest.mark.parametrize(
    "dtype, allowed",
    [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 4e-2)],
    ids=["fp32", "fp64", "bf16"],
)
def test_attention_and_its_gradients_equal_those_under_a_dense_mask(device, sizes, attention, dtype, allowed):
    allowed = tolerance(device, allowed) if dtype == torch.float32 else allowed
    check_against_the_mask(PassLayout(chunks_of(sizes[:-1]), chunks_of(sizes), attention), 16, dtype, device, allowed)


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU")
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("attention", UNROUTED, ids=kind_and_sink)
@pytest.mark.parametrize("sizes", [[40], [40] * 7, [10, 40, 40, 30], [40] * 20 + [20]], ids=len)
@pytest.mark.parametrize("kernel", ["fa2", "cudnn"])
def test_so_do_those_of_every_kernel_of_a_gpu(device, kernel, sizes, attention):
    layout = PassLayout(chunks_of(sizes[:-1]), chunks_of(sizes), attention, kernel=kernel)
    check_against_the_mask(layout, 64, torch.bfloat16, device, 4e-2)


def check_against_the_mask(layout: PassLayout, width: int, dtype: torch.dtype, device: torch.device, allowed: float):
    """Result and gradients, relative to the largest value of each."""
    length = layout.history_tokens + sum(chunk.length for chunk in layout.noisy)
    stream = torch.Generator().manual_seed(len(layout.noisy))
    q, k, v, weight = (torch.randn(2, 3, length, width, generator=stream).to(device) for _ in range(4))
    q, k, v = (x.to(dtype).requires_grad_() for x in (q, k, v))
    ours, reference = two_stream_attention(q, k, v, layout), masked_attention(q, k, v, layout)
    our_grads, reference_grads = (torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (ours, reference))
    for one, other in zip((ours, *our_grads), (reference, *reference_grads)):
        assert (one.double() - other.double()).abs().max() <= allowed * other.abs().max()


@pytest.mark.parametrize("attention", ATTENTIONS, ids=kind_and_sink)
@torch.no_grad()
def test_with_noisy_queries_only_the_output_is_that_of_the_noisy_tokens(device, attention):
    sizes = [1, 4, 4, 3]
    layout = PassLayout(chunks_of(sizes[:-1]), chunks_of(sizes), attention)
    stream = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 21, 16, generator=stream).to(device) for _ in range(3))
    whole = two_stream_attention(q, k, v, layout)
    noisy = two_stream_attention(q[:, :, layout.history_tokens :], k, v, layout.of_last_block())
    assert_close(noisy, whole[:, :, 9:])


@pytest.mark.parametrize("attention", UNROUTED, ids=kind_and_sink)
def test_every_visible_pair_of_tokens_is_computed_once_in_few_kernel_calls(attention):
    """Each pair is in one rectangle, and equal rectangles are one call."""
    history, noisy = chunks_of([1] * 20), chunks_of([1] * 21)
    layout = PassLayout(history, noisy, attention)
    computed, calls = torch.zeros(41, 41, dtype=torch.int), []

    def kernel(q, k, v):
        """Reads the positions of its tokens from their values."""
        calls.append(len(q))
        for queries, keys in zip(q.flatten(1).long(), k.flatten(1).long()):
            computed[queries[:, None], keys] += 1
        return v.new_zeros(q.shape), v.new_zeros(q.shape[:3]), ()

    own_keys = [slice(i, i + 1) for i in range(41)]
    asking = [(chunk, own_keys[i], i >= 20) for i, chunk in enumerate(history + noisy)]
    blocks = query_blocks(asking, list(range(20)), own_keys[:20], attention)
    position = torch.arange(41.0).reshape(1, 1, 41, 1)
    TwoStreamAttention.apply(position, position, position, blocks, (kernel, None), None)

    zeros, identity = torch.zeros(1, 1, 41, 1), torch.eye(41)[None, None]
    visible = masked_attention(zeros, zeros, identity, layout)[0, 0] > 0
    assert torch.equal(computed.bool(), visible) and computed.max() == 1
    if attention.kind == "dense":
        assert sum(calls) == 60 and len(calls) <= 12  # those of one size in a batch
    else:
        assert sum(calls) <= 21 + 2 * 41
