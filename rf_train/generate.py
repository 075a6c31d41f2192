"""Makes videos with a trained run, of any length:  python -m rf_train.generate RUN OUT.mp4 --prompt TEXT --seconds 15

With --video FILE the first frames of a real video are kept and continued.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data_prep.card import card_geometry, read_card
from data_prep.codecs import Codec, dataset_codec
from data_prep.command import require_finite, run_command
from data_prep.geometry import LatentGeometry
from data_prep.places import Place, place_of
from data_prep.text import dataset_text
from data_prep.video import read_frames, write_video
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

    def embed(self, prompts: list[str]) -> list[Tensor]:
        """The prompts' embeddings, fp32 [L, text_dim], by the text encoder that made the dataset."""
        encoder = dataset_text(self.dataset, self.device.type)
        return [torch.from_numpy(np.asarray(vector, dtype=np.float32)) for vector in encoder.encode(prompts)]

    @property
    def geometry(self) -> LatentGeometry:
        return card_geometry(self.card)

    @property
    def trained_chunks(self) -> int:
        return len(self.model.chunking.sizes(self.trained_frames))

    @property
    def attention(self) -> Attention:
        """That of videos of any length; see `attention_at_any_length`."""
        return attention_at_any_length(self.recipe.stages[-1].attention, self.trained_chunks)

    def chunks(
        self, texts: list[Tensor], frames: int, seeds: list[int], given: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Yields latent chunks [B, C, f, H, W] for the embeddings of B captions; see `sample_chunks`."""
        request = VideoRequest.like(self.card, self.recipe.model, self.device, texts, frames, seeds, given)
        return sample_chunks(self.model, request, self.recipe.flow, self.attention)


def open_run(run: str | Path, overrides: Sequence[str] = (), step: int = 0, weights: str = "ema") -> Generator:
    """Opens a run: its recipe with `overrides`, the weights of a checkpoint (step 0 = the newest), the codec.

    `weights`: "ema", the average, or "master", the last weights.
    """
    run = Path(run)
    if not (run / "recipe.yaml").is_file():
        raise ValueError(f"{run}: not a run, it has no recipe.yaml")
    recipe = config.load(run / "recipe.yaml", overrides)
    folder = checkpoint.at_step(run, step)
    device = torch.device("cuda" if gpu_is_usable() else "cpu")
    use_compiled(recipe.run.compile)
    use_kernel(recipe.model.attention_kernel)
    model = CausalWan(recipe.model)
    state = checkpoint.read_weights(folder, weights if recipe.optimizer.ema > 0 else "master")
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    wrong = checkpoint.shape_differences({name: tensor.shape for name, tensor in state.items()}, shapes)
    if wrong:
        raise ValueError(f"{folder}: the checkpoint does not fit the recipe's model: {wrong}")
    model.load_state_dict(state)
    model = model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32).eval()
    patience = recipe.data.patience
    dataset = place_of(recipe.folders_of(recipe.data.train or recipe.stages[0].data)[0], patience)
    card = read_card(dataset)
    check_card(card, recipe.model, dataset)
    folders = [place_of(recipe.folders_of(recipe.dataset_of(stage))[0], patience) for stage in recipe.stages]
    frames = [stage.frames or read_card(folder)["latent"]["frames"] for stage, folder in zip(recipe.stages, folders)]
    codec = dataset_codec(dataset, device.type)
    return Generator(recipe, model, checkpoint.step_of(folder), card, max(frames), codec, dataset, device)


def first_frames(generator: Generator, video: str | Path, chunks: int) -> Tensor:
    """Latent [1, C, F, H, W] of the first `chunks` chunks of a video, or as many whole ones as it has.

    Raises ValueError when it has none.
    """
    size, fps = generator.card["video"], generator.card["video"]["fps"]
    chunking, geometry = generator.model.chunking, generator.geometry
    wanted = geometry.video_frames(chunking.start(chunks))
    pixels = []
    for frame in read_frames(video, fps, (size["height"], size["width"])):
        pixels.append(frame)
        if len(pixels) == wanted:
            break
    while chunks > 0 and geometry.video_frames(chunking.start(chunks)) > len(pixels):
        chunks -= 1
    if chunks == 0:
        need = geometry.video_frames(chunking.first)
        raise ValueError(f"{video}: {len(pixels)} frames at {fps} fps, the first chunk needs {need}")
    kept = geometry.video_frames(chunking.start(chunks))
    return torch.from_numpy(generator.codec.encode(np.stack(pixels[:kept])))[None]


def generate(options: argparse.Namespace) -> str:
    """Writes the video that the command line asks for. Returns the line that says what was made."""
    check_options(options)
    generator = open_run(options.run, options.overrides, options.step)
    fps = generator.card["video"]["fps"]
    pixel_frames = max(1, round(options.seconds * fps))
    frames = generator.geometry.latent_frames(pixel_frames)
    given = first_frames(generator, options.video, options.given_chunks) if options.video else None
    if given is not None and given.shape[2] >= frames:
        taken = f"the {given.shape[2]} latent frames taken from {options.video}"
        raise ValueError(f"--seconds {options.seconds} is not longer than {taken}")
    chunks = generator.chunks(generator.embed([options.prompt]), frames, [options.seed], given)
    total = len(generator.model.chunking.sizes(frames))
    latent = torch.cat(list(tqdm(chunks, total=total, unit="chunk", desc="generate")), dim=2)[0]
    pixels = generator.codec.decode(latent.cpu().numpy())[:pixel_frames]
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    write_video(options.out, pixels, fps)
    trained = generator.geometry.video_frames(generator.trained_frames) / fps
    return f"{options.out}: {len(pixels)} frames, {len(pixels) / fps:.2f} s (trained on clips of {trained:.2f} s)"


def check_options(options: argparse.Namespace) -> None:
    """Raises ValueError for invalid options."""
    if not options.prompt and not options.video:
        raise ValueError("give --prompt TEXT, --video FILE or both")
    require_finite(seconds=options.seconds)
    if options.seconds <= 0:
        raise ValueError(f"--seconds {options.seconds}: must be positive")
    if options.given_chunks < 1:
        raise ValueError(f"--given-chunks {options.given_chunks}: must be at least 1")
    if Path(options.out).suffix != ".mp4":
        raise ValueError(f"{options.out}: the output is an .mp4 file")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="rf_train.generate", description="Makes a video with a trained run.")
    parser.add_argument("run", help="a folder written by rf_train.train")
    parser.add_argument("out", help="the mp4 to write")
    parser.add_argument("--prompt", default="", help="what the video shows")
    parser.add_argument("--video", help="a video whose first frames are continued")
    parser.add_argument("--given-chunks", type=int, default=2, help="chunks taken from --video (default 2)")
    parser.add_argument("--seconds", type=float, default=15.0, help="length, the given frames included (default 15)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--step", type=int, default=0, help="the checkpoint's step (default: the newest)")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings, e.g. flow.guidance=3")
    options = parser.parse_intermixed_args(arguments)
    return run_command(lambda: print(generate(options)))


if __name__ == "__main__":
    sys.exit(main())
