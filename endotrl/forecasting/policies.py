# SPDX-License-Identifier: Apache-2.0
r"""
Where trainers end, as weights of samples of the frozen model.

With the reward $R(y)$ and a KL penalty $\beta$ to the frozen model $\hat\pi$:

- **RLOO** (TRL) subtracts $\beta \log(\pi/\hat\pi)$ of the whole completion from its reward, and [`PPOTrainer`] the
  same token by token; both then credit what follows. Their optimum is $\pi(y) \propto \hat\pi(y)\, e^{R(y)/\beta}$:
  for the endogenous reward $\alpha \log \hat\pi(y)$, the power distribution $\hat\pi^{1+k}$, $k = \alpha/\beta$
  (https://huggingface.co/papers/2605.04542).
- **GRPO** (TRL, and [`DenseGRPOTrainer`]) has the mean of the group as baseline, which contains the completion itself
  and so scales the reward by $c = 1 - 1/G$. Its KL penalty is a loss of each token, which is not counted against
  earlier tokens (`use_bias_correction_kl=True`, the default since TRL 1.16): in each state $s$ it ends at
  $\pi_s(a) \propto \hat\pi_s(a)\, e^{c Q(s,a)/\beta}$ with the *expected* reward $Q$ under $\pi$. With one token that
  matters, that is $\hat\pi^{1+k}$, $k = c\alpha/\beta$; else it is near it. $Q$ comes from the tree of the samples.
- **`scale_rewards="group"`** divides by the standard deviation of the group, which the completion is part of: a
  completion ends at the expected advantage $\mathbb{E}[(R - \bar R)/s]$ over groups of it and $G - 1$ others of the
  *trained* policy in the place of $cR$. Few of a group are unlike, and $s$ is most often below the policy's standard
  deviation: $\beta$ acts as less than $\beta$ times it. Groups are drawn among the samples, anew in each step.
- **`scale_rewards="batch"`** divides by one standard deviation $\sigma$, that of all rewards of the *trained* policy.

Not part of it: clipping, several epochs on a batch, `loss_type="grpo"` (which weighs tokens of short completions
more), and what an optimizer has not reached yet. A run that is stopped early is at a larger $\beta$ of the same path.
"""

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..checks import check_choice


Array = NDArray[np.float64]
Trainer = Literal["rloo", "grpo", "dense_grpo", "ppo"]
ScaleRewards = Literal["group", "batch", "none"]

EPSILON = 1e-4  # TRL adds it to standard deviations
STEP, MAX_STEPS, TOLERANCE = 0.2, 1000, 1e-9
GROUPS, GROUP_STEPS, FOLLOWING = 32, 150, 30  # groups of each prompt and step; later steps take the mean over steps


@dataclass(frozen=True)
class Objective:
    """What is trained. Raises `ValueError` if there is no such trainer or scale, or a group has fewer than two."""

    trainer: Trainer = "grpo"  # RLOO and GRPO are TRL's, the others ours
    num_generations: int = 8  # completions of a group, G; RLOO and PPO do not depend on it
    # As in `trl.GRPOConfig`, whose default is "group". RLOO and PPO have none: what they normalise includes the KL.
    scale_rewards: ScaleRewards = "none"

    def __post_init__(self) -> None:
        check_choice("trainer", self.trainer, get_args(Trainer))
        check_choice("scale_rewards", self.scale_rewards, get_args(ScaleRewards))
        if self.num_generations < 2:
            raise ValueError(f"`num_generations` is {self.num_generations}, but a group has at least 2 completions.")

    @property
    def has_groups(self) -> bool:
        """Whether the baseline is the mean of a group, and the KL penalty a loss of each token."""
        return self.trainer in ("grpo", "dense_grpo")

    @property
    def words(self) -> str:
        """The settings that matter, in words."""
        if not self.has_groups:
            return {"rloo": "RLOO", "ppo": "PPO"}[self.trainer]
        name = {"grpo": "GRPO", "dense_grpo": "DenseGRPO"}[self.trainer]
        return f'{name}, groups of {self.num_generations}, scale_rewards="{self.scale_rewards}"'


