"""What to encode: a folder, a manifest, or webdataset shards of videos, as a list of videos (`Row`)."""

import csv
import difflib
import hashlib
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from webdataset.shardlists import expand_urls

from data_prep.command import printable
from data_prep.tars import Member, Region, tar_members
from data_prep.video import Problem

SUFFIXES = frozenset(
    ".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .mts .m2ts .wmv .flv .ogv .3gp .gif".split()  # noqa: SIM905
)
MANIFESTS = (".jsonl", ".csv", ".parquet")
COLUMNS = ("video", "caption", "captions", "start", "end", "cuts")  # of a manifest
DUPLICATE = "duplicate"  # the reason of a video that is left out since another one has the same content
LARGEST_TEXT = 1 << 20  # bytes of a caption or JSON in a tar


@dataclass(frozen=True)
class Row:
    """One video of the source: its position, file, name in the dataset, first caption, and span in seconds."""

    index: int
    path: Path
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
        """What `read_frames` reads."""
        return Region(self.path, *self.region) if self.region else self.path

    @property
    def trouble(self) -> Problem | None:
        """Why the video can't be used, if that is known already."""
        return Problem(self.reason or "unreadable", self.problem) if self.reason or self.problem else None


def list_source(src: str | Path) -> list[Row]:
    """The rows of a folder, a manifest or shards, in order. Raises ValueError if it is missing, empty or malformed."""
    text, src = str(src), Path(src)
    if src.is_dir():
        named = {path.relative_to(src).as_posix(): path for path in _files(src, SUFFIXES)}
        rows = [_folder_row(index, named[name], name) for index, name in enumerate(sorted(named))]
        tars = sorted(_files(src, {".tar"}))
        if rows and tars:
            print(f"{src}: its .tar files ({len(tars)}) are not read, since there are videos", file=sys.stderr)
        rows = rows or _rows_of_tars(tars, src)
    elif src.suffix.lower() == ".tar" and src.exists():
        rows = _rows_of_tars([src], src.parent)
    elif not src.exists() and (src.suffix == ".tar" or "{" in text or "::" in text or _is_address(text)):
        tars = _expand(text)
        rows = _rows_of_tars(tars, Path(os.path.commonpath([path.parent for path in tars])))
    elif not src.exists():
        raise ValueError(f"{src}: no such folder or manifest")
    elif src.suffix.lower() in MANIFESTS:
        rows = _rows_of_manifest(src)
    else:
        raise ValueError(
            f"{src}: expected a folder of videos or .tar files, a manifest ({', '.join(MANIFESTS)}), or a .tar file"
        )
    if not rows:
        raise ValueError(f"{text}: no videos in it")
    return rows


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
    try:
        return row.path.stat().st_size if row.path.is_file() else None
    except OSError:
        return None


def _files(folder: Path, suffixes: frozenset[str] | set[str]) -> Iterator[Path]:
    """The files with such a suffix in a folder and below. Raises ValueError for a folder that can't be listed."""

    def refuse(error: OSError) -> None:
        raise ValueError(f"{error.filename}: cannot be listed ({error.strerror}); make it readable, or take it away")

    for place, _, names in os.walk(folder, onerror=refuse):
        paths = [Path(place, name) for name in names]
        yield from (path for path in paths if path.suffix.lower() in suffixes and not path.is_dir())


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


def _rows_of_manifest(path: Path) -> list[Row]:
    """The rows of a manifest, in order. Keys that are not read are named on the terminal."""
    rows: list[Row] = []
    unknown: dict[str, int] = {}  # the first line of each
    for line, entry in _manifest(path, unknown):
        rows.append(_manifest_row(path, len(rows), line, entry))
        for key in entry if isinstance(entry, dict) else ():
            if key not in COLUMNS:
                unknown.setdefault("cells behind the last column" if key is None else str(key), line)
    if unknown:
        named = []
        for key, line in list(unknown.items())[:10]:
            near = difflib.get_close_matches(key.lower(), COLUMNS, 1)
            named.append(f"{key!r} (line {line}{f', {near[0]!r} is meant?' if near else ''})")
        more = f" and {len(unknown) - len(named)} more" if len(unknown) > len(named) else ""
        keys = ", ".join(COLUMNS)
        print(printable(f"{path}: not read are {', '.join(named)}{more}; the keys are {keys}"), file=sys.stderr)
    return rows


def _manifest(path: Path, unknown: dict[str, int]) -> Iterator[tuple[int, object]]:
    """(line number, entry) of each entry of a JSONL, CSV or Parquet file. Notes columns of Parquet that aren't read."""
    if path.suffix.lower() == ".parquet":
        yield from enumerate(_parquet(path, unknown), start=1)
        return
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


