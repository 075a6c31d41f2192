"""Read any video on a target clock; write mp4.

Frames are uint8 [H, W, 3] RGB. Times are seconds since the stream's first frame, as exact fractions: a file's own
clock may start anywhere, run at a variable rate or jump, and only its timestamps say what is on screen when.
"""

import os
from collections import deque
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.stream import Disposition
from PIL import Image

# Containers whose header declares a duration, so that a file which ends before it is known to be cut short.
_DECLARES_DURATION = {"mov", "mp4", "matroska", "webm", "avi", "flv"}
# Timestamps are rounded to the container's tick (1 ms in Matroska): a frame this little late counts as in time.
_TOLERANCE = Fraction(1, 1000)


class VideoError(ValueError):
    """A video that cannot be read, or not to its end. The message is one line and names the file.

    reason: "missing", "not a video", "no video stream", "undecodable" or "truncated"
    """

    def __init__(self, path, reason, detail=""):
        self.reason = reason
        self.detail = detail
        super().__init__(f"{path}: {reason}{f' ({detail})' if detail else ''}")


def parse_size(text):
    """(height, width) from "480x832"."""
    height, _, width = text.lower().partition("x")
    if not (height.isdigit() and width.isdigit() and int(height) > 0 and int(width) > 0):
        raise ValueError(f"size {text!r}: expected HEIGHTxWIDTH, e.g. 480x832")
    return int(height), int(width)


def best_stream(container):
    """The video stream with the largest picture that is no cover art or thumbnail; None without one. Ties: first."""
    still = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
    streams = [s for s in container.streams.video if s.codec_context is not None and not s.disposition & still]
    return max(streams, key=lambda s: s.codec_context.width * s.codec_context.height, default=None)


def _open(path):
    """An open container. Raises VideoError if the file is missing or no video."""
    if not os.path.isfile(path):
        raise VideoError(path, "missing")
    try:
        # An absolute path is never taken for a protocol, and a playlist inside a file never leads to the network.
        return av.open(os.path.abspath(path), options={"protocol_whitelist": "file"}, metadata_errors="replace")
    except (av.FFmpegError, ValueError) as error:
        with open(path, "rb") as file:
            if file.read(8)[4:] == b"ftyp":
                raise VideoError(path, "truncated", "an mp4 or mov without its index") from None
        raise VideoError(path, "not a video", _reason(error)) from None


def declared_seconds(path):
    """The length in seconds that a video's header declares, a hint only; None where it says nothing."""
    try:
        with _open(path) as container:
            stream = best_stream(container)
            if stream is not None and stream.duration:
                return float(stream.duration * stream.time_base)
            return container.duration / av.time_base if container.duration else None
    except VideoError:
        return None


def read_frames(path, fps, size=None, start=0, end=None):
    """Iterate over a video's frames, uint8 [H, W, 3] RGB, at a constant rate.

    Frame n is what a player shows `start + n / fps` seconds after the first frame, for every n before `end` (or the
    video's end): held frames repeat, surplus ones are dropped. Rotation and non-square pixels are applied; then the
    picture is resized (antialiased) to cover `size` = (height, width) and cropped at its centre. Without `size` it
    keeps its own. Memory does not grow with the video's length.

    Raises VideoError, possibly after frames that are sound, when the file is missing, no video, damaged or cut short.
    """
    fps, start = Fraction(fps).limit_denominator(100_000), Fraction(start)
    end = None if end is None else Fraction(end)
    if fps <= 0 or start < 0 or (end is not None and end <= start):
        raise ValueError(f"fps {fps}, start {start} and end {end}: need fps > 0 and 0 <= start < end")
    with _open(path) as container:
        stream = best_stream(container)
        if stream is None:
            raise VideoError(path, "no video stream")
        stream.thread_type = "AUTO"
        n = 0
        shown = image = None            # the frame on screen; its converted image, once needed
        for time, until, frame in _from(path, container, stream, start):
            due = start + n / fps
            while shown is not None and due + _TOLERANCE < time and (end is None or due + _TOLERANCE < end):
                if image is None:
                    image, size = _picture(shown, stream, size)
                yield image
                n += 1
                due = start + n / fps
            if end is not None and due + _TOLERANCE >= end:
                return
            shown, image = frame, None


