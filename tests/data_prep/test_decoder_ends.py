"""Workers that crash, hang, answer nonsense or are stopped: no file ends more than its own video."""

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import av
import numpy as np
import pytest

from data_prep import decoder_worker
from data_prep.decoder import Decoders
from data_prep.video import Problem, VideoError
from tests.data_prep.decoding import FRAMES, PROJECT, SIZE, eventually, expected, gone, pids, same, span, started


def test_a_crash_ends_one_video(coded_videos):
    spans = [
        span(coded_videos[0], size=SIZE),
        span(coded_videos[2]),
        span(coded_videos[0], size=SIZE),
        span(coded_videos[3]),
    ]
    with Decoders(2) as decoders:
        for n, video in enumerate(decoders.videos(spans)):
            clips = expected(video.span.path, size=video.span.size)[0]
            if n == 0:
                found = [next(video)]
                os.kill(decoders._workers[0].process.pid, signal.SIGSEGV)
                found += list(video)
                assert same(found, clips[: len(found)]) and len(found) < len(clips)
                assert video.problem == Problem("undecodable", "the decoder crashed: SIGSEGV")
            else:
                assert same(list(video), clips) and video.problem is None


@pytest.mark.parametrize("more", [{}, {"skip": 1}, {"clips": 6}, {"skip": 2, "clips": 5, "place": 0.1}])
def test_a_killed_worker_costs_nothing_once(coded_videos, more):
    """The kernel kills any process when the machine's memory is full: that is not the video's fault."""
    given = span(coded_videos[0], size=SIZE, **more)
    with Decoders() as decoders:
        undisturbed = next(list(video) for video in decoders.videos([given]))
        for kills in (1, 2):
            videos_ = decoders.videos([given])
            video, found, killed = next(videos_), [], set()
            for clip in video:
                found.append(clip)
                for pid in set(pids(decoders)) - killed if len(killed) < kills else ():
                    assert eventually(lambda pid=pid: started(pid))
                    os.kill(pid, signal.SIGKILL)
                    assert eventually(lambda pid=pid: gone(pid))
                    killed.add(pid)
            assert len(killed) == kills
            if kills == 1:
                assert same(found, undisturbed) and video.problem is None
            else:
                assert same(found, undisturbed[: len(found)]) and len(found) < len(undisturbed)
                assert video.problem == Problem("undecodable", "the decoder crashed: SIGKILL")


def test_many_crashes_and_other_deaths_in_a_row(coded_videos, tmp_path, in_worker):
    codes = {
        "crash.mp4": "os.kill(os.getpid(), signal.SIGSEGV)",
        "abort.mp4": "os.abort()",
        "leave.mp4": "os._exit(3)",
        "raise.mp4": "raise KeyError('a\\nb')",
        "deny.mp4": "raise PermissionError(13, 'Permission denied')",
        "full.mp4": "raise MemoryError",
    }
    in_worker(codes)
    names = ["crash.mp4"] * 4 + list(codes)[1:]
    paths = [tmp_path / name for name in names] + [coded_videos[2]]
    with Decoders() as decoders:
        found = [(len(list(video)), video.problem) for video in decoders.videos(map(span, paths))]
    assert found[:4] == [(0, Problem("undecodable", "the decoder crashed: SIGSEGV"))] * 4
    assert found[4:] == [
        (0, Problem("undecodable", "the decoder crashed: SIGABRT")),
        (0, Problem("undecodable", "the decoder ended with status 3")),
        (0, Problem("undecodable", "KeyError: 'a\\nb'")),
        (0, Problem("unreadable", "Permission denied")),
        (0, Problem("too large", "needs more than 8 GiB of memory")),
        (2, None),
    ]


def test_a_worker_that_dies_without_work_costs_nothing(coded_videos):
    with Decoders() as decoders:
        for path in coded_videos[2:]:
            for video in decoders.videos([span(path)]):
                assert same(list(video), expected(path)[0]) and video.problem is None
            (pid,) = pids(decoders)
            os.kill(pid, signal.SIGKILL)
            assert eventually(lambda pid=pid: gone(pid))


