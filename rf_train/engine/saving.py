"""Saving beside the training: it stands still for a copy into host memory; threads write the files meanwhile.

A checkpoint is written into a folder of another name, and hashed on its way. At a later step boundary, when all ranks
have their file on disk, rank 0 adds the manifest, gives the folder its name, and updates `latest`. A save that fails
leaves the older checkpoints as they are.
"""

import hashlib
import json
import os
import shutil
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from data_prep.command import one_line
from data_prep.files import naming, sync, write_atomic, write_json
from rf_train.engine.checkpoint import MAKING, folder_of_step, own_hash, prune
from rf_train.engine.collectives import RunError, current_device, on_rank_0
from rf_train.engine.state import TrainingState

PIECE = 16 << 20  # bytes that are hashed and written at once


class NotSaved(RunError):
    """A checkpoint could not be written, and training must not go on without it."""


@dataclass(frozen=True)
class Saved:
    """The outcome of a save."""

    folder: Path
    step: int
    seconds: float  # from its beginning to its end
    stall: float  # seconds of them in which training stood still
    waited: float  # seconds of these in which it waited for files that were not written yet
    error: str  # "" when the checkpoint is whole


class Saver:
    """Saves the checkpoints of a run. Every method is a collective, with the same outcome on all ranks.

    It keeps the `keep` newest checkpoints and those of the steps in `always`.
    """

    def __init__(self, run: Path, state: TrainingState, keep: int, always: set[int]):
        self.run, self.state, self.keep, self.always = run, state, keep, always
        self.pending: int | None = None  # the step that is being saved
        self.failures = 0  # in a row
        self._worker = ThreadPoolExecutor(1, "save")
        self._writing: Future[dict] | None = None
        self._tidying: Future[None] | None = None  # the removal of old checkpoints, on rank 0
        own = sum(tensor.nbytes for tensors in state.by_kind().values() for tensor in tensors.values())
        total = torch.tensor(own, dtype=torch.int64, device=current_device())
        dist.all_reduce(total)
        self.bytes = int(total)  # of all files

    def begin(self, step: int) -> None:
        """Copies the state of `step` into host memory. Its files are written beside what comes next."""
        assert self.pending is None, "finish a save before the next one"
        self.pending, self._began = step, time.perf_counter()
        making = self._making(step)
        self._refused = on_rank_0(lambda: self._make_folder(making))
        if self._refused:
            return
        entry: dict = {"file": f"rank-{dist.get_rank():05d}.safetensors"}
        if (begins := self.state.begins()) is not None:
            entry["begins"] = begins
        tensors = self.state.copy_to_host()
        self._numbers: dict = {
            "step": step,
            "world_size": dist.get_world_size(),
            "optimizer_steps": self.state.optimizer_steps,
            "average_steps": self.state.average_steps,
            "shapes": {name: list(shape) for name, shape in self.state.shapes.items()},
        }
        self._writing = self._worker.submit(lambda: {**entry, **write_tensors(making / entry["file"], tensors)})
        self._stall = time.perf_counter() - self._began

    def poll(self) -> Saved | None:
        """The outcome, once all ranks have written. Call it at step boundaries while `pending`."""
        if self._refused:
            return self._conclude()
        assert self._writing is not None
        written = torch.tensor(int(self._writing.done()), device=current_device())
        dist.all_reduce(written, dist.ReduceOp.MIN)
        return self._conclude() if int(written) else None

    def finish(self) -> Saved | None:
        """Waits for the pending save. Returns its outcome; None when nothing is pending."""
        return None if self.pending is None else self._conclude()

    def close(self) -> None:
        """Waits until old checkpoints are removed."""
        self._worker.shutdown()

    def _making(self, step: int) -> Path:
        final = folder_of_step(self.run, step)
        return final.with_name(final.name + MAKING)

    def _make_folder(self, making: Path) -> str:
        """Makes the folder to write into. Returns what is in the way, or ""."""
        try:
            shutil.rmtree(making, ignore_errors=True)
            making.mkdir(parents=True)
            free = shutil.disk_usage(making).free
            if free < self.bytes and self._tidying is not None:
                wait([self._tidying])
                free = shutil.disk_usage(making).free
            if free < self.bytes:
                making.rmdir()
                mib = 1 << 20
                return f"{self.run}: a checkpoint takes {self.bytes / mib:,.0f} MiB, {free / mib:,.0f} MiB are free"
        except OSError as error:
            return str(error)
        return ""

    def _conclude(self) -> Saved:
        """Names the checkpoint, or removes what a failed save left."""
        assert self.pending is not None
        begin, step, making = time.perf_counter(), self.pending, self._making(self.pending)
        error, stall, waited = self._refused, 0.0, 0.0
        if not error:
            assert self._writing is not None
            entries: list = [None] * dist.get_world_size()
            dist.all_gather_object(entries, _outcome(self._writing))
            waited = time.perf_counter() - begin
            failed = [f"rank {rank}: {entry}" for rank, entry in enumerate(entries) if isinstance(entry, str)]
            error = failed[0] if failed else on_rank_0(lambda: self._name(making, entries))
            stall = self._stall
        self.pending = self._writing = None
        self.failures = self.failures + 1 if error else 0
        if dist.get_rank() == 0:
            self._tidying = self._worker.submit(_remove if error else self._prune, making)
        now = time.perf_counter()
        return Saved(folder_of_step(self.run, step), step, now - self._began, stall + now - begin, waited, error)

    def _prune(self, _: Path) -> None:
        """Removes old checkpoints."""
        try:
            prune(self.run, self.keep, self.always)
        except OSError as error:  # training goes on, and the disk fills
            print(f"old checkpoints can't be removed: {one_line(error)}", file=sys.stderr, flush=True)

    def _name(self, making: Path, entries: list[dict]) -> str:
        """Makes the folder a checkpoint. Returns what failed, or ""."""
        final = folder_of_step(self.run, self._numbers["step"])
        manifest = {**self._numbers, "files": entries}
        try:
            write_json(making / "manifest.json", {**manifest, "hash": own_hash(manifest)})
            shutil.rmtree(final, ignore_errors=True)
            # First the pointer: a name that is not there yet is no harm. A newer checkpoint than the one that is named
            # would count as one that the run went back behind.
            write_atomic(self.run / "latest", final.name)
            os.rename(making, final)
            sync(final.parent)
        except OSError as error:
            return str(error)
        return ""


def _outcome(writing: Future[dict]) -> dict | str:
    """This rank's entry in the manifest; what failed, if its file could not be written."""
    try:
        return writing.result()
    except OSError as error:
        return str(error)


def _remove(folder: Path) -> None:
    """Removes what a failed save left."""
    shutil.rmtree(folder, ignore_errors=True)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict:
    """Writes contiguous fp32 tensors in host memory as a safetensors file, and waits until it is on disk.

    Returns {"bytes", "sha256"} of the file, which is hashed while it is written.
    """
    header, end = {}, 0
    contents: list[memoryview] = []
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
        contents.append(_bytes_of(tensor))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hashlib.sha256(), 0
    with naming(path), open(path, "wb", buffering=0) as file:
        for content in (memoryview(len(text).to_bytes(8, "little") + text), *contents):
            for begin in range(0, len(content), PIECE):
                piece = content[begin : begin + PIECE]
                digest.update(piece)
                while piece:
                    written = file.write(piece)
                    size, piece = size + written, piece[written:]
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous fp32 tensor."""
    assert tensor.dtype == torch.float32 and tensor.is_contiguous() and not tensor.is_cuda
    return tensor.numpy().data.cast("B") if tensor.numel() else memoryview(b"")
