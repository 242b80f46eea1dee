# SPDX-License-Identifier: Apache-2.0
"""The reward's formulas against numbers worked out by hand, and against what follows from them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from endotrl.bellman import aggregate_weights, bellman_contributions, outcome_reward, soft_value, token_rewards

from .support.reference import scores_from_logits
from .support.reference import token_rewards as reference_token_rewards


LN2, LN3, LN4, LN5 = math.log(2), math.log(3), math.log(4), math.log(5)

# Two tokens of a vocabulary of two. All by hand:
#   s_1: f = [0, ln 3]   exp(f) = [1, 3]   V = ln 4   pi = [1/4, 3/4]   token 1 taken: f = ln 3, log pi = ln 3/4
#   s_2: f = [ln 2, 0]   exp(f) = [2, 1]   V = ln 3   pi = [2/3, 1/3]   token 0 taken: f = ln 2, log pi = ln 2/3
#   s_3: V = ln 5, if the response goes on
# Entropies: H_1 = 1/4 ln 4 + 3/4 (ln 4 - ln 3) = ln 4 - 3/4 ln 3;  H_2 = 2/3 (ln 3 - ln 2) + 1/3 ln 3 = ln 3 - 2/3 ln
# 2
CHOSEN = torch.tensor([LN3, LN2])
FINISHED = torch.tensor([LN4, LN3, 0.0])
CUT_OFF = torch.tensor([LN4, LN3, LN5])
ENTROPIES = torch.tensor([LN4 - 0.75 * LN3, LN3 - 2 / 3 * LN2])


def random_episode(seed: int, num_tokens: int, vocab_size: int = 7) -> tuple[Tensor, Tensor]:
    """Logits at every state of a response, of shape (H + 1, V), and its tokens, of shape (H,)."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(num_tokens + 1, vocab_size, generator=generator)
    return logits, torch.randint(vocab_size, (num_tokens,), generator=generator)


def chosen_and_values(logits: Tensor, actions: Tensor, alpha: float, finished: bool) -> tuple[Tensor, Tensor]:
    values = soft_value(logits, alpha)
    if finished:
        values = torch.cat([values[:-1], torch.zeros(1)])
    return logits[:-1].gather(1, actions[:, None]).squeeze(1), values


class TestSoftValue:
    @pytest.mark.parametrize(
        ("logits", "alpha", "expected"),
        [
            ([0.0, LN3], 1.0, LN4),  # ln(1 + 3)
            ([0.0, LN3], 0.5, 0.5 * math.log(10)),  # exp(2 ln 3) = 9, hence ln(1 + 9) / 2
            ([0.0, LN3], 2.0, 2 * math.log(1 + math.sqrt(3))),  # exp(ln 3 / 2) = sqrt 3
            ([0.7], 0.3, 0.7),  # one action: its own value, at any temperature
            ([2.0, 2.0, 2.0], 0.7, 2 + 0.7 * LN3),  # n equal actions: f + alpha ln n
        ],
    )
    def test_by_hand(self, logits, alpha, expected):
        assert soft_value(torch.tensor(logits), alpha).item() == pytest.approx(expected, abs=1e-6)

    def test_goes_to_the_maximum_as_alpha_goes_to_zero(self):
        assert soft_value(torch.tensor([1.0, -2.0, 0.5]), alpha=1e-3).item() == pytest.approx(1.0, abs=1e-6)

    @pytest.mark.parametrize("size", [1e4, -1e4, 1e30])
    def test_large_logits_do_not_overflow(self, size):
        # exp(1e4) is infinite in any float. ln 2 is below the rounding error of 1e30.
        assert soft_value(torch.tensor([size, size])).item() == pytest.approx(size + LN2, rel=1e-6)

    def test_keeps_batch_dimensions(self):
        logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
        values = soft_value(logits, 0.7)
        assert values.shape == (2, 3)
        torch.testing.assert_close(values[1, 2], soft_value(logits[1, 2], 0.7))

    def test_computes_in_float32(self):
        # bfloat16 has 8 bits: next to 100, its steps are 0.5, and ln 2 would be lost.
        value = soft_value(torch.tensor([100.0, 100.0], dtype=torch.bfloat16))
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(100 + LN2, abs=1e-4)


