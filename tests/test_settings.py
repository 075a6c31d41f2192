"""Typed settings to and from plain ones: kinds, paths, suggestions, and one clear line for whatever is wrong."""

from dataclasses import dataclass, field, fields, make_dataclass

import pytest

from rf_train.config import Recipe, Stage
from rf_train.diffusion.histories import Autoregressive, Clean, History, Mixed
from rf_train.model.chunks import Dense, Routed, Window
from rf_train.settings import Kind, differences, from_plain, set_by_path, to_plain


@dataclass(frozen=True)
class Inner:
    rate: float = 1.0
    count: int = 2
    on: bool = False
    name: str = ""

    def validate(self) -> None:
        if self.count < 0:
            raise ValueError("count must not be negative")


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    items: tuple[Inner, ...] = ()


def error_of(cls: type, raw: object) -> str:
    """What `from_plain` says about `raw`: one line."""
    with pytest.raises(ValueError) as caught:
        from_plain(cls, raw)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def every_kind() -> list[Kind]:
    """Every kind of every setting: with its defaults, and with other values."""
    found = []
    for base in Kind.__subclasses__():
        for cls in base.kinds.values():
            others = {setting.name: setting.default / 2 if setting.type is float else 3 for setting in fields(cls)}
            found += [cls(), cls(**others)]
    return found


# ---- kinds


def test_a_kind_is_given_by_its_name():
    assert from_plain(Stage, {"history": "clean", "attention": "window"}) == Stage(history=Clean(), attention=Window())


def test_a_kind_is_given_as_a_mapping_with_its_settings():
    raw = {"history": {"kind": "mixed", "t_shift": 2, "probability": 0.25}, "attention": {"kind": "routed", "top_k": 3}}
    assert from_plain(Stage, raw) == Stage(history=Mixed(t_shift=2.0, probability=0.25), attention=Routed(top_k=3))


def test_a_mapping_without_a_kind_is_of_the_default_kind():
    assert from_plain(Stage, {"history": {"t_shift": 2.0}}).history == Autoregressive(t_shift=2.0)
    assert from_plain(Stage, {"history": {}}).history == Autoregressive()


@pytest.mark.parametrize(
    "raw, message",
    [
        ({"history": "teacher"}, f"history='teacher': choose one of {', '.join(History.kinds)}"),
        ({"attention": {"kind": "sparse"}}, "attention='sparse': choose one of dense, window, routed"),
        ({"attention": "clean"}, "attention='clean': choose one of dense, window, routed"),
        ({"attention": {"kind": ["dense"]}}, "attention=['dense']: choose one of dense, window, routed"),
        ({"attention": 3}, "attention: expected the name of a kind or a mapping, got 3"),
        ({"attention": None}, "attention: expected the name of a kind or a mapping, got None"),
    ],
)
def test_an_unknown_kind_is_refused_with_the_kinds_that_there_are(raw, message):
    assert error_of(Stage, raw) == message


@pytest.mark.parametrize(
    "raw, message",
    [
        (
            {"history": {"kind": "autoregressive", "probability": 0.5}},
            "history.probability: unknown setting; 'autoregressive' has t_shift, solver_steps",
        ),
        ({"history": {"kind": "clean", "t_shift": 1}}, "history.t_shift: unknown setting; 'clean' has no settings"),
        (
            {"history": {"probability": 0.5}},  # of the default kind
            "history.probability: unknown setting; 'autoregressive' has t_shift, solver_steps",
        ),
        (
            {"attention": {"kind": "routed", "t_shift": 3}},
            "attention.t_shift: unknown setting; 'routed' has top_k, window, sink",
        ),
        ({"attention": {"kind": "routed", 5: 3}}, "attention.5: unknown setting; 'routed' has top_k, window, sink"),
        (
            {"attention": {"kind": "routed", "topk": 3}},
            "attention.topk: unknown setting; did you mean attention.top_k?",
        ),
    ],
)
def test_a_setting_of_another_kind_is_refused_with_the_settings_of_this_kind(raw, message):
    assert error_of(Stage, raw) == message