def _from(path, container, stream, start):
    """As `_decode`, from the last frame shown before `start` on where the file can be searched, and with a last
    entry whose frame is None at the time the video ends."""
    # Not in AVI: its times are counted from the first packet on, and a search would lose the count.
    if start > 1 and container.format.name != "avi":
        origin = next(_decode(path, container, stream))[0]
        container.seek(int((origin + start) / stream.time_base), stream=stream)
        frames = _decode(path, container, stream)
        try:
            head = next(frames)
        except VideoError:
            head = None
        if head is None or head[0] > origin + start:        # nothing there, or too far: read from the beginning
            frames = _all(path)
            head = next(frames)
        yield head[0] - origin, head[1] - origin, head[2]
    else:
        frames, origin = _decode(path, container, stream), None
    for time, until, frame in frames:
        origin = time if origin is None else origin
        yield time - origin, until - origin, frame


def _all(path):
    """`_decode` of the whole of a file, opened for it."""
    with _open(path) as container:
        stream = best_stream(container)
        stream.thread_type = "AUTO"
        yield from _decode(path, container, stream)


def _decode(path, container, stream):
    """Yield (time, end, frame) of every frame, in order of time, on the file's own clock in seconds.

    The last entry is (end, end, None). Raises VideoError at damage and, after the last frame, at a missing rest.
    """
    rate = stream.average_rate or stream.guessed_rate
    usual = 1 / Fraction(rate) if rate else Fraction(1, 25)
    formats = set(container.format.name.split(","))
    first = last = until = damage = None
    reached = {}                        # stream index -> the latest end of its packets
    # AVI stores no display times, only the steady ones of decoding: the n-th frame shown takes the n-th of them.
    steady = deque() if "avi" in formats else None
    packets = container.demux()
    while damage is None:
        try:
            packet = next(packets, None)
            if packet is None:
                break
            index = packet.stream.index
            if packet.pts is not None:
                ends = (packet.pts + (packet.duration or 0)) * packet.time_base
                reached[index] = max(reached.get(index, ends), ends)
            if index != stream.index:
                continue
            at_end = packet.size == 0 and packet.dts is None
            if at_end and _DECLARES_DURATION & formats:
                missing = _missing(container, stream, reached)
                if missing > Fraction(1, 4) + 2 * usual:
                    damage = "truncated", f"the last {float(missing):.1f} s are missing"
            elif packet.is_corrupt and last is not None:
                damage = "truncated", "a packet is incomplete"
                packet = None
            elif steady is not None and not at_end:
                steady.append(packet.dts)
            frames = stream.codec_context.decode(packet)
        except av.FFmpegError as error:
            if last is None and isinstance(error, av.InvalidDataError):
                continue                # a recording may begin before its first key frame
            damage = damage or ("undecodable", _reason(error))
            break
        for frame in frames:
            pts = steady.popleft() if steady else frame.pts
            if frame.is_corrupt and last is None:
                continue
            if frame.is_corrupt:
                damage = damage or ("undecodable", "a frame is damaged")
                break
            time = until or Fraction(0) if pts is None else pts * stream.time_base
            if last is not None and time <= last:
                continue                # never back in time
            if damage and last is not None and time - last > usual * 3 / 2:
                break                   # the frame between belonged to the missing part
            first = time if first is None else first
            last, until = time, time + (frame.duration * stream.time_base if frame.duration else usual)
            yield time, until, frame
    if last is None:
        raise VideoError(path, *(damage or ("undecodable", "no frame decodes")))
    yield until, until, None
    if damage:
        reason, detail = damage
        raise VideoError(path, reason, f"{detail}, good for {float(until - first):.2f} s")


