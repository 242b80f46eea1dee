# SPDX-License-Identifier: Apache-2.0
"""Backward inductions against enumeration of all responses, closed forms for one and two tokens, and invariances."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from endotrl.bellman import outcome_reward, soft_value, token_rewards
from studies.theory import (
    TERMINAL,
    TokenMDP,
    expected_return,
    greedy_policy,
    inverse_soft_bellman,
    kl_divergence,
    log_error,
    occupancy,
    optimal_q,
    policy_q,
    policy_values,
    prefix_tree,
    response_sums,
    responses,
    sample_responses,
    soft_optimal_q,
    soft_policy,
    soft_values,
    suboptimality,
    total_variation,
)


def random_table(mdp: TokenMDP, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(mdp.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loop(seed: int = 0) -> TokenMDP:
    """Five Markov states, some tokens end the response: not a tree."""
    generator = torch.Generator().manual_seed(seed)
    return TokenMDP(torch.randint(-1, 5, (5, 3), generator=generator), horizon=4, initial=2)


NOWHERE = torch.zeros(2, 2, dtype=torch.int64)
MDPS = {
    "fixed length": prefix_tree(num_tokens=3, horizon=4),
    "eos": prefix_tree(num_tokens=3, horizon=4, eos=1),
    "markov": loop(),
    "one token": prefix_tree(num_tokens=1, horizon=3),
    "one step": prefix_tree(num_tokens=4, horizon=1, eos=2),
}


@pytest.fixture(params=MDPS)
def mdp(request: pytest.FixtureRequest) -> TokenMDP:
    return MDPS[request.param]


class TestTokenMDP:
    def test_prefix_tree(self) -> None:
        # States: the empty prefix, "1", "2"; token 0 ends the response.
        assert prefix_tree(num_tokens=3, horizon=2, eos=0).transitions.tolist() == [[-1, 1, 2], [-1] * 3, [-1] * 3]

    def test_responses_with_eos(self) -> None:
        mdp = prefix_tree(num_tokens=2, horizon=3, eos=0)
        assert responses(mdp).tolist() == [[0, -1, -1], [1, 0, -1], [1, 1, 0], [1, 1, 1]]

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: TokenMDP(torch.full((2, 2), 2), horizon=1), "out of the 2 states"),
            (lambda: TokenMDP(torch.full((2, 2), -2), horizon=1), "out of the 2 states"),
            (lambda: TokenMDP(NOWHERE, horizon=1, initial=2), "`initial` is 2"),
            *((lambda eos=eos: prefix_tree(3, 2, eos), "at least one token and one step") for eos in (7, -1)),
            *(
                (lambda call=call, a=a: call(MDPS["eos"], torch.zeros(MDPS["eos"].shape), a), "`alpha` is")
                for call in (soft_values, soft_optimal_q)
                for a in (0.0, -1.0, math.nan)
            ),
        ],
    )
    def test_bad_arguments(self, call, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            call()


class TestEnumeration:
    """The same from all responses, without any backward induction."""

    @pytest.mark.parametrize("alpha", [1.0, 0.3])
    def test_soft_optimum(self, alpha: float, mdp: TokenMDP) -> None:
        rewards, every = random_table(mdp, 0), responses(mdp)
        returns = response_sums(mdp, rewards, every)
        q = soft_optimal_q(mdp, rewards, alpha)
        expected = (returns / alpha).log_softmax(0)
        torch.testing.assert_close(response_sums(mdp, soft_policy(q, alpha), every), expected)
        value = alpha * torch.logsumexp(returns / alpha, 0)
        torch.testing.assert_close(soft_values(mdp, q, alpha)[0, mdp.initial], value)

    def test_kl_regularised_optimum(self, mdp: TokenMDP) -> None:
        rewards, every, beta = random_table(mdp, 0), responses(mdp), 0.4
        reference = random_table(mdp, 1).log_softmax(-1)
        policy = soft_policy(soft_optimal_q(mdp, rewards, beta, reference), beta, reference)
        expected = response_sums(mdp, reference, every) + response_sums(mdp, rewards, every) / beta
        torch.testing.assert_close(response_sums(mdp, policy, every), expected.log_softmax(0))

    def test_evaluation_and_kl(self, mdp: TokenMDP) -> None:
        rewards, every = random_table(mdp, 0), responses(mdp)
        policy, other = (random_table(mdp, seed).log_softmax(-1) for seed in (1, 2))
        log_p, log_q = (response_sums(mdp, p, every) for p in (policy, other))
        assert log_p.exp().sum().item() == pytest.approx(1.0)
        expected = (log_p.exp() * response_sums(mdp, rewards, every)).sum().item()
        assert expected_return(mdp, rewards, policy) == pytest.approx(expected)
        assert (occupancy(mdp, policy) * rewards).sum().item() == pytest.approx(expected)
        assert kl_divergence(mdp, policy, other) == pytest.approx((log_p.exp() * (log_p - log_q)).sum().item())

    def test_hard_optimum(self, mdp: TokenMDP) -> None:
        rewards = random_table(mdp, 0)
        best = greedy_policy(optimal_q(mdp, rewards))
        largest = response_sums(mdp, rewards, responses(mdp)).max().item()
        assert expected_return(mdp, rewards, best) == pytest.approx(largest)
        assert suboptimality(mdp, rewards, best) == 0.0
        other = suboptimality(mdp, rewards, random_table(mdp, 1).log_softmax(-1))
        assert other > 0.01 if mdp.shape[2] > 1 else other == 0.0  # of one token there is one policy

    def test_samples(self, mdp: TokenMDP) -> None:
        policy, every = random_table(mdp, 1).log_softmax(-1), responses(mdp)
        samples = sample_responses(mdp, policy, 40_000, torch.Generator().manual_seed(0))
        index = {tuple(row): i for i, row in enumerate(every.tolist())}
        counts = torch.zeros(len(every), dtype=torch.float64)
        for row in samples.tolist():
            counts[index[tuple(row)]] += 1
        probabilities = response_sums(mdp, policy, every).exp()
        # Four standard errors, and a little for the rarest.
        error = (probabilities * (1 - probabilities) / 40_000).sqrt()
        assert ((counts / 40_000 - probabilities).abs() < 4 * error + 2e-4).all()

    def test_errors_of_a_policy(self) -> None:
        p, q = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]), torch.tensor([[0.4, 0.35, 0.25], [0.1, 0.1, 0.8]])
        assert total_variation(p.log(), q.log()) == pytest.approx(0.1)
        assert log_error(p.log(), q.log()) == pytest.approx(math.log(0.35 / 0.25))


class TestEndogenousReward:
    @pytest.mark.parametrize("alpha", [1.0, 0.3])
    def test_inverse_of_soft_optimality(self, alpha: float, mdp: TokenMDP) -> None:
        rewards, logits = random_table(mdp, 0), random_table(mdp, 1)
        back = inverse_soft_bellman(mdp, soft_optimal_q(mdp, rewards, alpha), alpha)
        torch.testing.assert_close(back, rewards)
        again = soft_optimal_q(mdp, inverse_soft_bellman(mdp, logits, alpha), alpha)
        torch.testing.assert_close(again, logits)

    def test_telescopes(self, mdp: TokenMDP) -> None:
        logits, alpha, every = random_table(mdp, 0), 0.7, responses(mdp)
        returns = response_sums(mdp, inverse_soft_bellman(mdp, logits, alpha), every)
        log_probs = response_sums(mdp, soft_policy(logits, alpha), every)
        torch.testing.assert_close(returns, alpha * log_probs + soft_values(mdp, logits, alpha)[0, mdp.initial])

    def test_agrees_with_the_package(self) -> None:
        """`endotrl.bellman`, which is what runs on a language model."""
        mdp, alpha = MDPS["eos"], 0.7
        logits = random_table(mdp, 0)
        table = inverse_soft_bellman(mdp, logits, alpha)
        tokens, state = [2, 0, 1], 0  # ends with EOS
        chosen, values, expected = [], [], []
        for h, token in enumerate(tokens):
            chosen.append(logits[h, state, token])
            values.append(soft_value(logits[h, state], alpha))
            expected.append(table[h, state, token])
            state = mdp.transitions[state, token].item()
        assert state == TERMINAL
        rewards = token_rewards(torch.stack(chosen), torch.stack([*values, torch.zeros(())]), alpha)
        torch.testing.assert_close(rewards.double(), torch.stack(expected), rtol=0, atol=1e-5)
        padded = torch.tensor([tokens + [-1]])
        log_prob = response_sums(mdp, soft_policy(logits, alpha), padded).item()
        assert outcome_reward(rewards, values[0]).item() == pytest.approx(alpha * log_prob, abs=1e-5)

    def test_soft_loss_is_the_kl(self, mdp: TokenMDP) -> None:
        """With entropy counted, a policy loses alpha times its KL to the soft-optimal one: no more, no less."""
        rewards, alpha = random_table(mdp, 0), 0.6
        expert = soft_policy(soft_optimal_q(mdp, rewards, alpha), alpha)
        other = random_table(mdp, 1).log_softmax(-1)

        def soft_return(policy: Tensor) -> float:
            return expected_return(mdp, rewards - alpha * policy, policy)

        expected = alpha * kl_divergence(mdp, other, expert)
        assert soft_return(expert) - soft_return(other) == pytest.approx(expected)


class TestMonotone:
    def test_optimum_dominates(self, mdp: TokenMDP) -> None:
        rewards = random_table(mdp, 0)
        best = optimal_q(mdp, rewards)
        for seed, policy in itertools.product(range(3), (greedy_policy, lambda q: q.log_softmax(-1))):
            assert (policy_q(mdp, rewards, policy(random_table(mdp, seed + 1))) <= best + 1e-12).all()

    def test_policy_values_of_a_token_never_taken(self) -> None:
        mdp = TokenMDP(torch.full((1, 2), TERMINAL), horizon=1)
        rewards = torch.tensor([1.0, -torch.inf]).double()
        assert policy_values(mdp, rewards, torch.tensor([1.0, 0.0]).log())[0, 0].item() == 1.0
