"""Reading video: every picture carries its number and an orientation, so that what comes out can be named exactly."""

from fractions import Fraction

import av
import numpy as np
import pytest

from data_prep.files import _machine
from data_prep.video import VideoError, VideoWriter, best_stream, declared_seconds, read_frames, write_video


def picture(n, height=64, width=96):
    """Six bars of light and dark are n's bits, above; red at the left, blue at the right, below."""
    image = np.zeros((height, width, 3), np.uint8)
    for bit in range(6):
        image[: height // 2, bit * width // 6 : (bit + 1) * width // 6] = 230 if n >> bit & 1 else 25
    image[height // 2 :, : width // 2] = (200, 30, 30)
    image[height // 2 :, width // 2 :] = (30, 30, 200)
    return image


def number(image):
    """The n of a `picture`, whatever its size and losses; -1 if it does not stand upright."""
    height, width = image.shape[:2]
    left = image[3 * height // 4, width // 4].astype(int)
    right = image[3 * height // 4, 3 * width // 4].astype(int)
    if not (left[0] > left[2] + 80 and right[2] > right[0] + 80):
        return -1
    return sum(int(image[height // 4, (2 * bit + 1) * width // 12].mean() > 128) << bit for bit in range(6))


def write(
    path,
    codec="libx264",
    pixels="yuv420p",
    frames=40,
    fps=25,
    size=(64, 96),
    pts=None,
    options=None,
    sar=None,
    rotation=None,
    format=None,
):
    """A video of `picture`s 0 .. frames - 1. pts: milliseconds of each, for a variable frame rate."""
    with av.open(str(path), "w", format=format) as container:
        stream = container.add_stream(codec, rate=Fraction(fps))
        stream.height, stream.width, stream.pix_fmt = *size, pixels
        stream.options = options or {}
        if pts:
            stream.codec_context.time_base = Fraction(1, 1000)
        if sar:
            stream.codec_context.sample_aspect_ratio = sar
        if rotation:
            stream.set_display_rotation(rotation)
        for n in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(n, *size), format="rgb24")
            frame.pts, frame.time_base = (pts[n], Fraction(1, 1000)) if pts else (n, 1 / Fraction(fps))
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def numbers(path, fps=16, size=None, **span):
    return [number(frame) for frame in read_frames(path, fps, size, **span)]


def on_screen(fps, frames, source_fps=25):
    """The source frame shown at each tick of the target clock."""
    return [n * source_fps // fps for n in range(frames * fps // source_fps + 1) if n * source_fps // fps < frames]


X265 = {"x265-params": "log-level=none", "preset": "ultrafast"}
FORMATS = [
    ("libx264", "yuv420p", "mp4", {"bf": "3"}),
    ("libx264", "yuv420p", "mov", {}),
    ("libx264", "yuv420p", "mkv", {}),
    ("libx264", "yuv420p10le", "mp4", {}),
    ("libx264", "yuv420p", "avi", {"bf": "0"}),
    ("libx264", "yuv420p", "avi", {"bf": "3"}),
    ("libx264", "yuv420p", "ts", {}),
    ("libx265", "yuv420p", "mp4", X265),
    ("libx265", "yuv420p10le", "mkv", X265),
    ("libvpx-vp9", "yuv420p", "webm", {"deadline": "realtime", "cpu-used": "8"}),
    ("libsvtav1", "yuv420p", "mp4", {"preset": "12"}),
    ("libsvtav1", "yuv420p10le", "webm", {"preset": "12"}),
    ("mpeg4", "yuv420p", "avi", {"bf": "2", "b": "2000000"}),
    ("mpeg4", "yuv420p", "mp4", {"b": "2000000"}),
    ("ffv1", "yuv444p", "mkv", {}),
]


@pytest.mark.parametrize("codec, pixels, ext, options", FORMATS)
def test_formats_give_the_right_frames_at_the_right_times(tmp_path, codec, pixels, ext, options):
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    path = write(tmp_path / f"video.{ext}", codec, pixels, options=options)
    assert numbers(path, 25) == list(range(40))
    assert numbers(path, 16) == on_screen(16, 40)
    assert numbers(path, 50) == [n // 2 for n in range(80)]
    assert numbers(path, 16, size=(32, 48)) == on_screen(16, 40)


def test_picture_comes_out_as_it_went_in(tmp_path):
    path = tmp_path / "video.mp4"
    write_video(path, [picture(n) for n in range(20)], 16, crf=4)
    frames = np.stack(list(read_frames(path, 16)))
    assert frames.shape == (20, 64, 96, 3) and frames.dtype == np.uint8
    assert np.abs(frames.astype(float) - np.stack([picture(n) for n in range(20)])).mean() < 4


@pytest.mark.parametrize("ext", ["mp4", "mkv"])
def test_variable_frame_rate_follows_the_timestamps(tmp_path, ext):
    pts = [0, 40, 400, 440, 480, 1200, 1210, 1220, 1600]
    path = write(tmp_path / f"video.{ext}", frames=9, pts=pts, options={"bf": "2"})
    got = numbers(path, 20)
    expected = [max(i for i, p in enumerate(pts) if p <= t) for t in range(0, 1640, 50)]
    assert got[:33] == expected and set(got[33:]) <= {8}


@pytest.mark.parametrize("ext", ["mp4", "mkv", "ts"])
def test_a_clock_may_start_anywhere(tmp_path, ext):
    path = write(tmp_path / f"video.{ext}", frames=20, pts=[7000 + 40 * n for n in range(20)])
    assert numbers(path, 25) == list(range(20))


def test_millisecond_timestamps_do_not_double_frames(tmp_path):
    """Matroska rounds 62.5 ms to 63: the frame that is half a millisecond late is still the one meant."""
    path = write(tmp_path / "video.webm", "libvpx-vp9", fps=16, frames=33, options={"deadline": "realtime"})
    assert numbers(path, 16) == list(range(33))


@pytest.mark.parametrize(
    "codec, ext",
    [
        ("libx264", "mp4"),
        ("libx264", "mkv"),
        ("libx264", "avi"),
        ("libx264", "ts"),
        ("mpeg4", "avi"),
        ("mpeg4", "mp4"),
        ("mpeg2video", "ts"),
    ],
)
@pytest.mark.parametrize("start", [0.4, 1.08, 1.2])
def test_spans(tmp_path, codec, ext, start):
    """Searching to the start gives the same as reading on from the beginning."""
    path = write(tmp_path / f"video.{ext}", codec, options={"g": "10", "bf": "2", "b": "2000000"})
    whole = numbers(path, 25)
    first = round(start * 25)
    assert numbers(path, 25, start=start) == whole[first:]
    assert numbers(path, 25, start=start, end=start + 0.2) == whole[first : first + 5]
    assert numbers(path, 25, start=5) == []


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_rotation_is_undone(tmp_path, degrees):
    upright = write(tmp_path / "upright.mp4", frames=3)
    path = write(tmp_path / "rotated.mp4", frames=3, rotation=degrees)
    plain = next(read_frames(upright, 25)).astype(float)
    turned = next(read_frames(path, 25)).astype(float)
    expected = np.rot90(plain, degrees // 90)  # the matrix counts counterclockwise
    assert turned.shape == expected.shape and np.abs(turned - expected).mean() < 1


def test_resizing_covers_and_crops_the_centre(tmp_path):
    """A wide picture in a square: its middle, undistorted. Non-square pixels are squared first."""
    disc = np.zeros((64, 128, 3), np.uint8)
    y, x = np.mgrid[:64, :128] + 0.5
    disc[(x - 64) ** 2 + (y - 32) ** 2 < 20**2] = 255
    path = tmp_path / "video.mp4"
    write_video(path, [disc], 25, crf=4)
    square = next(read_frames(path, 25, (32, 32)))[..., 1]
    assert square.shape == (32, 32)
    assert (square > 128).sum() == pytest.approx(np.pi * 100, rel=0.05)
    assert (square[16] > 128).sum() == pytest.approx(20, abs=1) == (square[:, 16] > 128).sum()
    assert np.abs(square.astype(int) - square[:, ::-1]).max() < 30  # centred
    tall = next(read_frames(path, 25, (64, 32)))[..., 1]
    assert (tall[32] > 128).sum() == 32 and (tall[:, 16] > 128).sum() == pytest.approx(40, abs=1)


def test_non_square_pixels(tmp_path):
    path = write(tmp_path / "video.mkv", frames=2, size=(64, 48), sar=Fraction(2, 1))
    frames = list(read_frames(path, 25))
    assert frames[0].shape == (64, 96, 3) and [number(frame) for frame in frames] == [0, 1]
    assert next(read_frames(path, 25, (32, 48))).shape == (32, 48, 3)


def test_odd_sizes_and_single_frames(tmp_path):
    path = write(tmp_path / "odd.mkv", "ffv1", "yuv444p", frames=5, size=(63, 95))
    assert next(read_frames(path, 25)).shape == (63, 95, 3)
    assert numbers(path, 25, size=(32, 48)) == list(range(5))
    assert numbers(write(tmp_path / "one.mp4", frames=1), 25) == [0]
    assert numbers(write(tmp_path / "one.webm", "libvpx-vp9", frames=1), 16) == [0]


def test_the_largest_video_stream_is_read_and_covers_are_not(tmp_path):
    path = tmp_path / "two.mp4"
    with av.open(str(path), "w") as container:
        streams = []
        for width, height in ((96, 64), (160, 96), (160, 96)):
            stream = container.add_stream("libx264", rate=25)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            streams.append(stream)
        for n in range(10):
            for offset, stream in zip((0, 20, 40), streams):
                image = picture(n + offset, stream.height, stream.width)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        for stream in streams:
            container.mux(stream.encode(None))
    with av.open(str(path)) as container:
        assert best_stream(container).index == 1
    assert numbers(path, 25) == list(range(20, 30))


def write_sound(path):
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=16000)
        for n in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.rate = frame.sample_rate = 16000
            frame.pts = n * 1024
            container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
    return path


def reason(path, **arguments):
    """(frames read, why it stopped)"""
    frames = []
    with pytest.raises(VideoError) as caught:
        for frame in read_frames(path, 25, **arguments):
            frames.append(number(frame))
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return frames, caught.value.reason


def test_what_is_no_video_is_said_so(tmp_path):
    assert reason(tmp_path / "none.mp4") == ([], "missing")
    assert reason(write_sound(tmp_path / "sound.mp4")) == ([], "no video stream")
    for name, data in (
        ("empty.mp4", b""),
        ("text.mp4", b"no video\n" * 50),
        ("list.mp4", b"#EXTM3U\n#EXTINF:1,\nhttp://localhost:1/a.ts\n"),
    ):
        (tmp_path / name).write_bytes(data)
        assert reason(tmp_path / name) == ([], "not a video")
        assert declared_seconds(tmp_path / name) is None


CUTS = [
    ("mp4", "libx264", {}),
    ("mkv", "libx264", {}),
    ("avi", "mpeg4", {"b": "3000000"}),
    ("webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}),
]


@pytest.mark.parametrize("ext, codec, options", CUTS)
def test_a_truncated_file_gives_its_sound_frames_and_then_says_so(tmp_path, ext, codec, options):
    path = tmp_path / f"video.{ext}"
    with av.open(str(path), "w", options={"movflags": "+faststart"} if ext == "mp4" else {}) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.options = {"g": "12", **options}
        noise = np.random.default_rng(0)
        for n in range(60):
            image = picture(n) // 2 + noise.integers(0, 20, (64, 96, 3), dtype=np.uint8)
            image[:32] = picture(n)[:32]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))

    whole = numbers(path, 25)
    assert len(whole) == 60
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    frames, why = reason(path)
    assert why == "truncated"
    assert 10 < len(frames) < 55 and frames == whole[: len(frames)]


def test_an_mp4_cut_before_its_index_is_called_truncated(tmp_path):
    path = write(tmp_path / "video.mp4")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 8 // 10])
    assert reason(path) == ([], "truncated")


def test_damage_in_the_middle_stops_the_reading(tmp_path):
    path = write(tmp_path / "video.mp4", frames=60, options={"g": "10"})
    data = bytearray(path.read_bytes())
    middle = slice(len(data) // 2, len(data) // 2 + 1500)
    data[middle] = np.random.default_rng(0).integers(0, 256, 1500, dtype=np.uint8).tobytes()
    path.write_bytes(data)
    frames, why = reason(path)
    assert why in ("undecodable", "truncated")
    assert len(frames) < 60 and frames == list(range(len(frames)))


def test_damage_is_the_same_each_time(tmp_path):
    path = write(tmp_path / "video.mkv", frames=60, options={"g": "10", "bf": "3"})
    data = bytearray(path.read_bytes())
    for place in np.random.default_rng(1).integers(len(data) // 3, len(data), 12):
        data[place] ^= 255
    path.write_bytes(data)
    found = [reason(path) for _ in range(8)]
    assert all(other == found[0] for other in found) and found[0][1] is not None


@pytest.mark.parametrize("start", [1.2, 3.0, 1e308])
def test_a_stream_that_cannot_be_searched_is_read_from_its_beginning(tmp_path, start):
    path = write(tmp_path / "raw.mp4", frames=40, format="h264")  # no container, whatever its name
    whole, late = numbers(path, 25), numbers(path, 25, start=start)
    assert len(whole) == 40 and late == whole[round(25 * min(start, 2)) :]


def test_bad_arguments():
    for arguments in ({"fps": 0}, {"fps": 16, "start": -1}, {"fps": 16, "start": 2, "end": 1}):
        with pytest.raises(ValueError, match="need fps > 0"):
            next(read_frames("x.mp4", **arguments))


def test_two_that_write_a_video_at_once_and_one_that_was_killed(tmp_path):
    """Neither writes into the other's file. What a killed process left is removed, and nobody else's."""
    path, frames = tmp_path / "a[1].mp4", [np.full((4, 16, 16, 3), value, np.uint8) for value in (50, 200)]
    killed = tmp_path / f".a[1].mp4.{_machine()}.{2**22 + 1}.00000000.tmp"  # no process has this number
    other = tmp_path / f".a[1].mp4.{'0' * 12}.1.00000000.tmp"  # of another machine
    for left in (killed, other):
        left.write_bytes(b"half")
    with VideoWriter(path, 16) as one:
        one.write(frames[0])
        with VideoWriter(path, 16) as two:
            two.write(frames[1])
        assert abs(next(read_frames(path, 16)).mean() - 200) < 3
        one.write(frames[0])
    assert abs(np.stack(list(read_frames(path, 16))).mean() - 50) < 3
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([other.name, path.name])
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(ValueError, match="a folder is there"):
        VideoWriter(tmp_path / "folder.mp4", 16)
    with pytest.raises(OSError, match=r"none/\.a\.mp4"):
        write_video(tmp_path / "none/a.mp4", frames[0], 16)


def test_write_video_refuses_what_browsers_do_not_play(tmp_path):
    path = tmp_path / "video.mp4"
    for frames, says in (
        ([], "no frames"),
        ([picture(0, 63, 96)], "even sides, not 63x96"),
        ([picture(0), picture(1, 32, 96)], "the first was"),
        ([picture(0).astype(float)], "uint8"),
    ):
        with pytest.raises(ValueError, match=says):
            write_video(path, frames, 16)
    assert list(tmp_path.iterdir()) == []
    write_video(path, (picture(n) for n in range(5)), 16)
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # plays before it is all there
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 16)
    write_video(path, (picture(n) for n in range(5)), 16)
    assert path.read_bytes() == data


@pytest.mark.parametrize("gap, whole", [(500, True), (700, False), (10**6, False)])
def test_a_jump_of_the_timestamps_is_damage_not_an_endless_video(tmp_path, gap, whole):
    """Five frames at 25 per second, then one that comes `gap` seconds later."""
    pts = [40 * n for n in range(5)] + [160 + 1000 * gap]
    path = write(tmp_path / "jump.mkv", frames=6, pts=pts, options={"bf": "0"})
    read = read_frames(path, Fraction(1, 10), (16, 16))
    if whole:
        assert len(list(read)) == gap // 10 + 1
        return
    with pytest.raises(VideoError, match=f"undecodable .its timestamps jump by {gap} s"):
        list(read)
