# SPDX-License-Identifier: Apache-2.0
"""Forecasts of small token MDPs, of which every completion is enumerated, against policies found by other means."""

import itertools

import numpy as np
import pytest

from endotrl.forecasting.policies import Objective, Samples


TOKENS, HORIZON = 3, 3
COMPLETIONS = [list(ids) for ids in itertools.product(range(TOKENS), repeat=HORIZON)]


def frozen_table(seed: int) -> dict[tuple[int, ...], np.ndarray]:
    """Log-probabilities of the next token in every state."""
    rng = np.random.default_rng(seed)
    states = [state for h in range(HORIZON) for state in itertools.product(range(TOKENS), repeat=h)]
    logits = {state: rng.normal(size=TOKENS) for state in states}
    return {state: row - np.log(np.exp(row).sum()) for state, row in logits.items()}


def log_probs_of(table: dict[tuple[int, ...], np.ndarray]) -> np.ndarray:
    return np.array([sum(table[tuple(ids[:h])][ids[h]] for h in range(HORIZON)) for ids in COMPLETIONS])


def enumeration(log_probs: np.ndarray, rewards: np.ndarray) -> Samples:
    return Samples([COMPLETIONS], [log_probs], [np.zeros(len(COMPLETIONS))], [rewards])


@pytest.fixture(scope="module")
def table():
    return frozen_table(seed=0)


@pytest.fixture(scope="module")
def log_probs(table):
    return log_probs_of(table)


class TestSequencePenalty:
    @pytest.mark.parametrize("trainer", ["rloo", "ppo"])
    def test_maximiser_of_the_objective(self, log_probs, trainer):
        """No policy has a higher E[r] - beta KL than the forecast: its gradient vanishes there."""
        rewards, beta = np.random.default_rng(1).normal(size=len(log_probs)), 0.4
        policy = enumeration(log_probs, rewards).policy(Objective(trainer), beta)
        # The objective's gradient in the policy, projected on distributions, is p (g - E_p g).
        gain = rewards - beta * (policy - log_probs)
        assert np.abs(np.exp(policy) * (gain - np.exp(policy) @ gain)).max() < 1e-12
        assert np.exp(policy).sum() == pytest.approx(1, abs=1e-12)

    def test_expectations_under_the_power_distribution(self, log_probs):
        samples, k = enumeration(log_probs, 0.7 * log_probs), 0.7 / 0.2
        policy = np.exp(samples.policy(Objective("rloo"), 0.2))
        power = np.exp(log_probs) ** (1 + k)
        power /= power.sum()
        right = np.arange(len(power)) % 4 == 0
        assert abs(samples.mean(policy, right)[0] - power[right].sum()) < 1e-12
        # THEORY: k E[l] - log E_base[exp(k l)]
        divergence = k * power @ log_probs - np.log(np.exp(log_probs) @ np.exp(k * log_probs))
        assert samples.divergence(np.log(policy))[0] == pytest.approx(divergence, abs=1e-12)

    def test_samples_estimate_the_enumeration(self, log_probs):
        rng = np.random.default_rng(2)
        proposal = np.exp(0.5 * log_probs) / np.exp(0.5 * log_probs).sum()
        drawn = rng.choice(len(proposal), size=40_000, p=proposal)
        samples = Samples(
            [[COMPLETIONS[i] for i in drawn]], [log_probs[drawn]], [np.log(proposal[drawn])], [log_probs[drawn]]
        )
        for objective in (Objective("rloo"), Objective("grpo", 4, "none"), Objective("grpo", 4, "group")):
            whole = np.exp(enumeration(log_probs, log_probs).policy(objective, 1.0))
            weights = np.exp(samples.policy(objective, 1.0))
            assert np.abs(np.bincount(drawn, weights, len(proposal)) - whole).max() < 0.02

    def test_effective_sample_size(self):
        samples = Samples([[[0], [1], [2]]], [[0.0, 0.0, -50.0]], [[0.0] * 3], [[0.0, 0.0, -50.0]])
        assert samples.effective_sizes(samples.policy(Objective("rloo"), 1.0)) == pytest.approx([2.0])


