# SPDX-License-Identifier: Apache-2.0
r"""
Optimal policies of each trainer, as weights of samples of the frozen model.

With the reward $R(y)$ and a KL penalty $\beta$ to the frozen model $\hat\pi$:

- **RLOO** (TRL) subtracts $\beta \log(\pi/\hat\pi)$ of the whole completion from its reward, and [`PPOTrainer`] the
  same token by token; both credit each token with all that follows it. Their optimum is
  $\pi(y) \propto \hat\pi(y)\, e^{R(y)/\beta}$: for the endogenous reward $\alpha \log \hat\pi(y)$, the power
  distribution $\hat\pi^{1+k}$, $k = \alpha/\beta$ (https://huggingface.co/papers/2605.04542).
- **GRPO** (TRL, and [`DenseGRPOTrainer`]) has the mean of the group as baseline, which includes the completion itself
  and so scales the reward by $c = 1 - 1/G$. Its KL penalty is a loss per token, which is not charged to earlier tokens
  (`use_bias_correction_kl=True`, the default since TRL 1.16): in each state $s$ it ends at $\pi_s(a) \propto
  \hat\pi_s(a)\, e^{c Q(s,a)/\beta}$ with the *expected* reward $Q$ under $\pi$. If only one token matters, that is
  $\hat\pi^{1+k}$, $k = c\alpha/\beta$; otherwise it is close to it. $Q$ comes from the tree of samples.
- **`scale_rewards="group"`** divides by the group's standard deviation, so that the effective penalty is $\beta$ times
  that deviation, in groups of the *trained* policy ([`GroupAdvantages`]): it falls as the policy sharpens. The fixed
  point is followed from the frozen model on, as in training. If $\beta$ is too small, the policy collapses to the most
  probable completion, until groups have no spread. (`DenseGRPOTrainer` divides by the spread of token credit, which
  totals do not determine: it is assumed to be the same.)
- **`scale_rewards="batch"`** is the same with a single standard deviation, that of the rewards of all prompts.

Training is assumed to sample at a `temperature` of 1 from all tokens, with defaults for all else that shifts the
optimum; docs/forecast.md lists what is not modelled. In DenseGRPO `baseline="leave_one_out"` means $c = 1$; in PPO
`kl_placement="loss"` ends like GRPO with $c = 1$. A run that is stopped early corresponds to a larger $\beta$ on the
same path.
"""

import itertools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..checks import check_choice
from ..evaluation.intervals import Array
from . import ScaleRewards, Trainer


STEP, MAX_STEPS, TOLERANCE = 0.4, 1000, 1e-8
PROMPTS = 16  # whose groups are averaged over at a time, to bound memory
EPSILON = 1e-4  # TRL adds it to standard deviations
# Step sizes of the trapezoidal rule of [`GroupAdvantages`], in x and in widths of the product of G Gaussians, and the
# exponent at which a Gaussian counts as 0. Compared with an enumeration of all groups, errors are
# below 1e-6, or 2e-4 where rewards differ by less than epsilon.
SCALE_STEP, WIDTH_STEP, NEGLIGIBLE = 0.25, 0.8, 20.0


@dataclass(frozen=True)
class Objective:
    """Training objective. Raises `ValueError` for an unknown trainer or scale, or a group of fewer than two."""

    trainer: Trainer = "grpo"
    num_generations: int = 8  # completions per group, G; RLOO and PPO do not depend on it
    # As in `trl.GRPOConfig`, whose default is "group". RLOO and PPO have none: their normalisation includes the KL.
    scale_rewards: ScaleRewards = "none"

    def __post_init__(self) -> None:
        check_choice("trainer", self.trainer, get_args(Trainer))
        check_choice("scale_rewards", self.scale_rewards, get_args(ScaleRewards))
        if self.scale_rewards != "none" and not self.has_groups:
            raise ValueError(
                f'`scale_rewards` is a setting of GRPO and does not apply to `trainer="{self.trainer}"`. Remove it.'
            )
        if self.num_generations < 2:
            raise ValueError(f"`num_generations` must be at least 2, got {self.num_generations}.")

    @property
    def has_groups(self) -> bool:
        """Whether the baseline is the mean of a group, and the KL penalty a loss per token."""
        return self.trainer in ("grpo", "dense_grpo")

    @property
    def words(self) -> str:
        """The relevant settings, in words."""
        if not self.has_groups:
            return {"rloo": "RLOO", "ppo": "PPO"}[self.trainer]
        name = {"grpo": "GRPO", "dense_grpo": "DenseGRPO"}[self.trainer]
        return f'{name}, groups of {self.num_generations}, scale_rewards="{self.scale_rewards}"'


