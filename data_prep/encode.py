"""Makes a dataset of latents and text embeddings from videos.

    python -m data_prep.encode SRC OUT --fps 16 --size 480x832 --frames 81 --codec default --text default

SRC is a folder of videos with .txt captions beside them, searched recursively. Or it is a manifest, JSONL or CSV, with
`video`, `caption` and, optionally, `start` and `end` in seconds; its paths are relative to the manifest. Every video is
cut into consecutive clips of exactly `--frames` frames. Videos that cannot be used are skipped, logged and counted in
the card.

`--codec default` fits the built-in codec on these videos first; `default:FOLDER` uses the codec of another dataset.
"""

import argparse
import itertools
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data_prep.card import CARD, SCHEMA, read_card, write_card
from data_prep.codecs import Codec, open_codec
from data_prep.command import run_command
from data_prep.default_codec import CODEC_FILE, FIT_CLIPS, DefaultCodec
from data_prep.geometry import LatentGeometry, parse_size
from data_prep.shards import ShardWriter, to_float16
from data_prep.sources import Row, fingerprint, list_source
from data_prep.text import TextEncoder, open_text
from data_prep.video import VideoError, declared_seconds, read_frames

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
    device: str = "cpu"

    def validate(self, geometry: LatentGeometry) -> None:
        """Raises a one-line ValueError for invalid settings."""
        geometry.check_patches(*self.size)
        geometry.latent_shape(self.frames, *self.size)
        if not 0 < self.fps <= 1000:
            raise ValueError(f"fps {self.fps}: must be above 0")
        if self.samples_per_shard < 1:
            raise ValueError(f"samples per shard must be at least 1, not {self.samples_per_shard}")

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
            "codec": f"{codec.name} {codec.hash}" if codec else "default, fitted",
            "text": f"{text.name} {text.hash}",
            "samples_per_shard": self.samples_per_shard,
            "source": fingerprint(rows),
        }


@dataclass
class Tally:
    """Counts what became of the videos, for the card."""

    samples: int = 0
    dropped_seconds: float = 0.0  # remainders shorter than a clip
    skipped: list[dict] = field(default_factory=list)

    def skip(self, row: Row, reason: str, detail: str, samples: int) -> None:
        """Counts and prints a video that cannot be used, or not to its end. `samples`: clips made from it before."""
        self.skipped.append({"source": row.source, "reason": reason, "detail": detail, "samples": samples})
        kept = f", kept {samples} clips" if samples else ""
        tqdm.write(f"skipped {row.source}: {reason}{f' ({detail})' if detail else ''}{kept}", file=sys.stderr)

    def reasons(self) -> dict[str, int]:
        """Videos skipped, by reason."""
        return dict(sorted(Counter(entry["reason"] for entry in self.skipped).items()))


def encode(src: str | Path, out: str | Path, settings: EncodeSettings) -> dict:
    """Makes the dataset `out` from `src`; see the module's docstring. Returns its card.

    Raises a one-line ValueError if the dataset cannot be made.
    """
    out = Path(out)
    fitted = settings.codec == "default"
    codec = None if fitted else open_codec(settings.codec, settings.device)
    settings.validate(codec.geometry if codec else DefaultCodec.geometry)
    text = open_text(settings.text, settings.device)
    rows = list_source(src)
    record = settings.record(codec, text, rows)
    if stands_already(out, record):
        print(f"{out}: the dataset exists already, nothing to do")
        return read_card(out)
    bare = sum(not row.caption for row in rows)
    if bare:
        print(f"{bare} of {len(rows)} videos have no caption; they get the empty one", file=sys.stderr)

    if fitted:
        codec = fit_codec(rows, settings)
    tally = Tally()
    with ShardWriter(out, settings.samples_per_shard) as writer:
        if isinstance(codec, DefaultCodec):
            codec.save(out / CODEC_FILE)
        encode_rows(rows, codec, text, settings, writer, tally)
    if codec is None or not tally.samples:
        (out / CODEC_FILE).unlink(missing_ok=True)
        reasons = ", ".join(f"{n} {reason}" for reason, n in tally.reasons().items())
        raise ValueError(f"{src}: no clip could be made from {len(rows)} videos: {reasons}")
    shape = codec.geometry.latent_shape(settings.frames, *settings.size)
    video = {key: record[key] for key in ("fps", "frames", "height", "width")}
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
        "video": video,
        "text": {key: getattr(text, key) for key in ("name", "dim", "max_tokens", "hash", "folder")},
        "empty_caption": to_float16(text.encode([""])[0], "the empty caption").tolist(),
        "counts": {
            "videos": len(rows),
            "samples": tally.samples,
            "shards": len(writer.shards),
            "skipped": tally.reasons(),
            "no_caption": bare,
            "dropped_seconds": round(tally.dropped_seconds, 6),
        },
        "skipped": tally.skipped,
        "shards": writer.shards,
        "source": {"path": os.path.abspath(src), "settings": record},
    }
    write_card(out, card)
    return card


