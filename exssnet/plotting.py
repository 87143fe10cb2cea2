"""Matplotlib, where it is installed."""

import os
from typing import Any


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
