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
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from data_prep.batching import Tally, batch_that_fits
from data_prep.buckets import mixture, parse_buckets, size_name
from data_prep.card import CARD, read_card
from data_prep.codecs import Codec, open_codec
from data_prep.command import GOES_ON, Help, counted, run_command
from data_prep.cuts import THRESHOLD
from data_prep.default_codec import CODEC_FILE, DefaultCodec
from data_prep.encode_parts import NoClip, encode_parts, finish
from data_prep.encode_settings import EncodeSettings, codec_record
from data_prep.files import has_size, locked, write_json
from data_prep.fitting import fit_codec
from data_prep.geometry import parse_size
from data_prep.rows import Row
from data_prep.sources import list_source
from data_prep.survey import survey
from data_prep.text import TextEncoder, open_text
from data_prep.work import (
    LOCK,
    WORK,
    Work,
    check_same_work,
    clear,
    discard,
    parse_job,
    read_work,
    refuse_foreign,
    remove_leftovers,
    stands_already,
)


def encode(
    src: str | Path, out: str | Path, settings: EncodeSettings, job: tuple[int, int] = (0, 1), retry: bool = False
) -> dict[str, dict] | None:
    """Makes the dataset `out` from `src`, or job `job` = (i, n) of it; see the module's docstring.

    `retry`: what failed in this job's parts is tried again. Returns the card of every dataset that it made or found,
    by folder: one, or one per bucket that has clips. None if parts of other jobs are missing. Raises a one-line
    ValueError if nothing can be made.
    """
    out = Path(out)
    codec = None if settings.codec == "default" else open_codec(settings.codec, settings.device, settings.precision)
    settings.validate(codec.geometry if codec else DefaultCodec.geometry)
    text = open_text(settings.text, settings.device)
    refuse_foreign(out)
    rows = list_source(src, out)
    record = settings.record(codec, text, rows)
    card = None if settings.buckets else card_of(out, record, retry)
    if card:
        return {str(out): card}
    if settings.buckets:
        stands_already(out, record, retry)
    try:
        with begun(out, record, retry, None if settings.buckets else lambda: batch_that_fits(codec, settings)) as kept:
            rows = survey(out, rows, settings.buckets, settings.drop_duplicates, settings.workers, retry)
            codec = kept_codec(out, codec, rows, settings, src)
        bare = sum(not row.caption for row in rows)
        if bare:
            have = "has no caption; it gets" if bare == 1 else "have no caption; they get"
            print(f"{bare} of {counted(len(rows), 'video')} {have} the empty one", file=sys.stderr)
        if settings.buckets:
            return encode_buckets(src, out, rows, record, codec, text, settings, job, retry)
        work = Work(out, rows, settings.videos_per_part)
        settings = replace(settings, batch=kept.get("batch", 1))
        card = encode_work(work, kept, codec, text, settings, src, job, retry, Tally(videos_of(work, job)))
    except NoClip:
        clear(out)
        raise
    return card and {str(out): card}


def encode_buckets(
    src: str | Path,
    out: Path,
    rows: list[Row],
    record: dict,
    codec: Codec,
    text: TextEncoder,
    settings: EncodeSettings,
    job: tuple[int, int],
    retry: bool,
) -> dict[str, dict] | None:
    """Makes a dataset in `out` for each bucket that has videos, as `encode` does for one. Raises NoClip if all fail."""
    cards: dict[str, dict] = {}
    missing, problem = False, None
    tally = Tally(videos_of(Work(out, rows, settings.videos_per_part), job))
    for bucket in settings.buckets:
        own = replace(settings, size=bucket)
        folder, members = out / size_name(bucket), [row for row in rows if row.size == bucket]
        if not members:
            discard(folder)  # it may have had some, before files were replaced and tried again
            print(f"{folder}: no video has this shape")
            continue
        own_record = {**record, "codec": codec_record(codec), "height": bucket[0], "width": bucket[1]}
        card = card_of(folder, own_record, retry)
        if card is None:
            with begun(folder, own_record, retry, partial(batch_that_fits, codec, own)) as kept:
                kept_codec(folder, codec, members, own, src)
            own = replace(own, batch=kept.get("batch", 1))
            work = Work(folder, members, settings.videos_per_part, len(rows))
            try:
                card = encode_work(work, kept, codec, text, own, src, job, retry, tally)
            except NoClip as error:
                problem = NoClip(f"{folder}: {error}")
                print(problem, file=sys.stderr)
                continue
        missing |= card is None
        if card:
            cards[str(folder)] = card
    if problem and not cards and not missing:
        for bucket in settings.buckets:
            discard(out / size_name(bucket))
        raise problem
    remove_leftovers(out)
    return None if missing else cards


