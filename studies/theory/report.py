# SPDX-License-Identifier: Apache-2.0
"""
The page of `make theory`: its plots, its table, its words. Every number in it comes from `theory.json.gz`'s content.
"""

from pathlib import Path
from typing import Any


# Okabe and Ito's colours, told apart with every common colour blindness.
BASE, RL, KL_RL, BOUND = "#0072b2", "#d55e00", "#009e73", "#888888"
ERROR_OF = {
    "forked cliff": "TV",
    "learned cliff": "demonstrations",
    "drift": "log",
    "random MDP": "log",
    "random MDP, worst": "log",
    "trapdoor": "TV",
}


def exponent_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of the table of exponents."""
    headers = ["family", "error", "base model", "after RL", "RL, to the best"]
    rows = []
    for run in results["growth"]:
        fits = run["exponents"]
        rows.append(
            [
                run["family"],
                f"{run['epsilon']:g} {ERROR_OF[run['family']]}",
                _exponent(fits["base"], run["losses"]["base"]),
                _exponent(fits["rl"], run["losses"]["rl"]),
                _exponent(fits["rl_to_best"], run["losses"]["rl_to_best"]),
            ]
        )
    return headers, rows


def bound_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of the table of bounds."""
    headers = [
        "family",
        "base: εH(H+1)/2, ε in TV",
        "base: εH^1.5/2, ε in nats",
        "RL: two responses",
        "RL: 2αHε, ε in nats",
    ]
    rows = []
    for run in results["growth"]:
        shares = run["shares_of_bounds"].values()
        rows.append([run["family"], *("0" if share == 0 else f"{share:.2g}" for share in shares)])
    return headers, rows


def _exponent(fit: dict[str, float] | None, losses: list[list[float]]) -> str:
    if fit is not None:
        return f"{fit['exponent']:.2f} [{fit['low']:.2f}, {fit['high']:.2f}]"
    means = [_mean(row) for row in losses]
    if all(abs(mean) < 1e-9 for mean in means):
        return "no loss"
    if all(mean >= 0 for mean in means) and min(map(min, losses)) > -1e-9:
        return "rarely a loss"
    return "a gain" if all(mean < 0 for mean in means) else "no clear sign"