class TestTokenPenalty:
    @pytest.mark.parametrize(("beta", "size"), [(0.3, 8), (2.0, 2)])
    def test_gradient_vanishes(self, table, log_probs, beta, size):
        """
        GRPO's expected gradient in the logits of state s is visits(s) times the covariance of a's indicator with
        c Q(s, a) - beta log(pi_s / base_s).
        """
        policy = np.exp(enumeration(log_probs, log_probs).policy(Objective("grpo", size, "none"), beta))
        reached = {tuple(ids): p for ids, p in zip(COMPLETIONS, policy, strict=True)}
        for state, base in table.items():
            children = [
                sum(p for ids, p in reached.items() if ids[: len(state) + 1] == (*state, a)) for a in range(TOKENS)
            ]
            local = np.array(children) / sum(children)
            value = np.array(
                [
                    sum(
                        p * value
                        for (ids, p), value in zip(reached.items(), log_probs, strict=True)
                        if ids[: len(state) + 1] == (*state, a)
                    )
                    for a in range(TOKENS)
                ]
            ) / np.array(children)
            gain = (1 - 1 / size) * value - beta * (np.log(local) - base)
            assert np.abs(local * (gain - local @ gain)).max() < 1e-9

    def test_one_token_gives_the_power_distribution(self):
        base = np.log([0.5, 0.3, 0.2])
        samples = Samples([[[0], [1], [2]]], [base], [[0.0] * 3], [base])
        power = np.exp(base) ** (1 + (1 - 1 / 4) / 0.5)
        policy = np.exp(samples.policy(Objective("grpo", 4, "none"), 0.5))
        assert policy == pytest.approx(power / power.sum(), abs=1e-12)

    def test_equal_samples_are_one_state(self):
        base = np.log([0.5, 0.5, 0.3, 0.2])
        rows = [[0, 9], [0, 9], [1, 9], [2, 9]]
        # The first is drawn twice, at half the weight each.
        samples = Samples([rows], [base], [np.log([2.0, 2.0, 1.0, 1.0])], [base])
        single = Samples([rows[1:]], [base[1:]], [[0.0] * 3], [base[1:]])
        objective = Objective("grpo", 8, "none")
        policy = np.exp(samples.policy(objective, 0.5))
        assert [policy[0] + policy[1], *policy[2:]] == pytest.approx(np.exp(single.policy(objective, 0.5)))


class TestScaledRewards:
    def test_group_of_many_divides_beta_by_the_deviation(self):
        base = np.log([0.4, 0.35, 0.25])
        samples = Samples([[[0], [1], [2]]], [base], [[0.0] * 3], [base])
        policy = np.exp(samples.policy(Objective("grpo", 5000, "group"), 4.0))
        deviation = np.sqrt(policy @ base**2 - (policy @ base) ** 2)
        power = np.exp(base) ** (1 + 1 / (4.0 * deviation))
        assert policy == pytest.approx(power / power.sum(), abs=1e-3)

    @pytest.mark.parametrize(("size", "beta"), [(2, 1.0), (3, 0.3), (4, 1.0)])
    def test_group_against_all_groups(self, size, beta):
        """The fixed point of TRL's advantages, averaged over all groups of completions of one or two tokens."""
        rng = np.random.default_rng(size)
        first, second = (np.log(rng.dirichlet(np.ones(3), n)) for n in (1, 2))
        rows = [[2], *([a, b] for a in range(2) for b in range(3))]  # 2 ends a completion
        base = np.array([first[0, 2], *(first[0, a] + second[a, b] for a in range(2) for b in range(3))])
        base[4] = base[1]  # two have the same reward
        states = [[0], [1, 2, 3], [4, 5, 6]]  # completions by their first token: 2, 0, 1
        base -= np.log(np.exp(base).sum())
        groups = np.array(list(itertools.product(range(7), repeat=size)))
        rewards = base[groups]
        deviations = rewards - rewards.mean(1, keepdims=True)
        advantages = (deviations / (rewards.std(1, ddof=1, keepdims=True) + 1e-4))[:, 0]
        policy = np.exp(base)
        for _ in range(400):
            likely = np.prod(policy[groups[:, 1:]], axis=1)  # the others of the group, given the first
            credit = np.bincount(groups[:, 0], likely * advantages)
            target = np.zeros(7)
            tops = []
            for rows_of in states:
                local = np.exp(base[rows_of] + credit[rows_of] / beta)
                tops.append(np.log(np.exp(base[rows_of]).sum()) + local / local.sum() @ credit[rows_of] / beta)
                target[rows_of] = local / local.sum()
            top = np.exp(tops) / np.exp(tops).sum()
            for share, rows_of in zip(top, states, strict=True):
                target[rows_of] *= share
            policy = policy**0.8 * target**0.2
            policy /= policy.sum()
        samples = Samples([rows] * 20, [base] * 20, [np.zeros(7)] * 20, [base] * 20)
        found = np.exp(samples.policy(Objective("grpo", size, "group"), beta))
        assert np.abs(found - np.tile(policy, 20)).max() < 1e-6

    def test_rewards_that_are_equal_but_for_rounding(self):
        base = np.log([0.5, 0.3, 0.2])
        for rewards in ([1.0, 1.0, 1.0], [1.0, 1.0 + 1e-15, 1.0 - 1e-12]):
            samples = Samples([[[0], [1], [2]]], [base], [[0.0] * 3], [rewards])
            policy = np.exp(samples.policy(Objective("grpo", 8, "group"), 0.01))
            assert policy == pytest.approx(np.exp(base), abs=1e-5)

    def test_small_beta_runs_to_the_most_probable(self):
        base = np.log([0.4, 0.35, 0.25])
        samples = Samples([[[0], [1], [2]]], [base], [[0.0] * 3], [base])
        assert np.exp(samples.policy(Objective("grpo", 8, "group"), 0.05))[0] > 0.9999
        # With RLOO, it is the same only at a beta much smaller.
        assert np.exp(samples.policy(Objective("rloo"), 0.05))[0] < 0.95

    def test_batch_is_one_deviation_for_all_prompts(self):
        rows = [[[0], [1]], [[0], [1]]]
        bases = [np.log([0.6, 0.4]), np.log([0.9, 0.1]) - 3.0]
        samples = Samples(rows, bases, [[0.0] * 2] * 2, bases)
        weights = np.exp(samples.policy(Objective("grpo", 8, "batch"), 1.0))
        rewards = np.concatenate(bases)
        deviation = np.sqrt((weights / 2) @ rewards**2 - ((weights / 2) @ rewards) ** 2)
        exponent = 1 + (1 - 1 / 8) / (deviation + 1e-4)
        for i, base in enumerate((np.log([0.6, 0.4]), np.log([0.9, 0.1]))):
            power = np.exp(base) ** exponent
            assert weights[2 * i : 2 * i + 2] == pytest.approx(power / power.sum(), abs=1e-6)


