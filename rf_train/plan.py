"""What a recipe needs and which settings to take:  python -m rf_train.plan RECIPE [a.b=c ...] --gpus 64

For each stage: memory a GPU, FLOP and bytes over links of a step, the least time they take (`rf_train.costs`, `rf_train.memory`), and the fastest settings that
fit; `--measure` runs real steps and prints planned and measured peak side by side. Memory is printed in GiB (2^30), links in GB (1e9).
"""

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import torch

from rf_train import config, distributed
from rf_train.costs import GIB, Case, Clip, Cluster, Zero, clip_of, flop, links, read_zero, seconds, times
from rf_train.memory import ROOM, fits, memory

# ---- the search


def overrides(case: Case) -> list[str]:
    recipe = case.recipe
    return [f"run.deepspeed={recipe.run.deepspeed}", f"run.held={str(recipe.run.held).lower()}", f"run.sequence={recipe.run.sequence}",
            f"optimizer.micro_batch={recipe.optimizer.micro_batch}", f"model.checkpointing={recipe.model.checkpointing}"]  # fmt: skip


def shipped() -> list[Zero]:
    """The project's DeepSpeed settings."""
    return [read_zero(f"ds_configs/{path.name}") for path in sorted((distributed.PROJECT / "ds_configs").glob("zero*.json"))]


def candidates(recipe: config.Recipe, clips: list[Clip], cluster: Cluster) -> list[list[Case]]:
    """Every setting that can run all stages, as its case of each stage."""
    zeros = {zero.file: zero for zero in [read_zero(recipe.run.deepspeed), *shipped()] if zero.secondary == 1 or zero.secondary < cluster.gpus}
    rollouts = any(stage.history in ("parallel", "autoregressive") for stage in recipe.stages)
    found = []
    for sequence in divisors(math.gcd(cluster.gpus, recipe.model.heads)):
        clips_a_rank, rest = divmod(math.gcd(*(stage.batch for stage in recipe.stages)) * sequence, cluster.gpus)
        for micro in divisors(clips_a_rank) if not rest else ():
            for checkpointing in config.CHECKPOINTINGS:
                for zero in zeros.values():
                    for held in (True, False) if zero.stage == 3 and rollouts else (True,):
                        tried = dataclasses.replace(
                            recipe,
                            model=dataclasses.replace(recipe.model, checkpointing=checkpointing),
                            optimizer=dataclasses.replace(recipe.optimizer, micro_batch=micro),
                            run=dataclasses.replace(recipe.run, deepspeed=zero.file, sequence=sequence, held=held),
                        )
                        cases = [Case(tried, stage, clip, zero, cluster) for stage, clip in zip(tried.stages, clips)]
                        if not any(case.frame % sequence or cluster.gpus % zero.secondary for case in cases):
                            found.append(cases)
    return found


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def price(cases: list[Case]) -> tuple:
    """What a search minimises: seconds of all steps; then those on links, whether or not they are hidden; then memory."""
    total = sum(case.stage.steps * seconds(case) for case in cases)
    moving = sum(case.stage.steps * (sum(times(case).values()) - times(case)["compute"]) for case in cases)
    return float(f"{total:.9g}"), float(f"{moving:.9g}"), need_of(cases)


def need_of(cases: list[Case]) -> int:
    return max(memory(case)["peak"] for case in cases)


