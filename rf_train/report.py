"""One self-contained page on one or more runs:  python -m rf_train.report RUN [RUN ...]

In short what came out, the videos by segment, quality by segment, history, routing, training. Written to the first
run's `report.html`. Plots are inline SVG, videos are inline mp4, and nothing is loaded from outside. With
--picture FILE.png it also writes one picture of frames of the videos, side by side.
"""

import argparse
import base64
import html
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.command import run_command
from data_prep.files import write_atomic
from data_prep.pages import COLOURS, html_page, html_table
from data_prep.video import read_frames, write_video
from rf_train import config
from rf_train.evaluation.results import CLIPS, PROMPTS
from rf_train.evaluation.statistics import as_text
from rf_train.report_data import RunRecord
from rf_train.report_headline import headline
from rf_train.report_plots import (
    history_plot,
    loss_plot,
    measured,
    metric_plots,
    progress_plot,
    quality_plot,
    routing_plot,
)

STYLE = """
.headline { background: #f6f8fa; border: 1px solid #d8dee4; border-radius: 6px; padding: .6rem 1rem; margin: 1rem 0; }
.headline p { margin: .3rem 0; } td { white-space: nowrap; } details { margin: .6rem 0; overflow-x: auto; }
table { display: block; overflow-x: auto; }
summary { cursor: pointer; color: #0b6bcb; } .wide td, .wide th { padding: .2rem .5rem; font-size: .8rem; }
"""
SHOWN_SEGMENTS = 4  # of a clip, side by side: the first, the last, and some between

# ---- parts with tables


def routing_section(runs: list[RunRecord]) -> str:
    """Which chunks routing chose in the evaluation; "" without routing."""
    routed = [(run, run.evaluation["routing"]) for run in runs if run.evaluation.get("routing")]
    if not routed:
        return ""
    heads = ["run", "queries that chose the first chunk", "entropy of a head's choices over distances, nats"]
    rows = []
    for run, found in routed:
        most = f"{as_text(found['entropy'])} of at most {as_text(float(np.log(max(1, len(found['by_distance'])))))}"
        rows.append([run.name, as_text(found["first_chunk"]), most])
    about = (
        "Counted while the videos were made, of the queries that could choose the chunk. A head that chooses every "
        "distance equally often has the highest entropy."
    )
    return f"<h2>Which chunks routing chooses</h2><p>{about}</p>{routing_plot(routed)}{html_table(heads, rows)}"


