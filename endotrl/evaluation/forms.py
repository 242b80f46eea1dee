# SPDX-License-Identifier: Apache-2.0
r"""
Forms of intrinsic reward, all from the token statistics of one forward pass (`gain` needs a second one, without the prompt).

A form is named `token.aggregate`, or `token.aggregate=parameter`.

Token rewards, for a token $a_h$ in state $s_h$ of a frozen model $\hat\pi$ with logits $f$ and soft value $V$:

- `bellman`: $f(s_h, a_h) - V(s_{h+1})$ (eq. 11 of https://huggingface.co/papers/2506.23235)
- `log_prob`: $\alpha \log \hat\pi(a_h|s_h)$
- `centered`: $\alpha (\log \hat\pi(a_h|s_h) + \mathcal{H}(\hat\pi(\cdot|s_h)))$
- `negative_entropy`: $-\mathcal{H}$ (RENT, https://huggingface.co/papers/2505.22660)
- `self_certainty`: $\mathrm{KL}(U \| \hat\pi(\cdot|s_h))$ (Intuitor, https://huggingface.co/papers/2505.19590)
- `gain`: $\log \hat\pi(a_h|x, a_{<h}) - \log \hat\pi(a_h|a_{<h})$, what the prompt adds

Aggregates: `sum` (eq. 12; of `bellman` without $V(s_1)$), `mean`, `discounted`=δ ($\sum_h \delta^{h-1} r_h$), `power`=ρ (sum /
$H^\rho$: 0 is the sum, 1 the mean), `first`=K (sum over the first K tokens), `matched` (sum over as many tokens as the shortest
response of the item has), `min`.

A response that was cut counts as ended there, V = 0, so that `bellman.sum` is the log-probability of what is left. Of the
`bellman` forms only `sum`, `mean` and `power` are free of the arbitrary constants in V; the other tokens have none.
"""

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import one_hot

from ..bellman import Contributions, aggregate_weights, bellman_contributions, token_rewards
from ..checks import check_discount
from ..rewards.intrinsic import relative_perplexity, self_certainty
from .engine import ScoredResponse
from .items import Item


TOKENS = ("bellman", "log_prob", "centered", "negative_entropy", "self_certainty", "gain")
AGGREGATES = ("sum", "mean", "discounted", "power", "first", "matched", "min")
STEP_AGGREGATES = ("sum", "mean", "min")
WITH_PARAMETER = ("discounted", "power", "first")
# Names of rivals as their papers have them.
ALIASES = {
    "self_certainty": "self_certainty.mean",
    "negative_entropy": "negative_entropy.mean",
    "mean_log_prob": "log_prob.mean",
}
CONTROLS = ("length", "shortness", "position", "random")
RELATIVE_PERPLEXITY = "relative_perplexity"
# Differences among responses of an item (one fewer than responses) that a group needs for each slope.
MIN_DIFFERENCES = 3
_MARKDOWN = re.compile(r"^\s*#{1,6} |^\s*[-*] |^\s*\d+\. |\*\*|```", re.MULTILINE)


def token_values(response: ScoredResponse, token: str, vocab_size: int) -> Tensor:
    """Token rewards of a response, of shape `(H,)`, float32."""
    stats = response.stats
    if token in ("bellman", "log_prob", "centered"):
        values = torch.cat([stats.soft_values[:-1], torch.zeros(1)])
        return token_rewards(stats.chosen_logits, values, stats.alpha, 1.0, token, stats.entropies)  # type: ignore[arg-type]
    if token == "negative_entropy":
        assert stats.entropies is not None
        return -stats.entropies
    if token == "self_certainty":
        assert stats.mean_logits is not None
        return self_certainty(stats.soft_values[:-1], stats.mean_logits, vocab_size, stats.alpha)
    assert token == "gain" and response.log_probs_alone is not None
    return stats.log_probs - response.log_probs_alone


