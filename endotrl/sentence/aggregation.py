# SPDX-License-Identifier: Apache-2.0
"""From the values of a response's sentences to their rewards, weights and one score: pure tensor functions."""

import math

import torch
from torch import Tensor


def sentence_rewards(values: Tensor, mask: Tensor) -> Tensor:
    r"""
    What each sentence added:

    $$
    r_1 = v_1, \qquad r_i = v_i - v_{i-1}
    $$

    (https://huggingface.co/papers/2503.04793). The first state is the one before the response, so that $r_1$ is the
    value of the prompt.

    Args:
        values (`torch.Tensor` of shape `(batch_size, N)`):
            Values $v_i$ of the states.
        mask (`torch.Tensor` of shape `(batch_size, N)`):
            `True` where there is a state, `False` where a row is padded on the right.

    Returns:
        `torch.Tensor` of shape `(batch_size, N)`: rewards, 0 where padded. Those of a row sum to its last value $v_N$.

    Example:
    ```python
    >>> import torch
    >>> from endotrl.sentence.aggregation import sentence_rewards

    >>> sentence_rewards(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([[True, True, True]]))
    tensor([[ 1.,  2., -1.]])
    ```
    """
    before = torch.nn.functional.pad(values, (1, 0))[..., :-1]
    return torch.where(mask, values - before, 0.0)


def rotate(vectors: Tensor, theta: float = 10_000.0) -> Tensor:
    r"""
    Rotary position embedding (https://huggingface.co/papers/2104.09864) by sentence index: the pair of entries
    $(x_j, x_{j + d/2})$ of vector $i$ is turned by the angle $i \, \theta^{-2j/d}$.

    Args:
        vectors (`torch.Tensor` of shape `(batch_size, N, d)`):
            One vector a sentence; `d` is even.
        theta (`float`, *optional*, defaults to `10000.0`):
            Base of the angles.

    Returns:
        `torch.Tensor` of shape `(batch_size, N, d)`. The dot product of two of its vectors depends on their indices
        only by the difference.
    """
    num_sentences, half = vectors.shape[-2], vectors.shape[-1] // 2
    steps = torch.arange(half, device=vectors.device, dtype=torch.float32)
    positions = torch.arange(num_sentences, device=vectors.device, dtype=torch.float32)
    angles = positions[:, None] * theta ** (-steps / half)  # (N, d/2)
    cos, sin = angles.cos(), angles.sin()
    first, second = vectors[..., :half], vectors[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attention_weights(queries: Tensor, keys: Tensor, mask: Tensor, theta: float = 10_000.0) -> Tensor:
    r"""
    Weights of the sentences, by attention of the last one $N$ to all:

    $$
    a = \mathrm{softmax}_i \left( \mathrm{RoPE}_N(q_N) \cdot \mathrm{RoPE}_i(k_i) / \sqrt{d} \right)
    $$

    (https://huggingface.co/papers/2503.04793).

    Args:
        queries (`torch.Tensor` of shape `(batch_size, N, d)`):
            $W_q h_i$; of each row, that of the last state is used.
        keys (`torch.Tensor` of shape `(batch_size, N, d)`):
            $W_k h_i$.
        mask (`torch.Tensor` of shape `(batch_size, N)`):
            `True` where there is a state, `False` where a row is padded on the right. A row has at least one.
        theta (`float`, *optional*, defaults to `10000.0`):
            Base of the rotary angles, see [`rotate`].

    Returns:
        `torch.Tensor` of shape `(batch_size, N)`: weights that sum to 1, 0 where padded.
    """
    queries, keys = rotate(queries, theta), rotate(keys, theta)
    last = mask.sum(dim=-1) - 1  # (B,)
    query = queries[torch.arange(len(queries), device=queries.device), last]  # (B, d)
    scores = torch.einsum("bd,bnd->bn", query, keys) / math.sqrt(keys.shape[-1])
    return scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
