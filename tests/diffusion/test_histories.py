"""The histories: rollouts against a literal, cache-free reading of Algorithm 1, and what every kind must declare."""

import math
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from rf_train.diffusion.batch import Batch
from rf_train.diffusion.histories import (
    Autoregressive,
    Clean,
    History,
    Mixed,
    Noise,
    Parallel,
    make_history,
)
from rf_train.diffusion.randomness import make_draws
from rf_train.model.chunks import Dense, ModelPass, Routed, Window
from tests.conftest import assert_close, random_batch, tiny_settings, tolerance

# (latent frames of the first chunk, of the clip); the other chunks have three.
CHUNKINGS = [
    pytest.param(3, 12, id="whole-chunks"),
    pytest.param(3, 8, id="partial-last-chunk"),
    pytest.param(3, 4, id="two-chunks"),
    pytest.param(1, 10, id="first-chunk-1"),
    pytest.param(1, 6, id="first-chunk-1-partial-last-chunk"),
    pytest.param(3, 3, id="single-chunk"),
    pytest.param(3, 2, id="single-partial-chunk"),
    pytest.param(1, 1, id="single-frame"),
]


def every_history() -> list[History]:
    """Every kind with its defaults, and with three solver steps where it has them."""
    found = []
    for cls in History.kinds.values():
        found.append(cls())
        if "solver_steps" in {field.name for field in fields(cls)}:
            found.append(cls(solver_steps=3))
    return found


every_history_and_id = pytest.mark.parametrize(
    "history", every_history(), ids=lambda history: f"{history.kind}-{getattr(history, 'solver_steps', 0)}"
)


class RecordingModel:
    """Stands for a model, and notes each pass."""

    def __init__(self, model):
        self.model, self.passes, self.caches = model, [], []
        self.settings, self.chunking, self.new_kv_cache = model.settings, model.chunking, model.new_kv_cache

    def __call__(self, *, noisy, history, noisy_chunk=0, kv_cache=None, **arguments):
        first_history = 0 if kv_cache is None else kv_cache.chunks_written
        noisy_chunks, history_chunks = (
            () if latent is None else self.chunking.chunks(latent.shape[2], begin)
            for latent, begin in ((noisy, noisy_chunk), (history, first_history))
        )
        if kv_cache is not None and all(kv_cache is not known for known in self.caches):
            self.caches.append(kv_cache)
        number = next((i for i, known in enumerate(self.caches) if known is kv_cache), None)
        self.passes.append(ModelPass(noisy_chunks, history_chunks, number))
        return self.model(noisy=noisy, history=history, noisy_chunk=noisy_chunk, kv_cache=kv_cache, **arguments)


class RecordingDraws(dict):
    """Random numbers by purpose. Notes which are read."""

    def __init__(self, draws: dict[str, Tensor]):
        super().__init__(draws)
        self.purposes_read: set[str] = set()

    def __getitem__(self, purpose: str) -> Tensor:
        self.purposes_read.add(purpose)
        return super().__getitem__(purpose)


def resample_all(batch: Batch) -> Batch:
    """The batch, with the draws that make a mixed history resample every clip."""
    choice = torch.zeros_like(batch.draws["history_choice"])
    return replace(batch, draws={**batch.draws, "history_choice": choice})


def batch_of_draws(ids: list[str], seed: int = 0, step: int = 3) -> Batch:
    """Empty clips of two chunks with the draws of a mixed history: enough to see what it chooses."""
    draws = make_draws(Mixed.draws, seed, step, ids, (1, 2, 1, 1), 2)
    return Batch(ids, torch.zeros(len(ids), 1, 2, 1, 1), torch.zeros(len(ids), 1, 1), draws, [1, 1])


# ---- what each kind makes


