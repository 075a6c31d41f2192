"""The method's claims, tested where anyone can run them:  python -m rf_train.evidence [EXPERIMENT ...]

Trains and evaluates every arm of the experiments with every seed, and writes a page of what they gave. It can be
stopped anywhere: the same command goes on. Hours on two CPU cores; `--quick` only shows that everything runs.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from tqdm import tqdm

from data_prep.card import NotADataset, read_card
from data_prep.command import run_command
from data_prep.files import locked
from rf_train.engine.collectives import free_port
from rf_train.evidence.experiments import FILE, Arm, Plan, chosen, read_evidence
from rf_train.evidence.results import add_record, check_same_plan, read_records, record_of, write_page


def runs_needed(plan: Plan, names: list[str], arms: list[str], seeds: int) -> list[tuple[Arm, int]]:
    """(arm, seed) of every run that the experiments compare, seed by seed."""
    wanted: dict[tuple[int, str], None] = {}
    for experiment in chosen(plan.evidence, names):
        for seed in range(seeds or experiment.seeds):
            wanted.update({(seed, arm): None for arm in experiment.arms if not arms or arm in arms})
    missing = set(arms) - {arm for _, arm in wanted}
    if missing:
        raise ValueError(f"no chosen experiment has the arm {', '.join(sorted(missing))}")
    return [(plan.evidence.arm[arm], seed) for seed, arm in sorted(wanted, key=lambda pair: pair[0])]


def missing_data(plan: Plan, arms: Iterable[str]) -> str:
    """The first dataset that these arms need and that isn't there; "" if there are all."""
    for arm in arms:
        for folder in plan.datasets(plan.evidence.arm[arm]):
            try:
                read_card(folder)
            except NotADataset:
                return folder
    return ""


def possible(plan: Plan, names: list[str], arms: list[str]) -> list[str]:
    """The names of the experiments to do: without `names`, those that need something to be given are left out.

    Raises ValueError when data isn't there.
    """
    found = []
    for experiment in chosen(plan.evidence, names):
        missing = missing_data(plan, [arm for arm in experiment.arms if not arms or arm in arms])
        if missing and experiment.needs and not names:
            print(f"{experiment.name}: left out, it needs {experiment.needs}", file=sys.stderr)
        elif missing:
            needed = experiment.needs or "what `make evidence` draws and encodes"
            raise ValueError(f"{missing}: no dataset; the experiment {experiment.name} needs {needed}")
        else:
            found.append(experiment.name)
    if not found:
        raise ValueError("no experiment is left to do")
    return found


def run_arm(plan: Plan, arm: Arm, seed: int) -> None:
    """Trains an arm, after the one that it starts from, and evaluates it. What is done already is not done again."""
    train(plan, arm, seed)
    run(plan.evaluation(arm, seed), plan.folder(arm.name, seed))


def train(plan: Plan, arm: Arm, seed: int) -> None:
    if arm.start:
        train(plan, plan.evidence.arm[arm.start], seed)
    run(plan.training(arm, seed), plan.folder(arm.name, seed))


def run(command: list[str], folder: Path) -> None:
    """Runs one of the plan's commands; what it prints goes to a file beside the run's folder.

    Raises ValueError with the last error that it printed when it fails.
    """
    here = Path(sys.executable).parent
    program, *rest = command
    if program == "deepspeed":
        launcher = str(here / program) if (here / program).is_file() else program
        start = [launcher, "--master_port", str(free_port())]
    else:
        start = [sys.executable]
    log = folder.with_suffix(".log")
    # The child has the lock, too: when this process is killed, a next one waits for the child's end.
    with locked(folder.with_suffix(".lock")) as lock, open(log, "a") as file:
        before = file.tell()
        done = subprocess.run([*start, *rest], stdout=file, stderr=subprocess.STDOUT, pass_fds=[lock])
    if done.returncode:
        lines = log.read_bytes()[before:].decode(errors="replace").splitlines()
        errors = [line for line in lines if line.startswith("error")]
        raise ValueError(f"{' '.join(command)}: exit code {done.returncode}: {errors[-1] if errors else f'see {log}'}")


def gather_evidence(options: argparse.Namespace) -> None:
    """Does what the command line asks for."""
    ranks = options.ranks or torch.cuda.device_count() or 2
    out = Path(options.out or ("runs/evidence-quick" if options.quick else "runs/evidence"))
    plan = Plan(read_evidence(Path(options.file)), out, ranks, options.quick)
    seeds = options.seeds or (2 if options.quick else 0)
    needed = runs_needed(plan, possible(plan, options.experiments, options.arm), options.arm, seeds)
    if options.list:
        for arm, seed in needed:
            print(" ".join(plan.training(arm, seed)), " ".join(plan.evaluation(arm, seed)), sep="\n")
        return
    path = plan.out / "results.json"
    records = read_records(path)
    for arm, seed in needed:
        if str(seed) in records.get(arm.name, {}):
            check_same_plan(plan, arm, seed, records[arm.name][str(seed)])
    for arm, seed in tqdm(needed, unit="run", desc="evidence"):
        if str(seed) not in records.get(arm.name, {}):
            tqdm.write(f"{arm.name}, seed {seed}")
            run_arm(plan, arm, seed)
            records = add_record(plan, arm, seed, record_of(plan, arm, seed))
    print(write_page(plan, records))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="rf_train.evidence", description="Trains and compares what the method claims."
    )
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help="default: all of experiments.yaml")
    parser.add_argument("--file", default=str(FILE), help="the experiments (the shipped experiments.yaml)")
    parser.add_argument("--out", help="folder of the runs and the results (runs/evidence; quick: runs/evidence-quick)")
    parser.add_argument("--arm", action="append", default=[], help="only this arm; can be given again")
    parser.add_argument("--seeds", type=int, default=0, help="seeds 0 .. N - 1 (default: as the experiment says)")
    parser.add_argument("--ranks", type=int, default=0, help="ranks of each training (default: the GPUs, else 2)")
    parser.add_argument("--quick", action="store_true", help="few steps and clips: only to see that everything runs")
    parser.add_argument("--list", action="store_true", help="print the commands, and run none")
    options = parser.parse_args(arguments)
    if min(options.seeds, options.ranks) < 0:
        parser.error("--seeds and --ranks must not be negative")
    return run_command(lambda: gather_evidence(options))


if __name__ == "__main__":
    sys.exit(main())
