"""Checkpoints: each rank's fragments of weights, Adam's moments and the average, as safetensors, with a manifest.

    RUN/checkpoints/step-00000500/rank-00000.safetensors     master/NAME, exp_avg/NAME, exp_avg_sq/NAME, ema/NAME: flat fp32 fragments
                                  manifest.json              step, world size, parameter shapes, size and sha256 of every file
    RUN/latest                                               the newest whole checkpoint's name

Under ZeRO-3 slice r of W of a parameter is elements [r n, (r + 1) n) of it flattened, n = ceil(numel / W), the last one padded; under
ZeRO-2 a rank holds whole parameters or pieces of them, and the manifest says where each begins. So any number of ranks and either stage
can read what another wrote, and no rank ever holds more than one whole parameter. A checkpoint is made in a folder of another name, which is
renamed when all of it is on disk; `latest` moves last.
"""

import hashlib
import json
import math
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rf_train import distributed

KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")


class Shards:
    """This rank's fragments of an engine's state, by parameter name, and the average of the weights (EMA).

    The average is kept on each rank's own fragments: no communication, exact.
    """

    def __init__(self, engine, decay: float):
        self.engine, self.decay, self.step = engine, decay, 0
        self.shapes = distributed.parameter_shapes(engine)
        self.mine = distributed.fragments(engine)
        self.ema = {name: fragment.master.clone() for name, fragment in self.mine.items()}

    @torch.no_grad()
    def update_average(self) -> None:
        """ema <- d ema + (1 - d) weights, with d rising to `decay` over the first steps: d = min(decay, (1 + n) / (10 + n))."""
        self.step += 1
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.ema.values()), [fragment.master for fragment in self.mine.values()], 1 - decay)

    def places(self) -> dict[str, dict[str, Tensor]]:
        """{kind: {name: flat fp32 tensor}} of the engine's state."""
        mine = distributed.fragments(self.engine)
        kinds = {kind: {name: getattr(fragment, kind) for name, fragment in mine.items()} for kind in ("master", "exp_avg", "exp_avg_sq")}
        return {**kinds, "ema": self.ema}

    def tensors(self) -> dict[str, Tensor]:
        return {f"{kind}/{name}": tensor.detach().cpu().contiguous() for kind, tensors in self.places().items() for name, tensor in tensors.items()}

    def begins(self) -> dict[str, int] | None:
        """Where this rank's fragments begin in their parameters; None when they are equal slices (ZeRO-3), as a reader assumes."""
        return None if self.engine.zero_optimization_stage() == 3 else {name: fragment.begin for name, fragment in self.mine.items()}

    @torch.no_grad()
    def load(self, folder: Path, manifest: dict) -> None:
        """Puts this rank's fragments of the checkpoint in place; it may come from another number of ranks and another ZeRO stage."""
        wrong = difference(manifest["shapes"], self.shapes)
        if wrong:
            raise ValueError(f"{folder}: the checkpoint is of another model: {wrong}")
        for count in distributed.adam_steps(self.engine):
            count.fill_(manifest["optimizer_steps"])
        with Reader(folder, manifest) as reader:
            for kind, tensors in self.places().items():
                self._fill(tensors, lambda name, begin, end: reader.flat(kind, name, begin, end))
            distributed.use_masters(self.engine, self.mine, lambda name: reader.whole("master", name))
        self.step = manifest["average_steps"]

    @torch.no_grad()
    def load_weights(self, files) -> None:
        """Puts this rank's fragments of a checkpoint's tensors (`weights.WeightFiles`) in place, in fp32; the average starts there too."""
        files.check(self.shapes)
        for tensors in (self.places()["master"], self.ema):
            self._fill(tensors, files.flat)
        distributed.use_masters(self.engine, self.mine, files.whole)

    def _fill(self, tensors: dict[str, Tensor], flat) -> None:
        """Fills fragments from `flat(name, begin, end)`; what lies past a parameter's end is padding, and 0."""
        for name, tensor in tensors.items():
            total, begin = math.prod(self.shapes[name]), self.mine[name].begin
            found = flat(name, min(begin, total), min(begin + tensor.numel(), total))
            tensor.copy_(torch.nn.functional.pad(found, (0, tensor.numel() - len(found))))

    @property
    def optimizer_steps(self) -> int:
        """Steps that AdamW has taken."""
        return int(distributed.adam_steps(self.engine)[0])


