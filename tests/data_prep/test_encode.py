"""From a folder or manifest of videos to a dataset: the right clips, every complaint in one line, nothing twice."""

import json
import sys

import numpy as np
import pytest

from data_prep import default_codec, encode
from data_prep.card import read_card, verify_dataset
from data_prep.codecs import dataset_codec
from data_prep.shards import index_shard, read_sample
from data_prep.text import HashText, dataset_text
from data_prep.video import read_frames, write_video
from tests.data_prep.test_video import picture, write, write_sound


@pytest.fixture(autouse=True)
def quick_fit(monkeypatch):
    monkeypatch.setattr(default_codec, "STEPS", 5)


@pytest.fixture
def videos(tmp_path):
    """Three valid videos of 12, 20 and 7 frames at 16 frames per second, two of them with captions."""
    folder = tmp_path / "videos"
    (folder / "more").mkdir(parents=True)
    write(folder / "b.mp4", frames=12, fps=16)
    write(folder / "a.mkv", frames=20, fps=16)
    write(folder / "more" / "c.mp4", frames=7, fps=16)
    (folder / "b.txt").write_text("a red\n thing\n", encoding="utf-8")
    (folder / "a.txt").write_text("grün", encoding="utf-8")
    return folder


def run(src, out, *more):
    return encode.main([str(src), str(out), "--size", "32x48", "--frames", "5", "--samples-per-shard", "3", *more])


def samples(out):
    found = {}
    for shard in read_card(out)["shards"]:
        for key, members in index_shard(out / shard["file"]):
            found[key] = read_sample(out / shard["file"], members)
    return found


def test_a_folder_becomes_a_dataset(videos, tmp_path, capsys):
    out = tmp_path / "data"
    assert run(videos, out) == 0
    assert "1 of 3 videos have no caption" in capsys.readouterr().err
    card, found = read_card(out), samples(out)
    assert verify_dataset(out) == 7
    # a.mkv: 20 frames make 4 clips; b.mp4: 12 make 2, 2 frames left; more/c.mp4: 7 make 1, 2 left
    assert list(found) == [f"{row:06d}_{clip:04d}" for row, clips in enumerate((4, 2, 1)) for clip in range(clips)]
    assert [shard["samples"] for shard in card["shards"]] == [3, 3, 1]
    assert card["counts"] == {
        "videos": 3,
        "samples": 7,
        "shards": 3,
        "skipped": {},
        "no_caption": 1,
        "dropped_seconds": 0.25,
    }
    assert card["video"] == {"fps": 16, "frames": 5, "height": 32, "width": 48}
    assert card["latent"] | {"mean": 0, "std": 0} == {
        "channels": 16,
        "frames": 2,
        "height": 4,
        "width": 6,
        "dtype": "float16",
        "strides": [4, 8, 8],
        "mean": 0,
        "std": 0,
    }
    assert np.allclose(card["empty_caption"], HashText().encode([""])[0], atol=1e-3)

    codec, text = dataset_codec(out), dataset_text(out)
    assert codec.hash == card["codec"]["hash"] and (codec.mean, codec.std) == (
        card["latent"]["mean"],
        card["latent"]["std"],
    )
    latent, embedding, meta = found["000001_0001"]
    assert meta == {
        "caption": "a red thing",
        "source": "b.mp4",
        "start": 0.3125,
        "end": 0.625,
        "fps": 16,
        "height": 32,
        "width": 48,
        "frames": 5,
        "codec": codec.hash,
        "key": "000001_0001",
    }
    clip = np.stack(list(read_frames(videos / "b.mp4", 16, (32, 48))))[5:10]
    assert np.array_equal(latent, codec.encode(clip).astype(np.float16))
    assert np.array_equal(embedding, text.encode(["a red thing"])[0].astype(np.float16))
    assert found["000002_0000"][2]["source"] == "more/c.mp4"


def test_again_does_nothing_and_elsewhere_makes_the_same_bytes(videos, tmp_path, capsys):
    out, other = tmp_path / "data", tmp_path / "other"
    assert run(videos, out) == 0
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}
    capsys.readouterr()
    assert run(videos, out, "--fps", "16.0") == 0
    assert "exists already" in capsys.readouterr().out
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()} == before
    assert run(videos, other) == 0
    assert {path.name: path.read_bytes() for path in other.iterdir()} == {
        name: data for name, (data, _) in before.items()
    }


def test_other_settings_or_another_source_are_refused(videos, tmp_path, capsys):
    out = tmp_path / "data"
    assert run(videos, out) == 0
    capsys.readouterr()
    assert run(videos, out, "--fps", "8") == 2
    assert "differs in fps (16, now 8)" in capsys.readouterr().err
    (videos / "b.txt").write_text("another caption")
    assert run(videos, out) == 2
    assert "differs in source" in capsys.readouterr().err


def test_interrupted_runs_are_redone(videos, tmp_path, monkeypatch, capsys):
    out, whole = tmp_path / "data", tmp_path / "whole"
    assert run(videos, whole) == 0

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(encode, "write_card", interrupt)
        assert run(videos, out) == 130
    with pytest.raises(ValueError, match="interrupted"):
        read_card(out)
    (out / "shard-000000.tar").write_bytes(b"half")
    (out / "shard-000009.tar.tmp").write_bytes(b"half")
    capsys.readouterr()
    assert run(videos, out) == 0
    assert "interrupted run left" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in whole.iterdir()
    }


