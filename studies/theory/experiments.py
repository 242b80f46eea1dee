# SPDX-License-Identifier: Apache-2.0
"""
The papers' statements and ours as experiments: each returns plain numbers, with one entry per seed where it has seeds.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .families import Imitation, drift, forked_cliff, learned_cliff, perturbed, random_mdp, trapdoor
from .inverse_rl import maximum_entropy_irl, maximum_likelihood_logits, next_token_objective, token_counts
from .mdp import (
    TokenMDP,
    expected_return,
    greedy_policy,
    kl_divergence,
    log_error,
    occupancy,
    optimal_q,
    policy_q,
    prefix_tree,
    response_sums,
    responses,
    sample_responses,
    soft_optimal_q,
    soft_policy,
    suboptimality,
    total_variation,
)


Family = Callable[[int, float, int], Imitation]

HORIZONS = (8, 16, 32, 64, 128)
EPSILONS = (1e-4, 3e-4, 1e-3, 3e-3)
# Families with the error of their base model, or the number of demonstrations that it has learned from. In the
# quadratic regime an error compounds, but has not yet hit nearly every response: horizon * epsilon stays well below 1.
FAMILIES: dict[str, tuple[Family, float]] = {
    "forked cliff": (forked_cliff, 1e-3),
    "learned cliff": (learned_cliff, 300),
    "drift": (drift, 1e-2),
    "random MDP": (random_mdp, 0.1),
    "random MDP, worst": (lambda horizon, epsilon, seed: random_mdp(horizon, epsilon, seed, worst=True), 0.1),
    "trapdoor": (trapdoor, 1e-3),
}


def losses(imitation: Imitation) -> dict[str, float]:
    """
    What base model and policies after RL lose, and the errors that the bounds are stated in.

    `base`, `rl` and `kl_rl` (beta = alpha) are losses of true return to the expert; `rl_to_best` is that of `rl` to
    the best policy, and `guarantee` its bound.
    """
    mdp, after = imitation.mdp, imitation.after_rl()
    return {
        "base": imitation.loss_of(imitation.base),
        "rl": imitation.loss_of(after),
        "rl_to_best": suboptimality(mdp, imitation.rewards, after),
        "kl_rl": imitation.loss_of(imitation.after_kl_rl(imitation.alpha)),
        "guarantee": imitation.guarantee(),
        "total_variation": total_variation(imitation.base, imitation.expert),
        "log_error": log_error(imitation.base, imitation.expert),
        "alpha": imitation.alpha,
    }


def fit_exponent(
    xs: Sequence[float], values: Sequence[Sequence[float]], resamples: int = 2000, seed: int = 0
) -> dict[str, float] | None:
    """
    Exponent of a power law: the slope of log(mean over seeds) against log(x), least squares, with the 95% interval of
    a bootstrap over seeds.

    Args:
        xs (`Sequence[float]`):
            Horizons, or errors.
        values (`Sequence[Sequence[float]]`):
            For every x, one value per seed.
        resamples (`int`, *optional*, defaults to `2000`):
            Number of bootstrap samples.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the bootstrap.

    Returns:
        `dict[str, float]` with `exponent`, `low` and `high`; `None` where a mean is not clearly positive (in 2.5% of
        the bootstrap samples or more it is not), so that there is no power law to fit.
    """
    table = torch.tensor(values, dtype=torch.float64)  # (x, seed)
    logs = torch.tensor(xs, dtype=torch.float64).log()
    centred = logs - logs.mean()

    def slope(means: Tensor) -> Tensor:
        return (means.log() * centred).sum(-1) / (centred**2).sum()

    chosen = torch.randint(table.shape[1], (resamples, table.shape[1]), generator=torch.Generator().manual_seed(seed))
    means = table[:, chosen].mean(-1).T  # (resample, x)
    positive = (means > 1e-12).all(-1)
    if (table.mean(-1) <= 1e-12).any() or positive.double().mean() < 0.975:
        return None
    low, high = slope(means[positive]).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"exponent": slope(table.mean(-1)).item(), "low": low, "high": high}


def growth(
    name: str, seeds: Sequence[int], horizons: Sequence[int] = HORIZONS, epsilon: float | None = None
) -> dict[str, Any]:
    """Losses of a family of [`FAMILIES`] against the horizon."""
    family, default = FAMILIES[name]
    epsilon = default if epsilon is None else epsilon
    runs = [[losses(family(horizon, epsilon, seed)) for seed in seeds] for horizon in horizons]
    found = {"family": name, "epsilon": epsilon, "horizons": list(horizons), **_collected(horizons, runs)}
    return {**found, "shares_of_bounds": shares_of_bounds(found)}


def shares_of_bounds(run: dict[str, Any]) -> dict[str, float]:
    r"""
    How much of each bound is used, at most, over all horizons and seeds of a run of [`growth`]; more than 1 would
    refute it.

    `base_tv`: $\epsilon H (H + 1) / 2$, $\epsilon$ the total variation. `base_nats`:
    $H \sqrt{H \epsilon \tanh(\epsilon/2) / 2}$, $\epsilon$ the log error. `rl_two_responses`: [`Imitation.guarantee`].
    `rl_nats`: $2 \alpha H \epsilon$.
    """
    shares = {"base_tv": 0.0, "base_nats": 0.0, "rl_two_responses": 0.0, "rl_nats": 0.0}
    for i, horizon in enumerate(run["horizons"]):
        columns = (
            run["losses"][key][i]
            for key in ("base", "rl_to_best", "guarantee", "total_variation", "log_error", "alpha")
        )
        for base, rl, guarantee, tv, nats, alpha in zip(*columns, strict=True):
            bounds = {
                "base_tv": (base, tv * horizon * (horizon + 1) / 2),
                "base_nats": (base, horizon * response_tv_bound(horizon, nats)),
                "rl_two_responses": (rl, guarantee),
                "rl_nats": (rl, 2 * alpha * horizon * nats),
            }
            for key, (loss, bound) in bounds.items():
                # Rounding: what is 0 is 1e-15 in the sums.
                shares[key] = max(shares[key], loss / bound if loss > 1e-12 else 0.0)
    return shares


def growth_in_epsilon(seeds: Sequence[int], epsilons: Sequence[float] = EPSILONS, horizon: int = 32) -> dict[str, Any]:
    """Losses on the forked cliff against the error of the base model, at one horizon."""
    runs = [[losses(forked_cliff(horizon, epsilon, seed)) for seed in seeds] for epsilon in epsilons]
    return {"family": "forked cliff", "horizon": horizon, "epsilons": list(epsilons), **_collected(epsilons, runs)}


def _collected(xs: Sequence[float], runs: list[list[dict[str, float]]]) -> dict[str, Any]:
    quantities = {key: [[run[key] for run in row] for row in runs] for key in runs[0][0]}
    # A random error does as often good as harm: its size grows even where its mean does not.
    sizes = {"base_size": [[abs(value) for value in row] for row in quantities["base"]]}
    fitted = {**{key: quantities[key] for key in ("base", "rl", "rl_to_best", "kl_rl")}, **sizes}
    return {"losses": quantities, "exponents": {key: fit_exponent(xs, values) for key, values in fitted.items()}}


def beta_path(seeds: Sequence[int], horizon: int = 64, epsilon: float = 1e-3) -> dict[str, Any]:
    r"""
    Loss on the forked cliff after RL with a KL penalty, against $\beta/\alpha$: from the base model
    ($\beta \to \infty$) to RL without a penalty ($\beta \to 0$).
    """
    ratios = [10.0 ** (exponent / 4) for exponent in range(-20, 9)]
    table = []
    for ratio in ratios:
        imitations = [forked_cliff(horizon, epsilon, seed) for seed in seeds]
        table.append([imitation.loss_of(imitation.after_kl_rl(ratio * imitation.alpha)) for imitation in imitations])
    imitations = [forked_cliff(horizon, epsilon, seed) for seed in seeds]
    return {
        "horizon": horizon,
        "epsilon": epsilon,
        "beta_over_alpha": ratios,
        "loss": table,
        "base": [imitation.loss_of(imitation.base) for imitation in imitations],
        "rl": [imitation.loss_of(imitation.after_rl()) for imitation in imitations],
    }


def preference_total_variation(
    seeds: Sequence[int],
    horizons: Sequence[int] = (2, 3, 4, 5, 6, 7),
    epsilons: Sequence[float] = (0.01, 0.1, 0.5),
    alpha: float = 1.0,
) -> dict[str, Any]:
    r"""
    Largest difference of any preference between two responses, judged by the true and by the endogenous reward
    (Bradley-Terry), against its bound $\tanh(\alpha H \epsilon / 2) \le \alpha H \epsilon / 2$; $\epsilon$ is the log
    error. (A difference of returns is wrong by $2 \alpha H \epsilon$ at most.)

    Two base models: one with random errors, and one whose errors all favour one response over another that is as good.
    """
    rows = []
    for horizon in horizons:
        mdp = prefix_tree(num_tokens=3, horizon=horizon)
        all_responses = responses(mdp)
        for epsilon in epsilons:
            for seed in seeds:
                generator = torch.Generator().manual_seed(seed)
                rewards = torch.rand(mdp.shape, generator=generator, dtype=torch.float64)
                expert = soft_policy(soft_optimal_q(mdp, rewards, alpha), alpha)
                direction = 2 * torch.rand(mdp.shape, generator=generator, dtype=torch.float64) - 1
                random = Imitation(mdp, rewards, alpha, expert, perturbed(expert, direction, epsilon))
                rows.append(_preferences("random", random, all_responses, horizon, epsilon))
            rows.append(_preferences("aligned", _aligned(mdp, alpha, epsilon), all_responses, horizon, epsilon))
    return {"alpha": alpha, "rows": rows}


def _aligned(mdp: TokenMDP, alpha: float, epsilon: float) -> Imitation:
    """All responses are equally good; the base model's errors favour 0 0 0 ... and disfavour 1 1 1 ..."""
    expert = torch.full(mdp.shape, 1 / 3, dtype=torch.float64).log()
    direction = torch.zeros(mdp.shape, dtype=torch.float64)
    for token, sign in ((0, 1.0), (1, -1.0)):
        path = torch.full(mdp.shape, -torch.inf, dtype=torch.float64)
        path[..., token] = 0.0
        on_path = occupancy(mdp, path).sum(-1) > 0
        direction[on_path] += sign * torch.nn.functional.one_hot(torch.tensor(token), 3)
    return Imitation(
        mdp, torch.zeros(mdp.shape, dtype=torch.float64), alpha, expert, perturbed(expert, direction, epsilon)
    )


