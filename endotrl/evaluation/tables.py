# SPDX-License-Identifier: Apache-2.0
"""Results as tables: for the terminal, for a page, and in Markdown to paste."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..reporting import cell_text, number
from .intervals import MIN_CLUSTERS
from .results import ranked


LENGTH_NOTE = (
    "bias: accuracy where the better response is longer minus where it is shorter; 0 is balanced. length-controlled: "
    "the mean of the two."
)
LONGEST_NAME = 38  # of a scorer, on a terminal


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
    return f" Of {count} items, intervals are too narrow." if count < MIN_CLUSTERS else ""


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


def best_first(results: Mapping[str, Any]) -> list[str]:
    """Scorers by their main metric."""
    return ranked({name: value(results, name, results["main_metric"]) for name in results["metrics"]})


def full_rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[object]]]:
    """Headers and rows of a table, the best scorer first; of a single scorer, a row for each metric."""
    names, metrics = best_first(results), shown_metrics(results)
    if len(names) == 1:
        (name,) = names
        others = [metric for metric in results["metrics"][name] if metric not in results["headline"]]
        others = [] if results["length"] else others
        rows: list[list[object]] = [
            [metric, value(results, name, metric), interval(results, name, metric)] for metric in [*metrics, *others]
        ]
        return [name, "value", "95% interval"], rows
    headers = ["scorer", metrics[0], "95% interval", *metrics[1:]]
    with_length = bool(results["length"])
    if with_length:
        headers[3:3] = ["bias", "length-controlled", "ties"]
    rows = []
    for name in names:
        row: list[object] = [name, value(results, name, metrics[0]), interval(results, name, metrics[0])]
        if with_length:
            row += [length_of(results, name, "bias"), length_of(results, name, "length_controlled")]
            row.append(results["ties"].get(name))
        rows.append(row + [value(results, name, metric) for metric in metrics[1:]])
    return headers, rows


def terminal_rows(results: Mapping[str, Any], width: int) -> tuple[list[str], list[list[object]], list[str]]:
    """Of the table, the columns that fit a terminal, and the headers of those that do not."""
    headers, rows = full_rows(results)
    order = [i for i, header in enumerate(headers) if header not in ("length-controlled", "ties")]
    rows = [[_short(str(row[0])), *row[1:]] for row in rows]
    kept: list[int] = []
    for i in order:
        width -= max(len(cell_text(cell)) for cell in (headers[i], *(row[i] for row in rows))) + 2
        if width < -2:
            break
        kept.append(i)
    left_out = [headers[i] for i in range(len(headers)) if i not in kept]
    return [headers[i] for i in kept], [[row[i] for i in kept] for row in rows], left_out


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
        f"**{markdown_text(results['verdict'])}**",
        "",
        f"{results['num_items']} items, {results['tokens']:,} tokens, {results['seconds']:.0f} s. "
        f"{results['tie_rule']} Intervals are 95% (bootstrap over items).{few_items(results)}"
        f"{' ' + LENGTH_NOTE if results['length'] else ''}",
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


def _short(name: str) -> str:
    half = LONGEST_NAME // 2
    return name if len(name) <= LONGEST_NAME else f"{name[: half - 1]}…{name[-half:]}"


def _cell(cell: object) -> str:
    if cell is None or isinstance(cell, float):
        return number(cell)
    return markdown_text(str(cell)).replace("|", "\\|")


def markdown_text(text: str) -> str:
    """Text of data and users for a line of Markdown, in which it makes no tag, link or picture."""
    return " ".join(text.splitlines()).replace("<", "&lt;").replace("](", "]\\(")
