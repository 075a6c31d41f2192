"""What is measured in a step: every metric against plain NumPy, over micro-steps and ranks, without broken clips."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rf_train.diffusion.batch import Batch
from rf_train.diffusion.loss import VelocityLoss
from rf_train.engine.collectives import start_ranks
from rf_train.metrics import METRICS, MicroStepResult, StepMetrics
from tests.distributed import run_distributed
from tests.step_results import SIZES, one_rank, random_result


@pytest.fixture(autouse=True)
def group():
    with one_rank():
        yield


# ---- the metrics in NumPy, of all clips of a step


def all_clips(results: list[MicroStepResult], name: str) -> np.ndarray:
    """One tensor of the results, micro-batch after micro-batch, in fp64."""
    return np.concatenate([getattr(result, name).double().numpy() for result in results])


def error_by_chunk(results: list[MicroStepResult]) -> np.ndarray:
    x, history = all_clips(results, "x"), all_clips(results, "history")
    found, begin = [], 0
    for size in SIZES[:-1]:
        part = slice(begin, begin + size)
        square = (history[:, :, part] - x[:, :, part]) ** 2
        found.append(np.mean(np.sqrt(square.mean(axis=(1, 2, 3, 4)))))
        begin += size
    return np.array(found)


def loss_by_level(results: list[MicroStepResult]) -> list[float | None]:
    t, loss = all_clips(results, "t"), all_clips(results, "loss_by_chunk")
    bins = np.minimum(np.floor(10 * t), 9)
    return [loss[bins == n].mean() if (bins == n).any() else None for n in range(10)]


def resampled_levels(results: list[MicroStepResult]) -> np.ndarray:
    levels = all_clips(results, "history_level")
    return levels[levels > 0]


EXPECTED = {
    "loss_by_chunk": lambda results: all_clips(results, "loss_by_chunk").mean(axis=0),
    "history_error_by_chunk": error_by_chunk,
    "loss_by_t": loss_by_level,
    "t_s": lambda results: resampled_levels(results).mean(),
    "t_s_histogram": lambda results: np.histogram(resampled_levels(results), bins=10, range=(0, 1))[0],
}


def measured(
    results: list[MicroStepResult], ids: list[list[str]] | None = None, sequence_parallel_size: int = 1
) -> dict:
    """What `StepMetrics` makes of a step with these micro-batches."""
    metrics = StepMetrics()
    for position, result in enumerate(results):
        metrics.add(ids[position] if ids else [f"{position}-{row}" for row in range(len(result.x))], result)
    return metrics.reduced(sequence_parallel_size)


def same(found, expected) -> bool:
    if expected is None or found is None:
        return found is expected
    if isinstance(found, list):
        return len(found) == len(expected) and all(map(same, found, list(expected)))
    return bool(found == pytest.approx(expected, rel=1e-6))


def broken(result: MicroStepResult, row: int, value: float) -> MicroStepResult:
    """The result with a loss that isn't finite, in the last chunk of the clip `row`; its history is broken too."""
    result.loss_by_chunk[row, -1] = value
    result.history[row] = value
    return result


def without(result: MicroStepResult, row: int) -> MicroStepResult:
    """The result of all clips but the one in this row."""
    names, kept = ("x", "history", "history_level", "loss_by_chunk", "t"), torch.arange(len(result.x)) != row
    return replace(result, **{name: getattr(result, name)[kept] for name in names})


