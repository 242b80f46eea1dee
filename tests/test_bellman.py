# SPDX-License-Identifier: Apache-2.0
"""The reward's formulas against numbers worked out by hand, and, for any episode, against the naive reference."""

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
SEEDS = st.integers(0, 10_000)
FUZZ = settings(max_examples=200, deadline=None)


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


@pytest.mark.parametrize(
    ("logits", "alpha", "expected"),
    [
        ([0.0, LN3], 1.0, LN4),  # ln(1 + 3)
        ([0.0, LN3], 0.5, 0.5 * math.log(10)),  # exp(2 ln 3) = 9, hence ln(1 + 9) / 2
        ([0.0, LN3], 2.0, 2 * math.log(1 + math.sqrt(3))),  # exp(ln 3 / 2) = sqrt 3
        ([0.7], 0.3, 0.7),  # one action: its own value, at any temperature
        ([2.0, 2.0, 2.0], 0.7, 2 + 0.7 * LN3),  # n equal actions: f + alpha ln n
        ([1.0, -2.0, 0.5], 1e-3, 1.0),  # it goes to the maximum as alpha goes to zero
        # exp(1e4) is infinite in any float. ln 2 is below the rounding error of 1e30.
        *(([size, size], 1.0, size + LN2) for size in (1e4, -1e4, 1e30)),
    ],
)
def test_soft_values_by_hand(logits, alpha, expected):
    assert soft_value(torch.tensor(logits), alpha).item() == pytest.approx(expected, rel=5e-7, abs=1e-6)


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
def test_token_rewards_by_hand(form, values, gamma, expected):
    rewards = token_rewards(CHOSEN, values, gamma=gamma, form=form, entropies=ENTROPIES)
    assert rewards.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("rewards", "initial_value", "aggregate", "discount", "expected"),
    [
        ([1.0, 2.0, 4.0], 3.0, "sum", 0.5, 4.0),  # 7 - 3
        ([1.0, 2.0, 4.0], 3.0, "mean", 0.5, 4 / 3),
        ([1.0, 2.0, 4.0], 3.0, "discounted", 0.5, 3.0),  # 1 + 2/2 + 4/4; V(s_1) is not left out
        ([1.0, 2.0, 4.0], 3.0, "discounted", 1.0, 7.0),
        ([1e8, 1.0, -1e8], 0.0, "sum", 0.5, 1.0),  # in float32, 1e8 + 1 == 1e8
        # Geometric series: (1 - d^n) / (1 - d) = 20 to within 1e-200, for d = 0.95 and n = 10000.
        ([1.0] * 10_000, 0.0, "discounted", 0.95, 20.0),
    ],
    ids=lambda value: None if isinstance(value, list) else str(value),
)
def test_outcomes_by_hand(rewards, initial_value, aggregate, discount, expected):
    outcome = outcome_reward(torch.tensor(rewards), initial_value, aggregate, discount)
    assert outcome.item() == pytest.approx(expected, rel=1e-6)


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
def test_contributions_by_hand(values, weights, gamma, keep, tokens, prompt, cut_off):
    found = bellman_contributions(CHOSEN, values, torch.tensor(weights), gamma, keep)
    assert found.tokens.tolist() == pytest.approx(tokens, abs=1e-6)
    assert (found.prompt, found.cut_off) == pytest.approx((prompt, cut_off), abs=1e-6)


@FUZZ
@given(
    seed=SEEDS,
    num_tokens=st.integers(1, 40),
    alpha=st.floats(0.1, 5.0),
    gamma=st.floats(0.05, 1.0) | st.just(1.0),
    finished=st.booleans(),
    form=st.sampled_from(["bellman", "log_prob", "centered"]),
    aggregate=st.sampled_from(["sum", "mean", "discounted"]),
)
def test_equal_to_the_reference(seed, num_tokens, alpha, gamma, finished, form, aggregate):
    logits, actions = random_episode(seed, num_tokens)
    chosen, values = chosen_and_values(logits, actions, alpha, finished)
    scores = scores_from_logits(logits, actions.tolist(), alpha)
    rewards = token_rewards(chosen, values, alpha, gamma, form, torch.tensor(scores.entropies))
    expected = reference_token_rewards(scores, form, alpha, gamma, finished, "bootstrap")
    assert rewards.tolist() == pytest.approx(expected, abs=1e-5, rel=1e-5)
    first = scores.values[0] if form == "bellman" else 0.0
    total = {
        "sum": sum(expected) - first,
        "mean": (sum(expected) - first) / num_tokens,
        "discounted": sum(0.9**h * reward for h, reward in enumerate(expected)),
    }[aggregate]
    outcome = outcome_reward(rewards, values[0] if form == "bellman" else 0.0, aggregate, 0.9).item()
    assert outcome == pytest.approx(total, abs=1e-4, rel=1e-5)
    if form == "bellman":
        weights = aggregate_weights(num_tokens, aggregate, 0.9)
        found = bellman_contributions(chosen, values, weights, gamma, aggregate == "discounted")
        assert found.total == pytest.approx(total, abs=1e-4, rel=1e-5)
        assert (found.cut_off == 0.0) == finished
    if (form, aggregate, gamma) == ("bellman", "sum", 1.0):  # it telescopes
        left_over = 0.0 if finished else scores.values[-1]
        assert outcome == pytest.approx(alpha * sum(scores.log_probs) - left_over, abs=1e-3, rel=1e-5)


