"""The structure of the code: no import cycle, nothing imports upward, and only the engine imports DeepSpeed."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.distributed import PROJECT

# From the lowest to the highest. A module may import from its own row, or from a lower one.
LAYERS = (
    ("data_prep",),
    ("rf_train.settings",),
    ("rf_train.model",),
    ("rf_train.diffusion",),
    ("rf_train.config",),
    ("rf_train.data", "rf_train.engine"),
    ("rf_train.planning", "rf_train.metrics", "rf_train.evaluation", "rf_train.generation"),
    ("rf_train.run_log", "rf_train.run_status", "rf_train.weights"),
    ("rf_train.failures", "rf_train.start_checks", "rf_train.saves", "rf_train.resuming"),
    (
        "rf_train.train",
        "rf_train.generate",
        "rf_train.bench",
        "rf_train.bench_attention",
        "rf_train.bench_checkpoint",
        "rf_train.bench_timing",
        "rf_train.bench_traffic",
        "rf_train.bench_data",
        "rf_train.bench_generate",
        "rf_train.bench_gpu",
        "rf_train.bench_self_forcing",
    ),
    ("rf_train.evaluate", "rf_train.plan", "rf_train.status", "rf_train.vbench"),
    ("rf_train.report_data",),
    ("rf_train.report_plots", "rf_train.report_headline"),
    ("rf_train.report",),
    ("rf_train.evidence",),
)


def modules() -> dict[str, Path]:
    """Every module of both packages, by its dotted name."""
    found = {}
    for package in ("rf_train", "data_prep"):
        for path in sorted((PROJECT / package).rglob("*.py")):
            parts = path.relative_to(PROJECT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported_names(path: Path) -> set[str]:
    """The dotted names that a file imports, anywhere in it. `from a import b` gives `a` and `a.b`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def import_graph() -> dict[str, set[str]]:
    """{module: the project's modules that it imports}, packages left out."""
    paths = modules()
    files = {name for name, path in paths.items() if path.name != "__init__.py"}
    return {name: (imported_names(paths[name]) & files) - {name} for name in files}


def layer_of(module: str) -> int:
    for layer, names in enumerate(LAYERS):
        if any(module == name or module.startswith(name + ".") for name in names):
            return layer
    raise AssertionError(f"{module} stands in no layer: add it to LAYERS")


def test_there_is_no_import_circle():
    order = list(TopologicalSorter(import_graph()).static_order())  # raises CycleError
    assert len(order) > 30


def test_nothing_imports_upward():
    upward = [
        f"{name} imports {other}"
        for name, others in import_graph().items()
        for other in others
        if layer_of(other) > layer_of(name)
    ]
    assert not upward


def test_only_the_engine_knows_deepspeed():
    knows = {
        name
        for name, path in modules().items()
        if any(imported.split(".")[0] == "deepspeed" for imported in imported_names(path))
    }
    assert knows and all(name.startswith("rf_train.engine.") for name in knows)


@pytest.mark.parametrize("source, found", [("import a.b as c", "a.b"), ("def f():\n from a import b", "a.b")])
def test_the_scanner_sees_every_kind_of_import(tmp_path, source, found):
    (tmp_path / "x.py").write_text(source)
    assert found in imported_names(tmp_path / "x.py")
