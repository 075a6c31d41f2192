"""Measures how quality holds over long videos:  python -m rf_train.evaluate RUN

Held-out long clips are continued from their first chunks and compared with the truth, segment by segment; a segment is as long as a
training clip. Written to RUN/evaluation: `evaluation.json`, and the videos, truth beside generated.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data_prep.video import write_video
from rf_train import checkpoint, config, flow
from rf_train.data import Latents
from rf_train.generate import Generator, open_run, video_frames
from rf_train.model import pad_text
from rf_train.randomness import Draws, draw
from rf_train.resampling import make_history

# What is measured: (name, better, what it says)
FIGURES = {
    "colour_distance": ("lower", "Hellinger distance between the colour histograms of the segment, generated and true: colours and areas, wherever they are"),
    "sharpness": ("near 1", "root mean square image gradient, generated over true: below 1 is blur or lost shapes, above 1 is noise"),
    "flicker": ("near 1", "mean absolute change between frames, generated over true"),
    "psnr": ("higher", "dB against the true continuation, frame by frame: falls as positions part, even where the world is kept; an empty picture can score better than one with shapes in other places"),
    "latent_mse": ("lower", "mean squared distance of latents from the true continuation; like psnr, it prefers nothing to something elsewhere"),
}


def colour_histogram(frames: np.ndarray, levels: int = 5) -> np.ndarray:
    """uint8 [T, H, W, 3] -> levels^3 shares. Each pixel is split between the nearest levels of each channel, so that a small change of colour is a small change."""
    pixels = frames.reshape(-1, 3)
    pixels = pixels[:: max(1, len(pixels) // 200_000)]  # enough of large pictures
    position = pixels.T.astype(np.float32) * ((levels - 1) / 255)
    low = np.minimum(position.astype(np.int32), levels - 2)
    upper = position - low  # the share of the upper level, by channel
    shares = np.zeros(levels**3)
    for r, g, b in np.ndindex(2, 2, 2):
        weight = np.prod([u if bit else 1 - u for u, bit in zip(upper, (r, g, b))], axis=0)
        shares += np.bincount(((low[0] + r) * levels + low[1] + g) * levels + low[2] + b, weight, levels**3)
    return shares / len(pixels)


def gradient(frames: np.ndarray) -> float:
    """Root mean square difference between neighbouring pixels. (The mean absolute one doesn't see blur: an edge keeps its total rise.)"""
    x = frames.astype(np.float32)
    return float(np.sqrt((np.diff(x, axis=1) ** 2).mean() + (np.diff(x, axis=2) ** 2).mean()))


def change(frames: np.ndarray) -> float:
    """Mean absolute difference between neighbouring frames."""
    return float(np.abs(np.diff(frames.astype(np.float32), axis=0)).mean()) if len(frames) > 1 else 0.0


def compare(made: np.ndarray, true: np.ndarray, latent_made: np.ndarray, latent_true: np.ndarray) -> dict[str, float]:
    """The figures of one segment. Frames uint8 [T, H, W, 3], latents [C, F, H, W]."""
    p, q = colour_histogram(made), colour_histogram(true)
    mse = float(((made.astype(np.float32) - true) ** 2).mean())
    return {
        "colour_distance": float(np.sqrt(max(0.0, 1 - np.sqrt(p * q).sum()))),
        "sharpness": gradient(made) / max(gradient(true), 1e-6),
        "flicker": change(made) / max(change(true), 1e-6),
        "psnr": 10 * np.log10(255**2 / max(mse, 1e-6)),
        "latent_mse": float(((latent_made - latent_true) ** 2).mean()),
    }


def segments(frames: int, given: int, length: int) -> list[tuple[int, int]]:
    """Latent frame spans [begin, end) of `length` that cover a clip of `frames`, without the `given` first ones; a remainder shorter than half is joined."""
    spans = [(begin, min(begin + length, frames)) for begin in range(0, frames, length)]
    if len(spans) > 1 and spans[-1][1] - spans[-1][0] < length / 2:
        spans[-2:] = [(spans[-2][0], frames)]
    return [(max(begin, given), end) for begin, end in spans if end > given]


def pixels_of(span: tuple[int, int]) -> slice:
    """Video frames that latent frames [begin, end) stand for: the first one for 1, each later one for 4."""
    begin, end = (video_frames(latent) if latent else 0 for latent in span)
    return slice(begin, end)


def evaluate(generator: Generator, dataset: Latents, clips: int, given_chunks: int, batch: int, seed: int, out: Path, videos: int) -> dict:
    """Continues the first `clips` clips of the dataset; returns what `evaluation.json` holds."""
    clips = min(clips, len(dataset))
    given_frames = generator.model.chunking.start(given_chunks)
    total = dataset.card["latent"]["frames"]
    if given_frames >= total:
        raise ValueError(f"{dataset.folder}: clips of {total} latent frames are no longer than the {given_frames} given ones")
    spans = segments(total, given_frames, generator.trained_frames)
    rows, fps = [], dataset.card["video"]["fps"]
    with tqdm(total=clips, unit="clip", desc="evaluate") as bar:
        for begin in range(0, clips, batch):
            indices = range(begin, min(begin + batch, clips))
            samples = [dataset.read(index) for index in indices]
            true = torch.stack([latent for latent, _, _ in samples])
            prompts = [meta["caption"] for _, _, meta in samples]
            seeds = [seed + index for index in indices]
            made = torch.cat(list(generator.chunks([text for _, text, _ in samples], total, seeds, true[:, :, :given_frames])), dim=2).cpu()
            for index, latent_made, latent_true, prompt in zip(indices, made.numpy(), true.numpy(), prompts):
                ours, truth = generator.codec.decode(latent_made), generator.codec.decode(latent_true)
                figures = [compare(ours[pixels_of(s)], truth[pixels_of(s)], latent_made[:, slice(*s)], latent_true[:, slice(*s)]) for s in spans]
                rows.append({"clip": dataset.places[index][1], "caption": prompt, "seed": seed + index, "segments": figures})
                if index < videos:
                    name = f"clip-{index:03d}.mp4"
                    write_video(out / name, ours, fps)
                    write_video(out / f"truth-{index:03d}.mp4", truth, fps)
                    rows[-1].update(video=name, truth=f"truth-{index:03d}.mp4")
                bar.update()
    seconds = [[(pixels_of(s).start) / fps, pixels_of(s).stop / fps] for s in spans]
    summary = {
        name: [
            {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0}
            for values in ([row["segments"][i][name] for row in rows] for i in range(len(spans)))
        ]
        for name in FIGURES
    }
    trained = video_frames(generator.trained_frames)
    return {
        "step": generator.step, "dataset": str(dataset.folder), "clips": clips, "given_seconds": video_frames(given_frames) / fps,
        "trained_seconds": trained / fps, "segments_seconds": seconds, "figures": summary, "rows": rows,
    }  # fmt: skip


@torch.no_grad()
def solver_distance(model, stage: config.Stage, solver_steps: int, x: Tensor, text: Tensor, draws: Draws) -> dict[str, Tensor]:
    """How far training's history is from the one that a finer solver makes from the same noise: rms by clip and chunk, each [B, N - 1].

    "solver": x~ of `stage.solver_steps` Euler steps to x~ of `solver_steps`; "truth" and "truth_fine": each of the two to the clean clip.
    """
    stage = dataclasses.replace(stage, history="autoregressive")
    ours, fine = (make_history(model, x, text, draws, dataclasses.replace(stage, solver_steps=steps), model.chunking)[0] for steps in (stage.solver_steps, solver_steps))
    sizes, clean = model.chunking.sizes(x.shape[2])[:-1], x[:, :, : ours.shape[2]]

    def distance(one: Tensor, other: Tensor) -> Tensor:
        return flow.mean_over_chunks((one - other).square().mean(dim=(1, 3, 4)), sizes).sqrt()

    return {"solver": distance(ours, fine), "truth": distance(ours, clean), "truth_fine": distance(fine, clean)}


def evaluate_history(generator: Generator, dataset: Latents, clips: int, batch: int, seed: int) -> dict | None:
    """`solver_distance` over the dataset's clips, cut to the trained length, by the last stage's settings; None when that is a single chunk."""
    if generator.trained_chunks < 2:
        return None
    recipe, frames, found = generator.recipe, min(generator.trained_frames, dataset.card["latent"]["frames"]), []
    stage, steps = recipe.stages[-1], recipe.flow.sampling_steps
    for begin in range(0, min(clips, len(dataset)), batch):
        indices = range(begin, min(begin + batch, clips, len(dataset)))
        samples = [dataset.read(index, frames) for index in indices]
        x = torch.stack([latent for latent, _, _ in samples])
        text = pad_text([text for _, text, _ in samples], recipe.model)
        draws = draw(seed, 0, [f"evaluation {dataset.places[index][1]}" for index in indices], tuple(x.shape[1:]), generator.trained_chunks)
        device = generator.device
        found.append(solver_distance(generator.model, stage, steps, x.to(device), text.to(device), draws.to(device)))
    by_chunk = {name: torch.cat([part[name] for part in found]).double().mean(0).tolist() for name in found[0]}
    return {"solver_steps": stage.solver_steps, "fine_solver_steps": steps, "s": stage.s, **by_chunk}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="rf_train.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--data", help="dataset folder of long held-out clips (default: the recipe's data.evaluation)")
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--given-chunks", type=int, default=2, help="true chunks that each clip begins with (default 2)")
    parser.add_argument("--batch", type=int, default=8, help="clips made together")
    parser.add_argument("--videos", type=int, default=4, help="clips whose videos are kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--step", type=int, default=0, help="the checkpoint's step (default: the newest)")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings, e.g. flow.sampling_steps=16")
    options = parser.parse_intermixed_args(arguments)
    try:
        if min(options.clips, options.given_chunks, options.batch) < 1:
            raise ValueError("--clips, --given-chunks and --batch must be at least 1")
        generator = open_run(options.run, options.overrides, options.step)
        folder = options.data or generator.recipe.data.evaluation
        if not folder:
            raise ValueError("no dataset to evaluate on: give --data FOLDER or set data.evaluation in the recipe")
        dataset = Latents(folder, generator.recipe.model)
        for part in ("codec", "text"):
            if dataset.card[part]["hash"] != generator.card[part]["hash"]:
                raise ValueError(f"{folder}: its {part} is not that of the training data; encode it with --{part} of {generator.recipe.data.train}")
        out = Path(options.run) / "evaluation"
        request = {key: value for key, value in vars(options).items() if key not in ("run", "data")} | {"step": generator.step, "data": str(folder)}
        done = out / "evaluation.json"
        if done.is_file() and json.loads(done.read_text()).get("request") == request:
            print(f"{done}: stands already")
        else:
            out.mkdir(parents=True, exist_ok=True)
            done.unlink(missing_ok=True)
            result = evaluate(generator, dataset, options.clips, options.given_chunks, options.batch, options.seed, out, options.videos)
            history = evaluate_history(generator, dataset, options.clips, options.batch, options.seed)
            checkpoint.write_json(done, {"request": request, **result, "history": history})
        print(table(json.loads(done.read_text())))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def table(result: dict) -> str:
    """The figures by segment, mean and spread over clips, as text."""
    heads = [f"{begin:.1f}-{end:.1f} s" for begin, end in result["segments_seconds"]]
    lines = [f"{'step ' + str(result['step']):<18}" + "".join(f"{head:>20}" for head in heads)]
    for name, cells in result["figures"].items():
        lines.append(f"{name:<18}" + "".join(f"{cell['mean']:>11.3f} ± {cell['std']:<6.3f}" for cell in cells))
    if result.get("history"):
        h = result["history"]
        lines.append(f"training's history (x~, s = {h['s']:g}), rms by chunk:")
        lines.append(f"  {h['solver_steps']} solver step(s) to {h['fine_solver_steps']}    " + " ".join(f"{value:.3f}" for value in h["solver"]))
        lines.append("  to the truth            " + " ".join(f"{value:.3f}" for value in h["truth"]))
        lines.append("  the fine one's          " + " ".join(f"{value:.3f}" for value in h["truth_fine"]))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