@FUZZ
@given(seed=SEEDS, alpha=st.floats(0.2, 3.0), finished=st.booleans())
def test_constants_in_the_logits_move_bellman_rewards_only(seed, alpha, finished):
    """A constant c(s) added to the logits of a state changes nothing that the model does."""
    logits, actions = random_episode(seed, num_tokens=8)
    constants = 10 * torch.randn(9, generator=torch.Generator().manual_seed(seed + 1))
    entropies = torch.distributions.Categorical(logits=logits[:-1] / alpha).entropy()
    found = []
    for f in (logits, logits + constants[:, None]):
        chosen, values = chosen_and_values(f, actions, alpha, finished)
        bellman = token_rewards(chosen, values, alpha)
        unmoved = [token_rewards(chosen, values, alpha, 1.0, form, entropies) for form in ("log_prob", "centered")]
        if finished:
            unmoved += [outcome_reward(bellman, values[0], name) for name in ("sum", "mean")]
        for name in ("sum", "mean"):
            unmoved.append(bellman_contributions(chosen, values, aggregate_weights(8, name)).tokens)
        found.append((bellman, unmoved))
    (before, unmoved), (after, still_unmoved) = found
    # f(s_h) moves by c(s_h), V(s_{h+1}) by c(s_{h+1}); the value of the terminal state is 0 and does not move.
    following = torch.cat([constants[1:-1], torch.zeros(1)]) if finished else constants[1:]
    torch.testing.assert_close(after - before, constants[:-1] - following, atol=1e-4, rtol=1e-4)
    for first, second in zip(unmoved, still_unmoved, strict=True):
        torch.testing.assert_close(second, first, atol=1e-4, rtol=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_any_dtype_is_computed_in_float32(dtype):
    # bfloat16 has 8 bits: next to 100, its steps are 0.5, and ln 2 would be lost; so would 1 next to 4096 in float16.
    value = soft_value(torch.tensor([100, 100]).to(dtype))
    reward = token_rewards(torch.tensor([4096]).to(dtype), torch.tensor([7, 1]).to(dtype))
    outcome = outcome_reward(torch.tensor([4096, 1]).to(dtype))
    assert value.dtype == reward.dtype == outcome.dtype == torch.float32
    assert (reward.item(), outcome.item()) == (4095.0, 4097.0) and value.item() == pytest.approx(100 + LN2, abs=1e-4)


def test_batch_dimensions():
    logits = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    values = soft_value(logits, 0.7)
    rewards = token_rewards(logits[..., :-1, 0], values, 0.7, gamma=0.9)
    outcomes = outcome_reward(rewards, values[..., 0])
    assert (values.shape, rewards.shape, outcomes.shape) == ((2, 3, 6), (2, 3, 5), (2, 3))
    torch.testing.assert_close(values[1, 2], soft_value(logits[1, 2], 0.7))
    torch.testing.assert_close(rewards[1, 0], token_rewards(logits[1, 0, :-1, 0], values[1, 0], 0.7, gamma=0.9))
    torch.testing.assert_close(outcomes[1, 0], outcome_reward(rewards[1, 0], values[1, 0, 0]))


ONES, MORE = torch.ones(2, 3), torch.ones(2, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        *(
            (call, rf"`alpha` is {alpha}.*must be positive and finite")
            for alpha in (0.0, -1.0, math.nan, math.inf)
            for call in (lambda a=alpha: soft_value(ONES, a), lambda a=alpha: token_rewards(ONES, MORE, a))
        ),
        (lambda: soft_value(ONES, alpha="1"), "`alpha` is '1'"),
        *(
            (call, rf"{name} is {value}.*greater than 0 and at most 1")
            for value in (0.0, -0.5, 1.0001, math.nan)
            for name, call in (
                ("`gamma`", lambda v=value: token_rewards(ONES, MORE, gamma=v)),
                ("`discount`", lambda v=value: outcome_reward(ONES, aggregate="discounted", discount=v)),
            )
        ),
        *((lambda s=shape: token_rewards(CHOSEN, torch.zeros(s)), "one entry more") for shape in ((2,), (4,), (1, 3))),
        (lambda: token_rewards(ONES, ONES), "one entry more"),
        (lambda: token_rewards(torch.tensor(1.0), torch.tensor(1.0)), "one entry more"),
        # Entropies that would broadcast
        *(
            (lambda s=shape: token_rewards(ONES, MORE, form="centered", entropies=torch.ones(s)), "one entry a token")
            for shape in ((2, 1), (3,))
        ),
        (lambda: token_rewards(CHOSEN, FINISHED, form="centered"), "needs `entropies`"),
        (lambda: token_rewards(CHOSEN, FINISHED, form="q"), "Unknown token reward 'q'.*bellman.*log_prob.*centered"),
        (lambda: outcome_reward(CHOSEN, aggregate="max"), "Unknown aggregate 'max'.*sum.*mean.*discounted"),
        # A column of initial values, and many of them
        (lambda: outcome_reward(ONES, torch.ones(2, 1)), "one value a response"),
        (lambda: outcome_reward(torch.ones(3), torch.ones(5)), "one value a response"),
        *(
            (lambda r=rewards, a=aggregate: outcome_reward(r, aggregate=a), "without a token has no reward")
            for rewards in (torch.zeros(0), torch.ones(2, 0), torch.tensor(1.0))
            for aggregate in ("sum", "mean", "discounted")
        ),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