def _markdown(headers: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [headers, ["---"] * len(headers), *rows])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def write_plots(results: dict[str, Any], output: Path) -> None:
    """Writes `theory-growth.png`, `theory-sharpening.png` and `theory-preferences.png`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    style: dict[Any, Any] = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
    }
    with plt.rc_context():
        plt.rcParams.update(style)
        for name, draw, size in (
            ("growth", _draw_growth, (13, 4.4)),
            ("sharpening", _draw_sharpening, (10, 3.4)),
            ("preferences", _draw_preferences, (8, 3.2)),
        ):
            columns = {"growth": 4, "sharpening": 3, "preferences": 2}[name]
            fig, axes = plt.subplots(1, columns, figsize=size, layout="constrained")
            draw(results, axes)
            fig.savefig(output / f"theory-{name}.png", dpi=130)
            plt.close(fig)


def _draw_growth(results: dict[str, Any], axes: Any) -> None:
    runs = {run["family"]: run for run in results["growth"]}
    cliff, learned, drift, trap = (runs[name] for name in ("forked cliff", "learned cliff", "drift", "trapdoor"))

    def curve(axis: Any, run: dict[str, Any], key: str, color: str, label: str, exponent: bool = True) -> None:
        values = run["losses"][key]
        fit = run["exponents"][key] if exponent else None
        text = f"{label}: H$^{{{fit['exponent']:.2f}}}$" if fit else label
        axis.plot(run["horizons"], [_mean(row) for row in values], "o-", color=color, label=text, markersize=4)
        for horizon, row in zip(run["horizons"], values, strict=True):
            axis.plot([horizon] * len(row), row, ".", color=color, alpha=0.15, markersize=3)

    def bound(axis: Any, run: dict[str, Any], values: list[float], label: str, style: str = "--") -> None:
        axis.plot(run["horizons"], values, style, color=BOUND, linewidth=1, label=label)

    horizons, epsilon = cliff["horizons"], cliff["epsilon"]
    bound(axes[0], cliff, [epsilon * h * h / 2 for h in horizons], "$\\epsilon H^2/2$")
    curve(axes[0], cliff, "base", BASE, "base model")
    bound(axes[0], cliff, [_mean(row) for row in cliff["losses"]["guarantee"]], "guarantee after RL", ":")
    curve(axes[0], cliff, "rl", RL, "after RL")
    axes[0].set_title("forked cliff: the base model's errors compound,\nRL leaves the linear part")

    curve(axes[1], learned, "base", BASE, "base model")
    bound(axes[1], learned, [_mean(row) for row in learned["losses"]["guarantee"]], "guarantee after RL", ":")
    curve(axes[1], learned, "rl_to_best", RL, "after RL, to the best")
    axes[1].set_ylim(bottom=1e-4)
    axes[1].set_title(f"learned cliff: no error put in, but\n{learned['epsilon']:g} demonstrations to learn from")

    horizons, epsilon = drift["horizons"], drift["epsilon"]
    bound(axes[2], drift, [epsilon * h**1.5 / 2 for h in horizons], "$\\epsilon H^{1.5}/2$")
    curve(axes[2], drift, "base", BASE, "drift, base model")
    curve(axes[2], runs["random MDP, worst"], "base", "#56b4e9", "random MDPs, worst base model")
    curve(axes[2], runs["random MDP, worst"], "rl_to_best", RL, "random MDPs, after RL, to the best")
    axes[2].set_ylim(bottom=1e-4)
    axes[2].set_title("an error that is small in nats everywhere\ncompounds less")

    bound(axes[3], trap, [float(h) for h in trap["horizons"]], "all there is to lose")
    curve(axes[3], trap, "rl", RL, "after RL")
    curve(axes[3], trap, "kl_rl", KL_RL, "after RL with KL, $\\beta = \\alpha$", exponent=False)
    curve(axes[3], trap, "base", BASE, "base model")
    axes[3].set_title("trapdoor: small in total variation is not\nenough, RL goes where text is trivial")
    for axis in axes:
        axis.set(xscale="log", yscale="log", xlabel="horizon H (tokens)")
        axis.set_xticks(cliff["horizons"], [str(h) for h in cliff["horizons"]])
        axis.minorticks_off()
        # Below the axes: the curves fill them.
        axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    axes[0].set_ylabel("loss of true return")


def _draw_sharpening(results: dict[str, Any], axes: Any) -> None:
    path, rounds = results["beta_path"], results["rounds"]
    axes[0].plot(path["beta_over_alpha"], [_mean(row) for row in path["loss"]], color=KL_RL)
    for value, color, label in ((_mean(path["base"]), BASE, "base model"), (_mean(path["rl"]), RL, "RL, no penalty")):
        axes[0].axhline(value, color=color, linewidth=1, linestyle="--")
        axes[0].text(1e-5, value * 1.15, label, color=color, fontsize=8)
    axes[0].set(xscale="log", yscale="log", xlabel="KL penalty $\\beta/\\alpha$", ylabel="loss of true return")
    axes[0].set_title(f"forked cliff, H = {path['horizon']}")
    colors = (BASE, RL, KL_RL, "#cc79a7")
    for curve, color in zip(results["power"], colors, strict=False):
        values = [max(value, 1e-12) for value in curve["kl_to_power_distribution"]]
        label = f"$\\alpha$={curve['alpha']:g}, $\\beta$={curve['beta']:g}: $\\hat\\pi^{{{curve['exponent']:.3g}}}$"
        axes[1].plot(range(len(values)), values, color=color, label=label)
    axes[1].set(yscale="log", ylim=(5e-13, None), xlabel="gradient step", ylabel="KL to the power distribution (nats)")
    axes[1].legend(frameon=False, fontsize=8)
    axes[1].set_title("exact natural-gradient ascent")
    one = rounds["one_round_path"]
    axes[2].plot(
        [p["kl_to_base"] for p in one], [p["true_return"] for p in one], color=BOUND, label="one round, any $\\beta$"
    )
    axes[2].plot(
        [p["kl_to_base"] for p in rounds["with_kl"]],
        [p["true_return"] for p in rounds["with_kl"]],
        "o",
        color=KL_RL,
        label=f"rounds 1 to {len(rounds['with_kl'])}, each $\\beta$ = {rounds['beta']:g}",
    )
    axes[2].axhline(rounds["best_true_return"], color=BASE, linewidth=1, linestyle="--")
    axes[2].text(0, rounds["best_true_return"], "best policy", color=BASE, fontsize=8, va="bottom")
    axes[2].axhline(rounds["unregularised"]["true_return"][0], color=RL, linewidth=1, linestyle="--")
    axes[2].text(0, rounds["unregularised"]["true_return"][0], "RL, no penalty", color=RL, fontsize=8, va="bottom")
    axes[2].set(xlabel="KL to the base model (nats)", ylabel="true return")
    axes[2].legend(frameon=False, fontsize=8, loc="lower right")
    axes[2].set_title("a second round stays on the same path")


def _draw_preferences(results: dict[str, Any], axes: Any) -> None:
    rows = results["preferences"]["rows"]
    epsilons = sorted({row["epsilon"] for row in rows})
    for epsilon, color in zip(epsilons, (BASE, KL_RL, RL), strict=False):
        mine = [row for row in rows if row["epsilon"] == epsilon]
        for axis, key in ((axes[0], "preference"), (axes[1], "response")):
            for kind, marker in (("aligned", "s"), ("random", ".")):
                chosen = [row for row in mine if row["base"] == kind]
                xs, ys = [row["horizon"] for row in chosen], [row[f"{key}_tv"] for row in chosen]
                axis.plot(xs, ys, marker, color=color, alpha=0.8, markersize=5)
            bounds = sorted({(row["horizon"], row[f"{key}_bound"]) for row in mine})
            label = f"bound, $\\epsilon$ = {epsilon:g}"
            axis.plot(*zip(*bounds, strict=True), "--", color=color, linewidth=1, label=label)
    axes[0].set_title("preference between any two responses")
    axes[1].set_title("distribution of responses")
    for axis in axes:
        axis.set(yscale="log", xlabel="horizon H (tokens)")
    axes[0].legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("total variation\n(dots: random errors, squares: aligned)")


def write_page(results: dict[str, Any], output: Path) -> Path:
    """Writes `theory.md`, and returns its path."""
    environment = results["environment"]
    runs = {run["family"]: run for run in results["growth"]}
    cliff, learned, trap = runs["forked cliff"], runs["learned cliff"], runs["trapdoor"]
    horizons = cliff["horizons"]
    table, bounds = (_markdown(*content) for content in (exponent_rows(results), bound_rows(results)))
    checked = sum(len(row) for run in results["growth"] for row in run["losses"]["base"])
    fits = results["growth_in_epsilon"]["exponents"]
    preferences = results["preferences"]["rows"]
    irl, rounds, path = results["inverse_rl"]["rows"], results["rounds"], results["beta_path"]
    best = min(range(len(path["loss"])), key=lambda i: _mean(path["loss"][i]))
    at = horizons.index(max(horizons))
    size = _exponent(runs["random MDP"]["exponents"]["base_size"], [[1.0]])

    def mean(run: dict[str, Any], key: str) -> str:
        return f"{_mean(run['losses'][key][at]):.3g}".replace("-", "\N{MINUS SIGN}")

    text = f"""# The bounds, measured

