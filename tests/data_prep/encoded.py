"""What the tests of `data_prep.encode` run, and read of the dataset that it makes."""

import json

from data_prep import encode
from data_prep.card import read_card
from data_prep.index import SampleIndex
from data_prep.shards import read_sample


def run(src, out, *more):
    settings = ["--size", "32x48", "--frames", "5", "--samples-per-shard", "3"]
    return encode.main([str(src), str(out), *settings, *more])


def samples(out):
    index = SampleIndex(out, read_card(out))
    found = (index[number] for number in range(len(index)))
    return {entry.key: read_sample(out / file, entry) for file, entry in found}


def failures(out):
    return [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]


def content(out):
    """Every file of a dataset, by name."""
    return {path.name: path.read_bytes() for path in out.iterdir()}