class TestFirstGains:
    @pytest.mark.parametrize(
        ("trainer", "size", "scale"),
        [("rloo", 8, "none"), *(("grpo", size, scale) for size in (2, 8) for scale in ("none", "group", "batch"))],
    )
    def test_derivative(self, log_probs, trainer, size, scale):
        """The slope in 1 / beta at 0 of any expectation, against the forecast at two large betas."""
        samples, objective = enumeration(log_probs, log_probs), Objective(trainer, size, scale)
        right = np.arange(len(log_probs)) % 4 == 0
        gains, base = samples.first_gains(objective), np.exp(log_probs)
        step = 1e-4
        ahead, behind = (np.exp(samples.policy(objective, 1 / h)) @ right for h in (2 * step, step))
        assert base @ (gains * right) - (base @ gains) * (base @ right) == pytest.approx(
            (ahead - behind) / step, rel=2e-3
        )

    def test_many_prompts(self, log_probs):
        objective = Objective("grpo", 4, "group")
        many = Samples([COMPLETIONS] * 20, [log_probs] * 20, [np.zeros(len(log_probs))] * 20, [log_probs] * 20)
        one = enumeration(log_probs, log_probs).first_gains(objective)
        assert many.first_gains(objective) == pytest.approx(np.tile(one, 20), abs=1e-12)

    def test_covariance_is_unbiased(self):
        """On average over all ways to draw three of two equally probable completions."""
        total = 0.0
        for drawn in itertools.product([0.0, 1.0], repeat=3):
            samples = Samples([[[int(d)] for d in drawn]], [np.zeros(3)], [np.zeros(3)], [drawn])
            values = np.array(drawn)
            total += samples.covariance(np.full(3, 1 / 3), values, values)[0] / 8
        assert total == pytest.approx(0.25)  # the variance

    @pytest.mark.parametrize("grade", [0.7, 1.0])
    def test_equal_values_have_no_covariance(self, grade):
        """Not even by rounding, of which a verdict was made."""
        log_probs = np.log(np.random.default_rng(0).dirichlet(np.ones(9), 20))
        samples = Samples([[[i] for i in range(9)]] * 20, log_probs, log_probs, log_probs)
        assert not samples.covariance(np.exp(samples.base), np.full(180, grade), samples.rewards).any()


def test_impossible_settings():
    with pytest.raises(ValueError, match="`num_generations` must be at least 2, got 1"):
        Objective("grpo", 1)
    with pytest.raises(ValueError, match="trainer"):
        Objective("dpo")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='does not apply to `trainer="rloo"`'):
        Objective("rloo", scale_rewards="group")
