"""Buckets: every video in the dataset of the nearest shape, whatever the jobs, the kills and the form of the source."""

import json
import random
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import yaml

from data_prep import encode, survey
from data_prep.buckets import mixture, nearest_bucket, parse_buckets
from data_prep.card import read_card
from data_prep.decoder import Decoders
from data_prep.decoder_worker import Span
from data_prep.index import SampleIndex
from data_prep.sources import list_source
from data_prep.verify import verify
from data_prep.video import VideoError, picture_size
from rf_train.config import from_dict
from rf_train.data.mixture import MixedDataset
from tests.data_prep.encoded import failures, samples
from tests.data_prep.test_tars import pack
from tests.data_prep.test_video import write, write_sound

pytestmark = pytest.mark.usefixtures("quick_fit")

WIDE, TALL, SQUARE = "32x48", "48x32", "32x32"
ARGUMENTS = ["--frames", "5", "--samples-per-shard", "3", "--videos-per-part", "2"]
BUCKETS = ["--buckets", f"{WIDE},{TALL},{SQUARE}"]


@pytest.fixture
def videos(tmp_path):
    """Seven videos, of which two are not what their stored pictures look like, and two can't be read."""
    folder = tmp_path / "videos"
    folder.mkdir()
    write(folder / "a wide.mp4", frames=12, fps=16, size=(64, 96))
    (folder / "b broken.mp4").write_bytes(b"no")
    write(folder / "c tall.mp4", frames=11, fps=16, size=(96, 64))
    write(folder / "d turned.mp4", frames=6, fps=16, size=(64, 96), rotation=90)
    write(folder / "e square.mp4", frames=5, fps=16, size=(64, 64))
    write(folder / "f pixels.mp4", frames=10, fps=16, size=(64, 64), sar=Fraction(3, 2))
    write_sound(folder / "g sound.mp4")
    (folder / "a wide.txt").write_text("one")
    return folder


def run(src, out, *more):
    return encode.main([str(src), str(out), *ARGUMENTS, *BUCKETS, *more])


def content(out):
    """Every file of a folder and those below, by name."""
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def sources(dataset):
    """{key: source} of all samples."""
    return {key: sample.meta["source"] for key, sample in samples(dataset).items()}


def test_the_nearest_shape_is_that_of_the_log_ratio_and_ties_go_by_order():
    wide, tall, square = buckets = parse_buckets("480x832, 832x480,624x624")
    assert (wide, tall, square) == ((480, 832), (832, 480), (624, 624))
    assert nearest_bucket((1080, 1920), buckets) == wide and nearest_bucket((1920, 1080), buckets) == tall
    assert nearest_bucket((1000, 1001), buckets) == square
    # Between the square and the wide one lies their geometric mean: 1.3166 of 1.7333, not the arithmetic 1.3667.
    assert nearest_bucket((1000, 1310), buckets) == square and nearest_bucket((1000, 1320), buckets) == wide
    assert nearest_bucket((7, 7), [tall, wide]) == tall and nearest_bucket((7, 7), [wide, tall]) == wide
    assert nearest_bucket((10, 40), [(10, 20), (10, 80)]) == (10, 20)  # equally far, in logarithms
    with pytest.raises(ValueError, match="480x832 and 960x1664 have the same shape"):
        parse_buckets("480x832,960x1664")
    with pytest.raises(ValueError, match="HEIGHTxWIDTH"):
        parse_buckets("480x832,")


def test_the_size_of_a_picture_is_as_it_is_shown(videos):
    sizes = {path.name[2:-4]: picture_size(path) for path in sorted(videos.glob("[acdef]*.mp4"))}
    assert sizes == {"wide": (64, 96), "tall": (96, 64), "turned": (96, 64), "square": (64, 64), "pixels": (64, 96)}
    with pytest.raises(VideoError, match="no video stream"):
        picture_size(videos / "g sound.mp4")
    spans = [Span(path, 1, (1, 1), 1, only_size=True) for path in sorted(videos.glob("*.mp4"))]
    with Decoders(2) as decoders:
        found = [
            (list(video), video.picture, video.problem and video.problem.reason) for video in decoders.videos(spans)
        ]
    assert [size for _, size, _ in found] == [(64, 96), None, (96, 64), (96, 64), (64, 64), (64, 96), None]
    assert not any(clips for clips, _, _ in found) and found[1][2] == "not a video" and found[6][2] == "no video stream"


