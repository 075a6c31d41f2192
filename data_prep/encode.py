"""Makes a dataset of latents and text embeddings from videos.

    python -m data_prep.encode SRC OUT --fps 16 --size 480x832 --frames 81 --codec default --text default --job 0/1

SRC is a folder of videos with .txt captions beside them, searched recursively. Or it is a manifest, JSONL, CSV or
Parquet, with `video`, `caption` and, optionally, `captions`, `start` and `end` in seconds; its paths are relative to
it. Or it is webdataset shards of videos: a folder of .tar files, one .tar, or a pattern such as `clips/{000..010}.tar`.
Every video is cut into clips of exactly `--frames` frames, one behind the other or every `--stride` frames. Videos
that cannot be used are skipped, and listed in failures.jsonl.

Any number of jobs can share the work: each makes the parts `i, i + n, ...` of `work.py`. Any of them can be killed, and
started again. The one that finds all parts done writes the index and the card.

`--codec default` fits the built-in codec on these videos first; `default:FOLDER` uses the codec of another dataset.
"""

import argparse
import itertools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data_prep.card import SCHEMA, read_card, write_card
from data_prep.codecs import Codec, open_codec
from data_prep.command import printable, run_command
from data_prep.decoder import DecodedVideo, Decoders, Problem, Span
from data_prep.default_codec import CODEC_FILE, FIT_CLIPS, DefaultCodec
from data_prep.files import has_size, locked, write_atomic, write_json
from data_prep.geometry import LatentGeometry, parse_size
from data_prep.index import write_index
from data_prep.shards import to_float16
from data_prep.sources import Row, fingerprints, list_source
from data_prep.text import TextEncoder, open_text
from data_prep.work import (
    FAILURES,
    LOCK,
    WORK,
    PartWriter,
    Work,
    check_same_work,
    clear,
    parse_job,
    remove_leftovers,
    stands_already,
)

FIT_FRAMES = 17  # at most this many frames per clip of the fit, if pictures are larger than FIT_SIDE x FIT_SIDE
FIT_SIDE = 128
FIT_SEED = 0


@dataclass(frozen=True)
class EncodeSettings:
    """The settings that a dataset is made with; `codec` and `text` as on the command line."""

    fps: float  # frames per second
    size: tuple[int, int]  # (height, width) in pixels
    frames: int  # video frames of a clip
    codec: str = "default"
    text: str = "default"
    samples_per_shard: int = 256
    videos_per_part: int = 64
    precision: str = "auto"  # of the Wan VAE: auto, bf16 or fp32
    stride: int = 0  # a clip begins every so many frames; 0: every `frames`

    # These don't change the dataset.
    device: str = "cpu"
    workers: int = 1  # processes that decode
    max_failures: float = 1.0  # share of a job's videos

    def validate(self, geometry: LatentGeometry) -> None:
        """Raises a one-line ValueError for invalid settings."""
        geometry.check_patches(*self.size)
        geometry.latent_shape(self.frames, *self.size)
        if not 0.01 <= self.fps <= 1000:
            raise ValueError(f"fps {self.fps}: must be from 0.01 to 1000")
        if self.stride < 0:
            raise ValueError(f"stride {self.stride}: must be at least 1")
        for name in ("samples_per_shard", "videos_per_part", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.replace('_', ' ')} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.max_failures <= 1:
            raise ValueError(f"max failures {self.max_failures}: a share, from 0 to 1")

    @property
    def clip_stride(self) -> int:
        """Frames from the begin of a clip to that of the next."""
        return self.stride or self.frames

    @property
    def whole_fps(self) -> float:
        """fps, as an int where it is one: 16 and 16.0 make the same bytes."""
        return int(self.fps) if self.fps == int(self.fps) else self.fps

    def record(self, codec: Codec | None, text: TextEncoder, rows: list[Row]) -> dict:
        """Settings and source, as the card records them. Two datasets with the same record are the same."""
        return {
            "fps": self.whole_fps,
            "height": self.size[0],
            "width": self.size[1],
            "frames": self.frames,
            "stride": self.clip_stride,
            "codec": f"{codec.name} {codec.hash} {codec.settings.get('dtype', 'float32')}"
            if codec
            else "default, fitted",
            "text": f"{text.name} {text.hash}",
            "samples_per_shard": self.samples_per_shard,
            "videos_per_part": self.videos_per_part,
            **fingerprints(rows),
        }


