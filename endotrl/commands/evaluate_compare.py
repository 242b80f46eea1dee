# SPDX-License-Identifier: Apache-2.0
"""The command `endotrl eval compare A B`."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..evaluation.results import LETTERS, compare
from ..evaluation.tables import Table, markdown_table, markdown_text
from ..reporting import counted, interval_text, number, show_verdict, terminal, terminal_table, terminal_text, working
from .common import counted_items


MARKS = {"better": " ▲", "worse": " ▼", "noise": "  ", "too few": "  "}


def run(args: argparse.Namespace) -> None:
    """Reads runs and prints their paired differences to the first."""
    if not 2 <= len(args.runs) <= len(LETTERS):
        raise ValueError(f"Pass 2 to {len(LETTERS)} runs to compare, got {len(args.runs)}.")
    files = [results_file(path).resolve() for path in args.runs]
    if same := next((path for i, path in enumerate(args.runs) if files[i] in files[:i]), None):
        raise ValueError(f"{same} is given twice. Pass different runs.")
    with working("Intervals"):
        runs = [read_results(path) for path in args.runs]
        found = compare(runs)
    console = terminal()
    show_verdict(console, found["verdict"])
    letters = LETTERS[: len(runs)]
    # In benchmarks, a cluster may contain several distinct items.
    distinct = found["num_clusters"] if "num_distinct" in runs[0] else found["num_units"]
    title = f"{found['benchmark']}: {', '.join(letters)} on {counted_items(found['num_units'], distinct)}"
    short = comparison_rows(found) if len(runs) == 2 else table_of_runs(found)
    short = ([*short[0][2:], "metric, scorer"], [[*row[2:], f"{row[1]}, {row[0]}"] for row in short[1]])
    console.print(terminal_table(*short, title, fold=True))
    if len(runs) > 2:
        console.print("▲ better than A, ▼ worse than A, beyond noise (95%).")
    for name, path, results in zip(letters, args.runs, runs, strict=True):
        console.print(terminal_text(f"{name}: {path} ({results['model']})"), soft_wrap=True)
    if found["left_out"]:
        console.print(f"Left out because not all runs have them: {counted(found['left_out'], 'item')}.")
    if args.markdown:
        models = "; ".join(f"{name}: {results['model']}" for name, results in zip(letters, runs, strict=True))
        blocks = [markdown_text(f"**{found['verdict']}** {title}. {models}. Paired bootstrap, 95%.")]
        tables = [table_of_runs] if len(runs) > 2 else []
        blocks += [markdown_table(*rows(found)) for rows in (*tables, comparison_rows)]
        Path(args.markdown).write_text("\n\n".join(blocks) + "\n", encoding="utf-8")


def table_of_runs(found: Mapping[str, Any]) -> Table:
    """Table of all runs side by side, with marks where they differ from the first."""
    rows: list[list[object]] = []
    for row in found["rows"]:
        first, *others = map(number, row["values"])
        marks = [MARKS[gap["verdict"]] for gap in row["differences"]]
        rows.append(
            [row["scorer"], row["metric"], first, *(value + mark for value, mark in zip(others, marks, strict=True))]
        )
    return ["scorer", "metric", *LETTERS[: len(rows[0]) - 2]], rows


def comparison_rows(found: Mapping[str, Any]) -> Table:
    """Table with one row per difference to A."""
    rows: list[list[object]] = []
    several = len(found["rows"][0]["values"]) > 2
    for row in found["rows"]:
        for letter, value, gap in zip(LETTERS[1:], row["values"][1:], row["differences"], strict=False):
            name = f"{row['metric']} of {letter}" if several else row["metric"]
            change, interval = number(gap["value"], sign=True), interval_text(gap["low"], gap["high"], sign=True)
            rows.append([row["scorer"], name, row["values"][0], value, change, interval, gap["verdict"]])
    run = "run" if several else "B"
    return ["scorer", "metric", "A", run, f"{run}-A", "95% interval", "verdict"], rows


def results_file(path: str) -> Path:
    """Path of a `results.json`, given as the file or its folder."""
    return Path(path) / "results.json" if Path(path).is_dir() else Path(path)


def read_results(path: str) -> dict[str, Any]:
    """Contents of a `results.json`, given as the file or its folder."""
    file = results_file(path)
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        _ = results["units"], results["metrics"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a run of `endotrl eval`: {file} has no results ({error}).") from error
    return results
