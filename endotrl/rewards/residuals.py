# SPDX-License-Identifier: Apache-2.0
"""Residuals of scores on length and style: rankings of responses that do not depend on style."""

import math
import re
from array import array
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


# Differences among responses of an item (one fewer than responses) required per slope in a group.
MIN_DIFFERENCES = 3
Table = Sequence[Sequence[float]] | NDArray[np.float64]
_MARKDOWN = re.compile(r"^\s*#{1,6} |^\s*[-*] |^\s*\d+\. |\*\*|```", re.MULTILINE)
# Covariates removed from a score, by the prefix of its name: `style_residual:bellman.discounted=0.93`.
RESIDUALS = {"residual": ("log length",), "style_residual": ("log length", "Markdown")}


def split_name(name: str) -> tuple[str | None, str]:
    """Splits a scorer's name into its prefix, one of [`RESIDUALS`] or `None`, and the rest."""
    prefix, _, base = name.partition(":")
    return (prefix, base) if prefix in RESIDUALS else (None, name)


def covariates_of(residual: str, text: str, num_tokens: int) -> list[float]:
    """The C covariates of a response."""
    return [math.log(max(1, num_tokens)), markdown_density(text)][: len(RESIDUALS[residual])]


def markdown_density(text: str) -> float:
    """Markdown density of a text: headings, bold (`**`), list items and code fences per 100 characters."""
    return 100 * len(_MARKDOWN.findall(text)) / max(1, len(text))


def residuals(
    scores: Sequence[Sequence[float]], covariates: Sequence[Sequence[Sequence[float]]], groups: Sequence[str]
) -> tuple[list[list[float]], dict[str, list[float]]]:
    r"""
    Part of the scores that style does not explain (ours): $s - b^\top x$, with the slopes $b$ of the score on C
    covariates $x$, such as the logarithm of the length, among the responses to an item, pooled over the items of a
    group (least squares with a level per item). It needs no labels, but all items: the residual of one depends
    slightly on the others.

    Returns the residuals, and the C slopes of each group: 0 if a covariate is the same for all responses to each item,
    and in groups that are too small to fit them.
    """
    tables = [np.asarray(table, dtype=float) for table in covariates]  # (responses, C)
    fit = ResidualFit(tables[0].shape[1])
    for row, table, group in zip(scores, tables, groups, strict=True):
        fit.add(row, table, group)
    slopes = fit.slopes()
    corrected = [
        (np.asarray(row, dtype=float) - table @ np.array(slopes[group])).tolist()
        for row, table, group in zip(scores, tables, groups, strict=True)
    ]
    return corrected, slopes


class ResidualFit:
    """Streaming fit of the slopes of [`residuals`] on C covariates: C + 1 numbers are kept per response."""

    def __init__(self, num_covariates: int) -> None:
        self._width = num_covariates + 1
        self._differences: dict[str, tuple[array[float], list[int]]] = {}

    def add(self, scores: Sequence[float], covariates: Table, group: str) -> None:
        """Adds the responses to one prompt."""
        values, items = self._differences.setdefault(group, (array("d"), [0]))
        table = np.column_stack([np.asarray(covariates, dtype=float), np.asarray(scores, dtype=float)])
        # Exactly 0 if all are equal: least squares would take rounding for data.
        centered = np.where(np.ptp(table, axis=0) == 0, 0.0, table - table.mean(axis=0))
        values.extend(centered.ravel().tolist())
        items[0] += 1

    def slopes(self) -> dict[str, list[float]]:
        """C slopes per group; see [`residuals`]."""
        result = {}
        for group, (values, (num_items,)) in self._differences.items():
            table = np.frombuffer(values).reshape(-1, self._width)
            # With fewer differences the slopes would fit the scores: for one pair only rounding would be left.
            fits = len(table) - num_items >= MIN_DIFFERENCES * (self._width - 1)
            slopes = np.linalg.lstsq(table[:, :-1], table[:, -1], rcond=None)[0].tolist() if fits else None
            result[group] = slopes or [0.0] * (self._width - 1)
        return result
