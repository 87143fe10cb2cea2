"""Kernels of the operators, one file per implementation; `KERNELS` is the table operator x device -> files.

The reference serves every operator on every device. A kernel registered for a device takes precedence by itself:
PyTorch's dispatcher chooses, there is no other registry.
"""

if __name__ != "exssnet.kernels":
    raise ImportError("this folder is the package exssnet.kernels: install exssnet and import it by that name")

REFERENCE = "kernels/reference.py"
_FILES = {
    "topk_masks": ("csrc/torch/cpu/topk.cpp", "csrc/torch/cuda/topk.cpp", "kernels/triton_topk.py"),
    "adam_topk": (REFERENCE, "csrc/torch/cuda/adam.cpp"),
    "pack_mask": ("csrc/torch/cpu/bits.cpp", "csrc/torch/cuda/bits.cpp", "kernels/triton_bits.py"),
    "unpack_mask": ("csrc/torch/cpu/bits.cpp", "csrc/torch/cuda/bits.cpp", "kernels/triton_bits.py"),
    "free_mask": ("csrc/torch/cpu/bits.cpp", "csrc/torch/cuda/bits.cpp", "kernels/triton_bits.py"),
    "supermask_linear": ("csrc/torch/cpu/linear.cpp", "kernels/triton_linear.py"),
    "supermask_conv2d": ("csrc/torch/cpu/conv.cpp", "kernels/triton_conv.py"),
    "supermask_weights": (REFERENCE, "kernels/triton_weights.py"),
    "masked_linear": ("csrc/torch/cpu/linear.cpp", "kernels/triton_linear.py"),
    "masked_conv2d": ("csrc/torch/cpu/conv.cpp", "kernels/triton_conv.py"),
    "bitmap_linear": (REFERENCE, "kernels/triton_linear.py"),
    "bitmap_conv2d": (REFERENCE, "kernels/triton_conv.py"),
    "sparse_linear": ("csrc/torch/cpu/sparse.cpp", "csrc/torch/cuda/sparse.cpp"),
    "sparse_conv2d": ("csrc/torch/cpu/sparse.cpp", "csrc/torch/cuda/sparse.cpp"),
    "sparse_conv2d_folded": ("csrc/torch/cpu/sparse.cpp", "csrc/torch/cuda/sparse.cpp"),
    "batch_norm_act": ("csrc/torch/cpu/batchnorm.cpp",),
    "knn_classify": ("csrc/torch/cpu/knn.cpp",),
}

OPERATORS = tuple(_FILES)
KERNELS = {(name, "cpu"): (files[0], REFERENCE) for name, files in _FILES.items()} | {
    (name, "cuda"): (*files[1:], REFERENCE) for name, files in _FILES.items()
}
"""The files that can serve an operator on a device, best first. The first that is loaded does."""
