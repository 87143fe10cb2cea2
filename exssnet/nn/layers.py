"""What layers with a supermask share: a dense weight, of which a mask keeps a share, and the ways to use it."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import config as compiler

from ..ops import (
    BitmapPattern,
    SparsePattern,
    density_to_k,
    kept_weights,
    masked_weight,
    pack_mask,
    sparse_pattern,
    supermask_weights,
    topk_mask,
    topk_masks,
    unpack_mask,
)
from ..ops.bitmap import as_bitmap
from ..ops.library import product_dtype
from .choice import Products, fused_is_faster, recorded, sparse_is_faster, traced
from .selector import capturing, forwards, in_backward, recomputable

PATTERN = SparsePattern._fields[:-1]
"""Names of the buffers that hold a layer's pattern."""
NO_MASK = "this layer has neither scores nor a mask: start a task or activate one"
TENSORS = (
    "dense_weight", "scores", "free_values", "frozen_values", "packed_mask", "packed_free_mask", "kept", *PATTERN,
)  # fmt: skip
"""Names of all parameters and buffers that a layer has in place of the plain layer's weight."""
MODE = (*(name for name in TENSORS if name not in ("dense_weight", "kept")), "_seen", "_made", "called", "recent")
"""Names of what differs between the modes of a layer; ATTRIBUTES: of all that a layer has beside tensors."""
ATTRIBUTES = (*MODE[-4:], "selection", "masked", "written", "k", "products", "_choices", "_read")

# One compiled graph for the weight phases of all tasks: the compiler takes sizes of parameters for constants.
compiler.dynamic_sources += r",.*\._(parameters|buffers)\['(free|frozen)_values'\]"


def full_name(module: str, key: str) -> str:
    """The name in a model of the parameter or buffer `key` of its module of that name, which is "" for the model."""
    return f"{module}.{key}".lstrip(".")


