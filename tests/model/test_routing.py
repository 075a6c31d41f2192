"""Routed attention: the fast path against a reference whose choice is written here, and what it must never build."""

import importlib.util
import random
import weakref

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rf_train.model import kernels, routing
from rf_train.model.attention import PassLayout, two_stream_attention
from rf_train.model.chunks import Attention, Chunk, Dense, Routed
from rf_train.model.kv_cache import LayerKVCache, chunk_means
from rf_train.model.routing import Gather, RoutedRows, RoutingPlan, choose_slots, masked_routing, routed_attention
from rf_train.model.settings import KERNELS
from tests.conftest import CPU, assert_close, kernel_dtype, tolerance


@pytest.fixture(autouse=True)
def no_size_is_small(monkeypatch):
    """So that the fast path runs at these sizes, too."""
    monkeypatch.setattr(routing, "SMALL_PAIRS", 0)


Tensors = tuple[Tensor, Tensor, Tensor]


def layout_of(sizes: list[int], attention: Attention, noisy_only: bool = False) -> PassLayout:
    chunks = tuple(Chunk(index, size) for index, size in enumerate(sizes))
    return PassLayout(chunks[:-1], chunks, attention, noisy_only)


def precision(device: torch.device) -> float:
    """How far results in `kernel_dtype` may be from the reference."""
    return 1e-5 if device.type == "cpu" else 0.03


def random_qkv(
    layout: PassLayout, batch: int, heads: int, width: int, device: torch.device, dtype: torch.dtype | None = None
) -> Tensors:
    """Laid out as the model does: the heads of a token stand next to each other. In a dtype of the device's kernels."""
    tokens = layout.history_tokens + sum(chunk.length for chunk in layout.noisy)
    dtype = dtype or kernel_dtype(device)
    q, k, v = (torch.randn(batch, tokens, heads, width).to(device, dtype) for _ in range(3))
    q, k, v = (x.transpose(1, 2).requires_grad_() for x in (q, k, v))
    return q[:, :, layout.history_tokens :] if layout.noisy_queries_only else q, k, v


def expected_attention(q: Tensor, k: Tensor, v: Tensor, layout: PassLayout) -> Tensor:
    """Eq. 8-9 token by token under a mask, in fp64. Chunks are ranked by a full sort of dot products in fp32."""
    attention, keys, begin = layout.attention, [], 0
    for chunk, noisy in [(c, False) for c in layout.history] + [(c, True) for c in layout.noisy]:
        keys.append((chunk, noisy, slice(begin, begin + chunk.length)))
        begin += chunk.length
    outs, begin = [], 0
    for chunk, noisy, own in keys:
        if layout.noisy_queries_only and not noisy:
            continue
        rows = q[:, :, begin : begin + chunk.length]
        begin += chunk.length
        earlier = {c.index: place for c, is_noisy, place in keys if not is_noisy and c.index < chunk.index}
        always = {i for i in earlier if i < attention.sink or i >= chunk.index - attention.window}
        reads = torch.zeros(*rows.shape[:3], k.shape[2], dtype=torch.bool, device=q.device)
        reads[..., own] = True
        candidates = [i for i in earlier if i not in always]
        for index in always:
            reads[..., earlier[index]] = True
        if candidates:
            dots = [(rows.float() * k[:, :, earlier[i]].float().mean(2, keepdim=True)).sum(-1) for i in candidates]
            ranks = torch.stack(dots, -1).argsort(-1, descending=True)[..., : attention.top_k]
            for position, index in enumerate(candidates):
                reads[..., earlier[index]] |= (ranks == position).any(-1, keepdim=True)
        scores = (rows.double() @ k.double().transpose(2, 3)) / q.shape[-1] ** 0.5
        outs.append(scores.masked_fill(~reads, float("-inf")).softmax(-1) @ v.double())
    return torch.cat(outs, dim=2)


def random_like(x: Tensor) -> Tensor:
    """Random fp32 numbers of its shape, drawn on the CPU."""
    return torch.randn(x.shape).to(x.device)


def with_gradients(out: Tensor, inputs: Tensors, weight: Tensor) -> list[Tensor]:
    return [out, *torch.autograd.grad((out * weight).sum(), inputs, materialize_grads=True)]


