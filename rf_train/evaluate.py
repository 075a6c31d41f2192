"""Measures how quality holds over long videos:  python -m rf_train.evaluate RUN

Held-out long clips are continued from their first chunks and compared with the truth, segment by segment. A segment is
as long as a training clip. It writes `evaluation.json` and the videos, true and generated, to RUN/evaluation.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data_prep.command import run_command
from data_prep.files import write_json
from data_prep.places import no_such_folder, place_of
from data_prep.video import write_video
from rf_train.data.latent_dataset import LatentDataset
from rf_train.diffusion.batch import Batch
from rf_train.diffusion.flow_matching import mean_by_chunk
from rf_train.diffusion.histories import Autoregressive, Resampled, make_history
from rf_train.diffusion.randomness import make_draws
from rf_train.evaluation.calibration import calibrate, calibration_table
from rf_train.evaluation.long_videos import LongVideos, summary
from rf_train.evaluation.routing_choices import RoutingChoices, counted_choices
from rf_train.evaluation.statistics import as_text
from rf_train.evaluation.video_metrics import GENERAL_METRICS
from rf_train.generation.generator import Generator, open_run
from rf_train.model.chunks import Attention
from rf_train.model.transformer import VelocityModel, pad_text

REPORTED = {metric.name for metric in GENERAL_METRICS}


def evaluate(generator: Generator, videos: LongVideos, options: argparse.Namespace, out: Path) -> dict:
    """Continues the clips. Returns what `evaluation.json` holds; videos are written to `out`."""
    rows: list[dict] = []
    model = generator.model
    choices = RoutingChoices(model.settings.layers, model.settings.heads, len(model.chunking.sizes(videos.frames)))
    with counted_choices(choices), tqdm(total=videos.clips, unit="clip", desc="evaluate") as bar:
        for begin in range(0, videos.clips, options.batch):
            indices = range(begin, min(begin + options.batch, videos.clips))
            for index, (row, pair) in zip(indices, videos.continued(generator.chunks, indices)):
                rows.append(row)
                if index < options.videos:
                    name, truth_name = f"clip-{index:03d}.mp4", f"truth-{index:03d}.mp4"
                    write_video(out / name, pair.made, videos.fps)
                    write_video(out / truth_name, pair.true, videos.fps)
                    row.update(video=name, truth=truth_name)
                bar.update()
    geometry, fps = generator.geometry, videos.fps
    found = summary(rows, len(videos.spans))
    return {
        "step": generator.step,
        "dataset": str(videos.dataset.folder),
        "clips": videos.clips,
        "fps": fps,
        "given_seconds": geometry.video_frames(videos.given) / fps,
        "trained_seconds": geometry.video_frames(videos.trained) / fps,
        "segments_seconds": videos.segments_seconds,
        **found,
        "routing": choices.summary(),
        "rows": [{key: value for key, value in row.items() if key != "features"} for row in rows],
    }


@torch.no_grad()
def solver_distance(
    model: VelocityModel, history: Autoregressive, solver_steps: int, batch: Batch, attention: Attention
) -> dict[str, Tensor]:
    """How far training's history is from the one that a finer solver makes from the same noise.

    Root mean square distances per clip and chunk, each [B, N - 1]. "solver": between x~ with `history.solver_steps`
    Euler steps and x~ with `solver_steps`. "truth" and "truth_fine": between each of the two and the clean clip.
    """
    fine_history = dataclasses.replace(history, solver_steps=solver_steps)
    ours, fine = (make_history(kind, batch, attention, model)[0] for kind in (history, fine_history))
    assert ours is not None and fine is not None
    clean = batch.x[:, :, : ours.shape[2]]

    def distance(one: Tensor, other: Tensor) -> Tensor:
        return mean_by_chunk((one - other).square().mean(dim=(1, 3, 4)), batch.chunk_sizes[:-1]).sqrt()

    return {"solver": distance(ours, fine), "truth": distance(ours, clean), "truth_fine": distance(fine, clean)}


def evaluate_history(generator: Generator, dataset: LatentDataset, clips: int, batch: int, seed: int) -> dict | None:
    """The mean `solver_distance` over the dataset's clips, cut to the trained length, with the last stage's settings.

    None when that length is a single chunk.
    """
    if generator.trained_chunks < 2:
        return None
    recipe, stage = generator.recipe, generator.recipe.stages[-1]
    history = Autoregressive()
    if isinstance(stage.history, Resampled):
        history = Autoregressive(t_shift=stage.history.t_shift, solver_steps=stage.history.solver_steps)
    frames, steps = min(generator.trained_frames, dataset.card["latent"]["frames"]), recipe.flow.sampling_steps
    sizes = generator.model.chunking.sizes(frames)
    found = []
    for begin in range(0, min(clips, len(dataset)), batch):
        indices = range(begin, min(begin + batch, clips, len(dataset)))
        samples = [dataset.read(index, frames) for index in indices]
        x = torch.stack([latent for latent, _, _ in samples])
        text = pad_text([text for _, text, _ in samples], recipe.model)
        ids = [f"evaluation {dataset.key(index)}" for index in indices]
        draws = make_draws(history.draws, seed, 0, ids, tuple(x.shape[1:]), len(sizes))
        clip = Batch(ids, x, text, draws, sizes).to(generator.device)
        found.append(solver_distance(generator.model, history, steps, clip, stage.attention))
    by_chunk = {name: torch.cat([part[name] for part in found]).double().mean(0).tolist() for name in found[0]}
    settings = {"solver_steps": history.solver_steps, "fine_solver_steps": steps, "t_shift": history.t_shift}
    return {**settings, **by_chunk}


def evaluate_run(options: argparse.Namespace) -> str:
    """Runs the evaluation of the command line, unless its result exists already. Returns its table."""
    if min(options.clips, options.given_chunks, options.batch) < 1:
        raise ValueError("--clips, --given-chunks and --batch must be at least 1")
    generator = open_run(options.run, options.overrides, options.step)
    folder = options.data or generator.recipe.data.evaluation
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
    videos = LongVideos(
        dataset=dataset,
        codec=generator.codec,
        clips=min(options.clips, len(dataset)),
        given=generator.model.chunking.start(options.given_chunks),
        trained=generator.trained_frames,
        seed=options.seed,
    )
    out = Path(options.run) / "evaluation"
    if options.calibrate:
        found = calibrate(videos)
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "calibration.json", dataclasses.asdict(found))
        return calibration_table(found)
    request = {key: value for key, value in vars(options).items() if key not in ("run", "data", "calibrate")}
    request.update(step=generator.step, data=str(folder))
    if getattr(generator.attention, "farthest_sink", None) is not None:  # before, sinks were at absolute positions
        request["positions"] = generator.positions
    path = out / "evaluation.json"
    if read_evaluation(Path(options.run)).get("request") == request:
        print(f"{path}: exists already")
    else:
        out.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        result = evaluate(generator, videos, options, out)
        history = evaluate_history(generator, dataset, options.clips, options.batch, options.seed)
        write_json(path, {"request": request, **result, "history": history})
    return table(read_evaluation(Path(options.run)))


def read_evaluation(run: Path) -> dict:
    """A run's evaluation.json; {} without one. Raises ValueError for a file that `evaluate_run` didn't write."""
    path = run / "evaluation" / "evaluation.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); remove it, and evaluate again") from None
    wanted = {
        "request",
        "metrics",
        "frechet",
        "slopes",
        "rows",
        "segments_seconds",
        "clips",
        "given_seconds",
        "trained_seconds",
        "fps",
    }
    known = isinstance(found, dict) and wanted <= found.keys() and isinstance(found["metrics"], dict)
    if not known or not found["metrics"].keys() >= REPORTED:
        raise ValueError(f"{path}: not an evaluation of this version; remove it, and evaluate again")
    return found


def table(result: dict) -> str:
    """The metrics as text, by segment: mean ± standard deviation over clips, and the change per segment."""
    heads = [f"{begin:.1f}-{end:.1f} s" for begin, end in result["segments_seconds"]]
    lines = [f"{'step ' + str(result['step']):<18}" + "".join(f"{head:>20}" for head in [*heads, "per segment (95 %)"])]
    for name, cells in result["metrics"].items():
        line = "".join(f"{as_text(cell['mean'], 12)} ± {as_text(cell['std'], 5)}" for cell in cells)
        slope = result["slopes"][name]
        change = f"{as_text(slope['slope'], 8)} ({as_text(slope['low'])}, {as_text(slope['high'])})"
        lines.append(f"{name:<18}{line}{change if len(heads) > 1 else ''}")
    lines.append(f"{'frechet':<18}" + "".join(f"{as_text(value, 12)}{'':8}" for value in result["frechet"]).rstrip())
    history = result.get("history")
    if history:
        lines.append(f"training's history (x~, t_shift {history['t_shift']:g}), rms by chunk:")
        titles = {
            "solver": f"{history['solver_steps']} solver step(s) to {history['fine_solver_steps']}",
            "truth": "to the truth",
            "truth_fine": "the fine one's",
        }
        for key, title in titles.items():
            lines.append(f"  {title:<24}" + " ".join(f"{value:.3f}" for value in history[key]))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="rf_train.evaluate", description="Measures how quality holds over long videos."
    )
    parser.add_argument("run")
    parser.add_argument("--data", help="dataset folder of long held-out clips (default: the recipe's data.evaluation)")
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument(
        "--given-chunks", type=int, default=2, help="true chunks that each clip begins with (default 2)"
    )
    parser.add_argument("--batch", type=int, default=8, help="clips made together")
    parser.add_argument("--videos", type=int, default=4, help="clips whose videos are kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="instead of generating, damage the true clips, and show what each metric says",
    )
    parser.add_argument("--step", type=int, default=0, help="the checkpoint's step (default: the newest)")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings, e.g. flow.sampling_steps=16")
    options = parser.parse_intermixed_args(arguments)
    return run_command(lambda: print(evaluate_run(options)))


if __name__ == "__main__":
    sys.exit(main())
