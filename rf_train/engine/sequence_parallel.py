"""Sequence parallelism: neighbouring ranks share a clip (DeepSpeed's Ulysses)."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor


class Ulysses:
    """Spreads tokens and heads over the `size` ranks that share a clip.

    Outside attention each rank has an equal share of the tokens of every latent frame. Inside self-attention it has all
    tokens of a share of the heads, and its K/V cache holds those. DeepSpeed's engine does not know this, and averages
    gradients over all ranks. `all_gather_tokens` scales them so that the average is the gradient of the clip.
    """

    def __init__(self, size: int):
        self.size, self.rank = size, dist.get_rank() % size
        for first in range(0, dist.get_world_size(), size):
            group = dist.new_group(list(range(first, first + size)))
            if first <= dist.get_rank() < first + size:
                self.group = group

    def split_tokens(self, x: Tensor, dim: int) -> Tensor:
        """This rank's share of the tokens of each frame. Raises ValueError when they don't split evenly."""
        if x.shape[dim] % self.size:
            tokens = f"a latent frame's {x.shape[dim]} tokens don't split evenly over {self.size} ranks"
            raise ValueError(f"run.sequence_parallel_size={self.size}: {tokens}")
        return x.chunk(self.size, dim)[self.rank]

    def all_gather_tokens(self, x: Tensor, dim: int) -> Tensor:
        """The tokens of all ranks, on every rank."""
        return _AllGatherTokens.apply(x, dim, self)

    def attend(self, attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, tokens: int) -> Tensor:
        """Runs `attention` on all tokens of a share of the heads.

        q, k, v and the result are [B, L, H, D], with this rank's `tokens` of each frame.
        """
        from deepspeed.sequence.layer import DistributedAttention

        def by_frame(x: Tensor) -> Tensor:  # gathered rank after rank -> frame after frame
            return rearrange(x, "b (r f p) h d -> b (f r p) h d", r=self.size, p=tokens)

        def on_heads(*qkv: Tensor) -> Tensor:
            out = attention(*(by_frame(x) for x in qkv))
            return rearrange(out, "b (f r p) h d -> b (r f p) h d", r=self.size, p=tokens)

        return DistributedAttention(on_heads, self.group, scatter_idx=2, gather_idx=1)(q, k, v, 0)


class _AllGatherTokens(torch.autograd.Function):
    """Gathers the tokens of the ranks that share a clip.

    Every rank then has the same loss of the whole clip. So the gradient of a rank's share is its part of the whole
    gradient, times the number of ranks, because gradients are averaged over these ranks.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, ranks: Ulysses) -> Tensor:
        ctx.dim, ctx.ranks = dim, ranks
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(ranks.size)]
        dist.all_gather(parts, x.contiguous(), group=ranks.group)
        return torch.cat(parts, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.ranks.split_tokens(grads[0], ctx.dim) * ctx.ranks.size, None, None
