"""The batch scripts, with stand-ins for Slurm's own commands."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.distributed import PROJECT

SCRIPT = PROJECT / "slurm/train.sbatch"


def cores_that_srun_is_asked_for(folder: Path, **slurm: str) -> str:
    """Runs the script. Returns SRUN_CPUS_PER_TASK as srun finds it."""
    for name, body in {"srun": 'echo "$SRUN_CPUS_PER_TASK"', "scontrol": "echo node-1"}.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node-1", "SLURM_JOB_ID": "7"}
    command = ["bash", str(SCRIPT), "demo"]
    return subprocess.run(command, env={**environment, **slurm}, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("asked, expected", [({}, "8\n"), ({"SLURM_CPUS_PER_TASK": "16"}, "16\n")], ids=["", "16"])
def test_srun_gives_each_task_the_cores_that_sbatch_was_given(tmp_path, asked, expected):
    """By default as many as the script's own line asks sbatch for."""
    assert cores_that_srun_is_asked_for(tmp_path, **asked) == expected
    assert "#SBATCH --cpus-per-task=8\n" in SCRIPT.read_text()


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
def test_a_task_of_an_array_is_a_job_of_the_encoding(tmp_path, array, job):
    (tmp_path / "srun").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    slurm = {f"SLURM_ARRAY_TASK_{name}": value for name, value in array.items()}
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": "python3", **slurm}
    command = ["bash", str(PROJECT / "slurm/encode.sbatch"), "my videos", "data", "--fps", "16"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"python3 -m data_prep.encode my videos data --fps 16 --job {job}\n"
