"""Draws the demo's world: coloured shapes that move, bounce off the borders and pass behind one another.

    python -m data_prep.draw OUT --videos 64 --seconds 5.0625 --size 64x64 --fps 16 --seed 0

writes OUT/video-00000.mp4 (H.264) with its caption in OUT/video-00000.txt, and so on. The scene of a video depends only
on (seed, index), so a longer video starts with the same frames. A shape that was hidden comes back unchanged, so a good
model of this world has to remember it.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_prep.command import GOES_ON, Help, require_finite, run_command
from data_prep.files import begin_folder, write_atomic
from data_prep.geometry import parse_size
from data_prep.video import write_video

PALETTE = {  # name -> RGB
    "red": (235, 40, 45),
    "green": (40, 200, 70),
    "blue": (50, 90, 245),
    "yellow": (250, 220, 40),
    "magenta": (225, 60, 225),
    "cyan": (40, 215, 225),
}
BACKGROUND = (20, 20, 26)
# Kind -> half the side of its bounding box, in units of the shape's radius.
EXTENTS = {"circle": 1.0, "square": 0.88, "ring": 1.0, "cross": 0.95}
KINDS = tuple(EXTENTS)
DIRECTIONS = ("right", "down and right", "down", "down and left", "left", "up and left", "up", "up and right")

# The same for all shapes, in units of the frame's shorter side. At 32x32 and 16 frames per second:
RADIUS = 0.22  # 7 pixels
SPEED = 0.15  # per second: 0.3 pixels per frame
EDGE = 2  # pixels over which a shape's edge fades: antialiased, and easier for small codecs


@dataclass(frozen=True)
class Shape:
    """A flat shape. Units are the frame's shorter side, and for velocity the shorter side per second; y points down."""

    kind: str
    colour: str
    radius: float
    position: tuple[float, ...]
    velocity: tuple[float, ...]


@dataclass(frozen=True)
class World:
    """What a drawn world has."""

    shapes: tuple[int, int] = (2, 3)  # fewest and most in a video
    kinds: tuple[str, ...] = KINDS
    colours: tuple[str, ...] = tuple(PALETTE)  # all shapes of a video differ in colour

    def validate(self) -> None:
        """Raises a one-line ValueError for an impossible world."""
        for name, values, known in (("kinds", self.kinds, KINDS), ("colours", self.colours, tuple(PALETTE))):
            wrong = [value for value in values if value not in known]
            if wrong or not values or len(set(values)) < len(values):
                raise ValueError(f"{name} {','.join(values)!r}: must be different ones of {', '.join(known)}")
        fewest, most = self.shapes
        if not 1 <= fewest <= most <= len(self.colours):
            raise ValueError(f"shapes {fewest}-{most}: must lie within 1-{len(self.colours)}, the number of colours")


def scene(seed: int, index: int, aspect: float = 1.0, world: World | None = None) -> list[Shape]:
    """The shapes of video `index`, front to back, at time 0. aspect = width / height."""
    world = world or World()
    rng = np.random.default_rng([seed, index])
    sides = max(aspect, 1.0), max(1 / aspect, 1.0)
    count = int(rng.integers(world.shapes[0], world.shapes[1] + 1))
    result = []
    for colour in rng.permutation(list(world.colours))[:count]:
        angle = rng.uniform(0, 2 * math.pi)
        result.append(
            Shape(
                kind=str(rng.choice(world.kinds)),
                colour=str(colour),
                radius=RADIUS,
                position=tuple(float(rng.uniform(RADIUS, side - RADIUS)) for side in sides),
                velocity=(SPEED * math.cos(angle), SPEED * math.sin(angle)),
            )
        )
    return result


def caption(shapes: list[Shape]) -> str:
    """A sentence that names the shapes, front to back, and their first directions."""

    def direction(shape: Shape) -> str:
        octant = round(math.atan2(shape.velocity[1], shape.velocity[0]) / (math.pi / 4)) % 8
        return DIRECTIONS[octant]

    return " in front of ".join(f"a {s.colour} {s.kind} moving {direction(s)}" for s in shapes)


def position(shape: Shape, time: float, world: tuple[float, float]) -> tuple[float, ...]:
    """Centre (x, y) at `time` seconds: straight lines folded at the borders, i.e. elastic bounces."""
    centre, half = [], EXTENTS[shape.kind] * shape.radius
    for start, velocity, side in zip(shape.position, shape.velocity, world):
        span = side - 2 * half
        travelled = (start - half + velocity * time) % (2 * span)
        centre.append(half + min(travelled, 2 * span - travelled))
    return tuple(centre)


