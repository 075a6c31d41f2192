"""The bytes that operations move, against counts by hand."""

import pytest
import torch

from rf_train import bench_traffic
from rf_train.bench_traffic import Traffic, kernel_bytes, own_bytes, recorded_functions
from rf_train.model import elementwise


def test_an_operation_reads_its_inputs_and_writes_its_output_and_a_view_moves_nothing():
    x, row = torch.randn(8, 16), torch.randn(1, 16)
    with Traffic() as traffic:
        x.view(16, 8).transpose(0, 1)
        x + row.expand(8, 16)  # a row is read once
        x.add_(1)
    assert dict(traffic.read_and_written) == {"add": (2 * 8 + 1) * 16 * 4, "add_": 2 * 8 * 16 * 4}
    assert traffic.elementwise() == traffic.read_and_written.total()
    with Traffic() as traffic:
        x @ x.T
    assert traffic.elementwise() == 0 and traffic.read_and_written.total() == (2 * 8 * 16 + 8 * 8) * 4


@pytest.mark.slow
def test_a_compiled_function_moves_its_inputs_and_outputs_once():
    """x + gate y in bf16, forward: x, y and the output, a gate for each frame. Operations move five times as much."""
    x, y = (torch.randn(1, 2, 64, 32, dtype=torch.bfloat16) for _ in range(2))
    gate = torch.randn(1, 2, 1, 32)
    arguments = (x, y, gate)
    calls: list = []
    with recorded_functions(calls):
        elementwise.gated_sum(*arguments)
    [(function, _)] = calls
    once = (3 * x.numel()) * 2 + gate.numel() * 4
    assert kernel_bytes(function, arguments) == once
    casts, sums = 2 * x.numel() * (2 + 4), 3 * x.numel() * 4 + gate.numel() * 4
    assert own_bytes(function, arguments) == casts + sums + x.numel() * (4 + 2)


@pytest.mark.slow
def test_a_block_is_counted_at_any_size(monkeypatch):
    """Bytes are linear in tokens, so two sizes give a third. The functions' parts are parts of the whole."""
    monkeypatch.setattr(bench_traffic, "FRAMES", 6)
    small = bench_traffic.ModelSettings(dim=32, ffn_dim=64, heads=2, layers=1, text_len=8)
    monkeypatch.setattr(bench_traffic, "WAN", small)
    monkeypatch.setattr(bench_traffic, "kernel_bytes", lambda *_: 1000)
    one, two, three = (bench_traffic.count(tokens) for tokens in (4, 8, 12))
    assert three["all"] - two["all"] == two["all"] - one["all"] > 0
    assert 0 < one["not compiled"] < one["all"]
    functions = [name for name in one if name.startswith("function ")]
    assert 0 < sum(one[name] for name in functions if name.endswith(", not compiled")) < one["not compiled"]
    assert {name.split(",")[0] for name in functions} >= {"function rms_norm_and_rotate", "function merge_part"}