class Samples:
    """Samples of P prompts, N in all; `owner`, of shape `(N,)`, has the prompt of each."""

    def __init__(
        self,
        token_ids: Sequence[Sequence[Sequence[int]]],  # completions of each prompt
        log_probs: Sequence[ArrayLike],  # under the frozen model, in nats
        log_proposals: Sequence[ArrayLike],  # under what they were drawn from; 0 for an enumeration of all completions
        rewards: Sequence[ArrayLike],
    ) -> None:
        self.owner = np.repeat(np.arange(len(token_ids)), [len(rows) for rows in token_ids])
        self.num_prompts = len(token_ids)
        self.rewards = np.concatenate([np.asarray(row, float) for row in rewards])
        self.log_probs = np.concatenate([np.asarray(row, float) for row in log_probs])
        self.log_proposals = np.concatenate([np.asarray(row, float) for row in log_proposals])
        self.base = self.normalized(self.log_probs - self.log_proposals)
        self._tree = _Tree(token_ids)

    def normalized(self, log_weights: Array) -> Array:
        """Log-weights, normalised within each prompt."""
        return log_weights - _logsumexp(log_weights, self.owner, self.num_prompts)[self.owner]

    def mean(self, weights: Array, values: Array) -> Array:
        """Means of values under weights of shape `(N,)` that sum to 1 in each prompt, of shape `(P,)`."""
        return np.bincount(self.owner, weights * values, self.num_prompts).astype(float)

    def policy(self, objective: Objective, beta: float) -> Array:
        r"""
        Log-weights of the policy that training ends with, of shape `(N,)`, normalised within each prompt:
        $A = \sum_i w_i a_i$ estimates the expectation of $a$ under it. Raises `ValueError` if `beta` is not above 0.
        """
        if not 0.0 < beta < np.inf:
            raise ValueError(f"`beta` is {beta}, but a forecast needs a KL penalty above 0, or policies collapse.")
        if not objective.has_groups:
            return self.normalized(self.base + self.rewards / beta)
        size = objective.num_generations
        share = 1.0 - 1.0 / size
        if objective.scale_rewards == "none":
            return self._tree.policy(self.base, share * self.rewards / beta)
        grouped, generator = objective.scale_rewards == "group", np.random.default_rng(0)
        log_weights = self.base
        for step in range(GROUP_STEPS if grouped else MAX_STEPS):  # natural gradient ascent, in the space of policies
            weights, rate = np.exp(log_weights), STEP
            if grouped:
                advantages = self._group_advantages(weights, size, generator)
                rate = min(STEP, 1 / max(1, step - FOLLOWING + 1 / STEP))
            else:
                advantages = share * self._batch_advantages(weights)
            target = self._tree.policy(self.base, advantages / beta)
            following = self.normalized(log_weights + rate * (target - log_weights))
            change = np.abs(np.exp(following) - weights).max()
            log_weights = following
            if change < TOLERANCE:
                break
        return log_weights

    def divergence(self, log_weights: Array) -> Array:
        r"""$\mathrm{KL}(\pi \| \hat\pi)$ of log-weights, of shape `(P,)`, in nats."""
        return self.mean(np.exp(log_weights), log_weights - self.base)

    def effective_sizes(self, log_weights: Array) -> Array:
        r"""Effective sample size $(\sum w)^2 / \sum w^2$ of each prompt, of shape `(P,)`."""
        return 1.0 / np.bincount(self.owner, np.exp(2 * log_weights), self.num_prompts)

    def _batch_advantages(self, weights: Array) -> Array:
        """Rewards less their mean, over the standard deviation of those of all prompts."""
        mean = (weights * self.rewards).sum() / self.num_prompts
        std = np.sqrt((weights * (self.rewards - mean) ** 2).sum() / self.num_prompts)
        return (self.rewards - self.mean(weights, self.rewards)[self.owner]) / (std + EPSILON)

    def _group_advantages(self, weights: Array, size: int, generator: np.random.Generator) -> Array:
        """Mean advantages in groups of a completion and others that are drawn by their weights."""
        deviations = self.rewards - self.mean(weights, self.rewards)[self.owner]
        ranks = generator.permuted(np.tile(np.arange(GROUPS), (self.num_prompts, size - 1, 1)), axis=-1)
        quantiles = (ranks + generator.random(ranks.shape)) / GROUPS  # stratified
        ends = np.cumsum(np.bincount(self.owner, minlength=self.num_prompts))
        drawn = np.searchsorted(np.cumsum(weights), quantiles + np.arange(self.num_prompts)[:, None, None])
        others = deviations[np.minimum(drawn, ends[:, None, None] - 1)]
        own = deviations[:, None]
        means = (others.sum(1)[self.owner] + own) / size
        squares = (others**2).sum(1)[self.owner] + own**2
        variances = np.maximum(squares - size * means**2, 0.0) / (size - 1)
        return ((own - means) / (np.sqrt(variances) + EPSILON)).mean(1)


