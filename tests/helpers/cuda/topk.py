"""Calls of csrc/cuda/topk on the emulator."""

from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
"""In the order of the kernels' Float."""


@dataclass
class Result:
    masks: list[Tensor]
    selection: Tensor
    hint: Tensor | None
    nan: bool
    launches: int
    missed: int
    """Layers whose scores were read more than once."""


def bits(scores: Tensor) -> np.ndarray:
    return scores.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[scores.element_size()]).numpy()


def select(
    topk: ModuleType, scores: list[Tensor], k: list[int], hint: Tensor | None = None, with_masks: bool = True,
    nan_flag: int = 0, processors: int = 2, packed: bool = False,
) -> Result:  # fmt: skip
    arrays, kinds = [bits(s) for s in scores], [FLOATS.index(s.dtype) for s in scores]
    masks = [torch.empty(s.shape, dtype=torch.bool) for s in scores] if with_masks else []
    if packed:
        masks = [torch.empty(-(-s.numel() // 8), dtype=torch.uint8) for s in scores]
    selection = torch.empty(len(scores), 2, dtype=torch.int64)
    new_hint = None if hint is None else hint.clone(memory_format=torch.contiguous_format)
    flag = np.array([nan_flag], dtype=np.int32)
    workspace = torch.empty(topk.workspace_bytes(arrays, kinds), dtype=torch.uint8).numpy()
    launches = topk.topk_masks(
        arrays, kinds, k, [m.numpy() for m in masks], None if new_hint is None else new_hint.numpy(),
        selection.numpy(), flag, workspace, processors, packed,
    )  # fmt: skip
    missed = int(workspace[:4].view(np.uint32)[0])
    return Result(masks, selection, new_hint, bool(flag[0]), launches, missed)
