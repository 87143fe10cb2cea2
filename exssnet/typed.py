"""JSON and YAML read as annotated Python values: the right types everywhere, or one sentence that names the place."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

LARGEST = 1 << 62


def typed(kind: Any, value: Any, where: str) -> Any:
    """`value`, which came from JSON, as a `kind`: a dataclass, list, tuple, dict, optional or plain type.

    ValueError, naming the place, for any other type, for unknown or missing fields and for integers beyond 2^62.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, UnionType):
        (other,) = (a for a in arguments if a is not type(None))
        return None if value is None else typed(other, value, where)
    if is_dataclass(kind) and isinstance(kind, type):
        names = {f.name for f in fields(kind)}
        if isinstance(value, dict) and value.keys() == names:
            hints = get_type_hints(kind)
            return kind(**{name: typed(hints[name], value[name], f"{where}.{name}") for name in names})
    elif origin is list and isinstance(value, list):
        return [typed(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value)]
    elif origin is tuple and isinstance(value, list) and len(value) == len(arguments):
        return tuple(typed(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(arguments, value, strict=True)))
    elif origin in (dict, Mapping) and isinstance(value, dict):
        return {name: typed(arguments[1], v, f"{where}.{name}") for name, v in value.items()}
    elif kind in (int, float) and type(value) in (int, kind) and not (type(value) is int and abs(value) > LARGEST):
        return kind(value)
    elif kind in (str, bool, dict) and type(value) is kind:
        return value
    raise ValueError(f"{where} must be {_name(kind)}, got {_short(value)}")


def alike(old: Any, new: Any, where: str) -> Any:
    """`new`, which came from JSON, where it is of the types of `old`, tuples as tuples; ValueError otherwise."""
    if isinstance(old, list | tuple) and isinstance(new, list) and len(new) == len(old):
        return type(old)(alike(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(zip(old, new, strict=True)))
    if isinstance(old, bool) or not isinstance(old, int | float):
        if type(new) is type(old) and not isinstance(new, list | dict):
            return new
        raise ValueError(f"{where} must be like {_short(old)}, got {_short(new)}")
    return typed(int if type(old) is type(new) is int else float, new, where)


def from_yaml(text: str, where: str) -> dict[Any, Any]:
    """The `name: value` lines of a YAML text; ValueError for any other."""
    try:
        read = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(read, dict):
        raise ValueError(f"{where}: expected options as `name: value` lines, got {type(read).__name__}")
    return read


def fitting(kind: Any, value: Any) -> Any:
    """`value`, which came from YAML, as a `kind`: a plain type, an optional one, a list as a tuple; else ValueError.

    YAML reads 1e-2 as a string: numbers may be strings where a float is wanted.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        (other,) = (a for a in arguments if a is not type(None))
        return None if value is None else fitting(other, value)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(fitting(arguments[0], v) for v in value)
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, origin or kind) and origin is not tuple and (kind is bool or not isinstance(value, bool)):
        return value
    raise ValueError(f"{value!r} is no {_name(kind)}")


def _name(kind: Any) -> str:
    return f"an object of {', '.join(f.name for f in fields(kind))}" if is_dataclass(kind) else getattr(
        kind, "__name__", str(kind)
    )  # fmt: skip


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
