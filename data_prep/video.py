"""Reads any video at a constant frame rate; writes mp4.

Frames are uint8 [H, W, 3] RGB. Times are exact fractions, in seconds since the stream's first frame. A file's own clock
may start anywhere, run at a variable rate or jump. Only its timestamps say when a frame is on screen.
"""

import contextlib
import glob
import os
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.stream import Disposition
from PIL import Image

from data_prep.files import is_abandoned, naming, sync, temporary_beside
from data_prep.places import Remote
from data_prep.tars import Region

# Containers whose header declares a duration. A file that ends earlier is cut short.
_DECLARES_DURATION = {"mov", "mp4", "matroska", "webm", "avi", "flv"}
# Timestamps are rounded to the container's tick (1 ms in Matroska). A frame that is late by no more counts as in time.
_TOLERANCE = Fraction(1, 1000)
# No frame is shown for longer. A longer gap between timestamps is damage: filling it could take all disk space.
LONGEST_FRAME = 600  # seconds

_Shown = tuple[Fraction, Fraction, Any]  # (on screen from, until, frame); at the video's end the frame is None


class VideoError(ValueError):
    """A video that cannot be read, or not to its end. The message is one line and names the file.

    reason: "missing", "not a video", "no video stream", "undecodable" or "truncated"
    """

    def __init__(self, path: str | Path | Region, reason: str, detail: str = ""):
        self.reason = reason
        self.detail = detail
        super().__init__(f"{path}: {reason}{f' ({detail})' if detail else ''}")


@dataclass(frozen=True)
class Problem:
    """Why a video can't be used, or not to its end.

    reason: one of `VideoError`'s, or "too short" (for one clip), "unreadable" (the file system says no) or "too large"
    (for the worker's memory). "undecodable" is also what crashes a worker, or takes too long.
    """

    reason: str
    detail: str


def best_stream(container: Any) -> Any:
    """The (first) video stream with the largest picture. Cover art and thumbnails don't count. None without any."""
    still = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
    streams = [s for s in container.streams.video if s.codec_context is not None and not s.disposition & still]
    return max(streams, key=lambda s: s.codec_context.width * s.codec_context.height, default=None)


def _open(video: str | Path | Region) -> Any:
    """Opens a container. Raises VideoError if the file is missing or not a video."""
    path = video.path if isinstance(video, Region) else video
    assert not isinstance(path, Remote)  # see `opened_here`
    if not os.path.isfile(path):
        raise VideoError(video, "missing")
    try:
        # An absolute path can't be taken for a protocol, and the whitelist keeps playlists off the network.
        # A region is opened here: then FFmpeg opens nothing at all.
        source: Any = video.open() if isinstance(video, Region) else os.path.abspath(path)
        options = {"protocol_whitelist": "none" if isinstance(video, Region) else "file"}
        return av.open(source, options=options, metadata_errors="replace")
    except (av.FFmpegError, ValueError) as error:
        with video.open() if isinstance(video, Region) else open(path, "rb") as file:
            if file.read(8)[4:] == b"ftyp":
                raise VideoError(video, "truncated", "an mp4 or mov without its index") from None
        raise VideoError(video, "not a video", _reason(error)) from None


def declared_seconds(path: str | Path | Region) -> float | None:
    """The length in seconds that a video's header declares, only a hint; None if it declares none."""
    try:
        with _open(path) as container:
            stream = best_stream(container)
            if stream is not None and stream.duration:
                return float(stream.duration * stream.time_base)
            return container.duration / av.time_base if container.duration else None
    except VideoError:
        return None


def frame_rate(path: str | Path | Region) -> Fraction:
    """The mean number of frames per second of a video. Raises VideoError when it can't be read, or says none."""
    with _open(path) as container:
        rate = _video_stream(path, container).average_rate
        if not rate:
            raise VideoError(path, "not a video", "no frame rate")
        return Fraction(rate)


def picture_size(path: str | Path | Region) -> tuple[int, int]:
    """(height, width) of a video's first frame in pixels, as it is shown: upright, with square pixels.

    Raises VideoError when the file is missing, not a video, or has no frame that decodes.
    """
    with _open(path) as container:
        stream = _video_stream(path, container)
        frame = next(_Decoder(path, container, stream).shown())[2]
        pixel, turned = _shape_of_pixels(frame, stream)[:2]
        height, width = (frame.width, frame.height) if turned else (frame.height, frame.width)
        return height, max(1, round(width * pixel))


