"""The Frechet distance between all generated and all true latents, from sums that can be added up."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def latent_features(latent: np.ndarray) -> np.ndarray:
    """What the Frechet distance compares: each latent pixel's C values and their change to the next frame.

    latent [C, F, H, W] -> fp64 [(F - 1) H W, 2 C]. So it sees content and motion, not where in the picture they are.
    """
    now, change_to_next = latent[:, :-1], np.diff(latent, axis=1)
    return np.concatenate([now, change_to_next]).reshape(2 * len(latent), -1).T.astype(np.float64)


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of features, from sums that can be added up."""

    count: int
    total: list[float] | np.ndarray
    products: list[list[float]] | np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> "Gaussian":
        return cls(len(features), features.sum(0), features.T @ features)

    def record(self) -> dict:
        """The fields, ready for JSON."""
        return {"count": self.count, "total": np.asarray(self.total).tolist(),
                "products": np.asarray(self.products).tolist()}  # fmt: skip

    def __add__(self, other: "Gaussian") -> "Gaussian":
        total, products = np.add(self.total, other.total), np.add(self.products, other.products)
        return Gaussian(self.count + other.count, total, products)

    @property
    def mean(self) -> np.ndarray:
        return np.asarray(self.total) / max(self.count, 1)

    @property
    def covariance(self) -> np.ndarray:
        return np.asarray(self.products) / max(self.count, 1) - np.outer(self.mean, self.mean)


def frechet_distance(one: Gaussian, other: Gaussian) -> float:
    """Squared Frechet distance of two Gaussians: |m - n|^2 + tr(S + R - 2 (S R)^(1/2)); 0 for the same ones.

    NaN when a mean or a covariance is not finite, as with a model that has diverged.
    """
    if not all(np.isfinite(part).all() for side in (one, other) for part in (side.mean, side.covariance)):
        return float("nan")

    def root(matrix: np.ndarray) -> np.ndarray:
        values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
        return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T

    half = root(one.covariance)
    cross = root(half @ other.covariance @ half)
    spread = np.trace(one.covariance) + np.trace(other.covariance) - 2 * np.trace(cross)
    return float(((one.mean - other.mean) ** 2).sum() + max(spread, 0.0))


def sum_of(parts: Sequence[Gaussian]) -> Gaussian:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