@dataclass
class Tally:
    """What this job has made so far, for its progress line."""

    clips: int = 0
    failures: int = 0
    began: float = field(default_factory=time.monotonic)

    def rates(self, seconds_per_clip: float) -> dict[str, str]:
        """Clips per second, hours of video per hour, failures."""
        rate = self.clips / max(time.monotonic() - self.began, 1e-9)
        return {"clips/s": f"{rate:.2f}", "video h/h": f"{rate * seconds_per_clip:.1f}", "failed": str(self.failures)}


def encode(
    src: str | Path, out: str | Path, settings: EncodeSettings, job: tuple[int, int] = (0, 1), retry: bool = False
) -> dict | None:
    """Makes the dataset `out` from `src`, or job `job` = (i, n) of it; see the module's docstring.

    `retry`: what failed in this job's parts is tried again. Returns the dataset's card; None if parts of other jobs are
    missing. Raises a one-line ValueError if the dataset cannot be made.
    """
    out = Path(out)
    fitted = settings.codec == "default"
    codec = None if fitted else open_codec(settings.codec, settings.device, settings.precision)
    settings.validate(codec.geometry if codec else DefaultCodec.geometry)
    text = open_text(settings.text, settings.device)
    rows = list_source(src)
    record = settings.record(codec, text, rows)
    work = Work(out, rows, settings.videos_per_part)
    if stands_already(out, record, retry) and not retry:
        card = read_card(out)
        lost = [shard["file"] for shard in card["shards"] if not has_size(out / shard["file"], shard["bytes"])]
        if not lost:
            print(f"{out}: the dataset exists already, nothing to do")
            return card
        print(f"{out}: {len(lost)} shards are missing or cut short, they are made again", file=sys.stderr)
    parts = range(job[0], work.parts, job[1])
    codec = begin(work, record, codec, settings, src, retry)
    if retry and not work.forget_failures(parts):
        print(f"{out}: nothing failed in the parts that are done", file=sys.stderr)
    bare = sum(not row.caption for row in rows)
    if bare:
        print(f"{bare} of {len(rows)} videos have no caption; they get the empty one", file=sys.stderr)
    encode_parts(work, parts, codec, text, settings)
    return finish(work, codec, text, settings, record, src)


def begin(
    work: Work, record: dict, codec: Codec | None, settings: EncodeSettings, src: str | Path, retry: bool
) -> Codec:
    """Writes what is made into the folder, or checks that it is the same. Fits the built-in codec, once for all jobs.

    Returns the codec. Raises ValueError if the folder holds other work, or if there is no clip to fit the codec on.
    """
    out = work.folder
    with locked(out / LOCK, lambda: print(f"{out}: waiting for the job that starts this dataset", file=sys.stderr)):
        if (out / WORK).exists():
            check_same_work(out, record, retry)
        if retry or not (out / WORK).exists():
            write_json(out / WORK, record)
        path = out / CODEC_FILE
        if codec is None:
            if path.is_file():
                return DefaultCodec.load(path)
            codec = fit_codec(work, settings, src)
        if isinstance(codec, DefaultCodec) and not _holds(path, codec):
            codec.save(path)
    return codec


def _holds(path: Path, codec: DefaultCodec) -> bool:
    """Whether a file holds this codec, undamaged."""
    try:
        return DefaultCodec.load(path).hash == codec.hash
    except ValueError:
        return False


