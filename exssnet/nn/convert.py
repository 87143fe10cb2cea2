"""`convert` puts supermasks into any torch model, in place; `unconvert` takes them out again."""

import sys
import types
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any, Literal

from torch import nn

from . import blocks, norms, stale
from .choice import PRODUCTS, Products
from .init import allocate_density, signed_constant_
from .layers import TENSORS, SupermaskLayer, full_name
from .linear_conv import SupermaskConv1d, SupermaskConv2d, SupermaskLinear
from .selector import OWN_FORWARD, Selector, own_class, selecting
from .summary import summary

MASKED: Mapping[type[nn.Module], type[SupermaskLayer]] = {
    kind.plain_type: kind for kind in (SupermaskLinear, SupermaskConv1d, SupermaskConv2d)
}
FEW = 0.8
"""`convert` warns below this share of masked parameters, because each task has a dense copy of the others."""
FAST_PATHS = {nn.TransformerEncoder: "use_nested_tensor", nn.TransformerEncoderLayer: "activation_relu_or_gelu"}
"""Module -> attribute that turns PyTorch's fused inference off. It uses dense weights and never calls the layers."""
Chosen = str | type[nn.Module]


def swaps() -> Mapping[type[nn.Module], type[nn.Module]]:
    """Class -> the class that `convert` replaces it by; torchvision's only if torchvision is imported."""
    classes = {**norms.SWAPPED, **blocks.SWAPPED, nn.Sequential: blocks.FusedSequential}
    if "torchvision.models.resnet" in sys.modules:
        from . import torchvision_blocks

        classes |= torchvision_blocks.SWAPPED
    return classes


def _swapped(module: nn.Module) -> type[nn.Module]:
    """The class that `convert` gives a module. An `nn.Sequential` without batch norms keeps its class."""
    if type(module) is nn.Sequential and not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module):
        return nn.Sequential
    return swaps().get(type(module), type(module))


