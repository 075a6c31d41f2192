"""What finished runs gave: `results.json`, and the page and curves that are made of it."""

import io
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from data_prep.files import locked, write_atomic, write_json
from data_prep.pages import COLOURS, new_figure
from rf_train import config
from rf_train.evaluation.statistics import mean_and_std
from rf_train.evaluation.video_metrics import GENERAL_METRICS, VIDEO_METRICS
from rf_train.evidence.experiments import Arm, Experiment, Plan, what_is_trained
from rf_train.run_log import read_rows

SHOWN = ("shape_kept", "objects_kept", "speed", "goes_straight", "bounces", "sharpness", "frechet")
SHOWN_OF_REAL_VIDEO = (*(metric.name for metric in GENERAL_METRICS), "frechet")
BETTER = {metric.name: metric.better for metric in VIDEO_METRICS} | {"frechet": "lower"}

REQUIRED = {
    "identity",
    "metrics",
    "history",
    "segments_seconds",
    "steps",
    "tflop",
    "minutes",
    "versions",
    "training",
    "evaluation",
}

Record = dict  # of one run: see `record_of`
Records = dict[str, dict[str, Record]]  # {arm: {seed: record}}


def read_records(path: Path) -> Records:
    """The finished runs of a results.json; none without the file. Raises ValueError for a file that isn't right."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
        runs = {arm: dict(seeds) for arm, seeds in found.items()}
        for record in (record for seeds in runs.values() for record in seeds.values()):
            check_record(record)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not the results of this version ({error}); move it away") from None
    return runs


def check_record(record: Record) -> None:
    """Raises ValueError when a record lacks something, or holds something else."""
    missing = REQUIRED - record.keys()
    if missing or "frechet" not in record["metrics"]:
        raise ValueError(f"a record without {', '.join(sorted(missing)) or 'frechet'}")
    lists = [*record["metrics"].values(), record["segments_seconds"]]
    if not all(isinstance(one, list) and one for one in lists) or not isinstance(record["history"], dict | None):
        raise ValueError("a record whose lists are empty or no lists")


def record_of(plan: Plan, arm: Arm, seed: int) -> Record:
    """What is kept of a run that was trained and evaluated, as plain JSON.

    "metrics": {name: mean over clips, by segment}. "minutes": of its own steps, without what it starts from. "tflop":
    10^12 FLOP, with what it starts from. Raises ValueError when the run has not taken the plan's steps.
    """
    folder = plan.folder(arm.name, seed)
    found, steps = json.loads((folder / "evaluation" / "evaluation.json").read_text()), plan.recipe(arm).steps
    if found["step"] != steps:
        raise ValueError(f"{folder}: trained for {found['step']} steps, not {steps}: from another plan; move it away")
    metrics = {name: [cell["mean"] for cell in cells] for name, cells in found["metrics"].items()}
    return {
        "identity": plan.identity(arm, seed),
        "metrics": {**metrics, "frechet": found["frechet"]},
        "history": found["history"],
        "segments_seconds": found["segments_seconds"],
        "clips": found["clips"],
        "steps": found["step"],
        "tflop": plan.tflop(arm),
        "minutes": sum(row["seconds"] for row in read_rows(folder / "metrics.jsonl")) / 60,
        "versions": {name: version(name) for name in ("torch", "deepspeed")},
        "training": plan.training(arm, seed),
        "evaluation": plan.evaluation(arm, seed),
    }


def add_record(plan: Plan, arm: Arm, seed: int, record: Record) -> Records:
    """Adds a record to the results, and writes the page. Several processes may do so at once. Returns all records."""
    path = plan.out / "results.json"
    with locked(path.with_suffix(".lock")):
        records = read_records(path)
        records.setdefault(arm.name, {})[str(seed)] = record
        write_json(path, records)
        write_page(plan, records)
    return records


def check_same_plan(plan: Plan, arm: Arm, seed: int, record: Record) -> None:
    """Raises ValueError when a record is of a run with other settings than the plan's."""
    try:
        same = completed(record["identity"]) == completed(plan.identity(arm, seed))
    except (ValueError, KeyError, TypeError, AttributeError):  # settings that this version doesn't have
        same = False
    if not same:
        found = f"{plan.out / 'results.json'}: {arm.name}, seed {seed}, was run with other settings"
        raise ValueError(f"{found}; take it out of the file, or use another --out")


def completed(identity: dict) -> dict:
    """With settings that are newer than the record: they had their defaults."""
    recipes = {key: identity[key] and what_is_trained(config.from_dict(identity[key])) for key in ("recipe", "start")}
    return {**identity, **recipes}


