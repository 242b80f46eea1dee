# SPDX-License-Identifier: Apache-2.0
r"""
Training statistics of a batch of sampled completions: pure functions, without models or trainers.

`N` completions are in groups of `G`, one group per prompt, in contiguous rows.
"""

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from torch import Tensor


def repetition(tokens: Sequence[Hashable], n: int = 4) -> float | None:
    """
    Fraction, in $[0, 1)$, of a completion's n-grams (of tokens, or of words) that occurred in it before: 0 without
    repetition, near 1 in a loop; `None` with fewer than two n-grams, of which none can recur.
    """
    total = len(tokens) - n + 1
    if total < 2:
        return None
    return 1 - len({tuple(tokens[i : i + n]) for i in range(total)}) / total


MAX_VERDICTS = 32


class ValuesSeen:
    """
    Distinct values of a reward. The reward is a verdict, such as a verifier's, if different completions of a batch
    have had the same value, and there have been no more than 32 values.
    """

    def __init__(self, values: Sequence[float] = (), recurs: bool = False) -> None:
        self.values, self.recurs = list(values), recurs

    def add(self, completions: Sequence[Hashable], values: Sequence[float]) -> None:
        """Adds a batch: an identifier of each completion (with its prompt), and its value, or NaN."""
        if len(self.values) <= MAX_VERDICTS:
            known = zip(completions, values, strict=True)
            found = {completion: float(f"{value:.6g}") for completion, value in known if math.isfinite(value)}
            new = set(found.values())
            self.recurs |= len(new) < len(found)
            self.values += new.difference(self.values)

    @property
    def is_verdict(self) -> bool:
        """Whether the reward is a verdict, by the batches so far."""
        return self.recurs and len(self.values) <= MAX_VERDICTS


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """
    Mean of grades of shape `(questions, answers)`, NaN left out, and its standard error: from the spread of questions,
    plus one grade, so that it is not 0 if all are right. NaN without a grade; the error also with one question.
    """
    rows = values.double().nanmean(dim=1)
    rows = rows[~rows.isnan()]
    given = values[~values.isnan()]
    if not len(given):
        return math.nan, math.nan
    spread = rows.std().item() if len(rows) > 1 else math.nan
    return given.mean().item(), math.hypot(spread / len(rows) ** 0.5, 1 / len(given))


def distinct_completions(hashes: Tensor, num_generations: int) -> float:
    """Mean number of distinct completions per group, from their `hashes`, of shape `(N,)`."""
    groups = hashes.view(-1, num_generations).tolist()
    return sum(len(set(group)) for group in groups) / len(groups)


class Correlation(NamedTuple):
    """Result of [`group_correlation`]."""

    rho: float
    z: float
    slope: float


def group_correlation(values: Tensor, others: Tensor, num_generations: int) -> Correlation | None:
    r"""
    Correlation of two numbers per completion *within groups*: of their differences to their group's means,

    $$
    \rho = \frac{\sum_i \tilde x_i \tilde y_i}{\sqrt{\sum_i \tilde x_i^2 \sum_i \tilde y_i^2}}, \qquad
    z = \frac{\sum_i \tilde x_i \tilde y_i}{\sqrt{\sum_g S^x_g S^y_g / (G - 1)}}, \qquad
    \text{slope} = \frac{\sum_i \tilde x_i \tilde y_i}{\sum_i \tilde x_i^2}
    $$

    with $S_g = \sum_{i \in g} \tilde x_i^2$. $z$ is in standard deviations, which are exact for numbers shuffled
    within each group. Differences between prompts do not count, as in GRPO's advantage. With a reward $x$, $\rho$
    shows the direction of the policy gradient: the mean of any $y$ changes in proportion to its covariance with the
    advantage.

    `values` and `others`, of shape `(N,)`, are $x$ and $y$; groups with a NaN are left out. `None` if one of the
    numbers is constant within every group.
    """
    if num_generations < 2:
        return None
    x, y = (t.double().view(-1, num_generations) for t in (values, others))
    # Numbers that are equal up to rounding have no correlation.
    rounding_x, rounding_y = ((t.abs().nan_to_num().max().item() * 1e-6) ** 2 for t in (x, y))
    defined = ~(x + y).isnan().any(dim=1)
    x, y = (t[defined] - t[defined].mean(dim=1, keepdim=True) for t in (x, y))
    squares_x, squares_y = x.square().sum(dim=1), y.square().sum(dim=1)
    product, total_x, total_y = (x * y).sum(), squares_x.sum(), squares_y.sum()
    shuffled = (squares_x * squares_y).sum() / (num_generations - 1)
    if total_x <= rounding_x * x.numel() or total_y <= rounding_y * y.numel() or shuffled <= 0:
        return None
    found = (product / (total_x * total_y).sqrt(), product / shuffled.sqrt(), product / total_x)
    return Correlation(*(number.item() for number in found))


def change_since(values: Tensor, log_ratios: Tensor, num_generations: int) -> tuple[float, float] | None:
    r"""
    Change of the mean of a number since an earlier policy $\pi_0$, estimated from completions of the current policy
    $\pi_t$ alone: with the importance weights $w_i = \pi_0(y_i) / \pi_t(y_i)$,

    $$
    \Delta = \frac1N \sum_i (1 - w_i)(a_i - b_i), \qquad \mathbb{E}[\Delta] = \mathbb{E}_{\pi_t}[a] -
    \mathbb{E}_{\pi_0}[a]
    $$

    with the mean $b_i$ of the *other* completions of the group, a baseline that only reduces variance. While the
    policies are close, this is far more precise than the difference of two means of $a$: its variance is about
    $\sigma_a^2 \chi^2(\pi_0, \pi_t) / N$, instead of $2 \sigma_a^2 / N$.

    `values` are the $a_i$, of shape `(N,)` (groups with a NaN are left out), and `log_ratios`
    $\log \pi_0(y_i) - \log \pi_t(y_i)$, in nats per completion.

    Returns $\Delta$ and its standard error over groups; `None` if the policies are too far apart (an effective
    sample size $(\sum w)^2 / \sum w^2$ below half of `N`, or a mean weight off 1 by a quarter), or with one group.
    """
    if num_generations < 2:
        return None
    a, weights = (t.double().view(-1, num_generations) for t in (values, log_ratios.double().exp()))
    defined = ~(a + weights).isnan().any(dim=1)
    a, weights = a[defined], weights[defined]
    if len(a) < 2:
        return None
    mean = weights.mean().item()
    if not 0.75 < mean < 1.25 or mean**2 < 0.5 * weights.square().mean().item():
        return None
    others = (a.sum(dim=1, keepdim=True) - a) / (num_generations - 1)
    changes = ((1 - weights) * (a - others)).mean(dim=1)
    return changes.mean().item(), changes.std().item() / math.sqrt(len(changes))
