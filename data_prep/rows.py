"""A video to encode (`Row`), and what a source may say of one: captions, span, cuts."""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

from data_prep.places import Place, Remote
from data_prep.tars import Region, video_at
from data_prep.video import Problem

SUFFIXES = frozenset(
    ".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .mts .m2ts .wmv .flv .ogv .3gp .gif".split()  # noqa: SIM905
)
DUPLICATE = "duplicate"  # the reason of a video that is left out since another one has the same content


@dataclass(frozen=True)
class Row:
    """One video of the source: its position, file, name in the dataset, first caption, and span in seconds."""

    index: int
    path: Place
    source: str
    caption: str
    start: float = 0.0
    end: float | None = None
    problem: str = ""  # why it cannot be used, if that is known already
    captions: tuple[str, ...] = ()  # all of them, if there are several
    region: tuple[int, int] | None = None  # (offset, size) of the video in the file; None: it is the whole file
    cuts: tuple[float, ...] = ()  # seconds at which a scene begins, as the source says
    size: tuple[int, int] | None = None  # (height, width) of its bucket in pixels, if there are buckets
    reason: str = ""  # of the problem, where it is not "unreadable"

    @property
    def video(self) -> Path | Region:
        """Where its bytes are."""
        return video_at(self.path, self.region)

    @property
    def trouble(self) -> Problem | None:
        """Why the video can't be used, if that is known already."""
        return Problem(self.reason or "unreadable", self.problem) if self.reason or self.problem else None


def fingerprints(rows: list[Row]) -> dict[str, str]:
    """SHA-256, in hexadecimal, of a source: its videos' names, captions and spans; and the sizes of their files."""
    source, sizes = hashlib.sha256(), hashlib.sha256()
    for row in rows:
        cuts = [{"cuts": row.cuts}] if row.cuts else []
        source.update(json.dumps([row.source, row.caption, row.start, row.end, *row.captions, *cuts]).encode())
        sizes.update(f"{bytes_of(row)} ".encode())
    return {"source": source.hexdigest(), "source_sizes": sizes.hexdigest()}


def bytes_of(row: Row) -> int | None:
    """Bytes of a video's file, None if there is none or it can't be known."""
    if row.region:
        return row.region[1]
    if isinstance(row.path, Remote):
        return None
    try:
        return row.path.stat().st_size if row.path.is_file() else None
    except OSError:
        return None


def as_utf8(text: str) -> str:
    """`text` with escapes for what UTF-8 can't hold, such as the bytes of a file name in another encoding."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half of a surrogate pair, from a manifest
        return text.encode("utf-8", "backslashreplace").decode("utf-8")


def captions_of(first: str, entry: dict) -> tuple[str, ...]:
    """The captions of an entry, each once: `first` or its "caption", and its "captions". "" alone if it has none.

    Raises ValueError unless "captions" is a list of texts.
    """
    more = entry.get("captions") or []
    if not isinstance(more, list) or not all(isinstance(caption, str) for caption in more):
        raise ValueError(f"captions {str(more)[:100]!r} is not a list of texts")
    own = entry.get("caption") or ""
    if isinstance(own, list | dict):
        raise ValueError(f"caption {str(own)[:100]!r} is not a text; several go under 'captions'")
    tidy = [as_utf8(" ".join(str(caption).split())) for caption in (first or own, *more)]
    return tuple(dict.fromkeys(filter(None, tidy))) or ("",)


def span_in(entry: dict) -> tuple[float, float | None]:
    """`start` and `end` of an entry, in seconds. Raises ValueError unless 0 <= start < end."""
    seconds: dict[str, float | None] = {}
    for key in ("start", "end"):
        value = entry.get(key)
        try:
            seconds[key] = None if value is None or value == "" else float(value)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"{key} {str(value)[:100]!r} is not a number of seconds") from None
    start, end = seconds["start"] or 0.0, seconds["end"]
    if not (0 <= start < math.inf and (end is None or start < end < math.inf)):
        raise ValueError(f"need 0 <= start < end, got {start} and {end}")
    return start, end


def cuts_of(entry: dict) -> tuple[float, ...]:
    """The "cuts" of an entry, in seconds, in order. Raises ValueError unless they are a list of finite numbers."""
    cuts = entry.get("cuts") or []
    numbers = isinstance(cuts, list) and all(isinstance(cut, (int, float)) and 0 <= cut < 1e9 for cut in cuts)
    if not numbers or any(isinstance(cut, bool) for cut in cuts):
        raise ValueError(f"cuts {str(cuts)[:100]!r} is not a list of seconds")
    return tuple(sorted({float(cut) for cut in cuts}))
