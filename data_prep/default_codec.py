"""The built-in codec (`default`): fitted in seconds on the user's own videos. Nothing is downloaded.

A block is 4 frames of 8 x 8 RGB pixels; a latent pixel stands for one block.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from data_prep.files import write_atomic
from data_prep.geometry import WAN_2_1

CHANNELS = WAN_2_1.channels
TIME, ROWS, COLUMNS = WAN_2_1.strides
BLOCK = TIME * ROWS * COLUMNS * 3  # the numbers in a block
CODEC_FILE = "codec.safetensors"

# A channel with standard deviation s is divided by s ** TEMPER (times one constant that makes the mean variance 1).
# With 1 every channel would have variance 1. That amplifies weak channels, which are mostly noise to a small model.
# Of 0.8, 0.5 and 0.25, a small model kept the shapes of the demo's world best with 0.25.
TEMPER = 0.25

# The fit. Its time, about 10 s on one core, does not depend on the amount of video.
COMPONENTS = 160  # the decoder's outputs: principal components of a block
HIDDEN = 256
STEPS = 500
BATCH = 1024  # blocks per step
LEARNING_RATE = 5e-3
LATENT_NOISE = 0.05  # added in the fit: generated latents are never exact
FIT_PIXELS = 81 * 64 * 64  # pixels of each clip that the fit looks at
FIT_CLIPS = 64

Tensors = dict[str, Tensor]


class DefaultCodec:
    """The built-in codec.

    Encoder: the 16 leading principal components of a block. Frame 0 is repeated to fill a block. So a still picture has
    the same latent in every latent frame, and one decoder works for all of them.
    Decoder: the COMPONENTS leading principal components of a block. The first 16 come from the latent itself. A small
    MLP adds a correction to all of them; it sees the 3 x 3 latents around the block. Latent frames decode one by one.
    """

    name = "default"
    geometry = WAN_2_1
    folder: str | None = None
    device = torch.device("cpu")

    def __init__(self, tensors: Tensors, settings: dict):
        self._tensors = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
        self.settings = settings
        self.mean: list[float] = self._tensors["latent_mean"].tolist()
        self.std: list[float] = self._tensors["latent_std"].tolist()
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for name, tensor in sorted(self._tensors.items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
        self.hash = digest.hexdigest()

    @classmethod
    def fit(cls, clips: Iterable[np.ndarray], seed: int = 0) -> "DefaultCodec":
        """Fits a codec to clips, uint8 [T, H, W, 3], T = 1 + 4k, sides multiples of 8.

        Looks at a random part of FIT_PIXELS pixels of each of the first FIT_CLIPS clips. Runs on one thread, so that
        the same videos give the same codec, and the same hash, with any number of cores.
        """
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return cls._fit(clips, seed)
        finally:
            torch.set_num_threads(threads)

    @classmethod
    def _fit(cls, clips: Iterable[np.ndarray], seed: int) -> "DefaultCodec":
        rng = np.random.default_rng(seed)
        blocks = [_to_blocks(np.concatenate([part[:1]] * (TIME - 1) + [part])) for part in _random_parts(clips, rng)]
        if not blocks:
            raise ValueError("no clips to fit the codec on")
        x = torch.cat([part.reshape(-1, BLOCK) for part in blocks])
        x = x[torch.from_numpy(rng.permutation(len(x))[:100_000])]
        block_mean = x.mean(0)
        x -= block_mean
        variance, basis = torch.linalg.eigh((x.T @ x / len(x)).double())
        basis = basis.flip(1)[:, :COMPONENTS]
        basis = basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()  # fixes the signs
        basis = basis.float()

        # A floor for videos that have fewer than 16 components, e.g. a single flat colour.
        deviation = variance.flip(0)[:CHANNELS].clamp(min=1e-4).sqrt().float()
        scale = deviation**TEMPER
        scale *= ((deviation / scale) ** 2).mean().sqrt()
        encoder = {
            "block_mean": block_mean,
            "basis": basis,
            "latent_mean": block_mean @ basis[:, :CHANNELS],
            "latent_std": scale,
        }
        settings = {
            "version": 1,
            "seed": seed,
            "clips": len(blocks),
            "components": COMPONENTS,
            "hidden": HIDDEN,
            "steps": STEPS,
            "temper": TEMPER,
        }
        return cls({**encoder, **_fit_decoder(blocks, block_mean, basis, scale, seed)}, settings)

    @classmethod
    def load(cls, path: str | Path) -> "DefaultCodec":
        """Reads a codec.safetensors. Raises a one-line ValueError for anything else."""
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"{path}: no such file, expected a default codec")
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                settings = json.loads((file.metadata() or {})["settings"])
            written = settings.pop("hash", None)  # older files have none
            codec = cls(tensors, settings)
            if written not in (None, codec.hash):
                raise ValueError("damaged, its hash is not that of what it holds")
            return codec
        except (SafetensorError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}: not a default codec ({error})") from None

    def save(self, path: str | Path) -> None:
        """Writes the codec as safetensors, as a whole or not at all."""
        # One entry only: safetensors writes several in any order, and the same codec must give the same file.
        metadata = {"settings": json.dumps({**self.settings, "hash": self.hash}, sort_keys=True)}
        write_atomic(path, save(self._tensors, metadata=metadata))

    @torch.no_grad()
    def encode(self, frames: np.ndarray) -> np.ndarray:
        """uint8 [T, H, W, 3] -> float32 [16, 1 + (T - 1) / 4, H / 8, W / 8], normalised."""
        shape = self.geometry.latent_shape_of(frames)
        basis = self._tensors["basis"][:, :CHANNELS]
        latent = np.empty(shape, np.float32)
        for k in range(shape[1]):  # one latent frame at a time keeps memory flat
            part = frames[TIME * (k - 1) + 1 : TIME * k + 1] if k else np.repeat(frames[:1], TIME, axis=0)
            z = (_to_blocks(part)[0] @ basis - self._tensors["latent_mean"]) / self._tensors["latent_std"]
            latent[:, k] = z.permute(2, 0, 1).numpy()
        return latent

    def encode_batch(self, clips: np.ndarray) -> np.ndarray:
        """See `Codec.encode_batch`. One clip after another, so that the bits are those of `encode`."""
        return np.stack([self.encode(clip) for clip in clips])

    def decode(self, latent: np.ndarray | Tensor) -> np.ndarray:
        """float [16, T, H, W] -> uint8 [1 + 4 (T - 1), 8 H, 8 W, 3]."""
        return self.decoder()(latent)

    def decoder(self) -> Callable[[np.ndarray | Tensor], np.ndarray]:
        """See `Codec.decoder`. Between calls it only remembers whether the first latent frame is over."""
        weights, begun = self._tensors, False

        @torch.no_grad()
        def decode(latent: np.ndarray | Tensor) -> np.ndarray:
            nonlocal begun
            latent = torch.as_tensor(latent).detach().cpu().float()
            self.geometry.check_latent(tuple(latent.shape))
            frames = []
            for z in latent.permute(1, 2, 3, 0).split(1):
                coefficients = _decode_blocks(_with_neighbours(z), weights, weights["latent_std"])
                part = _to_frames(coefficients @ weights["basis"].T + weights["block_mean"])
                frames.append(part if begun else part[-1:])
                begun = True
            return torch.cat(frames).numpy()

        return decode

    def decoder_bytes(self, height: int, width: int) -> int:
        """See `Codec.decoder_bytes`: the numbers of a latent frame's blocks, in fp32 and twice."""
        return height * width * 4 * (9 * CHANNELS + 2 * HIDDEN + COMPONENTS + 2 * BLOCK)


