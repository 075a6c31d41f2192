"""Makes videos with a trained run, of any length:  python -m rf_train.generate RUN OUT.mp4 --prompt TEXT --seconds 15

With --image FILE or --video FILE they begin with an image, or with the first frames of a real video. With --prompts
FILE it makes a folder of videos, alone or on many ranks. With --play it shows a video on a page while it is made.
"""

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data_prep.command import Help, require_finite, run_command
from data_prep.files import sha256_of_file
from rf_train.config import to_dict
from rf_train.engine import checkpoint
from rf_train.engine.collectives import RunError, naming_lost_peers
from rf_train.engine.inference import VideoRanks, start_video_ranks
from rf_train.engine.shared_work import ranks_here, this_rank
from rf_train.generation.generator import Generator, open_run
from rf_train.generation.given import first_frames, still_image
from rf_train.generation.many import make_batches, open_job
from rf_train.generation.memory import memory_needed
from rf_train.generation.play import Player
from rf_train.generation.prompts import Prompts, check_text, read_prompts
from rf_train.generation.stream import ENDLESS, Stream, Videos, write
from rf_train.model.chunks import POSITIONS

GIVEN_CHUNKS, PORT = 2, 8000  # if nothing else is asked for


def generate(options: argparse.Namespace) -> str:
    """Does what the command line asks for. Returns the line that says what was made."""
    check_options(options)
    if options.sequence_parallel == 1 and not options.split_weights:
        if not options.prompts and this_rank()[1] > 1:
            raise ValueError(f"{this_rank()[1]} ranks would make the same video: give --sequence-parallel or --prompts")
        return (make_many if options.prompts else make_one)(options, None)
    together = start_video_ranks(options.sequence_parallel)
    try:
        if together.groups > 1 and not options.prompts:
            size, ranks = options.sequence_parallel, together.ranks.world_size
            raise ValueError(f"--sequence-parallel {size}: one video, {ranks} ranks; give --sequence-parallel {ranks}")
        with naming_lost_peers():
            said = (make_many if options.prompts else make_one)(options, together)
            together.end()
    except RunError as error:
        raise ValueError(str(error)) from None
    return said


def make_one(options: argparse.Namespace, together: VideoRanks | None) -> str:
    """Makes one video, or shows it."""
    prompts = Prompts.of(options.prompt)
    generator = opened(options, together, None)
    given = generator.tell(lambda: given_chunks(generator, options))
    seconds = ENDLESS if options.play else options.seconds
    videos = Videos(generator, [prompts], [options.seed], seconds, options.negative, given)
    if given is not None and given.shape[2] >= videos.latent_frames:
        taken = f"the {generator.geometry.video_frames(given.shape[2]) / videos.fps:.3g} s"
        raise ValueError(f"--seconds {options.seconds} is not longer than {taken} of {options.image or options.video}")
    if options.play:
        return play(videos, options.port)
    video = Stream(videos)
    if not generator.leads:
        return helped(video.videos)
    print(video.memory.lines(video.plan), flush=True)
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    chunks = tqdm(video, total=video.chunk_count, unit="chunk", desc="generate")
    frames = write(chunks, options.out, video.fps)
    trained = generator.geometry.video_frames(generator.trained_frames) / video.fps
    return f"{options.out}: {frames} frames, {frames / video.fps:.2f} s (trained on clips of {trained:.2f} s)"


def helped(videos: Videos) -> str:
    """Takes part in the passes of videos that another rank decodes and writes."""
    for _ in videos.latents():
        pass
    together = videos.generator.together
    assert together is not None
    return f"rank {together.ranks.rank} took part"


def opened(options: argparse.Namespace, together: VideoRanks | None, device: torch.device | None) -> Generator:
    generator = open_run(
        options.run, options.overrides, options.step, device=device, positions=options.positions, together=together,
        split_weights=options.split_weights,
    )  # fmt: skip
    if options.negative and generator.recipe.flow.guidance == 1:
        raise ValueError("--negative: guidance leads away from it, and there is none: add  flow.guidance=3")
    return generator


def given_chunks(generator: Generator, options: argparse.Namespace) -> Tensor | None:
    """The latents that the video begins with, or None."""
    if options.image:
        return still_image(generator, options.image)
    return first_frames(generator, options.video, options.given_chunks) if options.video else None


def make_many(options: argparse.Namespace, together: VideoRanks | None) -> str:
    """Makes the videos of a prompt file: this rank's share, and whatever no other rank makes."""
    prompts = read_prompts(options.prompts)
    if together is None:
        rank, world_size, device = this_rank()
    else:  # ranks that make a video together are one
        rank, world_size, device = together.number, together.groups, together.ranks.device
    generator = opened(options, together, device)
    like = Videos(generator, [], [], options.seconds, options.negative)
    for prompt in prompts:
        replace(like, prompts=[Prompts.of_line(prompt)])  # refuses one that is never shown, before anything is made
    memory = memory_needed(generator, like.latent_frames, ranks_here())
    settings = {
        "checkpoint": sha256_of_file(checkpoint.at_step(Path(options.run), options.step) / "manifest.json"),
        "seconds": options.seconds,
        "negative": options.negative,
        "flow": asdict(generator.recipe.flow),
        "attention": to_dict(generator.recipe)["stages"][-1]["attention"],
        "positions": options.positions,
        "device": device.type,
    }
    if together is not None:  # other ranks add in another order
        settings["sequence_parallel"] = together.size
    job = generator.tell(
        lambda: open_job(options.out, settings, prompts, options.samples, options.seed, memory.plan(options.batch))
    )
    if rank == 0 and generator.leads:
        print(memory.lines(job.plan), flush=True)
    made = make_batches(job, like, rank, world_size)
    if not generator.leads:
        assert together is not None
        return f"rank {together.ranks.rank} took part"
    there = len(job.videos) - len(job.missing(job.videos))
    return f"{options.out}: rank {rank} made {made} videos; {there} of {len(job.videos)} are there"


