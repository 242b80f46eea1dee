# SPDX-License-Identifier: Apache-2.0
"""Token heat maps of rewards: colour scale, legend, and coloured completions."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from markupsafe import Markup, escape

from .text import JOINERS, counted, is_hidden, number, plain


STEPS = 8  # shades on each side of neutral
# Opacity of the strongest shade. Text stays readable on every shade, in both modes: a test computes the contrast.
OPACITY = 0.75
QUANTILE = 0.95  # fraction of a page's tokens below the strongest shade
MIN_FOR_EXTREMES = 8  # tokens; fewer are seen at a glance
# Blue and orange are colour-blind safe. They are translucent, so that neutral is white on a white page and dark on a
# dark one.
SHADES = "\n".join(
    f".{side}{step} {{ background-color: rgb(var(--{name}) / {OPACITY * step / STEPS:.3f}); }}"
    for side, name in (("p", "pos"), ("n", "neg"))
    for step in range(1, STEPS + 1)
)


@dataclass(frozen=True)
class ColorScale:
    """
    Colour scale of token rewards: orange below `center`, neutral at it, blue above; strongest from `limit` nats away.
    It has both sides for signed numbers, and one for numbers of one sign, such as log-probabilities (`"below"`).
    """

    limit: float
    center: float = 0.0
    sides: Literal["both", "below", "above"] = "both"

    @classmethod
    def of(cls, rewards: Iterable[Iterable[float]], center: float = 0.0) -> "ColorScale":
        """Scale for some completions, robust to a few extreme tokens."""
        differences = [r - center for row in rewards for r in row if math.isfinite(r)]
        distances = sorted(map(abs, differences))
        limit = distances[math.ceil(QUANTILE * (len(distances) - 1))] if distances else 0.0
        below, above = (any(sign * d > 0 for d in differences) for sign in (-1, 1))
        return cls(limit or 1.0, center, "both" if below == above else "below" if below else "above")

    def share(self, reward: float) -> float:
        """Position of a reward on the scale, from -1 to 1."""
        return max(-1.0, min(1.0, (reward - self.center) / self.limit))

    def shade(self, reward: float) -> str:
        """CSS class: `"p1"`..`"p8"` above the centre, `"n1"`..`"n8"` below, `""` at it, `"bad"` for NaN."""
        if math.isnan(reward):
            return "bad"
        share = self.share(reward)
        step = round(abs(share) * STEPS)
        return "" if step == 0 else f"{'p' if share > 0 else 'n'}{step}"


def legend(scale: ColorScale, what: str) -> Markup:
    """Legend of a page's heat maps: the colours with their meaning."""
    decimals = max(1, -math.floor(math.log10(scale.limit)))  # a small limit must not be shown as 0.0
    middle = low = high = number(scale.center, decimals)
    shades = [""]
    if scale.sides != "above":
        low = "≤ " + number(scale.center - scale.limit, decimals, sign=True)
        shades = [*(f"n{i}" for i in range(STEPS, 0, -1)), *shades]
    if scale.sides != "below":
        high = "≥ " + number(scale.center + scale.limit, decimals, sign=True)
        shades = [*shades, *(f"p{i}" for i in range(1, STEPS + 1))]
    return Markup(
        '<div class="legend"><span>{}</span><span class="bar">{}<span class="ramp" aria-hidden="true">{}</span>{}'
        "</span><span>neutral at {}. Point at the text, or tap it, to see its numbers.</span></div>"
    ).format(what, low, Markup("").join(Markup('<i class="{}"></i>').format(s) for s in shades), high, middle)


@dataclass(frozen=True)
class HeatMapRow:
    """A completion for [`heat_maps`]: contributions of its `H` tokens to one number, the `total`."""

    text: str
    offsets: Sequence[tuple[int, int]]  # `H` spans, as in [`token_heat_map`]
    contributions: Sequence[float]  # of length `H`
    total: float | None  # `None` for a completion that was cut off and gets no reward
    rest: Mapping[str, float] = field(default_factory=dict)  # further summands of the total, by name
    columns: Mapping[str, Sequence[float]] = field(default_factory=dict)  # further numbers per token, by name
    eos: bool = False
    prompt: str = ""
    meta: str = ""
    details: Markup = Markup("")  # shown below


def heat_maps(
    rows: Sequence[HeatMapRow],
    what: str = "contribution to the reward, nats",
    total: str = "reward",
    unit: str = "token",
    center: float = 0.0,
    decimals: int | None = None,
) -> Markup:
    """
    Heat maps of completions, coloured by the contributions (`what`) of their tokens, or other units, to one number
    (named `total`), on one scale with a legend, and with the sum above each. By default, numbers have at least 3
    decimals, and as many as the shares of a mean need. Raises `ValueError` if the contributions of a completion and
    its `rest` do not sum to its `total`: the page would show another number than the actual one.
    """
    scale = ColorScale.of((row.contributions for row in rows), center=center)
    if decimals is None:
        decimals = max(3, 3 - math.floor(math.log10(scale.limit)))
    blocks = [legend(scale, what)]
    for row in rows:
        meta = " · ".join(filter(None, [row.meta, _sum_in_words(row, total, unit)]))
        blocks += [token_heat_map(row, scale, meta, unit, decimals), row.details]
    return Markup("").join(blocks)


