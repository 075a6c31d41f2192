"""What commands share: help with defaults, exit codes, and one line for whatever went wrong."""

import argparse
import os
import signal
import subprocess
import sys

import pytest

from data_prep.command import Help, counted, require_finite, run_command
from tests.distributed import PROJECT


def fail(error: BaseException):
    def action() -> None:
        raise error

    return action


@pytest.mark.parametrize(
    "error, code, line",
    [
        (ValueError("a\n b"), 2, "error: a b\n"),
        (FileNotFoundError(2, "No such file", "x"), 2, "error: [Errno 2] No such file: 'x'\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_an_error_is_one_line(capsys, error, code, line):
    assert run_command(fail(error)) == code
    assert capsys.readouterr().err == line


def test_sigterm_ends_a_command_that_can_go_on_as_an_interruption_does(capsys):
    before = signal.getsignal(signal.SIGTERM)
    assert run_command(lambda: os.kill(os.getpid(), signal.SIGTERM), "run it again") == 75
    assert capsys.readouterr().err == "stopped by SIGTERM; run it again\n"
    assert run_command(fail(KeyboardInterrupt()), "run it again") == 130
    assert capsys.readouterr().err == "interrupted; run it again\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_counts_have_their_nouns():
    assert [counted(n, "shard") for n in (0, 1, 1000)] == ["0 shards", "1 shard", "1,000 shards"]


def test_success_is_0_and_defects_are_not_hidden():
    assert run_command(lambda: "a result") == 0
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 / 0)


def test_a_reader_that_has_seen_enough_is_no_error():
    code = "from data_prep.command import run_command; run_command(lambda: print('x\\n' * 100_000))"
    command = f'{sys.executable} -c "{code}" | head -n 1'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=PROJECT)
    assert (done.stdout, done.stderr) == ("x\n", "")


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -float("inf"), 1e30])
def test_numbers_that_cannot_be_meant_name_their_option(value):
    require_finite(seconds=1.0)
    with pytest.raises(ValueError, match=r"--gpu-memory .*: expected a number that can be meant"):
        require_finite(gpu_memory=value)


def test_help_tells_the_defaults_that_say_something():
    parser = argparse.ArgumentParser(formatter_class=Help)
    parser.add_argument("--size", default=3, help="how large")
    parser.add_argument("--out", help="where")
    parser.add_argument("--again", action="store_true", help="once more")
    parser.add_argument("--step", default=0, help="which (default: the newest)")
    told = parser.format_help()
    assert "how large (default: 3)" in told and "None" not in told and "False" not in told and "0" not in told
