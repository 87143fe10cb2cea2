"""Layers with a supermask, and `convert` for whole models."""

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatch
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import blocks, layout
from .beginning import allocate_density, signed_constant_
from .choice import PRODUCTS, Products, fused_is_faster, sparse_is_faster, traced
from .layout import TaskBatchNorm, TaskBatchNorm1d, TaskBatchNorm2d
from .ops import (
    PackedPattern,
    SparsePattern,
    density_to_k,
    kept_weights,
    masked_weight,
    packed_conv1d,
    packed_conv2d,
    packed_linear,
    sparse_conv1d,
    sparse_conv2d,
    sparse_conv2d_folded,
    sparse_linear,
    sparse_pattern,
    supermask_conv1d,
    supermask_conv2d,
    supermask_linear,
    supermask_weights,
    topk_mask,
    topk_masks,
)
from .ops.library import product_dtype
from .ops.packed import as_packed
from .selecting import capturing, forget_selection, select_for_all

__all__ = [
    "SupermaskConv1d",
    "SupermaskConv2d",
    "SupermaskLayer",
    "SupermaskLinear",
    "TaskBatchNorm1d",
    "TaskBatchNorm2d",
    "allocate_density",
    "convert",
    "signed_constant_",
    "supermask_layers",
]


PATTERN = SparsePattern._fields[:-1]
"""Names of the buffers that hold a layer's pattern."""

# One compiled graph for the weight phases of all tasks: the compiler takes sizes of parameters for constants.
torch.compiler.config.dynamic_sources += r",.*\._(parameters|buffers)\['(free|frozen)_values'\]"


