# SPDX-License-Identifier: Apache-2.0
"""
Speed of `endotrl eval rm-bench` with all single-pass scorers, against the naive reward alone.

    python -m benchmarks.evaluation_speed --data RM-Bench/data/chat_filtered.json    # --prompts 16: so many, drawn

- naive: what a user of TRL writes to get one number per response. The six responses of a prompt as one batch, padded on
  the right, full logits, `.float()`, `log_softmax`, `gather`, the sum over the response. Nothing is kept.
- endotrl: all scorers of the sets `single-pass` and `controls`, token statistics and scores written to disk.
- endotrl, to the end: the same, then metrics with bootstrap intervals, differences, and the HTML page.

All begin with the text and hold their model loaded. In every round each runs once, beginning with another one each
time. Writes results/evaluation_speed.{md,json}.
"""

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoTokenizer

from benchmarks.measure import add_common_options, alternate, describe_run, machine_line, markdown_table, spread
from benchmarks.methods import PaddedLogits
from endotrl.commands.evaluate import load_items
from endotrl.evaluation.benchmarks import BENCHMARKS
from endotrl.evaluation.engine import Engine
from endotrl.evaluation.examples_page import examples_of
from endotrl.evaluation.items import Item
from endotrl.evaluation.results import evaluate
from endotrl.evaluation.results_page import benchmark_sections, report_page
from endotrl.evaluation.run_folder import RunFolder
from endotrl.evaluation.scorers import DEFAULT, expand_names, make_scorer, score_items
from endotrl.frozen.names import resolve_model
from endotrl.frozen.own_copy import OwnCopy
from endotrl.rendering.messages import as_messages
from endotrl.reporting import terminal_table
from endotrl.runs.record import now, versions


NAIVE, OURS, WHOLE = "naive reward alone", "endotrl, all single-pass scorers", "endotrl, to the end"
# bellman.sum of either must be the same number up to the rounding of the dtype, in nats for a whole response.
LARGEST_DIFFERENCE = {"float32": 0.05, "bfloat16": 12.0}


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, and writes page and JSON."""
    args = make_parser().parse_args(argv)
    path = resolve_model(args.model)
    items = load_items(BENCHMARKS["rm-bench"], str(args.data), None)
    if args.quick:
        args.prompts, args.rounds = 2, 1
    if args.prompts is not None:
        items = random.Random(args.seed).sample(items, min(args.prompts, len(items)))
    names = expand_names(DEFAULT, steps=False)
    dtype = getattr(torch, args.dtype)
    tokenizer = AutoTokenizer.from_pretrained(path)
    engine = Engine(OwnCopy(path, dtype, args.device), tokenizer)
    with engine.placement.active():
        pass  # loads the weights now
    padded = PaddedLogits(path, dtype, args.device)

    def naive() -> list[list[float]]:
        return [naive_rewards(item, engine, padded) for item in items]

    def ours(page: bool = False) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as scratch:
            folder = RunFolder(scratch)
            records = score_items(items, names, folder, lambda: engine, lambda name, e: make_scorer(name, e))
            if page:
                write_report(items, names, records, folder, engine)
            return records

    largest = check(naive(), ours(), items, args.dtype)
    runs: dict[str, Callable[[], object]] = {NAIVE: naive, OURS: ours, WHOLE: lambda: ours(page=True)}
    seconds = alternate(runs, args.rounds, args.device, "RM-Bench")
    ratios = {
        name: spread([own / base for own, base in zip(seconds[name], seconds[NAIVE], strict=True)]) for name in seconds
    }
    results = {
        "run": describe_run("benchmarks.evaluation_speed", args.device, shown_arguments(args)),
        "settings": {"model": args.model, "dtype": args.dtype, "device": args.device, "prompts": len(items)}
        | {"responses": sum(len(item.responses) for item in items), "scorers": names, "rounds": args.rounds},
        "seconds": seconds,
        "ratios": ratios,
        "largest difference": largest,
    }
    write(results, args.output / "results")
    rows = [[name, f"{spread(seconds[name])['median']:.2f}", f"{ratios[name]['median']:.2f}"] for name in runs]
    Console().print(terminal_table(["method", "seconds", "of naive"], rows, f"{len(items)} prompts of RM-Bench"))
    return 0


@torch.inference_mode()
def naive_rewards(item: Item, engine: Engine, padded: PaddedLogits) -> list[float]:
    """Sums of log-probabilities of an item's responses, from texts."""
    rows = engine.renderer.render([as_messages(item.prompt, "user")] * len(item.responses), list(item.responses))
    return [log_probs.double().sum().item() for log_probs in padded([rows])]