def stage_table(run: RunRecord) -> str:
    rows = []
    for stage, begin, end in run.recipe.stage_spans:
        part = run.rows_between(begin, end)
        kinds = [stage.name, stage.history.label, describe_attention(stage)]
        if not part:
            reason = "done in the run it starts from" if run.recipe.start.run else "not run yet"
            rows.append([*kinds, f"{begin + 1}-{end}", reason, "", "", ""])
            continue
        tenth = max(1, len(part) // 10)
        first, last = (float(np.mean([row["loss"] for row in some])) for some in (part[:tenth], part[-tenth:]))
        speed = float(np.median([row["samples_per_s"] for row in part]))
        rollout = float(np.mean([row["rollout_share"] for row in part]))
        rows.append([
            *kinds,
            f"{part[0]['step']}-{part[-1]['step']}",
            f"{first:.4f} → {last:.4f}",
            f"{speed:.1f}",
            f"{100 * rollout:.0f} %",
            f"{sum(row['seconds'] for row in part) / 60:.1f} min",
        ])  # fmt: skip
    loss = "loss, first and last tenth"
    heads = ["stage", "history", "attention", "steps", loss, "samples/s", "rollout's share", "time"]
    return html_table(heads, rows)


def describe_attention(stage: config.Stage) -> str:
    """The kind and its settings, but those that are 0: such as "routed (top_k 5)"."""
    settings = ", ".join(f"{name} {value}" for name, value in vars(stage.attention).items() if value)
    return f"{stage.attention.kind} ({settings})" if settings else stage.attention.kind


def quality_table(runs: list[RunRecord]) -> str:
    heads = [f"{begin:.1f}–{end:.1f} s" for begin, end in runs[0].evaluation["segments_seconds"]]
    rows = []
    for metric in measured(runs):
        for run in runs:
            cells, slope = run.evaluation["metrics"][metric.name], run.evaluation["slopes"][metric.name]
            by_segment = [f"{as_text(cell['mean'])} ± {as_text(cell['std'])}" for cell in cells]
            change = f"{as_text(slope['slope'])} ({as_text(slope['low'])}, {as_text(slope['high'])})"
            rows.append([f"{metric.title} ({metric.better}): {run.name}", *by_segment, change])
    for run in runs:
        distances = [as_text(value) for value in run.evaluation["frechet"]]
        rows.append([f"Frechet distance (lower): {run.name}", *distances, ""])
    return html_table(["metric", *heads, "change per segment (95 % interval)"], rows)


def history_section(runs: list[RunRecord]) -> str:
    """How far a self-resampled history is from what a fine solver would make, by chunk."""
    rows = []
    for run in runs:
        history = run.evaluation.get("history")
        if not history:
            continue
        steps, fine = history["solver_steps"], history["fine_solver_steps"]
        titles = {
            "solver": f"{steps} solver step(s) to {fine}",
            "truth": f"{steps} step(s) to the truth",
            "truth_fine": f"{fine} steps to the truth",
        }
        for key, title in titles.items():
            rows.append([f"{run.name}: {title}", *(f"{value:.3f}" for value in history[key])])
    if not rows:
        return ""
    width = max(len(row) for row in rows)
    heads = ["x\u0303", *(f"chunk {n}" for n in range(1, width))]
    padded = [row + [""] * (width - len(row)) for row in rows]
    made = "Self-resampled history, made from held-out clips with the trained weights: rms distances by chunk."
    return f"<h2>History</h2><p>{made}</p>{history_plot(runs)}{folded('As a table', html_table(heads, padded))}"


def folded(title: str, content: str) -> str:
    """Content that is opened with a click."""
    return f'<details class="wide"><summary>{html.escape(title)}</summary>{content}</details>'


# ---- videos


def video_tag(mp4: Path | bytes) -> str:
    data = base64.b64encode(mp4 if isinstance(mp4, bytes) else mp4.read_bytes()).decode()
    return f'<video controls loop muted autoplay playsinline src="data:video/mp4;base64,{data}"></video>'


def clip_rows(runs: list[RunRecord]) -> list[tuple[str, list[tuple[str, Path]]]]:
    """For each clip or prompt whose video was kept: its text, and [(name, video)] of the truth and of each run."""
    first, found = runs[0], []
    for position, row in enumerate(first.evaluation["rows"]):
        if "video" not in row:
            continue
        videos = [("truth", first.evaluation_video(row["truth"]))] if "truth" in row else []
        for run in runs:
            rows = run.evaluation["rows"]
            other = rows[position] if position < len(rows) else {}
            if all(other.get(key) == row.get(key) for key in ("clip", "prompt", "sample")) and "video" in other:
                videos.append((run.name, run.evaluation_video(other["video"])))
        text = row.get("caption") or row.get("clip") or row["prompt"]
        found.append((text, [(name, path) for name, path in videos if path.is_file()]))
    return found


def segments_side_by_side(runs: list[RunRecord]) -> str:
    """The first clip's segments: a row for the truth and for each run, a column per segment; "" without videos."""
    spans = runs[0].evaluation["segments_seconds"]
    fps = runs[0].evaluation["fps"]
    shown = sorted({round(n) for n in np.linspace(0, len(spans) - 1, min(SHOWN_SEGMENTS, len(spans)))})
    rows = []
    for _, videos in clip_rows(runs)[:1]:
        for name, path in videos:
            frames = list(read_frames(path, fps))
            parts = [frames[round(spans[n][0] * fps) : round(spans[n][1] * fps)] for n in shown]
            titles = [f"{name}, {spans[n][0]:.1f}–{spans[n][1]:.1f} s" for n in shown]
            rows.append([(title, encoded(part, fps)) for title, part in zip(titles, parts) if part])
    return "".join(grid_of(row, len(shown), 180) for row in rows)


def encoded(frames: list[np.ndarray], fps: float) -> bytes:
    """An mp4 of frames, uint8 [H, W, 3]."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part.mp4"
        write_video(path, frames, fps)
        return path.read_bytes()


def grid_of(videos: Sequence[tuple[str, Path | bytes]], columns: int, width: int = 260) -> str:
    cells = [f"<figure>{video_tag(mp4)}<figcaption>{html.escape(name)}</figcaption></figure>" for name, mp4 in videos]
    style = f"grid-template-columns: repeat({columns}, minmax(0, {width}px))"
    return f'<div class="clips" style="{style}">{"".join(cells)}</div>'


def clip_grid(runs: list[RunRecord]) -> str:
    """A row per clip: the truth, then each run's continuation."""
    rows = clip_rows(runs)
    return "".join(f'<p class="note">{html.escape(text)}</p>{grid_of(videos, len(videos))}' for text, videos in rows)


def extra_videos(run: RunRecord) -> str:
    """The mp4s in RUN/videos, made with rf_train.generate."""
    videos = [(path.stem, run.video(path)) for path in sorted((run.folder / "videos").glob("*.mp4"))]
    return f"<h2>Generated by {html.escape(run.name)}</h2>{grid_of(videos, 4)}" if videos else ""


def picture(runs: list[RunRecord], clips: int = 2, columns: int = 8, scale: int = 2) -> Image.Image:
    """Frames of the first clips side by side: a row for the truth and for each run, columns evenly over time."""
    rows = []
    if not runs:
        raise ValueError("--picture: no run has been evaluated yet; run rf_train.evaluate first")
    for _, videos in clip_rows(runs)[:clips]:
        for _, path in videos:
            fps = runs[0].evaluation["fps"]
            frames = list(read_frames(path, fps))
            chosen = [frames[round(i)] for i in np.linspace(0, len(frames) - 1, columns)]
            rows.append(np.concatenate([np.pad(frame, ((1, 1), (1, 1), (0, 0))) for frame in chosen], axis=1))
    if not rows:
        raise ValueError(f"{runs[0].folder}: its evaluation kept no videos for a picture")
    sheet = np.concatenate(rows, axis=0)
    return Image.fromarray(sheet.repeat(scale, axis=0).repeat(scale, axis=1))


# ---- the page


def page(runs: list[RunRecord]) -> str:
    model = runs[0].recipe.model
    shape = f"{model.layers} layers of width {model.dim}, {model.heads} heads, chunks of {model.chunk} latent frames"
    comparable = comparable_runs(runs)
    parts = [
        f"<h1>{html.escape(' and '.join(run.name for run in runs))}</h1>",
        f'<p class="note">Resampling Forcing. Model: {shape}.</p>',
        headline(runs, comparable),
    ]
    if comparable:
        parts += quality_section(comparable)
    for run in runs:
        if run.evaluation and run not in comparable:
            parts.append(f"<p>{html.escape(run.name)} was evaluated on other segments and isn't compared here.</p>")
    parts += training_section(runs)
    parts += [extra_videos(run) for run in runs]
    return html_page("rf_train: " + ", ".join(run.name for run in runs), "".join(parts), STYLE)


def training_section(runs: list[RunRecord]) -> list[str]:
    loss = "A clip's loss is the mean squared error of the velocity over its chunks."
    parts = [f"<h2>Training</h2><p>{loss}</p>", loss_plot(runs)]
    for run in runs:
        start = run.recipe.start
        origin = f", from step {start.step or 'the last'} of {start.run}" if start.run else ""
        dot = f'<span class="dot" style="background:{run.colour}"></span>'
        parts.append(f"<h3>{dot}{html.escape(run.name + origin)}</h3>{stage_table(run)}")
    return [*parts, metric_plots(runs), progress_plot(runs)]


def comparable_runs(runs: list[RunRecord]) -> list[RunRecord]:
    """The runs that were evaluated on the same segments as the first evaluated one."""
    evaluated = [run for run in runs if run.evaluation]
    segments = evaluated[0].evaluation["segments_seconds"] if evaluated else None
    return [run for run in evaluated if run.evaluation["segments_seconds"] == segments]


def quality_section(runs: list[RunRecord]) -> list[str]:
    first = runs[0].evaluation
    given, trained = f"{first['given_seconds']:.2f} s", f"{first['trained_seconds']:.2f} s"
    if runs[0].of_prompts:
        shown, other = "The first video by segment, then whole videos.", "of their first segment"
        measured_on = f"{len(first['rows'])} videos made from prompts alone"
    else:
        shown = "The first clip by segment, then whole clips: the truth, and what each run made of its first frames."
        other = "of all true clips"
        measured_on = f"{first['clips']} held-out clips, continued from their first {given}"
    about = f"{measured_on}; trained on clips of {trained} (dotted). Lines are means, bands one standard deviation."
    explained = "".join(f"<li><b>{metric.title}</b>: {html.escape(metric.meaning)}.</li>" for metric in measured(runs))
    frechet = (
        f"squared Frechet distance between the latents of all generated videos and those {other}, and their changes "
        "from frame to frame, taken as Gaussian"
    )
    explained += f"<li><b>Frechet distance</b>: {frechet}.</li>"
    table = quality_table(runs) + f"<ul>{explained}</ul>"
    return [
        "<h2>The videos</h2>",
        f"<p>{shown}</p>",
        segments_side_by_side(runs),
        clip_grid(runs),
        "<h2>Quality over long videos</h2>",
        f"<p>{html.escape(about)}</p>",
        quality_plot(runs),
        folded("All numbers, and what the metrics mean", table),
        history_section(runs),
        routing_section(runs),
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="rf_train.report", description="One self-contained page on one or more runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--prompts", action="store_true", help="show what `rf_train.evaluate --prompts` found")
    parser.add_argument("--out", help="the page to write (default: report.html, or prompts.html, in the first run)")
    parser.add_argument("--picture", metavar="FILE.png", help="also write frames of the videos side by side")
    options = parser.parse_args(arguments)
    return run_command(lambda: report_as_asked(options))


def report_as_asked(options: argparse.Namespace) -> None:
    """Writes what the command line asks for. Prints a line about it."""
    evaluated = PROMPTS if options.prompts else CLIPS
    runs = [RunRecord(folder, COLOURS[i % len(COLOURS)], evaluated) for i, folder in enumerate(options.runs)]
    out = Path(options.out or Path(options.runs[0]) / ("prompts.html" if options.prompts else "report.html"))
    write_atomic(out, page(runs))
    if options.picture:
        picture(comparable_runs(runs)).save(options.picture)
    print(f"{out}: {out.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    sys.exit(main())
