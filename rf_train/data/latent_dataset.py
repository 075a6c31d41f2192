"""A folder of latent shards as a list of samples in a seeded order.

    card -> index of every sample in its shard -> one order per epoch -> samples at given positions

A sample is one read at its offset in a tar file. Its bytes are checked against the index, its values against the card.
Nothing is unpickled.
"""

import hashlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_prep.card import check_sample, read_card
from data_prep.index import SampleIndex
from data_prep.places import Place, Remote, place_of
from data_prep.shards import SampleError, read_sample
from rf_train.config import Stage
from rf_train.data.damage import Damage
from rf_train.model.settings import ModelSettings

TRIES = 100  # samples that are tried for one position
READERS = 8  # samples of a remote dataset that are read at once


class Clip(NamedTuple):
    """The clip at a position: its id, latent fp32 [C, F, H, W], text fp32 [L, D], JSON, and what was damaged before."""

    id: str
    latent: Tensor
    text: Tensor
    meta: dict
    damage: list[Damage]


class LatentDataset:
    """A dataset that `data_prep.encode` wrote, in a folder or at an address, for a given model.

    Raises ValueError when its card doesn't fit the model; the message names every difference.
    """

    def __init__(self, folder: str | Place, model: ModelSettings, patience: float | None = None):
        self.folder = place_of(folder, patience)
        card = read_card(self.folder)
        check_card(card, model, self.folder)
        latent = card["latent"]
        self.tokens_per_frame = model.tokens_per_frame(latent["height"], latent["width"])
        self.index = SampleIndex(self.folder, card)
        self.card = {key: part for key, part in card.items() if key != "shards"}  # of ten million samples: 100 MB
        self.empty_caption = torch.tensor(self.card["empty_caption"], dtype=torch.float32)
        self._lock = threading.Lock()
        self._orders: dict[tuple[int, int], np.ndarray] = {}  # of the last two (seed, epoch) asked for

    def __len__(self) -> int:
        return len(self.index)

    def key(self, index: int) -> str:
        """The name of sample `index`."""
        return self.index.key(index)

    def summary(self) -> dict:
        """What must be the same on every rank: the number of samples, and the card's hash."""
        return {"samples": len(self), "card": self.card["hash"][:16]}

    def read(self, index: int, frames: int = 0, draw: str = "") -> tuple[Tensor, Tensor, dict]:
        """Sample `index`: latent fp32 [C, F, H, W], text fp32 [L, D], and its JSON.

        `frames` cuts the latent to its first frames; 0 = all. Of several captions it takes the first one, or draws one
        from the random stream of the name `draw`; then "caption" of the JSON is that one. Raises SampleError, a
        ValueError, when the sample is not as it was written, or does not fit the card.
        """
        file, entry = self.index[index]
        sample = read_sample(self.folder / file, entry)
        check_sample(self.card, f"{self.folder / file}: {entry.key}", sample)
        text, meta = sample.text, sample.meta
        if draw and len(sample.texts) > 1:
            number = int(random_stream(draw).integers(len(sample.texts)))
            text, meta = sample.texts[number], {**meta, "caption": meta["captions"][number]}
        return to_float32(sample.latent[:, : frames or None]), to_float32(text), meta

    def places(self, seed: int, done: Sequence[tuple[int, int]], step: int, batch: int) -> list[int]:
        """The positions of a step's clips in the stream of `samples_at`.

        `done`: (steps, clips of each) of the stages before that read this dataset; `step` counts from there on.
        """
        first = sum(steps * size for steps, size in done) + step * batch
        return list(range(first, first + batch))

    def clip_at(self, seed: int, position: int, frames: int = 0) -> Clip:
        """The clip at a position of the endless stream of `samples_at`.

        A sample that can't be read as it was written is replaced by the next one of the epoch's order that can. So the
        clip depends on the position and the data alone, and ranks stay in step. Of several captions, one is drawn for
        the position, by (seed, id). Raises ValueError after TRIES samples.
        """
        epoch, place = divmod(position, len(self))
        order = self._epoch_order(seed, epoch)
        name, bad = f"{self.key(int(order[place]))}@{epoch}", []
        for step in range(min(TRIES, len(self))):
            index = int(order[(place + step) % len(self)])
            try:
                latent, text, meta = self.read(index, frames, f"{seed}\0caption\0{name}")
            except SampleError as error:
                bad.append((self.index[index][0], self.key(index), error))
                continue
            used = self.key(index)
            damage = [
                Damage(name, str(self.folder), file, key, error.reason, error.detail, used) for file, key, error in bad
            ]
            return Clip(f"{name}>{used}" if bad else name, latent, text, meta, damage)
        raise ValueError(f"{bad[0][2]}; and so are the next {len(bad) - 1} samples. Look at {self.folder}")

    def clips_at(self, seed: int, positions: Sequence[int], frames: int = 0) -> list[Clip]:
        """The clips at these positions, in this order. Those of a remote dataset are read up to READERS at once."""
        return read_all(lambda position: self.clip_at(seed, position, frames), positions, self.is_remote)

    @property
    def is_remote(self) -> bool:
        """Whether it is read from a server."""
        return isinstance(self.folder, Remote)

    @property
    def parts(self) -> list["LatentDataset"]:
        """The datasets that it consists of, as those of a mixture."""
        return [self]

    def clip_frames(self, stage: Stage) -> int:
        """Latent frames of a clip in `stage`. Raises ValueError when the dataset's clips are shorter."""
        return clip_frames(self.card, stage, self.folder)

    def samples_at(self, seed: int, first: int, count: int) -> list[tuple[int, str]]:
        """(index, id) of the samples at positions first .. first + count - 1 of an endless stream of epochs.

        Each epoch has a fresh order. The id names sample and epoch, so that no two positions share their random
        numbers.
        """
        samples = []
        for position in range(first, first + count):
            epoch, place = divmod(position, len(self))
            index = int(self._epoch_order(seed, epoch)[place])
            samples.append((index, f"{self.key(index)}@{epoch}"))
        return samples

    def _epoch_order(self, seed: int, epoch: int) -> np.ndarray:
        """The samples of an epoch in its order, 4 bytes each."""
        with self._lock:
            if (seed, epoch) not in self._orders:
                if len(self._orders) == 2:  # a batch reaches into two epochs at most
                    self._orders.pop(next(iter(self._orders)))
                order = np.arange(len(self), dtype=np.uint32)
                self._orders[seed, epoch] = random_stream(f"{seed}\0order\0{epoch}").permutation(order)
            return self._orders[seed, epoch]


