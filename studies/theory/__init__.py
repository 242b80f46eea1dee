# SPDX-License-Identifier: Apache-2.0
"""
Exact tabular token MDPs: the papers' statements, computed without sampling. `python -m studies.theory` runs them.
"""

from .families import Imitation, drift, forked_cliff, learned_cliff, perturbed, random_mdp, trapdoor
from .inverse_rl import (
    InverseRL,
    maximum_entropy_irl,
    maximum_likelihood_logits,
    next_token_objective,
    token_counts,
)
from .mdp import (
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


__all__ = [
    "TERMINAL",
    "Imitation",
    "InverseRL",
    "TokenMDP",
    "drift",
    "expected_return",
    "forked_cliff",
    "greedy_policy",
    "inverse_soft_bellman",
    "kl_divergence",
    "learned_cliff",
    "log_error",
    "maximum_entropy_irl",
    "maximum_likelihood_logits",
    "next_token_objective",
    "occupancy",
    "optimal_q",
    "perturbed",
    "policy_q",
    "policy_values",
    "prefix_tree",
    "random_mdp",
    "response_sums",
    "responses",
    "sample_responses",
    "soft_optimal_q",
    "soft_policy",
    "soft_values",
    "suboptimality",
    "token_counts",
    "total_variation",
    "trapdoor",
]
