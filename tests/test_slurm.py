"""The batch script, with stand-ins for Slurm's own commands."""

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
