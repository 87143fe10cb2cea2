"""Errors are sentences with the numbers in them: each is given here as the user reads it."""

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from exssnet import ops
from exssnet.kernels import native as native_library

X = torch.zeros(3, 5)
W = torch.zeros(4, 5)
M = torch.ones(4, 5, dtype=torch.bool)
IMAGES = torch.zeros(2, 4, 6, 6)
KERNELS = torch.zeros(8, 4, 3, 3)
LINES = torch.zeros(2, 4, 9)
TAPS = torch.zeros(8, 4, 3)
ROW = torch.tensor([0, 0])
PATTERN, BITMAP = ops.sparse_pattern(M), ops.bitmap_pattern(M)
VALUES, NONE = torch.zeros(20), torch.zeros(0)
FEATURES, LABELS = torch.zeros(6, 2), torch.tensor([0, 1, 2, 0, 1, 2])
FAR = torch.zeros(4, 5, device="meta")
supermask, masked, knn = ops.supermask_linear, ops.masked_linear, ops.knn_classify


def conv(images: Tensor = IMAGES, kernels: Tensor = KERNELS, **options: object) -> Tensor:
    return ops.masked_conv2d(images, kernels, torch.ones(kernels.shape, dtype=torch.bool), **options)  # type: ignore


def sparse_conv(kernel_size: int = 3, pattern_of: Tensor = KERNELS, **options: object) -> Tensor:
    pattern = ops.sparse_pattern(torch.ones(pattern_of.shape, dtype=torch.bool))
    return ops.sparse_conv2d(IMAGES, torch.zeros(pattern_of.numel()), NONE, pattern, kernel_size, **options)  # type: ignore


