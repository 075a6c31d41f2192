"""Decoding in worker processes: the same clips as in one process."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data_prep import decoder_worker
from data_prep.decoder import Decoders
from data_prep.video import Problem, read_frames
from tests.data_prep.decoding import FRAMES, PROJECT, SIZE, eventually, expected, pids, same, span
from tests.data_prep.test_video import write, write_sound


@pytest.mark.parametrize("workers, ahead", [(1, 1), (1, 2), (3, 3)])
def test_the_clips_are_those_of_read_frames_in_order(coded_videos, workers, ahead):
    spans = [span(path) for path in coded_videos * 3] + [
        span(coded_videos[0], start=0.52, end=1.2),
        span(coded_videos[0], start=1.2, fps=16, frames=3),
        span(coded_videos[0], size=SIZE, frames=9),
    ]
    with Decoders(workers, ahead) as decoders:
        count = 0
        for given, video in zip(spans, decoders.videos(iter(spans))):
            clips, left, reason = expected(given.path, given.fps, given.size, given.frames, given.start, given.end)
            assert video.span is given and same(list(video), clips) and reason is None
            assert video.left == left
            assert video.problem == (None if clips else Problem("too short", "4 of 5 frames"))
            count += 1
    assert count == len(spans)


@pytest.mark.parametrize("stride", [1, 3, 5, 7, 40])
@pytest.mark.parametrize("skip", [0, 2])
def test_clips_begin_every_stride_frames(coded_videos, stride, skip):
    frames = np.stack(list(read_frames(coded_videos[3], 25, (32, 48))))  # 33
    starts = range(0, len(frames) - FRAMES + 1, stride)
    with Decoders(1) as decoders:
        (found,) = [
            (list(video), video) for video in decoders.videos([span(coded_videos[3], stride=stride, skip=skip)])
        ]
        assert same(found[0], [frames[n : n + FRAMES] for n in starts][skip:])
        assert found[1].left == len(frames) - starts[-1] - FRAMES and found[1].problem is None
        (limited,) = [list(video) for video in decoders.videos([span(coded_videos[3], stride=stride, clips=1)])]
        assert same(limited, [frames[:FRAMES]])


def test_a_long_gap_is_no_hang(coded_videos):
    """The worker gives a sign of life every few frames."""
    told = []
    given = span(coded_videos[0], stride=1000)
    assert decoder_worker.decode(given, lambda message, data=None: told.append(message["clip"]), 8.0) == (None, 35)
    assert told == [True] + [False] * 7


def test_a_worker_works_ahead_but_not_far(coded_videos):
    spans = [span(coded_videos[0], size=SIZE) for _ in range(20)]
    with Decoders(1, ahead=3) as decoders:
        worker, taken, far = decoders._workers[0], [], 0
        for video in decoders.videos(spans[n] for n in range(20) if not taken.append(n)):
            assert len(taken) - far <= 4  # this one, and three ahead
            for _ in video:
                assert eventually(lambda: worker.held == 2 or len(taken) == 20)
                time.sleep(0.002)
                assert worker.held <= 2 and sum(len(v._clips) for v in decoders._pending) <= 2
            if far < 15:
                assert eventually(lambda: decoders._pending[1]._clips)  # over the end of a video
            far += 1
    assert far == 20


def test_a_limited_number_of_clips(coded_videos):
    clips = expected(coded_videos[0])[0]
    with Decoders() as decoders:
        found = []
        for video in decoders.videos([span(coded_videos[0], clips=n) for n in (1, 3, 8, 9)]):
            found.append(same(list(video), clips[: video.span.clips]) and video.problem is None and video.left == 0)
            found.append(pids(decoders))
    assert found[::2] == [True] * 4
    assert all(pid == found[1] for pid in found[1::2])  # such an end costs no worker


@pytest.mark.parametrize("skip", [0, 1, 7, 8, 9])
def test_skipped_clips_are_decoded_and_left_out(coded_videos, skip):
    """As one goes on behind clips that are made already: all else is as if they came."""
    whole, left, _ = expected(coded_videos[0])
    with Decoders() as decoders:
        for video in decoders.videos([span(coded_videos[0], skip=skip)]):
            clips = list(video)
    assert len(whole) == 8 and same(clips, whole[skip:])
    assert (video.problem, video.left) == (None, left)


def test_a_place_is_a_share_of_the_room(coded_videos):
    """40 frames at 25 per second have room for a clip of 5 frames in 1.4 s."""
    with Decoders() as decoders:
        for place, start in ((0.0, 0.0), (0.5, 0.7), (1.0, 1.4)):
            for video in decoders.videos([span(coded_videos[0], clips=1, place=place)]):
                clips = list(video)
            assert video.room == pytest.approx(1.4)
            assert same(clips, expected(coded_videos[0], start=start)[0][:1])


def test_what_is_damaged_or_no_video(coded_videos, tmp_path):
    data = coded_videos[0].read_bytes()
    whole = write(tmp_path / "whole.mkv", frames=60, options={"g": "12"})
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 6 // 10])
    (tmp_path / "index.mp4").write_bytes(data[: len(data) * 8 // 10])
    (tmp_path / "text.mp4").write_bytes(b"no video\n" * 50)
    sound = write_sound(tmp_path / "sound.mp4")
    paths = [
        cut,
        tmp_path / "index.mp4",
        tmp_path / "text.mp4",
        sound,
        tmp_path / "none.mp4",
        tmp_path,
        coded_videos[2],
    ]
    with Decoders(2) as decoders:
        found = [(list(video), video.left, video.problem) for video in decoders.videos(span(path) for path in paths)]
    for path, (clips, left, problem) in zip(paths, found):
        others, other_left, reason = expected(path)
        assert same(clips, others) and left == other_left and (problem and problem.reason) == reason
    assert [problem and problem.reason for _, _, problem in found] == [
        "truncated",
        "truncated",
        "not a video",
        "no video stream",
        "missing",
        "missing",
        None,
    ]
    assert 0 < len(found[0][0]) < 12 and "good for" in found[0][2].detail


def test_names_that_are_not_utf8_and_relative_names(coded_videos, tmp_path, monkeypatch):
    raw = os.fsencode(tmp_path) + b'/na\xefve \xff\n".mp4'
    shutil.copy(coded_videos[2], raw)
    shutil.copy(coded_videos[2], tmp_path / "ü.mp4")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data_prep").mkdir()  # not the package
    (tmp_path / "av.py").write_text("1 / 0")
    monkeypatch.setenv("PYTHONPATH", "no/such:")
    clips = expected(coded_videos[2])[0]
    with Decoders() as decoders:
        for video in decoders.videos(span(path) for path in (Path(os.fsdecode(raw)), Path("ü.mp4"))):
            assert same(list(video), clips) and len(clips) == 2 and video.problem is None


def test_bad_arguments():
    for arguments in ({"fps": 0}, {"start": -1}, {"start": 2, "end": 1}, {"frames": 0}, {"clips": 0}):
        with pytest.raises(ValueError, match=r"x\.mp4: .*(need fps > 0|at least 1)"):
            span(Path("x.mp4"), **arguments)
    for arguments in ({"workers": 0}, {"ahead": 0}, {"seconds_per_clip": 0}, {"memory_gib": 0}):
        with pytest.raises(ValueError, match="must be"):
            Decoders(**arguments)


def test_a_worker_starts_light():
    """It must not import torch, which would take seconds."""
    code = "import sys, data_prep.decoder_worker; print(sorted({'torch', 'tqdm', 'transformers'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=PROJECT, text=True) == "[]\n"