def assert_equal(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Relative to the largest value. The clips have one token at least, so gradients of q may be all zero."""
    for name, one, other in zip(("out", "dq", "dk", "dv"), found, expected):
        assert (one.double() - other.double()).abs().max() <= tolerance * max(1.0, other.abs().max()), name


@pytest.mark.parametrize("seed", range(220))
def test_the_fast_path_equals_the_reference(device, monkeypatch, seed):
    """Random chunks (a short first one, a partial last one), heads, k, windows, sinks; random pieces and tiles."""
    choice = random.Random(seed)
    torch.manual_seed(seed)
    size, count = choice.randint(1, 6), choice.randint(1, 9)
    sizes = [choice.choice([1, size]), *[size] * (count - 1)]
    sizes[-1] = choice.randint(1, sizes[-1])
    attention = Routed(choice.randint(1, 4), choice.choice([0, 0, 1, 2]), choice.choice([0, 0, 1]))
    layout = layout_of(sizes, attention, choice.random() < 0.3)
    q, k, v = random_qkv(layout, choice.randint(1, 2), choice.randint(1, 4), choice.choice([8, 16, 64]), device)
    monkeypatch.setitem(routing.GATHERED_BYTES, device.type, choice.choice([1, 3000, 20011, 10**9]))
    monkeypatch.setitem(routing.TILE, device.type, choice.choice([0, 1, 2, 3]))
    weight = random_like(q)
    found = with_gradients(two_stream_attention(q, k, v, layout), (q, k, v), weight)
    assert_equal(found, with_gradients(expected_attention(q, k, v, layout), (q, k, v), weight), precision(device))


@pytest.mark.parametrize("top_k, window, sink", [(1, 0, 0), (2, 0, 0), (2, 1, 0), (3, 1, 1)])
@pytest.mark.parametrize("width", [16, 64, 128])
@pytest.mark.parametrize("first, tile", [(40, 0), (200, 0), (200, 24)])
def test_the_fast_path_equals_the_mask_with_the_same_choices(
    device, monkeypatch, top_k, window, sink, width, first, tile
):
    """Queries of three chunks, in the dtype of the device's kernels. With tiles chunks must have the same length."""
    monkeypatch.setitem(routing.TILE, device.type, tile)
    used = []
    monkeypatch.setattr(routing, "tiled", lambda dense, tiled=routing.tiled: (used.append(1), tiled(dense))[1])
    lengths = [first, 200, 200, 200, 200, 200, 200, 130]
    bounds = tuple(sum(lengths[:n]) for n in range(len(lengths) + 1))
    rows = tuple(RoutedRows(lengths[own], own, own) for own in (5, 6, 7))
    plan, stream = RoutingPlan(rows, bounds, Routed(top_k, window, sink)), torch.Generator().manual_seed(0)
    shapes = [(2, length, 3, width) for length in (sum(lengths[5:]), bounds[-1], bounds[-1], sum(lengths[5:]))]
    *inputs, weight = (torch.randn(shape, generator=stream).transpose(1, 2).to(device) for shape in shapes)
    inputs = [x.to(kernel_dtype(device)).requires_grad_() for x in inputs]
    slots = choose_slots(inputs[0], chunk_means(inputs[1][:, :, : bounds[-2]], lengths[:-1]), plan)
    out = routing.RoutedAttention.apply(*inputs, slots, plan, routing.routing_kernels(inputs[0]), None)
    expected = masked_routing(*(x.double() for x in inputs), plan, slots)
    found, wanted = (with_gradients(result, inputs, weight) for result in (out, expected))
    assert_equal(found, wanted, precision(device))
    assert bool(used) == bool(tile and (device.type == "cpu" or width in (64, 128)))


def test_the_fast_path_really_runs(monkeypatch, device):
    monkeypatch.setattr(routing, "masked_routing", None)
    calls = []
    monkeypatch.setattr(routing.Gather, "of", lambda *given, of=Gather.of: (calls.append(1), of(*given))[1])
    layout = layout_of([3] * 6, Routed(top_k=2))
    two_stream_attention(*random_qkv(layout, 2, 3, 8, device), layout).sum().backward()
    assert len(calls) == 2 * 2  # a group of heads for each clip, in forward and in backward


def test_small_attention_on_a_cpu_goes_by_the_mask(monkeypatch):
    monkeypatch.setattr(routing, "SMALL_PAIRS", 10**6)
    monkeypatch.setattr(routing, "RoutedAttention", None)
    layout = layout_of([3] * 6, Routed(top_k=2))
    inputs = random_qkv(layout, 2, 3, 8, CPU)
    weight = random_like(inputs[0])
    found = with_gradients(two_stream_attention(*inputs, layout), inputs, weight)
    assert_equal(found, with_gradients(expected_attention(*inputs, layout), inputs, weight), 1e-5)


@pytest.mark.parametrize("groups", [1, 10**9], ids=["query by query", "all heads"])
def test_the_result_does_not_depend_on_the_pieces(monkeypatch, device, groups):
    monkeypatch.setitem(routing.GATHERED_BYTES, device.type, groups)
    layout = layout_of([4] * 7, Routed(top_k=2))
    torch.manual_seed(0)
    inputs = random_qkv(layout, 2, 3, 8, device)
    weight = random_like(inputs[0])
    found = with_gradients(two_stream_attention(*inputs, layout), inputs, weight)
    assert_equal(found, with_gradients(expected_attention(*inputs, layout), inputs, weight), precision(device))


@pytest.mark.parametrize(
    "dtype, allowed",
    [(torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float64, 1e-12)],
    ids=["fp32", "bf16", "fp64"],
)
def test_every_precision(device, dtype, allowed):
    layout = layout_of([1, 5, 5, 5, 5, 3], Routed(top_k=2))
    torch.manual_seed(0)
    inputs = random_qkv(layout, 2, 2, 16, device, dtype)
    weight = random_like(inputs[0])
    found = with_gradients(two_stream_attention(*inputs, layout), inputs, weight)
    allowed = tolerance(device, allowed) if dtype == torch.float32 else allowed
    assert_equal(found, with_gradients(expected_attention(*inputs, layout), inputs, weight), allowed)


def test_with_k_as_large_as_the_history_it_equals_dense_attention(device):
    sizes = [1, 4, 4, 4, 4, 2]
    torch.manual_seed(0)
    inputs = random_qkv(layout_of(sizes, Dense()), 2, 3, 16, device)
    weight = random_like(inputs[0])
    dense = with_gradients(two_stream_attention(*inputs, layout_of(sizes, Dense())), inputs, weight)
    for top_k in (5, 9):
        routed = with_gradients(two_stream_attention(*inputs, layout_of(sizes, Routed(top_k))), inputs, weight)
        assert all(torch.equal(one, other) for one, other in zip(routed, dense))
    every = RoutingPlan((RoutedRows(4, 3, 3),), (0, 1, 5, 9, 13), Routed(3))  # all three, but through the fast path
    q, k, v = (x[:, :, :13] for x in inputs)
    out = routed_attention(q[:, :, 9:], k, v, chunk_means(k[:, :, :9], [1, 4, 4]), every)
    expected = torch.nn.functional.scaled_dot_product_attention(q[:, :, 9:], k, v)
    torch.testing.assert_close(out, expected, rtol=precision(device), atol=precision(device))


def one_chunk(device: torch.device, top_k: int, chunks: int = 4, tokens: int = 3) -> tuple[RoutingPlan, Tensors]:
    """The queries of one chunk after `chunks` earlier ones; q, k, v of two heads."""
    plan = RoutingPlan(
        (RoutedRows(tokens, chunks, chunks),), tuple(range(0, tokens * (chunks + 2), tokens)), Routed(top_k)
    )
    q, k, v = (torch.randn(1, 2, n * tokens, 8).to(device, kernel_dtype(device)) for n in (1, chunks + 1, chunks + 1))
    return plan, (q.requires_grad_(), k.requires_grad_(), v.requires_grad_())


def test_a_chunk_that_no_query_chose_gets_no_gradient_and_the_others_do(device):
    torch.manual_seed(0)
    plan, (q, k, v) = one_chunk(device, top_k=1)
    means = torch.tensor([0.0, 0.0, 1.0, 0.0], device=device)[None, None, :, None] * q.detach().mean(2, keepdim=True)
    slots = choose_slots(q.detach().mean(2, keepdim=True).expand_as(q), means, plan)
    assert (slots[..., 0] == 2).all() and (slots[..., 1] == 4).all()
    out = routing.RoutedAttention.apply(q, k, v, slots, plan, routing.routing_kernels(q), None)
    dk, dv = torch.autograd.grad(out.square().sum(), (k, v))
    for grad in (dk, dv):
        touched = grad.unflatten(2, (5, 3)).abs().sum(dim=(0, 1, 3, 4)) > 0
        assert touched.tolist() == [False, False, True, False, True]


def test_ties_are_broken_alike_and_a_chunk_is_read_once(device):
    torch.manual_seed(0)
    plan, (q, k, v) = one_chunk(device, top_k=2)
    means = torch.zeros(1, 2, 4, 8, device=device)
    slots = choose_slots(q, means, plan)
    assert torch.equal(slots, choose_slots(q, means, plan))
    assert all(len(set(row.tolist())) == 3 for row in slots.flatten(0, 2))
    weight = random_like(q)
    found = with_gradients(routed_attention(q, k, v, means, plan), (q, k, v), weight)
    assert_equal(found, with_gradients(masked_routing(q, k, v, plan, slots), (q, k, v), weight), precision(device))


@pytest.mark.parametrize("groups", [1, 10**9], ids=["query by query", "all heads"])
def test_equal_inputs_give_equal_bits(monkeypatch, device, groups):
    monkeypatch.setitem(routing.GATHERED_BYTES, device.type, groups)
    layout = layout_of([4] * 8, Routed(top_k=2))
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        inputs = random_qkv(layout, 1, 4, 16, device)
        results.append(with_gradients(two_stream_attention(*inputs, layout), inputs, torch.ones_like(inputs[0])))
    assert all(torch.equal(one, other) for one, other in zip(*results))


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def test_memory_grows_with_the_tokens_and_not_with_their_square(device):
    found = []
    for chunks in (20, 80):
        layout = layout_of([16] * chunks, Routed(top_k=2))
        inputs = random_qkv(layout, 1, 2, 8, device)
        with Largest() as largest:
            two_stream_attention(*inputs, layout).sum().backward()
        found.append(largest.elements)
        tokens = inputs[1].shape[2]
        assert largest.elements < 2 * tokens * layout.history_tokens  # one mask of one of the heads
    assert found[1] <= 4.7 * found[0]  # 77 / 17 times as many chunks choose


def test_the_cache_has_the_mean_key_of_each_chunk_and_drops_it_with_the_chunk(device):
    cache = LayerKVCache(1, 2, 8, 2, 8, sink=1, dtype=torch.float32, device=device)
    pieces = [torch.randn(1, 2, n, 8).to(device) for n in (2, 3, 3, 2)]
    cache.append(torch.cat(pieces[:2], 2), torch.cat(pieces[:2], 2), (Chunk(0, 2), Chunk(1, 3)))
    assert_close(cache.means(), torch.stack([piece.mean(2) for piece in pieces[:2]], 2))
    for index in (2, 3):
        cache.append(pieces[index], pieces[index], (Chunk(index, pieces[index].shape[2]),))
    assert cache.chunks == [0, 2, 3]
    expected = torch.stack([pieces[index].mean(2) for index in cache.chunks], 2)
    assert_close(cache.means(), expected)
    assert_close(cache.means(), chunk_means(cache.k, cache.lengths))


def test_the_calls_of_the_gpu_kernels_have_the_shapes_that_these_kernels_take():
    """On meta tensors, where PyTorch checks shapes without a GPU."""
    heads, keys, rows = 2, 10, 10
    plan = RoutingPlan((RoutedRows(rows, 3, 3),), (0, 2, 6, 10, 12), Routed(2))
    slots = torch.tensor([0, 1, 3], dtype=torch.int16).expand(heads, rows, 3)
    segments = Gather.of(slots, plan).segments
    assert segments.begins.tolist() == [0, 10, 20, 20, 30, 40, 40]  # nobody chose chunk 2; chunk 3 is their own
    begins, key_begins, longest_q, longest_k = kernels._cuda_lengths(torch.empty(heads, keys, 16), segments)
    assert begins.dtype == key_begins.dtype == torch.int32 and len(begins) == len(key_begins)
    assert key_begins.tolist() == [0, 2, 6, 10, 12, 16, 20] and (longest_q, longest_k) == (rows, 4)
    meta = segments._replace(begins=segments.begins.to("meta"))
    q = torch.empty(40, 16, dtype=torch.bfloat16, device="meta")
    k, v = (torch.empty(keys, heads, 16, dtype=torch.bfloat16, device="meta").transpose(0, 1) for _ in range(2))
    out, log_sums, rest = kernels._varlen_forward(q, k, v, meta)
    assert out.shape == q.shape and log_sums.shape == (40,) and log_sums.dtype == torch.float32
    dq, dk, dv = kernels._varlen_backward(torch.empty_like(q), q, k, v, out, log_sums, meta, rest)
    assert dq.shape == q.shape and dk.shape == k.shape and dv.shape == v.shape


def test_every_kernel_has_a_setting():
    assert {"auto", *kernels.CUDA_KERNELS} == set(KERNELS)


def test_another_kernel_takes_flash_attention_3_out_again(monkeypatch):
    """PyTorch has it in the place of FlashAttention-2, which would else run under the wrong name."""
    done: list[str] = []
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", done.append)
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: done[-1] if done else None)
    monkeypatch.setattr(torch.nn.attention, "restore_flash_attention_impl", lambda: done.append("restored"))
    for kernel in ("fa2", "fa3", "cudnn", "fa2"):
        kernels.use_kernel(kernel)
    assert done == ["FA3", "restored"]