def test_each_bucket_is_a_dataset_and_together_they_are_a_mixture(videos, tmp_path, capsys):
    out = tmp_path / "data"
    assert run(videos, out) == 0
    captured = capsys.readouterr()
    assert "6 of 7 videos have no caption" in captured.err and captured.err.count("fitted the default codec") == 1
    wide, tall, square = (out / name for name in (WIDE, TALL, SQUARE))
    # The number of a video is its place in the source, so it is unique over all buckets.
    assert sources(wide) == {
        "000000_0000": "a wide.mp4", "000000_0001": "a wide.mp4", "000005_0000": "f pixels.mp4",
        "000005_0001": "f pixels.mp4",
    }  # fmt: skip
    assert set(sources(tall).values()) == {"c tall.mp4", "d turned.mp4"} and len(sources(tall)) == 3
    assert sources(square) == {"000004_0000": "e square.mp4"}
    assert [verify(folder) for folder in (wide, tall, square)] == [4, 3, 1]
    assert [(one["source"], one["reason"]) for one in failures(wide)] == [
        ("b broken.mp4", "not a video"), ("g sound.mp4", "no video stream"),
    ]  # fmt: skip
    assert failures(tall) == failures(square) == []
    cards = [read_card(folder) for folder in (wide, tall, square)]
    assert [card["counts"]["videos"] for card in cards] == [4, 2, 1]
    assert [(card["video"]["height"], card["video"]["width"]) for card in cards] == [(32, 48), (48, 32), (32, 32)]
    assert len({card["codec"]["hash"] for card in cards}) == 1  # or else they could not be mixed

    printed = captured.out[captured.out.index("data:\n") :]
    data = yaml.safe_load(printed)["data"]
    assert [part["weight"] for part in data["mixtures"][0]["parts"]] == [4, 3, 1]
    model = {"channels": 16, "text_dim": cards[0]["text"]["dim"], "text_len": cards[0]["text"]["max_tokens"]}
    recipe = from_dict({"data": data, "stages": [{"frames": 2}], "model": {"chunk": 1, "first_chunk": 1, **model}})
    from rf_train.data.batches import open_datasets

    mixed = open_datasets(recipe)["buckets"]
    assert isinstance(mixed, MixedDataset) and len(mixed) == 8 and mixed.by == "step"

    before = content(out)
    assert run(videos, out) == 0
    said = capsys.readouterr().out
    assert said.count("the dataset exists already") == 3 and printed in said and content(out) == before


