"""Compiled, the model gives what it gives without, in training, rollout and generation; and it compiles once."""

import os
import subprocess
import sys
from itertools import chain

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

from rf_train.model import elementwise, routing
from rf_train.model.chunks import Dense, Routed
from rf_train.model.elementwise import compiled, graphs_compiled
from rf_train.model.self_test import self_test
from tests.conftest import random_clip
from tests.distributed import PROJECT
from tests.model.passes import cached_pass, parallel_pass


def results(model, frames: int, attention) -> list[torch.Tensor]:
    """The velocities of a training pass and of a pass with a cache, and the gradients."""
    x, t, text = random_clip(frames, 2, model.settings, device=model.proj_out.weight.device)
    model.zero_grad()
    v = parallel_pass(model, x, x, t, text, attention)
    v.float().square().mean().backward()
    with torch.no_grad():
        one_by_one = cached_pass(model, x, x, t, text, attention)
    return [v.detach(), one_by_one, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.slow
@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", ["none", "selective"])
def test_compiled_equals_eager_and_nothing_is_compiled_later(
    monkeypatch, tiny_model, device, dtype, allowed, checkpointing
):
    """The difference is at most `allowed` of the norm of each result."""
    monkeypatch.setattr(routing, "SMALL_PAIRS", 0)  # else a CPU would route under a mask
    model, cases = tiny_model(device, checkpointing=checkpointing).to(dtype), [(9, Dense()), (12, Routed(top_k=1))]
    expected = [results(model, *case) for case in cases]
    with compiled(True):
        found = [results(model, *case) for case in cases]
        graphs = graphs_compiled()
        again = [results(model, *case) for case in cases]
        assert graphs_compiled() == graphs > 0
    for one, other, repeated in zip(chain(*found), chain(*expected), chain(*again)):
        assert (one.float() - other.float()).norm() <= allowed * other.float().norm()
        assert device.type == "cuda" or torch.equal(one, repeated)  # there, flash attention's backward repeats no bits


@pytest.mark.slow
def test_a_compiled_model_passes_the_self_test(monkeypatch, tiny_model, device):
    monkeypatch.setattr(routing, "SMALL_PAIRS", 0)
    with compiled(True):
        assert self_test(tiny_model(device), 4, [Dense(), Routed(top_k=2)]) < 1


def test_without_a_compiler_the_error_is_one_line(monkeypatch):
    def broken(*_):
        raise RuntimeError("No working C++ compiler found\nmore lines")

    monkeypatch.setattr(torch, "compile", lambda function: broken)
    elementwise.check_compiler.cache_clear()
    try:
        with pytest.raises(
            ValueError, match=r"^run.compile=true: .*No working C\+\+ compiler found.*run.compile=false$"
        ):
            elementwise.use_compiled(True)
    finally:
        elementwise.check_compiler.cache_clear()
    assert not elementwise._state["compiled"]


def test_a_cache_folder_that_cannot_be_made_is_named_in_one_line():
    program = "from rf_train.model.elementwise import use_compiled; use_compiled(True)"
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": f"{__file__}/cache"}
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=PROJECT, capture_output=True, text=True
    )
    *_, last = ended.stderr.splitlines()
    assert last.startswith("ValueError: run.compile=true: ") and f"{__file__}/cache" in last and "_CACHE_DIR" in last


def test_a_compiler_that_fails_once_is_asked_again_and_then_named_in_one_line(monkeypatch):
    """Ctrl-C ends the C++ compiler, too. A disk that is full stays so."""
    said, fails = (
        f"C++ compile error\n\nCommand: g++ {'-O3 ' * 999}\nld: final link failed: No space left on device",
        [1],
    )

    def compiled_by(function):
        def call(*arguments):
            if fails:
                fails.pop()
                raise BackendCompilerFailed("inductor", RuntimeError(said), None)
            return function(*arguments)

        return call

    monkeypatch.setattr(elementwise, "_compile", compiled_by)
    monkeypatch.setitem(elementwise._state, "compiled", True)
    x = torch.randn(2, 3)
    expected = torch.nn.functional.rms_norm(x, (3,), torch.ones(3), 1e-6)
    assert torch.equal(elementwise.rms_norm(x, torch.ones(3), 1e-6), expected)
    fails += [1, 1]
    with pytest.raises(ValueError, match=r"^run.compile=true: .*\(ld: final link failed: No space left on device\)"):
        elementwise.rms_norm(x, torch.ones(3), 1e-6)
