# SPDX-License-Identifier: Apache-2.0
"""The formulas of PPO that are neither TRL's nor credit assignment, as pure functions."""

import torch
from torch import Tensor


def clipped_value_loss(
    values: Tensor,
    old_values: Tensor,
    targets: Tensor,
    scale: Tensor | float = 1.0,
    cliprange: float | None = None,
) -> tuple[Tensor, Tensor]:
    r"""
    Value loss of every token, as in PPO's reference implementation (https://huggingface.co/papers/2005.12729, Section
    3):

    $$
    \frac{1}{2 \sigma^2} \max\big[(v - R)^2,\ (\mathrm{clip}(v, v_\text{old} - \epsilon\sigma, v_\text{old} +
    \epsilon\sigma)
    - R)^2\big].
    $$

    Args:
        values (`torch.Tensor` of shape `(...)`):
            Values $v$ of the critic.
        old_values (`torch.Tensor` of shape `(...)`):
            Its values $v_\text{old}$ at the rollout.
        targets (`torch.Tensor` of shape `(...)`):
            Returns $R$.
        scale (`torch.Tensor` or `float`, *optional*, defaults to `1.0`):
            Unit $\sigma$ of the errors.
        cliprange (`float`, *optional*):
            $\epsilon$. `None` does not clip: $(v - R)^2 / 2 \sigma^2$.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]` of shape `(...)`: losses, and `True` where the clipped error is the larger
        one, so that the token has no gradient.

    Example:
    ```python
    >>> import torch
    >>> from endotrl.trainers.ppo_math import clipped_value_loss

    >>> clipped_value_loss(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([2.0]), cliprange=0.5)
    (tensor([1.1250]), tensor([True]))
    ```
    """
    errors = ((values - targets) / scale).square()
    if cliprange is None:
        return 0.5 * errors, torch.zeros_like(errors, dtype=torch.bool)
    clipped = torch.clamp(values, old_values - cliprange * scale, old_values + cliprange * scale)
    clipped_errors = ((clipped - targets) / scale).square()
    return 0.5 * torch.maximum(errors, clipped_errors), clipped_errors > errors


def explained_variance(values: Tensor, targets: Tensor) -> float:
    r"""
    Fraction of the returns' variance that the critic explains, $1 - \mathrm{Var}(R - v) / \mathrm{Var}(R)$.

    Args:
        values (`torch.Tensor` of shape `(N,)`), targets (`torch.Tensor` of shape `(N,)`):
            Values and returns.

    Returns:
        `float`: 1 for a perfect critic, 0 for a constant one, negative for one that is worse. NaN if the returns do
        not vary.
    """
    if targets.numel() < 2:
        return float("nan")
    variance = targets.double().var()
    if variance == 0:
        return float("nan")
    return (1 - (targets.double() - values.double()).var() / variance).item()


def adapted_kl_coefficient(coefficient: float, kl: float, target: float, num_completions: int, horizon: int) -> float:
    r"""
    Proportional controller of the KL coefficient (Section 2.2 of https://huggingface.co/papers/1909.08593):
    $\beta \leftarrow \beta\,(1 + \mathrm{clip}(\mathrm{KL} / \mathrm{KL}_\text{target} - 1, -0.2, 0.2)\, n /
    \text{horizon})$.

    Args:
        coefficient (`float`):
            $\beta$.
        kl (`float`), target (`float`):
            KL measured and aimed at, in nats per completion.
        num_completions (`int`):
            Completions $n$ that `kl` was measured on.
        horizon (`int`):
            Completions over which the coefficient changes by at most 20 %.

    Returns:
        `float`: new $\beta$.

    Example:
    ```python
    >>> from endotrl.trainers.ppo_math import adapted_kl_coefficient

    >>> adapted_kl_coefficient(0.01, kl=12.0, target=6.0, num_completions=100, horizon=100)
    0.012
    ```
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    # A batch larger than the horizon changes it by 20 % as well; the coefficient must stay positive.
    return coefficient * (1.0 + error * min(num_completions / horizon, 1.0))
