"""Kernels of the operators, one file per implementation; `KERNELS` is the table operator x device -> file.

The reference serves every operator on every device. A compiled kernel registered for a device takes
precedence by itself: PyTorch's dispatcher chooses, there is no other registry.
"""

if __name__ != "exssnet.kernels":
    raise ImportError("this folder is the package exssnet.kernels: install exssnet and import it by that name")

OPERATORS = (
    "topk_masks",
    "pack_mask",
    "unpack_mask",
    "free_mask",
    "supermask_linear",
    "supermask_conv2d",
    "masked_linear",
    "masked_conv2d",
    "sparse_linear",
    "sparse_conv2d",
    "sparse_conv2d_folded",
    "batch_norm_act",
    "knn_classify",
)

KERNELS = {
    **{(name, device): "kernels/reference.py" for name in OPERATORS for device in ("cpu", "cuda")},
    ("topk_masks", "cpu"): "csrc/topk.cpp",
    ("pack_mask", "cpu"): "csrc/bits.cpp",
    ("unpack_mask", "cpu"): "csrc/bits.cpp",
    ("free_mask", "cpu"): "csrc/bits.cpp",
    ("supermask_linear", "cpu"): "csrc/linear.cpp",
    ("supermask_conv2d", "cpu"): "csrc/conv.cpp",
    ("masked_linear", "cpu"): "csrc/linear.cpp",
    ("masked_conv2d", "cpu"): "csrc/conv.cpp",
    ("sparse_linear", "cpu"): "csrc/sparse.cpp",
    ("sparse_conv2d", "cpu"): "csrc/sparse.cpp",
    ("sparse_conv2d_folded", "cpu"): "csrc/sparse.cpp",
    ("batch_norm_act", "cpu"): "csrc/batchnorm.cpp",
    ("knn_classify", "cpu"): "csrc/knn.cpp",
}