def encode_parts(work: Work, parts: range, codec: Codec, text: TextEncoder, settings: EncodeSettings) -> None:
    """Encodes and writes what is missing of these parts, in order.

    Raises ValueError when more than `max_failures` of their videos have failed.
    """
    todo, tally = [], Tally()
    for part in parts:
        records, place = work.records(part)
        tally.failures += sum(len(record["failures"]) for record in records)
        if place is not None:
            todo.append((part, place))
    if not todo:
        return
    videos = sum(len(work.rows_of(part)) for part in parts)
    rest = [row for part, place in todo for row in work.rows_from(part, place)]
    skips = {place.row: place.clip for _, place in todo}
    spans = (span_of(row, settings, skips.get(row.index, 0)) for row in rest if not row.problem)
    bar = tqdm(total=len(rest), desc="encode", unit="video")
    with bar, Decoders(settings.workers) as decoders:
        decoded = decoders.videos(spans)
        for part, place in todo:
            with PartWriter(work, part, place, settings.samples_per_shard) as writer:
                for row in work.rows_from(part, place):
                    video = None if row.problem else next(decoded)
                    encode_video(row, video, skips.get(row.index, 0), codec, text, settings, writer, tally)
                    bar.set_postfix(tally.rates(settings.frames / settings.fps), refresh=False)
                    bar.update()
                    if tally.failures > settings.max_failures * videos:
                        raise ValueError(
                            f"{work.folder}: {tally.failures} of {videos} videos failed, more than --max-failures "
                            f"{settings.max_failures:g}; the last ones are named above. Mend the cause, and run the "
                            "command again with --retry"
                        )
                writer.finish()


def encode_video(
    row: Row,
    video: DecodedVideo | None,
    clips: int,
    codec: Codec,
    text: TextEncoder,
    settings: EncodeSettings,
    writer: PartWriter,
    tally: Tally,
) -> None:
    """Encodes and writes the whole clips of a video. `video` begins behind its first `clips` clips."""
    problem: Problem | None = Problem("unreadable", row.problem)
    if video is not None:
        texts, problem = [text.encode([caption])[0] for caption in row.captions or [row.caption]], None
        for clip in video:
            try:
                writer.add(row, clips, codec.encode(clip), texts, clip_meta(row, clips, codec, settings))
            except ValueError as error:
                problem = Problem("not finite", str(error))
                break
            clips, tally.clips = clips + 1, tally.clips + 1
        problem = problem or video.problem
    left = video.left if video is not None else 0
    writer.end_video(left / settings.fps, failure_of(row, problem, clips) if problem else None)
    if problem:
        tally.failures += 1
        kept = f", kept {clips} clips" if clips else ""
        detail = f" ({problem.detail})" if problem.detail else ""
        tqdm.write(printable(f"skipped {row.source}: {problem.reason}{detail}{kept}"), file=sys.stderr)


def failure_of(row: Row, problem: Problem, clips: int) -> dict:
    """A line of failures.jsonl. `clips`: those made before."""
    span = {"start": row.start, "end": row.end}
    return {"source": row.source, **span, "reason": problem.reason, "detail": problem.detail, "samples": clips}


def span_of(row: Row, settings: EncodeSettings, skip: int) -> Span:
    """What to decode of a video: all whole clips but the first `skip`."""
    size, frames, stride = settings.size, settings.frames, settings.clip_stride
    return Span(row.path, settings.fps, size, frames, row.start, row.end, skip=skip, stride=stride, region=row.region)


def clip_meta(row: Row, number: int, codec: Codec, settings: EncodeSettings) -> dict:
    """The JSON of clip `number` of a video."""
    fps, frames = settings.whole_fps, settings.frames
    start = row.start + number * settings.clip_stride / fps
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


# ---- the last step