def _parquet(path: Path, unknown: dict[str, int]) -> Iterator[dict]:
    """The rows of a Parquet file, with the columns of a manifest only. Raises ValueError without pyarrow."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: reading it needs pyarrow: pip install pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = [name for name in COLUMNS if name in file.schema_arrow.names]
            unknown.update((name, 1) for name in file.schema_arrow.names if name not in COLUMNS)
            if "video" not in columns:
                raise ValueError(f"no column 'video'; it has: {', '.join(file.schema_arrow.names) or 'none'}")
            for batch in file.iter_batches(columns=columns):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        raise ValueError(f"{path}: does not parse ({error})") from None


def _manifest_row(manifest: Path, index: int, line: int, entry: object) -> Row:
    video = entry.get("video") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not isinstance(video, str) or not video:
        has = f"; it has: {', '.join(map(str, entry))[:200]}" if isinstance(entry, dict) and entry else ""
        raise ValueError(f"{manifest} line {line}: no 'video'{has}")
    try:
        captions, (start, end), cuts = _captions("", entry), _span(entry), _cuts(entry)
    except ValueError as error:
        raise ValueError(f"{manifest} line {line}: {error}") from None
    several = captions[1:] and captions
    path = manifest.parent / video
    return Row(index, path, as_utf8(video), captions[0], start, end, captions=several, cuts=cuts)


def _captions(first: str, entry: dict) -> tuple[str, ...]:
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


def _span(entry: dict) -> tuple[float, float | None]:
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


def _cuts(entry: dict) -> tuple[float, ...]:
    """The "cuts" of an entry, in seconds, in order. Raises ValueError unless they are a list of finite numbers."""
    cuts = entry.get("cuts") or []
    numbers = isinstance(cuts, list) and all(isinstance(cut, (int, float)) and 0 <= cut < 1e9 for cut in cuts)
    if not numbers or any(isinstance(cut, bool) for cut in cuts):
        raise ValueError(f"cuts {str(cuts)[:100]!r} is not a list of seconds")
    return tuple(sorted({float(cut) for cut in cuts}))


# ---- webdataset shards


def _is_address(text: str) -> bool:
    """Whether webdataset would take `text` for a command or an address elsewhere."""
    return text.startswith("pipe:") or re.match(r"[a-z][a-z0-9+.-]*:/", text, re.IGNORECASE) is not None


def _expand(pattern: str) -> list[Path]:
    """The .tar files of a pattern in webdataset's notation. Raises ValueError unless all exist."""
    try:
        names = expand_urls(pattern)
    except (ValueError, AssertionError) as error:  # unbalanced braces; a variable of the environment that isn't set
        raise ValueError(f"{pattern}: not a pattern of .tar files ({error})") from None
    for name in names:
        if _is_address(name):
            raise ValueError(f"{name}: shards of raw video must be files here; remote ones and pipes are not supported")
    missing = [name for name in names if not os.path.isfile(name)]
    if missing or not names:
        more = f", nor are {len(missing) - 1} others of {len(names)}" if len(missing) > 1 else ""
        raise ValueError(f"{missing[0] if missing else pattern}: no such .tar file{more}")
    for name in names:
        if not name.lower().endswith(".tar"):
            raise ValueError(f"{name}: expected .tar files only")
    twice = [name for name, count in Counter(map(os.path.normpath, names)).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]}: {pattern} names it twice")
    return [Path(name) for name in names]


def _rows_of_tars(tars: list[Path], base: Path) -> list[Row]:
    """The rows of shards, in order, named `shard.tar/KEY.mp4` with the shard's path from `base` on."""
    found = [row for path in tars for row in _rows_of_tar(path, path.relative_to(base).as_posix())]
    return [replace(row, index=index) for index, row in enumerate(found)]


def _rows_of_tar(path: Path, shard: str) -> Iterator[Row]:
    """The rows of one shard, numbered 0. If the shard is cut short or damaged, the last row says so.

    Then the last sample before the damage is not used: its caption may be behind.
    """
    try:
        members = list(tar_members(path))
        counts = Counter(member.name for member in members)
        named = {member.name: member for member in members}  # the last of a name, as for tar
        unsure = os.path.splitext(members[-2].name)[0] if len(members) > 1 and not members[-1].name else None
        with open(path, "rb") as file:
            for name, member in named.items():
                key, suffix = os.path.splitext(name)
                if not name:
                    yield Row(0, path, as_utf8(shard), "", problem=member.problem)
                elif suffix.lower() in SUFFIXES:
                    beside = [named[key + end] for end in (".txt", ".json") if key + end in named]
                    start, end, problem = 0.0, None, ""
                    captions: tuple[str, ...] = ("",)
                    cuts: tuple[float, ...] = ()
                    try:
                        for one in (member, *beside):
                            if one.problem or counts[one.name] > 1:
                                what = "" if one is member else f"{one.name[len(key) :]}: "
                                raise ValueError(what + (one.problem or "the tar holds it twice"))
                        if key == unsure:
                            raise ValueError("cut short: behind it the tar ends or is damaged")
                        captions, start, end, cuts = _annotation(file.fileno(), beside)
                    except ValueError as error:
                        problem = str(error)
                    several, region = captions[1:] and captions, (member.offset, member.size)
                    yield Row(
                        0, path, as_utf8(f"{shard}/{name}"), captions[0], start, end, problem, several, region, cuts
                    )
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None


def _annotation(file: int, members: list[Member]) -> tuple[tuple[str, ...], float, float | None, tuple[float, ...]]:
    """(captions, start, end, cuts) from a sample's .txt and .json. Raises ValueError if they make no sense."""
    text, entry = "", {}
    for member in members:
        suffix = os.path.splitext(member.name)[1]
        if member.size > LARGEST_TEXT:
            raise ValueError(f"{suffix}: {member.size} bytes are too many, at most {LARGEST_TEXT}")
        data = os.pread(file, member.size, member.offset)
        if suffix == ".txt":
            text = data.decode(errors="replace")
            continue
        try:
            entry = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{suffix}: does not parse ({error})") from None
        if not isinstance(entry, dict):
            raise ValueError(f"{suffix}: not an object")
    first = text.strip() or entry.get("caption") or entry.get("text") or ""
    return _captions(str(first), entry), *_span(entry), _cuts(entry)
