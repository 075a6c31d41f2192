"""Checkpoints: each rank's fragments of weights, Adam's moments and the average, as safetensors, with a manifest.

    RUN/checkpoints/step-00000500/
        rank-00000.safetensors   master/NAME, exp_avg/NAME, exp_avg_sq/NAME, ema/NAME: flat fp32 fragments
        manifest.json            step, world size, parameter shapes, size and sha256 of every file
    RUN/latest                                             the name of the newest whole checkpoint

Under ZeRO-3, rank r of W holds elements [r n, (r + 1) n) of each flattened parameter, n = ceil(numel / W); the last
slice is padded. Under ZeRO-2 a rank holds whole parameters or pieces of them, and the manifest says where each begins.
So a checkpoint can be read by any number of ranks and under either stage. No rank ever holds more than one whole
parameter. A checkpoint is written into a folder of another name, and renamed when all of it is on disk. `latest` is
updated last.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data_prep.files import sha256_of_file, sync, write_atomic, write_json
from rf_train.engine.collectives import current_device, sum_over_ranks
from rf_train.engine.zero import Engine

KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")
_MANIFEST_KEYS = {"step", "world_size", "optimizer_steps", "average_steps", "shapes", "files"}


class TrainingState:
    """The state of a run on this rank: the engine's fragments by parameter name, and the average (EMA).

    Each rank averages its own fragments. That is exact, and needs no communication.
    """

    def __init__(self, engine: Engine, ema_decay: float):
        self.engine, self.ema_decay, self.average_steps = engine, ema_decay, 0
        self.shapes = engine.parameter_shapes()
        self.local_fragments = engine.fragments()
        self.ema = {name: fragment.master.clone() for name, fragment in self.local_fragments.items()}

    @torch.no_grad()
    def update_average(self) -> None:
        """ema <- d ema + (1 - d) weights, with d = min(`ema_decay`, (1 + n) / (10 + n)) at the n-th step."""
        self.average_steps += 1
        decay = min(self.ema_decay, (1 + self.average_steps) / (10 + self.average_steps))
        masters = [fragment.master for fragment in self.local_fragments.values()]
        torch._foreach_lerp_(list(self.ema.values()), masters, 1 - decay)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Passes compute with the average meanwhile. A collective. An error in between must end the run."""
        self._copy_to_weights(self.ema)
        yield
        self._copy_to_weights({name: fragment.master for name, fragment in self.local_fragments.items()})

    def _copy_to_weights(self, tensors: dict[str, Tensor]) -> None:
        """Makes the weights that passes compute with from the fragments of all ranks."""

        def whole(name: str) -> Tensor:
            found = torch.zeros(math.prod(self.shapes[name]), device=current_device())
            if name in tensors:
                begin = self.local_fragments[name].begin
                found[begin : begin + tensors[name].numel()] = tensors[name]
            return sum_over_ranks(found).view(self.shapes[name])

        fragments = {name: replace(f, master=tensors[name]) for name, f in self.local_fragments.items()}
        self.engine.copy_masters_to_weights(fragments, whole)

    def by_kind(self) -> dict[str, dict[str, Tensor]]:
        """{kind: {name: flat fp32 tensor}} of the engine's own tensors and of the average."""
        fragments = self.engine.fragments()
        kinds = {kind: {name: getattr(f, kind) for name, f in fragments.items()} for kind in KINDS[:3]}
        return {**kinds, "ema": self.ema}

    def tensors(self) -> dict[str, Tensor]:
        """What this rank's file holds: "kind/NAME" -> a copy in host memory."""
        return {
            f"{kind}/{name}": tensor.detach().cpu().contiguous()
            for kind, tensors in self.by_kind().items()
            for name, tensor in tensors.items()
        }

    def begins(self) -> dict[str, int] | None:
        """Where this rank's fragments begin in their parameters. None under ZeRO-3, where all slices are equal."""
        if self.engine.zero_stage == 3:
            return None
        return {name: fragment.begin for name, fragment in self.local_fragments.items()}

    @property
    def optimizer_steps(self) -> int:
        """Steps that AdamW has taken."""
        return int(self.engine.adam_steps()[0])

    @torch.no_grad()
    def load(self, folder: Path, manifest: dict) -> None:
        """Loads this rank's fragments from a checkpoint that any number of ranks wrote, under either ZeRO stage.

        Raises ValueError when the checkpoint's shapes are not the model's.
        """
        wrong = shape_differences(manifest["shapes"], self.shapes)
        if wrong:
            raise ValueError(f"{folder}: the checkpoint is of another model: {wrong}")
        for count in self.engine.adam_steps():
            count.fill_(manifest["optimizer_steps"])
        with CheckpointReader(folder, manifest) as reader:
            for kind, tensors in self.by_kind().items():

                def read(name: str, begin: int, end: int, kind: str = kind) -> Tensor:
                    return reader.flat(kind, name, begin, end)

                self._fill(tensors, read)
            self.engine.copy_masters_to_weights(self.local_fragments, lambda name: reader.whole("master", name))
        self.average_steps = manifest["average_steps"]

    @torch.no_grad()
    def load_weights(self, read_flat: Callable[[str, int, int], Tensor], read_whole: Callable[[str], Tensor]) -> None:
        """Loads this rank's fragments of the weights, in fp32. The average starts from them, too.

        `read_flat(name, begin, end)` gives a slice of a flattened parameter, `read_whole(name)` a whole one.
        """
        for tensors in (self.by_kind()["master"], self.ema):
            self._fill(tensors, read_flat)
        self.engine.copy_masters_to_weights(self.local_fragments, read_whole)

    def _fill(self, tensors: dict[str, Tensor], read_flat: Callable[[str, int, int], Tensor]) -> None:
        """Fills fragments from `read_flat(name, begin, end)`. Elements past a parameter's end are padding: 0."""
        for name, tensor in tensors.items():
            total, begin = math.prod(self.shapes[name]), self.local_fragments[name].begin
            found = read_flat(name, min(begin, total), min(begin + tensor.numel(), total))
            tensor.copy_(torch.nn.functional.pad(found, (0, tensor.numel() - len(found))))


