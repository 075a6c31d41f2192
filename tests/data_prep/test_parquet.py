"""Parquet manifests: the rows that JSONL gives, and one line for what is wrong."""

import json
import sys

import pytest

from data_prep.rows import fingerprints
from data_prep.sources import list_source

ENTRIES = [
    {"video": "a.mp4", "caption": "one  two", "start": 0.5, "end": 1.5, "captions": ["x", "y"]},
    {"video": "b/ü.mp4", "caption": None, "start": None, "end": None, "captions": None},
]


@pytest.fixture
def parquet():
    return pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")


def table(entries):
    import pyarrow

    return pyarrow.Table.from_pylist(entries)


def test_without_pyarrow_one_line_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet", raising=False)
    with pytest.raises(ValueError, match="pip install pyarrow"):
        list_source(tmp_path / "a.parquet")


def test_the_rows_are_those_of_jsonl(parquet, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in ENTRIES))
    parquet.write_table(table(ENTRIES), tmp_path / "a.parquet")
    rows = list_source(tmp_path / "a.parquet")
    assert rows == list_source(tmp_path / "a.jsonl")
    assert (rows[0].caption, rows[0].start, rows[0].end) == ("one two", 0.5, 1.5)
    assert fingerprints(rows) == fingerprints(list_source(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    "entries, says",
    [
        ([{"path": "a.mp4"}], "no column 'video'"),
        ([{"video": "a.mp4"}, {"video": None}], "line 2: no 'video'"),
        ([{"video": "a.mp4", "start": 3.0, "end": 2.0}], "line 1: need 0 <= start < end"),
        ([{"video": "a.mp4", "start": float("nan")}], "line 1: need 0 <= start < end"),
        ([], "no column 'video'"),
    ],
)
def test_bad_rows_are_one_line(parquet, tmp_path, entries, says):
    parquet.write_table(table(entries), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=says) as error:
        list_source(tmp_path / "a.parquet")
    assert "\n" not in str(error.value)


def test_a_damaged_file_is_one_line(parquet, tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(table(ENTRIES), path)
    data = path.read_bytes()
    for damaged in (b"", b"no", data[: len(data) // 2], data[:10] + b"\xff" * 60 + data[70:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="does not parse"):
            list_source(path)
