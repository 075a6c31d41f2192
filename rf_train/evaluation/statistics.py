"""Means, spreads and slopes, with their confidence. All by the bootstrap over clips, with fixed random numbers."""

from collections.abc import Callable, Sequence

import numpy as np

RESAMPLES = 1000
CONFIDENCE = 0.95


def mean_and_std(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation of what was measured; (None, None) of nothing, std 0 of a single value."""
    found = [value for value in values if value is not None]
    if not found:
        return None, None
    return float(np.mean(found)), float(np.std(found, ddof=1)) if len(found) > 1 else 0.0


def as_text(value: float | None, width: int = 0) -> str:
    """A number with three decimals, right-aligned; "-" for what wasn't measured."""
    return f"{'-' if value is None else format(value, '.3f'):>{width}}"


def interval(count: int, statistic: Callable[[np.ndarray], float | None]) -> tuple[float, float] | None:
    """The 95 % bootstrap interval of a statistic of `count` clips; `statistic` gets indices of clips.

    None when it can't be measured on some resample.
    """
    stream = np.random.default_rng(0)
    found = [statistic(stream.integers(0, count, count)) for _ in range(RESAMPLES)]
    if count < 2 or any(value is None or not np.isfinite(value) for value in found):
        return None
    low, high = np.quantile(np.array(found, dtype=float), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def slope(by_segment: Sequence[float | None], positions: Sequence[float]) -> float | None:
    """Least-squares slope of one clip's values over the segments where it was measured; None with fewer than two."""
    pairs = [(x, y) for x, y in zip(positions, by_segment) if y is not None]
    if len(pairs) < 2:
        return None
    x, y = np.array(pairs).T
    return float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())


def slope_with_interval(rows: list[list[float | None]], positions: Sequence[float]) -> dict[str, float | None]:
    """The mean slope over clips, and its 95 % interval: {"slope", "low", "high"}.

    `rows`: values by clip and segment.
    """
    slopes = [value for value in (slope(row, positions) for row in rows) if value is not None]
    if not slopes:
        return {"slope": None, "low": None, "high": None}
    values = np.array(slopes)
    bounds = interval(len(values), lambda chosen: float(values[chosen].mean())) or (None, None)
    return {"slope": float(values.mean()), "low": bounds[0], "high": bounds[1]}
