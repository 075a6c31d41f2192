"""One self-contained page on one or more runs:  python -m rf_train.report RUN [RUN ...]

Loss by stage, quality by segment of the long videos, the runs side by side, and the videos themselves. Written to the
first run's `report.html`. Plots are inline SVG, videos are inline mp4, and nothing is loaded from outside. With
--picture FILE.png it also writes one picture of frames of the videos, side by side.
"""

import argparse
import base64
import html
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep.command import run_command
from data_prep.files import write_atomic
from data_prep.pages import COLOURS, GREY, html_page, html_table, new_figure, svg
from data_prep.video import read_frames
from rf_train import config
from rf_train.evaluation.statistics import as_text
from rf_train.evaluation.video_metrics import VIDEO_METRICS, VideoMetric
from rf_train.metrics import METRICS, Metric
from rf_train.report_data import RunRecord

# ---- plots


def smooth(values: list[float], width: int) -> np.ndarray:
    """Mean of the last `width` values (fewer at the start)."""
    total = np.cumsum(np.insert(np.asarray(values, dtype=float), 0, 0.0))
    end = np.arange(1, len(values) + 1)
    begin = np.maximum(end - width, 0)
    return (total[end] - total[begin]) / (end - begin)


def means(rows: list[list]) -> np.ndarray:
    """The means over rows, by position. None means not measured."""
    with np.errstate(invalid="ignore"):
        values = np.array(rows, dtype=float)
        return np.nansum(values, axis=0) / np.isfinite(values).sum(axis=0)


