"""Several datasets as one stream of clips, mixed by clip or by step.

    units 0 .. 999 -> how many of each dataset, in a random order -> each dataset's own stream of epochs

A unit is a clip, or a step: by step, all clips of a step are of one dataset, so the datasets may have pictures of
different sizes (buckets). In every PERIOD units each dataset has the same number of places: its share, rounded. Their
order is drawn from (seed, period). So the dataset of a unit, and the place in its own stream, are found without what
came before. Within a dataset every sample comes once per epoch.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from rf_train.config import Mixture, Stage
from rf_train.data.latent_dataset import Clip, LatentDataset, random_stream, read_all

PERIOD = 1000


class MixedDataset:
    """Datasets mixed by weight.

    Raises a one-line ValueError when clips of one step would differ in shape, or a weight is too small to be counted.
    """

    def __init__(self, mixture: Mixture, parts: Sequence[LatentDataset]):
        self.folder, self.parts, self.by = mixture.name, list(parts), mixture.by
        self.shares = shares([entry.weight or len(part) for entry, part in zip(mixture.parts, parts)])
        for entry, count in zip(mixture.parts, self.shares):
            if not count:
                raise ValueError(f"data.mixtures: {mixture.name}: {entry.data} has less than 1/{PERIOD} of the weight")
        alike = ("channels", "frames", *(("height", "width") if self.by == "clip" else ()))
        first = self.parts[0]
        for other in self.parts[1:]:
            for name in alike:
                sizes = other.card["latent"][name], first.card["latent"][name]
                if sizes[0] != sizes[1]:
                    found = f"{sizes[0]} in {other.folder}, {sizes[1]} in {first.folder}"
                    may = "; with by: step they may" if name in ("height", "width") else ""
                    raise ValueError(f"data.mixtures: {mixture.name}: latents differ in {name}: {found}{may}")
        self.card = max(self.parts, key=lambda part: part.tokens_per_frame).card  # what needs the most memory
        self.empty_caption = first.empty_caption

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def summary(self) -> dict:
        """What must be the same on every rank."""
        return {"parts": [part.summary() for part in self.parts], "shares": self.shares, "by": self.by}

    def clip_frames(self, stage: Stage) -> int:
        """Latent frames of a clip in `stage`. Raises ValueError when the datasets' clips are shorter."""
        return self.parts[0].clip_frames(stage)

    def places(self, seed: int, done: Sequence[tuple[int, int]], step: int, batch: int) -> list[tuple[int, int]]:
        """(number of the dataset, position in its own stream) of each clip of a step.

        `done`: (steps, clips of each) of the stages before that read this mixture; `step` counts from there on.
        """
        if self.by == "clip":
            first = sum(steps * size for steps, size in done) + step * batch
            return [self.place_of(seed, position) for position in range(first, first + batch)]
        begin = own = 0
        number, _ = self.place_of(seed, sum(steps for steps, _ in done) + step)
        for steps, size in [*done, (step, batch)]:
            own += size * (self.count(seed, number, begin + steps) - self.count(seed, number, begin))
            begin += steps
        return [(number, own + clip) for clip in range(batch)]

    def place_of(self, seed: int, unit: int) -> tuple[int, int]:
        """(number of the dataset, how many units of it came before) of a unit."""
        period, place = divmod(unit, PERIOD)
        number = int(_order_of_period(seed, period, tuple(self.shares))[place])
        return number, self.count(seed, number, unit)

    def count(self, seed: int, number: int, units: int) -> int:
        """How many of the first `units` units are of dataset `number`."""
        period, place = divmod(units, PERIOD)
        order = _order_of_period(seed, period, tuple(self.shares))
        return period * self.shares[number] + int((order[:place] == number).sum())

    def clip_at(self, seed: int, place: tuple[int, int], frames: int = 0) -> Clip:
        """The clip at one of `places`. Its id begins with the number of the dataset."""
        number, position = place
        clip = self.parts[number].clip_at(seed, position, frames)
        return clip._replace(id=f"{number}:{clip.id}")

    def clips_at(self, seed: int, places: Sequence[tuple[int, int]], frames: int = 0) -> list[Clip]:
        """The clips at these places, in this order; several are read at once if a dataset is remote."""
        remote = any(part.is_remote for part in self.parts)
        return read_all(lambda place: self.clip_at(seed, place, frames), places, remote)


def shares(weights: Sequence[float]) -> list[int]:
    """Of PERIOD units, how many each dataset has: the weights' shares, rounded by the largest remainders."""
    exact = [weight * PERIOD / sum(weights) for weight in weights]
    found = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda n: (found[n] - exact[n], n))
    for number in by_remainder[: PERIOD - sum(found)]:
        found[number] += 1
    return found


@lru_cache(maxsize=64)
def _order_of_period(seed: int, period: int, counts: tuple[int, ...]) -> np.ndarray:
    """The numbers of the datasets at the places of a period."""
    numbers = np.repeat(np.arange(len(counts)), counts)
    return random_stream(f"{seed}\0mixture\0{period}").permutation(numbers)
