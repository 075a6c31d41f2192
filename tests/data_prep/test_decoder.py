"""Decoding in worker processes: the same clips as in one process, and no file ends more than its own video."""

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest

from data_prep import decoder_worker
from data_prep.decoder import Decoders, Span
from data_prep.video import Problem, VideoError, read_frames
from tests.data_prep.test_video import write, write_sound

PROJECT = Path(__file__).resolve().parent.parent.parent
SIZE, FRAMES = (256, 384), 5  # a clip of 1.5 MB: no pipe holds one


def span(path, **more):
    return Span(**{"path": path, "fps": 25, "size": (32, 48), "frames": FRAMES, **more})


def expected(path, fps=25, size=(32, 48), frames=FRAMES, start=0.0, end=None):
    """(whole clips, frames left, reason) from reading in this process."""
    read, reason = [], None
    try:
        for frame in read_frames(path, fps, size, start, end):
            read.append(frame)
    except VideoError as error:
        reason = error.reason
    whole = len(read) // frames
    return [np.stack(read[n * frames : (n + 1) * frames]) for n in range(whole)], len(read) % frames, reason


def same(clips, others):
    return len(clips) == len(others) and all(
        a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in zip(clips, others)
    )


def eventually(condition, seconds=20.0):
    """Waits until the condition holds; False if it never does."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return False


def started(pid):
    """Whether a worker has set its limits, the last thing before it serves: until then its death costs no video."""
    return str(8 << 30) in Path(f"/proc/{pid}/limits").read_text()


def gone(pid):
    """Whether a process has ended; one that nobody has collected yet has, too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def pids(decoders):
    return [worker.process.pid for worker in decoders._workers if worker.process]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Videos of 40, 4, 12 and 33 frames."""
    folder = tmp_path_factory.mktemp("videos")
    lengths = {"a.mp4": 40, "b.mkv": 4, "c.mp4": 12, "d.mkv": 33}
    return [write(folder / name, frames=n, options={"g": "8", "bf": "2"}) for name, n in lengths.items()]


@pytest.fixture
def in_worker(tmp_path, monkeypatch):
    """Has workers run Python code when they look for the file of a name: {name: code}."""

    def install(codes):
        folder = tmp_path / "hook"
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(f"""
import os, signal, time
def isfile(path, original=os.path.isfile):
    exec({codes!r}.get(os.path.basename(path), ""))
    return original(path)
