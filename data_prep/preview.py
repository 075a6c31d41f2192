"""A page of decoded clips, to look at a dataset before training on it.

    python -m data_prep.preview DATASET --out FOLDER --clips 24 --seed 0 --source VIDEOS

    FOLDER/index.html         the page: videos with caption, source, span of time
    FOLDER/VIDEO_CLIP.mp4     the videos; with --source the original is to the left of what the codec makes of it

The clips are spread over the dataset. They are decoded by the dataset's own codec.
"""

import argparse
import html
import itertools
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from data_prep.card import check_sample, read_card
from data_prep.codecs import Codec, dataset_codec
from data_prep.command import Help, one_line, printable, run_command
from data_prep.files import write_atomic
from data_prep.index import SampleIndex
from data_prep.pages import html_page
from data_prep.places import local_folder
from data_prep.rows import Row
from data_prep.shards import Sample, SampleError, caption_of, read_sample, span_of
from data_prep.sources import list_source
from data_prep.tars import opened_here
from data_prep.video import read_frames, write_video

Videos = dict[str, Row]  # of a source, by the name that samples have of them
PAGE = "index.html"
GENERATOR = '<meta name="generator" content="data_prep.preview">'
CRF = 20  # of the videos: what H.264 changes is far below what the codec does

STYLE = """
body { max-width: 1500px; }
.clips { gap: 1.4rem 1rem; }
.clips figcaption { overflow-wrap: anywhere; line-height: 1.35; padding-top: .2rem; }
.problem { color: #b42318; }
"""


class Preview(NamedTuple):
    """A clip on the page: its name, its sample if that could be read, its video, and remarks.

    `video`: the name of its file; "" without one. `problem`: what went wrong, "" if nothing did.
    """

    key: str
    sample: Sample | None
    video: str
    psnr: float | None
    problem: str


