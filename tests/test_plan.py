"""The command rf_train.plan: what it recommends runs, what it plans is what a step takes, bad input is one line."""

import json

import pytest
import yaml

from rf_train import plan
from tests.conftest import plain_settings
from tests.distributed import PROJECT


def recipe_file(folder, **changes) -> str:
    stages = [
        {"name": "warm", "history": "clean", "frames": 9, "batch": 8, "steps": 10},
        {"name": "self", "history": "autoregressive", "frames": 9, "batch": 16, "steps": 20},
    ]
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model": plain_settings(dim=64, heads=4), "stages": stages, **changes}))
    return str(path)


def printed(capsys) -> tuple[list[str], dict]:
    """The lines that the command printed, and its figures, which --json puts into the last line."""
    *lines, figures = capsys.readouterr().out.splitlines()
    return lines, json.loads(figures)


def test_the_command_prints_settings_that_run_and_fit(tmp_path, capsys):
    """The recommended settings are put in. The same command then says that each stage fits, and recommends the same."""
    path = recipe_file(tmp_path)
    usual = ["--gpus", "8", "--size", "64x64", "--gpu-memory", "0.5", "--json"]
    assert plan.main([path, *usual]) == 0
    lines, figures = printed(capsys)
    assert any("recommended settings" in line for line in lines)
    assert [stage["stage"] for stage in figures["stages"]] == ["warm", "self"]
    assert plan.main([path, *figures["best"]["overrides"], *usual]) == 0
    _, again = printed(capsys)
    assert all(stage["fits"] for stage in again["stages"])
    assert again["best"]["overrides"] == figures["best"]["overrides"]
    assert max(stage["peak"] for stage in again["stages"]) == figures["best"]["peak"] <= 0.9 * 0.5 * 2**30


def test_without_settings_that_fit_the_smallest_need_is_told(tmp_path, capsys):
    assert plan.main([recipe_file(tmp_path), "--gpus", "8", "--size", "512x512", "--gpu-memory", "0.1"]) == 0
    said = capsys.readouterr().out
    assert "DOES NOT FIT" in said and "nothing fits in 0.1 GiB: the smallest need is" in said


def test_the_markdown_table_has_a_row_per_stage(tmp_path, capsys):
    """And --json has the same: the recommended settings for each stage in a job of its own."""
    usual = ["--gpus", "8", "--size", "64x64", "--json"]
    assert plan.main([recipe_file(tmp_path), "--markdown", *usual]) == 0
    (heads, rule, *rows), figures = printed(capsys)
    assert heads.count("|") == rule.count("|") and len(rows) == len(figures["stages"]) == 2
    for row, stage in zip(rows, figures["stages"]):
        assert row.startswith(f"| recipe | 8 | {stage['stage']} | zero") and row.count("|") == heads.count("|")
        assert any(setting == "run.sequence_parallel_size=1" for setting in stage["overrides"])


@pytest.mark.parametrize("arguments, said", [
    (["no_such_recipe"], "no_such_recipe: no such recipe file"),
    (["wan_1.3b", "--gpus", "12"], "--gpus 12 is not a multiple of --node 8"),
    (["wan_1.3b", "--gpus", "8", "run.sequence_parallel_size=5"], "run.sequence_parallel_size=5 does not divide"),
    (
        ["wan_1.3b", "--gpus", "8", "run.sequence_parallel_size=3"],
        "run.sequence_parallel_size=3 does not divide the 8 ranks",
    ),
    (
        ["wan_1.3b", "--gpus", "8", "optimizer.micro_batch=3"],
        "batch=64 is not a multiple of optimizer.micro_batch=3 x 8 replicas",
    ),
    (["wan_1.3b", "--gpus", "512"], "no setting splits batch 64 over 512 ranks"),
    (["wan_14b", "--gpus", "512"], "what would run: run.deepspeed="),
    (["wan_1.3b", "stages.1.frames=0", "data.train="], "stage self_resampling: frames is 0"),
    (["wan_1.3b", "--size", "480x830"], "must be multiples of 16"),
    (["wan_1.3b", "--size", "480"], "HEIGHTxWIDTH"),
    (["wan_1.3b", "--mfu", "0"], "--mfu must be positive"),
    (["wan_1.3b", "--mfu", "40"], "--mfu 40: a share of the peak, at most 1"),
    (["wan_1.3b", "run.deepspeed=nowhere.json"], "nowhere.json: no such file"),
])  # fmt: skip
def test_bad_input_is_one_clear_line(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert plan.main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.slow
def test_planned_is_what_a_step_really_takes(tmp_path, capsys, monkeypatch):
    """Real steps through DeepSpeed in a process of their own: within 10 % of its peak."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))  # the process must find this code, wherever it starts
    stage = {"name": "self", "history": "autoregressive", "frames": 15, "batch": 2, "steps": 1}
    model = plain_settings(dim=256, ffn_dim=1024, heads=4, layers=4)
    path = recipe_file(tmp_path, model=model, stages=[stage], optimizer={"micro_batch": 2})
    assert plan.main([path, "--measure", "--size", "96x96", "--json"]) == 0
    _, figures = printed(capsys)
    assert figures["stages"][0]["measured"] > 150 * 2**20
    assert 0.9 < figures["ratio"] < 1.1