def _preferences(
    kind: str, imitation: Imitation, all_responses: Tensor, horizon: int, epsilon: float
) -> dict[str, float | str]:
    mdp = imitation.mdp
    true = response_sums(mdp, imitation.rewards, all_responses)
    endogenous = response_sums(mdp, imitation.endogenous_reward(), all_responses)
    log_probs = [response_sums(mdp, policy, all_responses) for policy in (imitation.expert, imitation.base)]
    # Row by row: all pairs at once would need memory for (3 ** H) ** 2 numbers.
    largest = max(
        ((t - true).sigmoid() - (e - endogenous).sigmoid()).abs().max().item()
        for t, e in zip(true, endogenous, strict=True)
    )
    return {
        "base": kind,
        "horizon": horizon,
        "epsilon": epsilon,
        "preference_tv": largest,
        "preference_bound": math.tanh(imitation.alpha * horizon * epsilon / 2),
        "response_tv": 0.5 * (log_probs[0].exp() - log_probs[1].exp()).abs().sum().item(),
        "response_bound": response_tv_bound(horizon, epsilon),
    }


def response_tv_bound(horizon: int, epsilon: float) -> float:
    r"""
    Bound of the total variation of two distributions of responses whose log error is $\epsilon$ in every state:
    $\sqrt{H \epsilon \tanh(\epsilon/2) / 2}$, about $\epsilon \sqrt H / 2$. By Pinsker's inequality, and because
    $KL(p\|q) \le \epsilon \tanh(\epsilon/2)$ where $|\log p - \log q| \le \epsilon$.
    """
    return (horizon * epsilon * math.tanh(epsilon / 2) / 2) ** 0.5


