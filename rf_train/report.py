"""One self-contained page on one or more runs:  python -m rf_train.report RUN [RUN ...]

Loss by stage, quality by segment of the long videos, the runs side by side, and the videos themselves. Written to the first run's
`report.html`; plots are inline SVG, videos are inline mp4, and nothing is loaded from outside.
"""

import argparse
import base64
import html
import io
import json
import sys
from pathlib import Path

import numpy as np
import yaml

from rf_train import checkpoint, config
from rf_train.evaluate import FIGURES
from rf_train.metrics import read_metrics

COLOURS = ("#0b6bcb", "#c2410c", "#15803d", "#7e22ce", "#a16207", "#0e7490")

STYLE = """
:root { color-scheme: light; } body { font: 15px/1.5 system-ui, sans-serif; color: #1f2328; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #d8dee4; padding-bottom: .3rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #eaeef2; }
th:first-child, td:first-child { text-align: left; } .note { color: #57606a; } svg { max-width: 100%; height: auto; } figure { margin: 0; }
.clips { display: grid; gap: .6rem; align-items: start; margin-bottom: 1.4rem; } .clips video { width: 100%; image-rendering: pixelated; border-radius: 4px; background: #000; }
.clips figcaption { font-size: .85rem; } .dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .4em; }
"""


class RunRecord:
    """What a run's folder tells: recipe, metrics and, when it was evaluated, its evaluation."""

    def __init__(self, folder: str):
        self.folder = Path(folder)
        if not (self.folder / "recipe.yaml").is_file():
            raise ValueError(f"{folder}: not a run, it has no recipe.yaml")
        self.name = self.folder.resolve().name
        self.recipe = config.from_dict(yaml.safe_load((self.folder / "recipe.yaml").read_text()))
        self.rows = read_metrics(self.folder / "metrics.jsonl")
        if not self.rows:
            raise ValueError(f"{folder}: its metrics.jsonl holds no steps yet")
        self.rows = [row for row in self.rows if row["loss"] is not None]
        if not self.rows:
            raise ValueError(f"{folder}: its metrics.jsonl holds no step with a finite loss")
        path = self.folder / "evaluation" / "evaluation.json"
        self.evaluation = json.loads(path.read_text()) if path.is_file() else None


def smooth(values: list[float], width: int) -> np.ndarray:
    """Mean of the last `width` values (fewer at the start)."""
    total = np.cumsum(np.insert(np.asarray(values, dtype=float), 0, 0.0))
    end = np.arange(1, len(values) + 1)
    begin = np.maximum(end - width, 0)
    return (total[end] - total[begin]) / (end - begin)


def svg(figure) -> str:
    """A matplotlib figure as inline SVG, with text as paths' own fonts left to the page."""
    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight")
    return text.getvalue()[text.getvalue().index("<svg") :]


