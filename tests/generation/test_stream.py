"""Streaming: chunks as they are made are the whole video; prompts by time; memory that does not grow."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from data_prep.video import read_frames
from rf_train.generation.memory import Memory, memory_needed
from rf_train.generation.prompts import Prompts
from rf_train.generation.stream import ENDLESS, Videos, stream, write

ROUTED, WINDOW = {"kind": "routed", "top_k": 1}, {"kind": "window", "window": 1, "sink": 1}


@pytest.mark.parametrize("attention", ["dense", WINDOW, ROUTED], ids=str)
def test_the_streams_frames_are_those_of_the_whole_latent_decoded(tiny_generator, attention):
    generator = tiny_generator(attention, {"guidance": 2.0})
    video = stream(generator, "a red cross", seconds=5, seed=3)
    pieces = list(video)
    latent = torch.cat(list(generator.chunks(generator.embed(["a red cross"]), 21, [3])), dim=2)[0]
    assert [len(piece) for piece in pieces] == [9, *[12] * 5, 11] and video.chunk_count == len(pieces)
    made, whole = np.concatenate(pieces).astype(int), generator.codec.decode(latent)[:80]
    assert np.abs(made - whole).max() <= 1  # guidance in one batch adds in another order


def test_a_chunk_is_handed_out_before_the_next_one_is_made(tiny_generator):
    generator, passes = tiny_generator(), []
    generator.model.register_forward_hook(lambda *_: passes.append(1))
    video = iter(Videos(generator, [Prompts.of("a")], [0], ENDLESS).chunks())
    assert [frames.shape for frames in next(video)] == [(9, 32, 48, 3)] and len(passes) == 4
    next(video)
    assert len(passes) == 8


def test_videos_made_together_are_those_made_alone(tiny_generator):
    generator = tiny_generator()
    both = Videos(generator, [Prompts.of("a red cross"), Prompts.of("a blue square")], [1, 2], 2)
    together = [np.concatenate(parts) for parts in zip(*both.chunks())]
    for row, made in enumerate(together):
        alone = np.concatenate(list(stream(generator, *both.prompts[row].texts, seconds=2, seed=both.seeds[row])))
        assert np.abs(made.astype(int) - alone).max() <= 1
    assert not np.array_equal(*together)


def test_the_file_appears_when_it_is_whole(tiny_generator, tmp_path):
    video, path = stream(tiny_generator(), "a", seconds=1), tmp_path / "out.mp4"

    def interrupted():
        yield next(iter(video))
        assert not path.exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(interrupted(), path, video.fps)
    assert list(tmp_path.iterdir()) == []
    assert write(video, path, video.fps) == 16 == len(list(read_frames(path, 16)))


def test_a_prompt_holds_from_the_chunk_that_begins_at_or_after_its_time(tiny_generator):
    """Chunks begin at frames 0, 9, 21, 33: 1.4 s is frame 22, so the chunk from frame 33 on is the first to change."""
    generator = tiny_generator()
    plain, changed, other = (
        np.concatenate(list(stream(generator, prompt, seconds=4)))
        for prompt in ("a red cross", ["0: a red cross", "1.4: a blue square"], ["0: a red cross", "1.4: a green disc"])
    )
    assert np.array_equal(plain[:33], changed[:33]) and np.array_equal(changed[:33], other[:33])
    assert not np.array_equal(plain[33:45], changed[33:45]) and not np.array_equal(changed[33:45], other[33:45])


def test_a_prompt_typed_while_the_video_goes_on_changes_it(tiny_generator):
    generator, typed = tiny_generator(), iter([None, None, "a green disc", None])
    live = Videos(
        generator, [Prompts.of("a red cross")], [0], ENDLESS, guidance_in_one_batch=True,
        live=lambda: next(typed, None),
    )  # fmt: skip
    chunks = live.chunks()
    made = np.concatenate([next(chunks)[0] for _ in range(4)])
    timed = np.concatenate(list(stream(generator, ["0: a red cross", "1.3: a green disc"], seconds=45 / 16)))
    plain = np.concatenate(list(stream(generator, "a red cross", seconds=45 / 16)))
    assert np.array_equal(made, timed) and not np.array_equal(made, plain)
    with pytest.raises(ValueError, match=r'"2.5: b" is never shown: the last chunk of the video begins at 2\.0'):
        stream(generator, ["0: a", "2.5: b"], seconds=45 / 16)


def test_numbers_that_are_not_finite_are_no_video(tiny_generator, tmp_path):
    video = stream(tiny_generator(flow={"guidance": 1e39}), "a", seconds=1)
    with pytest.raises(ValueError, match=r"chunk 0 \(at 0 s\) has numbers that are not finite.*flow.guidance"):
        write(video, tmp_path / "out.mp4", video.fps)
    assert not list(tmp_path.iterdir())


def test_a_negative_prompt_takes_the_empty_captions_place(tiny_generator):
    guided, unguided = tiny_generator(flow={"guidance": 3.0}), tiny_generator(flow={"guidance": 1.0})
    empty, other, own, alone = (
        torch.cat(list(Videos(generator, [Prompts.of("a cross")], [0], 1, negative).latents()), dim=2)
        for generator, negative in [(guided, ""), (guided, "a disc"), (guided, "a cross"), (unguided, "")]
    )
    assert (own - alone).abs().max() < 1e-4  # led away from the prompt itself: v + 3 (v - v)
    assert min((empty - alone).abs().max(), (empty - other).abs().max()) > 1e-3


@pytest.mark.parametrize("attention", ["dense", WINDOW, ROUTED], ids=str)
def test_what_is_kept_does_not_grow_with_the_video(tiny_generator, attention):
    """The caches' real bytes are those planned, and the same for any video that is longer than the training clips."""
    generator, caches = tiny_generator(attention, {"guidance": 2.0}), []
    new_cache = generator.model.new_kv_cache
    generator.model.new_kv_cache = lambda *rest: caches.append(new_cache(*rest)) or caches[-1]
    needed = [memory_needed(generator, frames) for frames in (13, 10**9)]
    assert needed[0].caches == needed[1].caches and needed[0].branches == 2
    list(stream(generator, "a", seconds=4))
    text = sum(part.nbytes for cache in caches for layer in cache.layers for part in layer.text)
    assert sum(cache.bytes for cache in caches) + text == needed[0].caches


def test_the_batch_comes_from_what_is_free():
    memory = Memory(caches=10, decoder=5, passes=20, branches=2, free=1000)
    assert (memory.of_video(True), memory.of_video(False)) == (55, 35)
    plans = {free: replace(memory, free=free).plan() for free in (1000, 140, 50)}
    assert [(plan.videos, plan.guidance_in_one_batch) for plan in plans.values()] == [(4, True), (2, True), (1, False)]
    assert replace(memory, free=140).plan(3).guidance_in_one_batch is False
    assert replace(memory, free=1000, branches=1).plan().guidance_in_one_batch is False
    with pytest.raises(
        ValueError, match=r"2 video\(s\) at once need about 0.00 MiB, 0.00 MiB are free: take a smaller"
    ):
        replace(memory, free=60).plan(2)
