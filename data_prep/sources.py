"""What to encode: a folder, a manifest, or webdataset shards of videos, as a list of videos (`Row`)."""

import csv
import difflib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from data_prep.command import printable
from data_prep.rows import SUFFIXES, Row, as_utf8, captions_of, cuts_of, span_in
from data_prep.tar_sources import expand, is_address, rows_of_tars

MANIFESTS = (".jsonl", ".csv", ".parquet")
COLUMNS = ("video", "caption", "captions", "start", "end", "cuts")  # of a manifest


def list_source(src: str | Path, listings: Path | None = None) -> list[Row]:
    """The rows of a folder, a manifest or shards, in order.

    `listings`: the folder that keeps what is in remote shards. Raises ValueError if the source is missing, empty or
    malformed.
    """
    text, src = str(src), Path(src)
    if src.is_dir():
        named = {path.relative_to(src).as_posix(): path for path in _files(src, SUFFIXES)}
        rows = [_folder_row(index, named[name], name) for index, name in enumerate(sorted(named))]
        tars = sorted(_files(src, {".tar"}))
        if rows and tars:
            print(f"{src}: its .tar files ({len(tars)}) are not read, since there are videos", file=sys.stderr)
        rows = rows or rows_of_tars(tars, src)
    elif src.suffix.lower() == ".tar" and src.exists():
        rows = rows_of_tars([src], src.parent)
    elif not src.exists() and (src.suffix == ".tar" or "{" in text or "::" in text or is_address(text)):
        rows = rows_of_tars(expand(text), None, listings)
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
        captions, (start, end), cuts = captions_of("", entry), span_in(entry), cuts_of(entry)
    except ValueError as error:
        raise ValueError(f"{manifest} line {line}: {error}") from None
    several = captions[1:] and captions
    path = manifest.parent / video
    return Row(index, path, as_utf8(video), captions[0], start, end, captions=several, cuts=cuts)
