"""Make a dataset of latents and text embeddings from videos.

    python -m data_prep.encode SRC OUT --fps 16 --size 480x832 --frames 81 --codec default --text default

SRC is a folder (videos with .txt captions beside them, searched in depth) or a manifest, JSONL or CSV, of `video`,
`caption` and optionally `start` and `end` in seconds, with paths relative to it. Every video is cut into consecutive
clips of exactly `--frames` frames. Videos that cannot be used are skipped, logged and counted in the card.

`--codec default` fits the embedded codec on these videos first; `default:FOLDER` takes that of another dataset.
"""

import argparse
import csv
import hashlib
import itertools
import json
import math
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data_prep.codecs import CODEC_FILE, FIT_CLIPS, STRIDES, DefaultCodec, latent_shape, open_codec
from data_prep.shards import CARD, SCHEMA, ShardWriter, read_card, to_float16, write_card
from data_prep.text import open_text
from data_prep.video import VideoError, declared_seconds, parse_size, read_frames

SUFFIXES = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".wmv", ".flv",
            ".ogv", ".3gp", ".gif"}
PATCH = 2                   # the model joins 2x2 latent values: sizes must be multiples of 8 * 2
FIT_FRAMES = 17             # frames of a fitting clip once pictures are larger than FIT_SIDE x FIT_SIDE
FIT_SIDE = 128
SEED = 0                    # of the codec's fit


@dataclass(frozen=True)
class Row:
    """One video of the source: its position, file, name in the dataset, caption, and span in seconds."""
    index: int
    path: Path
    source: str
    caption: str
    start: float = 0.0
    end: float | None = None


def list_source(src):
    """The rows of a folder or manifest, in order. Raises ValueError if it is missing, empty or malformed."""
    src = Path(src)
    if src.is_dir():
        paths = sorted((p for p in src.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()),
                       key=lambda p: p.relative_to(src).as_posix())
        rows = [Row(i, p, p.relative_to(src).as_posix(), _caption_beside(p)) for i, p in enumerate(paths)]
    elif not src.exists():
        raise ValueError(f"{src}: no such folder or manifest")
    elif src.suffix.lower() in (".jsonl", ".csv"):
        rows = [_manifest_row(src, i, line, entry) for i, (line, entry) in enumerate(_manifest(src))]
    else:
        raise ValueError(f"{src}: expected a folder of videos or a .jsonl or .csv manifest")
    if not rows:
        raise ValueError(f"{src}: no videos in it")
    return rows


def _caption_beside(path):
    text = path.with_suffix(".txt")
    return " ".join(text.read_text(encoding="utf-8", errors="replace").split()) if text.is_file() else ""


def _manifest(path):
    """(line number, dict) of each entry of a JSONL or CSV file."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        try:
            if path.suffix.lower() == ".csv":
                reader = csv.DictReader(file)
                for entry in reader:
                    yield reader.line_num, entry
            else:
                for line, text in enumerate(file, start=1):
                    if text.strip():
                        yield line, json.loads(text)
        except (csv.Error, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: does not parse ({error})") from None


def _manifest_row(manifest, index, line, entry):
    if not isinstance(entry, dict) or not isinstance(entry.get("video"), str) or not entry["video"]:
        raise ValueError(f"{manifest} line {line}: no 'video'")
    span = []
    for key, default in (("start", 0.0), ("end", None)):
        value = entry.get(key)
        try:
            span.append(default if value is None or value == "" else float(value))
        except (TypeError, ValueError):
            raise ValueError(f"{manifest} line {line}: {key} {value!r} is not a number of seconds") from None
    start, end = span
    if not (0 <= start < math.inf and (end is None or start < end < math.inf)):
        raise ValueError(f"{manifest} line {line}: need 0 <= start < end, got {start} and {end}")
    caption = " ".join(str(entry.get("caption") or "").split())
    return Row(index, manifest.parent / entry["video"], entry["video"], caption, start, end)


def _fingerprint(rows):
    """sha256 of what a source says: names, captions, spans, and the files' sizes."""
    digest = hashlib.sha256()
    for row in rows:
        size = os.path.getsize(row.path) if row.path.is_file() else None
        digest.update(json.dumps([row.source, row.caption, row.start, row.end, size]).encode())
    return digest.hexdigest()