def read_frames(
    path: str | Path | Region,
    fps: float | Fraction,
    size: tuple[int, int] | None = None,
    start: float = 0,
    end: float | None = None,
) -> Iterator[np.ndarray]:
    """Yields a video's frames, uint8 [H, W, 3] RGB, at a constant rate.

    Frame n is what a player shows `start + n / fps` seconds after the first frame. So frames are repeated or dropped
    where the video's own rate differs. The last one is before `end`, or the video's end. Rotation and non-square pixels
    are applied. Then the picture is resized (antialiased) to cover `size` = (height, width) and cropped at its centre.
    Without `size` it keeps its own size. Memory does not grow with the video's length.

    Raises VideoError when the file is missing, not a video, damaged or cut short. Good frames may come before it.
    """
    rate, begin = Fraction(fps).limit_denominator(100_000), Fraction(start)
    stop = None if end is None else Fraction(end)
    if rate <= 0 or begin < 0 or (stop is not None and stop <= begin):
        raise ValueError(f"fps {fps}, start {start} and end {end}: need fps > 0 and 0 <= start < end")
    with _open(path) as container:
        stream = _video_stream(path, container)
        n = 0
        shown = image = None  # the frame on screen; its converted image, once needed
        for time, _, frame in _shown_from(path, container, stream, begin):
            due = begin + n / rate
            while shown is not None and due + _TOLERANCE < time and (stop is None or due + _TOLERANCE < stop):
                if image is None:
                    image, size = _picture(shown, stream, size)
                yield image
                n += 1
                due = begin + n / rate
            if stop is not None and due + _TOLERANCE >= stop:
                return
            shown, image = frame, None


class _Decoder:
    """Decodes a video stream, frame by frame, on the file's own clock in seconds."""

    def __init__(self, path: str | Path | Region, container: Any, stream: Any):
        self.path, self.container, self.stream = path, container, stream
        rate = stream.average_rate or stream.guessed_rate
        self.usual_duration = 1 / Fraction(rate) if rate else Fraction(1, 25)
        self.formats = set(container.format.name.split(","))
        self.damage: tuple[str, str] | None = None  # reason and detail, once something is wrong
        self.last: Fraction | None = None  # the time of the last frame shown
        self.reached: dict[int, Fraction] = {}  # stream index -> the latest end of its packets
        # AVI stores no display times, only evenly spaced decoding times: the n-th frame shown takes the n-th of these.
        self.steady_times: deque | None = deque() if "avi" in self.formats else None

    def shown(self) -> Iterator[_Shown]:
        """Every frame in order of time, then one entry without a frame at the video's end.

        Raises VideoError at damage and, after the last frame, when the file ends before its declared end.
        """
        first, until = Fraction(0), Fraction(0)
        for frame in self._frames():
            pts = self.steady_times.popleft() if self.steady_times else frame.pts
            if frame.is_corrupt and self.last is None:
                continue
            if frame.is_corrupt:
                self.damage = self.damage or ("undecodable", "a frame is damaged")
                break
            time = until if pts is None else pts * self.stream.time_base
            if self.last is not None and time <= self.last:
                continue  # never back in time
            if self.damage and self.last is not None and time - self.last > self.usual_duration * 3 / 2:
                break  # a frame before this one was lost to the damage
            if self.last is not None and time - self.last > LONGEST_FRAME:
                self.damage = "undecodable", f"its timestamps jump by {float(time - self.last):.0f} s"
                break
            first = time if self.last is None else first
            duration = frame.duration * self.stream.time_base if frame.duration else self.usual_duration
            until = time + min(duration, LONGEST_FRAME)
            self.last = time
            yield time, until, frame
        if self.last is None:
            raise VideoError(self.path, *(self.damage or ("undecodable", "no frame decodes")))
        yield until, until, None
        if self.damage:
            reason, detail = self.damage
            raise VideoError(self.path, reason, f"{detail}, good for {float(until - first):.2f} s")

    def _frames(self) -> Iterator[Any]:
        """The frames that the packets decode to. Ends with the packet at which `damage` was found."""
        packets = self.container.demux()
        while self.damage is None:
            try:
                packet = next(packets, None)
                if packet is None:
                    return
                if not self._is_ours(packet):
                    continue
                frames = self.stream.codec_context.decode(self._checked(packet))
            except av.FFmpegError as error:
                if self.last is None and isinstance(error, av.InvalidDataError):
                    continue  # a recording may begin before its first key frame
                self.damage = self.damage or ("undecodable", _reason(error))
                return
            yield from frames

    def _is_ours(self, packet: Any) -> bool:
        """Whether a packet belongs to the video's stream. Also records how far the packet's stream reaches."""
        index = packet.stream.index
        if packet.pts is not None:
            end = (packet.pts + (packet.duration or 0)) * packet.time_base
            self.reached[index] = max(self.reached.get(index, end), end)
        return index == self.stream.index

    def _checked(self, packet: Any) -> Any:
        """The packet, or None if it is incomplete: None makes the decoder give the frames that it still holds."""
        at_end = packet.size == 0 and packet.dts is None
        if at_end and _DECLARES_DURATION & self.formats:
            missing = self._missing_seconds()
            if missing > Fraction(1, 4) + 2 * self.usual_duration:
                self.damage = "truncated", f"the last {float(missing):.1f} s are missing"
        elif packet.is_corrupt and self.last is not None:
            self.damage = "truncated", "a packet is incomplete"
            return None
        elif self.steady_times is not None and not at_end:
            self.steady_times.append(packet.dts)
        return packet

    def _missing_seconds(self) -> Fraction:
        """Seconds between the last packet and the end that the header declares."""
        stream, container = self.stream, self.container
        if stream.duration:
            end = ((stream.start_time or 0) + stream.duration) * stream.time_base
            return end - self.reached.get(stream.index, Fraction(0))
        if container.duration:
            return Fraction(container.duration, av.time_base) - max(self.reached.values(), default=Fraction(0))
        return Fraction(0)


