"""How fast data is read:  python -m rf_train.bench data

Three questions. Is reading samples in a seeded order, each checked, as fast as plain webdataset reading and decoding
the same shards in sequence? How long does a training step of the demo's model wait for data? What do ten million
samples cost at start and at a resume?
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
import webdataset

from data_prep.card import CARD, SCHEMA, card_hash, write_card
from data_prep.files import sha256_of_file
from data_prep.index import INDEX, ROW, write_index
from data_prep.shards import ShardWriter
from rf_train import config
from rf_train.config import DataSettings, Recipe
from rf_train.data.batches import open_datasets, steps
from rf_train.data.latent_dataset import LatentDataset
from rf_train.diffusion.histories import make_history
from rf_train.diffusion.loss import training_loss
from rf_train.model.settings import ModelSettings
from rf_train.model.transformer import CausalWan

MANY, PER_SHARD = 10_000_000, 64
WAN_LATENT = (16, 21, 60, 104)  # 81 frames of 480x832
DEMO_LATENT = (16, 15, 4, 4)  # 57 frames of 32x32


def bench_data(options: argparse.Namespace) -> tuple[list[str], dict]:
    """Lines for people, and the figures."""
    with tempfile.TemporaryDirectory() as folder:
        rates = reading_rates(Path(folder) / "wan", options.samples, options.rounds)
        wait = wait_share(Path(folder) / "demo", options.steps)
        seconds, private, index_bytes, restore = many_samples(Path(folder) / "many", options.index_samples)
    ratio = rates["ours"] / rates["webdataset"]
    figures = {
        "bench": "data",
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "rate_over_webdataset": ratio,
        "wait_share": wait,
        "index_seconds_10m": seconds,
        "index_bytes_10m": index_bytes + private,
        "index_bytes_shared": index_bytes,
        "restore_seconds": restore,
    }
    mib = 2 * np.prod(WAN_LATENT) / 2**20
    lines = [
        f"{options.samples} samples of {mib:.1f} MiB, from the page cache, on one thread",
        f"  webdataset, in sequence    {rates['webdataset']:8.1f} samples/s",
        f"  in a seeded order, checked {rates['ours']:8.1f} samples/s, {ratio:.2f} x as many",
        f"{options.steps} steps of the demo's model wait for data for {wait:.2%} of their time",
        f"{options.index_samples:,} samples: {seconds:.1f} s to open, {restore:.2f} s more to the first clips",
        f"  memory: {index_bytes / 2**20:.0f} MiB of index, which all processes of a machine share, and "
        f"{private / 2**20:.0f} MiB of each one's own",
    ]
    return lines, figures


# ---- against webdataset


def reading_rates(folder: Path, samples: int, rounds: int) -> dict[str, float]:
    """Samples per second of both, to fp32 tensors, in turn: the median of `rounds`."""
    write_random_dataset(folder, samples, WAN_LATENT)
    dataset = LatentDataset(folder, wan_model())
    urls = [str(folder / name) for name in dataset.index.files]

    def plainly() -> None:
        for sample in webdataset.WebDataset(urls, shardshuffle=False).decode():
            torch.from_numpy(sample["latent.npy"].astype(np.float32))
            torch.from_numpy(sample["text.npy"].astype(np.float32))

    def ours() -> None:
        for position in range(samples):
            dataset.clip_at(0, position)

    seconds: dict[str, list[float]] = {"webdataset": [], "ours": []}
    for turn in range(rounds + 1):
        for name, read in (("webdataset", plainly), ("ours", ours)):
            begin = time.perf_counter()
            read()
            if turn:  # the first one fills the page cache
                seconds[name].append(time.perf_counter() - begin)
    return {name: samples / median(values) for name, values in seconds.items()}


def wan_model() -> ModelSettings:
    return replace(ModelSettings(), channels=16, text_dim=64, text_len=32)


def write_random_dataset(folder: Path, samples: int, latent: Sequence[int]) -> None:
    """A dataset of random latents, as `data_prep.encode` writes it."""
    folder.mkdir(parents=True)
    stream, records = np.random.default_rng(0), []
    for part, begin in enumerate(range(0, samples, PER_SHARD)):
        writer = ShardWriter(folder / f"shard-{part:06d}-0000.tar")
        for video in range(begin, min(begin + PER_SHARD, samples)):
            text = stream.standard_normal((8, 64), np.float32)
            writer.add(video, 0, stream.standard_normal(latent, np.float32), text, {"caption": "random"})
        records.append(writer.finish())
    shards = [{key: record[key] for key in ("file", "samples", "bytes", "sha256")} for record in records]
    write_card(folder, random_card(latent, samples, shards, write_index(folder, records)))


def random_card(latent: Sequence[int], samples: int, shards: list[dict], index: dict) -> dict:
    """The card of a dataset of random latents."""
    channels, frames, height, width = latent
    return {
        "schema": SCHEMA,
        "codec": {"name": "default", "hash": "random", "settings": {}},
        "latent": {
            "channels": channels,
            "frames": frames,
            "height": height,
            "width": width,
            "dtype": "float16",
            "strides": [4, 8, 8],
            "mean": [0.0] * channels,
            "std": [1.0] * channels,
        },
        "video": {"fps": 16, "frames": 4 * frames - 3, "height": 8 * height, "width": 8 * width},
        "text": {"name": "default", "dim": 64, "max_tokens": 32, "hash": "random"},
        "empty_caption": [[0.0] * 64],
        "counts": {"videos": samples, "samples": samples, "shards": len(shards), "skipped": {}},
        "shards": shards,
        "index": index,
        "source": {"path": "", "settings": {}},
    }


# ---- how long training waits


def wait_share(folder: Path, count: int) -> float:
    """The share of `count` teacher-forcing steps of the demo in which the model waits for clips."""
    write_random_dataset(folder, 192, DEMO_LATENT)
    recipe = config.load(config.recipe_path("demo"), ["evaluation.every=0"])
    stage = replace(recipe.stages[0], steps=count + 1)
    recipe = replace(recipe, data=DataSettings(train=str(folder)), stages=(stage,))
    model = CausalWan(recipe.model)
    waited, begin = 0.0, time.perf_counter()
    waiting = begin
    for step, batches in steps(recipe, open_datasets(recipe), 0, 0, 1):
        waited += time.perf_counter() - waiting
        if step == 0:  # nothing could be read ahead of it
            waited, begin = 0.0, time.perf_counter()
        train_step(recipe, model, batches)
        waiting = time.perf_counter()
    return waited / (time.perf_counter() - begin)


def train_step(recipe: Recipe, model: CausalWan, batches: list) -> None:
    """Forward and backward of a step, without an optimizer."""
    stage = recipe.stages[0]
    for batch in batches:
        history, _ = make_history(stage.history, batch, stage.attention, model)
        training_loss(model, batch, history, recipe.flow, stage.attention).loss.backward()
    model.zero_grad()


# ---- ten million samples


def many_samples(folder: Path, samples: int) -> tuple[float, int, int, float]:
    """Seconds to open a dataset, bytes of a process's own memory for it, bytes of its index, seconds of a resume."""
    folder.mkdir()
    sizes = [min(PER_SHARD, samples - begin) for begin in range(0, samples, PER_SHARD)]
    shards = [
        {"file": f"shard-{n:06d}-0000.tar", "samples": size, "bytes": 1 << 28, "sha256": f"{n:064x}"}
        for n, size in enumerate(sizes)
    ]
    rows = np.zeros(samples, ROW)
    rows["video"], rows["bytes"] = np.arange(samples), 1 << 22
    np.save(folder / INDEX, rows, allow_pickle=False)
    index_bytes = (folder / INDEX).stat().st_size
    index = {"file": INDEX, "bytes": index_bytes, "sha256": sha256_of_file(folder / INDEX)}
    card = random_card(WAN_LATENT, samples, shards, index)
    (folder / CARD).write_text(json.dumps({**card, "hash": card_hash(card)}))
    del rows, card, shards
    # In a process of its own, as a rank is: memory that it takes is all for the dataset.
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_open_many, args=(str(folder), samples, sender))
    process.start()
    sender.close()
    seconds, private, restore = receiver.recv()
    process.join()
    return seconds, private, index_bytes, restore


def _open_many(folder: str, samples: int, answer) -> None:  # type: ignore[no-untyped-def]
    before = _private_bytes()
    begin = time.perf_counter()
    dataset = LatentDataset(folder, wan_model())
    opened = time.perf_counter()
    dataset.samples_at(0, 10 * samples + samples // 2, 64)  # in the middle of the eleventh epoch
    answer.send((opened - begin, _private_bytes() - before, time.perf_counter() - opened))


def _private_bytes() -> int:
    """Resident memory of this process without what it shares with files, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():
        return 1024 * int(status.read_text().split("RssAnon:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