@dataclass(frozen=True)
class Form:
    """
    One form of intrinsic reward.

    Attributes:
        name (`str`):
            As on the command line.
        token (`str`):
            Token reward.
        aggregate (`str`):
            How token rewards become one number.
        parameter (`float`, *optional*):
            Of the aggregate.
        vocab_size (`int`):
            Size of the model's vocabulary.
    """

    name: str
    token: str
    aggregate: str
    parameter: float | None
    vocab_size: int

    @classmethod
    def parse(cls, name: str, vocab_size: int) -> "Form":
        """
        Reads the name of a form.

        Raises:
            `ValueError`: If there is no such form, or its parameter is missing or out of range.

        Example:
        ```python
        >>> from endotrl.evaluation.forms import Form

        >>> form = Form.parse("bellman.discounted=0.95", vocab_size=100)
        >>> form.token, form.aggregate, form.parameter
        ('bellman', 'discounted', 0.95)
        ```
        """
        token, _, rest = ALIASES.get(name, name).partition(".")
        aggregate, has_parameter, text = rest.partition("=")
        if token not in TOKENS or aggregate not in AGGREGATES:
            raise ValueError(
                f"There is no scorer {name!r}. A form of the reward is TOKEN.AGGREGATE with TOKEN one of {', '.join(TOKENS)} "
                f"and AGGREGATE one of {', '.join(a + '=NUMBER' if a in WITH_PARAMETER else a for a in AGGREGATES)}; "
                f"others are {', '.join([*ALIASES, RELATIVE_PERPLEXITY, *CONTROLS])}."
            )
        if bool(has_parameter) != (aggregate in WITH_PARAMETER):
            example = {"discounted": "0.95", "power": "0.5", "first": "20"}.get(aggregate)
            fix = f"a number, such as {token}.{aggregate}={example}" if example else f"no number: {token}.{aggregate}"
            raise ValueError(f"The scorer {name!r} needs {fix}.")
        parameter = None
        if has_parameter:
            try:
                parameter = float(text)
            except ValueError as error:
                raise ValueError(f"The scorer {name!r} has the parameter {text!r}, which is not a number.") from error
            if aggregate == "discounted":
                check_discount(f"discount of {name}", parameter)
            elif not (math.isfinite(parameter) and (aggregate == "power" or parameter >= 1)):
                raise ValueError(f"The scorer {name!r} has the parameter {text!r}, which is out of range.")
        return cls(name, token, aggregate, parameter, vocab_size)

    @property
    def needs_alone(self) -> bool:
        """Whether it needs the second pass, without the prompt."""
        return self.token == "gain"

    def score(self, item: Item, responses: Sequence[ScoredResponse]) -> list[float]:
        """One number a response, or a step."""
        if item.steps is not None:
            return self._step_scores(responses[0], len(item.steps))
        shortest = min(response.num_tokens for response in responses)
        return [self.contributions(response, shortest).total for response in responses]

    def contributions(self, response: ScoredResponse, shortest: int) -> Contributions:
        """
        What each token of a response contributes to its score, which they sum to.

        Args:
            response ([`ScoredResponse`]):
                The response.
            shortest (`int`):
                Tokens of the shortest response of the item.
        """
        values = token_values(response, self.token, self.vocab_size).double()
        num_tokens = len(values)
        count = {"first": int(self.parameter or 0), "matched": shortest}.get(self.aggregate, num_tokens)
        if self.aggregate in ("mean", "discounted"):
            weights = aggregate_weights(num_tokens, self.aggregate, self.parameter or 1.0)  # type: ignore[arg-type]
        elif self.aggregate == "min":
            weights = one_hot(values.argmin(), num_tokens).double()
        else:
            power = self.parameter if self.aggregate == "power" else 0.0
            weights = torch.full((num_tokens,), num_tokens ** -(power or 0.0), dtype=torch.float64)
        if self.token != "bellman" or self.aggregate == "min":
            return Contributions(weights * values * (torch.arange(num_tokens) < count))
        stats = response.stats
        states = torch.cat([stats.soft_values[:-1], torch.zeros(1)])[: count + 1]
        own = bellman_contributions(
            stats.chosen_logits[:count],
            states,
            weights[:count],
            # Of `bellman` rewards, V(s_1) is a constant of the prompt, which only this aggregate keeps.
            keep_initial_value=self.aggregate == "discounted",
        )
        tokens = torch.zeros_like(weights)
        tokens[: len(own.tokens)] = own.tokens
        return own._replace(tokens=tokens)

    def _step_scores(self, response: ScoredResponse, num_steps: int) -> list[float]:
        """
        Scores of steps. Summed over a step, `bellman` rewards are its log-probability plus V at its start minus V at its end. A
        step without a token of its own (empty, or cut off) gets the score of the step before it.
        """
        assert response.step_of_token is not None
        values = token_values(response, self.token, self.vocab_size).double()
        scores: list[float] = []
        for step in range(num_steps):
            own = values[response.step_of_token == step]
            if len(own) == 0:
                scores.append(scores[-1] if scores else 0.0)
            elif self.aggregate == "sum":
                scores.append(own.sum().item())
            elif self.aggregate == "mean":
                scores.append(own.mean().item())
            else:
                scores.append(own.min().item())
        return scores


