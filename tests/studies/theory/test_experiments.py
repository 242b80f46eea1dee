# SPDX-License-Identifier: Apache-2.0
"""The families are what they say they are, the bounds hold, and the page's words are true."""

import math
import re
from pathlib import Path

import pytest
import torch

from benchmarks.measure import read_figures
from studies.theory import (
    drift,
    expected_return,
    forked_cliff,
    learned_cliff,
    log_error,
    occupancy,
    random_mdp,
    response_sums,
    responses,
    suboptimality,
    total_variation,
    trapdoor,
)
from studies.theory.__main__ import main
from studies.theory.experiments import (
    FAMILIES,
    _language_model,
    beta_path,
    fit_exponent,
    growth,
    growth_in_epsilon,
    losses,
    power_by_gradient,
    preference_total_variation,
    response_tv_bound,
    rounds,
    shares_of_bounds,
)


class TestFamilies:
    @pytest.mark.parametrize("name", FAMILIES)
    @pytest.mark.parametrize("seed", range(3))
    def test_what_all_share(self, name: str, seed: int) -> None:
        family, epsilon = FAMILIES[name]
        imitation = family(12, epsilon, seed)
        assert 0 <= imitation.rewards.min() and imitation.rewards.max() <= 1
        for policy in (imitation.expert, imitation.base):
            torch.testing.assert_close(policy.exp().sum(-1), torch.ones(policy.shape[:-1]).double())
        # The expert is soft-optimal: returns are alpha * log-probabilities plus a constant.
        some = torch.randint(imitation.mdp.shape[2], (50, 12), generator=torch.Generator().manual_seed(seed))
        some = torch.cat([some, imitation.expert[0, 0].argmax().expand(1, 12)])
        returns = response_sums(imitation.mdp, imitation.rewards, some)
        log_probs = imitation.alpha * response_sums(imitation.mdp, imitation.expert, some)
        torch.testing.assert_close(returns - returns[0], log_probs - log_probs[0])

    def test_a_learned_base_model_by_hand(self) -> None:
        """Nobody falls in the demonstrations, so all counts of a fall are the one that is added."""
        imitation = learned_cliff(6, 300, 0)
        base = imitation.base.exp()
        torch.testing.assert_close(base[:, 0, 3], torch.full((6,), 1 / 304).double())
        assert imitation.expert[:, 0, 3].exp().max() < 1e-6
        # Sampled, not put in: a standard error of 300 draws, and no more, and other seeds have others.
        error = (base - imitation.expert.exp())[:, 0, :3]
        assert 0.005 < error.abs().mean() < 0.03
        assert not torch.equal(base, learned_cliff(6, 300, 1).base.exp())

    @pytest.mark.parametrize("family", [forked_cliff, trapdoor])
    def test_error_in_total_variation(self, family) -> None:
        imitation = family(12, 1e-3, 0)
        assert total_variation(imitation.base, imitation.expert) == pytest.approx(1e-3)
        assert log_error(imitation.base, imitation.expert) > 5

    @pytest.mark.parametrize("family", [drift, random_mdp])
    def test_error_in_nats(self, family) -> None:
        imitation = family(12, 0.02, 0)
        assert log_error(imitation.base, imitation.expert) == pytest.approx(0.02)

    def test_cliff_by_hand(self) -> None:
        """Falls compound: the chance of still being on road A is a product, and a fall costs all that would follow."""
        imitation = forked_cliff(6, 0.01, 0)
        good = imitation.base[:, 1, 0].exp()
        expected = 0.0
        for road, stays in ((0, good), (1, imitation.base[:, 2, 0].exp())):
            alive = imitation.base[0, 0, road].exp().item()
            expected += alive * imitation.rewards[0, 0, road].item()
            for h in range(1, 6):
                alive *= stays[h].item()
                expected += alive * imitation.rewards[h, road + 1, 0].item()
        assert expected_return(imitation.mdp, imitation.rewards, imitation.base) == pytest.approx(expected)

    def test_rl_takes_the_other_road(self) -> None:
        imitation = forked_cliff(12, 1e-3, 0)
        visits = occupancy(imitation.mdp, imitation.after_rl()).sum(-1)
        assert visits[-1].tolist() == [0, 0, 1, 0]  # start, A, B, fallen