SENTENCES: dict[str, Callable[[], object]] = {
    # selection and bits
    "density must be in [0, 1], got 1.5": lambda: ops.density_to_k(10, 1.5),
    "topk_masks: expected at least one score tensor, got none": lambda: ops.topk_masks([], []),
    "topk_masks: expected one k per score tensor, got 2 scores and 1 k": lambda: ops.topk_masks([W, W], [1]),
    "topk_mask: k must be in [0, 20], got 21": lambda: ops.topk_mask(W, 21),
    "topk_mask: k must be in [0, 20], got -1": lambda: ops.topk_mask(W, -1),
    "topk_select: k must be in [0, 20], got 25": lambda: ops.topk_select([W, W], [3, 25]),
    "topk_mask: scores must be float32, bfloat16, float16 or float64, got torch.int64": lambda: ops.topk_mask(ROW, 1),
    "topk_masks: scores are on two devices, cpu and meta": lambda: ops.topk_masks([W, FAR], [1, 1]),
    "topk_masks: hint must be int64 of shape (2, 2), got torch.int64 of (1, 2)": lambda: ops.topk_masks(
        [W, W], [1, 1], torch.zeros(1, 2, dtype=torch.int64)
    ),
    "topk_select: hint must be int64 of shape (1, 2), got torch.float32 of (1, 2)": lambda: ops.topk_select(
        [W], [1], torch.zeros(1, 2)
    ),
    "pack_mask: mask must be bool, got torch.float32": lambda: ops.pack_mask(W),
    "unpack_mask: 20 entries are 3 bytes of uint8, got torch.uint8 of (2,)": lambda: ops.unpack_mask(
        torch.zeros(2, dtype=torch.uint8), (4, 5)
    ),
    "free_mask: mask and used_mask must both be bool, or both packed uint8, of one shape, got torch.bool of (4, 5) and "
    "torch.uint8 of (3,)": lambda: ops.free_mask(M, ops.pack_mask(M)),
    # linear layers
    "supermask_linear: weight must have shape (O, I), got (4,)": lambda: supermask(X, W[:, 0], W, 1),
    "masked_linear: weight must have shape (O, I), got (8, 4, 3)": lambda: masked(X, TAPS, M),
    "supermask_linear: expected x with 5 features in its last dimension, got shape (3, 4)": lambda: supermask(
        X[:, :4], W, W, 1
    ),
    "sparse_linear: expected x with 5 features in its last dimension, got shape ()": lambda: ops.sparse_linear(
        torch.zeros(()), VALUES, NONE, PATTERN
    ),
    "masked_linear: bias must have shape (4,), got (5,)": lambda: masked(X, W, M, bias=X[0]),
    "supermask_linear: scores must lie beside the weight, (4, 5) on cpu, got (5, 4) on cpu": lambda: supermask(
        X, W, W.t(), 1
    ),
    "supermask_linear: scores must lie beside the weight, (4, 5) on cpu, got (4, 5) on meta": lambda: supermask(
        X, W, FAR, 1
    ),
    "supermask_linear: scores must be float32, bfloat16, float16 or float64, got torch.int64": lambda: supermask(
        X, W, W.long(), selection=ROW
    ),
    "supermask_linear: give either k or a selection": lambda: supermask(X, W, W),
    "supermask_conv2d: give either k or a selection": lambda: ops.supermask_conv2d(
        IMAGES, KERNELS, KERNELS, 1, selection=ROW
    ),
    "supermask_linear: k must be in [0, 20], got 21": lambda: supermask(X, W, W, 21),
    "supermask_linear: selection must be one int64 row (threshold bits, tie index) of topk_select, or a packed mask of "
    "3 bytes, on cpu, got torch.int64 of (1, 2) on cpu": lambda: supermask(X, W, W, selection=ROW[None]),
    "supermask_linear: x is torch.float32 but weight is torch.float64": lambda: supermask(X, W.double(), W, 1),
    "masked_linear: x is torch.float64 but bias is torch.float32": lambda: masked(
        X.double(), W.double(), M, bias=W[:, 0]
    ),
    "masked_linear: x is on meta but weight is on cpu": lambda: masked(FAR, W, M),
    "masked_linear: mask must be bool of shape (4, 5) or packed uint8 of 3 bytes, got torch.float32 of "
    "(4, 5)": lambda: masked(X, W, W),
    "masked_linear: free_mask must be bool of shape (4, 5) or packed uint8 of 3 bytes, got torch.uint8 "
    "of (2,)": lambda: masked(X, W, M, ops.pack_mask(M)[:2]),
    "masked_linear: weight is on cpu but mask on meta": lambda: masked(X, W, FAR.bool()),
    # convolutions
    "masked_conv2d: x must have 4 dimensions (N, C, H, W), got 3": lambda: conv(LINES),
    "masked_conv2d: expected x with 4 channels, got 3": lambda: conv(IMAGES[:, :3]),
    "masked_conv2d: weight must have shape (O, C/groups, R, S), got (8, 4, 3)": lambda: conv(kernels=TAPS),
    "masked_conv2d: groups must divide the 8 output channels, got 3": lambda: conv(groups=3),
    "masked_conv2d: groups must divide the 8 output channels, got 0": lambda: conv(groups=0),
    "masked_conv2d: stride must be one or two integers of at least 1, got 0": lambda: conv(stride=0),
    "masked_conv2d: padding must be one or two integers of at least 0, got (1, -1)": lambda: conv(padding=(1, -1)),
    "masked_conv2d: padding must be one or two integers of at least 0, got same": lambda: conv(padding="same"),
    "masked_conv2d: dilation must be one or two integers of at least 1, got [1, 2, 3]": lambda: conv(
        dilation=[1, 2, 3]
    ),
    "masked_conv2d: the kernel spans 9 pixels but the padded image has only 8": lambda: conv(padding=1, dilation=4),
    "masked_conv2d: bias must have shape (8,), got (4,)": lambda: conv(bias=W[:, 0]),
    "supermask_conv1d: weight must have shape (O, C/groups, S), got (4, 5)": lambda: ops.supermask_conv1d(
        LINES, W, W, 1
    ),
    "masked_conv1d: x must have 3 dimensions (N, C, L), got 2": lambda: ops.masked_conv1d(X, TAPS, M),
    "supermask_conv1d: stride must be one integer of at least 1, got (1, 2)": lambda: ops.supermask_conv1d(
        LINES, TAPS, TAPS, 1, stride=(1, 2)
    ),
    # patterns and their values
    "sparse_pattern: mask and free_mask must be bool of one shape, got torch.bool of (4, 5) and torch.bool of (4,)": (
        lambda: ops.sparse_pattern(M, M[:, 0])
    ),
    "sparse_pattern: mask must have at least 2 dimensions, got 1": lambda: ops.sparse_pattern(M[0]),
    "bitmap_pattern: mask and free_mask must be bool of one shape, got torch.bool of (4, 5) and torch.bool of (4,)": (
        lambda: ops.bitmap_pattern(M, M[:, 0])
    ),
    "bitmap_pattern: free_mask has 20 entries outside the mask": lambda: ops.bitmap_pattern(~M, M),
    "bitmap_linear: the pattern must be of a weight (O, I), got (8, 4, 3)": lambda: ops.bitmap_linear(
        X, VALUES, NONE, ops.bitmap_pattern(TAPS == 0)
    ),
    "bitmap_linear: the pattern keeps 20 weights, 20 of them free, got free_values of (19,) and frozen_values of "
    "(0,)": lambda: ops.bitmap_linear(X, VALUES[1:], NONE, BITMAP),
    "bitmap_linear: the pattern keeps 20 weights, 20 of them free, got free_values of (19,) and frozen_values of "
    "(1,)": lambda: ops.bitmap_linear(X, VALUES[1:], VALUES[:1], BITMAP),
    "bitmap_linear: x is on cpu but the pattern is on meta": lambda: ops.bitmap_linear(
        X, VALUES, NONE, BITMAP._replace(words=BITMAP.words.to("meta"))
    ),
    "bitmap_linear: expected x with 5 features in its last dimension, got shape (4, 4)": lambda: ops.bitmap_linear(
        W[:, 1:], VALUES, NONE, BITMAP
    ),
    "bitmap_linear: x is torch.float32 but free_values is torch.float64": lambda: ops.bitmap_linear(
        X, VALUES.double(), NONE, BITMAP
    ),
    "bitmap_conv2d: the pattern must be of a weight (O, C/groups, R, S), got (4, 5)": lambda: ops.bitmap_conv2d(
        IMAGES, VALUES, NONE, BITMAP
    ),
    "bitmap_conv2d: groups must divide the 8 output channels, got 3": lambda: ops.bitmap_conv2d(
        IMAGES, VALUES, NONE, ops.bitmap_pattern(KERNELS == 0), groups=3
    ),
    "bitmap_conv1d: the pattern must be of a weight (O, C/groups, S), got (4, 5)": lambda: ops.bitmap_conv1d(
        LINES, VALUES, NONE, BITMAP
    ),
    "sparse_pattern: free_mask has 20 entries outside the mask": lambda: ops.sparse_pattern(~M, M),
    "sparse_pattern: groups must divide the 4 rows, got 3": lambda: ops.sparse_pattern(M, groups=3),
    "sparse_linear: the pattern keeps 20 weights, got 19 free and 0 frozen values": lambda: ops.sparse_linear(
        X, VALUES[1:], NONE, PATTERN
    ),
    "sparse_linear: x is torch.float32 but frozen_values is torch.float64": lambda: ops.sparse_linear(
        X, VALUES, NONE.double(), PATTERN
    ),
    "sparse_conv2d: the pattern is of a kernel of 9 taps, got kernel_size (5, 5)": lambda: sparse_conv(5),
    "sparse_conv2d: expected x with 5 channels, got 4": lambda: sparse_conv(pattern_of=torch.zeros(8, 5, 3, 3)),
    "sparse_conv2d: kernel_size must be one or two integers of at least 1, got 0": lambda: sparse_conv(0),
    "sparse_conv2d: bias must have shape (8,), got (4,)": lambda: sparse_conv(bias=W[:, 0]),
    # norms
    "batch_norm_act: x must have shape (N, C, ...), got (20,)": lambda: ops.batch_norm_act(VALUES),
    "batch_norm_act: x must be float32 or float64, got torch.bfloat16": lambda: ops.batch_norm_act(X.bfloat16()),
    "batch_norm_act: residual must have shape (2, 4, 6, 6), got (2, 4, 9)": lambda: ops.batch_norm_act(IMAGES, LINES),
    "batch_norm_act: weight must have shape (4,), got (20,)": lambda: ops.batch_norm_act(IMAGES, weight=VALUES),
    "batch_norm_act: var must have shape (4,), got (0,)": lambda: ops.batch_norm_act(IMAGES, mean=W[:, 0], var=NONE),
    "batch_norm_act: mean and var must be given together, got mean alone": lambda: ops.batch_norm_act(
        IMAGES, mean=W[:, 0]
    ),
    "batch_norm_act: x is torch.float32 but bias is torch.float64": lambda: ops.batch_norm_act(
        IMAGES, bias=W[:, 0].double()
    ),
    "batch_norm_act: x is on cpu but residual is on meta": lambda: ops.batch_norm_act(IMAGES, IMAGES.to("meta")),
    # neighbours
    "knn_classify: features and queries must be (n, d) and (m, d), got (6, 2) and (3, 5)": lambda: knn(
        FEATURES, LABELS, X, 1, 3
    ),
    "knn_classify: labels must be int64 of shape (6,), got torch.int32 of (6,)": lambda: knn(
        FEATURES, LABELS.int(), FEATURES, 1, 3
    ),
    "knn_classify: k must be in [1, 6], got 7": lambda: knn(FEATURES, LABELS, FEATURES, 7, 3),
    "knn_classify: k must be in [1, 6], got 0": lambda: knn(FEATURES, LABELS, FEATURES, 0, 3),
    "knn_classify: features must be floating point, got torch.int64": lambda: knn(
        FEATURES.long(), LABELS, FEATURES.long(), 1, 3
    ),
    "knn_classify: x is torch.float32 but queries is torch.float64": lambda: knn(
        FEATURES, LABELS, FEATURES.double(), 1, 3
    ),
    "knn_classify: labels must be in [0, 2), got 0 to 2": lambda: knn(FEATURES, LABELS, FEATURES, 1, 2),
}


