# SPDX-License-Identifier: Apache-2.0
"""Prop. 1 of the paper: logits of maximum likelihood solve offline inverse RL."""

import math

import pytest
import torch

from studies.theory import (
    maximum_entropy_irl,
    maximum_likelihood_logits,
    next_token_objective,
    occupancy,
    prefix_tree,
    sample_responses,
    soft_optimal_q,
    soft_policy,
    token_counts,
)
from studies.theory.experiments import inverse_rl_is_next_token_prediction


def test_counts_by_hand() -> None:
    mdp = prefix_tree(num_tokens=2, horizon=2, eos=0)
    counts = token_counts(mdp, torch.tensor([[0, -1], [1, 0], [1, 1], [1, 1]]))
    # States: 0 is the prompt, 1 is "1". One response ends at once, three go on, of which one ends.
    assert counts[0, 0].tolist() == [1, 3] and counts[1, 1].tolist() == [1, 2]
    assert counts.sum() == 1 + 2 * 3
    logits = maximum_likelihood_logits(counts, alpha=2.0)
    assert soft_policy(logits, 2.0).exp()[0, 0].tolist() == pytest.approx([0.25, 0.75])
    assert logits[1, 0].tolist() == [0.0, 0.0]  # never visited
    # 2 * mean log-likelihood of a response: one has probability 1/4, one 3/4 * 1/3, two 3/4 * 2/3.
    expected = 2 * (math.log(1 / 4) + math.log(1 / 4) + 2 * math.log(1 / 2)) / 4
    assert next_token_objective(counts, logits, 2.0).item() == pytest.approx(expected)


def test_no_other_logits_are_better() -> None:
    mdp = prefix_tree(num_tokens=3, horizon=3)
    generator = torch.Generator().manual_seed(0)
    uniform = torch.zeros(mdp.shape).double().log_softmax(-1)
    counts = token_counts(mdp, sample_responses(mdp, uniform, 500, generator))
    logits = maximum_likelihood_logits(counts, 1.0)
    best = next_token_objective(counts, logits, 1.0)
    for _ in range(20):
        noise = 0.1 * torch.randn(mdp.shape, generator=generator, dtype=torch.float64)
        assert next_token_objective(counts, logits + noise, 1.0) < best
        constants = noise[..., :1]
        torch.testing.assert_close(next_token_objective(counts, logits + constants, 1.0), best)


def test_two_routes_agree() -> None:
    for row in inverse_rl_is_next_token_prediction(seeds=range(2))["rows"]:
        assert row["largest_log_prob_difference"] < 1e-5
        assert row["objective_irl"] == pytest.approx(row["objective_next_token"], abs=1e-10)
        assert row["log_error_to_expert"] > 1e-3  # not because both found the expert


def test_irl_policy_visits_what_the_demonstrations_visit() -> None:
    mdp = prefix_tree(num_tokens=2, horizon=3, eos=0)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(mdp.shape, generator=generator, dtype=torch.float64)
    demonstrations = sample_responses(mdp, logits.log_softmax(-1), 2000, generator)
    solved = maximum_entropy_irl(mdp, demonstrations, alpha=0.5)
    torch.testing.assert_close(solved.q, soft_optimal_q(mdp, solved.rewards, 0.5))
    visits = occupancy(mdp, soft_policy(solved.q, 0.5))
    torch.testing.assert_close(visits, token_counts(mdp, demonstrations) / 2000, rtol=0, atol=1e-6)


def test_unseen_token_has_no_optimum() -> None:
    mdp = prefix_tree(num_tokens=2, horizon=1)
    with pytest.raises(ValueError, match="No demonstration takes token 1 in state 0 at step 0"):
        maximum_entropy_irl(mdp, torch.tensor([[0], [0]]), alpha=1.0)
