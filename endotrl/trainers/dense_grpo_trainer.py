# SPDX-License-Identifier: Apache-2.0
"""GRPO with token-level credit: every token is credited with the reward from it on."""

from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from ..credit import spread_over_segments, sum_by_segment
from ..scoring.reference_pass import loss_mask
from ..sentence.segmentation import Segmenter, load_segmenter
from ..sentence.tokens import token_segments
from .dense_advantages import dense_advantages, rewards_to_go
from .dense_grpo_config import DenseGRPOConfig
from .dense_reward_trainer import DenseRewardTrainer, checked_args
from .scored_batch import ScoredBatch, pad_rows
from .setting_checks import check_token_credit, check_token_rewards, warn_of_constants


OTHER_CREDIT = ", or `credit='outcome'`"


class DenseGRPOTrainer(DenseRewardTrainer):
    r"""
    GRPO with dense rewards: the advantage of a token is the reward *from this token on*, relative to the other
    completions of the prompt, instead of the reward of the whole completion.

    Otherwise it is [`~trl.GRPOTrainer`], with its arguments, losses, logs and `reward_funcs`. A reward function is
    dense if it is a [`DenseReward`], such as [`EndogenousReward`], or if it returns a list of numbers per completion,
    one for each token of `completion_ids`. All others (one number, `async`, reward models) credit all tokens equally,
    as in TRL.

    The expected gradient is that of GRPO on the same rewards (exactly, with the default `gamma=1` and
    `scale_rewards="none"`): rewards before a token do not depend on it, and only add noise to its advantage.
    docs/dense.md has the formulas.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to be trained.
        reward_funcs (`RewardFunc | list[RewardFunc]`, *optional*):
            Reward functions, dense or not, weighted by `args.reward_weights`.
        args ([`DenseGRPOConfig`], *optional*):
            Configuration.
        segmenter ([`Segmenter`], *optional*):
            Splits completions into sentences, for `credit="sentence"`. Defaults to the one named by `args.segmenter`.
        **kwargs:
            All other arguments of [`~trl.GRPOTrainer`].

    Raises:
        `ValueError`: If a setting of TRL would undo token-level credit, or a reward cannot be credited to tokens.

    Example:
    ```python
    >>> from endotrl import DenseGRPOConfig, DenseGRPOTrainer, EndogenousReward

    >>> trainer = DenseGRPOTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     reward_funcs=EndogenousReward("Qwen/Qwen2.5-0.5B-Instruct"),
    ...     args=DenseGRPOConfig(beta=0.05, scale_rewards="none"),
    ...     train_dataset=dataset,
    ... )
    >>> trainer.train()
    ```
    """

    _tag_names = ["trl", "endotrl", "dense-grpo"]
    _name = "Dense GRPO"
    # GRPO's paper did not introduce token-level credit.
    _paper = {"citation": GRPOTrainer._paper["citation"]}

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: DenseGRPOConfig | None = None,
        train_dataset: Any = None,
        *,
        segmenter: Segmenter | None = None,
        **kwargs: Any,
    ) -> None:
        args = checked_args(args, DenseGRPOConfig, model)
        self.segmenter: Segmenter = load_segmenter(args.segmenter) if segmenter is None else segmenter
        self._keep_token_rewards = args.credit != "outcome"
        rewards = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        if self._keep_token_rewards and check_token_rewards(rewards):
            check_token_credit(args, OTHER_CREDIT)
        gamma = args.gamma if self._keep_token_rewards else None
        warn_of_constants(rewards, gamma, sentences=args.credit == "sentence", batch=args.scale_rewards == "batch")
        if args.credit == "outcome":  # plain GRPO, for the model card
            self._name, self._paper = GRPOTrainer._name, GRPOTrainer._paper
            self._tag_names = [*GRPOTrainer._tag_names, "endotrl"]
        super().__init__(model, reward_funcs, args, train_dataset, **kwargs)

    def _compute_advantages(self, output: dict[str, Any], scored: ScoredBatch) -> Tensor:
        if scored.token_rewards:  # of plain functions, too
            check_token_credit(self.args, OTHER_CREDIT)
        segment_ids = self._segment_ids(output, scored)
        to_go = {
            index: rewards_to_go(rewards, scored.state_values.get(index), segment_ids, scored.mask, self.args.gamma)
            for index, rewards in scored.token_rewards.items()
        }
        num_tokens, _ = sum_by_segment(torch.ones_like(scored.mask, dtype=torch.float32), segment_ids, scored.mask)
        advantages = dense_advantages(
            scored.rewards_per_func,
            {index: self._gather_ragged(values) for index, values in to_go.items()},
            self._gather_ragged(num_tokens),
            scored.reward_weights,
            self.num_generations if self.model.training else self.num_generations_eval,
            self.scale_rewards,
            self.multi_objective_aggregation,
            leave_one_out=self.args.baseline == "leave_one_out",
        )
        return spread_over_segments(advantages[scored.local], segment_ids, scored.mask & loss_mask(output))

    def _segment_ids(self, output: dict[str, Any], scored: ScoredBatch) -> Tensor:
        """Index of the step of each token, of shape `(B, T)`."""
        completion_ids = output["completion_ids"]
        if not scored.token_rewards:
            return torch.zeros_like(completion_ids)  # the same for all tokens
        if self.args.credit == "token":
            return torch.arange(completion_ids.shape[1], device=completion_ids.device).expand_as(completion_ids)
        segments = [token_segments(self._tokenizer, ids, self.segmenter) for ids in scored.completion_ids]
        return pad_rows(segments, completion_ids.shape[1], completion_ids.device).long()
