"""Ranks that watch one another: an error or a death on one ends all within seconds; a hang is named, and ended.

Each rank has a thread, and a connection of its own to the store through which the ranks found one another. So it works
while the main thread waits in a collective that will never complete.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from data_prep.command import one_line
from rf_train.engine.collectives import PeerLost, Ranks
from rf_train.engine.processes import machine, started

T = TypeVar("T")
LEFT = 1  # exit code of a rank that leaves because of another one


class Watch:
    """This rank's place in the step, for its peers to see; and its eye on them. `begin` starts it."""

    interval = 2.0  # seconds between two looks
    answer = 10.0  # seconds in which the store should answer

    def __init__(self, hang_timeout: float = 900.0):
        self.hang_timeout = hang_timeout
        self._place, self._since, self._allowed = "start", time.monotonic(), float("inf")
        self._ended, self._failed = threading.Event(), threading.Event()
        self.on_leaving: Callable[[str], object] = lambda why: None  # is told why this rank ends
        self.asked: Callable[[], object] = lambda: False  # whether this rank was asked to stop
        self.asked_anywhere = False  # whether some rank was, for who waits where no collective can tell
        self._store: dist.Store | None = None
        self._beat = 0

    def begin(self, ranks: Ranks) -> None:
        """Starts to watch. A collective."""
        self.ranks = ranks
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        patience = timedelta(seconds=30)
        client = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=patience)
        self._store = dist.PrefixStore("watch", client)
        self._own = {"pid": os.getpid(), "machine": machine()}
        self._publish()
        dist.barrier()
        self._neighbours = self._ranks_here()
        for target in (self._watch, self._exchange):
            threading.Thread(target=target, name="watch", daemon=True).start()

    def at(self, place: str, more: float = 0.0) -> None:
        """Notes where this rank is now. It may stay for the time-out of hangs, and `more` seconds."""
        self._place, self._since, self._allowed = place, time.monotonic(), self.hang_timeout + more

    def without_limit(self, place: str) -> None:
        """Notes where this rank is now. It may stay for any time."""
        self._place, self._since, self._allowed = place, time.monotonic(), float("inf")

    def close(self) -> None:
        """Stops to watch. Before a rank leaves, all must have stopped."""
        self._ended.set()

    def fail(self, text: str) -> None:
        """Prints what has ended this rank, unless a peer has failed before, and tells the peers, which leave."""
        self.close()
        if self._asked(lambda store: self._is_first(store, text)) is not False:
            with suppress(OSError):  # who read it is gone
                print(text, file=sys.stderr, flush=True)
        self._let_peers_hear()

    def a_peer_fails(self, seconds: float) -> bool:
        """Waits until a peer has failed, and so has said why. False when none has after so many seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if (self._asked(lambda store: store.add("failed", 0)) or 0) > 0:
                return True
            time.sleep(self.interval / 8)
        return False

    def reason(self, error: BaseException) -> str:
        """What has ended the run, in one line: the error of the rank that failed, where a peer lost it."""
        if isinstance(error, PeerLost) and self._failed.wait(3 * self.interval):
            return self._failure()
        return f"error: {short(error)}"

    # ---- the threads

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._ended.wait(self.interval):
            now = time.monotonic()
            if now - looked > 5 * self.interval:  # this process was suspended, and perhaps all of them
                self._since = min(now, self._since + now - looked)
            if self._failed.is_set() and not self._ended.is_set():
                self.on_leaving(self._failure())
                self._let_peers_hear()
                os._exit(LEFT)
            for rank, pid in self._neighbours.items():
                if started(pid) is None and not self._failed.wait(2 * self.interval) and not self._ended.is_set():
                    self._leave(f"rank {rank} (process {pid}) was killed, or ended without a word; all ranks leave")
            # Rank 0 says it, or leaves others the time to.
            turn = self.ranks.rank and 6 * self.interval + 2 * self.answer
            since = self._since
            if time.monotonic() - since > self._allowed + turn:
                said = self._hang()
                if self._since == since:  # there was no progress meanwhile
                    self._leave(said)
            looked = time.monotonic()

    def _exchange(self) -> None:
        """Tells the peers where this rank is, and hears whether one has failed, or was asked to stop."""
        assert self._store is not None
        told = False
        with suppress(RuntimeError):  # the store is gone, with rank 0
            while not self._ended.wait(self.interval):
                self._publish()
                news = bool(self.asked()) and not told
                told = told or news
                self.asked_anywhere = self._store.add("asked", int(news)) > 0
                if self._store.add("failed", 0) > 0:
                    self._failed.set()

    def _asked(self, question: Callable[[dist.Store], T]) -> T | None:
        """What the store answers; None when it is gone, or silent for `answer` seconds, as when rank 0 is stopped."""
        found: list[T] = []

        def ask(store: dist.Store) -> None:
            with suppress(RuntimeError):
                found.append(question(store))

        if self._store is not None:
            thread = threading.Thread(target=ask, args=(self._store,), daemon=True)
            thread.start()
            thread.join(self.answer)
        return found[0] if found else None

    def _let_peers_hear(self) -> None:
        """Rank 0, with which the store ends, stays until its peers have looked: else they would miss it instead."""
        if self._store is not None and self.ranks.rank == 0:
            time.sleep(2 * self.interval)

    def _is_first(self, store: dist.Store, text: str) -> bool:
        """Whether no other rank has failed before this one. Then its last line is there for all to read."""
        if store.add("failures", 1) > 1:
            return False
        store.set("failure", text.splitlines()[-1])
        store.add("failed", 1)
        return True

    def _failure(self) -> str:
        """What the rank that failed has said."""
        said = self._asked(lambda store: store.get("failure").decode(errors="replace"))
        return (said or "error: on another rank, which has said why")[:500]

    def _publish(self) -> None:
        assert self._store is not None
        self._beat += 1
        told = {**self._own, "beat": self._beat, "place": self._place}
        self._store.set(str(self.ranks.rank), json.dumps(told))

    def _read(self, rank: int) -> dict:
        assert self._store is not None
        return json.loads(self._store.get(str(rank)))

    def _ranks_here(self) -> dict[int, int]:
        """{rank: process} of the other ranks on this machine."""
        found = {rank: self._read(rank) for rank in range(self.ranks.world_size) if rank != self.ranks.rank}
        return {rank: one["pid"] for rank, one in found.items() if one["machine"] == self._own["machine"]}

    def _hang(self) -> str:
        """Which ranks are where, and which don't answer."""
        waited = f"no progress for {time.monotonic() - self._since:.0f} s"
        everyone = range(self.ranks.world_size)
        before = self._asked(lambda _: [self._read(rank) for rank in everyone])
        time.sleep(3 * self.interval)
        now = self._asked(lambda _: [self._read(rank) for rank in everyone])
        if before is None or now is None:
            return f"{waited} at {self._place}; rank 0, which holds the ranks' store, does not answer"
        silent: list[int] = []
        places: dict[str, list[int]] = {}
        for rank, (one, two) in enumerate(zip(before, now)):
            if one["beat"] == two["beat"] and rank != self.ranks.rank:
                silent.append(rank)
            else:
                places.setdefault(two["place"], []).append(rank)
        told = [f"{_ranks(ranks)} at {place}" for place, ranks in sorted(places.items(), key=lambda item: len(item[1]))]
        told += [f"{_ranks([rank])} does not answer since {now[rank]['place']}" for rank in silent]
        return f"{waited}: {'; '.join(told)}"

    def _leave(self, why: str) -> None:
        self.on_leaving(f"error: {why}")
        self.fail(f"error on rank {self.ranks.rank}: {why}")
        os._exit(LEFT)


def short(error: BaseException) -> str:
    """What an error says, without what a library said to it in brackets."""
    return one_line(error).split(" ([")[0][:500] or type(error).__name__


def _ranks(ranks: list[int]) -> str:
    """A few ranks by number, many by count."""
    numbers = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {numbers}" if len(ranks) == 1 else f"ranks {numbers}"