@pytest.mark.slow
def test_a_hang_ends_one_video(coded_videos, tmp_path, in_worker):
    in_worker({"hang.mp4": "time.sleep(1000)"})
    spans = [span(tmp_path / "hang.mp4"), span(coded_videos[0], size=SIZE), span(coded_videos[2])]
    with Decoders(seconds_per_clip=1.0) as decoders:
        videos_ = decoders.videos(spans)
        video = next(videos_)
        assert list(video) == [] and video.problem == Problem("undecodable", "no clip within 1 s")

        video = next(videos_)
        clips, found = expected(coded_videos[0], size=SIZE)[0], [next(video)]
        (pid,) = pids(decoders)
        os.kill(pid, signal.SIGSTOP)
        found += list(video)
        assert same(found, clips[: len(found)]) and 1 <= len(found) < len(clips)
        assert video.problem == Problem("undecodable", "no clip within 1 s") and eventually(lambda: gone(pid))

        video = next(videos_)
        assert same(list(video), expected(coded_videos[2])[0]) and video.problem is None


@pytest.mark.parametrize("ahead", [1, 2])
def test_a_slow_consumer_is_no_hang(coded_videos, ahead):
    with Decoders(ahead=ahead, seconds_per_clip=0.5) as decoders:
        for video in decoders.videos([span(coded_videos[3], size=SIZE, clips=4)]):
            found = []
            for clip in video:
                time.sleep(0.7 if len(found) in (0, 2) else 0)
                found.append(clip)
            assert same(found, expected(coded_videos[3], size=SIZE)[0][:4]) and video.problem is None


@pytest.mark.slow
def test_a_picture_that_is_too_large_for_the_memory(coded_videos, tmp_path):
    path = tmp_path / "large.mov"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", rate=25, options={"compression_level": "1"})
        stream.width, stream.height, stream.pix_fmt = 7000, 7000, "gray"
        frame = av.VideoFrame.from_ndarray(np.zeros((7000, 7000), np.uint8), format="gray")
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    large, good = span(path, frames=1), span(coded_videos[2])
    with Decoders(memory_gib=0.5) as decoders:
        found = [(len(list(video)), video.problem) for video in decoders.videos([good, large, good])]
    assert found == [(2, None), (0, Problem("too large", "needs more than 0.5 GiB of memory")), (2, None)]
    with Decoders() as decoders:
        assert [len(list(video)) for video in decoders.videos([large])] == [1]


@pytest.mark.slow
def test_an_early_stop_leaves_the_next_videos_whole(coded_videos):
    clips = expected(coded_videos[0], size=SIZE)[0]
    spans = [span(coded_videos[0], size=SIZE) for _ in range(5)]
    for workers in (1, 2):
        with Decoders(workers) as decoders:
            found = []
            for n, video in enumerate(decoders.videos(spans)):
                some = [next(video) for _ in range((8, 0, 1, 7, 8)[n])]
                if n % 4 == 0:
                    some += video
                found.append(same(some, clips[: len(some)]) and video.problem is None)
            assert found == [True] * 5
            assert [worker.held for worker in decoders._workers] == [0] * workers

            first = decoders.videos(spans)
            taken = next(first)
            next(taken)
            second = decoders.videos(spans[:2])
            assert [same(list(video), clips) for video in second] == [True] * 2
            for old in (first, taken):  # never silently without clips
                with pytest.raises(RuntimeError):
                    next(old)


def test_a_long_decode_is_stopped_when_nobody_wants_it(coded_videos, tmp_path, in_worker):
    in_worker({"hang.mp4": "time.sleep(1000)"})
    with Decoders(seconds_per_clip=20.0) as decoders:
        found = decoders.videos([span(tmp_path / "hang.mp4"), span(coded_videos[2])])
        next(found)
        assert eventually(lambda: decoders._workers[0].current)
        began = time.monotonic()
        assert len(list(next(found))) == 2 and time.monotonic() - began < 15


def test_no_process_is_left(coded_videos):
    spans = [span(coded_videos[0], size=SIZE) for _ in range(6)]
    for stopped in (False, True):
        with pytest.raises(ZeroDivisionError), Decoders(3) as decoders:
            found = iter(decoders.videos(spans))
            video = next(found)
            next(video)
            assert eventually(lambda decoders=decoders: len(pids(decoders)) == 3)
            left = pids(decoders)
            if stopped:
                os.kill(left[0], signal.SIGSTOP)
            began = time.monotonic()
            _ = 1 / 0
        assert all(gone(pid) for pid in left) and time.monotonic() - began < 5
        assert not any(worker.thread.is_alive() for worker in decoders._workers)
        with pytest.raises(RuntimeError, match="closed"):
            next(decoders.videos(spans))
        with pytest.raises(RuntimeError):
            list(video)