Command: `make theory` (the same as `python -m studies.theory`). No text, no training of networks: token MDPs with
tables, solved exactly in float64; only demonstrations are sampled. Machine: {environment["machine"]}; torch {environment["torch"]}, Python
{environment["python"]}, endotrl {environment["endotrl"]}. Seeds 0 to {environment["seeds"] - 1}, for the learned cliff and the
random MDPs 0 to {2 * environment["seeds"] - 1}. Time: {environment["seconds"]:.0f} s. Numbers behind this page: `theory.json.gz`, which the command
writes beside it.

## The statements

The expert is soft-optimal at temperature $\\alpha$ for rewards in $[0, 1]$ per token, and the base model $\\hat\\pi$ imitates
it with an error $\\epsilon$. The loss of expected true return:

- **Base model, total variation** $\\le \\epsilon$ in the expert's states: at most $\\epsilon H (H + 1)/2$, which a cliff
  reaches.
- **Base model, nats**, $|\\log \\pi_E - \\log \\hat\\pi| \\le \\epsilon$ everywhere: the KL per token is at most
  $\\epsilon \\tanh(\\epsilon/2) \\le \\epsilon^2/2$, so by Pinsker's inequality the loss is at most $\\epsilon H^{{1.5}}/2$.
  The soft return loses exactly $\\alpha\\,\\mathrm{{KL}}(\\hat\\pi(y)\\|\\pi_E(y))$.