class TestBounds:
    @pytest.mark.parametrize("name", FAMILIES)
    @pytest.mark.parametrize("horizon", [4, 24])
    def test_guarantee_after_rl(self, name: str, horizon: int) -> None:
        family, epsilon = FAMILIES[name]
        for seed in range(5):
            found = losses(family(horizon, epsilon, seed))
            assert -1e-12 <= found["rl_to_best"] <= found["guarantee"] + 1e-12
            assert found["guarantee"] <= 2 * found["alpha"] * horizon * found["log_error"] + 1e-12
            assert found["base"] <= found["total_variation"] * horizon * (horizon + 1) / 2 + 1e-12
            assert found["base"] <= horizon * response_tv_bound(horizon, found["log_error"]) + 1e-12

    def test_preferences_and_responses(self) -> None:
        rows = preference_total_variation(seeds=range(2), horizons=(2, 5))["rows"]
        for row in rows:
            assert 0 < row["preference_tv"] <= row["preference_bound"]
            assert 0 < row["response_tv"] <= row["response_bound"]
        # Nearly reached by errors that all favour one response.
        assert max(row["preference_tv"] / row["preference_bound"] for row in rows) > 0.7

    def test_small_in_total_variation_is_not_enough(self) -> None:
        # Road: 1/4 a token. Trapdoor: once 0.001, then certain. It wins if 4^-H < 0.001, from H = 5 on.
        for horizon, falls in ((4, False), (5, True)):
            imitation = trapdoor(horizon, 1e-3, 0)
            lost = suboptimality(imitation.mdp, imitation.rewards, imitation.after_rl())
            assert (lost > 0.4 * horizon) if falls else (lost == 0.0)


class TestGrowth:
    def test_quadratic_and_linear(self) -> None:
        fits = growth("forked cliff", seeds=range(5))["exponents"]
        assert fits["base"]["exponent"] == pytest.approx(2.0, abs=0.1)
        assert fits["rl"]["exponent"] == pytest.approx(1.0, abs=0.1)
        assert fits["rl"]["high"] < 1.5 < fits["base"]["low"]

    def test_learned_from_demonstrations(self) -> None:
        fits = growth("learned cliff", seeds=range(12), horizons=(8, 32, 128))["exponents"]
        assert fits["base"]["exponent"] == pytest.approx(1.9, abs=0.1)
        assert fits["rl_to_best"]["low"] < 1.1 and fits["rl_to_best"]["high"] < fits["base"]["low"] - 0.2

    def test_shares_of_bounds(self) -> None:
        run = {
            "horizons": [2, 4],
            "losses": {
                "base": [[0.3, -1.0], [1.0, 0.0]],
                "rl_to_best": [[0.0, 0.1], [0.4, 1e-16]],
                "guarantee": [[0.0, 0.2], [0.5, 1e-17]],
                "total_variation": [[0.5, 0.5], [0.5, 0.5]],
                "log_error": [[1.0, 1.0], [1.0, 1.0]],
                "alpha": [[0.5, 0.5], [0.5, 0.5]],
            },
        }
        # Bounds for horizons 2 and 4: 1.5 and 5; H sqrt(H tanh(1/2) / 2); the guarantee; 2 and 4.
        expected = [0.2, 1 / (4 * (2 * math.tanh(0.5)) ** 0.5), 0.8, 0.1]
        assert list(shares_of_bounds(run).values()) == pytest.approx(expected)

    def test_linear_in_the_error(self) -> None:
        fits = growth_in_epsilon(seeds=range(3))["exponents"]
        assert fits["base"]["exponent"] == pytest.approx(1.0, abs=0.02)
        assert fits["rl"]["exponent"] == pytest.approx(1.0, abs=0.02)

    def test_drift_grows_with_three_halves(self) -> None:
        run = growth("drift", seeds=range(3), horizons=(8, 16, 32, 64))
        assert run["exponents"]["base"]["exponent"] == pytest.approx(1.5, abs=0.1)
        assert run["exponents"]["rl"] is None  # better than the expert

    def test_penalty_between_base_and_rl(self) -> None:
        path = beta_path(seeds=range(2), horizon=32)
        for seed in range(2):
            loss = [row[seed] for row in path["loss"]]
            assert loss[0] == pytest.approx(path["rl"][seed], rel=1e-3)
            assert 0.3 * path["base"][seed] < loss[-1] < path["base"][seed]
            assert min(loss) < 0.2 * path["rl"][seed]

    def test_fit_recovers_an_exponent(self) -> None:
        xs = [2.0, 4.0, 8.0]
        fit = fit_exponent(xs, [[0.5 * x**1.3 * factor for factor in (0.9, 1.0, 1.1)] for x in xs])
        assert fit["exponent"] == pytest.approx(1.3) and fit["low"] == pytest.approx(1.3)
        generator = torch.Generator().manual_seed(0)
        noisy = [(x**2 * torch.rand(20, generator=generator)).tolist() for x in xs]
        fit = fit_exponent(xs, noisy)
        assert fit["low"] < fit["exponent"] < fit["high"]
        assert fit_exponent(xs, [[1.0, -1.0], [1.0, 1.0], [1.0, 1.0]]) is None


