# SPDX-License-Identifier: Apache-2.0
"""Sparklines and SVG curves of logged numbers, without a plotting library."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from markupsafe import Markup

from .text import plain


BARS = "▁▂▃▄▅▆▇█"
# Okabe and Ito's colour-blind safe palette.
COLORS = BLUE, ORANGE, GREEN, *_ = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
GREY = "#999999"
WIDTH, HEIGHT, MARGIN = 480, 110, 6


def sparkline(values: Sequence[float], width: int = 32) -> str:
    """A series as one line of characters, scaled from its minimum to its maximum; non-finite values are dots."""
    per_bar = max(1, math.ceil(len(values) / width))
    blocks = [list(filter(math.isfinite, values[i : i + per_bar])) for i in range(0, len(values), per_bar)]
    means = [fmean(block) if block else None for block in blocks]
    known = [mean for mean in means if mean is not None] or [0.0]
    step = (max(known) - min(known)) / (len(BARS) - 1) or 1.0
    return "".join("·" if mean is None else BARS[round((mean - min(known)) / step)] for mean in means)


def curves(series: Mapping[str, Sequence[tuple[float, float]]]) -> Markup:
    """Series (steps and values by name) as inline SVG, each with its own scale; non-finite values are left out."""
    known = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in series.items()}
    known = {name: points for name, points in known.items() if points}
    if not known:
        return Markup("")
    left = min(points[0][0] for points in known.values())
    right = max(points[-1][0] for points in known.values())
    lines, legend = [], []
    for index, (name, points) in enumerate(known.items()):
        low, high = min(y for _, y in points), max(y for _, y in points)
        path = " ".join(
            f"{MARGIN + (x - left) / ((right - left) or 1) * (WIDTH - 2 * MARGIN):.1f},"
            f"{HEIGHT - MARGIN - (y - low) / ((high - low) or 1) * (HEIGHT - 2 * MARGIN):.1f}"
            for x, y in points
        )
        color = Markup(COLORS[index % len(COLORS)])
        lines.append(
            Markup('<polyline points="{}" fill="none" stroke="{}" stroke-width="1.5"/>').format(path, color)
            if len(points) > 1
            else Markup('<circle cx="{}" cy="{}" r="3" fill="{}"/>').format(*path.split(","), color)
        )
        legend.append(
            Markup('<span style="color:{}">■</span> {} ({:.4g} to {:.4g})').format(color, plain(name), low, high)
        )
    return Markup(
        '<figure><svg viewBox="0 0 {} {}" role="img" aria-label="{}" style="width:100%;max-width:30rem;'
        'border:1px solid var(--line)">{}</svg><figcaption>{}, step {:g} to {:g}</figcaption></figure>'
    ).format(WIDTH, HEIGHT, plain(", ".join(known)), Markup("").join(lines), Markup(" · ").join(legend), left, right)
