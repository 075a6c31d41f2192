"""Makes videos with a trained run, of any length:  python -m rf_train.generate RUN OUT.mp4 --prompt TEXT --seconds 15

With --image FILE or --video FILE they begin with an image, or with the first frames of a real video.
"""

import argparse
import sys
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from data_prep.command import require_finite, run_command
from rf_train.generation.generator import Generator, open_run
from rf_train.generation.given import first_frames, still_image
from rf_train.generation.prompts import Prompts
from rf_train.generation.stream import Stream, Videos, write


def generate(options: argparse.Namespace) -> str:
    """Writes the video that the command line asks for. Returns the line that says what was made."""
    check_options(options)
    prompts = Prompts.of(options.prompt)
    generator = open_run(options.run, options.overrides, options.step)
    given = given_chunks(generator, options)
    videos = Videos(generator, [prompts], [options.seed], options.seconds, options.negative, given)
    if given is not None and given.shape[2] >= videos.latent_frames:
        taken = f"the {given.shape[2]} latent frames taken from {options.image or options.video}"
        raise ValueError(f"--seconds {options.seconds} is not longer than {taken}")
    video = Stream(videos)
    print(video.memory.lines(video.plan), flush=True)
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    chunks = tqdm(video, total=video.chunk_count, unit="chunk", desc="generate")
    frames = write(chunks, options.out, video.fps)
    trained = generator.geometry.video_frames(generator.trained_frames) / video.fps
    return f"{options.out}: {frames} frames, {frames / video.fps:.2f} s (trained on clips of {trained:.2f} s)"


def given_chunks(generator: Generator, options: argparse.Namespace) -> Tensor | None:
    """The latents that the video begins with, or None."""
    if options.image:
        return still_image(generator, options.image)
    return first_frames(generator, options.video, options.given_chunks) if options.video else None


def check_options(options: argparse.Namespace) -> None:
    """Raises ValueError for invalid options."""
    if not (options.prompt or options.video or options.image):
        raise ValueError("give --prompt TEXT, --image FILE, --video FILE, or a prompt with one of these files")
    if options.video and options.image:
        raise ValueError("--image and --video: a video begins with one of them")
    require_finite(seconds=options.seconds)
    if options.seconds <= 0:
        raise ValueError(f"--seconds {options.seconds}: must be positive")
    if options.given_chunks < 1:
        raise ValueError(f"--given-chunks {options.given_chunks}: must be at least 1")
    if Path(options.out).suffix != ".mp4":
        raise ValueError(f"{options.out}: the output is an .mp4 file")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="rf_train.generate", description="Makes videos with a trained run.")
    parser.add_argument("run", help="a folder written by rf_train.train")
    parser.add_argument("out", help="the mp4 to write")
    parser.add_argument(
        "--prompt", action="append", default=[],
        help='what the video shows; several like "0: a boat" and "5: a storm" change at these seconds',
    )  # fmt: skip
    parser.add_argument("--negative", default="", help="what guidance leads away from (default: the empty caption)")
    parser.add_argument("--image", help="an image that the video begins with")
    parser.add_argument("--video", help="a video whose first frames are continued")
    parser.add_argument("--given-chunks", type=int, default=2, help="chunks taken from --video (default 2)")
    parser.add_argument("--seconds", type=float, default=15.0, help="length, the given frames included (default 15)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--step", type=int, default=0, help="the checkpoint's step (default: the newest)")
    parser.add_argument(
        "overrides", nargs="*", metavar="a.b=c",
        help="settings, e.g. flow.guidance=3 flow.sampling_steps=50 flow.sampling_shift=5 flow.solver=heun",
    )  # fmt: skip
    options = parser.parse_intermixed_args(arguments)
    return run_command(lambda: print(generate(options)))


if __name__ == "__main__":
    sys.exit(main())
