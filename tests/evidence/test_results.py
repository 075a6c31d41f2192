"""Results: what runs gave is kept by arm and seed, and the page says what the numbers say."""

import json
import subprocess
import time

import pytest

from data_prep.files import locked
from rf_train.evidence import __main__ as command
from rf_train.evidence import results
from rf_train.evidence.experiments import Arm, Clips, Evidence, Experiment, Plan
from rf_train.evidence.results import add_record, read_records, write_page

IDENTITY = {"recipe": {"stages": [{}]}, "start": None, "seed": 0, "clips": ["data", 2]}
SEGMENTS = [[0.5, 1.0], [1.0, 2.0]]
EVIDENCE = Evidence(
    arms=(Arm("a", "arm A"), Arm("b", "arm B"), Arm("c", "arm C")),
    experiments=(Experiment("first", "Which one?", ("a", "b"), 2), Experiment("other", "And C?", ("b", "c"), 2)),
    clips=Clips("data", 2),
)


def record(shape: float, **changes) -> dict:
    return {
        "identity": IDENTITY,
        "metrics": {"shape_kept": [1.0, shape], "speed": [1.0, None], "frechet": [0.1, 0.2]}, "history": None,
        "segments_seconds": SEGMENTS, "clips": 2, "steps": 10, "tflop": 7.0, "minutes": 1.0,
        "versions": {"torch": "2"}, "training": ["deepspeed", "x"], "evaluation": ["python", "y"], **changes,
    }  # fmt: skip


@pytest.fixture
def plan(tmp_path):
    return Plan(EVIDENCE, tmp_path)


def test_the_page_gives_mean_and_spread_over_seeds_and_compares_seed_by_seed(plan):
    for arm, shapes in (("a", [0.2, 0.4]), ("b", [0.9, 0.3])):
        for seed, shape in enumerate(shapes):
            records = add_record(plan, EVIDENCE.arm[arm], seed, record(shape))
    page = write_page(plan, records).read_text()
    assert "| arm A | 1.00 ± 0.00 | 0.30 ± 0.14 |" in page and "| arm B | 1.00 ± 0.00 | 0.60 ± 0.42 |" in page
    assert "- arm B against arm A: 0.30 ± 0.57, better with 1 of 2 seeds" in page
    assert "0.5-1.0 s" in page and "| arm A | 1.00 ± 0.00 | - |" in page  # speed was not measured at the end
    assert "And C?" not in page and "objects kept" not in page
    assert "rf_train.evidence first --arm b --seeds 1" in page
    assert (plan.out / "first.png").read_bytes().startswith(b"\x89PNG") and not (plan.out / "other.png").exists()


def test_an_experiment_is_shown_when_most_of_its_arms_have_been_run(tmp_path):
    experiments = (
        Experiment("most", "Shown?", ("a", "b", "c"), 1),
        Experiment("half", "Hidden?", ("a", "b", "c", "d"), 1),
    )
    plan = Plan(Evidence((*EVIDENCE.arms, Arm("d", "arm D")), experiments, EVIDENCE.clips), tmp_path)
    for arm in "ab":
        records = add_record(plan, EVIDENCE.arm[arm], 0, record(0.5))
    page = write_page(plan, records).read_text()
    assert "Not run yet: arm C." in page and "Hidden?" not in page


