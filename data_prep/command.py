"""How every command ends: its exit code, and one line for whatever went wrong."""

import os
import sys
from collections.abc import Callable

UNFORESEEN, BAD_INPUT, INTERRUPTED = 1, 2, 130  # exit codes
GO_ON = 75  # exit code of what was stopped in time: the same command goes on


def run_command(action: Callable[[], object]) -> int:
    """Runs a command. Returns its exit code: 0; 2 after one line that says what is wrong; 130 when interrupted."""
    try:
        action()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
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


def require_finite(**numbers: float) -> None:
    """Raises ValueError that names the option, for a number on the command line that is infinite or not a number."""
    for name, value in numbers.items():
        if not abs(value) < 1e15:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected a number that can be meant")
