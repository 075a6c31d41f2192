"""What a recipe needs, and the recommended settings:  python -m rf_train.plan RECIPE [a.b=c ...] --gpus 64

For each stage: memory per GPU, FLOP, bytes over links, a lower bound for the time of a step (`rf_train.planning`), and
the fastest settings that fit. With --measure it runs real steps, and prints planned and measured peak side by side.
Memory is printed in GiB (2^30), traffic in GB (1e9).
"""

import argparse
import dataclasses
import gc
import json
import logging
import os
import resource
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from data_prep.command import Help, require_finite, run_command
from data_prep.geometry import WAN_2_1, parse_size
from rf_train import config
from rf_train.config import Recipe, Stage
from rf_train.diffusion.batch import Batch
from rf_train.diffusion.randomness import LOSS_DRAWS, make_draws
from rf_train.engine.collectives import start_ranks
from rf_train.engine.devices import gpu_is_usable
from rf_train.engine.state import TrainingState
from rf_train.engine.zero import Engine, build_engine
from rf_train.model.chunks import Routed
from rf_train.planning.costs import (
    GIB,
    Clip,
    Cluster,
    StageCase,
    clip_of,
    flop,
    read_zero,
    seconds,
    step_traffic,
    times,
)
from rf_train.planning.memory import ROOM, fits, memory
from rf_train.planning.search import Found, best, best_by_stage, overrides, stage_cases
from rf_train.train import train_step

# ---- what is printed


def gib(items: dict[str, int]) -> str:
    return ", ".join(f"{name} {size / GIB:.2f}" for name, size in items.items() if size)


def describe(case: StageCase) -> tuple[list[str], dict]:
    """One stage, as lines and as JSON."""
    need, work, traffic, time = memory(case), flop(case), step_traffic(case), times(case)
    floor, cluster, stage, clip = seconds(case), case.cluster, case.stage, case.clip
    slowest = max(time, key=lambda name: time[name])
    verdict = "fits" if fits(case) else "DOES NOT FIT"
    state = sum(need.states.values())
    host = f"; host memory {need.host / GIB:.1f} per GPU" if need.host else ""
    shape = f"{clip.frames} latent frames of {clip.height}x{clip.width}, {len(case.chunk_sizes)} chunks"
    split = f"{case.micro_batch} clips x {case.replicas} replicas x {case.micro_steps} micro-steps"
    by_purpose = {name: sum(pair) / 1e9 for name, pair in traffic.by_purpose.items()}
    purposes = ", ".join(f"{name} {value:.1f}" for name, value in by_purpose.items() if value)
    near, far, outside = traffic.inside / 1e9, traffic.between / 1e9, traffic.host / 1e9
    peak = f"{need.peak / GIB:8.2f} of {cluster.memory / GIB:.0f} in {need.phase}"
    parts = ", ".join(f"{name} {value / 1e15:.2f}" for name, value in work.items() if value)
    links = ", ".join(f"{name} {value:.2f}" for name, value in time.items() if value)
    days = stage.steps * floor / 86400
    lines = [
        f"stage {stage.name}: {stage.history.kind} history, {shape}, batch {stage.batch} = {split}",
        f"  memory per GPU, GiB  always {state / GIB:.2f}: {gib(need.states)}",
        *(
            f"    {name:<18} {(state + sum(items.values())) / GIB:8.2f}: {gib(items)}"
            for name, items in need.phases.items()
        ),
        f"    peak               {peak}: {verdict} with {ROOM:.0%} room{host}",
        f"  PFLOP per step       {sum(work.values()) / 1e15:.2f}: {parts}",
        f"  GB per GPU and step  inside a node {near:.1f}, between nodes {far:.1f}, host {outside:.1f}: {purposes}",
        f"  step at least        {floor:.2f} s ({slowest}): {links}",
        f"                       {stage.batch / floor:.2f} samples/s; {stage.steps} steps in {days:.2f} days",
    ]
    working = {f"{phase}: {name}": size for phase, items in need.phases.items() for name, size in items.items()}
    figures = {
        "stage": stage.name,
        "clip": asdict(clip),
        "memory": {**need.states, **working},
        "peak": need.peak,
        "phase": need.phase,
        "host_memory": need.host,
        "fits": fits(case),
        "flop": work,
        "links": {name: list(pair) for name, pair in traffic.by_purpose.items()},
        "inside": traffic.inside,
        "between": traffic.between,
        "host": traffic.host,
        "times": time,
        "seconds": floor,
        "samples_per_s": stage.batch / floor,
        "days": days,
    }
    return lines, figures