def _prepare(out, settings):
    """Make `out` ready to be written. True if the dataset stands there already, with the same settings and source.

    Raises ValueError if `out` holds another dataset, or anything that an interrupted run would not have left.
    """
    if (out / CARD).exists():
        found = read_card(out)["source"]["settings"]
        differ = [key for key in sorted({*settings, *found}) if settings.get(key) != found.get(key)]
        if differ:
            raise ValueError(f"{out}: holds another dataset, it differs in " + ", ".join(
                f"{key} ({found.get(key)}, now {settings.get(key)})" for key in differ))
        return True
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file, expected a folder to write")
    out.mkdir(parents=True, exist_ok=True)
    left = sorted(out.iterdir())
    foreign = [p.name for p in left if not (p.name.removesuffix(".tmp") in (CARD, CODEC_FILE)
                                            or p.name.startswith("shard-"))]
    if foreign:
        raise ValueError(f"{out}: not empty and no dataset (it holds {foreign[0]}); choose another folder")
    if left:
        print(f"{out}: an interrupted run left {len(left)} files; starting again", file=sys.stderr)
        for path in left:
            path.unlink()
    return False


def fitting_clips(rows, fps, size, frames):
    """Yield up to FIT_CLIPS clips, uint8 [T, H, W, 3], from random places all over the source, for the codec's fit.

    Of large pictures, FIT_FRAMES frames each. Videos that cannot be read are passed over here: encoding reports them.
    """
    rng = np.random.default_rng(SEED)
    length = frames if size[0] * size[1] <= FIT_SIDE ** 2 else min(frames, FIT_FRAMES)
    order, found, turn = [rows[i] for i in rng.permutation(len(rows))], 0, 0
    while order and found < FIT_CLIPS:
        again = []
        for row in order:
            if found == FIT_CLIPS:
                break
            end = row.end or declared_seconds(row.path) or 0.0
            room = max(0.0, end - row.start - length / fps)
            for start in (row.start + rng.uniform(0, room), row.start):     # the end may be missing
                try:
                    clip = list(itertools.islice(read_frames(row.path, fps, size, start, row.end), length))
                except VideoError:
                    clip = []
                if len(clip) == length:
                    break
            if len(clip) == length:
                found += 1
                yield np.stack(clip)
                if (turn + 1) * length / fps < room:        # a longer video may be looked at again
                    again.append(row)
        order, turn = again, turn + 1


class _Log:
    """What was skipped and why: printed once, counted for the card."""

    def __init__(self):
        self.entries = []

    def add(self, row, reason, detail, samples):
        self.entries.append({"source": row.source, "reason": reason, "detail": detail, "samples": samples})
        kept = f", kept {samples} clips" if samples else ""
        tqdm.write(f"skipped {row.source}: {reason}{f' ({detail})' if detail else ''}{kept}", file=sys.stderr)

    def counts(self):
        return dict(sorted(Counter(entry["reason"] for entry in self.entries).items()))


