"""What all commands share: help with defaults, their exit codes, and one line for whatever went wrong."""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable

UNFORESEEN, BAD_INPUT, INTERRUPTED = 1, 2, 130  # exit codes
GO_ON = 75  # exit code of what was stopped in time: the same command goes on
GOES_ON = "the same command goes on where it stopped"


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help that ends with an option's default, where it has one and does not speak of it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_none = action.default in (None, "") or isinstance(action.default, bool | list)
        if has_none or "default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class Terminated(KeyboardInterrupt):
    """SIGTERM, as a batch system sends it before it kills."""


def run_command(action: Callable[[], object], go_on: str = "") -> int:
    """Runs a command. Returns its exit code: 0; 2 after one line that says what is wrong; 130 when interrupted.

    `go_on`: how to go on after that. With it, SIGTERM is taken as an interruption, too, and the code is 75.
    """

    def stop(number: int, frame: object) -> None:
        raise Terminated

    on_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if go_on and on_main_thread else None
    try:
        return _run(action, f"; {go_on}" if go_on else "")
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _run(action: Callable[[], object], go_on: str) -> int:
    try:
        action()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt as error:
        stopped = isinstance(error, Terminated)
        print(f"{'stopped by SIGTERM' if stopped else 'interrupted'}{go_on}", file=sys.stderr)
        return GO_ON if stopped else INTERRUPTED
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return BAD_INPUT
    return 0


def one_line(error: BaseException) -> str:
    """What an error says, in one line that is safe to print."""
    return printable(" ".join(str(error).split()))


def printable(text: str) -> str:
    """`text` with escapes for what a terminal would obey or can't show, such as control characters in a file's name."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def counted(count: int, thing: str) -> str:
    """A count with its noun, such as "1 shard" and "1,000 shards"."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def require_finite(**numbers: float) -> None:
    """Raises ValueError that names the option, for a number on the command line that is infinite or not a number."""
    for name, value in numbers.items():
        if not abs(value) < 1e15:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected a number that can be meant")