def check_runs(cases: tuple[StageCase, ...], together: Found) -> None:
    """Raises ValueError, with settings that would run, when the recipe's own can't."""
    for case in cases:
        try:
            case.validate()
        except ValueError as error:
            instead = f"what would run: {' '.join(together.overrides)}" if together.overrides else together.why
            raise ValueError(f"{error}; {instead}") from None


def report(recipe: Recipe, name: str, clips: list[Clip], cluster: Cluster) -> tuple[list[str], dict]:
    """The recipe as it is, stage by stage, then the recommended settings."""
    cases = stage_cases(recipe, clips, cluster, read_zero(recipe.run.deepspeed))
    together = best(recipe, clips, cluster)
    check_runs(cases, together)
    gpus = f"{cluster.gpus} GPUs of {cluster.memory / GIB:.0f} GiB, {cluster.gpus_per_node} per node"
    speed = f"{cluster.flops / 1e12:.0f} TFLOP/s at {cluster.mfu:.0%}"
    lines = [
        f"{name} on {gpus}, {speed}; links {cluster.inside / 1e9:.0f} and {cluster.between / 1e9:.0f} GB/s",
        f"{cases[0].parameters:,} parameters, {' '.join(overrides(recipe))}",
    ]
    stages, alone = [], best_by_stage(recipe, clips, cluster)
    for case, found in zip(cases, alone):
        text, figures = describe(case)
        lines += text
        stages.append({**figures, "best": found.plain()})
    days = sum(figures["days"] for figures in stages)
    lines += [
        f"all stages: {days:.1f} days at least, at {cluster.mfu:.0%} of the peak",
        f"recommended settings, with {ROOM:.0%} room",
    ]
    lines += describe_found("one job", together)
    for case, found in zip(cases, alone):
        lines += describe_found(f"{case.stage.name} alone", found)
    plan = {"plan": name, "cluster": asdict(cluster), "parameters": cases[0].parameters}
    return lines, {**plan, "stages": stages, "days": days, "best": together.plain()}


def describe_found(title: str, found: Found) -> list[str]:
    if not found.overrides:
        return [f"  {title}: {found.why}"]
    days = sum(case.stage.steps * seconds(case) for case in found.cases) / 86400
    costs = f"{days:.2f} days, peak {found.peak / GIB:.1f} GiB"
    return [f"  {title}: {' '.join(found.overrides)}   {costs}", f"    {found.why}"]


def markdown(recipe: Recipe, name: str, clips: list[Clip], cluster: Cluster) -> tuple[list[str], dict]:
    """A Markdown table: for each stage, in a job of its own, the recommended settings and their costs."""
    heads = ["recipe", "GPUs", "stage", "settings", "peak, GiB", "PFLOP per step", "step, s", "days"]
    lines, figures = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"], []
    for stage, found in zip(recipe.stages, best_by_stage(recipe, clips, cluster)):
        figures.append({"stage": stage.name, **found.plain()})
        head = f"| {name} | {cluster.gpus} | {stage.name} |"
        if not found.cases:
            lines.append(f"{head} {found.why} | | | | |")
            continue
        case = found.cases[0]
        zero = Path(case.zero.file).stem + ("" if case.gather_for_rollout or not case.rolls_out else ", not gathered")
        split = f"sequence {case.sequence_ranks}, micro-batch {case.micro_batch}"
        settings = f"{zero}, {split}, {case.recipe.model.checkpointing}"
        work, step = sum(flop(case).values()) / 1e15, seconds(case)
        costs = f"{found.peak / GIB:.0f} | {work:.0f} | {step:.1f} | {case.stage.steps * step / 86400:.1f}"
        lines.append(f"{head} {settings} | {costs} |")
    return lines, {"plan": name, "cluster": asdict(cluster), "stages": figures}


# ---- measured


