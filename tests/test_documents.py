"""The documents say what is so: links lead somewhere, settings and test files exist, no line is too long."""

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from data_prep import draw, encode, merge, preview, stats, windows
from rf_train import config, metrics
from rf_train.diffusion import histories
from rf_train.diffusion.histories import History
from rf_train.diffusion.history_check import check_history
from rf_train.model.chunks import Attention, Dense
from tests.distributed import PROJECT
from tests.step_results import random_result

FOLDERS = ["data_prep", "ds_configs", "slurm", "tests", "rf_train"]
DOCUMENTS = sorted(
    path
    for path in [*PROJECT.glob("*.md"), *(path for name in FOLDERS for path in (PROJECT / name).rglob("*.md"))]
    if ".venv" not in path.parts
)
ids = [str(path.relative_to(PROJECT)) for path in DOCUMENTS]


def known_settings() -> set[str]:
    """Dotted names of all settings, with N for a stage's position."""
    found = {f"stages.N.{field.name}" for field in fields(config.Stage)}
    for section in fields(config.Recipe):
        if section.name != "stages":
            found |= {f"{section.name}.{field.name}" for field in fields(section.default_factory())}
    for name, base in (("history", History), ("attention", Attention)):
        for kind in base.kinds.values():
            found |= {f"stages.N.{name}.{field.name}" for field in fields(kind)}
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_links_lead_to_files(path):
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", [p for p in DOCUMENTS if p.name != "CHANGELOG.md"], ids=lambda path: path.parent.name)
def test_settings_exist(path):
    named = re.findall(r"\b(?:model|flow|optimizer|run|start|stages\.[\dN])(?:\.[a-z_]+)+(?==)", path.read_text())
    assert {re.sub(r"\.\d\.", ".N.", name) for name in named} <= known_settings()


@pytest.mark.parametrize("path", [p for p in DOCUMENTS if p.name != "results.md"], ids=str)
def test_lines_are_at_most_120_characters(path):
    assert [line for line in path.read_text().splitlines() if len(line) > 120] == []


def test_every_folder_of_code_has_a_map_of_its_files():
    folders = {path.parent for name in FOLDERS for path in (PROJECT / name).rglob("*.py")}
    for folder in [folder for folder in folders if "tests" not in folder.relative_to(PROJECT).parts]:
        text = (folder / "README.md").read_text()
        for file in folder.glob("*.py"):
            if file.name != "__init__.py":
                assert file.name in text or f"rf_train.{file.stem}" in text, f"{folder.name}/README.md: {file.name}"


def examples(title: str) -> dict:
    """What the example in the part `title` of CONTRIBUTING.md defines. `_` is the value of its last expression."""
    part = (PROJECT / "CONTRIBUTING.md").read_text().split(title)[1]
    defined: dict = {**vars(histories), **vars(metrics), "__name__": "rf_train.example"}
    for statement in ast.parse(re.search(r"```python\n(.*?)```", part, re.DOTALL)[1]).body:
        if isinstance(statement, ast.Expr):
            defined["_"] = eval(ast.unparse(statement), defined)
        else:
            exec(ast.unparse(statement), defined)
    return defined


def test_the_example_of_a_history_works(tiny_model):
    try:
        history = examples("## To add a history")["Blurred"](probability=0.7)
        check_history(history, tiny_model(), Dense(), 3)
    finally:
        History.kinds.pop("blurred", None)


def test_the_example_of_a_metric_works():
    result, example = random_result(3, 0), examples("## To add a metric")
    result.loss_by_chunk[2] = result.history[2] = float("nan")
    found, (totals, counts) = example["std_by_chunk"](result), example["_"].sums(result)
    assert found.shape == (3, 2) and torch.allclose(found[1, 0], result.history[1, :, :3].std(correction=0))
    assert torch.allclose(totals, found[:2].double().sum(0)) and counts.tolist() == [2, 2]


def test_the_kinds_and_options_are_documented():
    recipes = (PROJECT / "rf_train/recipes/README.md").read_text()
    for base in (History, Attention):
        for kind, cls in base.kinds.items():
            if cls.__module__.startswith("rf_train."):
                row = next((line for line in recipes.splitlines() if line.startswith(f"| `{kind}`")), "")
                assert row, f"rf_train/recipes/README.md has no row for {kind!r}"
                assert all(f"`{field.name}`" in row for field in fields(cls)), row
    data = (PROJECT / "data_prep/README.md").read_text()
    for module in (encode, draw, merge, preview, stats, windows):
        for option in re.findall(r'add(?:_argument)?\("(--[a-z-]+)"', Path(module.__file__).read_text()):
            assert option in data, option
