# SPDX-License-Identifier: Apache-2.0
"""The page of the GPU run, and its table in the README: what was measured, and nothing else."""

import re
from pathlib import Path
from typing import Any

from benchmarks.measure import machine_line, markdown_table
from benchmarks.methods import METHODS, RIVALS


# What stands between these in the README is replaced.
BEGIN, END = "<!-- gpu table -->", "<!-- end of gpu table -->"
NOT_MEASURED = "Not measured."


def write_page(results: dict[str, Any], output: Path, readme: Path | None) -> Path:
    """
    Writes `results/gpu.md`, and the README's table.

    Args:
        results (`dict`):
            What [`benchmarks.gpu`] measured.
        output (`Path`):
            Folder of `results/`.
        readme (`Path`, *optional*):
            README with the two comments, if it is to be changed.
    """
    cells: dict[str, dict[str, dict[str, Any]]] = {"exactness": {}, "scoring": {}, "step": {}, "learning": {}}
    for key, cell in results["cells"].items():
        part, _, name = key.partition("/")
        cells[part][name] = cell
    blocks = [
        "# One GPU",
        machine_line(results["run"]),
        *(["**Tiny sizes on a CPU: the figures mean nothing.**"] if results["run"]["tiny"] else []),
        "Weights are random, in the shapes of Qwen2.5-0.5B and 7B. What is not in a table was not measured.",
        "## Exactness",
        "Log-probabilities against the same weights in float32, one row at a time, from full logits; nats per token.",
        exactness_table(cells["exactness"]),
        "## Scoring",
        _roofline(cells["scoring"]),
        scoring_table(cells["scoring"]),
        "*Bound* is the time that the useful products take at the measured matmul peak, or reading the weights once at "
        "the measured bandwidth, whichever is longer. Ratios: seconds of the other way by endotrl's. "
        + "; ".join(f"{METHODS[name].label}" for name in RIVALS)
        + ".",
        "## A GRPO step",
        "TRL's `GRPOTrainer`, one prompt of 256 tokens, 8 generations of at most 256. *Adds* is the reward call divided "
        "by the rest of the step.",
        step_table(cells["step"]),
        "## Learning",
        "The addition of `endotrl.tasks.arithmetic` with 30% wrong demonstrations: accuracy of sampled answers in "
        "training.",
        learning_table(cells["learning"]),
    ]
    page = output / "results" / "gpu.md"
    page.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")
    if readme is not None and readme.exists() and cells["scoring"]:
        text = readme.read_text(encoding="utf-8")
        table = f"{BEGIN}\n{results['run']['processor']}:\n\n{scoring_table(cells['scoring'])}\n{END}"
        replaced = re.sub(f"{BEGIN}.*?{END}", lambda match: table, text, flags=re.DOTALL)
        if replaced != text:
            readme.write_text(replaced, encoding="utf-8")
    return page


def exactness_table(cells: dict[str, dict[str, Any]]) -> str:
    """Errors of every way of scoring."""
    if not cells:
        return NOT_MEASURED
    verdict = {True: "yes", False: "**no**", None: "–"}
    return markdown_table(
        ["way", "RMS", "largest", "rounding only"],
        [[name, f"{c['rms']:.1e}", f"{c['max']:.1e}", verdict[c["right"]]] for name, c in cells.items()],
    )


def scoring_table(cells: dict[str, dict[str, Any]]) -> str:
    """Speed and memory."""
    if not cells:
        return NOT_MEASURED

    def ratio(cell: dict[str, Any], name: str) -> str:
        return f"{cell['ratios'][name]:.1f}x" if name in cell["ratios"] else "out of memory"

    def gigabytes(size: int | None) -> str:
        return "–" if size is None else f"{size / 1e9:.1f}"

    return markdown_table(
        ["workload", "s", "bound, s", "tokens/s", "of peak", "(a)", "(b)", "(c)", "GB extra", "(a)'s"],
        [
            [
                name,
                f"{c['seconds']['endotrl']:.3f}",
                f"{c['roofline_seconds']:.3f}",
                f"{c['scored_tokens_per_second']:,.0f}",
                f"{c['share_of_peak']:.0%}",
                *(ratio(c, rival) for rival in RIVALS),
                gigabytes(c["peak_bytes"]["endotrl"]),
                gigabytes(c["peak_bytes"]["padded_logits"]),
            ]
            for name, c in cells.items()
        ],
    )


def step_table(cells: dict[str, dict[str, Any]]) -> str:
    """The reward's share of a step."""
    if not cells:
        return NOT_MEASURED
    return markdown_table(
        ["placement", "step, s", "reward call, s", "adds", "extra GB"],
        [
            [
                name,
                f"{c['step_seconds']['median']:.2f}",
                f"{c['reward_seconds']['median']:.3f}",
                f"{c['added']['median']:.1%}",
                f"{c['extra_bytes'] / 1e9:.1f}",
            ]
            for name, c in cells.items()
        ],
    )


def learning_table(cells: dict[str, dict[str, Any]]) -> str:
    """Accuracy before and after, and the time that it took."""
    if not cells:
        return NOT_MEASURED
    return markdown_table(
        ["reward", "first step", "last step", "seconds", "seconds to 90%"],
        [
            [
                name,
                f"{c['first']:.0%}",
                f"{c['last']:.0%}",
                f"{c['seconds']:.0f}",
                "never" if c["seconds_to_90"] is None else f"{c['seconds_to_90']:.0f}",
            ]
            for name, c in cells.items()
        ],
    )


def _roofline(cells: dict[str, dict[str, Any]]) -> str:
    if not cells:
        return NOT_MEASURED
    cell = next(iter(cells.values()))
    return f"Measured: {cell['matmul_peak'] / 1e12:,.1f} TFLOP/s in bfloat16, {cell['bandwidth'] / 1e9:,.0f} GB/s."