def test_a_kind_checks_its_own_settings_and_the_error_names_the_path():
    raw = {"stages": [{"attention": {"kind": "window", "window": 0}}]}
    assert error_of(Recipe, raw) == "stages.0.attention.window=0 must be at least 1"


@pytest.mark.parametrize("value", every_kind(), ids=repr)
def test_every_kind_comes_back_from_its_plain_form(value):
    base = next(base for base in Kind.__subclasses__() if isinstance(value, base))
    holder = make_dataclass("Holder", [("setting", base)], frozen=True)
    assert from_plain(holder, to_plain(holder(value))) == holder(value)


def test_the_plain_form_of_a_kind_is_its_name_or_a_mapping():
    assert to_plain(Dense()) == "dense"
    assert to_plain(Window(sink=1)) == {"kind": "window", "window": 6, "sink": 1}


# ---- unknown settings and wrong values


@pytest.mark.parametrize(
    "raw, message",
    [
        ({"modle": {}}, "modle: unknown setting; did you mean model?"),
        ({"model": {"dmi": 3}}, "model.dmi: unknown setting; did you mean model.dim?"),
        ({"stages": [{"stepz": 3}]}, "stages.0.stepz: unknown setting; did you mean stages.0.steps?"),
        ({"stages": [{"q": 3}]}, "stages.0.q: unknown setting"),
        ({"quite_another": 3}, "quite_another: unknown setting"),
        ({7: 3}, "7: unknown setting"),
    ],
)
def test_an_unknown_setting_is_refused_and_only_a_near_name_suggested(raw, message):
    assert error_of(Recipe, raw) == message


@pytest.mark.parametrize(
    "raw, message",
    [
        ({"inner": {"count": "many"}}, "inner.count: expected int, got 'many'"),
        ({"inner": {"count": 1.5}}, "inner.count: expected int, got 1.5"),
        ({"inner": {"count": True}}, "inner.count: expected int, got True"),
        ({"inner": {"rate": True}}, "inner.rate: expected float, got True"),
        ({"inner": {"rate": "fast"}}, "inner.rate: expected float, got 'fast'"),
        ({"inner": {"on": 1}}, "inner.on: expected bool, got 1"),
        ({"inner": {"name": 1}}, "inner.name: expected str, got 1"),
        ({"inner": 3}, "inner: expected a mapping, got 3"),
        ({"items": {"rate": 1.0}}, "items: expected a list, got {'rate': 1.0}"),
        ({"items": [{}, {"count": -1}]}, "items.1: count must not be negative"),
        ({"inner": {"count": -1}}, "inner: count must not be negative"),
    ],
)
def test_a_wrong_value_is_refused_with_its_path(raw, message):
    assert error_of(Outer, raw) == message


def test_numbers_and_strings_are_read_as_yaml_gives_them():
    """YAML reads 1e-4 as a string, and `key=` on the command line is None."""
    assert from_plain(Inner, {"rate": "1e-4", "name": None}) == Inner(rate=1e-4, name="")
    assert isinstance(from_plain(Inner, {"rate": 3}).rate, float)
    assert from_plain(Outer, {"inner": None}) == from_plain(Outer, {}) == Outer()  # a section with nothing in it
    assert error_of(Outer, {"items": [None]}) == "items.0: expected a mapping, got None"


def test_settings_come_back_from_their_plain_form():
    value = Outer(Inner(rate=0.5, name="a"), (Inner(count=1), Inner(on=True)))
    plain = to_plain(value)
    assert plain["items"] == [
        {"rate": 1.0, "count": 1, "on": False, "name": ""},
        {"rate": 1.0, "count": 2, "on": True, "name": ""},
    ]
    assert from_plain(Outer, plain) == value


