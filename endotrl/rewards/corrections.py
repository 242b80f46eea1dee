# SPDX-License-Identifier: Apache-2.0
"""Corrections of the endogenous reward for what policies exploit: length, outlier tokens, generic text."""

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..frozen.served import ServedModel
from ..scoring.token_stats import TokenStats
from .settings import CorrectionName


def length_slope(outcomes: Sequence[float | None], lengths: Sequence[int], groups: Sequence[Hashable]) -> float:
    r"""
    Least-squares slope of outcomes on $\log H$, both centered within groups (the completions of a prompt), so that
    prompts that require long answers do not count as an effect of length. Outcomes of `None` are left out. 0 if
    lengths do not differ.
    """
    by_group: dict[Hashable, list[tuple[float, float]]] = defaultdict(list)
    for outcome, length, group in zip(outcomes, lengths, groups, strict=True):
        if outcome is not None and length > 0:
            by_group[group].append((math.log(length), outcome))
    covariance = variance = 0.0
    for pairs in by_group.values():
        log_lengths, scores = (column - column.mean() for column in torch.tensor(pairs, dtype=torch.float64).T)  # (N,)
        covariance += (log_lengths @ scores).item()
        variance += (log_lengths @ log_lengths).item()
    return covariance / variance if variance > 0 else 0.0


def length_shares(num_tokens: int, slope: float) -> Tensor:
    r"""Contribution of each token to $-b \log H$, `(H,)`, float32: $-b \log \frac{h}{h-1}$, and 0 for the first."""
    logs = torch.arange(1, num_tokens + 1, dtype=torch.float64).log()
    return (-slope * torch.diff(logs, prepend=torch.zeros(1, dtype=torch.float64))).float()


@dataclass(frozen=True)
class LengthControl:
    r"""
    Length control: $s - b \log H$ for an outcome $s$ of $H$ tokens, the residual of the outcome on log length.

    The slope $b$ is estimated by least squares within groups, pooled over the prompts of a batch: the completions that
    this process scores in one call. If longer answers *are* better, that is removed too.
    """


@dataclass(frozen=True)
class ClipTokens:
    r"""
    Clipping: each token reward is clamped to `[low, high]` (nats for `alpha=1.0`), so that one improbable token does
    not dominate a whole answer. It needs `token_reward="log_prob"` or `"centered"`, which are free of the arbitrary
    constants in the logits. The outcome, the aggregate of the clipped rewards, is no longer a log-probability.
    """

    low: float = -5.0
    high: float = math.inf

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"`low` must be less than `high`, got {self.low} and {self.high}.")


@dataclass(frozen=True)
class InformationGain:
    r"""
    Information gain over a second model: the token reward is

    $$
    r_h = w(\hat\pi(a_h|s_h)) \, \alpha \, (\log \hat\pi(a_h|s_h) - \log \pi_{\text{gen}}(a_h|s_h))
    $$

    with a generalist $\pi_{\text{gen}}$: text that is probable under any model earns nothing. The idea is TCER's
    (https://huggingface.co/papers/2604.11522), whose formula is not public: no parity with it is claimed. It needs
    `token_reward="log_prob"`, and costs a forward pass of the generalist.

    Args:
        generalist (`str`, [`~transformers.PreTrainedModel`] or [`ServedModel`]):
            The other model, with the same tokenizer: a path, a hub id, a loaded model, or one on a server.
        weight (`Callable`, *optional*):
            Function from the tokens' probabilities under the frozen model, shape `(H,)`, to their weights, such as
            [`one_minus_probability`]. `None` means 1 for all.

    Example:
    ```python
    >>> from endotrl import EndogenousReward
    >>> from endotrl.rewards import InformationGain
    >>> from endotrl.rewards.corrections import one_minus_probability

    >>> gain = InformationGain("Qwen/Qwen2.5-Math-7B", weight=one_minus_probability)
    >>> reward = EndogenousReward("my-sft-model", token_reward="log_prob", correction=gain)
    ```
    """

    generalist: str | PreTrainedModel | ServedModel
    weight: Callable[[Tensor], Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Replaces a loaded model by its name: the [`EndogenousReward`] that scores with it holds the weights."""
        model = self.generalist
        name = model.config._name_or_path if isinstance(model, PreTrainedModel) else model
        return {**vars(self), "generalist": name}


Correction = LengthControl | ClipTokens | InformationGain


def one_minus_probability(probabilities: Tensor) -> Tensor:
    """Weight for [`InformationGain`]: 0 for a token of which the model was certain, 1 for an unexpected one."""
    return 1 - probabilities


def as_correction(correction: Correction | CorrectionName | None, token_reward: str) -> Correction | None:
    """Resolves the name of a correction: `"length"` is `LengthControl()`, `"clip"` is `ClipTokens()`."""
    if correction == "length":
        return LengthControl()
    if correction == "clip":
        correction = ClipTokens()
    if not isinstance(correction, LengthControl | ClipTokens | InformationGain | None):
        raise ValueError(
            f'`correction` is {correction!r}, but it must be "length", "clip", a `LengthControl`, a `ClipTokens`, an '
            "`InformationGain`, or `None`."
        )
    if isinstance(correction, ClipTokens) and token_reward == "bellman":
        raise ValueError(
            '`ClipTokens` does not support `token_reward="bellman"`: these rewards contain arbitrary constants of the '
            'logits, and clipping would leave them in the sum. Use `token_reward="log_prob"` (the same sum) or '
            '"centered".'
        )
    if isinstance(correction, InformationGain) and token_reward != "log_prob":
        raise ValueError(
            f"`token_reward` is {token_reward!r}, but `InformationGain` is a difference of log-probabilities. Use "
            '`token_reward="log_prob"`.'
        )
    return correction


def correct_tokens(rewards: Tensor, stats: TokenStats, correction: Correction) -> Tensor:
    """Corrected token rewards, of shape `(H,)`; [`LengthControl`] corrects outcomes of a batch instead."""
    if isinstance(correction, LengthControl):
        return rewards
    if isinstance(correction, ClipTokens):
        return rewards.clamp(correction.low, correction.high)
    if stats.generalist_log_probs is None:
        raise ValueError(
            "`InformationGain` needs the generalist's log-probabilities, but these token statistics have none. Score "
            "the completions with this reward."
        )
    gains = rewards - stats.alpha * stats.generalist_log_probs
    if correction.weight is None:
        return gains
    weights = correction.weight(stats.log_probs.exp())
    if not isinstance(weights, Tensor) or weights.shape != gains.shape or not weights.isfinite().all():
        raise ValueError(
            f"The `weight` of `InformationGain` must return one finite number per token, got {weights!r}."
        )
    return weights * gains
