"""The experiments: each run trains what its arm describes, and compute is equal where that is said."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rf_train import config
from rf_train.evidence import __main__ as command
from rf_train.evidence.experiments import FILE, Clips, Evidence, Experiment, Plan, chosen, read_evidence, step_flop
from rf_train.evidence.results import check_same_plan, read_records
from rf_train.settings import from_plain
from tests.conftest import change_card, write_dataset

SHIPPED = read_evidence(FILE)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """The shipped experiments on small datasets in the demo's shapes."""
    folder = tmp_path_factory.mktemp("data")
    demo = config.load(config.recipe_path("demo")).model
    for name, frames in (("train", 15), ("train_long", 30), ("ten", 20)):
        write_dataset(folder / name, count=6, frames=frames, settings=demo, height=4, width=4)
    plain = config.read_plain(config.recipe_path("demo"))
    plain["data"]["train"] = str(folder / "train")
    recipe = folder / "demo.yaml"
    recipe.write_text(json.dumps(plain))
    arms = []
    for arm in SHIPPED.arms:
        settings = tuple(text.replace("data/demo/train_long", str(folder / "train_long")) for text in arm.settings)
        arms.append(type(arm)(arm.name, arm.title, str(recipe), arm.start, settings, arm.equal_compute))
    evidence = Evidence(tuple(arms), SHIPPED.experiments, Clips(str(folder / "ten"), 4))
    return Plan(evidence, folder / "out")


def load(arguments: list[str]) -> config.Recipe:
    """The recipe that a training command trains."""
    recipe, *overrides = arguments[arguments.index("rf_train.train") + 1 :]
    return config.load(recipe, overrides)


def test_every_arm_trains_what_it_says(plan):
    folders = set()
    for arm in plan.evidence.arms:
        recipe = load(plan.training(arm, 3))
        assert recipe.run.seed == 3 and recipe.evaluation.every == 0
        assert recipe.optimizer.micro_batch * plan.ranks == recipe.stages[0].batch
        folders.add(recipe.run.out)
        if arm.start:  # the first stage is that of the arm that it starts from
            first = load(plan.training(plan.evidence.arm[arm.start], 3))
            assert recipe.start.run == first.run.out and recipe.start.step == first.stages[0].steps
            assert recipe.model == first.model and recipe.stages[0] == first.stages[0]
    assert len(folders) == len(plan.evidence.arms)
    arm = plan.evidence.arm
    assert load(plan.training(arm["noise"], 0)).stages[1].history.kind == "noise"
    assert load(plan.training(arm["shift_3"], 0)).stages[1].history.t_shift == 3
    assert load(plan.training(arm["window_and_sink"], 0)).stages[1].attention.sink == 1


@pytest.mark.parametrize("name", ["teacher_forcing_equal_compute", "long_equal_compute"])
def test_equal_compute_is_equal_within_a_step(plan, name):
    """Of the whole training, also where no stage is shared."""
    arm, other = (plan.evidence.arm[one] for one in (name, "autoregressive"))
    ours, theirs = plan.recipe(arm), plan.recipe(other)
    steps = [step_flop(ours, plan.ranks, position) / 1e12 for position in range(2)]
    assert abs(plan.tflop(arm) - plan.tflop(other)) <= sum(steps)
    longer = [own.steps > stage.steps for own, stage in zip(ours.stages, theirs.stages)]
    assert longer == [False, name == "teacher_forcing_equal_compute"]
    assert (ours.stages[0].steps < theirs.stages[0].steps) == (name == "long_equal_compute")


def test_quick_takes_few_steps_of_every_stage(plan):
    quick = Plan(plan.evidence, plan.out, quick=True)
    for arm in plan.evidence.arms:
        assert all(2 <= stage.steps <= 60 for stage in load(quick.training(arm, 0)).stages)


def test_the_runs_that_experiments_need_are_named_once_and_seed_by_seed(plan):
    runs = [(arm.name, seed) for arm, seed in command.runs_needed(plan, ["histories", "shift"], [], 0)]
    assert len(set(runs)) == len(runs) == 5 * 5 + 3 * 2 and [seed for _, seed in runs] == sorted(s for _, s in runs)
    assert command.runs_needed(plan, ["shift"], ["shift_3"], 1) == [(plan.evidence.arm["shift_3"], 0)]
    for names, arms, words in ((["none"], [], "no experiment 'none'"), ([], ["noise", "none"], "has the arm none")):
        with pytest.raises(ValueError, match=words):
            command.runs_needed(plan, names, arms, 0)
    assert [one.name for one in chosen(plan.evidence, [])] == [one.name for one in SHIPPED.experiments]


def test_an_arm_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="there is no b, c"):
        from_plain(
            Evidence, {"arms": [{"name": "a", "start": "b"}], "experiments": [{"name": "x", "arms": ["a", "c"]}]}
        )
    with pytest.raises(ValueError, match="seeds"):
        from_plain(Experiment, {"name": "x", "seeds": 0})


@pytest.mark.parametrize(
    "plain, words",
    [
        ({"arms": [{"name": "../a"}]}, "use letters"),
        ({"arms": [{"name": "a"}, {"name": "a"}]}, "the name a is there twice"),
        ({"arms": [{"name": "a", "start": "b"}, {"name": "b", "start": "a"}]}, "a: start b has a start"),
        ({"arms": [{"name": "a", "equal_compute": "a"}]}, "a: equal_compute a has a equal_compute"),
        ({"arms": [{"name": "a"}], "experiments": [{"name": "x/y", "arms": ["a"]}]}, "use letters"),
    ],
)
def test_names_and_references_that_lead_nowhere_are_one_line(plain, words):
    with pytest.raises(ValueError, match=words):
        from_plain(Evidence, plain)