def _distance(kind: str, x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    """Signed distance (negative inside) to a shape of outer radius r at the origin; x, y arrays, y down."""
    half = EXTENTS.get(kind, 0.0) * r
    if kind == "circle":
        return np.hypot(x, y) - half
    if kind == "square":
        return np.maximum(np.abs(x), np.abs(y)) - half
    if kind == "ring":
        return np.abs(np.hypot(x, y) - 0.72 * r) - 0.28 * r
    if kind == "cross":
        arm = 0.33 * r
        upright = np.maximum(np.abs(x) - arm, np.abs(y) - half)
        return np.minimum(upright, np.maximum(np.abs(x) - half, np.abs(y) - arm))
    raise ValueError(f"unknown shape {kind!r}, known: {', '.join(KINDS)}")


def render(shapes: list[Shape], frames: int, size: tuple[int, int], fps: float) -> Iterator[np.ndarray]:
    """Yields `frames` images, uint8 [H, W, 3], at times 0, 1 / fps, 2 / fps, and so on. `size` = (height, width)."""
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


@dataclass(frozen=True)
class DrawSettings:
    """The settings that a folder of videos is drawn with."""

    videos: int
    frames: int  # of each video
    size: tuple[int, int]  # (height, width) in pixels
    fps: float = 16
    seed: int = 0
    world: World = World()

    def validate(self) -> None:
        """Raises a one-line ValueError for invalid settings."""
        if self.videos < 1 or self.frames < 1 or self.fps <= 0:
            raise ValueError(f"videos {self.videos}, frames {self.frames} and fps {self.fps} must be positive")
        height, width = self.size
        if height % 2 or width % 2 or min(self.size) < 16:
            raise ValueError(f"size {height}x{width}: height and width must be even and at least 16")
        if self.seed < 0:
            raise ValueError(f"seed {self.seed}: must not be negative")
        self.world.validate()

    def record(self) -> dict:
        """The content of the folder's `draw.json`."""
        fps = int(self.fps) if self.fps == int(self.fps) else self.fps
        record = {"videos": self.videos, "frames": self.frames, "size": list(self.size), "fps": fps}
        world = {name: list(values) for name, values in vars(self.world).items()}
        return {**record, "seed": self.seed, **world}


def draw(out: str | Path, settings: DrawSettings) -> int:
    """Writes mp4 files with captions into the folder `out`. Existing ones are kept.

    Returns how many were written. Raises ValueError if `out` holds something else.
    """
    out = Path(out)
    settings.validate()
    begin_folder(out, settings.record(), "draw")
    height, width = settings.size
    paths = [out / f"video-{index:05d}.mp4" for index in range(settings.videos)]
    missing = [i for i, path in enumerate(paths) if not (path.is_file() and path.with_suffix(".txt").is_file())]
    for index in tqdm(missing, desc="draw", unit="video", disable=not missing):
        shapes = scene(settings.seed, index, width / height, settings.world)
        write_atomic(paths[index].with_suffix(".txt"), caption(shapes) + "\n")
        frames = render(shapes, settings.frames, settings.size, settings.fps)
        write_video(paths[index], frames, settings.fps, crf=10)
    return len(missing)


def parse_range(text: str) -> tuple[int, int]:
    """(fewest, most) from "2-3" or "2"."""
    fewest, _, most = text.partition("-")
    if not (fewest.isdigit() and (most or fewest).isdigit()):
        raise ValueError(f"shapes {text!r}: expected a range such as 2-3")
    return int(fewest), int(most or fewest)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="data_prep.draw", formatter_class=Help, description="Draws the demo's world as videos."
    )
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--videos", type=int, default=64, help="how many videos")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, default=5.0625, help="length of each, rounded to whole frames")
    length.add_argument("--frames", type=int, help="length of each in frames")
    parser.add_argument("--size", default="64x64", help="HEIGHTxWIDTH, even")
    parser.add_argument("--fps", type=float, default=16, help="frames per second")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other videos")
    parser.add_argument("--shapes", default="2-3", help="fewest and most shapes in a video")
    parser.add_argument("--kinds", default=",".join(KINDS), help="kinds of shapes")
    parser.add_argument("--colours", default=",".join(PALETTE), help="their colours")
    options = parser.parse_args(arguments)
    return run_command(lambda: draw_as_asked(options), GOES_ON)


def draw_as_asked(options: argparse.Namespace) -> None:
    """What the command line asks for. Prints a line on what was made."""
    require_finite(seconds=options.seconds, fps=options.fps)
    frames = round(options.seconds * options.fps) if options.frames is None else options.frames
    kinds, colours = tuple(options.kinds.split(",")), tuple(options.colours.split(","))
    world = World(parse_range(options.shapes), kinds, colours)
    settings = DrawSettings(options.videos, frames, parse_size(options.size), options.fps, options.seed, world)
    written = draw(options.out, settings)
    now = f"({written} drawn now)" if written else "exist already, nothing to do"
    print(f"{options.out}: {options.videos} videos of {frames} frames {now}")


if __name__ == "__main__":
    sys.exit(main())
