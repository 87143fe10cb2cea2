"""Sparse supermasks for PyTorch: operators, layers, and exclusive training without forgetting."""

from .console import VERSION
from .freezing import freeze_weights
from .kkt import transfer
from .learner import Learner, PhaseOptions
from .masks import MaskBank
from .methods import METHODS, Method
from .nn import (
    Summary,
    SupermaskConv1d,
    SupermaskConv2d,
    SupermaskLinear,
    TaskBatchNorm1d,
    TaskBatchNorm2d,
    convert,
    summary,
)
from .ops import *  # noqa: F403
from .ops import __all__ as _operators
from .optim import ScoreAdam
from .phases import Phases
from .resident import keep_freed_memory
from .serving import Served

__version__ = VERSION

__all__ = [
    "METHODS",
    "Learner",
    "MaskBank",
    "Method",
    "PhaseOptions",
    "Phases",
    "ScoreAdam",
    "Served",
    "Summary",
    "SupermaskConv1d",
    "SupermaskConv2d",
    "SupermaskLinear",
    "TaskBatchNorm1d",
    "TaskBatchNorm2d",
    "convert",
    "freeze_weights",
    "keep_freed_memory",
    "summary",
    "transfer",
    *_operators,
]