# ---- the page


def write_page(plan: Plan, records: Records) -> Path:
    """Writes `results.md`, and a picture of curves for each experiment that has results, beside results.json."""
    parts = [
        "# Results",
        "Written by `python -m rf_train.evidence`. Segments are as long as a training clip. Each number is "
        "the mean over seeds of the mean over clips, and the standard deviation over seeds; a number alone is one "
        "seed. An experiment is shown when most of its arms have been run. The metrics are explained in "
        "[evaluation](../evaluation/README.md).",
    ]
    for experiment in plan.evidence.experiments:
        arms = [plan.evidence.arm[name] for name in experiment.arms if records.get(name)]
        if len(arms) < 2 or 2 * len(arms) <= len(experiment.arms):
            continue
        write_atomic(plan.out / f"{experiment.name}.png", curves(arms, records))
        parts += experiment_parts(plan, experiment, arms, records)
    if plan.quick:
        parts.insert(1, "**A quick run: it shows that everything runs. Its numbers mean nothing.**")
    page = plan.out / "results.md"
    write_atomic(page, "\n\n".join(parts) + "\n")
    return page


def experiment_parts(plan: Plan, experiment: Experiment, arms: list[Arm], records: Records) -> list[str]:
    """The paragraphs and tables of one experiment, in Markdown. `arms`: those that have been run."""
    seeds = {arm.name: sorted(records[arm.name], key=int) for arm in arms}
    rows = []
    for arm in arms:
        some = list(records[arm.name].values())
        minutes = f"{mean_and_std([one['minutes'] for one in some])[0]:.0f}"
        settings = ", ".join(arm.settings) or f"recipe {arm.recipe}"
        start = f"from {arm.start}'s first stage" if arm.start else "whole"
        numbers = [", ".join(seeds[arm.name]), str(some[0]["steps"]), f"{some[0]['tflop']:.0f}", minutes]
        rows.append([arm.title, *numbers, start, f"`{settings}`"])
    missing = [plan.evidence.arm[name].title for name in experiment.arms if not records.get(name)]
    parts = [
        f"## {experiment.name}: {experiment.question}",
        *([f"Not run yet: {', '.join(missing)}."] if missing else []),
        markdown_table(["arm", "seeds", "steps", "TFLOP", "minutes of its own", "run", "settings"], rows),
        f"![curves]({experiment.name}.png)",
    ]
    spans = shortest_spans(arms, records)
    picked = sorted({i for i in (0, 1, 2, 3, len(spans) - 1) if i < len(spans)})
    heads = [f"{spans[i][0]:.1f}-{spans[i][1]:.1f} s" for i in picked]
    for name in shown_metrics(arms, records):
        found = [[values_of(records, arm, name, i) for i in picked] for arm in arms]
        if all(value is None for row in found for values in row for value in values):
            continue
        table = [[arm.title, *(with_spread(values) for values in row)] for arm, row in zip(arms, found)]
        parts.append(markdown_table([f"**{name.replace('_', ' ')}** ({BETTER[name]})", *heads], table))
    parts.append(comparison(arms, records, min(3, len(spans) - 1), heads[min(3, len(picked) - 1)]))
    histories = history_rows(arms, records)
    if histories:
        parts.append(
            "How far training's history is from the truth, and from one made with as many steps as the sampler takes "
            "(rms, mean over the last quarter of the chunks):"
        )
        parts.append(markdown_table(["arm", "solver steps", "to the truth", "to the fine history"], histories))
    first = arms[-1]
    seed = seeds[first.name][0]
    training, evaluation = (" ".join(records[first.name][seed][key]) for key in ("training", "evaluation"))
    versions = ", ".join(f"{name} {version}" for name, version in records[first.name][seed]["versions"].items())
    parts.append(f"The row of {first.title}, seed {seed} ({versions}):\n\n    {training}\n    {evaluation}")
    again = f"python -m rf_train.evidence {experiment.name} --arm {first.name} --seeds 1 --out runs/again"
    parts.append(f"Or, with all that it starts from: `{again}`")
    return parts


def shown_metrics(arms: Sequence[Arm], records: Records) -> tuple[str, ...]:
    """What tables and curves show: of the drawn world what is known exactly, of any other video the general metrics."""
    drawn = any(value is not None for arm in arms for value in values_of(records, arm, "shape_kept", 0))
    return SHOWN if drawn else SHOWN_OF_REAL_VIDEO


