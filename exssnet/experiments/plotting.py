"""Matplotlib, where it is installed."""

import os
from pathlib import Path
from typing import Any

from ..io.writing import replacing


def pyplot() -> Any:
    """`matplotlib.pyplot`, set to draw into files; None if matplotlib is not installed."""
    backend = os.environ.pop("MPLBACKEND", None)  # a notebook's backend may be missing here; the import would fail
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        return None
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save(figure: Any, path: Path, dpi: int = 120) -> None:
    """Write a figure to an image file, and close it.

    Args:
        figure: of matplotlib.
        path: the file. Its suffix gives the format.
        dpi: dots an inch.
    """
    import matplotlib.pyplot as plt

    with replacing(path) as file:
        figure.savefig(file, format=path.suffix[1:] or None, dpi=dpi)
    plt.close(figure)
