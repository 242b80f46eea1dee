# SPDX-License-Identifier: Apache-2.0
"""Statistics of the studies of sentence reward models."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


BOOTSTRAP = 2000


def accuracy(margins: Sequence[float]) -> float:
    """Share of pairs in the right order; a tie counts half."""
    return sum((m > 0) + 0.5 * (m == 0) for m in margins) / len(margins)


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
