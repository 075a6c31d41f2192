"""The parts of a dataset: videos decoded, encoded and written; and the last step, which merges all records."""

import json
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from data_prep.card import SCHEMA, write_card
from data_prep.codecs import Codec
from data_prep.command import counted, one_line, printable
from data_prep.decoder import DecodedVideo, Decoders
from data_prep.encode_settings import EncodeSettings, span_of
from data_prep.files import write_atomic
from data_prep.index import write_index
from data_prep.shards import to_float16
from data_prep.sources import DUPLICATE, Row
from data_prep.text import TextEncoder
from data_prep.video import Problem
from data_prep.work import FAILURES, PartWriter, Work, failures_in, remove_leftovers


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


def encode_parts(
    work: Work, parts: range, codec: Codec, text: TextEncoder, settings: EncodeSettings, tally: Tally
) -> None:
    """Encodes and writes what is missing of these parts, in order.

    Raises ValueError when more than `max_failures` of the videos in `tally` have failed.
    """
    todo = []
    for part in parts:
        records, place = work.records(part)
        tally.failures += sum(map(failures_in, records))
        if place is not None:
            todo.append((part, place))
    if not todo:
        return
    rest = [row for part, place in todo for row in work.rows_from(part, place)]
    skips = {place.row: place.clip for _, place in todo}
    spans = (span_of(row, settings, skips.get(row.index, 0)) for row in rest if not row.trouble)
    bar = tqdm(total=len(rest), desc="encode", unit="video")
    with bar, Decoders(settings.workers) as decoders:
        decoded = decoders.videos(spans)
        for part, place in todo:
            with PartWriter(work, part, place, settings.samples_per_shard) as writer:
                for row in work.rows_from(part, place):
                    video = None if row.trouble else next(decoded)
                    encode_video(row, video, skips.get(row.index, 0), codec, text, settings, writer, tally)
                    bar.set_postfix(tally.rates(settings.frames / settings.fps), refresh=False)
                    bar.update()
                    if tally.failures > settings.max_failures * tally.videos:
                        raise ValueError(
                            f"{work.folder}: {tally.failures} of {counted(tally.videos, 'video')} failed, more than "
                            f"--max-failures {settings.max_failures:g}; the last ones are named above. Mend the cause, "
                            "and run the command again with --retry"
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
    problem = row.trouble
    if video is not None:
        texts, problem = [text.encode([caption])[0] for caption in row.captions or [row.caption]], None
        for clip in video:
            try:
                latent = codec.encode(clip)
            except ValueError as error:
                problem = Problem("not encodable", one_line(error))
                break
            try:
                writer.add(row, clips, latent, texts, clip_meta(row, video.begin, codec, settings))
            except ValueError as error:
                problem = Problem("not finite", str(error))
                break
            clips, tally.clips = clips + 1, tally.clips + 1
        problem = problem or video.problem
    left = video.left if video is not None else 0
    writer.end_video(left / settings.fps, failure_of(row, problem, clips) if problem else None)
    if problem:
        tally.failures += problem.reason != DUPLICATE
        kept = f", kept {counted(clips, 'clip')}" if clips else ""
        detail = f" ({problem.detail})" if problem.detail else ""
        tqdm.write(printable(f"skipped {row.source}: {problem.reason}{detail}{kept}"), file=sys.stderr)


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


# ---- the last step


def finish(
    work: Work, codec: Codec, text: TextEncoder, settings: EncodeSettings, record: dict, src: str | Path
) -> dict | None:
    """Merges the records of all parts into failures.jsonl, the index and the card. None if some parts are not done.

    It can be run again, and by several jobs at once: all write the same. Raises NoClip when there is no clip.
    """
    out, records, missing = work.folder, [], 0
    for part in range(work.parts):
        own, place = work.records(part)
        records += own
        missing += place is not None
    if missing:
        parts = f"{missing} of {counted(work.parts, 'part')} {'is' if missing == 1 else 'are'} not done"
        print(f"{out}: {parts}; the job that finds none missing writes the card")
        return None
    failures = [failure for record in records for failure in record["failures"]]
    reasons = dict(sorted(Counter(failure["reason"] for failure in failures).items()))
    shards = [entry for entry in records if entry["samples"]]
    lines = "".join(json.dumps(failure, ensure_ascii=False) + "\n" for failure in failures)
    write_atomic(out / FAILURES, lines)
    if not shards:
        raise NoClip(no_clip(src, len(work.rows), reasons))
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


class NoClip(ValueError):
    """No clip could be made from the videos."""


def no_clip(src: str | Path, videos: int, reasons: dict[str, int]) -> str:
    """The error of a source that gives no clip."""
    why = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    return f"{src}: no clip could be made from {counted(videos, 'video')}: {why}"