def shortest_spans(arms: Sequence[Arm], records: Records) -> list[list[float]]:
    """The segments of the arm that has the fewest."""
    return min((record["segments_seconds"] for arm in arms for record in records[arm.name].values()), key=len)


def values_of(records: Records, arm: Arm, metric: str, segment: int) -> list[float | None]:
    """A metric of every seed of an arm, in the order of the seeds."""
    return [value_of(records[arm.name][seed], metric, segment) for seed in sorted(records[arm.name], key=int)]


def value_of(record: Record, metric: str, segment: int) -> float | None:
    """A metric of a run in a segment; None if it wasn't measured."""
    values = record["metrics"].get(metric) or []
    return values[segment] if segment < len(values) else None


def with_spread(values: Sequence[float | None]) -> str:
    """Mean and standard deviation as text; one value alone; "-" for none."""
    mean, std = mean_and_std(values)
    single = sum(value is not None for value in values) == 1
    return "-" if mean is None else f"{mean:.2f}" if single else f"{mean:.2f} ± {std:.2f}"


def comparison(arms: list[Arm], records: Records, segment: int, head: str) -> str:
    """Each arm against the last one, seed by seed, in a segment: the mean difference of shapes kept, and its spread."""
    last, metric = arms[-1], "shape_kept"
    if all(value is None for value in values_of(records, last, metric, segment)):
        metric = "frechet"
    lines = []
    for arm in arms[:-1]:
        common = sorted(set(records[arm.name]) & set(records[last.name]), key=int)
        pairs = [[value_of(records[one.name][seed], metric, segment) for one in (last, arm)] for seed in common]
        differences = [a - b for a, b in pairs if a is not None and b is not None]
        if differences:
            sign = -1 if BETTER[metric] == "lower" else 1
            better = sum(sign * difference > 0 for difference in differences)
            lines.append(
                f"- {last.title} against {arm.title}: {with_spread(differences)}, better with {better} of "
                f"{len(differences)} seeds"
            )
    return f"Difference of {metric.replace('_', ' ')} at {head}, seed by seed:\n\n" + "\n".join(lines)


def history_rows(arms: list[Arm], records: Records) -> list[list[str]]:
    """A row of the table of training's history for each arm that measured it."""
    rows = []
    for arm in arms:
        found = [record["history"] for record in records[arm.name].values() if record["history"]]
        if found:
            ends = [[last_quarter(history[key]) for history in found] for key in ("truth", "solver")]
            rows.append([arm.title, str(found[0]["solver_steps"]), *map(with_spread, ends)])
    return rows


def last_quarter(by_chunk: list[float]) -> float:
    """The mean over the last quarter of the chunks."""
    part = by_chunk[-max(1, len(by_chunk) // 4) :]
    return sum(part) / len(part)


def markdown_table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def curves(arms: list[Arm], records: Records) -> bytes:
    """A PNG: each shown metric over time, a line per arm, with a band of one standard deviation over seeds."""
    spans = shortest_spans(arms, records)
    middle = [sum(span) / 2 for span in spans]
    shown = [
        name
        for name in shown_metrics(arms, records)
        if any(value is not None for arm in arms for value in values_of(records, arm, name, 0))
    ]  # fmt: skip
    columns = 4
    count = -(-len(shown) // columns)
    figure, grid = new_figure(12, 2.6 * count, columns, count)
    for axes, name in zip(grid.flat, shown):
        for number, arm in enumerate(arms):
            cells = [mean_and_std(values_of(records, arm, name, i)) for i in range(len(spans))]
            points = [(x, *cell) for x, cell in zip(middle, cells) if cell[0] is not None]
            if points:
                x, mean, std = zip(*points)
                colour = COLOURS[number % len(COLOURS)]
                axes.plot(x, mean, color=colour, marker="o", markersize=2.5, linewidth=1.2, label=arm.title)
                low, high = ([m + sign * s for m, s in zip(mean, std)] for sign in (-1, 1))
                axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.axvline(spans[0][1], color="#8c959f", linewidth=0.8, linestyle=":")
        axes.set_title(f"{name.replace('_', ' ')} ({BETTER[name]})", fontsize=9)
        axes.set_xlabel("seconds", fontsize=8)
        axes.tick_params(labelsize=7)
    for axes in list(grid.flat)[len(shown) :]:
        axes.axis("off")
    figure.tight_layout()
    figure.legend(*grid.flat[0].get_legend_handles_labels(), frameon=False, ncols=3, loc="lower center",
                  bbox_to_anchor=(0.5, 1.0))  # fmt: skip
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=90, bbox_inches="tight", metadata={"Software": None})
    return data.getvalue()
