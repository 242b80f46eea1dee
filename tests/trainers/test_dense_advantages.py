# SPDX-License-Identifier: Apache-2.0
"""
The estimator of DenseGRPOTrainer, without a trainer: against TRL's formulas where the two must agree, and, on a token
MDP so small that every completion of every group is enumerated, against the exact gradient of the expected reward.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor

from endotrl.trainers.dense_advantages import dense_advantages, rewards_to_go


@pytest.mark.parametrize(
    "settings", [{}, {"scale_rewards": "batch"}, {"multi_objective_aggregation": "normalize_then_sum"}]
)
def test_completions_without_a_reward(settings):
    """Of rewards of whole completions; with a reward for each, `test_dense_grpo.py` compares with TRL."""

    def advantages(rewards: Tensor) -> list[float]:
        weights = torch.tensor([1.0, 0.5])
        return dense_advantages(rewards, {}, torch.ones(len(rewards), 1), weights, 3, **settings)[:, 0].tolist()

    first, without, last = advantages(torch.tensor([[1.0, 5.0], [math.nan, math.nan], [2.0, 4.0]]))
    assert without == 0.0 and first == pytest.approx(-last, rel=1e-4) and first < 0
    assert advantages(torch.full((6, 2), math.nan)) == [0.0] * 6


class TestScale:
    def test_same_total_earned_elsewhere(self):
        # TRL's standard deviation, of the totals, is 0 here, and would make these advantages 10^4 times as large.
        mask = torch.ones(2, 2, dtype=torch.bool)
        to_go = rewards_to_go(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), None, torch.arange(2).expand(2, 2), mask)
        advantages = dense_advantages(torch.ones(2, 1), {0: to_go}, mask.float(), torch.ones(1), 2)
        # Credit: 0 before the first token, -1/2 and 1/2 before the second; sigma^2 = (1/8 + 1/8) / (2 - 1).
        torch.testing.assert_close(advantages, torch.tensor([[0.0, -1.0], [0.0, 1.0]]), rtol=1e-3, atol=1e-6)

    def test_mean_square_is_one(self):
        torch.manual_seed(0)
        mask = torch.arange(9) < torch.tensor([3, 9, 5, 1])[:, None]
        to_go = rewards_to_go(5 * torch.randn(4, 9), None, torch.arange(9).expand(4, 9), mask)
        advantages = dense_advantages(torch.randn(4, 1), {0: to_go}, mask.float(), torch.ones(1), 4)
        mean_squares = advantages.square().sum(1) / mask.sum(1)
        assert mean_squares.sum().item() / (4 - 1) == pytest.approx(1.0, rel=1e-3)

    def test_sentences_weigh_as_many_tokens_as_they_have(self):
        # The same credit, told as two sentences of 3 and 1 tokens, or token by token.
        to_go = torch.tensor([[4.0, 1.0], [2.0, 3.0]])
        num_tokens = torch.tensor([[3.0, 1.0], [3.0, 1.0]])
        by_sentence = dense_advantages(torch.zeros(2, 1), {0: to_go}, num_tokens, torch.ones(1), 2)
        by_token = dense_advantages(torch.zeros(2, 1), {0: to_go[:, [0, 0, 0, 1]]}, torch.ones(2, 4), torch.ones(1), 2)
        torch.testing.assert_close(by_sentence[:, [0, 0, 0, 1]], by_token)


EOS, HORIZON, GROUP = 0, 3, 3


class TabularMdp:
    """
    Tokens 0 (EOS), 1 and 2; at most 3 of them. The policy is a table of logits by state, a state being the tokens so
    far; so is the frozen model. All 15 completions, and all 15^3 groups of 3.
    """

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.states = [prefix for n in range(HORIZON) for prefix in itertools.product((1, 2), repeat=n)]
        ended = [(*state, EOS) for state in self.states]
        self.completions = [*ended, *itertools.product((1, 2), repeat=HORIZON)]
        index = {state: i for i, state in enumerate(self.states)}
        count = len(self.completions)
        self.mask = torch.zeros(count, HORIZON, dtype=torch.bool)
        self.state, self.action = (torch.zeros(count, HORIZON, dtype=torch.long) for _ in range(2))
        for i, completion in enumerate(self.completions):
            for h, token in enumerate(completion):
                self.mask[i, h] = True
                self.state[i, h], self.action[i, h] = index[completion[:h]], token

        def table() -> Tensor:
            return torch.randn(len(self.states), 3, generator=generator, dtype=torch.float64)

        self.logits = table().requires_grad_()
        self.frozen = 2 * table()
        self.any_reward = table()
        self.outcomes = torch.randn(count, generator=generator, dtype=torch.float64)
        self.groups = torch.tensor(list(itertools.product(range(count), repeat=GROUP)))

    def take(self, table: Tensor) -> Tensor:
        """Table entries along every completion, of shape (15, 3)."""
        return torch.where(self.mask, table[self.state, self.action], 0.0)

    @property
    def log_probs(self) -> Tensor:
        return self.take(self.logits.log_softmax(-1))

    def gradient_of(self, total: Tensor) -> Tensor:
        """Gradient of the expected total reward."""
        expected = (self.log_probs.sum(1).exp() * total).sum()
        return torch.autograd.grad(expected, self.logits)[0]

    def estimates(self, advantages: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and total variance of the estimate from one group, sum_i sum_h A_ih grad log pi(a_ih | s_ih) / G."""
        probabilities = self.log_probs.sum(1).exp().detach()[self.groups].prod(1)  # (15^3,)
        assert probabilities.sum().item() == pytest.approx(1.0)
        # grad of log pi(a|s) with respect to the logits of s is onehot(a) - pi(s).
        scores = torch.zeros(len(self.completions), HORIZON, *self.logits.shape, dtype=torch.float64)
        pi = self.logits.softmax(-1).detach()
        for i, completion in enumerate(self.completions):
            for h, token in enumerate(completion):
                scores[i, h, self.state[i, h]] = torch.eye(3, dtype=torch.float64)[token] - pi[self.state[i, h]]
        scores = scores.flatten(2)
        gradient = torch.einsum("gih,gihp->gp", advantages.double(), scores[self.groups]) / GROUP
        mean = probabilities @ gradient
        variance = probabilities @ (gradient - mean).square().sum(1)
        return mean.view_as(self.logits), variance

    def advantages(
        self, token_rewards: Tensor, values: Tensor | None, segment_ids: Tensor, with_outcome: bool, loo: bool
    ) -> Tensor:
        """Advantages of all completions of all groups, of shape (15^3, 3, 3), as the trainer makes them."""
        rows = self.groups.flatten()
        mask, ids = self.mask[rows], segment_ids[rows]
        to_go = rewards_to_go(token_rewards[rows], None if values is None else values[rows], ids, mask)
        num_tokens = torch.zeros_like(to_go).scatter_add_(1, ids, mask.float())
        rewards = torch.stack([token_rewards.sum(1), self.outcomes], dim=1)[rows].float()
        weights = torch.tensor([1.0, 0.7 if with_outcome else 0.0])
        result = dense_advantages(
            rewards, {0: to_go}, num_tokens, weights, GROUP, scale_rewards="none", leave_one_out=loo
        )
        return (result.gather(1, ids) * mask).view(-1, GROUP, HORIZON)