def inverse_rl_is_next_token_prediction(
    seeds: Sequence[int], alphas: Sequence[float] = (1.0, 0.5), number: int = 10_000
) -> dict[str, Any]:
    """Prop. 1: maximum-entropy inverse RL by gradients on rewards, against logits that maximise the likelihood."""
    mdp = prefix_tree(num_tokens=3, horizon=3)
    rows = []
    for alpha in alphas:
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            rewards = torch.rand(mdp.shape, generator=generator, dtype=torch.float64)
            expert = soft_policy(soft_optimal_q(mdp, rewards, alpha), alpha)
            demonstrations = sample_responses(mdp, expert, number, generator)
            counts = token_counts(mdp, demonstrations)
            logits = maximum_likelihood_logits(counts, alpha)
            solved = maximum_entropy_irl(mdp, demonstrations, alpha)
            visited = counts.sum(-1) > 0
            difference = soft_policy(solved.q, alpha)[visited] - soft_policy(logits, alpha)[visited]
            rows.append(
                {
                    "seed": seed,
                    "alpha": alpha,
                    "demonstrations": number,
                    "objective_irl": solved.objective,
                    "objective_next_token": next_token_objective(counts, logits, alpha).item(),
                    "largest_log_prob_difference": difference.abs().max().item(),
                    "log_error_to_expert": (soft_policy(logits, alpha) - expert)[visited].abs().max().item(),
                }
            )
    return {"rows": rows}


