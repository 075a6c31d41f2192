"""Cuts small windows out of real videos: a world for small models.

    python -m data_prep.windows VIDEOS OUT --size 32x32 --frames 41 --clips 1024 --held-out-frames 173

writes OUT/train and OUT/held_out: H.264 mp4 files, with captions if the videos have some. A window is a part of the
picture, reduced to `--size`, at a random place. The held-out windows are of the last part of each video, and a gap as
long as a training clip is before it: so no picture is in both, nor the next one to it. Other places of the same seconds
would show the same things. No window goes over a scene cut.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_prep.command import GOES_ON, Help, counted, one_line, require_finite, run_command
from data_prep.cuts import THRESHOLD, mark_cuts
from data_prep.files import begin_folder, write_atomic
from data_prep.geometry import parse_size
from data_prep.places import Remote
from data_prep.rows import SUFFIXES, Row, fingerprints
from data_prep.sources import list_source
from data_prep.video import VideoError, picture_size, read_frames, write_video

PARTS = ("train", "held_out")


@dataclass(frozen=True)
class WindowSettings:
    """What is cut out of the videos."""

    size: tuple[int, int] = (32, 32)  # (height, width) in pixels
    share: float = 0.75  # of the picture's height or width, the larger of the two
    fps: float = 16
    frames: int = 41  # of a training window
    clips: int = 1024  # training windows
    held_out_frames: int = 173
    held_out_clips: int = 16
    held_out: float = 0.3  # share of each video, at its end
    seed: int = 0

    def validate(self) -> None:
        """Raises a one-line ValueError for invalid settings."""
        if self.size[0] % 2 or self.size[1] % 2 or min(self.size) < 16:
            raise ValueError(f"size {self.size[0]}x{self.size[1]}: height and width must be even and at least 16")
        if not (0 < self.share <= 1 and 0 < self.held_out < 1):
            raise ValueError(f"share {self.share} and held-out {self.held_out}: shares between 0 and 1")
        if not 0.01 <= self.fps <= 1000:
            raise ValueError(f"fps {self.fps}: must be from 0.01 to 1000")
        for name in ("frames", "clips", "held_out_frames", "held_out_clips"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.replace('_', ' ')} must be at least 1, not {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"seed {self.seed}: must not be negative")


@dataclass(frozen=True)
class Film:
    """A video as windows are cut out of it: reduced, so that a window has as many pixels as it is written with."""

    row: Row
    frames: np.ndarray  # uint8 [T, H, W, 3]
    scenes: np.ndarray  # int [T]: the number of each frame's scene

    def starts(self, begin: int, end: int, length: int) -> np.ndarray:
        """int [n]: where a window of `length` frames can begin, within [begin, end) and a single scene."""
        first = np.arange(begin, end - length + 1)
        return first[self.scenes[first] == self.scenes[first + length - 1]]


@dataclass(frozen=True)
class Window:
    """Where a window is: frames and pixels of a film."""

    film: Film
    start: int
    top: int
    left: int
    mirrored: bool

    def cut(self, length: int, size: tuple[int, int]) -> np.ndarray:
        """uint8 [length, H, W, 3]."""
        height, width = size
        rows, columns = slice(self.top, self.top + height), slice(self.left, self.left + width)
        found = self.film.frames[self.start : self.start + length, rows, columns]
        return found[:, :, ::-1] if self.mirrored else found


def read_film(row: Row, settings: WindowSettings) -> Film:
    """Reads a video, reduced. Raises ValueError when it can't be read.

    All its frames are kept in memory, about 10 KiB each for 32x32 windows. What is whole before a
    damage counts.
    """
    if isinstance(row.path, Remote):
        raise ValueError(f"{row.source}: windows are cut out of local videos only; copy it here")
    height, width = picture_size(row.video)
    scale = max(settings.size[0] / height, settings.size[1] / width) / settings.share
    reduced = max(settings.size[0], round(height * scale)), max(settings.size[1], round(width * scale))
    frames, scenes = [], [0]
    try:
        for frame, cut in mark_cuts(read_frames(row.video, settings.fps, reduced, row.start, row.end), THRESHOLD):
            frames.append(frame)
            scenes.append(scenes[-1] + cut)
    except VideoError as error:
        print(f"{one_line(error)}; what is before it is used", file=sys.stderr)
    return Film(row, np.stack(frames) if frames else np.empty((0, *reduced, 3), np.uint8), np.array(scenes[1:]))


def read_films(rows: list[Row], settings: WindowSettings) -> list[Film]:
    """Reads the videos. Those that can't be read have a line on the terminal each."""
    films = []
    for row in tqdm(rows, desc="read", unit="video"):
        try:
            if row.trouble:
                raise ValueError(f"{row.source}: {row.trouble.detail}")
            films.append(read_film(row, settings))
        except ValueError as error:
            print(f"{one_line(error)}; left out", file=sys.stderr)
    return films


def held_out_from(film: Film, settings: WindowSettings) -> int:
    """The first frame of the held-out part; the video's end if no window fits behind it."""
    count = len(film.frames)
    begin = round(count * (1 - settings.held_out))
    return begin if len(film.starts(begin, count, settings.held_out_frames)) else count