class TestSharpening:
    def test_gradient_ascent_reaches_the_power_distribution(self) -> None:
        for curve in power_by_gradient(pairs=((1.0, 0.5), (0.5, 0.3)), steps=100):
            kls = curve["kl_to_power_distribution"]
            assert kls[0] > 0.5 and abs(kls[-1]) < 1e-6

    def test_gradient_vanishes_there_and_only_there(self) -> None:
        """The plain gradient, by automatic differentiation of the objective with respect to a table of logits."""
        imitation, beta = _language_model(alpha=0.7), 0.4
        mdp, reward = imitation.mdp, imitation.endogenous_reward()

        def gradient(policy: torch.Tensor) -> float:
            logits = policy.clone().requires_grad_()
            log_probs = logits.log_softmax(-1)
            gain = (occupancy(mdp, log_probs) * (reward - beta * (log_probs - imitation.base))).sum()
            return torch.autograd.grad(gain, logits)[0].abs().max().item()

        optimum = imitation.after_kl_rl(beta)
        assert gradient(optimum) < 1e-12
        assert gradient(imitation.base) > 1e-2
        every = responses(mdp)
        power = ((1 + 0.7 / beta) * response_sums(mdp, imitation.base, every)).log_softmax(0)
        torch.testing.assert_close(response_sums(mdp, optimum, every), power)

    def test_rounds(self) -> None:
        found = rounds(number=3)
        assert found["same_temperature"]["log_prob_change"] < 1e-12
        assert found["unregularised"]["total_variation_of_second_round"] == 0.0
        for row in found["with_kl"]:
            assert row["total_variation_to_one_round"] < 1e-10
        # The rounds do something: it is only nothing that one round could not do.
        returns = [found["base"]["true_return"], *(row["true_return"] for row in found["with_kl"])]
        assert returns == sorted(returns) and returns[-1] > returns[0] + 0.5
        assert found["unregularised"]["true_return"][0] < found["best_true_return"]


class TestCommand:
    def test_run(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--output", str(tmp_path), "--seeds", "2"]) == 0
        printed = capsys.readouterr().out
        table = [line for line in printed.splitlines() if not line.startswith("Page:")]
        assert all(len(line) <= 80 for line in table) and "…" not in printed
        results = read_figures(tmp_path / "theory.json.gz")
        page = (tmp_path / "theory.md").read_text(encoding="utf-8")
        fit = results["growth"][0]["exponents"]["base"]
        assert f"| forked cliff | 0.001 TV | {fit['exponent']:.2f} [{fit['low']:.2f}, {fit['high']:.2f}] |" in page
        assert all(max(run["shares_of_bounds"].values()) <= 1 + 1e-9 for run in results["growth"])
        images = re.findall(r"!\[[^]]+\]\(([^)]+)\)", page)
        assert len(images) == 3
        for image in images:
            assert (tmp_path / image).read_bytes().startswith(b"\x89PNG")
            assert (tmp_path / image).stat().st_size < 200_000
