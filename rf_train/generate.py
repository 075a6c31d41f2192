"""Makes videos with a trained run, of any length:  python -m rf_train.generate RUN OUT.mp4 --prompt TEXT --seconds 15

With --video FILE the first frames of a real video are kept and continued.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data_prep.codecs import dataset_codec
from data_prep.shards import read_card
from data_prep.text import dataset_text
from data_prep.video import read_frames, write_video
from rf_train import checkpoint, config
from rf_train.chunks import Attention
from rf_train.data import check_card
from rf_train.model import CausalWan, pad_text
from rf_train.resampling import stage_attention
from rf_train.sampling import sample_chunks


@dataclass
class Generator:
    """A trained model with what stands around it: the codec, and the training data's card."""

    recipe: config.Recipe
    model: CausalWan
    step: int
    card: dict
    cards: dict[str, dict]  # of every stage's dataset, by folder
    codec: object
    dataset: Path
    device: torch.device

    def embed(self, prompts: list[str]) -> list[Tensor]:
        """The prompts' embeddings, fp32 [L, text_dim], by the text encoder that made the dataset."""
        text = dataset_text(self.dataset, self.device.type)
        return [torch.from_numpy(np.asarray(vector, dtype=np.float32)) for vector in text.encode(prompts)]

    @property
    def attention(self) -> Attention:
        """A window as wide as the history seen in training, so that relative positions stay inside it at any length; the last stage's own if that is narrower."""
        stage, seen = self.recipe.stages[-1], self.trained_chunks - 1
        if stage.attention == "window" and stage.window + stage.sink <= seen:
            return stage_attention(stage)
        return Attention("window", window=seen) if seen else Attention()

    @property
    def trained_frames(self) -> int:
        """Latent frames of the longest clip trained on."""
        return max(stage.frames or self.cards[stage.data or self.recipe.data.train]["latent"]["frames"] for stage in self.recipe.stages)

    @property
    def trained_chunks(self) -> int:
        return len(self.model.chunking.sizes(self.trained_frames))

    def chunks(self, texts: list[Tensor], frames: int, seeds: list[int], given: Tensor | None = None):
        """Yields latent chunks [B, C, f, H, W] for B captions' embeddings; see `sample_chunks`."""
        text = pad_text(texts, self.recipe.model).to(self.device)
        empty = pad_text([torch.tensor(self.card["empty_caption"], dtype=torch.float32)] * len(texts), self.recipe.model).to(self.device)
        size = self.card["latent"]["height"], self.card["latent"]["width"]
        given = None if given is None else given.to(self.device)
        return sample_chunks(self.model, text, empty, frames, size, self.recipe.flow, self.attention, seeds, given)


def open_run(run: str | Path, overrides: list[str] = (), step: int = 0, weights: str = "ema") -> Generator:
    """Opens a run folder: its recipe with `overrides`, the weights of a checkpoint (0 = newest; "ema" the average, "master" the last) and the codec."""
    run = Path(run)
    if not (run / "recipe.yaml").is_file():
        raise ValueError(f"{run}: not a run, it has no recipe.yaml")
    recipe = config.load(run / "recipe.yaml", overrides)
    folder = checkpoint.at_step(run, step)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = CausalWan(recipe.model)
    kind = weights if recipe.optimizer.ema > 0 else "master"
    state = checkpoint.read_weights(folder, kind)
    wrong = checkpoint.difference({n: list(t.shape) for n, t in state.items()}, {n: list(p.shape) for n, p in model.named_parameters()})
    if wrong:
        raise ValueError(f"{folder}: the checkpoint does not fit the recipe's model: {wrong}")
    model.load_state_dict(state)
    model = model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32).eval()
    dataset = Path(recipe.data.train or recipe.stages[0].data)
    card = read_card(dataset)
    check_card(card, recipe.model, dataset)
    cards = {name: read_card(Path(name)) for name in {stage.data or recipe.data.train for stage in recipe.stages if not stage.frames}}
    return Generator(recipe, model, int(folder.name[5:]), card, cards, dataset_codec(dataset, device.type), dataset, device)


def latent_frames(seconds: float, fps: float) -> int:
    """Latent frames that hold at least `seconds` of video: 1 + 4 (n - 1) frames come from n latent ones."""
    frames = max(1, round(seconds * fps))
    return 1 + -(-(frames - 1) // 4)


def video_frames(latents: int) -> int:
    """Video frames that `latents` latent ones stand for: 1 for the first, 4 for each other."""
    return 1 + 4 * (latents - 1)


def first_frames(generator: Generator, video: str | Path, chunks: int) -> Tensor:
    """Latent [1, C, F, H, W] of the first `chunks` chunks of a video, or as many whole ones as it has. Raises ValueError when it has none."""
    size, fps = generator.card["video"], generator.card["video"]["fps"]
    wanted = generator.model.chunking.start(chunks)
    pixels = []
    for frame in read_frames(video, fps, (size["height"], size["width"])):
        pixels.append(frame)
        if len(pixels) == video_frames(wanted):
            break
    while chunks > 0 and video_frames(generator.model.chunking.start(chunks)) > len(pixels):
        chunks -= 1
    if chunks == 0:
        need = video_frames(generator.model.chunking.first)
        raise ValueError(f"{video}: {len(pixels)} frames at {fps} fps, the first chunk takes {need}")
    keep = video_frames(generator.model.chunking.start(chunks))
    return torch.from_numpy(generator.codec.encode(np.stack(pixels[:keep])))[None]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="rf_train.generate", description=__doc__.splitlines()[0])
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
    try:
        if not options.prompt and not options.video:
            raise ValueError("give --prompt TEXT, --video FILE or both")
        if options.seconds <= 0:
            raise ValueError(f"--seconds {options.seconds}: must be positive")
        if options.given_chunks < 1:
            raise ValueError(f"--given-chunks {options.given_chunks}: must be at least 1")
        if Path(options.out).suffix != ".mp4":
            raise ValueError(f"{options.out}: the output is an .mp4 file")
        generator = open_run(options.run, options.overrides, options.step)
        given = first_frames(generator, options.video, options.given_chunks) if options.video else None
        fps = generator.card["video"]["fps"]
        frames = latent_frames(options.seconds, fps)
        if given is not None and given.shape[2] >= frames:
            raise ValueError(f"--seconds {options.seconds} is not longer than the {given.shape[2]} latent frames taken from {options.video}")
        chunks = generator.chunks(generator.embed([options.prompt]), frames, [options.seed], given)
        total = len(generator.model.chunking.sizes(frames))
        latent = torch.cat(list(tqdm(chunks, total=total, unit="chunk", desc="generate")), dim=2)[0]
        pixels = generator.codec.decode(latent.cpu().numpy())[: max(1, round(options.seconds * fps))]
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        write_video(options.out, pixels, fps)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {len(pixels)} frames, {len(pixels) / fps:.2f} s (trained on clips of {video_frames(generator.trained_frames) / fps:.2f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