def loss_plot(runs: list[RunRecord]) -> str:
    figure, axes = _figure(10, 3.6)
    for run, colour in zip(runs, COLOURS):
        steps, loss = [row["step"] for row in run.rows], [row["loss"] for row in run.rows]
        axes.plot(steps, loss, color=colour, alpha=0.15, linewidth=0.7)
        for position, (stage, begin, end) in enumerate(stage_spans(run)):
            part = [(s, v) for s, v in zip(steps, loss) if begin < s <= end]
            if part:
                x, y = zip(*part)
                axes.plot(x, smooth(list(y), max(1, len(y) // 20)), color=colour, linewidth=1.8, label=run.name if position == _first_shown(run) else None)
    for stage, begin, end in stage_spans(runs[0]):
        axes.axvline(end, color="#8c959f", linewidth=0.7, linestyle=":")
        axes.text((begin + end) / 2, 1.01, stage.name.replace("_", " "), ha="center", va="bottom", fontsize=9, color="#57606a", transform=axes.get_xaxis_transform())
    high = np.percentile([row["loss"] for run in runs for row in run.rows], 98)
    axes.set(xlabel="step", ylabel="loss", ylim=(0, high * 1.05))
    axes.legend(frameon=False)
    return svg(figure)


def chunk_plot(runs: list[RunRecord]) -> str:
    """Loss and history error by chunk position, loss by noise level and the levels t_s, over the last fifth of each run's last stage."""
    figure, ((left, right), (by_t, levels)) = _figure(10, 6.0, columns=2, rows=2)
    for run, colour in zip(runs, COLOURS):
        last = [row for row in run.rows if row["stage"] == run.rows[-1]["stage"]]
        last = last[-max(1, len(last) // 5) :]
        for axes, key in ((left, "loss_by_chunk"), (right, "history_error_by_chunk")):
            mean = means([row[key] for row in last])
            axes.plot(np.arange(1, len(mean) + 1), mean, color=colour, marker="o", markersize=3, label=run.name)
        if "loss_by_t" in last[-1]:
            mean = means([row["loss_by_t"] for row in last])
            middle = (np.arange(len(mean)) + 0.5) / len(mean)
            by_t.plot(middle, mean, color=colour, marker="o", markersize=3)
            counts = np.sum([row["t_s_histogram"] for row in last], axis=0)
            if any(row["t_s"] for row in last):  # clean history has no level
                levels.stairs(counts * len(counts) / max(counts.sum(), 1), np.linspace(0, 1, len(counts) + 1), color=colour)
    left.set(xlabel="chunk", ylabel="loss", title="loss by chunk")
    right.set(xlabel="chunk", ylabel="rms of x\u0303 - x", title="how far training's history is from the truth")
    by_t.set(xlabel="noise level t", ylabel="loss", title="loss by noise level")
    levels.set(xlabel="t_s", ylabel="density", title="levels that history was resampled from")
    for axes in (left, right, by_t, levels):
        axes.set_ylim(0, 1.1 * max(axes.get_ylim()[1], 1e-3))
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
    right.legend(frameon=False)
    figure.tight_layout()
    return svg(figure)


def means(rows: list[list]) -> np.ndarray:
    """Means by position of rows of numbers, in which None is nothing measured."""
    with np.errstate(invalid="ignore"):
        values = np.array(rows, dtype=float)
        return np.nansum(values, axis=0) / np.isfinite(values).sum(axis=0)


def history_table(runs: list[RunRecord]) -> str:
    """How far the history that training reads is from what a fine solver would make, by chunk."""
    rows = []
    for run in runs:
        h = run.evaluation.get("history")
        if h:
            for key, text in (("solver", f"{h['solver_steps']} solver step(s) to {h['fine_solver_steps']}"), ("truth", f"{h['solver_steps']} step(s) to the truth"), ("truth_fine", f"{h['fine_solver_steps']} steps to the truth")):
                rows.append([f"{run.name}: {text}"] + [f"{value:.3f}" for value in h[key]])
    if not rows:
        return ""
    width = max(len(row) for row in rows)
    note = "<p>The history that training reads, made from held-out clips with the trained weights: root mean square distances by chunk.</p>"
    return note + _table(["x\u0303"] + [f"chunk {n}" for n in range(1, width)], [row + [""] * (width - len(row)) for row in rows])


def quality_plot(runs: list[RunRecord]) -> str:
    names = list(FIGURES)
    figure, grid = _figure(10, 5.2, columns=3, rows=2)
    for axes, name in zip(grid.flat, names):
        for position, (run, colour) in enumerate(zip(runs, COLOURS)):
            cells = run.evaluation["figures"][name]
            middle = [sum(span) / 2 for span in run.evaluation["segments_seconds"]]
            shift = 0.12 * (position - (len(runs) - 1) / 2)
            axes.errorbar([m + shift for m in middle], [c["mean"] for c in cells], [c["std"] for c in cells], color=colour, marker="o", markersize=4, capsize=3, label=run.name)
        axes.axvline(run.evaluation["trained_seconds"], color="#8c959f", linewidth=0.8, linestyle=":")
        if FIGURES[name][0] == "near 1":
            axes.axhline(1, color="#8c959f", linewidth=0.8)
        axes.set_title(f"{name.replace('_', ' ')} ({FIGURES[name][0]})", fontsize=10)
        axes.set_xlabel("seconds")
    for axes in list(grid.flat)[len(names) :]:
        axes.axis("off")
        axes.legend(*grid.flat[0].get_legend_handles_labels(), frameon=False, loc="center")
    figure.tight_layout()
    return svg(figure)


def _figure(width: float, height: float, columns: int = 1, rows: int = 1):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "rf_train", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(rows, columns)


def stage_spans(run: RunRecord) -> list[tuple[config.Stage, int, int]]:
    """(stage, steps before it, steps at its end)."""
    spans, done = [], 0
    for stage in run.recipe.stages:
        spans.append((stage, done, done + stage.steps))
        done += stage.steps
    return spans


def _first_shown(run: RunRecord) -> int:
    first = run.rows[0]["step"]
    return next(position for position, (_, _, end) in enumerate(stage_spans(run)) if first <= end)


def stage_table(run: RunRecord) -> str:
    rows = []
    for stage, begin, end in stage_spans(run):
        part = [row for row in run.rows if begin < row["step"] <= end]
        if not part:
            rows.append([stage.name, stage.history, stage.attention, f"{begin + 1}-{end}", "from the run it starts from" if run.recipe.start.run else "not run yet", "", "", ""])
            continue
        tenth = max(1, len(part) // 10)
        mean = lambda rows, key: float(np.mean([row[key] for row in rows]))
        rows.append([
            stage.name, stage.history, stage.attention + (f" k={stage.k}" if stage.attention == "routed" else ""), f"{part[0]['step']}-{part[-1]['step']}",
            f"{mean(part[:tenth], 'loss'):.4f} \u2192 {mean(part[-tenth:], 'loss'):.4f}", f"{np.median([row['samples_per_s'] for row in part]):.1f}",
            f"{100 * mean(part, 'rollout_share'):.0f} %", f"{sum(row['seconds'] for row in part) / 60:.1f} min",
        ])  # fmt: skip
    return _table(["stage", "history", "attention", "steps", "loss, first and last tenth", "samples/s", "rollout's share", "time"], rows)


def quality_table(runs: list[RunRecord]) -> str:
    heads = [f"{begin:.1f}\u2013{end:.1f} s" for begin, end in runs[0].evaluation["segments_seconds"]]
    rows = []
    for name, (better, _) in FIGURES.items():
        for run in runs:
            cells = run.evaluation["figures"][name]
            rows.append([f"{name.replace('_', ' ')} ({better}): {run.name}"] + [f"{c['mean']:.3f} \u00b1 {c['std']:.3f}" for c in cells])
    return _table(["figure"] + heads, rows)


def _table(heads: list[str], rows: list[list[str]]) -> str:
    line = lambda tag, cells: "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"
    return "<table>" + line("th", heads) + "".join(line("td", row) for row in rows) + "</table>"


def video_tag(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<video controls loop muted autoplay playsinline src="data:video/mp4;base64,{data}"></video>'


def clip_grid(runs: list[RunRecord]) -> str:
    """A row a clip: the truth, then each run's continuation."""
    first, parts = runs[0], []
    for position, row in enumerate(first.evaluation["rows"]):
        if "video" not in row:
            continue
        cells = [("truth", first.folder / "evaluation" / row["truth"])]
        for run in runs:
            other = run.evaluation["rows"][position] if position < len(run.evaluation["rows"]) else {}
            if other.get("clip") == row["clip"] and "video" in other:
                cells.append((run.name, run.folder / "evaluation" / other["video"]))
        figures = "".join(f"<figure>{video_tag(path)}<figcaption>{html.escape(name)}</figcaption></figure>" for name, path in cells if path.is_file())
        parts.append(f'<p class="note">{html.escape(row["caption"] or row["clip"])}</p><div class="clips" style="grid-template-columns: repeat({len(cells)}, minmax(0, 260px))">{figures}</div>')
    return "".join(parts)


def extra_videos(run: RunRecord) -> str:
    """The mp4s that stand in RUN/videos, made with rf_train.generate."""
    paths = sorted((run.folder / "videos").glob("*.mp4"))
    figures = "".join(f"<figure>{video_tag(path)}<figcaption>{html.escape(path.stem)}</figcaption></figure>" for path in paths)
    return f'<h2>Generated by {html.escape(run.name)}</h2><div class="clips" style="grid-template-columns: repeat(4, minmax(0, 260px))">{figures}</div>' if paths else ""


def page(runs: list[RunRecord]) -> str:
    model = runs[0].recipe.model
    evaluated = [run for run in runs if run.evaluation]
    parts = [
        f"<h1>{html.escape(' and '.join(run.name for run in runs))}</h1>",
        f'<p class="note">Resampling Forcing. Model: {model.layers} layers of width {model.dim}, {model.heads} heads, chunks of {model.chunk} latent frames. '
        "A clip's loss is the mean squared error of the velocity over its chunks.</p>",
        "<h2>Training</h2>", loss_plot(runs),
    ]  # fmt: skip
    for run, colour in zip(runs, COLOURS):
        origin = f", from step {run.recipe.start.step or 'the last'} of {run.recipe.start.run}" if run.recipe.start.run else ""
        parts.append(f'<h3><span class="dot" style="background:{colour}"></span>{html.escape(run.name + origin)}</h3>{stage_table(run)}')
    parts.append(chunk_plot(runs))
    comparable = [run for run in evaluated if run.evaluation["segments_seconds"] == evaluated[0].evaluation["segments_seconds"]]
    if comparable:
        e = comparable[0].evaluation
        parts += [
            "<h2>Quality over long videos</h2>",
            f"<p>{e['clips']} held-out clips, continued from their first {e['given_seconds']:.2f} s; trained on clips of {e['trained_seconds']:.2f} s (dotted). "
            "Mean ± standard deviation over clips.</p>",
            quality_plot(comparable), quality_table(comparable),
            "<ul>" + "".join(f"<li><b>{name.replace('_', ' ')}</b>: {html.escape(text)}.</li>" for name, (_, text) in FIGURES.items()) + "</ul>",
            history_table(comparable), "<h2>The videos</h2>", clip_grid(comparable),
        ]  # fmt: skip
    for run in evaluated:
        if run not in comparable:
            parts.append(f"<p>{html.escape(run.name)} was evaluated on other segments and isn't compared here.</p>")
    parts += [extra_videos(run) for run in runs]
    title = html.escape("rf_train: " + ", ".join(run.name for run in runs))
    return f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head><body>{"".join(parts)}</body></html>\n'


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="rf_train.report", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--out", help="the page to write (default: report.html in the first run)")
    options = parser.parse_args(arguments)
    try:
        runs = [RunRecord(folder) for folder in options.runs]
        out = Path(options.out or Path(options.runs[0]) / "report.html")
        checkpoint.write_text(out, page(runs))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{out}: {out.stat().st_size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
