"""A trained model, ready to sample."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from data_prep.card import NotADataset, card_geometry, read_card
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
from rf_train.engine.inference import VideoRanks, check_split, inference_model, split_model
from rf_train.model.chunks import Attention, attention_at_any_length
from rf_train.model.elementwise import use_compiled
from rf_train.model.kernels import use_kernel
from rf_train.model.transformer import CausalWan, VelocityModel, parameter_shapes

T = TypeVar("T")


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
    together: VideoRanks | None = None  # the ranks that make each video; None: this process alone
    engine: VelocityModel | None = None  # what makes the passes where weights are split; None: the model itself

    @property
    def velocity(self) -> VelocityModel:
        """What makes the passes."""
        return self.engine or self.model

    @property
    def leads(self) -> bool:
        """Whether this process decodes and writes; others only take part in the passes."""
        return self.together is None or self.together.leads

    def tell(self, action: Callable[[], T]) -> T:
        """What `action` gives on the leader, on every rank that makes the video. A collective of them."""
        return action() if self.together is None else self.together.tell(action)

    def embed(self, prompts: Sequence[str]) -> list[Tensor]:
        """The prompts' embeddings, fp32 [L, text_dim], by the text encoder that made the dataset.

        Where ranks make videos together it is a collective, and only the leader opens the encoder.
        """
        vectors = self.tell(lambda: self._encoder.encode(list(prompts)))
        most = self.recipe.model.text_len
        for prompt, vector in zip(prompts, vectors):
            if len(vector) > most and self.leads:
                print(f'the model reads the first {most} of {len(vector)} tokens of "{prompt}"', file=sys.stderr)
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
        return sample_chunks(self.velocity, request, self.recipe.flow, self.attention)


def open_run(
    run: str | Path,
    overrides: Sequence[str] = (),
    step: int = 0,
    weights: str = "ema",
    device: torch.device | None = None,
    positions: str = "relative",
    together: VideoRanks | None = None,
    split_weights: bool = False,
) -> Generator:
    """Opens a run: its recipe with `overrides`, the weights of a checkpoint (step 0 = the newest), the codec.

    `weights`: "ema", the average, or "master", the last weights. `device`: None for a GPU where there is one.
    `positions`: one of `POSITIONS`. `together`: the ranks that make each video; `split_weights`: each keeps a part of
    the weights. Raises a one-line ValueError when there is no such run or checkpoint, or when its dataset is gone.
    """
    run = Path(run)
    if not (run / "recipe.yaml").is_file():
        raise ValueError(f"{run}: not a run, it has no recipe.yaml")
    recipe = config.load(run / "recipe.yaml", overrides)
    folder = checkpoint.at_step(run, step)
    if together is not None:
        device = together.ranks.device
    device = device or torch.device("cuda" if gpu_is_usable() else "cpu")
    use_compiled(recipe.run.compile)
    use_kernel(recipe.model.attention_kernel)
    manifest = checkpoint.verified(folder) if together is None else together.tell(lambda: checkpoint.verified(folder))
    wrong = checkpoint.shape_differences(manifest["shapes"], parameter_shapes(recipe.model))
    if wrong:
        raise ValueError(f"{folder}: the checkpoint does not fit the recipe's model: {wrong}")
    if together is not None:
        latent = training_card(recipe)[1]["latent"]
        check_split(recipe.model, recipe.model.tokens_per_frame(latent["height"], latent["width"]), together.size)
    kind, engine = weights if recipe.optimizer.ema > 0 else "master", None
    with checkpoint.opened_weights(folder, manifest, kind) as found:
        if split_weights:
            assert together is not None
            model, engine = split_model(recipe.model, together, found)
        else:
            model = inference_model(recipe.model, device, found)
    generator = make_generator(recipe, model, checkpoint.step_of(folder), device)
    if together is not None and together.size > 1:
        model.sequence_parallel = together.ulysses
    return replace(generator, positions=positions, together=together, engine=engine)


def make_generator(recipe: Recipe, model: CausalWan, step: int, device: torch.device) -> Generator:
    """A generator with a recipe's model, whose weights are those of `step`, and the codec of the recipe's dataset.

    Raises ValueError when the dataset is not there, or does not fit the model.
    """
    model = model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32).eval()
    patience = recipe.data.patience
    dataset, card = training_card(recipe)
    folders = [place_of(recipe.folders_of(recipe.dataset_of(stage))[0], patience) for stage in recipe.stages]
    frames = [stage.frames or read_card(folder)["latent"]["frames"] for stage, folder in zip(recipe.stages, folders)]
    codec = dataset_codec(dataset, device.type)
    return Generator(recipe, model, step, card, max(frames), codec, dataset, device)


def training_card(recipe: Recipe) -> tuple[Place, dict]:
    """The dataset that a recipe trains on first, and its card. Raises ValueError when it does not fit the model."""
    dataset = place_of(recipe.folders_of(recipe.data.train or recipe.stages[0].data)[0], recipe.data.patience)
    try:
        card = read_card(dataset)
    except NotADataset as error:
        needed = "the run's training data: its card, codec and text encoder are needed, not its shards"
        raise NotADataset(f"{error} ({needed}; or give  data.train=FOLDER)") from None
    check_card(card, recipe.model, dataset)
    return dataset, card
