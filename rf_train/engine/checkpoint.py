"""Checkpoints on disk: each rank's fragments of weights, Adam's moments and the average, with a manifest.

    RUN/checkpoints/step-00000500/
        rank-00000.safetensors   master/NAME, exp_avg/NAME, exp_avg_sq/NAME, ema/NAME: flat fp32 fragments
        manifest.json            step, world size, parameter shapes, size and sha256 of every file, and its own hash
    RUN/checkpoints/step-00000400.damaged                  set aside, because it isn't what was saved
    RUN/checkpoints/step-00000600.aside                    set aside, because the run went back behind it
    RUN/latest                                             the name of the checkpoint to go on from

Under ZeRO-3, rank r of W holds elements [r n, (r + 1) n) of each flattened parameter, n = ceil(numel / W); the last
slice is padded. Under ZeRO-2 a rank holds whole parameters or pieces of them, and the manifest says where each begins.
So a checkpoint can be read by any number of ranks and under either stage. No rank ever holds more than one whole
parameter. `saving.py` writes checkpoints, `restoring.py` finds the one to go on from.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_prep.card import card_hash as own_hash
from data_prep.files import sha256_of_file

KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")
MAKING, DAMAGED, ASIDE = ".making", ".damaged", ".aside"  # ends of the names of folders that are no checkpoints
_MANIFEST_KEYS = {"step", "world_size", "optimizer_steps", "average_steps", "shapes", "files"}


class Damaged(ValueError):
    """A checkpoint is not what was saved. The message names the file."""


class CheckpointReader:
    """Reads slices of parameters from a checkpoint that any number of ranks wrote. A file is opened when it is needed.

    `begins` of a file's entry in the manifest: {name: position of its fragment in the flattened parameter}. Without
    it, each of W files has an equal slice.
    """

    def __init__(self, folder: Path, manifest: dict):
        self.shapes, self.world_size = manifest["shapes"], manifest["world_size"]
        self.paths = [folder / entry["file"] for entry in manifest["files"]]
        self.begins = [entry.get("begins") for entry in manifest["files"]]
        self.opened: dict[int, safe_open] = {}

    def __enter__(self) -> "CheckpointReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.opened.clear()

    def flat(self, kind: str, name: str, begin: int, end: int) -> Tensor:
        """Elements begin .. end - 1 of the flattened parameter, fp32."""
        pieces, total = [], math.prod(self.shapes[name])
        starts = self._starts(name, total)
        for (start, rank), (stop, _) in zip(starts, [*starts[1:], (total, None)]):
            low, high = max(begin, start), min(end, stop)
            if low < high:
                pieces.append(self._file(rank).get_slice(f"{kind}/{name}")[low - start : high - start])
        return torch.cat(pieces) if pieces else torch.zeros(0)

    def whole(self, kind: str, name: str) -> Tensor:
        """The parameter in its shape, fp32."""
        return self.flat(kind, name, 0, math.prod(self.shapes[name])).view(self.shapes[name])

    def _starts(self, name: str, total: int) -> list[tuple[int, int]]:
        """(where it starts in the flattened parameter, the rank that wrote it) of each fragment, ascending."""
        if self.begins[0] is None:
            size = -(-total // self.world_size)
            return [(rank * size, rank) for rank in range(self.world_size) if rank * size < total]
        return sorted((begins[name], rank) for rank, begins in enumerate(self.begins) if name in begins)

    def _file(self, rank: int) -> safe_open:
        if rank not in self.opened:
            self.opened[rank] = safe_open(self.paths[rank], "pt")
        return self.opened[rank]


def shape_differences(theirs: dict, ours: dict) -> str:
    """All differences between two {name: shape}, in one line; "" without any."""
    found = [f"{name} is missing" for name in ours if name not in theirs]
    found += [f"{name} is not in the model" for name in theirs if name not in ours]
    for name, shape in ours.items():
        if name in theirs and list(theirs[name]) != list(shape):
            found.append(f"{name} is {list(theirs[name])}, the model's is {list(shape)}")
    return "; ".join(found)


# ---- finding


def folder_of_step(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step of a checkpoint's folder; -1 for any other folder."""
    number = folder.name.removeprefix("step-")
    own = number.isascii() and number.isdigit() and folder.name == f"step-{int(number):08d}"
    return int(number) if own else -1


def steps_saved(run: Path) -> list[int]:
    """Steps of the run's checkpoints, ascending."""
    return sorted(
        step_of(path) for path in (run / "checkpoints").glob("step-*") if step_of(path) >= 0 and path.is_dir()
    )


def latest(run: Path) -> Path | None:
    """The checkpoint that `RUN/latest` names. If it names none that is there, the newest one. None without any."""
    saved = steps_saved(run)
    named = pointer(run)
    if named in [folder_of_step(run, step).name for step in saved]:
        return run / "checkpoints" / named
    return folder_of_step(run, saved[-1]) if saved else None


