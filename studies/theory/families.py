# SPDX-License-Identifier: Apache-2.0
r"""
Families of token MDPs, by horizon, in which the papers' bounds are met, and one in which their assumption fails.

In [`learned_cliff`] the base model is what next-token prediction makes of demonstrations. In all others its error is
put in: they are examples that show how bad it can get. There, the expert is soft-optimal for the true rewards, which
lie in $[0, 1]$ a token, and the base model is the expert with an error of a given size in every state. What differs is
where the error sits, and how it is measured:

- *total variation*: the largest $TV(\pi_E(\cdot|s), \hat\pi(\cdot|s))$ of a state;
- *log error*: the largest $|\log \pi_E(a|s) - \log \hat\pi(a|s)|$ of a state and token, in nats. It bounds the total
  variation, and is not bounded by it: a token of probability $10^{-9}$ that gets $10^{-3}$ is an error of 13.8 nats.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .inverse_rl import token_counts
from .mdp import (
    TokenMDP,
    expected_return,
    greedy_policy,
    inverse_soft_bellman,
    log_error,
    optimal_q,
    policy_q,
    sample_responses,
    soft_optimal_q,
    soft_policy,
    suboptimality,
)


@dataclass(frozen=True)
class Imitation:
    r"""
    An expert, and a base model that imitates it with an error.

    Attributes:
        mdp ([`TokenMDP`]):
            The token MDP.
        rewards (`torch.Tensor` of shape `(H, S, A)`):
            True rewards, for which the expert is soft-optimal.
        alpha (`float`):
            Temperature of expert and base model.
        expert (`torch.Tensor` of shape `(H, S, A)`), base (`torch.Tensor` of shape `(H, S, A)`):
            Log-probabilities of the two policies.
    """

    mdp: TokenMDP
    rewards: Tensor
    alpha: float
    expert: Tensor
    base: Tensor

    def endogenous_reward(self) -> Tensor:
        """Token rewards from the base model's logits by the inverse soft Bellman operator, shape `(H, S, A)`."""
        return inverse_soft_bellman(self.mdp, self.alpha * self.base, self.alpha)

    def after_rl(self) -> Tensor:
        """The policy that is optimal for the endogenous reward, without any regularisation (log-probabilities)."""
        return greedy_policy(optimal_q(self.mdp, self.endogenous_reward()))

    def after_kl_rl(self, beta: float) -> Tensor:
        r"""
        The policy that is optimal for the endogenous reward minus `beta` times the KL to the base model
        (log-probabilities): the power distribution $\hat\pi(y|x)^{1 + \alpha/\beta}$, normalised.
        """
        q = soft_optimal_q(self.mdp, self.endogenous_reward(), beta, reference=self.base)
        return soft_policy(q, beta, reference=self.base)

    def guarantee(self) -> float:
        r"""
        What RL on the endogenous reward can lose to the best policy at most,
        $\alpha [\log(\pi_E/\hat\pi)(y^*) - \log(\pi_E/\hat\pi)(y_{RL})]$, with $y^*$ the best response and $y_{RL}$
        the one after RL: the base model's error on these two responses, and on no other.

        True rewards sum to $\alpha \log \pi_E(y)$ plus a constant, for which the expert is soft-optimal; and
        $\hat\pi(y_{RL}) \ge \hat\pi(y^*)$, for RL chose it.
        """
        best = greedy_policy(optimal_q(self.mdp, self.rewards))
        error = self.alpha * (self.expert - self.base)
        # Both are policies with one response each, of which this is the sum.
        return expected_return(self.mdp, error, best) - expected_return(self.mdp, error, self.after_rl())

    def loss_of(self, policy: Tensor) -> float:
        """
        What a policy loses to the expert in expected true return. Negative for one that is better than the expert.
        """
        return suboptimality(self.mdp, self.rewards, policy, against=self.expert)


def _uniform(generator: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)