def _language_model(alpha: float, seed: int = 0) -> Imitation:
    """A base model of 4 tokens, one of them EOS, and responses of up to 5 tokens: an expert with random errors."""
    mdp = prefix_tree(num_tokens=4, horizon=5, eos=0)
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.rand(mdp.shape, generator=generator, dtype=torch.float64)
    rewards[..., 0] *= (
        mdp.horizon - torch.arange(mdp.horizon, dtype=torch.float64)[:, None]
    )  # so that short ones can win
    expert = soft_policy(soft_optimal_q(mdp, rewards, alpha), alpha)
    direction = 2 * torch.rand(mdp.shape, generator=generator, dtype=torch.float64) - 1
    return Imitation(mdp, rewards, alpha, expert, perturbed(expert, direction, 1.0))


def power_by_gradient(
    pairs: Sequence[tuple[float, float]] = ((1.0, 1.0), (1.0, 0.3), (0.5, 0.5), (0.5, 0.1)),
    steps: int = 300,
    step_size: float = 0.5,
) -> Iterator[dict[str, Any]]:
    r"""
    Exact natural-gradient ascent on $E_\pi[r] - \beta KL(\pi \| \hat\pi)$, $r$ the endogenous reward, from the base
    model: before every step, its KL in nats to the power distribution $\hat\pi^{1+\alpha/\beta}$.

    For a table of logits the natural gradient is the advantage: $\log \pi \leftarrow \log \pi + \eta Q_\pi$,
    normalised.
    """
    for alpha, beta in pairs:
        imitation = _language_model(alpha)
        mdp, base, reward = imitation.mdp, imitation.base, imitation.endogenous_reward()
        all_responses = responses(mdp)
        target = ((1 + alpha / beta) * response_sums(mdp, base, all_responses)).log_softmax(0)
        policy, curve = base, []
        for _ in range(steps + 1):
            log_probs = response_sums(mdp, policy, all_responses)
            curve.append((log_probs.exp() * (log_probs - target)).sum().item())
            policy = (policy + step_size * policy_q(mdp, reward - beta * (policy - base), policy)).log_softmax(-1)
        yield {"alpha": alpha, "beta": beta, "exponent": 1 + alpha / beta, "kl_to_power_distribution": curve}


def rounds(number: int = 5, alpha: float = 1.0, beta: float = 2.0, seed: int = 0) -> dict[str, Any]:
    r"""
    RL on the endogenous reward, again and again, each round with the policy of the last one as the frozen model.

    - With entropy at the model's own temperature $\alpha$ instead of a KL: a round returns the frozen model unchanged.
    - Without regularisation: the first round ends at the most probable response, the second changes nothing.
    - With a KL penalty: round $k$ ends at the exponent $(1 + \alpha/\beta)^k$, where one round with the penalty
      $\alpha / ((1 + \alpha/\beta)^k - 1)$ ends too.
    """
    imitation = _language_model(alpha, seed)
    mdp, base = imitation.mdp, imitation.base

    def place(policy: Tensor) -> dict[str, float]:
        return {
            "true_return": expected_return(mdp, imitation.rewards, policy),
            "kl_to_base": kl_divergence(mdp, policy, base),
        }

    entropy = soft_policy(soft_optimal_q(mdp, imitation.endogenous_reward(), alpha), alpha)
    greedy = imitation.after_rl()
    greedy_again = greedy_policy(optimal_q(mdp, alpha * greedy))

    policy, iterated = base, []
    for k in range(1, number + 1):
        policy = Imitation(mdp, imitation.rewards, alpha, imitation.expert, policy).after_kl_rl(beta)
        exponent = (1 + alpha / beta) ** k
        one_round = imitation.after_kl_rl(alpha / (exponent - 1))
        iterated.append(
            {
                "round": k,
                "exponent": exponent,
                **place(policy),
                "total_variation_to_one_round": total_variation(policy, one_round),
            }
        )
    exponents = [10 ** (i / 20) for i in range(1, 61)]
    path = [{"exponent": k, **place(imitation.after_kl_rl(alpha / (k - 1)))} for k in exponents]
    return {
        "alpha": alpha,
        "beta": beta,
        "base": place(base),
        "same_temperature": {"log_prob_change": log_error(entropy, base)},
        "unregularised": {
            "true_return": [expected_return(mdp, imitation.rewards, p) for p in (greedy, greedy_again)],
            "total_variation_of_second_round": total_variation(greedy, greedy_again),
        },
        "with_kl": iterated,
        "one_round_path": path,
        "best_true_return": expected_return(mdp, imitation.rewards, greedy_policy(optimal_q(mdp, imitation.rewards))),
    }