class Samples:
    """Samples of P prompts, N in all; `owner`, of shape `(N,)`, is the prompt index of each."""

    def __init__(
        self,
        token_ids: Sequence[Sequence[Sequence[int]]],  # completions per prompt
        log_probs: Sequence[ArrayLike],  # under the frozen model, in nats
        log_proposals: Sequence[ArrayLike],  # under the proposal distribution; 0 for an enumeration of all completions
        rewards: Sequence[ArrayLike],
    ) -> None:
        self._rows: tuple[Sequence[Any], ...] = (token_ids, log_probs, log_proposals, rewards)
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
        Log-weights of the policy at the end of training, of shape `(N,)`, normalised within each prompt:
        $A = \sum_i w_i a_i$ estimates the expectation of $a$ under it.
        """
        return np.concatenate([part._policy(objective, beta) for part in self._parts(objective)])

    def first_gains(self, objective: Objective) -> Array:
        r"""
        Gain of each completion at the start of training, of shape `(N,)`: the derivative in $1/\beta$, at 0, of the
        expectation of any $a$ is its covariance with these gains under the frozen model.
        """
        return np.concatenate([part._gains(objective)(np.exp(part.base)) for part in self._parts(objective)])

    def covariance(self, weights: Array, first: Array, second: Array) -> Array:
        r"""
        Covariances within each prompt under weights that sum to 1 there, of shape `(P,)`, divided by $1 - \sum w^2$,
        which makes them unbiased for equal weights.
        """
        first = first - first[np.searchsorted(self.owner, self.owner)]  # equal values have no rounding errors
        deviations = second - self.mean(weights, second)[self.owner]
        spare = 1.0 - np.bincount(self.owner, weights**2, self.num_prompts)
        return self.mean(weights, (first - self.mean(weights, first)[self.owner]) * deviations) / spare.clip(min=1e-9)

    def divergence(self, log_weights: Array) -> Array:
        r"""$\mathrm{KL}(\pi \| \hat\pi)$ of log-weights, of shape `(P,)`, in nats."""
        return self.mean(np.exp(log_weights), log_weights - self.base)

    def effective_sizes(self, log_weights: Array) -> Array:
        r"""Effective sample size $(\sum w)^2 / \sum w^2$ per prompt, of shape `(P,)`."""
        return 1.0 / np.bincount(self.owner, np.exp(2 * log_weights), self.num_prompts)

    def _parts(self, objective: Objective) -> list["Samples"]:
        """Prompts that are solved together: all, or a few where averages over groups need memory."""
        if not (objective.has_groups and objective.scale_rewards == "group" and self.num_prompts > PROMPTS):
            return [self]
        starts = range(0, self.num_prompts, PROMPTS)
        return [Samples(*(rows[start : start + PROMPTS] for rows in self._rows)) for start in starts]

    def _policy(self, objective: Objective, beta: float) -> Array:
        gains = self._gains(objective)
        if not objective.has_groups:
            return self.normalized(self.base + gains(np.exp(self.base)) / beta)
        if objective.scale_rewards == "none":
            return self._tree.policy(self.base, gains(np.exp(self.base)) / beta)
        log_weights = self.base
        for _ in range(MAX_STEPS):  # natural gradient ascent, in the space of policies
            weights = np.exp(log_weights)
            target = self._tree.policy(self.base, gains(weights) / beta)
            log_weights = self.normalized(log_weights + STEP * (target - log_weights))
            if np.abs(np.exp(log_weights) - weights).max() < TOLERANCE:
                break
        return log_weights

    def _gains(self, objective: Objective) -> Callable[[Array], Array]:
        """Returns a function from a policy's weights to expected advantages, up to a constant per prompt."""
        if not objective.has_groups:
            return lambda weights: self.rewards
        share = 1.0 - 1.0 / objective.num_generations
        if objective.scale_rewards == "none":
            return lambda weights: share * self.rewards
        scaled: Callable[[Array], Array] = self._scaled_by_batch
        if objective.scale_rewards == "group":
            scaled = self._scaled_by_group(objective.num_generations)
        return lambda weights: share * scaled(weights)

    def _scaled_by_batch(self, weights: Array) -> Array:
        means = self.mean(weights, self.rewards)
        deviation = np.sqrt((weights * (self.rewards - means.mean()) ** 2).sum() / self.num_prompts)
        return (self.rewards - means[self.owner]) / (deviation + EPSILON)

    def _scaled_by_group(self, size: int) -> Callable[[Array], Array]:
        cuts = np.searchsorted(self.owner, np.arange(1, self.num_prompts))
        groups = [GroupAdvantages(rewards, size) for rewards in np.split(self.rewards, cuts)]
        return lambda weights: np.concatenate([of(w) for of, w in zip(groups, np.split(weights, cuts), strict=True)])


