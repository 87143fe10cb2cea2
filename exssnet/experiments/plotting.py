"""Matplotlib, where it is installed."""

import os
from pathlib import Path
from typing import Any

from ..io.writing import replacing


def pyplot() -> Any:
    """`matplotlib.pyplot` that draws into files; None without matplotlib."""
    asked = os.environ.pop("MPLBACKEND", None)  # a notebook's, say: importing fails where it is not installed here
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        return None
    finally:
        if asked is not None:
            os.environ["MPLBACKEND"] = asked
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save(figure: Any, path: Path, dpi: int = 120) -> None:
    """Replace an image file by a figure, in the format that the file's name tells, and close the figure."""
    import matplotlib.pyplot as plt

    with replacing(path) as file:
        figure.savefig(file, format=path.suffix[1:] or None, dpi=dpi)
    plt.close(figure)
