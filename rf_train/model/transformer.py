"""The causal DiT: Wan2.1's transformer with two streams, history (t = 0) and noisy, in one pass.

Plain `nn.Module`s that know nothing of DeepSpeed. Parameter names are those of diffusers' `WanTransformer3DModel`.
Sizes: B batch, F latent frames, P tokens of a latent frame, L = F P tokens, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rf_train.model.attention import PassLayout, two_stream_attention
from rf_train.model.chunks import Attention, Chunk, Chunking, RoutedWithin, Window, WindowWithin
from rf_train.model.elementwise import (
    gated_sum,
    gated_sum_and_norm,
    modulated_norm,
    rms_norm,
    rms_norm_and_rotate,
    sum_and_modulated_norm,
)
from rf_train.model.kv_cache import KVCache, LayerKVCache
from rf_train.model.rope import rotary_table
from rf_train.model.settings import ModelSettings


class SequenceParallel(Protocol):
    """Splits a clip's tokens over ranks; `rf_train.engine.sequence_parallel` implements it."""

    size: int

    def split_tokens(self, x: Tensor, dim: int) -> Tensor: ...

    def all_gather_tokens(self, x: Tensor, dim: int) -> Tensor: ...

    def attend(self, attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, tokens: int) -> Tensor: ...


class VelocityModel(Protocol):
    """A model that predicts velocities: `CausalWan`, or a wrapper of it (an engine, a counter in a test)."""

    settings: ModelSettings
    chunking: Chunking

    def __call__(
        self,
        *,
        noisy: Tensor | None,
        t: Tensor | None,
        history: Tensor | None,
        text: Tensor,
        attention: Attention,
        noisy_chunk: int = 0,
        kv_cache: KVCache | None = None,
    ) -> Tensor: ...

    def new_kv_cache(self, batch: int, tokens_per_frame: int, frames: int, attention: Attention) -> KVCache: ...


@dataclass(frozen=True)
class PassContext:
    """What all blocks of a pass share besides their input. Tokens are those of this rank, except in `layout`."""

    layout: PassLayout  # all tokens of the clips: attention sees them all
    rotary: Tensor  # [L, head_dim / 2, 2]
    history_frames: int
    tokens_per_frame: int
    sequence_parallel: SequenceParallel | None

    @property
    def history_tokens(self) -> int:
        return self.history_frames * self.tokens_per_frame

    def of_last_block(self) -> "PassContext":
        return replace(self, layout=self.layout.of_last_block())


