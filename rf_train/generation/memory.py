"""The memory that generation needs, before it starts, and how many videos are made at once with what is free."""

from dataclasses import dataclass

import torch

from rf_train.engine.devices import memory_of
from rf_train.engine.inference import block_elements
from rf_train.generation.generator import Generator
from rf_train.model.kv_cache import kv_cache_bytes

MARGIN = 0.85  # the share of what is free that is planned with
MOST_AT_ONCE = 4  # more videos at once gain little: a chunk of one real video fills a GPU


@dataclass(frozen=True)
class Memory:
    """Bytes: `caches` and `decoder` are kept from chunk to chunk by one video, `passes` are alive in a pass of it.

    `passes` is that of one guidance branch at a time. `branches` is 1 without guidance, else 2. Where `ranks` make a
    video together, all is of one rank, the one that decodes. `gathered`: split weights that are whole for a while.
    """

    caches: int
    decoder: int
    passes: int
    branches: int
    free: int
    ranks: int = 1
    gathered: int = 0

    def of_video(self, in_one_batch: bool) -> int:
        """One video's bytes, with the guidance branches in one batch, or one after the other."""
        return self.caches + self.decoder + self.passes * (self.branches if in_one_batch else 1)

    def plan(self, batch: int = 0) -> "BatchPlan":
        """How many videos to make at once: `batch`, or with 0 as many as fit, at most `MOST_AT_ONCE`.

        Guidance has both branches in one batch where that fits. Raises ValueError when one video doesn't fit at all.
        """
        free = int(self.free * MARGIN) - self.gathered
        for in_one_batch in (True, False):
            fit = free // self.of_video(in_one_batch)
            if fit >= max(1, batch):
                return BatchPlan(batch or min(fit, MOST_AT_ONCE), in_one_batch and self.branches > 1)
        need = max(1, batch) * self.of_video(False)
        raise ValueError(
            f"{max(1, batch)} video(s) at once need about {size(need + self.gathered)}, {size(self.free)} are free: "
            "take a smaller --batch, a smaller size, a narrower window, or more ranks (--sequence-parallel)"
        )

    def lines(self, plan: "BatchPlan") -> str:
        """The two lines for people."""
        one = self.of_video(plan.guidance_in_one_batch)
        parts = f"K/V caches {size(self.caches)}, decoder {size(self.decoder)}"
        parts += f", a pass {size(one - self.caches - self.decoder)}"
        how = "without guidance"
        if self.branches > 1:
            how = f"guidance in {'one batch' if plan.guidance_in_one_batch else 'two passes'}"
        at_once = f"{plan.videos} video(s) at once, {how}"
        where = f" on each of {self.ranks} ranks" if self.ranks > 1 else ""
        gathered = f"; besides, {size(self.gathered)} of gathered weights" if self.gathered else ""
        return (
            f"memory: about {size(one)} for each video at once{where}, however long it gets ({parts}){gathered}\n"
            f"        {size(self.free)} are free: {at_once}"
        )


@dataclass(frozen=True)
class BatchPlan:
    """How videos are made: how many at once, and whether both guidance branches are in one batch."""

    videos: int
    guidance_in_one_batch: bool


def memory_needed(generator: Generator, frames: int, ranks_here: int = 1) -> Memory:
    """What a video of `frames` latent frames needs with this model, and what is free on its device now.

    A collective of the ranks that make a video together: what is free is that of the rank that has least.
    """
    together = generator.together
    ranks = 1 if together is None else together.size
    settings, model, latent = generator.recipe.model, generator.model, generator.card["latent"]
    weight = model.proj_out.weight
    tokens = settings.tokens_per_frame(latent["height"], latent["width"])
    capacity = model.cache_tokens(tokens, frames, generator.attention)
    branches = 1 if generator.recipe.flow.guidance == 1 else 2
    cache = kv_cache_bytes(settings.layers, 1, settings.heads // ranks, capacity, settings.head_dim, weight.dtype)
    cache += kv_cache_bytes(settings.layers, 1, settings.heads, settings.text_len, settings.head_dim, weight.dtype)
    # Keys and values of text are whole on every rank.
    # The newest chunk and the noisy one. A block's largest moment: its input, norms and modulation in fp32, q, k, v and
    # the output, or the feed-forward's hidden layer twice.
    chunk = 2 * min(frames, model.chunking.largest) * tokens // ranks
    passes = chunk * (6 * settings.dim * 4 + (6 * settings.dim + 2 * settings.ffn_dim) * weight.element_size())
    decoder = generator.codec.decoder_bytes(latent["height"], latent["width"])
    free = free_memory(generator.device, ranks_here)
    free = free if together is None else together.smallest(free)
    # Split weights: one block is computed while the next one is gathered, and a part of a third may be on its way.
    gathered = 0 if generator.engine is None else 3 * block_elements(settings) * weight.element_size()
    return Memory(branches * cache, decoder, passes, branches, free, ranks, gathered)


def free_memory(device: torch.device, ranks_here: int) -> int:
    """Bytes that a rank can still take: of its GPU, or its share of what the system can give."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return memory_of(device, ranks_here)


def size(count: int) -> str:
    """Bytes for people: "1.2 GiB"."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"
