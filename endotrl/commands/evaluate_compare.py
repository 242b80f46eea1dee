# SPDX-License-Identifier: Apache-2.0
"""The command `endotrl eval compare A B`."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..evaluation.results import compare
from ..evaluation.tables import markdown_table, markdown_text
from ..reporting import number, terminal_table, terminal_text


def run_compare(args: argparse.Namespace) -> dict[str, Any]:
    """Reads two runs and shows their paired differences; returns them."""
    from rich.console import Console

    a, b = read_results(args.a), read_results(args.b)
    found = compare(a, b)
    console = Console(highlight=False)
    console.print()
    title = f"{found['benchmark']}: B minus A on {found['num_units']} items"
    console.print(terminal_table(*comparison_rows(found, short=True), title, fold=True))
    for name, path, results in (("A", args.a, a), ("B", args.b, b)):
        console.print(terminal_text(f"{name}: {path} ({results['model']})"), markup=False, soft_wrap=True)
    if found["left_out"]:
        console.print(f"{found['left_out']} items that only one of the runs has are left out.")
    if args.markdown:
        text = markdown_text(f"{title}. A: {a['model']}; B: {b['model']}. Paired bootstrap, 95%.") + "\n\n"
        Path(args.markdown).write_text(text + markdown_table(*comparison_rows(found)) + "\n", encoding="utf-8")
    return found


def comparison_rows(found: Mapping[str, Any], short: bool = False) -> tuple[list[str], list[list[object]]]:
    """Headers and rows of a comparison."""
    rows: list[list[object]] = []
    for row in found["rows"]:
        change = number(row["difference"], sign=True)
        interval = f"{number(row['low'], sign=True)} to {number(row['high'], sign=True)}"
        name = f"{row['metric']}, {row['scorer']}"
        if short:
            rows.append([row["a"], row["b"], change, interval, row["verdict"], name])
        else:
            rows.append([row["scorer"], row["metric"], row["a"], row["b"], change, interval, row["verdict"]])
    if short:
        return ["A", "B", "B-A", "95% interval", "verdict", "metric, scorer"], rows
    return ["scorer", "metric", "A", "B", "B-A", "95% interval", "verdict"], rows


def read_results(path: str) -> dict[str, Any]:
    """Contents of a `results.json`, given as the file or its folder."""
    file = Path(path) / "results.json" if Path(path).is_dir() else Path(path)
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no run of endotrl eval: {file} cannot be read ({error}).") from error
    if not isinstance(results, dict) or "units" not in results or "metrics" not in results:
        raise ValueError(f"{file} is not a results.json of endotrl eval: it has no units.")
    return results