def finish(
    work: Work, codec: Codec, text: TextEncoder, settings: EncodeSettings, record: dict, src: str | Path
) -> dict | None:
    """Merges the records of all parts into failures.jsonl, the index and the card. None if some parts are not done.

    It can be run again, and by several jobs at once: all write the same. Raises ValueError when there is no clip.
    """
    out, records, missing = work.folder, [], 0
    for part in range(work.parts):
        own, place = work.records(part)
        records += own
        missing += place is not None
    if missing:
        print(f"{out}: {missing} of {work.parts} parts are not done; the job that finds none missing writes the card")
        return None
    failures = [failure for record in records for failure in record["failures"]]
    reasons = dict(sorted(Counter(failure["reason"] for failure in failures).items()))
    shards = [entry for entry in records if entry["samples"]]
    if not shards:
        clear(out)
        raise ValueError(no_clip(src, len(work.rows), reasons))
    lines = "".join(json.dumps(failure, ensure_ascii=False) + "\n" for failure in failures)
    write_atomic(out / FAILURES, lines)
    shape = codec.geometry.latent_shape(settings.frames, *settings.size)
    card = {
        "schema": SCHEMA,
        "codec": {"name": codec.name, "hash": codec.hash, "settings": codec.settings, "folder": codec.folder},
        "latent": {
            **dict(zip(("channels", "frames", "height", "width"), shape)),
            "dtype": "float16",
            "strides": list(codec.geometry.strides),
            "mean": codec.mean,
            "std": codec.std,
        },
        "video": {key: record[key] for key in ("fps", "frames", "height", "width")},
        "text": {key: getattr(text, key) for key in ("name", "dim", "max_tokens", "hash", "folder")},
        "empty_caption": to_float16(text.encode([""])[0], "the empty caption").tolist(),
        "counts": {
            "videos": len(work.rows),
            "samples": sum(shard["samples"] for shard in shards),
            "shards": len(shards),
            "skipped": reasons,
            "no_caption": sum(not row.caption for row in work.rows),
            "dropped_seconds": round(sum(entry["dropped_seconds"] for entry in records), 6),
        },
        "shards": [{key: shard[key] for key in ("file", "samples", "bytes", "sha256")} for shard in shards],
        "index": write_index(out, shards),
        "source": {"path": os.path.abspath(src), "settings": record},
    }
    card = write_card(out, card)
    remove_leftovers(out)
    return card


def no_clip(src: str | Path, videos: int, reasons: dict[str, int]) -> str:
    """The error of a source that gives no clip."""
    return f"{src}: no clip could be made from {videos} videos: {', '.join(f'{n} {why}' for why, n in reasons.items())}"


# ---- the built-in codec's fit


def fit_codec(work: Work, settings: EncodeSettings, src: str | Path) -> DefaultCodec:
    """Fits the built-in codec to the source. Raises ValueError if there is no clip to fit it on."""
    began = time.monotonic()
    problems: Counter[str] = Counter()
    with Decoders(settings.workers) as decoders:
        found = fitting_clips(work.rows, settings, decoders, problems)
        clips = iter(tqdm(found, desc="fit codec", unit="clip", leave=False))
        first = next(clips, None)
        if first is None:
            clear(work.folder)
            raise ValueError(no_clip(src, len(work.rows), dict(sorted(problems.items()))))
        codec = DefaultCodec.fit(itertools.chain([first], clips), FIT_SEED)
    seconds = time.monotonic() - began
    print(f"fitted the default codec on {codec.settings['clips']} clips in {seconds:.1f} s", file=sys.stderr)
    return codec