@pytest.mark.slow
def test_jobs_that_are_killed_anywhere_make_the_bytes_of_one(videos, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "data"
    for number in range(3):
        shutil.copy(videos / "c tall.mp4", videos / f"h{number}.mp4")
    assert run(videos, whole) == 0
    start = (
        "import sys; from data_prep import default_codec, encode, survey; default_codec.STEPS = 5; survey.PIECE = 2;"
        "sys.exit(encode.main())"
    )
    command = [sys.executable, "-c", start, str(videos), str(out), *ARGUMENTS, *BUCKETS]
    rng, kills = random.Random(0), 8
    running: dict[int, subprocess.Popen] = {}
    while True:
        for job in range(2):
            if job not in running or (running[job].returncode or 0) < 0:
                running[job] = subprocess.Popen([*command, "--job", f"{job}/2"], stderr=subprocess.DEVNULL)
        if not kills:
            break
        time.sleep(rng.uniform(0.3, 2.5))
        victim = running[rng.randrange(2)]
        victim.kill()
        victim.wait()
        kills -= 1
        for job in range(2):
            if running[job].poll() is not None and running[job].returncode >= 0:
                running.pop(job)
    assert [job.wait() for job in running.values()] == [0, 0]
    assert run(videos, out) == 0  # a killed job may have been the last one
    found, expected = content(out), content(whole)
    pieces = [name for name in (*found, *expected) if name.startswith("survey-")]
    assert len(pieces) == 6  # of 10 videos: five of 2 each, and one of all
    assert {n: d for n, d in found.items() if n not in pieces} == {n: d for n, d in expected.items() if n not in pieces}


def test_a_survey_goes_on_behind_its_last_whole_piece_and_is_not_made_again(videos, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "data"
    monkeypatch.setattr(survey, "PIECE", 2)
    assert run(videos, whole) == 0
    real, asked = survey.find_pictures, []

    def stops(rows, workers):
        asked.append([row.index for row in rows])
        if len(asked) == 3:
            raise KeyboardInterrupt
        return real(rows, workers)

    monkeypatch.setattr(survey, "find_pictures", stops)
    assert run(videos, out) == 130
    (out / "survey-000000.json").write_text((out / "survey-000000.json").read_text().replace("64", "65", 1))
    assert run(videos, out) == 0
    assert asked == [[0, 1], [2, 3], [4, 5], [0, 1], [4, 5], [6]]
    assert content(out) == content(whole)


def test_what_could_not_be_used_stays_so_for_all_jobs_until_retry(videos, tmp_path):
    """A caption that could not be read, or a damaged tar, is mended while jobs run."""
    (tmp_path / "data").mkdir()
    good = next(row for row in list_source(videos) if row.source == "c tall.mp4")
    bad = replace(good, problem="its caption: Input/output error")
    buckets = parse_buckets(f"{WIDE},{TALL}")
    for row, retry, size in ((bad, False, (32, 48)), (good, False, (32, 48)), (good, True, (48, 32))):
        (found,) = survey.survey(tmp_path / "data", [row], buckets, False, 1, retry)
        assert found.size == size and found.trouble == (None if retry else bad.trouble)


@pytest.mark.slow
def test_retry_moves_what_is_mended_into_its_own_bucket(videos, tmp_path, capsys):
    """What is read now may belong elsewhere; a bucket that has nothing any more goes."""
    shutil.copy(videos / "c tall.mp4", tmp_path / "good.mp4")
    (videos / "e square.mp4").rename(tmp_path / "square.mp4")
    whole, out = tmp_path / "whole", tmp_path / "data"
    write(videos / "e square.mp4", frames=5, fps=16, size=(96, 64))
    assert run(videos, tmp_path / "codec") == 0
    codec = ["--codec", f"default:{tmp_path / 'codec'}"]
    assert run(videos, out, *codec) == 0 and not (out / SQUARE).exists()
    assert f"{SQUARE}: no video has this shape" in capsys.readouterr().out
    shutil.copy(tmp_path / "good.mp4", videos / "b broken.mp4")
    shutil.copy(tmp_path / "square.mp4", videos / "e square.mp4")
    assert run(videos, out, *codec) == 2
    assert "differs in source_sizes" in capsys.readouterr().err
    assert run(videos, out, *codec, "--retry") == 0
    assert set(sources(out / TALL).values()) == {"b broken.mp4", "c tall.mp4", "d turned.mp4"}
    assert [one["source"] for one in failures(out / WIDE)] == ["g sound.mp4"]
    assert run(videos, whole, *codec) == 0
    assert content(out) == content(whole) and (out / SQUARE).exists()
    write(videos / "e square.mp4", frames=9, fps=16, size=(96, 64))
    assert run(videos, out, *codec, "--retry") == 0 and not (out / SQUARE).exists()


def test_tars_and_manifests(videos, tmp_path):
    good = [path for path in sorted(videos.glob("*.mp4")) if path.name[0] not in "bg"]
    pack(tmp_path / "tars" / "x.tar", [(f"{path.name[0]}.mp4", path.read_bytes()) for path in good])
    entries = [{"video": f"videos/{path.name}"} for path in good]
    entries.insert(1, {"video": "videos/c tall.mp4", "start": 0.3, "end": 0.65})
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert run(tmp_path / "tars", tmp_path / "a") == run(tmp_path / "list.jsonl", tmp_path / "b") == 0
    assert [len(sources(tmp_path / "a" / name)) for name in (WIDE, TALL, SQUARE)] == [4, 3, 1]
    assert set(sources(tmp_path / "a" / TALL).values()) == {"x.tar/c.mp4", "x.tar/d.mp4"}
    assert [len(sources(tmp_path / "b" / name)) for name in (WIDE, TALL, SQUARE)] == [4, 4, 1]
    assert samples(tmp_path / "b" / TALL)["000001_0000"].meta["start"] == 0.3


def test_a_bucket_without_a_clip_keeps_its_failures_and_a_source_without_one_is_an_error(videos, tmp_path, capsys):
    for name in "cd":
        next(videos.glob(f"{name}*.mp4")).unlink()
    write(videos / "short.mp4", frames=3, fps=16, size=(96, 64))
    out, none = tmp_path / "data", tmp_path / "none"
    for _ in range(2):
        assert run(videos, out) == 0
        captured = capsys.readouterr()
        assert f"{TALL}: {videos}: no clip could be made from 1 video: 1 too short" in captured.err
        assert [one["source"] for one in failures(out / TALL)] == ["short.mp4"] and f"/{TALL}" not in captured.out
    bad = tmp_path / "bad"
    bad.mkdir()
    for name in ("short.mp4", "b broken.mp4"):
        shutil.copy(videos / name, bad)
    assert run(bad, none) == 2
    assert "no clip could be made" in capsys.readouterr().err and list(none.iterdir()) == []
    assert run(bad, none, "--codec", f"default:{out}") == 2
    assert "no clip could be made" in capsys.readouterr().err and list(none.iterdir()) == []


def test_max_failures_counts_over_all_buckets(videos, tmp_path, capsys):
    """Two of seven failed, though they are two of the first bucket's four."""
    assert run(videos, tmp_path / "data", "--max-failures", "0.3") == 0
    assert run(videos, tmp_path / "other", "--max-failures", "0.2") == 2
    assert "2 of 7 videos failed" in capsys.readouterr().err


def test_one_folder_is_either_one_dataset_or_buckets(videos, tmp_path, capsys):
    plain, out = tmp_path / "plain", tmp_path / "data"
    assert encode.main([str(videos), str(plain), *ARGUMENTS, "--size", WIDE]) == run(videos, out) == 0
    capsys.readouterr()
    assert run(videos, plain) == 2
    assert f"differs in buckets (None, now {WIDE},{TALL},{SQUARE})" in capsys.readouterr().err
    assert encode.main([str(videos), str(out), *ARGUMENTS, "--size", WIDE]) == 2
    assert "differs in buckets" in capsys.readouterr().err
    for arguments, says in (
        (["--size", WIDE], "--size and --buckets: give one of them"),
        (["--buckets", "32x48,30x30"], "size 30x30: must be multiples of 16"),
        (["--buckets", "32x48,64x96"], "have the same shape"),
    ):
        assert run(videos, tmp_path / "new", *arguments) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1 and not (tmp_path / "new").exists()


def test_a_bucket_that_is_too_small_is_left_out_of_the_mixture():
    parts = yaml.safe_load(mixture({"a b/1": 5000, "é": 6, "c": 5}))["data"]["mixtures"][0]["parts"]
    assert parts == [{"data": "a b/1", "weight": 5000}, {"data": "é", "weight": 6}]


def test_the_index_of_a_bucket_has_gaps(videos, tmp_path):
    assert run(videos, tmp_path / "data") == 0
    folder: Path = tmp_path / "data" / WIDE
    assert SampleIndex(folder, read_card(folder)).rows["video"].tolist() == [0, 0, 5, 5]