class TestExpectedGradient:
    mdp = TabularMdp()

    def rewards(self, kind: str) -> tuple[Tensor, Tensor | None]:
        """Token rewards and state values of all completions, of shape (15, 3)."""
        mdp = self.mdp
        if kind == "any":
            return mdp.take(mdp.any_reward), None
        # r = f - V(s'), with V = 0 after EOS and after the last token (truncation="terminal").
        values = torch.where(mdp.mask, mdp.frozen.logsumexp(-1)[mdp.state], 0.0)
        following = torch.cat([values[:, 1:], torch.zeros(len(values), 1)], dim=1)
        return torch.where(mdp.mask, mdp.take(mdp.frozen) - following, 0.0), values

    def segments(self, granularity: str) -> Tensor:
        """By token; by sentence, which the token 1 ends; or all in one."""
        if granularity == "token":
            return torch.arange(HORIZON).expand(len(self.mdp.completions), HORIZON)
        if granularity == "outcome":
            return torch.zeros(len(self.mdp.completions), HORIZON, dtype=torch.long)
        ends = (self.mdp.action == 1) & self.mdp.mask
        return ends.long().cumsum(1) - ends.long()

    @pytest.mark.parametrize("granularity", ["token", "sentence", "outcome"])
    @pytest.mark.parametrize("kind", ["any", "endogenous"])
    @pytest.mark.parametrize("with_outcome", [False, True])
    @pytest.mark.parametrize("loo", [False, True])
    def test_is_that_of_the_expected_reward(self, granularity, kind, with_outcome, loo):
        mdp = self.mdp
        token_rewards, values = self.rewards(kind)
        segment_ids = self.segments(granularity)
        mean, _ = mdp.estimates(mdp.advantages(token_rewards, values, segment_ids, with_outcome, loo))
        total = token_rewards.sum(1) + (0.7 * mdp.outcomes if with_outcome else 0.0)
        # GRPO's baseline contains the completion itself, which makes the gradient 1 - 1/G times that of the reward.
        exact = mdp.gradient_of(total) * (1.0 if loo else 1 - 1 / GROUP)
        torch.testing.assert_close(mean, exact, rtol=1e-4, atol=1e-6)
        assert exact.norm() > 0.05

    def test_soft_value_turns_bellman_rewards_into_log_probabilities(self):
        mdp = self.mdp
        bellman, values = self.rewards("endogenous")
        log_probs = mdp.take(mdp.frozen.log_softmax(-1))
        for granularity in ("token", "sentence"):
            ids = self.segments(granularity)
            found = rewards_to_go(bellman, values, ids, mdp.mask)
            torch.testing.assert_close(found, rewards_to_go(log_probs, None, ids, mdp.mask))

    @pytest.mark.parametrize("kind", ["any", "endogenous"])
    def test_varies_less_than_scalar_credit(self, kind):
        mdp = self.mdp
        token_rewards, values = self.rewards(kind)
        token, sentence, outcome = (
            mdp.estimates(mdp.advantages(token_rewards, values, self.segments(kind), False, False))[1].item()
            for kind in ("token", "sentence", "outcome")
        )
        assert token < 0.95 * outcome  # three tokens leave little to gain
        assert token < sentence
