"""A real Slurm of two nodes on this machine, for the length of a test session. Nothing outside its folder changes."""

import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.distributed import PROJECT, free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
FirstJobId={first_job}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=2,bf_interval=2
KillWait={kill_wait}
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 Gres=gpu:2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 Gres=gpu:2
PartitionName=low Nodes=n1,n2 Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE
PartitionName=grace Nodes=n1,n2 MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=n1,n2 MaxTime=INFINITE PriorityTier=2
"""


def missing_programs() -> list[str]:
    """Which of Slurm's and munge's programs are not installed. Daemons are in /usr/sbin, which users may not search."""
    return [name for name in PROGRAMS if shutil.which(name, path=search_path()) is None]


def search_path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


class Cluster:
    """A running Slurm. Jobs write `job-ID.log` where they are submitted from."""

    kill_wait = 30  # seconds from SIGTERM to SIGKILL; Slurm's default

    def __init__(self, folder: Path):
        self.folder = folder
        python = {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHON": sys.executable}
        self.environment = {**os.environ, "PATH": search_path(), "SLURM_CONF": str(folder / "slurm.conf"), **python}

    def run(self, *command: str, cwd: Path | None = None, check: bool = True, **environment: str) -> str:
        """Runs one of Slurm's commands. Returns its output, errors included."""
        done = subprocess.run(
            command, cwd=cwd, env={**self.environment, **environment}, text=True, timeout=120,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}"
        return done.stdout

    def submit(self, folder: Path, *arguments: str | Path, **environment: str) -> int:
        """Submits a job from `folder`. Returns its id."""
        command = ["sbatch", "--parsable", f"--output={folder}/job-%j.log", *map(str, arguments)]
        return int(self.run(*command, cwd=folder, **environment))

    def job(self, job: int | str) -> dict[str, str]:
        """What Slurm says of a job: `scontrol show job`, as a dict."""
        words = self.run("scontrol", "--oneliner", "show", "job", str(job)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, what: str, condition: Callable[[], object], seconds: float = 120) -> None:
        """Waits for a condition. Raises an AssertionError with all jobs and their logs when it doesn't come."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"no {what} in {seconds} s\n{self.run('scontrol', 'show', 'job')}"
            time.sleep(0.2)

    def wait_for_state(self, job: int, *states: str, seconds: float = 120) -> None:
        self.wait_for(f"{' or '.join(states)} of job {job}", lambda: self.job(job)["JobState"] in states, seconds)

    def wait_for_nodes(self) -> None:
        """Waits until both nodes are idle."""
        idle = ["sinfo", "--noheader", "--Node", "--partition=low", "--states=idle", "--format=%N"]
        self.wait_for("idle nodes", lambda: self.run(*idle, check=False).split() == ["n1", "n2"], 60)

    def end_all_jobs(self) -> None:
        self.run("scancel", "--full", "--signal=KILL", "--user", user_name(), check=False)
        self.run("scancel", "--user", user_name(), check=False)
        self.wait_for("end of all jobs", lambda: not self.run("squeue", "--noheader").strip(), self.kill_wait + 60)


def user_name() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """Starts munge, a controller and two nodes. At the end no process and no file of them is left."""
    folder = Path(tempfile.mkdtemp(prefix="slurm"))
    folder.chmod(0o755)
    ports = [free_port() for _ in range(3)]
    host = socket.gethostname().split(".")[0]
    first_job = random.randrange(1, 9000)  # jobs choose their port by it: two clusters at once have others
    values = {
        "first_job": first_job,
        "host": host,
        "folder": folder,
        "ports": ports,
        "user": user_name(),
        "kill_wait": Cluster.kill_wait,
    }
    (folder / "slurm.conf").write_text(CONF.format(**values))
    for name in ("gpu0", "gpu1"):
        (folder / name).symlink_to("/dev/null")  # Slurm asks only that it is a device
    (folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={folder}/gpu[0-1] Flags=nvidia_gpu_env\n")
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    for name in ("state", "n1", "n2"):
        (folder / name).mkdir()
    cluster = Cluster(folder)
    files = [f"--{kind}={folder}/munge.{kind.split('-')[0]}" for kind in ("socket", "key-file", "pid-file", "log-file")]
    daemons = [
        ["munged", "--foreground", "--force", *files, f"--seed-file={folder}/munge.seed"],
        ["slurmctld", "-D", "-c"],
        ["slurmd", "-D", "-N", "n1"],
        ["slurmd", "-D", "-N", "n2"],
    ]
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        for position, command in enumerate(daemons):
            stack.enter_context(daemon(command, folder / f"daemon-{position}.log", cluster.environment))
            if command[0] == "munged":
                cluster.wait_for("munge", (folder / "munge.socket").exists, 20)
        try:
            cluster.wait_for_nodes()
        except AssertionError as error:
            logs = "".join(f"\n{path}\n{path.read_text()[-3000:]}" for path in sorted(folder.glob("*.log")))
            raise AssertionError(f"{error}{logs}") from None
        stack.callback(cluster.end_all_jobs)
        yield cluster


@contextmanager
def daemon(command: list[str], log: Path, environment: dict[str, str]) -> Iterator[None]:
    with open(log, "w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
