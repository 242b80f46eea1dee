# SPDX-License-Identifier: Apache-2.0
r"""
Credit assignment as pure tensor functions: how rewards of tokens become advantages of tokens. No models, no TRL.

Conventions, for all functions:

- Shapes: `B` completions, `T` positions of the padded completion, `K` segments (sentences).
- `mask` is boolean of shape `(B, T)`, `True` where the policy wrote the token. `False` is padding (on either side) or
  a token that someone else wrote, such as a tool's result: a hole. What stands there is never read, be it NaN, and
  results are 0 there.
- Recurrences pass over holes as if they were cut out: the token after a hole follows the token before it, one
  discount away. Time is counted in tokens of the policy.
- Computed and returned in float32, whatever the input is. Discounts are applied by a backward recurrence, never as
  $\gamma^t$ of an absolute position, which underflows.
"""

from typing import Literal

import torch
from torch import Tensor

from .bellman import check_discount


def returns_to_go(rewards: Tensor, mask: Tensor, gamma: float = 1.0) -> Tensor:
    r"""
    Discounted sum of the rewards from a token on, $G_h = r_h + \gamma G_{h+1}$, with $G_{H+1} = 0$.

    Args:
        rewards (`torch.Tensor` of shape `(B, T)`):
            Token rewards.
        mask (`torch.Tensor` of shape `(B, T)`, bool):
            `True` where the policy wrote the token.
        gamma (`float`, *optional*, defaults to `1.0`):
            Discount, in $(0, 1]$.

    Returns:
        `torch.Tensor` of shape `(B, T)`, float32: returns, 0 where `mask` is `False`.

    Raises:
        `ValueError`: If shapes or dtype of the mask do not fit, or `gamma` is out of range.

    Example:
    ```python
    >>> import torch
    >>> from endotrl.credit import returns_to_go

    >>> returns_to_go(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[True, True, True]]), gamma=0.5)
    tensor([[3., 4., 4.]])
    ```
    """
    check_discount("gamma", gamma)
    return _discounted_sum(_masked("rewards", rewards, mask), mask, gamma)


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
        rewards (`torch.Tensor` of shape `(B, T)`):
            Token rewards $r_h$.
        values (`torch.Tensor` of shape `(B, T)`):
            Value $V(s_h)$ of the state before each token.
        mask (`torch.Tensor` of shape `(B, T)`, bool):
            `True` where the policy wrote the token.
        gamma (`float`, *optional*, defaults to `1.0`):
            Discount, in $(0, 1]$.
        lam (`float`, *optional*, defaults to `1.0`):
            $\lambda$, in $[0, 1]$.
        final_values (`torch.Tensor` of shape `(B,)`, *optional*):
            Value of the state after the last token, to bootstrap completions that were cut off. Defaults to 0: the
            state is terminal.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`, both of shape `(B, T)` and float32: advantages, and returns (advantages +
        values). Both are 0 where `mask` is `False`.

    Raises:
        `ValueError`: If shapes or dtype of the mask do not fit, or `gamma` or `lam` is out of range.

    Example:
    ```python
    >>> import torch
    >>> from endotrl.credit import generalized_advantage_estimate

    >>> mask = torch.tensor([[True, True]])
    >>> advantages, returns = generalized_advantage_estimate(
    ...     torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 1.0]]), mask, lam=0.0
    ... )
    >>> advantages, returns
    (tensor([[1.5000, 1.0000]]), tensor([[2., 2.]]))
    ```
    """
    check_discount("gamma", gamma)
    if not 0.0 <= lam <= 1.0:
        raise ValueError(f"`lam` is {lam}, but it must be between 0 and 1.")
    rewards, values = _masked("rewards", rewards, mask), _masked("values", values, mask)
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
    Baseline of each position from the other completions of the same prompt: the mean over the group of what they have
    at this position.

    Completions differ in length. One that has ended keeps its last value for all later positions, and one that has a
    hole has there the value of its next token. So every completion counts everywhere; for rewards that come only with
    the last token, whose return is the same at all tokens, the baseline is that of GRPO whatever the lengths are; and
    it leaves the gradient unbiased, because the values of other completions do not depend on the tokens of this one.

    The own value $G_{i,h}$ is handled as for equal lengths. With $m_{i,h}$ the mean of the *others* and $n$
    completions:

    - `leave_one_out=True`: $b_{i,h} = m_{i,h}$ (RLOO, https://huggingface.co/papers/2402.14740). Expected gradient:
      that of the expected reward.
    - `leave_one_out=False`: $b_{i,h} = (1 - 1/n)\, m_{i,h} + G_{i,h} / n$, the mean of all (GRPO,
      https://huggingface.co/papers/2402.03300). $G - b$ is $1 - 1/n$ times that of `leave_one_out`, at every position.

    Args:
        values (`torch.Tensor` of shape `(B, T)`):
            Returns to go, of groups of `num_generations` contiguous rows.
        mask (`torch.Tensor` of shape `(B, T)`, bool):
            `True` where the policy wrote the token.
        num_generations (`int`):
            Completions of a prompt.
        leave_one_out (`bool`, *optional*, defaults to `False`):
            Whether to leave the completion itself out of its baseline.
        valid (`torch.Tensor` of shape `(B,)`, bool, *optional*):
            `False` for completions that have no reward: they count for nobody, and their own baseline is 0.
            Completions without any token are never valid.

    Returns:
        `torch.Tensor` of shape `(B, T)`, float32: baselines, 0 where `mask` is `False`. A valid completion that is
        alone in its group has its own value for a baseline (so that its advantage is 0, as in TRL).

    Raises:
        `ValueError`: If shapes or dtype of the mask do not fit, or the rows are not full groups.

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
    own = _masked("values", values, mask)
    if num_generations < 1 or values.shape[0] % num_generations:
        raise ValueError(
            f"There are {values.shape[0]} completions, which are not full groups of `num_generations`={num_generations}."
        )
    if valid is not None and (valid.shape != mask.shape[:1] or valid.dtype != torch.bool):
        raise ValueError(
            f"`valid` is {valid.dtype} of shape {tuple(valid.shape)}, but it must be bool, with one entry for each of the "
            f"{values.shape[0]} completions."
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
    Scales the values where `mask` is `True` to mean 0 and standard deviation 1.

    Args:
        values (`torch.Tensor` of shape `(B, T)`):
            Advantages.
        mask (`torch.Tensor` of shape `(B, T)`, bool):
            `True` where the policy wrote the token.
        population (`torch.Tensor` of shape `(N,)`, *optional*):
            Values whose mean and standard deviation are used. Defaults to `values[mask]`. With several processes, pass
            the masked values of all of them.
        shift_mean (`bool`, *optional*, defaults to `True`):
            Whether to subtract the mean, or to scale only.

    Returns:
        `torch.Tensor` of shape `(B, T)`, float32: 0 where `mask` is `False`. If there is no spread, because all values
        are the same or there is only one, the mean is subtracted and nothing scaled up.

    Raises:
        `ValueError`: If shapes or dtype of the mask do not fit.

    Example:
    ```python
    >>> import torch
    >>> from endotrl.credit import whiten

    >>> whiten(torch.tensor([[1.0, 3.0, 100.0]]), torch.tensor([[True, True, False]]))
    tensor([[-0.7071,  0.7071,  0.0000]])
    ```
    """
    values = _masked("values", values, mask)
    population = values[mask] if population is None else population.float()
    if population.numel() == 0:
        return values
    mean = population.mean()
    std = population.std() if population.numel() > 1 else mean.new_zeros(())
    # Rounding leaves equal values a spread of about 1e-7 of their size, which is not to be blown up to 1.
    scale = torch.where(std > 1e-6 * population.abs().max(), std, 1.0)
    whitened = (values - mean) / scale if shift_mean else values / scale
    return torch.where(mask, whitened, 0.0)


def segment_ids_from_ends(ends: Tensor) -> Tensor:
    """
    Numbers segments from their last tokens.

    Args:
        ends (`torch.Tensor` of shape `(B, T)`, bool):
            `True` at the last token of each segment. Tokens after the last end are one more segment.

    Returns:
        `torch.Tensor` of shape `(B, T)`, int64: the index of each token's segment, from 0.

    Example:
    ```python
    >>> import torch
    >>> from endotrl.credit import segment_ids_from_ends

    >>> segment_ids_from_ends(torch.tensor([[False, True, False, True, False]]))
    tensor([[0, 0, 1, 1, 2]])
    ```
    """
    return ends.long().cumsum(dim=1) - ends.long()


def sum_by_segment(values: Tensor, segment_ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """
    Sum of the token values of each segment.

    Args:
        values (`torch.Tensor` of shape `(B, T)`):
            Token values, such as rewards.
        segment_ids (`torch.Tensor` of shape `(B, T)`, int64):
            Index of each token's segment, from 0.
        mask (`torch.Tensor` of shape `(B, T)`, bool):
            `True` where the policy wrote the token.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`, both of shape `(B, K)`: the sums, float32, and a mask, `True` for segments
        that have a token of the policy. `K` is the largest number of segments of a row.

    Raises:
        `ValueError`: If shapes or dtype of the mask do not fit.

    Example:
    ```python
    >>> import torch
    >>> from endotrl.credit import sum_by_segment

    >>> sum_by_segment(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0, 0, 1]]), torch.tensor([[True, True, True]]))
    (tensor([[3., 4.]]), tensor([[True, True]]))
    ```
    """
    values = _masked("values", values, mask)
    ids = _segments(segment_ids, mask)
    num_segments = int(ids.max()) + 1 if ids.numel() else 0
    sums = values.new_zeros(values.shape[0], num_segments).scatter_add_(1, ids, values)
    counts = torch.zeros_like(sums).scatter_add_(1, ids, mask.to(sums.dtype))
    return sums, counts > 0


def spread_over_segments(segment_values: Tensor, segment_ids: Tensor, mask: Tensor) -> Tensor:
    """
    Gives every token the value of its segment.

    Args:
        segment_values (`torch.Tensor` of shape `(B, K)`):
            Values of segments.
        segment_ids (`torch.Tensor` of shape `(B, T)`, int64), mask (`torch.Tensor` of shape `(B, T)`, bool):
            As in [`sum_by_segment`].

    Returns:
        `torch.Tensor` of shape `(B, T)`: 0 where `mask` is `False`.

    Example:
    ```python
    >>> import torch
    >>> from endotrl.credit import spread_over_segments

    >>> spread_over_segments(torch.tensor([[3.0, 4.0]]), torch.tensor([[0, 0, 1]]), torch.tensor([[True, True, True]]))
    tensor([[3., 3., 4.]])
    ```
    """
    ids = _segments(segment_ids, mask)
    if (
        segment_values.ndim != 2
        or len(segment_values) != len(ids)
        or ids.numel()
        and segment_values.shape[1] <= ids.max()
    ):
        raise ValueError(
            f"`segment_values` has shape {tuple(segment_values.shape)}, but it must have a value for each of the "
            f"{int(ids.max()) + 1 if ids.numel() else 0} segments of the {len(ids)} completions."
        )
    return torch.where(mask, segment_values.gather(1, ids), 0.0)


def start_of_segment(values: Tensor, segment_ids: Tensor, mask: Tensor) -> Tensor:
    """
    Value at the first token of each segment that the policy wrote.

    Args:
        values (`torch.Tensor` of shape `(B, T)`):
            Token values, such as the value of the state before each token.
        segment_ids (`torch.Tensor` of shape `(B, T)`, int64), mask (`torch.Tensor` of shape `(B, T)`, bool):
            As in [`sum_by_segment`].

    Returns:
        `torch.Tensor` of shape `(B, K)`, float32: 0 for segments that have no token of the policy.

    Raises:
        `ValueError`: If shapes or dtype of the mask do not fit.

    Example:
    ```python
    >>> import torch
    >>> from endotrl.credit import start_of_segment

    >>> start_of_segment(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0, 0, 1]]), torch.tensor([[True, True, True]]))
    tensor([[1., 4.]])
    ```
    """
    values = _masked("values", values, mask)
    starts, _ = sum_by_segment(torch.where(_at_end(segment_ids, mask, "first"), values, 0.0), segment_ids, mask)
    return starts


def pool_by_segment(values: Tensor, segment_ids: Tensor, mask: Tensor, at: Literal["last", "all"] = "last") -> Tensor:
    """
    Replaces token values by the sum of their segment: the reward of a sentence instead of its tokens'.

    Args:
        values (`torch.Tensor` of shape `(B, T)`), segment_ids (`torch.Tensor` of shape `(B, T)`, int64), mask
        (`torch.Tensor` of shape `(B, T)`, bool):
            As in [`sum_by_segment`].
        at (`str`, *optional*, defaults to `"last"`):
            Where to put the sum: `"last"`, at the last token of the segment that the policy wrote, and 0 at the
            others, so that the total of the completion stays; `"all"`, at each of its tokens.

    Returns:
        `torch.Tensor` of shape `(B, T)`, float32: 0 where `mask` is `False`.

    Raises:
        `ValueError`: If shapes or dtype of the mask do not fit, or `at` is unknown.

    Example:
    ```python
    >>> import torch
    >>> from endotrl.credit import pool_by_segment

    >>> mask = torch.tensor([[True, True, True]])
    >>> pool_by_segment(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0, 0, 1]]), mask)
    tensor([[0., 3., 4.]])
    ```
    """
    if at not in ("last", "all"):
        raise ValueError(f'`at` is {at!r}, but it must be "last" or "all".')
    sums, _ = sum_by_segment(values, segment_ids, mask)
    pooled = spread_over_segments(sums, segment_ids, mask)
    if at == "all":
        return pooled
    return torch.where(_at_end(segment_ids, mask, "last"), pooled, 0.0)


def _masked(name: str, values: Tensor, mask: Tensor) -> Tensor:
    """`values` in float32, and 0 where `mask` is `False`."""
    if values.ndim != 2 or values.shape != mask.shape:
        raise ValueError(
            f"`{name}` has shape {tuple(values.shape)} and `mask` {tuple(mask.shape)}, but both must be "
            "(completions, tokens)."
        )
    if mask.dtype != torch.bool:
        raise ValueError(f"`mask` is {mask.dtype}, but it must be bool: `True` where the policy wrote the token.")
    return torch.where(mask, values.float(), 0.0)


def _segments(segment_ids: Tensor, mask: Tensor) -> Tensor:
    """The index of each token's segment, and 0 where `mask` is `False`: there ids may be anything."""
    if (
        segment_ids.shape != mask.shape
        or segment_ids.dtype != torch.int64
        or mask.dtype != torch.bool
        or mask.ndim != 2
    ):
        raise ValueError(
            f"`segment_ids` is {segment_ids.dtype} of shape {tuple(segment_ids.shape)} and `mask` {mask.dtype} of shape "
            f"{tuple(mask.shape)}, but they must be int64 and bool, both of shape (completions, tokens)."
        )
    ids = torch.where(mask, segment_ids, 0)
    if ids.numel() and ids.min() < 0:
        raise ValueError(f"`segment_ids` contains {int(ids.min())}, but segments are counted from 0.")
    return ids


