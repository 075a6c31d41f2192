"""The first lines of a report: what came out, to be read in ten seconds."""

import html

import numpy as np

from data_prep.pages import html_table
from rf_train.evaluation.statistics import as_text
from rf_train.evaluation.video_metrics import VIDEO_METRICS, VideoMetric
from rf_train.report_data import RunRecord

# What is told first, if it was measured: content, movement, picture.
FIRST = ("shape_kept", "goes_straight", "speed", "colour_drift", "sharpness")


def headline(runs: list[RunRecord], comparable: list[RunRecord]) -> str:
    """A box: whether each run's long videos hold, the first and the last segment in numbers, how far it is trained."""
    lines = [f"<p>{dot(run)}<b>{html.escape(sentence(run))}</b></p>" for run in comparable]
    if comparable:
        segments = comparable[0].evaluation["segments_seconds"]
        first, last = (f"{begin:.1f}–{end:.1f} s" for begin, end in (segments[0], segments[-1]))
        metrics = [metric for metric in told_first(comparable[0]) if all(metric in told_first(r) for r in comparable)]
        rows = [[f"{m.title} ({m.better})", *(cell for run in comparable for cell in cells(run, m))] for m in metrics]
        heads = [head for run in comparable for head in (f"{run.name}: {first}", last, "change")]
        worse = {n for n, row in enumerate(rows) if "worse" in row}
        lines.append(html_table([f"mean over {len(comparable[0].evaluation['rows'])} videos", *heads], rows, worse))
        about = "Worse or better: the change per segment differs from 0 with 95 % confidence (bootstrap over clips)."
        lines.append(f'<p class="note">{about}</p>')
    else:
        command = f"python -m rf_train.evaluate RUN{' --prompts FILE' if runs[0].of_prompts else ''}"
        lines.append(f"<p>Not evaluated yet: <code>{command}</code> adds quality and videos.</p>")
    lines += [f'<p class="note">{dot(run)}{html.escape(trained(run))}</p>' for run in runs]
    return f'<div class="headline">{"".join(lines)}</div>'


def told_first(run: RunRecord) -> list[VideoMetric]:
    """The metrics of `FIRST` that were measured."""
    return [metric for metric in VIDEO_METRICS if metric.name in FIRST and metric.name in run.evaluation["metrics"]]


def dot(run: RunRecord) -> str:
    return f'<span class="dot" style="background:{run.colour}"></span>'


def trained(run: RunRecord) -> str:
    """Such as "demo: 2400 of 2400 steps; loss 0.138 in the first tenth of self_resampling, 0.083 in its last"."""
    stage = run.rows[-1]["stage"]
    rows = [row for row in run.rows if row["stage"] == stage]
    tenth = max(1, len(rows) // 10)
    begin, end = (float(np.mean([row["loss"] for row in part])) for part in (rows[:tenth], rows[-tenth:]))
    steps = f"{run.rows[-1]['step']} of {run.recipe.steps} steps"
    return f"{run.name}: {steps}; loss {begin:.3f} in the first tenth of {stage}, {end:.3f} in its last"


def sentence(run: RunRecord) -> str:
    """What changes along the videos, in one line."""
    found = {metric.title: verdict(run, metric) for metric in told_first(run)}
    if not any(found.values()):
        return f"{run.name}: too few segments or clips to say whether its videos hold"
    length = run.evaluation["segments_seconds"][-1][1] / run.evaluation["trained_seconds"]
    worse, better = ([name for name, said in found.items() if said == word] for word in ("worse", "better"))
    change = f"{', '.join(worse)} gets worse" if worse else f"none of these {len(found)} measures gets clearly worse"
    gain = f"; {', '.join(better)} gets better" if better else ""
    return f"{run.name}, up to {length:.1f} times its trained length: {change}{gain}"


def cells(run: RunRecord, metric: VideoMetric) -> list[str]:
    measured = run.evaluation["metrics"][metric.name]
    return [as_text(measured[0]["mean"]), as_text(measured[-1]["mean"]), verdict(run, metric)]


def verdict(run: RunRecord, metric: VideoMetric) -> str:
    """ "worse", "better" or "no clear change": the change per segment is outside of its 95 % interval's noise, or not.

    "" when it was not measured in two segments.
    """
    change, values = run.evaluation["slopes"][metric.name], run.evaluation["metrics"][metric.name]
    known = [cell["mean"] for cell in values if cell["mean"] is not None]
    if change["low"] is None or change["high"] is None or len(known) < 2:
        return ""
    if change["low"] <= 0 <= change["high"]:
        return "no clear change"
    if metric.better.startswith("near"):
        best = float(metric.better.split()[1])
        return "worse" if abs(known[-1] - best) > abs(known[0] - best) else "better"
    return "better" if (change["low"] > 0) == (metric.better == "higher") else "worse"
