"""Clips encoded several at once: batches of clips of one shard, in order, whatever videos they are of.

A batch has `batch` clips, or as many as the shard still has room for; the last one of a part has what is left. A shard
is always made from its begin on. So a job that goes on behind a whole shard makes the batches that an undisturbed one
makes, and the same bytes.
"""

import sys
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from tqdm import tqdm

from data_prep.codecs import Codec
from data_prep.command import counted, one_line, printable
from data_prep.decoder import DecodedVideo
from data_prep.encode_settings import EncodeSettings
from data_prep.rows import DUPLICATE, Row
from data_prep.video import Problem
from data_prep.work import PartWriter

LARGEST = 16  # clips that are encoded at once, unless more are asked for: beyond that a GPU gains nothing
SHARE = 0.7  # of a GPU's free memory that a batch may take


def batch_that_fits(codec: Codec | None, settings: EncodeSettings) -> int:
    """Clips to encode at once: 1 on a CPU, and with the codec that is to be fitted; on a GPU what fits into its memory.

    What a clip takes is measured on one.
    """
    if codec is None or codec.device.type != "cuda":
        return 1
    torch.cuda.reset_peak_memory_stats(codec.device)
    before = torch.cuda.memory_allocated(codec.device)
    codec.encode_batch(np.zeros((1, settings.frames, *settings.size, 3), np.uint8))
    clip = max(1, torch.cuda.max_memory_allocated(codec.device) - before)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(codec.device)
    return max(1, min(LARGEST, settings.samples_per_shard, int(SHARE * free) // clip))


@dataclass
class Tally:
    """What this job has made so far: for its progress line, and for --max-failures."""

    videos: int  # that the job makes, in all buckets
    clips: int = 0
    failures: int = 0
    began: float = field(default_factory=time.monotonic)

    def rates(self, seconds_per_clip: float) -> dict[str, str]:
        """Clips per second, hours of video per hour, failures."""
        rate = self.clips / max(time.monotonic() - self.began, 1e-9)
        return {"clips/s": f"{rate:.2f}", "video h/h": f"{rate * seconds_per_clip:.1f}", "failed": str(self.failures)}


@dataclass
class Video:
    """A video that is being encoded: its row, the texts of its captions [L, D], its clips, why it failed if it did."""

    row: Row
    texts: list[np.ndarray]
    clips: int  # written, those of earlier shards included
    taken: int  # given to the encoder, the same
    problem: Problem | None = None


@dataclass
class Clip:
    """A clip to encode: its number in its video, its first frame's number, and its frames, uint8 [T, H, W, 3]."""

    video: Video
    number: int
    begin: int
    frames: np.ndarray


@dataclass
class End:
    """The end of a video: why it came early if it did, and how many frames are in no clip."""

    video: Video
    problem: Problem | None
    left: int


class BatchEncoder:
    """Encodes the clips of a part in batches, and writes them and the ends of videos, in order.

    After the last video call `flush`.
    """

    def __init__(self, writer: PartWriter, codec: Codec, settings: EncodeSettings, tally: Tally):
        self._writer, self._codec, self._settings, self._tally = writer, codec, settings, tally
        self._waiting: list[Clip | End] = []

    def encode(self, row: Row, video: DecodedVideo | None, texts: list[np.ndarray], skipped: int) -> None:
        """Takes the clips of a video, which begins behind its first `skipped` clips. None: the row has a problem."""
        mine = Video(row, texts, skipped, skipped)
        if video is None:
            self._put(End(mine, row.trouble, 0))
            return
        for frames in video:
            self._put(Clip(mine, mine.taken, video.begin, frames))
            mine.taken += 1
            if mine.problem:
                break
        self._put(End(mine, video.problem, video.left))

    def _put(self, one: Clip | End) -> None:
        self._waiting.append(one)
        clips = sum(isinstance(waiting, Clip) for waiting in self._waiting)
        if clips in (0, min(self._settings.batch, self._writer.room)):
            self.flush()

    def flush(self) -> None:
        """Encodes and writes all that waits."""
        waiting, self._waiting = self._waiting, []
        latents = iter(encode_each(self._codec, [one.frames for one in waiting if isinstance(one, Clip)]))
        for one in waiting:
            if isinstance(one, Clip):
                self._write(one, next(latents))
            else:
                self._end(one)

    def _write(self, clip: Clip, latent: np.ndarray | Problem) -> None:
        """Writes a clip, unless one of its video before it failed, or it fails itself."""
        video = clip.video
        if video.problem:
            return
        if isinstance(latent, Problem):
            video.problem = latent
            return
        meta = clip_meta(video.row, clip.begin, self._codec, self._settings)
        try:
            self._writer.add(video.row, clip.number, latent, video.texts, meta)
        except ValueError as error:
            video.problem = Problem("not finite", str(error))
            return
        video.clips += 1
        self._tally.clips += 1

    def _end(self, end: End) -> None:
        """Notes what became of a video. Of one that is left early, nobody knows how much was left."""
        row, clips, problem = end.video.row, end.video.clips, end.video.problem or end.problem
        left = 0 if end.video.problem else end.left
        self._writer.end_video(left / self._settings.fps, failure_of(row, problem, clips) if problem else None)
        if problem:
            self._tally.failures += problem.reason != DUPLICATE
            kept = f", kept {counted(clips, 'clip')}" if clips else ""
            detail = f" ({problem.detail})" if problem.detail else ""
            tqdm.write(printable(f"skipped {row.source}: {problem.reason}{detail}{kept}"), file=sys.stderr)


def encode_each(codec: Codec, clips: list[np.ndarray]) -> list[np.ndarray | Problem]:
    """The latents of clips of one size, uint8 [T, H, W, 3] each, in one batch; or why a clip is not encodable.

    If there is one that is not, all are encoded one by one. Raises a one-line ValueError when a GPU's memory is full.
    """
    if not clips:
        return []
    try:
        return list(codec.encode_batch(np.stack(clips)))
    except ValueError as error:
        if len(clips) == 1:
            return [Problem("not encodable", one_line(error))]
    except torch.OutOfMemoryError:
        raise OutOfMemory(len(clips)) from None
    return [latent for clip in clips for latent in encode_each(codec, [clip])]


class OutOfMemory(OSError):
    """A batch does not fit on the GPU."""

    def __init__(self, clips: int):
        smaller = f"encode into another folder with --batch {clips // 2}" if clips > 1 else "make --size smaller"
        super().__init__(f"{counted(clips, 'clip')} at once: out of GPU memory; {smaller}, or free the GPU")


def failure_of(row: Row, problem: Problem, clips: int) -> dict:
    """A line of failures.jsonl. `clips`: those made before."""
    span = {"start": row.start, "end": row.end}
    return {"source": row.source, **span, "reason": problem.reason, "detail": problem.detail, "samples": clips}


def clip_meta(row: Row, begin: int, codec: Codec, settings: EncodeSettings) -> dict:
    """The JSON of the clip that begins with frame number `begin` of a video, from its start on."""
    fps, frames = settings.whole_fps, settings.frames
    start = row.start + begin / fps
    return {
        "caption": row.caption,
        **({"captions": list(row.captions)} if row.captions else {}),
        "source": row.source,
        "start": start,
        "end": start + frames / fps,
        "fps": fps,
        "height": settings.size[0],
        "width": settings.size[1],
        "frames": frames,
        "codec": codec.hash,
    }