class Reader:
    """Reads slices of parameters from a checkpoint, whatever number of ranks wrote it."""

    def __init__(self, folder: Path, manifest: dict):
        self.shapes, self.world = manifest["shapes"], manifest["world_size"]
        self.paths = [folder / entry["file"] for entry in manifest["files"]]
        self.begins = [entry.get("begins") for entry in manifest["files"]]

    def __enter__(self) -> "Reader":
        self.files = [safe_open(path, "pt") for path in self.paths]
        return self

    def __exit__(self, *_) -> None:
        self.files = []

    def flat(self, kind: str, name: str, begin: int, end: int) -> Tensor:
        """Elements begin .. end - 1 of the flattened parameter, fp32."""
        size, pieces = -(-math.prod(self.shapes[name]) // self.world), []
        holders = range(self.world) if self.begins[0] is not None else range(begin // size, min(self.world, -(-end // size)))
        for rank in holders:
            begins = self.begins[rank]
            if begins is not None and name not in begins:
                continue
            piece = self.files[rank].get_slice(f"{kind}/{name}")
            start = rank * size if begins is None else begins[name]
            low, high = max(begin - start, 0), min(end - start, piece.get_shape()[0])
            if low < high:
                pieces.append(piece[low:high])
        return torch.cat(pieces) if pieces else torch.zeros(0)

    def whole(self, kind: str, name: str) -> Tensor:
        """The parameter in its shape, fp32."""
        return self.flat(kind, name, 0, math.prod(self.shapes[name])).view(self.shapes[name])


def difference(theirs: dict, ours: dict) -> str:
    """What differs between two {name: shape}, all of it in one line; "" when nothing does."""
    found = [f"{name} is missing" for name in ours if name not in theirs]
    found += [f"{name} is not in the model" for name in theirs if name not in ours]
    found += [f"{name} is {list(theirs[name])}, the model's is {list(ours[name])}" for name in ours if name in theirs and list(theirs[name]) != list(ours[name])]
    return "; ".join(found)


def save(run: Path, step: int, shards: Shards) -> Path:
    """Writes the checkpoint of `step`, on all ranks together. Nothing reads it before all of it is on disk."""
    rank, world = dist.get_rank(), dist.get_world_size()
    final = run / "checkpoints" / f"step-{step:08d}"
    making = final.with_name(final.name + ".making")
    if rank == 0:
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
    dist.barrier()
    path = making / f"rank-{rank:05d}.safetensors"
    save_file(shards.tensors(), path)
    _sync(path)
    entries, begins = [None] * world, shards.begins()
    dist.all_gather_object(entries, {"file": path.name, "bytes": path.stat().st_size, "sha256": _sha256(path), **({} if begins is None else {"begins": begins})})
    if rank == 0:
        manifest = {
            "step": step, "world_size": world, "optimizer_steps": shards.optimizer_steps, "average_steps": shards.step,
            "shapes": {name: list(shape) for name, shape in shards.shapes.items()}, "files": entries,
        }  # fmt: skip
        write_json(making / "manifest.json", manifest)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(making, final)
        _sync(final.parent)
        write_text(run / "latest", final.name)
    dist.barrier()
    return final


def latest(run: Path) -> Path | None:
    """The checkpoint that `RUN/latest` names; without that file the newest one, since a checkpoint has its name only when it is whole; None without any."""
    pointer = run / "latest"
    if not pointer.is_file():
        held = steps_held(run)
        return run / "checkpoints" / f"step-{held[-1]:08d}" if held else None
    name = pointer.read_text().strip()
    if name not in [f"step-{step:08d}" for step in steps_held(run)]:
        raise ValueError(f"{pointer} names {name!r}, which is not in {run / 'checkpoints'}; write one of its folders' names there, or remove the file to go on from the newest")
    return run / "checkpoints" / name


def steps_held(run: Path) -> list[int]:
    """Steps of the run's checkpoints, ascending."""
    return sorted(int(p.name[5:]) for p in (run / "checkpoints").glob("step-*") if p.name[5:].isdigit() and p.is_dir())


def at_step(run: Path, step: int) -> Path:
    """The run's checkpoint of `step`, or its newest with step 0."""
    folder = run / "checkpoints" / f"step-{step:08d}" if step else latest(run)
    if folder is None or not folder.is_dir():
        raise ValueError(f"{run}: no checkpoint{f' of step {step}' if step else ''}; it has {steps_held(run) or 'none'}")
    return folder


def verified(folder: Path) -> dict:
    """The manifest of a checkpoint, after every file's size and hash were compared with it. Raises ValueError naming what is damaged."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: no readable manifest.json: {error}") from None
    missing = {"step", "world_size", "optimizer_steps", "average_steps", "shapes", "files"} - set(manifest if isinstance(manifest, dict) else ())
    if missing:
        raise ValueError(f"{folder}: its manifest.json has no {', '.join(sorted(missing))}; go back to an older checkpoint")
    for entry in manifest["files"]:
        path = folder / entry["file"]
        if not path.is_file():
            raise ValueError(f"{path}: missing from the checkpoint")
        if path.stat().st_size != entry["bytes"] or _sha256(path) != entry["sha256"]:
            raise ValueError(f"{path}: damaged, its content is not what was saved; go back to an older checkpoint")
    return manifest


def read_weights(folder: Path, kind: str = "ema") -> dict[str, Tensor]:
    """All weights of a checkpoint as fp32 tensors, the average ("ema") or the last ones ("master")."""
    manifest = verified(folder)
    try:
        with Reader(folder, manifest) as reader:
            return {name: reader.whole(kind, name) for name in manifest["shapes"]}
    except SafetensorError as error:
        raise ValueError(f"{folder}: {error}") from None


def prune(run: Path, keep: int, always: set[int]) -> None:
    """Removes checkpoints that are neither among the `keep` newest up to the one that `latest` names nor at a step in `always`; later ones stay."""
    newest = int(latest(run).name[5:])
    for step in [step for step in steps_held(run) if step <= newest][:-keep]:
        if step not in always:
            shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")


def write_text(path: Path, text: str) -> None:
    """Replaces a file as a whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    _sync(temporary)
    os.replace(temporary, path)
    _sync(path.parent)


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=1))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        if hasattr(hashlib, "file_digest"):  # Python 3.11
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()
