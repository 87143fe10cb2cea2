"""Records which weights each task has trained, and the SHA-256 of the weights before the first of them."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, uint8

from ..ops import pack_mask

Packed = Mapping[str, Tensor]  # layer name -> packed mask, uint8 of (ceil(n / 8),); layers without True are left out


@dataclass(frozen=True)
class Trained:
    """Which weights tasks have trained. It never changes; the methods return another one.

    Attributes:
        base: The SHA-256 of the base weights, as they were before the first task that trained weights. "" if none has:
            then the present weights are the base weights. None if it is not known.
        tasks: Of each finished task, the weights that it trained, also those that its mask does not keep.
        open: Those that were written while the task was open, before its end.
    """

    base: str | None = ""
    tasks: tuple[Packed, ...] = ()
    open: Packed = field(default_factory=dict)

    def writing(self, masks: Mapping[str, Tensor], base: Callable[[], str]) -> "Trained":
        """The open task writes weights. To be called before it does.

        Args:
            masks: Layer name -> bool mask of the weights.
            base: Returns the SHA-256 of the present weights.
        """
        packed = {name: pack_mask(mask) for name, mask in masks.items() if bool(mask.any())}
        return replace(self, open=_union(self.open, packed), base=base() if packed and self.base == "" else self.base)

    def finished(self) -> "Trained":
        """The open task is finished."""
        return replace(self, tasks=(*self.tasks, self.open), open={})

    def abandoned(self) -> "Trained":
        """The open task is dropped. What it has written counts as written by the task before it."""
        if not self.tasks:
            return self
        return replace(self, tasks=(*self.tasks[:-1], _union(self.tasks[-1], self.open)), open={})

    def any(self, name: str) -> Tensor | None:
        """The packed mask of a layer's weights that any task has trained. None if there are none."""
        union: Packed = {}
        for masks in (*self.tasks, self.open):
            union = _union(union, {name: masks[name]} if name in masks else {})
        return union.get(name)


def _union(a: Packed, b: Packed) -> Packed:
    return {**a, **{name: bits | a[name].to(bits.device) if name in a else bits for name, bits in b.items()}}


def sha256(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """The SHA-256 of tensors with their names, dtypes and shapes, in hexadecimal digits."""
    digest = hashlib.sha256()
    for name, t in tensors:
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}\n".encode())
        digest.update(t.detach().cpu().contiguous().reshape(-1).view(uint8).numpy().data)
    return digest.hexdigest()
