"""Shards of raw video on a server: the same dataset as from the disk, and each tar's headers read once."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from data_prep import places
from data_prep.rows import fingerprints
from data_prep.sources import list_source
from data_prep.survey import hashes
from tests.data_prep.encoded import content, failures, run, samples
from tests.data_prep.test_tars import pack
from tests.data_prep.test_video import write
from tests.servers import needs_aiohttp, served

pytestmark = [needs_aiohttp, pytest.mark.usefixtures("quick_fit")]


@pytest.fixture
def server(tmp_path):
    """Three tars at /clips on a server: six videos of one or two clips, one that is none, captions, a sound file."""
    videos = tmp_path / "videos"
    videos.mkdir()
    data = [write(videos / f"{n}.mp4", frames=7 + n, fps=16).read_bytes() for n in range(6)]
    for number in range(3):
        first, second = data[2 * number : 2 * number + 2]
        members = [("b.mp4", first), ("b.txt", f"video {number}".encode()), ("b.wav", b"s" * 200_000)]
        members += [("a.mp4", second), ("a.json", b'{"captions": ["x", "y"], "cuts": [0.1]}')]
        members += [("bad.mp4", b"no")] if number == 1 else []
        pack(tmp_path / "served" / "clips" / f"{number:03d}.tar", members)
    with served(tmp_path / "served") as server:
        yield server


def shards_of(out):
    """All files of a dataset but those that name its source."""
    own = ("dataset.json", "listing-")
    return {name: data for name, data in content(out).items() if not name.startswith(own)}


def test_a_remote_source_makes_the_shards_that_the_local_one_makes(server, tmp_path, capsys):
    pattern = "{000..002}.tar"
    remote, local = f"{server.address}/clips/{pattern}", f"{server.folder}/clips/{pattern}"
    assert run(local, tmp_path / "local", "--drop-duplicates") == 0
    assert run(remote, tmp_path / "remote", "--drop-duplicates") == 0
    assert "skipped 001.tar/bad.mp4: not a video" in capsys.readouterr().err
    assert shards_of(tmp_path / "remote") == shards_of(tmp_path / "local")
    found = samples(tmp_path / "remote")
    assert len(found) > 6 and found["000000_0000"].meta["source"] == "000.tar/b.mp4"
    assert len(list((tmp_path / "remote").glob("listing-*.json"))) == 3
    # Once more: only the sizes of the tars are asked for, a byte each.
    server.asked.clear()
    assert run(remote, tmp_path / "remote", "--drop-duplicates") == 0
    assert sorted(server.asked) == [(f"/clips/{n:03d}.tar", "bytes=0-0") for n in range(3)]


def test_listing_reads_headers_and_texts_and_no_video(server, tmp_path):
    rows = list_source(f"{server.address}/clips/{{000..002}}.tar", tmp_path / "out")
    local = list_source(server.folder / "clips")
    assert fingerprints(rows) == fingerprints(local) and len(rows) == 7
    assert [(row.source, row.captions, row.cuts, row.region, row.index) for row in rows] == [
        (row.source, row.captions, row.cuts, row.region, row.index) for row in local
    ]
    kept = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    again = list_source(f"{server.address}/clips/{{000..002}}.tar", tmp_path / "out")
    assert again == rows and {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == kept
    # 200 kB of sound are skipped.
    asked = [tuple(map(int, re.findall(r"\d+", wanted))) for _, wanted in server.asked]
    assert sum(end - begin + 1 for begin, end in asked) < 3 * 4 * (64 << 10)
    assert hashes(rows, 2) == hashes(local, 2)


@pytest.mark.parametrize("damage", ["cut", "edit", "other", "size"])
def test_a_list_that_is_not_whole_or_of_another_tar_is_made_anew(server, tmp_path, damage):
    address, out = f"{server.address}/clips/{{000..002}}.tar", tmp_path / "out"
    list_source(address, out)
    kept = {path.name: path.read_bytes() for path in out.iterdir()}
    listing = sorted(out.iterdir())[0]
    if damage == "cut":
        listing.write_bytes(listing.read_bytes()[:-9])
    elif damage == "edit":
        listing.write_text(listing.read_text().replace("b.mp4", "c.mp4"))
    elif damage == "other":
        listing.write_bytes(sorted(out.iterdir())[1].read_bytes())
    else:
        pack(server.folder / "clips" / "001.tar", [("z.mp4", b"no"), ("z.txt", b"new" * 9000)])
    rows = list_source(address, out)
    assert [row.source for row in rows] == [row.source for row in list_source(server.folder / "clips")]
    now = {path.name: path.read_bytes() for path in out.iterdir()}
    assert len([name for name in kept if kept[name] != now[name]]) == (damage == "size")


def test_another_dataset_gets_no_lists(server, tmp_path, capsys):
    out, address = tmp_path / "out", f"{server.address}/clips/000.tar"
    assert run(tmp_path / "videos", out) == 0
    before = content(out)
    assert run(address, out) == 2 and "differs in source" in capsys.readouterr().err
    assert content(out) == before
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "a.txt").write_text("mine")
    assert run(address, tmp_path / "foreign") == 2
    assert [path.name for path in (tmp_path / "foreign").iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    "source, says",
    [
        ("clips/none.tar", "cannot be read (no such file)"),
        ("clips/text.tar", "not a plain tar file"),
        ("clips", "expected .tar files only; a folder there can't be listed"),
        ("clips/{000,000}.tar", "names it twice"),
    ],
)
def test_bad_addresses_are_one_line(server, tmp_path, capsys, source, says):
    (server.folder / "clips" / "text.tar").write_text("a text\n" * 1000)
    assert run(f"{server.address}/{source}", tmp_path / "data") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and says in error and error.count("\n") == 1


def test_a_damaged_remote_tar_gives_what_is_whole(server, tmp_path):
    path = server.folder / "clips" / "000.tar"
    path.write_bytes(path.read_bytes()[:-12_000])
    rows, local = list_source(f"{server.address}/clips/000.tar"), list_source(path)
    assert [(row.source, row.problem) for row in rows] == [(row.source, row.problem) for row in local]
    assert "cut short" in rows[-1].problem


def test_what_is_gone_or_forbidden_meanwhile_is_a_failure_of_its_videos(server, tmp_path):
    out, address = tmp_path / "data", f"{server.address}/clips/{{000..002}}.tar"
    paths, codec = {"/clips/000.tar": 404, "/clips/002.tar": 403}, tmp_path / "codec"
    list_source(address, out)
    assert run(f"{server.folder}/clips/000.tar", codec) == 0
    # The size is still told, then the tars are gone.
    server.fault = lambda path: paths.get(path) if server.asked[-1][1] != "bytes=0-0" else None
    assert run(address, out, "--codec", f"default:{codec}", "--workers", "1") == 0
    assert [(one["source"], one["reason"], one["detail"]) for one in failures(out)] == [
        ("000.tar/b.mp4", "missing", "no such file"),
        ("000.tar/a.mp4", "missing", "no such file"),
        ("001.tar/bad.mp4", "not a video", "Invalid data found when processing input"),
        ("002.tar/b.mp4", "unreadable", "not allowed, HTTP 403"),
        ("002.tar/a.mp4", "unreadable", "not allowed, HTTP 403"),
    ]


def test_encoding_waits_for_a_server_that_is_away(server, tmp_path, capsys, monkeypatch):
    address = f"{server.address}/clips/{{000..002}}.tar"
    assert run(f"{server.folder}/clips/{{000..002}}.tar", tmp_path / "local") == 0
    server.stop()
    back = threading.Timer(1.5, server.start)
    back.start()
    assert run(address, tmp_path / "remote") == 0
    back.join()
    assert shards_of(tmp_path / "remote") == shards_of(tmp_path / "local")
    said = capsys.readouterr().err
    host = server.address.removeprefix("http://")
    assert said.count(f"{host}: not reachable") == 1 and said.count(f"{host}: back after") == 1


@pytest.mark.parametrize("listed", [False, True])
def test_sigterm_ends_a_job_that_waits_for_a_server(server, tmp_path, listed):
    """While it lists the tars, and while it copies a video."""
    out, address = tmp_path / "data", f"{server.address}/clips/{{000..002}}.tar"
    assert run(f"{server.folder}/clips/000.tar", tmp_path / "codec") == 0
    if listed:
        list_source(address, out)
    server.fault = lambda path: 503 if not listed or server.asked[-1][1] != "bytes=0-0" else None
    command = [sys.executable, "-m", "data_prep.encode", address, str(out), "--size", "32x48", "--frames", "5"]
    command += ["--codec", f"default:{tmp_path / 'codec'}", "--workers", "2"]
    job = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert job.stderr
    for line in job.stderr:
        if "not reachable (HTTP 503); trying again" in line:
            break
    began = time.monotonic()
    job.send_signal(signal.SIGTERM)
    said = job.communicate()[1]
    assert job.returncode == 75 and "the same command goes on" in said
    assert time.monotonic() - began < 15


def test_a_server_that_stays_away_ends_the_job_and_fails_no_video(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(places, "PATIENCE", 0.5)
    out, address = tmp_path / "data", f"{server.address}/clips/{{000..002}}.tar"
    assert run(f"{server.folder}/clips/000.tar", tmp_path / "codec") == 0
    trouble = ["--codec", f"default:{tmp_path / 'codec'}", "--videos-per-part", "2", "--workers", "1"]
    assert run(address, out, *trouble, "--job", "0/4") == 0
    server.fault = lambda path: 503 if server.asked[-1][1] != "bytes=0-0" else None
    capsys.readouterr()
    assert run(address, out, *trouble) == 2
    assert re.search(r"^error: .*tar: not reachable for 0.5 s \(HTTP 503\)$", capsys.readouterr().err, re.MULTILINE)
    server.fault = lambda path: None
    assert run(address, out, *trouble) == 0 and [one["source"] for one in failures(out)] == ["001.tar/bad.mp4"]


@pytest.mark.slow
def test_jobs_at_once_that_are_killed_make_the_same_bytes_and_read_headers_once(server, tmp_path):
    address, whole, out = f"{server.address}/clips/{{000..002}}.tar", tmp_path / "whole", tmp_path / "data"
    settings = ["--size", "32x48", "--frames", "5", "--samples-per-shard", "2", "--videos-per-part", "1"]
    assert run(f"{server.folder}/clips/000.tar", tmp_path / "codec") == 0
    settings += ["--codec", f"default:{tmp_path / 'codec'}", "--workers", "1"]

    def start(folder, job):
        command = [sys.executable, "-m", "data_prep.encode", address, str(folder), *settings, "--job", job]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert start(whole, "0/1").wait() == 0
    for _ in range(3):
        before = len(list(out.glob("shard-*.json"))) if out.exists() else 0
        jobs = [start(out, f"{number}/2") for number in range(2)]
        while any(job.poll() is None for job in jobs) and len(list(out.glob("shard-*.json"))) <= before:
            time.sleep(0.005)
        for job in jobs:
            os.kill(job.pid, signal.SIGKILL)
            job.wait()
    server.asked.clear()
    jobs = [start(out, f"{number}/2") for number in range(2)]
    assert [job.wait() for job in jobs] == [0, 0]
    assert content(out) == content(whole)
    assert [wanted for _, wanted in server.asked].count("bytes=0-0") == 6
    assert json.loads(next(out.glob("listing-*.json")).read_text())["version"] == ""
