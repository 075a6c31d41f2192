"""Watching: a death or an error on one rank ends its peers, though they wait; a hang is named, and ended."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from rf_train.engine.watching import LEFT, Watch
from tests.distributed import PROJECT, free_port, rank_environment

# A rank that waits for ever in a call which no error of a peer ends, as with NCCL.
RANK = """
import os, signal, subprocess, sys, time
import torch.distributed as dist
from rf_train.engine.collectives import PeerLost, start_ranks
from rf_train.failures import print_error
from rf_train.engine.watching import Watch
what, rank = sys.argv[1], int(os.environ["RANK"])
watch = Watch(hang_timeout=1.0)
watch.interval, watch.answer = 0.3, 2.0
if what == "unevenly":  # rank 0 hears of the failure at once, and rank 2 a second later
    watch.interval = (0.6, 0.6, 2.6)[rank]
watch.begin(start_ranks())
print("ready", flush=True)
if what == "fail" and rank == 1:
    watch.fail("error on rank 1: no luck")
    time.sleep(60)
if what == "unevenly" and rank == 1:
    time.sleep(1.6)
    watch.fail("error on rank 1: no luck")
    os._exit(2)
watch.on_leaving = lambda why: print(f"the end of rank {rank}: {why}", file=sys.stderr, flush=True)
if what == "lost" and rank == 1:
    watch.fail("Traceback\\n  of many lines\\nerror on rank 1: no luck")
    os._exit(2)
if what == "lost":
    watch.on_leaving = lambda why: time.sleep(60)  # the main thread sees the loss first
    time.sleep(0.2)
    print("the end:", watch.reason(PeerLost("a connection was closed")), file=sys.stderr, flush=True)
    os._exit(2)
if what == "all fail":
    print_error(ValueError("no luck"), rank, watch)
    os._exit(2)
if what == "rank 0 fails" and rank == 0:
    watch.fail("error on rank 0: no luck")
    os._exit(2)
if what == "hang":
    watch.at("step 7" if rank == 1 else "step 8")
    time.sleep(60)
if what in ("suspended", "slow"):
    watch.at("step 0")
    if what == "suspended":  # as Slurm and a user can do it to a whole job
        subprocess.Popen(["sh", "-c", f"sleep 4; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(0.5)
    else:
        time.sleep(1.7)  # it is late, and moves on while the ranks are asked where they are
    for step in range(1, 20):
        watch.at(f"step {step}")
        time.sleep(0.1)
    what = "end"
if what == "end":
    watch.at("step 1")
    watch.close()
    dist.barrier()
    os._exit(0)
sys.stdin.read() if what == "killed" else time.sleep(60)
"""


def ranks(
    what: str, stop: int | None = None, number: int = signal.SIGKILL, count: int = 2
) -> tuple[list[int], list[str], float]:
    """Starts `count` ranks, and sends a signal to rank `stop`. (exit codes, what each said to stderr, seconds)."""
    port, pipe = free_port(), subprocess.PIPE
    started = []
    for rank in range(count):
        environment = {**os.environ, **rank_environment(rank, count, port)}
        command = [sys.executable, "-c", RANK, what]
        started.append(
            subprocess.Popen(command, env=environment, cwd=PROJECT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        )
    try:
        for process in started:
            assert process.stdout.readline() == "ready\n"
        begin = time.monotonic()
        if stop is not None:
            time.sleep(0.5)  # it tells its place first
            started[stop].send_signal(number)
        waiting = [process for rank, process in enumerate(started) if rank != stop]
        for process in waiting:
            process.wait(timeout=60)
        seconds = time.monotonic() - begin
    finally:
        for process in started:
            process.kill()
        said = [process.communicate()[1] for process in started]
    return [process.returncode for process in started], said, seconds


def own(said: str) -> list[str]:
    """The lines that aren't PyTorch's."""
    return [line for line in said.splitlines() if line.startswith("error")]


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_when_a_rank_is_killed_its_neighbour_says_so_and_leaves(killed):
    codes, said, seconds = ranks("killed", killed)
    assert codes[1 - killed] == LEFT and seconds < 20
    [line] = own(said[1 - killed])
    assert line.startswith(f"error on rank {1 - killed}: rank {killed} (process ") and "was killed" in line


@pytest.mark.slow
def test_an_error_on_one_rank_is_the_last_word_and_all_leave():
    codes, said, seconds = ranks("fail", stop=1, number=0)
    assert codes[0] == LEFT and seconds < 20
    assert own(said[0]) == [] and own(said[1]) == ["error on rank 1: no luck"]
    assert "the end of rank 0: error on rank 1: no luck\n" in said[0]
    codes, said, seconds = ranks("rank 0 fails")
    assert codes == [2, LEFT] and seconds < 20
    assert own(said[1]) == [] and own(said[0]) == ["error on rank 0: no luck"]


@pytest.mark.slow
def test_rank_0_stays_until_all_have_heard_of_an_error():
    """The store ends with it. A peer that looks later would say that rank 0 was killed."""
    codes, said, _ = ranks("unevenly", count=3)
    assert codes == [LEFT, 2, LEFT] and list(map(own, said)) == [[], ["error on rank 1: no luck"], []]
    assert "the end of rank 0: error on rank 1: no luck\n" in said[0]


@pytest.mark.slow
def test_a_rank_that_lost_a_peer_knows_its_error():
    codes, said, _ = ranks("lost")
    assert codes == [2, 2] and "the end: error on rank 1: no luck\n" in said[0]
    assert Watch().reason(ValueError("no ([a library's words])")) == "error: no"


@pytest.mark.slow
def test_an_error_that_all_ranks_share_is_said_once_and_nothing_else():
    codes, said, seconds = ranks("all fail")
    assert codes == [2, 2] and said == ["error: no luck\n", ""] and seconds < 20


@pytest.mark.slow
def test_a_port_that_is_taken_is_named_in_one_line():
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        code = "from rf_train.engine.collectives import RunError, start_ranks\ntry: start_ranks()\n"
        code += "except RunError as error: print(error)"
        environment = {**os.environ, **rank_environment(0, 2, port)}
        command = [sys.executable, "-c", code]
        said = subprocess.run(command, env=environment, cwd=PROJECT, capture_output=True, text=True, timeout=60).stdout
    assert said.startswith(f"the ranks can't meet at 127.0.0.1:{port} (") and "--master_port" in said
    assert said.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "stop, words",
    [(None, "rank 1 at step 7"), (1, "rank 1 does not answer since step 7"), (0, "does not answer")],
    ids=["both run", "rank 1 stopped", "rank 0 stopped"],
)
def test_a_hang_is_named_and_ended(stop, words):
    codes, said, seconds = ranks("hang", stop, signal.SIGSTOP)
    assert LEFT in codes and seconds < 40
    lines = [line for one in said for line in own(one)]
    assert len(lines) == 1 and "no progress for" in lines[0] and words in lines[0]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["end", "suspended", "slow"])
def test_ranks_that_end_well_are_not_missed(what):
    codes, said, _ = ranks(what)
    assert codes == [0, 0] and not any(map(own, said))


def test_alone_without_a_store_a_rank_says_why_it_fails(capsys):
    Watch().fail("no luck")
    assert capsys.readouterr().err == "no luck\n"
