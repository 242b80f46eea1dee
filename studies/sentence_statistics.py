# SPDX-License-Identifier: Apache-2.0
"""Statistics of the studies of sentence reward models."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


BOOTSTRAP = 2000
BINS = ((1, 2), (3, 4), (5, 99))  # numbers of sentences
LEAST_PAIRS = 20


def accuracy(margins: Sequence[float]) -> float:
    """Share of pairs in the right order; a tie counts half."""
    return sum((m > 0) + 0.5 * (m == 0) for m in margins) / len(margins)


def right_by_pair(seeds: Sequence[Sequence[float]]) -> Tensor:
    """Share of seeds that put each pair in the right order, `(P,)`, from the margins of every seed."""
    return torch.tensor([[accuracy([margin]) for margin in margins] for margins in seeds]).mean(dim=0)


def auc(worth: Tensor, right: Tensor) -> float:
    """Chance that a right sentence is worth more than a wrong one."""
    good, bad = worth[right], worth[~right].sort().values
    below = torch.searchsorted(bad, good) + torch.searchsorted(bad, good, right=True)
    return (below.double().mean() / (2 * len(bad))).item()


def resample(count: int, statistic: Any, times: int) -> list[float]:
    """95% interval of a statistic of pairs, by bootstrap over pairs."""
    generator = torch.Generator().manual_seed(0)
    values = [statistic(torch.randint(count, (count,), generator=generator).tolist()) for _ in range(times)]
    return torch.quantile(torch.tensor(values, dtype=torch.float64), torch.tensor([0.025, 0.975]).double()).tolist()


def percent(value: float, sign: str = "") -> str:
    """A share, in percent."""
    return f"{100 * value:{sign}.1f}"


def with_interval(value: float, ends: Sequence[float], sign: str = "") -> str:
    """A share and its interval, in percent."""
    return f"{percent(value, sign)} ({' to '.join(percent(end, sign) for end in ends)})"


def by_sentences(margins: dict[str, list[list[float]]], counts: list[list[int]], base: str) -> list[list[str]]:
    """
    Rows of a table: pairs by the number of sentences of their longer answer, accuracy of the arm `base`, and by how much
    others differ from it. `margins` has one list per seed.
    """
    longest = torch.tensor([max(both) for both in counts])
    right = {arm: right_by_pair(seeds) for arm, seeds in margins.items()}
    rows = []
    for low, high in BINS:
        chosen = right[base][(longest >= low) & (longest <= high)]
        if len(chosen) < LEAST_PAIRS:
            continue
        row = [f"{low} to {high}" if high < 99 else f"{low} or more", str(len(chosen)), percent(chosen.mean().item())]
        for arm in right:
            if arm != base:
                difference = (right[arm] - right[base])[(longest >= low) & (longest <= high)]
                ends = resample(len(difference), lambda i, d=difference: d[i].mean().item(), BOOTSTRAP)
                row.append(with_interval(difference.mean().item(), ends, "+"))
        rows.append(row)
    return rows