# ---- paths


@pytest.mark.parametrize(
    "path, value, expected",
    [
        ("a.b", 3, {"a": {"b": 3}, "list": [{"h": "autoregressive"}]}),
        ("new.x.y", 3, {"a": {"b": 1}, "list": [{"h": "autoregressive"}], "new": {"x": {"y": 3}}}),
        ("list.0.h.t_shift", 0.3, {"a": {"b": 1}, "list": [{"h": {"kind": "autoregressive", "t_shift": 0.3}}]}),
        ("list.0.h", "clean", {"a": {"b": 1}, "list": [{"h": "clean"}]}),
        ("list.0", 3, {"a": {"b": 1}, "list": [3]}),
        ("list.0.new.x", 3, {"a": {"b": 1}, "list": [{"h": "autoregressive", "new": {"x": 3}}]}),
    ],
)
def test_a_value_is_set_by_its_path(path, value, expected):
    plain = {"a": {"b": 1}, "list": [{"h": "autoregressive"}]}
    set_by_path(plain, path, value)
    assert plain == expected


def test_a_setting_of_a_kind_that_is_given_by_its_name_can_be_set_by_path():
    plain = {"stages": [{"history": "mixed"}, {}]}
    for path in ("stages.0.history.t_shift", "stages.1.history.t_shift"):  # the second stage has the default kind
        set_by_path(plain, path, 0.3)
    stages = from_plain(
        Recipe, {"stages": [{"name": str(i), **stage} for i, stage in enumerate(plain["stages"])]}
    ).stages
    assert [stage.history for stage in stages] == [Mixed(t_shift=0.3), Autoregressive(t_shift=0.3)]


@pytest.mark.parametrize(
    "path, message",
    [
        ("list.7", "list.7: '7' is not a position in a list of 1"),
        ("list.7.x", "list.7.x: '7' is not a position in a list of 1"),
        ("list.-1", "list.-1: '-1' is not a position in a list of 1"),
        ("list.last.x", "list.last.x: 'last' is not a position in a list of 1"),
        ("a.b.c", "a.b.c: a.b is a value, it has no keys"),
        ("list.0.name.x", "list.0.name.x: list.0.name is a value, it has no keys"),
    ],
)
def test_a_path_that_leads_nowhere_is_refused(path, message):
    with pytest.raises(ValueError) as caught:
        set_by_path({"a": {"b": 1}, "list": [{"name": "first"}]}, path, 3)
    assert str(caught.value) == message


# ---- differences


@pytest.mark.parametrize(
    "old, new, expected",
    [
        ({"a": 1, "b": [1, 2]}, {"a": 1, "b": [1, 2]}, []),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 3, "c": 2}}, [("a.b", 1, 3)]),
        ({"a": 1}, {"b": 2}, [("a", 1, None), ("b", None, 2)]),
        ({"s": [{"x": 1}]}, {"s": [{"x": 2}, {"x": 3}]}, [("s.0.x", 1, 2), ("s.1", None, {"x": 3})]),
        ({"h": "clean"}, {"h": {"kind": "mixed"}}, [("h", "clean", {"kind": "mixed"})]),
        ({"h": {"kind": "a", "x": 1}}, {"h": {"kind": "b", "x": 1}}, [("h.kind", "a", "b")]),
    ],
)
def test_differences_are_named_by_path_with_both_values(old, new, expected):
    assert differences(old, new) == expected


def test_differences_of_two_recipes():
    old = Recipe(stages=(Stage(name="a"), Stage(name="b", history=Clean())))
    new = Recipe(
        stages=(Stage(name="a", history=Autoregressive(t_shift=1.0)), Stage(name="b", history=Clean(), lr=1.0))
    )
    expected = [("stages.0.history.t_shift", 0.6, 1.0), ("stages.1.lr", 5e-5, 1.0)]
    assert differences(to_plain(old), to_plain(new)) == expected
