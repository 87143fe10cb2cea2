"""The kernels of the operators, a file for each implementation; `registry` is the table of them."""

if __name__ != "exssnet.kernels":
    raise ImportError("this folder is the package exssnet.kernels: install exssnet and import it by that name")