def card_of(out: Path, record: dict, retry: bool) -> dict | None:
    """The card of the dataset with this record, if `out` holds it, whole, and nothing is to be tried again.

    Raises ValueError if `out` holds anything else.
    """
    if not stands_already(out, record, retry) or retry:
        return None
    card = read_card(out)
    lost = sum(not has_size(out / shard["file"], shard["bytes"]) for shard in card["shards"])
    if not lost:
        print(f"{out}: the dataset exists already, nothing to do")
        return card
    are = "is missing or cut short, it is" if lost == 1 else "are missing or cut short, they are"
    print(f"{out}: {counted(lost, 'shard')} {are} made again", file=sys.stderr)
    return None


@contextlib.contextmanager
def begun(out: Path, record: dict, retry: bool, choose: Callable[[], int] | None = None) -> Iterator[dict]:
    """Writes what is made into the folder, or checks that it is the same. Inside, other jobs on the folder wait.

    Gives the record that is kept there: if it asks for batches of a size that fits, with the one that the first job
    chooses; without `choose` there are none. Raises ValueError if the folder holds other work.
    """
    with locked(out / LOCK, lambda: print(f"{out}: waiting for the job that starts this dataset", file=sys.stderr)):
        begins, batch = not (out / WORK).exists(), record.get("batch", 1)
        if not begins:
            check_same_work(out, record, retry)
        if batch == 0:
            found = (
                read_work(out)
                if not begins
                else read_card(out)["source"]["settings"]
                if (out / CARD).exists()
                else None
            )
            batch = found.get("batch", 1) if found is not None else choose() if choose else 1
        kept = {key: value for key, value in record.items() if key != "batch"} | ({"batch": batch} if batch > 1 else {})
        if retry or begins:
            write_json(out / WORK, kept)
        yield kept


def kept_codec(out: Path, codec: Codec | None, rows: list[Row], settings: EncodeSettings, src: str | Path) -> Codec:
    """The codec of a dataset. The built-in one is written into its folder; None: it is fitted, once for all jobs."""
    path = out / CODEC_FILE
    if codec is None:
        if path.is_file():
            return DefaultCodec.load(path)
        codec = fit_codec(rows, settings, src)
    if isinstance(codec, DefaultCodec) and not holds(path, codec):
        codec.save(path)
    return codec


def holds(path: Path, codec: DefaultCodec) -> bool:
    """Whether a file holds this codec, undamaged."""
    try:
        return DefaultCodec.load(path).hash == codec.hash
    except ValueError:
        return False


def parts_of(work: Work, job: tuple[int, int]) -> range:
    """The parts that a job makes."""
    return range(job[0], work.parts, job[1])


def videos_of(work: Work, job: tuple[int, int]) -> int:
    """How many videos a job makes."""
    return sum(len(work.rows_of(part)) for part in parts_of(work, job))


def encode_work(
    work: Work,
    record: dict,
    codec: Codec,
    text: TextEncoder,
    settings: EncodeSettings,
    src: str | Path,
    job: tuple[int, int],
    retry: bool,
    tally: Tally,
) -> dict | None:
    """Makes a job's parts of one dataset. Returns the card; None if parts of other jobs are missing."""
    if retry and not work.forget_failures(parts_of(work, job)):
        print(f"{work.folder}: nothing failed in the parts that are done", file=sys.stderr)
    encode_parts(work, parts_of(work, job), codec, text, settings, tally)
    return finish(work, codec, text, settings, record, src)