def test_without_the_package_flash_attention_3_is_refused_in_one_line():
    if importlib.util.find_spec("flash_attn_interface"):
        pytest.skip("it is installed")
    with pytest.raises(ValueError, match=r"^model.attention_kernel=fa3: FlashAttention-3 can't be used: .*$"):
        kernels.use_kernel("fa3")


@pytest.mark.parametrize("kernel", kernels.CUDA_KERNELS)
def test_the_dense_kernels_of_a_gpu_give_log_sums_per_query(kernel):
    """Also on meta tensors, laid out as the model does, with slices of queries."""
    forward, backward = kernels.CUDA_KERNELS[kernel]
    q, k, v = (torch.empty(2, 9, 3, 64, dtype=torch.bfloat16, device="meta").transpose(1, 2) for _ in range(3))
    out, log_sums, rest = forward(q[:, :, :4], k, v)
    assert out.shape == (2, 3, 4, 64) and log_sums.shape == (2, 3, 4) and log_sums.dtype == torch.float32
    whole = torch.empty(2, 3, 9, device="meta")
    grads = backward(out, q[:, :, :4], k, v, out, whole[:, :, :4], rest)
    assert [grad.shape for grad in grads] == [(2, 3, 4, 64), (2, 3, 9, 64), (2, 3, 9, 64)]


