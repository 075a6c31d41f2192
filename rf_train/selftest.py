"""Checks of the model in hand before the first step: that it is causal, and that its passes agree.

A wrong mask, a shifted rotary position or a cache that disagrees with training costs a week of GPU time; these cost seconds. They run on the
run's own weights and chunking, on a small picture, with text, in the run's precision.
"""

from contextlib import contextmanager

import torch
from torch import Tensor

from rf_train.chunks import Attention
from rf_train.model import CausalWan

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # of the features' standard deviation


class SelfTestError(ValueError):
    """A check that failed; the message names it."""


def self_test(model: CausalWan, chunks: int, attentions: list[Attention]) -> None:
    """Raises SelfTestError naming the first check that fails. `model` holds whole parameters; `attentions` are those of the run's stages.

    What is compared is the input of the last linear layer, since a fresh model's output is all zero.
    """
    weight = model.proj_out.weight
    count = min(chunks, 4)
    frames = model.chunking.start(count)
    stream = torch.Generator().manual_seed(0)
    ranks = model.sequence.size if model.sequence is not None else 1
    shape = (1, model.settings.channels, frames, 2 * model.settings.patch, 2 * ranks * model.settings.patch)
    noisy, history = (torch.randn(shape, generator=stream).to(weight.device) for _ in range(2))
    t = torch.rand(1, count, generator=stream).to(weight.device)
    text = torch.randn(1, model.settings.text_len, model.settings.text_dim, generator=stream).to(weight.device)
    sizes = model.chunking.sizes(frames)
    t = t.repeat_interleave(torch.tensor(sizes, device=t.device), dim=1)
    clip = (noisy, history[:, :, : frames - sizes[-1]] if count > 1 else None, t, text)

    with frozen(model):
        for attention in dict.fromkeys([Attention(), *attentions]):
            check_causal(model, *clip, sizes, attention)
            check_cached(model, *clip, sizes, attention)
        check_routing(model, *clip, count)


@contextmanager
def frozen(model: CausalWan):
    """No gradient for parameters meanwhile: an engine's hooks on them must not see the checks."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with torch.no_grad():
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def features(model: CausalWan, **arguments) -> Tensor:
    """The input of `proj_out`, fp32 [1, F, P, D], of a pass."""
    with captured(model) as found:
        model(**arguments)
    return found[0].float()


@contextmanager
def captured(model: CausalWan):
    found: list[Tensor] = []
    handle = model.proj_out.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    try:
        yield found
    finally:
        handle.remove()


def check_causal(model: CausalWan, noisy: Tensor, history: Tensor | None, t: Tensor, text: Tensor, sizes: list[int], attention: Attention) -> None:
    """By gradient: noisy chunk i depends on itself and on earlier history (all of it, when attention is dense), and on nothing else."""
    count = len(sizes)
    with torch.enable_grad():
        noisy = noisy.clone().requires_grad_()
        past = None if history is None else history.clone().requires_grad_()
        inputs = [noisy] if past is None else [noisy, past]
        out = features(model, noisy=noisy, t=t, history=past, text=text, attention=attention)
        if not bool(out.isfinite().all()):
            raise SelfTestError("self-test 'finite' failed: the model's features are not finite")
        for index, part in enumerate(out.split(sizes, dim=1)):
            grads = torch.autograd.grad(part.square().sum(), inputs, retain_graph=True, allow_unused=True)
            grads = [torch.zeros_like(x) if grad is None else grad for grad, x in zip(grads, inputs)]
            for other, grad in enumerate(grads[0].split(sizes, dim=2)):
                if bool(grad.any()) != (other == index):
                    reads = "reads" if other != index else "does not read"
                    raise SelfTestError(f"self-test 'causal' failed ({attention.kind} attention): noisy chunk {index + 1} {reads} noisy chunk {other + 1}")
            for other, grad in enumerate(grads[1].split(sizes[: count - 1], dim=2) if past is not None else ()):
                if other >= index and bool(grad.any()):
                    raise SelfTestError(f"self-test 'causal' failed ({attention.kind} attention): noisy chunk {index + 1} reads history chunk {other + 1}")
                if other < index and attention.kind == "dense" and not bool(grad.any()):
                    raise SelfTestError(f"self-test 'causal' failed: noisy chunk {index + 1} does not read history chunk {other + 1}")


def check_cached(model: CausalWan, noisy: Tensor, history: Tensor | None, t: Tensor, text: Tensor, sizes: list[int], attention: Attention) -> None:
    """The parallel pass gives what the chunk-by-chunk pass with a K/V cache gives, for every chunk."""
    parallel = features(model, noisy=noisy, t=t, history=history, text=text, attention=attention)
    cache = model.new_cache(1, (noisy.shape[3] // model.settings.patch) * (noisy.shape[4] // model.settings.patch), noisy.shape[2], attention)
    begin = 0
    for index, size in enumerate(sizes):
        span = slice(begin, begin + size)
        newest = history[:, :, begin - sizes[index - 1] : begin] if index else None
        one = features(model, noisy=noisy[:, :, span], t=t[:, span], history=newest, text=text, attention=attention, noisy_chunk=index, cache=cache)
        compare(f"cached = parallel' failed ({attention.kind} attention), chunk {index + 1}", one, parallel[:, span], model)
        begin += size


def check_routing(model: CausalWan, noisy: Tensor, history: Tensor | None, t: Tensor, text: Tensor, count: int) -> None:
    """Routing that keeps as many chunks as there are is dense attention."""
    dense, routed = (features(model, noisy=noisy, t=t, history=history, text=text, attention=a) for a in (Attention(), Attention("routed", k=max(1, count - 1))))
    compare("routed with k >= N = dense' failed", routed, dense, model)


def compare(name: str, one: Tensor, other: Tensor, model: CausalWan) -> None:
    distance, spread = (one - other).abs().max().item(), other.std().item()
    allowed = TOLERANCE[model.proj_out.weight.dtype] * spread
    if not distance <= allowed:
        raise SelfTestError(f"self-test '{name}: they differ by {distance:.2g}, allowed is {allowed:.2g}")
