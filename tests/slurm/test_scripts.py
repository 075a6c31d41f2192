"""What the batch scripts ask Slurm for, with stand-ins for its commands; and that shellcheck finds nothing in them."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.distributed import PROJECT

# What Slurm tells a job of one node and one task.
JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node-1", "SLURM_TASKS_PER_NODE": "1"}


@pytest.fixture
def batch(tmp_path):
    """`batch(script, *arguments, **environment)` runs a script. `srun` prints what it is asked to do."""
    for name, body in {
        "srun": 'echo "$SRUN_CPUS_PER_TASK"; printf "%s\\n" "$@"',
        "scontrol": 'case "$*" in "show hostnames"*) echo node-1 ;; "show node"*) echo " NodeAddr=10.0.0.1 X=" ;; esac',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def run(script: str, *arguments: str, cwd: Path = PROJECT, **environment: str) -> subprocess.CompletedProcess:
        command = ["bash", str(PROJECT / "slurm" / script), *arguments]
        return subprocess.run(command, cwd=cwd, env={**path, **JOB, **environment}, capture_output=True, text=True)

    return run


@pytest.mark.parametrize("asked, expected", [({}, "8"), ({"SLURM_CPUS_PER_TASK": "16"}, "16")], ids=["", "16"])
@pytest.mark.parametrize("script", ["train.sbatch", "evaluate.sbatch"])
def test_srun_gives_each_task_the_cores_that_sbatch_was_given(batch, script, asked, expected):
    """By default as many as the script's own line asks sbatch for."""
    done = batch(script, "demo", **asked)
    assert done.returncode == 0 and done.stdout.splitlines()[0] == expected
    assert "#SBATCH --cpus-per-task=8\n" in (PROJECT / "slurm" / script).read_text()


@pytest.mark.parametrize(
    "array, job",
    [
        ({"ID": "0", "MIN": "0", "COUNT": "4"}, "0/4"),
        ({"ID": "3", "MIN": "0", "COUNT": "4"}, "3/4"),
        ({"ID": "10", "MIN": "5", "COUNT": "8", "STEP": "1"}, "5/8"),
        ({"ID": "6", "MIN": "0", "COUNT": "4", "STEP": "2"}, "3/4"),
        ({"ID": "7", "MIN": "3", "COUNT": "2"}, "0/2"),  # --array=3,7: all parts are shared by two tasks
    ],
    ids=str,
)
def test_a_task_of_an_array_is_a_job_of_the_encoding(batch, array, job):
    slurm = {f"SLURM_ARRAY_TASK_{name}": value for name, value in array.items()}
    done = batch("encode.sbatch", "my videos", "data", "--fps", "16", PYTHON="python3", **slurm)
    asked = ["python3", "-m", "data_prep.encode", "my videos", "data", "--fps", "16", "--job", job]
    assert done.stdout.splitlines()[1:] == asked


@pytest.mark.parametrize(
    "script, arguments, environment, message",
    [
        ("train.sbatch", [], {}, "usage: sbatch"),
        ("encode.sbatch", ["videos"], {}, "usage: sbatch"),
        ("evaluate.sbatch", [], {}, "usage: sbatch"),
        ("train.sbatch", ["demo"], {"SLURM_TASKS_PER_NODE": "2,1"}, "nodes have different numbers of tasks: 2,1"),
        ("train.sbatch", ["demo"], {"SLURM_GPUS_ON_NODE": "8"}, "give sbatch --ntasks-per-node 8"),
        ("train.sbatch", ["demo"], {"SITE": "none.sh"}, "no none.sh in"),
    ],
)
def test_what_is_wrong_is_one_line(batch, script, arguments, environment, message):
    done = batch(script, *arguments, **environment)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and message in done.stderr
    assert done.stderr.count("\n") == 1 and not done.stdout


def test_a_job_submitted_from_another_folder_says_where_to_submit_it(batch, tmp_path):
    for script in ("train.sbatch", "encode.sbatch", "evaluate.sbatch"):
        done = batch(script, "a", "b", cwd=tmp_path)
        assert done.returncode == 2 and f"{tmp_path} has no slurm/common.sh" in done.stderr


def test_as_many_tasks_as_gpus_are_fine(batch):
    done = batch("train.sbatch", "demo", SLURM_TASKS_PER_NODE="8(x4)", SLURM_GPUS_ON_NODE="8")
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "demo"


def test_shellcheck_finds_nothing():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    scripts = sorted(path for path in (PROJECT / "slurm").iterdir() if path.suffix in (".sh", ".sbatch"))
    done = subprocess.run(["shellcheck", "-x", *scripts], cwd=PROJECT, capture_output=True, text=True)
    assert len(scripts) == 5 and done.returncode == 0, done.stdout
