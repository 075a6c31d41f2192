"""Makes a video chunk by chunk with diffusers' own parts: an exported model's sample.py.

    python sample.py --prompt "a boat on a lake" --seconds 15 --out boat.mp4 [--wan WAN_FOLDER]

The transformer is diffusers' WanTransformer3DModel, as it is. One thing is added: an attention processor that keeps the
keys and values of earlier chunks, `CausalAttention`. A chunk is denoised from noise; then one pass at t = 0 writes its
keys and values. WAN_FOLDER is a published Wan checkpoint in diffusers' format: its VAE, text encoder and tokenizer are
used. A model with the built-in codec needs the package rf_train in its place.

It is made to be read. On many GPUs, over hours, or with prompts that change, use rf_train.generate.
Sizes: B batch, C channels, f latent frames of a chunk, P tokens of a latent frame, N heads, D width of a head.
"""

import argparse
import html
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

HERE = Path(__file__).parent


class CausalPass:
    """What all blocks share: which chunk is processed, where it begins, and what may be read.

    `settings`: "window", the last chunks that a chunk reads; "sink", the first ones, which it reads, too; "top_k": if
    not 0, routing: among the last "reach" chunks outside of window and sink, those that fit each query best.
    "farthest_sink": from the chunk after this one on, sinks move along; None: they stay where they are.
    """

    def __init__(self, transformer: Any, settings: dict):
        self.rope, self.settings = transformer.rope, settings
        self.starts = [0]  # the first latent frame of each chunk, and of the next one
        self.shape: torch.Size | None = None  # of the chunk [B, C, f, H, W]
        self.index, self.writes = 0, False
        for block in transformer.blocks:
            block.attn1.set_processor(CausalAttention(self))

    def begin(self, x: Tensor, index: int, writes: bool) -> None:
        """The next pass is chunk `index`, x [B, C, f, H, W]; `writes`: its keys and values are kept."""
        self.shape, self.index, self.writes = x.shape, index, writes
        self.starts[index + 1 :] = [self.starts[index] + x.shape[2]]

    def visible(self) -> list[int]:
        """The earlier chunks that this one can read."""
        reach = self.settings["reach"] - self.writes  # of the chunks that are kept then, it is one itself
        last = max(self.settings["window"], reach)
        return [n for n in range(self.index) if n >= self.index - last or n < self.settings["sink"]]

    def always(self, chunk: int) -> bool:
        """Whether every query reads an earlier chunk, without a choice."""
        return chunk >= self.index - self.settings["window"] or chunk < self.settings["sink"]

    def rotary(self, start: int, frames: int) -> tuple[Tensor, Tensor]:
        """diffusers' rotary tables of latent frames from `start` on: cosine and sine, [1, f P, 1, D]."""
        assert self.shape is not None
        cos, sin = self.rope(torch.empty(1, 1, start + frames, *self.shape[3:], device="meta"))
        begin = cos.shape[1] // (start + frames) * start
        return cos[:, begin:], sin[:, begin:]

    def sink_shift(self) -> int:
        """Latent frames by which sinks have moved along. A pass that writes looks from the next chunk."""
        farthest, seen_from = self.settings["farthest_sink"], self.index + self.writes
        return self.starts[seen_from] - self.starts[farthest] if farthest and seen_from > farthest else 0


