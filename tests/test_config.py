"""Recipes: defaults < YAML < command line, and one clear line for whatever is wrong."""

import pytest
import yaml

from rf_train import config
from rf_train.diffusion.histories import Autoregressive, Clean, Noise
from rf_train.model.chunks import Dense, Routed, Window
from rf_train.resuming import check_stages, recipe_changes, write_recipe


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "model: {dim: 96, heads: 4}\nstages:\n"
        "  - {name: a, steps: 3, lr: 1e-4, attention: {kind: window, window: 4}}\n  - {name: b, history: clean}\n"
    )
    return path


def test_the_command_line_wins_over_yaml_and_yaml_over_defaults(recipe_file):
    recipe = config.load(recipe_file, ["stages.1.steps=7", "optimizer.beta2=0.9", "run.out=/tmp/x"])
    assert recipe.model.dim == 96 and recipe.model.layers == 30
    assert [stage.steps for stage in recipe.stages] == [3, 7] and recipe.stages[0].lr == 1e-4
    assert recipe.optimizer.beta2 == 0.9 and recipe.run.out == "/tmp/x"
    assert config.from_dict(config.to_dict(recipe)) == recipe


def test_stages_follow_one_another(recipe_file):
    recipe = config.load(recipe_file, ["stages.1.steps=7"])
    assert [recipe.span_at(step).stage.name for step in (0, 2, 3, 9)] == ["a", "a", "b", "b"]
    assert recipe.span_at(4)[1:] == (3, 10)
    with pytest.raises(ValueError, match="past the recipe's end"):
        recipe.span_at(10)


