"""Which earlier chunks routing chooses: by distance, layer and head (the paper's Figure 8)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rf_train.model import routing
from rf_train.model.routing import RoutingPlan


class RoutingChoices:
    """Counts choices: int64 [layers, heads, chunks, 2]. Chunk d - 1 is the one at distance d.

    Of the last dimension, entry 0 counts the queries that chose a chunk at distance d, and entry 1 those that could.
    The first chunk is counted apart: [layers, heads, 2].
    """

    def __init__(self, layers: int, heads: int, chunks: int):
        self.by_distance = torch.zeros(layers, heads, chunks, 2, dtype=torch.int64)
        self.first = torch.zeros(layers, heads, 2, dtype=torch.int64)
        self._calls = 0

    def add(self, slots: Tensor, plan: RoutingPlan) -> None:
        """Adds the choices of one layer, int16 [B, H, R, n], see `choose_slots`. Calls come layer after layer.

        The counts stay on the device of `slots`: nothing waits for it.
        """
        self.by_distance, self.first = self.by_distance.to(slots.device), self.first.to(slots.device)
        layer, attention, chunks = self._calls % len(self.by_distance), plan.attention, self.by_distance.shape[2]
        self._calls += 1
        clips, heads = slots.shape[:2]
        chosen = slots[..., : attention.top_k].long()  # (B, H, R, k)
        earlier = [slots.new_full((rows.queries, 1), rows.earlier, dtype=torch.int64) for rows in plan.rows]
        head = torch.arange(heads, device=slots.device)[:, None, None]
        place = (head * chunks + torch.cat(earlier) - 1 - chosen).flatten()  # distance d is at d - 1
        counts = torch.zeros(heads * chunks, dtype=torch.int64, device=slots.device)
        counts.scatter_add_(0, place, torch.ones_like(place))
        self.by_distance[layer, :heads, :, 0] += counts.view(heads, chunks)
        self.first[layer, :heads, 0] += (chosen == 0).sum((0, 2, 3))
        for rows in plan.rows:
            candidates = slice(attention.window, rows.earlier - attention.sink)
            self.by_distance[layer, :heads, candidates, 1] += clips * rows.queries
            self.first[layer, :heads, 1] += clips * rows.queries if attention.sink == 0 else 0

    def summary(self) -> dict[str, Any] | None:
        """What the counts say; None without any.

        "by_distance": the share of queries that chose a chunk at distance 1, 2, ..., of those that could; over all
        layers and heads. "first_chunk": the same for the first chunk. "entropy": of a head's choices over distances, in
        nats, the mean over layers and heads. "mean_distance": [layers][heads].
        """
        if not self.by_distance.any():
            return None
        chosen, could = self.by_distance.cpu().double().unbind(-1)
        share = chosen / chosen.sum(-1, keepdim=True).clamp(min=1)
        distances = torch.arange(1, chosen.shape[-1] + 1).double()
        total, first = could.sum((0, 1)), self.first.sum((0, 1)).tolist()
        by_distance = (chosen.sum((0, 1)) / total.clamp(min=1))[: int((total > 0).nonzero().max()) + 1]
        return {
            "by_distance": by_distance.tolist(),
            "first_chunk": first[0] / first[1] if first[1] else None,
            "entropy": float(torch.special.entr(share).sum(-1).mean()),
            "mean_distance": (share * distances).sum(-1).tolist(),
        }


@contextmanager
def counted_choices(choices: RoutingChoices) -> Iterator[None]:
    """Adds the choices of every routed attention inside to `choices`."""
    routing.observers.append(choices.add)
    try:
        yield
    finally:
        routing.observers.remove(choices.add)