def test_every_metric_has_an_expectation_here():
    assert [metric.name for metric in METRICS] == list(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_metric_is_summed_over_micro_steps(name):
    """Micro-batches of different sizes: each clip weighs the same."""
    results = [random_result(clips, seed) for seed, clips in enumerate((3, 5, 1))]
    found = measured(results)
    assert same(found[name], EXPECTED[name](results)), (found[name], EXPECTED[name](results))
    assert not same(found[name], EXPECTED[name](results[:1]))


def test_the_loss_is_the_mean_over_clips_and_chunks():
    results = [random_result(clips, seed) for seed, clips in enumerate((3, 5))]
    found = measured(results)
    assert found["loss"] == pytest.approx(all_clips(results, "loss_by_chunk").mean(), rel=1e-6)
    assert found["clips_not_finite"] == 0
    assert list(found) == ["loss", *EXPECTED, "clips_not_finite", "damaged"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_clips_whose_loss_is_not_finite_are_left_out_and_counted(value):
    results = [random_result(clips, seed) for seed, clips in enumerate((3, 4, 2))]
    kept = [without(results[0], 1), without(results[1], 0), results[2]]
    damaged = [broken(random_result(3, 0), 1, value), broken(random_result(4, 1), 0, value), results[2]]
    found, expected = measured(damaged), measured(kept)
    assert found.pop("clips_not_finite") == 2 and expected.pop("clips_not_finite") == 0
    assert found == expected


def test_the_clips_whose_loss_is_not_finite_are_named_in_order():
    metrics = StepMetrics()
    metrics.add(["d@0", "c@0"], broken(random_result(2, 0), 0, float("nan")))
    metrics.add(["b@0", "a@0"], broken(broken(random_result(2, 1), 0, float("nan")), 1, float("inf")))
    assert metrics.clips_not_finite() == ["a@0", "b@0", "d@0"]


def test_what_has_no_clips_is_not_measured():
    """All clips are broken: no metric is a number, the counts are 0."""
    found = measured([broken(random_result(1, 0), 0, float("nan"))])
    assert found == {
        "loss": None, "loss_by_chunk": [None] * 3, "history_error_by_chunk": [None] * 2, "loss_by_t": [None] * 10,
        "t_s": None, "t_s_histogram": [0] * 10, "clips_not_finite": 1, "damaged": 0,
    }  # fmt: skip


def test_clips_of_a_single_chunk_have_no_history_to_measure():
    result = random_result(2, 0)
    single = replace(
        result, x=result.x[:, :, :3], history=None, loss_by_chunk=result.loss_by_chunk[:, :1], t=result.t[:, :1],
        chunk_sizes=[3],
    )  # fmt: skip
    found = measured([single])
    assert found["history_error_by_chunk"] == [] and len(found["loss_by_chunk"]) == 1


def test_teacher_forcing_has_no_levels_to_measure():
    result = random_result(3, 0)
    found = measured([replace(result, history=result.x[:, :, :6], history_level=torch.zeros(3))])
    assert found["t_s"] is None and sum(found["t_s_histogram"]) == 0 and found["history_error_by_chunk"] == [0.0, 0.0]


def test_the_largest_level_counts_into_the_last_part():
    result = replace(random_result(2, 0), history_level=torch.tensor([1.0, 0.05]), t=torch.ones(2, 3))
    found = measured([result])
    assert found["t_s_histogram"] == [1, *[0] * 8, 1]
    assert found["loss_by_t"] == [*[None] * 9, pytest.approx(result.loss_by_chunk.mean().item())]


def test_ranks_that_share_clips_count_them_once():
    """Both have the same clips, so everything is there twice."""
    results = [random_result(3, 0), broken(random_result(4, 1), 2, float("nan"))]
    twice = [result for result in results for _ in range(2)]
    once = measured(results)
    assert measured(twice, sequence_parallel_size=2) == once and once["clips_not_finite"] == 1
    assert measured(twice)["clips_not_finite"] == 2


def test_a_result_is_taken_from_the_batch_and_its_loss():
    result = random_result(2, 0)
    draws, text = {}, torch.zeros(2, 1, 1)
    batch = Batch(["a", "b"], result.x, text, draws, SIZES)
    loss = VelocityLoss(torch.tensor(0.0), result.loss_by_chunk, result.t)
    taken = MicroStepResult.of(batch, result.history, result.history_level, loss)
    assert vars(taken) == vars(result)


# ---- over ranks


def measure_on_this_rank(clips: list[int]) -> dict:
    """The metrics of a step on this rank. The first clip of the second rank is broken."""
    rank = start_ranks().rank
    metrics, result = StepMetrics(), random_result(clips[rank], seed=rank)
    ids = [f"{rank}-{row}" for row in range(clips[rank])]
    metrics.add(ids, broken(result, 0, float("nan")) if rank else result, damaged=1 + rank)
    return {**metrics.reduced(1), "names": metrics.clips_not_finite()}


@pytest.mark.slow
def test_metrics_are_summed_over_ranks():
    """Every rank has the numbers of all clips, and the names of all broken ones."""
    found = run_distributed(measure_on_this_rank, 2, clips=[2, 4])
    expected = measured([random_result(2, 0), without(random_result(4, 1), 0)])
    for on_rank in found:
        assert on_rank.pop("names") == ["1-0"] and on_rank.pop("clips_not_finite") == 1
        assert on_rank.pop("damaged") == 3
        assert all(same(on_rank[name], expected[name]) for name in on_rank)
    assert set(found[0]) == {"loss", *EXPECTED}