def best(recipe: config.Recipe, clips: list[Clip], cluster: Cluster) -> dict:
    """The cheapest settings that fit: {"overrides", "cases", "seconds" by stage, "peak", "why"}. Without any: "overrides" None, and the smallest need in "why"."""
    found = sorted(candidates(recipe, clips, cluster), key=price)
    limit = (1 - ROOM) * cluster.memory / GIB
    if not found:
        batches = ", ".join(str(batch) for batch in sorted({stage.batch for stage in recipe.stages}))
        rule = f"run.sequence must divide them, {recipe.model.heads} heads and a latent frame's tokens, and the ranks by run.sequence the batch"
        return {"overrides": None, "why": f"no setting splits batch {batches} over {cluster.gpus} ranks: {rule}"}
    chosen = next((cases for cases in found if all(fits(case) for case in cases)), None)
    if chosen is None:
        least = min(found, key=need_of)
        why = f"nothing fits in {limit:.1f} GiB: the smallest need is {need_of(least) / GIB:.1f}, with {' '.join(overrides(least[0]))}"
        return {"overrides": None, "peak": need_of(least), "why": why}
    why = f"the fastest of {len(found)} settings"
    faster = found[: found.index(chosen)]
    if faster:
        nearest = min(faster, key=need_of)
        changed = [theirs for theirs, ours in zip(overrides(nearest[0]), overrides(chosen[0])) if theirs != ours]
        why = f"{len(faster)} of {len(found)} would rank before it but don't fit in {limit:.1f} GiB; of these {' '.join(changed)} needs least, "
        why += f"{need_of(nearest) / GIB:.1f}"
    return {"overrides": overrides(chosen[0]), "cases": chosen, "seconds": [seconds(case) for case in chosen], "peak": need_of(chosen), "why": why}


def search(recipe: config.Recipe, clips: list[Clip], cluster: Cluster) -> list[dict]:
    """The best settings for each stage in a job of its own."""
    return [best(dataclasses.replace(recipe, stages=(stage,)), [clip], cluster) for stage, clip in zip(recipe.stages, clips)]


# ---- what is printed


def gib(items: dict[str, int]) -> str:
    return ", ".join(f"{name} {size / GIB:.2f}" for name, size in items.items() if size)


def describe(case: Case) -> tuple[list[str], dict]:
    """One stage's lines and figures."""
    need, work, moved, time = memory(case), flop(case), links(case), times(case)
    floor, cluster = seconds(case), case.cluster
    slowest = max(time, key=time.get)
    verdict = "fits" if fits(case) else "DOES NOT FIT"
    state = sum(need["states"].values())
    clip, host = case.clip, f"; host memory {need['host'] / GIB:.1f} a GPU" if need["host"] else ""
    shape = f"{clip.frames} latent frames of {clip.height}x{clip.width}, {len(case.sizes)} chunks"
    split = f"{case.micro} a micro-batch x {cluster.gpus // case.sequence} replicas x {case.accumulation} in turn"
    near, far, outside = (moved[name] / 1e9 for name in ("inside", "between", "host"))
    purposes = ", ".join(f"{name} {sum(pair) / 1e9:.1f}" for name, pair in moved["links"].items() if sum(pair))
    lines = [
        f"stage {case.stage.name}: {case.stage.history} history, {shape}, batch {case.stage.batch} = {split}",
        f"  memory a GPU, GiB    always {state / GIB:.2f}: {gib(need['states'])}",
        *(f"    {name:<18} {(state + sum(items.values())) / GIB:8.2f}: {gib(items)}" for name, items in need["phases"].items()),
        f"    peak               {need['peak'] / GIB:8.2f} of {cluster.memory / GIB:.0f} in {need['phase']}: {verdict} with {ROOM:.0%} room{host}",
        f"  PFLOP a step         {sum(work.values()) / 1e15:.2f}: {', '.join(f'{name} {value / 1e15:.2f}' for name, value in work.items() if value)}",
        f"  GB a GPU and step    inside a node {near:.1f}, between nodes {far:.1f}, host {outside:.1f}: {purposes}",
        f"  step at least        {floor:.2f} s ({slowest}): {', '.join(f'{name} {value:.2f}' for name, value in time.items() if value)}",
        f"                       {case.stage.batch / floor:.2f} samples/s; {case.stage.steps} steps in {case.stage.steps * floor / 86400:.2f} days",
    ]
    working = {f"{phase}: {name}": size for phase, items in need["phases"].items() for name, size in items.items()}
    figures = {
        "stage": case.stage.name, "clip": dataclasses.asdict(clip), "memory": {**need["states"], **working}, "peak": need["peak"], "phase": need["phase"],
        "host_memory": need["host"], "fits": fits(case), "flop": work, "links": {name: list(pair) for name, pair in moved["links"].items()},
        "inside": moved["inside"], "between": moved["between"], "host": moved["host"], "times": time, "seconds": floor,
        "samples_per_s": case.stage.batch / floor, "days": case.stage.steps * floor / 86400,
    }  # fmt: skip
    return lines, figures