def literal_resampling(model, batch: Batch, t_shift: float, solver_steps: int, clean_history: bool) -> tuple:
    """Algorithm 1 as it is written: for each chunk the whole history is given again, and nothing is cached.

    With `clean_history` the history of each chunk is the truth. Returns (all chunks, t_s).
    """
    t_s = torch.sigmoid(batch.draws["t_s"])
    t_s = t_shift * t_s / (1 + (t_shift - 1) * t_s)
    level, made, begin = t_s.view(-1, 1, 1, 1, 1), [], 0
    for index, size in enumerate(batch.chunk_sizes):
        clean = batch.x[:, :, begin : begin + size]
        x_t = (1 - level) * clean + level * batch.draws["history_noise"][:, :, begin : begin + size]
        history = None
        if index:
            history = batch.x[:, :, :begin] if clean_history else torch.cat(made, dim=2)
        for step in range(solver_steps):
            t = (t_s * (1 - step / solver_steps))[:, None].expand(-1, size)
            v = model(noisy=x_t, t=t, history=history, text=batch.text, attention=Dense(), noisy_chunk=index)
            x_t = x_t - level / solver_steps * v
        made.append(x_t)
        begin += size
    return torch.cat(made, dim=2), t_s


@pytest.mark.parametrize("solver_steps", [1, 3])
@pytest.mark.parametrize("frames", [3, 6, 12, 11])
@torch.no_grad()
def test_autoregressive_history_is_algorithm_1(tiny_model, device, frames, solver_steps):
    model = tiny_model(device)
    batch = random_batch(model.settings, frames, device=device)
    ours, level = make_history(Autoregressive(solver_steps=solver_steps), batch, Dense(), model)
    literal, t_s = literal_resampling(model, batch, 0.6, solver_steps, clean_history=False)
    if frames == 3:
        assert ours is None and not level.any()  # nothing is made of a single chunk
    else:
        assert_close(level, t_s)
        assert (ours - literal[:, :, : ours.shape[2]]).abs().max() <= tolerance(device, 1e-5)
        assert (ours - batch.x[:, :, : ours.shape[2]]).abs().max() > 0.1


@pytest.mark.parametrize("solver_steps", [1, 3])
@torch.no_grad()
def test_parallel_history_resamples_each_chunk_after_the_truth(tiny_model, device, solver_steps):
    model = tiny_model(device, first_chunk=1)
    batch = random_batch(model.settings, 9, device=device)
    ours, level = make_history(Parallel(t_shift=2.0, solver_steps=solver_steps), batch, Dense(), model)
    literal, t_s = literal_resampling(model, batch, 2.0, solver_steps, clean_history=True)
    assert_close(level, t_s)
    assert (ours - literal[:, :, :7]).abs().max() <= tolerance(device, 1e-5)
    autoregressive, _ = make_history(Autoregressive(2.0, solver_steps), batch, Dense(), model)
    # The first chunk has no history.
    assert (ours[:, :, :1] - autoregressive[:, :, :1]).abs().max() <= tolerance(device, 1e-5)
    assert (ours[:, :, 1:] - autoregressive[:, :, 1:]).abs().max() > 1e-3


def test_clean_history_is_the_truth(device):
    batch = random_batch(tiny_settings(), 9, device=device)
    history, level = make_history(Clean(), batch, Dense(), None)
    assert torch.equal(history, batch.x[:, :, :6]) and level.tolist() == [0, 0]


def test_noise_history_is_the_truth_with_noise_of_the_drawn_level(device):
    batch = random_batch(tiny_settings(), 9, device=device)
    history, level = make_history(Noise(), batch, Dense(), None)
    assert torch.equal(level, batch.draws["history_level"]) and level.min() > 0
    share = level.view(-1, 1, 1, 1, 1)
    expected = (1 - share) * batch.x[:, :, :6] + share * batch.draws["history_noise"][:, :, :6]
    assert_close(history, expected)


# ---- what every kind declares


def test_the_kinds_by_name():
    """Recipes and checkpoints name them."""
    kinds = {name: cls for name, cls in History.kinds.items() if cls.__module__.startswith("rf_train.")}
    assert set(kinds) >= {"clean", "noise", "parallel", "autoregressive", "mixed"}
    assert all(cls.kind == name for name, cls in kinds.items())
    assert len({cls.label for cls in kinds.values()}) == len(kinds)


@every_history_and_id
@pytest.mark.parametrize("first_chunk, frames", CHUNKINGS)
@torch.no_grad()
def test_the_declared_passes_are_exactly_those_that_are_run(tiny_model, device, history, first_chunk, frames):
    """In order, each with its noisy and history chunks, and whether it reads a cache."""
    model = RecordingModel(tiny_model(device, first_chunk=first_chunk))
    batch = resample_all(random_batch(model.settings, frames, device=device))
    make_history(history, batch, Dense(), model)
    assert model.passes == history.rollout_passes(batch.chunk_sizes)