class SupermaskLayer(nn.Module):
    """What the supermask layers share: a dense weight that is no parameter, and one of three ways to use it.

    - Scores (the mask phase; how a new layer starts): `scores` is the parameter, the mask is their top k.
    - Values (the weight phase): `free_values` is the parameter, the kept weights that may change; `frozen_values`,
      `packed_mask`, `packed_free_mask` and the pattern are buffers. The rest of the weight is out of every optimizer's
      reach.
    - A fixed mask (evaluation): values of which none is free.

    `dense_weight` is a buffer of the plain layer's shape in all of them. `weight` is what the layer multiplies by,
    ``dense_weight * mask`` with its gradient. A state dict of the layer holds which of the three it is in, and loading
    it brings the layer there; the state dict of a plain layer loads into `dense_weight`. `products` chooses between
    sparse and dense products, see `exssnet.nn.choice.sparse_is_faster`.
    """

    products: Products
    dense_weight: Tensor
    scores: nn.Parameter | None
    free_values: nn.Parameter | None
    frozen_values: Tensor | None
    packed_mask: Tensor | None
    packed_free_mask: Tensor | None
    kept: Tensor  # k, for the state dict
    selection: Tensor | None  # row or packed mask, made by the converted model for all layers; valid for one forward
    masked: Tensor | None  # the masked weight in the dtype of the products, made likewise where they want it written
    recent: Tensor | None  # the selection of the last forward, for activations that are computed again in its backward
    called: bool  # whether the layer was used since it got its scores
    k: int
    _kept: dict[Any, Any] | None = None  # what follows from values that change no more, see exssnet.continual.serving
    _read: tuple[Tensor, int, object] | None = None  # `weight` as somebody outside of a forward got it

    def _own_weight(self, density: float, products: Products = "auto") -> None:
        """Turn the plain layer's weight into a buffer and start with random scores."""
        self.products = products
        self._choices: dict[tuple[Any, ...], bool] = {}
        self._seen: SparsePattern | None = None
        self._made: dict[str, tuple[SparsePattern, Any]] = {}
        weight = self._parameters.pop("weight")
        assert weight is not None
        self.k = density_to_k(weight.numel(), density)
        self.register_buffer("dense_weight", weight.detach())
        self.register_buffer("kept", torch.tensor(self.k, device=weight.device))
        for name in ("scores", "free_values"):
            self.register_parameter(name, None)
        for name in ("packed_mask", "packed_free_mask"):
            self.register_buffer(name, None)
        for name in ("frozen_values", *PATTERN):
            self.register_buffer(name, None, persistent=False)
        self.selection = self.masked = self.recent = None
        self.written = False  # whether this layer's products want the masked weight written
        self.use_scores(self.random_scores())

    @property
    def weight(self) -> Tensor:
        """The weight in effect, ``dense_weight * mask``, of the plain layer's shape, with its gradient.

        For modules that multiply by it themselves. It is computed at each access: RuntimeError, at the next access or
        forward, if something was written into it.
        """
        if "dense_weight" not in self._buffers:  # the plain layer is being built
            if (own := self._parameters.get("weight")) is None:
                raise AttributeError("weight")
            return own
        self._check_read()
        weight = self._effective_weight()
        if self.scores is not None:
            self._note_call()
        if not (traced() or forwards() or weight.is_inference()):
            self._read = weight, weight._version, self._versions()
        return weight

    def _effective_weight(self) -> Tensor:
        if self.scores is None:
            return self._weight_of_values()
        return supermask_weights([self.dense_weight], [self.scores], [self._selection()])[0]

    def _check_read(self) -> None:
        """RuntimeError if the weight that somebody got was written to: that would have no effect."""
        if self._read is None:
            return
        (weight, version, versions), self._read = self._read, None
        written = weight._version != version
        if not written and versions == self._versions():  # `.data` is written to behind the version's back
            with torch.no_grad():
                written = not torch.allclose(weight, self._effective_weight(), rtol=0, atol=0, equal_nan=True)
        if written:
            raise RuntimeError(
                f"the weight of {type(self).__name__} {tuple(self.dense_weight.shape)} was written to, without effect: "
                "it is computed from dense_weight and the mask. Write to dense_weight, before the first task"
            )

    def _versions(self) -> object:
        tensors = (self.dense_weight, self.scores, self.free_values, self.frozen_values)
        return [(id(t), t.data_ptr(), t._version) for t in tensors if t is not None]

    def _note_call(self) -> None:
        if not torch.compiler.is_compiling():
            self.__dict__["called"] = True  # to set an attribute of a module is slow

    @property
    def density(self) -> float:
        """Share of the weights that a mask keeps."""
        return self.k / max(1, self.dense_weight.numel())

    def random_scores(self, generator: torch.Generator | None = None) -> Tensor:
        """Fresh scores, Kaiming-uniform with a = sqrt(5), drawn on the CPU so that every device starts alike."""
        scores = torch.empty(self.dense_weight.shape, device="cpu")
        if scores.numel():
            nn.init.kaiming_uniform_(scores, a=math.sqrt(5), generator=generator)
        return scores.to(self.dense_weight.device)

    def use_scores(self, scores: Tensor) -> None:
        """Enter the mask phase from a copy of the given scores, of the weight's shape."""
        self._clear()
        self.scores = nn.Parameter(scores.detach().to(self.dense_weight.device, torch.float32, copy=True).contiguous())

    def use_values(self, mask: Tensor, free_mask: Tensor) -> None:
        """Fix a mask (bool, of the weight's shape); the kept weights inside free_mask become trainable."""
        pattern = sparse_pattern(mask, free_mask, getattr(self, "groups", 1))
        self._clear()
        if bool(free_mask.any()):
            self.free_values = nn.Parameter(self.dense_weight[free_mask])
        self.frozen_values = self.dense_weight[mask & ~free_mask]
        self.packed_mask, self.packed_free_mask = pack_mask(mask), pack_mask(free_mask)
        for name, tensor in zip(PATTERN, pattern.tensors, strict=True):
            setattr(self, name, tensor)

    def hold(self) -> dict[str, Any]:
        """The mode that the layer is in, for `put_back`."""
        return {name: getattr(self, name) for name in ("dense_weight", *MODE)}

    def put_back(self, held: Mapping[str, Any]) -> None:
        """Return to a mode that the layer was in; its tensors are the same objects, as a CUDA graph may know them."""
        for name, value in held.items():
            own = self._parameters if name in self._parameters else self._buffers
            (own if name in own else self.__dict__)[name] = value

    def store_values(self, free_mask: Tensor) -> None:
        """Scatter the trained values back into the weight; free_mask is the one of `use_values`."""
        if self.free_values is not None:
            self.dense_weight[free_mask] = self.free_values.detach()

    def mask(self) -> Tensor:
        """The current bool mask, of the weight's shape."""
        if self.scores is not None:
            return topk_mask(self.scores, self.k)
        if self.packed_mask is None:
            raise RuntimeError(NO_MASK)
        return unpack_mask(self.packed_mask, self.dense_weight.shape)

    def _pattern(self) -> SparsePattern:
        buffers = self._buffers  # read at every step: `getattr` of a module is slow
        if buffers["frozen_values"] is None:
            raise RuntimeError(NO_MASK)
        if traced() or self._seen is None or self._seen.row_ptr is not buffers["row_ptr"]:
            taps = math.prod(self.dense_weight.shape[2:])
            pattern = SparsePattern(*(buffers[name] for name in PATTERN), taps)  # type: ignore[arg-type, call-arg]
            if traced():
                return pattern
            self._seen = pattern
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

    def _weight_of_values(self) -> Tensor:
        """The masked weight that the values make; where they belong is computed once for a pattern."""

        def make() -> Tensor:
            where = None
            if not traced() and self._pattern().slot.numel() < self.dense_weight.numel():
                where = self._of_pattern("where", lambda pattern: kept_weights(pattern, self.dense_weight.shape))
            return masked_weight(*self._values(), self.dense_weight.shape, where)

        weight: Tensor = self._once(self, make)
        return weight

    def _bitmap_values(self) -> tuple[Tensor, Tensor, BitmapPattern]:
        free, frozen, _ = self._values()
        return free, frozen, self._of_pattern("bitmap", lambda p: as_bitmap(p, self.dense_weight.shape, free.numel()))

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
            return sparse_is_faster(x, self.dense_weight, self.density, self._geometry(padding), self.products)

        return self._decided("sparse", decide, x, self.products, self.k)

    def _fused(self, x: Tensor, padding: Any = None) -> bool:
        """Whether a dense weight is masked as it is multiplied, see `fused_is_faster`; on a CPU by scores alone."""
        if x.device.type == "cpu" or self._kept is not None:  # values that change no more are written once
            return self.scores is not None
        dtype, density = product_dtype(x), None if self.scores is not None else self.density

        def decide() -> bool:
            return fused_is_faster(x, self.dense_weight, dtype, self._geometry(padding), density)

        fused = self._decided("fused", decide, x, x.stride(), dtype, density)
        if density is None and not traced():
            self.written = not fused  # for the next forward of the model
        return fused

    def _decided(self, what: str, decide: Callable[[], bool], x: Tensor, *more: Any) -> bool:
        if recorded():
            return decide()
        key = what, x.shape, x.dtype, x.device, torch.get_num_threads(), *more
        if key not in self._choices:
            if traced():
                return decide()
            self._choices[key] = decide()
        return self._choices[key]

    def _masked_weight(self, x: Tensor) -> Tensor:
        """The weight under the mask of the scores, in the dtype of the products of x."""
        dtype = product_dtype(x)
        if self.masked is not None and self.masked.dtype == dtype and not recomputable():
            return self.masked
        assert self.scores is not None
        return supermask_weights([self.dense_weight], [self.scores], [self._selection()], dtype)[0]

    def _selection(self) -> Tensor:
        """The selection of the scores: the model's, or the layer's own."""
        if (selection := self._selected()) is not None:
            return selection
        assert self.scores is not None
        return topk_masks([self.scores], [self.k], packed=True).masks[0]

    def _selected(self) -> Tensor | None:
        """The selection that the model made for this forward, or for the one that is computed again; None without."""
        if self.selection is None and self.recent is not None and in_backward():
            return self.recent
        return self.selection

    def _geometry(self, padding: Any) -> tuple[Any, ...]:
        return () if padding is None else (self.stride, padding, self.dilation, self.groups)

    def _scored(self) -> dict[str, Any]:
        return {"k": self.k} if (selection := self._selected()) is None else {"selection": selection}

    def _clear(self) -> None:
        self._seen, self._made, self._read, self.recent, self.called = None, {}, None, None, False
        for name in MODE:
            if name in TENSORS:
                setattr(self, name, None)

    def _apply(self, *how: Any) -> "SupermaskLayer":
        """Moves and casts: a weight that trains, in a joint phase, stays a leaf."""
        trains = self.dense_weight.requires_grad
        with torch.no_grad():
            super()._apply(*how)  # type: ignore[no-untyped-call]
        self.dense_weight.requires_grad_(trains)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Without what was made here: another machine may choose otherwise."""
        return {**self.__dict__, "_choices": {}, "_made": {}, "_read": None, "recent": None}

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Bring the layer to the mode of the state dict, then copy; a plain layer's weight goes to `dense_weight`."""
        hooks, messages = self._load_state_dict_pre_hooks, (missing_keys, unexpected_keys, error_msgs)
        for hook in hooks.values():  # they may refuse, before the mode is another one
            hook(state_dict, prefix, local_metadata, strict, *messages)
        own = {key: t for key, t in state_dict.items() if key.startswith(prefix)}
        given = {name: own[prefix + name] for name in ("weight", *TENSORS) if prefix + name in own}
        if "weight" in given and "dense_weight" not in given:
            own[f"{prefix}dense_weight"] = own.pop(f"{prefix}weight")
            own |= {prefix + name: t for name in ("scores", "kept") if (t := getattr(self, name)) is not None}
            wrong = "a plain weight was given, but the layer has a fixed mask" if self.packed_mask is not None else ""
        else:
            wrong = self._enter_mode_of(given)
        if wrong:
            error_msgs.append(f"{prefix.removesuffix('.')}: {wrong}")
            return
        self._load_state_dict_pre_hooks = type(hooks)()
        super()._load_from_state_dict(own, prefix, local_metadata, strict, *messages)  # type: ignore[no-untyped-call]
        self._load_state_dict_pre_hooks = hooks

    def _enter_mode_of(self, given: Mapping[str, Tensor]) -> str:
        """Make room for the tensors of a state dict; returns what is wrong with them, or ""."""
        shape, dense = self.dense_weight.shape, given.get("dense_weight")
        if "kept" in given and int(given["kept"]) != self.k:
            return f"its masks keep {int(given['kept'])} weights, the layer's keep {self.k} of {shape.numel()}"
        packed = {name: given[name] for name in ("packed_mask", "packed_free_mask") if name in given}
        if dense is None or dense.shape != shape or any(t.shape != (-(-shape.numel() // 8),) for t in packed.values()):
            return ""  # the caller tells of names and shapes
        if "scores" in given:
            if self.scores is None and given["scores"].shape == shape:
                self.use_scores(given["scores"])
        elif len(packed) == 2:
            mask, free = (unpack_mask(t.to(self.dense_weight.device), shape) for t in packed.values())
            if bool((free & ~mask).any()):
                return "its free mask is not inside its mask"
            with torch.no_grad():
                self.dense_weight.copy_(dense)
            have = (self.packed_mask, self.packed_free_mask)
            if all(t is not None and t.equal(new.to(t.device)) for t, new in zip(have, packed.values(), strict=True)):
                self.frozen_values = self.dense_weight[mask & ~free]  # parameters that an optimizer holds stay
            else:
                self.use_values(mask, free)
        return ""

    def extra_repr(self) -> str:
        phase = "scores" if self.scores is not None else "values" if self.free_values is not None else "fixed mask"
        return f"{super().extra_repr()}, k={self.k} of {self.dense_weight.numel()}, {phase}"
