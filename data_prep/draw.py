"""Draw the demo's world: coloured shapes that move, bounce off the borders and pass behind one another.

    python -m data_prep.draw OUT --videos 64 --seconds 5.0625 --size 64x64 --fps 16 --seed 0

writes OUT/video-00000.mp4 (H.264) with its caption in OUT/video-00000.txt, and so on. A video is a function of
(seed, index) alone: a longer one starts with the same frames. What was hidden comes back the same, so a model
that draws the world well has to remember it.
"""

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_prep.shards import write_atomic
from data_prep.video import parse_size, write_video

PALETTE = {  # name -> RGB
    "red": (235, 40, 45),
    "green": (40, 200, 70),
    "blue": (50, 90, 245),
    "yellow": (250, 220, 40),
    "magenta": (225, 60, 225),
    "cyan": (40, 215, 225),
}
BACKGROUND = (20, 20, 26)
KINDS = ("circle", "square")
DIRECTIONS = ("right", "down and right", "down", "down and left", "left", "up and left", "up", "up and right")

# In units of the frame's shorter side, and of that per second. At 64x64 and 16 frames a second:
RADII = (10 / 64, 13 / 64)      # 10 to 13 pixels
SPEEDS = (6 / 64, 14 / 64)      # 0.4 to 0.9 pixels a frame
EDGE = 2                        # pixels over which a shape's edge fades: antialiased, and kind to small codecs


@dataclass(frozen=True)
class Shape:
    """A flat shape; position, radius and velocity in units of the frame's shorter side (per second), y down."""
    kind: str
    colour: str
    radius: float
    position: tuple
    velocity: tuple


def scene(seed, index, aspect=1.0, shapes=(2, 3)):
    """The shapes of video `index`, front to back, at time 0. aspect = width / height; shapes = (fewest, most)."""
    rng = np.random.default_rng([seed, index])
    world = max(aspect, 1.0), max(1 / aspect, 1.0)
    count = int(rng.integers(shapes[0], shapes[1] + 1))
    colours = rng.permutation(list(PALETTE))[:count]
    result = []
    for colour in colours:
        radius = rng.uniform(*RADII)
        speed, angle = rng.uniform(*SPEEDS), rng.uniform(0, 2 * math.pi)
        result.append(Shape(
            kind=str(rng.choice(KINDS)), colour=str(colour), radius=float(radius),
            position=tuple(float(rng.uniform(radius, side - radius)) for side in world),
            velocity=(float(speed * math.cos(angle)), float(speed * math.sin(angle)))))
    return result


def caption(shapes):
    """What is there, front to back, and how it starts to move."""
    def direction(shape):
        octant = round(math.atan2(shape.velocity[1], shape.velocity[0]) / (math.pi / 4)) % 8
        return DIRECTIONS[octant]
    return " in front of ".join(f"a {s.colour} {s.kind} moving {direction(s)}" for s in shapes)


def position(shape, time, world):
    """Centre (x, y) at `time` seconds: straight lines folded at the borders, i.e. elastic bounces."""
    centre = []
    for start, velocity, side in zip(shape.position, shape.velocity, world):
        span = side - 2 * shape.radius
        travelled = (start - shape.radius + velocity * time) % (2 * span)
        centre.append(shape.radius + min(travelled, 2 * span - travelled))
    return tuple(centre)


def _distance(kind, x, y, r):
    """Signed distance (negative inside) to a shape of outer radius r at the origin; x, y arrays, y down."""
    if kind == "circle":
        return np.hypot(x, y) - r
    if kind == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.88 * r
    raise ValueError(f"unknown shape {kind!r}, known: {', '.join(KINDS)}")


def render(shapes, frames, size, fps):
    """Yield `frames` images, uint8 [H, W, 3], of the world at times 0, 1 / fps, ... size = (height, width)."""
    height, width = size
    short = min(size)
    world = width / short, height / short
    y, x = np.mgrid[0:height, 0:width] + 0.5
    for n in range(frames):
        image = np.empty((height, width, 3))
        image[:] = BACKGROUND
        for shape in reversed(shapes):
            cx, cy = position(shape, n / fps, world)
            outside = _distance(shape.kind, x - cx * short, y - cy * short, shape.radius * short)
            cover = np.clip(0.5 - outside / EDGE, 0, 1)[..., None]
            image += cover * (np.array(PALETTE[shape.colour]) - image)
        yield np.round(image).astype(np.uint8)


def draw(out, videos, frames, size, fps, seed, shapes=(2, 3)):
    """Write `videos` mp4 files with captions into the folder `out`; those that stand already are kept.

    Returns how many were written. Raises ValueError if `out` holds something else.
    """
    out = Path(out)
    if videos < 1 or frames < 1 or fps <= 0:
        raise ValueError(f"videos {videos}, frames {frames} and fps {fps} must be positive")
    if size[0] % 2 or size[1] % 2 or min(size) < 16:
        raise ValueError(f"size {size[0]}x{size[1]}: height and width must be even and at least 16")
    if not 1 <= shapes[0] <= shapes[1] <= len(PALETTE):
        raise ValueError(f"shapes {shapes[0]}-{shapes[1]}: must lie within 1-{len(PALETTE)}")
    fps = int(fps) if fps == int(fps) else fps
    settings = {"videos": videos, "frames": frames, "size": list(size), "fps": fps, "seed": seed,
                "shapes": list(shapes)}
    record = out / "draw.json"
    if record.is_file():
        try:
            found = json.loads(record.read_text())
        except ValueError:
            found = None
        if found != settings:
            raise ValueError(f"{out}: holds videos drawn with other settings ({found}); choose another folder")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: exists and was not made by data_prep.draw; choose another folder")
    if not record.is_file():
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(record, json.dumps(settings).encode())

    names = [(index, out / f"video-{index:05d}.mp4") for index in range(videos)]
    missing = [(index, path) for index, path in names if not (path.is_file() and path.with_suffix(".txt").is_file())]
    for index, path in tqdm(missing, desc="draw", unit="video", disable=not missing):
        world = scene(seed, index, size[1] / size[0], shapes)
        write_atomic(path.with_suffix(".txt"), (caption(world) + "\n").encode())
        write_video(path, render(world, frames, size, fps), fps, crf=10)
    return len(missing)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m data_prep.draw", description="Draw the demo's world as videos.")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--videos", type=int, default=64)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, default=5.0625, help="length of each, rounded to whole frames")
    length.add_argument("--frames", type=int, help="length of each in frames")
    parser.add_argument("--size", default="64x64", help="HEIGHTxWIDTH, even (default 64x64)")
    parser.add_argument("--fps", type=float, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shapes", default="2-3", help="fewest and most shapes in a video (default 2-3)")
    args = parser.parse_args(argv)
    try:
        fewest, _, most = args.shapes.partition("-")
        if not (fewest.isdigit() and (most or fewest).isdigit()):
            raise ValueError(f"shapes {args.shapes!r}: expected a range such as 2-3")
        if args.seed < 0:
            raise ValueError(f"seed {args.seed}: must not be negative")
        frames = round(args.seconds * args.fps) if args.frames is None else args.frames
        written = draw(args.out, args.videos, frames, parse_size(args.size), args.fps, args.seed,
                       (int(fewest), int(most or fewest)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if written:
        print(f"{args.out}: {args.videos} videos of {frames} frames ({written} drawn now)")
    else:
        print(f"{args.out}: {args.videos} videos of {frames} frames stand already, nothing to do")
    return 0


if __name__ == "__main__":
    sys.exit(main())
