"""A micro-batch: what one forward and backward pass of a rank reads."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """B clips in N chunks, and their random numbers."""

    ids: list[str]  # sample and epoch, such as "000012_0001@3"
    x: Tensor  # [B, C, F, H, W] fp32, the clean latents
    text: Tensor  # [B, text_len, text_dim] fp32, zero-padded; dropped captions are already replaced by the empty one
    draws: dict[str, Tensor]  # random numbers by purpose, see `randomness.make_draws`
    chunk_sizes: list[int]  # N numbers: latent frames of each chunk
    present: Tensor | None = None  # bool [B, F]: which latent frames exist; None: all of them
    damaged: Sequence[str] = ()  # the samples that could not be read, and were replaced: a line of JSON each

    @property
    def history_frames(self) -> int:
        """Latent frames of the history stream: all chunks but the last, which nothing reads."""
        return sum(self.chunk_sizes[:-1])

    def to(self, device: torch.device) -> "Batch":
        """The same on a device. From page-locked memory the caller does not wait for the copy."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """The same in page-locked memory, from which a GPU copies beside its work."""
        return self._each(Tensor.pin_memory)

    def used_on(self, stream: "torch.cuda.Stream") -> "Batch":
        """Notes that `stream` reads the tensors too: their memory is given to nobody else before it is done."""

        def noted(tensor: Tensor) -> Tensor:
            tensor.record_stream(stream)
            return tensor

        return self._each(noted)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        draws = {purpose: change(tensor) for purpose, tensor in self.draws.items()}
        present = None if self.present is None else change(self.present)
        return replace(self, x=change(self.x), text=change(self.text), draws=draws, present=present)


def on_device(batches: Sequence[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches on a device, in order. A GPU copies the next one, on a stream of its own, beside the work on one."""
    if device.type != "cuda":
        yield from (batch.to(device) for batch in batches)
        return
    work, copies = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    coming = None
    for number in range(len(batches)):
        with torch.cuda.stream(copies):
            batch = coming or batches[0].to(device)
            work.wait_stream(copies)  # for this one, and not for the next
            coming = batches[number + 1].to(device) if number + 1 < len(batches) else None
        yield batch.used_on(work)
