"""Real clips made worse in known ways: a metric can be trusted when it moves with what it is about, and hardly else.

Each way is one entry in `DAMAGES`. All frames after the given ones are damaged.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rf_train.evaluation.long_videos import LongVideos, summary
from rf_train.evaluation.statistics import as_text

Damage = Callable[[np.ndarray, np.random.Generator], np.ndarray]  # float32 [T, H, W, 3] in 0 .. 255 -> the same


def blurred(frames: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Averages over 5 x 5 pixels."""
    for axis in (1, 2):
        padded = np.pad(frames, [(2, 2) if i == axis else (0, 0) for i in range(4)], mode="edge")
        size = frames.shape[axis]
        frames = np.mean([padded.take(range(k, k + size), axis) for k in range(5)], axis=0)
    return frames


def frozen(frames: np.ndarray, random: np.random.Generator) -> np.ndarray:
    return np.repeat(frames[:1], len(frames), axis=0)


def emptied(frames: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Only the ground is left: the colour that is most common."""
    colours, counts = np.unique(frames.reshape(-1, 3).round(), axis=0, return_counts=True)
    return np.broadcast_to(colours[counts.argmax()], frames.shape).astype(np.float32)


DAMAGES: dict[str, Damage] = {
    "none": lambda frames, random: frames,
    "blurred": blurred,
    "darkened": lambda frames, random: 0.7 * frames,
    "frozen": frozen,
    "emptied": emptied,
    "shuffled": lambda frames, random: frames[random.permutation(len(frames))],
    "noised": lambda frames, random: frames + random.normal(0, 25, frames.shape).astype(np.float32),
}


@dataclass(frozen=True)
class Calibration:
    """The mean of every metric over clips and segments, for clips that were damaged in one way."""

    clips: int
    values: dict[str, dict[str, float | None]]  # damage -> metric -> mean


def calibrate(videos: LongVideos) -> Calibration:
    """Damages the clips after their given frames, and measures them against themselves."""
    rows: dict[str, list[dict]] = {name: [] for name in DAMAGES}
    geometry = videos.codec.geometry
    for index in range(videos.clips):
        latent, _, meta = videos.dataset.read(index)
        true = videos.codec.decode(latent.numpy())
        given = geometry.video_frames(videos.given)
        for name, damage in DAMAGES.items():
            rest = damage(true[given:].astype(np.float32), np.random.default_rng(index))
            made = np.concatenate([true[:given], np.clip(rest.round(), 0, 255).astype(np.uint8)])
            latent_made = latent.numpy() if name == "none" else videos.codec.encode(made)
            rows[name].append(
                videos.measured(videos.compared(made, true, latent_made, latent.numpy(), meta["caption"]))
            )
    return Calibration(videos.clips, {name: over_segments(found, len(videos.spans)) for name, found in rows.items()})


def over_segments(rows: Sequence[dict], count: int) -> dict[str, float | None]:
    """The mean of each metric over `count` segments."""
    found = summary(rows, count)
    cells = {name: [cell["mean"] for cell in cells] for name, cells in found["metrics"].items()}
    cells["frechet"] = found["frechet"]
    means = {name: [value for value in values if value is not None] for name, values in cells.items()}
    return {name: float(np.mean(values)) if values else None for name, values in means.items()}


def calibration_table(found: Calibration) -> str:
    """A line per metric, a column per damage."""
    lines = [f"{'mean of ' + str(found.clips) + ' clips':<18}" + "".join(f"{name:>10}" for name in found.values)]
    for name in found.values["none"]:
        values = [column.get(name) for column in found.values.values()]
        lines.append(f"{name:<18}" + "".join(as_text(value, 10) for value in values))
    return "\n".join(lines)
