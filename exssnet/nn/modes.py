"""The modes of a supermask layer. A mode owns the mask's tensors and computes the product and the masked weight."""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import (
    BitmapPattern,
    SparsePattern,
    kept_weights,
    masked_weight,
    pack_mask,
    sparse_pattern,
    supermask_weights,
    topk_mask,
    unpack_mask,
)
from ..ops.bitmap import as_bitmap
from ..ops.library import product_dtype
from .choice import traced
from .selector import capturing, in_backward, recomputable, select

Layer = Any  # a SupermaskLayer, whose module imports this one
Folded = tuple[Tensor, ...]
Folding = Callable[[], Folded]
PATTERN = SparsePattern._fields[:-1]
"""Names of the buffers of a layer's pattern."""
PARAMETERS = ("scores", "free_values")
BUFFERS = ("frozen_values", "packed_mask", "packed_free_mask", *PATTERN)
"""Names of the buffers that a mode registers on its layer."""
NO_MASK = "this layer has neither scores nor a mask: start a task or activate one"


class Mode:
    """How a supermask layer computes its product. A mode belongs to one layer.

    A mode owns tensors. While the layer is in the mode, they are registered on the layer under fixed names, so that
    state dicts, moves and compiled graphs see them. The methods of the layer and of the mode read them there. When the
    layer enters another mode, the old mode takes its tensors back.

    Attributes:
        tensors: The tensors by name. None while they are registered on the layer.
        scored: Whether the mask is selected from scores, by the model's `Selector` if there is one.
        called: Whether the layer was called since it got its scores.
        made_for: Identity of the layer whose weights the mode holds. None if it fits any layer.
    """

    scored = False
    called = False

    def __init__(self, layer: Layer | None = None, **tensors: Tensor) -> None:
        self.tensors: dict[str, Tensor] | None = tensors
        self.made_for = None if layer is None else id(layer)

    def product(self, layer: Layer, x: Tensor, padding: Any) -> Tensor:
        """The layer's output for x. `padding` is that of a convolution, None for a linear layer."""
        raise RuntimeError(NO_MASK)

    def weight(self, layer: Layer) -> Tensor:
        """The masked weight, ``dense_weight * mask``, with its gradient."""
        raise RuntimeError(NO_MASK)

    def mask(self, layer: Layer) -> Tensor:
        """The mask, bool of the weight's shape."""
        raise RuntimeError(NO_MASK)

    def used(self, layer: Layer) -> bool:
        """Whether a product or a gradient has used the scores."""
        return False


class NoMask(Mode):
    """The mode of a layer with neither scores nor a mask. Calling the layer raises RuntimeError."""


class Scores(Mode):
    """The mask phase: `scores` is the parameter, and the mask is their top k.

    Args:
        layer: The layer that will enter the mode.
        scores: Scores of the weight's shape. They are copied to float32 on the layer's device.

    Attributes:
        selection: The selection of these scores. The `Selector` sets it for one forward pass of the model.
        masked: The masked weight in the dtype of the products. The `Selector` sets it for one forward pass too, if the
            layer's `written` is true.
        recent: The selection of the last forward pass, for activations that its backward pass recomputes.
    """

    scored = True

    def __init__(self, layer: Layer, scores: Tensor) -> None:
        copied = scores.detach().to(layer.dense_weight.device, torch.float32, copy=True).contiguous()
        super().__init__(layer, scores=nn.Parameter(copied))
        self.called = False
        self.selection: Tensor | None = None
        self.masked: Tensor | None = None
        self.recent: Tensor | None = None

    def product(self, layer: Layer, x: Tensor, padding: Any) -> Tensor:
        sparse = layer._sparse(x, padding)
        self._note_call()
        fused, geometry = layer._fused(x, padding), layer._geometry(padding)
        y: Tensor
        if fused:
            selection = self._selected(layer)
            y = layer.supermask_product(
                x, layer.dense_weight, layer.scores, None, layer.bias, *geometry, selection=selection, sparse=sparse
            )
        else:
            y = layer.dense_product(x, self._masked_weight(layer, x), layer.bias, *geometry)
        return y

    def weight(self, layer: Layer) -> Tensor:
        self._note_call()
        return self._weight(layer)

    def mask(self, layer: Layer) -> Tensor:
        return topk_mask(layer.scores, layer.k)

    def used(self, layer: Layer) -> bool:
        return self.called or getattr(layer.scores, "grad", None) is not None

    def _note_call(self) -> None:
        if not torch.compiler.is_compiling():
            self.called = True

    def _masked_weight(self, layer: Layer, x: Tensor) -> Tensor:
        """The masked weight in the dtype of the products of x."""
        dtype = product_dtype(x)
        if self.masked is not None and self.masked.dtype == dtype and not recomputable():
            return self.masked
        return self._weight(layer, dtype)

    def _weight(self, layer: Layer, dtype: torch.dtype | None = None) -> Tensor:
        return supermask_weights([layer.dense_weight], [layer.scores], [self._selected(layer)], dtype)[0]

    def _selected(self, layer: Layer) -> Tensor:
        """The model's selection for this forward pass, or for the one that is recomputed. Otherwise the layer's own.

        All three have the same form, because a checkpoint compares the tensors of both computations.
        """
        if self.selection is not None:
            return self.selection
        if self.recent is not None:
            if in_backward():
                return self.recent
            self.recent = None  # what is recomputed next may be this call
        return select([layer.scores], [layer.k])[0]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "recent": None}


