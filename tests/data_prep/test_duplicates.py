"""Duplicates: the first video of the same bytes stays, whatever the jobs; the others are named, and no failures."""

import json
import shutil

import pytest

from data_prep import survey
from data_prep.card import read_card
from tests.data_prep.encoded import content, failures, run, samples
from tests.data_prep.test_tars import pack
from tests.data_prep.test_video import write

pytestmark = pytest.mark.usefixtures("quick_fit")

DROP = ["--drop-duplicates", "--videos-per-part", "1"]


@pytest.fixture
def videos(tmp_path):
    """c is a again, and d is as long as b and another video; e differs in its last byte only."""
    folder = tmp_path / "videos"
    folder.mkdir()
    a = write(folder / "a.mp4", frames=12, fps=16)
    b = write(folder / "b.avi", frames=7, fps=16, codec="mjpeg", pixels="yuvj420p")
    shutil.copy(a, folder / "c.mp4")
    data = bytearray(b.read_bytes())
    at = data.index(b"Lavf")
    data[at : at + 4] = b"mine"
    (folder / "d.avi").write_bytes(data)
    (folder / "e.mp4").write_bytes(a.read_bytes()[:-1] + b"!")
    return folder


def sources(out):
    return {sample.meta["source"] for sample in samples(out).values()}


def test_the_first_one_stays_and_the_others_are_named(videos, tmp_path, capsys):
    out = tmp_path / "data"
    assert run(videos, out) == 0 and sources(out) == {"a.mp4", "b.avi", "c.mp4", "d.avi", "e.mp4"}
    shutil.rmtree(out)
    assert run(videos, out, *DROP, "--max-failures", "0") == 0
    captured = capsys.readouterr()
    assert sources(out) == {"a.mp4", "b.avi", "d.avi", "e.mp4"}
    (line,) = failures(out)
    assert (line["source"], line["reason"], line["detail"], line["samples"]) == ("c.mp4", "duplicate", "of a.mp4", 0)
    assert "skipped c.mp4: duplicate (of a.mp4)" in captured.err and "skipped: 1 duplicate" in captured.out
    assert read_card(out)["counts"]["skipped"] == {"duplicate": 1}
    assert run(videos, out) == 2
    assert "differs in drop_duplicates (True, now None)" in capsys.readouterr().err


def test_only_files_of_equal_size_are_read(videos, tmp_path, monkeypatch):
    write(videos / "f.mp4", frames=6, fps=16)
    asked, real = [], survey.hashes
    monkeypatch.setattr(survey, "hashes", lambda rows, workers: asked.extend(rows) or real(rows, workers))
    assert run(videos, tmp_path / "data", *DROP) == 0
    assert [row.source for row in asked] == ["a.mp4", "b.avi", "c.mp4", "d.avi", "e.mp4"]
    assert run(videos, tmp_path / "data", *DROP) == 0 and len(asked) == 5


def test_jobs_in_any_order_leave_out_the_same(videos, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "data"
    assert run(videos, whole, *DROP) == 0
    for job in (2, 0, 1):  # job 2 has the duplicate, and comes first
        assert run(videos, out, *DROP, "--job", f"{job}/3") == 0
    assert content(out) == content(whole)


def test_spans_of_one_file_are_no_duplicates_and_the_same_span_twice_is(videos, tmp_path):
    spans = [("a.mp4", 0, 0.4), ("a.mp4", 0.4, 0.8), ("c.mp4", 0.4, 0.8), ("a.mp4", 0, 0.4), ("b.avi", 0, 0.4)]
    entries = [{"video": f"videos/{name}", "start": start, "end": end} for name, start, end in spans]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    out = tmp_path / "data"
    assert run(tmp_path / "list.jsonl", out, *DROP) == 0
    assert [(one["source"], one["detail"]) for one in failures(out)] == [
        ("videos/c.mp4", "of videos/a.mp4"),
        ("videos/a.mp4", "of videos/a.mp4"),
    ]
    assert list(samples(out)) == ["000000_0000", "000001_0000", "000004_0000"]


def test_videos_in_tars(videos, tmp_path):
    data = {path.name: path.read_bytes() for path in videos.iterdir()}
    pack(tmp_path / "tars" / "0.tar", [("x.mp4", data["a.mp4"]), ("y.mp4", data["e.mp4"])])
    pack(tmp_path / "tars" / "1.tar", [("z.mp4", data["c.mp4"])])
    out = tmp_path / "data"
    assert run(tmp_path / "tars", out, *DROP) == 0
    assert [(one["source"], one["detail"]) for one in failures(out)] == [("1.tar/z.mp4", "of 0.tar/x.mp4")]


def test_what_is_mended_later_takes_its_place_before_its_duplicate(videos, tmp_path, capsys):
    """The first one could not be read. So the second stayed, until the first is back."""
    out, whole = tmp_path / "data", tmp_path / "whole"
    assert run(videos, tmp_path / "codec") == 0
    settings = [*DROP, "--codec", f"default:{tmp_path / 'codec'}"]
    (videos / "a.mp4").rename(tmp_path / "away.mp4")
    (videos / "a.mp4").write_bytes(b"no")
    assert run(videos, out, *settings) == 0 and "c.mp4" in sources(out)
    assert [one["source"] for one in failures(out)] == ["a.mp4"]
    (tmp_path / "away.mp4").rename(videos / "a.mp4")
    assert run(videos, out, *settings, "--retry") == 0 and "c.mp4" not in sources(out)
    assert run(videos, whole, *settings) == 0 and content(out) == content(whole)
    capsys.readouterr()
    assert run(videos, out, *settings, "--retry") == 0  # a duplicate is nothing to try again
    assert "nothing failed in the parts that are done" in capsys.readouterr().err


def test_a_file_that_cannot_be_read_is_a_failure(videos, tmp_path, monkeypatch):
    reading = survey.pieces

    def refuse(path):
        if str(path).endswith("c.mp4"):
            raise PermissionError(13, "Permission denied", str(path))
        return reading(path)

    monkeypatch.setattr(survey, "pieces", refuse)
    out = tmp_path / "data"
    assert run(videos, out, *DROP) == 0
    assert [(one["source"], one["reason"], one["detail"]) for one in failures(out)] == [
        ("c.mp4", "unreadable", "Permission denied")
    ]