def forked_cliff(horizon: int, epsilon: float, seed: int, alpha: float = 0.05) -> Imitation:
    r"""
    Two roads along a cliff. The base model stumbles on the better one, with probability `epsilon` a token (total
    variation).

    The first token chooses road A or B. On a road, one token of four stays on it and earns about 1; the others fall
    off the cliff, where nothing is earned any more. The expert never falls, so the base model's falls compound: on
    road A it has fallen after `h` tokens with probability about `h * epsilon`. Road B earns a little less, by half to
    nearly all of what the base model's stumbling takes off road A's log-probability; so for the endogenous reward road
    B is the better one, and the policy after RL takes it.
    """
    generator = torch.Generator().manual_seed(seed)
    start, road_a, road_b, fallen, good = 0, 1, 2, 3, 0
    transitions = torch.full((4, 4), fallen)
    transitions[start, :2] = torch.tensor([road_a, road_b])
    transitions[road_a, good], transitions[road_b, good] = road_a, road_b
    mdp = TokenMDP(transitions, horizon)

    share = _uniform(generator, 0.5, 0.95)
    slips = epsilon * _uniform(generator, 0.5, 1.0, horizon)
    slips[-1] = epsilon  # so that the largest error is the same at every horizon
    rewards = torch.zeros(mdp.shape, dtype=torch.float64)
    earned = _uniform(generator, 0.8, 1.0, horizon)
    rewards[:, start, :2] = earned[:, None]
    rewards[:, road_a, good] = earned
    rewards[:, road_b, good] = earned + share * alpha * (-slips).log1p()

    expert = soft_policy(soft_optimal_q(mdp, rewards, alpha), alpha)
    on_road = expert[:, road_a].exp()
    where = _uniform(generator, 0.5, 1.5, horizon, 3)
    on_road[:, good] -= slips
    on_road[:, 1:] += slips[:, None] * where / where.sum(-1, keepdim=True)
    base = expert.clone()
    base[:, road_a] = on_road.log()
    return Imitation(mdp, rewards, alpha, expert, base)


def learned_cliff(horizon: int, number: float, seed: int, alpha: float = 0.05, synonyms: int = 3) -> Imitation:
    r"""
    A road along a cliff, and a base model that has learned it by next-token prediction from `number` demonstrations of
    the expert, counts plus one: nobody has put an error in.

    Several tokens stay on the road and earn between 0.9 and 1; one more falls off, and nothing is earned any more. No
    demonstration falls, but the base model holds it for possible, about once in `number` tokens. Which token of the
    road is the best it knows only as well as the counts tell.
    """
    generator = torch.Generator().manual_seed(seed)
    road, fallen = 0, 1
    transitions = torch.full((2, synonyms + 1), fallen)
    transitions[road, :synonyms] = road
    mdp = TokenMDP(transitions, horizon)
    rewards = torch.zeros(mdp.shape, dtype=torch.float64)
    rewards[:, road, :synonyms] = _uniform(generator, 0.9, 1.0, horizon, synonyms)
    expert = soft_policy(soft_optimal_q(mdp, rewards, alpha), alpha)
    counts = token_counts(mdp, sample_responses(mdp, expert, int(number), generator)) + 1
    return Imitation(mdp, rewards, alpha, expert, (counts / counts.sum(-1, keepdim=True)).log())


