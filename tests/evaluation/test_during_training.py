"""Evaluation during training: it measures the average, the same on any number of ranks, and changes nothing."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.geometry import WAN_2_1
from rf_train import config, train
from rf_train.config import Recipe
from rf_train.data.batches import open_datasets
from rf_train.diffusion.sampling import VideoRequest, count_passes, sample_chunks
from rf_train.engine import checkpoint
from rf_train.engine.stopping import Stop, Stopped
from rf_train.evaluation import during_training
from rf_train.evaluation.long_videos import LongVideos, summary
from rf_train.model.chunks import Window
from rf_train.model.transformer import CausalWan
from rf_train.run_log import read_rows
from tests.conftest import random_clip, tiny_settings
from tests.distributed import run_distributed
from tests.engine.runs import assert_close, assert_same_state, recipe_dict, train_on_this_rank

CLIPS = 3  # not a multiple of the ranks


class PlainCodec:
    """Three latent channels are shown as red, green and blue."""

    geometry = WAN_2_1

    def decode(self, latent: np.ndarray) -> np.ndarray:
        pixels = (255 / (1 + np.exp(-latent[:3]))).astype(np.uint8).repeat(8, axis=2).repeat(8, axis=3)
        return np.concatenate([pixels[:, :1], pixels[:, 1:].repeat(4, axis=1)], axis=1).transpose(1, 2, 3, 0)


def evaluated_recipe(data: Path, out: Path, every: int, **run) -> dict:
    """Eight steps, two stages; the first one's clips are shorter, the second one is routed."""
    recipe = recipe_dict(data, out, save_every=4, keep=9, **run)
    first, second = recipe["stages"][0], recipe["stages"][4]
    recipe["stages"] = [{**first, "steps": 4, "warmup": 0, "frames": 6}, {**second, "steps": 4}]
    recipe["flow"]["sampling_steps"] = 2
    recipe["data"]["evaluation"] = str(data / "long")
    recipe["evaluation"] = {"every": every, "clips": CLIPS, "given_chunks": 1}
    return recipe


def train_with_plain_codec(recipe: dict) -> None:
    during_training.dataset_codec = lambda *_: PlainCodec()
    train_on_this_rank(recipe)


def train_and_stop_in_an_evaluation(recipe: dict) -> str:
    """Rank 1 is asked to stop while the evaluation after step 4 is under way. Returns how the training ended."""
    during_training.dataset_codec = lambda *_: PlainCodec()
    stop, real, chunks = Stop(), during_training.sample_chunks, []

    def asked(*arguments):
        for chunk in real(*arguments):
            chunks.append(chunk)
            if len(chunks) == 2 and os.environ["RANK"] == "1":
                stop.reason = signal.SIGTERM
            yield chunk

    during_training.sample_chunks = asked
    try:
        train.train(config.from_dict(recipe), stop)
    except Stopped as error:
        return f"{error}, {len(chunks)} chunks"
    return "finished"


def evaluations(run: Path) -> dict[int, dict]:
    return {row["step"]: row["evaluation"] for row in read_rows(run / "metrics.jsonl") if "evaluation" in row}


def evaluated_here(recipe: Recipe, step: int, window: int) -> dict[str, list]:
    """The metrics of the average that was saved after `step`, made in this process without an engine."""
    datasets = open_datasets(recipe)
    dataset = datasets[recipe.data.evaluation]
    model = CausalWan(recipe.model)
    model.load_state_dict(checkpoint.read_weights(checkpoint.at_step(Path(recipe.run.out), step)))

    def sampler(texts, frames, seeds, given):
        request = VideoRequest.like(dataset.card, recipe.model, torch.device("cpu"), texts, frames, seeds, given)
        return sample_chunks(model, request, recipe.flow, Window(window=window))

    videos = LongVideos(dataset, PlainCodec(), clips=CLIPS, given=3, trained=14)
    rows = [row for index in range(CLIPS) for row, _ in videos.continued(sampler, [index])]
    found = summary(rows, len(videos.spans))
    return {"frechet": found["frechet"], **{n: [c["mean"] for c in cells] for n, cells in found["metrics"].items()}}


