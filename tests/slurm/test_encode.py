"""The preparation of a dataset by an array on a real Slurm: tasks are killed and requeued, by others or themselves."""

import sys
from pathlib import Path

import pytest

from data_prep import default_codec, draw, encode
from data_prep.card import read_card
from data_prep.index import SampleIndex
from data_prep.verify import verify

VIDEOS, CLIPS = 24, 10  # clips of each video
SECONDS_PER_SHARD = 0.2
SLOW_PYTHON = """#!{python}
import runpy, sys, time
from data_prep.shards import ShardWriter

finish = ShardWriter.finish

def slow_finish(*arguments):
    time.sleep({seconds})
    return finish(*arguments)

ShardWriter.finish = slow_finish
assert sys.argv[1] == "-m"
sys.argv = sys.argv[2:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
OPTIONS = ("--size", "32x32", "--frames", "9", "--videos-per-part", "1", "--samples-per-shard", "2")


@pytest.fixture(scope="module")
def encoded(tmp_path_factory) -> Path:
    """A folder with `my videos`, and `alone`, the dataset that one job makes of them."""
    folder = tmp_path_factory.mktemp("encoded")
    assert draw.main([str(folder / "my videos"), "--videos", str(VIDEOS), "--frames", "90", "--size", "32x32"]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(default_codec, "STEPS", 5)
        assert encode.main([str(folder / "my videos"), str(folder / "alone"), *OPTIONS]) == 0
    return folder


def submit(cluster, project: Path, encoded: Path, *options: str, **environment: str) -> int:
    """Submits an array of four tasks that makes `dataset`."""
    arguments = (
        encoded / "my videos",
        "dataset",
        *OPTIONS,
        "--codec",
        f"default:{encoded / 'alone'}",
        "--workers",
        "1",
    )
    array = ("--array=0-3", "--cpus-per-task=2")
    return cluster.submit(project, *array, *options, "slurm/encode.sbatch", *arguments, **environment)


def slow_python(path: Path) -> Path:
    """Writes a Python to run tasks with that takes SECONDS_PER_SHARD longer for each shard: no machine is too fast."""
    path.write_text(SLOW_PYTHON.format(python=sys.executable, seconds=SECONDS_PER_SHARD))
    path.chmod(0o755)
    return path


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("shard-*.tar")}


def assert_whole(project: Path, encoded: Path) -> None:
    """Each clip of each video once, and the same bytes as from one job that nobody killed."""
    out = project / "dataset"
    assert verify(out) == VIDEOS * CLIPS
    index = SampleIndex(out, read_card(out))
    keys = [index.key(number) for number in range(len(index))]
    assert sorted(keys) == [f"{video:06d}_{clip:04d}" for video in range(VIDEOS) for clip in range(CLIPS)]
    assert shards(out) == shards(encoded / "alone")


def wait_for_array(cluster, job: int) -> int:
    """Waits until all tasks of an array are complete. Returns how often they were restarted."""
    for task in range(4):
        cluster.wait_for_state(f"{job}_{task}", "COMPLETED", "FAILED", "TIMEOUT", seconds=240)
    found = [cluster.job(f"{job}_{task}") for task in range(4)]
    assert [task["JobState"] for task in found] == ["COMPLETED"] * 4
    return sum(int(task["Restarts"]) for task in found)


@pytest.mark.slow
def test_tasks_that_are_killed_and_requeued_lose_no_clip_and_make_none_twice(jobs, project, encoded):
    """First by Slurm, then by themselves, on the signal that comes before the time limit."""
    job = submit(jobs, project, encoded, MIN_SECONDS="0", PYTHON=str(slow_python(project / "python")))
    for enough, command in ((1, ["scontrol", "requeue"]), (30, ["scancel", "--batch", "--signal=USR1"])):
        jobs.wait_for(f"{enough} shards", lambda: len(shards(project / "dataset")) >= enough)  # noqa: B023
        assert len(shards(project / "dataset")) < VIDEOS * CLIPS / 2
        assert not (project / "dataset" / "dataset.json").exists()
        for task in range(4):
            jobs.run(*command, f"{job}_{task}", check=False)  # one may not run at the moment
    restarts = wait_for_array(jobs, job)
    said = "".join(path.read_text() for path in project.glob("job-*.log")).count("the time limit is near after")
    assert 1 <= said < restarts  # the others are Slurm's
    assert_whole(project, encoded)
