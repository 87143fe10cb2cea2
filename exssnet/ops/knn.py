"""K-nearest-neighbour classification of features."""

import torch
from torch import Tensor

from .library import define, same_kind

__all__ = ["knn_classify"]

define(
    "knn_classify(Tensor features, Tensor labels, Tensor queries, int k, int classes) -> Tensor",
    lambda features, labels, queries, k, classes: labels.new_empty(queries.shape[0]),
)


def knn_classify(features: Tensor, labels: Tensor, queries: Tensor, k: int, classes: int) -> Tensor:
    """Labels of queries by majority vote of their k nearest features in Euclidean distance.

    Ties of distance go to the smaller index, ties of votes to the smaller label. Queries are processed in blocks, so
    neither an (n, m, d) nor an (n, m) tensor is built. Source: arXiv 2210.10209, section 3.3.

    Args:
        features: (n, d), floating point.
        labels: (n,), int64 in [0, classes).
        queries: (m, d), of the features' dtype.
        k: The number of neighbours, in [1, n].
        classes: The number of classes.

    Returns:
        (m,), int64.

    Raises:
        ValueError: Shapes, dtypes or devices do not match, or k or a label is out of range.
    """
    if not (features.dim() == 2 and queries.dim() == 2 and features.shape[1] == queries.shape[1]):
        raise ValueError(
            f"knn_classify: features and queries must be (n, d) and (m, d), got {tuple(features.shape)} and "
            f"{tuple(queries.shape)}"
        )
    n = features.shape[0]
    if not (labels.shape == (n,) and labels.dtype == torch.int64):
        raise ValueError(
            f"knn_classify: labels must be int64 of shape ({n},), got {labels.dtype} of {tuple(labels.shape)}"
        )
    if not 1 <= k <= n:
        raise ValueError(f"knn_classify: k must be in [1, {n}], got {k}")
    if not features.is_floating_point():
        raise ValueError(f"knn_classify: features must be floating point, got {features.dtype}")
    same_kind("knn_classify", features, queries=queries)
    if labels.device != features.device:
        raise ValueError(f"knn_classify: features are on {features.device} but labels on {labels.device}")
    low, high = (int(v) for v in labels.aminmax())
    if low < 0 or high >= classes:
        raise ValueError(f"knn_classify: labels must be in [0, {classes}), got {low} to {high}")
    with torch.autocast(features.device.type, enabled=False):
        predicted: Tensor = torch.ops.exssnet.knn_classify(features.detach(), labels, queries.detach(), k, high + 1)
    return predicted
