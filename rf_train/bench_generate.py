"""How generation spends its time and memory:  python -m rf_train.bench generate

A model of the demo's size, with random weights, streams videos of 32x32 pixels through the built-in codec into mp4
files. How much of the time are the model's passes? What does guidance in one batch gain? How soon is the first frame
there? And does a long video take more memory than a short one, after a window, and after routing?
"""

import argparse
import contextlib
import io
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch

from data_prep import encode
from data_prep.draw import DrawSettings, draw
from data_prep.video import VideoWriter
from rf_train import config
from rf_train.generation.generator import Generator, make_generator
from rf_train.generation.prompts import Prompts
from rf_train.generation.stream import Videos
from rf_train.model.chunks import RoutedWithin, Window
from rf_train.model.transformer import CausalWan

SECONDS = 5.0  # of the videos whose time is measured
ATTENTIONS = {
    "window": {"kind": "window", "window": 4, "sink": 1},
    "routed": {"kind": "routed", "top_k": 2},
}


def random_generator(folder: Path, attention: dict) -> Generator:
    """The demo's model with random weights, as if trained with `attention`, and a drawn dataset in `folder`."""
    dataset = folder / "data"
    if not dataset.exists():
        draw(folder / "videos", DrawSettings(videos=8, frames=57, size=(32, 32)))
        arguments = [str(folder / "videos"), str(dataset), "--fps", "16", "--size", "32x32", "--frames", "57"]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            if encode.main([*arguments, "--codec", "default", "--text", "default"]):
                raise ValueError(f"{dataset}: data_prep.encode failed")
    plain = config.to_dict(config.load(Path(__file__).parent / "recipes/demo.yaml", [f"data.train={dataset}"]))
    plain["stages"][-1]["attention"] = attention
    recipe = config.from_dict(plain)
    torch.manual_seed(0)
    model = CausalWan(recipe.model)
    torch.nn.init.normal_(model.proj_out.weight, std=0.02)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return make_generator(recipe, model, 0, device)


def a_video(generator: Generator, seconds: float, in_one_batch: bool = False) -> Videos:
    return Videos(generator, [Prompts.of("a red cross")], [0], seconds, guidance_in_one_batch=in_one_batch)


def written(videos: Videos, path: Path) -> Iterator[int]:
    """Writes the first video. Yields the number of frames after each chunk."""
    with VideoWriter(path, videos.fps) as writer:
        for [frames] in videos.chunks():
            writer.write(frames)
            yield writer.frames


@contextlib.contextmanager
def forward_seconds(generator: Generator) -> Iterator[list[float]]:
    """Collects the seconds of each pass of the model meanwhile."""
    found: list[float] = []
    on_gpu = generator.device.type == "cuda"

    def clock(*_: object) -> None:
        if on_gpu:
            torch.cuda.synchronize()
        found.append(time.perf_counter() * (-1 if len(found) % 2 == 0 else 1))

    hooks = [generator.model.register_forward_pre_hook(clock), generator.model.register_forward_hook(clock)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def resident_bytes() -> int:
    """The memory of this process that is in use now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def times(generator: Generator, folder: Path, rounds: int) -> dict[str, float]:
    """The figures of time, medians over `rounds`."""
    guided = replace(generator, recipe=replace(generator.recipe, flow=replace(generator.recipe.flow, guidance=3.0)))
    shares, firsts, ratios = [], [], []
    for turn in range(rounds + 1):
        begin = time.perf_counter()
        with forward_seconds(generator) as passes:
            progress = written(a_video(generator, SECONDS), folder / "time.mp4")
            next(progress)
            first = time.perf_counter() - begin
            for _ in progress:
                pass
        whole, seconds = time.perf_counter() - begin, []
        for in_one_batch in (False, True):
            begin = time.perf_counter()
            for _ in written(a_video(guided, SECONDS, in_one_batch), folder / "guided.mp4"):
                pass
            seconds.append(time.perf_counter() - begin)
        if turn:  # the first turn warms up
            shares.append(sum(passes) / whole)
            firsts.append(first)
            ratios.append(seconds[0] / seconds[1])
    return {
        "share_of_forward": median(shares),
        "batched_guidance_speedup": median(ratios),
        "first_frame_seconds": median(firsts),
    }


def memory_by_chunk(generator: Generator, frames: int, path: Path) -> list[tuple[int, int]]:
    """(frames so far, bytes of this process) after each chunk of one video, one solver step per chunk."""
    quick = replace(generator, recipe=replace(generator.recipe, flow=replace(generator.recipe.flow, sampling_steps=1)))
    return [(made, resident_bytes()) for made in written(a_video(quick, frames / quick.fps), path)]


def bench_generate(options: argparse.Namespace) -> tuple[list[str], dict]:
    """Measures time, then the memory of `options.video_frames` frames against that of a tenth of them."""
    frames, growths, lines = options.video_frames, {}, []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, attention in ATTENTIONS.items():
            generator = random_generator(folder, attention)
            assert isinstance(generator.attention, (Window, RoutedWithin))
            if kind == "window":
                found = times(generator, folder, options.rounds)
            rows = np.array(memory_by_chunk(generator, frames, folder / "long.mp4"))
            # The most in the tenth before each of the two points: a single moment says little.
            before = rows[(rows[:, 0] > frames // 20) & (rows[:, 0] <= frames // 10), 1].max()
            growths[kind] = float(rows[rows[:, 0] > frames * 9 // 10, 1].max() / before)
            lines.append(f"memory of {frames} frames, {kind} ({generator.attention}):")
            for made, count in rows[:: max(1, len(rows) // 20)]:
                lines.append(f"  {made:7d} frames  {count / 2**20:8.1f} MiB")
            lines.append(f"  grows by {growths[kind]:.4f} from {frames // 10} to {frames} frames")
    lines.append(
        f"the model's passes take {found['share_of_forward']:.2f} of the time; the first frames are there after "
        f"{found['first_frame_seconds']:.3f} s; guidance in one batch is {found['batched_guidance_speedup']:.2f} x "
        "as fast as in two passes"
    )
    growth = {"memory_growth_1000_to_10000": max(growths.values()), "memory_growth": growths}
    return lines, {"bench": "generate", "device": str(generator.device), "frames": frames, **found, **growth}