class _Tree:
    """
    The prefixes that completions share, as one forest for all prompts: nodes 0..N-1 are the samples, all others are
    where samples part. Equal samples part at their end.
    """

    def __init__(self, token_ids: Sequence[Sequence[Sequence[int]]]) -> None:
        rows = [tuple(row) for group in token_ids for row in group]
        parents, depths = [-1] * len(rows), [0] * len(rows)
        first = 0
        for group in token_ids:
            nodes = sorted(range(first, first + len(group)), key=rows.__getitem__)
            first += len(group)
            todo = [(nodes, -1, 0)]
            while todo:
                nodes, parent, depth = todo.pop()
                if len(nodes) == 1:
                    parents[nodes[0]] = parent
                    continue
                node = len(parents)
                parents.append(parent)
                depths.append(depth)
                place = len(os.path.commonprefix([rows[nodes[0]], rows[nodes[-1]]]))
                if place == len(rows[nodes[-1]]):  # they are equal
                    parts = [[child] for child in nodes]
                else:
                    tokens = {child: rows[child][place : place + 1] for child in nodes}
                    parts = [list(part) for _, part in itertools.groupby(nodes, tokens.__getitem__)]
                todo += [(children, node, depth + 1) for children in parts]
        self._parents = np.array(parents)
        inner = np.flatnonzero(self._parents >= 0)
        above = np.array(depths)[self._parents[inner]]
        self._levels = [inner[above == depth] for depth in range(max(depths, default=0), -1, -1)]

    def policy(self, log_masses: Array, gains: Array) -> Array:
        r"""
        Log-weights of $\pi_s(a) \propto \hat\pi_s(a)\, e^{Q(s,a)}$, $Q$ the expected gain of what follows under
        $\pi$, from the log-masses of $\hat\pi$; both of shape `(N,)`.
        """
        num_samples, num_nodes = len(gains), len(self._parents)
        masses, values = np.full(num_nodes, -np.inf), np.zeros(num_nodes)
        masses[:num_samples], values[:num_samples] = log_masses, gains
        log_policy = np.zeros(num_nodes)  # of each node, given its parent
        for nodes in self._levels:
            parents = self._parents[nodes]
            tilted = masses[nodes] + values[nodes]
            log_policy[nodes] = tilted - _logsumexp(tilted, parents, num_nodes)[parents]
            np.add.at(values, parents, np.exp(log_policy[nodes]) * values[nodes])
            np.logaddexp.at(masses, parents, masses[nodes])
        for nodes in reversed(self._levels):
            log_policy[nodes] += log_policy[self._parents[nodes]]
        return log_policy[:num_samples]


def _logsumexp(values: Array, groups: NDArray[np.int64], num_groups: int) -> Array:
    r"""$\log \sum e^v$ of each group."""
    totals = np.full(num_groups, -np.inf)
    np.logaddexp.at(totals, groups, values)
    return totals