def test_no_process_outlives_a_killed_parent(coded_videos, tmp_path):
    """One of the workers is stopped, so that it can't see the end of its pipes."""
    script = f"""
import os, signal, time
from pathlib import Path
from data_prep.decoder import Decoders, Span
decoders = Decoders(2)
found = decoders.videos([Span(Path({str(coded_videos[0])!r}), 25, {SIZE}, {FRAMES})] * 4)
next(next(found))
while not all(worker.held for worker in decoders._workers):
    time.sleep(0.01)
pids = [worker.process.pid for worker in decoders._workers]
os.kill(pids[0], signal.SIGSTOP)
print(*pids, flush=True)
time.sleep(1000)
"""
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2 and not any(gone(pid) for pid in workers)
        parent.kill()
    ended = [eventually(lambda pid=pid: gone(pid), 5.0) for pid in workers]
    for pid, good in zip(workers, ended):
        if not good:
            os.kill(pid, signal.SIGKILL)
    assert ended == [True, True]


def test_interrupts_are_the_parents(coded_videos):
    with Decoders() as decoders:
        for video in decoders.videos([span(coded_videos[0], size=SIZE)]):
            found = [next(video)]
            os.kill(pids(decoders)[0], signal.SIGINT)
            assert same(found + list(video), expected(coded_videos[0], size=SIZE)[0])


def test_only_messages_come_from_a_worker(coded_videos, tmp_path, in_worker):
    path = shutil.copy(coded_videos[2], tmp_path / "loud.mp4")
    in_worker({"loud.mp4": "os.write(1, b'noise\\n'); print('noise', flush=True); assert os.read(0, 9) == b''"})
    with Decoders(seconds_per_clip=5.0) as decoders:
        for video in decoders.videos([span(path)] * 2):
            assert same(list(video), expected(path)[0]) and video.problem is None


def test_a_worker_that_does_not_start(coded_videos, monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with Decoders() as decoders:
        found = decoders.videos([span(coded_videos[2])] * 9)
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"does not start \(the decoder ended with status 1\)") as caught:
                list(next(found))
            assert "\n" not in str(caught.value)
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with Decoders() as decoders, pytest.raises(RuntimeError, match="No such file"):
        for video in decoders.videos([span(coded_videos[2])]):
            list(video)


def test_a_worker_that_answers_nonsense(coded_videos, tmp_path, in_worker):
    """Such as one that a file has taken over."""
    line = "import sys; [os.write(fd, b'[1]\\n') for fd in range(3, 9) if os.path.realpath(f'/proc/self/fd/{fd}')"
    in_worker(
        {"odd.mp4": line + ".startswith('/proc') and 'pipe' in os.readlink(f'/proc/self/fd/{fd}') and fd % 2 == 0]"}
    )
    with Decoders(seconds_per_clip=5.0) as decoders:
        found = [
            (len(list(video)), video.problem)
            for video in decoders.videos([span(tmp_path / "odd.mp4"), span(coded_videos[2])])
        ]
    assert found[0] == (0, Problem("undecodable", "the decoder's answer makes no sense")) and found[1] == (2, None)


def test_errors_of_the_file_system(coded_videos, monkeypatch):
    """Clips from before the error are kept."""

    def frames(*arguments):
        yield from np.ones((7, 32, 48, 3), np.uint8)
        raise errors[-1]

    errors = []
    monkeypatch.setattr(decoder_worker, "read_frames", frames)
    request = {"path": "a", "fps": 25, "size": [32, 48], "frames": 5, "start": 0.0, "end": None, "clips": None}
    for error, reason, detail in (
        (OSError(errno.EIO, "Input/output error", "a"), "unreadable", "Input/output error"),
        (VideoError("a", "undecodable", "Cannot allocate memory, good for 1 s"), "too large", "more than 2 GiB"),
        (SystemError("a\nb"), "undecodable", "SystemError: a b"),
    ):
        errors.append(error)
        answers = io.BytesIO()
        decoder_worker.serve(io.BytesIO(json.dumps(request).encode() + b"\n"), answers, 2.0)
        ready, head, rest = answers.getvalue().split(b"\n", 2)
        end = json.loads(rest[5 * 32 * 48 * 3 :])
        assert json.loads(ready) == {"ready": True} and json.loads(head) == {"clip": True, "begin": 0}
        assert end["left"] == 2 and end["problem"][0] == reason and detail in end["problem"][1]
