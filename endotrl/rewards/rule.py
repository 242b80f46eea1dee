# SPDX-License-Identifier: Apache-2.0
"""Reward rule of the endogenous reward, from token statistics to rewards, and batch metrics. No models, no TRL."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from ..bellman import (
    Contributions,
    aggregate_weights,
    bellman_contributions,
    check_alpha,
    check_discount,
    outcome_reward,
    token_rewards,
)
from ..checks import check_choice
from ..scoring.token_stats import TokenStats
from .corrections import Correction, as_correction, correct_tokens
from .settings import TOKEN_REWARDS, CorrectionName, TokenReward, Truncation, parse_aggregate


def self_certainty(soft_values: Tensor, mean_logits: Tensor, vocab_size: int, alpha: float = 1.0) -> Tensor:
    r"""
    Self-certainty of a state (Intuitor, https://huggingface.co/papers/2505.19590), in nats: $\mathrm{KL}(U \|
    \hat\pi(\cdot|s)) = (V(s) - \bar f(s)) / \alpha - \log |\mathcal{A}|$, with the mean logit $\bar f$.
    """
    return (soft_values.float() - mean_logits.float()) / alpha - math.log(vocab_size)


@dataclass(frozen=True)
class RewardRule:
    r"""
    Settings of the reward, and their arithmetic, on the [`TokenStats`] of one completion of `H` tokens. Used by
    [`EndogenousReward`], its rivals, and the forms of `endotrl eval`.

    Args:
        token_reward, aggregate, discount, alpha, gamma, truncation, correction:
            See [`~endotrl.rewards.settings.Settings`], with the formulas of [`~endotrl.bellman.token_rewards`],
            [`self_certainty`] and [`~endotrl.bellman.outcome_reward`].
    """

    token_reward: TokenReward = "bellman"
    aggregate: str = "sum"
    discount: float = 0.95
    alpha: float = 1.0
    gamma: float = 1.0
    truncation: Truncation = "terminal"
    correction: Correction | CorrectionName | None = None

    def __post_init__(self) -> None:
        check_alpha(self.alpha)
        check_discount("gamma", self.gamma)
        check_discount("discount", self.discount)
        check_choice("token_reward", self.token_reward, TOKEN_REWARDS)
        check_choice("truncation", self.truncation, get_args(Truncation))
        name, number = parse_aggregate(self.aggregate)
        object.__setattr__(self, "correction", as_correction(self.correction, self.token_reward))
        if name == "discounted" and number is not None:
            object.__setattr__(self, "aggregate", name)
            object.__setattr__(self, "discount", number)

    @property
    def needs_entropy(self) -> bool:
        return self.token_reward in ("centered", "negative_entropy")

    @property
    def needs_mean_logits(self) -> bool:
        return self.token_reward == "self_certainty"

    @property
    def needs_logits(self) -> str | None:
        """Reason why a server's log-probabilities are not enough to compute the outcome; `None` if they are."""
        if self.alpha != 1.0:
            return f"`alpha` is {self.alpha}, and any temperature other than 1 needs all logits of a state"
        if self.needs_entropy or self.needs_mean_logits:
            return f'`token_reward="{self.token_reward}"` needs the whole next-token distribution'
        if self.token_reward == "log_prob":
            return None
        name, _ = parse_aggregate(self.aggregate)
        if self.gamma != 1.0:
            return f"`gamma` is {self.gamma}, so the soft values V do not cancel in the sum"
        if name not in ("sum", "mean", "power"):
            return f'with `aggregate="{self.aggregate}"`, the soft values V of Bellman rewards do not cancel'
        if self.truncation == "bootstrap":
            return '`truncation="bootstrap"` subtracts the soft value V of the state where a completion was truncated'
        return None

    @property
    def step_discount(self) -> float:
        """Weight of a token reward in the outcome, relative to that of the token before it."""
        return self.discount if self.aggregate == "discounted" else 1.0

    def check_token_credit(self) -> None:
        """Raises `ValueError` if the outcome is not a sum of token rewards."""
        name, _ = parse_aggregate(self.aggregate)
        if name in ("mean", "power", "min"):
            raise ValueError(
                f'`aggregate="{self.aggregate}"` cannot be credited to single tokens, because the weight of a token '
                'depends on later tokens. Use `aggregate="sum"` or `"discounted"`, or credit the outcome.'
            )

    def has_outcome(self, stats: TokenStats) -> bool:
        """Whether the completion has a reward: a scored token, and with `truncation="skip"` an end."""
        return len(stats.token_ids) > 0 and (self.truncation != "skip" or stats.finished)

    def state_values(self, stats: TokenStats) -> Tensor:
        """Soft values, of shape `(H + 1,)`; the last is 0 if the state after the last token counts as terminal."""
        if self.truncation == "terminal" and not stats.finished:
            return torch.cat([stats.soft_values[:-1], torch.zeros(1)])
        return stats.soft_values

    def token_rewards(self, stats: TokenStats) -> Tensor:
        """Rewards of the scored tokens, shape `(H,)`, float32; NaN for completions excluded by `truncation="skip"`."""
        if self.truncation == "skip" and not stats.finished:
            return torch.full_like(stats.chosen_logits, torch.nan)
        form = self.token_reward
        if form == "negative_entropy":
            rewards = -_given(stats.entropies, "entropies")
        elif form == "self_certainty":
            mean_logits, vocab_size = _given(stats.mean_logits, "mean_logits"), _given(stats.vocab_size, "vocab_size")
            rewards = self_certainty(stats.soft_values[:-1], mean_logits, vocab_size, stats.alpha)
        else:
            values = self.state_values(stats)
            rewards = token_rewards(stats.chosen_logits, values, stats.alpha, self.gamma, form, stats.entropies)
        return rewards if self.correction is None else correct_tokens(rewards, stats, self.correction)  # type: ignore[arg-type]

    def weights(self, rewards: Tensor) -> Tensor:
        """Weights of token rewards of shape `(H,)` in the outcome, of shape `(H,)`, float64."""
        name, number = parse_aggregate(self.aggregate)
        num_tokens = len(rewards)
        if name == "min":
            return one_hot(rewards.argmin(), num_tokens).double()
        if name == "first":
            return (torch.arange(num_tokens) < int(number or 0)).double()
        if name == "power":
            return torch.full((num_tokens,), num_tokens ** -(number or 0.0), dtype=torch.float64)
        return aggregate_weights(num_tokens, name, self.discount)  # type: ignore[arg-type]

    def outcome(self, stats: TokenStats) -> float | None:
        """Reward of the completion, `None` if it has none. Without [`LengthControl`], which needs the batch."""
        if self.aggregate not in ("sum", "mean", "discounted"):
            contributions = self.contributions(stats)
            return None if contributions is None else contributions.total
        if not self.has_outcome(stats):
            return None
        # Only Bellman rewards contain the potential V, of which V(s_1) is a constant of the prompt.
        initial_value = stats.soft_values[0].double() if self.token_reward == "bellman" else 0.0
        rewards = self.token_rewards(stats)
        return outcome_reward(rewards, initial_value, self.aggregate, self.discount).item()  # type: ignore[arg-type]

    def contributions(self, stats: TokenStats) -> Contributions | None:
        r"""
        Contributions of the tokens to the outcome, which they sum to; `None` if it has no reward. With the default
        settings, these are $\alpha \log \hat\pi(a_h|s_h)$, and not the token rewards: see
        [`~endotrl.bellman.bellman_contributions`].
        """
        if not self.has_outcome(stats):
            return None
        name, number = parse_aggregate(self.aggregate)
        rewards = self.token_rewards(stats)
        weights = self.weights(rewards)
        if self.token_reward != "bellman" or name == "min":
            return Contributions(weights * rewards.double())
        count = min(len(rewards), int(number or 0)) if name == "first" else len(rewards)
        own = bellman_contributions(
            stats.chosen_logits[:count],
            self.state_values(stats)[: count + 1],
            weights[:count],
            self.gamma,
            keep_initial_value=name == "discounted",
        )
        return own._replace(tokens=torch.cat([own.tokens, torch.zeros(len(rewards) - count, dtype=torch.float64)]))