class TestTokenRewards:
    @pytest.mark.parametrize(
        ("form", "values", "gamma", "expected"),
        [
            # r_h = f_h - gamma V_{h+1}
            ("bellman", FINISHED, 1.0, [LN3 - LN3, LN2]),
            ("bellman", FINISHED, 0.9, [0.1 * LN3, LN2]),
            ("bellman", CUT_OFF, 1.0, [0.0, LN2 - LN5]),
            ("bellman", CUT_OFF, 0.9, [0.1 * LN3, LN2 - 0.9 * LN5]),
            # ln pi: neither gamma nor what follows matters
            ("log_prob", FINISHED, 1.0, [math.log(3 / 4), math.log(2 / 3)]),
            ("log_prob", CUT_OFF, 0.9, [math.log(3 / 4), math.log(2 / 3)]),
            # ln 3 - ln 4 + H_1 = 1/4 ln 3;  ln 2 - ln 3 + H_2 = 1/3 ln 2
            ("centered", FINISHED, 1.0, [LN3 / 4, LN2 / 3]),
            ("centered", CUT_OFF, 0.9, [LN3 / 4, LN2 / 3]),
        ],
    )
    def test_by_hand(self, form, values, gamma, expected):
        rewards = token_rewards(CHOSEN, values, gamma=gamma, form=form, entropies=ENTROPIES)
        assert rewards.tolist() == pytest.approx(expected, abs=1e-6)

    def test_alpha_by_hand(self):
        # alpha = 1/2 and f = [0, ln 3]: weights exp(2f) = [1, 9], V = ln(10)/2, pi = [.1, .9]. Token 1: alpha ln pi =
        # ln(.9)/2. Entropy: -.1 ln .1 - .9 ln .9, so centered = 1/2 (ln .9 - .1 ln .1 - .9 ln .9) = .05 (ln .9 - ln
        # .1).
        chosen, values = torch.tensor([LN3]), torch.tensor([0.5 * math.log(10), 0.0])
        entropy = torch.tensor([-0.1 * math.log(0.1) - 0.9 * math.log(0.9)])
        log_prob = token_rewards(chosen, values, alpha=0.5, form="log_prob")
        centered = token_rewards(chosen, values, alpha=0.5, form="centered", entropies=entropy)
        assert log_prob.item() == pytest.approx(0.5 * math.log(0.9), abs=1e-6)
        assert centered.item() == pytest.approx(0.05 * math.log(9), abs=1e-6)

    @pytest.mark.parametrize("form", ["bellman", "log_prob", "centered"])
    @pytest.mark.parametrize("truncation", ["terminal", "bootstrap"])
    @pytest.mark.parametrize(("alpha", "gamma"), [(1.0, 1.0), (0.7, 0.9)])
    def test_equal_to_the_reference(self, form, truncation, alpha, gamma):
        logits, actions = random_episode(seed=3, num_tokens=12)
        finished = truncation == "terminal"
        chosen, values = chosen_and_values(logits, actions, alpha, finished)
        scores = scores_from_logits(logits, actions.tolist(), alpha)
        rewards = token_rewards(chosen, values, alpha, gamma, form, torch.tensor(scores.entropies))
        expected = reference_token_rewards(scores, form, alpha, gamma, finished=False, truncation=truncation)
        assert rewards.tolist() == pytest.approx(expected, abs=1e-5)

    @settings(max_examples=50, deadline=None)
    @given(
        seed=st.integers(0, 10_000),
        num_tokens=st.integers(1, 40),
        alpha=st.floats(0.1, 5.0),
        gamma=st.floats(0.05, 1.0),
        finished=st.booleans(),
    )
    def test_identities(self, seed, num_tokens, alpha, gamma, finished):
        logits, actions = random_episode(seed, num_tokens)
        chosen, values = chosen_and_values(logits, actions, alpha, finished)
        bellman = token_rewards(chosen, values, alpha, gamma)
        log_prob = token_rewards(chosen, values, alpha, gamma, "log_prob")
        # The reward is the log-probability, shaped by the potential V.
        torch.testing.assert_close(bellman, log_prob + values[:-1] - gamma * values[1:], atol=1e-4, rtol=1e-5)
        # Discounted with gamma itself, the potential telescopes.
        weights = gamma ** torch.arange(num_tokens, dtype=torch.float64)
        left_over = values[0] - gamma**num_tokens * values[-1]
        torch.testing.assert_close(
            (weights * bellman).sum(), (weights * log_prob).sum() + left_over, atol=1e-3, rtol=1e-5
        )

    def test_centered_has_mean_zero_in_every_state(self):
        # All actions of 6 states at once: sum_a pi(a|s) r(s, a) = 0, for any logits and temperature.
        logits = 4 * torch.randn(6, 9, generator=torch.Generator().manual_seed(1))
        for alpha in (0.3, 1.0, 2.0):
            policy = torch.softmax(logits / alpha, dim=-1)
            entropies = -(policy * policy.log()).sum(-1)
            for state in range(6):
                values = torch.stack(
                    [soft_value(logits[state], alpha)] * 10
                )  # V(s) for each of the 9 actions, and V(s')
                rewards = token_rewards(
                    logits[state], values, alpha, form="centered", entropies=entropies[state].expand(9)
                )
                assert (policy[state] * rewards).sum().item() == pytest.approx(0.0, abs=1e-5)
                assert rewards.abs().max() > 0.1  # and not because all of them are 0

    def test_batch_dimensions(self):
        episodes = [chosen_and_values(*random_episode(seed, 5), 1.0, False) for seed in range(6)]
        chosen = torch.stack([chosen for chosen, _ in episodes]).view(2, 3, 5)
        values = torch.stack([values for _, values in episodes]).view(2, 3, 6)
        rewards = token_rewards(chosen, values, gamma=0.9)
        assert rewards.shape == (2, 3, 5)
        torch.testing.assert_close(rewards[1, 0], token_rewards(*episodes[3], gamma=0.9))

    def test_computes_in_float32(self):
        rewards = token_rewards(CHOSEN.bfloat16(), FINISHED.bfloat16())
        assert rewards.dtype == torch.float32


