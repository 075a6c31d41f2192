"""What to encode: a folder or a manifest, as a list of videos (`Row`)."""

import csv
import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = frozenset(
    ".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .mts .m2ts .wmv .flv .ogv .3gp .gif".split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Row:
    """One video of the source: its position, file, name in the dataset, caption, and span in seconds."""

    index: int
    path: Path
    source: str
    caption: str
    start: float = 0.0
    end: float | None = None
    problem: str = ""  # why it cannot be used, if that is known already


def list_source(src: str | Path) -> list[Row]:
    """The rows of a folder or manifest, in order. Raises ValueError if it is missing, empty or malformed."""
    src = Path(src)
    if src.is_dir():
        named = {path.relative_to(src).as_posix(): path for path in _videos(src)}
        rows = [_folder_row(index, named[name], name) for index, name in enumerate(sorted(named))]
    elif not src.exists():
        raise ValueError(f"{src}: no such folder or manifest")
    elif src.suffix.lower() in (".jsonl", ".csv"):
        rows = [_manifest_row(src, index, line, entry) for index, (line, entry) in enumerate(_manifest(src))]
    else:
        raise ValueError(f"{src}: expected a folder of videos or a .jsonl or .csv manifest")
    if not rows:
        raise ValueError(f"{src}: no videos in it")
    return rows


def fingerprints(rows: list[Row]) -> dict[str, str]:
    """SHA-256, in hexadecimal, of a source: its videos' names, captions and spans; and the sizes of their files."""
    source, sizes = hashlib.sha256(), hashlib.sha256()
    for row in rows:
        source.update(json.dumps([row.source, row.caption, row.start, row.end]).encode())
        sizes.update(f"{_size(row.path)} ".encode())
    return {"source": source.hexdigest(), "source_sizes": sizes.hexdigest()}


def _size(path: Path) -> int | None:
    """Bytes of a file, None if there is none or it can't be known."""
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None


def _videos(folder: Path) -> Iterator[Path]:
    """The files with a video's suffix in a folder and below. Raises ValueError for a folder that can't be listed."""

    def refuse(error: OSError) -> None:
        raise ValueError(f"{error.filename}: cannot be listed ({error.strerror}); make it readable, or take it away")

    for place, _, names in os.walk(folder, onerror=refuse):
        paths = [Path(place, name) for name in names]
        yield from (path for path in paths if path.suffix.lower() in SUFFIXES and not path.is_dir())


def _folder_row(index: int, path: Path, name: str) -> Row:
    """A video of a folder, with the caption in the .txt file of the same name."""
    text, caption, problem = path.with_suffix(".txt"), "", ""
    try:
        if text.is_file():
            caption = " ".join(text.read_text(encoding="utf-8", errors="replace").split())
    except OSError as error:
        problem = f"its caption: {error.strerror}"
    return Row(index, path, as_utf8(name), caption, problem=problem)


def as_utf8(text: str) -> str:
    """`text` with escapes for what UTF-8 can't hold, such as the bytes of a file name in another encoding."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half of a surrogate pair, from a manifest
        return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _manifest(path: Path) -> Iterator[tuple[int, object]]:
    """(line number, entry) of each entry of a JSONL or CSV file."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        try:
            if path.suffix.lower() == ".csv":
                reader = csv.DictReader(file)
                for entry in reader:
                    yield reader.line_num, entry
            else:
                for line, text in enumerate(file, start=1):
                    if text.strip():
                        yield line, json.loads(text)
        except (csv.Error, ValueError, RecursionError) as error:
            raise ValueError(f"{path}: does not parse ({error})") from None


def _manifest_row(manifest: Path, index: int, line: int, entry: object) -> Row:
    video = entry.get("video") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not isinstance(video, str) or not video:
        raise ValueError(f"{manifest} line {line}: no 'video'")
    seconds: dict[str, float | None] = {}
    for key in ("start", "end"):
        value = entry.get(key)
        try:
            seconds[key] = None if value is None or value == "" else float(value)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"{manifest} line {line}: {key} {value!r} is not a number of seconds") from None
    start, end = seconds["start"] or 0.0, seconds["end"]
    if not (0 <= start < math.inf and (end is None or start < end < math.inf)):
        raise ValueError(f"{manifest} line {line}: need 0 <= start < end, got {start} and {end}")
    caption = as_utf8(" ".join(str(entry.get("caption") or "").split()))
    return Row(index, manifest.parent / video, as_utf8(video), caption, start, end)