def test_equal_results_give_equal_files(plan, tmp_path):
    for folder in (tmp_path / "one", tmp_path / "two"):
        own = Plan(EVIDENCE, folder)
        for arm in "ab":
            add_record(own, EVIDENCE.arm[arm], 0, record(0.5))
    for name in ("results.json", "results.md", "first.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_without_shapes_arms_are_compared_by_frechet_distance(plan):
    for arm, distance in (("a", 0.5), ("b", 0.2)):
        own = record(0.0, metrics={"motion": [1.0, 0.7], "frechet": [0.1, distance]})
        records = add_record(plan, EVIDENCE.arm[arm], 0, own)
    page = write_page(plan, records).read_text()
    assert "arm B against arm A: -0.30, better with 1 of 1 seeds" in page
    assert "**motion** (near 1)" in page and "| arm A | 1.00 | 0.70 |" in page
    records = add_record(plan, EVIDENCE.arm["b"], 0, record(0.5))  # a drawn world: what is known exactly is shown
    assert "motion" not in write_page(plan, records).read_text()


def test_an_arm_without_a_metric_is_left_out_of_its_comparison(plan):
    add_record(plan, EVIDENCE.arm["a"], 0, record(0.0, metrics={"sharpness": [1.0, 1.0], "frechet": [0.1, 0.3]}))
    records = add_record(plan, EVIDENCE.arm["b"], 0, record(0.5))
    page = write_page(plan, records).read_text()
    assert "| arm A | - | - |" in page and "arm B against arm A" not in page


def test_a_folder_is_used_by_one_process_at_a_time_and_a_child_counts(tmp_path):
    path = tmp_path / "runs" / "arm.lock"
    with locked(path) as descriptor:
        child = subprocess.Popen(["sleep", "0.5"], pass_fds=[descriptor])
    begin = time.perf_counter()
    with locked(path):
        assert time.perf_counter() - begin > 0.2 and child.wait() == 0


def test_histories_are_told_by_their_last_quarter(plan):
    history = {"solver_steps": 1, "truth": [0.0, 0.0, 0.0, 0.25], "solver": [0.0, 0.0, 0.0, 0.5]}
    for arm in "ab":
        records = add_record(plan, EVIDENCE.arm[arm], 0, record(0.5, history=history))
    assert "| arm A | 1 | 0.25 | 0.50 |" in write_page(plan, records).read_text()


def damaged(**changes) -> str:
    return json.dumps({"a": {"0": record(0.5, **changes)}})


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        damaged(segments_seconds=[]),
        damaged(metrics={"frechet": "x"}),
        damaged(history=[1]),
        damaged(metrics={"frechet": []}),
        '{"a": 1}',
        '{"a": {"0": {}}}',
        '{"a": {"0": {"metrics": 1}}}',
    ],
)
def test_a_file_that_is_not_ours_is_one_line(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=r"results\.json: not the results of this version"):
        read_records(tmp_path / "results.json")


def test_what_is_done_is_not_done_again_and_a_failure_keeps_what_is_done(plan, monkeypatch, capsys):
    """The trainings are replaced; `tests/test_end_to_end.py` runs real ones."""
    ran = []

    def run_arm(plan, arm, seed):
        if (arm.name, seed) == ("b", 1):
            raise ValueError("the power went")
        ran.append((arm.name, seed))

    monkeypatch.setattr(command, "read_evidence", lambda _: EVIDENCE)
    monkeypatch.setattr(command, "missing_data", lambda *_: "")
    monkeypatch.setattr(command, "run_arm", run_arm)
    monkeypatch.setattr(command, "record_of", lambda *_: record(0.5))
    monkeypatch.setattr(Plan, "identity", lambda self, arm, seed: IDENTITY)
    arguments = ["first", "--out", str(plan.out)]
    assert command.main(arguments) == 2 and "the power went" in capsys.readouterr().err
    assert ran == [("a", 0), ("b", 0), ("a", 1)]
    monkeypatch.setattr(command, "run_arm", lambda plan, arm, seed: ran.append((arm.name, seed)))
    assert command.main(arguments) == 0 and ran[3:] == [("b", 1)]
    assert command.main(arguments) == 0 and len(ran) == 4
    assert {arm: list(seeds) for arm, seeds in json.loads((plan.out / "results.json").read_text()).items()} == {
        "a": ["0", "1"], "b": ["0", "1"],
    }  # fmt: skip
    assert results.read_records(plan.out / "none.json") == {}
    monkeypatch.setattr(Plan, "identity", lambda self, arm, seed: {**IDENTITY, "clips": ["data", 3]})
    assert command.main(arguments) == 2 and "a, seed 0, was run with other settings" in capsys.readouterr().err