class TestGauge:
    """A constant c(s) added to the logits of a state changes nothing that the model does."""

    @settings(max_examples=30, deadline=None)
    @given(seed=st.integers(0, 10_000), alpha=st.floats(0.2, 3.0), finished=st.booleans())
    def test_moves_bellman_rewards_by_the_difference_only(self, seed, alpha, finished):
        logits, actions = random_episode(seed, num_tokens=8)
        constants = 10 * torch.randn(9, generator=torch.Generator().manual_seed(seed + 1))
        before = token_rewards(*chosen_and_values(logits, actions, alpha, finished), alpha)
        after = token_rewards(*chosen_and_values(logits + constants[:, None], actions, alpha, finished), alpha)
        # f(s_h) moves by c(s_h), V(s_{h+1}) by c(s_{h+1}); the value of the terminal state is 0 and does not move.
        following = torch.cat([constants[1:-1], torch.zeros(1)]) if finished else constants[1:]
        torch.testing.assert_close(after - before, constants[:-1] - following, atol=1e-4, rtol=1e-4)

    @settings(max_examples=30, deadline=None)
    @given(seed=st.integers(0, 10_000), form=st.sampled_from(["log_prob", "centered"]))
    def test_does_not_move_the_other_forms(self, seed, form):
        logits, actions = random_episode(seed, num_tokens=8)
        moved = logits + 10 * torch.randn(9, 1, generator=torch.Generator().manual_seed(seed + 1))
        entropies = torch.distributions.Categorical(logits=logits[:-1]).entropy()
        rewards = [
            token_rewards(*chosen_and_values(some_logits, actions, 1.0, True), form=form, entropies=entropies)
            for some_logits in (logits, moved)
        ]
        torch.testing.assert_close(rewards[1], rewards[0], atol=1e-4, rtol=1e-4)

    @settings(max_examples=30, deadline=None)
    @given(seed=st.integers(0, 10_000), aggregate=st.sampled_from(["sum", "mean"]))
    def test_does_not_move_the_default_outcome(self, seed, aggregate):
        logits, actions = random_episode(seed, num_tokens=8)
        moved = logits + 10 * torch.randn(9, 1, generator=torch.Generator().manual_seed(seed + 1))
        outcomes = []
        for some_logits in (logits, moved):
            chosen, values = chosen_and_values(some_logits, actions, 1.0, True)
            outcomes.append(outcome_reward(token_rewards(chosen, values), values[0], aggregate))
        torch.testing.assert_close(outcomes[1], outcomes[0], atol=1e-4, rtol=1e-4)