class SupermaskLayer(nn.Module):
    """What the supermask layers share: a dense weight that is no parameter, and one of three ways to use it.

    - Scores (the mask phase; how a new layer starts): `scores` is the parameter, the mask is their top k.
    - Values (the weight phase): `free_values` is the parameter, the kept weights that may change; `frozen_values`
      and the pattern are buffers. The rest of the weight is out of every optimizer's reach.
    - A fixed mask (evaluation): values of which none is free.

    `weight` is a buffer of the plain layer's shape in all of them. `products` chooses between sparse and dense
    products, see `exssnet.choice.sparse_is_faster`.
    """

    products: Products
    weight: Tensor
    scores: nn.Parameter | None
    free_values: nn.Parameter | None
    frozen_values: Tensor | None
    selection: Tensor | None  # row or packed mask, made by the converted model for all layers; valid for one forward
    masked: Tensor | None  # the masked weight in the dtype of the products, made likewise where they want it written
    k: int
    _kept: dict[Any, Any] | None = None  # what follows from values that change no more, see exssnet.serving

    def _own_weight(self, density: float, products: Products = "auto") -> None:
        """Turn the plain layer's weight into a buffer and start with random scores."""
        self.products = products
        self._choices: dict[tuple[Any, ...], bool] = {}
        self._seen: SparsePattern | None = None
        self._made: dict[str, tuple[SparsePattern, Any]] = {}
        self.k = density_to_k(self.weight.numel(), density)
        weight = self._parameters.pop("weight")
        assert weight is not None
        self.register_buffer("weight", weight.detach())
        for name in ("scores", "free_values"):
            self.register_parameter(name, None)
        for name in ("frozen_values", *PATTERN):
            self.register_buffer(name, None, persistent=False)
        self.selection = self.masked = None
        self.written = False  # whether this layer's products want the masked weight written
        self.use_scores(self.random_scores())

    @property
    def density(self) -> float:
        """Share of the weights that a mask keeps."""
        return self.k / max(1, self.weight.numel())

    def random_scores(self, generator: torch.Generator | None = None) -> Tensor:
        """Fresh scores, Kaiming-uniform with a = sqrt(5), drawn on the CPU so that every device starts alike."""
        scores = torch.empty(self.weight.shape, device="cpu")
        if scores.numel():
            nn.init.kaiming_uniform_(scores, a=math.sqrt(5), generator=generator)
        return scores.to(self.weight.device)

    def use_scores(self, scores: Tensor) -> None:
        """Enter the mask phase from a copy of the given scores, of the weight's shape."""
        self._clear()
        self.scores = nn.Parameter(scores.detach().to(self.weight.device, torch.float32, copy=True).contiguous())

    def use_values(self, mask: Tensor, free_mask: Tensor) -> None:
        """Fix a mask (bool, of the weight's shape); the kept weights inside free_mask become trainable."""
        pattern = sparse_pattern(mask, free_mask, getattr(self, "groups", 1))
        self._clear()
        if bool(free_mask.any()):
            self.free_values = nn.Parameter(self.weight[free_mask])
        self.frozen_values = self.weight[mask & ~free_mask]
        for name, tensor in zip(PATTERN, pattern.tensors, strict=True):
            setattr(self, name, tensor)

    def store_values(self, free_mask: Tensor) -> None:
        """Scatter the trained values back into the weight; free_mask is the one of `use_values`."""
        if self.free_values is not None:
            self.weight[free_mask] = self.free_values.detach()

    def mask(self) -> Tensor:
        """The current bool mask, of the weight's shape."""
        if self.scores is not None:
            return topk_mask(self.scores, self.k)
        kept = torch.zeros(self.weight.numel(), dtype=torch.bool, device=self.weight.device)
        kept[kept_weights(self._pattern(), self.weight.shape)] = True
        return kept.reshape(self.weight.shape)

    def _pattern(self) -> SparsePattern:
        buffers = self._buffers  # read at every step: `getattr` of a module is slow
        if buffers["frozen_values"] is None:
            raise RuntimeError("this layer has neither scores nor a mask: start a task or activate one")
        if torch.compiler.is_compiling() or self._seen is None or self._seen.row_ptr is not buffers["row_ptr"]:
            self._seen = SparsePattern(*(buffers[name] for name in PATTERN), math.prod(self.weight.shape[2:]))  # type: ignore[arg-type, call-arg]
        return self._seen

    def _values(self) -> tuple[Tensor, Tensor, SparsePattern]:
        pattern, frozen, free = self._pattern(), self._buffers["frozen_values"], self._parameters["free_values"]
        assert frozen is not None
        return frozen.new_empty(0) if free is None else free, frozen, pattern

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        """make(), called once where the values change no more."""
        if self._kept is None:
            return make()
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def _dense_weight(self) -> Tensor:
        """The masked weight that the values make; where they belong is computed once for a pattern."""

        def make() -> Tensor:
            where = None
            if not traced() and self._pattern().slot.numel() < self.weight.numel():
                where = self._of_pattern("where", lambda pattern: kept_weights(pattern, self.weight.shape))
            return masked_weight(*self._values(), self.weight.shape, where)

        weight: Tensor = self._once(self, make)
        return weight

    def _packed_values(self) -> tuple[Tensor, Tensor, PackedPattern]:
        free, frozen, _ = self._values()
        return free, frozen, self._of_pattern("packed", lambda p: as_packed(p, self.weight.shape, free.numel()))

    def _of_pattern(self, what: str, make: Callable[[SparsePattern], Any]) -> Any:
        """What follows from the pattern alone, made once for a pattern."""
        pattern = self._pattern()
        if what not in self._made or self._made[what][0] is not pattern:
            if traced() or capturing():
                return make(pattern)
            with torch.inference_mode(False):
                self._made[what] = pattern, make(pattern)
        return self._made[what][1]

    def _sparse(self, x: Tensor, padding: Any = None) -> bool:
        """Whether to multiply only what is kept, see `sparse_is_faster`; decided once for a shape of x."""

        def decide() -> bool:
            geometry = () if padding is None else self._geometry(padding)
            return sparse_is_faster(x, self.weight, self.density, geometry, self.products)

        return self._decided("sparse", decide, x, self.products, self.k)

    def _fused(self, x: Tensor, padding: Any = None) -> bool:
        """Whether a dense weight is masked as it is multiplied, see `fused_is_faster`; on a CPU by scores alone."""
        if x.device.type == "cpu" or self._kept is not None:  # values that change no more are written once
            return self.scores is not None
        dtype, density = product_dtype(x), None if self.scores is not None else self.density

        def decide() -> bool:
            geometry = () if padding is None else self._geometry(padding)
            return fused_is_faster(x, self.weight, dtype, geometry, density)

        fused = self._decided("fused", decide, x, x.stride(), dtype, density)
        if density is None and not traced():
            self.written = not fused  # for the next forward of the model
        return fused

    def _decided(self, what: str, decide: Callable[[], bool], x: Tensor, *more: Any) -> bool:
        if traced():
            return decide()
        key = what, x.shape, x.dtype, x.device, torch.get_num_threads(), *more
        if key not in self._choices:
            self._choices[key] = decide()
        return self._choices[key]

    def _masked_weight(self, x: Tensor) -> Tensor:
        """The weight under the mask of the scores, in the dtype of the products of x."""
        dtype = product_dtype(x)
        if self.masked is not None and self.masked.dtype == dtype:
            return self.masked
        assert self.scores is not None
        selection = (
            topk_masks([self.scores], [self.k], packed=True).masks[0] if self.selection is None else self.selection
        )
        return supermask_weights([self.weight], [self.scores], [selection], dtype)[0]

    def _geometry(self, padding: Any) -> tuple[Any, ...]:
        return self.stride, padding, self.dilation, self.groups

    def _selected(self) -> dict[str, Any]:
        return {"k": self.k} if self.selection is None else {"selection": self.selection}

    def _clear(self) -> None:
        self._seen, self._made = None, {}
        for name in ("scores", "free_values", "frozen_values", *PATTERN):
            setattr(self, name, None)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_choices": {}, "_made": {}}  # another machine may choose otherwise

    def extra_repr(self) -> str:
        phase = "scores" if self.scores is not None else "values" if self.free_values is not None else "fixed mask"
        return f"{super().extra_repr()}, k={self.k} of {self.weight.numel()}, {phase}"


