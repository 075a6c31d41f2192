"""A check of a stage's history before the first step. Else a mistake in it would end the run when its stage begins."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rf_train.diffusion.batch import Batch
from rf_train.diffusion.histories import History, make_history
from rf_train.diffusion.randomness import make_draws
from rf_train.model.chunks import Attention
from rf_train.model.transformer import CausalWan

MOST_CHUNKS = 4


class HistoryError(ValueError):
    """A history that breaks a rule of `History`. The message names the rule."""


def check_history(history: History, model: CausalWan, attention: Attention, chunks: int) -> None:
    """`check_rules`, with the history's name in the error."""
    try:
        check_rules(history, model, attention, chunks)
    except HistoryError as error:
        raise HistoryError(f"history {history.kind!r}: {error}") from None


@torch.no_grad()
def check_rules(history: History, model: CausalWan, attention: Attention, chunks: int) -> None:
    """Makes the history of two random clips of `chunks` chunks (at most 4). `model` holds whole parameters.

    Raises HistoryError when x~ has another shape or isn't finite, when the clips were changed, when a random number is
    read that isn't declared, or when the model was called more or less often than `rollout_passes` says.
    """
    batch = random_batch(history, model, min(chunks, MOST_CHUNKS))
    clean, counted = batch.x.clone(), _CountedCalls(model)
    made, level = make_history(history, batch, attention, counted)
    if made is None:
        return

    def require(condition: bool, rule: str) -> None:
        if not condition:
            raise HistoryError(rule)

    declared = len(history.rollout_passes(batch.chunk_sizes))
    expected = (*batch.x.shape[:2], batch.history_frames, *batch.x.shape[3:])
    require(counted.calls == declared, f"it declares {declared} passes in `rollout_passes` and made {counted.calls}")
    require(tuple(made.shape) == expected, f"x~ is {list(made.shape)}, not {list(expected)}: all chunks but the last")
    require(bool(made.isfinite().all()), "x~ is not finite")
    require(tuple(level.shape) == (len(batch.x),), f"`level` is {list(level.shape)}, not one number per clip")
    require(torch.equal(batch.x, clean), "it changed the clips, which are the targets of the loss")


def random_batch(history: History, model: CausalWan, chunks: int) -> Batch:
    """Two random clips, with the random numbers that the history declares and no others."""
    settings, weight = model.settings, model.proj_out.weight
    frames = model.chunking.start(chunks)
    ranks = model.sequence_parallel.size if model.sequence_parallel is not None else 1
    shape = (settings.channels, frames, 2 * settings.patch, 2 * ranks * settings.patch)
    stream, names = torch.Generator().manual_seed(0), ["a", "b"]
    x = torch.randn(len(names), *shape, generator=stream)
    text = torch.randn(len(names), settings.text_len, settings.text_dim, generator=stream)
    sizes = model.chunking.sizes(frames)
    draws = make_draws(history.draws, 0, 0, names, shape, len(sizes))
    batch = Batch(names, x, text, draws, sizes).to(weight.device)
    return replace(batch, draws=_DeclaredDraws(batch.draws))


class _DeclaredDraws(dict):
    """The random numbers that a history declares."""

    def __missing__(self, purpose: str) -> Tensor:
        raise HistoryError(f"it reads the random number {purpose!r}, which it does not declare in `draws`")


class _CountedCalls:
    """A model that counts its passes."""

    def __init__(self, model: CausalWan):
        self._model, self.calls = model, 0
        self.settings, self.chunking, self.new_kv_cache = model.settings, model.chunking, model.new_kv_cache

    def __call__(self, **arguments: Any) -> Any:
        self.calls += 1
        return self._model(**arguments)
