"""knn_classify: exact on integer features, in blocks of queries."""

import subprocess
import sys
from collections import Counter

import pytest
import torch
from cases import dtypes
from refusals import RAW, Calls, X, guarded, refused
from torch import Tensor

from exssnet import ops
from exssnet.kernels import reference


def by_double_loop(features: Tensor, labels: Tensor, queries: Tensor, k: int) -> Tensor:
    """The definition in plain Python: equal distance -> smaller index, equal votes -> smaller label."""
    points = features.double().tolist()
    predicted = []
    for query in queries.double().tolist():
        distance = [sum((a - b) ** 2 for a, b in zip(point, query, strict=True)) for point in points]
        nearest = sorted(range(len(points)), key=lambda i: (distance[i], i))[:k]
        votes = Counter(int(labels[i]) for i in nearest)
        predicted.append(min(votes, key=lambda label: (-votes[label], label)))
    return torch.tensor(predicted, dtype=torch.int64)


def integers(n: int, m: int, d: int, classes: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Features, labels and queries so coarse that equal distances and votes abound, and every sum is exact."""
    return torch.randint(-2, 3, (n, d)).to(dtype), torch.randint(classes, (n,)), torch.randint(-2, 3, (m, d)).to(dtype)


def test_autocast_does_not_round_distances() -> None:
    features = 1000 + torch.arange(40.0)[:, None]  # bfloat16 holds every eighth of these integers
    labels = torch.arange(40) % 5
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.knn_classify(features, labels, features, 1, 5), labels)


@pytest.mark.parametrize(
    ("n", "m", "d", "k", "classes"),
    [
        (1, 3, 1, 1, 1),
        (7, 9, 1, 3, 2),
        (33, 20, 2, 1, 5),
        (33, 20, 2, 33, 5),
        (33, 20, 3, 32, 7),
        (65, 31, 5, 8, 3),
        (129, 17, 9, 16, 100),
    ],
)
@dtypes()
def test_integer_features_are_exact_with_ties(
    n: int, m: int, d: int, k: int, classes: int, dtype: torch.dtype, threads: int, device: str
) -> None:
    features, labels, queries = integers(n, m, d, classes, dtype)
    predicted = ops.knn_classify(features.to(device), labels.to(device), queries.to(device), k, classes)
    assert torch.equal(predicted.cpu(), by_double_loop(features, labels, queries, k))


def test_of_equal_distances_the_smaller_index_is_nearer() -> None:
    features = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    assert ops.knn_classify(features, torch.tensor([3, 0, 1, 2]), torch.tensor([[0.0]]), 1, 4).tolist() == [3]


def test_of_equal_votes_the_smaller_label_wins() -> None:
    features = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    assert ops.knn_classify(features, torch.tensor([3, 1, 3, 1]), torch.tensor([[0.0]]), 4, 4).tolist() == [1]


def test_all_features_vote_when_k_is_their_number() -> None:
    features, labels, queries = integers(50, 9, 4, 6)
    majority = torch.bincount(labels, minlength=6).argmax()
    assert torch.equal(ops.knn_classify(features, labels, queries, 50, 6), majority.expand(9))


def test_the_nearest_of_the_features_themselves_is_their_own_label() -> None:
    features = torch.arange(50.0).reshape(25, 2)
    labels = torch.randint(7, (25,))
    assert torch.equal(ops.knn_classify(features, labels, features, 1, 7), labels)


@dtypes("float32", "float64")
def test_real_features_whose_distances_are_apart_are_exact(dtype: torch.dtype) -> None:
    features, labels, queries = torch.randn(200, 16), torch.randint(5, (200,)), torch.randn(60, 16)
    distance = torch.cdist(queries.double(), features.double()).square().sort(dim=1).values
    apart = distance[:, 11] - distance[:, 10] > 1e-3
    assert apart.sum() > 50
    predicted = ops.knn_classify(features.to(dtype), labels, queries[apart].to(dtype), 11, 5)
    assert torch.equal(predicted, by_double_loop(features, labels, queries[apart], 11))


@pytest.mark.parametrize("far", [torch.nan, torch.inf])
@pytest.mark.parametrize("k", [1, 7, 25])
def test_features_without_a_distance_are_the_farthest(far: float, k: int, threads: int) -> None:
    features, labels, queries = integers(40, 20, 3, 4)
    lost = torch.arange(40) % 3 == 0
    whole = ops.knn_classify(features[~lost], labels[~lost], queries, k, 4)
    features[lost] = far
    assert torch.equal(ops.knn_classify(features, labels, queries, k, 4), whole)


@pytest.mark.parametrize("m", [1023, 1024, 1025, 2500])
def test_blocks_of_queries_do_not_show(m: int, threads: int) -> None:
    features, labels, queries = integers(300, m, 6, 10)
    together = ops.knn_classify(features, labels, queries, 20, 10)
    apart = [ops.knn_classify(features, labels, part, 20, 10) for part in queries.split(100)]
    assert torch.equal(together, torch.cat(apart))


@pytest.mark.parametrize("k", [1, 20, 300])
def test_bitwise_the_reference(k: int, threads: int, device: str) -> None:
    arguments = [t.to(device) for t in integers(300, 2500, 6, 10)]
    assert torch.equal(ops.knn_classify(*arguments, k, 10), reference.knn_classify(*arguments, k, 10))


def test_no_queries_give_no_labels() -> None:
    features, labels, _ = integers(5, 0, 3, 2)
    predicted = ops.knn_classify(features, labels, torch.empty(0, 3), 2, 2)
    assert (predicted.shape, predicted.dtype) == ((0,), torch.int64)


def test_strided_features_labels_and_queries() -> None:
    features, labels, queries = integers(65, 31, 4, 5)
    strided = features.t().contiguous().t(), torch.stack([labels] * 2, 1)[:, 0], torch.cat([queries] * 2, 1)[:, :4]
    assert torch.equal(ops.knn_classify(*strided, 7, 5), ops.knn_classify(features, labels, queries, 7, 5))


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.exssnet.knn_classify.default, (*integers(9, 5, 3, 4), 3, 4))


MEMORY = """
import resource, torch
from exssnet import ops
features, labels, queries = torch.randn(500, 64), torch.randint(9, (500,)), torch.randn(60_000, 64)
ops.knn_classify(features, labels, queries[:1024], 10, 9)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ops.knn_classify(features, labels, queries, 10, 9)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read as Linux reports it")
def test_memory_grows_by_less_than_the_distances_would_take() -> None:
    command = [sys.executable, "-W", "ignore", "-c", MEMORY]
    mebibytes = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert mebibytes < 60  # 500 x 60,000 float32 distances are 114 MiB, all differences are 7.2 GiB


FEATURES, LABELS = torch.zeros(6, 2), torch.tensor([0, 1, 2, 0, 1, 2])
SENTENCES: Calls = {
    "knn_classify: features and queries must be (n, d) and (m, d), got (6, 2) and (3, 5)": lambda: ops.knn_classify(
        FEATURES, LABELS, X, 1, 3
    ),
    "knn_classify: labels must be int64 of shape (6,), got torch.int32 of (6,)": lambda: ops.knn_classify(
        FEATURES, LABELS.int(), FEATURES, 1, 3
    ),
    "knn_classify: k must be in [1, 6], got 7": lambda: ops.knn_classify(FEATURES, LABELS, FEATURES, 7, 3),
    "knn_classify: k must be in [1, 6], got 0": lambda: ops.knn_classify(FEATURES, LABELS, FEATURES, 0, 3),
    "knn_classify: features must be floating point, got torch.int64": lambda: ops.knn_classify(
        FEATURES.long(), LABELS, FEATURES.long(), 1, 3
    ),
    "knn_classify: x is torch.float32 but queries is torch.float64": lambda: ops.knn_classify(
        FEATURES, LABELS, FEATURES.double(), 1, 3
    ),
    "knn_classify: labels must be in [0, 2), got 0 to 2": lambda: ops.knn_classify(FEATURES, LABELS, FEATURES, 1, 2),
}
test_wrong_arguments_are_refused_in_a_sentence = refused(SENTENCES)


FOREIGN_MEMORY: Calls = {
    "a label beyond the classes": lambda: RAW.knn_classify(FEATURES, LABELS, FEATURES, 3, 2),
    "more neighbours than features": lambda: RAW.knn_classify(FEATURES, LABELS, FEATURES, 7, 3),
    "queries of other length": lambda: RAW.knn_classify(FEATURES, LABELS, X, 1, 3),
}
test_native_kernels_touch_no_foreign_memory_given = guarded(FOREIGN_MEMORY)