def test_bad_videos_are_skipped_logged_and_counted(videos, tmp_path, capsys):
    (videos / "empty.mp4").write_bytes(b"")
    write_sound(videos / "sound.mp4")
    write(videos / "short.mp4", frames=4, fps=16)
    cut = write(videos / "trunc.mkv", frames=40, fps=16, options={"g": "8"})
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size * 7 // 10])
    out = tmp_path / "data"
    assert run(videos, out) == 0
    captured = capsys.readouterr()
    card = read_card(out)
    assert card["counts"]["skipped"] == {"no video stream": 1, "not a video": 1, "too short": 1, "truncated": 1}
    entries = {entry["source"]: entry for entry in card["skipped"]}
    assert set(entries) == {"empty.mp4", "sound.mp4", "short.mp4", "trunc.mkv"}
    assert entries["short.mp4"]["detail"] == "4 of 5 frames"
    kept = entries["trunc.mkv"]["samples"]
    assert 0 < kept < 8 and card["counts"]["samples"] == 7 + kept == verify_dataset(out)
    assert "skipped empty.mp4: not a video" in captured.err and f"kept {kept} clips" in captured.err
    assert "skipped: 1 no video stream, 1 not a video" in captured.out


def test_nothing_usable_is_an_error_and_no_dataset(tmp_path, capsys):
    folder = tmp_path / "videos"
    folder.mkdir()
    (folder / "a.mp4").write_bytes(b"no")
    write_sound(folder / "b.mp4")
    out = tmp_path / "data"
    assert run(folder, out) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"error: {folder}: no clip could be made from 2 videos: 1 no video stream, 1 not a video"
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_manifests(videos, tmp_path, kind):
    manifest = tmp_path / f"list.{kind}"
    if kind == "jsonl":
        rows = [
            {"video": "videos/a.mkv", "caption": "whole, really"},
            {"video": "videos/a.mkv", "caption": "part", "start": 0.5, "end": 0.9},
            {"video": "videos/none.mp4", "caption": "gone", "start": None},
        ]
        manifest.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    else:
        manifest.write_text(
            'video,caption,start,end\nvideos/a.mkv,"whole, really",,\nvideos/a.mkv,part,0.5,0.9\n'
            "videos/none.mp4,gone,,\n",
            encoding="utf-8-sig",
        )
    out = tmp_path / "data"
    assert run(manifest, out) == 0
    found, card = samples(out), read_card(out)
    assert list(found) == ["000000_0000", "000000_0001", "000000_0002", "000000_0003", "000001_0000"]
    latent, _, meta = found["000001_0000"]
    assert (meta["caption"], meta["start"], meta["end"], meta["source"]) == ("part", 0.5, 0.8125, "videos/a.mkv")
    clip = np.stack(list(read_frames(videos / "a.mkv", 16, (32, 48))))[8:13]
    assert np.array_equal(latent, dataset_codec(out).encode(clip).astype(np.float16))
    assert found["000000_0000"][2]["caption"] == "whole, really"
    assert card["counts"]["skipped"] == {"missing": 1} and card["skipped"][0]["source"] == "videos/none.mp4"


def test_the_codec_of_another_dataset(videos, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert run(videos, first) == 0
    folder = tmp_path / "new"
    folder.mkdir()
    write_video(folder / "x.mp4", [picture(n) for n in range(5)], 16)
    assert run(folder, second, "--codec", f"default:{first}") == 0
    assert dataset_codec(second).hash == dataset_codec(first).hash
    (second / "codec.safetensors").write_bytes((first / "codec.safetensors").read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(ValueError, match="not the codec that made"):
        dataset_codec(second)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--frames", "80"], "80 frames: a clip must have 1 + 4k, such as 77 or 81"),
        (["--size", "40x48"], "must be multiples of 16, such as 32x48"),
        (["--size", "big"], "HEIGHTxWIDTH"),
        (["--fps", "0"], "fps 0"),
        (["--codec", "vae"], "unknown codec"),
        (["--codec", "wan:nowhere"], "no Wan VAE here"),
        (["--text", "clip"], "unknown text encoder"),
        (["--samples-per-shard", "0"], "samples per shard"),
    ],
)
def test_bad_settings_are_one_line(videos, tmp_path, capsys, arguments, says):
    assert run(videos, tmp_path / "data", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and says in error and error.count("\n") == 1
    assert not (tmp_path / "data").exists()


def test_bad_sources_are_one_line(videos, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.txt").write_text("a.mp4")
    (tmp_path / "bad.jsonl").write_text('{"video": "a.mp4"}\n{"caption": "no video"}\n')
    (tmp_path / "worse.jsonl").write_text('{"video": \n')
    (tmp_path / "span.csv").write_text("video,start,end\na.mp4,3,2\n")
    (tmp_path / "word.csv").write_text("video,start\na.mp4,soon\n")
    for src, says in (
        ("none", "no such folder or manifest"),
        ("empty", "no videos in it"),
        ("list.txt", "expected a folder of videos"),
        ("bad.jsonl", "line 2: no 'video'"),
        ("worse.jsonl", "does not parse"),
        ("span.csv", "line 2: need 0 <= start < end"),
        ("word.csv", "start 'soon' is not a number"),
    ):
        assert run(tmp_path / src, tmp_path / "data") == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and says in error and error.count("\n") == 1
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.doc").write_text("mine")
    assert run(videos, foreign) == 2
    assert "not empty and no dataset" in capsys.readouterr().err
    assert [path.name for path in foreign.iterdir()] == ["thesis.doc"]


def test_it_never_imports_what_it_does_not_use():
    """The default path needs neither diffusers nor transformers: they take seconds to import."""
    import subprocess

    heavy = "[name for name in ('diffusers', 'transformers') if name in sys.modules]"
    code = f"import sys, data_prep.encode, data_prep.draw; print({heavy})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(path for path in sys.path if path)},
    )
    assert done.stdout.strip() == "[]"