def plain(found: dict) -> dict:
    return {key: value for key, value in found.items() if key != "cases"}


def report(recipe: config.Recipe, name: str, clips: list[Clip], cluster: Cluster) -> tuple[list[str], dict]:
    """The recipe as it is, stage by stage, then the settings to take."""
    zero = read_zero(recipe.run.deepspeed)
    cases = [Case(recipe, stage, clip, zero, cluster) for stage, clip in zip(recipe.stages, clips)]
    together = best(recipe, clips, cluster)
    for case in cases:
        try:
            case.validate()
        except ValueError as error:
            raise ValueError(f"{error}; {'what would run: ' + ' '.join(together['overrides']) if together['overrides'] else together['why']}") from None
    lines = [
        f"{name} on {cluster.gpus} GPUs of {cluster.memory / GIB:.0f} GiB, {cluster.node} a node, {cluster.flops / 1e12:.0f} TFLOP/s at {cluster.mfu:.0%}; "
        f"links {cluster.inside / 1e9:.0f} and {cluster.between / 1e9:.0f} GB/s",
        f"{cases[0].parameters:,} parameters, {' '.join(overrides(cases[0]))}",
    ]
    stages, alone = [], search(recipe, clips, cluster)
    for case, found in zip(cases, alone):
        text, figures = describe(case)
        lines += text
        stages.append({**figures, "best": plain(found)})
    days = sum(figures["days"] for figures in stages)
    lines += [f"all stages: {days:.1f} days at least", f"settings to take, with {ROOM:.0%} room"]
    for title, found, selected in [("one job", together, cases), *((f"{case.stage.name} alone", found, [case]) for case, found in zip(cases, alone))]:
        if found["overrides"]:
            took = sum(case.stage.steps * second for case, second in zip(selected, found["seconds"])) / 86400
            lines.append(f"  {title}: {' '.join(found['overrides'])}   {took:.2f} days, peak {found['peak'] / GIB:.1f} GiB")
            lines.append(f"    {found['why']}")
        else:
            lines.append(f"  {title}: {found['why']}")
    figures = {"plan": name, "cluster": dataclasses.asdict(cluster), "parameters": cases[0].parameters, "stages": stages, "days": days, "best": plain(together)}
    return lines, figures


def rows(recipe: config.Recipe, name: str, clips: list[Clip], cluster: Cluster) -> tuple[list[str], dict]:
    """A Markdown table: for each stage in a job of its own the settings to take, and what they cost."""
    lines, figures = [], []
    for stage, found in zip(recipe.stages, search(recipe, clips, cluster)):
        head = f"| {name} | {cluster.gpus} | {stage.name} |"
        if not found["overrides"]:
            lines.append(f"{head} {found['why']} | | | | |")
        else:
            case = found["cases"][0]
            named = Path(case.zero.file).stem + ("" if case.held or not case.rolls_out else ", not held")
            settings = f"{named}, sequence {case.sequence}, micro-batch {case.micro}, {case.recipe.model.checkpointing}"
            days = case.stage.steps * seconds(case) / 86400
            lines.append(f"{head} {settings} | {found['peak'] / GIB:.0f} | {sum(flop(case).values()) / 1e15:.0f} | {seconds(case):.1f} | {days:.1f} |")
        figures.append({"stage": stage.name, **plain(found)})
    return lines, {"plan": name, "cluster": dataclasses.asdict(cluster), "stages": figures}


HEAD = ["| recipe | GPUs | stage | settings | peak, GiB | PFLOP a step | step, s | days |", "|---|---|---|---|---|---|---|---|"]


