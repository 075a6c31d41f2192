"""Several datasets mixed by weight, as one stream of clips.

    positions 0 .. 999 -> how many of each dataset, in a random order -> each dataset's own stream of epochs

In every PERIOD positions each dataset has the same number of places: its share, rounded. Their order is drawn from
(seed, period). So the dataset of a position, and the place in its own stream, are found without what came before.
Within a dataset every sample comes once per epoch; a dataset with a larger share begins its next epoch sooner.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from rf_train.config import Mixture, Stage
from rf_train.data.latent_dataset import Clip, LatentDataset, random_stream

PERIOD = 1000


class MixedDataset:
    """Datasets of clips of one shape, mixed by weight.

    Raises a one-line ValueError when their clips differ in size, or a weight is too small to be counted.
    """

    def __init__(self, mixture: Mixture, parts: Sequence[LatentDataset]):
        self.folder, self.parts = mixture.name, list(parts)
        self.places = places([part.weight for part in mixture.parts])
        for part, count in zip(mixture.parts, self.places):
            if not count:
                raise ValueError(f"data.mixtures: {mixture.name}: {part.data} has less than 1/{PERIOD} of the weight")
        first = self.parts[0]
        for other in self.parts[1:]:
            for name in ("channels", "frames", "height", "width"):
                sizes = other.card["latent"][name], first.card["latent"][name]
                if sizes[0] != sizes[1]:
                    found = f"{sizes[0]} in {other.folder}, {sizes[1]} in {first.folder}"
                    raise ValueError(f"data.mixtures: {mixture.name}: latents differ in {name}: {found}")
        self.card, self.tokens_per_frame = first.card, first.tokens_per_frame
        self.empty_caption = first.empty_caption

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def summary(self) -> dict:
        """What must be the same on every rank."""
        return {"parts": [part.summary() for part in self.parts], "places": self.places}

    def clip_frames(self, stage: Stage) -> int:
        """Latent frames of a clip in `stage`. Raises ValueError when the datasets' clips are shorter."""
        return self.parts[0].clip_frames(stage)

    def place_of(self, seed: int, position: int) -> tuple[int, int]:
        """(number of the dataset, position in its own stream) at a position of the mixed stream."""
        period, place = divmod(position, PERIOD)
        order = _order_of_period(seed, period, tuple(self.places))
        number = int(order[place])
        return number, period * self.places[number] + int((order[:place] == number).sum())

    def clip_at(self, seed: int, position: int, frames: int = 0) -> Clip:
        """The clip at a position of the endless mixed stream. Its id begins with the number of the dataset."""
        number, own = self.place_of(seed, position)
        clip = self.parts[number].clip_at(seed, own, frames)
        return clip._replace(id=f"{number}:{clip.id}")


def places(weights: Sequence[float]) -> list[int]:
    """Of PERIOD places, how many each dataset has: shares of the weights, rounded by the largest remainders."""
    exact = [weight * PERIOD / sum(weights) for weight in weights]
    found = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda n: (found[n] - exact[n], n))
    for number in by_remainder[: PERIOD - sum(found)]:
        found[number] += 1
    return found


@lru_cache(maxsize=8)
def _order_of_period(seed: int, period: int, counts: tuple[int, ...]) -> np.ndarray:
    """The numbers of the datasets at the places of a period."""
    numbers = np.repeat(np.arange(len(counts)), counts)
    return random_stream(f"{seed}\0mixture\0{period}").permutation(numbers)