class Fixed(Mode):
    """A fixed mask without trainable values: `frozen_values`, the packed masks and the pattern are buffers.

    Args:
        layer: The layer that will enter the mode.
        mask: Bool of the weight's shape.
        free_mask: Bool of the weight's shape. `Values` holds the values inside it.

    Raises:
        ValueError: If the masks do not fit the layer, or if the free mask is not inside the mask.
    """

    _derived: tuple[SparsePattern, dict[Hashable, Any]] | None = None  # the pattern, and what was computed from it

    def __init__(self, layer: Layer, mask: Tensor, free_mask: Tensor) -> None:
        pattern = sparse_pattern(mask, free_mask, getattr(layer, "groups", 1))
        super().__init__(
            layer,
            frozen_values=layer.dense_weight[mask & ~free_mask],
            packed_mask=pack_mask(mask),
            packed_free_mask=pack_mask(free_mask),
            **dict(zip(PATTERN, pattern.tensors, strict=True)),
        )

    def product(self, layer: Layer, x: Tensor, padding: Any) -> Tensor:
        sparse, geometry = layer._sparse(x, padding), layer._geometry(padding)
        y: Tensor
        if sparse:
            kernel = (layer.kernel_size,) if geometry else ()
            y = layer.sparse_product(x, *self.values(layer), *kernel, layer.bias, *geometry[:3])
        elif self._fuses(layer, x, padding):
            y = layer.bitmap_product(x, *self._bitmap_values(layer), layer.bias, *geometry)
        else:
            y = layer.dense_product(x, self.weight(layer), layer.bias, *geometry)
        return y

    def weight(self, layer: Layer) -> Tensor:
        where = None
        if not traced() and self._pattern(layer)[0].slot.numel() < layer.dense_weight.numel():
            where = self._once_a_pattern(layer, "where", lambda p: kept_weights(p, layer.dense_weight.shape))
        return masked_weight(*self.values(layer), layer.dense_weight.shape, where)

    def mask(self, layer: Layer) -> Tensor:
        return unpack_mask(layer.packed_mask, layer.dense_weight.shape)

    def values(self, layer: Layer) -> tuple[Tensor, Tensor, SparsePattern]:
        """Free values, frozen values and the pattern: the arguments of the sparse products."""
        frozen: Any = layer._buffers["frozen_values"]  # `getattr` of a module is too slow for every step
        free = layer._parameters["free_values"]
        return frozen.new_empty(0) if free is None else free, frozen, self._pattern(layer)[0]

    def once(self, layer: Layer, key: Hashable, compute: Folding, sources: Sequence[Tensor | None] = ()) -> Folded:
        """The tensors ``compute()``, cached under the key until one of the tensors `sources` changes.

        Identities, addresses and versions show a change, as autograd sees it, so a write through `.data` is not seen.
        An unknown source, None, forbids caching. A change rewrites the cached tensors, which a CUDA graph may read.
        """
        known = self._pattern(layer)[1]
        tensors = [t for t in sources if t is not None and not t.is_inference()]
        if traced() or len(tensors) < len(sources):
            return compute()
        state = [(id(t), t.data_ptr(), t._version) for t in tensors]
        before, cached, _ = known.get(key, (None, (), ()))
        if before == state or capturing():
            return cached if before == state else compute()
        with torch.inference_mode(False), torch.no_grad():
            folded = compute()
            for old, new in zip(cached, folded, strict=False):
                old.copy_(new)
            folded = cached or folded
            known[key] = state, folded, [t.detach() for t in tensors]  # which keeps the addresses taken
        return folded

    def _fuses(self, layer: Layer, x: Tensor, padding: Any) -> bool:
        """Whether dense products mask the weight while they read it."""
        return bool(layer._fused(x, padding))

    def _bitmap_values(self, layer: Layer) -> tuple[Tensor, Tensor, BitmapPattern]:
        """Free values, frozen values and the bitmap: the arguments of the bitmap products."""
        free, frozen, _ = self.values(layer)
        shape, count = layer.dense_weight.shape, free.numel()
        return free, frozen, self._once_a_pattern(layer, "bitmap", lambda p: as_bitmap(p, shape, count))

    def _pattern(self, layer: Layer) -> tuple[SparsePattern, dict[Hashable, Any]]:
        """The pattern, and by name what was computed from it. Moving the layer replaces both."""
        buffers, recorded = layer._buffers, traced()
        known = None if recorded else self._derived
        if known is None or known[0].row_ptr is not buffers["row_ptr"]:
            taps = math.prod(layer.dense_weight.shape[2:])
            known = SparsePattern(*(buffers[name] for name in PATTERN), taps), {}  # type: ignore[arg-type, call-arg]
            if not recorded:
                self._derived = known
        return known

    def _once_a_pattern(self, layer: Layer, name: str, compute: Callable[[SparsePattern], Any]) -> Any:
        """The result of ``compute(pattern)``, cached for each pattern under a name."""
        pattern, known = self._pattern(layer)
        if name not in known:
            if traced() or capturing():
                return compute(pattern)
            with torch.inference_mode(False):
                known[name] = compute(pattern)
        return known[name]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_derived": None}