class SupermaskLinear(SupermaskLayer, nn.Linear):
    """`nn.Linear` of which only a supermask of the weights is used; see `SupermaskLayer` and `supermask_linear`.

    density: share of the weights kept, in [0, 1]; the other arguments are those of `nn.Linear`, by default without a
    bias. The bias, if any, has no mask. x (..., in_features) to (..., out_features). ValueError for a wrong density.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False, *options: Any, density: float = 0.1,
                 **more: Any) -> None:  # fmt: skip
        super().__init__(in_features, out_features, bias, *options, **more)
        self._own_weight(density)

    def forward(self, x: Tensor) -> Tensor:
        sparse = self._sparse(x)
        if self.scores is not None:
            if not self._fused(x):
                return F.linear(x, self._masked_weight(x), self.bias)
            return supermask_linear(x, self.weight, self.scores, bias=self.bias, sparse=sparse, **self._selected())
        if sparse:
            return sparse_linear(x, *self._values(), self.bias)
        if self._fused(x):
            return packed_linear(x, *self._packed_values(), self.bias)
        return F.linear(x, self._dense_weight(), self.bias)


class _SupermaskConv(SupermaskLayer):
    """What both convolutions share; they name the operators."""

    supermask_product: Callable[..., Tensor]
    sparse_product: Callable[..., Tensor]
    packed_product: Callable[..., Tensor]
    dense_product: Callable[..., Tensor]

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, ...], *geometry: Any,
                 density: float = 0.1, bias: bool = False, **options: Any) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels, kernel_size, *geometry, bias=bias, **options)  # type: ignore[call-arg]
        self._own_weight(density)

    def forward(self, x: Tensor) -> Tensor:
        x, padding = self._padded(x)
        sparse = self._sparse(x, padding)
        if self.scores is not None:
            if not self._fused(x, padding):
                weight = self._masked_weight(x)
                return self.dense_product(x, weight, self.bias, self.stride, padding, self.dilation, self.groups)
            return self.supermask_product(
                x, self.weight, self.scores, bias=self.bias, stride=self.stride, padding=padding,
                dilation=self.dilation, groups=self.groups, sparse=sparse, **self._selected(),
            )  # fmt: skip
        if sparse:
            return self.sparse_product(
                x, *self._values(), self.kernel_size, self.bias, self.stride, padding, self.dilation
            )  # fmt: skip
        geometry = self.bias, self.stride, padding, self.dilation, self.groups
        if self._fused(x, padding):
            return self.packed_product(x, *self._packed_values(), *geometry)
        return self.dense_product(x, self._dense_weight(), *geometry)

    def _padded(self, x: Tensor) -> tuple[Tensor, Any]:
        """x with the padding that the operators do not know (modes other than zeros, "same"), and what is left."""
        if self.padding_mode == "zeros" and not isinstance(self.padding, str):
            return x, self.padding
        mode = "constant" if self.padding_mode == "zeros" else str(self.padding_mode)
        return F.pad(x, self._reversed_padding_repeated_twice, mode=mode), (0,) * len(self.kernel_size)  # type: ignore[arg-type]


class SupermaskConv1d(_SupermaskConv, nn.Conv1d):
    """`nn.Conv1d` of which only a supermask of the weights is used: x (N, C, L) to (N, O, L').

    density: share of the weights kept, in [0, 1]; the other arguments are those of `nn.Conv1d`, by default without a
    bias. See `SupermaskLayer` and `supermask_conv1d`.
    """

    supermask_product = staticmethod(supermask_conv1d)
    sparse_product = staticmethod(sparse_conv1d)
    packed_product = staticmethod(packed_conv1d)
    dense_product = staticmethod(F.conv1d)


class SupermaskConv2d(_SupermaskConv, nn.Conv2d):
    """`nn.Conv2d` of which only a supermask of the weights is used: x (N, C, H, W) to (N, O, H', W').

    density: share of the weights kept, in [0, 1]; the other arguments are those of `nn.Conv2d`, by default without a
    bias. See `SupermaskLayer` and `supermask_conv2d`.
    """

    supermask_product = staticmethod(supermask_conv2d)
    sparse_product = staticmethod(sparse_conv2d)
    packed_product = staticmethod(packed_conv2d)
    dense_product = staticmethod(F.conv2d)

    def normalised(self, x: Tensor, norm: TaskBatchNorm, residual: Tensor | None, relu: bool) -> Tensor | None:
        """``norm(self(x), residual, relu)`` in one operation; None in training, and where it cannot be had.

        The norm's statistics become a scale and a bias of the output, see `sparse_conv2d_folded`.
        """
        if self.frozen_values is None or norm.training or norm.running_var is None or norm.running_mean is None:
            return None
        if torch.is_grad_enabled() or x.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled("cpu"):
            return None
        if residual is not None and (residual.dtype != x.dtype or residual.dim() != 4):
            return None
        x, padding = self._padded(x)
        if not self._sparse(x, padding):
            return None
        scale, bias = self._once((self, norm), lambda: self._folded(norm))
        return sparse_conv2d_folded(
            x, *self._values(), self.kernel_size, scale, bias, residual, relu, self.stride, padding, self.dilation
        )  # type: ignore[arg-type]

    def _folded(self, norm: TaskBatchNorm) -> tuple[Tensor, Tensor]:
        """Scale and bias of the product that the bias and a norm in evaluation amount to."""
        assert norm.running_var is not None
        assert norm.running_mean is not None
        scale = (norm.running_var + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight
        mean = norm.running_mean if self.bias is None else norm.running_mean - self.bias
        return scale, -scale * mean if norm.bias is None else norm.bias - scale * mean


MASKED: Mapping[type[nn.Module], type[SupermaskLayer]] = {
    nn.Linear: SupermaskLinear,
    nn.Conv1d: SupermaskConv1d,
    nn.Conv2d: SupermaskConv2d,
}


def swaps() -> Mapping[type[nn.Module], type[nn.Module]]:
    """Classes that `convert` puts in the place of others; torchvision's where somebody has imported it."""
    found = {**layout.SWAPPED, **blocks.SWAPPED, nn.Sequential: blocks.FusedSequential}
    if "torchvision.models.resnet" in sys.modules:
        from . import torchvision_blocks

        found |= torchvision_blocks.SWAPPED
    return found


def _swapped(module: nn.Module) -> type[nn.Module]:
    if type(module) is nn.Sequential and not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module):
        return nn.Sequential
    return swaps().get(type(module), type(module))


