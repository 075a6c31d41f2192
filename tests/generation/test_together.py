"""Ranks that make a video together make the one that a single rank makes, each with a share of heads and caches."""

import json
from dataclasses import replace

import pytest
import torch

from rf_train.config import from_dict
from rf_train.diffusion.sampling import VideoRequest, sample_chunks
from rf_train.engine.inference import check_split, inference_model, split_model, start_video_ranks
from rf_train.generation.generator import Generator, make_generator
from rf_train.generation.many import make_batches, open_job
from rf_train.generation.memory import BatchPlan, memory_needed
from rf_train.generation.prompts import Prompts
from rf_train.generation.stream import Videos
from rf_train.model.chunks import Dense, RoutedWithin, Window, WindowWithin
from rf_train.model.transformer import CausalWan
from tests.conftest import CPU, plain_settings, randomise, tiny_settings
from tests.distributed import run_distributed
from tests.generation.conftest import MODEL

ATTENTIONS = (
    Dense(),
    Window(window=2),
    WindowWithin(window=1, sink=1, farthest_sink=2),
    RoutedWithin(top_k=1, sink=1, reach=3, farthest_sink=3),
)
PROMPTS = ["a red cross", "a blue disc", "a boat"]


def generators(dataset: str, split: bool) -> tuple[Generator, Generator]:
    """(of this process alone, of two ranks), with the same weights."""
    together = start_video_ranks(2)
    plain = {
        "model": plain_settings(**MODEL, chunk=1, first_chunk=1, layers=6),
        "data": {"train": dataset},
        "flow": {"sampling_steps": 2, "guidance": 2.0},
        "stages": [{"attention": {"kind": "window", "window": 2, "sink": 1}}],
    }
    recipe = from_dict(plain)
    alone = CausalWan(recipe.model)
    randomise(alone)
    weights = {name: parameter.detach for name, parameter in alone.named_parameters()}
    if split:
        model, engine = split_model(recipe.model, together, weights)
    else:
        model, engine = inference_model(recipe.model, CPU, weights), None
    model.sequence_parallel = together.ulysses
    shared = replace(make_generator(recipe, model, 1, CPU), together=together, engine=engine)
    return make_generator(recipe, alone, 1, CPU), shared


def gathered_bytes(model: CausalWan) -> int:
    status = [(getattr(p, "ds_status", None), p) for p in model.parameters()]
    return sum(p.ds_numel * p.element_size() for status, p in status if status and status.name != "NOT_AVAILABLE")


def compared_on_this_rank(dataset: str, split: bool) -> dict:
    alone, shared = generators(dataset, split)
    latents, caches = {}, []
    new_cache = shared.model.new_kv_cache
    shared.model.new_kv_cache = lambda *rest: caches.append(new_cache(*rest)) or caches[-1]
    texts = alone.embed(["a red cross", "a blue disc"])
    for generator in (alone, shared):
        request = VideoRequest.like(generator.card, generator.recipe.model, CPU, texts, 8, [1, 2])
        for attention in ATTENTIONS:
            chunks = sample_chunks(generator.velocity, request, generator.recipe.flow, attention, True)
            latents.setdefault(type(attention).__name__, []).append(torch.cat(list(chunks), dim=2))
    needed, of_one = (memory_needed(generator, 10**6) for generator in (shared, alone))
    caches.clear()
    whole: list[int] = []  # bytes of split weights that are whole when a block begins
    for block in shared.model.blocks:
        block.register_forward_pre_hook(lambda *_: whole.append(gathered_bytes(shared.model)))
    typed = iter([None, "a green cross"])
    live = (lambda: next(typed, None)) if shared.leads else (lambda: None)
    videos = Videos(shared, [Prompts.of("a red cross")], [3], 3, live=live)
    shown = torch.cat(list(videos.latents()), dim=2)
    text = sum(part.nbytes for cache in caches for layer in cache.layers for part in layer.text)
    kept = {name: tuple(parameter.shape) for name, parameter in shared.model.named_parameters()}
    return {
        "differences": {name: (a - b).abs().max().item() for name, (a, b) in latents.items()},
        "planned": needed.caches, "kept": sum(cache.bytes for cache in caches) + text, "of one": of_one.caches,
        "text": text, "passes": [of_one.passes, needed.passes], "gathered": needed.gathered,
        "whole": max(whole),
        "empty": all(shape == (0,) for shape in kept.values()), "shown": shown.double().sum().item(),
        "lines": needed.lines(needed.plan(1)),
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("split", [False, True], ids=["whole weights", "split weights"])
def test_the_video_is_the_same_and_caches_are_divided(decodable_dataset, split):
    results = run_distributed(compared_on_this_rank, 2, dataset=str(decodable_dataset), split=split)
    for found in results:
        assert len(found["differences"]) == 4 and max(found["differences"].values()) <= 2e-5, found
        assert found["kept"] == found["planned"] and found["empty"] == split
        assert 2 * (found["planned"] - found["text"]) == found["of one"] - found["text"]
        assert found["passes"][0] == 2 * found["passes"][1] and (found["gathered"] > 0) == split
        assert found["whole"] <= found["gathered"] and (found["whole"] > 0) == split
        assert "on each of 2 ranks" in found["lines"] and ("of gathered weights" in found["lines"]) == split
    assert results[0]["shown"] == results[1]["shown"]  # what is typed reaches every rank


def many_on_this_rank(dataset: str, out: str) -> int:
    _, shared = generators(dataset, False)
    job = shared.tell(lambda: open_job(out, {}, PROMPTS, 1, 0, BatchPlan(2, False)))
    made = make_batches(job, Videos(shared, [], [], 1.0), 0, 1)
    shared.together.end()
    return made


@pytest.mark.slow
def test_many_prompts_are_made_once_by_the_leader_and_again_where_they_are_missing(decodable_dataset, tmp_path):
    about = {"dataset": str(decodable_dataset), "out": str(tmp_path / "out")}
    assert run_distributed(many_on_this_rank, 2, **about) == [3, 0]
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.mp4")}
    assert sorted(files) == ["00000-0.mp4", "00001-0.mp4", "00002-0.mp4"]
    assert [video["prompt"] for video in json.loads((tmp_path / "out/job.json").read_text())["videos"]] == PROMPTS
    (tmp_path / "out/00001-0.mp4").unlink()
    assert run_distributed(many_on_this_rank, 2, **about) == [1, 0]
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.mp4")} == files


def test_heads_and_tokens_must_split_evenly():
    check_split(tiny_settings(heads=12, dim=96), 6, 3)
    for heads, tokens, what in ((2, 6, "the 2 heads"), (12, 7, "the 7 tokens of a latent frame")):
        with pytest.raises(ValueError, match=f"--sequence-parallel 3: {what} don't split evenly over 3 ranks"):
            check_split(tiny_settings(heads=heads, dim=96), tokens, 3)
