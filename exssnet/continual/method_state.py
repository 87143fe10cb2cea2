"""What a strategy keeps, as named tensors and JSON, and back."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..io.values import shown
from .state import generator_state
from .stored import Pieces
from .strategy import Strategy

PREFIX = "method"


class _Unknown(ValueError):
    """A value that a checkpoint cannot hold."""


def options(method: Strategy) -> dict[str, Any]:
    """The attributes of a strategy before training as JSON: what tells it from one with other options."""
    described = {}
    for name, value in vars(method).items():
        try:
            described[name] = _encode(value, name, {}, set(), torch.device("cpu"))
        except _Unknown:
            described[name] = {"other": type(value).__name__}
    return described


def encoded(method: Strategy, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a strategy keeps as named tensors and JSON.

    Numbers, strings and None stand for themselves, all else is an object of one entry: {"tensor": ...},
    {"generator": ...}, {"list": ...}, {"tuple": ...} or {"dict": pairs}.

    Raises:
        ValueError: Something else is kept, or a tensor of the model.
    """
    kept: Any = method.state_dict()
    who, tensors = type(method).__name__, dict[str, Tensor]()
    if not isinstance(kept, Mapping) or not all(isinstance(name, str) for name in kept):
        raise ValueError(f"state: {who}.state_dict must return values by name, but it returned {shown(kept)}")
    live = [*model.parameters(), *model.buffers()]
    models = {t.untyped_storage().data_ptr() for t in live if t.numel()}
    described = {}
    for name, value in kept.items():
        try:
            described[name] = _encode(value, f"{PREFIX}/{name}", tensors, models, live[0].device)
        except _Unknown as error:
            raise ValueError(
                f"state: {who} keeps {error} in {name!r}, which a checkpoint cannot hold: let state_dict and "
                "load_state_dict tell what to keep instead"
            ) from None
    return tensors, described


def decoded(pieces: Pieces, described: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The values that `encoded` was given, in new memory; tensors of the model's device are on `device`.

    Raises:
        ValueError: The description is damaged, or a tensor is missing.
    """
    try:
        return {name: _decode(pieces, value, f"{PREFIX}/{name}", device) for name, value in described.items()}
    except RecursionError:
        raise ValueError("the state's values of the method are nested too deep") from None


def _encode(value: Any, path: str, tensors: dict[str, Tensor], models: set[int], device: torch.device) -> Any:
    def inner(value: Any, key: Any) -> Any:
        return _encode(value, f"{path}/{key}", tensors, models, device)

    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        if not value.is_leaf or value.layout != torch.strided:
            raise _Unknown("a tensor that is computed from others" if not value.is_leaf else "a sparse tensor")
        if value.numel() and value.untyped_storage().data_ptr() in models:
            raise _Unknown("a tensor of the model")
        tensors[path] = value.detach()
        return {"tensor": {"trains": value.requires_grad, "with model": value.device == device}}
    if isinstance(value, torch.Generator):
        tensors[path] = value.get_state()
        return {"generator": value.device.type}
    if type(value) in (list, tuple):
        return {type(value).__name__: [inner(v, i) for i, v in enumerate(value)]}
    if type(value) is dict and all(type(key) in (int, str) for key in value):
        return {"dict": [[key, inner(v, i)] for i, (key, v) in enumerate(value.items())]}
    raise _Unknown(f"a value of type {type(value).__name__}")


def _decode(pieces: Pieces, value: Any, path: str, device: torch.device) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    match value:
        case {"tensor": {"trains": bool(trains), "with model": bool(with_model)}}:
            tensor = pieces.take(path, pieces.left[path].shape if path in pieces.left else ())
            if not trains or tensor.is_floating_point():
                return tensor.detach().to(device if with_model else "cpu", copy=True).requires_grad_(trains)
        case {"generator": "cpu" | "cuda" as kind} if kind in ("cpu", device.type):
            return torch.Generator(kind).set_state(generator_state(pieces, path, kind))
        case {"list": list(values)}:
            return [_decode(pieces, v, f"{path}/{i}", device) for i, v in enumerate(values)]
        case {"tuple": list(values)}:
            return tuple(_decode(pieces, v, f"{path}/{i}", device) for i, v in enumerate(values))
        case {"dict": list(pairs)} if all(
            isinstance(p, list) and len(p) == 2 and type(p[0]) in (int, str) for p in pairs
        ):
            return {key: _decode(pieces, v, f"{path}/{i}", device) for i, (key, v) in enumerate(pairs)}
    raise ValueError(f"the state holds {shown(value)} for {path}, which is no value of a method")