class Linear(nn.Linear):
    """A linear layer with Wan's initial weights: Xavier-uniform, or normal with `std` (0: all zero). The bias is 0.

    Weights are set where the layer is built, because `zero.Init` partitions them as soon as `__init__` is over. With
    `fp32` it computes in fp32, whatever its weights are.
    """

    def __init__(self, width_in: int, width_out: int, std: float | None = None, fp32: bool = False):
        self.std, self.fp32 = std, fp32
        super().__init__(width_in, width_out)

    def reset_parameters(self) -> None:
        if self.std is None:
            nn.init.xavier_uniform_(self.weight)
        else:
            nn.init.normal_(self.weight, std=self.std)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width_in] -> [..., width_out]."""
        weight, bias = (self.weight.float(), self.bias.float()) if self.fp32 else (self.weight, self.bias)
        # ZeRO-3's own linear function adds the bias in a second pass unless its input has two dimensions.
        return F.linear(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])


class Projections(nn.Module):
    """What self- and cross-attention share: the projections, and RMS norm on q and k over the full width."""

    def __init__(self, dim: int, heads: int, eps: float):
        super().__init__()
        self.heads, self.eps = heads, eps
        self.to_q, self.to_k, self.to_v = Linear(dim, dim), Linear(dim, dim), Linear(dim, dim)
        self.to_out = nn.ModuleList([Linear(dim, dim)])
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps), nn.RMSNorm(dim, eps)


class SelfAttention(Projections):
    """Self-attention of both streams, with rotary positions."""

    def forward(self, x: Tensor, context: PassContext, kv_cache: LayerKVCache | None, stash: dict | None) -> Tensor:
        """x [B, L, D], history tokens first. Returns [B, L, D]; in the last block, only the noisy tokens."""
        skipped = context.history_tokens if context.layout.noisy_queries_only else 0
        norm_q, norm_k, rotary = self.norm_q, self.norm_k, context.rotary
        q = rms_norm_and_rotate(self.to_q(x[:, skipped:]), norm_q.weight, rotary[skipped:], self.heads, self.eps)
        k = rms_norm_and_rotate(self.to_k(x), norm_k.weight, rotary, self.heads, self.eps)
        v = rearrange(self.to_v(x), "b l (h d) -> b l h d", h=self.heads)

        def attend(*qkv: Tensor) -> Tensor:
            q, k, v = (y.transpose(1, 2) for y in qkv)
            return two_stream_attention(q, k, v, context.layout, kv_cache, stash).transpose(1, 2)

        parallel = context.sequence_parallel
        out = attend(q, k, v) if parallel is None else parallel.attend(attend, q, k, v, context.tokens_per_frame)
        return self.to_out[0](rearrange(out, "b l h d -> b l (h d)"))


class CrossAttention(Projections):
    """Attention to the caption. Padded positions are attended to, as Wan was trained."""

    def forward(self, x: Tensor, text: Tensor, kv_cache: LayerKVCache | None) -> Tensor:
        """x [B, L, D], text [B, text_len, D]. Returns [B, L, D]. With a cache, keys and values are computed once."""
        q = rearrange(rms_norm(self.to_q(x), self.norm_q.weight, self.eps), "b l (h d) -> b h l d", h=self.heads)
        if kv_cache is not None and kv_cache.text is not None:
            k, v = kv_cache.text
        else:
            k = rearrange(rms_norm(self.to_k(text), self.norm_k.weight, self.eps), "b l (h d) -> b h l d", h=self.heads)
            v = rearrange(self.to_v(text), "b l (h d) -> b h l d", h=self.heads)
            if kv_cache is not None:
                kv_cache.text = (k, v)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](rearrange(out, "b h l d -> b l (h d)"))


class LinearGelu(nn.Module):
    """Linear, tanh-GELU."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.proj = Linear(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """Linear, tanh-GELU, linear; named as diffusers names them (`net.0.proj`, `net.2`)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.net = nn.ModuleList([LinearGelu(dim, hidden), nn.Identity(), Linear(hidden, dim)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class Block(nn.Module):
    """Self-attention of both streams, cross-attention to the caption, feed-forward; modulated by the noise level."""

    def __init__(self, settings: ModelSettings):
        super().__init__()
        dim, heads, self.eps = settings.dim, settings.heads, settings.eps
        self.attn1 = SelfAttention(dim, heads, self.eps)
        self.attn2 = CrossAttention(dim, heads, self.eps)
        self.norm2 = nn.LayerNorm(dim, self.eps)
        self.ffn = FeedForward(dim, settings.ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        text: Tensor,
        context: PassContext,
        kv_cache: LayerKVCache | None = None,
        stash: dict | None = None,
    ) -> Tensor:
        """x [B, F, P, D], history frames first; modulation [B, F, 6, D] in fp32; text [B, text_len, D].

        Returns x's shape; in the last block (`context.layout.noisy_queries_only`) only the noisy frames.
        """
        table = (self.scale_shift_table.float() + modulation).unsqueeze(3)
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = table.unbind(2)  # (B, F, 1, D) each
        y = modulated_norm(x, shift, scale, self.eps)
        y = self.attn1(y.flatten(1, 2), context, kv_cache, stash)
        if context.layout.noisy_queries_only:
            skipped = context.history_frames
            x, gate, ffn_shift, ffn_scale, ffn_gate = (
                part[:, skipped:] for part in (x, gate, ffn_shift, ffn_scale, ffn_gate)
            )
        frames = x.shape[1:3]
        x, y = gated_sum_and_norm(x, y.unflatten(1, frames), gate, self.norm2.weight, self.norm2.bias, self.eps)
        y = self.attn2(y.flatten(1, 2), text, kv_cache)
        x, y = sum_and_modulated_norm(x, y.unflatten(1, frames), ffn_shift, ffn_scale, self.eps)
        return gated_sum(x, self.ffn(y.flatten(1, 2)).unflatten(1, frames), ffn_gate)


class TwoLinears(nn.Module):
    """Linear, activation, linear; named as diffusers names them (`linear_1`, `linear_2`)."""

    def __init__(self, width: int, dim: int, fp32: bool = False):
        super().__init__()
        self.linear_1 = Linear(width, dim, std=0.02, fp32=fp32)
        self.linear_2 = Linear(dim, dim, std=0.02, fp32=fp32)

    def forward(self, x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        return self.linear_2(activation(self.linear_1(x)))


@lru_cache
def time_frequencies(width: int, device: torch.device) -> Tensor:
    """The frequencies of the sinusoidal time embedding: fp64 [width / 2], from 1 down to 1 / 10000."""
    return 10000.0 ** (-torch.arange(width // 2, dtype=torch.float64, device=device) / (width // 2))


class ConditionEmbedder(nn.Module):
    """Embeds the noise level and the caption for the blocks; named as diffusers' `condition_embedder`.

    The noise level's sinusoid is in fp64, and its embedding in fp32, whatever the weights are.
    """

    def __init__(self, settings: ModelSettings):
        super().__init__()
        dim = settings.dim
        self.freq_dim = settings.freq_dim
        # What a seed gives depends on the order in which layers are built, and on the order of the attributes.
        time_embedder = TwoLinears(settings.freq_dim, dim, fp32=True)
        time_proj = Linear(dim, 6 * dim, fp32=True)
        self.time_embedder, self.text_embedder = time_embedder, TwoLinears(settings.text_dim, dim)
        self.time_proj = time_proj

    def forward(self, t: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """t [B, F] in [0, 1]; text [B, text_len, text_dim].

        Returns time [B, F, D] and modulation [B, F, 6, D], both fp32, and text [B, text_len, D].
        """
        dtype = self.time_proj.weight.dtype
        angle = 1000 * t.double()[..., None] * time_frequencies(self.freq_dim, t.device)
        wave = torch.cat([angle.cos(), angle.sin()], dim=-1).float()
        time = self.time_embedder(wave, F.silu)
        modulation = self.time_proj(F.silu(time)).unflatten(-1, (6, -1))
        text = self.text_embedder(text.to(dtype), partial(F.gelu, approximate="tanh"))
        return time, modulation, text


class CausalWan(nn.Module):
    """Wan2.1's transformer made causal over chunks.

    With `sequence_parallel` set, ranks share a clip's tokens and heads. Inputs and outputs are still whole.
    """

    sequence_parallel: SequenceParallel | None = None
    kept_blocks: int = 0  # with checkpointing auto: the last blocks, which recompute nothing in backward

    def __init__(self, settings: ModelSettings):
        super().__init__()
        self.settings = settings
        self.chunking = settings.chunking
        patch = (1, settings.patch, settings.patch)
        self.patch_embedding = nn.Conv3d(settings.channels, settings.dim, kernel_size=patch, stride=patch)
        self.condition_embedder = ConditionEmbedder(settings)
        self.blocks = nn.ModuleList([Block(settings) for _ in range(settings.layers)])
        self.proj_out = Linear(settings.dim, settings.channels * settings.patch**2, std=0.0)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, settings.dim) / settings.dim**0.5)

    def forward(
        self,
        *,
        noisy: Tensor | None,
        t: Tensor | None,
        history: Tensor | None,
        text: Tensor,
        attention: Attention,
        noisy_chunk: int = 0,
        kv_cache: KVCache | None = None,
    ) -> Tensor | None:
        """Velocity of the noisy chunks: [B, C, F, H, W] like `noisy`, or None without it.

        noisy [B, C, F, H, W]: consecutive chunks from chunk `noisy_chunk` on, at noise levels t [B, F].
        history [B, C, F', H, W]: consecutive chunks at t = 0, from the first one after the cached chunks on.
        text [B, text_len, text_dim], zero-padded.

        Either stream may be None. Training gives all N noisy chunks and the N - 1 history chunks at once. Generation
        gives a cache, the newest history chunk, which is appended to the cache, and the next noisy chunk.
        """
        first_history = kv_cache.chunks_written if kv_cache is not None else 0
        if kv_cache is not None and isinstance(attention, (WindowWithin, RoutedWithin)):
            self._move_sinks(kv_cache, attention, history)
        parts, levels, rotary, streams = [], [], [], []
        for latent, begin, level in ((history, first_history, None), (noisy, noisy_chunk, t)):
            streams.append(() if latent is None else self.chunking.chunks(latent.shape[2], begin))
            if latent is None:
                continue
            frames, (height, width) = latent.shape[2], (side // self.settings.patch for side in latent.shape[3:])
            parts.append(self.patch_embedding(latent.to(self.patch_embedding.weight.dtype)))
            levels.append(level if level is not None else latent.new_zeros(len(latent), frames, dtype=torch.float32))
            start, head_dim = self.chunking.start(begin), self.settings.head_dim
            rotary.append(rotary_table(start, frames, height, width, head_dim, latent.device))
        x = rearrange(torch.cat(parts, dim=2), "b d f h w -> b f (h w) d").contiguous()
        height, width = parts[0].shape[-2:]
        tokens = height * width
        table = torch.cat(rotary)
        if self.sequence_parallel is not None:
            x = self.sequence_parallel.split_tokens(x, 2).contiguous()
            table = self.sequence_parallel.split_tokens(table.unflatten(0, (-1, tokens)), 1).flatten(0, 1)
        history_chunks, noisy_chunks = (tuple(Chunk(c.index, c.length * tokens) for c in stream) for stream in streams)
        history_frames = 0 if history is None else history.shape[2]
        layout = PassLayout(history_chunks, noisy_chunks, attention, kernel=self.settings.attention_kernel)
        context = PassContext(layout, table, history_frames, x.shape[2], self.sequence_parallel)

        time, modulation, text = self.condition_embedder(torch.cat(levels, dim=1), text)
        checkpointing, recomputed = self.settings.checkpointing, len(self.blocks)
        if checkpointing == "none" or kv_cache is not None or not torch.is_grad_enabled():
            recomputed = 0
        elif checkpointing == "auto":
            recomputed -= self.kept_blocks
        for position, block in enumerate(self.blocks):
            if position == len(self.blocks) - 1:
                context = context.of_last_block()
            if position < recomputed:
                stash: dict | None = None if checkpointing == "block" else {}
                x = checkpoint(
                    block, x, modulation, text, context, stash=stash, use_reentrant=False, preserve_rng_state=False
                )
            else:
                layer_cache = kv_cache.layers[position] if kv_cache is not None else None
                x = block(x, modulation, text, context, kv_cache=layer_cache)
        if kv_cache is not None:
            kv_cache.chunks_written += len(history_chunks)
        if noisy is None:
            return None
        shift, scale = (self.scale_shift_table.float() + time[:, history_frames:, None]).unsqueeze(3).unbind(2)
        x = modulated_norm(x, shift, scale, self.settings.eps)
        p, out = self.settings.patch, self.proj_out(x)
        if self.sequence_parallel is not None:
            out = self.sequence_parallel.all_gather_tokens(out, 2)
        return rearrange(out, "b f (h w) (p q c) -> b c f (h p) (w q)", h=height, w=width, p=p, q=p)

    def _move_sinks(self, kv_cache: KVCache, attention: WindowWithin | RoutedWithin, history: Tensor | None) -> None:
        """Moves the sinks for a pass whose noisy chunk follows its history: see `WindowWithin`."""
        farthest, added = attention.farthest_sink, 0 if history is None else history.shape[2]
        if farthest is None or not attention.sink:
            return
        start = self.chunking.start
        chunk = kv_cache.chunks_written + len(self.chunking.sizes(added, kv_cache.chunks_written))
        assert farthest >= attention.sink
        if chunk > farthest:
            kv_cache.move_sinks(start(chunk) - start(farthest))

    def cached_frames(self, frames: int, attention: Attention) -> int:
        """Latent frames that a cache keeps of `frames` latent frames of history: only what later chunks can read."""
        largest = self.chunking.largest
        if isinstance(attention, Window):
            return min(frames, (attention.window + 1 + attention.sink) * largest)
        if isinstance(attention, RoutedWithin):
            return min(frames, (attention.reach + attention.sink) * largest)
        return frames

    def cache_tokens(self, tokens_per_frame: int, frames: int, attention: Attention) -> int:
        """Tokens of the buffers of a `new_kv_cache`: history, and a noisy chunk behind it."""
        return (self.cached_frames(frames, attention) + self.chunking.largest) * tokens_per_frame

    def new_kv_cache(self, batch: int, tokens_per_frame: int, frames: int, attention: Attention) -> KVCache:
        """A cache for `frames` latent frames of history; see `cached_frames`."""
        settings, sink = self.settings, attention.sink if isinstance(attention, (Window, RoutedWithin)) else 0
        heads = settings.heads // (self.sequence_parallel.size if self.sequence_parallel is not None else 1)
        scratch = self.chunking.largest * tokens_per_frame
        tokens = self.cache_tokens(tokens_per_frame, frames, attention) - scratch
        weight = self.proj_out.weight
        most = attention.reach + sink if isinstance(attention, RoutedWithin) else None
        return KVCache(
            settings.layers, batch, heads, tokens, scratch, settings.head_dim, weight.dtype, weight.device, sink, most
        )


def pad_text(texts: list[Tensor], settings: ModelSettings) -> Tensor:
    """Captions of different length, each [L, text_dim], as one tensor [B, text_len, text_dim].

    They are padded with zeros. A caption longer than text_len is cut.
    """
    padded = texts[0].new_zeros(len(texts), settings.text_len, settings.text_dim)
    for row, text in zip(padded, texts):
        row[: len(text)] = text[: settings.text_len]
    return padded


def parameter_shapes(settings: ModelSettings) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by name, from the model itself, which is built without memory."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in CausalWan(settings).named_parameters()}