def stands_already(out: Path, record: dict) -> bool:
    """Prepares the folder `out`. True if it already holds the dataset, with the same settings and source.

    Raises ValueError if `out` holds another dataset, or files that an interrupted run does not leave.
    """
    if (out / CARD).exists():
        found = read_card(out)["source"]["settings"]
        differ = [key for key in sorted({*record, *found}) if record.get(key) != found.get(key)]
        if differ:
            changes = ", ".join(f"{key} ({found.get(key)}, now {record.get(key)})" for key in differ)
            raise ValueError(f"{out}: holds another dataset, it differs in {changes}")
        return True
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file, expected a folder to write")
    out.mkdir(parents=True, exist_ok=True)
    left = sorted(out.iterdir())
    ours = (CARD, CODEC_FILE)
    foreign = [p.name for p in left if p.name.removesuffix(".tmp") not in ours and not p.name.startswith("shard-")]
    if foreign:
        raise ValueError(f"{out}: not empty and no dataset (it holds {foreign[0]}); choose another folder")
    if left:
        print(f"{out}: an interrupted run left {len(left)} files; starting again", file=sys.stderr)
        for path in left:
            path.unlink()
    return False


def encode_rows(
    rows: list[Row], codec: Codec | None, text: TextEncoder, settings: EncodeSettings, writer: ShardWriter, tally: Tally
) -> None:
    """Encodes and writes the whole clips of every video, in order.

    `codec` is None when there was no clip to fit it on. Then nothing is written, and `tally` gets the reasons.
    """
    bar = tqdm(rows, desc="encode", unit="video")
    for row in bar:
        embedding = text.encode([row.caption])[0]
        clips = filled = 0
        clip = np.empty((settings.frames, *settings.size, 3), np.uint8)
        problem: tuple[str, str] | None = None
        try:
            for frame in read_frames(row.path, settings.fps, settings.size, row.start, row.end):
                clip[filled] = frame
                filled += 1
                if filled == settings.frames:
                    assert codec is not None
                    meta = clip_meta(row, clips, codec, settings)
                    writer.add(f"{row.index:06d}_{clips:04d}", codec.encode(clip), embedding, meta)
                    clips, filled = clips + 1, 0
                    bar.set_postfix(samples=tally.samples + clips, refresh=False)
        except VideoError as error:
            problem = error.reason, error.detail
        if problem is None and clips == 0:
            problem = "too short", f"{filled} of {settings.frames} frames"
        if problem:
            tally.skip(row, *problem, clips)
        tally.samples += clips
        tally.dropped_seconds += filled / settings.fps


def clip_meta(row: Row, number: int, codec: Codec, settings: EncodeSettings) -> dict:
    """The JSON of clip `number` of a video."""
    fps, frames = settings.whole_fps, settings.frames
    start = row.start + number * frames / fps
    return {
        "caption": row.caption,
        "source": row.source,
        "start": start,
        "end": start + frames / fps,
        "fps": fps,
        "height": settings.size[0],
        "width": settings.size[1],
        "frames": frames,
        "codec": codec.hash,
    }


# ---- the built-in codec's fit