@pytest.mark.parametrize("sentence", SENTENCES, ids=lambda sentence: sentence[:60])
def test_sentence(sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        SENTENCES[sentence]()


def broken(**changed: Tensor) -> tuple[Tensor, ...]:
    return PATTERN._replace(**changed).tensors


def raw(operator: str, *arguments: object) -> object:
    return getattr(torch.ops.exssnet, operator)(*arguments)


BYTES, SHORT = ops.pack_mask(M), ops.pack_mask(M)[:2]
STEPS = [1, 1], [0, 0], [1, 1]
SPARSE = X, VALUES, NONE
WILD: dict[str, Callable[[], object]] = {
    "more to keep than there is": lambda: raw("topk_masks", [W], [21], None, True),
    "a short hint": lambda: raw("topk_masks", [W, W], [1, 1], torch.zeros(1, 2, dtype=torch.int64), True),
    "too few packed bytes": lambda: raw("unpack_mask", SHORT, [4, 5]),
    "a short used mask": lambda: raw("free_mask", BYTES, SHORT),
    "short scores": lambda: raw("supermask_linear", X, W, W[:3], ROW, None, False),
    "short scores of a convolution": lambda: raw(
        "supermask_conv2d", IMAGES, KERNELS, KERNELS[:3], ROW, None, *STEPS, 1, True
    ),
    "a short selection": lambda: raw("supermask_linear", X, W, W, ROW[:1], None, True),
    "a short packed mask": lambda: raw("masked_linear", X, W, SHORT, None, None),
    "a short packed mask of a convolution": lambda: raw("masked_conv2d", IMAGES, KERNELS, SHORT, None, None, *STEPS, 1),
    "a short free mask": lambda: raw("masked_linear_backward", W[:3, :4], X, W, M, SHORT, [True, True]),
    "a column beyond the last": lambda: raw("sparse_linear", *SPARSE, *broken(col=PATTERN.col + 1), None),
    "a negative column": lambda: raw("sparse_linear", *SPARSE, *broken(col=PATTERN.col - 1), None),
    "columns that do not ascend": lambda: raw("sparse_linear", *SPARSE, *broken(col=PATTERN.col.flip(0)), None),
    "a slot beyond the values": lambda: raw("sparse_linear", *SPARSE, *broken(slot=PATTERN.slot + 1), None),
    "pointers beyond the entries": lambda: raw("sparse_linear", *SPARSE, *broken(row_ptr=PATTERN.row_ptr * 2), None),
    "pointers that fall": lambda: raw("sparse_linear", *SPARSE, *broken(row_ptr=PATTERN.row_ptr.flip(0)), None),
    "a row beyond the last": lambda: raw(
        "sparse_linear_backward", W[:3, :4], *SPARSE, *broken(col_t=PATTERN.col_t + 1), [True, True]
    ),
    "a short residual": lambda: raw("batch_norm_act", X, X[:2], None, None, None, None, 0.1, True),
    "a short weight of a norm": lambda: raw("batch_norm_act", X, None, X[0, 1:], None, None, None, 0.1, True),
    "a short variance": lambda: raw("batch_norm_act", X, None, None, None, X[0], X[0, 1:], 0.1, True),
    "a short gradient of a norm": lambda: raw(
        "batch_norm_act_backward", X[:2], X, None, None, None, X[0], X[0], 0.1, True, True, [True] * 4
    ),
    "a label beyond the classes": lambda: raw("knn_classify", FEATURES, LABELS, FEATURES, 3, 2),
    "more neighbours than features": lambda: raw("knn_classify", FEATURES, LABELS, FEATURES, 7, 3),
    "queries of other length": lambda: raw("knn_classify", FEATURES, LABELS, X, 1, 3),
}


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("what", WILD)
def test_native_kernels_touch_no_foreign_memory_given(what: str) -> None:
    with pytest.raises(RuntimeError):
        WILD[what]()


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `load` says of the libraries is put back afterwards."""
    monkeypatch.setattr(native_library, "missing", None)
    monkeypatch.setattr(native_library, "missing_cuda", native_library.missing_cuda)


def test_unknown_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXSSNET_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"^EXSSNET_BACKEND must be one of reference, native, triton, got 'fast'$"):
        native_library.load()


@pytest.mark.usefixtures("unloaded")
def test_missing_library_is_told_by_one_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("EXSSNET_BACKEND", raising=False)
    monkeypatch.setattr(native_library, "__file__", str(tmp_path / "native.py"))
    with pytest.warns(UserWarning, match=r"reference in plain PyTorch.*reinstall with a C\+\+20 compiler") as told:
        native_library.load()
    assert len(told) == 1
    assert native_library.missing is not None


@pytest.mark.usefixtures("unloaded")
def test_library_that_does_not_load_is_told_by_one_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("EXSSNET_BACKEND", raising=False)
    monkeypatch.setattr(native_library, "__file__", str(tmp_path / "native.py"))
    (tmp_path / "_native.so").write_bytes(b"not a library")
    with pytest.warns(UserWarning, match="_native.so does not load in torch") as told:
        native_library.load()
    assert len(told) == 1


@pytest.mark.usefixtures("unloaded")
def test_backend_asked_for_is_silent_about_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXSSNET_BACKEND", "reference")
    native_library.load()
    assert native_library.missing == "EXSSNET_BACKEND=reference"


def test_kernels_under_a_foreign_name_are_refused() -> None:
    spec = importlib.util.spec_from_file_location("kernels", Path(native_library.__file__).parent / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match=r"^this folder is the package exssnet\.kernels"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