def choose(total: int, clips: int, seed: int, first: bool = False) -> list[int]:
    """Numbers of `clips` of `total` samples: one at random from each of as many equal parts; or the first ones."""
    clips = min(total, clips)
    if first or clips == total:
        return list(range(clips))
    rng = np.random.default_rng(seed)
    return [int(rng.integers(n * total // clips, (n + 1) * total // clips)) for n in range(clips)]


def preview(
    dataset: str | Path,
    out: str | Path,
    clips: int = 24,
    seed: int = 0,
    first: bool = False,
    source: str | Path | None = None,
    device: str = "cpu",
) -> list[Preview]:
    """Decodes clips of a dataset into the folder `out`, and writes the page. Returns what stands on it, in order.

    A clip that can't be read, or whose original can't, is named on the page. Raises ValueError if nothing can be shown.
    """
    dataset, out = Path(dataset), Path(out)
    if clips < 1:
        raise ValueError(f"--clips {clips}: must be at least 1")
    card = read_card(dataset)
    if source is not None and "merged" in card["source"]["settings"]:
        raise ValueError(f"{dataset}: is merged, its videos come from several sources; leave out --source")
    videos = None if source is None else {row.source: row for row in list_source(source)}
    index, codec = SampleIndex(dataset, card), dataset_codec(dataset, device)
    begin_folder(out)
    shown = []
    for number in tqdm(choose(len(index), clips, seed, first), "preview", unit="clip", leave=False, disable=None):
        file, entry = index[number]
        try:
            sample = read_sample(dataset / file, entry)
            check_sample(card, f"{dataset / file}: {entry.key}", sample)
        except SampleError as error:
            shown.append(Preview(entry.key, None, "", None, one_line(error)))
        else:
            shown.append(decode(entry.key, sample, card, codec, out, videos))
        if shown[-1].problem:
            tqdm.write(printable(shown[-1].problem), file=sys.stderr)
    write_atomic(out / PAGE, page(dataset, card, shown, videos is not None).encode(errors="replace"))
    return shown


def begin_folder(out: Path) -> None:
    """Makes the folder with an empty page, or takes an earlier preview out. Raises ValueError if it holds others."""
    out.mkdir(parents=True, exist_ok=True)
    names = sorted(os.listdir(out))
    ours = [name for name in names if re.fullmatch(r"\d+_\d+\.mp4|\.\d+_\d+\.mp4\..*tmp", name)]
    foreign = [name for name in names if name not in (*ours, PAGE)]
    if foreign or (names and (PAGE not in names or GENERATOR not in (out / PAGE).read_text(errors="replace"))):
        raise ValueError(f"{out}: holds something else than a preview ({(foreign or names)[0]}); choose another folder")
    write_atomic(out / PAGE, f"{GENERATOR}<p>This preview is not finished.</p>")
    for name in ours:
        (out / name).unlink()


def decode(key: str, sample: Sample, card: dict, codec: Codec, out: Path, videos: Videos | None) -> Preview:
    """Writes the video of a sample; to the left the original, if it is one of `videos`."""
    frames, psnr, problem = codec.decode(sample.latent.astype(np.float32)), None, ""
    if videos is not None:
        try:
            original = read_original(sample, card, videos)
            psnr = psnr_of(frames, original)
        except (ValueError, OSError) as error:
            original, problem = np.zeros_like(frames), one_line(error)
        line = np.full((*frames.shape[:2], 2 * max(1, frames.shape[2] // 200), 3), 255, np.uint8)  # a white one between
        frames = np.concatenate([original, line, frames], axis=2)
    name = f"{key}.mp4"
    write_video(out / name, frames, card["video"]["fps"], crf=CRF)
    return Preview(key, sample, name, psnr, problem)


def read_original(sample: Sample, card: dict, videos: Videos) -> np.ndarray:
    """The frames that a sample was made of, uint8 [T, H, W, 3]. Raises ValueError if they aren't there any more.

    The sample says which of `videos` it was. Nothing else is opened.
    """
    source, start, video = sample.meta.get("source"), sample.meta.get("start"), card["video"]
    if not isinstance(source, str) or not isinstance(start, (int, float)) or not 0 <= start < 1e9:
        raise ValueError("the sample does not say what it was made of")
    row = videos.get(source)
    if row is None:
        raise ValueError(f"{source}: not one of the videos of --source")
    with opened_here(row.video) as here:
        frames = read_frames(here, video["fps"], (video["height"], video["width"]), start)
        found = list(itertools.islice(frames, video["frames"]))
    if len(found) < video["frames"]:
        raise ValueError(f"{source}: {len(found)} frames from {start:.2f} s on, the clip has {video['frames']}")
    return np.stack(found)


def psnr_of(made: np.ndarray, true: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two videos, uint8, over all frames; at most 100."""
    total = 0.0
    for one, other in zip(made, true):
        total += float(np.square(one.astype(np.float32) - other.astype(np.float32)).mean(dtype=np.float64))
    return float(10 * np.log10(255**2 / max(total / len(true), 255**2 * 1e-10)))


# ---- the page


def page(dataset: Path, card: dict, shown: list[Preview], beside: bool) -> str:
    """The page. `beside`: originals were asked for."""
    name = os.fsencode(dataset.resolve().name).decode(errors="replace")
    video, counts = card["video"], card["counts"]
    size = f"{video['height']}x{video['width']}, {video['frames']} frames at {video['fps']} fps"
    found = [clip.psnr for clip in shown if clip.psnr is not None]
    about = f"{len(shown)} of {counts['samples']:,} clips of {size}, decoded by the codec {card['codec']['name']}."
    if beside:
        about += " Left: the original. Right: what the codec makes of it."
    if found:
        about += f" PSNR of the codec: {np.mean(found):.1f} dB on average, from {min(found):.1f} to {max(found):.1f}."
    # Small pictures stand closer together.
    columns = video["width"] * (2 if beside else 1)
    width = 180 if columns <= 96 else 260 if columns <= 256 else 340 if columns <= 1000 else 460
    style = f"grid-template-columns: repeat(auto-fill, minmax({width}px, 1fr))"
    cells = "".join(figure(clip) for clip in shown)
    body = f'<h1>{html.escape(name)}</h1><p class="note">{html.escape(about)}</p>'
    document = html_page(f"Preview of {name}", f'{body}<div class="clips" style="{style}">{cells}</div>', STYLE)
    return document.replace("<head>", f"<head>{GENERATOR}", 1)


def figure(clip: Preview) -> str:
    """A clip with what is known about it. All text is escaped."""
    lines = []
    if clip.sample is not None:
        caption = caption_of(clip.sample)
        lines.append(html.escape(caption) if caption else '<span class="note">no caption</span>')
        about = [str(clip.sample.meta.get("source", "")), span_of(clip.sample), clip.key]
        if clip.psnr is not None:
            about.append(f"{clip.psnr:.1f} dB")
        lines.append(f'<span class="note">{html.escape(", ".join(part for part in about if part))}</span>')
    if clip.problem:
        lines.append(f'<span class="problem">{html.escape(printable(clip.problem))}</span>')
    # A browser plays muted videos by itself, and only those in sight.
    video = f'<video controls loop muted autoplay playsinline src="{clip.video}"></video>' if clip.video else ""
    return f"<figure>{video}<figcaption>{'<br>'.join(lines)}</figcaption></figure>"


def main(arguments: list[str] | None = None) -> int:
    description = "A page of decoded clips, to look at a dataset before training on it. The dataset is only read."
    parser = argparse.ArgumentParser(prog="data_prep.preview", formatter_class=Help, description=description)
    parser.add_argument("dataset")
    parser.add_argument("--out", metavar="FOLDER", help="folder for page and videos (default: NAME-preview, here)")
    parser.add_argument("--clips", type=int, default=24, help="how many, spread over the dataset")
    parser.add_argument("--seed", type=int, default=0, help="chooses which")
    parser.add_argument("--first", action="store_true", help="the first ones instead")
    parser.add_argument("--source", metavar="VIDEOS", help="what was encoded: shows the originals beside")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="for the codec wan")
    options = parser.parse_args(arguments)
    return run_command(lambda: preview_as_asked(options))


def preview_as_asked(options: argparse.Namespace) -> None:
    """What the command line asks for. Prints a line on what was made."""
    cuda = torch.cuda.is_available()
    if options.device == "cuda" and not cuda:
        raise ValueError("--device cuda: no usable GPU here")
    device = ("cuda" if cuda else "cpu") if options.device == "auto" else options.device
    dataset = local_folder(options.dataset, "data_prep.preview")
    out = Path(options.out or f"{dataset.resolve().name}-preview")
    if options.seed < 0:
        raise ValueError(f"--seed {options.seed}: must be at least 0")
    shown = preview(options.dataset, out, options.clips, options.seed, options.first, options.source, device)
    size = sum(path.stat().st_size for path in out.iterdir()) / 2**20
    found = [clip.psnr for clip in shown if clip.psnr is not None]
    psnr = f", PSNR of the codec {np.mean(found):.1f} dB" if found else ""
    print(f"{out / PAGE}: {len(shown)} clips, {size:.1f} MiB{psnr}")


if __name__ == "__main__":
    sys.exit(main())