def pointer(run: Path) -> str:
    """What `RUN/latest` says; "" without that file."""
    try:
        return (run / "latest").read_bytes()[:200].decode(errors="replace").strip()
    except (FileNotFoundError, IsADirectoryError):
        return ""


def leftovers(run: Path) -> list[Path]:
    """Folders of checkpoints that were never finished."""
    return sorted((run / "checkpoints").glob(f"step-*{MAKING}"))


def was_saved(run: Path) -> bool:
    """Whether the run ever had a checkpoint, which may be damaged or gone by now."""
    folders = (run / "checkpoints").glob("step-*")
    return (run / "latest").exists() or any(not folder.name.endswith(MAKING) for folder in folders)


def prune(run: Path, keep: int, always: set[int]) -> None:
    """Removes old checkpoints.

    It keeps the `keep` newest ones up to the one that `latest` names, those of the steps in `always`, and all that come
    after `latest`.
    """
    newest = latest(run)
    assert newest is not None
    for step in [step for step in steps_saved(run) if step <= step_of(newest)][:-keep]:
        if step not in always:
            folder = folder_of_step(run, step)
            removing = folder.with_name(folder.name + MAKING)  # so that a half-removed one is not taken for whole
            folder.rename(removing)
            shutil.rmtree(removing)


def at_step(run: Path, step: int) -> Path:
    """The run's checkpoint of `step`; step 0 is the newest. Raises ValueError if there is none."""
    folder = folder_of_step(run, step) if step else latest(run)
    if folder is None or not folder.is_dir():
        which = f" of step {step}" if step else ""
        raise ValueError(f"{run}: no checkpoint{which}; it has {steps_saved(run) or 'none'}")
    return folder


# ---- reading


def read_manifest(folder: Path) -> dict:
    """The manifest of a checkpoint. Raises Damaged when it isn't what was saved. Older versions wrote no hash."""
    path, advice = folder / "manifest.json", "go back to an older checkpoint"
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise Damaged(f"{path}: missing from the checkpoint; {advice}") from None
    except (ValueError, RecursionError, IsADirectoryError) as error:
        raise Damaged(f"{path}: not readable ({error}); {advice}") from None
    missing = _MANIFEST_KEYS - set(manifest if isinstance(manifest, dict) else ())
    if missing:
        raise Damaged(f"{path}: it has no {', '.join(sorted(missing))}; {advice}")
    files = manifest["files"] if isinstance(manifest["files"], list) else [{}]
    names = [str(entry.get("file", "")) if isinstance(entry, dict) else "" for entry in files]
    own = own_hash(manifest)
    counts = [manifest[key] for key in sorted(_MANIFEST_KEYS - {"files", "shapes"})]
    sound = all(type(count) is int and count >= 0 for count in counts) and len(names) == manifest["world_size"]
    shapes = manifest["shapes"].values() if isinstance(manifest["shapes"], dict) else ()
    sound = sound and bool(shapes) and all(isinstance(shape, list) for shape in shapes)
    sound = sound and all(name and name == Path(name).name for name in names)
    if manifest.get("hash", own) != own or not sound:
        raise Damaged(f"{path}: edited or damaged, it does not hold together or is not what its hash says; {advice}")
    if manifest["step"] != step_of(folder):
        raise Damaged(f"{folder}: holds the checkpoint of step {manifest['step']}; give the folder that name")
    return manifest


def check_file(folder: Path, entry: dict) -> None:
    """Raises Damaged when a file is not what its entry in the manifest says."""
    path = folder / entry["file"]
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise Damaged(f"{path}: missing from the checkpoint; go back to an older one") from None
    if size != entry.get("bytes") or sha256_of_file(path) != entry.get("sha256"):
        raise Damaged(f"{path}: damaged, its content is not what was saved; go back to an older checkpoint")


def verified(folder: Path) -> dict:
    """Checks every file of a checkpoint against its manifest. Returns the manifest.

    Raises Damaged, a ValueError, that names what is damaged.
    """
    manifest = read_manifest(folder)
    for entry in manifest["files"]:
        check_file(folder, entry)
    return manifest


@contextmanager
def opened_weights(folder: Path, manifest: dict, kind: str = "ema") -> Iterator[dict[str, Callable[[], Tensor]]]:
    """Functions that read each weight, fp32: of the average ("ema") or the last weights ("master").

    `manifest`: what `verified` gave.
    """
    try:
        with CheckpointReader(folder, manifest) as reader:
            yield {name: partial(reader.whole, kind, name) for name in manifest["shapes"]}
    except SafetensorError as error:
        raise ValueError(f"{folder}: {error}") from None


def read_weights(folder: Path, kind: str = "ema") -> dict[str, Tensor]:
    """All weights of a checkpoint as fp32 tensors; see `opened_weights`."""
    with opened_weights(folder, verified(folder), kind) as weights:
        return {name: read() for name, read in weights.items()}
