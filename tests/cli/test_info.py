"""`exssnet info`: versions, and the kernel of every operator."""

import pytest
import torch

import exssnet
from exssnet.cli.commands import main
from exssnet.cli.info import describe, serving
from exssnet.kernels import native
from exssnet.kernels.registry import OPERATORS


def test_info_tells_versions_and_the_kernel_of_every_operator(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    assert said == describe() + "\n"
    assert f"exssnet {exssnet.__version__}, torch {torch.__version__}, Python 3." in said
    rows = {line.split()[0]: line.split()[1:] for line in said.splitlines() if line}
    assert rows["native"][0] == ("loaded" if native.missing is None else "not")
    for operator in OPERATORS:
        assert rows[operator] == [serving(operator, "cpu"), serving(operator, "cuda")]


def test_the_kernel_told_is_the_one_that_the_dispatcher_takes() -> None:
    for operator in OPERATORS:
        told = serving(operator, "cpu")
        own = torch._C._dispatch_has_kernel_for_dispatch_key(f"exssnet::{operator}", "CPU")
        assert told == OPERATORS[operator].files("cpu")[0 if own else -1]
        assert native.missing is None or told == "kernels/reference.py"
