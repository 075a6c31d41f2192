"""Training on a real Slurm of two nodes: whatever ends a job, it goes on by itself to the run's end."""

import contextlib
import os
import signal
from pathlib import Path

import pytest

from rf_train.engine import checkpoint
from rf_train.engine.run_folder import read_events
from rf_train.run_log import read_rows
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import write_recipe

TWO_NODES = ("--nodes=2", "--cpus-per-task=4")  # the whole cluster, with a task on each node


def rows_of(project: Path) -> int:
    return len(read_rows(project / "run" / "metrics.jsonl"))


def assert_finished(project: Path, steps: int) -> None:
    """Every step once, and a last checkpoint that verifies."""
    assert [row["step"] for row in read_rows(project / "run" / "metrics.jsonl")] == list(range(1, steps + 1))
    assert checkpoint.verified(checkpoint.latest(project / "run"))["step"] == steps


def starts_and_ends(project: Path) -> list[tuple[str, str]]:
    """(event, job) of each start and (event, why) of each end. Where the run stops, it also goes on."""
    events = [event for event in read_events(project / "run") if event["event"] in ("start", "end")]
    for end, start in zip(events[1::2], events[2::2]):
        assert end["step"] == start["step"]
    return [(event["event"], event["job"] if event["event"] == "start" else event["why"]) for event in events]


def weights_of(project: Path) -> dict:
    return checkpoint.read_weights(checkpoint.latest(project / "run"), "master")


def wait_for_rows(cluster: Cluster, project: Path, job: int, restarts: int, rows: int) -> None:
    """Waits until a job that was restarted so often has written so many rows."""

    def there() -> bool:
        found = cluster.job(job)
        assert found["JobState"] not in ("FAILED", "COMPLETED", "TIMEOUT", "CANCELLED"), log_of(project, job)
        return found["Restarts"] == str(restarts) and found["JobState"] == "RUNNING" and rows_of(project) >= rows

    cluster.wait_for(f"{rows} rows after {restarts} restarts of job {job}", there)


def log_of(project: Path, job: int) -> str:
    return (project / f"job-{job}.log").read_text(
        errors="replace"
    )  # Slurm may cut a character of the progress bar in two


@pytest.mark.slow
def test_a_requeued_and_a_preempted_job_go_on_to_the_end_as_if_nothing_had_happened(jobs, project, samples):
    steps = 160
    write_recipe(project / "recipe.yaml", samples, steps, save_every=20)
    job = jobs.submit(project, *TWO_NODES, "slurm/train.sbatch", "recipe.yaml")
    wait_for_rows(jobs, project, job, 0, 25)
    jobs.run("scontrol", "requeue", str(job))
    wait_for_rows(jobs, project, job, 1, 50)
    urgent = jobs.submit(project, "--partition=high", "--cpus-per-task=4", "--wrap=sleep 1")
    jobs.wait_for_state(urgent, "COMPLETED")
    jobs.wait_for_state(job, "COMPLETED")
    assert jobs.job(job)["Restarts"] == "2"
    assert_finished(project, steps)
    log = log_of(project, job)
    assert log.count("from the start") == 1 and log.count("resuming after step") == 2
    assert starts_and_ends(project) == [
        ("start", str(job)), ("end", "stopped by SIGTERM"), ("start", f"{job}.1"), ("end", "stopped by SIGTERM"),
        ("start", f"{job}.2"), ("end", "finished"),
    ]  # fmt: skip

    alone = project / "alone"
    alone.mkdir()
    write_recipe(alone / "recipe.yaml", samples, steps, save_every=20)
    job = jobs.submit(project, *TWO_NODES, "slurm/train.sbatch", "alone/recipe.yaml")
    jobs.wait_for_state(job, "COMPLETED")
    ours, theirs = weights_of(project), weights_of(alone)
    assert all(ours[name].equal(theirs[name]) for name in ours)


