"""Matplotlib, where it is installed."""

from typing import Any


def pyplot() -> Any:
    """`matplotlib.pyplot` that draws into files; None without matplotlib."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