def windows(films: list[Film], part: str, settings: WindowSettings) -> Iterator[Window]:
    """The windows of a part, in order; they are the same for the same videos, settings and seed.

    Training windows are at random times and places, and half of them are mirrored. Held-out ones are evenly spread over
    time, at random places, as they are. Raises ValueError if no window fits.
    """
    training = part == "train"
    length = settings.frames if training else settings.held_out_frames
    places: list[tuple[Film, int]] = []
    for film in films:
        count, begin = len(film.frames), held_out_from(film, settings)
        # Without a held-out part all of the video is for training; else it ends a gap before that part.
        span = (begin, count) if not training else (0, begin if begin == count else begin - settings.frames)
        places += [(film, int(start)) for start in film.starts(*span, length)]
    if not places:
        longest = max((len(film.frames) for film in films), default=0)
        seconds = (settings.frames * 2 if training else settings.held_out_frames / settings.held_out) / settings.fps
        raise ValueError(
            f"no {part.replace('_', '-')} window of {length} frames fits: the longest video has {longest} frames at "
            f"{settings.fps:g} fps; give one of at least {seconds:.0f} s without a cut, or shorter windows"
        )
    count = settings.clips if training else settings.held_out_clips
    for index in range(count):
        rng = np.random.default_rng([settings.seed, PARTS.index(part), index])
        chosen = int(rng.integers(len(places))) if training else round(index * (len(places) - 1) / max(1, count - 1))
        film, start = places[chosen]
        room = [there - own for there, own in zip(film.frames.shape[1:3], settings.size)]
        top, left = (int(rng.integers(most + 1)) for most in room)
        yield Window(film, start, top, left, training and bool(rng.integers(2)))


def write_windows(source: str | Path, out: str | Path, settings: WindowSettings) -> int:
    """Writes OUT/train and OUT/held_out. Existing windows are kept. Returns how many were written.

    Raises ValueError for a source or settings that can't be used, and if `out` holds something else.
    """
    settings.validate()
    source, out = Path(source), Path(out)
    single = source.is_file() and source.suffix.lower() in SUFFIXES
    rows = [Row(0, source, source.name, "")] if single else list_source(source)
    record = {**asdict(settings), "size": list(settings.size), **fingerprints(rows)}
    if out.exists():
        begin_folder(out, record, "windows")
    names = {part: [out / part / f"window-{i:05d}" for i in range(count)] for part, count in counts(settings).items()}
    missing = {part: [not name.with_suffix(".mp4").is_file() for name in found] for part, found in names.items()}
    if not any(map(any, missing.values())):
        return 0
    films = read_films(rows, settings)
    chosen = {part: list(windows(films, part, settings)) for part in reversed(PARTS)}
    begin_folder(out, record, "windows")  # nothing is written before it is known that windows fit
    for part, found in chosen.items():
        (out / part).mkdir(exist_ok=True)
        length = settings.frames if part == "train" else settings.held_out_frames
        for window, name, wanted in tqdm(list(zip(found, names[part], missing[part])), desc=part, unit="window"):
            if wanted:
                if window.film.row.caption:
                    write_atomic(name.with_suffix(".txt"), window.film.row.caption + "\n")
                write_video(name.with_suffix(".mp4"), window.cut(length, settings.size), settings.fps, crf=10)
    return sum(map(sum, missing.values()))


def counts(settings: WindowSettings) -> dict[str, int]:
    """How many windows each part has."""
    return dict(zip(PARTS, (settings.clips, settings.held_out_clips)))


def main(arguments: list[str] | None = None) -> int:
    usual = WindowSettings()
    parser = argparse.ArgumentParser(
        prog="data_prep.windows", formatter_class=Help, description="Cuts small windows out of real videos."
    )
    add = parser.add_argument
    add("source", metavar="VIDEOS", help="a video, a folder of videos or a manifest")
    add("out", help="folder to write")
    add("--size", default="32x32", help="HEIGHTxWIDTH of a window, even")
    add("--share", type=float, default=usual.share, help="its side over the picture's")
    add("--fps", type=float, default=usual.fps, help="frames per second")
    add("--frames", type=int, default=usual.frames, help="frames of a clip to train on")
    add("--clips", type=int, default=usual.clips, help="clips to train on")
    add("--held-out-frames", type=int, default=usual.held_out_frames, help="frames of a clip to evaluate on")
    add("--held-out-clips", type=int, default=usual.held_out_clips, help="clips to evaluate on")
    add("--held-out", type=float, default=usual.held_out, help="share of each video, at its end")
    add("--seed", type=int, default=usual.seed, help="another seed cuts other windows")
    options = parser.parse_args(arguments)
    return run_command(lambda: cut_as_asked(options), GOES_ON)


def cut_as_asked(options: argparse.Namespace) -> None:
    """What the command line asks for. Prints a line on what was made."""
    require_finite(share=options.share, fps=options.fps, held_out=options.held_out)
    chosen = {key: value for key, value in vars(options).items() if key not in ("source", "out")}
    settings = WindowSettings(**{**chosen, "size": parse_size(options.size)})
    written = write_windows(options.source, options.out, settings)
    now = f"({written} cut now)" if written else "exist already, nothing to do"
    print(f"{options.out}: {counted(settings.clips, 'window')} and {settings.held_out_clips} held out {now}")


if __name__ == "__main__":
    sys.exit(main())
