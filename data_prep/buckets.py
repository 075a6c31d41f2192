"""Buckets of picture sizes: each video goes to the one whose shape is nearest, and each becomes a dataset.

OUT/480x832, OUT/832x480, ...     a dataset each
"""

from collections.abc import Sequence
from fractions import Fraction

import yaml

from data_prep.geometry import parse_size

Size = tuple[int, int]  # (height, width) in pixels
SMALLEST_SHARE = 1000  # rf_train mixes by thousandths: a dataset with less than one can't be in a mixture


def parse_buckets(text: str) -> tuple[Size, ...]:
    """The sizes of "480x832,832x480". Raises ValueError if two of them have the same shape."""
    buckets = tuple(parse_size(part.strip()) for part in text.split(","))
    for number, one in enumerate(buckets):
        for other in buckets[:number]:
            if Fraction(*one) == Fraction(*other):
                raise ValueError(
                    f"buckets {size_name(other)} and {size_name(one)} have the same shape, and a video's bucket is "
                    "chosen by its shape alone; leave one out"
                )
    return buckets


def size_name(size: Size) -> str:
    """The name of a bucket, such as "480x832"."""
    return f"{size[0]}x{size[1]}"


def nearest_bucket(picture: Size, buckets: Sequence[Size]) -> Size:
    """The bucket whose aspect ratio is nearest to the picture's, in log ratio. Of several the first one."""

    def distance(bucket: Size) -> Fraction:  # its logarithm is |log(a) - log(b)|; without rounding, ties are ties
        ratio = Fraction(*picture) / Fraction(*bucket)
        return max(ratio, 1 / ratio)

    return min(buckets, key=distance)


def mixture(samples: dict[str, int]) -> str:
    """The part of a recipe that mixes datasets, {folder: its samples}, as YAML. Each has its share of the steps."""
    total = sum(samples.values())
    parts = [{"data": folder, "weight": count} for folder, count in samples.items() if count * SMALLEST_SHARE >= total]
    recipe = {"data": {"train": "buckets", "mixtures": [{"name": "buckets", "by": "step", "parts": parts}]}}
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=1000)