def main(arguments: list[str] | None = None) -> int:
    description = "Makes a dataset of latents and text embeddings from videos."
    parser = argparse.ArgumentParser(prog="data_prep.encode", formatter_class=Help, description=description)
    parser.add_argument(
        "src", help="folder of videos with .txt captions, manifest (.jsonl, .csv, .parquet), or .tar files"
    )
    parser.add_argument("out", help="folder to write the dataset to")
    parser.add_argument("--fps", type=float, default=16, help="frames per second of all clips")
    parser.add_argument("--size", help="HEIGHTxWIDTH, multiples of 16, or 32 for Wan 2.2 (default: 480x832)")
    parser.add_argument("--buckets", metavar="SIZE,SIZE,...", help="a dataset for each size; each video goes to one")
    parser.add_argument("--drop-duplicates", action="store_true", help="of videos with the same bytes keep the first")
    parser.add_argument("--frames", type=int, default=81, help="frames per clip, 1 + 4k")
    parser.add_argument("--stride", type=int, default=0, help="a clip begins every so many frames (default: --frames)")
    parser.add_argument(
        "--cuts",
        type=float,
        nargs="?",
        const=THRESHOLD,
        default=0.0,
        metavar="THRESHOLD",
        help=f"no clip goes over a scene cut: a change of at least THRESHOLD of 255 (default: {THRESHOLD:g})",
    )
    parser.add_argument("--codec", default="default", help="default, default:FOLDER or wan:FOLDER")
    parser.add_argument("--text", default="default", help="default or umt5:FOLDER")
    parser.add_argument("--samples-per-shard", type=int, default=256, help="at most")
    parser.add_argument("--videos-per-part", type=int, default=64, help="consecutive videos that one job makes")
    parser.add_argument("--job", default="0/1", metavar="I/N", help="make part I, I + N, ... only (default: 0/1, all)")
    parser.add_argument("--workers", type=int, default=default_workers(), help="processes that decode")
    parser.add_argument("--batch", type=int, help="clips encoded at once (default: what fits on a GPU; 1 on a CPU)")
    parser.add_argument("--max-failures", type=float, default=1.0, help="share of the job's videos")
    parser.add_argument("--retry", action="store_true", help="try again what failed")
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32"), help="of the Wan VAE")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="for wan and umt5")
    options = parser.parse_args(arguments)
    return run_command(lambda: encode_as_asked(options), GOES_ON)


def encode_as_asked(options: argparse.Namespace) -> None:
    """What the command line asks for. Prints a line on what was made."""
    cuda = torch.cuda.is_available()
    if options.device == "cuda" and not cuda:
        raise ValueError("--device cuda: no usable GPU here")
    device = ("cuda" if cuda else "cpu") if options.device == "auto" else options.device
    if options.size and options.buckets:
        raise ValueError("--size and --buckets: give one of them; a bucket is a size")
    if options.batch is not None and options.batch < 1:
        raise ValueError(f"batch {options.batch}: must be at least 1")
    buckets = parse_buckets(options.buckets) if options.buckets else ()
    settings = EncodeSettings(
        fps=options.fps,
        size=buckets[0] if buckets else parse_size(options.size or "480x832"),
        frames=options.frames,
        codec=options.codec,
        text=options.text,
        samples_per_shard=options.samples_per_shard,
        videos_per_part=options.videos_per_part,
        precision=options.precision,
        stride=options.stride,
        buckets=buckets,
        cuts=options.cuts,
        drop_duplicates=options.drop_duplicates,
        batch=options.batch or 0,
        device=device,
        workers=options.workers,
        max_failures=options.max_failures,
    )
    cards = encode(options.src, options.out, settings, parse_job(options.job), options.retry)
    for folder, card in (cards or {}).items():
        print(f"{folder}: {what_was_made(card)}")
    if cards and buckets:
        samples = {folder: card["counts"]["samples"] for folder, card in cards.items()}
        print(f"To train on all buckets, put this into the recipe:\n\n{mixture(samples)}")


def what_was_made(card: dict) -> str:
    """The counts of a dataset, in words."""
    counts = card["counts"]
    skipped = ", ".join(f"{n} {reason}" for reason, n in counts["skipped"].items()) or "none"
    samples, shards, videos = (counted(counts[f"{name}s"], name) for name in ("sample", "shard", "video"))
    made = f"{samples} in {shards} from {videos}"
    return f"{made}; skipped: {skipped}; {counts['dropped_seconds']:.1f} s of remainders dropped"


def default_workers() -> int:
    """Decoding processes: as many as cores are left beside the encoder, at most 8."""
    return max(1, min(8, len(os.sched_getaffinity(0)) - 1))


if __name__ == "__main__":
    sys.exit(main())
