# SPDX-License-Identifier: Apache-2.0
r"""
GRPO advantages from token rewards, as pure functions.

Every reward function $f$ has for completion $i$ a reward to go $G^f_{i,k}$ at each of its steps $k$ (tokens or
sentences): for a dense one the discounted sum of its rewards from there on, minus its state value if it gives one; for
any other its one number, at every step. Minus the baseline of the group ([`~endotrl.credit.group_baseline`]) that is
the centred credit $C^f_{i,k}$, and the advantage is $\sum_f w_f C^f_{i,k}$, scaled by TRL's settings. Where TRL
divides by a standard deviation of rewards, this divides by

$$
\sigma^2 = \frac{1}{n - 1} \sum_i \operatorname{mean}_h (C_{i,h})^2,
$$

the mean taken over tokens $h$ and the sum over the $n$ completions of the group. For credit that is equal at all
tokens of a completion it is TRL's standard deviation, and all formulas are TRL's. For other credit it keeps the
advantages of a group of the order of 1, even if the completions differ in where they earned and not in how much, where
the standard deviation of their totals is 0.
"""

from typing import Literal

import torch
from torch import Tensor

from ..credit import group_baseline, returns_to_go, start_of_segment, sum_by_segment


# TRL's constant, added to a standard deviation before dividing by it.
EPSILON = 1e-4

ScaleRewards = Literal["group", "batch", "none"]
MultiObjectiveAggregation = Literal["sum_then_normalize", "normalize_then_sum"]


def rewards_to_go(
    token_rewards: Tensor, state_values: Tensor | None, segment_ids: Tensor, mask: Tensor, gamma: float = 1.0
) -> Tensor:
    r"""
    Reward to go of each segment: $\sum_{j \ge k} \gamma^{j-k} r_j - V(s_k)$, with $r_k$ the sum of its token rewards
    and $V(s_k)$ the value of the state before its first token. With endogenous rewards, their soft values and
    `gamma=1` that is the log-probability to go, $\alpha \log \hat\pi(y_{\ge k} | s_k)$.

    All arguments have shape `(B, T)`; `mask` is `True` where the policy wrote the token. The result has shape `(B,
    K)`, float32: 0 for segments without a token of the policy.
    """
    rewards, segment_mask = sum_by_segment(token_rewards, segment_ids, mask)
    to_go = returns_to_go(rewards, segment_mask, gamma)
    return to_go if state_values is None else to_go - start_of_segment(state_values, segment_ids, mask)


def dense_advantages(
    rewards_per_func: Tensor,
    to_go: dict[int, Tensor],
    num_tokens: Tensor,
    reward_weights: Tensor,
    num_generations: int,
    scale_rewards: ScaleRewards = "group",
    multi_objective_aggregation: MultiObjectiveAggregation = "sum_then_normalize",
    leave_one_out: bool = False,
) -> Tensor:
    """
    Advantages of the segments of all completions, see the module's formulas: shape `(N, K)`, float32, 0 for segments
    that do not exist, and for completions without any reward.

    `rewards_per_func` `(N, F)` has the reward of every completion by every function, NaN for none, in contiguous
    groups of `num_generations`; `to_go`, for each dense function by its index in `F`, the rewards to go `(N, K)`;
    `num_tokens` `(N, K)`, the tokens that the policy wrote in each segment. The other arguments are those of TRL's
    `GRPOConfig`, and whether a completion is left out of its own baseline.
    """
    mask = num_tokens > 0
    share = num_tokens / num_tokens.sum(dim=1, keepdim=True).clamp(min=1)  # of a segment in its completion
    has_reward = ~rewards_per_func.isnan()  # (N, F)
    scorable = has_reward.any(dim=1)
    outcomes = rewards_per_func.nan_to_num(0.0)

    def centred(index: int, valid: Tensor) -> Tensor:
        dense = index in to_go
        values = to_go[index] if dense else outcomes[:, index : index + 1].expand_as(mask)
        there = mask if dense else torch.ones_like(mask)
        difference = values - group_baseline(values, there, num_generations, valid=valid)
        return torch.where(mask & valid[:, None], difference, 0.0)

    def group_sum(per_row: Tensor) -> Tensor:
        return per_row.view(-1, num_generations).sum(dim=1).repeat_interleave(num_generations)

    def mean_square(credit: Tensor) -> Tensor:
        return (credit.square() * share).sum(dim=1)  # (N,)

    def group_std(credit: Tensor, valid: Tensor) -> Tensor:
        return (group_sum(mean_square(credit)) / (group_sum(valid.float()) - 1).clamp(min=1)).sqrt()

    credit = torch.zeros_like(num_tokens, dtype=torch.float32)
    num_scorable = scorable.sum()
    if multi_objective_aggregation == "sum_then_normalize":
        # As in TRL, a function that gave `None` counts as 0 if another one gave a reward.
        for index, weight in enumerate(reward_weights):
            credit += weight * centred(index, scorable)
        if scale_rewards == "group":
            credit /= group_std(credit, scorable)[:, None] + EPSILON
        elif scale_rewards == "batch":
            # For dense functions, the rewards to go from the first segment: an outcome may contain a constant of the
            # prompt, such as its soft value.
            first = mask.int().argmax(dim=1, keepdim=True)
            per_func = [
                to_go[i].gather(1, first)[:, 0] if i in to_go else outcomes[:, i] for i in range(len(reward_weights))
            ]
            totals = (torch.stack(per_func, dim=1) * reward_weights).sum(dim=1)
            group_means = group_sum(totals * scorable) / group_sum(scorable.float()).clamp(min=1)
            between = torch.where(scorable, (group_means - totals[scorable].mean()).square(), 0.0)
            credit /= ((mean_square(credit) + between).sum() / (num_scorable - 1).clamp(min=1)).sqrt() + EPSILON
    else:
        for index, weight in enumerate(reward_weights):
            part = centred(index, has_reward[:, index])
            credit += weight * part / (group_std(part, has_reward[:, index])[:, None] + EPSILON)
        credit /= (mean_square(credit).sum() / (num_scorable - 1).clamp(min=1)).sqrt() + EPSILON
    if leave_one_out:
        # See `group_baseline`: the two baselines differ by this factor.
        group_sizes = group_sum(scorable.float())
        credit *= (group_sizes / (group_sizes - 1).clamp(min=1))[:, None]
    return credit
