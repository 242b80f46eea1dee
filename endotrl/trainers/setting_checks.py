# SPDX-License-Identifier: Apache-2.0
r"""
Checks for settings that undo token-level credit, or make advantages depend on constants in the logits.

A constant $c(s)$ added to all logits of a state changes no probability, and adds $c(s)$ to the soft value $V(s)$. A
Bellman reward is $\alpha \log \hat\pi(a_h|s_h) + V(s_h) - \gamma V(s_{h+1})$. The soft values cancel from a return if
it discounts like the reward, if $V$ is subtracted from it where it begins, and if it ends where the reward takes the
state to be terminal.
"""

from collections.abc import Sequence
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from trl import GRPOConfig

from ..rewards.corrections import LengthControl
from ..rewards.endogenous import EndogenousReward
from ..rewards.protocol import DenseReward


logger = get_logger(__name__)


def check_token_credit(args: GRPOConfig, alternative: str = "") -> None:
    """Raises `ValueError` for settings of TRL's loss under which tokens cannot have advantages of their own."""
    if args.importance_sampling_level == "sequence":
        raise ValueError(
            "`importance_sampling_level='sequence'` uses one importance ratio for all tokens of a completion, which "
            f"undoes token-level advantages. Use `importance_sampling_level='token'`{alternative}."
        )
    if args.off_policy_mask_threshold is not None:
        raise ValueError(
            f"`off_policy_mask_threshold` is {args.off_policy_mask_threshold}, but it is meant to drop whole "
            "completions with a negative advantage. With token-level advantages, it would drop single tokens. Use "
            f"`off_policy_mask_threshold=None`{alternative}."
        )


def check_token_rewards(reward_funcs: Sequence[Any]) -> bool:
    """
    Whether any of the reward functions is a [`DenseReward`]; plain functions show it only when they are called. Raises
    `ValueError` if one of them cannot be credited to tokens.
    """
    for reward in reward_funcs:
        if isinstance(reward, EndogenousReward):
            reward.check_token_credit()
    return any(isinstance(reward, DenseReward) for reward in reward_funcs)


def check_prompts(name: str, dataset: Any) -> None:
    """Raises `ValueError` for a dataset of token ids instead of prompts, as in TRL's own PPO."""
    for part in dataset.values() if isinstance(dataset, dict) else [dataset]:
        columns = part.column_names if isinstance(part, Dataset | IterableDataset) else None
        if columns and "input_ids" in columns and "prompt" not in columns:  # unknown for some streams
            raise ValueError(
                f"`{name}` is tokenized: it has a column `input_ids` but no column `prompt`. This trainer renders and "
                "tokenizes prompts itself. Pass them as text or messages in a column `prompt`."
            )


def warn_of_constants(
    reward_funcs: Sequence[Any],
    gamma: float | None,
    *,
    sentences: bool = False,
    baseline: bool = True,
    bootstrap: bool = False,
    batch: bool = False,
) -> None:
    """
    Warns about each endogenous reward whose advantages would depend on constants in the frozen model's logits.

    `gamma` discounts the returns from one step to the next (`None`: completions are credited with their outcome), and
    a step is a token, or with `sentences` a sentence. `baseline`: the soft value is subtracted from the return;
    `bootstrap`: it is added to that of a truncated completion; `batch`: outcomes of several prompts are compared.
    """
    for reward in reward_funcs:
        if not isinstance(reward, EndogenousReward) or reward.token_reward != "bellman":
            continue
        step, by_outcome = reward.rule.step_discount, gamma is None
        discount = step if gamma is None else gamma * step
        reasons = []
        if sentences and not by_outcome and discount < step:
            reasons.append(
                "`gamma` discounts from sentence to sentence, but soft values change from token to token: use 1.0."
            )
        elif not by_outcome and abs(discount - reward.gamma) > 1e-9:
            reasons.append(
                f"The returns are discounted by {discount:g}, but `gamma` of the endogenous reward is "
                f"{reward.gamma:g}: use the same value."
            )
        if (by_outcome or isinstance(reward.correction, LengthControl)) and abs(step - reward.gamma) > 1e-9:
            reasons.append(
                f"The outcome of a completion is discounted by {step:g}, but `gamma` of the endogenous reward is "
                f"{reward.gamma:g}: use the same value."
            )
        elif by_outcome and batch and reward.aggregate == "discounted":
            reasons.append(
                "The discounted outcome contains the soft value of the prompt, but `scale_rewards='batch'` compares "
                "prompts: use 'group' or 'none'."
            )
        if reward.aggregate.startswith(("first", "min")):
            reasons.append(f"The aggregate '{reward.aggregate}' keeps the soft value of the state where it stops.")
        if not baseline:
            reasons.append(
                "`soft_value_baseline=False` leaves the soft value for the critic to learn: use the default, `True`."
            )
        if reward.truncation == "bootstrap" and not bootstrap:
            reasons.append(
                "`truncation='bootstrap'` of the endogenous reward subtracts the soft value of the state where a "
                "completion was truncated: use 'terminal'."
            )
        if reasons:
            logger.warning(
                f"The advantages from '{reward.__name__}' depend on constants that the frozen model's logits may "
                f"contain. {' '.join(reasons)} With `token_reward='log_prob'`, no setting has this effect."
            )