def _given(value: Any, name: str) -> Any:
    if value is None:
        raise ValueError(f"This reward needs `{name}`, but these token statistics have none. Score with this reward.")
    return value


def batch_diagnostics(
    rewards: Sequence[float | None], per_token: Sequence[float | None], stats: Sequence[TokenStats]
) -> dict[str, float]:
    """
    Mean over completions of the reward per token, mean over tokens of log-probability, soft value and entropy (nats;
    a server only provides the first), fraction of truncated completions, and Pearson correlation of the reward with
    the length in tokens. Metrics that are undefined for the batch (no scored token, equal lengths) are left out.
    """
    figures = {"truncated_fraction": sum(not row.finished for row in stats) / len(stats)}
    scored = [(r, row) for r, row in zip(rewards, stats, strict=True) if r is not None]
    if not scored:
        return figures
    values = torch.tensor([r for r, _ in scored], dtype=torch.float64)
    lengths = torch.tensor([len(row.token_ids) for _, row in scored], dtype=torch.float64)
    means = [mean for mean in per_token if mean is not None]
    figures["reward_per_token"] = sum(means) / len(means)
    figures["log_prob_per_token"] = torch.cat([row.log_probs for _, row in scored]).mean().item()
    if all(row.has_logits for _, row in scored):
        figures["soft_value"] = torch.cat([row.soft_values[: len(row.token_ids)] for _, row in scored]).mean().item()
    entropies = [row.entropies for _, row in scored if row.entropies is not None]
    if entropies:
        figures["entropy"] = torch.cat(entropies).mean().item()
    if len(scored) > 1 and values.std() > 0 and lengths.std() > 0:
        figures["length_correlation"] = torch.corrcoef(torch.stack([values, lengths]))[0, 1].item()
    return figures


def log_batch(
    name: str,
    rule: RewardRule,
    rewards: Sequence[float | None],
    stats: Sequence[TokenStats],
    log_extra: Callable[[str, list[Any]], None] | None,
    log_metric: Callable[[str, float], None] | None,
) -> None:
    """Passes TRL's loggers the column `per_token`, [`batch_diagnostics`], and the mean effect of a correction."""
    mean = replace(rule, aggregate="mean")  # so that runs with different aggregates can be compared
    per_token = [mean.outcome(row) for row in stats]
    if log_extra is not None:
        log_extra(f"{name}/per_token", per_token)
    if log_metric is None:
        return
    figures = batch_diagnostics(rewards, per_token, stats)
    if rule.correction is not None:
        without = map(replace(rule, correction=None).outcome, stats)
        changes = [r - p for r, p in zip(rewards, without, strict=True) if r is not None and p is not None]
        if changes:
            figures["correction"] = sum(changes) / len(changes)
    for key, value in figures.items():
        log_metric(f"{name}/{key}", value)
