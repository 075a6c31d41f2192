"""Encoding that stops, goes on, is shared by jobs, or finds damage: the same bytes, and no clip twice."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from data_prep import encode_parts, shards
from data_prep.card import read_card
from data_prep.files import temporary_beside
from data_prep.verify import verify
from tests.data_prep.encoded import content, failures, run
from tests.data_prep.test_video import write

pytestmark = pytest.mark.usefixtures("quick_fit")


def test_again_does_nothing_and_elsewhere_makes_the_same_bytes(videos, tmp_path, capsys):
    out, other = tmp_path / "data", tmp_path / "other"
    assert run(videos, out) == 0
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}
    capsys.readouterr()
    assert run(videos, out, "--fps", "16.0") == 0
    assert "exists already" in capsys.readouterr().out
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()} == before
    assert run(videos, other) == 0
    assert content(other) == {name: data for name, (data, _) in before.items()}


def test_other_settings_or_another_source_are_refused(videos, tmp_path, capsys):
    out = tmp_path / "data"
    assert run(videos, out) == 0
    capsys.readouterr()
    assert run(videos, out, "--fps", "8") == 2
    assert "differs in fps (16, now 8)" in capsys.readouterr().err
    (videos / "b.txt").write_text("another caption")
    assert run(videos, out) == 2
    assert "differs in source: the source has other videos, captions or spans now" in capsys.readouterr().err


def test_an_interrupted_run_goes_on_behind_the_last_whole_shard(videos, tmp_path, monkeypatch, capsys):
    """Wherever it stops: while a shard is written, between a shard and its record, before the card."""
    whole, out = tmp_path / "whole", tmp_path / "data"
    assert run(videos, whole) == 0
    finish, made, stop = shards.ShardWriter.finish, [], {"at": 0, "named": False}

    def interrupted_finish(self):
        if len(made) == stop["at"]:
            if stop["named"]:
                finish(self)
            raise KeyboardInterrupt
        made.append(self.path.name)
        return finish(self)

    monkeypatch.setattr(shards.ShardWriter, "finish", interrupted_finish)
    for limit, named in ((0, False), (1, True), (2, False), (2, True)):
        stop.update(at=limit, named=named)
        assert run(videos, out) == 130
        assert not list(out.glob("*.tmp")) and len(list(out.glob("shard-*.json"))) == limit
        with pytest.raises(ValueError, match="not finished"):
            read_card(out)
    limit = 99
    stop.update(at=99)

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(encode_parts, "write_card", interrupt)
        assert run(videos, out) == 130
    dead = subprocess.Popen(["true"])
    dead.wait()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: dead.pid)
        temporary_beside(out / "shard-000000-0001.tar").write_bytes(b"half")
    assert run(videos, out) == 0
    assert made == [f"shard-000000-{number:04d}.tar" for number in range(3)]  # each once
    assert content(out) == content(whole)


def edited(**changes):
    return lambda record: json.dumps(json.loads(record) | changes)


@pytest.mark.parametrize(
    "damage",
    [
        lambda record: record[: len(record) // 2],
        lambda record: "[" * 100_000,
        lambda record: "{}",
        edited(next=None),
        edited(next=[1, 0]),
        edited(index=[]),
        edited(samples=99),
        edited(failures=None),
        lambda record: record.replace("shard-000000-0001", "shard-000000-0000"),
    ],
)
def test_a_damaged_record_counts_for_nothing(videos, tmp_path, damage):
    whole, out = tmp_path / "whole", tmp_path / "data"
    assert run(videos, whole) == 0
    shutil.copytree(whole, out)
    (out / "dataset.json").unlink()
    record = out / "shard-000000-0001.json"
    record.write_text(damage(record.read_text()))
    assert run(videos, out) == 0
    assert content(out) == content(whole)


def flip_bit(path):
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)


def test_a_damaged_codec_makes_no_sample(videos, tmp_path, capsys):
    whole, out = tmp_path / "whole", tmp_path / "data"
    assert run(videos, whole) == 0
    shutil.copytree(whole, out)
    flip_bit(out / "codec.safetensors")
    with pytest.raises(ValueError, match=r"codec.safetensors: not a default codec \(damaged"):
        verify(out)
    (out / "dataset.json").unlink()
    (out / "shard-000000-0002.json").unlink()
    capsys.readouterr()
    assert run(videos, out) == 2
    assert "codec.safetensors: not a default codec (damaged" in capsys.readouterr().err
    assert not (out / "dataset.json").exists()


def test_a_damaged_copy_of_a_given_codec_is_written_again(videos, tmp_path):
    first, whole, out = tmp_path / "first", tmp_path / "whole", tmp_path / "data"
    assert run(videos, first) == run(videos, whole, "--codec", f"default:{first}") == 0
    shutil.copytree(whole, out)
    (out / "dataset.json").unlink()
    flip_bit(out / "codec.safetensors")
    assert run(videos, out, "--codec", f"default:{first}") == 0
    assert content(out) == content(whole)


def test_jobs_share_the_parts_and_make_the_same_bytes(videos, tmp_path, capsys):
    (videos / "bad.mp4").write_bytes(b"no")
    whole, out = tmp_path / "whole", tmp_path / "data"
    assert run(videos, whole, "--videos-per-part", "1") == 0
    assert [shard["file"] for shard in read_card(whole)["shards"]] == [
        f"shard-00000{part}-000{number}.tar" for part, number in ((0, 0), (0, 1), (1, 0), (3, 0))
    ]
    capsys.readouterr()
    for job in ("2/3", "0/3", "2/3", "1/3"):
        assert not (out / "dataset.json").exists()
        assert run(videos, out, "--videos-per-part", "1", "--job", job) == 0
    assert content(out) == content(whole)
    said = capsys.readouterr().out
    assert "3 of 4 parts are not done" in said and "1 of 4 parts is not done" in said
    assert [one["source"] for one in failures(out)] == ["bad.mp4"]


def test_jobs_at_once_fit_the_codec_once_and_make_the_same_bytes(videos, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "data"
    settings = ["--size", "32x48", "--frames", "5", "--samples-per-shard", "3", "--videos-per-part", "1"]
    start = "import sys; from data_prep import default_codec, encode; default_codec.STEPS = 5; sys.exit(encode.main())"
    command = [sys.executable, "-c", start, str(videos), str(out), *settings]
    jobs = [subprocess.Popen([*command, "--job", f"{job}/3"], stderr=subprocess.PIPE, text=True) for job in range(3)]
    said = [job.communicate()[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0, 0], said
    assert sum("fitted the default codec" in text for text in said) == 1
    assert run(videos, whole, "--videos-per-part", "1") == 0
    assert content(out) == content(whole)


def test_a_job_with_other_settings_or_another_source_is_refused_meanwhile(videos, tmp_path, capsys):
    out = tmp_path / "data"
    assert run(videos, out, "--videos-per-part", "1", "--job", "0/2") == 0
    before = content(out)
    capsys.readouterr()
    assert run(videos, out, "--videos-per-part", "1", "--fps", "8", "--job", "1/2") == 2
    assert "holds another dataset, it differs in fps (16, now 8)" in capsys.readouterr().err
    assert run(videos / "more", out, "--videos-per-part", "1", "--job", "1/2") == 2
    assert "differs in source" in capsys.readouterr().err
    assert content(out) == before


def test_a_job_ends_when_too_many_videos_fail_and_retry_tries_them_again(videos, tmp_path, capsys):
    good = (videos / "b.mp4").read_bytes()
    for name in ("b.mp4", "a.mkv"):
        (videos / name).write_bytes(b"no")
    out, whole = tmp_path / "data", tmp_path / "whole"
    settings = ["--codec", f"default:{tmp_path / 'codec'}", "--max-failures", "0.5"]
    assert run(videos / "more", tmp_path / "codec") == 0
    capsys.readouterr()
    assert run(videos, out, *settings) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "2 of 3 videos failed, more than --max-failures 0.5" in error and "--retry" in error
    settings[-1] = "1"
    assert run(videos, out, *settings) == 0 and len(failures(out)) == 2
    (videos / "b.mp4").write_bytes(good)
    assert run(videos, out, *settings) == 2
    assert "differs in source_sizes" in capsys.readouterr().err
    assert run(videos, out, *settings, "--retry") == 0 and [one["source"] for one in failures(out)] == ["a.mkv"]
    assert run(videos, whole, *settings) == 0
    assert content(out) == content(whole)


def test_retry_makes_anew_what_has_another_size_though_it_did_not_fail(videos, tmp_path):
    """One video is mended, another, which was good, is replaced: no clip of the old one may stay."""
    good = (videos / "b.mp4").read_bytes()
    (videos / "b.mp4").write_bytes(b"no")
    out, whole = tmp_path / "data", tmp_path / "whole"
    assert run(videos / "more", tmp_path / "codec") == 0
    settings = ["--codec", f"default:{tmp_path / 'codec'}", "--videos-per-part", "1"]
    assert run(videos, out, *settings) == 0
    untouched = (out / "shard-000002-0000.tar").stat().st_mtime_ns
    (videos / "b.mp4").write_bytes(good)
    write(videos / "a.mkv", frames=15, fps=16)
    assert run(videos, out, *settings, "--retry") == 0
    assert run(videos, whole, *settings) == 0
    assert content(out) == content(whole)
    assert (out / "shard-000002-0000.tar").stat().st_mtime_ns == untouched


def test_a_shard_that_is_lost_from_a_finished_dataset_is_made_again(videos, tmp_path, capsys):
    out = tmp_path / "data"
    assert run(videos, out) == 0
    before = content(out)
    (out / "shard-000000-0001.tar").unlink()
    assert run(videos, out) == 0
    assert "1 shard is missing or cut short, it is made again" in capsys.readouterr().err
    assert content(out) == before


def test_a_full_disk_is_one_line_that_names_the_file(videos, tmp_path, monkeypatch, capsys):
    def full(handle):
        raise OSError(28, "No space left on device")

    assert run(videos, tmp_path / "codec") == 0
    capsys.readouterr()
    monkeypatch.setattr(os, "fsync", full)
    assert run(videos, tmp_path / "data", "--codec", f"default:{tmp_path / 'codec'}") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"error: [Errno 28] No space left on device: '{tmp_path / 'data' / 'work.json'}'"


def test_sigterm_is_one_line_that_says_how_to_go_on(videos, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "data"
    for number in range(8):
        shutil.copy(videos / "a.mkv", videos / f"z{number}.mkv")
    start = (
        "import sys, time; from data_prep import batching, default_codec, encode; default_codec.STEPS = 5;"
        "real = batching.encode_each;"
        "batching.encode_each = lambda *a: (time.sleep(0.05), real(*a))[1]; sys.exit(encode.main())"
    )
    settings = ["--size", "32x48", "--frames", "5", "--samples-per-shard", "3"]
    job = subprocess.Popen([sys.executable, "-c", start, str(videos), str(out), *settings], stderr=subprocess.PIPE)
    while not list(out.glob("shard-*.json")):
        time.sleep(0.01)
        assert job.poll() is None
    job.send_signal(signal.SIGTERM)
    said = job.communicate()[1].decode().splitlines()[-1]
    assert job.returncode == 75 and said == "stopped by SIGTERM; the same command goes on where it stopped"
    assert not list(out.glob("*.tmp")) and not (out / "dataset.json").exists()
    assert run(videos, out) == run(videos, whole) == 0 and content(out) == content(whole)