- **After RL** without regularisation, which ends at the most probable response $y_{{RL}}$ of $\\hat\\pi$, the loss to the
  best response $y^*$ is at most

  $$\\alpha \\Big[\\log \\frac{{\\pi_E(y^*)}}{{\\hat\\pi(y^*)}} - \\log \\frac{{\\pi_E(y_{{RL}})}}{{\\hat\\pi(y_{{RL}})}}\\Big] \\le 2 \\alpha H \\epsilon \\quad (\\epsilon \\text{{ in nats}}).$$

  Only the errors on two responses count. But one improbable token that leads to trivial text, of which the base model
  is sure and which the expert never enters, loses everything (the *trapdoor*).

## How the loss grows with the length of responses

Loss of expected true return against the expert that the base model imitates; horizons {horizons[0]} to {horizons[-1]}; exponent of the
horizon with the 95% interval of a bootstrap over seeds. *Error* is the largest of any state: total variation (TV) or
log-probability (log, in nats). *To the best*: loss against the best policy.
"No loss": optimal; "rarely a loss": optimal in too many MDPs to fit an exponent; "a gain": better than the expert.

{table}

![Loss against horizon, four families](theory-growth.png)

In all families but the learned cliff the error was put in, mostly where it does harm: they show that the bounds can be reached, not
that base models are as bad. The intervals say how much seeds differ, not that a curve is quite a power law.

- **Learned cliff**: the base model is what next-token prediction makes of {learned["epsilon"]:g} demonstrations of
  the expert (counts plus one): it holds a fall for possible that no demonstration shows, about once in {learned["epsilon"]:g} tokens, and knows only
  roughly which token is the best. The base model loses nearly as the square of the horizon, at H = {horizons[at]} {mean(learned, "base")}; RL,
  to the best policy, about linearly, {mean(learned, "rl_to_best")}. (It gains on the expert.)
- **Forked cliff**: built to be bad for both, one base model with one error. The base model loses as the square of the
  horizon, the policy after RL linearly: at H = {horizons[at]}, {mean(cliff, "base")} against {mean(cliff, "rl")} (a token earns about
  0.9). In the error itself both are linear (exponents {fits["base"]["exponent"]:.2f} and {fits["rl"]["exponent"]:.2f}). Slopes are a little above
  2 and 1 because the first token only chooses the road, so the cliff is H - 1 tokens long. The error is large in nats at the tokens that fall; the guarantee for RL holds all the same, because it needs the error on
  two responses only.
- **Drift.** If the error is at most ε *nats* at every token of every state, which is what the linear bound after RL needs, the base model
  cannot lose as H²: at most ε H^1.5 / 2 (above), which this family reaches up to a constant.