def drift(horizon: int, epsilon: float, seed: int, alpha: float = 0.05, synonyms: int = 8) -> Imitation:
    r"""
    A random walk whose steps the base model biases by a log error of `epsilon`, all in the same direction: the worst
    that a base model can do that is nowhere further than `epsilon` nats from the expert.

    Every token is a step to the left or to the right, in one of several synonyms. Left of the origin, one synonym
    earns 1 and the others nothing; right of it, all earn a little less, so much that the soft values are equal. The
    expert steps left and right equally often. The base model drifts to the right.
    """
    generator = torch.Generator().manual_seed(seed)
    positions = torch.arange(2 * horizon + 1)
    side = torch.arange(2 * synonyms) < synonyms  # left
    transitions = torch.where(side, positions[:, None] - 1, positions[:, None] + 1).clamp(0, 2 * horizon)
    mdp = TokenMDP(transitions, horizon, initial=horizon)

    rewards = torch.zeros(2 * horizon + 1, 2 * synonyms, dtype=torch.float64)
    rewards[:, 0] = rewards[:, synonyms] = 1.0
    wordy = positions > horizon
    same_value = alpha * torch.logsumexp(rewards[0] / alpha, 0) - alpha * torch.tensor(2 * synonyms).double().log()
    rewards[wordy] = same_value
    rewards = mdp.expand(rewards)
    expert = soft_policy(soft_optimal_q(mdp, rewards, alpha), alpha)

    # The larger error is that of the left step: exp(-epsilon) of what it was.
    sizes = epsilon * _uniform(generator, 0.5, 1.0, horizon)
    sizes[-1] = epsilon
    left = (-sizes).exp()[:, None, None]
    probabilities = expert.exp()
    share = probabilities[..., side].sum(-1, keepdim=True)
    right = (1 - left * share) / (1 - share)
    return Imitation(mdp, rewards, alpha, expert, torch.where(side, left, right).log() + expert)


def random_mdp(
    horizon: int,
    epsilon: float,
    seed: int,
    worst: bool = False,
    alpha: float = 0.1,
    states: int = 16,
    tokens: int = 4,
) -> Imitation:
    r"""
    Random transitions and rewards; the base model's error is at most `epsilon` nats (log error).

    The error is random, or, with `worst`, against the expert wherever it can be: every token that the expert has an
    advantage from becomes less probable.
    """
    generator = torch.Generator().manual_seed(seed)
    mdp = TokenMDP(torch.randint(states, (states, tokens), generator=generator), horizon)
    rewards = mdp.expand(_uniform(generator, 0.0, 1.0, states, tokens))
    expert = soft_policy(soft_optimal_q(mdp, rewards, alpha), alpha)
    if worst:
        q = policy_q(mdp, rewards, expert)
        direction = -(q - (expert.exp() * q).sum(-1, keepdim=True)).sign()
    else:
        direction = _uniform(generator, -1.0, 1.0, *mdp.shape)
    return Imitation(mdp, rewards, alpha, expert, perturbed(expert, direction, epsilon))


def perturbed(expert: Tensor, direction: Tensor, epsilon: float) -> Tensor:
    r"""
    The policy $\propto \pi_E e^{t z}$, where $z$ is `direction`, with the $t$ for which its log error is `epsilon`.
    """
    low, high = 0.0, 4 * epsilon / direction.abs().max().item()
    for _ in range(60):
        middle = (low + high) / 2
        error = log_error((expert + middle * direction).log_softmax(-1), expert)
        low, high = (middle, high) if error < epsilon else (low, middle)
    return (expert + low * direction).log_softmax(-1)


def trapdoor(horizon: int, epsilon: float, seed: int, alpha: float = 0.05, synonyms: int = 4) -> Imitation:
    r"""
    Where the guarantee's assumption fails: the total variation is `epsilon`, and the log error is large.

    On the road, several synonyms are equally good. One more token, which the expert never takes, leads through a
    trapdoor to a room where only one token is ever said, which earns half. The base model takes the trapdoor with
    probability
    `epsilon`. A response in the room costs one token of low probability; one on the road costs some at every token.
    """
    generator = torch.Generator().manual_seed(seed)
    road, room = 0, 1
    transitions = torch.full((2, synonyms + 1), room)
    transitions[road, :synonyms] = road
    mdp = TokenMDP(transitions, horizon)
    rewards = torch.zeros(mdp.shape, dtype=torch.float64)
    rewards[:, road, :synonyms] = _uniform(generator, 0.9, 1.0, horizon)[:, None]
    rewards[:, room, 0] = 0.5
    expert = soft_policy(soft_optimal_q(mdp, rewards, alpha), alpha)
    on_road = expert[:, road].exp()
    on_road[:, synonyms] += epsilon
    on_road[:, :synonyms] -= epsilon / synonyms
    base = expert.clone()
    base[:, road] = on_road.log()
    return Imitation(mdp, rewards, alpha, expert, base)