def _to_blocks(frames: np.ndarray) -> Tensor:
    """uint8 [4 k, H, W, 3] -> float32 [k, H / 8, W / 8, BLOCK] in -1 .. 1."""
    t, h, w, _ = frames.shape
    x = torch.from_numpy(np.ascontiguousarray(frames))
    x = x.view(t // TIME, TIME, h // ROWS, ROWS, w // COLUMNS, COLUMNS, 3).permute(0, 2, 4, 1, 3, 5, 6)
    return x.reshape(t // TIME, h // ROWS, w // COLUMNS, BLOCK).float().div_(127.5).sub_(1)


def _to_frames(blocks: Tensor) -> Tensor:
    """The inverse of `_to_blocks`, clipped and rounded: [k, h, w, BLOCK] -> uint8 [4 k, 8 h, 8 w, 3]."""
    k, h, w, _ = blocks.shape
    x = blocks.add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
    x = x.view(k, h, w, TIME, ROWS, COLUMNS, 3).permute(0, 3, 1, 4, 2, 5, 6)
    return x.reshape(TIME * k, ROWS * h, COLUMNS * w, 3)


def _with_neighbours(z: Tensor) -> Tensor:
    """[k, h, w, C] -> [k, h, w, 9 C]: each block with the 3 x 3 blocks around it, its own first. Borders repeat."""
    h, w = z.shape[1:3]
    rows, columns = torch.arange(-1, h + 1).clamp(0, h - 1), torch.arange(-1, w + 1).clamp(0, w - 1)
    padded = z[:, rows][:, :, columns]
    offsets = [(1, 1)] + [(i, j) for i in range(3) for j in range(3) if (i, j) != (1, 1)]
    return torch.cat([padded[:, i : i + h, j : j + w] for i, j in offsets], dim=-1)


def _random_parts(clips: Iterable[np.ndarray], rng: np.random.Generator) -> Iterator[np.ndarray]:
    """A random part, at most FIT_PIXELS pixels, of each of the first FIT_CLIPS clips: uint8 [1 + 4k, h, w, 3]."""
    for _, clip in zip(range(FIT_CLIPS), clips):
        WAN_2_1.latent_shape_of(clip)
        frames, height, width = clip.shape[:3]
        h, w = min(height, 96), min(width, 96)
        t = min(frames, max(1, (FIT_PIXELS // (h * w) - 1) // TIME * TIME + 1))
        start, top, left = (int(rng.integers(room + 1)) for room in (frames - t, height - h, width - w))
        yield clip[start : start + t, top : top + h, left : left + w]


def _decode_blocks(neighbours: Tensor, weights: Tensors, scale: Tensor) -> Tensor:
    """Normalised latents [..., 9 * 16] around a block -> its principal components [..., COMPONENTS]."""
    hidden = F.silu(neighbours @ weights["w1"] + weights["b1"])
    hidden = F.silu(hidden @ weights["w2"] + weights["b2"])
    own = neighbours[..., :CHANNELS] * scale
    return hidden @ weights["w3"] + weights["b3"] + F.pad(own, (0, weights["b3"].shape[0] - CHANNELS))


def _fit_decoder(clips: list[Tensor], block_mean: Tensor, basis: Tensor, scale: Tensor, seed: int) -> Tensors:
    """The decoder's weights, from STEPS steps of AdamW on the blocks [k, h, w, BLOCK] of `clips`."""
    coefficients = [(clip - block_mean) @ basis for clip in clips]
    inputs = torch.cat([_with_neighbours(c[..., :CHANNELS] / scale).flatten(0, 2) for c in coefficients])
    targets = torch.cat([c.flatten(0, 2) for c in coefficients])
    # Three quarters of the training blocks come from those that are not flat, if there are any.
    busy = torch.nonzero(torch.cat([clip.reshape(-1, BLOCK).std(1) for clip in clips]) > 0.05)[:, 0]
    busy = busy if len(busy) else torch.arange(len(inputs))

    generator = torch.Generator().manual_seed(seed)
    sizes = [inputs.shape[1], HIDDEN, HIDDEN, targets.shape[1]]
    weights: Tensors = {}
    for layer, (fan_in, fan_out) in enumerate(pairwise(sizes), start=1):
        spread = fan_in**-0.5 if layer < 3 else 0.1 * fan_in**-0.5
        weights[f"w{layer}"] = (torch.randn(fan_in, fan_out, generator=generator) * spread).requires_grad_()
        weights[f"b{layer}"] = torch.zeros(fan_out, requires_grad=True)
    optimizer = torch.optim.AdamW(weights.values(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.1)
    for _ in range(STEPS):
        from_busy = busy[torch.randint(len(busy), (BATCH * 3 // 4,), generator=generator)]
        from_all = torch.randint(len(inputs), (BATCH // 4,), generator=generator)
        chosen = torch.cat([from_busy, from_all])
        x = inputs[chosen]
        x = x + LATENT_NOISE * torch.randn(x.shape, generator=generator)
        loss = (_decode_blocks(x, weights, scale) - targets[chosen]).square().sum(1).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return {name: weight.detach() for name, weight in weights.items()}
