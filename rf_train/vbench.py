"""VBench by segment:  python -m rf_train.vbench cut VIDEOS OUT,  then VBench itself,  then  ... table OUT [OUT ...]

`cut` takes the folder that rf_train.generate --prompts made. It cuts every video into segments of 5 s, and names them
as the package `vbench` reads them:

    OUT/0-5s/PROMPT-INDEX.mp4     a folder per segment; INDEX counts the videos of a prompt from 0
    OUT/scores/0-5s/*.json        where the commands that `cut` prints let VBench write its results
    OUT/cut.json                  the job that made the videos, and the names of the segments

`table` makes a table like the paper's Table 1 from the results. VBench needs an environment of its own: see
rf_train/evaluation/README.md.
"""

import argparse
import json
import math
import re
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_prep.command import Help, counted, require_finite, run_command
from data_prep.files import write_json
from data_prep.video import frame_rate, read_frames, write_video
from rf_train.generation.many import JOB
from rf_train.generation.prompts import read_prompts

CUT = "cut.json"
# The three columns of the table, each the mean of these dimensions of VBench.
COLUMNS = {
    "temporal": (
        "subject_consistency", "background_consistency", "temporal_flickering", "motion_smoothness", "dynamic_degree",
    ),
    "visual": ("aesthetic_quality", "imaging_quality"),
    "text": ("overall_consistency",),
}  # fmt: skip
DIMENSIONS = [dimension for column in COLUMNS.values() for dimension in column]
CRF = 10  # of a segment; the videos have 16, and the second loss must not show


def segment_name(number: int, seconds: float) -> str:
    """The folder of a segment: such as "5-10s"."""
    return f"{number * seconds:g}-{(number + 1) * seconds:g}s"


# ---- cutting


def read_job(videos: Path) -> dict[str, Any]:
    """The job.json of a folder of videos. Raises ValueError when there is none, or when not all videos are there."""
    path = videos / JOB
    if not path.is_file():
        raise ValueError(f"{videos}: has no {JOB}; make it with rf_train.generate RUN {videos} --prompts FILE")
    found = _read_json(path)
    try:
        job: dict[str, Any] = {
            "settings": dict(found["settings"]),
            "videos": [dict(video) for video in found["videos"]],
        }
        prompts, samples = job["settings"]["prompts"], job["settings"]["samples"]
        known = all(Path(video["file"]).name == video["file"] for video in job["videos"])
        known = known and len(job["videos"]) == len(prompts) * samples > 0
    except (KeyError, TypeError, ValueError):
        known = False
    if not known:
        raise ValueError(f"{path}: not as rf_train.generate writes it")
    missing = [video["file"] for video in job["videos"] if not (videos / video["file"]).is_file()]
    if missing:
        there = f"{len(missing)} of {counted(len(job['videos']), 'video')} are missing, such as {missing[0]}"
        raise ValueError(f"{videos}: {there}; give rf_train.generate's command again")
    return job


def vbench_names(prompts: list[str], samples: int) -> list[str]:
    """PROMPT-INDEX.mp4 for each video, in a job's order. Raises ValueError for a prompt that can't be a file's name."""
    for number, prompt in enumerate(prompts, start=1):
        if (
            not isinstance(prompt, str)
            or "/" in prompt
            or "\0" in prompt
            or len(f"{prompt}-{samples}.mp4".encode()) > 240
        ):
            why = "VBench takes the prompt from the file's name: at most 240 bytes, and no slash"
            raise ValueError(f"prompt {number}, {str(prompt)[:60]!r}: {why}; give short ones with --names FILE")
    return [f"{prompt}-{index}.mp4" for prompt in prompts for index in range(samples)]


