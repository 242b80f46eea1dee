# SPDX-License-Identifier: Apache-2.0
"""Plots of results, as PNG: distinguishable by colour and by shape, with labels next to the data."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

from ..reporting.curves import BLUE, GREY
from .results import CEILING, RIVALS
from .tables import best_first, value


def plot_metric(results: Mapping[str, Any]) -> bytes:
    """Main metric per scorer with its interval, best on top; a dotted line at the best content-free scorer."""
    metric, names = results["main_metric"], best_first(results)
    fig, axis = pyplot().subplots(figsize=(6, 0.9 + 0.28 * len(names)), layout="constrained")
    label_rows(axis, names)
    for y, name in enumerate(names):
        estimate, known = results["metrics"][name][metric], name in (*RIVALS, CEILING)
        color = GREY if known else BLUE
        if estimate["low"] is not None:
            axis.plot([estimate["low"], estimate["high"]], [y, y], color=color, linewidth=2, alpha=0.5)
        axis.plot(estimate["value"], y, "s" if known else "o", color=color, markersize=5)
    rival = next((name for name in names if name in RIVALS), None)
    if rival is not None:
        axis.axvline(value(results, rival, metric), color=GREY, linestyle=":", linewidth=1)
    beside = "" if rival is None else f"; dotted: {rival}"
    axis.set(xlabel=f"{metric}, with 95% interval\nfurther right is better{beside}")
    return as_png(fig)


def label_rows(axis: Any, names: Sequence[str]) -> None:
    """Labels the rows of a panel by name, the first on top."""
    axis.set_yticks(range(len(names)), names, fontsize=9)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.grid(axis="x", alpha=0.3)


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