def supermask_layers(model: nn.Module) -> Iterator[tuple[str, SupermaskLayer]]:
    """(name, layer) of every supermask layer of a model, in the order of `named_modules`."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, SupermaskLayer))


def convert(
    model: nn.Module,
    density: float = 0.1,
    include: Iterable[Chosen] | None = None,
    exclude: Iterable[Chosen] = (),
    weights: Literal["keep", "signed_constant"] = "keep",
    init_scale: Literal["official", "density"] = "official",
    allocation: Literal["uniform", "er"] = "uniform",
    products: Products = "auto",
) -> nn.Module:
    """Put supermasks into any torch model, in place.

    `nn.Linear`, `nn.Conv1d` and `nn.Conv2d` become supermask layers. Batch norms get per-task statistics. Batch norms
    and pools keep the layout of the sparse kernels. In residual blocks (`exssnet.nn.models`, torchvision) and in an
    `nn.Sequential`, a batch norm is fused with the sum and the ReLU after it, unless they have hooks. All modules keep
    their identity, name and hooks.

    A layer whose weight requires no gradient stays as it is, frozen. Other parameters without a mask (biases, affine
    norms, embeddings) are per-task under `Phases` if they require a gradient, and frozen otherwise.
    `exssnet.summary` lists them with the reasons. A warning follows if masks cover less than 80 % of the parameters
    that train. The model's class becomes a subclass of its own class, with the same name, whose `forward` selects the
    masks of all layers at once. `unconvert` undoes that.

    Args:
        model: The model.
        density: Share of the weights kept, in (0, 1].
        include: Layers to mask, by name pattern ("encoder.*") or by type. None means all of the three types.
        exclude: Layers not to mask, by name pattern or by type.
        weights: "keep" keeps the model's weights, for a pretrained model. "signed_constant" is for training from
            scratch, see `signed_constant_`.
        init_scale: Scale of signed constants, see `signed_constant_`.
        allocation: How the density is distributed over the layers, see `allocate_density`.
        products: "sparse" or "dense" kernels in all layers. "auto" takes the faster kernels for each layer on this
            machine.

    Returns:
        The model.

    Raises:
        ValueError: If there is no layer to mask, if a pattern matches no layer, if a weight to be masked is tied to
            another module's, and for an argument outside its range.

    Example:
        >>> model = exssnet.convert(torchvision.models.resnet18(), density=0.1)
    """
    if products not in PRODUCTS:
        raise ValueError(f"convert: products must be one of {', '.join(PRODUCTS)}, got {products!r}")
    if weights not in ("keep", "signed_constant"):
        raise ValueError(f'convert: weights must be "keep" or "signed_constant", got {weights!r}')
    layers, passed_over = _choose(model, None if include is None else list(include), list(exclude))
    densities = allocate_density([m.weight.shape for m in layers.values()], density, allocation)  # type: ignore[misc]
    weights_before: list[Any] = [m.weight for m in layers.values()]
    stale.phase_changes(None, weights_before, "weights of a model from before convert")
    for layer, layer_density in zip(layers.values(), densities, strict=True):
        masked = MASKED[type(layer)].from_plain(layer, layer_density, products)
        if weights == "signed_constant":
            signed_constant_(masked.dense_weight, layer_density, init_scale)
    for module in model.modules():
        module.__class__ = _swapped(module)
        for kind, switch in FAST_PATHS.items():
            if isinstance(module, kind) and switch in module.__dict__:
                module.__dict__[f"_{switch}"] = module.__dict__[switch]
                module.__dict__[switch] = 0
    every = [m for m in model.modules() if isinstance(m, SupermaskLayer)]
    model._selector = Selector(every, passed_over)  # type: ignore[assignment]
    model.__class__ = selecting(type(model))  # type: ignore[arg-type]
    if "forward" in vars(model):
        model.__dict__[OWN_FORWARD] = model.__dict__.pop("forward")
    if callable(getattr(model, "save_pretrained", None)):
        model.save_pretrained = types.MethodType(_save_pretrained, model)  # type: ignore[assignment]
    _warn_of_few(model, passed_over)
    return model


def _choose(
    model: nn.Module, include: list[Chosen] | None, exclude: list[Chosen]
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Layers to mask by name, and the reasons why other modules with parameters have no mask. Nothing is changed."""
    owning = {name: m for name, m in model.named_modules() if m._parameters}
    reasons = {name: _unmaskable(m) for name, m in owning.items()}
    maskable = {name: m for name, m in owning.items() if not reasons[name]}
    _check_patterns("include", include or (), maskable, reasons)
    _check_patterns("exclude", exclude, owning, {})
    wanted: Sequence[Chosen] = tuple(MASKED) if include is None else include
    layers = {}
    for name, module in maskable.items():
        if not _matches(name, module, wanted):
            reasons[name] = "not included"
        elif _matches(name, module, exclude):
            reasons[name] = "excluded"
        else:
            layers[name] = module
    tied = {name: names for name, m in layers.items() if len(names := _owners_of(model, m.weight)) > 1}
    if len(tied) == len(layers):
        why = [f"{' and '.join(names)} are one tensor" for names in tied.values()]
        why += [f"{f'{name}: ' if name else ''}{reason}" for name, reason in reasons.items() if reason]
        told = f": {'; '.join(why[:5])}" if why else ""
        raise ValueError(f"convert: the model has no nn.Linear, nn.Conv1d or nn.Conv2d layer to mask{told}")
    for names in tied.values():
        raise ValueError(f"convert: {' and '.join(names)} are one tensor; exclude tied layers or untie them")
    return layers, {name: why for name, why in reasons.items() if why}


def _matches(name: str, module: nn.Module, by: Iterable[Chosen]) -> bool:
    """Whether a module matches a name pattern or a type."""
    return any(fnmatch(name, p) if isinstance(p, str) else isinstance(module, p) for p in by)


def _unmaskable(module: nn.Module) -> str:
    """The reason why a module with parameters cannot be masked, or ""."""
    kind = type(module).__name__
    if type(module) not in MASKED:
        if isinstance(module, SupermaskLayer):
            return "it is a supermask layer already"
        if isinstance(module, tuple(MASKED)):
            return f"{kind} is a subclass"
        return "a norm" if "Norm" in kind else f"{kind} has no masked form"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed (weight_norm, prune, ...)"
    return "" if weight.requires_grad else "its weight requires no gradient"


