# SPDX-License-Identifier: Apache-2.0
"""
Intrinsic rewards as TRL reward functions, alternatives to the endogenous reward that also need no training or labels.
They read a frozen model; Intuitor and RENT score with the policy itself, which changes during training.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..frozen.served import ServedModel
from ..rendering.messages import Completions, Prompts, TokenIds
from ..rendering.renderer import Rendered, Renderer
from ..scoring.token_stats import TokenStats
from .frozen_model_reward import FrozenModelReward
from .rule import RewardRule, batch_diagnostics


def relative_perplexity(log_probs: Tensor, log_probs_alone: Tensor) -> float:
    """
    Relative reduction of a response's perplexity by its prompt (SAR, https://huggingface.co/papers/2509.05489), from
    log-probabilities in nats: $(p_0 - p) / p_0$, clipped to $[-1, 1]$, with $p$ after the prompt and $p_0$ without it.
    """
    ratio = torch.exp(log_probs_alone.double().mean() - log_probs.double().mean())  # p / p_0
    return (1 - ratio).clamp(-1.0, 1.0).item()


def without_prompts(renderer: Renderer, rows: Sequence[Rendered], chats: Sequence[bool]) -> list[Rendered]:
    """Rows with empty prompts: an empty user message where `chats` is `True`, otherwise BOS, or else EOS."""
    empty = {}
    if True in chats:
        empty[True] = renderer.prompt_ids([[{"role": "user", "content": ""}]])[0]
    if False in chats:
        tokenizer = renderer.tokenizer
        first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if first is None:
            raise ValueError(
                f"The tokenizer {tokenizer.name_or_path!r} has neither a BOS nor an EOS token, so there is nothing to "
                "put before a response without its prompt. Set one of them."
            )
        empty[False] = [first]
    return [replace(row, prompt_ids=empty[chat], images=None) for row, chat in zip(rows, chats, strict=True)]


class _IntrinsicReward(FrozenModelReward):
    """TRL's contract for a number from token statistics: by default, the mean of a rule's token rewards."""

    _default_name: str
    rule = RewardRule("log_prob", "mean")
    _dtype = torch.float32  # of the mean

    def __init__(
        self,
        model: str | PreTrainedModel | ServedModel | None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        name: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(model, processing_class, self._default_name if name is None else name, **settings)

    def __call__(
        self, prompts: Prompts, completions: Completions, completion_ids: TokenIds | None = None, **kwargs: Any
    ) -> list[float | None]:
        """One reward per completion, `None` for one without a scored token. As [`EndogenousReward.__call__`]."""
        rows = self._render(prompts, completions, completion_ids, kwargs)
        stats = self._score_rows(rows, entropy=False)
        rewards = self._rewards(prompts, rows, stats)
        if (log_metric := kwargs.get("log_metric")) is not None:
            figures = batch_diagnostics(rewards, rewards, stats)
            for key in ("log_prob_per_token", "length_correlation", "truncated_fraction"):
                if key in figures:
                    log_metric(f"{self.__name__}/{key}", figures[key])
        return rewards

    def _rewards(self, prompts: Prompts, rows: list[Rendered], stats: list[TokenStats]) -> list[float | None]:
        return [
            self.rule.token_rewards(row).to(self._dtype).mean().item() if self.rule.has_outcome(row) else None
            for row in stats
        ]


class SelfCertaintyReward(_IntrinsicReward):
    r"""
    Self-certainty (Intuitor, https://huggingface.co/papers/2505.19590): the mean over tokens of
    $\mathrm{KL}(U \| \hat\pi(\cdot|s_h))$, the distance from a uniform prediction, in nats. For the arguments, see
    [`FrozenModelReward`].
    """

    _default_name = "self_certainty_reward"
    rule = RewardRule("self_certainty", "mean")


class NegativeEntropyReward(_IntrinsicReward):
    r"""
    Negative entropy (RENT, https://huggingface.co/papers/2505.22660): minus the mean over tokens of the entropy of
    $\hat\pi(\cdot|s_h)$, in nats. Used like [`SelfCertaintyReward`].
    """

    _default_name = "negative_entropy_reward"
    rule = RewardRule("negative_entropy", "mean")


class MeanLogProbReward(_IntrinsicReward):
    r"""
    Mean log-probability of the tokens, $\frac1H \log \hat\pi(y|x)$, in nats: minus the logarithm of the perplexity.
    Equal to `EndogenousReward(aggregate="mean")` for a finished response. Used like [`SelfCertaintyReward`].
    """

    _default_name = "mean_log_prob_reward"
    _dtype = torch.float64


class RelativePerplexityReward(_IntrinsicReward):
    r"""
    Relative reduction of the response's perplexity by the prompt: see [`relative_perplexity`]. It needs a second
    forward pass, without the prompt ([`without_prompts`]). Used like [`SelfCertaintyReward`].
    """

    _default_name = "relative_perplexity_reward"

    def _rewards(self, prompts: Prompts, rows: list[Rendered], stats: list[TokenStats]) -> list[float | None]:
        without = without_prompts(self._prompts.of(), rows, [not isinstance(prompt, str) for prompt in prompts])
        return [
            relative_perplexity(own.log_probs, alone.log_probs) if len(own.token_ids) else None
            for own, alone in zip(stats, self._score_rows(without, entropy=False), strict=True)
        ]
