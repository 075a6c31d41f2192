"""Shards of raw video: read where they lie, and every damage named."""

import io
import json
import os
import tarfile
import time

import numpy as np
import pytest

from data_prep import default_codec
from data_prep.rows import fingerprints
from data_prep.sources import list_source
from data_prep.tars import Region, tar_members
from data_prep.video import VideoError, read_frames
from tests.data_prep.encoded import failures, run, samples
from tests.data_prep.test_video import write


@pytest.fixture(autouse=True)
def quick_fit(monkeypatch):
    monkeypatch.setattr(default_codec, "STEPS", 5)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """The bytes of a video of 12 frames, index in front."""
    path = tmp_path_factory.mktemp("video") / "a.mp4"
    return write(path, frames=12, fps=16).read_bytes()


def pack(path, members, format=tarfile.PAX_FORMAT):
    """A tar of (name, bytes) or whole TarInfos."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))
    return path


def link(name, to, kind):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return info


def problems(path):
    return {row.source: row.problem for row in list_source(path)}


def test_shards_make_the_samples_that_files_make(video, tmp_path, capsys):
    files = tmp_path / "files"
    files.mkdir()
    for name, caption in (("a", "one"), ("b", "two  three"), ("c", "")):
        (files / f"{name}.mp4").write_bytes(video)
        (files / f"{name}.txt").write_text(caption)
    (files / "bad.mp4").write_bytes(b"no")
    shards = tmp_path / "shards"
    pack(shards / "0.tar", [("a.mp4", video), ("a.txt", b"one"), ("b.txt", b"two\n three"), ("b.mp4", video)])
    pack(shards / "1.tar", [("bad.mp4", b"no"), ("c.mp4", video)])
    assert run(files, tmp_path / "from_files") == 0
    assert run(shards, tmp_path / "from_shards") == 0
    assert "skipped 1.tar/bad.mp4: not a video" in capsys.readouterr().err
    assert [one["source"] for one in failures(tmp_path / "from_shards")] == ["1.tar/bad.mp4"]
    wanted, found = samples(tmp_path / "from_files"), samples(tmp_path / "from_shards")
    assert [meta["source"] for _, _, meta in found.values()] == [
        f"{name}.mp4" for name in ("0.tar/a", "0.tar/a", "0.tar/b", "0.tar/b", "1.tar/c", "1.tar/c")
    ]
    assert [meta["caption"] for _, _, meta in found.values()] == ["one"] * 2 + ["two three"] * 2 + [""] * 2
    # The codec is fitted on other random clips: the frames are compared below.
    assert [meta["start"] for _, _, meta in found.values()] == [meta["start"] for _, _, meta in wanted.values()]


def test_a_region_reads_as_its_file_does(video, tmp_path):
    path = pack(tmp_path / "a.tar", [("x.txt", b"x" * 1000), ("a.mp4", video), ("y.txt", b"y")])
    (tmp_path / "a.mp4").write_bytes(video)
    row = list_source(path)[0]
    frames = list(read_frames(Region(row.path, *row.region), 16, (32, 48), 0.2))
    assert np.array_equal(frames, list(read_frames(tmp_path / "a.mp4", 16, (32, 48), 0.2)))
    file = Region(row.path, *row.region).open()
    assert (file.read(), file.read(1), file.seek(-4, os.SEEK_END), file.read()) == (
        video,
        b"",
        len(video) - 4,
        video[-4:],
    )


def test_ffmpeg_opens_no_file_for_a_region(tmp_path, monkeypatch):
    """A playlist in a tar that names a file on this machine."""
    write(tmp_path / "a.mp4", frames=12, fps=16)
    monkeypatch.chdir(tmp_path)
    row = list_source(pack(tmp_path / "a.tar", [("a.mp4", b"ffconcat version 1.0\nfile a.mp4\n")]))[0]
    with pytest.raises(VideoError):
        list(read_frames(Region(row.path, *row.region), 16))


def test_patterns_single_shards_and_folders_below(video, tmp_path, monkeypatch):
    for number in range(3):
        pack(tmp_path / "in" / "more" / f"{number:03d}.tar", [("k.mp4", video), ("k.json", b'{"text": "t"}')])
    monkeypatch.chdir(tmp_path)
    names = [f"{number:03d}.tar/k.mp4" for number in range(3)]
    assert [row.source for row in list_source("in/more/{000..002}.tar")] == names
    assert [row.source for row in list_source("in")] == [f"more/{name}" for name in names]
    assert [row.source for row in list_source("in/more/001.tar")] == names[1:2]
    rows = list_source("in/more/000.tar::in/more/002.tar")
    assert [(row.index, row.source, row.caption) for row in rows] == [(0, names[0], "t"), (1, names[2], "t")]


@pytest.mark.parametrize(
    "source, says",
    [
        ("{000..002}.tar", "001.tar: no such .tar file, nor are 1 others of 3"),
        ("none.tar", "no such .tar file"),
        ("{000,000}.tar", "names it twice"),
        ("{000.tar", "not a pattern"),
        ("${WDS_NONE}/{0..1}.tar", "not a pattern"),
        ("{000.tar,a.mp4}", "expected .tar files only"),
        ("pipe:cat 000.tar", "runs a command is refused"),
        ("https://me:secret@host/{000..002}.tar", "holds a name or password"),
        ("000.tar::ftp://host/a.tar", "ftp:// is not read"),
        ("text.tar", "not a plain tar file"),
        ("zip.tar", "not a plain tar file"),
        ("nothing.tar", "not a plain tar file"),
        ("captions.tar", "no videos in it"),
    ],
)
def test_bad_shards_are_one_line(video, tmp_path, monkeypatch, capsys, source, says):
    pack(tmp_path / "000.tar", [("a.mp4", video)])
    pack(tmp_path / "captions.tar", [("a.txt", b"no video")])
    (tmp_path / "a.mp4").write_bytes(video)
    (tmp_path / "text.tar").write_text("a text\n" * 1000)
    (tmp_path / "nothing.tar").write_bytes(b"")
    with tarfile.open(tmp_path / "zip.tar", "w:gz"):
        pass
    monkeypatch.chdir(tmp_path)
    assert run(source, tmp_path / "data") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and says in error and error.count("\n") == 1
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_and_names_with_dots(video, tmp_path, format):
    name = "long/" * 60 + "a.b.c"
    path = pack(tmp_path / "a.tar", [(f"./{name}.MP4", video), (f"./{name}.txt", b"found")], format)
    row = list_source(path)[0]
    assert (row.source, row.caption, row.problem) == (f"a.tar/{name}.MP4", "found", "")
    assert row.region and Region(path, *row.region).open().read() == video


def test_what_is_wrong_with_a_sample_is_its_own_failure(video, tmp_path):
    path = pack(
        tmp_path / "a.tar",
        [
            ("good.mp4", video),
            ("twice.mp4", video),
            ("twice.mp4", video),
            ("text.mp4", video),
            ("text.txt", b"1"),
            ("text.txt", b"2"),
            link("hard.mp4", "good.mp4", tarfile.LNKTYPE),
            link("soft.mp4", "/etc/passwd", tarfile.SYMTYPE),
            ("/abs.mp4", video),
            ("a/../../up.mp4", video),
            ("json.mp4", video),
            ("json.json", b"{"),
            ("list.mp4", video),
            ("list.json", b"[]"),
            ("deep.mp4", video),
            ("deep.json", b"[" * 100_000),
            ("span.mp4", video),
            ("span.json", b'{"start": 3, "end": 2}'),
            ("huge.mp4", video),
            ("huge.json", b'{"start": 1' + b"0" * 400 + b"}"),
            ("large.mp4", video),
            ("large.txt", b"x" * (1 << 21)),
            (os.fsdecode(b"b\xff.mp4"), video),
        ],
    )
    found = problems(path)
    assert {name for name, problem in found.items() if not problem} == {"a.tar/good.mp4", "a.tar/b\\xff.mp4"}
    for name, says in {
        "twice": "twice",
        "text": ".txt: the tar holds it twice",
        "hard": "a link",
        "soft": "a link",
        "/abs": "leads out",
        "a/../../up": "leads out",
        "json": ".json: does not parse",
        "list": "not an object",
        "deep": "does not parse",
        "span": "0 <= start < end",
        "huge": "not a number of seconds",
        "large": "too many",
    }.items():
        assert says in found[f"a.tar/{name}.mp4"], name
    assert not any("\n" in problem for problem in found.values())


def test_json_gives_caption_and_span_and_text_goes_first(video, tmp_path):
    entry = json.dumps({"caption": "of  json", "text": "no", "start": 0.25, "end": 0.6}).encode()
    members = [("a.mp4", video), ("a.json", entry), ("b.mp4", video), ("b.json", entry), ("b.txt", b"of text")]
    members += [("c.mp4", video), ("c.json", b'{"captions": ["x", "y"]}'), ("c.txt", b"z")]
    rows = list_source(pack(tmp_path / "a.tar", members))
    assert (rows.pop().captions, rows[0].captions) == (("z", "x", "y"), ())
    assert [(row.caption, row.start, row.end) for row in rows] == [("of json", 0.25, 0.6), ("of text", 0.25, 0.6)]


def test_a_tar_cut_anywhere_says_so_and_keeps_what_is_whole(video, tmp_path):
    """At every 256 bytes, and at every boundary."""
    whole = pack(tmp_path / "whole.tar", [("a.mp4", video), ("a.txt", b"a"), ("b.mp4", video), ("b.txt", b"b")])
    data, path = whole.read_bytes(), tmp_path / "a.tar"
    end = {member.name: member.offset + member.size for member in tar_members(whole)}
    stop = -(-end["b.txt"] // 512) * 512  # here the end of the tar begins
    for size in range(512, stop + 512, 256):
        path.write_bytes(data[:size])
        found = problems(path)
        assert any("cut short" in problem for problem in found.values()), size
        # The next header must be there, too: only then is nothing of the sample missing.
        assert (found.get("a.tar/a.mp4") == "") == (size >= end["a.txt"] + 511 + 512), size
        assert found.get("a.tar/b.mp4") != ""
    path.write_bytes(data[: stop + 512])
    assert set(problems(path).values()) == {""}


def test_a_damaged_header_ends_its_shard_only(video, tmp_path):
    first = pack(tmp_path / "0.tar", [("a.mp4", video), ("b.mp4", video), ("c.mp4", video)])
    pack(tmp_path / "1.tar", [("d.mp4", video)])
    data = bytearray(first.read_bytes())
    offset = next(member.offset for member in tar_members(first) if member.name == "b.mp4")
    data[offset - 512 + 124] ^= 0x41  # in its size
    first.write_bytes(data)
    found = problems(tmp_path)
    assert {name: bool(problem) for name, problem in found.items()} == {
        "0.tar/a.mp4": True,
        "0.tar": True,
        "1.tar/d.mp4": False,
    }
    assert "damaged" in found["0.tar"]
    assert run(tmp_path, tmp_path / "data") == 0
    assert [(one["source"], one["reason"]) for one in failures(tmp_path / "data")] == [
        ("0.tar/a.mp4", "unreadable"),
        ("0.tar", "unreadable"),
    ]


def test_sizes_that_lie_end_quickly(video, tmp_path):
    """A size below 0 would send tarfile in circles; a header of 2 GB would be read into memory."""
    path = pack(tmp_path / "a.tar", [("a.mp4", video)])
    for kind, size in ((tarfile.REGTYPE, -1024), (tarfile.GNUTYPE_LONGNAME, 1 << 31), (tarfile.XHDTYPE, -4096)):
        info = tarfile.TarInfo("evil.mp4")
        info.type, info.size = kind, 0
        block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
        block[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
        block[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(block))[0]
        path.write_bytes(path.read_bytes()[: 512 * (1 + -(-len(video) // 512))] + block + bytes(1024))
        found = problems(path)
        assert "damaged" in found["a.tar/a.mp4"] and "damaged" in found["a.tar"], kind


def test_the_fingerprint_is_of_names_captions_spans_and_sizes(video, tmp_path):
    def marks(members):
        return fingerprints(list_source(pack(tmp_path / "a.tar", members)))

    base = marks([("a.mp4", video), ("a.txt", b"a")])
    assert marks([("a.txt", b"a"), ("a.mp4", video)]) == base
    assert marks([("b.mp4", video), ("b.txt", b"a")])["source"] != base["source"]
    assert marks([("a.mp4", video), ("a.txt", b"b")])["source"] != base["source"]
    longer = marks([("a.mp4", video + b"0"), ("a.txt", b"a")])
    assert longer["source"] == base["source"] and longer["source_sizes"] != base["source_sizes"]


def test_listing_reads_no_video(tmp_path):
    """10,000 samples of 1 GB each, in a tar of holes."""
    path, hole = tmp_path / "a.tar", 1 << 30
    with open(path, "wb") as file:
        for number in range(10_000):
            info = tarfile.TarInfo(f"{number:06d}.mp4")
            info.size = hole
            file.write(info.tobuf())
            file.seek(hole, os.SEEK_CUR)
        file.truncate(file.tell() + 1024)
    began = time.monotonic()
    rows = list_source(path)
    assert len(rows) == 10_000 and not any(row.problem for row in rows)
    assert time.monotonic() - began < 20