def measure(recipe: Recipe, clips: list[Clip]) -> tuple[list[str], dict]:
    """Compares planned and measured peak of every stage, on one rank of this machine, in a process of its own.

    It runs real steps (`train.train_step`) on random clips, with one micro-step each. On a GPU the peak is what torch
    allocated. On a CPU it is the growth of resident memory since before the engine was built. A tiny engine runs first,
    so that all code is loaded by then.
    """
    device = "cuda" if gpu_is_usable() else "cpu"
    cluster = Cluster(gpus=1, gpus_per_node=1, device=device)
    stages = tuple(replace(stage, batch=recipe.optimizer.micro_batch, warmup=0) for stage in recipe.stages)
    recipe = replace(recipe, stages=stages, run=replace(recipe.run, sequence_parallel_size=1))
    zero = read_zero(recipe.run.deepspeed)
    if zero.offloads and device == "cpu":
        raise ValueError(
            f"{zero.file} offloads to host memory, which on a CPU is the same: there is nothing to measure"
        )
    cases = stage_cases(recipe, clips, cluster, zero)
    work = json.dumps(
        {
            "recipe": config.to_dict(recipe),
            "clips": [dataclasses.astuple(clip) for clip in clips],
            "kept": [case.kept_blocks for case in cases],
        }
    )
    # Freed memory goes back to the system at once, so that the peak is what is in use, not what the allocator keeps.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", "from rf_train.plan import print_measured_peaks; print_measured_peaks()"]
    done = subprocess.run(command, input=work, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"the measured run failed:\n{done.stderr[-3000:]}")
    peaks = json.loads(done.stdout.splitlines()[-1])
    precision = "bf16" if cases[0].value_bytes == 2 else "fp32"
    lines = [f"one rank on {device}, {precision}, checkpointing {recipe.model.checkpointing}: peak in MiB"]
    figures = []
    for case, peak in zip(cases, peaks):
        planned = memory(case).peak
        ratio = planned / peak
        sizes = f"planned {planned / 2**20:9.1f}   measured {peak / 2**20:9.1f}   ratio {ratio:.3f}"
        lines.append(f"  {case.stage.name:<24} {sizes}")
        figures.append({"stage": case.stage.name, "planned": planned, "measured": peak, "ratio": ratio})
    largest = max(figures, key=lambda row: row["measured"])
    about = {"measure": recipe.run.deepspeed, "device": device, "checkpointing": recipe.model.checkpointing}
    return lines, {**about, "stages": figures, "ratio": largest["ratio"]}


def print_measured_peaks() -> None:
    """The measuring process: reads recipe and clips from its input, prints every stage's peak in bytes as JSON."""
    logging.disable(logging.WARNING)
    work = json.load(sys.stdin)
    recipe, clips = config.from_dict(work["recipe"]), [Clip(*clip) for clip in work["clips"]]
    ranks = start_ranks()
    small_model = replace(recipe.model, dim=16 * recipe.model.heads, ffn_dim=64, layers=2)
    small, patch = replace(recipe, model=small_model), 2 * recipe.model.patch
    routed = [stage.attention.top_k for stage in recipe.stages if isinstance(stage.attention, Routed)]
    frames = min(max(clip.frames for clip in clips), (3 + max(routed, default=0)) * recipe.model.chunk)
    engine = build_engine(small, ranks)
    state = TrainingState(engine, small.optimizer.ema)
    for stage in small.stages:
        peak_of_steps(engine, state, small, stage, Clip(frames, patch, patch))
    engine.destroy()
    del engine, state
    gc.collect()
    before = resident_bytes()
    engine = build_engine(recipe, ranks)
    state = TrainingState(engine, recipe.optimizer.ema)
    peaks = []
    for stage, clip, kept in zip(recipe.stages, clips, work["kept"]):
        engine.model.kept_blocks = kept
        peaks.append(peak_of_steps(engine, state, recipe, stage, clip) - before)
    print(json.dumps(peaks), flush=True)
    os._exit(0)  # as rf_train.train does


