"""The operators: per family its schemas, shapes, gradients and public functions."""

from ..kernels import native as _native
from . import flops as _flops
from .adam import adam_topk
from .bitmap import BitmapPattern, bitmap_conv1d, bitmap_conv2d, bitmap_linear, bitmap_pattern
from .former_names import *  # noqa: F403
from .knn import knn_classify
from .masked import masked_conv1d, masked_conv2d, masked_linear
from .norm import batch_norm_act
from .selection import (
    TopK,
    density_to_k,
    free_mask,
    nan_scores_seen,
    pack_mask,
    topk_mask,
    topk_masks,
    topk_select,
    unpack_mask,
)
from .sparse import (
    SparsePattern,
    kept_weights,
    masked_weight,
    sparse_conv1d,
    sparse_conv2d,
    sparse_conv2d_folded,
    sparse_linear,
    sparse_pattern,
)
from .supermask import supermask_conv1d, supermask_conv2d, supermask_linear
from .weights import supermask_weights

_native.load()
_flops.register()

__all__ = [
    "BitmapPattern",
    "SparsePattern",
    "TopK",
    "adam_topk",
    "batch_norm_act",
    "bitmap_conv1d",
    "bitmap_conv2d",
    "bitmap_linear",
    "bitmap_pattern",
    "density_to_k",
    "free_mask",
    "kept_weights",
    "knn_classify",
    "masked_conv1d",
    "masked_conv2d",
    "masked_linear",
    "masked_weight",
    "nan_scores_seen",
    "pack_mask",
    "sparse_conv1d",
    "sparse_conv2d",
    "sparse_conv2d_folded",
    "sparse_linear",
    "sparse_pattern",
    "supermask_conv1d",
    "supermask_conv2d",
    "supermask_linear",
    "supermask_weights",
    "topk_mask",
    "topk_masks",
    "topk_select",
    "unpack_mask",
]
