"""A micro-step gives a GPU its work without waiting for it: nothing asks for a number that the device computes."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rf_train.diffusion.flow_matching import FlowSettings
from rf_train.diffusion.histories import Autoregressive, Clean, Noise, Parallel, make_history
from rf_train.diffusion.loss import training_loss
from rf_train.engine.devices import Moment
from rf_train.metrics import MicroStepResult, StepMetrics
from rf_train.model.chunks import Dense, Window
from tests.conftest import CPU, random_batch
from tests.step_results import random_result

# On a GPU the sizes of results of the last ones depend on values. Indexing waits only with a mask.
WAITING = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique", "bincount")


class NoWaiting(TorchDispatchMode):
    """Raises AssertionError at an operation for which a GPU would have to finish its work first."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.__name__.split(".")[0]
        masks = [x for x in (arguments[1] if name == "index" else ()) if x is not None and x.dtype == torch.bool]
        assert not masks and not name.strip("_").startswith(WAITING) and name not in WAITING, f"{name} waits"
        return function(*arguments, **(keywords or {}))

    def __enter__(self):
        """On a CPU `tolist` reads the memory itself, and is no operation."""
        self.tolist, torch.Tensor.tolist = torch.Tensor.tolist, lambda x: [value.item() for value in x.flatten()]
        return super().__enter__()

    def __exit__(self, *error):
        torch.Tensor.tolist = self.tolist
        return super().__exit__(*error)


@pytest.mark.parametrize("attention", [Dense(), Window(window=1)], ids=["dense", "window"])
@pytest.mark.parametrize("history", [Clean(), Noise(), Parallel(), Autoregressive()], ids=lambda history: history.kind)
@pytest.mark.parametrize("checkpointing", ["none", "selective"])
def test_a_micro_step_waits_for_nothing(tiny_model, history, attention, checkpointing):
    model = tiny_model(checkpointing=checkpointing).train()
    batch, metrics = random_batch(model.settings, 11), StepMetrics()
    with NoWaiting():
        made, level = make_history(history, batch, attention, model)
        result = training_loss(model, batch, made, FlowSettings(), attention)
        result.loss.backward()
        metrics.add(batch.ids, MicroStepResult.of(batch, made, level, result), damaged=0)
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x[x > 0],
        lambda x: bool((x > 0).any()),
        lambda x: x.nonzero(),
    ],
    ids=["item", "tolist", "mask", "bool", "nonzero"],
)
def test_what_waits_is_found(waits):
    with pytest.raises(AssertionError, match="waits"), NoWaiting():
        waits(random_result(3, 0).history_level)


def test_seconds_between_moments():
    first = Moment(CPU)
    sum(range(100_000))
    last = Moment(CPU)
    assert 0 < first.until(last) < 10 and last.until(first) == -first.until(last)