def encode(src, out, fps, size, frames, codec="default", text="default", samples_per_shard=256, device="cpu"):
    """Make the dataset `out` from `src`; see the module's docstring. Returns its card.

    fps: frames a second; size: (height, width), multiples of 16; frames: 1 + 4k.
    codec, text: as on the command line. Raises ValueError in one line if there is nothing to make or it cannot be made.
    """
    out = Path(out)
    multiple = STRIDES[1] * PATCH
    if size[0] % multiple or size[1] % multiple:
        nearest = "x".join(str(max(1, round(side / multiple)) * multiple) for side in size)
        raise ValueError(f"size {size[0]}x{size[1]}: must be multiples of {multiple}, such as {nearest}")
    shape = latent_shape(frames, *size)
    if not 0 < fps <= 1000:
        raise ValueError(f"fps {fps}: must be above 0")
    if samples_per_shard < 1:
        raise ValueError(f"samples per shard must be at least 1, not {samples_per_shard}")
    fps = int(fps) if fps == int(fps) else fps      # 16 and 16.0 make the same bytes
    opened = None if codec == "default" else open_codec(codec, device)
    encoder = open_text(text, device)
    rows = list_source(src)
    settings = {"fps": fps, "height": size[0], "width": size[1], "frames": frames,
                "codec": f"{opened.name} {opened.hash}" if opened else "default, fitted",
                "text": f"{encoder.name} {encoder.hash}", "samples_per_shard": samples_per_shard,
                "source": _fingerprint(rows)}
    if _prepare(out, settings):
        print(f"{out}: the dataset stands already, nothing to do")
        return read_card(out)
    bare = sum(not row.caption for row in rows)
    if bare:
        print(f"{bare} of {len(rows)} videos have no caption; theirs is empty", file=sys.stderr)

    log, dropped, samples = _Log(), 0.0, 0
    if opened is None:
        # None without a single clip: then there is nothing to encode either, and below says why of every video.
        opened = _fit(rows, fps, size, frames)
    if opened is not None and opened.name == "default":
        opened.save(out / CODEC_FILE)
    with ShardWriter(out, samples_per_shard) as writer:
        bar = tqdm(rows, desc="encode", unit="video")
        for row in bar:
            embedding = encoder.encode([row.caption])[0]
            clips = filled = 0
            clip = np.empty((frames, *size, 3), np.uint8)
            problem = None
            try:
                for frame in read_frames(row.path, fps, size, row.start, row.end):
                    clip[filled] = frame
                    filled += 1
                    if filled == frames:
                        start = row.start + clips * frames / fps
                        writer.add(f"{row.index:06d}_{clips:04d}", opened.encode(clip), embedding, {
                            "caption": row.caption, "source": row.source, "start": start, "end": start + frames / fps,
                            "fps": fps, "height": size[0], "width": size[1], "frames": frames, "codec": opened.hash})
                        clips, filled = clips + 1, 0
                        bar.set_postfix(samples=samples + clips, refresh=False)
            except VideoError as error:
                problem = error.reason, error.detail
            if problem is None and clips == 0:
                problem = "too short", f"{filled} of {frames} frames"
            if problem:
                log.add(row, *problem, clips)
            samples += clips
            dropped += filled / fps
    if not samples:
        (out / CODEC_FILE).unlink(missing_ok=True)
        reasons = ", ".join(f"{n} {reason}" for reason, n in log.counts().items())
        raise ValueError(f"{src}: not one clip could be made, of {len(rows)} videos: {reasons}")
    card = {
        "schema": SCHEMA,
        "codec": {"name": opened.name, "hash": opened.hash, "settings": opened.settings, "folder": opened.folder},
        "latent": {"channels": shape[0], "frames": shape[1], "height": shape[2], "width": shape[3], "dtype": "float16",
                   "strides": list(STRIDES), "mean": opened.mean, "std": opened.std},
        "video": {"fps": fps, "frames": frames, "height": size[0], "width": size[1]},
        "text": {"name": encoder.name, "dim": encoder.dim, "max_tokens": encoder.max_tokens, "hash": encoder.hash,
                 "folder": encoder.folder},
        "empty_caption": to_float16(encoder.encode([""])[0], "the empty caption").tolist(),
        "counts": {"videos": len(rows), "samples": samples, "shards": len(writer.shards), "skipped": log.counts(),
                   "no_caption": bare, "dropped_seconds": round(dropped, 6)},
        "skipped": log.entries,
        "shards": writer.shards,
        "source": {"path": os.path.abspath(src), "settings": settings},
    }
    write_card(out, card)
    return card


def _fit(rows, fps, size, frames):
    """Fit the default codec. None if there is not one clip to fit it on."""
    began = time.monotonic()
    clips = iter(tqdm(fitting_clips(rows, fps, size, frames), desc="fit codec", unit="clip", leave=False))
    first = next(clips, None)
    if first is None:
        return None
    codec = DefaultCodec.fit(itertools.chain([first], clips), SEED)
    print(f"fitted the default codec on {codec.settings['clips']} clips in {time.monotonic() - began:.1f} s",
          file=sys.stderr)
    return codec


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m data_prep.encode",
                                     description="Make a dataset of latents and text embeddings from videos.")
    parser.add_argument("src", help="folder of videos with .txt captions, or a .jsonl or .csv manifest")
    parser.add_argument("out", help="folder to write the dataset to")
    parser.add_argument("--fps", type=float, default=16)
    parser.add_argument("--size", default="480x832", help="HEIGHTxWIDTH, multiples of 16 (default 480x832)")
    parser.add_argument("--frames", type=int, default=81, help="frames of a clip, 1 + 4k (default 81)")
    parser.add_argument("--codec", default="default", help="default, default:FOLDER or wan:FOLDER")
    parser.add_argument("--text", default="default", help="default or umt5:FOLDER")
    parser.add_argument("--samples-per-shard", type=int, default=256)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="for wan and umt5")
    args = parser.parse_args(argv)
    try:
        cuda = torch.cuda.is_available()
        if args.device == "cuda" and not cuda:
            raise ValueError("--device cuda: no usable GPU here")
        device = ("cuda" if cuda else "cpu") if args.device == "auto" else args.device
        card = encode(args.src, args.out, args.fps, parse_size(args.size), args.frames, args.codec, args.text,
                      args.samples_per_shard, device)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    counts = card["counts"]
    skipped = ", ".join(f"{n} {reason}" for reason, n in counts["skipped"].items()) or "none"
    print(f"{args.out}: {counts['samples']} samples in {counts['shards']} shards from {counts['videos']} videos; "
          f"skipped: {skipped}; {counts['dropped_seconds']:.1f} s of remainders dropped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