def test_the_identity_of_a_run_is_its_settings_wherever_and_on_however_many_ranks_it_runs(plan, tmp_path):
    arm = plan.evidence.arm["noise"]
    other = Plan(plan.evidence, tmp_path, ranks=1)
    assert plan.identity(arm, 0) == other.identity(arm, 0)
    different = [Plan(plan.evidence, plan.out, quick=True).identity(arm, 0), plan.identity(arm, 1)]
    assert plan.identity(arm, 0) not in [*different, plan.identity(plan.evidence.arm["parallel"], 0)]


def test_a_record_stays_of_its_plan_when_a_new_setting_has_its_default(plan):
    arm = plan.evidence.arm["noise"]
    record = {"identity": plan.identity(arm, 0)}
    del record["identity"]["recipe"]["flow"]["guidance"]  # the demo's is 1.0, the default is not
    with pytest.raises(ValueError, match="was run with other settings"):
        check_same_plan(plan, arm, 0, record)
    record = {"identity": plan.identity(arm, 0)}
    del record["identity"]["recipe"]["optimizer"]["max_skipped"]  # as if the run were older than this setting
    check_same_plan(plan, arm, 0, record)
    assert "max_skipped" not in record["identity"]["recipe"]["optimizer"]
    record["identity"]["recipe"]["optimizer"]["gone"] = 1
    with pytest.raises(ValueError, match="was run with other settings"):
        check_same_plan(plan, arm, 0, record)


def test_the_committed_results_are_those_of_the_shipped_experiments(tmp_path, monkeypatch):
    """Clips of the data's sizes are there: the steps of equal compute follow from them."""
    monkeypatch.chdir(tmp_path)
    model = config.load(config.recipe_path("demo")).model
    for folder, frames in (("train", 15), ("train_long", 30)):
        write_dataset(Path("data/demo") / folder, count=1, frames=frames, settings=model, height=4, width=4)
    shipped = Plan(SHIPPED, Path("runs/evidence"))
    for name, seeds in read_records(FILE.parent / "results.json").items():
        for seed, record in seeds.items():
            if "videos" in record["identity"]:
                record["identity"]["videos"] = ["", ""]  # the real video is not here
            check_same_plan(shipped, SHIPPED.arm[name], int(seed), record)


def test_data_that_is_not_there_is_one_line(plan, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command.main(["histories", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: data/demo/ten: no dataset; the experiment histories needs what")
    assert command.main(["real", "--out", str(tmp_path / "out")]) == 2
    words = "error: data/real/long: no dataset; the experiment real needs a real video: make real-data VIDEO="
    assert capsys.readouterr().err.startswith(words)


def test_what_needs_a_video_is_left_out_unless_it_is_named(plan, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arm = plan.evidence.arm["noise"]
    real = replace(arm, name="own_video", start="", clips="data/real/long")
    experiments = (Experiment("histories", arms=("noise",)), Experiment("own", arms=("own_video",), needs="a video"))
    evidence = Evidence((*plan.evidence.arms, real), experiments, plan.evidence.clips)
    plan = replace(plan, evidence=evidence)
    assert command.possible(plan, [], []) == ["histories"]
    assert capsys.readouterr().err == "own: left out, it needs a video\n"
    for folder in ("data/real", "data/other"):
        write_dataset(Path(folder) / "long", count=1, frames=20, settings=plan.recipe(arm).model, height=4, width=4)
    assert command.possible(plan, [], []) == ["histories", "own"] and capsys.readouterr().err == ""
    nothing = Evidence(evidence.arms, (replace(experiments[1], arms=("elsewhere",)),))
    nothing = Evidence((*evidence.arms, replace(real, name="elsewhere", clips="data/none")), nothing.experiments)
    with pytest.raises(ValueError, match="no experiment is left to do"):
        command.possible(replace(plan, evidence=nothing), [], [])


def test_an_arm_with_clips_of_its_own_is_evaluated_on_them_and_knows_another_video(plan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = replace(plan.evidence.arm["noise"], clips="data/real/long")
    settings = plan.recipe(own).model
    write_dataset(Path("data/real/long"), count=1, frames=20, settings=settings, height=4, width=4)
    change_card(Path("data/real/long"), lambda card: card["source"]["settings"].update(source="a", source_sizes="b"))
    command_line = plan.evaluation(own, 0)
    assert command_line[command_line.index("--data") + 1] == "data/real/long"
    record = {"identity": plan.identity(own, 0)}
    assert record["identity"]["clips"] == ["data/real/long", 4] and record["identity"]["videos"] == ["a b", " "]
    check_same_plan(plan, own, 0, record)
    change_card(Path("data/real/long"), lambda card: card["source"]["settings"].update(source_sizes="c"))
    with pytest.raises(ValueError, match="was run with other settings"):
        check_same_plan(plan, own, 0, record)


def test_a_command_that_fails_is_told_with_its_error(tmp_path):
    folder = tmp_path / "runs" / "arm" / "seed0"
    with pytest.raises(ValueError, match=r"exit code 3: error: no luck"):
        command.run(["python", "-c", "print('error: no luck'); raise SystemExit(3)"], folder)
    assert folder.with_suffix(".log").read_text() == "error: no luck\n"
    with pytest.raises(ValueError, match=r"exit code 4: see ") as raised:  # not the error of the time before
        command.run(["python", "-c", "raise SystemExit(4)"], folder)
    assert "no luck" not in str(raised.value)
    command.run(["python", "-c", "import sys; print(sys.executable)"], folder)
    assert folder.with_suffix(".log").read_text().endswith(f"{sys.executable}\n")