@dataclass(frozen=True)
class RelativePerplexity:
    """The reward of SAR: see [`relative_perplexity`]."""

    name: str = RELATIVE_PERPLEXITY
    needs_alone: bool = True

    def score(self, item: Item, responses: Sequence[ScoredResponse]) -> list[float]:
        """One number a response, or a step."""
        if item.steps is None:
            return [_relative_perplexity(response, slice(None)) for response in responses]
        steps = responses[0].step_of_token
        assert steps is not None
        return [_relative_perplexity(responses[0], steps == step) for step in range(len(item.steps))]


def _relative_perplexity(response: ScoredResponse, tokens: Tensor | slice) -> float:
    assert response.log_probs_alone is not None
    log_probs = response.stats.log_probs[tokens]
    return relative_perplexity(log_probs, response.log_probs_alone[tokens]) if len(log_probs) else 0.0


@dataclass(frozen=True)
class Control:
    """
    A scorer that knows nothing of the content: `length` (longer wins, in tokens), `shortness`, `position` (earlier wins),
    `random` (the same number for the same item in every run).
    """

    name: str
    needs_alone: bool = False

    def score(self, item: Item, responses: Sequence[ScoredResponse]) -> list[float]:
        """One number a response, or a step."""
        if self.name == "random":
            draws = random.Random(item.key)
            return [draws.random() for _ in range(item.num_scores)]
        if self.name == "position":
            return [-float(i) for i in range(item.num_scores)]
        lengths = token_counts(item, responses)
        return [float(n) if self.name == "length" else -float(n) for n in lengths]


def token_counts(item: Item, responses: Sequence[ScoredResponse]) -> list[int]:
    """Number of tokens of each response, or step."""
    if item.steps is None:
        return [response.num_tokens for response in responses]
    steps = responses[0].step_of_token
    assert steps is not None
    return [int((steps == step).sum()) for step in range(len(item.steps))]


def markdown_density(text: str) -> float:
    """
    How much Markdown a text has: headings, bold (`**`), list items and code fences per 100 characters.

    Example:
    ```python
    >>> from endotrl.evaluation.forms import markdown_density

    >>> markdown_density("- one\\n- two")  # 2 list items in 11 characters
    18.181818181818183
    ```
    """
    return 100 * len(_MARKDOWN.findall(text)) / max(1, len(text))


def residuals(
    scores: Sequence[Sequence[float]], covariates: Sequence[Sequence[Sequence[float]]], groups: Sequence[str]
) -> tuple[list[list[float]], dict[str, list[float]]]:
    r"""
    What style does not explain (ours): $s - b^\top x$, with the slopes $b$ of the score on covariates $x$, such as the logarithm
    of the length, among the responses of an item, pooled over the items of a group (least squares with a level for each item).
    It takes no labels, but all items: the score of one depends, a little, on the others.

    Args:
        scores (`Sequence[Sequence[float]]`):
            One number a response, by item.
        covariates (`Sequence[Sequence[Sequence[float]]]`):
            C numbers a response, by item.
        groups (`Sequence[str]`):
            Group of each item. What is long for one domain is not for another.

    Returns:
        The residuals, and the C slopes of each group: 0 where a covariate is the same for all responses of each item, and in a
        group too small to fit them.
    """
    rows = [np.asarray(row, dtype=float) for row in scores]  # (responses,)
    tables = [np.asarray(table, dtype=float) for table in covariates]  # (responses, C)
    slopes: dict[str, list[float]] = {}
    for group in dict.fromkeys(groups):
        own = [i for i, name in enumerate(groups) if name == group]
        x = np.concatenate([_centered(tables[i]) for i in own])
        y = np.concatenate([_centered(rows[i]) for i in own])
        if len(y) - len(own) < MIN_DIFFERENCES * x.shape[1]:
            # The slopes would follow the scores: of one pair nothing but rounding would be left.
            slopes[group] = [0.0] * x.shape[1]
            continue
        slopes[group] = np.linalg.lstsq(x, y, rcond=None)[0].tolist()
    corrected = [
        (row - table @ np.array(slopes[group])).tolist()
        for row, table, group in zip(rows, tables, groups, strict=True)
    ]
    return corrected, slopes


def _centered(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values minus their mean; exactly 0 where all are equal, since least squares would take what rounding leaves for data."""
    return np.where(np.ptp(values, axis=0) == 0, 0.0, values - values.mean(axis=0))
