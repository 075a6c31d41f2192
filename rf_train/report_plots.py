"""The report's figures, as inline SVG: losses, metrics of training, quality by segment, histories, routing."""

import html
from typing import Any

import numpy as np

from data_prep.pages import GREY, new_figure, svg
from rf_train.evaluation.video_metrics import VIDEO_METRICS, VideoMetric
from rf_train.metrics import METRICS, Metric
from rf_train.report_data import RunRecord


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
    steps = [row["step"] for run in runs for row in run.rows]
    axes.set_xlim(min(steps) - 1, max(steps))
    for stage, begin, end in runs[0].recipe.stage_spans:
        if end < min(steps) or begin >= max(steps):
            continue
        axes.axvline(end, color=GREY, linewidth=0.7, linestyle=":")
        name, place = stage.name.replace("_", " "), {"ha": "center", "va": "bottom"}
        transform = axes.get_xaxis_transform()
        middle = (max(begin, min(steps)) + min(end, max(steps))) / 2
        axes.text(middle, 1.01, name, fontsize=9, color="#57606a", transform=transform, **place)
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
    figure, grid = new_figure(10, 2.3 * rows, columns, rows)
    for axes, metric in zip(grid.flat, metrics):
        for run in runs:
            cells = run.evaluation["metrics"][metric.name]
            middle = [sum(span) / 2 for span in run.evaluation["segments_seconds"]]
            mean, std = (np.array([np.nan if c[key] is None else c[key] for c in cells]) for key in ("mean", "std"))
            axes.plot(middle, mean, color=run.colour, marker="o", markersize=3, label=run.label)
            axes.fill_between(middle, mean - std, mean + std, color=run.colour, alpha=0.12, linewidth=0)
        axes.axvline(runs[0].evaluation["trained_seconds"], color=GREY, linewidth=0.8, linestyle=":")
        if metric.better.startswith("near"):
            axes.axhline(float(metric.better.split()[1]), color=GREY, linewidth=0.8)
        axes.set_title(f"{metric.title} ({metric.better})", fontsize=10)
    for axes in grid[-1]:
        axes.set_xlabel("seconds")
    for axes in list(grid.flat)[len(metrics) :]:
        axes.axis("off")
    return with_legend_above(figure, grid)


def history_plot(runs: list[RunRecord]) -> str:
    """How far a self-resampled history is from what a fine solver would make, and from the truth, by chunk."""
    figure, ((to_fine, to_truth),) = new_figure(10, 2.8, 2)
    for run in runs:
        history = run.evaluation.get("history")
        if not history:
            continue
        chunks = range(1, len(history["solver"]) + 1)
        style = {"color": run.colour, "marker": "o", "markersize": 3}
        to_fine.plot(chunks, history["solver"], label=run.label, **style)
        to_truth.plot(chunks, history["truth"], label=run.label, **style)
        to_truth.plot(chunks, history["truth_fine"], "--", color=run.colour, linewidth=1)
    for axes, title in ((to_fine, "to the fine solver's history"), (to_truth, "to the truth (dashed: the fine one's)")):
        axes.set(title=title, xlabel="chunk", ylabel="rms distance")
        axes.set_ylim(0, None)
        axes.xaxis.get_major_locator().set_params(integer=True)
    to_fine.legend(frameon=False)
    figure.tight_layout()
    return svg(figure)


def routing_plot(routed: list[tuple[RunRecord, dict]]) -> str:
    """Which chunks routing chose: by distance for all runs, and by layer and head for each."""
    figure, ((curve, *maps),) = new_figure(10, 2.8, 1 + len(routed))
    for (run, found), axes in zip(routed, maps):
        distances = range(1, len(found["by_distance"]) + 1)
        curve.plot(distances, found["by_distance"], color=run.colour, marker="o", markersize=2.5, label=run.label)
        image = axes.imshow(found["mean_distance"], aspect="auto", cmap="viridis")
        axes.set(title=f"mean distance, {run.label}", xlabel="head", ylabel="layer")
        axes.locator_params(integer=True)
        figure.colorbar(image, ax=axes, label="chunks")
    curve.set(title="share of queries that chose it", xlabel="distance in chunks", ylim=(0, 1))
    curve.legend(frameon=False)
    figure.tight_layout()
    return svg(figure)


def with_legend_above(figure: Any, grid: Any) -> str:
    figure.tight_layout()
    entries = grid.flat[0].get_legend_handles_labels()
    figure.legend(*entries, frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return svg(figure)
