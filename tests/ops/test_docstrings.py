"""The examples in the docstrings of the operators."""

import doctest
import importlib

import pytest

MODULES = ("selection", "sparse")


@pytest.mark.parametrize("name", MODULES)
def test_examples_give_what_they_show(name: str) -> None:
    module = importlib.import_module(f"exssnet.ops.{name}")
    failed, attempted = doctest.testmod(module)
    assert attempted > 0
    assert failed == 0
