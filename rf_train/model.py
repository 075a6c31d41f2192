"""The causal DiT: Wan2.1's transformer with two streams, history (t = 0) and noisy, in one pass.

Plain `nn.Module`s that know nothing of DeepSpeed. Parameter names are those of diffusers' `WanTransformer3DModel`.
Suffixes: B batch, F latent frames, P tokens a frame, L = F P tokens, D width.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rf_train import config
from rf_train.attention import two_stream_attention
from rf_train.cache import Cache, LayerCache
from rf_train.chunks import Attention, Chunking
from rf_train.rope import rotary_table, rotate


class Linear(nn.Linear):
    """A linear layer that starts as Wan's do: Xavier-uniform, or normal of width `std`, or zero with `std` = 0; no bias at first.

    Weights are set where the layer is built, since `zero.Init` partitions them as soon as `__init__` is over.
    """

    def __init__(self, width_in: int, width_out: int, std: float | None = None):
        self.std = std
        super().__init__(width_in, width_out)

    def reset_parameters(self) -> None:
        if self.std is None:
            nn.init.xavier_uniform_(self.weight)
        else:
            nn.init.normal_(self.weight, std=self.std)
        nn.init.zeros_(self.bias)


class Projections(nn.Module):
    """What self- and cross-attention have alike: q, k, v and output projections, RMS norm on q and k over the full width."""

    def __init__(self, dim: int, heads: int, eps: float):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = Linear(dim, dim), Linear(dim, dim), Linear(dim, dim)
        self.to_out = nn.ModuleList([Linear(dim, dim)])
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps), nn.RMSNorm(dim, eps)


class SelfAttention(Projections):
    """Self-attention of both streams, with rotary positions."""

    def forward(self, x: Tensor, plan: "Plan", memory: LayerCache | None, noisy_only: bool, kept: dict | None) -> Tensor:
        """x [B, L, D], history tokens first. Returns [B, L, D], or the noisy tokens alone with `noisy_only`."""
        asks = x[:, plan.history_tokens :] if noisy_only else x
        skipped = plan.history_tokens if noisy_only else 0
        q = rotate(rearrange(self.norm_q(self.to_q(asks)), "b l (h d) -> b l h d", h=self.heads), plan.rotary[skipped:])
        k = rotate(rearrange(self.norm_k(self.to_k(x)), "b l (h d) -> b l h d", h=self.heads), plan.rotary)
        v = rearrange(self.to_v(x), "b l (h d) -> b l h d", h=self.heads)

        def attend(*qkv: Tensor) -> Tensor:
            heads_first = (y.transpose(1, 2) for y in qkv)
            return two_stream_attention(*heads_first, plan.history, plan.noisy, plan.attention, memory, noisy_only, kept).transpose(1, 2)

        out = attend(q, k, v) if plan.sequence is None else plan.sequence.attend(attend, q, k, v, plan.tokens)
        return self.to_out[0](rearrange(out, "b l h d -> b l (h d)"))


class CrossAttention(Projections):
    """Attention to the caption. Padded positions are attended to, as Wan was trained."""

    def forward(self, x: Tensor, text: Tensor, memory: LayerCache | None) -> Tensor:
        """x [B, L, D], text [B, text_len, D]. Keys and values are made once a caption when there is a cache."""
        q = rearrange(self.norm_q(self.to_q(x)), "b l (h d) -> b h l d", h=self.heads)
        if memory is not None and memory.text is not None:
            k, v = memory.text
        else:
            k = rearrange(self.norm_k(self.to_k(text)), "b l (h d) -> b h l d", h=self.heads)
            v = rearrange(self.to_v(text), "b l (h d) -> b h l d", h=self.heads)
            if memory is not None:
                memory.text = (k, v)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](rearrange(out, "b h l d -> b l (h d)"))


class FeedForward(nn.Module):
    """Linear, tanh-GELU, linear; named as diffusers names them (`net.0.proj`, `net.2`)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        up = nn.Module()
        up.proj = Linear(dim, hidden)
        self.net = nn.ModuleList([up, nn.Identity(), Linear(hidden, dim)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](F.gelu(self.net[0].proj(x), approximate="tanh"))


def layer_norm(x: Tensor, eps: float) -> Tensor:
    """Layer norm without weights, in fp32."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=eps)


class Block(nn.Module):
    def __init__(self, settings: config.Model):
        super().__init__()
        dim, heads, self.eps = settings.dim, settings.heads, settings.eps
        self.attn1 = SelfAttention(dim, heads, self.eps)
        self.attn2 = CrossAttention(dim, heads, self.eps)
        self.norm2 = nn.LayerNorm(dim, self.eps)
        self.ffn = FeedForward(dim, settings.ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self, x: Tensor, time: Tensor, text: Tensor, plan: "Plan", memory: LayerCache | None = None, noisy_only: bool = False, kept: dict | None = None
    ) -> Tensor:
        """x [B, F, P, D], history frames first; time [B, F, 6, D] in fp32; text [B, text_len, D]. Returns x's shape, or its noisy frames alone."""
        shift, scale, gate, shift_ffn, scale_ffn, gate_ffn = (self.scale_shift_table.float() + time).unsqueeze(3).unbind(2)  # (B, F, 1, D) each
        y = torch.addcmul(shift, layer_norm(x, self.eps), 1 + scale).to(x.dtype)
        y = self.attn1(y.flatten(1, 2), plan, memory, noisy_only, kept)
        if noisy_only:
            skipped = plan.history_frames
            x, gate, shift_ffn, scale_ffn, gate_ffn = (part[:, skipped:] for part in (x, gate, shift_ffn, scale_ffn, gate_ffn))
        x = torch.addcmul(x.float(), y.float().unflatten(1, x.shape[1:3]), gate).to(x.dtype)
        x = x + self.attn2(self.norm2(x).flatten(1, 2), text, memory).unflatten(1, x.shape[1:3])
        y = torch.addcmul(shift_ffn, layer_norm(x, self.eps), 1 + scale_ffn).to(x.dtype)
        return torch.addcmul(x.float(), self.ffn(y.flatten(1, 2)).float().view_as(x), gate_ffn).to(x.dtype)


class Embedder(nn.Module):
    """Time and text conditions, named as diffusers' `condition_embedder`."""

    def __init__(self, settings: config.Model):
        super().__init__()
        dim = settings.dim
        self.freq_dim = settings.freq_dim
        self.time_embedder, self.text_embedder = nn.Module(), nn.Module()
        self.time_embedder.linear_1, self.time_embedder.linear_2 = Linear(settings.freq_dim, dim, std=0.02), Linear(dim, dim, std=0.02)
        self.time_proj = Linear(dim, 6 * dim)
        self.text_embedder.linear_1, self.text_embedder.linear_2 = Linear(settings.text_dim, dim, std=0.02), Linear(dim, dim, std=0.02)

    def forward(self, t: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """t [B, F] in [0, 1]; text [B, text_len, text_dim]. Returns time [B, F, D], modulation [B, F, 6, D], both fp32, and text [B, text_len, D]."""
        dtype = self.time_proj.weight.dtype
        half = self.freq_dim // 2
        frequency = torch.exp(-torch.log(torch.tensor(10000.0, dtype=torch.float64)) * torch.arange(half, dtype=torch.float64) / half).to(t.device, torch.float32)
        angle = 1000 * t.float()[..., None] * frequency
        wave = torch.cat([angle.cos(), angle.sin()], dim=-1).to(dtype)
        time = self.time_embedder.linear_2(F.silu(self.time_embedder.linear_1(wave)))
        modulation = self.time_proj(F.silu(time)).unflatten(-1, (6, -1))
        text = self.text_embedder.linear_2(F.gelu(self.text_embedder.linear_1(text.to(dtype)), approximate="tanh"))
        return time.float(), modulation.float(), text


class Plan:
    """What one pass computes: which chunks stand in each stream, and where."""

    def __init__(
        self, history: list[tuple[int, int]], noisy: list[tuple[int, int]], history_frames: int, tokens: int, rotary: Tensor, attention: Attention, sequence
    ):
        self.history, self.noisy = history, noisy  # pairs of (chunk index, tokens)
        self.history_frames = history_frames
        self.tokens = tokens  # of a frame, on this rank
        self.history_tokens = history_frames * tokens
        self.rotary = rotary  # of this rank's tokens
        self.attention = attention
        self.sequence = sequence


class CausalWan(nn.Module):
    """Wan2.1's transformer made causal over chunks.

    `sequence`, when set, spreads a clip's tokens and heads over ranks: see `distributed.Sequence`. Inputs and outputs are whole all the same.
    """

    sequence = None

    def __init__(self, settings: config.Model):
        super().__init__()
        self.settings = settings
        self.chunking = Chunking(settings.chunk, settings.first_chunk)
        self.head_dim = settings.dim // settings.heads
        patch = (1, settings.patch, settings.patch)
        self.patch_embedding = nn.Conv3d(settings.channels, settings.dim, kernel_size=patch, stride=patch)
        self.condition_embedder = Embedder(settings)
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
        cache: Cache | None = None,
    ) -> Tensor | None:
        """Velocity of the noisy chunks.

        noisy [B, C, F, H, W]: the run of chunks that begins with chunk `noisy_chunk`, at levels t [B, F].
        history [B, C, F', H, W]: a run of clean chunks, at t = 0: those after the cache's, or from chunk 0 without a cache.
        Training gives all N noisy chunks and the N - 1 history chunks at once; generation gives a cache, the newest history chunk,
        which is appended to it, and the next noisy one. Either stream may be None.
        text [B, text_len, text_dim], zero-padded. Returns [B, C, F, H, W] like `noisy` (None without it).
        """
        first_history = cache.chunks if cache is not None else 0
        parts, levels, chunk_lists, frame_starts = [], [], [], []
        for latent, begin, level in ((history, first_history, None), (noisy, noisy_chunk, t)):
            frames = 0 if latent is None else latent.shape[2]
            sizes = self.chunking.sizes(frames, begin)
            chunk_lists.append([(begin + i, size) for i, size in enumerate(sizes)])
            frame_starts.append((self.chunking.start(begin), frames))
            if latent is not None:
                parts.append(self.patch_embedding(latent.to(self.patch_embedding.weight.dtype)))
                levels.append(level if level is not None else latent.new_zeros(latent.shape[0], frames, dtype=torch.float32))
        x = rearrange(torch.cat(parts, dim=2), "b d f h w -> b f (h w) d").contiguous()
        height, width = parts[0].shape[-2:]
        tokens = height * width
        tables = [rotary_table(start, frames, height, width, self.head_dim, x.device) for start, frames in frame_starts if frames]
        rotary = torch.cat(tables)
        if self.sequence is not None:
            x = self.sequence.share(x, 2).contiguous()
            rotary = self.sequence.share(rotary.unflatten(0, (-1, tokens)), 1).flatten(0, 1)
        history_chunks, noisy_chunks = ([(index, frames * tokens) for index, frames in chunks] for chunks in chunk_lists)
        history_frames = frame_starts[0][1]
        plan = Plan(history_chunks, noisy_chunks, history_frames, x.shape[2], rotary, attention, self.sequence)

        time, modulation, text = self.condition_embedder(torch.cat(levels, dim=1), text)
        recompute = self.settings.checkpointing != "none" and torch.is_grad_enabled() and cache is None
        for position, block in enumerate(self.blocks):
            memory = cache.layers[position] if cache is not None else None
            noisy_only = position == len(self.blocks) - 1  # nothing reads what the last block makes of history
            if recompute:
                kept = {} if self.settings.checkpointing == "selective" else None
                x = checkpoint(block, x, modulation, text, plan, noisy_only=noisy_only, kept=kept, use_reentrant=False)
            else:
                x = block(x, modulation, text, plan, memory=memory, noisy_only=noisy_only)
        if cache is not None:
            cache.chunks += len(history_chunks)
        if noisy is None:
            return None
        shift, scale = (self.scale_shift_table.float() + time[:, history_frames:, None]).unsqueeze(3).unbind(2)
        x = torch.addcmul(shift, layer_norm(x, self.settings.eps), 1 + scale).to(x.dtype)
        p, out = self.settings.patch, self.proj_out(x)
        if self.sequence is not None:
            out = self.sequence.whole(out, 2)
        return rearrange(out, "b f (h w) (p q c) -> b c f (h p) (w q)", h=height, w=width, p=p, q=p)

    def new_cache(self, batch: int, tokens_per_frame: int, frames: int, attention: Attention = Attention()) -> Cache:
        """A cache for `frames` latent frames of history (fewer when `attention` is a window: only what can still be read is kept)."""
        largest = max(self.chunking.chunk, self.chunking.first)
        if attention.kind == "window":
            frames = min(frames, (attention.window + 1 + attention.sink) * largest)
        weight, s = self.proj_out.weight, self.settings
        heads = s.heads // (self.sequence.size if self.sequence is not None else 1)
        return Cache(s.layers, batch, heads, frames * tokens_per_frame, largest * tokens_per_frame, self.head_dim, weight.dtype, weight.device, attention.sink)


def pad_text(texts: list[Tensor], settings: config.Model) -> Tensor:
    """Captions of different length, each [L, text_dim], to [B, text_len, text_dim], zero past their ends (longer ones are cut)."""
    padded = texts[0].new_zeros(len(texts), settings.text_len, settings.text_dim)
    for row, text in zip(padded, texts):
        row[: len(text)] = text[: settings.text_len]
    return padded


def parameter_count(settings: config.Model) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in CausalWan(settings).parameters())
