"""Independent parts on a CPU: each in a thread of its own, in which PyTorch computes alone."""

import multiprocessing
import threading
from threading import Thread, get_ident

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rf_train.model import threads
from rf_train.model.threads import in_threads

CPU = torch.device("cpu")


def test_each_part_has_one_thread_and_the_others_keep_all():
    before = torch.get_num_threads()
    assert before > 1  # see conftest.py
    found = in_threads(lambda part: (part, torch.get_num_threads(), get_ident()), [(n,) for n in range(20)], CPU)
    assert [part for part, _, _ in found] == list(range(20))
    assert {threads for _, threads, _ in found} == {1}
    assert get_ident() not in {thread for _, _, thread in found}
    assert torch.get_num_threads() == before
    later: list[int] = []
    thread = Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [before]


@pytest.mark.parametrize("parts, device", [(1, CPU), (20, torch.device("meta"))])
def test_too_few_parts_and_other_devices_stay_in_this_thread(parts, device):
    found = in_threads(lambda _: (torch.get_num_threads(), get_ident()), [(n,) for n in range(parts)], device)
    assert found == [(torch.get_num_threads(), get_ident())] * parts


def test_a_mode_that_looks_at_operations_sees_them_all():
    with FlopCounterMode(display=False) as counter:
        in_threads(lambda n: torch.ones(2, n) @ torch.ones(n, 3), [(n,) for n in range(1, 9)], CPU)
    assert counter.get_total_flops() == sum(2 * 2 * 3 * n for n in range(1, 9))


@pytest.mark.parametrize("parts", [1, 4])
def test_parts_have_no_gradients(parts):
    weight = torch.ones(2, requires_grad=True)
    assert not any(x.requires_grad for x in in_threads(lambda n: weight * n, [(n,) for n in range(parts)], CPU))
    assert (weight * 2).requires_grad


@pytest.mark.parametrize("parts", [1, 4])
def test_parts_may_write_into_what_inference_mode_made(parts):
    with torch.inference_mode():
        out = torch.zeros(parts)
        in_threads(lambda n: out[n].fill_(n), [(n,) for n in range(parts)], CPU)
    assert out.tolist() == list(range(parts))


def test_an_error_of_a_part_is_raised_and_the_threads_go_on():
    with pytest.raises(ZeroDivisionError):
        in_threads(lambda n: 1 // (n - 3), [(n,) for n in range(8)], CPU)
    assert in_threads(lambda n: n, [(n,) for n in range(8)], CPU) == list(range(8))


def squares(n: int, out) -> None:
    out.put(in_threads(lambda i: i * i, [(i,) for i in range(n)], CPU))


def test_a_forked_process_makes_threads_of_its_own():
    """It has none of those that its parent made, and would wait for them for ever."""
    in_threads(lambda n: n, [(n,) for n in range(8)], CPU)
    context = multiprocessing.get_context("fork")
    out = context.Queue()
    process = context.Process(target=squares, args=(4, out))
    process.start()
    try:
        assert out.get(timeout=30) == [0, 1, 4, 9]
    finally:
        process.kill()


def test_where_no_thread_can_be_started_nothing_waits_for_it(monkeypatch):
    threads._pool.cache_clear()
    before, started = torch.get_num_threads(), []

    def start(thread: Thread, start=Thread.start) -> None:
        started.append(thread)
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RuntimeError, match="can't start"):
        in_threads(lambda n: n, [(n,) for n in range(8)], CPU)
    assert not started[0].is_alive() and torch.get_num_threads() == before
    assert in_threads(lambda n: n, [(n,) for n in range(8)], CPU) == list(range(8))
