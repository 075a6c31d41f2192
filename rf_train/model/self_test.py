"""Checks of a run's model before the first step: that it is causal, and that parallel and cached passes agree.

A wrong mask, a shifted rotary position, or a cache that disagrees with training costs a week of GPU time. These checks
cost seconds. They use the run's own weights and chunking, and a small picture with text. In bf16, rounding hides small
faults. So the first blocks are checked again in fp32, where two passes agree to six digits.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rf_train.model.chunks import Attention, Dense, Routed
from rf_train.model.kv_cache import chunk_means
from rf_train.model.routing import (
    RoutedAttention,
    RoutedRows,
    RoutingPlan,
    choose_slots,
    masked_routing,
    routing_kernels,
)
from rf_train.model.transformer import CausalWan


@dataclass(frozen=True)
class Limits:
    """How much two passes may differ, in standard deviations of the features.

    In bf16 a sound model of 30 layers has a root mean square of 0.012 and a largest difference of 0.12. The pretrained
    ones have outlier channels, so the largest one says little.
    """

    rms: float
    largest: float
    mean_with_ties: float  # where routing may choose differently


LIMITS = {torch.float32: Limits(1e-4, 1e-3, 1e-3), torch.bfloat16: Limits(0.03, 0.5, 0.1)}


class SelfTestError(ValueError):
    """A check that failed. The message names it."""


@dataclass(frozen=True)
class ProbeClip:
    """A random clip of a few chunks."""

    noisy: Tensor  # [1, C, F, H, W]
    history: Tensor | None  # [1, C, F', H, W] all chunks but the last; None for a single chunk
    t: Tensor  # [1, F]
    text: Tensor  # [1, text_len, text_dim]
    sizes: list[int]  # latent frames of each chunk

    @classmethod
    def of(cls, model: CausalWan, chunks: int) -> "ProbeClip":
        settings, weight = model.settings, model.proj_out.weight
        frames = model.chunking.start(chunks)
        sizes = model.chunking.sizes(frames)
        ranks = model.sequence_parallel.size if model.sequence_parallel is not None else 1
        shape = (1, settings.channels, frames, 2 * settings.patch, 2 * ranks * settings.patch)
        stream = torch.Generator().manual_seed(0)
        noisy, history = (torch.randn(shape, generator=stream).to(weight.device) for _ in range(2))
        t = torch.rand(1, chunks, generator=stream).to(weight.device)
        text = torch.randn(1, settings.text_len, settings.text_dim, generator=stream).to(weight.device)
        t = t.repeat_interleave(torch.tensor(sizes, device=t.device), dim=1)
        return cls(noisy, history[:, :, : frames - sizes[-1]] if chunks > 1 else None, t, text, sizes)

    @property
    def frame_slices(self) -> list[slice]:
        """The latent frames of each chunk, as slices."""
        ends = torch.tensor(self.sizes).cumsum(0).tolist()
        return [slice(end - size, end) for end, size in zip(ends, self.sizes)]


def self_test(model: CausalWan, chunks: int, attentions: list[Attention]) -> float:
    """Raises SelfTestError, naming the first check that fails. Returns the largest difference, as a share of its limit.

    `model` holds whole parameters. `attentions` are those of the run's stages. The checks compare the input of the last
    linear layer, because the output of a new model is all zero.
    """
    share = _checked(model, chunks, attentions)
    if model.proj_out.weight.dtype != torch.float32:
        with torch.backends.cudnn.flags(allow_tf32=False):
            _checked(first_blocks_in_fp32(model), chunks, attentions)
    return share


def _checked(model: CausalWan, chunks: int, attentions: list[Attention]) -> float:
    clip, shares = ProbeClip.of(model, min(chunks, 4)), [0.0]
    with frozen(model):
        for attention in dict.fromkeys([Dense(), *(small_enough(kind, len(clip.sizes)) for kind in attentions)]):
            check_causal(model, clip, attention)
            shares += check_cached(model, clip, attention)
        shares += check_routing(model, clip)
    return max(shares)


def first_blocks_in_fp32(model: CausalWan, blocks: int = 2) -> CausalWan:
    """An fp32 copy of the model with its first blocks only."""
    weights = dict(model.named_parameters())
    device = model.proj_out.weight.device
    with torch.random.fork_rng(devices=[]), torch.device(device):
        copy = type(model)(replace(model.settings, layers=min(blocks, len(model.blocks))))
    copy.sequence_parallel = model.sequence_parallel
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            parameter.copy_(weights[name])
    return copy


def small_enough(attention: Attention, chunks: int) -> Attention:
    """Routing that makes a choice in a clip of `chunks` chunks; other kinds as they are."""
    if not isinstance(attention, Routed) or attention.read_chunks < chunks - 1:
        return attention
    fewer = replace(attention, top_k=1)
    return fewer if fewer.read_chunks < chunks - 1 else Routed(top_k=1)


@contextmanager
def frozen(model: CausalWan) -> Iterator[None]:
    """Parameters take no gradient inside, so that an engine's hooks on them don't see the checks."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with torch.no_grad():
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def features(model: CausalWan, **arguments: Any) -> Tensor:
    """The input of `proj_out` in a pass: fp32 [1, F, P, D]."""
    found: list[Tensor] = []
    handle = model.proj_out.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    try:
        model(**arguments)
    finally:
        handle.remove()
    return found[0].float()