# ---- measured


def measure(recipe: config.Recipe, clips: list[Clip]) -> tuple[list[str], dict]:
    """Planned against measured peak of every stage, on one rank of this machine, in a process of its own.

    Steps are real ones, `train.train_step` on random clips, with one micro-batch each. On a GPU the peak is what torch allocated; on a CPU the growth
    of resident memory since before the engine was built, once a tiny engine has loaded all code.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cluster = Cluster(gpus=1, node=1, device=device)
    stages = tuple(dataclasses.replace(stage, batch=recipe.optimizer.micro_batch, warmup=0) for stage in recipe.stages)
    recipe = dataclasses.replace(recipe, stages=stages, run=dataclasses.replace(recipe.run, sequence=1))
    zero = read_zero(recipe.run.deepspeed)
    if zero.offloads and device == "cpu":
        raise ValueError(f"{zero.file} offloads to host memory, which on a CPU is the same: there is nothing to measure")
    cases = [Case(recipe, stage, clip, zero, cluster) for stage, clip in zip(stages, clips)]
    work = json.dumps({"recipe": config.to_dict(recipe), "clips": [dataclasses.astuple(clip) for clip in clips]})
    # Freed memory goes back to the system at once, so that the peak is what is held, not what the allocator keeps.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", "from rf_train.plan import measured; measured()"]
    done = subprocess.run(command, input=work, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"the measured run failed:\n{done.stderr[-3000:]}")
    peaks = json.loads(done.stdout.splitlines()[-1])
    lines, figures = [f"one rank on {device}, {'bf16' if cases[0].a == 2 else 'fp32'}, checkpointing {recipe.model.checkpointing}: peak in MiB"], []
    for case, peak in zip(cases, peaks):
        planned = memory(case)["peak"]
        lines.append(f"  {case.stage.name:<24} planned {planned / 2**20:9.1f}   measured {peak / 2**20:9.1f}   ratio {planned / peak:.3f}")
        figures.append({"stage": case.stage.name, "planned": planned, "measured": peak, "ratio": planned / peak})
    largest = max(figures, key=lambda row: row["measured"])
    return lines, {"measure": recipe.run.deepspeed, "device": device, "checkpointing": recipe.model.checkpointing, "stages": figures, "ratio": largest["ratio"]}


def measured() -> None:
    """The measuring process: reads recipe and clips from its input, prints every stage's peak in bytes as JSON."""
    import gc
    import logging
    import resource

    from rf_train.checkpoint import Shards
    from rf_train.data import Batch
    from rf_train.randomness import draw
    from rf_train.train import train_step

    logging.disable(logging.WARNING)
    work = json.load(sys.stdin)
    recipe, clips = config.from_dict(work["recipe"]), [Clip(*clip) for clip in work["clips"]]
    _, world, device = distributed.start()
    on_gpu = device.type == "cuda"

    def resident() -> int:
        return torch.cuda.memory_allocated() if on_gpu else int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    def forget_peak() -> None:
        torch.cuda.reset_peak_memory_stats() if on_gpu else Path("/proc/self/clear_refs").write_text("5")

    def peak() -> int:
        status = Path("/proc/self/status").read_text().splitlines()
        return torch.cuda.max_memory_allocated() if on_gpu else 1024 * int(next(line for line in status if line.startswith("VmHWM")).split()[1])

    def run(engine, shards: Shards, recipe: config.Recipe, stage: config.Stage, clip: Clip, steps: int) -> int:
        m, ids = recipe.model, [str(i) for i in range(recipe.optimizer.micro_batch)]
        shape = (m.channels, clip.frames, clip.height, clip.width)
        chunks = len(engine.module.chunking.sizes(clip.frames))
        distributed.set_accumulation(engine, stage, recipe.run.sequence)
        forget_peak()
        for step in range(steps):
            batch = Batch(ids, torch.randn(len(ids), *shape), torch.randn(len(ids), m.text_len, m.text_dim), draw(0, step, ids, shape, chunks))
            train_step(engine, step, [batch], recipe, stage)
            shards.update_average()
        return peak()

    small = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, dim=16 * recipe.model.heads, ffn_dim=64, layers=2))
    patch = 2 * recipe.model.patch
    frames = min(max(clip.frames for clip in clips), (3 + max(stage.k for stage in recipe.stages)) * recipe.model.chunk)
    engine = distributed.build_engine(small, device, world)
    shards = Shards(engine, small.optimizer.ema)
    for stage in small.stages:
        run(engine, shards, small, stage, Clip(frames, patch, patch), 2)
    engine.destroy()
    del engine, shards
    gc.collect()
    before = resident()
    engine = distributed.build_engine(recipe, device, world)
    shards = Shards(engine, recipe.optimizer.ema)
    peaks = [run(engine, shards, recipe, stage, clip, 2) - before for stage, clip in zip(recipe.stages, clips)]
    print(json.dumps(peaks), flush=True)
    os._exit(0)  # as rf_train.train does