class GroupAdvantages:
    r"""
    Expected advantages, divided by $1 - 1/G$, of the completions of one prompt where TRL divides rewards by the
    standard deviation $s$ of their group, $A_i = (r_i - m) / (s + \epsilon)$, over the other $G - 1$ of the group.
    With $\rho(t)$, whose Laplace transform is $1 / (\sqrt x + \epsilon)$, and $\tau = t / (G - 1)$,

    $$
    \frac1{s + \epsilon} = \int_0^\infty \rho(t)\, e^{-t s^2} dt, \qquad
    e^{-t s^2} = \sqrt{\frac{\tau G}\pi} \int \prod_j e^{-\tau (r_j - \mu)^2} d\mu,
    $$

    so that, given $t$ and $\mu$, the completions are independent. With $g_j = e^{-\tau (r_j - \mu)^2}$ and the policy
    $\pi$, the result is

    $$
    \int\!\!\int \rho(t) \sqrt{\frac{\tau G}\pi}\, g_i \sum_j \pi_j g_j (r_i - r_j)
    \Big(\sum_k \pi_k g_k\Big)^{G-2} d\mu\, dt,
    $$

    by the trapezoidal rule in $\mu$, and in $x$ with $\sqrt t = e^{x - e^{-x}} / u$, $u$ the range of the rewards.
    """

    def __init__(self, rewards: Array, size: int) -> None:
        values, self._places = np.unique(rewards - rewards.mean(), return_inverse=True)
        self._values, self._size = values, size
        gaps, middles = np.diff(values), (values[1:] + values[:-1]) / 2
        unit = max(np.ptp(values), EPSILON)
        # Up to where the closest two rewards are resolved, or epsilon is from 0. Equal rewards have no advantage.
        last = np.log1p(min(6 * math.sqrt(size) / gaps.min(), 20 / EPSILON) * unit) if len(gaps) else -3.0
        reach = math.ceil(math.sqrt(NEGLIGIBLE * size / 2) / WIDTH_STEP)
        factors, gaussians = [np.zeros(0)], [np.zeros((0, len(values)))]
        for place in np.arange(-3.0, last, SCALE_STEP):
            v = math.exp(place - math.exp(-place)) / unit  # the square root of t
            # 2 rho(t) times the square root of t
            density = 2 / math.sqrt(math.pi) - 2 * v * EPSILON * math.exp((v * EPSILON) ** 2) * math.erfc(v * EPSILON)
            factor = density * v * (1 + math.exp(-place)) * SCALE_STEP
            tau = v**2 / (size - 1)
            step = WIDTH_STEP / math.sqrt(size * tau)
            # Where the Gaussians of two neighbours contribute
            near = middles[tau * gaps**2 < 2 * NEGLIGIBLE]
            nodes = step * np.unique(np.floor(near / step)[:, None] + np.arange(-reach, reach + 2))
            factors.append(np.full(len(nodes), factor * step * math.sqrt(tau * size / math.pi)))
            gaussians.append(np.exp(-tau * (nodes[:, None] - values) ** 2))
        self._factors, self._gaussians = np.concatenate(factors), np.concatenate(gaussians)

    def __call__(self, weights: Array) -> Array:
        """Advantages of shape `(N,)`, under a policy with these probabilities."""
        masses = np.bincount(self._places, weights, len(self._values))
        one, weighted = self._gaussians @ masses, self._gaussians @ (masses * self._values)
        others = self._factors * one ** (self._size - 2)
        advantages = self._values * ((others * one) @ self._gaussians) - (others * weighted) @ self._gaussians
        return advantages[self._places]


class _Tree:
    """
    Prefix tree of the completions, as one forest for all prompts: nodes 0..N-1 are the samples, all others the
    branching points. Equal samples branch at their end.
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
    r"""$\log \sum e^v$ per group."""
    totals = np.full(num_groups, -np.inf)
    np.logaddexp.at(totals, groups, values)
    return totals