def cut(options: argparse.Namespace) -> str:
    """Cuts a folder of videos. Returns what to do next. What is there already is not made again."""
    videos, out, seconds = Path(options.videos), Path(options.out), options.seconds
    require_finite(seconds=seconds)
    if seconds < 0.1:
        raise ValueError(f"--seconds {seconds}: must be at least 0.1")
    if not re.fullmatch(r"[\w./+-]+", str(out), re.ASCII):
        raise ValueError(f"{out}: VBench gives its paths to a shell; choose one of letters, digits and ._/+- only")
    job = read_job(videos)
    prompts = read_prompts(options.names) if options.names else job["settings"]["prompts"]
    if len(prompts) != len(job["settings"]["prompts"]):
        wanted = counted(len(job["settings"]["prompts"]), "prompt")
        raise ValueError(f"{options.names}: {counted(len(prompts), 'prompt')}, the videos were made from {wanted}")
    names = vbench_names(prompts, job["settings"]["samples"])
    segments: list[str] = []
    for name, video in zip(names, tqdm(job["videos"], unit="video", desc="cut")):
        found = cut_video(videos / video["file"], out, name, seconds)
        if not found or (segments and found != segments):
            whole = f"{counted(len(found), 'whole segment')} of {seconds:g} s"
            first = f", the first video has {len(segments)}" if segments else ""
            raise ValueError(f"{videos / video['file']}: has {whole}{first}")
        segments = found
        if name == names[0]:
            begin(out, {"job": job, "segment_seconds": seconds, "segments": segments, "names": names})
    return f"{out}: {counted(len(names), 'video')} in {counted(len(segments), 'segment')}. Score each:\n" + "\n".join(
        vbench_command(out, segment) for segment in segments
    )


def cut_video(video: Path, out: Path, name: str, seconds: float) -> list[str]:
    """Writes a video's whole segments as OUT/SEGMENT/NAME. A remainder is left out. Returns the segments' names."""
    fps = frame_rate(video)
    found: list[str] = []
    pixels: list[np.ndarray] = []
    for number, frame in enumerate(read_frames(video, fps), start=1):
        pixels.append(frame)
        if number < round((len(found) + 1) * Fraction(seconds) * fps):
            continue
        path = out / segment_name(len(found), seconds) / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_video(path, pixels, fps, CRF)
        found.append(path.parent.name)
        pixels = []
    return found


def begin(out: Path, request: dict[str, Any]) -> None:
    """Writes cut.json. Raises ValueError when it is there with another content: segments of two jobs don't mix."""
    path = out / CUT
    if not path.exists():
        write_json(path, request)
    elif _read_json(path) != json.loads(json.dumps(request)):
        raise ValueError(f"{out}: holds segments of other videos; choose another folder")


def vbench_command(out: Path, segment: str) -> str:
    """VBench's own command for a segment."""
    paths = f"--videos_path {out / segment} --output_path {out / 'scores' / segment}"
    return f'vbench evaluate --mode custom_input {paths} --dimension "{" ".join(DIMENSIONS)}"'


# ---- the table


def read_cut(out: Path) -> dict[str, Any]:
    """cut.json. Raises ValueError when `out` was not made by `cut`."""
    path = out / CUT
    if not path.is_file():
        raise ValueError(f"{out}: has no {CUT}; make it with rf_train.vbench cut VIDEOS {out}")
    found = _read_json(path)
    known = isinstance(found, dict) and all(
        isinstance(found.get(key), list) and found[key] and all(isinstance(one, str) for one in found[key])
        for key in ("segments", "names")
    )
    if not known or any(Path(one).name != one for one in found["segments"]):
        raise ValueError(f"{path}: not as rf_train.vbench cut writes it")
    return found


