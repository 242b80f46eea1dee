# SPDX-License-Identifier: Apache-2.0
"""Responses by prompt, and length and style residuals of their rewards."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from ..data.formats import images_of, message_text
from ..rendering.messages import TEMPLATE_COLUMNS
from ..rewards.residuals import RESIDUALS, ResidualFit, covariates_of
from .rows import Row, Scored, finite


Slopes = Mapping[str, Sequence[float]]


def by_prompt(scored: Iterable[Scored]) -> Iterator[list[Scored]]:
    """Responses with a reward, grouped by prompt: adjacent ones with equal prompts and other rendered columns."""

    def key(one: Scored) -> Any:
        row = one[0]
        return row.prompt, images_of(row.extra), [row.extra.get(name) for name in TEMPLATE_COLUMNS], _domain(row)

    return (list(group) for _, group in groupby((one for one in scored if one[1]["reward"] is not None), key))


def fit_slopes(residual: str, scored: Iterable[Scored]) -> Slopes:
    """Slopes of the rewards on length, or length and style, by `domain`: see [`residuals`]."""
    fit, largest = ResidualFit(len(RESIDUALS[residual])), 0
    for group in by_prompt(scored):
        covariates = [_covariates(residual, row, record) for row, record in group]
        fit.add([record["reward"] for _, record in group], covariates, _domain(group[0][0]))
        largest = max(largest, len(group))
    if largest < 2:
        raise ValueError(f"A {residual} compares adjacent rows with equal prompts: sort the rows by prompt.")
    return fit.slopes()


def take_out(residual: str, slopes: Slopes, row: Row, record: dict[str, Any]) -> None:
    """Subtracts from the reward of an output line the effect found by [`fit_slopes`]."""
    if record["reward"] is not None:
        explained = zip(slopes[_domain(row)], _covariates(residual, row, record), strict=True)
        record["base_reward"] = record["reward"]
        record["reward"] = finite(record["reward"] - math.fsum(b * x for b, x in explained))


def _domain(row: Row) -> str:
    return str(row.extra.get("domain", ""))


def _covariates(residual: str, row: Row, record: Mapping[str, Any]) -> list[float]:
    if "num_tokens" not in record:
        raise ValueError(f"A {residual} needs lengths in tokens, which only endogenous and sentence rewards provide.")
    return covariates_of(residual, message_text(row.completion), record["num_tokens"])
