"""A preview: the right clips beside their originals, and nothing of the dataset becomes part of the page or a path."""

import json
import os
import re
import shutil

import numpy as np
import pytest

from data_prep import default_codec, encode, preview, stats
from data_prep.codecs import dataset_codec
from data_prep.index import SampleIndex
from data_prep.preview import choose, psnr_of, read_original
from data_prep.shards import Sample, read_sample
from data_prep.sources import list_source
from data_prep.video import read_frames, write_video
from tests.conftest import change_card
from tests.data_prep.made import write_samples
from tests.data_prep.test_tars import pack
from tests.data_prep.test_video import write

HOSTILE = '<script>alert("1")</script> & <b>'


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(videos, dataset): 12 and 20 frames make 2 and 4 clips. Nothing may change them."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "videos").mkdir()
    write(folder / "videos" / "b.mp4", frames=12, fps=16)
    write(folder / "videos" / "<i>a.mkv", frames=20, fps=16)
    (folder / "videos" / "b.txt").write_text(HOSTILE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(default_codec, "STEPS", 5)
        arguments = ["--size", "32x48", "--frames", "5", "--samples-per-shard", "4"]
        assert encode.main([str(folder / "videos"), str(folder / "data"), *arguments]) == 0
    return folder / "videos", folder / "data"


def samples(dataset):
    index = SampleIndex(dataset, stats.read_card(dataset))
    return {index.key(n): read_sample(dataset / index[n][0], index[n][1]) for n in range(len(index))}


def test_clips_are_spread_seeded_and_never_twice():
    assert choose(5, 9, 0) == choose(5, 5, 3) == [0, 1, 2, 3, 4] and choose(100, 3, 0, first=True) == [0, 1, 2]
    found = choose(1000, 10, 1)
    assert [n // 100 for n in found] == list(range(10)) and found == choose(1000, 10, 1) != choose(1000, 10, 2)


def test_the_page_shows_clips_beside_their_originals(made, tmp_path, monkeypatch, capsys):
    videos, dataset = made
    before = {path.name: path.stat().st_mtime_ns for path in dataset.iterdir()}
    monkeypatch.chdir(tmp_path)
    written = {}

    def write_and_keep(path, frames, fps, crf):
        written[path.name] = frames
        write_video(path, frames, fps, crf)

    monkeypatch.setattr(preview, "write_video", write_and_keep)
    assert preview.main([str(dataset), "--source", str(videos)]) == 0
    assert {path.name: path.stat().st_mtime_ns for path in dataset.iterdir()} == before
    out, codec, found = tmp_path / "data-preview", dataset_codec(dataset), samples(dataset)
    page = (out / "index.html").read_text()
    named = re.findall(r'src="([^"]*)"', page)
    assert sorted(named) == sorted(f"{key}.mp4" for key in found) and len(named) == 6
    assert {path.name for path in out.iterdir()} == {"index.html", *named}
    assert "<script" not in page and "<i>" not in page and "&lt;i&gt;a.mkv, 0.31–0.62 s, 000000_0001" in page
    assert "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt; &amp; &lt;b&gt;" in page and "no caption" in page
    # The original, a line, and the decoded clip; H.264 changes little.
    sample = found["000001_0001"]
    true = np.stack(list(read_frames(videos / "b.mp4", 16, (32, 48))))[5:10]
    decoded = codec.decode(sample.latent.astype(np.float32))
    shown = np.stack(list(read_frames(out / "000001_0001.mp4", 16)))
    assert shown.shape == (5, 32, 98, 3)
    assert psnr_of(shown[:, :, :48], true) > 30 and psnr_of(shown[:, :, 50:], decoded) > 30
    given = written["000001_0001.mp4"]
    assert np.array_equal(given[:, :, :48], true) and np.array_equal(given[:, :, 50:], decoded)
    assert f"000001_0001, {psnr_of(decoded, true):.1f} dB" in page
    assert "6 clips" in capsys.readouterr().out


def test_without_sources_only_the_clips(made, tmp_path):
    shown = preview.preview(made[1], tmp_path / "out", clips=2)
    assert len(shown) == 2 and all(clip.psnr is None and not clip.problem for clip in shown)
    frames = np.stack(list(read_frames(tmp_path / "out" / shown[0].video, 16)))
    assert frames.shape == (5, 32, 48, 3)
    # Again replaces it; what isn't a preview is left alone.
    assert [clip.key for clip in preview.preview(made[1], tmp_path / "out", clips=1, first=True)] == ["000000_0000"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["000000_0000.mp4", "index.html"]


def test_an_interrupted_preview_is_made_again(made, tmp_path, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(preview, "page", stop)
        assert preview.main([str(made[1]), "--out", str(tmp_path / "out"), "--clips", "2"]) == 130
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 2
    assert preview.main([str(made[1]), "--out", str(tmp_path / "out"), "--clips", "1"]) == 0
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 1


@pytest.mark.parametrize("name", ["notes.txt", "000000_0000.mp4", "index.html"])
def test_a_folder_with_something_else_is_refused(made, tmp_path, name, capsys):
    (tmp_path / name).write_text("mine")
    assert preview.main([str(made[1]), "--out", str(tmp_path)]) == 2
    assert f"holds something else than a preview ({name})" in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_what_cannot_be_shown_is_named(made, tmp_path, capsys):
    videos, dataset = made
    copy = tmp_path / "data"
    copy.mkdir()
    for path in dataset.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    shard = copy / "shard-000000-0000.tar"
    data = bytearray(shard.read_bytes())
    data[data.index(b"\x93NUMPY") + 200] ^= 1
    shard.write_bytes(data)
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "b.mp4").write_bytes((videos / "b.mp4").read_bytes())
    shown = preview.preview(copy, tmp_path / "out", source=tmp_path / "videos")
    assert [bool(clip.problem) for clip in shown] == [True] * 4 + [False] * 2
    assert "000000_0000: damaged" in shown[0].problem and not shown[0].video
    assert (
        "&lt;i&gt;a.mkv: not one of the videos of --source" in (tmp_path / "out" / "index.html").read_text()
        and shown[1].video
    )
    assert len(capsys.readouterr().err.splitlines()) == 4


@pytest.mark.parametrize("source", ["../secret.mp4", "a/../../secret.mp4", "{tmp}/secret.mp4", "", "a\0b", None, ".."])
def test_no_original_outside_of_the_source_is_opened(source, tmp_path):
    (tmp_path / "videos").mkdir()
    for path in (tmp_path / "secret.mp4", tmp_path / "videos" / "a.mp4"):
        write(path, frames=5, fps=16)
    card = {"video": {"fps": 16, "frames": 5, "height": 32, "width": 48}}
    source = source and source.replace("{tmp}", str(tmp_path))
    videos = {row.source: row for row in list_source(tmp_path / "videos")}
    for start in (0, -1, float("nan"), "0"):
        with pytest.raises(ValueError, match=r"not one of the videos|does not say"):
            read_original(Sample(None, None, {"source": source, "start": start}), card, videos)


def test_originals_of_shards_and_of_a_manifest_that_leads_elsewhere(made, tmp_path, monkeypatch):
    """A manifest names files anywhere: the user gives it, the dataset doesn't."""
    videos, _ = made
    data = (videos / "b.mp4").read_bytes()
    pack(tmp_path / "tars" / "x.tar", [("k.mp4", data), ("k.txt", b"one")])
    (tmp_path / "lists").mkdir()
    manifest = tmp_path / "lists" / "list.jsonl"
    manifest.write_text(json.dumps({"video": os.path.relpath(videos / "b.mp4", manifest.parent)}))
    codec = ["--codec", f"default:{made[1]}", "--size", "32x48", "--frames", "5"]
    for name, source in (("of tars", tmp_path / "tars"), ("of a manifest", manifest)):
        assert encode.main([str(source), str(tmp_path / name), *codec]) == 0
        shown = preview.preview(tmp_path / name, tmp_path / "out", source=source)
        assert len(shown) == 2 and all(clip.psnr is not None and not clip.problem for clip in shown)


def test_a_short_original_is_named(made):
    card = {"video": {"fps": 16, "frames": 5, "height": 32, "width": 48}}
    with pytest.raises(ValueError, match=r"b.mp4: 2 frames from 0.62 s on, the clip has 5"):
        read_original(
            Sample(None, None, {"source": "b.mp4", "start": 0.625}),
            card,
            {row.source: row for row in list_source(made[0])},
        )


def test_errors_are_one_line(made, tmp_path, capsys):
    rng = np.random.default_rng(0)
    write_samples(tmp_path / "bare", [(0, 0, rng.standard_normal((16, 2, 4, 6)), np.ones((1, 4)), {})], codec="default")
    for arguments, says in (
        ([str(tmp_path / "none")], "no such folder"),
        ([str(tmp_path / "bare")], "codec.safetensors"),
        ([str(made[1]), "--clips", "0"], "--clips 0: must be at least 1"),
        ([str(made[1]), "--seed", "-1"], "--seed -1"),
        ([str(made[1]), "--source", str(tmp_path / "none")], "none: no such folder or manifest"),
    ):
        assert preview.main([*arguments, "--out", str(tmp_path / "out")]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ") and says in lines[0]
    assert not (tmp_path / "out").exists()


def test_a_merged_dataset_has_no_single_source(made, tmp_path, capsys):
    settings = {"merged": [{"path": "a", "card": "1"}, {"path": "b", "card": "2"}]}
    copy = tmp_path / "data"
    shutil.copytree(made[1], copy)
    change_card(copy, lambda card: card["source"].update(settings=settings))
    arguments = [str(copy), "--out", str(tmp_path / "out")]
    assert preview.main([*arguments, "--source", str(made[0])]) == 2
    assert "is merged, its videos come from several sources" in capsys.readouterr().err
    assert preview.main(arguments) == 0


def test_psnr():
    black = np.zeros((2, 2, 2, 3), np.uint8)
    assert psnr_of(black, black + 255) == pytest.approx(0) and psnr_of(black, black) == pytest.approx(100)