def size_of(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    if not (height.isdigit() and width.isdigit() and int(height) and int(width)):
        raise ValueError(f"--size {text}: write HEIGHTxWIDTH in pixels, such as 480x832")
    return int(height), int(width)


def main(arguments: list[str] | None = None) -> int:
    usual = Cluster()
    parser = argparse.ArgumentParser(prog="rf_train.plan", description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped one")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that replace the recipe's")
    parser.add_argument("--gpus", type=int, default=usual.gpus)
    parser.add_argument("--node", type=int, default=usual.node, help="GPUs a node")
    parser.add_argument("--gpu-memory", type=float, default=usual.memory / GIB, metavar="GiB")
    parser.add_argument("--inside", type=float, default=usual.inside / 1e9, metavar="GB/s", help="a GPU's link inside a node, one direction")
    parser.add_argument("--between", type=float, default=usual.between / 1e9, metavar="GB/s", help="a GPU's link between nodes, one direction")
    parser.add_argument("--host", type=float, default=usual.host / 1e9, metavar="GB/s", help="a GPU's link to host memory")
    parser.add_argument("--flops", type=float, default=usual.flops / 1e12, metavar="TFLOP/s", help="dense bf16 peak")
    parser.add_argument("--mfu", type=float, default=usual.mfu, help="share of it that is reached")
    parser.add_argument("--size", default="480x832", help="pixels of a clip whose dataset isn't there, HEIGHTxWIDTH")
    parser.add_argument("--measure", action="store_true", help="run real steps on this machine and compare")
    parser.add_argument("--markdown", action="store_true", help="a table of the settings to take")
    parser.add_argument("--json", action="store_true", help="the same figures as a JSON object, in the last line")
    options = parser.parse_intermixed_args(arguments)
    try:
        for name in ("gpus", "node", "gpu_memory", "inside", "between", "host", "flops", "mfu"):
            if not getattr(options, name) > 0:
                raise ValueError(f"--{name.replace('_', '-')} must be positive")
        node = min(options.node, options.gpus)
        if options.gpus % node:
            raise ValueError(f"--gpus {options.gpus} is not a multiple of --node {node}")
        recipe = config.load(config.recipe_path(options.recipe), options.overrides)
        clips = [clip_of(recipe, position, size_of(options.size)) for position in range(len(recipe.stages))]
        speeds = (options.inside * 1e9, options.between * 1e9, options.host * 1e9, options.flops * 1e12, options.mfu)
        cluster = Cluster(options.gpus, options.gpu_memory * GIB, node, *speeds)
        if options.measure:
            lines, figures = measure(recipe, clips)
        elif options.markdown:
            lines, figures = rows(recipe, Path(options.recipe).name.removesuffix(".yaml"), clips, cluster)
            lines = HEAD + lines
        else:
            lines, figures = report(recipe, options.recipe, clips, cluster)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    if options.json:
        print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
