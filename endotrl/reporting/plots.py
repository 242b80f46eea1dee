# SPDX-License-Identifier: Apache-2.0
"""Plots with matplotlib, as PNG."""

from collections.abc import Sequence
from io import BytesIO
from typing import Any


def pyplot() -> Any:
    """`matplotlib.pyplot` without a display, in the style of the reports."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    return plt


def as_png(fig: Any) -> bytes:
    """Renders a figure as PNG and closes it."""
    from matplotlib import pyplot as plt

    buffer = BytesIO()
    fig.savefig(buffer, format="png", dpi=144)
    plt.close(fig)
    return buffer.getvalue()


def label_rows(axis: Any, names: Sequence[str]) -> None:
    """Labels the rows of a panel by name, the first on top."""
    axis.set_yticks(range(len(names)), names, fontsize=9)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.grid(axis="x", alpha=0.3)