- **Random MDPs** are milder. A random error helps as often as it harms: the base model's loss has no clear sign, and its size
  grows with exponent {size}. With the error turned against the expert in every state, growth is nearly linear. RL gains
  on the expert, which does not always take the best token.
- **Trapdoor.** The linear bound needs the error to be small in nats, off the expert's states too. Small in total variation is
  not enough: with probability {trap["epsilon"]:g} the base model enters a room where only one token is ever said. For H = {horizons[at]} RL then
  loses {mean(trap, "rl")}, where the base model loses {mean(trap, "base")}; a KL penalty of β = α does not prevent it ({mean(trap, "kl_rl")}).

## Do the bounds hold?

The largest share of each bound that was used by any of the {checked:,} MDPs above; 1 is the bound itself, 0 no loss. Base: the loss to
the expert; in nats, the bound is H sqrt(Hε tanh(ε/2)/2), a little less than what the column says. RL: the loss to the best policy;
*two responses* is the bound from the errors on the best response and on RL's own.

{bounds}

## How much penalty

![Penalty, gradient ascent, rounds](theory-sharpening.png)

- Left: with a KL penalty the policy goes from the base model to unregularised RL. On the forked cliff the best
  penalty is in between, at β/α = {path["beta_over_alpha"][best]:.2g} (loss {_mean(path["loss"][best]):.2g}; without a penalty {_mean(path["rl"]):.2g}, base model
  {_mean(path["base"]):.2g}).
- Middle: exact natural-gradient ascent from the base model reaches the power distribution π̂^(1 + α/β): in {len(results["power"][0]["kl_to_power_distribution"]) - 1}
  steps to a KL of at most {max(c["kl_to_power_distribution"][-1] for c in results["power"]):.0e} nats, for {len(results["power"])} pairs of α and β.
- Right: **a second round reaches nothing that the first could not.** With a KL penalty, {len(rounds["with_kl"])} rounds of β = {rounds["beta"]:g}, each on the reward of the
  last one's policy, end where one round with a smaller β ends: total variation of the next-token distributions at most
  {max(r["total_variation_to_one_round"] for r in rounds["with_kl"]):.0e}. Without a penalty the second round changes nothing (true return {rounds["unregularised"]["true_return"][0]:.3f}, then
  {rounds["unregularised"]["true_return"][1]:.3f}). With entropy at the model's own temperature in place of a KL, even the first round returns the
  model: log-probabilities change by {rounds["same_temperature"]["log_prob_change"]:.0e}.

## Preferences by the endogenous reward

![Total variation against horizon](theory-preferences.png)

If the base model's log-probabilities are off by at most ε, the endogenous reward's preference between two responses (Bradley-Terry)
is off by at most tanh(αHε/2) ≤ αHε/2. All pairs of all responses of up to 7 tokens over 3: the largest difference is
{max(r["preference_tv"] / r["preference_bound"] for r in preferences if r["base"] == "random"):.0%} of the bound for random errors and {max(r["preference_tv"] / r["preference_bound"] for r in preferences if r["base"] == "aligned"):.0%} for errors that all favour one response. The
distribution of responses moves by at most sqrt(Hε tanh(ε/2)/2), about ε√H/2: at most
{max(r["response_tv"] / r["response_bound"] for r in preferences):.0%} of it is reached.

## Next-token prediction solves inverse RL

Prop. 1, by two independent routes: logits from token counts, and maximum-entropy inverse RL solved by L-BFGS on the rewards
alone. {len(irl)} data sets of {irl[0]["demonstrations"]:,} demonstrations, 3 tokens, 3 steps: log-probabilities differ by at most
{max(r["largest_log_prob_difference"] for r in irl):.0e} nats, objectives by {max(abs(r["objective_irl"] - r["objective_next_token"]) for r in irl):.0e}. (Both are
{_mean([r["log_error_to_expert"] for r in irl]):.2f} nats from the expert: the demonstrations are finite.)
"""
    target = output / "theory.md"
    target.write_text(text, encoding="utf-8")
    return target
