"""The benchmark runs at a small size, and ends with its figures as JSON."""

import json

import pytest

from data_prep import bench


@pytest.mark.slow
def test_the_benchmark_prints_its_figures(capsys):
    small = ["--size", "32x32", "--frames", "5", "--videos", "2", "--clips", "2", "--rounds", "1", "--workers", "1"]
    assert bench.main(small) == 0
    *lines, figures = capsys.readouterr().out.splitlines()
    found = json.loads(figures)
    assert len(lines) == 3 and found["bench"] == "encode" and 0 < found["rate_over_codec"] < 10


def test_a_wrong_size_is_one_line(capsys):
    assert bench.main(["--size", "33x32"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
