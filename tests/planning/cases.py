"""A stage of a tiny model on a tiny cluster, and the training step that its costs are compared with."""

from dataclasses import replace

from torch import Tensor

from rf_train import config
from rf_train.diffusion.flow_matching import FlowSettings
from rf_train.diffusion.histories import make_history
from rf_train.diffusion.loss import training_loss
from rf_train.model.chunks import Attention, Dense, Routed, Window
from rf_train.model.transformer import VelocityModel
from rf_train.planning.costs import Clip, Cluster, StageCase, read_zero
from rf_train.settings import to_plain
from tests.conftest import plain_settings, random_batch

# One per kind. In a clip of four chunks none of them reads what another one does.
ATTENTIONS = {"dense": Dense(), "window": Window(window=1, sink=1), "routed": Routed(top_k=1)}


def tiny_case(
    history="autoregressive", attention: Attention | None = None, device="cpu", zero="ds_configs/zero3.json", gpus=1,
    frames=12, micro_batch=2, run: dict | None = None, **model,
) -> StageCase:  # fmt: skip
    """A stage of clips of 4 x 6 latent pixels, with one micro-batch per rank and step.

    `run` and `model` replace settings of these sections.
    """
    stage = {
        "history": history if isinstance(history, (str, dict)) else to_plain(history),
        "attention": to_plain(attention or Dense()),
        "frames": frames, "batch": micro_batch * gpus, "steps": 1,
    }  # fmt: skip
    recipe = config.from_dict({
        "model": plain_settings(**model), "stages": [stage], "optimizer": {"micro_batch": micro_batch},
        "run": {"deepspeed": zero, **(run or {})},
    })  # fmt: skip
    cluster = Cluster(gpus=gpus, gpus_per_node=min(8, gpus), device=device)
    return StageCase(recipe, recipe.stages[0], Clip(frames, 4, 6), read_zero(zero), cluster)


def with_run(case: StageCase, **changes) -> StageCase:
    """The case with other settings of the section `run`."""
    return replace(case, recipe=replace(case.recipe, run=replace(case.recipe.run, **changes)))


class Step:
    """A micro-step of a case, as training makes it, in two halves: first the history, then the loss."""

    def __init__(self, case: StageCase):
        clip = case.clip
        self.case = case
        self.batch = random_batch(case.recipe.model, clip.frames, case.micro_batch, clip.height, clip.width)
        self.history: Tensor | None = None

    def make_history(self, model: VelocityModel) -> None:
        stage = self.case.stage
        self.history, _ = make_history(stage.history, self.batch, stage.attention, model)

    def loss(self, model: VelocityModel) -> Tensor:
        attention = self.case.stage.attention
        return training_loss(model, self.batch, self.history, FlowSettings(), attention).loss
