"""What a video shows, and when: prompts on the command line, and prompt files."""

import hashlib
import re
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

_TIMED = re.compile(r"(\d+(?:\.\d+)?):(?:\s+(.*))?", re.DOTALL)  # "5: a boat"; a colon without a space is no time


@dataclass(frozen=True)
class Prompts:
    """The prompts of one video, each from a time on: `times` in seconds, ascending, the first 0."""

    times: tuple[float, ...]
    texts: tuple[str, ...]

    @classmethod
    def of(cls, written: str | list[str]) -> "Prompts":
        """From one prompt without a time, or from several like "0: a boat" and "5: a storm", or "0: a boat | 5: ...".

        Raises a one-line ValueError for several prompts without times, and for times that don't ascend from 0.
        """
        written = [written] if isinstance(written, str) else written or [""]
        for one in written:
            check_text("--prompt", one)
        parts = written[0].split(" | ")
        if len(written) == 1 and len(parts) > 1 and _TIMED.fullmatch(parts[0].strip()):
            written = parts
        found = [_TIMED.fullmatch(one.strip()) for one in written]
        if len(written) == 1 and found[0] is None:
            return cls((0.0,), (written[0],))
        for one, match in zip(written, found):
            if match is None:
                raise ValueError(f'--prompt "{one}": one of several prompts, so give its time: "SECONDS: {one}"')
        times = tuple(float(match[1]) for match in found if match)
        if times[0] != 0 or any(a >= b for a, b in pairwise(times)):
            raise ValueError(f"--prompt: the times {', '.join(f'{t:g}' for t in times)} must begin with 0 and ascend")
        return cls(times, tuple(match[2] or "" for match in found if match))

    @classmethod
    def of_line(cls, line: str) -> "Prompts":
        """From a line of a prompt file: one prompt, or several like "0: a boat | 5: a storm".

        Raises a one-line ValueError when the first has a time and another one has none, and as `of` does.
        """
        timed = " | " in line and _TIMED.fullmatch(line.split(" | ")[0].strip())
        return cls.of(line) if timed else cls((0.0,), (line,))

    def check_shown(self, begins: Callable[[int], float], first: int, count: int) -> None:
        """Raises a one-line ValueError that names a prompt which a video never shows.

        A prompt holds from the first chunk that begins at its time or later. Chunk i of `count` begins at `begins(i)`
        seconds; those from number `first` on are generated.
        """
        starts = [max(first, bisect_left(range(count), time, key=begins)) if time else 0 for time in self.times]
        for number, (start, after) in enumerate(zip(starts, [*starts[1:], count])):
            written = f'the prompt "{self.times[number]:g}: {self.texts[number]}"'
            if start >= count:
                last = f"the last chunk of the video begins at {begins(count - 1):.4g} s"
                raise ValueError(f"{written} is never shown: {last}; leave it out, or make a longer video")
            if start >= after:
                until = f"no generated chunk begins between {self.times[number]:g} and {self.times[number + 1]:g} s"
                raise ValueError(f"{written} is never shown: {until}; leave it out, or choose other times")

    def at(self, seconds: float) -> int:
        """The number of the prompt at this time."""
        return max(n for n, time in enumerate(self.times) if time <= max(0.0, seconds))


def check_text(name: str, text: str) -> None:
    """Raises ValueError for bytes on the command line that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} {text!r}: not UTF-8 text") from None


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a text file, one per line, see `Prompts.of_line`. Empty lines and those with # first are left out.

    Raises a one-line ValueError for a file that is not UTF-8, has no prompts, or has one twice.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")  # not splitlines: a prompt may have U+2028
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text") from None
    found: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        prompt = line.strip()
        if not prompt or prompt.startswith("#"):
            continue
        if prompt in found:
            again = f"line {number} repeats line {found[prompt]}; for several videos of a prompt give --samples N"
            raise ValueError(f"{path}: {again}")
        try:
            Prompts.of_line(prompt)
        except ValueError as error:
            raise ValueError(f"{path}: line {number}: {error}") from None
        found[prompt] = number
    if not found:
        raise ValueError(f"{path}: no prompts, expected one per line")
    return list(found)


def seed_of(seed: int, prompt: str, sample: int) -> int:
    """The seed of video `sample` of a prompt: it depends on these three only, not on the file that the prompt is in."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{prompt}\0{sample}".encode()).digest()[:4], "little")
