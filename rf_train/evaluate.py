"""Measures how quality holds over long videos:  python -m rf_train.evaluate RUN

Held-out long clips are continued from their first chunks and compared with the truth, segment by segment. A segment is
as long as a training clip. It writes `evaluation.json` and the videos, true and generated, to RUN/evaluation. With
--prompts FILE the videos come from prompts alone, and the results go to RUN/evaluation_prompts. Any number of ranks
share the work; the same command goes on after a kill.
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep.command import GOES_ON, Help, require_finite, run_command
from data_prep.files import sha256_of_file, write_json
from data_prep.places import no_such_folder, place_of
from rf_train.data.latent_dataset import LatentDataset
from rf_train.engine import checkpoint
from rf_train.engine.shared_work import this_rank
from rf_train.evaluation.calibration import calibrate, calibration_table
from rf_train.evaluation.evaluation import Evaluation
from rf_train.evaluation.history_distance import evaluate_history
from rf_train.evaluation.long_videos import LongVideos
from rf_train.evaluation.pieces import RESULT, Pieces
from rf_train.evaluation.prompted import PromptedVideos
from rf_train.evaluation.results import CLIPS, PROMPTS, read_result, table
from rf_train.evaluation.text_agreement import FRAMES_PER_SECOND, TextAgreement
from rf_train.generation.generator import Generator, open_run
from rf_train.generation.prompts import read_prompts


def evaluate_run(options: argparse.Namespace) -> str:
    """Makes this rank's share of what the command line asks for. Returns the table, on rank 0."""
    check_options(options)
    rank, world_size, device = this_rank()
    generator = open_run(options.run, options.overrides, options.step, device=device)
    agreement = TextAgreement(options.text_agreement, device) if options.text_agreement else None
    evaluation, request = (of_prompts if options.prompts else of_clips)(generator, agreement, options)
    out = Path(options.run) / (PROMPTS if options.prompts else CLIPS)
    if options.calibrate:
        assert isinstance(evaluation.videos, LongVideos)
        return calibrated(evaluation.videos, out) if rank == 0 else f"rank {rank}: rank 0 calibrates"
    if read_result(out).get("request") != request:
        manifest = checkpoint.at_step(Path(options.run), options.step) / "manifest.json"
        identity = {"request": request, "checkpoint": sha256_of_file(manifest), "dataset": evaluation.dataset_hash}
        pieces = Pieces(out, identity, evaluation.names)
        with pieces.entered():
            made = make_pieces(evaluation, pieces, rank, world_size)
            if rank > 0:
                return f"rank {rank}: made {made} of {len(pieces.names)} pieces"
            if not (out / RESULT).exists():
                pieces.finish({"request": request, **evaluation.result(pieces.whole())})
    elif rank == 0:
        print(f"{out / RESULT}: exists already")
    return table(read_result(out)) if rank == 0 else f"rank {rank}: nothing is missing"


def make_pieces(evaluation: Evaluation, pieces: Pieces, rank: int, world_size: int) -> int:
    """Makes pieces that no other rank makes. Returns how many. On rank 0, all are there when it returns."""
    made = 0
    with tqdm(total=len(pieces.names), unit="piece", desc="evaluate", disable=rank > 0) as bar:
        for name in pieces.missing(rank, world_size):
            pieces.add(name, evaluation.make(name, pieces.out))
            made += 1
            bar.update(pieces.there - bar.n)
    return made


def of_clips(
    generator: Generator, agreement: TextAgreement | None, options: argparse.Namespace
) -> tuple[Evaluation, dict[str, Any]]:
    """The evaluation on held-out clips, and what was asked for, as evaluation.json holds it."""
    dataset = held_out(generator, options.data)
    recipe = generator.recipe
    if str(dataset.folder) in {
        folder for stage in recipe.stages for folder in recipe.folders_of(recipe.dataset_of(stage))
    }:
        print(f"{dataset.folder}: the run was trained on these clips; they are not held out", file=sys.stderr)
    videos = LongVideos(
        dataset=dataset,
        codec=generator.codec,
        clips=min(options.clips, len(dataset)),
        given=generator.model.chunking.start(options.given_chunks),
        trained=generator.trained_frames,
        seed=options.seed,
        agreement=agreement,
    )

    def history() -> dict | None:
        return evaluate_history(generator, dataset, options.clips, options.batch, options.seed)

    request = {"clips": options.clips, "given_chunks": options.given_chunks}
    request.update(
        data=str(options.data or generator.recipe.data.evaluation), **request_of(options, generator, agreement)
    )
    return Evaluation(generator, videos, options.samples, options.batch, options.videos, history), request


