"""From latent shards to the batches of a step.

    card -> index of every sample's place in its shard -> one order an epoch -> the clips of a step -> this rank's micro-batches

The clips of a step are a function of (seed, step) and the recipe alone: the same at any world size, and after any resume.
Samples are read by their offsets in the tar; nothing is unpickled.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

import numpy as np
import torch
from torch import Tensor

from data_prep.shards import index_shard, read_card, read_sample
from rf_train import config
from rf_train.chunks import Chunking
from rf_train.model import pad_text
from rf_train.randomness import Draws, draw


class Latents:
    """A dataset folder written by `data_prep.encode`, for a given model.

    Raises ValueError, naming every difference at once, when its card doesn't fit the model.
    """

    def __init__(self, folder: str | Path, model: config.Model):
        self.folder, self.patch = Path(folder), model.patch
        self.card = read_card(self.folder)
        check_card(self.card, model, self.folder)
        self.places = [(shard["file"], key, members) for shard in self.card["shards"] for key, members in index_shard(self.folder / shard["file"])]
        if len(self.places) != self.card["counts"]["samples"]:
            raise ValueError(f"{self.folder}: the card counts {self.card['counts']['samples']} samples, the shards hold {len(self.places)}")
        self.empty_caption = torch.tensor(self.card["empty_caption"], dtype=torch.float32)

    @property
    def tokens(self) -> int:
        """Tokens of a latent frame."""
        return self.card["latent"]["height"] * self.card["latent"]["width"] // self.patch**2

    def summary(self) -> dict:
        """What must be the same on every rank: the number of samples, and a hash of what the card says of them."""
        parts = json.dumps([self.card[key] for key in ("codec", "latent", "text", "empty_caption", "shards")], sort_keys=True)
        return {"samples": len(self), "card": hashlib.sha256(parts.encode()).hexdigest()[:16]}

    def __len__(self) -> int:
        return len(self.places)

    def read(self, index: int, frames: int = 0) -> tuple[Tensor, Tensor, dict]:
        """Sample `index`: latent fp32 [C, F, H, W] (its first `frames` frames; 0 = all), text fp32 [L, D], and its JSON."""
        file, _, members = self.places[index]
        latent, text, meta = read_sample(self.folder / file, members)
        latent = torch.from_numpy(latent[:, : frames or None].astype(np.float32))
        return latent, torch.from_numpy(text.astype(np.float32)), meta

    def frames(self, stage: config.Stage) -> int:
        """Latent frames of a clip in `stage`."""
        held = self.card["latent"]["frames"]
        if stage.frames > held:
            raise ValueError(f"stage {stage.name}: frames={stage.frames}, but {self.folder} holds clips of {held} latent frames")
        return stage.frames or held

    def drawn(self, seed: int, first: int, count: int) -> list[tuple[int, str]]:
        """(index, id) of the samples at positions first .. first + count - 1 of the endless stream of epochs, each a fresh order.

        The id names sample and epoch, so that no two places of a batch share their random numbers.
        """
        found = []
        for position in range(first, first + count):
            epoch, place = divmod(position, len(self))
            index = int(self._order(seed, epoch)[place])
            found.append((index, f"{self.places[index][1]}@{epoch}"))
        return found

    def _order(self, seed: int, epoch: int) -> np.ndarray:
        if getattr(self, "_epoch", None) != (seed, epoch):
            digest = hashlib.sha256(f"{seed}\0order\0{epoch}".encode()).digest()
            stream = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
            self._epoch, self._permutation = (seed, epoch), stream.permutation(len(self))
        return self._permutation


def check_card(card: dict, model: config.Model, folder: str | Path) -> None:
    """Raises ValueError listing every way in which a dataset's card doesn't fit the model."""
    latent, text, wrong = card["latent"], card["text"], []
    if latent["channels"] != model.channels:
        wrong.append(f"its latents have {latent['channels']} channels, model.channels is {model.channels}")
    if text["dim"] != model.text_dim:
        wrong.append(f"its text vectors are {text['dim']} wide, model.text_dim is {model.text_dim}")
    if text["max_tokens"] > model.text_len:
        wrong.append(f"its captions have up to {text['max_tokens']} tokens, model.text_len is {model.text_len}")
    if latent["height"] % model.patch or latent["width"] % model.patch:
        wrong.append(f"its latents are {latent['height']}x{latent['width']}, not a multiple of model.patch {model.patch}")
    if wrong:
        raise ValueError(f"{folder}: the dataset does not fit the model: " + "; ".join(wrong))


@dataclass
class Batch:
    """A micro-batch of B clips and its random numbers."""

    ids: list[str]
    x: Tensor  # [B, C, F, H, W] fp32
    text: Tensor  # [B, text_len, text_dim] fp32, zero-padded; dropped captions already replaced by the empty one
    draws: Draws

    def to(self, device: torch.device) -> "Batch":
        return Batch(self.ids, self.x.to(device, non_blocking=True), self.text.to(device, non_blocking=True), self.draws.to(device))


def open_datasets(recipe: config.Recipe) -> dict[str, Latents]:
    """Every dataset that the stages name, by folder; all must come from the same codec and text encoder."""
    folders = [stage.data or recipe.data.train for stage in recipe.stages]
    if "" in folders:
        raise ValueError("data.train: no dataset folder is set")
    datasets = {folder: Latents(folder, recipe.model) for folder in dict.fromkeys(folders)}
    first = next(iter(datasets.values()))
    for folder, dataset in datasets.items():
        for part in ("codec", "text"):
            if dataset.card[part]["hash"] != first.card[part]["hash"]:
                raise ValueError(f"{folder}: its {part} is not that of {first.folder}; stages can't mix them")
    for stage in recipe.stages:
        datasets[stage.data or recipe.data.train].frames(stage)
    return datasets


def accumulation(stage: config.Stage, micro_batch: int, world: int) -> int:
    """Micro-batches a rank and step. Raises ValueError when the stage's batch doesn't split evenly."""
    if stage.batch % (micro_batch * world):
        raise ValueError(f"stage {stage.name}: batch={stage.batch} is not a multiple of optimizer.micro_batch={micro_batch} x {world} ranks")
    return stage.batch // (micro_batch * world)


def step_batches(recipe: config.Recipe, datasets: dict[str, Latents], step: int, rank: int, world: int) -> list[Batch]:
    """This rank's micro-batches of `step`, on the CPU."""
    position, stage, inside = recipe.stage_at(step)
    folder = stage.data or recipe.data.train
    dataset = datasets[folder]
    seen = sum(s.steps * s.batch for s in recipe.stages[:position] if (s.data or recipe.data.train) == folder)
    chosen = dataset.drawn(recipe.run.seed, seen + inside * stage.batch, stage.batch)
    chunking = Chunking(recipe.model.chunk, recipe.model.first_chunk)
    size = recipe.optimizer.micro_batch
    batches = []
    for part in range(accumulation(stage, size, world)):
        begin = (part * world + rank) * size
        mine = chosen[begin : begin + size]
        samples = [dataset.read(index, dataset.frames(stage)) for index, _ in mine]
        ids = [name for _, name in mine]
        x = torch.stack([latent for latent, _, _ in samples])
        draws = draw(recipe.run.seed, step, ids, tuple(x.shape[1:]), len(chunking.sizes(x.shape[2])))
        dropped = draws.drop_caption < recipe.flow.caption_dropout
        text = pad_text([dataset.empty_caption if drop else text for drop, (_, text, _) in zip(dropped.tolist(), samples)], recipe.model)
        batches.append(Batch(ids, x, text, draws))
    return batches


def steps(recipe: config.Recipe, datasets: dict[str, Latents], first: int, rank: int, world: int) -> Iterator[tuple[int, list[Batch]]]:
    """(step, micro-batches) from step `first` to the recipe's end; the next step is read while this one is computed."""
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(step_batches, recipe, datasets, first, rank, world) if first < recipe.steps else None
        for step in range(first, recipe.steps):
            batches = ahead.result()
            if step + 1 < recipe.steps:
                ahead = reader.submit(step_batches, recipe, datasets, step + 1, rank, world)
            yield step, batches