def fit_codec(rows: list[Row], settings: EncodeSettings) -> DefaultCodec | None:
    """Fits the built-in codec to the source. None if there is no clip to fit it on."""
    began = time.monotonic()
    clips = iter(tqdm(fitting_clips(rows, settings), desc="fit codec", unit="clip", leave=False))
    first = next(clips, None)
    if first is None:
        return None
    codec = DefaultCodec.fit(itertools.chain([first], clips), FIT_SEED)
    seconds = time.monotonic() - began
    print(f"fitted the default codec on {codec.settings['clips']} clips in {seconds:.1f} s", file=sys.stderr)
    return codec


def fitting_clips(rows: list[Row], settings: EncodeSettings) -> Iterator[np.ndarray]:
    """Yields up to FIT_CLIPS clips, uint8 [T, H, W, 3], from random places all over the source, for the codec's fit.

    Clips of large pictures have at most FIT_FRAMES frames. Videos that cannot be read are skipped: encoding reports
    them.
    """
    rng = np.random.default_rng(FIT_SEED)
    small = settings.size[0] * settings.size[1] <= FIT_SIDE**2
    length = settings.frames if small else min(settings.frames, FIT_FRAMES)
    seconds = length / settings.fps
    order, found, turn = [rows[i] for i in rng.permutation(len(rows))], 0, 0
    while order and found < FIT_CLIPS:
        again = []
        for row in order:
            if found == FIT_CLIPS:
                break
            end = row.end or declared_seconds(row.path) or 0.0
            room = max(0.0, end - row.start - seconds)
            for start in (row.start + rng.uniform(0, room), row.start):  # the video may end early
                clip = first_pictures(row, start, length, settings)
                if len(clip) == length:
                    break
            if len(clip) == length:
                found += 1
                yield np.stack(clip)
                if (turn + 1) * seconds < room:  # a longer video may be used again
                    again.append(row)
        order, turn = again, turn + 1


def first_pictures(row: Row, start: float, count: int, settings: EncodeSettings) -> list[np.ndarray]:
    """Up to `count` frames of a video, from `start` seconds on; none if the video cannot be read."""
    try:
        return list(itertools.islice(read_frames(row.path, settings.fps, settings.size, start, row.end), count))
    except VideoError:
        return []


def main(arguments: list[str] | None = None) -> int:
    description = "Makes a dataset of latents and text embeddings from videos."
    parser = argparse.ArgumentParser(prog="data_prep.encode", description=description)
    parser.add_argument("src", help="folder of videos with .txt captions, or a .jsonl or .csv manifest")
    parser.add_argument("out", help="folder to write the dataset to")
    parser.add_argument("--fps", type=float, default=16)
    parser.add_argument("--size", default="480x832", help="HEIGHTxWIDTH, multiples of 16 (default 480x832)")
    parser.add_argument("--frames", type=int, default=81, help="frames per clip, 1 + 4k (default 81)")
    parser.add_argument("--codec", default="default", help="default, default:FOLDER or wan:FOLDER")
    parser.add_argument("--text", default="default", help="default or umt5:FOLDER")
    parser.add_argument("--samples-per-shard", type=int, default=256)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="for wan and umt5")
    options = parser.parse_args(arguments)
    return run_command(lambda: encode_as_asked(options))


def encode_as_asked(options: argparse.Namespace) -> None:
    """What the command line asks for. Prints a line on what was made."""
    cuda = torch.cuda.is_available()
    if options.device == "cuda" and not cuda:
        raise ValueError("--device cuda: no usable GPU here")
    device = ("cuda" if cuda else "cpu") if options.device == "auto" else options.device
    size, shard = parse_size(options.size), options.samples_per_shard
    settings = EncodeSettings(options.fps, size, options.frames, options.codec, options.text, shard, device)
    counts = encode(options.src, options.out, settings)["counts"]
    skipped = ", ".join(f"{n} {reason}" for reason, n in counts["skipped"].items()) or "none"
    made = f"{counts['samples']} samples in {counts['shards']} shards from {counts['videos']} videos"
    print(f"{options.out}: {made}; skipped: {skipped}; {counts['dropped_seconds']:.1f} s of remainders dropped")


if __name__ == "__main__":
    sys.exit(main())
