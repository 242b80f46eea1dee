# SPDX-License-Identifier: Apache-2.0
"""The page, the plots and the JSON of the scoring benchmark."""

import json
import os
from pathlib import Path
from typing import Any

from benchmarks.measure import machine_line, markdown_table
from benchmarks.methods import METHODS, RIVALS


COLORS = {"padded_logits": "#c2571a", "fused_head": "#dd9a3c", "reward_model": "#8a8a8a", "endotrl": "#1f6fb4"}


def write_page(results: dict[str, Any], output: Path) -> Path:
    """
    Writes `results/scoring.json`, `results/scoring.md` and two plots into `images/`.

    Returns:
        `Path` of the page.
    """
    folder, images = output / "results", output / "images"
    folder.mkdir(parents=True, exist_ok=True)
    images.mkdir(parents=True, exist_ok=True)
    (folder / "scoring.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    _plot_ratios(results, images / "scoring-ratios.png")
    _plot_sweeps(results, images / "scoring-sweeps.png")
    page = folder / "scoring.md"
    page.write_text(_page(results, os.path.relpath(images, folder)), encoding="utf-8")
    return page


def _page(results: dict[str, Any], images: str) -> str:
    settings, quick = results["settings"], results["settings"]["quick"]
    targets = results["targets"]
    num_reached = sum(target["reached"] for target in targets)
    blocks = [
        "# Speed and memory of scoring",
        machine_line(results["run"]),
        *(["**A quick run with tiny sizes: its figures mean nothing.**"] if quick else []),
        f"Model: {settings['model']} in {settings['dtype']} on {settings['device']}; the same token ids for all, "
        f"{settings['rounds']} rounds in changing order. A ratio is a method's time divided by endotrl's of the same "
        "round (median and range).",
        f"{num_reached} of {len(targets)} targets are reached:",
        markdown_table(
            ["target", "wanted", "measured", "reached"],
            [[t["name"], t["wanted"], t["measured"], "yes" if t["reached"] else "**no**"] for t in targets],
        ),
        f"![How many times as long as endotrl each method takes]({images}/scoring-ratios.png)",
        "## Methods",
        "- (a) A batch padded on the right, full logits, `.float()`, `log_softmax`, `gather`.\n"
        "- (b) The same batch through TRL's fused LM head (`trl.trainer.add_fused_lm_head`), which without Triton (on "
        "a "
        "CPU) computes all positions.\n"
        "- (c) `AutoModelForSequenceClassification` of the same checkpoint, as TRL's `GRPOTrainer` calls a reward "
        "model: no LM head, and another result.\n"
        "- endotrl: `FrozenScorer`, without and with the entropies that the reward logs in a trainer.\n\n"
        "(a), (b) and (c) get the completions of one prompt at a time.",
        "## Workloads",
    ]
    for name, entry in results["workloads"].items():
        blocks += [_workload_text(name, entry), _workload_table(entry)]
    how = {entry["memory_measured_by"] for entry in results["workloads"].values()}
    blocks += [
        "Extra memory: peak during one pass in a fresh process, above that of the loaded model "
        f"({', '.join(sorted(how))}). Useful FLOPs: matrix products of the tokens that must be run (every prompt "
        "once, no padding), what each attends to, and the LM head at the scored positions. Peak: the fastest of 20 "
        f"products of two square matrices of {results['matmul_size']} rows in {settings['dtype']}, "
        f"{results['matmul_peak'] / 1e9:,.0f} GFLOP/s.",
        "## Accuracy",
        f"Errors in nats of {results['accuracy']['tokens']:,} tokens in {results['accuracy']['rewards']} completions, "
        "against the same weights in float32, each sequence alone. The reward is the sum over a completion.",
        markdown_table(
            ["method", "token, mean", "RMS", "max", "reward, mean", "RMS", "max"],
            [
                [METHODS[name].label, *(_error(value) for value in errors.values())]
                for name, errors in results["accuracy"]["errors"].items()
            ],
        ),
        "## Sweeps",
        "endotrl against (a), by default with 8 completions of 64 tokens after a prompt of 256. The vocabulary's "
        "sweep "
        "has a random model of 2 layers and width 128, and prompts of 64.",
        f"![Time over completions per prompt, prompt length and vocabulary]({images}/scoring-sweeps.png)",
        " ".join(
            f"{name.capitalize()}: {points[0]['ratio']['median']:.1f} times as fast at {points[0]['x']:,}, "
            f"{points[-1]['ratio']['median']:.1f} at {points[-1]['x']:,}."
            for name, points in results["sweeps"].items()
        ),
    ]
    if "scale" in results:
        blocks += _scale_blocks(results["scale"])
    return "\n\n".join(blocks) + "\n"


def _workload_text(name: str, entry: dict[str, Any]) -> str:
    return (
        f"**{name}**: {entry['description']}. {entry['useful_tokens']:,} tokens must be run, "
        f"{entry['padded_tokens']:,} are in the padded batches; {entry['scored_tokens']:,} are scored. endotrl does "
        f"{entry['share_of_peak']:.0%} of the matrix-product peak."
    )


def _workload_table(entry: dict[str, Any]) -> str:
    return markdown_table(
        ["method", "seconds", "ratio", "range", "extra memory, MB"],
        [
            [
                METHODS[name].label,
                f"{m['seconds']['median']:.3f}",
                f"{m['ratio']['median']:.2f}",
                f"{m['ratio']['min']:.2f} to {m['ratio']['max']:.2f}",
                f"{m['peak_extra_bytes'] / 1e6:,.0f}",
            ]
            for name, m in entry["methods"].items()
        ],
    )


def _scale_blocks(scale: dict[str, Any]) -> list[str]:
    few, many = scale["many"]
    growth = (many["peak_extra_bytes"] - few["peak_extra_bytes"]) / (many["completions"] - few["completions"])
    long = scale["long"]
    return [
        "## Scale",
        "Ragged completions of 5 to 40 tokens, 8 per prompt of 16, in one call (random model, vocabulary of 8,192):",
        "; ".join(
            f"{m['completions']:,} completions take {m['peak_extra_bytes'] / 1e6:,.1f} MB" for m in scale["many"]
        )
        + f", {growth / 1e3:,.1f} kB for each one more, its result included. One completion of {long['tokens']:,} "
        f"tokens with the model above takes {long['peak_extra_bytes'] / 1e6:,.0f} MB; its full logits in float32 "
        "alone "
        f"would be {long['full_logits_bytes'] / 1e6:,.0f} MB.",
    ]


def _error(value: float) -> str:
    return f"{value:.1e}" if value < 1e-3 else f"{value:.4f}"


def _plot_ratios(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    names = list(results["workloads"])
    fig, (speed, memory) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for i, rival in enumerate(RIVALS):
        ratios = [results["workloads"][name]["methods"][rival]["ratio"] for name in names]
        medians = [r["median"] for r in ratios]
        spans = [[m - r["min"] for m, r in zip(medians, ratios, strict=True)]]
        spans.append([r["max"] - m for m, r in zip(medians, ratios, strict=True)])
        xs = [x + 0.27 * (i - 1) for x in range(len(names))]
        bars = speed.bar(xs, medians, 0.25, yerr=spans, color=COLORS[rival], label=METHODS[rival].label)
        speed.bar_label(bars, [f"{m:.1f}" for m in medians], padding=2, fontsize=8)
    speed.axhline(1, color=COLORS["endotrl"], label="endotrl")
    speed.set(xticks=range(len(names)), xticklabels=names, ylabel="time, endotrl = 1", title="Time")
    for i, method in enumerate((*RIVALS, "endotrl")):
        sizes = [results["workloads"][name]["methods"][method]["peak_extra_bytes"] / 1e6 for name in names]
        memory.bar([x + 0.2 * (i - 1.5) for x in range(len(names))], sizes, 0.18, color=COLORS[method])
    fig.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    memory.set(
        xticks=range(len(names)), xticklabels=names, ylabel="MB above the model", yscale="log", title="Peak memory"
    )
    fig.savefig(path, dpi=120)
    plt.close(fig)


def _plot_sweeps(results: dict[str, Any], path: Path) -> None:
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(1, len(results["sweeps"]), figsize=(9, 3.2), layout="constrained")
    for axis, (name, points) in zip(axes, results["sweeps"].items(), strict=True):
        xs = [p["x"] for p in points]
        for method in ("padded_logits", "endotrl"):
            seconds = [p["seconds"][method] for p in points]
            axis.plot(xs, seconds, marker="o", markersize=4, color=COLORS[method], label=METHODS[method].label)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(xs, [f"{x // 1024}k" if x >= 4096 else str(x) for x in xs])
        axis.set(xlabel=name)
    axes[0].set_ylabel("seconds")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    fig.savefig(path, dpi=120)
    plt.close(fig)