def _missing(container, stream, reached):
    """Seconds between the last packet and the end that the header declares."""
    if stream.duration:
        return ((stream.start_time or 0) + stream.duration) * stream.time_base - reached.get(stream.index, 0)
    if container.duration:
        return Fraction(container.duration, av.time_base) - max(reached.values(), default=0)
    return Fraction(0)


def _reason(error):
    """What FFmpeg says, without the numbers and file names around it."""
    return getattr(error, "strerror", None) or str(error)


def _picture(frame, stream, size):
    """A decoded frame as (uint8 [H, W, 3] RGB, its (height, width)), upright, with square pixels, at `size`."""
    rgb = frame.to_ndarray(format="rgb24")
    pixel = stream.sample_aspect_ratio or Fraction(1)
    matrix = frame.side_data.get(SideData.DISPLAYMATRIX)
    if matrix is not None:
        # Row vectors: x' = a x + c y, y' = b x + d y, y down. Multiples of 90 degrees and mirrors; others are ignored.
        a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].astype(np.int64)
        if a == d == 0:
            rgb, pixel = rgb.transpose(1, 0, 2), 1 / pixel
            a, d = c, b
        rgb = rgb[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    height, width = rgb.shape[:2]
    if size is None:
        size = height, max(1, round(width * pixel))
    # The part of the source that fills `size`, in source pixels. Both are compared as displayed.
    wanted = Fraction(size[1], size[0]) / pixel
    if Fraction(width, height) > wanted:
        box_height, box_width = height, float(height * wanted)
    else:
        box_height, box_width = float(width / wanted), width
    left, top = (width - box_width) / 2, (height - box_height) / 2
    if (height, width) != size:
        image = Image.fromarray(np.ascontiguousarray(rgb))
        rgb = np.asarray(image.resize((size[1], size[0]), Image.Resampling.BICUBIC,
                                      box=(left, top, left + box_width, top + box_height)))
    return np.ascontiguousarray(rgb), size


def write_video(path, frames, fps, crf=16):
    """Write frames, uint8 [T, H, W, 3] or an iterable of [H, W, 3], as an H.264 mp4 that browsers play.

    yuv420p with its index in front; the same frames give the same file. `path` appears only when it is whole.
    Raises ValueError for no frames, odd sizes, or frames that are not alike.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    container = stream = None
    try:
        for number, frame in enumerate(frames):
            frame = np.asarray(frame)
            if stream is None:
                if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
                    raise ValueError(f"{path}: frames must be uint8 [H, W, 3], not {frame.dtype} {frame.shape}")
                height, width = frame.shape[:2]
                if height % 2 or width % 2:
                    raise ValueError(f"{path}: H.264 in yuv420p needs even sides, not {height}x{width}")
                container = av.open(str(temporary), "w", format="mp4", options={"movflags": "+faststart"})
                stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(100_000))
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
                # The same frames give the same file: one thread, and no mbtree, whose assembly makes tiny pictures
                # depend on what the memory held before.
                stream.options = {"crf": str(crf), "preset": "medium", "threads": "1", "x264-params": "mbtree=0"}
            if frame.shape != (height, width, 3) or frame.dtype != np.uint8:
                raise ValueError(f"{path}: a frame is {frame.dtype} {frame.shape}, the first was {(height, width, 3)}")
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture = picture.reformat(format="yuv420p", threads=1)
            picture.pts, picture.time_base = number, 1 / stream.average_rate
            container.mux(stream.encode(picture))
        if stream is None:
            raise ValueError(f"{path}: no frames to write")
        container.mux(stream.encode(None))
        container.close()
        container = None
        os.replace(temporary, path)
    finally:
        if container is not None:
            container.close()
        temporary.unlink(missing_ok=True)