@pytest.mark.parametrize("attention", [Window(window=1), Window(window=1, sink=1), Routed(top_k=1)], ids=str)
@every_history_and_id
@torch.no_grad()
def test_the_passes_do_not_depend_on_the_attention(tiny_model, device, history, attention):
    model = RecordingModel(tiny_model(device))
    batch = resample_all(random_batch(model.settings, 14, device=device))
    make_history(history, batch, attention, model)
    assert model.passes == history.rollout_passes(batch.chunk_sizes)


@torch.no_grad()
def test_self_resampling_takes_one_pass_per_chunk(tiny_model, device):
    """N - 1 passes for N - 1 chunks: a pass denoises one chunk and writes the keys of the one before."""
    model = RecordingModel(tiny_model(device))
    make_history(Autoregressive(), random_batch(model.settings, 21, device=device), Dense(), model)
    lengths = [(sum(c.length for c in p.noisy), sum(c.length for c in p.history)) for p in model.passes]
    assert lengths == [(3, 0)] + [(3, 3)] * 5


@every_history_and_id
@pytest.mark.parametrize("first_chunk, frames", CHUNKINGS)
def test_a_rollout_is_needed_exactly_where_passes_are_declared(history, first_chunk, frames):
    batch = resample_all(random_batch(tiny_settings(first_chunk=first_chunk), frames))
    assert history.needs_rollout(batch) == bool(history.rollout_passes(batch.chunk_sizes))


@every_history_and_id
def test_without_a_rollout_no_model_is_needed(device, history):
    """Of 64 random micro-batches, those that need no rollout get their history without a model."""
    needed = []
    for step in range(64):
        batch = random_batch(tiny_settings(), 9, clips=1, step=step, device=device)
        needed.append(history.needs_rollout(batch))
        if not needed[-1]:
            made, level = make_history(history, batch, Dense(), None)
            assert made.shape == batch.x[:, :, :6].shape and level.shape == (1,)
    assert any(needed) == bool(history.rollout_passes([3, 3, 3]))


@every_history_and_id
@torch.no_grad()
def test_a_history_reads_exactly_the_draws_that_it_declares(tiny_model, device, history):
    model = tiny_model(device)
    batch = random_batch(model.settings, 9, device=device)
    draws = RecordingDraws(batch.draws)
    batch = replace(batch, draws=draws)
    history.needs_rollout(batch)
    make_history(history, batch, Dense(), model)
    assert draws.purposes_read == set(history.draws)


@pytest.mark.parametrize("kind, purpose", [(kind, draw) for kind, cls in History.kinds.items() for draw in cls.draws])
@torch.no_grad()
def test_a_missing_draw_is_an_error(tiny_model, kind, purpose):
    model = tiny_model()
    batch = random_batch(model.settings, 9)
    del batch.draws[purpose]
    with pytest.raises(KeyError, match=purpose):
        make_history(History.kinds[kind](), batch, Dense(), model)


@every_history_and_id
@torch.no_grad()
def test_only_a_history_that_says_so_is_the_clip_itself(tiny_model, device, history):
    """Planning counts no memory for it."""
    model = tiny_model(device)
    batch = random_batch(model.settings, 9, device=device)
    made, _ = make_history(history, batch, Dense(), model)
    assert (made.data_ptr() == batch.x.data_ptr()) == history.is_the_clip


