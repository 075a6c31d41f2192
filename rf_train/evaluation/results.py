"""What an evaluation has found: `evaluation.json`, and its table."""

import json
from pathlib import Path

from rf_train.evaluation.pieces import RESULT
from rf_train.evaluation.statistics import as_text
from rf_train.evaluation.video_metrics import GENERAL_METRICS

# What every evaluation has, and what one without a truth has.
REPORTED = {metric.name for metric in GENERAL_METRICS}
REPORTED_OF_PROMPTS = {metric.name for metric in GENERAL_METRICS if not metric.needs_truth}
CLIPS, PROMPTS = "evaluation", "evaluation_prompts"  # the folders in a run's


def read_result(out: Path) -> dict:
    """The evaluation.json of a folder; {} without one. Raises ValueError for another file than `evaluate_run`'s."""
    path = out / RESULT
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); remove it, and evaluate again") from None
    wanted = {
        "request",
        "metrics",
        "frechet",
        "slopes",
        "rows",
        "segments_seconds",
        "clips",
        "given_seconds",
        "trained_seconds",
        "fps",
    }
    known = isinstance(found, dict) and wanted <= found.keys() and isinstance(found["metrics"], dict)
    reported = REPORTED if out.name == CLIPS else REPORTED_OF_PROMPTS
    if not known or not found["metrics"].keys() >= reported:
        raise ValueError(f"{path}: not an evaluation of this version; remove it, and evaluate again")
    return found


def table(result: dict) -> str:
    """The metrics as text, by segment: mean ± standard deviation over clips, and the change per segment."""
    heads = [f"{begin:.1f}-{end:.1f} s" for begin, end in result["segments_seconds"]]
    lines = [f"{'step ' + str(result['step']):<18}" + "".join(f"{head:>20}" for head in [*heads, "per segment (95 %)"])]
    for name, cells in result["metrics"].items():
        line = "".join(f"{as_text(cell['mean'], 12)} ± {as_text(cell['std'], 5)}" for cell in cells)
        slope = result["slopes"][name]
        change = f"{as_text(slope['slope'], 8)} ({as_text(slope['low'])}, {as_text(slope['high'])})"
        lines.append(f"{name:<18}{line}{change if len(heads) > 1 else ''}")
    lines.append(f"{'frechet':<18}" + "".join(f"{as_text(value, 12)}{'':8}" for value in result["frechet"]).rstrip())
    history = result.get("history")
    if history:
        lines.append(f"training's history (x~, t_shift {history['t_shift']:g}), rms by chunk:")
        titles = {
            "solver": f"{history['solver_steps']} solver step(s) to {history['fine_solver_steps']}",
            "truth": "to the truth",
            "truth_fine": "the fine one's",
        }
        for key, title in titles.items():
            lines.append(f"  {title:<24}" + " ".join(f"{value:.3f}" for value in history[key]))
    return "\n".join(lines)