def read_all(read: Callable[[Any], Clip], places: Sequence, remote: bool) -> list[Clip]:
    """`read` of each place, in this order; up to READERS at once if they are remote."""
    if not remote or len(places) < 2:
        return [read(place) for place in places]
    pool = ThreadPoolExecutor(min(READERS, len(places)))
    try:
        return list(pool.map(read, places))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def to_float32(half: np.ndarray) -> Tensor:
    """A float16 array as a contiguous fp32 tensor of its own memory; PyTorch is three times as fast as numpy."""
    return torch.from_numpy(half).float().contiguous()


def random_stream(name: str) -> np.random.Generator:
    """A stream of random numbers that depends on its name alone, on every machine."""
    digest = hashlib.sha256(name.encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def clip_frames(card: dict, stage: Stage, folder: str | Place) -> int:
    """Latent frames of a clip of `stage` in a dataset. Raises ValueError when its clips are shorter."""
    stored = card["latent"]["frames"]
    if stage.frames > stored:
        raise ValueError(
            f"stage {stage.name}: frames={stage.frames}, but {folder} holds clips of {stored} latent frames"
        )
    return stage.frames or stored


def check_card(card: dict, model: ModelSettings, folder: str | Place) -> None:
    """Raises a ValueError that lists every way in which a dataset's card doesn't fit the model."""
    latent, text, wrong = card["latent"], card["text"], []
    if latent["channels"] != model.channels:
        wrong.append(f"its latents have {latent['channels']} channels, model.channels is {model.channels}")
    if text["dim"] != model.text_dim:
        wrong.append(f"its text vectors are {text['dim']} wide, model.text_dim is {model.text_dim}")
    if text["max_tokens"] > model.text_len:
        wrong.append(f"its captions have up to {text['max_tokens']} tokens, model.text_len is {model.text_len}")
    if latent["height"] % model.patch or latent["width"] % model.patch:
        size = f"{latent['height']}x{latent['width']}"
        wrong.append(f"its latents are {size}, not a multiple of model.patch {model.patch}")
    if wrong:
        raise ValueError(f"{folder}: the dataset does not fit the model: " + "; ".join(wrong))