@pytest.mark.parametrize(
    "override, message",
    [
        ("modle.dim=3", "modle: unknown setting; did you mean model?"),
        ("model.dmi=3", "model.dmi: unknown setting; did you mean model.dim?"),
        ("stages.0.stepz=3", "stages.0.stepz: unknown setting; did you mean stages.0.steps?"),
        ("stages.0.steps=many", "stages.0.steps: expected int, got 'many'"),
        ("stages.0.steps=true", "stages.0.steps: expected int"),
        ("stages.7.steps=3", "is not a position in a list of 2"),
        ("stages.0.history=teacher", "stages.0.history='teacher': choose one of clean, "),
        ("model.dim=97", "model.dim=97 is not a multiple of model.heads=4"),
        ("stages=[]", "a recipe needs at least one"),
        ("stages.1.name=a", "names must differ"),
        ("run.wandb=maybe", "choose offline, online or disabled"),
        ("run.sequence_parallel_size=3", "run.sequence_parallel_size=3 does not divide model.heads=4"),
        ("run", "an override is written a.b=c"),
        (".=1", "an override is written a.b=c"),
        ("run.wandb_mode=offline", "run.wandb_mode: unknown setting; did you mean run.wandb?"),
        ("model.heads=0", "model.heads=0 must be at least 1"),
        ("model.eps=.nan", "model.eps: nan is not a number that can be meant"),
        ("stages.0.lr=.inf", "stages.0.lr: inf is not a number that can be meant"),
        ("stages.0.lr=" + 400 * "9", "is not a number that can be meant"),
        ("stages.0.steps=" + 400 * "9", "is not a number that can be meant"),
        ("stages.0.steps=" + 5000 * "9", "stages.0.steps: the value is not YAML"),
        ("stages.0.steps=" + 9000 * "[", "nested too deeply"),
        ("stages.0.steps=0", "stages.0.steps=0 must be at least 1"),
        ("stages.²=1", "'²' is not a position in a list of 2"),
        ("stages.0=", "stages.0: expected a mapping, got None"),
        ("optimizer.beta1=5", "optimizer.beta1=5.0 is not in [0, 1)"),
        ("start.step=-5", "start.step=-5 must be at least 0"),
        ("run.out=", "run.out is empty"),
        ("run={out: a, out: b}", "'out' is there twice"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(recipe_file, override, message):
    with pytest.raises(ValueError) as caught:
        config.load(recipe_file, [override])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_kernel_that_never_repeats_its_bits_is_refused_where_they_must_repeat(recipe_file):
    with pytest.raises(ValueError, match=r"set model\.attention_kernel=auto or fa2"):
        config.load(recipe_file, ["run.deterministic=true", "model.attention_kernel=cudnn"])


@pytest.mark.parametrize("name", ["stages.0.q", "model.depth"])
def test_a_name_that_is_near_nothing_gets_no_suggestion(recipe_file, name):
    with pytest.raises(ValueError) as caught:
        config.load(recipe_file, [f"{name}=1"])
    assert str(caught.value) == f"{name}: unknown setting (recipe {recipe_file})"


def test_a_date_is_a_name(recipe_file):
    assert config.load(recipe_file, ["run.out=2024-13-45"]).run.out == "2024-13-45"


def test_files_that_are_no_recipes(tmp_path):
    with pytest.raises(ValueError, match="no such recipe"):
        config.load(tmp_path / "none.yaml")
    for text, message in (("a: [", "not YAML"), ("- 1", "mapping"), ("!!python/object/apply:os.getcwd []", "not YAML")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            config.load(tmp_path / "bad.yaml")


@pytest.mark.parametrize("path", sorted(config.SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a file of that name in the current folder would be taken first
    assert config.load(path).steps > 0
    assert config.recipe_path(path.stem) == config.recipe_path(path.name) == path


def test_a_file_of_that_name_is_taken_before_a_shipped_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config.recipe_path("demo.yaml").parent == config.SHIPPED
    (tmp_path / "demo.yaml").write_text("")
    assert config.recipe_path("demo.yaml").resolve() == (tmp_path / "demo.yaml").resolve()


# ---- settings that come in kinds


@pytest.mark.parametrize(
    "overrides, history, attention",
    [
        ([], Autoregressive(), Window(window=4)),
        (["stages.0.history.t_shift=0.3"], Autoregressive(t_shift=0.3), Window(window=4)),
        (["stages.0.history=noise", "stages.0.attention.sink=2"], Noise(), Window(window=4, sink=2)),
        (["stages.0.history=clean", "stages.0.attention=dense"], Clean(), Dense()),
        (["stages.0.attention=routed", "stages.0.attention.top_k=3"], Autoregressive(), Routed(top_k=3)),
        (["stages.0.attention={kind: routed, top_k: 2}"], Autoregressive(), Routed(top_k=2)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_kind_is_a_name_or_a_mapping(recipe_file, overrides, history, attention):
    stage = config.load(recipe_file, overrides).stages[0]
    assert (stage.history, stage.attention) == (history, attention)


@pytest.mark.parametrize(
    "override, message",
    [
        ("stages.0.attention.top_k=2", "stages.0.attention.top_k: unknown setting; 'window' has window, sink"),
        (
            "stages.0.attention.snik=2",
            "stages.0.attention.snik: unknown setting; did you mean stages.0.attention.sink?",
        ),
        ("stages.1.attention.window=2", "stages.1.attention.window: unknown setting; 'dense' has no settings"),
        ("stages.1.history.t_shift=2", "stages.1.history.t_shift: unknown setting; 'clean' has no settings"),
        (
            "stages.0.history.probability=0.5",
            "stages.0.history.probability: unknown setting; 'autoregressive' has t_shift, solver_steps",
        ),
        ("stages.0.attention.window=0", "stages.0.attention.window=0 must be at least 1"),
        ("stages.0.attention=7", "stages.0.attention: expected the name of a kind or a mapping, got 7"),
    ],
)
def test_a_setting_of_another_kind_is_refused_in_one_line(recipe_file, override, message):
    with pytest.raises(ValueError) as caught:
        config.load(recipe_file, [override])
    assert str(caught.value) == f"{message} (recipe {recipe_file})"


# ---- a run that is resumed


def saved_recipe(folder, **without) -> tuple:
    """A run's recipe file that lacks the settings `without` ({section: name}), and all settings of the run."""
    whole = {"run": {"out": str(folder)}, "stages": [{"name": "a", "history": "noise"}, {"name": "b"}]}
    whole = config.to_dict(config.from_dict(whole))
    sections = {name: dict(settings) for name, settings in whole.items() if isinstance(settings, dict)}
    for section, name in without.items():
        del sections[section][name]
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**whole, **sections}))
    return path, whole


def test_a_setting_that_is_new_in_this_version_is_no_change(tmp_path):
    """The saved recipe lacks it, so it had its default then."""
    path, whole = saved_recipe(tmp_path, run="gather_for_rollout", optimizer="max_skipped")
    assert recipe_changes(path, whole) == []
    whole["run"]["gather_for_rollout"] = False
    assert recipe_changes(path, whole) == [("run.gather_for_rollout", True, False)]


def test_every_setting_that_changed_is_told(tmp_path, capsys):
    path, whole = saved_recipe(tmp_path)
    whole["optimizer"]["beta2"] = 0.9
    whole["stages"][0]["history"] = "clean"
    whole["stages"][1]["history"]["t_shift"] = 0.3
    assert recipe_changes(path, whole) == [
        ("optimizer.beta2", 0.95, 0.9),
        ("stages.0.history", "noise", "clean"),
        ("stages.1.history.t_shift", 0.6, 0.3),
    ]
    write_recipe(config.from_dict(whole))
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 3
    assert told[0] == "the recipe has changed since this run began: optimizer.beta2: 0.95 -> 0.9"
    assert recipe_changes(path, whole) == []  # it was written


def test_a_kind_without_its_settings_written_out_is_no_change(tmp_path):
    path, whole = saved_recipe(tmp_path)
    short = {**whole, "stages": [whole["stages"][0], {**whole["stages"][1], "history": "autoregressive"}]}
    path.write_text(yaml.safe_dump(short))
    assert recipe_changes(path, whole) == []


def test_a_recipe_of_another_version_is_told_in_one_line(tmp_path, capsys):
    path, whole = saved_recipe(tmp_path)
    path.write_text(yaml.safe_dump({**whole, "optimizer": {"clip": 1.0}}))
    assert recipe_changes(path, whole) == []
    told = capsys.readouterr().err
    assert "is not known: " in told and "optimizer.clip: unknown setting" in told and told.count("\n") == 1


def test_stages_that_are_over_keep_their_length(tmp_path):
    """Otherwise steps that were trained in one stage would count as another's."""
    _, whole = saved_recipe(tmp_path)
    first, second = (stage["steps"] for stage in whole["stages"])

    def told(done: int, *lengths: int) -> str:
        stages = [{**whole["stages"][0], "name": str(index), "steps": steps} for index, steps in enumerate(lengths)]
        try:
            check_stages(config.from_dict({**whole, "stages": stages}), done)
        except ValueError as error:
            return str(error)
        return ""

    assert not told(first, first + 5, second)  # the stage that goes on
    assert not told(first + 1, first, second + 5) and not told(first + second, first, second + 5)
    assert not told(first + second, first, second, 7)
    assert f"ended after [{first}] of them" in told(first + 1, first + 5, second)
    assert f"ended after [{first}] of them" in told(first + 1, first + second)
    assert "ended after none of them" in told(first - 1, first - 5, second)


@pytest.mark.parametrize("setting", ["data.train", "data.evaluation", "stages.0.data"])
def test_a_recipe_with_an_address_that_is_not_read_names_the_setting(setting):
    raw = {"data": {}, "stages": [{"name": "a"}]}
    (raw["stages"][0] if "stages" in setting else raw["data"])[setting.rpartition(".")[2]] = "pipe:cat x"
    with pytest.raises(ValueError, match=r"data.*: pipe: an address that runs a command is refused"):
        config.from_dict(raw)