class CausalAttention:
    """Self-attention of one block: the chunk reads itself, and the kept chunks that it may read."""

    _attention_backend = _parallel_config = None  # diffusers asks for these

    def __init__(self, causal: CausalPass):
        self.causal = causal
        self.kept: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # chunk: keys before rotation, rotated keys, values

    def __call__(self, attn: Any, hidden_states: Tensor, *ignored: Any, **also: Any) -> Tensor:
        """hidden_states [B, f P, N D] -> the same shape."""
        causal = self.causal
        assert causal.shape is not None
        raw_q, raw_k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        raw_q, raw_k, v = (x.unflatten(2, (attn.heads, -1)) for x in (attn.norm_q(raw_q), attn.norm_k(raw_k), v))
        tables = causal.rotary(causal.starts[causal.index], causal.shape[2])
        q, k = rotate(raw_q, tables), rotate(raw_k, tables)
        chunks = causal.visible()
        keys = [*(self.key(chunk) for chunk in chunks), k]
        values = [*(self.kept[chunk][2] for chunk in chunks), v]
        mask = self.routing_mask(q, chunks, keys)
        q, joined_k, joined_v = (x.transpose(1, 2) for x in (q, torch.cat(keys, 1), torch.cat(values, 1)))
        if mask is None:
            out = F.scaled_dot_product_attention(q, joined_k, joined_v)
        else:  # head by head, since masks are large
            parts = [part.split(1, 1) for part in (q, joined_k, joined_v, mask)]
            out = torch.cat([F.scaled_dot_product_attention(a, b, c, attn_mask=m) for a, b, c, m in zip(*parts)], 1)
        if causal.writes:
            self.kept = {chunk: self.kept[chunk] for chunk in chunks} | {causal.index: (raw_k, k, v)}
        return attn.to_out[0](out.transpose(1, 2).flatten(2))

    def key(self, chunk: int) -> Tensor:
        """The rotated keys of a kept chunk. Those of sinks that have moved are rotated anew."""
        raw, rotated, _ = self.kept[chunk]
        starts, shift = self.causal.starts, self.causal.sink_shift()
        if chunk >= self.causal.settings["sink"] or not shift:
            return rotated
        return rotate(raw, self.causal.rotary(starts[chunk] + shift, starts[chunk + 1] - starts[chunk]))

    def routing_mask(self, q: Tensor, chunks: list[int], keys: list[Tensor]) -> Tensor | None:
        """[B, N, queries, keys], True where a query reads a key; None where it reads all."""
        free = [n for n, chunk in enumerate(chunks) if not self.causal.always(chunk)]
        top_k = self.causal.settings["top_k"]
        if not top_k or len(free) <= top_k:
            return None
        means = torch.stack([keys[n].float().mean(1) for n in free], dim=2)  # [B, N, chunks, D]
        chosen = (q.float().transpose(1, 2) @ means.transpose(2, 3)).topk(top_k, dim=3).indices
        reads = torch.ones(*chosen.shape[:3], len(keys), dtype=torch.bool, device=q.device)
        reads[..., free] = torch.zeros_like(reads[..., free]).scatter(3, chosen, True)
        return reads.repeat_interleave(torch.tensor([key.shape[1] for key in keys], device=q.device), dim=3)


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions, as diffusers applies them: x [B, L, N, D], tables [1, L, 1, D]."""
    cos, sin = tables[0][..., 0::2], tables[1][..., 1::2]
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).type_as(x)


@torch.no_grad()
def sample(
    transformer: Any, scheduler: Any, text: Tensor, empty: Tensor, noise: Iterable[Tensor], settings: dict
) -> Iterator[Tensor]:
    """Yields the chunks of B videos, each [B, C, f, H, W] in fp32, from the `noise` of each chunk.

    text, empty [B, text_len, text_dim]: the captions and the empty caption, zero-padded. `settings`: causal.json.
    """
    causal, guidance = CausalPass(transformer, settings["attention"]), settings["guidance"]
    dtype, both = transformer.patch_embedding.weight.dtype, guidance != 1
    condition = (torch.cat([text, empty]) if both else text).to(dtype)

    def velocity(x: Tensor, t: float | Tensor) -> Tensor:
        latents = torch.cat([x, x]) if both else x
        time = torch.full((len(latents),), float(t), device=x.device)
        found = transformer(latents.to(dtype), time, condition, return_dict=False)[0].float()
        if not both:
            return found
        with_text, without = found.chunk(2)
        return without + guidance * (with_text - without)

    for index, start in enumerate(noise):
        x = start
        # The noise levels of rf_train: evenly spaced from 1, shifted by the scheduler, then 0.
        scheduler.set_timesteps(sigmas=np.linspace(1, 0, settings["steps"] + 1)[:-1].tolist(), device=x.device)
        causal.begin(x, index, writes=False)
        for t in scheduler.timesteps:
            x = scheduler.step(velocity(x, t), t, x, return_dict=False)[0]
        yield x
        causal.begin(x, index, writes=True)
        velocity(x, 0)


def chunk_noise(settings: dict, frames: int, seed: int, device: str) -> Iterator[Tensor]:
    """Noise [1, C, f, H, W] of each chunk of a video of `frames` latent frames."""
    generator = torch.Generator().manual_seed(seed)
    begin = 0
    while begin < frames:
        size = min(settings["chunk"] if begin else settings["first_chunk"], frames - begin)
        shape = (1, settings["channels"], size, settings["height"], settings["width"])
        yield torch.randn(shape, generator=generator).to(device)
        begin += size


def built_in(settings: dict) -> tuple[Callable[[str], Tensor], Callable[[Tensor], np.ndarray]]:
    """(text encoder, decoder) of the package rf_train, whose codec is in codec/."""
    from data_prep.default_codec import DefaultCodec
    from data_prep.text import HashText

    codec, text = DefaultCodec.load(HERE / "codec" / "codec.safetensors"), HashText()
    return lambda prompt: torch.from_numpy(text.encode([prompt])[0]), lambda latent: codec.decode(latent[0])


def wan(folder: str, device: str) -> tuple[Callable[[str], Tensor], Callable[[Tensor], np.ndarray]]:
    """(text encoder, decoder) of a published Wan checkpoint."""
    from diffusers import AutoencoderKLWan
    from transformers import AutoTokenizer, UMT5EncoderModel

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    vae = AutoencoderKLWan.from_pretrained(folder, subfolder="vae", torch_dtype=dtype).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, subfolder="tokenizer")
    umt5 = UMT5EncoderModel.from_pretrained(folder, subfolder="text_encoder", dtype=dtype).to(device).eval()
    mean, std = (torch.tensor(x).view(-1, 1, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std))

    @torch.no_grad()
    def encode(prompt: str) -> Tensor:
        words = " ".join(html.unescape(html.unescape(prompt)).split())
        tokens = tokenizer(words, return_tensors="pt", max_length=512, truncation=True).to(device)
        return umt5(tokens.input_ids, tokens.attention_mask).last_hidden_state[0].float().cpu()

    @torch.no_grad()
    def decode(latent: Tensor) -> np.ndarray:
        pixels = vae.decode((latent.float().cpu() * std + mean).to(device, dtype), return_dict=False)[0][0]
        return pixels.float().add(1).mul(127.5).round().clamp(0, 255).byte().permute(1, 2, 3, 0).cpu().numpy()

    return encode, decode


def write_mp4(path: str, frames: np.ndarray, fps: float) -> None:
    """Writes frames, uint8 [T, H, W, 3], with PyAV."""
    import av

    with av.open(path, "w") as container:
        stream: Any = container.add_stream("libx264", rate=round(fps))
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def main(arguments: list[str] | None = None) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

    settings = json.loads((HERE / "causal.json").read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description="Makes a video chunk by chunk.")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="video.mp4")
    parser.add_argument("--wan", help="a published Wan checkpoint in diffusers' format")
    options = parser.parse_args(arguments)
    if settings["codec"] == "wan" and not options.wan:
        parser.error("give --wan FOLDER: this model was trained with Wan's VAE and text encoder")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encode, decode = wan(options.wan, device) if settings["codec"] == "wan" else built_in(settings)

    def padded(prompt: str) -> Tensor:
        vectors = encode(prompt)
        return F.pad(vectors, (0, 0, 0, settings["text_len"] - len(vectors)))[None].to(device)

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    transformer = WanTransformer3DModel.from_pretrained(HERE, torch_dtype=dtype).to(device).eval()
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(HERE / "scheduler")
    frames = 1 + -(-(round(options.seconds * settings["fps"]) - 1) // settings["frames_per_latent"])
    noise = chunk_noise(settings, frames, options.seed, device)
    chunks = list(sample(transformer, scheduler, padded(options.prompt), padded(""), noise, settings))
    write_mp4(options.out, decode(torch.cat(chunks, dim=2)), settings["fps"])


if __name__ == "__main__":
    main()
