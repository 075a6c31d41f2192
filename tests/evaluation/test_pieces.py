"""An evaluation in pieces: the same bytes however the work was shared and interrupted; and prompts without a truth."""

import numpy as np
import pytest
import torch

from rf_train.data.latent_dataset import LatentDataset
from rf_train.engine.shared_work import held
from rf_train.evaluate import make_pieces
from rf_train.evaluation.evaluation import Evaluation
from rf_train.evaluation.long_videos import SEEDS_APART, LongVideos, summary
from rf_train.evaluation.pieces import PREVIOUS, RESULT, Pieces
from rf_train.evaluation.prompted import PromptedVideos
from rf_train.evaluation.text_agreement import TextAgreement
from rf_train.evaluation.video_metrics import VIDEO_METRICS
from rf_train.generation.generator import Generator
from rf_train.generation.prompts import seed_of
from rf_train.generation.stream import stream
from tests.conftest import CPU
from tests.evaluation.test_long_videos import rows_of

ROUTED = {"kind": "routed", "top_k": 1}


def of_clips(generator: Generator, samples: int = 2) -> Evaluation:
    """Three clips of nine latent frames, the first three of which are given; segments of four."""
    dataset = LatentDataset(generator.dataset, generator.recipe.model)
    videos = LongVideos(dataset, generator.codec, clips=3, given=3, trained=4, seed=7)
    return Evaluation(generator, videos, samples, 2, 1, lambda: {"solver": [0.5]})


def finished(evaluation: Evaluation, pieces: Pieces) -> bytes:
    with pieces.entered():
        make_pieces(evaluation, pieces, 0, 1)
        pieces.finish(evaluation.result(pieces.whole()))
    return (pieces.out / RESULT).read_bytes()


def test_the_work_may_be_shared_and_interrupted_in_any_way(tiny_generator, tmp_path, monkeypatch):
    evaluation = of_clips(tiny_generator(ROUTED, chunk=1, first_chunk=1))
    names = ["000-00000", "000-00002", "001-00000", "001-00002", "history"]
    assert evaluation.names == names
    whole = finished(evaluation, Pieces(tmp_path / "whole", {}, names))
    assert b'"by_distance"' in whole  # routing's choices are added up
    assert {path.name for path in (tmp_path / "whole").iterdir()} == {
        RESULT, ".locks", "clip-000.mp4", "truth-000.mp4",
    }  # fmt: skip

    pieces, killed = Pieces(tmp_path / "parts", {}, names), []
    original = Pieces.add

    def add(self, name, piece):
        killed.append(name)
        if len(killed) == 2:
            raise KeyboardInterrupt
        original(self, name, piece)

    monkeypatch.setattr(Pieces, "add", add)
    with pytest.raises(KeyboardInterrupt), pieces.entered():
        make_pieces(evaluation, pieces, 0, 1)
    monkeypatch.undo()
    assert [name for name in names if pieces.read(name)] == names[:1]
    with pieces.entered(), held(pieces.locks / names[3]):  # another process makes this one
        assert make_pieces(evaluation, pieces, 1, 2) == 3
    (pieces.folder / f"{names[2]}.json").write_text('{"rows": [')  # no write of ours
    made = []
    monkeypatch.setattr(Pieces, "add", lambda self, name, piece: made.append(name) or original(self, name, piece))
    assert finished(evaluation, pieces) == whole and made == names[2:4]
    monkeypatch.undo()
    assert not list(pieces.missing(1, 2))  # a rank that comes late finds nothing to do


def test_another_evaluation_waits_for_its_turn_and_begins_anew(tmp_path):
    ours, other = (Pieces(tmp_path, {"request": n}, ["a"]) for n in (1, 2))
    with ours.entered():
        ours.add("a", {"rows": []})
        with pytest.raises(ValueError, match="another evaluation is being made in this folder"), other.entered():
            pass
        with ours.entered():  # a second rank joins
            assert ours.read("a") == {"rows": []}
    (tmp_path / RESULT).touch()
    with other.entered():
        assert other.read("a") is None and not (tmp_path / RESULT).exists() and (tmp_path / PREVIOUS).exists()


def test_samples_of_a_clip_have_seeds_of_their_own_and_count_as_one_clip(tiny_generator):
    videos = of_clips(tiny_generator()).videos
    rows = [next(videos.continued(tiny_generator().chunks, [1], sample))[0] for sample in (0, 1)]
    assert [row["seed"] for row in rows] == [8, 8 + SEEDS_APART] and rows[0]["clip"] == rows[1]["clip"]
    assert rows[0]["segments"] != rows[1]["segments"]
    found = summary(rows_of([[1.0], [3.0], [3.0], [7.0]]), 1, samples=2)  # clip 0: 1 and 3; clip 1: 3 and 7
    assert found["metrics"]["psnr"] == [{"mean": 3.5, "std": pytest.approx(1.5 * 2**0.5)}]


def test_videos_of_prompts_are_compared_with_their_own_first_segment(tiny_generator, tiny_clip):
    generator, agreement = tiny_generator(), TextAgreement(tiny_clip, CPU)
    prompts = ["a red cross", "0: a red cross | 1: a blue disc"]
    videos = PromptedVideos(generator, prompts, 2.0, trained=4, seed=3, agreement=agreement)
    (row, frames), (changed_row, changed) = videos.made([0, 1], 0)
    assert row["prompt"] == prompts[0] and row["seed"] == seed_of(3, prompts[0], 0)
    alone = torch.cat([torch.from_numpy(part) for part in stream(generator, "a red cross", 2.0, row["seed"])])
    assert (torch.from_numpy(frames)[: len(alone)].int() - alone.int()).abs().max() <= 1
    first, second = row["segments"]
    for name in ("contrast", "sharpness", "motion", "flicker"):
        assert first[name] == 1.0 != second[name]
    assert first["exposure"] == 0.0 and first["colour_drift"] < 1e-6 < 1e-3 < second["colour_drift"]
    unknown = {metric.name for metric in VIDEO_METRICS if metric.needs_truth}
    assert unknown == {"colour_distance", "psnr", "latent_mse", "text_gap"}
    assert all(segment[name] is None for segment in row["segments"] for name in unknown)
    # Chunks begin at 0, 9 / 16 and 21 / 16 s; the last one is the first that begins at 1 s or later.
    texts = ["a red cross"] * 21 + ["a blue disc"] * (len(changed) - 21)
    expected = agreement.of_frames(changed, texts, 16)[13:]
    assert changed_row["segments"][1]["text_agreement"] == pytest.approx(np.nanmean(expected), abs=1e-6)
    with pytest.raises(ValueError, match="is never shown"):
        PromptedVideos(generator, ["0: a | 5: b"], 2.0, trained=4)
