# SPDX-License-Identifier: Apache-2.0
"""Plots of results, as PNG."""

from collections.abc import Mapping
from io import BytesIO
from typing import Any

from .tables import length_of, value


# Okabe and Ito's colours, told apart with every common colour blindness.
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#999999"
CYCLE = (BLUE, ORANGE, "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
CONTROLS = ("length", "shortness", "position", "random")


def plot_metric(results: Mapping[str, Any]) -> bytes:
    """The main metric of each scorer with its interval, the best on top; controls in grey."""
    metric = results["main_metric"]
    names = sorted(results["metrics"], key=lambda name: value(results, name, metric) or 0.0)
    plt = pyplot()
    fig, axis = plt.subplots(figsize=(6, 0.6 + 0.28 * len(names)), layout="constrained")
    for y, name in enumerate(names):
        estimate = results["metrics"][name][metric]
        color = GREY if name in CONTROLS else BLUE
        if estimate["low"] is not None:
            axis.plot([estimate["low"], estimate["high"]], [y, y], color=color, linewidth=2, alpha=0.5)
        axis.plot(estimate["value"], y, "o", color=color, markersize=5)
    axis.set_yticks(range(len(names)), names, fontsize=9)
    axis.set(xlabel=f"{metric}, with 95% interval")
    axis.grid(axis="x", alpha=0.3)
    return as_png(fig)


def plot_levels(results: Mapping[str, Any], levels: tuple[str, ...]) -> bytes:
    """
    A few metrics side by side for each scorer, such as RM-Bench's easy, normal and hard: balanced is where they meet.
    """
    names = list(results["metrics"])[::-1]
    plt = pyplot()
    fig, axis = plt.subplots(figsize=(6, 0.6 + 0.28 * len(names)), layout="constrained")
    for y, name in enumerate(names):
        found = [value(results, name, level) or 0.0 for level in levels]
        axis.plot([min(found), max(found)], [y, y], color=GREY, linewidth=1.5, alpha=0.6)
    for i, level in enumerate(levels):
        axis.plot(
            [value(results, name, level) for name in names],
            range(len(names)),
            "o",
            color=CYCLE[i],
            label=level,
            markersize=5,
        )
    axis.axvline(0.5, color=GREY, linestyle=":", linewidth=1)
    axis.set_yticks(range(len(names)), names, fontsize=9)
    axis.set(xlabel="accuracy", xlim=(-0.02, 1.02))
    axis.legend(frameon=False, ncols=len(levels), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return as_png(fig)


def plot_length(results: Mapping[str, Any]) -> bytes:
    """Accuracy where the better response is longer, and where it is shorter: far apart means that length decides."""
    names = [name for name in results["length"] if length_of(results, name, "bias") is not None][::-1]
    plt = pyplot()
    fig, axis = plt.subplots(figsize=(6, 0.6 + 0.28 * len(names)), layout="constrained")
    for y, name in enumerate(names):
        longer, shorter = (length_of(results, name, f"better_is_{which}") for which in ("longer", "shorter"))
        axis.plot([longer, shorter], [y, y], color=GREY, linewidth=1.5, alpha=0.6)
        axis.plot(longer, y, ">", color=BLUE, label="better is longer" if y == 0 else None)
        axis.plot(shorter, y, "<", color=ORANGE, label="better is shorter" if y == 0 else None)
    axis.axvline(0.5, color=GREY, linestyle=":", linewidth=1)
    axis.set_yticks(range(len(names)), names, fontsize=9)
    axis.set(xlabel="accuracy", xlim=(-0.02, 1.02))
    axis.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return as_png(fig)


def plot_calibration(results: Mapping[str, Any]) -> bytes:
    """Accuracy against margin, for the first scorers."""
    plt = pyplot()
    fig, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for color, (name, bins) in zip(CYCLE, results["calibration"].items(), strict=False):
        axis.plot(
            range(1, len(bins) + 1), [part["accuracy"] for part in bins], "o-", color=color, label=name, markersize=4
        )
    axis.axhline(0.5, color=GREY, linestyle=":", linewidth=1)
    axis.set(xlabel="pairs by margin, from the least to the most decided fifth", ylabel="accuracy", ylim=(0, 1))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(frameon=False, fontsize=8)
    return as_png(fig)


def pyplot() -> Any:
    """`matplotlib.pyplot` without a display, in the style of the reports."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    return plt


def as_png(fig: Any) -> bytes:
    """A figure as PNG, closed."""
    from matplotlib import pyplot as plt

    buffer = BytesIO()
    fig.savefig(buffer, format="png", dpi=144)
    plt.close(fig)
    return buffer.getvalue()
