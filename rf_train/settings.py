"""Typed settings: frozen dataclasses to and from plain dicts, with every key checked.

Some settings have kinds: how history is made, which chunks attention reads. Such a setting is a subclass of `Kind`, and
each kind is a frozen dataclass derived from that. In YAML it is the kind's name, or a mapping with `kind` and the
settings of that kind:

    history: clean
    history: {kind: autoregressive, t_shift: 0.6}

A setting that belongs to another kind is an error.
"""

import contextlib
import dataclasses
import difflib
import math
import typing
from typing import Any, ClassVar, TypeVar

import yaml

T = TypeVar("T")


def require(condition: bool, message: str) -> None:
    """Raises `ValueError(message)` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def require_at_least(minimum: float, settings: Any, *names: str) -> None:
    """Raises ValueError unless each of these numbers of `settings` is at least `minimum`."""
    for name in names:
        value = getattr(settings, name)
        require(value >= minimum, f"{name}={value} must be at least {minimum}")


def require_positive(settings: Any, *names: str) -> None:
    """Raises ValueError unless each of these numbers of `settings` is above 0."""
    for name in names:
        value = getattr(settings, name)
        require(value > 0, f"{name}={value} must be positive")


class Kind:
    """Base of all settings that have kinds.

    A direct subclass, such as `Attention`, is one such setting; its `kinds` are its kinds by name. A subclass of that,
    written `class Window(Attention, kind="window")`, is one kind.
    """

    kinds: ClassVar[dict[str, type]]
    kind: ClassVar[str]

    def __init_subclass__(cls, kind: str = "", **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if Kind in cls.__bases__:
            cls.kinds = {}
        elif kind:
            if kind in cls.kinds:
                raise TypeError(f"{cls.__name__}: the kind {kind!r} is {cls.kinds[kind].__name__} already")
            cls.kind = kind
            cls.kinds[kind] = cls


def from_plain(cls: type[T], raw: Any, path: str = "") -> T:
    """An instance of the dataclass `cls` from the plain mapping `raw`, checked by its own `validate`.

    `path` is the dotted path of `raw` in all settings, for errors. Raises a one-line ValueError.
    """
    if not isinstance(raw, dict):
        raise ValueError(f"{path or 'settings'}: expected a mapping, got {raw!r}")
    fields = {field.name: (field, hint) for field, hint in _fields(cls)}
    values = {}
    for key, value in raw.items():
        dotted = f"{path}.{key}" if path else str(key)
        if key not in fields:
            raise ValueError(f"{dotted}: unknown setting{_suggestion(str(key), fields, path)}")
        field, hint = fields[key]
        values[key] = _convert(hint, value, dotted, field)
    made = cls(**values)
    if hasattr(made, "validate"):
        try:
            made.validate()
        except ValueError as error:
            if not path or str(error).startswith(path.split(".")[0]):
                raise
            of_a_field = str(error).partition("=")[0] in fields
            raise ValueError(f"{path}.{error}" if of_a_field else f"{path}: {error}") from None
    return made


def to_plain(value: Any) -> Any:
    """Plain dicts, lists, strings and numbers, ready for YAML or JSON. `from_plain` gives the settings back."""
    if isinstance(value, (tuple, list)):
        return [to_plain(item) for item in value]
    if not dataclasses.is_dataclass(value):
        return value
    plain = {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Kind):
        return {"kind": value.kind, **plain} if plain else value.kind
    return plain


def set_by_path(plain: dict, path: str, value: Any) -> None:
    """Sets `plain["a"]["b"]` for the path "a.b". A list is addressed by position: "stages.1.steps"."""
    node: Any = plain
    *parents, last = path.split(".")
    for depth, key in enumerate(parents):
        inner = node[_position(node, key, path)] if isinstance(node, list) else node.get(key)
        if inner is None:
            inner = {}
        elif isinstance(inner, str) and _names_a_kind(inner):
            inner = {"kind": inner}
        elif not isinstance(inner, (dict, list)):
            raise ValueError(f"{path}: {'.'.join(parents[: depth + 1])} is a value, it has no keys")
        node[_position(node, key, path) if isinstance(node, list) else key] = inner
        node = inner
    node[_position(node, last, path) if isinstance(node, list) else last] = value


def differences(old: Any, new: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted path, old value, new value) of everything that differs between two nested plain settings."""
    if isinstance(old, list) and isinstance(new, list):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(dict.fromkeys([*old, *new]))
        pairs = [(f"{path}.{key}" if path else str(key), old.get(key), new.get(key)) for key in keys]
        return [difference for inner, a, b in pairs for difference in differences(a, b, inner)]
    return [] if old == new else [(path, old, new)]