def write_report(
    items: Sequence[Item], names: Sequence[str], records: dict[str, Any], folder: RunFolder, engine: Engine
) -> None:
    """What the command does after scoring."""
    results = {
        "benchmark": "rm-bench",
        "model": "model",
        "data": "data",
        "settings": {},
        "versions": versions("torch", "transformers", "trl", "numpy"),
        "command": "",
        "updated": now(),
        "seconds": 0.0,
        "tokens": 0,
        "num_items": len(items),
        "cut": 0,
        **evaluate(BENCHMARKS["rm-bench"], items, names, records),
    }
    examples = examples_of(results, items)
    sections = benchmark_sections(results, items, examples, folder, engine.tokenizer)
    folder.report_path.write_text(report_page(results, sections, "benchmark"), encoding="utf-8")


def check(naive: list[list[float]], records: dict[str, Any], items: Sequence[Item], dtype: str) -> float:
    """
    The largest difference between the naive reward and `bellman.sum`, of responses that fit the context, in nats.

    Raises:
        `SystemExit`: If it is more than rounding.
    """
    largest = max(
        abs(a - b)
        for item, row in zip(items, naive, strict=True)
        if not records[item.key]["cut"]
        for a, b in zip(row, records[item.key]["scores"]["bellman.sum"], strict=True)
    )
    if largest > LARGEST_DIFFERENCE[dtype]:
        raise SystemExit(f"The naive reward and bellman.sum differ by {largest:.3f} nats: one of them is wrong.")
    return largest


def write(results: dict[str, Any], folder: Path) -> None:
    """`evaluation_speed.json` and `evaluation_speed.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1) + "\n"
    (folder / "evaluation_speed.json").write_text(text, encoding="utf-8")
    settings, rows = results["settings"], []
    for name, seconds in results["seconds"].items():
        time, ratio = spread(seconds), results["ratios"][name]
        rows.append(
            [name, f"{time['median']:.2f}", f"{time['min']:.2f} to {time['max']:.2f}", f"{ratio['median']:.2f}"]
            + [f"{ratio['min']:.2f} to {ratio['max']:.2f}"]
        )
    page = "\n\n".join(
        [
            "# Speed of an evaluation",
            machine_line(results["run"]),
            f"RM-Bench, {settings['prompts']} prompts with {settings['responses']} responses; {settings['model']} in "
            f"{settings['dtype']} on {settings['device']}; {settings['rounds']} rounds that count, each method once "
            "in each. "
            f"{len(settings['scorers'])} scorers (`single-pass controls`). The rewards of the naive way and "
            f"`bellman.sum` differ by at most {results['largest difference']:.3f} nats per response.",
            markdown_table(["method", "seconds", "range", "of the naive reward's time", "range"], rows),
            "What each does is at the head of `benchmarks/evaluation_speed.py`.",
        ]
    )
    (folder / "evaluation_speed.md").write_text(page + "\n", encoding="utf-8")


def shown_arguments(args: argparse.Namespace) -> str:
    """The options without the folder of the data."""
    return f"--data {args.data.name} --rounds {args.rounds}" + (
        f" --prompts {args.prompts}" if args.prompts is not None else ""
    )


def make_parser() -> argparse.ArgumentParser:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser)
    parser.add_argument("--data", type=Path, required=True, help="a file of RM-Bench, such as chat_filtered.json")
    parser.add_argument("--prompts", type=int, help="only so many prompts, drawn by --seed")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that count (default: 3)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
