"""The parts of a dataset: videos decoded, encoded and written; and the last step, which merges all records."""

import json
import os
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from data_prep.batching import BatchEncoder, Tally
from data_prep.card import SCHEMA, write_card
from data_prep.codecs import Codec
from data_prep.command import counted
from data_prep.decoder import Decoders
from data_prep.encode_settings import EncodeSettings, span_of
from data_prep.files import write_atomic
from data_prep.index import write_index
from data_prep.shards import to_float16
from data_prep.text import TextEncoder
from data_prep.work import FAILURES, PartWriter, Work, failures_in, remove_leftovers


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
    ahead = 1 + settings.batch  # one in the worker, and a whole batch behind it
    bar = tqdm(total=len(rest), desc="encode", unit="video")
    with bar, Decoders(settings.workers, ahead) as decoders:
        decoded = decoders.videos(spans)
        for part, place in todo:
            with PartWriter(work, part, place, settings.samples_per_shard) as writer:
                encoder = BatchEncoder(writer, codec, settings, tally)
                for row in work.rows_from(part, place):
                    video = None if row.trouble else next(decoded)
                    texts = [text.encode([caption])[0] for caption in row.captions or [row.caption]] if video else []
                    encoder.encode(row, video, texts, skips.get(row.index, 0))
                    bar.set_postfix(tally.rates(settings.frames / settings.fps), refresh=False)
                    bar.update()
                    check_failures(tally, settings, work.folder)
                encoder.flush()
                check_failures(tally, settings, work.folder)
                writer.finish()


def check_failures(tally: Tally, settings: EncodeSettings, folder: Path) -> None:
    """Raises ValueError when too many videos have failed."""
    if tally.failures > settings.max_failures * tally.videos:
        raise ValueError(
            f"{folder}: {tally.failures} of {counted(tally.videos, 'video')} failed, more than --max-failures "
            f"{settings.max_failures:g}; the last ones are named above. Mend the cause, and run the command again with "
            "--retry"
        )


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