@pytest.mark.slow
def test_a_job_requeues_itself_before_its_time_limit(jobs, project, samples):
    """Slurm looks at the limits every half minute, and sends a signal as much earlier."""
    write_recipe(project / "recipe.yaml", samples, steps=100_000)  # more than any machine does in a minute
    limit = ("--time=1", "--signal=USR1@1")
    job = jobs.submit(project, *TWO_NODES, *limit, "slurm/train.sbatch", "recipe.yaml", MIN_SECONDS="0")
    jobs.wait_for("restart", lambda: jobs.job(job)["Restarts"] == "1", seconds=240)
    wait_for_rows(jobs, project, job, 1, rows_of(project) + 1)
    jobs.run("scancel", str(job))
    jobs.wait_for("end of the job's processes", lambda: not jobs.run("squeue", "--noheader").strip())
    log = log_of(project, job)
    assert log.count("from the start") == 1 and log.count("resuming after step") == 1
    assert starts_and_ends(project) == [
        ("start", str(job)), ("end", "stopped by SIGUSR1"), ("start", f"{job}.1"), ("end", "stopped by SIGTERM"),
    ]  # fmt: skip
    steps = rows_of(project)
    assert_finished(project, steps)


@pytest.mark.slow
def test_a_run_that_stops_soon_after_its_start_is_not_requeued(jobs, project, samples):
    """It would stop again, for example because the signal is due longer before the end than the job may last."""
    write_recipe(project / "recipe.yaml", samples, 4000)
    job = jobs.submit(project, *TWO_NODES, "slurm/train.sbatch", "recipe.yaml")
    wait_for_rows(jobs, project, job, 0, 1)
    jobs.run("scancel", "--signal=USR1", str(job))
    jobs.wait_for_state(job, "FAILED")
    found = jobs.job(job)
    assert found["Restarts"] == "0" and found["ExitCode"] == "75:0"
    assert "not requeued. Is --time long enough" in log_of(project, job)


@pytest.mark.slow
def test_a_cancelled_job_saves_and_stays_cancelled(jobs, project, samples):
    write_recipe(project / "recipe.yaml", samples, 4000)
    job = jobs.submit(project, *TWO_NODES, "slurm/train.sbatch", "recipe.yaml", MIN_SECONDS="0")
    wait_for_rows(jobs, project, job, 0, 5)
    jobs.run("scancel", str(job))
    jobs.wait_for_state(job, "CANCELLED")
    jobs.wait_for("end of the job's processes", lambda: not jobs.run("squeue", "--noheader").strip())
    assert jobs.job(job)["JobState"] == "CANCELLED" and jobs.job(job)["Restarts"] == "0"
    assert checkpoint.verified(checkpoint.latest(project / "run"))["step"] == rows_of(project)


@pytest.mark.slow
@pytest.mark.parametrize("rows, words", [(5, "the run has stopped and saved after"), (0, "")])
def test_a_preemption_with_a_grace_time_requeues_a_run_however_short(jobs, project, samples, rows, words):
    """Slurm asks the tasks alone then, and requeues only what still runs when the grace time is over.

    Without a row, Python is still starting.
    """
    write_recipe(project / "recipe.yaml", samples, 4000)
    job = jobs.submit(project, *TWO_NODES, "--partition=grace", "slurm/train.sbatch", "recipe.yaml")
    wait_for_rows(jobs, project, job, 0, rows)
    jobs.submit(project, "--partition=high", "--cpus-per-task=4", "--wrap=sleep 1")
    jobs.wait_for("restart", lambda: jobs.job(job)["Restarts"] == "1")
    assert words in log_of(project, job)
    wait_for_rows(jobs, project, job, 1, rows_of(project) + 1)


@pytest.mark.slow
def test_a_bad_recipe_fails_once(jobs, project):
    job = jobs.submit(project, *TWO_NODES, "slurm/train.sbatch", "none.yaml")
    jobs.wait_for_state(job, "FAILED")
    found = jobs.job(job)
    assert found["ExitCode"] == "2:0" and found["Restarts"] == "0"
    assert "error: none.yaml: no such recipe file" in log_of(project, job)


