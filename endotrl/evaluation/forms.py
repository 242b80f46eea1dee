# SPDX-License-Identifier: Apache-2.0
r"""
Intrinsic reward forms, all from the token statistics of one forward pass (`gain` needs a second one, without the
prompt).

A form is named `token.aggregate`, or `token.aggregate=number`: the token rewards and aggregates of [`RewardRule`], and
the token reward `gain`, $\log \hat\pi(a_h|x, a_{<h}) - \log \hat\pi(a_h|a_{<h})$, the prompt's effect on a token.

A response that was cut off counts as ended there, V = 0, so that `bellman.sum` is the log-probability of what is left.
Among the `bellman` forms, only `sum`, `mean` and `power` do not depend on the arbitrary constants in V; other token
rewards never do.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..bellman import Contributions
from ..checks import did_you_mean
from ..rewards.intrinsic import relative_perplexity
from ..rewards.rule import RewardRule
from ..rewards.settings import AGGREGATES, EXAMPLES, TOKEN_REWARDS, parse_aggregate
from .engine import ScoredResponse
from .items import CONTROLS, Item


GAIN = "gain"  # in addition to the token rewards of [`RewardRule`]
STEP_AGGREGATES: dict[str, Callable[[Tensor], Tensor]] = {"sum": Tensor.sum, "mean": Tensor.mean, "min": Tensor.min}
# Names of rivals as in their papers.
ALIASES = {
    "self_certainty": "self_certainty.mean",
    "negative_entropy": "negative_entropy.mean",
    "mean_log_prob": "log_prob.mean",
}
RELATIVE_PERPLEXITY = "relative_perplexity"


@dataclass(frozen=True)
class Form:
    """One form of intrinsic reward: a token reward and its aggregation to one number."""

    name: str
    token: str
    aggregate: str  # without its number
    rule: RewardRule  # for `gain` that of `log_prob`

    @classmethod
    def parse(cls, name: str) -> "Form":
        """Parses the name of a form, such as `"bellman.discounted=0.95"`."""
        token, _, aggregate = ALIASES.get(name, name).partition(".")
        kind = aggregate.partition("=")[0]
        if token not in (*TOKEN_REWARDS, GAIN) or kind not in AGGREGATES:
            tokens = (*TOKEN_REWARDS, GAIN)
            others = [*ALIASES, RELATIVE_PERPLEXITY, *CONTROLS]
            meant = did_you_mean(name, [*others, *(f"{token}.{kind}" for token in tokens for kind in AGGREGATES)])
            kinds = ", ".join(f"{a}=NUMBER" if a in EXAMPLES else a for a in AGGREGATES)
            raise ValueError(
                f"There is no scorer {name!r}{meant}. Use a form TOKEN.AGGREGATE, where TOKEN is one of "
                f"{', '.join(tokens)} and AGGREGATE one of {kinds}; or residual:FORM, style_residual:FORM, "
                f"{', '.join(others)}."
            )
        if aggregate == "discounted":
            raise ValueError(f"The scorer {name!r} needs a number: {token}.discounted=0.95, for example.")
        try:
            known, number = parse_aggregate(aggregate)
        except ValueError as error:
            raise ValueError(f"There is no scorer {name!r}: {error}") from error
        token_reward: Any = "log_prob" if token == GAIN else token
        return cls(name, token, kind, RewardRule(token_reward, known if number is None else f"{known}={number!r}"))

    @property
    def needs_alone(self) -> bool:
        """Whether the form needs the second pass, without the prompt."""
        return self.token == GAIN

    def needs_logits(self, steps: bool) -> str | None:
        """Reason why a server's log-probabilities are not enough for it, or for step scores; `None` if they are."""
        if self.token == "bellman" and steps:
            return "the soft values V of Bellman rewards cancel only in sums over whole responses"
        return self.rule.needs_logits

    def token_rewards(self, response: ScoredResponse) -> Tensor:
        """Token rewards of a response, of shape `(H,)`, float32."""
        if self.token == GAIN:
            assert response.log_probs_alone is not None
            return response.stats.log_probs - response.log_probs_alone
        return self.rule.token_rewards(response.stats)

    def score(self, item: Item, responses: Sequence[ScoredResponse]) -> list[float]:
        """
        One number per response, or per step. Summed over a step, `bellman` rewards are its log-probability plus V at
        its start minus V at its end. A step without a token of its own (empty, or cut off) gets the score of the step
        before it.
        """
        if item.steps is None:
            return [self.contributions(response).total for response in responses]
        values, reduce = self.token_rewards(responses[0]).double(), STEP_AGGREGATES[self.aggregate]
        scores: list[float] = []
        for _, tokens in scored_parts(item, responses):
            own = values[tokens]
            scores.append(reduce(own).item() if len(own) else scores[-1] if scores else 0.0)
        return scores

    def contributions(self, response: ScoredResponse) -> Contributions:
        """Contribution of each token to the score."""
        if self.token == GAIN:
            gains = self.token_rewards(response)
            return Contributions(self.rule.weights(gains) * gains.double())
        contributions = self.rule.contributions(response.stats)
        assert contributions is not None  # every response has a token
        return contributions


class RelativePerplexity:
    """Relative perplexity, the reward of SAR: see [`relative_perplexity`]."""

    name = RELATIVE_PERPLEXITY
    needs_alone = True

    def score(self, item: Item, responses: Sequence[ScoredResponse]) -> list[float]:
        """One number per response, or per step; 0 for a step without tokens."""
        scores = []
        for response, tokens in scored_parts(item, responses):
            assert response.log_probs_alone is not None
            log_probs, alone = response.stats.log_probs[tokens], response.log_probs_alone[tokens]
            scores.append(relative_perplexity(log_probs, alone) if len(log_probs) else 0.0)
        return scores


@dataclass(frozen=True)
class Control:
    """
    Content-free scorer: `length` (in tokens; longer wins), `shortness`, `position` (earlier wins), `random` (the same
    in every run).
    """

    name: str
    needs_alone: bool = False

    def score(self, item: Item, responses: Sequence[ScoredResponse]) -> list[float]:
        """One number per response, or per step."""
        if self.name == "random":
            draws = random.Random(item.key)
            return [draws.random() for _ in range(item.num_scores)]
        if self.name == "position":
            return [-float(i) for i in range(item.num_scores)]
        lengths = token_counts(item, responses)
        return [float(n) if self.name == "length" else -float(n) for n in lengths]


def token_counts(item: Item, responses: Sequence[ScoredResponse]) -> list[int]:
    """Number of tokens per response, or per step."""
    return [len(response.stats.token_ids[tokens]) for response, tokens in scored_parts(item, responses)]


def scored_parts(item: Item, responses: Sequence[ScoredResponse]) -> list[tuple[ScoredResponse, Any]]:
    """What gets a score: each response with an index of all its tokens, or the only one with those of each step."""
    if (steps := responses[0].step_of_token) is None:
        return [(response, slice(None)) for response in responses]
    return [(responses[0], steps == step) for step in range(item.num_scores)]
