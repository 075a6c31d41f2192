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


def list_source(src: str | Path) -> list[Row]:
    """The rows of a folder or manifest, in order. Raises ValueError if it is missing, empty or malformed."""
    src = Path(src)
    if src.is_dir():
        named = {path.relative_to(src).as_posix(): path for path in src.rglob("*") if path.suffix.lower() in SUFFIXES}
        files = [(name, named[name]) for name in sorted(named) if named[name].is_file()]
        rows = [Row(index, path, name, _caption_beside(path)) for index, (name, path) in enumerate(files)]
    elif not src.exists():
        raise ValueError(f"{src}: no such folder or manifest")
    elif src.suffix.lower() in (".jsonl", ".csv"):
        rows = [_manifest_row(src, index, line, entry) for index, (line, entry) in enumerate(_manifest(src))]
    else:
        raise ValueError(f"{src}: expected a folder of videos or a .jsonl or .csv manifest")
    if not rows:
        raise ValueError(f"{src}: no videos in it")
    return rows


def fingerprint(rows: list[Row]) -> str:
    """SHA-256, in hexadecimal, of a source: the names, captions, spans and file sizes of its videos."""
    digest = hashlib.sha256()
    for row in rows:
        size = os.path.getsize(row.path) if row.path.is_file() else None
        digest.update(json.dumps([row.source, row.caption, row.start, row.end, size]).encode())
    return digest.hexdigest()


def _caption_beside(path: Path) -> str:
    text = path.with_suffix(".txt")
    return " ".join(text.read_text(encoding="utf-8", errors="replace").split()) if text.is_file() else ""


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
        except (csv.Error, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
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
        except (TypeError, ValueError):
            raise ValueError(f"{manifest} line {line}: {key} {value!r} is not a number of seconds") from None
    start, end = seconds["start"] or 0.0, seconds["end"]
    if not (0 <= start < math.inf and (end is None or start < end < math.inf)):
        raise ValueError(f"{manifest} line {line}: need 0 <= start < end, got {start} and {end}")
    caption = " ".join(str(entry.get("caption") or "").split())
    return Row(index, manifest.parent / video, video, caption, start, end)
