"""Recipes: defaults < YAML < command line, and one clear line for whatever is wrong."""

import pytest

from rf_train import config


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("model: {dim: 96, heads: 4}\nstages:\n  - {name: a, steps: 3, lr: 1e-4}\n  - {name: b, history: clean}\n")
    return path


def test_the_command_line_wins_over_yaml_and_yaml_over_defaults(recipe_file):
    recipe = config.load(recipe_file, ["stages.1.steps=7", "optimizer.beta2=0.9", "run.out=/tmp/x"])
    assert recipe.model.dim == 96 and recipe.model.layers == 30
    assert [stage.steps for stage in recipe.stages] == [3, 7] and recipe.stages[0].lr == 1e-4
    assert recipe.optimizer.beta2 == 0.9 and recipe.run.out == "/tmp/x"
    assert config.from_dict(config.to_dict(recipe)) == recipe


def test_stages_follow_one_another(recipe_file):
    recipe = config.load(recipe_file, ["stages.1.steps=7"])
    assert [recipe.stage_at(step)[1].name for step in (0, 2, 3, 9)] == ["a", "a", "b", "b"]
    assert recipe.stage_at(4)[2] == 1
    with pytest.raises(ValueError):
        recipe.stage_at(10)


@pytest.mark.parametrize(
    "override, message",
    [
        ("modle.dim=3", "modle: unknown setting; did you mean model?"),
        ("model.dmi=3", "model.dmi: unknown setting; did you mean model.dim?"),
        ("stages.0.stepz=3", r"stages.0.stepz: unknown setting; did you mean stages.0.steps\?"),
        ("stages.0.steps=many", "stages.0.steps: expected int, got 'many'"),
        ("stages.0.steps=true", "stages.0.steps: expected int"),
        ("stages.7.steps=3", "is not a position in a list of 2"),
        ("stages.0.history=teacher", "choose one of clean, noise, parallel, autoregressive"),
        ("model.dim=97", "model.dim=97 is not a multiple of model.heads=4"),
        ("stages=[]", "a recipe needs at least one"),
        ("stages.1.name=a", "names must differ"),
        ("run.wandb=maybe", "choose offline, online or disabled"),
        ("run", "an override is written a.b=c"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(recipe_file, override, message):
    with pytest.raises(ValueError, match=message) as caught:
        config.load(recipe_file, [override])
    assert "\n" not in str(caught.value)


def test_files_that_are_no_recipes(tmp_path):
    with pytest.raises(ValueError, match="no such recipe"):
        config.load(tmp_path / "none.yaml")
    for text, message in (("a: [", "not YAML"), ("- 1", "mapping"), ("!!python/object/apply:os.getcwd []", "not YAML")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            config.load(tmp_path / "bad.yaml")


@pytest.mark.parametrize("path", sorted((config.recipe_path("demo").parent).glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_recipe_is_valid(path):
    assert config.load(path).steps > 0
    assert config.recipe_path(path.stem) == config.recipe_path(path.name) == path