def loss_plot(runs: list[RunRecord]) -> str:
    figure, ((axes,),) = new_figure(10, 3.6)
    for run in runs:
        steps, loss = [row["step"] for row in run.rows], [row["loss"] for row in run.rows]
        axes.plot(steps, loss, color=run.colour, alpha=0.15, linewidth=0.7)
        label: str | None = run.label
        for _, begin, end in run.recipe.stage_spans:
            rows = run.rows_between(begin, end)
            if rows:
                smoothed = smooth([row["loss"] for row in rows], max(1, len(rows) // 20))
                axes.plot([row["step"] for row in rows], smoothed, color=run.colour, linewidth=1.8, label=label)
                label = None
    for stage, begin, end in runs[0].recipe.stage_spans:
        axes.axvline(end, color=GREY, linewidth=0.7, linestyle=":")
        name, place = stage.name.replace("_", " "), {"ha": "center", "va": "bottom"}
        transform = axes.get_xaxis_transform()
        axes.text((begin + end) / 2, 1.01, name, fontsize=9, color="#57606a", transform=transform, **place)
    high = np.percentile([row["loss"] for run in runs for row in run.rows], 98)
    axes.set(xlabel="step", ylabel="loss", ylim=(0, high * 1.05))
    axes.legend(frameon=False)
    return svg(figure)


def metric_plots(runs: list[RunRecord]) -> str:
    """Every step metric that has a plot, over the last fifth of each run's last stage."""
    drawn = [metric for metric in METRICS if metric.plot is not None]
    columns = 2
    count = -(-len(drawn) // columns)
    figure, grid = new_figure(10, 3 * count, columns, count)
    for axes, metric in zip(grid.flat, drawn):
        draw_metric(axes, metric, runs)
    for axes in grid.flat[len(drawn) :]:
        axes.axis("off")
    grid.flat[0].legend(frameon=False)
    figure.tight_layout()
    return svg(figure)


def draw_metric(axes: Any, metric: Metric, runs: list[RunRecord]) -> None:
    plot = metric.plot
    assert plot is not None
    for run in runs:
        rows = [row[metric.name] for row in run.last_rows if row.get(metric.name)]
        if not rows:
            continue
        if plot.style == "density":
            counts = np.sum(rows, axis=0)
            if counts.sum():
                edges = np.linspace(0, 1, len(counts) + 1)
                axes.stairs(counts * len(counts) / counts.sum(), edges, color=run.colour, label=run.label)
            continue
        mean = means(rows)
        x = np.arange(1, len(mean) + 1) if plot.x == "chunk" else (np.arange(len(mean)) + 0.5) / len(mean)
        axes.plot(x, mean, color=run.colour, marker="o", markersize=3, label=run.label)
    if plot.x == "chunk":
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel=plot.x, ylabel=plot.y, title=plot.title)
    axes.set_ylim(0, 1.1 * max(axes.get_ylim()[1], 1e-3))


def measured(runs: list[RunRecord]) -> list[VideoMetric]:
    """The metrics that were measured in every run."""
    return [metric for metric in VIDEO_METRICS if all(metric.name in run.evaluation["metrics"] for run in runs)]


def progress_plot(runs: list[RunRecord]) -> str:
    """The evaluations during training: each metric over the steps, in the first segment and in the last one."""
    found = {run.name: [row for row in run.rows if row.get("evaluation")] for run in runs}
    metrics = [m for m in VIDEO_METRICS if any(m.name in row["evaluation"] for rows in found.values() for row in rows)]
    if not metrics:
        return ""
    columns = 4
    count = -(-len(metrics) // columns)
    figure, grid = new_figure(10, 2 * count, columns, count)
    for axes, metric in zip(grid.flat, metrics):
        for run in runs:
            points = [(row["step"], row["evaluation"].get(metric.name)) for row in found[run.name]]
            for segment, style in ((0, "--"), (-1, "-")):
                values = [np.nan if not cells or cells[segment] is None else cells[segment] for _, cells in points]
                label = f"{run.label}, {'last' if segment else 'first'} segment"
                steps = [step for step, _ in points]
                axes.plot(steps, values, style, color=run.colour, marker="o", markersize=2, linewidth=1, label=label)
        axes.set_title(metric.title, fontsize=9)
        axes.tick_params(labelsize=7)
    for axes in list(grid.flat)[len(metrics) :]:
        axes.axis("off")
    figure.tight_layout()
    entries = grid.flat[0].get_legend_handles_labels()
    figure.legend(*entries, frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    clips = max(row["evaluation"]["clips"] for rows in found.values() for row in rows)
    explained = f"On {clips} held-out clips, with the average of the weights, over the steps."
    return f"<h3>Quality during training</h3><p>{html.escape(explained)}</p>{svg(figure)}"


def quality_plot(runs: list[RunRecord]) -> str:
    metrics, columns = measured(runs), 3
    rows = -(-len(metrics) // columns)
    figure, grid = new_figure(10, 2.6 * rows, columns, rows)
    for axes, metric in zip(grid.flat, metrics):
        for position, run in enumerate(runs):
            cells = run.evaluation["metrics"][metric.name]
            shift = 0.12 * (position - (len(runs) - 1) / 2)
            middle = [sum(span) / 2 + shift for span in run.evaluation["segments_seconds"]]
            mean, std = ([np.nan if c[key] is None else c[key] for c in cells] for key in ("mean", "std"))
            style = {"marker": "o", "markersize": 4, "capsize": 3, "label": run.label}
            axes.errorbar(middle, mean, std, color=run.colour, **style)
        axes.axvline(run.evaluation["trained_seconds"], color=GREY, linewidth=0.8, linestyle=":")
        if metric.better.startswith("near"):
            axes.axhline(float(metric.better.split()[1]), color=GREY, linewidth=0.8)
        axes.set_title(f"{metric.title} ({metric.better})", fontsize=10)
        axes.set_xlabel("seconds")
    for axes in list(grid.flat)[len(metrics) :]:
        axes.axis("off")
    figure.tight_layout()
    entries = grid.flat[0].get_legend_handles_labels()
    figure.legend(*entries, frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return svg(figure)


def routing_section(runs: list[RunRecord]) -> str:
    """Which chunks routing chose in the evaluation: by distance, and by layer and head; "" without routing."""
    routed = [(run, run.evaluation["routing"]) for run in runs if run.evaluation.get("routing")]
    if not routed:
        return ""
    figure, ((curve, *maps),) = new_figure(10, 2.8, 1 + len(routed))
    for (run, found), axes in zip(routed, maps):
        distances = range(1, len(found["by_distance"]) + 1)
        curve.plot(distances, found["by_distance"], color=run.colour, marker="o", markersize=2.5, label=run.label)
        image = axes.imshow(found["mean_distance"], aspect="auto", cmap="viridis")
        axes.set(title=f"mean distance, {run.label}", xlabel="head", ylabel="layer")
        axes.locator_params(integer=True)
        figure.colorbar(image, ax=axes)
    curve.set(title="share of queries that chose it", xlabel="distance in chunks", ylim=(0, 1))
    curve.legend(frameon=False)
    figure.tight_layout()
    heads = ["run", "first chunk", "entropy of a head's choices over distances, nats"]
    rows = [[run.name, as_text(found["first_chunk"]), as_text(found["entropy"])] for run, found in routed]
    about = "Counted while the videos were made, of the queries that could choose the chunk."
    return f"<h2>Which chunks routing chooses</h2><p>{about}</p>{svg(figure)}{html_table(heads, rows)}"


# ---- tables


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


def history_table(runs: list[RunRecord]) -> str:
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
    made = "Self-resampled history, made from held-out clips with the trained weights: "
    return f"<p>{made}root mean square distances by chunk.</p>" + html_table(heads, padded)


# ---- videos


def video_tag(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<video controls loop muted autoplay playsinline src="data:video/mp4;base64,{data}"></video>'


def clip_rows(runs: list[RunRecord]) -> list[tuple[str, list[tuple[str, Path]]]]:
    """For each clip whose video was kept: its caption, and [(name, video)] of the truth and of each run."""
    first, found = runs[0], []
    for position, row in enumerate(first.evaluation["rows"]):
        if "video" not in row:
            continue
        videos = [("truth", first.evaluation_video(row.get("truth")))]
        for run in runs:
            rows = run.evaluation["rows"]
            other = rows[position] if position < len(rows) else {}
            if other.get("clip") == row["clip"] and "video" in other:
                videos.append((run.name, run.evaluation_video(other["video"])))
        found.append((row["caption"] or row["clip"], [(name, path) for name, path in videos if path.is_file()]))
    return found


def grid_of(videos: list[tuple[str, Path]], columns: int) -> str:
    cells = [f"<figure>{video_tag(path)}<figcaption>{html.escape(name)}</figcaption></figure>" for name, path in videos]
    style = f"grid-template-columns: repeat({columns}, minmax(0, 260px))"
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
    loss = "A clip's loss is the mean squared error of the velocity over its chunks."
    parts = [
        f"<h1>{html.escape(' and '.join(run.name for run in runs))}</h1>",
        f'<p class="note">Resampling Forcing. Model: {shape}. {loss}</p>',
        "<h2>Training</h2>",
        loss_plot(runs),
    ]
    for run in runs:
        start = run.recipe.start
        origin = f", from step {start.step or 'the last'} of {start.run}" if start.run else ""
        dot = f'<span class="dot" style="background:{run.colour}"></span>'
        parts.append(f"<h3>{dot}{html.escape(run.name + origin)}</h3>{stage_table(run)}")
    parts.append(metric_plots(runs))
    parts.append(progress_plot(runs))
    comparable = comparable_runs(runs)
    if comparable:
        parts += quality_section(comparable)
    for run in runs:
        if run.evaluation and run not in comparable:
            parts.append(f"<p>{html.escape(run.name)} was evaluated on other segments and isn't compared here.</p>")
    parts += [extra_videos(run) for run in runs]
    return html_page("rf_train: " + ", ".join(run.name for run in runs), "".join(parts))


def comparable_runs(runs: list[RunRecord]) -> list[RunRecord]:
    """The runs that were evaluated on the same segments as the first evaluated one."""
    evaluated = [run for run in runs if run.evaluation]
    segments = evaluated[0].evaluation["segments_seconds"] if evaluated else None
    return [run for run in evaluated if run.evaluation["segments_seconds"] == segments]


def quality_section(runs: list[RunRecord]) -> list[str]:
    first = runs[0].evaluation
    given, trained = f"{first['given_seconds']:.2f} s", f"{first['trained_seconds']:.2f} s"
    clips = (
        f"{first['clips']} held-out clips, continued from their first {given}; trained on clips of {trained} (dotted)."
    )
    explained = "".join(f"<li><b>{metric.title}</b>: {html.escape(metric.meaning)}.</li>" for metric in measured(runs))
    frechet = (
        "squared Frechet distance between the latents of all generated and of all true clips, and their changes from "
        "frame to frame, taken as Gaussian"
    )
    explained += f"<li><b>Frechet distance</b>: {frechet}.</li>"
    return [
        "<h2>Quality over long videos</h2>",
        f"<p>{html.escape(clips)} Mean ± standard deviation over clips.</p>",
        quality_plot(runs),
        quality_table(runs),
        f"<ul>{explained}</ul>",
        history_table(runs),
        routing_section(runs),
        "<h2>The videos</h2>",
        clip_grid(runs),
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="rf_train.report", description="One self-contained page on one or more runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--out", help="the page to write (default: report.html in the first run)")
    parser.add_argument("--picture", metavar="FILE.png", help="also write frames of the videos side by side")
    options = parser.parse_args(arguments)
    return run_command(lambda: report_as_asked(options))


def report_as_asked(options: argparse.Namespace) -> None:
    """Writes what the command line asks for. Prints a line about it."""
    runs = [RunRecord(folder, COLOURS[i % len(COLOURS)]) for i, folder in enumerate(options.runs)]
    out = Path(options.out or Path(options.runs[0]) / "report.html")
    write_atomic(out, page(runs))
    if options.picture:
        picture(comparable_runs(runs)).save(options.picture)
    print(f"{out}: {out.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    sys.exit(main())
