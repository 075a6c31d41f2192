"""The benchmarks run at small sizes, and end with their figures as JSON."""

import contextlib
import io
import json

import pytest

from rf_train import bench
from tests.distributed import PROJECT, run_distributed


def bench_on_this_rank(arguments: list[str]) -> str:
    """What a benchmark prints on this rank."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert bench.main(arguments) == 0
    return out.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, figure",
    [
        (["attention", "--chunks", "8", "--tokens", "128", "--heads", "2"], "speedup_over_dense_mask"),
        (["routing", "--chunks", "4", "--tokens", "32", "--heads", "2", "--top-k", "1"], "speedup_over_dense_16"),
        (["model", "--chunks", "3", "--side", "2"], "flop_rate_over_diffusers"),
        (["step", "--side", "2"], "rollout_share_7"),
    ],
)
def test_a_benchmark_prints_its_figures(arguments, figure, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))  # of the process that measures memory
    *lines, figures = bench_on_this_rank([*arguments, "--rounds", "1"]).splitlines()
    assert lines and json.loads(figures)["bench"] == arguments[0] and json.loads(figures)[figure] > 0


@pytest.mark.slow
def test_gathering_once_or_in_every_pass_gives_the_same_losses():
    """On one rank that a launcher started."""
    [out] = run_distributed(bench_on_this_rank, 1, arguments=["rollout", "--chunks", "2", "--rounds", "1"])
    figures = json.loads(out.splitlines()[-1])
    assert figures["ranks"] == 1 and figures["rollout_gathered_per_pass_over_once"] > 0
    assert figures["largest_difference_of_loss"] < 1e-6