def read_scores(folder: Path, names: list[str]) -> dict[str, float]:
    """{dimension: VBench's score} of a segment, from all its result files in `folder`.

    Raises a one-line ValueError when a dimension of the table is missing or there twice, when a file is not as VBench
    writes it, and when not exactly the videos `names` were scored.
    """
    scores: dict[str, float] = {}
    for path in sorted(folder.glob("*_eval_results.json")):
        found = _read_json(path)
        if not isinstance(found, dict):
            raise ValueError(f"{path}: not as VBench writes it: expected a mapping")
        for dimension in [name for name in DIMENSIONS if name in found]:
            if dimension in scores:
                raise ValueError(f"{path}: {dimension} is in another file beside it, too; remove one of them")
            scores[dimension] = _score(found[dimension], names, f"{path}: {dimension}")
    missing = [dimension for dimension in DIMENSIONS if dimension not in scores]
    if missing:
        raise ValueError(f"{folder}: VBench's results have no {', '.join(missing)}; give the commands of `cut` again")
    return scores


def _score(found: Any, names: list[str], where: str) -> float:
    """The mean score of a dimension: VBench writes [mean, [{"video_path", "video_results"} of each video]]."""
    try:
        mean, rows = found
        scored = sorted(Path(row["video_path"]).name for row in rows)
    except (TypeError, ValueError, KeyError):
        raise ValueError(f"{where}: not as VBench writes it: expected a mean and a list of videos") from None
    if isinstance(mean, bool) or not isinstance(mean, (int, float)) or not -1 <= mean <= 1 or math.isnan(mean):
        raise ValueError(f"{where}: its mean {str(mean)[:40]} is not a score in [-1, 1]")
    if scored != sorted(names):
        counts = f"{counted(len(scored), 'video')} scored, of {counted(len(names), 'video')} that were cut"
        other = sorted(set(names) ^ set(scored))
        raise ValueError(f"{where}: {counts}" + (f"; not in both: {other[0]!r}" if other else "") + "; score again")
    return float(mean)


def table(outs: list[str]) -> str:
    """The table as Markdown, in percent: a row per folder; then each dimension by itself."""
    found = {}
    for out in map(Path, outs):
        made = read_cut(out)
        found[out] = {name: read_scores(out / "scores" / name, made["names"]) for name in made["segments"]}
    segments = list(found[Path(outs[0])])
    if any(list(scores) != segments for scores in found.values()):
        raise ValueError("the folders have different segments; give one table for each")
    heads = [segment.replace("-", "–").replace("s", " s") for segment in segments]
    lines = ["| temporal / visual / text | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for out, scores in found.items():
        cells = [" / ".join(f"{100 * of_column(scores[name], column):.2f}" for column in COLUMNS) for name in segments]
        lines.append(f"| {out.resolve().name} | " + " | ".join(cells) + " |")
    lines += ["", "| dimension | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for dimension in DIMENSIONS:
        for out, scores in found.items():
            label = f"{dimension}: {out.resolve().name}" if len(found) > 1 else dimension
            lines.append(
                f"| {label} | " + " | ".join(f"{100 * scores[name][dimension]:.2f}" for name in segments) + " |"
            )
    return "\n".join(lines)


def of_column(scores: dict[str, float], column: str) -> float:
    """The mean of a column's dimensions."""
    return sum(scores[dimension] for dimension in COLUMNS[column]) / len(COLUMNS[column])


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({str(error)[:80]})") from None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="rf_train.vbench", description="VBench by segment of long videos.")
    commands = parser.add_subparsers(dest="command", required=True)
    cutting = commands.add_parser(
        "cut", formatter_class=Help, help="cuts generated videos into segments, named as VBench reads them"
    )
    cutting.add_argument("videos", help="the folder that rf_train.generate --prompts made")
    cutting.add_argument("out")
    cutting.add_argument("--seconds", type=float, default=5.0, help="length of a segment")
    cutting.add_argument(
        "--names", help="a file of prompts to name the segments after, if the videos were made from longer versions"
    )
    showing = commands.add_parser("table", help="the table of VBench's results")
    showing.add_argument("out", nargs="+", help="folders that `cut` made, with VBench's results in their scores/")
    options = parser.parse_args(arguments)
    return run_command(lambda: print(cut(options) if options.command == "cut" else table(options.out)))


if __name__ == "__main__":
    sys.exit(main())
