# SPDX-License-Identifier: Apache-2.0
"""PPO formulas besides TRL's and credit assignment: value loss, explained variance, KL and its coefficient."""

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
    \epsilon\sigma) - R)^2\big].
    $$

    The tensors have one shape: values $v$ of the critic, $v_\text{old}$ at the rollout, returns $R$; `scale` is
    $\sigma$, `cliprange` $\epsilon$, and `None` does not clip. Returns the losses, and `True` where the clipped error
    is the larger one, so that the token has no gradient.
    """
    errors = ((values - targets) / scale).square()
    if cliprange is None:
        return 0.5 * errors, torch.zeros_like(errors, dtype=torch.bool)
    clipped = torch.clamp(values, old_values - cliprange * scale, old_values + cliprange * scale)
    clipped_errors = ((clipped - targets) / scale).square()
    return 0.5 * torch.maximum(errors, clipped_errors), clipped_errors > errors


def kl_k3(log_ratio: Tensor) -> Tensor:
    """Estimator k3 of KL(p | q) from log p - log q of tokens sampled from p: http://joschu.net/blog/kl-approx.html"""
    return torch.expm1(-log_ratio) + log_ratio


def explained_variance(values: Tensor, targets: Tensor) -> float:
    r"""
    Fraction of the returns' variance that the critic explains, $1 - \mathrm{Var}(R - v) / \mathrm{Var}(R)$: 1 for a
    perfect critic, 0 for a constant one, negative for a worse one, NaN if the returns do not vary.
    """
    if targets.numel() < 2:
        return float("nan")
    variance = targets.double().var()
    if variance == 0:
        return float("nan")
    return (1 - (targets.double() - values.double()).var() / variance).item()


def adapted_kl_coefficient(coefficient: float, kl: float, target: float, num_completions: int, horizon: int) -> float:
    r"""
    Proportional controller of the KL coefficient (Section 2.2 of https://huggingface.co/papers/1909.08593): $\beta\,(1
    + \mathrm{clip}(\mathrm{KL} / \mathrm{KL}_\text{target} - 1, -0.2, 0.2)\, n / \text{horizon})$, with KL in nats per
    completion, measured on $n$ = `num_completions`.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    # A batch larger than the horizon also changes it by at most 20%, so that the coefficient stays positive.
    return coefficient * (1.0 + error * min(num_completions / horizon, 1.0))
