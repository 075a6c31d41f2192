"""The check of a history at the start: it passes sound ones, and names the rule that a broken one breaks."""

import pytest

from rf_train.diffusion.histories import Autoregressive, Clean, History, Noise
from rf_train.diffusion.history_check import HistoryError, check_history
from rf_train.diffusion.randomness import Draw
from rf_train.model.chunks import Dense, Routed, Window
from rf_train.settings import Kind, from_plain

ATTENTIONS = [Dense(), Window(window=1, sink=1), Routed(top_k=1)]


@pytest.mark.parametrize("kind", History.kinds)
@pytest.mark.parametrize("attention", ATTENTIONS, ids=str)
@pytest.mark.parametrize("chunks", [1, 2, 9])
def test_sound_histories_pass(tiny_model, device, kind, attention, chunks):
    check_history(History.kinds[kind](), tiny_model(device), attention, chunks)


class ForgetsPasses(Autoregressive):
    def rollout_passes(self, sizes):
        return []


class HalfOfThePasses(Autoregressive):
    def rollout_passes(self, sizes):
        return super().rollout_passes(sizes)[::2]


class Undeclared(Noise):
    draws = {"history_level": Draw("uniform", "clip")}


class ChangesTheClip(Clean):
    def make(self, batch, level, attention, model):
        return batch.x.mul_(0.5)[:, :, : batch.history_frames].clone()


class AllChunks(Clean):
    def make(self, batch, level, attention, model):
        return batch.x


class NotFinite(Clean):
    def make(self, batch, level, attention, model):
        return super().make(batch, level, attention, model) / 0


class OneLevel(Clean):
    def level(self, batch):
        return batch.x.new_zeros(1)


@pytest.mark.parametrize(
    "history, message",
    [
        (ForgetsPasses(), "'autoregressive': it declares 0 passes in `rollout_passes` and made 3"),
        (HalfOfThePasses(), "it declares 2 passes in `rollout_passes` and made 3"),
        (Undeclared(), "'noise': it reads the random number 'history_noise', which it does not declare in `draws`"),
        (ChangesTheClip(), "it changed the clips"),
        (AllChunks(), "x~ is .*: all chunks but the last"),
        (NotFinite(), "x~ is not finite"),
        (OneLevel(), "`level` is .1., not one number per clip"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, History) else "",
)
def test_a_broken_history_is_named_with_the_rule(tiny_model, device, history, message):
    with pytest.raises(HistoryError, match=message):
        check_history(history, tiny_model(device), Dense(), 4)


# ---- what a class can't be


def test_a_history_needs_a_label_and_names_of_its_own():
    with pytest.raises(TypeError, match="Nameless: a history needs a `label`"):
        type("Nameless", (History,), {}, kind="nameless")
    with pytest.raises(TypeError, match="Loud: the loss reads the random numbers noise"):
        type("Loud", (History,), {"label": "loud", "draws": {"noise": Draw("normal", "latent")}}, kind="loud")
    with pytest.raises(TypeError, match="Again: the kind 'clean' is Clean already"):
        type("Again", (History,), {"label": "again"}, kind="clean")
    for kind in ("nameless", "loud"):
        History.kinds.pop(kind, None)


def test_a_kind_without_a_decorator_is_told_what_is_missing():
    class Fruit(Kind):
        pass

    class Apple(Fruit, kind="apple"):
        weight: float = 1.0

    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Basket:
        fruit: Fruit

    Basket.__annotations__["fruit"] = Fruit
    with pytest.raises(ValueError, match="fruit='apple': Apple is no dataclass; write @dataclass"):
        from_plain(Basket, {"fruit": "apple"})
    with pytest.raises(ValueError, match="wants a space after the colon"):
        from_plain(Basket, {"fruit:x": "apple"})
