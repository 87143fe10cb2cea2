"""Supermask layers, `convert` for whole models, and norms that belong to one task at a time."""

from .convert import convert, plain_state_dict, supermask_layers, swaps, unconvert
from .evaluation import evaluation
from .init import allocate_density, signed_constant_
from .layers import TENSORS, SupermaskLayer, full_name
from .linear_conv import SupermaskConv1d, SupermaskConv2d, SupermaskLinear
from .modes import PATTERN
from .norms import TaskBatchNorm1d, TaskBatchNorm2d
from .summary import Summary, summary

__all__ = [
    "PATTERN",
    "TENSORS",
    "Summary",
    "SupermaskConv1d",
    "SupermaskConv2d",
    "SupermaskLayer",
    "SupermaskLinear",
    "TaskBatchNorm1d",
    "TaskBatchNorm2d",
    "allocate_density",
    "convert",
    "evaluation",
    "full_name",
    "plain_state_dict",
    "signed_constant_",
    "summary",
    "supermask_layers",
    "swaps",
    "unconvert",
]
