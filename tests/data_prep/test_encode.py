"""From a folder or manifest of videos to a dataset: the right clips, and every complaint in one line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_prep import batching, default_codec, encode
from data_prep.card import read_card
from data_prep.codecs import dataset_codec
from data_prep.text import HashText, dataset_text
from data_prep.verify import verify
from data_prep.video import read_frames, write_video
from tests.data_prep.encoded import content, failures, run, samples
from tests.data_prep.test_video import picture, write, write_sound

pytestmark = pytest.mark.usefixtures("quick_fit")


def test_a_folder_becomes_a_dataset(videos, tmp_path, capsys):
    out = tmp_path / "data"
    assert run(videos, out) == 0
    assert "1 of 3 videos has no caption" in capsys.readouterr().err
    card, found = read_card(out), samples(out)
    assert verify(out) == 7
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
    latent, (embedding,), meta = found["000001_0001"]
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


def test_a_stride_makes_clips_overlap_or_leaves_gaps(videos, tmp_path, capsys):
    whole, out = tmp_path / "whole", tmp_path / "data"
    assert run(videos, whole, "--stride", "5") == 0
    assert read_card(whole)["source"]["settings"]["stride"] == 5
    for stride, starts, left in ((3, [[0, 3, 6, 9, 12, 15], [0, 3, 6], [0]], 0 + 1 + 2), (8, [[0, 8], [0], [0]], 16)):
        assert run(videos, out, "--stride", str(stride)) == 0
        assert verify(out) == sum(map(len, starts))
        found, card = samples(out), read_card(out)
        wanted = {f"{row:06d}_{n:04d}": at / 16 for row, own in enumerate(starts) for n, at in enumerate(own)}
        assert {key: sample.meta["start"] for key, sample in found.items()} == wanted
        assert all(sample.meta["end"] == wanted[key] + 5 / 16 for key, sample in found.items())
        assert card["counts"]["dropped_seconds"] == left / 16 and card["source"]["settings"]["stride"] == stride
        frames = np.stack(list(read_frames(videos / "a.mkv", 16, (32, 48))))
        expected = dataset_codec(out).encode(frames[stride : stride + 5]).astype(np.float16)
        assert np.array_equal(found["000000_0001"].latent, expected)
        capsys.readouterr()
        assert run(videos, out) == 2
        assert f"differs in stride ({stride}, now 5)" in capsys.readouterr().err
        # Stopped behind the first shard, it goes on within the first video.
        before = content(out)
        for name in ("dataset.json", "samples.npy", "shard-000000-0001.json", "shard-000000-0001.tar"):
            (out / name).unlink(missing_ok=True)
        assert run(videos, out, "--stride", str(stride)) == 0
        assert content(out) == before
        shutil.rmtree(out)
    assert run(videos, out, "--stride", "-1") == 2


def test_several_captions_are_embedded_each(videos, tmp_path):
    entries = [
        {"video": "b.mp4", "caption": "one", "captions": ["two  words", "one", "", "three"]},
        {"video": "a.mkv", "captions": ["four", "five"]},
        {"video": "more/c.mp4", "captions": ["six"]},
    ]
    (videos / "list.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    out = tmp_path / "data"
    assert run(videos / "list.jsonl", out) == 0 and verify(out) == 7
    found = samples(out)
    for key, captions in (("000000_0001", ["one", "two words", "three"]), ("000001_0003", ["four", "five"])):
        assert found[key].meta["captions"] == captions and found[key].meta["caption"] == captions[0]
        expected = [text.astype(np.float16) for text in HashText().encode(captions)]
        assert len(found[key].texts) == len(captions)
        assert all(np.array_equal(*pair) for pair in zip(found[key].texts, expected))
    assert "captions" not in found["000002_0000"].meta and len(found["000002_0000"].texts) == 1
    entries[1]["captions"][1] = "another"
    (videos / "list.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert run(videos / "list.jsonl", out) == 2  # the fingerprint is of all captions


def test_unreadable_files_and_odd_names_are_failures_and_the_rest_is_encoded(videos, tmp_path, monkeypatch, capsys):
    odd = os.fsencode(videos) + b"/caf\xe9 \x1b[31m.mp4"
    shutil.copy(os.fsencode(videos / "b.mp4"), odd)
    (videos / "locked.mp4").write_bytes((videos / "b.mp4").read_bytes())
    (videos / "locked.txt").write_text("secret")
    read_text = Path.read_text

    def refuse(self, *arguments, **options):
        if self.name == "locked.txt":
            raise PermissionError(13, "Permission denied", str(self))
        return read_text(self, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", refuse)
    out = tmp_path / "data"
    assert run(videos, out) == 0
    said = capsys.readouterr().err
    assert "skipped locked.mp4: unreadable (its caption: Permission denied)" in said and "\x1b" not in said
    sources = {sample.meta["source"] for sample in samples(out).values()}
    assert sources == {"a.mkv", "b.mp4", "more/c.mp4", "caf\\xe9 \x1b[31m.mp4"}
    assert failures(out) == [
        {
            "source": "locked.mp4",
            "start": 0.0,
            "end": None,
            "reason": "unreadable",
            "detail": "its caption: Permission denied",
            "samples": 0,
        }
    ]


def test_tars_beside_videos_are_not_read_and_this_is_said(videos, tmp_path, capsys):
    (videos / "more" / "x.tar").write_bytes(b"")
    assert run(videos, tmp_path / "data") == 0
    assert f"{videos}: its .tar files (1) are not read, since there are videos" in capsys.readouterr().err


def test_a_folder_that_cannot_be_listed_is_one_line(videos, tmp_path, monkeypatch, capsys):
    scandir = os.scandir

    def refuse(path):
        if os.fspath(path).endswith("more"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert run(videos, tmp_path / "data") == 2
    error = capsys.readouterr().err
    assert "more: cannot be listed (Permission denied)" in error and error.count("\n") == 1
    assert not (tmp_path / "data").exists()


def test_latents_that_are_not_finite_end_their_video_alone(videos, tmp_path, monkeypatch, capsys):
    real = default_codec.DefaultCodec.encode
    calls = []

    def encode_once_with_nan(self, frames):
        calls.append(1)
        return real(self, frames) * (np.nan if len(calls) == 3 else 1)

    monkeypatch.setattr(default_codec.DefaultCodec, "encode", encode_once_with_nan)
    out = tmp_path / "data"
    assert run(videos, out) == 0
    assert list(samples(out)) == ["000000_0000", "000000_0001", "000001_0000", "000001_0001", "000002_0000"]
    assert [(one["source"], one["reason"], one["samples"]) for one in failures(out)] == [("a.mkv", "not finite", 2)]


def test_what_a_codec_says_of_a_clip_is_the_reason(videos, tmp_path, monkeypatch):
    def refuse(self, frames):
        raise ValueError("nothing but\n noise")

    assert run(videos, tmp_path / "codec") == 0
    monkeypatch.setattr(default_codec.DefaultCodec, "encode", refuse)
    rows = []
    monkeypatch.setattr(batching, "failure_of", lambda row, problem, clips: rows.append(problem) or {"reason": ""})
    assert run(videos, tmp_path / "data", "--codec", f"default:{tmp_path / 'codec'}") == 2
    assert {(one.reason, one.detail) for one in rows} == {("not encodable", "nothing but noise")}


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_keys_of_a_manifest_that_are_not_read_are_named(videos, tmp_path, capsys, kind):
    entries = [{"video": "a.mkv", "id": 7}, {"video": "b.mp4", "captoin": "hello", "\x1b[31m": 1}]
    manifest = videos / f"list.{kind}"
    if kind == "jsonl":
        manifest.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    elif kind == "csv":
        manifest.write_text("video,id,captoin,\x1b[31m\na.mkv,7,,\nb.mp4,,hello,1,more\n")
    else:
        pyarrow = pytest.importorskip("pyarrow")
        entries[0] = {key: entries[0].get(key) for key in ("video", "id", "captoin", "\x1b[31m")}
        __import__("pyarrow.parquet").parquet.write_table(pyarrow.Table.from_pylist(entries), manifest)
    assert len(encode.list_source(manifest)) == 2
    said = capsys.readouterr().err
    assert f"{manifest}: not read are 'id' (line " in said and said.count("\n") == 1 and "\x1b" not in said
    assert "(line 2, 'caption' is meant?)" in said or kind != "jsonl"
    assert "'captoin' (line " in said and "'caption' is meant?" in said and ("cells behind" in said) == (kind == "csv")
    assert said.endswith("the keys are video, caption, captions, start, end, cuts\n")
    (videos / "vido.jsonl").write_text('{"vido": "a.mkv"}')
    with pytest.raises(ValueError, match="line 1: no 'video'; it has: vido"):
        encode.list_source(videos / "vido.jsonl")


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
    entries = {entry["source"]: entry for entry in failures(out)}
    assert set(entries) == {"empty.mp4", "sound.mp4", "short.mp4", "trunc.mkv"}
    assert entries["short.mp4"]["detail"] == "4 of 5 frames"
    kept = entries["trunc.mkv"]["samples"]
    assert 0 < kept < 8 and card["counts"]["samples"] == 7 + kept == verify(out)
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
    assert card["counts"]["skipped"] == {"missing": 1} and failures(out)[0]["source"] == "videos/none.mp4"


def test_the_codec_of_another_dataset(videos, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert run(videos, first) == 0
    folder = tmp_path / "new"
    folder.mkdir()
    write_video(folder / "x.mp4", [picture(n) for n in range(5)], 16)
    assert run(folder, second, "--codec", f"default:{first}") == 0
    assert dataset_codec(second).hash == dataset_codec(first).hash
    assert run(folder, tmp_path / "third") == 0
    shutil.copy(tmp_path / "third" / "codec.safetensors", second)
    with pytest.raises(ValueError, match="not the codec that made"):
        dataset_codec(second)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--frames", "80"], "80 frames: a clip must have 1 + 4k, such as 77 or 81"),
        (["--size", "40x48"], "must be multiples of 16, such as 32x48"),
        (["--size", "big"], "HEIGHTxWIDTH"),
        (["--fps", "0"], "fps 0"),
        (["--fps", "1e-9"], "fps 1e-09: must be from 0.01 to 1000"),
        (["--codec", "vae"], "unknown codec"),
        (["--codec", "wan:nowhere"], "no Wan VAE here"),
        (["--codec", "default:https://host/data"], "https://host/data: --codec reads local folders only"),
        (["--text", "clip"], "unknown text encoder"),
        (["--samples-per-shard", "0"], "samples per shard"),
        (["--videos-per-part", "0"], "videos per part"),
        (["--workers", "0"], "workers must be at least 1"),
        (["--max-failures", "2"], "max failures 2.0: a share"),
        (["--job", "2/2"], "job '2/2': expected I/N"),
        (["--job", "one"], "job 'one': expected I/N"),
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
    (tmp_path / "captions.csv").write_text("video,captions\na.mp4,one\n")
    (tmp_path / "word.csv").write_text("video,start\na.mp4,soon\n")
    (tmp_path / "list.jsonl").write_text('{"video": "a.mp4", "caption": ["a", "b"]}')
    for name, digits in (("huge", 400), ("digits", 5000)):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"video": "b.mp4", "start": {"9" * digits}}}\n')
    for src, says in (
        ("none", "no such folder or manifest"),
        ("empty", "no videos in it"),
        ("list.txt", "expected a folder of videos"),
        ("bad.jsonl", "line 2: no 'video'"),
        ("worse.jsonl", "does not parse"),
        ("span.csv", "line 2: need 0 <= start < end"),
        ("captions.csv", "line 2: captions 'one' is not a list of texts"),
        ("word.csv", "start 'soon' is not a number"),
        ("list.jsonl", "line 1: caption \"['a', 'b']\" is not a text; several go under 'captions'"),
        ("huge.jsonl", "is not a number of seconds"),
        ("digits.jsonl", "digits.jsonl: does not parse"),
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