def process_of_rank(job: int, rank: int) -> int:
    """The process of a rank, which is the one that Slurm started: Python has replaced the task's shell."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            variables = (folder / "environ").read_bytes().split(b"\0")
            wanted = {f"SLURM_JOB_ID={job}".encode(), f"RANK={rank}".encode()}
            if wanted <= set(variables) and b"slurmstepd" in Path(f"/proc/{parent_of(folder)}/cmdline").read_bytes():
                return int(folder.name)
    raise AssertionError(f"job {job} has no rank {rank}")


def parent_of(folder: Path) -> str:
    return (folder / "stat").read_text().rsplit(")", 1)[1].split()[1]


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_job_within_seconds(jobs, project, samples):
    write_recipe(project / "recipe.yaml", samples, 4000)
    job = jobs.submit(project, *TWO_NODES, "slurm/train.sbatch", "recipe.yaml", MIN_SECONDS="0")
    wait_for_rows(jobs, project, job, 0, 5)
    os.kill(process_of_rank(job, 1), signal.SIGKILL)
    jobs.wait_for_state(job, "FAILED", seconds=20)
    assert jobs.job(job)["Restarts"] == "0" and jobs.job(job)["ExitCode"] == "137:0"


@pytest.mark.parametrize("script", ["train.sbatch", "evaluate.sbatch"])
@pytest.mark.parametrize("options", [["--gpus-per-node=1"], []], ids=["asked for", "not asked for"])
def test_gpus_that_a_task_can_not_use_are_an_error(jobs, project, script, options):
    """Slurm gives the job GPUs here, which are not there."""
    job = jobs.submit(project, "--cpus-per-task=4", *options, f"slurm/{script}", "demo", DS_ACCELERATOR="")
    jobs.wait_for_state(job, "FAILED")
    assert jobs.job(job)["ExitCode"] == "2:0" and log_of(project, job).count("no GPU that this task can use") == 1


@pytest.mark.slow
def test_an_evaluation_of_what_is_no_run_fails_once(jobs, project):
    job = jobs.submit(project, "--cpus-per-task=4", "slurm/evaluate.sbatch", "none", "--clips", "2")
    jobs.wait_for_state(job, "FAILED")
    assert jobs.job(job)["ExitCode"] == "2:0" and jobs.job(job)["Restarts"] == "0"
    assert log_of(project, job).startswith("error: none")


@pytest.mark.parametrize(
    "options, gpus",
    [
        (["--nodes=2", "--gpus-per-node=2", "--ntasks-per-node=2"], ["0,1"] * 4),
        (["--nodes=2", "--gpus-per-task=1", "--ntasks-per-node=2"], ["0", "0", "1", "1"]),
    ],
    ids=["per node", "per task"],
)
def test_tasks_know_their_rank_and_their_gpus(jobs, project, options, gpus):
    """A stand-in for Python prints what each task is given."""
    said = "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $CUDA_VISIBLE_DEVICES"
    (project / "python").write_text(f'#!/bin/sh\nsleep 0.$RANK\necho "task {said}"\n')
    (project / "python").chmod(0o755)
    python = str(project / "python")
    job = jobs.submit(project, *options, "--cpus-per-task=2", "slurm/train.sbatch", "demo", PYTHON=python)
    jobs.wait_for_state(job, "COMPLETED", "FAILED")
    tasks = [line.split()[1:] for line in log_of(project, job).splitlines() if line.startswith("task ")]
    assert [task[:5] for task in tasks] == [[str(n), str(n % 2), "4", "2", "127.0.0.1"] for n in range(4)]
    assert sorted(task[5] for task in tasks) == gpus


def test_a_job_that_stops_says_what_becomes_of_it(jobs, project):
    """A stand-in for Python stops at once, as a run that has saved."""
    (project / "python").write_text("#!/bin/sh\nexit 75\n")
    (project / "python").chmod(0o755)
    start = ("--cpus-per-task=1", "slurm/train.sbatch", "demo")
    variables = {"PYTHON": str(project / "python"), "MIN_SECONDS": "0"}
    requeued = jobs.submit(project, *start, **variables)
    refused = jobs.submit(project, "--no-requeue", *start, **variables)
    jobs.wait_for("requeued job", lambda: jobs.job(requeued)["Restarts"] != "0")
    jobs.wait_for_state(refused, "FAILED")
    assert "the run has stopped and saved after" in log_of(project, requeued)
    assert "refuses" not in log_of(project, requeued)
    assert "Slurm refuses to requeue; submit the same command again" in log_of(project, refused)


@pytest.mark.slow
def test_a_job_goes_on_when_its_node_fails(jobs, project, samples):
    """Slurm requeues it; nobody asks the run to save."""
    write_recipe(project / "recipe.yaml", samples, 4000, save_every=5)
    job = jobs.submit(project, "--cpus-per-task=4", "slurm/train.sbatch", "recipe.yaml")
    wait_for_rows(jobs, project, job, 0, 6)
    node = jobs.job(job)["NodeList"]
    try:
        jobs.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
        wait_for_rows(jobs, project, job, 1, rows_of(project) + 10)
        assert "resuming after step" in log_of(project, job)
    finally:
        jobs.end_all_jobs()
        jobs.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)  # it may be back already
        jobs.wait_for_nodes()
