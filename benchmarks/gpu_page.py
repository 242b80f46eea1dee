# SPDX-License-Identifier: Apache-2.0
"""The page of the GPU run, and its table in the README: what was measured, and nothing else."""

import re
from pathlib import Path
from typing import Any

from benchmarks.measure import machine_line, markdown_table
from benchmarks.methods import METHODS, RIVALS
from endotrl.scoring.attention_kernels import KERNELS


# What stands between these in the README is replaced.
BEGIN, END = "<!-- gpu table -->", "<!-- end of gpu table -->"
NOT_MEASURED = "Not measured."
# Operations per second of dense products in bfloat16, and bytes per second of the memory, by the vendor's datasheets.
DATASHEETS = {
    "NVIDIA A100-SXM4-80GB": (312e12, 2.039e12),
    "NVIDIA H100 80GB HBM3": (989e12, 3.35e12),
    "NVIDIA H100 PCIe": (756e12, 2.0e12),
    "NVIDIA H200": (989e12, 4.8e12),
}
LABELS = {
    **{name: METHODS[name].label for name in RIVALS},
    "vllm": "(d) vLLM's `prompt_logprobs`, where it is installed",
}


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
    failed = {
        part: [
            f"- Failed: {key.partition('/')[2]}: {reason}"
            for key, reason in results["failed"].items()
            if key.startswith(f"{part}/")
        ]
        for part in cells
    }
    absent = sorted(
        {f"{LABELS[rival]}: {why}" for cell in cells["scoring"].values() for rival, why in cell["absent"].items()}
    )
    halved = [
        f"{LABELS[rival]} of {name}: {rows} rows"
        for name, cell in cells["scoring"].items()
        for rival, rows in cell["batch_rows"].items()
        if rival in RIVALS and rows < cell["batch_rows"]["endotrl"]
    ]
    blocks = [
        "# One GPU",
        machine_line(results["run"]),
        *(["**Tiny sizes on a CPU: the figures mean nothing.**"] if results["run"]["tiny"] else []),
        "Weights are random, in the shapes of Qwen2.5-0.5B and 7B. What is not in a table was not measured.",
        "## Exactness",
        "Log-probabilities against the same weights in float32, one row at a time, from full logits; nats per token.",
        exactness_table(cells["exactness"]),
        *_listed(failed["exactness"]),
        "## Scoring",
        _roofline(cells["scoring"], results["run"]["processor"]),
        scoring_table(cells["scoring"]),
        *_listed(failed["scoring"]),
        "*Bound* is the time that the useful products take at the measured matmul peak (each prompt once, no padding, "
        "the "
        "head where a token is scored), or reading each weight once at the measured bandwidth, whichever is longer; "
        "*of "
        "peak* counts the same products. Ratios: seconds of the other way by endotrl's. "
        + "; ".join(LABELS.values())
        + ". –: not measured."
        + (f" In smaller micro-batches, as more did not fit: {'; '.join(halved)}." if halved else "")
        + (f" Not there: {'; '.join(absent)}." if absent else ""),
        "Attention kernels of the packed rows, in milliseconds per layer; a row is padded to a power of two only in "
        "FlexAttention.",
        kernel_table(cells["scoring"]),
        "## A GRPO step",
        "TRL's `GRPOTrainer`, one prompt of 256 tokens, 8 generations of 64. *Adds* is the reward call divided by the "
        "rest of the step. Bounds: decoding reads the weights once per token, and products run at the measured peak; "
        "of "
        "the reward, its own pass, or only the head where it rides on the reference pass.",
        step_table(cells["step"]),
        *_listed(failed["step"]),
        "## Learning",
        "The demo's addition, learned from demonstrations of which 55% are wrong: accuracy of sampled answers in "
        "training, of which a run gets 100 steps or 20 seconds.",
        learning_table(cells["learning"]),
        *_listed(failed["learning"]),
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
    rivals = [name for name in LABELS if name in RIVALS or any(name in c["ratios"] for c in cells.values())]

    def ratio(cell: dict[str, Any], name: str) -> str:
        if name in cell["ratios"]:
            return f"{cell['ratios'][name]:.1f}x" + _mark(cell, name)
        return {None: "–", "out of memory": "out of memory"}.get(cell["absent"].get(name), "failed")

    def gigabytes(cell: dict[str, Any], name: str) -> str:
        return f"{cell['peak_bytes'][name] / 1e9:.1f}" if name in cell["peak_bytes"] else "–"

    return markdown_table(
        [
            *("workload", "s", "bound, s", "tokens/s", "of peak"),
            *(LABELS[rival][:3] for rival in rivals),
            *("GB extra", "(a)'s"),
        ],
        [
            [
                name,
                f"{c['seconds']['endotrl']:.3f}" + _mark(c, "endotrl"),
                f"{c['roofline_seconds']:.3f}",
                f"{c['scored_tokens_per_second']:,.0f}",
                f"{c['share_of_peak']:.0%}",
                *(ratio(c, rival) for rival in rivals),
                gigabytes(c, "endotrl"),
                gigabytes(c, "padded_logits"),
            ]
            for name, c in cells.items()
        ],
    )


def kernel_table(cells: dict[str, dict[str, Any]]) -> str:
    """What each attention kernel took of the longest row of a workload, and which was chosen."""
    longest = {
        name: max(cell["kernels"], key=lambda kind: kind["tokens"]) for name, cell in cells.items() if cell["kernels"]
    }
    if not longest:
        return NOT_MEASURED if not cells else "One kernel on this device: block by block."

    def milliseconds(kind: dict[str, Any], kernel: str) -> str:
        if kernel not in kind["seconds"]:
            return "–"
        return "failed" if kind["seconds"][kernel] is None else f"{1e3 * kind['seconds'][kernel]:.2f}"

    return markdown_table(
        ["workload", "tokens below", *KERNELS, "chosen"],
        [
            [name, f"{kind['tokens']:,}", *(milliseconds(kind, kernel) for kernel in KERNELS), kind["chosen"]]
            for name, kind in longest.items()
        ],
    )


def step_table(cells: dict[str, dict[str, Any]]) -> str:
    """The reward's share of a step."""
    if not cells:
        return NOT_MEASURED
    return markdown_table(
        ["placement", "step, s", "bound, s", "reward call, s", "bound, s", "adds", "extra GB"],
        [
            [
                name,
                f"{c['step_seconds']['median']:.2f}" + _mark(c, "step"),
                f"{c['step_bound']:.2f}",
                f"{c['reward_seconds']['median']:.3f}" + _mark(c, "reward"),
                f"{c['reward_bound']:.3f}",
                f"{c['added']['median']:.1%}",
                f"{c['extra_bytes'] / 1e9:.1f}",
            ]
            for name, c in cells.items()
        ],
    )


def _listed(lines: list[str]) -> list[str]:
    """A block of a page, if there is anything in it."""
    return ["\n".join(lines)] if lines else []


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


def _mark(cell: dict[str, Any], name: str) -> str:
    """What shows a time that is below its bound."""
    return " **impossible**" if name in cell["impossible"] else ""


def _roofline(cells: dict[str, dict[str, Any]], card: str) -> str:
    if not cells:
        return NOT_MEASURED
    cell = next(iter(cells.values()))
    measured = cell["matmul_peak"], cell["bandwidth"]
    of = [f" ({m / best:.0%} of the datasheet's)" for m, best in zip(measured, DATASHEETS.get(card, ()), strict=False)]
    flops, memory = of or ("", "")
    return f"Measured: {measured[0] / 1e12:,.1f} TFLOP/s in bfloat16{flops}, {measured[1] / 1e9:,.0f} GB/s{memory}."