def play(videos: Videos, port: int) -> str:
    """Shows a video until it is interrupted."""
    players: list[Player] = []  # on the leader
    videos.generator.tell(lambda: players.append(Player(videos.fps, videos.prompts[0].texts[0], port)))
    if not players:
        return helped(Stream(videos, live=lambda: None).videos)
    player = players[0]
    video = Stream(videos, live=player.next_prompt)
    print(video.memory.lines(video.plan))
    print(f"open {player.address} in a browser; Ctrl-C ends it", flush=True)
    for frames in video:
        player.add(frames)
    return f"{player.shown} frames shown"


def check_options(options: argparse.Namespace) -> None:
    """Raises ValueError for invalid options."""
    if options.prompts and (options.prompt or options.video or options.image or options.play):
        raise ValueError("--prompts FILE makes many videos from text; leave out --prompt, --image, --video and --play")
    if not (options.prompts or options.prompt or options.video or options.image or options.play):
        raise ValueError("give --prompt TEXT, --image FILE or --video FILE, or --prompts FILE for many videos")
    if options.samples > 1 and not options.prompts:
        raise ValueError(f"--samples {options.samples} is for --prompts; for another video give another --seed")
    for name, default, other in (
        ("given_chunks", GIVEN_CHUNKS, "video"),
        ("batch", 0, "prompts"),
        ("port", PORT, "play"),
    ):
        if getattr(options, name) != default and not getattr(options, other):
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)} is for --{other}")
    if options.video and options.image:
        raise ValueError("--image and --video: a video begins with one of them")
    check_text("--negative", options.negative)
    require_finite(seconds=options.seconds)
    if options.seconds <= 0:
        raise ValueError(f"--seconds {options.seconds}: must be positive")
    for name, least in (("given_chunks", 1), ("samples", 1), ("sequence_parallel", 1), ("batch", 0), ("port", 0)):
        if getattr(options, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least {least}")
    if options.port > 65535:
        raise ValueError(f"--port {options.port}: must be at most 65535")
    if options.play:
        if options.out:
            raise ValueError(f"{options.out}: --play writes no file; leave it out")
    elif not options.out:
        raise ValueError("say where to write: RUN OUT.mp4, or RUN FOLDER with --prompts")
    elif Path(options.out).is_dir() and not options.prompts:
        raise ValueError(f"{options.out}: a folder is there; the output is an .mp4 file")
    elif (Path(options.out).suffix == ".mp4") == bool(options.prompts):
        raise ValueError(f"{options.out}: the output is an .mp4 file, or with --prompts a folder")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="rf_train.generate", formatter_class=Help, description="Makes videos with a trained run."
    )
    parser.add_argument("run", help="a folder written by rf_train.train")
    parser.add_argument(
        "--prompt", action="append", default=[],
        help='what the video shows; several like "0: a boat" and "5: a storm" change at these seconds',
    )  # fmt: skip
    parser.add_argument("--negative", default="", help="what guidance leads away from (default: the empty caption)")
    parser.add_argument("--image", help="an image that the video begins with")
    parser.add_argument("--video", help="a video whose first frames are continued")
    parser.add_argument("--given-chunks", type=int, default=GIVEN_CHUNKS, help="chunks taken from --video")
    parser.add_argument("--seconds", type=float, default=15.0, help="length, the given frames included")
    parser.add_argument("--seed", type=int, default=0, help="of the noise: another seed makes another video")
    parser.add_argument("--step", type=int, default=0, help="the checkpoint's step (default: the newest)")
    parser.add_argument(
        "--positions", choices=POSITIONS, default=POSITIONS[0],
        help="of sinks: relative (default), never farther away than in training; or absolute",
    )  # fmt: skip
    parser.add_argument("--prompts", help="a file with one prompt per line: OUT is a folder of videos, one per prompt")
    parser.add_argument("--samples", type=int, default=1, help="with --prompts: videos of each prompt")
    parser.add_argument("--batch", type=int, default=0, help="with --prompts: videos at once (default: as many as fit)")
    parser.add_argument(
        "--sequence-parallel", type=int, default=1, metavar="N",
        help="N ranks make each video together, each with 1 / N of the heads",
    )  # fmt: skip
    parser.add_argument("--split-weights", action="store_true", help="and each keeps 1 / N of the weights (ZeRO-3)")
    parser.add_argument("--play", action="store_true", help="show the video on a page, with a box for the next prompt")
    parser.add_argument("--port", type=int, default=PORT, help="with --play: the page's port; 0: any")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the launcher
    parser.add_argument(
        "rest", nargs="*", metavar="OUT | a.b=c",
        help="the mp4 or folder to write; settings, e.g. flow.guidance=3 flow.sampling_steps=50 flow.solver=heun",
    )  # fmt: skip
    options = parser.parse_intermixed_args(arguments)
    first = (
        options.rest[:1] if options.rest and ("=" not in options.rest[0] or options.rest[0].endswith(".mp4")) else []
    )
    options.out, options.overrides = "".join(first), options.rest[len(first) :]
    return run_command(lambda: print(generate(options)))


if __name__ == "__main__":
    sys.exit(main())