def supermask_layers(model: nn.Module) -> Iterator[tuple[str, SupermaskLayer]]:
    """(name, layer) of every supermask layer of a model, in the order of `named_modules`."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, SupermaskLayer))


def convert(
    model: nn.Module,
    density: float = 0.1,
    include: Iterable[str | type[nn.Module]] | None = None,
    exclude: Iterable[str | type[nn.Module]] = (),
    weights: Literal["keep", "signed_constant"] = "keep",
    init_scale: Literal["official", "density"] = "official",
    allocation: Literal["uniform", "er"] = "uniform",
    products: Products = "auto",
) -> nn.Module:
    """Put supermasks into any torch model, in place; returns the model.

    `nn.Linear`, `nn.Conv1d` and `nn.Conv2d` become supermask layers. Batch norms become per task and, like pools,
    keep the layout of the sparse products; those of residual blocks (`exssnet.models`, torchvision) and in an
    `nn.Sequential` take the addition and the ReLU that follow along, unless these have hooks. All modules keep their
    identity, name and hooks.

    density: share of the weights kept, in (0, 1]; allocation: how it is spread over layers, see `allocate_density`.
    include, exclude: layers by name pattern ("encoder.*") or by type; all three types are included by default.
    weights: "keep" what the model has (pretrained weights), or "signed_constant" for training from scratch, of
        scale `init_scale`, see `signed_constant_`.
    products: "sparse" or "dense" everywhere, or "auto", whichever is faster for a layer on this machine.
    Biases, affine norms, embeddings and excluded layers have no mask: those that require a gradient become per task
    under `Phases`, those that do not are frozen.
    ValueError if nothing is to convert, or if a weight to be masked is tied to another module's.
    """
    wanted = tuple(MASKED) if include is None else tuple(include)

    def chosen(name: str, module: nn.Module, by: Iterable[str | type[nn.Module]]) -> bool:
        return any(fnmatch(name, p) if isinstance(p, str) else isinstance(module, p) for p in by)

    layers = [
        m
        for name, m in model.named_modules()
        if type(m) in MASKED and chosen(name, m, wanted) and not chosen(name, m, exclude)
    ]
    if not layers:
        raise ValueError("convert: the model has no nn.Linear, nn.Conv1d or nn.Conv2d layer that was included")
    if products not in PRODUCTS:
        raise ValueError(f"convert: products must be one of {', '.join(PRODUCTS)}, got {products!r}")
    if weights not in ("keep", "signed_constant"):
        raise ValueError(f'convert: weights must be "keep" or "signed_constant", got {weights!r}')
    _refuse_tied(model, layers)
    densities = allocate_density([m.weight.shape for m in layers], density, allocation)  # type: ignore[misc]
    for layer, layer_density in zip(layers, densities, strict=True):
        layer.__class__ = MASKED[type(layer)]
        assert isinstance(layer, SupermaskLayer)
        layer._own_weight(layer_density, products)
        if weights == "signed_constant":
            signed_constant_(layer.weight, layer_density, init_scale)
    for module in model.modules():
        module.__class__ = _swapped(module)
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # its fast path would read the weights behind the masks' back
    model._masked = [m for m in model.modules() if isinstance(m, SupermaskLayer)]  # type: ignore[assignment]
    model._handed = None  # type: ignore[assignment]
    model.register_buffer("selection_hint", None, persistent=False)
    model.register_forward_pre_hook(select_for_all)
    model.register_forward_hook(forget_selection, always_call=True)
    return model


def _refuse_tied(model: nn.Module, layers: list[nn.Module]) -> None:
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(f"{name}.{key}".lstrip("."))
    for layer in layers:
        names = owners[id(layer.weight)]
        if len(names) > 1:
            raise ValueError(f"convert: {' and '.join(names)} are one tensor; exclude tied layers or untie them")


def unconvert(model: nn.Module) -> None:
    """Turn a converted model back into plain torch modules, in place: each masked layer keeps `weight * mask`."""
    backward = {new: old for old, new in (MASKED | swaps()).items()}  # type: ignore[operator]
    for _, layer in supermask_layers(model):
        weight = layer.weight.where(layer.mask(), 0)
        layer._clear()
        for name in ("scores", "free_values"):
            del layer._parameters[name]
        for name in ("weight", "frozen_values", *PATTERN):
            del layer._buffers[name]
            layer._non_persistent_buffers_set.discard(name)
        for name in ("selection", "masked", "written", "k", "products", "_choices", "_seen", "_made"):
            delattr(layer, name)
        layer.weight = nn.Parameter(weight)
    for module in model.modules():
        module.__class__ = backward.get(type(module), type(module))
        for hooks, ours in (
            (module._forward_pre_hooks, select_for_all),
            (module._forward_hooks, forget_selection),
        ):
            for key in [key for key, hook in hooks.items() if hook is ours]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)
        for name in ("_masked", "_handed"):
            module.__dict__.pop(name, None)
        module._buffers.pop("selection_hint", None)
        module._non_persistent_buffers_set.discard("selection_hint")