class TestOutcomeReward:
    # r = [1, 2, 4], V(s_1) = 3
    REWARDS = torch.tensor([1.0, 2.0, 4.0])

    @pytest.mark.parametrize(
        ("aggregate", "discount", "expected"),
        [
            ("sum", 0.5, 4.0),  # 7 - 3
            ("mean", 0.5, 4 / 3),
            ("discounted", 0.5, 3.0),  # 1 + 2/2 + 4/4; V(s_1) is not left out
            ("discounted", 1.0, 7.0),
        ],
    )
    def test_by_hand(self, aggregate, discount, expected):
        outcome = outcome_reward(self.REWARDS, 3.0, aggregate, discount)
        assert outcome.item() == pytest.approx(expected, rel=1e-6)

    @settings(max_examples=50, deadline=None)
    @given(seed=st.integers(0, 10_000), num_tokens=st.integers(1, 40), alpha=st.floats(0.1, 5.0))
    def test_sum_telescopes_to_the_log_probability(self, seed, num_tokens, alpha):
        logits, actions = random_episode(seed, num_tokens)
        chosen, values = chosen_and_values(logits, actions, alpha, finished=True)
        outcome = outcome_reward(token_rewards(chosen, values, alpha), values[0])
        log_policy = torch.log_softmax(logits[:-1].double() / alpha, dim=-1)
        expected = alpha * log_policy.gather(1, actions[:, None]).sum()
        assert outcome.item() == pytest.approx(expected.item(), abs=1e-3, rel=1e-5)

    def test_bootstrapped_sum_leaves_the_last_value(self):
        logits, actions = random_episode(seed=5, num_tokens=9)
        chosen, values = chosen_and_values(logits, actions, 1.0, finished=False)
        outcome = outcome_reward(token_rewards(chosen, values), values[0])
        log_prob = torch.log_softmax(logits[:-1], -1).gather(1, actions[:, None]).sum()
        torch.testing.assert_close(outcome, log_prob - values[-1], atol=1e-4, rtol=1e-5)

    def test_two_responses_are_ranked_by_probability_whatever_the_values_are(self):
        # Same prompt, hence the same V(s_1), but other values later on: the first is likelier (-2 against -3 nats)
        # though its raw values are lower.
        first = outcome_reward(torch.tensor([-12.0, 15.0]), 5.0)  # V = 5, 14: log pi = -3 + 1
        second = outcome_reward(torch.tensor([40.0, -38.0]), 5.0)
        assert (first.item(), second.item()) == (-2.0, -3.0)

    def test_long_sums_do_not_lose_small_rewards(self):
        # In float32, 1e8 + 1 == 1e8.
        assert outcome_reward(torch.tensor([1e8, 1.0, -1e8])).item() == 1.0

    def test_long_discounting_neither_underflows_nor_overflows(self):
        # Geometric series: (1 - d^n) / (1 - d) = 20 to within 1e-200, for d = 0.95 and n = 10000.
        assert outcome_reward(torch.ones(10_000), aggregate="discounted").item() == pytest.approx(20.0, rel=1e-6)

    def test_batch_dimensions(self):
        rewards = torch.arange(12.0).view(2, 2, 3)
        outcomes = outcome_reward(rewards, initial_value=torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        # 0+1+2-1, 3+4+5-2, 6+7+8-3, 9+10+11-4
        assert outcomes.tolist() == [[2.0, 10.0], [18.0, 26.0]]
        assert outcomes.dtype == torch.float32


class TestContributions:
    @pytest.mark.parametrize(
        ("values", "weights", "gamma", "keep", "tokens", "prompt", "cut_off"),
        [
            # log pi of each token
            (FINISHED, [1.0, 1.0], 1.0, False, [LN3 - LN4, LN2 - LN3], 0.0, 0.0),
            (FINISHED, [0.5, 0.5], 1.0, False, [0.5 * (LN3 - LN4), 0.5 * (LN2 - LN3)], 0.0, 0.0),
            (CUT_OFF, [1.0, 1.0], 1.0, False, [LN3 - LN4, LN2 - LN3], 0.0, -LN5),
            # f_1 - 0.9 V_2 + 0.5 (f_2 - 0.9 V_3), and V_1 stays: c_2 = 0.5 f_2 - 0.9 V_2
            (CUT_OFF, [1.0, 0.5], 0.9, True, [LN3 - LN4, 0.5 * LN2 - 0.9 * LN3], LN4, -0.45 * LN5),
        ],
    )
    def test_by_hand(self, values, weights, gamma, keep, tokens, prompt, cut_off):
        found = bellman_contributions(CHOSEN, values, torch.tensor(weights), gamma, keep)
        assert found.tokens.tolist() == pytest.approx(tokens, abs=1e-6)
        assert (found.prompt, found.cut_off) == pytest.approx((prompt, cut_off), abs=1e-6)

    @given(st.integers(0, 99), st.integers(1, 30), st.sampled_from([0.8, 1.0]), st.booleans())
    @settings(max_examples=30, deadline=None)
    @pytest.mark.parametrize("aggregate", ["sum", "mean", "discounted"])
    def test_sum_to_the_outcome(self, aggregate, seed, num_tokens, gamma, finished):
        chosen, values = chosen_and_values(*random_episode(seed, num_tokens), 1.0, finished)
        rewards = token_rewards(chosen, values, gamma=gamma)
        expected = outcome_reward(rewards, values[0], aggregate, 0.9).item()
        weights = aggregate_weights(num_tokens, aggregate, 0.9)
        found = bellman_contributions(chosen, values, weights, gamma, aggregate == "discounted")
        assert found.total == pytest.approx(expected, abs=1e-4)
        assert (found.cut_off == 0.0) == finished

    @pytest.mark.parametrize("aggregate", ["sum", "mean"])
    def test_constants_in_the_logits_do_not_move_them(self, aggregate):
        logits, actions = random_episode(3, 6)
        moved = logits + 10 * torch.randn(7, 1, generator=torch.Generator().manual_seed(1))
        weights = aggregate_weights(6, aggregate)
        before, after = (
            bellman_contributions(*chosen_and_values(f, actions, 1.0, finished=True), weights) for f in (logits, moved)
        )
        torch.testing.assert_close(before.tokens, after.tokens, atol=1e-4, rtol=0.0)


class TestBadInput:
    @pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan, math.inf])
    def test_alpha(self, alpha):
        with pytest.raises(ValueError, match=rf"`alpha` is {alpha}.*must be positive and finite"):
            soft_value(torch.zeros(3), alpha)
        with pytest.raises(ValueError, match=rf"`alpha` is {alpha}"):
            token_rewards(CHOSEN, FINISHED, alpha)

    @pytest.mark.parametrize("discount", [0.0, -0.5, 1.0001, math.nan])
    def test_discounts(self, discount):
        with pytest.raises(ValueError, match=rf"`gamma` is {discount}.*greater than 0 and at most 1"):
            token_rewards(CHOSEN, FINISHED, gamma=discount)
        with pytest.raises(ValueError, match=rf"`discount` is {discount}.*greater than 0 and at most 1"):
            outcome_reward(CHOSEN, aggregate="discounted", discount=discount)

    @pytest.mark.parametrize("shape", [(2,), (4,), (1, 3)])
    def test_shapes(self, shape):
        with pytest.raises(ValueError, match="one entry more"):
            token_rewards(CHOSEN, torch.zeros(shape))

    def test_unknown_names(self):
        with pytest.raises(ValueError, match="Unknown token reward 'q'.*bellman.*log_prob.*centered"):
            token_rewards(CHOSEN, FINISHED, form="q")
        with pytest.raises(ValueError, match="Unknown aggregate 'max'.*sum.*mean.*discounted"):
            outcome_reward(CHOSEN, aggregate="max")

    def test_centered_without_entropies(self):
        with pytest.raises(ValueError, match="needs `entropies`"):
            token_rewards(CHOSEN, FINISHED, form="centered")

    @pytest.mark.parametrize("aggregate", ["sum", "mean", "discounted"])
    def test_no_tokens(self, aggregate):
        with pytest.raises(ValueError, match="without a token has no reward"):
            outcome_reward(torch.zeros(0), aggregate=aggregate)
