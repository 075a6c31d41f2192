"""Datasets of given samples, for the tests of the commands that read one."""

from pathlib import Path

from data_prep.card import SCHEMA, write_card
from data_prep.index import write_index
from data_prep.shards import ShardWriter


def write_samples(folder: Path, samples: list, per_shard: int = 4, codec: str = "wan", skipped=None) -> dict:
    """A dataset of `samples`: (video, clip, latent [C, T, H, W], text [L, D], JSON). Returns its card."""
    folder.mkdir()
    records = []
    for number, begin in enumerate(range(0, len(samples), per_shard)):
        writer = ShardWriter(folder / f"shard-{number:06d}-0000.tar")
        for sample in samples[begin : begin + per_shard]:
            writer.add(*sample)
        records.append(writer.finish())
    channels, frames, height, width = samples[0][2].shape
    dim, skipped = samples[0][3].shape[1], skipped or {}
    card = {
        "schema": SCHEMA,
        "codec": {"name": codec, "hash": "c", "settings": {}},
        "latent": {
            "channels": channels, "frames": frames, "height": height, "width": width, "dtype": "float16",
            "strides": [4, 8, 8], "mean": [0.0] * channels, "std": [1.0] * channels,
        },
        "video": {"fps": 16, "frames": 4 * frames - 3, "height": 8 * height, "width": 8 * width},
        "text": {"name": "default", "dim": dim, "max_tokens": 8, "hash": "t"},
        "empty_caption": [[0.1] * dim],
        "counts": {
            "videos": len({sample[0] for sample in samples}), "samples": len(samples), "shards": len(records),
            "skipped": skipped, "no_caption": 0, "dropped_seconds": 1.5,
        },
        "shards": [{key: record[key] for key in ("file", "samples", "bytes", "sha256")} for record in records],
        "index": write_index(folder, records),
        "source": {"path": "", "settings": {}},
    }  # fmt: skip
    return write_card(folder, card)