def fitting_clips(
    rows: list[Row], settings: EncodeSettings, decoders: Decoders, problems: Counter[str]
) -> Iterator[np.ndarray]:
    """Yields up to FIT_CLIPS clips, uint8 [T, H, W, 3], from random places all over the source, for the codec's fit.

    Clips of large pictures have at most FIT_FRAMES frames. Videos that cannot be read are skipped, and their reasons
    counted in `problems`.
    """
    rng = np.random.default_rng(FIT_SEED)
    small = settings.size[0] * settings.size[1] <= FIT_SIDE**2
    length = settings.frames if small else min(settings.frames, FIT_FRAMES)
    seconds = length / settings.fps
    order, found, turn = [rows[i] for i in rng.permutation(len(rows)) if not rows[i].problem], 0, 0
    while order and found < FIT_CLIPS:
        again = []
        for row in order:
            if found == FIT_CLIPS:
                break
            for place in (rng.random(), 0.0):  # the video may end early
                span = replace(span_of(row, settings, 0), frames=length, clips=1, place=place)
                videos = decoders.videos([span])
                video = next(videos)
                clip = next(video, None)
                if clip is not None:
                    break
            if clip is None:
                problems[video.problem.reason if video.problem else "too short"] += 1
                continue
            found += 1
            yield clip
            next(video, None)  # then its room is known
            if (turn + 1) * seconds < video.room:  # a longer video may be used again
                again.append(row)
        order, turn = again, turn + 1


def main(arguments: list[str] | None = None) -> int:
    description = "Makes a dataset of latents and text embeddings from videos."
    parser = argparse.ArgumentParser(prog="data_prep.encode", description=description)
    parser.add_argument(
        "src", help="folder of videos with .txt captions, manifest (.jsonl, .csv, .parquet), or .tar files"
    )
    parser.add_argument("out", help="folder to write the dataset to")
    parser.add_argument("--fps", type=float, default=16)
    parser.add_argument("--size", default="480x832", help="HEIGHTxWIDTH, multiples of 16 (default 480x832)")
    parser.add_argument("--frames", type=int, default=81, help="frames per clip, 1 + 4k (default 81)")
    parser.add_argument("--stride", type=int, default=0, help="a clip begins every so many frames (default: --frames)")
    parser.add_argument("--codec", default="default", help="default, default:FOLDER or wan:FOLDER")
    parser.add_argument("--text", default="default", help="default or umt5:FOLDER")
    parser.add_argument("--samples-per-shard", type=int, default=256, help="at most (default 256)")
    parser.add_argument("--videos-per-part", type=int, default=64, help="consecutive videos that one job makes (64)")
    parser.add_argument("--job", default="0/1", metavar="I/N", help="make part I, I + N, ... only (default 0/1: all)")
    parser.add_argument(
        "--workers", type=int, default=default_workers(), help="processes that decode (default %(default)s)"
    )
    parser.add_argument("--max-failures", type=float, default=1.0, help="share of the job's videos (default 1)")
    parser.add_argument("--retry", action="store_true", help="try again what failed")
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32"), help="of the Wan VAE")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="for wan and umt5")
    options = parser.parse_args(arguments)
    return run_command(lambda: encode_as_asked(options))


def encode_as_asked(options: argparse.Namespace) -> None:
    """What the command line asks for. Prints a line on what was made."""
    cuda = torch.cuda.is_available()
    if options.device == "cuda" and not cuda:
        raise ValueError("--device cuda: no usable GPU here")
    device = ("cuda" if cuda else "cpu") if options.device == "auto" else options.device
    settings = EncodeSettings(
        options.fps,
        parse_size(options.size),
        options.frames,
        options.codec,
        options.text,
        options.samples_per_shard,
        options.videos_per_part,
        options.precision,
        options.stride,
        device,
        options.workers,
        options.max_failures,
    )
    card = encode(options.src, options.out, settings, parse_job(options.job), options.retry)
    if card is None:
        return
    counts = card["counts"]
    skipped = ", ".join(f"{n} {reason}" for reason, n in counts["skipped"].items()) or "none"
    made = f"{counts['samples']} samples in {counts['shards']} shards from {counts['videos']} videos"
    print(f"{options.out}: {made}; skipped: {skipped}; {counts['dropped_seconds']:.1f} s of remainders dropped")


def default_workers() -> int:
    """Decoding processes: as many as cores are left beside the encoder, at most 8."""
    return max(1, min(8, len(os.sched_getaffinity(0)) - 1))


if __name__ == "__main__":
    sys.exit(main())