def _fields(cls: type) -> list[tuple[dataclasses.Field, Any]]:
    """The settings of a dataclass, each with its type."""
    hints = typing.get_type_hints(cls)
    return [(field, hints[field.name]) for field in dataclasses.fields(cls)]


def _names_a_kind(name: str) -> bool:
    return any(name in base.kinds for base in Kind.__subclasses__())


def _position(items: list, key: str, path: str) -> int:
    if not (key.isascii() and key.isdigit()) or len(key) > 9 or int(key) >= len(items):
        raise ValueError(f"{path}: {key!r} is not a position in a list of {len(items)}")
    return int(key)


def _suggestion(key: str, known: typing.Iterable[str], path: str) -> str:
    """ "; did you mean a.b?" when a known key is near, else nothing."""
    if ":" in key:
        return "; YAML wants a space after the colon"
    names = list(known)
    near = [name for name in names if key.startswith(f"{name}_")]
    near = near or difflib.get_close_matches(key, names, n=1, cutoff=0.65)
    return f"; did you mean {path + '.' if path else ''}{near[0]}?" if near else ""


def _convert(hint: Any, value: Any, path: str, field: dataclasses.Field | None = None) -> Any:
    """Converts `value`, as YAML gives it, to the type `hint`."""
    if isinstance(hint, type) and issubclass(hint, Kind):
        return _kind(hint, value, path, field)
    if dataclasses.is_dataclass(hint):
        in_list = path.rpartition(".")[2].isdigit()
        empty_section = value is None and not in_list  # its settings may be commented out
        return from_plain(typing.cast(type, hint), {} if empty_section else value, path)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{path}: expected a list, got {value!r}")
        inner = typing.get_args(hint)[0]
        return tuple(_convert(inner, item, f"{path}.{i}") for i, item in enumerate(value))
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):  # YAML reads 1e-4 as a string
            value = float(value)
    if hint is str and value is None:  # `key=` on the command line
        return ""
    if isinstance(value, int) and abs(value) >= 2**53:
        raise ValueError(f"{path}: {_short(value)} is not a number that can be meant")
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{path}: expected {hint.__name__}, got {_short(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{path}: {_short(value)} is not a number that can be meant")
    return value


def _short(value: Any) -> str:
    """`value` as an error quotes it: one line of at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _kind(base: type[Kind], value: Any, path: str, field: dataclasses.Field | None) -> Any:
    """The kind that `value` gives: a name, or a mapping with `kind` (if absent, the field's default) and settings."""
    if isinstance(value, str):
        value = {"kind": value}
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected the name of a kind or a mapping, got {value!r}")
    default = field.default_factory if field is not None else dataclasses.MISSING
    name = value.get("kind", getattr(default, "kind", None))
    if not isinstance(name, str) or name not in base.kinds:
        raise ValueError(f"{path}={name!r}: choose one of {', '.join(base.kinds)}")
    settings = {key: item for key, item in value.items() if key != "kind"}
    cls = base.kinds[name]
    decorated = "__dataclass_fields__" in vars(cls)
    if not decorated and (vars(cls).get("__annotations__") or not dataclasses.is_dataclass(cls)):
        raise ValueError(f"{path}={name!r}: {cls.__name__} is no dataclass; write @dataclass(frozen=True) above it")
    unknown = [key for key in settings if key not in {field.name for field, _ in _fields(cls)}]
    if unknown:
        own = ", ".join(field.name for field, _ in _fields(cls)) or "no settings"
        near = _suggestion(str(unknown[0]), [field.name for field, _ in _fields(cls)], path)
        raise ValueError(f"{path}.{unknown[0]}: unknown setting{near or f'; {name!r} has {own}'}")
    return from_plain(cls, settings, path)


class _Loader(yaml.SafeLoader):
    """YAML without dates, and without keys that are there twice."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for position, key in enumerate(keys) if key in keys[:position]]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """The plain value that a YAML text holds. Raises a one-line ValueError for anything else."""
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except RecursionError:
        raise ValueError("not YAML: nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"not YAML: {' '.join(str(error).split())[:300]}") from None