def _check_patterns(
    what: str, patterns: Iterable[Chosen], known: Mapping[str, nn.Module], reasons: Mapping[str, str]
) -> None:
    """Raise ValueError for a name pattern that matches no known layer."""
    for pattern in patterns:
        if not isinstance(pattern, str) or any(fnmatch(name, pattern) for name in known):
            continue
        why = [f"{name}: {reason}" for name, reason in reasons.items() if reason and fnmatch(name, pattern)]
        names = ", ".join(list(known)[:5]) + (", ..." if len(known) > 5 else "")
        told = f"{why[0]}" if why else f'the layers are {names}; "encoder.*" names all within encoder'
        raise ValueError(f"convert: {what} pattern {pattern!r} matches no layer ({told})")


def _owners_of(model: nn.Module, weight: Any) -> list[str]:
    """Names of a parameter in all modules that hold it. A module with two names counts once."""
    return [
        full_name(name, key)
        for name, module in model.named_modules()
        for key, parameter in module._parameters.items()
        if parameter is weight
    ]


def _warn_of_few(model: nn.Module, passed_over: Mapping[str, str]) -> None:
    """Warn if masks cover less than `FEW` of the parameters that train."""
    rows = [r for r in summary(model).rows if passed_over.get(r.name) not in ("excluded", "not included")]
    masked, dense = (sum(r.parameters for r in rows if r.kind == kind) for kind in ("masked", "per task"))
    passed = [model.get_submodule(name) for name, why in passed_over.items() if why not in ("excluded", "not included")]
    matrices = [p for m in passed for p in m._parameters.values() if p is not None and p.dim() > 1 and p.requires_grad]
    if masked >= FEW * (masked + dense) or not matrices:  # a dense copy of biases and norms is small
        return
    sizes: dict[str, int] = {}
    for row in rows:
        if row.kind == "per task":
            sizes[row.type] = sizes.get(row.type, 0) + row.bytes_per_task
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:3]
    warnings.warn(
        f"convert: masks cover {100 * masked / (masked + dense):.0f} % of the parameters that train; every task keeps "
        f"a dense copy of the others, {sum(sizes.values()) / 1e6:.3g} MB: "
        + ", ".join(f"{kind} {size / 1e6:.3g} MB" for kind, size in largest)
        + ". Freeze them (requires_grad_(False)) or exclude them by name; exssnet.summary(model) lists all",
        stacklevel=3,
    )


def plain_state_dict(model: nn.Module) -> dict[str, Any]:
    """The state dict of a plain network with the model's present outputs. Each ``weight`` is masked.

    Args:
        model: A converted model.

    Returns:
        The names and shapes of the model before `convert`.

    Raises:
        RuntimeError: If a layer has neither scores nor a mask.

    Example:
        >>> plain_model.load_state_dict(plain_state_dict(phases.model))
    """
    state = model.state_dict()
    for name, layer in supermask_layers(model):
        prefix = f"{name}." if name else ""
        for key in TENSORS:
            state.pop(prefix + key, None)
        state[f"{prefix}weight"] = layer.weight.detach()
    return state


def _save_pretrained(model: nn.Module, save_directory: Any, *args: Any, **options: Any) -> Any:
    """`save_pretrained` of a converted transformers model. It saves the plain network of the active task."""
    save = type(model).save_pretrained  # type: ignore[attr-defined]
    return save(model, save_directory, *args, **options | {"state_dict": plain_state_dict(model)})


def unconvert(model: nn.Module) -> None:
    """Turn a converted model back into plain torch modules, in place. A masked layer keeps ``weight * mask``.

    Args:
        model: A converted model.

    Raises:
        RuntimeError: If a layer has neither scores nor a mask.
    """
    backward = {new: old for old, new in swaps().items()}
    for _, layer in supermask_layers(model):
        layer.to_plain()
    for module in model.modules():
        own = own_class(type(module))
        module.__class__ = backward.get(own, own)
        module.__dict__.pop("_selector", None)
        if OWN_FORWARD in vars(module):
            module.__dict__["forward"] = module.__dict__.pop(OWN_FORWARD)
        for switch in FAST_PATHS.values():
            if f"_{switch}" in module.__dict__:
                module.__dict__[switch] = module.__dict__.pop(f"_{switch}")
        if isinstance(vars(module).get("save_pretrained"), types.MethodType):
            del module.__dict__["save_pretrained"]