def of_prompts(
    generator: Generator, agreement: TextAgreement | None, options: argparse.Namespace
) -> tuple[Evaluation, dict[str, Any]]:
    """The same for a prompt file."""
    prompts, seconds = read_prompts(options.prompts), 15.0 if options.seconds is None else options.seconds
    videos = PromptedVideos(generator, prompts, seconds, generator.trained_frames, options.seed, agreement)
    request = {"prompts": prompts, "seconds": seconds, **request_of(options, generator, agreement)}
    return Evaluation(generator, videos, options.samples, options.batch, options.videos, None), request


def request_of(options: argparse.Namespace, generator: Generator, agreement: TextAgreement | None) -> dict[str, Any]:
    """What was asked for of any evaluation. Newer options are in it only where they are used."""
    request = {name: getattr(options, name) for name in ("batch", "videos", "seed", "overrides")}
    request["step"] = generator.step
    if options.samples > 1:
        request["samples"] = options.samples
    if agreement is not None:
        request["text_agreement"] = {"model": agreement.hash, "frames_per_second": FRAMES_PER_SECOND}
    if getattr(generator.attention, "farthest_sink", None) is not None:  # before, sinks were at absolute positions
        request["positions"] = generator.positions
    return request


def check_options(options: argparse.Namespace) -> None:
    """Raises ValueError for invalid options."""
    if min(options.clips, options.given_chunks, options.batch, options.samples) < 1:
        raise ValueError("--clips, --given-chunks, --batch and --samples must be at least 1")
    if options.prompts and (options.data or options.calibrate):
        raise ValueError("--prompts FILE: its videos have no truth; leave out --data and --calibrate")
    if options.seconds is not None:
        if not options.prompts:
            raise ValueError("--seconds is for --prompts; held-out clips are continued as far as they go")
        require_finite(seconds=options.seconds)
        if options.seconds <= 0:
            raise ValueError(f"--seconds {options.seconds}: must be positive")


def held_out(generator: Generator, data: str | None) -> LatentDataset:
    """The dataset to evaluate on: `data`, or the recipe's. Raises ValueError if it does not fit the run."""
    folder = data or generator.recipe.data.evaluation
    if not folder:
        raise ValueError("no dataset to evaluate on: give --data FOLDER or set data.evaluation in the recipe")
    place = place_of(folder, generator.recipe.data.patience)
    if no_such_folder(place):
        raise ValueError(f"{folder}: no such folder; give --data FOLDER, a dataset of long held-out clips")
    dataset = LatentDataset(place, generator.recipe.model)
    for part in ("codec", "text"):
        if dataset.card[part]["hash"] != generator.card[part]["hash"]:
            trained_on = generator.recipe.data.train
            fitted = part == "codec" and generator.card[part]["name"] == "default"
            same = f"--codec default:{trained_on}" if fitted else f"the same --{part}"
            raise ValueError(
                f"{folder}: its {part} is not that of {trained_on}, the training data; encode it with {same}"
            )
    return dataset


def calibrated(videos: LongVideos, out: Path) -> str:
    found = calibrate(videos)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "calibration.json", dataclasses.asdict(found))
    return calibration_table(found)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="rf_train.evaluate", formatter_class=Help, description="Measures how quality holds over long videos."
    )
    parser.add_argument("run")
    parser.add_argument("--data", help="dataset folder of long held-out clips (default: the recipe's data.evaluation)")
    parser.add_argument("--clips", type=int, default=16, help="clips of the dataset that are measured")
    parser.add_argument("--given-chunks", type=int, default=2, help="true chunks that each clip begins with")
    parser.add_argument("--prompts", help="instead of clips, a file with one prompt per line: videos without a truth")
    parser.add_argument("--seconds", type=float, help="with --prompts: length of the videos (default: 15)")
    parser.add_argument("--samples", type=int, default=1, help="videos of each clip or prompt, each with its own seed")
    parser.add_argument(
        "--text-agreement", metavar="CLIP", help="a folder with a CLIP: how well frames agree with their prompt"
    )
    parser.add_argument("--batch", type=int, default=8, help="clips made together")
    parser.add_argument("--videos", type=int, default=4, help="clips whose videos are kept")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="instead of generating, damage the true clips, and show what each metric says",
    )
    parser.add_argument("--step", type=int, default=0, help="the checkpoint's step (default: the newest)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the launcher
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings, e.g. flow.sampling_steps=16")
    options = parser.parse_intermixed_args(arguments)
    return run_command(lambda: print(evaluate_run(options)), GOES_ON)


if __name__ == "__main__":
    sys.exit(main())