def test_the_layout_that_cudnns_backward_sees_depends_on_its_shape_alone(monkeypatch):
    """PyTorch 2.11 reads gradients and outputs with the strides of the first call with q, k and v laid out alike."""
    q, k, v = (torch.empty(2, 9, 3, 64, dtype=torch.bfloat16, device="meta").transpose(1, 2) for _ in range(3))
    forward, backward = kernels.CUDA_KERNELS["cudnn"]
    out, log_sums, rest = forward(q, k, v)
    seen = []
    monkeypatch.setattr(
        torch.ops.aten,
        "_scaled_dot_product_cudnn_attention_backward",
        lambda grad, q, k, v, out, *_: (seen.append((grad.stride(), out.stride())), (q, k, v))[1],
    )
    for grad in (out, torch.empty_like(out).contiguous(), torch.empty(2, 3, 20, 64, device="meta")[:, :, 4:13]):
        backward(grad, q, k, v, grad.clone(), log_sums, rest)
    assert set(seen) == {(q.stride(), q.stride())}


@pytest.mark.parametrize("repeatable, kernel", [(False, "cudnn"), (True, "fa2")])
def test_kernels_that_must_repeat_their_bits_are_not_cudnns(monkeypatch, repeatable, kernel):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    assert kernels._best_on_cuda.__wrapped__(torch.device("cuda"), 128, repeatable) == kernel


def test_selective_recomputation_takes_choice_and_result_from_the_stash_and_holds_no_graph(monkeypatch, device):
    layout = layout_of([3] * 6, Routed(top_k=2))
    inputs, stash = random_qkv(layout, 1, 2, 8, device), {}
    first = two_stream_attention(*inputs, layout, stash=stash)
    reference, value = weakref.ref(first), first.detach().clone()
    del first
    assert reference() is None and {"slots", "routing", "attention"} <= stash.keys()
    monkeypatch.setattr(routing, "choose_slots", None)
    second = two_stream_attention(*inputs, layout, stash=stash)
    assert torch.equal(second, value) and not stash
    weight = random_like(value)
    found = with_gradients(second, inputs, weight)
    assert_equal(found, with_gradients(expected_attention(*inputs, layout), inputs, weight), precision(device))


def test_very_many_chunks_keep_their_numbers(device):
    plan = RoutingPlan((RoutedRows(1, 40000, 40000),), tuple(range(40002)), Routed(1))
    means = torch.zeros(1, 1, 40000, 2, device=device)
    means[0, 0, 39999] = 1.0
    assert choose_slots(torch.ones_like(means[:, :, :1]), means, plan).tolist() == [[[[39999, 40000]]]]