os.path.isfile = isfile
""")
        monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)

    return install


@pytest.mark.parametrize("workers, ahead", [(1, 1), (1, 2), (3, 3)])
def test_the_clips_are_those_of_read_frames_in_order(videos, workers, ahead):
    spans = [span(path) for path in videos * 3] + [
        span(videos[0], start=0.52, end=1.2),
        span(videos[0], start=1.2, fps=16, frames=3),
        span(videos[0], size=SIZE, frames=9),
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
def test_clips_begin_every_stride_frames(videos, stride, skip):
    frames = np.stack(list(read_frames(videos[3], 25, (32, 48))))  # 33
    starts = range(0, len(frames) - FRAMES + 1, stride)
    with Decoders(1) as decoders:
        (found,) = [(list(video), video) for video in decoders.videos([span(videos[3], stride=stride, skip=skip)])]
        assert same(found[0], [frames[n : n + FRAMES] for n in starts][skip:])
        assert found[1].left == len(frames) - starts[-1] - FRAMES and found[1].problem is None
        (limited,) = [list(video) for video in decoders.videos([span(videos[3], stride=stride, clips=1)])]
        assert same(limited, [frames[:FRAMES]])


def test_a_long_gap_is_no_hang(videos):
    """The worker gives a sign of life every few frames."""
    told = []
    given = span(videos[0], stride=1000)
    assert decoder_worker.decode(given, lambda message, data=None: told.append(message["clip"]), 8.0) == (None, 35)
    assert told == [True] + [False] * 7


def test_a_worker_works_ahead_but_not_far(videos):
    spans = [span(videos[0], size=SIZE) for _ in range(20)]
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


def test_a_limited_number_of_clips(videos):
    clips = expected(videos[0])[0]
    with Decoders() as decoders:
        found = []
        for video in decoders.videos([span(videos[0], clips=n) for n in (1, 3, 8, 9)]):
            found.append(same(list(video), clips[: video.span.clips]) and video.problem is None and video.left == 0)
            found.append(pids(decoders))
    assert found[::2] == [True] * 4
    assert all(pid == found[1] for pid in found[1::2])  # such an end costs no worker


@pytest.mark.parametrize("skip", [0, 1, 7, 8, 9])
def test_skipped_clips_are_decoded_and_left_out(videos, skip):
    """As one goes on behind clips that are made already: all else is as if they came."""
    whole, left, _ = expected(videos[0])
    with Decoders() as decoders:
        for video in decoders.videos([span(videos[0], skip=skip)]):
            clips = list(video)
    assert len(whole) == 8 and same(clips, whole[skip:])
    assert (video.problem, video.left) == (None, left)


def test_a_place_is_a_share_of_the_room(videos):
    """40 frames at 25 per second have room for a clip of 5 frames in 1.4 s."""
    with Decoders() as decoders:
        for place, start in ((0.0, 0.0), (0.5, 0.7), (1.0, 1.4)):
            for video in decoders.videos([span(videos[0], clips=1, place=place)]):
                clips = list(video)
            assert video.room == pytest.approx(1.4)
            assert same(clips, expected(videos[0], start=start)[0][:1])


def test_what_is_damaged_or_no_video(videos, tmp_path):
    data = videos[0].read_bytes()
    whole = write(tmp_path / "whole.mkv", frames=60, options={"g": "12"})
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 6 // 10])
    (tmp_path / "index.mp4").write_bytes(data[: len(data) * 8 // 10])
    (tmp_path / "text.mp4").write_bytes(b"no video\n" * 50)
    sound = write_sound(tmp_path / "sound.mp4")
    paths = [cut, tmp_path / "index.mp4", tmp_path / "text.mp4", sound, tmp_path / "none.mp4", tmp_path, videos[2]]
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


def test_names_that_are_not_utf8_and_relative_names(videos, tmp_path, monkeypatch):
    raw = os.fsencode(tmp_path) + b'/na\xefve \xff\n".mp4'
    shutil.copy(videos[2], raw)
    shutil.copy(videos[2], tmp_path / "ü.mp4")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data_prep").mkdir()  # not the package
    (tmp_path / "av.py").write_text("1 / 0")
    monkeypatch.setenv("PYTHONPATH", "no/such:")
    clips = expected(videos[2])[0]
    with Decoders() as decoders:
        for video in decoders.videos(span(path) for path in (Path(os.fsdecode(raw)), Path("ü.mp4"))):
            assert same(list(video), clips) and len(clips) == 2 and video.problem is None


def test_a_crash_ends_one_video(videos):
    spans = [span(videos[0], size=SIZE), span(videos[2]), span(videos[0], size=SIZE), span(videos[3])]
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
def test_a_killed_worker_costs_nothing_once(videos, more):
    """The kernel kills any process when the machine's memory is full: that is not the video's fault."""
    given = span(videos[0], size=SIZE, **more)
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


def test_many_crashes_and_other_deaths_in_a_row(videos, tmp_path, in_worker):
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
    paths = [tmp_path / name for name in names] + [videos[2]]
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


def test_a_worker_that_dies_without_work_costs_nothing(videos):
    with Decoders() as decoders:
        for path in videos[2:]:
            for video in decoders.videos([span(path)]):
                assert same(list(video), expected(path)[0]) and video.problem is None
            (pid,) = pids(decoders)
            os.kill(pid, signal.SIGKILL)
            assert eventually(lambda pid=pid: gone(pid))


@pytest.mark.slow
def test_a_hang_ends_one_video(videos, tmp_path, in_worker):
    in_worker({"hang.mp4": "time.sleep(1000)"})
    spans = [span(tmp_path / "hang.mp4"), span(videos[0], size=SIZE), span(videos[2])]
    with Decoders(seconds_per_clip=1.0) as decoders:
        videos_ = decoders.videos(spans)
        video = next(videos_)
        assert list(video) == [] and video.problem == Problem("undecodable", "no clip within 1 s")

        video = next(videos_)
        clips, found = expected(videos[0], size=SIZE)[0], [next(video)]
        (pid,) = pids(decoders)
        os.kill(pid, signal.SIGSTOP)
        found += list(video)
        assert same(found, clips[: len(found)]) and 1 <= len(found) < len(clips)
        assert video.problem == Problem("undecodable", "no clip within 1 s") and eventually(lambda: gone(pid))

        video = next(videos_)
        assert same(list(video), expected(videos[2])[0]) and video.problem is None


@pytest.mark.parametrize("ahead", [1, 2])
def test_a_slow_consumer_is_no_hang(videos, ahead):
    with Decoders(ahead=ahead, seconds_per_clip=0.5) as decoders:
        for video in decoders.videos([span(videos[3], size=SIZE, clips=4)]):
            found = []
            for clip in video:
                time.sleep(0.7 if len(found) in (0, 2) else 0)
                found.append(clip)
            assert same(found, expected(videos[3], size=SIZE)[0][:4]) and video.problem is None


@pytest.mark.slow
def test_a_picture_that_is_too_large_for_the_memory(videos, tmp_path):
    path = tmp_path / "large.mov"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", rate=25, options={"compression_level": "1"})
        stream.width, stream.height, stream.pix_fmt = 7000, 7000, "gray"
        frame = av.VideoFrame.from_ndarray(np.zeros((7000, 7000), np.uint8), format="gray")
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    large, good = span(path, frames=1), span(videos[2])
    with Decoders(memory_gib=0.5) as decoders:
        found = [(len(list(video)), video.problem) for video in decoders.videos([good, large, good])]
    assert found == [(2, None), (0, Problem("too large", "needs more than 0.5 GiB of memory")), (2, None)]
    with Decoders() as decoders:
        assert [len(list(video)) for video in decoders.videos([large])] == [1]


@pytest.mark.slow
def test_an_early_stop_leaves_the_next_videos_whole(videos):
    clips = expected(videos[0], size=SIZE)[0]
    spans = [span(videos[0], size=SIZE) for _ in range(5)]
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


def test_a_long_decode_is_stopped_when_nobody_wants_it(videos, tmp_path, in_worker):
    in_worker({"hang.mp4": "time.sleep(1000)"})
    with Decoders(seconds_per_clip=20.0) as decoders:
        found = decoders.videos([span(tmp_path / "hang.mp4"), span(videos[2])])
        next(found)
        assert eventually(lambda: decoders._workers[0].current)
        began = time.monotonic()
        assert len(list(next(found))) == 2 and time.monotonic() - began < 15


def test_no_process_is_left(videos):
    spans = [span(videos[0], size=SIZE) for _ in range(6)]
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


def test_no_process_outlives_a_killed_parent(videos, tmp_path):
    """One of the workers is stopped, so that it can't see the end of its pipes."""
    script = f"""
import os, signal, time
from pathlib import Path
from data_prep.decoder import Decoders, Span
decoders = Decoders(2)
found = decoders.videos([Span(Path({str(videos[0])!r}), 25, {SIZE}, {FRAMES})] * 4)
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


def test_interrupts_are_the_parents(videos):
    with Decoders() as decoders:
        for video in decoders.videos([span(videos[0], size=SIZE)]):
            found = [next(video)]
            os.kill(pids(decoders)[0], signal.SIGINT)
            assert same(found + list(video), expected(videos[0], size=SIZE)[0])


def test_only_messages_come_from_a_worker(videos, tmp_path, in_worker):
    path = shutil.copy(videos[2], tmp_path / "loud.mp4")
    in_worker({"loud.mp4": "os.write(1, b'noise\\n'); print('noise', flush=True); assert os.read(0, 9) == b''"})
    with Decoders(seconds_per_clip=5.0) as decoders:
        for video in decoders.videos([span(path)] * 2):
            assert same(list(video), expected(path)[0]) and video.problem is None


def test_a_worker_that_does_not_start(videos, monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with Decoders() as decoders:
        found = decoders.videos([span(videos[2])] * 9)
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"does not start \(the decoder ended with status 1\)") as caught:
                list(next(found))
            assert "\n" not in str(caught.value)
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with Decoders() as decoders, pytest.raises(RuntimeError, match="No such file"):
        for video in decoders.videos([span(videos[2])]):
            list(video)


def test_a_worker_that_answers_nonsense(videos, tmp_path, in_worker):
    """Such as one that a file has taken over."""
    line = "import sys; [os.write(fd, b'[1]\\n') for fd in range(3, 9) if os.path.realpath(f'/proc/self/fd/{fd}')"
    in_worker(
        {"odd.mp4": line + ".startswith('/proc') and 'pipe' in os.readlink(f'/proc/self/fd/{fd}') and fd % 2 == 0]"}
    )
    with Decoders(seconds_per_clip=5.0) as decoders:
        found = [
            (len(list(video)), video.problem)
            for video in decoders.videos([span(tmp_path / "odd.mp4"), span(videos[2])])
        ]
    assert found[0] == (0, Problem("undecodable", "the decoder's answer makes no sense")) and found[1] == (2, None)


def test_errors_of_the_file_system(videos, monkeypatch):
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
