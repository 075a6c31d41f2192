"""Micro-batches on a device: the same numbers, and on a GPU each is copied before its turn and never overwritten."""

import contextlib
from dataclasses import replace

import pytest
import torch

from rf_train.diffusion.batch import Batch, on_device


def batch(number: int) -> Batch:
    x = torch.full((1, 2, 3, 4, 4), float(number))
    return Batch([str(number)], x, torch.full((1, 5, 6), float(number)), {"noise": x + 0.5}, [3])


def numbers(batches: list[Batch]) -> list[tuple]:
    return [(one.ids, one.x.sum().item(), one.text.sum().item(), one.draws["noise"].sum().item()) for one in batches]


@pytest.mark.parametrize("count", [0, 1, 4])
def test_every_batch_comes_once_and_in_order(device, count):
    batches = [batch(number) for number in range(count)]
    given = [one.pinned() for one in batches] if device.type == "cuda" else batches
    found = []
    for one in on_device(given, device):
        assert one.x.device.type == one.text.device.type == one.draws["noise"].device.type == device.type
        found.append(replace(one))
        del one
        torch.zeros(1 << 20, device=device)  # would reuse memory that is free too early
    assert numbers(found) == numbers(batches)


class Stream:
    """A stream that notes what it is told to wait for."""

    def __init__(self, name: str, log: list[str]):
        self.name, self.log = name, log

    def wait_stream(self, other: "Stream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")


def test_on_a_gpu_the_next_batch_is_copied_on_another_stream_while_one_is_worked_on(monkeypatch):
    """Streams and copies are noted here, not made: the order of calls is what makes it right on a GPU."""
    log: list[str] = []
    work, copies = Stream("work", log), Stream("copies", log)
    now = [work]

    @contextlib.contextmanager
    def stream(other):
        now.append(other)
        yield
        now.pop()

    def to(self, device):
        log.append(f"copy {self.ids[0]} on {now[-1].name}")
        return self

    def used_on(self, stream):
        log.append(f"{self.ids[0]} used on {stream.name}")
        return self

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: work)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: copies)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(Batch, "to", to)
    monkeypatch.setattr(Batch, "used_on", used_on)
    for one in on_device([batch(number) for number in range(3)], torch.device("cuda")):
        assert now == [work]
        log.append(f"work on {one.ids[0]}")
    assert log == [
        "copy 0 on copies", "work waits for copies", "copy 1 on copies", "0 used on work", "work on 0",
        "work waits for copies", "copy 2 on copies", "1 used on work", "work on 1",
        "work waits for copies", "2 used on work", "work on 2",
    ]  # fmt: skip
