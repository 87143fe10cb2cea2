"""The weights that all tasks share, and the copies of them that a joint phase trains."""

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from ..nn import SupermaskLayer
from .mask_bank import MaskBank


class SharedWeights:
    """The dense weights of a model's layers, which stay out of reach while a joint phase trains copies of them.

    So the entries that finished tasks use are right at every moment and for every thread, whatever an optimizer, a
    guard or averaged weights do to the copies.
    """

    def __init__(self, layers: Mapping[str, SupermaskLayer]) -> None:
        self._layers = layers
        self._originals: dict[str, Tensor] = {}  # while copies are trained; another dict after each change

    def tensors(self) -> dict[str, Tensor]:
        """The weights by layer name; no copies."""
        while True:
            originals = self._originals
            live = {name: layer.dense_weight for name, layer in self._layers.items()}
            if originals is self._originals:  # else another thread began or ended a joint phase meanwhile
                return {name: originals.get(name, weight).to(weight) for name, weight in live.items()}

    def train_copies(self) -> None:
        """Give the layers copies, which require a gradient."""
        originals = self.tensors()
        copies = {name: weight.detach().clone().requires_grad_() for name, weight in originals.items()}
        self._originals = originals
        for name, layer in self._layers.items():
            layer.dense_weight = copies[name]

    def put_back_used(self, call: str, bank: MaskBank) -> dict[Tensor, Tensor]:
        """Undo what was changed, in copies, of weights that finished tasks use, with a warning.

        Returns where these are: copy -> bool mask of its shape; nothing where no copies are trained.
        """
        used, changed = {}, 0
        for name, weight in self.tensors().items() if self._originals else ():
            copy = self._layers[name].dense_weight
            used[copy] = where = ~bank.free(name, torch.ones_like(weight, dtype=torch.bool))
            changed += int((where & (copy != weight)).sum())
            copy.detach()[where] = weight[where]
        if changed:
            warnings.warn(
                f"{call}: {changed} weights that earlier tasks use had changed in the joint phase and were put back; "
                "this task may do worse without them: guard each optimizer before its first step",
                stacklevel=3,
            )
        return used

    def end(self, store: bool) -> None:
        """Give the layers their weights back, after those of the copies were stored in them or not."""
        weights = self.tensors() if self._originals else {}
        for name, weight in weights.items():
            if store:
                weight.copy_(self._layers[name].dense_weight.detach())
            self._layers[name].dense_weight = weight
        self._originals = {}
