# SPDX-License-Identifier: Apache-2.0
"""Pooling of any dense reward by sentence."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..rendering.messages import Completion, Completions, Prompts, TokenIds
from ..rendering.policy import find_call
from ..sentence.segmentation import Segmenter, load_segmenter
from ..sentence.tokens import find_sentences
from .protocol import DenseReward, DenseScores


class SentencePooledReward:
    r"""
    A dense reward with its token rewards summed over every sentence, and assigned to its last token. Summed over a
    sentence $z$, the endogenous reward is $\alpha \log \hat\pi(z | s) + V(s) - V(s')$, with the states $s$ before and
    $s'$ after it: a difference of values at the ends of sentences, as in the sentence-level reward model
    (https://huggingface.co/papers/2503.04793).

    Args:
        reward ([`DenseReward`]), processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            The reward, and the tokenizer of the policy.
        segmenter (`str` or [`~endotrl.sentence.Segmenter`], *optional*, defaults to `"rules"`):
            Splits text into sentences: an object, or a name as in [`~endotrl.sentence.load_segmenter`].
        name (`str`, *optional*, defaults to `"sentence_pooled_reward"`):
            Name in logs.
    """

    def __init__(
        self,
        reward: DenseReward,
        processing_class: PreTrainedTokenizerBase,
        segmenter: str | Segmenter = "rules",
        name: str = "sentence_pooled_reward",
    ) -> None:
        if not isinstance(reward, DenseReward):
            raise TypeError(
                f"`reward` is a {type(reward).__name__}, but it must be a `DenseReward` such as `EndogenousReward`, "
                "whose token rewards can be summed over sentences."
            )
        self.reward = reward
        self.processing_class = processing_class
        self.segmenter = load_segmenter(segmenter) if isinstance(segmenter, str) else segmenter
        self.__name__ = name  # TRL's name for a callable in logs

    def __call__(self, prompts: Prompts, completions: Completions, **kwargs: Any) -> Any:
        """Returns the outcomes of the reward itself."""
        return self.reward(prompts=prompts, completions=completions, **kwargs)  # type: ignore[operator]

    def outcome_and_token_rewards(
        self, prompts: Prompts, completions: Completions, completion_ids: TokenIds | None = None, **kwargs: Any
    ) -> DenseScores:
        """
        Scores a batch once; see [`DenseReward`]. Outcomes and sums over tokens are those of the reward itself. If
        there are state values, the rewards that the sentence has earned before the token are added to them, since
        they are only paid at its end.
        """
        if completion_ids is None:
            raise ValueError("Sentence rewards are assigned to the policy's tokens: pass `completion_ids`.")
        batch: dict[str, Any] = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        scores = DenseScores(*self.reward.outcome_and_token_rewards(**batch, **kwargs))
        call = find_call(prompts, completion_ids, kwargs)
        written = [None if call is None or call.rows is None else call.rows[i].written for i in range(len(prompts))]
        pooled = list(scores.token_rewards)
        values = None if scores.state_values is None else list(scores.state_values)
        for i, (outcome, rewards) in enumerate(zip(scores.outcomes, scores.token_rewards, strict=True)):
            if outcome is None:  # ignored, whatever its tokens
                continue
            pooled[i] = paid = pool(rewards, self._ends(completion_ids[i], completions[i], rewards, written[i]))
            if values is not None:
                # Earned up to the token and not paid yet.
                owed = rewards.double().cumsum(0) - rewards - (paid.double().cumsum(0) - paid)
                values[i] = values[i] + owed.float()
        return DenseScores(scores.outcomes, pooled, values)

    def _ends(
        self, ids: Sequence[int], completion: Completion, rewards: Tensor, written: Sequence[int] | None
    ) -> list[int]:
        # Tool output has no reward, and cannot carry one: trainers mask it.
        has_tools = not isinstance(completion, str) and len(completion) > 1
        flags = rewards if written is None and has_tools else torch.tensor(written or [1] * len(ids))
        positions = flags.nonzero().flatten().tolist()
        return find_sentences(self.processing_class, self.segmenter, ids, positions).last_tokens


def pool(rewards: Tensor, ends: Sequence[int]) -> Tensor:
    """
    Token rewards, of shape `(H,)`, summed over segments: at the last token of each segment (`ends`, rising) the sum of
    its rewards, 0 elsewhere.
    """
    pooled = torch.zeros_like(rewards)
    if ends:
        totals = rewards.double().cumsum(0)[list(ends)]
        pooled[list(ends)] = torch.diff(totals, prepend=totals.new_zeros(1)).float()
    return pooled
