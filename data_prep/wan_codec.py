"""The video VAEs of Wan 2.1 and Wan 2.2 (TI2V-5B) as codecs, by diffusers' AutoencoderKLWan."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_prep.files import sha256_of_files
from data_prep.geometry import LatentGeometry


class WanCodec:
    """A VAE of Wan from a local folder, or from its subfolder `vae`.

    Channels, strides, mean and std are those of the VAE's own config: 16 and 4 x 8 x 8 for Wan 2.1, 48 and 4 x 16 x 16
    for Wan 2.2, whose network works on patches of 2 x 2 pixels. Latents are the posterior's mode, normalised. Encoding
    and decoding run in pieces of 1, 4, 4, ... frames, which the network's causal cache connects. The result is exactly
    that of one call on the whole clip, but only one piece is on the device at a time. The dtype is bfloat16 on a GPU
    and float32 on a CPU, unless `dtype` is given.

    Raises a one-line ValueError when the folder holds no VAE of Wan, or its config contradicts itself.
    """

    name = "wan"

    def __init__(self, folder: str | Path, device: str = "cpu", dtype: torch.dtype | None = None):
        from diffusers import AutoencoderKLWan  # here, since it takes seconds to import

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
        self.folder: str | None = str(folder)
        self.device = torch.device(device)
        self.dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        options = {"torch_dtype": self.dtype, "use_safetensors": True, "local_files_only": True}
        try:
            vae = AutoencoderKLWan.from_pretrained(root, **options)
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"{folder}: the Wan VAE does not load ({str(error).splitlines()[0]})") from None
        self.vae = vae.eval().requires_grad_(False).to(self.device)
        found = vae.config
        self.mean, self.std = [float(v) for v in found.latents_mean], [float(v) for v in found.latents_std]
        self._patch = found.patch_size or 1  # pixels of a patch's side
        self.geometry = LatentGeometry(
            found.z_dim, (found.scale_factor_temporal, found.scale_factor_spatial, found.scale_factor_spatial)
        )
        side = self._patch * 2 ** (len(found.dim_mult) - 1)
        if self.geometry.strides != (2 ** sum(found.temperal_downsample), side, side):
            network = f"its network has {2 ** sum(found.temperal_downsample)} and {side}"
            raise ValueError(f"{config_file}: scale factors {self.geometry.strides[:2]}, but {network}")
        if not len(self.mean) == len(self.std) == found.z_dim:
            numbers = f"{len(self.mean)} latents_mean and {len(self.std)} latents_std"
            raise ValueError(f"{config_file}: {numbers} for {found.z_dim} channels (z_dim)")
        self.settings = {"latent": "posterior mode", "dtype": str(self.dtype).removeprefix("torch.")}
        self.hash = sha256_of_files(weights, {key: config[key] for key in config if key != "_diffusers_version"})

    def _cache(self, network: torch.nn.Module) -> list:
        from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

        return [None] * sum(isinstance(module, WanCausalConv3d) for module in network.modules())

    def encode(self, frames: np.ndarray) -> np.ndarray:
        """uint8 [T, H, W, 3] -> float32 [C, 1 + (T - 1) / s_t, H / s_h, W / s_w], normalised."""
        return self.encode_batch(frames[None])[0]

    @torch.no_grad()
    def encode_batch(self, clips: np.ndarray) -> np.ndarray:
        """See `Codec.encode_batch`. The bits may differ a little from those of `encode`: kernels depend on shapes."""
        from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

        shape, time = self.geometry.latent_shape_of(clips[0]), self.geometry.strides[0]
        mean, std = (torch.tensor(numbers).view(-1, 1, 1, 1) for numbers in (self.mean, self.std))
        cache, latents = self._cache(self.vae.encoder), []
        for k in range(shape[1]):
            part = np.ascontiguousarray(clips[:, max(0, time * (k - 1) + 1) : time * k + 1])
            pixels: Any = torch.from_numpy(part).to(self.device)
            pixels = (pixels.permute(0, 4, 1, 2, 3).float() / 127.5 - 1).to(self.dtype)
            pixels = patchify(pixels, self._patch)
            z = self.vae.quant_conv(self.vae.encoder(pixels, feat_cache=cache, feat_idx=[0]))
            latents.append((z[:, : shape[0]].float().cpu() - mean) / std)  # the other half is the log-variance
        return torch.cat(latents, dim=2).numpy()

    def decode(self, latent: np.ndarray | Tensor) -> np.ndarray:
        """float [C, T, H, W] -> uint8 [1 + s_t (T - 1), s_h H, s_w W, 3]."""
        return self.decoder()(latent)

    def decoder(self) -> Callable[[np.ndarray | Tensor], np.ndarray]:
        """See `Codec.decoder`. Between calls it keeps the network's causal cache, two frames of each convolution."""
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        cache = self._cache(self.vae.decoder)
        mean, std = (torch.tensor(numbers).view(-1, 1, 1, 1) for numbers in (self.mean, self.std))

        @torch.no_grad()
        def decode(latent: np.ndarray | Tensor) -> np.ndarray:
            latent = torch.as_tensor(latent).detach().cpu().float()
            self.geometry.check_latent(tuple(latent.shape))
            frames = []
            for raw in (latent * std + mean).split(1, dim=1):
                z = self.vae.post_quant_conv(raw[None].to(self.device, self.dtype))
                x = self.vae.decoder(z, feat_cache=cache, feat_idx=[0], first_chunk=cache[0] is None)
                x = unpatchify(x, self._patch)[0].float()
                x = x.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
                frames.append(x.permute(1, 2, 3, 0).cpu())
            return torch.cat(frames).numpy()

        return decode

    @torch.no_grad()
    def decoder_bytes(self, height: int, width: int) -> int:
        """See `Codec.decoder_bytes`: twice the causal cache, which is measured on two tiny latent frames."""
        cache, side = self._cache(self.vae.decoder), 2
        for first in (True, False):
            z = torch.zeros(1, self.geometry.channels, 1, side, side, device=self.device, dtype=self.dtype)
            self.vae.decoder(self.vae.post_quant_conv(z), feat_cache=cache, feat_idx=[0], first_chunk=first)
        kept = sum(part.numel() * part.element_size() for part in cache if isinstance(part, Tensor))
        return 2 * kept * height * width // side**2
