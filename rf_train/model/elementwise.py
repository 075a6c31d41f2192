"""The work of a block between its matrix multiplications: norms, modulation, residuals, rotary positions.

Each function reads its inputs and writes its outputs once when it is compiled. Then it takes one or two kernels, not
about ten, and backward keeps only the inputs. Statistics, modulation and rotation are in fp32. `use_compiled` turns
compilation on, for the process. Attention and matrix multiplications stay as they are, and so do ZeRO's hooks.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from threading import RLock
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from rf_train.model.rope import rotate

Function = TypeVar("Function", bound=Callable[..., Any])

_state = {"compiled": False}
_one_at_a_time = RLock()  # the compiler doesn't promise to serve several threads: see `in_threads`
# Of one function: with and without gradient, first, last and partial chunks, batch sizes. Further ones run uncompiled,
# and PyTorch logs a warning.
VARIANTS = 64


def use_compiled(on: bool) -> None:
    """Compiles the functions of this module from now on, or stops using what was compiled.

    Raises ValueError where PyTorch's compiler doesn't work.
    """
    if on:
        check_compiler()
        from torch._dynamo import config as limit

        limit.recompile_limit = max(limit.recompile_limit, VARIANTS)
    _state["compiled"] = on


@cache
def check_compiler() -> None:
    """Compiles a small function. Raises a one-line ValueError if that fails."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        from torch import _dynamo  # noqa: F401  it makes the folder of the compiler's cache

        torch.compile(lambda x: x.exp() + 1)(torch.ones(16, device=device))
    except Exception as error:  # the compiler's own kinds have no common base
        raise ValueError(_what_failed(error)) from None


def _what_failed(error: Exception) -> str:
    """One line on a failed compilation. The C++ compiler's own command and warnings take hundreds."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    telling = [line for line in lines if re.search(r"\berror: |\bfatal|failed: |killed", line, re.IGNORECASE)]
    return (
        f"run.compile=true: PyTorch's compiler does not work here ({(telling or lines)[0][:300]}); it needs a C++ "
        "compiler, for example g++, and room in its cache folder (TORCHINDUCTOR_CACHE_DIR, or the folder for temporary "
        "files). Or set run.compile=false"
    )


@contextmanager
def compiled(on: bool) -> Iterator[None]:
    """`use_compiled` inside the context only."""
    before = _state["compiled"]
    use_compiled(on)
    try:
        yield
    finally:
        use_compiled(before)


def graphs_compiled() -> int:
    """The graphs that this process has compiled so far."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


@cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


def fusible(function: Function) -> Function:
    """Makes a function of this module follow `use_compiled`."""

    @wraps(function)
    def call(*arguments: Any) -> Any:
        return _call_compiled(function, arguments) if _state["compiled"] else function(*arguments)

    return call  # type: ignore[return-value]


def _call_compiled(function: Callable[..., Any], arguments: tuple) -> Any:
    """Raises a one-line ValueError where the compiler fails twice.

    It fails once where Ctrl-C ends it, too. Then the step still ends, and the run saves.
    """
    from torch._dynamo.exc import BackendCompilerFailed

    with _one_at_a_time:
        try:
            return _compile(function)(*arguments)
        except BackendCompilerFailed:
            pass
        try:
            return _compile(function)(*arguments)
        except BackendCompilerFailed as error:
            raise ValueError(_what_failed(error)) from None


def layer_norm(x: Tensor, eps: float) -> Tensor:
    """Layer norm without weights, in fp32."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=eps)


@fusible
def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Layer norm, scaled and shifted: x [B, F, P, D]; shift and scale [B, F, 1, D] in fp32 -> x's shape and dtype."""
    return torch.addcmul(shift, layer_norm(x, eps), 1 + scale).to(x.dtype)


@fusible
def gated_sum(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate y: x and y [B, F, P, D]; gate [B, F, 1, D] in fp32 -> x's shape and dtype."""
    return torch.addcmul(x.float(), y.float(), gate).to(x.dtype)


@fusible
def gated_sum_and_norm(
    x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(z = x + gate y, layer norm of z with weights [D]): see `gated_sum`."""
    z = torch.addcmul(x.float(), y.float(), gate).to(x.dtype)
    return z, F.layer_norm(z, z.shape[-1:], weight, bias, eps)


@fusible
def sum_and_modulated_norm(x: Tensor, y: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(z = x + y, modulated layer norm of z): see `modulated_norm`."""
    z = x + y
    return z, torch.addcmul(shift, layer_norm(z, eps), 1 + scale).to(x.dtype)


@fusible
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the full width: x [..., D], weight [D]."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


@fusible
def rms_norm_and_rotate(x: Tensor, weight: Tensor, table: Tensor, heads: int, eps: float) -> Tensor:
    """RMS norm over the full width, then rotary positions per head.

    x [B, L, D]; weight [D]; table as in `rotate`. Returns [B, L, heads, D / heads].
    """
    return rotate(F.rms_norm(x, x.shape[-1:], weight, eps).unflatten(-1, (heads, -1)), table)


@fusible
def merge_slots(parts: Tensor, place: Tensor, sums: Tensor, own: Tensor, own_sums: Tensor) -> tuple[Tensor, Tensor]:
    """Merges attention over the chosen chunks with that over the own one: (output [R, D], its log-sum-exps [R]).
    parts [T, D] and sums [T] are those of the chosen chunks. place [R, n]: where each query has its n parts there.
    own [R, D] and own_sums [R]: of the own chunk.
    """
    sums = sums[place]
    total = torch.logaddexp(sums.logsumexp(dim=1), own_sums)
    weights = (sums - total[:, None]).exp()
    merged = own.float() * (own_sums - total).exp()[:, None]
    for slot in range(place.shape[1]):
        merged.addcmul_(parts.index_select(0, place[:, slot]), weights[:, slot, None])
    return merged.to(own.dtype), total


@fusible
def add_slots(own: Tensor, parts: Tensor, place: Tensor) -> Tensor:
    """own [R, D] + the sum of each query's n parts, in fp32: see `merge_slots`. Returns own's dtype."""
    total = own.float() if own.dtype != torch.float32 else own.clone()
    for slot in range(place.shape[1]):
        total += parts.index_select(0, place[:, slot])
    return total.to(own.dtype)


def merge_windows(out: Tensor, log_sums: Tensor, part: Tensor, part_sums: Tensor) -> None:
    """`merge_part` of several windows: out [B, n, H, L, D].

    Compiled, one by one: a kernel with a dimension more took 2.7 times as long on a GPU.
    """
    if not _state["compiled"]:
        merge_part(out, log_sums, part, part_sums)
    else:
        for window in zip(*(x.unbind(1) for x in (out, log_sums, part, part_sums))):
            merge_part(*window)


@fusible
def merge_part(out: Tensor, log_sums: Tensor, part: Tensor, part_sums: Tensor) -> None:
    """Merges attention over more keys into `out` [..., L, D] and `log_sums` [..., L], both fp32, in place.

    part [..., L, D] and part_sums [..., L] are the attention over those keys alone, and its log-sum-exps.
    """
    out.lerp_(part.float(), torch.sigmoid(part_sums - log_sums)[..., None])
    log_sums.copy_(torch.logaddexp(log_sums, part_sums))