def _shown_from(path: str | Path | Region, container: Any, stream: Any, start: Fraction) -> Iterator[_Shown]:
    """As `_Decoder.shown`, but times count from the first frame, and frames that end before `start` may be left out.

    It seeks to `start` if the file allows it.
    """
    # Not in AVI: its times are counted from the first packet on, and seeking would lose the count.
    if start <= 1 or container.format.name == "avi":
        yield from _from_first_frame(_Decoder(path, container, stream).shown())
        return
    origin = next(_Decoder(path, container, stream).shown())[0]
    frames: Iterator[_Shown] = iter(())
    head: _Shown | None = None
    with contextlib.suppress(VideoError, av.FFmpegError, OverflowError):  # a raw stream can't be searched
        container.seek(int((origin + start) / stream.time_base), stream=stream)
        frames = _Decoder(path, container, stream).shown()
        head = next(frames)
    if head is None or head[0] > origin + start:  # nothing there, or too far: read from the beginning
        with _open(path) as again:
            yield from _from_first_frame(_Decoder(path, again, _video_stream(path, again)).shown())
        return
    yield head[0] - origin, head[1] - origin, head[2]
    for time, until, frame in frames:
        yield time - origin, until - origin, frame


def _from_first_frame(frames: Iterator[_Shown]) -> Iterator[_Shown]:
    """The same frames, with times since the first one."""
    origin = None
    for time, until, frame in frames:
        origin = time if origin is None else origin
        yield time - origin, until - origin, frame


def _video_stream(path: str | Path | Region, container: Any) -> Any:
    """The stream to read. Raises VideoError without one."""
    stream = best_stream(container)
    if stream is None:
        raise VideoError(path, "no video stream")
    stream.codec_context.thread_count = 1  # with more threads, damaged files decode differently each time
    return stream


def _reason(error: Exception) -> str:
    """FFmpeg's own words, without the numbers and file names around them."""
    return getattr(error, "strerror", None) or str(error)


def _shape_of_pixels(frame: Any, stream: Any) -> tuple[Fraction, bool, int, int]:
    """(width / height of a pixel as shown, whether rows become columns, then the steps over rows and columns)."""
    pixel = stream.sample_aspect_ratio or Fraction(1)
    matrix = frame.side_data.get(SideData.DISPLAYMATRIX)
    if matrix is None:
        return pixel, False, 1, 1
    # Row vectors: x' = a x + c y, y' = b x + d y, y down. Only multiples of 90 degrees and mirrors are applied.
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].astype(np.int64)
    turned = bool(a == d == 0)
    if turned:
        pixel, a, d = 1 / pixel, c, b
    return pixel, turned, -1 if d < 0 else 1, -1 if a < 0 else 1


