# SPDX-License-Identifier: Apache-2.0
"""The page, the plots and the JSON of `studies.evaluation`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.measure import machine_line, write_figures
from endotrl.commands.evaluate_compare import comparison_rows
from endotrl.evaluation.intervals import (
    Array,
    Estimate,
    Means,
    Unit,
    differences,
    estimates,
    point_values,
    resampling_weights,
    verdict,
)
from endotrl.evaluation.results import compare, metrics_of, units_of
from endotrl.evaluation.tables import markdown_table


RM_BENCH = "rm-bench"
LEVELS = ("easy", "normal", "hard")
# Forms on the page; the corrected ones are compared with the form that they correct.
SHOWN = (
    "bellman.sum",
    "bellman.mean",
    "bellman.discounted=0.93",
    "style_residual:bellman.discounted=0.93",
    "log_prob.discounted=0.95",
    "style_residual:log_prob.discounted=0.95",
    "centered.mean",
    "self_certainty",
    "negative_entropy",
    "length",
    "random",
)
# Scorers of LLMBar and PRMBench alone.
JUDGES = ("judge_pairwise", "judge_pointwise", "judge_verifier")
STEPS = ("bellman.sum", "log_prob.sum", "log_prob.min", "centered.sum", "self_certainty", "relative_perplexity")
CONTROLS = ("length", "position", "random")
# First items of each part that discount and covariates were chosen on. What comes after them had no part in it.
CHOSEN_ON = {"rm-bench-chat": 60, "rm-bench-safety-response": 40, "rm-bench-safety-refuse": 32, "rm-bench-code": 32}
KEPT = (
    "benchmark", "title", "model", "model_version", "settings", "versions", "started", "updated", "tokens",
    "num_items", "cut", "main_metric", "tie_rule", "metrics", "differences", "statements", "length", "calibration", "ties",
    "details", "pass@1 by seed",
)  # fmt: skip
# What the papers report, with other and much larger models.
PUBLISHED = {
    "RM-Bench": "**Published** (Qwen2.5-7B-Instruct, https://huggingface.co/papers/2506.23235, Table 1), in per cent. EndoRM: "
    "Chat 84.7, Math 56.7, Code 53.2, Safety 91.2; easy 86.9, normal 74.4, hard 49.4; average 70.2. The same model as "
    "a judge: generative verifier 64.6, pairwise 61.4, pointwise 44.2. Skywork-Reward-Llama-3.1-8B, trained on "
    "preferences: 70.1. The paper does not say how token rewards became one number; the pattern is that of a "
    "discounted sum.",
    "dsp": "**DSP, published** (the same model and paper, Table 2), in per cent, domains under their own criterion: "
    "Academy 76.9, Business 69.2, Literature 63.0, Entertainment 72.1. Other criteria: 30.4 to 67.2. Its criteria are "
    "not public; these are ours.",
    "generation-plain": "**Published** (Qwen2.5-Math-7B, the same paper, Table 3), accuracy in per cent before and after RL on "
    "the endogenous reward: AIME24 19.0 and 20.4, AMC 42.3 and 49.4, MATH-500 63.0 and 67.4, Minerva 12.1 and 22.8, "
    "OlympiadBench 28.4 and 34.2.",
}


def write_page(
    run: dict[str, Any],
    titles: Mapping[str, str],
    commands: Mapping[str, str],
    results: Mapping[str, dict[str, Any]],
    compared: tuple[str, str],
    output: Path,
) -> Path:
    """
    Writes `results/evaluation.json.gz`, `results/evaluation.md` and plots into `images/`.

    Args:
        run (`dict`):
            From [`~benchmarks.measure.describe_run`].
        titles (`dict[str, str]`), commands (`dict[str, str]`):
            Of each run.
        results (`dict[str, dict]`):
            Contents of its `results.json`.
        compared (`tuple[str, str]`):
            Two runs, of which the paired differences are shown.
        output (`Path`):
            The folder.

    Returns:
        `Path` of the page.
    """
    folder, images = output / "results", output / "images"
    folder.mkdir(parents=True, exist_ok=True)
    images.mkdir(parents=True, exist_ok=True)
    first = next(iter(results.values()))
    tokens = sum(found["tokens"] for found in results.values())
    blocks = [
        "# How good is the reward",
        machine_line(run),
        f"Model: {first['model']} (SmolLM2-135M-Instruct, if `quickstart`), {tokens:,} tokens of responses. The "
        "papers' "
        "models have 7B parameters; the figures of a small one do not tell how they would do. Columns are explained "
        "in "
        "[eval.md](../eval.md); all scorers, metrics and intervals are in `evaluation.json.gz`.",
    ]
    parts = {name: found for name, found in results.items() if found["benchmark"] == RM_BENCH}
    if parts:
        image = images / "evaluation-rm-bench.png"
        _plot_parts({titles[name]: found for name, found in parts.items()}, image)
        blocks += ["## RM-Bench: substance against style", *_rm_bench(parts, titles), PUBLISHED["RM-Bench"]]
        blocks.append(f"![Accuracy by level, part and form]({os.path.relpath(image, folder)})")
    pairs = {name: results[name] for name in ("llmbar", "judge-bench", "dsp", "preference") if name in results}
    if pairs:
        blocks += ["## Other benchmarks", *_other_benchmarks(pairs, titles)]
        blocks += [PUBLISHED["dsp"]] if "dsp" in pairs else []
    if steps := results.get("prm-bench"):
        blocks += [f"## {titles['prm-bench']}", *_steps(steps)]
    if chosen := results.get("best-of-n"):
        values = {name: found["accuracy"]["value"] for name, found in chosen["metrics"].items()}
        blocks += [
            f"## {titles['best-of-n']}",
            f"Of {1 - values['best possible']:.0%} of the {chosen['num_items']} questions no sample is right, so no "
            "choice "
            "can be. Accuracy: " + ", ".join(f"{name} {value:.3f}" for name, value in values.items()) + ".",
        ]
    if all(name in results for name in compared):
        a, b = (results[name] for name in compared)
        blocks += [
            f"## {titles[compared[0]]} (A) against {titles[compared[1]].rpartition(', ')[2]} (B)",
            f"{a['num_items']} questions. Nothing was trained: what is compared is two ways to ask.",
            markdown_table(*comparison_rows(compare([a, b]))),
            PUBLISHED[compared[1]],
        ]
    blocks += ["## Commands", "```bash\n" + "\n".join(commands[name] for name in results) + "\n```"]
    kept = {name: {key: found[key] for key in KEPT if key in found} for name, found in results.items()}
    data = {"run": run, "commands": dict(commands), "results": kept}
    write_figures(folder / "evaluation.json.gz", data)
    page = folder / "evaluation.md"
    page.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")
    return page


def _other_benchmarks(found: Mapping[str, dict[str, Any]], titles: Mapping[str, str]) -> list[str]:
    """The main figure of each benchmark by each scorer, marked where it differs from the first one beyond noise."""
    names = [name for name in (*SHOWN, *JUDGES) if any(name in run["metrics"] for run in found.values())]
    first = names[0]
    marks = {"better": " +", "worse": " -"}

    def cell(run: Mapping[str, Any], name: str) -> str:
        main = run["main_metric"]
        if name not in run["metrics"]:
            return ""
        mark = "" if name == first else marks.get(_verdict(run, name), "")
        return f"{run['metrics'][name][main]['value']:.3f}{mark}"

    rows: list[list[object]] = [[f"`{name}`", *(cell(run, name) for run in found.values())] for name in names]
    intervals = [run["metrics"][first][run["main_metric"]] for run in found.values()]
    rows.append([f"*95% of `{first}`*", *(f"{found['low']:.3f} to {found['high']:.3f}" for found in intervals)])
    headers = [f"{titles[name]} ({run['num_items']}): {run['main_metric']}" for name, run in found.items()]
    return [
        f"Numbers of items are in brackets. + and -: better and worse than `{first}`; no mark: noise, or too few "
        "items.",
        markdown_table(["scorer", *headers], rows),
    ]


def _steps(found: Mapping[str, Any]) -> list[str]:
    """Whether wrong steps are found."""
    names = [name for name in (*STEPS, *CONTROLS) if name in found["metrics"]]
    rows: list[list[object]] = []
    for name in names:
        metrics = found["metrics"][name]
        main = metrics[found["main_metric"]]
        interval = f"{main['low']:.3f} to {main['high']:.3f}"
        word = "" if name == names[0] else _verdict(found, name)
        rows.append(
            [f"`{name}`", main["value"], interval, metrics["first error"]["value"], metrics["auc"]["value"], word]
        )
    headers = ["scorer", found["main_metric"], "95% interval", "first error", "auc", f"against {names[0]}"]
    return [f"{found['num_items']} solutions. {found['tie_rule']}", markdown_table(headers, rows)]


def _verdict(found: Mapping[str, Any], name: str) -> str:
    num_clusters = len({unit["cluster"] for unit in found["units"]})
    return verdict(_estimate(found["differences"][name][found["main_metric"]]), num_clusters)


def _rm_bench(parts: Mapping[str, dict[str, Any]], titles: Mapping[str, str]) -> list[str]:
    """Easy, normal, hard and average of each part, and what the corrections do, with intervals."""
    names = [name for name in SHOWN if all(name in found["metrics"] for found in parts.values())]
    columns = [titles[part].rpartition(", ")[2] for part in parts]

    def values_of(units: Mapping[str, Mapping[str, list[Unit]]], name: str) -> list[Mapping[str, float]]:
        return [point_values(units[part][name], metrics_of(RM_BENCH)) for part in parts]

    all_units = {part: {name: units_of(found["units"], name) for name in names} for part, found in parts.items()}
    sizes = ", ".join(f"{column} {found['num_items']}" for column, found in zip(columns, parts.values(), strict=True))
    blocks = [
        f"Easy / normal / hard / **average** ({sizes} items). Easy: the better response is in the fancier style. A "
        "reward that "
        "looks at substance has the three equal.",
        markdown_table(
            ["scorer", *columns],
            [
                [
                    f"`{name}`",
                    *(
                        " / ".join(f"{values[level]:.2f}" for level in LEVELS) + f" / **{values['average']:.3f}**"
                        for values in values_of(all_units, name)
                    ),
                ]
                for name in names
            ],
        ),
    ]
    unseen = {
        part: {name: _after(units, CHOSEN_ON.get(part, 0)) for name, units in of_part.items()}
        for part, of_part in all_units.items()
    }
    counts = [len({unit.cluster for unit in unseen[part][names[0]]}) for part in parts]
    if all(counts):
        sizes = ", ".join(f"{column} {count}" for column, count in zip(columns, counts, strict=True))
        blocks += [
            "The discount and the corrections were chosen by looking at the first items of each part. Averages on the "
            f"others alone ({sizes} items):",
            markdown_table(
                ["scorer", *columns],
                [[f"`{name}`", *(values["average"] for values in values_of(unseen, name))] for name in names],
            ),
        ]
    corrections = [name for name in names if ":" in name]
    rows: list[list[object]] = []
    for name in corrections:
        base = name.partition(":")[2]
        for column, found in zip(columns, parts.values(), strict=True):
            before, after = units_of(found["units"], base), units_of(found["units"], name)
            weights = resampling_weights(before)
            tilt = [estimates(units, _tilt, weights)["easy - hard"] for units in (before, after)]
            gap = differences(before, after, metrics_of(RM_BENCH), weights)["average"]
            rows.append([f"`{name}`", column, *map(_with_interval, tilt), _with_interval(gap)])
    if rows:
        blocks += [
            "What the corrections do to easy minus hard (0 is balanced) and to the average, with 95% intervals:",
            markdown_table(
                ["scorer", "part", "easy - hard, uncorrected", "easy - hard, corrected", "change of the average"], rows
            ),
        ]
    return blocks


def _after(units: list[Unit], num_clusters: int) -> list[Unit]:
    """Units of all items but the first ones."""
    clusters = list(dict.fromkeys(unit.cluster for unit in units))
    first = set(clusters[:num_clusters])
    return [unit for unit in units if unit.cluster not in first]


def _tilt(means: Means) -> dict[str, Array]:
    levels = metrics_of(RM_BENCH)(means)
    return {"easy - hard": levels["easy"] - levels["hard"]}


def _estimate(value: Mapping[str, float | None]) -> Estimate:
    found = [float("nan") if value[key] is None else value[key] for key in ("value", "low", "high")]
    return Estimate(*found)  # type: ignore[arg-type]


def _with_interval(estimate: Estimate) -> str:
    return f"{estimate.value:+.3f} ({estimate.low:+.3f} to {estimate.high:+.3f})"


def _plot_parts(parts: Mapping[str, dict[str, Any]], path: Path) -> None:
    """Easy, normal and hard of each form, a panel for each part: balanced is where the three points meet."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = [name for name in SHOWN if all(name in found["metrics"] for found in parts.values())][::-1]
    fig, axes = plt.subplots(
        1,
        len(parts),
        figsize=(4 + 2.4 * len(parts), 0.8 + 0.3 * len(names)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, (title, found) in zip(axes[0], parts.items(), strict=True):
        for y, name in enumerate(names):
            values = [found["metrics"][name][level]["value"] for level in LEVELS]
            axis.plot([min(values), max(values)], [y, y], color="#999999", linewidth=1.5, alpha=0.6)
        for level, color in zip(LEVELS, ("#0072b2", "#999999", "#d55e00"), strict=True):
            values = [found["metrics"][name][level]["value"] for name in names]
            axis.plot(values, range(len(names)), "o", color=color, label=level, markersize=5)
        axis.axvline(0.5, color="#999999", linestyle=":", linewidth=1)
        axis.set(xlim=(-0.02, 1.02), xlabel="accuracy")
        axis.set_title(title.rpartition(", ")[2], fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_yticks(range(len(names)), names, fontsize=8)
    handles, labels = axes[0][0].get_legend_handles_labels()
    fig.legend(handles, labels, ncols=3, frameon=False, loc="outside lower center")
    fig.savefig(path, dpi=130)
    plt.close(fig)