@pytest.mark.parametrize(
    "history, message",
    [
        (Parallel(t_shift=0.0), "t_shift=.* must be positive"),
        (Autoregressive(t_shift=-1.0), "t_shift=.* must be positive"),
        (Autoregressive(solver_steps=0), "solver_steps=0 must be at least 1"),
        (Mixed(probability=1.5), r"probability=1.5 is not in \[0, 1\]"),
        (Mixed(probability=-0.1), r"probability=-0.1 is not in \[0, 1\]"),
        (Mixed(solver_steps=0), "solver_steps=0 must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(history, message):
    with pytest.raises(ValueError, match=message):
        history.validate()


# ---- mixed


@pytest.mark.parametrize("solver_steps", [1, 3])
@torch.no_grad()
def test_mixed_history_is_per_clip_the_truth_or_self_resampling(tiny_model, device, solver_steps):
    model = tiny_model(device)
    batch = random_batch(model.settings, 9, clips=8, device=device)
    resampled = batch.draws["history_choice"] < 0.5
    assert 0 < resampled.sum() < 8
    mixed, level = make_history(Mixed(solver_steps=solver_steps), batch, Dense(), model)
    autoregressive, t_s = make_history(Autoregressive(solver_steps=solver_steps), batch, Dense(), model)
    truth = batch.x[:, :, :6]
    assert torch.equal(mixed[~resampled], truth[~resampled]) and not level[~resampled].any()
    assert_close(mixed[resampled], autoregressive[resampled])
    assert torch.equal(level[resampled], t_s[resampled])
    assert ((autoregressive - truth).flatten(1).abs().amax(dim=1) > 0.1).all()


@pytest.mark.parametrize("probability, resampled", [(0.0, False), (1.0, True)])
@torch.no_grad()
def test_probability_0_never_resamples_and_1_always_does(tiny_model, device, probability, resampled):
    """For the smallest and the largest number that a uniform draw can be, too."""
    model, history = tiny_model(device), Mixed(probability=probability)
    batch = random_batch(model.settings, 9, device=device)
    batch.draws["history_choice"] = torch.tensor([0.0, 1 - 2**-24], device=device)
    assert batch.draws["history_choice"][1] < 1
    assert history.needs_rollout(batch) == resampled
    made, level = make_history(history, batch, Dense(), model if resampled else None)
    expected, expected_level = make_history(Autoregressive() if resampled else Clean(), batch, Dense(), model)
    assert torch.equal(made, expected) and torch.equal(level, expected_level)
    for step in range(100):
        assert history.needs_rollout(batch_of_draws(["a"], step=step)) == resampled


def test_mixed_needs_a_rollout_as_soon_as_one_clip_is_resampled():
    batch = random_batch(tiny_settings(), 9, clips=3)
    for choice, needed in (([0.9, 0.5, 0.7], False), ([0.9, 0.49, 0.7], True), ([0.1, 0.2, 0.3], True)):
        batch.draws["history_choice"] = torch.tensor(choice)
        assert Mixed(probability=0.5).needs_rollout(batch) == needed


def test_the_choice_of_mixed_depends_on_seed_step_and_sample_and_on_nothing_else():
    """The same clip is resampled from the same level in any micro-batch and at any place in it."""
    history, ids = Mixed(), [f"{index:06d}@0" for index in range(16)]

    def levels(seed: int = 0, step: int = 3, micro_batch: int = 16, names: list[str] = ids) -> dict[str, float]:
        found = {}
        for begin in range(0, len(names), micro_batch):
            batch = batch_of_draws(names[begin : begin + micro_batch], seed, step)
            found.update(zip(batch.ids, history.level(batch).tolist()))
        return found

    def choices(**changes) -> list[bool]:
        return [level > 0 for level in levels(**changes).values()]

    for micro_batch in (1, 2, 8):
        assert levels(micro_batch=micro_batch) == levels()
    assert levels(names=ids[::-1]) == levels()
    assert any(choices()) and not all(choices())
    for changes in ({"seed": 1}, {"step": 4}, {"names": [name.replace("@0", "@1") for name in ids]}):
        assert choices(**changes) != choices()


@pytest.mark.parametrize("probability", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("clips", [1, 4])
def test_the_rollout_probability_of_mixed_is_the_share_of_batches_that_need_one(probability, clips):
    history, batches = Mixed(probability=probability), 400
    ids = [f"s{index}" for index in range(clips)]
    share = sum(history.needs_rollout(batch_of_draws(ids, step=step)) for step in range(batches)) / batches
    expected = history.rollout_probability(clips)
    assert abs(share - expected) <= 3 * math.sqrt(expected * (1 - expected) / batches)


def test_a_history_that_always_rolls_out_has_probability_1():
    assert Autoregressive().rollout_probability(1) == Parallel().rollout_probability(3) == 1
