"""Text agreement is what transformers' CLIP says of each frame and the prompt of its time. The weights are random."""

import shutil

import numpy as np
import pytest
import torch

from rf_train.evaluation.text_agreement import GROUP, TextAgreement
from rf_train.evaluation.video_metrics import Segment, VideoPair, compare
from tests.conftest import CPU


def video(frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, 32, 48, 3), dtype=np.uint8)


def test_it_is_what_transformers_computes(tiny_clip):
    """Of each frame alone, with logits that are divided by their scale."""
    from transformers import AutoProcessor, CLIPModel

    model, processor = CLIPModel.from_pretrained(tiny_clip), AutoProcessor.from_pretrained(tiny_clip)
    frames = video(8 * (GROUP + 2))
    prompts = ["a red cross"] * 60 + ["a blue square, far away"] * (len(frames) - 60)
    found = TextAgreement(tiny_clip, CPU).of_frames(frames, prompts, fps=16)
    assert np.flatnonzero(~np.isnan(found)).tolist() == list(range(0, len(frames), 8))
    for n in range(0, len(frames), 8):
        inputs = processor(text=[prompts[n]], images=[frames[n]], return_tensors="pt")
        with torch.no_grad():
            logit = model(**inputs).logits_per_image.item()
        assert found[n] == pytest.approx(logit / model.logit_scale.exp().item(), abs=1e-5)
    other = TextAgreement(tiny_clip, CPU).of_frames(frames, ["a red cross"] * len(frames), fps=16)
    assert np.array_equal(found[:60], other[:60], equal_nan=True) or np.nanmax(np.abs(found[:60] - other[:60])) < 1e-6
    assert np.nanmin(np.abs(found[64:] - other[64:])) > 1e-3  # the prompt of the time counts


def test_a_prompt_that_is_too_long_is_cut(tiny_clip):
    agreement, frames, words = TextAgreement(tiny_clip, CPU), video(1), "a red cross " * 20
    cut, longer = (agreement.of_frames(frames, [text], 16) for text in (words, words + "moving"))
    assert cut == longer


def test_the_metrics_are_means_over_the_frames_that_were_looked_at():
    latents, frames, nan = np.zeros((1, 4, 1, 1)), video(4), np.nan
    texts = np.array([0.1, nan, 0.3, nan]), np.array([0.2, nan, 0.2, nan])
    pair = VideoPair(frames, frames, latents, latents, 1, text_made=texts[0], text_true=texts[1])
    found = compare(Segment(pair, slice(0, 4), slice(0, 4)))
    assert found["text_agreement"] == pytest.approx(0.2) and found["text_gap"] == pytest.approx(0.0)
    found = compare(Segment(pair, slice(1, 3), slice(1, 3)))
    assert found["text_agreement"] == pytest.approx(0.3) and found["text_gap"] == pytest.approx(0.1)
    assert compare(Segment(pair, slice(3, 4), slice(3, 4)))["text_agreement"] is None
    first = Segment(pair, slice(0, 2), slice(0, 2))
    found = compare(Segment(pair, slice(2, 4), slice(2, 4), first))
    assert found["text_agreement"] == pytest.approx(0.3) and found["text_gap"] is None and found["psnr"] is None
    without = VideoPair(frames, frames, latents, latents, 1)
    assert compare(Segment(without, slice(0, 4), slice(0, 4)))["text_agreement"] is None


def test_a_folder_that_is_no_whole_clip_is_refused(tiny_clip, tmp_path):
    from safetensors.torch import load_file, save_file

    def broken(name: str):
        return shutil.copytree(tiny_clip, tmp_path / name)

    (broken("pickled") / "model.safetensors").rename(tmp_path / "pickled/pytorch_model.bin")
    (broken("cut") / "model.safetensors").write_bytes((tiny_clip / "model.safetensors").read_bytes()[:5000])
    (broken("no words") / "tokenizer.json").unlink()
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "no words" / name).unlink()
    (broken("no pictures") / "processor_config.json").unlink()
    weights = load_file(broken("partial") / "model.safetensors")
    weights.pop("visual_projection.weight")
    save_file(weights, tmp_path / "partial/model.safetensors", metadata={"format": "pt"})
    (broken("another") / "config.json").write_text('{"model_type": "bert"}')
    for name, says in (
        ("nothing", "no CLIP here"),
        ("pickled", "no CLIP here"),
        ("cut", "CLIP does not load"),
        ("no words", "no CLIP here"),
        ("no pictures", "CLIP does not load"),
        ("partial", r"its weights have no visual_projection.weight \(1 are absent\)"),
        ("another", "not a whole CLIP|CLIP does not load"),
    ):
        with pytest.raises(ValueError, match=f"{name}.*{says}") as caught:
            TextAgreement(tmp_path / name, CPU)
        assert "\n" not in str(caught.value)