@pytest.mark.parametrize(
    "run",
    [
        {},
        pytest.param({"gather_for_rollout": False}, marks=pytest.mark.slow),
        {"deepspeed": "ds_configs/zero2.json"},
        pytest.param({"precision": "bf16"}, marks=pytest.mark.slow),
    ],
    ids=["zero3", "no gather", "zero2", "bf16"],
)
def test_it_measures_the_average_and_leaves_the_run_as_it_was(plain_run, tmp_path, run):
    for name, every in (("with", 4), ("without", 0)):
        recipe = evaluated_recipe(plain_run.data, tmp_path / name, every, **run)
        run_distributed(train_with_plain_codec, 2, recipe=recipe)
    ours, theirs = (read_rows(tmp_path / name / "metrics.jsonl") for name in ("with", "without"))
    assert [(row["loss"], row["grad_norm"]) for row in ours] == [(row["loss"], row["grad_norm"]) for row in theirs]
    assert_same_state(tmp_path / "with", tmp_path / "without")
    found = evaluations(tmp_path / "with")
    assert list(found) == [4, 8] and not evaluations(tmp_path / "without")
    if "precision" in run:
        return
    assert not found[4]["routing"] and len(found[8]["routing"]["by_distance"]) == 4  # five chunks
    # The first stage saw one earlier chunk.
    recipe = config.from_dict(evaluated_recipe(plain_run.data, tmp_path / "with", 4))
    expected = evaluated_here(recipe, 4, window=1)
    assert found[4]["clips"] == CLIPS and found[4]["segments_seconds"] == [[9 / 16, 53 / 16]]
    for name, values in expected.items():
        assert_close([v for v in found[4][name] if v is not None], [v for v in values if v is not None], 1e-3)
    assert found[8]["psnr"] != found[4]["psnr"]


@pytest.mark.slow
@pytest.mark.parametrize("run", [{}, {"deepspeed": "ds_configs/zero2.json"}], ids=["zero3", "zero2"])
def test_a_run_that_is_asked_to_stop_does_not_evaluate_to_the_end(plain_run, tmp_path, run):
    for name, stopping in (("stopped", True), ("not stopped", False)):
        recipe = evaluated_recipe(plain_run.data, tmp_path / name, 4, **run)
        if stopping:
            told = run_distributed(train_and_stop_in_an_evaluation, 2, recipe=recipe)
            assert told[0] == told[1] and told[0].startswith("stopped by SIGTERM after step 4;")
            assert told[0].endswith(", 2 chunks")
        run_distributed(train_with_plain_codec, 2, recipe=recipe)
    assert list(evaluations(tmp_path / "stopped")) == [8]
    assert_same_state(tmp_path / "stopped", tmp_path / "not stopped")


def test_the_result_does_not_depend_on_the_number_of_ranks(plain_run, tmp_path):
    found = {}
    for ranks in (1, 2):
        recipe = evaluated_recipe(plain_run.data, tmp_path / str(ranks), 8)
        run_distributed(train_with_plain_codec, ranks, recipe=recipe)
        found[ranks] = evaluations(tmp_path / str(ranks))[8]
    for name in ("psnr", "sharpness", "frechet"):
        assert_close(found[1][name], found[2][name], 1e-3)


@pytest.mark.parametrize("given, guidance", [(0, 1.0), (3, 1.0), (6, 2.0)])
def test_the_passes_of_a_video_are_counted(tiny_model, given, guidance):
    model, passes = tiny_model(), []
    model.register_forward_hook(lambda *_: passes.append(1))
    recipe = config.from_dict({"flow": {"sampling_steps": 2, "guidance": guidance}, "stages": [{}]})
    x, _, text = random_clip(14)
    request = VideoRequest(text, text, [0], 14, *x.shape[-2:], given=x[:, :, :given] if given else None)
    list(sample_chunks(model, request, recipe.flow, Window(window=2)))
    assert len(passes) == count_passes(tiny_settings().chunking, recipe.flow, 14, given)


def test_a_recipe_that_evaluates_needs_clips_for_it():
    with pytest.raises(ValueError, match=r"and data\.evaluation is empty"):
        config.from_dict({"evaluation": {"every": 5}, "stages": [{}]})