def peak_of_steps(engine: Engine, state: TrainingState, recipe: Recipe, stage: Stage, clip: Clip) -> int:
    """The peak of memory in two real steps on random clips, in bytes."""
    model, ids = recipe.model, [str(i) for i in range(recipe.optimizer.micro_batch)]
    shape = (model.channels, clip.frames, clip.height, clip.width)
    sizes = model.chunking.sizes(clip.frames)
    engine.set_batch(stage.batch)
    forget_peak()
    for step in range(2):
        draws = make_draws({**LOSS_DRAWS, **stage.history.draws}, 0, step, ids, shape, len(sizes))
        x, text = torch.randn(len(ids), *shape), torch.randn(len(ids), model.text_len, model.text_dim)
        train_step(engine, step, [Batch(ids, x, text, draws, sizes)], recipe, stage)
        state.update_average()
    return peak_bytes()


def resident_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in status if line.startswith("VmHWM")).split()[1])


# ---- the command


def cluster_of(options: argparse.Namespace) -> Cluster:
    """The cluster that the command line describes."""
    for name in ("gpus", "node", "gpu_memory", "inside", "between", "host", "flops", "mfu"):
        require_finite(**{name: getattr(options, name)})
        if not getattr(options, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be positive")
    if options.mfu > 1:
        raise ValueError(f"--mfu {options.mfu:g}: a share of the peak, at most 1")
    node = min(options.node, options.gpus)
    if options.gpus % node:
        raise ValueError(f"--gpus {options.gpus} is not a multiple of --node {node}")
    return Cluster(
        gpus=options.gpus,
        memory=options.gpu_memory * GIB,
        gpus_per_node=node,
        inside=options.inside * 1e9,
        between=options.between * 1e9,
        host=options.host * 1e9,
        flops=options.flops * 1e12,
        mfu=options.mfu,
    )


def parser() -> argparse.ArgumentParser:
    usual = Cluster()
    found = argparse.ArgumentParser(
        prog="rf_train.plan", formatter_class=Help, description="What a recipe needs, and recommended settings."
    )
    found.add_argument("recipe", help="a YAML file, or the name of a shipped one")
    found.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that replace the recipe's")
    found.add_argument("--gpus", type=int, default=usual.gpus, help="GPUs of the cluster")
    found.add_argument("--node", type=int, default=usual.gpus_per_node, help="GPUs per node")
    numbers = {
        "gpu-memory": (usual.memory / GIB, "GiB", "memory of a GPU"),
        "inside": (usual.inside / 1e9, "GB/s", "a GPU's link inside a node, one direction"),
        "between": (usual.between / 1e9, "GB/s", "a GPU's link between nodes, one direction"),
        "host": (usual.host / 1e9, "GB/s", "a GPU's link to host memory"),
        "flops": (usual.flops / 1e12, "TFLOP/s", "dense bf16 peak"),
        "mfu": (usual.mfu, "SHARE", "share of that peak that is reached"),
    }
    for name, (default, unit, text) in numbers.items():
        found.add_argument(f"--{name}", type=float, default=default, metavar=unit, help=text)
    found.add_argument("--size", default="480x832", help="HEIGHTxWIDTH in pixels, if a dataset doesn't exist")
    found.add_argument("--stride", type=int, default=WAN_2_1.strides[1], help="pixels of a latent pixel's side, then")
    found.add_argument("--measure", action="store_true", help="run real steps on this machine and compare")
    found.add_argument("--markdown", action="store_true", help="a table of the recommended settings")
    found.add_argument("--json", action="store_true", help="the same figures as a JSON object, in the last line")
    return found


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_intermixed_args(arguments)
    return run_command(lambda: plan_as_asked(options))


def plan_as_asked(options: argparse.Namespace) -> None:
    """Prints what the command line asks for."""
    cluster = cluster_of(options)
    recipe = config.load(config.recipe_path(options.recipe), options.overrides)
    if options.stride < 1:
        raise ValueError("--stride must be positive")
    size = parse_size(options.size)
    clips = [clip_of(recipe, position, size, options.stride) for position in range(len(recipe.stages))]
    if options.measure:
        lines, figures = measure(recipe, clips)
    elif options.markdown:
        lines, figures = markdown(recipe, Path(options.recipe).name.removesuffix(".yaml"), clips, cluster)
    else:
        lines, figures = report(recipe, options.recipe, clips, cluster)
    print("\n".join(lines))
    if options.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    sys.exit(main())