def _sum_in_words(row: HeatMapRow, total: str, unit: str) -> str:
    units = counted(len(row.contributions), unit)
    if row.total is None:
        return f"no {total} · {units}"
    parts = {units: math.fsum(row.contributions), **row.rest}
    scale = 1.0 + math.fsum(map(abs, [*row.contributions, *row.rest.values()]))
    if math.isfinite(row.total) and abs(math.fsum(parts.values()) - row.total) > 1e-4 * scale:
        raise ValueError(
            f"The contributions of a completion must sum to its {total}, but they sum to {math.fsum(parts.values())}, "
            f"and its {total} is {row.total}: they belong to another reward."
        )
    sums = " + ".join(f"{name} {number(value)}" for name, value in parts.items())
    return f"{total} {number(row.total)} = {sums}" if row.rest else f"{total} {number(row.total)} · {units}"


def token_heat_map(row: HeatMapRow, scale: ColorScale, meta: str, unit: str = "token", decimals: int = 3) -> Markup:
    """
    Heat map of a completion, every token coloured by its contribution; hovering over a token, or tapping it, shows its
    numbers. A token that ends inside a character has an empty span; text outside all spans (written by a tool) has no
    colour.
    """
    columns = {"contribution": row.contributions, **row.columns}
    pieces, end = [], 0
    for place, ((start, stop), *values) in enumerate(zip(row.offsets, *columns.values(), strict=True), start=1):
        pieces.append(_gap(row.text[end:start]))
        end = max(end, stop)
        token, is_eos = row.text[start:stop], row.eos and place == len(row.offsets)
        numbers = " · ".join(
            f"{title} {number(value, decimals, sign=title == 'contribution')}"
            for title, value in zip(columns, values, strict=True)
        )
        # The space before a word has no colour: at a line's end it would hang there as a strip.
        space = " " if token.startswith(" ") and not token.isspace() else ""
        pieces.append(
            Markup('{}<span class="t {}{}" tabindex="-1" data-tip="{}">{}</span>').format(
                space,
                scale.shade(values[0]),
                " eos" if is_eos else "",
                f"{unit} {place}  “{plain(token, newline='↵')}”\n{numbers}",
                "EOS" if is_eos else _token_text(token[len(space) :]),
            )
        )
    return Markup('<div class="heat">{}{}<p class="tokens" dir="auto">{}</p>{}</div>').format(
        Markup('<p class="meta">{}</p>').format(plain(meta)),
        Markup('<div class="prompt" dir="auto">{}</div>').format(plain(row.prompt)) if row.prompt else "",
        Markup("").join([*pieces, _gap(row.text[end:])]),
        _extremes(row, decimals - 1),
    )


def _gap(text: str) -> Markup:
    return Markup('<span class="gap">{}</span>').format(_token_text(text)) if text else Markup("")


def _extremes(row: HeatMapRow, decimals: int) -> Markup:
    """The lowest and the highest in words, for readers who see no colours or cannot hover, and on paper."""
    known = [pair for pair in zip(row.contributions, row.offsets, strict=True) if not math.isnan(pair[0])]
    if len(known) < MIN_FOR_EXTREMES:
        return Markup("")
    known.sort(key=lambda pair: pair[0])
    lowest, highest = (
        Markup(", ").join(
            Markup("“<bdi>{}</bdi>” {}").format(_brief(row.text[slice(*span)]), number(value, decimals, sign=True))
            for value, span in chosen
        )
        for chosen in (known[:3], known[:-4:-1])
    )
    return Markup('<p class="meta extremes">Lowest: {}. Highest: {}.</p>').format(lowest, highest)


def _brief(token: str) -> str:
    """A token, or the beginning of a sentence, within a line of text."""
    if token == "":
        return "▯"
    shown = token.replace(" ", "·") if token.isspace() else token.strip(" ")
    return plain(shown if len(shown) <= 40 else f"{shown[:39]}…", newline="↵")


def _token_text(token: str) -> Markup:
    """A token with visible white space and hidden characters."""
    if token == "":
        return Markup("<i>▯</i>")  # part of a character
    blank, alone = token.isspace(), all(is_hidden(c) or c in JOINERS for c in token)
    pieces = []
    for character in token:
        if character == "\n":
            pieces.append(Markup("<i>↵</i>\n"))
        elif blank and character in " \t":
            pieces.append(Markup("<i>·</i>" if character == " " else "<i>→\t</i>"))
        elif character != "\t" and (is_hidden(character) or alone):
            pieces.append(Markup('<span class="u">{}</span>').format(f"U+{ord(character):04X}"))
        else:
            pieces.append(escape(character))
    return Markup("").join(pieces)
