"""The state of a run on a rank: its fragments of weights and Adam's moments, and the average (EMA) of the weights."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from rf_train.engine.checkpoint import KINDS, CheckpointReader, shape_differences
from rf_train.engine.collectives import current_device, sum_over_ranks
from rf_train.engine.zero import Engine


class TrainingState:
    """The state of a run on this rank: the engine's fragments by parameter name, and the average (EMA).

    Each rank averages its own fragments. That is exact, and needs no communication.
    """

    def __init__(self, engine: Engine, ema_decay: float):
        self.engine, self.ema_decay, self.average_steps = engine, ema_decay, 0
        self.shapes = engine.parameter_shapes()
        self.local_fragments = engine.fragments()
        self.ema = {name: fragment.master.clone() for name, fragment in self.local_fragments.items()}
        self._host: dict[str, Tensor] = {}

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

    @torch.no_grad()
    def copy_to_host(self) -> dict[str, Tensor]:
        """What this rank's file holds: "kind/NAME" -> a flat fp32 copy in host memory.

        Every call fills the same memory again, as much as this rank's part of weights, moments and average.
        """
        for kind, tensors in self.by_kind().items():
            for name, tensor in tensors.items():
                key = f"{kind}/{name}"
                if key not in self._host:
                    self._host[key] = torch.empty(tensor.shape, dtype=torch.float32)
                self._host[key].copy_(tensor)
        return self._host

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
