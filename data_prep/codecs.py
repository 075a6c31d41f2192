"""Pixels to latents and back. Two codecs, one interface:

    encode(frames)    uint8 [T, H, W, 3], T = 1 + 4k, H and W multiples of 8
                      -> float32 [16, 1 + k, H / 8, W / 8], normalised with mean and std
    decode(latent)    the way back, uint8 [1 + 4k, H, W, 3]
    name, hash, channels, strides, settings, mean, std, folder      what the dataset card records

Both have Wan's geometry: frame 0 alone makes latent frame 0, every further 4 frames make one more, and time is
causal in both directions, so a longer video starts with the same latents and decodes to the same first frames.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from data_prep.shards import file_hash, read_card, write_atomic

CHANNELS = 16
STRIDES = (4, 8, 8)         # frames, rows and columns that one latent value stands for
BLOCK = 4 * 8 * 8 * 3       # the numbers in a block of 4 frames of 8x8 RGB pixels
CODEC_FILE = "codec.safetensors"

# A channel with standard deviation s is divided by s ** TEMPER (times one constant that makes the mean variance 1).
# 1 would give every channel variance 1 and so blow up the faint ones, which are little but noise to a small model; of 0.8, 0.5 and
# 0.25, the last let a small model keep the shapes of the drawn world best.
TEMPER = 0.25

# The default codec's fit. Its time, about 10 s on one core, does not depend on the amount of video.
COMPONENTS = 160            # the decoder's outputs: principal components of a block
HIDDEN = 256
STEPS = 500
BATCH = 1024                # blocks a step
LEARNING_RATE = 5e-3
LATENT_NOISE = 0.05         # added in the fit: generated latents are never exact
FIT_PIXELS = 81 * 64 * 64   # pixels of each clip that the fit looks at
FIT_CLIPS = 64


def valid_frames(frames):
    """Raise ValueError, naming the nearest valid numbers, unless frames = 1 + 4k."""
    if frames < 1 or (frames - 1) % STRIDES[0]:
        below = max(1, frames - (frames - 1) % STRIDES[0])
        raise ValueError(f"{frames} frames: a clip must have 1 + 4k, such as {below} or {below + STRIDES[0]}")


def latent_shape(frames, height, width):
    """[C, T, H, W] of the latent of a clip. Raises ValueError where the numbers do not divide."""
    valid_frames(frames)
    if height < 8 or width < 8 or height % 8 or width % 8:
        raise ValueError(f"size {height}x{width}: height and width must be multiples of 8")
    return CHANNELS, 1 + (frames - 1) // STRIDES[0], height // STRIDES[1], width // STRIDES[2]


def _check_frames(frames):
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"frames must be uint8 [T, H, W, 3], not {frames.dtype} {frames.shape}")
    return latent_shape(*frames.shape[:3])


def _check_latent(latent):
    if latent.ndim != 4 or latent.shape[0] != CHANNELS or 0 in latent.shape:
        raise ValueError(f"latent must be [{CHANNELS}, T, H, W], not {tuple(latent.shape)}")


def _blocks(frames):
    """uint8 [4 k, H, W, 3] -> float32 [k, H / 8, W / 8, BLOCK] in -1 .. 1."""
    t, h, w, _ = frames.shape
    x = torch.from_numpy(np.ascontiguousarray(frames))
    x = x.view(t // 4, 4, h // 8, 8, w // 8, 8, 3).permute(0, 2, 4, 1, 3, 5, 6)
    return x.reshape(t // 4, h // 8, w // 8, BLOCK).float().div_(127.5).sub_(1)


def _frames(blocks):
    """The inverse of `_blocks`, clipped and rounded: [k, h, w, BLOCK] -> uint8 [4 k, 8 h, 8 w, 3]."""
    k, h, w, _ = blocks.shape
    x = blocks.add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
    return x.view(k, h, w, 4, 8, 8, 3).permute(0, 3, 1, 4, 2, 5, 6).reshape(4 * k, 8 * h, 8 * w, 3)


def _neighbours(z):
    """[k, h, w, C] -> [k, h, w, 9 C]: each block with the 3x3 around it, itself first. Borders repeat."""
    k, h, w, c = z.shape
    rows, columns = torch.arange(-1, h + 1).clamp(0, h - 1), torch.arange(-1, w + 1).clamp(0, w - 1)
    padded = z[:, rows][:, :, columns]
    places = [(1, 1)] + [(i, j) for i in range(3) for j in range(3) if (i, j) != (1, 1)]
    return torch.cat([padded[:, i:i + h, j:j + w] for i, j in places], dim=-1)


class DefaultCodec:
    """The embedded codec: downloads nothing, is fitted in seconds on the user's own videos and saved with the dataset.

    Encoder: the 16 leading principal components of blocks of 4 frames of 8x8 pixels. Frame 0 is encoded as if it had
    stood for 4 frames, so a still picture has the same latent in every frame and one decoder serves all.
    Decoder: the blocks' COMPONENTS leading principal components, the first 16 read off the latent itself, to all of
    which a small MLP adds what the 3x3 blocks around say about this one. Latent frames decode one by one.
    """

    name = "default"
    channels = CHANNELS
    strides = STRIDES
    folder = None

    def __init__(self, tensors, settings):
        self._tensors = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
        self.settings = settings
        self.mean = self._tensors["latent_mean"].tolist()
        self.std = self._tensors["latent_std"].tolist()
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for name, tensor in sorted(self._tensors.items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
        self.hash = digest.hexdigest()

    @classmethod
    def fit(cls, videos, seed=0):
        """Fit a codec to an iterable of uint8 clips [T, H, W, 3], T = 1 + 4k, sides multiples of 8.

        Looks at a random part of FIT_PIXELS pixels of each of the first FIT_CLIPS clips. Runs on one thread, so that
        the same videos give the same codec, and the same hash, whatever the number of cores.
        """
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return cls._fit(videos, seed)
        finally:
            torch.set_num_threads(threads)

    @classmethod
    def _fit(cls, videos, seed):
        rng = np.random.default_rng(seed)
        clips = [_blocks(np.concatenate([part[:1]] * 3 + [part])) for part in _parts(videos, rng)]
        if not clips:
            raise ValueError("no clips to fit the codec on")
        x = torch.cat([clip.reshape(-1, BLOCK) for clip in clips])
        x = x[torch.from_numpy(rng.permutation(len(x))[:100_000])]
        block_mean = x.mean(0)
        x -= block_mean
        variance, basis = torch.linalg.eigh((x.T @ x / len(x)).double())
        basis = basis.flip(1)[:, :COMPONENTS]
        basis = basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()      # eigenvectors have no sign
        basis = basis.float()

        # A floor for videos that have fewer than 16 components, e.g. a single flat colour.
        deviation = variance.flip(0)[:CHANNELS].clamp(min=1e-4).sqrt().float()
        scale = deviation ** TEMPER
        scale *= ((deviation / scale) ** 2).mean().sqrt()
        tensors = {"block_mean": block_mean, "basis": basis,
                   "latent_mean": block_mean @ basis[:, :CHANNELS], "latent_std": scale}
        tensors.update(_fit_decoder(clips, block_mean, basis, scale, seed))
        return cls(tensors, {"version": 1, "seed": seed, "clips": len(clips), "components": COMPONENTS,
                             "hidden": HIDDEN, "steps": STEPS, "temper": TEMPER})

    @classmethod
    def load(cls, path):
        """Read a codec.safetensors. Raises ValueError in one line for anything else."""
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"{path}: no such file, expected a default codec")
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                settings = json.loads((file.metadata() or {})["settings"])
            return cls(tensors, settings)
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path}: not a default codec ({error})") from None

    def save(self, path):
        """Write the codec as safetensors, atomically."""
        write_atomic(path, save(self._tensors, metadata={"settings": json.dumps(self.settings, sort_keys=True)}))

    @torch.no_grad()
    def encode(self, frames):
        """uint8 [T, H, W, 3] -> float32 [16, 1 + (T - 1) / 4, H / 8, W / 8], normalised."""
        shape = _check_frames(frames)
        basis = self._tensors["basis"][:, :CHANNELS]
        latent = np.empty(shape, np.float32)
        for k in range(shape[1]):       # one latent frame at a time keeps memory flat
            piece = frames[4 * k - 3:4 * k + 1] if k else np.repeat(frames[:1], 4, axis=0)
            z = (_blocks(piece)[0] @ basis - self._tensors["latent_mean"]) / self._tensors["latent_std"]
            latent[:, k] = z.permute(2, 0, 1).numpy()
        return latent

    @torch.no_grad()
    def decode(self, latent):
        """float [16, T, H, W] -> uint8 [1 + 4 (T - 1), 8 H, 8 W, 3]."""
        latent = torch.as_tensor(latent).detach().cpu().float()
        _check_latent(latent)
        z = latent.permute(1, 2, 3, 0)
        weights = self._tensors
        frames = []
        for k in range(latent.shape[1]):
            coefficients = _decoder(_neighbours(z[k:k + 1]), weights, weights["latent_std"])
            frames.append(_frames(coefficients @ weights["basis"].T + weights["block_mean"]))
        frames[0] = frames[0][-1:]
        return torch.cat(frames).numpy()


def _parts(videos, rng):
    """A random part, at most FIT_PIXELS pixels, of each of the first FIT_CLIPS clips: uint8 [1 + 4k, h, w, 3]."""
    for _, clip in zip(range(FIT_CLIPS), videos):
        _check_frames(clip)
        frames, height, width = clip.shape[:3]
        h, w = min(height, 96), min(width, 96)
        t = min(frames, max(1, (FIT_PIXELS // (h * w) - 1) // 4 * 4 + 1))
        start, top, left = (int(rng.integers(room + 1)) for room in (frames - t, height - h, width - w))
        yield clip[start:start + t, top:top + h, left:left + w]


def _decoder(neighbours, weights, scale):
    """Normalised latents [..., 9 * 16] around a block -> its principal components [..., COMPONENTS]."""
    hidden = F.silu(neighbours @ weights["w1"] + weights["b1"])
    hidden = F.silu(hidden @ weights["w2"] + weights["b2"])
    own = neighbours[..., :CHANNELS] * scale
    return hidden @ weights["w3"] + weights["b3"] + F.pad(own, (0, weights["b3"].shape[0] - CHANNELS))


def _fit_decoder(clips, block_mean, basis, scale, seed):
    """The decoder's weights, from STEPS steps of AdamW on blocks [k, h, w, BLOCK] of `clips`."""
    inputs, targets = [], []
    for clip in clips:
        coefficients = (clip - block_mean) @ basis
        z = coefficients[..., :CHANNELS] / scale
        inputs.append(_neighbours(z).flatten(0, 2))
        targets.append(coefficients.flatten(0, 2))
    inputs, targets = torch.cat(inputs), torch.cat(targets)
    # Three of four training blocks have something in them, where there are such.
    busy = torch.nonzero(torch.cat([clip.reshape(-1, BLOCK).std(1) for clip in clips]) > 0.05)[:, 0]
    busy = busy if len(busy) else torch.arange(len(inputs))

    generator = torch.Generator().manual_seed(seed)
    sizes = [inputs.shape[1], HIDDEN, HIDDEN, targets.shape[1]]
    weights = {}
    for layer, (fan_in, fan_out) in enumerate(zip(sizes, sizes[1:]), start=1):
        spread = fan_in ** -0.5 if layer < 3 else 0.1 * fan_in ** -0.5
        weights[f"w{layer}"] = (torch.randn(fan_in, fan_out, generator=generator) * spread).requires_grad_()
        weights[f"b{layer}"] = torch.zeros(fan_out, requires_grad=True)
    optimizer = torch.optim.AdamW(weights.values(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.1)
    for _ in range(STEPS):
        chosen = torch.cat([busy[torch.randint(len(busy), (BATCH * 3 // 4,), generator=generator)],
                            torch.randint(len(inputs), (BATCH // 4,), generator=generator)])
        x = inputs[chosen]
        x = x + LATENT_NOISE * torch.randn(x.shape, generator=generator)
        loss = (_decoder(x, weights, scale) - targets[chosen]).square().sum(1).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return {name: weight.detach() for name, weight in weights.items()}


class WanCodec:
    """Wan 2.1's video VAE, diffusers' AutoencoderKLWan from a local folder (or its `vae` subfolder).

    Latents are the posterior's mode, normalised with the mean and std of the VAE's own config. Both ways run in
    temporal pieces, 1 + 4 + 4 ... frames with the network's causal cache in between, which is exactly the whole: only
    one piece at a time is on the device. bfloat16 on cuda, float32 on the CPU, unless `dtype` says otherwise.
    """

    name = "wan"
    channels = CHANNELS
    strides = STRIDES

    def __init__(self, folder, device="cpu", dtype=None):
        from diffusers import AutoencoderKLWan      # here, since it takes seconds to import
        folder = Path(folder).absolute()
        root = folder / "vae" if (folder / "vae" / "config.json").is_file() else folder
        config_file, weights = root / "config.json", list(root.glob("*.safetensors"))
        if not config_file.is_file() or not weights:
            raise ValueError(f"{folder}: no Wan VAE here, expected config.json and *.safetensors")
        try:
            config = json.loads(config_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{config_file}: not JSON ({error})") from None
        if config.get("_class_name") != "AutoencoderKLWan":
            raise ValueError(f"{config_file}: holds {config.get('_class_name')!r}, expected 'AutoencoderKLWan'")
        self.folder = str(folder)
        self.device = torch.device(device)
        self.dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        try:
            vae = AutoencoderKLWan.from_pretrained(root, torch_dtype=self.dtype, use_safetensors=True,
                                                   local_files_only=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"{folder}: the Wan VAE does not load ({str(error).splitlines()[0]})") from None
        self.vae = vae.eval().requires_grad_(False).to(self.device)
        self.mean, self.std = [float(v) for v in vae.config.latents_mean], [float(v) for v in vae.config.latents_std]
        strides = vae.config.scale_factor_temporal, vae.config.scale_factor_spatial, vae.config.scale_factor_spatial
        if vae.config.z_dim != CHANNELS or strides != STRIDES or vae.config.patch_size is not None:
            raise ValueError(f"{folder}: a VAE of {vae.config.z_dim} channels and strides {strides}, "
                             f"expected {CHANNELS} and {STRIDES} (Wan 2.1)")
        self.settings = {"latent": "posterior mode", "dtype": str(self.dtype).removeprefix("torch.")}
        self.hash = file_hash(weights, {key: value for key, value in config.items() if key != "_diffusers_version"})

    def _cache(self, network):
        from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
        return [None] * sum(isinstance(module, WanCausalConv3d) for module in network.modules())

    @torch.no_grad()
    def encode(self, frames):
        """uint8 [T, H, W, 3] -> float32 [16, 1 + (T - 1) / 4, H / 8, W / 8], normalised."""
        shape = _check_frames(frames)
        mean, std = torch.tensor(self.mean).view(-1, 1, 1, 1), torch.tensor(self.std).view(-1, 1, 1, 1)
        cache, latents = self._cache(self.vae.encoder), []
        for k in range(shape[1]):
            piece = torch.from_numpy(np.ascontiguousarray(frames[max(0, 4 * k - 3):4 * k + 1])).to(self.device)
            piece = (piece.permute(3, 0, 1, 2)[None].float() / 127.5 - 1).to(self.dtype)
            z = self.vae.quant_conv(self.vae.encoder(piece, feat_cache=cache, feat_idx=[0]))
            latents.append((z[0, :CHANNELS].float().cpu() - mean) / std)     # the other half is the log-variance
        return torch.cat(latents, dim=1).numpy()

    @torch.no_grad()
    def decode(self, latent):
        """float [16, T, H, W] -> uint8 [1 + 4 (T - 1), 8 H, 8 W, 3]."""
        latent = torch.as_tensor(latent).detach().cpu().float()
        _check_latent(latent)
        latent = latent * torch.tensor(self.std).view(-1, 1, 1, 1) + torch.tensor(self.mean).view(-1, 1, 1, 1)
        cache, frames = self._cache(self.vae.decoder), []
        for k in range(latent.shape[1]):
            z = self.vae.post_quant_conv(latent[None, :, k:k + 1].to(self.device, self.dtype))
            x = self.vae.decoder(z, feat_cache=cache, feat_idx=[0], first_chunk=k == 0)[0].float()
            x = x.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
            frames.append(x.permute(1, 2, 3, 0).cpu())
        return torch.cat(frames).numpy()


def open_codec(spec, device="cpu"):
    """The codec of "default:FOLDER" (a dataset, or its codec.safetensors) or "wan:FOLDER"."""
    name, _, folder = spec.partition(":")
    if name == "default" and folder:
        path = Path(folder)
        return DefaultCodec.load(path / CODEC_FILE if path.is_dir() else path)
    if name == "wan" and folder:
        return WanCodec(folder, device)
    raise ValueError(f"unknown codec {spec!r}, expected default, default:FOLDER or wan:FOLDER")


def dataset_codec(folder, device="cpu"):
    """The codec that made a dataset, from its card. Raises ValueError if what is there now is another one."""
    recorded = read_card(folder)["codec"]
    if recorded["name"] == "default":
        codec = DefaultCodec.load(Path(folder) / CODEC_FILE)
    elif recorded["name"] == "wan":
        codec = WanCodec(recorded["folder"], device)
    else:
        raise ValueError(f"{folder}: made by an unknown codec {recorded['name']!r}")
    if codec.hash != recorded["hash"]:
        raise ValueError(f"{codec.folder or Path(folder) / CODEC_FILE}: not the codec that made {folder} "
                         f"(hash {codec.hash[:12]}, the dataset says {recorded['hash'][:12]})")
    return codec
