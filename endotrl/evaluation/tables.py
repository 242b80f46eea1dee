# SPDX-License-Identifier: Apache-2.0
"""Results as tables: for the terminal, for a page, and in Markdown to paste."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..reporting import number
from .intervals import MIN_CLUSTERS


LENGTH_NOTE = (
    " Bias: accuracy where the better response is longer minus where it is shorter; length-controlled: the mean of "
    "the two."
)


def shown_metrics(results: Mapping[str, Any]) -> list[str]:
    """The benchmark's headline metrics that these results have. A part that is all there is would repeat the whole."""
    there = next(iter(results["metrics"].values()))
    shown = [name for name in results["headline"] if name in there]
    groups = {unit["group"] for unit in results["units"]}
    if len(groups) == 1:
        shown = [name for name in shown if name not in groups and name.removesuffix(" F1") not in groups]
    return shown


def few_items(results: Mapping[str, Any]) -> str:
    """What to say of intervals from few items: where all are right, the bootstrap knows of no other item."""
    count = len({unit["cluster"] for unit in results["units"]})
    return f" Of {count} items they are too narrow." if count < MIN_CLUSTERS else ""


def value(results: Mapping[str, Any], scorer: str, metric: str) -> float | None:
    """A metric of a scorer."""
    estimate = results["metrics"][scorer].get(metric)
    return None if estimate is None else estimate["value"]


def interval(results: Mapping[str, Any], scorer: str, metric: str) -> str:
    """Its 95% interval, as text."""
    estimate = results["metrics"][scorer].get(metric)
    if estimate is None or estimate["low"] is None:
        return "–"
    return f"{number(estimate['low'])} to {number(estimate['high'])}"


def length_of(results: Mapping[str, Any], scorer: str, key: str) -> float | None:
    """A figure of the split by length; `None` if there is none."""
    return results["length"].get(scorer, {}).get(key)


def terminal_rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[object]]]:
    """Headers and rows for a terminal of 80 columns: the main metrics, with the scorer last, which takes the rest."""
    metrics = shown_metrics(results)[:4]
    headers = [metrics[0], "95% interval", *metrics[1:]]
    with_length = bool(results["length"])
    if with_length:
        headers.append("bias")
    rows: list[list[object]] = []
    for scorer in results["metrics"]:
        row: list[object] = [
            value(results, scorer, metrics[0]),
            interval(results, scorer, metrics[0]).replace(" to ", "–"),
        ]
        row += [value(results, scorer, metric) for metric in metrics[1:]]
        if with_length:
            row.append(length_of(results, scorer, "bias"))
        rows.append([*row, scorer])
    return [*headers, "scorer"], rows


def full_rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[object]]]:
    """Headers and rows with everything that a table has room for."""
    metrics = shown_metrics(results)
    headers = ["scorer", metrics[0], "95% interval", *metrics[1:]]
    with_length = bool(results["length"])
    if with_length:
        headers += ["length-controlled", "bias", "ties"]
    rows: list[list[object]] = []
    for scorer in results["metrics"]:
        row: list[object] = [scorer, value(results, scorer, metrics[0]), interval(results, scorer, metrics[0])]
        row += [value(results, scorer, metric) for metric in metrics[1:]]
        if with_length:
            row += [length_of(results, scorer, key) for key in ("length_controlled", "bias")]
            row.append(results["ties"].get(scorer))
        rows.append(row)
    return headers, rows


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown; numbers to the right."""
    numeric = [all(not isinstance(row[i], str) for row in rows) for i in range(len(headers))]
    lines = [
        f"| {' | '.join(map(_cell, headers))} |",
        "|" + "|".join("---:" if right else "---" for right in numeric) + "|",
    ]
    lines += [f"| {' | '.join(_cell(cell) for cell in row)} |" for row in rows]
    return "\n".join(lines)


def markdown_page(results: Mapping[str, Any]) -> str:
    """The table with what it takes to read it, in Markdown."""
    settings = ", ".join(f"{key} {val}" for key, val in results["settings"].items() if val not in (None, False))
    lines = [
        f"## {markdown_text(results['title'])}: {markdown_text(results['model'])}",
        "",
        f"{results['num_items']} items, {results['tokens']:,} tokens, {results['seconds']:.0f} s. "
        f"{results['tie_rule']} "
        f"Intervals are 95% (bootstrap over items).{few_items(results)}{LENGTH_NOTE if results['length'] else ''}",
        "",
        markdown_table(*full_rows(results)),
        "",
        *[f"- {markdown_text(statement)}" for statement in results["statements"]],
        "",
        f"Settings: {markdown_text(settings)}. Versions: "
        f"{', '.join(f'{k} {v}' for k, v in results['versions'].items())}.",
        "",
        f"```bash\n{results['command']}\n```",
        "",
    ]
    return "\n".join(lines)


def _cell(cell: object) -> str:
    if cell is None or isinstance(cell, float):
        return number(cell)
    return markdown_text(str(cell)).replace("|", "\\|")


def markdown_text(text: str) -> str:
    """Text of data and users for a line of Markdown, in which it makes no tag, link or picture."""
    return " ".join(text.splitlines()).replace("<", "&lt;").replace("](", "]\\(")