class Values(Fixed):
    """The weight phase: the kept weights inside the free mask are the parameter `free_values`. Else like `Fixed`."""

    def __init__(self, layer: Layer, mask: Tensor, free_mask: Tensor) -> None:
        super().__init__(layer, mask, free_mask)
        assert self.tensors is not None
        self.tensors["free_values"] = nn.Parameter(layer.dense_weight[free_mask])

    def once(self, layer: Layer, key: Hashable, compute: Folding, sources: Sequence[Tensor | None] = ()) -> Folded:
        """Return ``compute()``. Optimizers and averages may write through `.data` here, so nothing is cached."""
        return compute()


class Constant(Fixed):
    """A fixed mask for inference. Values and norms never change again, so results that depend on them are cached.

    Args:
        weight: The dense weight.
        mask: Bool of the weight's shape.
        groups: The layer's number of groups.
        slots: 0, 1, 2, ... in int32, at least as many as the weight has entries. All layers of a network share them,
            because the values are in the pattern's order.
        kept: The cache of `once`. All layers of a network share it.
    """

    def __init__(self, weight: Tensor, mask: Tensor, groups: int, slots: Tensor, kept: dict[Hashable, Any]) -> None:
        pattern = sparse_pattern(mask, groups=groups)
        nothing = pattern.col_t[:0].clone()  # only gradients need the transposed pattern
        tensors = pattern.row_ptr, pattern.col, slots[: len(pattern.col)], pattern.row_ptr_t, nothing, nothing
        Mode.__init__(self, frozen_values=weight[mask], **dict(zip(PATTERN, tensors, strict=True)))
        self._kept = kept

    def weight(self, layer: Layer) -> Tensor:
        return self.once(layer, "weight", lambda: (super(Constant, self).weight(layer),))[0]

    mask = Mode.mask  # raises: only the values and their positions are stored

    def once(self, layer: Layer, key: Hashable, compute: Folding, sources: Sequence[Tensor | None] = ()) -> Folded:
        if (layer, key) not in self._kept:
            self._kept[layer, key] = compute()
        folded: Folded = self._kept[layer, key]
        return folded

    def _fuses(self, layer: Layer, x: Tensor, padding: Any) -> bool:
        return False  # the masked weight is cached