class CheckpointReader:
    """Reads slices of parameters from a checkpoint that any number of ranks wrote."""

    def __init__(self, folder: Path, manifest: dict):
        self.shapes, self.world_size = manifest["shapes"], manifest["world_size"]
        self.paths = [folder / entry["file"] for entry in manifest["files"]]
        self.begins = [entry.get("begins") for entry in manifest["files"]]

    def __enter__(self) -> "CheckpointReader":
        self.files = [safe_open(path, "pt") for path in self.paths]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.files = []

    def flat(self, kind: str, name: str, begin: int, end: int) -> Tensor:
        """Elements begin .. end - 1 of the flattened parameter, fp32."""
        slice_size = -(-math.prod(self.shapes[name]) // self.world_size)
        equal_slices = self.begins[0] is None
        holders = range(begin // slice_size, min(self.world_size, -(-end // slice_size)))
        pieces = []
        for rank in holders if equal_slices else range(self.world_size):
            begins = self.begins[rank]
            if begins is not None and name not in begins:
                continue
            piece = self.files[rank].get_slice(f"{kind}/{name}")
            start = rank * slice_size if begins is None else begins[name]
            low, high = max(begin - start, 0), min(end - start, piece.get_shape()[0])
            if low < high:
                pieces.append(piece[low:high])
        return torch.cat(pieces) if pieces else torch.zeros(0)

    def whole(self, kind: str, name: str) -> Tensor:
        """The parameter in its shape, fp32."""
        return self.flat(kind, name, 0, math.prod(self.shapes[name])).view(self.shapes[name])


def shape_differences(theirs: dict, ours: dict) -> str:
    """All differences between two {name: shape}, in one line; "" without any."""
    found = [f"{name} is missing" for name in ours if name not in theirs]
    found += [f"{name} is not in the model" for name in theirs if name not in ours]
    for name, shape in ours.items():
        if name in theirs and list(theirs[name]) != list(shape):
            found.append(f"{name} is {list(theirs[name])}, the model's is {list(shape)}")
    return "; ".join(found)


# ---- saving


def save(run: Path, step: int, state: TrainingState) -> Path:
    """Writes the checkpoint of `step`. A collective. The checkpoint has its name only when all of it is on disk."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    final = folder_of_step(run, step)
    making = final.with_name(final.name + ".making")
    if rank == 0:
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
    dist.barrier()
    path = making / f"rank-{rank:05d}.safetensors"
    save_file(state.tensors(), path)
    sync(path)
    entry = {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
    if (begins := state.begins()) is not None:
        entry["begins"] = begins
    entries = [None] * world_size
    dist.all_gather_object(entries, entry)
    if rank == 0:
        manifest = {
            "step": step,
            "world_size": world_size,
            "optimizer_steps": state.optimizer_steps,
            "average_steps": state.average_steps,
            "shapes": {name: list(shape) for name, shape in state.shapes.items()},
            "files": entries,
        }
        write_json(making / "manifest.json", manifest)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(making, final)
        sync(final.parent)
        write_atomic(run / "latest", final.name)
    dist.barrier()
    return final


def prune(run: Path, keep: int, always: set[int]) -> None:
    """Removes old checkpoints.

    It keeps the `keep` newest ones up to the one that `latest` names, those of the steps in `always`, and all that come
    after `latest`.
    """
    newest = latest(run)
    assert newest is not None
    for step in [step for step in steps_saved(run) if step <= step_of(newest)][:-keep]:
        if step not in always:
            shutil.rmtree(folder_of_step(run, step))


# ---- finding and reading


def folder_of_step(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step of a checkpoint's folder; -1 for any other folder."""
    number = folder.name.removeprefix("step-")
    return int(number) if number != folder.name and number.isdigit() else -1


def steps_saved(run: Path) -> list[int]:
    """Steps of the run's checkpoints, ascending."""
    return sorted(
        step_of(path) for path in (run / "checkpoints").glob("step-*") if step_of(path) >= 0 and path.is_dir()
    )


def latest(run: Path) -> Path | None:
    """The checkpoint that `RUN/latest` names; without that file, the newest one; None without any.

    Raises ValueError when `latest` names something else.
    """
    pointer, saved = run / "latest", steps_saved(run)
    if not pointer.is_file():
        return folder_of_step(run, saved[-1]) if saved else None
    name = pointer.read_text().strip()
    if name not in [folder_of_step(run, step).name for step in saved]:
        what_to_do = "write one of its folders' names there, or remove the file to resume from the newest"
        raise ValueError(f"{pointer} names {name!r}, which is not in {run / 'checkpoints'}; {what_to_do}")
    return run / "checkpoints" / name


def at_step(run: Path, step: int) -> Path:
    """The run's checkpoint of `step`; step 0 is the newest. Raises ValueError if there is none."""
    folder = folder_of_step(run, step) if step else latest(run)
    if folder is None or not folder.is_dir():
        which = f" of step {step}" if step else ""
        raise ValueError(f"{run}: no checkpoint{which}; it has {steps_saved(run) or 'none'}")
    return folder


def verified(folder: Path) -> dict:
    """Checks size and hash of every file of a checkpoint against its manifest. Returns the manifest.

    Raises a ValueError that names what is damaged.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: no readable manifest.json: {error}") from None
    missing = _MANIFEST_KEYS - set(manifest if isinstance(manifest, dict) else ())
    if missing:
        keys = ", ".join(sorted(missing))
        raise ValueError(f"{folder}: its manifest.json has no {keys}; go back to an older checkpoint")
    for entry in manifest["files"]:
        path = folder / entry["file"]
        if not path.is_file():
            raise ValueError(f"{path}: missing from the checkpoint")
        if path.stat().st_size != entry["bytes"] or sha256_of_file(path) != entry["sha256"]:
            raise ValueError(f"{path}: damaged, its content is not what was saved; go back to an older checkpoint")
    return manifest


def read_weights(folder: Path, kind: str = "ema") -> dict[str, Tensor]:
    """All weights of a checkpoint as fp32 tensors: the average ("ema") or the last weights ("master")."""
    manifest = verified(folder)
    try:
        with CheckpointReader(folder, manifest) as reader:
            return {name: reader.whole(kind, name) for name in manifest["shapes"]}
    except SafetensorError as error:
        raise ValueError(f"{folder}: {error}") from None