def check_causal(model: CausalWan, clip: ProbeClip, attention: Attention) -> None:
    """Checks by gradient that noisy chunk i depends on itself and on earlier history, and on nothing else.

    With dense attention it must depend on all of the earlier history.
    """
    failed = f"self-test 'causal' failed ({attention.kind} attention)"
    with torch.enable_grad():
        noisy = clip.noisy.clone().requires_grad_()
        history = None if clip.history is None else clip.history.clone().requires_grad_()
        inputs = [noisy] if history is None else [noisy, history]
        for index in range(len(clip.sizes)):
            out = features(model, noisy=noisy, t=clip.t, history=history, text=clip.text, attention=attention)
            if not bool(out.isfinite().all()):
                raise SelfTestError("self-test 'finite' failed: the model's features are not finite")
            part = out.split(clip.sizes, dim=1)[index]
            found = torch.autograd.grad(part.square().sum(), inputs, allow_unused=True)
            grads = [torch.zeros_like(x) if grad is None else grad for grad, x in zip(found, inputs)]
            for other, grad in enumerate(grads[0].split(clip.sizes, dim=2)):
                if bool(grad.any()) != (other == index):
                    reads = "reads" if other != index else "does not read"
                    raise SelfTestError(f"{failed}: noisy chunk {index + 1} {reads} noisy chunk {other + 1}")
            for other, grad in enumerate(grads[1].split(clip.sizes[:-1], dim=2) if history is not None else ()):
                if other >= index and bool(grad.any()):
                    raise SelfTestError(f"{failed}: noisy chunk {index + 1} reads history chunk {other + 1}")
                if other < index and isinstance(attention, Dense) and not bool(grad.any()):
                    raise SelfTestError(f"{failed}: noisy chunk {index + 1} does not read history chunk {other + 1}")


def check_cached(model: CausalWan, clip: ProbeClip, attention: Attention) -> list[float]:
    """Checks for every chunk that the parallel pass equals the chunk-by-chunk pass with a K/V cache.

    Returns the differences, as `check_equal` does.
    """
    shares = []
    parallel = features(model, noisy=clip.noisy, t=clip.t, history=clip.history, text=clip.text, attention=attention)
    tokens = model.settings.tokens_per_frame(*clip.noisy.shape[3:])
    cache = model.new_kv_cache(1, tokens, clip.noisy.shape[2], attention)
    newest: Tensor | None = None  # the history chunk before this one, not yet in the cache
    for index, frames in enumerate(clip.frame_slices):
        one = features(
            model, noisy=clip.noisy[:, :, frames], t=clip.t[:, frames], history=newest, text=clip.text,
            attention=attention, noisy_chunk=index, kv_cache=cache,
        )  # fmt: skip
        where, ties = f"({attention.kind} attention), chunk {index + 1}", isinstance(attention, Routed)
        shares.append(check_equal("cached = parallel", where, one, parallel[:, frames], model, ties))
        newest = None if clip.history is None else clip.history[:, :, frames]
    return shares


def check_routing(model: CausalWan, clip: ProbeClip) -> list[float]:
    """Checks routed attention on random tokens, in the model's head width, dtype and device.

    Choosing all chunks must equal dense attention, and the fast path must equal the masked reference.
    """
    chunks, tokens, weight, settings = len(clip.sizes), 8, model.proj_out.weight, model.settings
    stream = torch.Generator().manual_seed(1)
    shape = (3, 1, settings.heads, tokens * (chunks + 1), settings.head_dim)
    q, k, v = torch.randn(shape, generator=stream).to(weight.device, weight.dtype)
    q, means = q[:, :, -tokens:], chunk_means(k[:, :, :-tokens], [tokens] * chunks)
    bounds = tuple(range(0, tokens * (chunks + 2), tokens))
    every, one = (RoutingPlan((RoutedRows(tokens, chunks, chunks),), bounds, Routed(top_k)) for top_k in (chunks, 1))
    dense = F.scaled_dot_product_attention(q, k, v)
    slots = [choose_slots(q, means, plan) for plan in (every, one)]
    masked = masked_routing(q, k, v, one, slots[1])
    kernels = routing_kernels(q)
    if kernels is None:
        found = [masked_routing(q, k, v, every, slots[0]), masked]
    else:
        found = [RoutedAttention.apply(q, k, v, *which, kernels, None) for which in zip(slots, (every, one))]
    checks = (("routed with top_k >= N = dense", "", dense), ("routed = masked", ", top_k 1", masked))
    return [
        check_equal(name, f"({chunks} chunks{more})", one.float(), other.float(), model)
        for (name, more, other), one in zip(checks, found)
    ]


def check_equal(check: str, where: str, one: Tensor, other: Tensor, model: CausalWan, ties: bool = False) -> float:
    """Raises SelfTestError when two results differ by more than the limits of the model's dtype.

    Returns the difference as a share of its limit. With `ties` only the mean counts: where two chunks fit a query
    equally well, rounding decides between them.
    """
    difference, spread, limits = (one - other).abs(), other.std().item(), LIMITS[model.proj_out.weight.dtype]
    found = {"mean": (difference.mean().item(), limits.mean_with_ties)}
    if not ties:
        root_mean_square = difference.square().mean().sqrt().item()
        found = {"rms": (root_mean_square, limits.rms), "largest": (difference.max().item(), limits.largest)}
    for name, (distance, limit) in found.items():
        if not distance <= limit * spread:
            message = f"the {name} difference is {distance:.2g}, at most {limit * spread:.2g} is allowed"
            raise SelfTestError(f"self-test '{check}' failed {where}: {message}")
    return max(distance / (limit * spread) if spread else 0.0 for distance, limit in found.values())
