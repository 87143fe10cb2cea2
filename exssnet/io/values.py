"""Read JSON and YAML as annotated Python values. A wrong type is refused in one sentence that names the place."""

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path, PurePath
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

LARGEST = 1 << 62
BRACKETS: dict[type, tuple[str, str]] = {list: ("[", "]"), tuple: ("(", ")"), set: ("{", "}"), dict: ("{", "}")}
YAML_BYTES, YAML_VALUES, YAML_DEPTH = 100_000, 10_000, 50
"""Limits of a YAML file: its size, the number of values (those that aliases repeat included), and their nesting."""


def shown(value: Any, most: int = 80) -> str:
    """Show a value in a message: one line of printable characters.

    A path is shown whole, an error as its text, any other value as `repr` does. Only the part that is shown is read.

    Args:
        value: from outside, of any type and size.
        most: the largest number of characters; a longer text ends in "...".
    """
    if isinstance(value, PurePath):
        return printable(str(value))
    if isinstance(value, BaseException):
        text = " ".join(str(value).split()) or type(value).__name__
    else:
        text = ""
        for part in _parts(value, most):
            text += part
            if len(text) > most:
                break
    text = printable(text[: most + 1])
    return text if len(text) <= most else text[: most - 3] + "..."


def printable(text: str) -> str:
    """Escape all characters of a text that are not printable, line ends and terminal codes included."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def aligned(rows: Sequence[Sequence[str]], right: Container[int] = ()) -> list[str]:
    """The lines of a table in plain text.

    Args:
        rows: the cells of each row.
        right: indices of the columns that are aligned to the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    pads = [str.rjust if number in right else str.ljust for number in range(len(widths))]
    return ["  ".join(pad(c, w) for pad, c, w in zip(pads, row, widths, strict=True)).rstrip() for row in rows]


def _parts(value: Any, most: int) -> Iterator[str]:
    """The parts of `repr(value)`, none of which is much longer than `most`."""
    if type(value) in BRACKETS and value:
        start, end = BRACKETS[type(value)]
        yield start
        for number, member in enumerate(value):
            if number:
                yield ", "
            yield from _parts(member, most)
            if isinstance(value, dict):
                yield ": "
                yield from _parts(value[member], most)
        yield f",{end}" if type(value) is tuple and len(value) == 1 else end
    elif isinstance(value, str | bytes):
        yield repr(value[:most])
    elif isinstance(value, int) and value.bit_length() > 4 * most:
        yield f"an integer of {value.bit_length()} bits"
    else:
        yield repr(value)


def typed(kind: Any, value: Any, where: str) -> Any:
    """Read a value that came from JSON as an annotated type.

    Args:
        kind: a dataclass, list, tuple, dict, optional or plain type.
        value: what JSON gave.
        where: the place of the value, for messages.

    Returns:
        The value as a `kind`.

    Raises:
        ValueError: It has another type, a field is unknown or missing, or an integer is beyond 2^62.
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
        return {name: typed(arguments[1], v, f"{where}.{shown(name)[1:-1]}") for name, v in value.items()}
    elif kind in (int, float) and type(value) in (int, kind) and not (type(value) is int and abs(value) > LARGEST):
        return kind(value)
    elif kind in (str, bool, dict) and type(value) is kind:
        return value
    raise ValueError(f"{where} must be {_name(kind)}, got {shown(value)}")


def alike(old: Any, new: Any, where: str) -> Any:
    """Read a value that came from JSON as the types of another value.

    Args:
        old: the example. Its lists and tuples give the lengths.
        new: what JSON gave.
        where: the place of the value, for messages.

    Returns:
        `new`, with tuples where `old` has them.

    Raises:
        ValueError: A type or a length differs.
    """
    if isinstance(old, list | tuple) and isinstance(new, list) and len(new) == len(old):
        return type(old)(alike(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(zip(old, new, strict=True)))
    if isinstance(old, bool) or not isinstance(old, int | float):
        if type(new) is type(old) and not isinstance(new, list | dict):
            return new
        raise ValueError(f"{where} must be like {shown(old)}, got {shown(new)}")
    return typed(int if type(old) is type(new) is int else float, new, where)


def read_yaml(path: str | Path) -> dict[Any, Any]:
    """Read the `name: value` lines of a YAML file.

    Args:
        path: the file.

    Raises:
        ValueError: It is not YAML, holds something else, or is too large: see `YAML_BYTES`.
        OSError: There is no such file.
    """
    path = Path(path)
    with path.open("rb") as file:
        content = file.read(YAML_BYTES + 1)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{shown(path)} is not YAML: {shown(error)}") from None
    return from_yaml(text, shown(path))


def from_yaml(text: str, where: str) -> dict[Any, Any]:
    """Read the `name: value` lines of a YAML text.

    Args:
        text: the YAML.
        where: its origin, for messages.

    Raises:
        ValueError: It is not YAML, holds something else, or is too large: see `YAML_BYTES`.
    """
    try:
        _check_size(text)
        read = yaml.safe_load(text)
    except Exception as error:  # YAML's readers of numbers and dates raise many kinds
        raise ValueError(f"{where} is not YAML: {shown(error, 300)}") from None
    if not isinstance(read, dict | None):
        raise ValueError(f"{where}: expected options as `name: value` lines, got {type(read).__name__}")
    return read or {}


def _check_size(text: str) -> None:
    """ValueError for a text that is too large, nested too deep, or repeats too much by aliases. Builds no values."""
    if len(text) > YAML_BYTES:
        raise ValueError(f"it is larger than {YAML_BYTES} bytes")
    open_values, values = [("", 0)], {"": 0}  # anchor and values of each level; values below each finished anchor
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            open_values.append((event.anchor or "", 0))
            if len(open_values) > YAML_DEPTH:
                raise ValueError(f"its values are nested deeper than {YAML_DEPTH} levels")
            continue
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in values:
                raise ValueError(f"the alias {shown(event.anchor)} stands for nothing that is finished before it")
            anchor, count = "", values[event.anchor]
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, count = open_values.pop()
            count += 1
        elif isinstance(event, yaml.ScalarEvent):
            anchor, count = event.anchor or "", 1
        else:
            continue
        values[anchor] = count
        outer, before = open_values.pop()
        if before + count > YAML_VALUES:
            raise ValueError(f"it holds more than {YAML_VALUES} values, with those that aliases repeat")
        open_values.append((outer, before + count))


def fitting(kind: Any, value: Any) -> Any:
    """Read a value that came from YAML as an annotated type.

    YAML reads 1e-2 as a string. So a string may stand for a float.

    Args:
        kind: a plain type, a union of such, or a tuple, for which YAML has a list.
        value: what YAML gave.

    Returns:
        The value as a `kind`.

    Raises:
        ValueError: It has another type, or is an integer beyond 2^62.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        for other in arguments:
            with suppress(ValueError):
                return fitting(other, value)
    elif origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(fitting(arguments[0], v) for v in value)
    elif isinstance(value, int) and (isinstance(value, bool) is not (kind is bool) or abs(value) > LARGEST):
        pass
    elif kind is float and isinstance(value, int | float | str):
        with suppress(ValueError):
            return float(value)
    elif isinstance(value, origin or kind):
        return value
    raise ValueError(f"{shown(value)} is no {_name(kind)}")


def _name(kind: Any) -> str:
    return f"an object of {', '.join(f.name for f in fields(kind))}" if is_dataclass(kind) else getattr(
        kind, "__name__", str(kind)
    )  # fmt: skip
