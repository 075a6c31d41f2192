"""A trained model, ready to sample."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_prep.card import card_geometry, read_card
from data_prep.codecs import Codec, dataset_codec
from data_prep.geometry import LatentGeometry
from data_prep.places import Place, place_of
from data_prep.text import TextEncoder, dataset_text
from rf_train import config
from rf_train.config import Recipe
from rf_train.data.latent_dataset import check_card
from rf_train.diffusion.sampling import VideoRequest, sample_chunks
from rf_train.engine import checkpoint
from rf_train.engine.devices import gpu_is_usable
from rf_train.model.chunks import Attention, attention_at_any_length
from rf_train.model.elementwise import use_compiled
from rf_train.model.kernels import use_kernel
from rf_train.model.transformer import CausalWan


@dataclass
class Generator:
    """A trained model with its recipe, its codec, and the card of its training data."""

    recipe: Recipe
    model: CausalWan
    step: int
    card: dict
    trained_frames: int  # latent frames of the longest clip trained on
    codec: Codec
    dataset: Place
    device: torch.device
    positions: str = "relative"  # of sinks, see `POSITIONS`

    def embed(self, prompts: Sequence[str]) -> list[Tensor]:
        """The prompts' embeddings, fp32 [L, text_dim], by the text encoder that made the dataset."""
        vectors = self._encoder.encode(list(prompts))
        return [torch.from_numpy(np.asarray(vector, dtype=np.float32)) for vector in vectors]

    @cached_property
    def _encoder(self) -> TextEncoder:
        return dataset_text(self.dataset, self.device.type)

    @property
    def geometry(self) -> LatentGeometry:
        return card_geometry(self.card)

    @property
    def trained_chunks(self) -> int:
        return len(self.model.chunking.sizes(self.trained_frames))

    @property
    def attention(self) -> Attention:
        """That of videos of any length; see `attention_at_any_length`."""
        return attention_at_any_length(self.recipe.stages[-1].attention, self.trained_chunks, self.positions)

    @property
    def fps(self) -> float:
        return self.card["video"]["fps"]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of a frame in pixels."""
        return self.card["video"]["height"], self.card["video"]["width"]

    def chunks(
        self, texts: list[Tensor], frames: int, seeds: list[int], given: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Yields latent chunks [B, C, f, H, W] for the embeddings of B captions; see `sample_chunks`."""
        request = VideoRequest.like(self.card, self.recipe.model, self.device, texts, frames, seeds, given)
        return sample_chunks(self.model, request, self.recipe.flow, self.attention)


def open_run(
    run: str | Path,
    overrides: Sequence[str] = (),
    step: int = 0,
    weights: str = "ema",
    device: torch.device | None = None,
    positions: str = "relative",
) -> Generator:
    """Opens a run: its recipe with `overrides`, the weights of a checkpoint (step 0 = the newest), the codec.

    `weights`: "ema", the average, or "master", the last weights. `device`: None for a GPU where there is one.
    `positions`: one of `POSITIONS`. Raises a one-line ValueError when there is no such run or checkpoint, or when its
    dataset is gone.
    """
    run = Path(run)
    if not (run / "recipe.yaml").is_file():
        raise ValueError(f"{run}: not a run, it has no recipe.yaml")
    recipe = config.load(run / "recipe.yaml", overrides)
    folder = checkpoint.at_step(run, step)
    device = device or torch.device("cuda" if gpu_is_usable() else "cpu")
    use_compiled(recipe.run.compile)
    use_kernel(recipe.model.attention_kernel)
    model = CausalWan(recipe.model)
    state = checkpoint.read_weights(folder, weights if recipe.optimizer.ema > 0 else "master")
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    wrong = checkpoint.shape_differences({name: tensor.shape for name, tensor in state.items()}, shapes)
    if wrong:
        raise ValueError(f"{folder}: the checkpoint does not fit the recipe's model: {wrong}")
    model.load_state_dict(state)
    return replace(make_generator(recipe, model, checkpoint.step_of(folder), device), positions=positions)


def make_generator(recipe: Recipe, model: CausalWan, step: int, device: torch.device) -> Generator:
    """A generator with a recipe's model, whose weights are those of `step`, and the codec of the recipe's dataset.

    Raises ValueError when the dataset is not there, or does not fit the model.
    """
    model = model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32).eval()
    patience = recipe.data.patience
    dataset = place_of(recipe.folders_of(recipe.data.train or recipe.stages[0].data)[0], patience)
    card = read_card(dataset)
    check_card(card, recipe.model, dataset)
    folders = [place_of(recipe.folders_of(recipe.dataset_of(stage))[0], patience) for stage in recipe.stages]
    frames = [stage.frames or read_card(folder)["latent"]["frames"] for stage, folder in zip(recipe.stages, folders)]
    codec = dataset_codec(dataset, device.type)
    return Generator(recipe, model, step, card, max(frames), codec, dataset, device)
