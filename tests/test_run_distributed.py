"""What the tests' own launcher reports when ranks fail or hang."""

import os
import time

import pytest

from tests.distributed import run_distributed


def talk_and_hang(on: str) -> str:
    print(f"this is rank {os.environ['RANK']}", flush=True)
    if os.environ["RANK"] in on:
        time.sleep(600)
    return os.environ["RANK"]


def fail_on_rank_1() -> None:
    print(f"this is rank {os.environ['RANK']}", flush=True)
    if os.environ["RANK"] == "1":
        raise ValueError("no luck")


def test_each_rank_returns_its_own():
    assert run_distributed(talk_and_hang, 3, on="") == ["0", "1", "2"]


def test_a_hang_tells_every_ranks_output_and_where_it_stands():
    with pytest.raises(AssertionError, match=r"did not end in 2 s") as caught:
        run_distributed(talk_and_hang, 2, timeout=2, on="01")
    for part in ("this is rank 0", "this is rank 1", "in talk_and_hang"):
        assert part in str(caught.value)


def test_a_failure_tells_every_ranks_output():
    with pytest.raises(AssertionError, match=r"ended with \[0, 1\]") as caught:
        run_distributed(fail_on_rank_1, 2)
    for part in ("this is rank 0", "this is rank 1", "ValueError: no luck"):
        assert part in str(caught.value)