def _picture(frame: Any, stream: Any, size: tuple[int, int] | None) -> tuple[np.ndarray, tuple[int, int]]:
    """A decoded frame as (uint8 [H, W, 3] RGB, its (height, width)): upright, with square pixels, resized to `size`."""
    rgb = frame.to_ndarray(format="rgb24")
    pixel, turned, down, right = _shape_of_pixels(frame, stream)
    if turned:
        rgb = rgb.transpose(1, 0, 2)
    rgb = rgb[::down, ::right]
    height, width = rgb.shape[:2]
    if size is None:
        size = height, max(1, round(width * pixel))
    # The part of the source that fills `size`, in source pixels. Aspect ratios are compared as displayed.
    wanted = Fraction(size[1], size[0]) / pixel
    if Fraction(width, height) > wanted:
        box_height, box_width = height, float(height * wanted)
    else:
        box_height, box_width = float(width / wanted), width
    left, top = (width - box_width) / 2, (height - box_height) / 2
    if (height, width) != size:
        image, box = Image.fromarray(np.ascontiguousarray(rgb)), (left, top, left + box_width, top + box_height)
        rgb = np.asarray(image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box))
    return np.ascontiguousarray(rgb), size


class VideoWriter:
    """Writes an H.264 mp4 that browsers play, frame by frame: yuv420p, with its index in front.

    The same frames give the same file. `path` appears only when it is complete, at the end of the `with` block; after
    an error, or when the process is killed, it does not. Of two processes that write it at once, the last one's stays.
    Memory does not grow with the video's length. Raises ValueError for no frames, odd sizes, frames of different
    shapes, or a folder in its place.
    """

    def __init__(self, path: str | Path, fps: float | Fraction, crf: int = 16):
        self.path, self.fps, self.crf = Path(path), Fraction(fps).limit_denominator(100_000), crf
        self.frames = 0  # written so far
        if self.path.is_dir():
            raise ValueError(f"{path}: a folder is there; choose another name")
        self._temporary = temporary_beside(self.path.with_name(f".{self.path.name}"))
        self._container: Any = None
        self._stream: Any = None
        self._shape: tuple[int, ...] = ()

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                if not self.frames:
                    raise ValueError(f"{self.path}: no frames to write")
                self._container.mux(self._stream.encode(None))
                container, self._container = self._container, None
                container.close()
                sync(self._temporary)
                os.replace(self._temporary, self.path)
        finally:
            if self._container is not None:
                self._container.close()
            self._temporary.unlink(missing_ok=True)

    def write(self, frames: Iterable[np.ndarray]) -> None:
        """Adds frames, uint8 [T, H, W, 3] or an iterable of [H, W, 3]."""
        for frame in frames:
            frame = np.asarray(frame)
            if self._container is None:
                self._open(frame)
            if frame.shape != self._shape or frame.dtype != np.uint8:
                found = f"a frame is {frame.dtype} {frame.shape}, the first was {self._shape}"
                raise ValueError(f"{self.path}: {found}")
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture = picture.reformat(format="yuv420p", threads=1)
            picture.pts, picture.time_base = self.frames, 1 / self._stream.average_rate
            with naming(self.path):
                self._container.mux(self._stream.encode(picture))
            self.frames += 1

    def _open(self, frame: np.ndarray) -> None:
        check_writable(self.path, frame)
        self._shape = frame.shape
        for other in self.path.parent.glob(f".{glob.escape(self.path.name)}.*.tmp"):
            with contextlib.suppress(FileNotFoundError):
                if is_abandoned(other):  # by a process that was killed
                    other.unlink()
        with naming(self.path):
            self._temporary.touch()  # PyAV opens it later, and its errors name no file
            self._container = av.open(str(self._temporary), "w", format="mp4", options={"movflags": "+faststart"})
        self._stream = self._container.add_stream("libx264", rate=self.fps)
        self._stream.height, self._stream.width, self._stream.pix_fmt = *frame.shape[:2], "yuv420p"
        # The same frames must give the same file. So there is one thread, and no mbtree: on tiny pictures its assembly
        # code depends on what the memory held before.
        options = {"crf": str(self.crf), "preset": "medium", "threads": "1", "x264-params": "mbtree=0"}
        self._stream.options = options


def write_video(
    path: str | Path, frames: np.ndarray | Iterable[np.ndarray], fps: float | Fraction, crf: int = 16
) -> None:
    """Writes frames, uint8 [T, H, W, 3] or an iterable of [H, W, 3], with a `VideoWriter`."""
    with VideoWriter(path, fps, crf) as writer:
        writer.write(frames)


def check_writable(path: Path, frame: np.ndarray) -> None:
    """Raises a ValueError that names `path` unless `write_video` can write the frame."""
    if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
        raise ValueError(f"{path}: frames must be uint8 [H, W, 3], not {frame.dtype} {frame.shape}")
    if frame.shape[0] % 2 or frame.shape[1] % 2:
        raise ValueError(f"{path}: H.264 in yuv420p needs even sides, not {frame.shape[0]}x{frame.shape[1]}")
