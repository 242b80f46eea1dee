# SPDX-License-Identifier: Apache-2.0
"""
Token rewards to token advantages: returns to go, GAE, group baselines, whitening.

Shapes or dtypes that do not match, and settings that are out of range, raise `ValueError`.
"""

import torch
from torch import Tensor

from ..bellman import check_discount
from .segments import masked


def returns_to_go(rewards: Tensor, mask: Tensor, gamma: float = 1.0) -> Tensor:
    r"""
    Discounted sum of the rewards from each token on, $G_h = r_h + \gamma G_{h+1}$, with $G_{H+1} = 0$ and $\gamma$ in
    $(0, 1]$: of shape `(B, T)`, like `rewards`.

    Example:
    ```python
    >>> import torch
    >>> from endotrl.credit import returns_to_go

    >>> returns_to_go(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[True, True, True]]), gamma=0.5)
    tensor([[3., 4., 4.]])
    ```
    """
    check_discount("gamma", gamma)
    return _discounted_sum(masked("rewards", rewards, mask), mask, gamma)


def generalized_advantage_estimate(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float = 1.0,
    lam: float = 1.0,
    final_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""
    Generalized advantage estimation (eq. 16 of https://huggingface.co/papers/1506.02438):

    $$
    A_h = \delta_h + \gamma \lambda A_{h+1}, \qquad \delta_h = r_h + \gamma V(s_{h+1}) - V(s_h).
    $$

    `lam=1` gives the returns to go minus the values, `lam=0` the TD errors. With the endogenous reward
    $r_h = f_h - V(s_{h+1})$ and the frozen model's own soft values, the TD error at `gamma=1` is
    $\alpha \log \hat\pi(a_h|s_h)$.

    Args:
        rewards (`torch.Tensor` of shape `(B, T)`), values (`torch.Tensor` of shape `(B, T)`):
            Token rewards $r_h$, and the value $V(s_h)$ of the state before each token.
        gamma (`float`, *optional*, defaults to `1.0`), lam (`float`, *optional*, defaults to `1.0`):
            Discount, in $(0, 1]$, and $\lambda$, in $[0, 1]$.
        final_values (`torch.Tensor` of shape `(B,)`, *optional*):
            Value of the state after the last token, to bootstrap completions that were cut off. Defaults to 0: the
            state is terminal.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`, both of shape `(B, T)`: advantages, and returns (advantages + values).

    Example:
    ```python
    >>> import torch
    >>> from endotrl.credit import generalized_advantage_estimate

    >>> rewards, values, mask = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 1.0]]), torch.tensor([[True, True]])
    >>> generalized_advantage_estimate(rewards, values, mask, lam=0.0)
    (tensor([[1.5000, 1.0000]]), tensor([[2., 2.]]))
    ```
    """
    check_discount("gamma", gamma)
    if not 0.0 <= lam <= 1.0:
        raise ValueError(f"`lam` is {lam}, but it must be between 0 and 1.")
    rewards, values = masked("rewards", rewards, mask), masked("values", values, mask)
    if final_values is None:
        final_values = values.new_zeros(values.shape[0])
    elif final_values.shape != values.shape[:1]:
        raise ValueError(
            f"`final_values` has shape {tuple(final_values.shape)}, but it must have one entry for each of the "
            f"{values.shape[0]} completions."
        )
    next_values = torch.empty_like(values)
    upcoming = final_values.float()
    for t in reversed(range(values.shape[1])):
        next_values[:, t] = upcoming
        upcoming = torch.where(mask[:, t], values[:, t], upcoming)
    td_errors = torch.where(mask, rewards + gamma * next_values - values, 0.0)
    advantages = _discounted_sum(td_errors, mask, gamma * lam)
    return advantages, advantages + values


def group_baseline(
    values: Tensor,
    mask: Tensor,
    num_generations: int,
    leave_one_out: bool = False,
    valid: Tensor | None = None,
) -> Tensor:
    r"""
    Baseline of each position from the completions of the same prompt: the mean of their values at this position over
    the group.

    A completion that has ended keeps its last value for all later positions, and one with a hole has there the value
    of its next token. So every completion counts at every position; for rewards at the last token only, the baseline
    is that of GRPO whatever the lengths are; and it leaves the gradient unbiased, because the values of other
    completions do not depend on the tokens of this one.

    With $m_{i,h}$ the mean of the *others* and $n$ completions:

    - `leave_one_out=True`: $b_{i,h} = m_{i,h}$ (RLOO, https://huggingface.co/papers/2402.14740). Expected gradient:
      that of the expected reward.
    - `leave_one_out=False`: $b_{i,h} = (1 - 1/n)\, m_{i,h} + G_{i,h} / n$, the mean of all (GRPO,
      https://huggingface.co/papers/2402.03300). $G - b$ is $1 - 1/n$ times that of `leave_one_out`, at every position.

    Args:
        values (`torch.Tensor` of shape `(B, T)`), num_generations (`int`):
            Returns to go, and the number of contiguous rows per prompt.
        leave_one_out (`bool`, *optional*, defaults to `False`):
            Whether to leave the completion itself out of its baseline.
        valid (`torch.Tensor` of shape `(B,)`, bool, *optional*):
            `False` for completions without a reward: they are left out of every mean, and their own baseline is 0.
            Completions without any token are never valid.

    Returns:
        `torch.Tensor` of shape `(B, T)`: baselines. A valid completion that is alone in its group is its own baseline
        (so that its advantage is 0, as in TRL).

    Example: the second completion has ended after one token, with a return of 2.
    ```python
    >>> import torch
    >>> from endotrl.credit import group_baseline

    >>> returns = torch.tensor([[6.0, 4.0], [2.0, 0.0]])
    >>> group_baseline(returns, torch.tensor([[True, True], [True, False]]), num_generations=2)
    tensor([[4., 3.],
            [4., 0.]])
    ```
    """
    own = masked("values", values, mask)
    if num_generations < 1 or values.shape[0] % num_generations:
        raise ValueError(
            f"`num_generations` is {num_generations}, but the {values.shape[0]} completions do not divide into groups "
            "of that size."
        )
    if valid is not None and (valid.shape != mask.shape[:1] or valid.dtype != torch.bool):
        raise ValueError(
            f"`valid` is {valid.dtype} of shape {tuple(valid.shape)}, but it must be bool, with one entry for each of "
            f"the {values.shape[0]} completions."
        )
    has_token = mask.any(dim=1)
    valid = has_token if valid is None else valid & has_token
    everywhere = torch.where(valid[:, None], _hold(own, mask), 0.0)
    groups = everywhere.unflatten(0, (values.shape[0] // num_generations, num_generations))
    num_valid = valid.view(-1, num_generations).sum(dim=1).repeat_interleave(num_generations)[:, None]
    total = groups.sum(dim=1).repeat_interleave(num_generations, dim=0)
    if leave_one_out:
        baseline = torch.where(num_valid > 1, (total - everywhere) / (num_valid - 1).clamp(min=1), everywhere)
    else:
        baseline = total / num_valid.clamp(min=1)
    return torch.where(mask & valid[:, None], baseline, 0.0)


def whiten(values: Tensor, mask: Tensor, population: Tensor | None = None, shift_mean: bool = True) -> Tensor:
    """
    Scales values `(B, T)` to mean 0 (unless `shift_mean=False`) and standard deviation 1, with the statistics of
    `population`, of shape `(N,)`: by default `values[mask]`; with several processes, pass the masked values of all of
    them. If the spread is zero, nothing is scaled.

    Example:
    ```python
    >>> import torch
    >>> from endotrl.credit import whiten

    >>> whiten(torch.tensor([[1.0, 3.0, 100.0]]), torch.tensor([[True, True, False]]))
    tensor([[-0.7071,  0.7071,  0.0000]])
    ```
    """
    values = masked("values", values, mask)
    population = values[mask] if population is None else population.float()
    if population.numel() == 0:
        return values
    mean = population.mean()
    std = population.std() if population.numel() > 1 else mean.new_zeros(())
    # Rounding leaves equal values a spread of about 1e-7 of their magnitude, which must not be scaled up to 1.
    scale = torch.where(std > 1e-6 * population.abs().max(), std, 1.0)
    whitened = (values - mean) / scale if shift_mean else values / scale
    return torch.where(mask, whitened, 0.0)


def _discounted_sum(values: Tensor, mask: Tensor, discount: float) -> Tensor:
    sums = torch.zeros_like(values)
    upcoming = values.new_zeros(values.shape[0])
    for t in reversed(range(values.shape[1])):
        sums[:, t] = values[:, t] + discount * upcoming
        upcoming = torch.where(mask[:, t], sums[:, t], upcoming)
    return torch.where(mask, sums, 0.0)


def _hold(values: Tensor, mask: Tensor) -> Tensor:
    """Fills holes with the value of the next token, and positions after the last token with that token's value."""
    num_rows, num_positions = values.shape
    positions = torch.arange(num_positions, device=values.device).expand(num_rows, num_positions)
    following = torch.where(mask, positions, num_positions).flip(1).cummin(dim=1).values.flip(1)
    last = torch.where(mask, positions, 0).amax(dim=1, keepdim=True) if num_positions else following
    return values.gather(1, torch.minimum(following, last))
