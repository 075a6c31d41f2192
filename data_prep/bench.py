"""How much of its time encoding spends in the codec:  python -m data_prep.bench

Encodes drawn videos, and the same clips from memory by the codec alone, in turn. Prints a table for people and, as its
last line, one JSON object. `rate_over_codec`: clips per second of the whole command over those of the codec alone. The
codec is Wan's VAE: that of `--codec wan:FOLDER`, or a small one with random weights.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np

from data_prep.batching import Tally, batch_that_fits
from data_prep.codecs import Codec, open_codec
from data_prep.command import Help, run_command
from data_prep.draw import DrawSettings, draw
from data_prep.encode import default_workers
from data_prep.encode_parts import encode_parts
from data_prep.encode_settings import EncodeSettings
from data_prep.geometry import parse_size
from data_prep.sources import list_source
from data_prep.text import open_text
from data_prep.video import read_frames
from data_prep.work import Work

FPS = 16


def bench(options: argparse.Namespace) -> None:
    """What the command line asks for."""
    size = parse_size(options.size)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        spec = options.codec or f"wan:{random_vae(folder / 'vae')}"
        codec, text = open_codec(spec, options.device), open_text("default")
        settings = EncodeSettings(FPS, size, options.frames, spec, device=options.device, workers=options.workers)
        settings.validate(codec.geometry)
        settings = replace(settings, batch=options.batch or batch_that_fits(codec, settings))
        draw(folder / "videos", DrawSettings(options.videos, options.frames * options.clips, size, FPS))
        rows = list_source(folder / "videos")
        frames = np.stack(list(read_frames(rows[0].video, FPS, size))).reshape(options.clips, -1, *size, 3)
        seconds: dict[str, list[float]] = {"codec": [], "command": []}
        for turn in range(options.rounds + 1):
            work = Work(folder / f"data{turn}", rows, settings.videos_per_part)
            work.folder.mkdir()
            begin = time.perf_counter()
            encode_parts(work, range(work.parts), codec, text, settings, Tally(options.videos))
            middle = time.perf_counter()
            encode_alone(codec, frames, options.videos, settings.batch)
            if turn:
                seconds["command"].append(middle - begin)
                seconds["codec"].append(time.perf_counter() - middle)
    clips = options.videos * options.clips
    rate = {name: clips / median(values) for name, values in seconds.items()}
    ratio = rate["command"] / rate["codec"]
    what = f"{clips} clips of {options.frames} frames of {options.size}"
    print(f"{what}, {settings.batch} at once, {options.workers} decoding processes")
    print(f"  the codec alone, from memory  {rate['codec']:8.2f} clips/s")
    print(f"  the command, from mp4 files   {rate['command']:8.2f} clips/s, {ratio:.2f} x as many")
    figures = {"bench": "encode", "device": options.device, "workers": options.workers, "batch": settings.batch}
    print(json.dumps({**figures, "rate_over_codec": ratio, "clips_per_s": rate["command"]}))


def encode_alone(codec: Codec, clips: np.ndarray, times: int, batch: int) -> None:
    """Encodes clips, uint8 [N, T, H, W, 3], so many times, in batches."""
    numbers = np.arange(times * len(clips)) % len(clips)
    for begin in range(0, len(numbers), batch):
        codec.encode_batch(clips[numbers[begin : begin + batch]])


def random_vae(folder: Path) -> Path:
    """A small VAE of Wan's architecture with random weights, as diffusers saves it."""
    from diffusers import AutoencoderKLWan

    AutoencoderKLWan(base_dim=16, num_res_blocks=1).save_pretrained(folder / "vae")
    return folder


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="data_prep.bench", formatter_class=Help, description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--codec", help="wan:FOLDER or default:DATASET (default: a small random Wan VAE)")
    parser.add_argument("--size", default="64x64", help="HEIGHTxWIDTH in pixels")
    parser.add_argument("--frames", type=int, default=17, help="frames per clip")
    parser.add_argument("--videos", type=int, default=4, help="videos that are encoded")
    parser.add_argument("--clips", type=int, default=4, help="clips per video")
    parser.add_argument("--rounds", type=int, default=3, help="times that each is measured")
    parser.add_argument("--batch", type=int, help="clips encoded at once (default: what fits on a GPU; 1 on a CPU)")
    parser.add_argument("--workers", type=int, default=default_workers(), help="processes that encode")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where the codec computes")
    options = parser.parse_args(arguments)
    for name in ("videos", "clips", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: must be at least 1")
    if options.batch is not None and options.batch < 1:
        parser.error(f"--batch {options.batch}: must be at least 1")
    return run_command(lambda: bench(options))


if __name__ == "__main__":
    sys.exit(main())