def _discounted_sum(values: Tensor, mask: Tensor, discount: float) -> Tensor:
    sums = torch.zeros_like(values)
    upcoming = values.new_zeros(values.shape[0])
    for t in reversed(range(values.shape[1])):
        sums[:, t] = values[:, t] + discount * upcoming
        upcoming = torch.where(mask[:, t], sums[:, t], upcoming)
    return torch.where(mask, sums, 0.0)


def _hold(values: Tensor, mask: Tensor) -> Tensor:
    """Fills holes with the value of the next token, and what comes after the last token with its value."""
    num_rows, num_positions = values.shape
    positions = torch.arange(num_positions, device=values.device).expand(num_rows, num_positions)
    following = torch.where(mask, positions, num_positions).flip(1).cummin(dim=1).values.flip(1)
    last = torch.where(mask, positions, 0).amax(dim=1, keepdim=True) if num_positions else following
    return values.gather(1, torch.minimum(following, last))


def _at_end(segment_ids: Tensor, mask: Tensor, end: Literal["first", "last"]) -> Tensor:
    """`True` at the first or the last token of each segment that the policy wrote."""
    positions = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    ids = _segments(segment_ids, mask)
    outside, reduce = (mask.shape[1], "amin") if end == "first" else (-1, "amax")
    num_segments = int(ids.max()) + 1 if ids.numel() else 0
    extreme = positions.new_full((len(mask), num_segments), outside).scatter_reduce(
        1, ids, torch.where(mask, positions, outside), reduce=reduce
    )
    return extreme.gather(1, ids) == positions
