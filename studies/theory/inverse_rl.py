# SPDX-License-Identifier: Apache-2.0
r"""
Offline inverse RL from demonstrations, in two ways that must agree (Prop. 1 of
https://huggingface.co/papers/2506.23235).

- Next-token prediction: logits that maximise the likelihood of the demonstrations, in closed form the logarithms of
  token counts. Read as a soft Q-function, they give rewards by the inverse soft Bellman operator.
- Maximum-entropy inverse RL: rewards $r$ that maximise
  $\frac1n \sum_i \sum_h r(s^i_h, a^i_h) - \max_\pi \{E_\pi[\sum_h r] + \alpha \mathcal{H}(\pi)\}$, how much better the
  demonstrations do than any policy could. Here it is solved by gradients with respect to the rewards, through the
  backward induction of the inner maximum, and without a look at counts or likelihoods.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .mdp import TokenMDP, response_sums, soft_optimal_q, soft_values


def token_counts(mdp: TokenMDP, demonstrations: Tensor) -> Tensor:
    """
    How often the demonstrations take each token in each state.

    Args:
        mdp ([`TokenMDP`]):
            The token MDP.
        demonstrations (`torch.Tensor` of shape `(N, H)`):
            Responses; after the end of one comes -1.

    Returns:
        `torch.Tensor` of shape `(H, S, A)`.
    """
    # The derivative of a sum along the responses with respect to the table is how often each entry was used.
    table = torch.zeros(mdp.shape, dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(response_sums(mdp, table, demonstrations).sum(), table)[0]


def maximum_likelihood_logits(counts: Tensor, alpha: float) -> Tensor:
    r"""
    Logits $f$ for which $\mathrm{softmax}(f/\alpha)$ maximises the likelihood: $\alpha$ times the logarithm of the
    counts. 0 in states that no demonstration visits, where every choice is as likely.
    """
    visited = counts.sum(-1, keepdim=True) > 0
    return torch.where(visited, alpha * counts.log(), 0.0)


def next_token_objective(counts: Tensor, q: Tensor, alpha: float) -> Tensor:
    r"""
    The offline inverse-RL objective over Q-functions, $\frac1n \sum_{i,h} [Q(s^i_h, a^i_h) - V_Q(s^i_h)]$: it is
    $\alpha$ times the mean log-likelihood of a demonstration. Scalar.
    """
    number = counts[0].sum()
    log_probs = (q / alpha).log_softmax(-1)
    return alpha * torch.where(counts > 0, counts * log_probs, 0.0).sum() / number


@dataclass(frozen=True)
class InverseRL:
    """
    Solution of maximum-entropy inverse RL.

    Attributes:
        rewards (`torch.Tensor` of shape `(H, S, A)`):
            Rewards. Not unique: potential shaping changes neither objective nor policy.
        q (`torch.Tensor` of shape `(H, S, A)`):
            Their soft-optimal Q-function.
        objective (`float`):
            Value of the objective.
    """

    rewards: Tensor
    q: Tensor
    objective: float


def maximum_entropy_irl(mdp: TokenMDP, demonstrations: Tensor, alpha: float, max_iterations: int = 1000) -> InverseRL:
    """
    Solves maximum-entropy inverse RL numerically (L-BFGS on the rewards, from zero).

    Args:
        mdp ([`TokenMDP`]):
            The token MDP.
        demonstrations (`torch.Tensor` of shape `(N, H)`):
            Responses. Every token must have been seen in every state that a demonstration visits: a reward that is
            never seen has no optimum, it falls for ever.
        alpha (`float`):
            Weight of the entropy.
        max_iterations (`int`, *optional*, defaults to `1000`):
            Limit of the optimizer.

    Returns:
        [`InverseRL`]
    """
    counts = token_counts(mdp, demonstrations)
    unseen = (counts == 0) & (counts.sum(-1, keepdim=True) > 0)
    if unseen.any():
        h, s, a = unseen.nonzero()[0].tolist()
        raise ValueError(
            f"No demonstration takes token {a} in state {s} at step {h}, which some visit: its reward has no optimum. "
            "Give more demonstrations, or fewer tokens."
        )
    weights = counts / len(demonstrations)
    rewards = torch.zeros(mdp.shape, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [rewards],
        max_iter=max_iterations,
        history_size=50,
        tolerance_grad=1e-10,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        q = soft_optimal_q(mdp, rewards, alpha)
        return (weights * rewards).sum() - soft_values(mdp, q, alpha)[0, mdp.initial]

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = -objective()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        return InverseRL(rewards.detach(), soft_optimal_q(mdp, rewards, alpha), objective().item())
