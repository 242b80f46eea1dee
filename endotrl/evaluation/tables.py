# SPDX-License-Identifier: Apache-2.0
"""Tables of results: for the terminal, for HTML, and in Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..reporting import cell_text, counted, interval_text
from .intervals import MIN_CLUSTERS
from .results import ranked


LENGTH_NOTE = (
    "bias: accuracy where the better response is longer minus where it is shorter; 0 is balanced. length-controlled: "
    "the mean of the two."
)
LONGEST_NAME = 38  # characters of a scorer's name on a terminal
Table = tuple[list[str], list[list[object]]]  # headers and rows


def shown_metrics(results: Mapping[str, Any]) -> list[str]:
    """Headline metrics present in these results. A part that is the whole is left out as a repetition."""
    there = next(iter(results["metrics"].values()))
    shown = [name for name in results["headline"] if name in there]
    groups = {unit["group"] for unit in results["units"]}
    if len(groups) == 1:
        shown = [name for name in shown if name not in groups and name.removesuffix(" F1") not in groups]
    return shown


def how_to_read(results: Mapping[str, Any]) -> str:
    """Note on ties and intervals below a table."""
    return f"{results['tie_rule']} Intervals are 95% (bootstrap over items).{few_items(results)}"


def few_items(results: Mapping[str, Any]) -> str:
    """Caveat on intervals from few items: if all are right, bootstrap resamples are, too."""
    count = len({unit["cluster"] for unit in results["units"]})
    return f" With only {counted(count, 'distinct item')}, intervals are too narrow." if count < MIN_CLUSTERS else ""


def value(results: Mapping[str, Any], scorer: str, metric: str) -> float | None:
    """A metric of a scorer."""
    return results["metrics"][scorer].get(metric, {}).get("value")


def interval(results: Mapping[str, Any], scorer: str, metric: str) -> str:
    """Its 95% interval, as text."""
    estimate = results["metrics"][scorer].get(metric, {})
    return interval_text(estimate.get("low"), estimate.get("high"))


def best_first(results: Mapping[str, Any]) -> list[str]:
    """Scorers by their main metric, best first."""
    return ranked({name: value(results, name, results["main_metric"]) for name in results["metrics"]})


def full_rows(results: Mapping[str, Any]) -> Table:
    """Headers and rows of a table, best scorer first; for a single scorer, one row per metric."""
    names, metrics = best_first(results), shown_metrics(results)
    if len(names) == 1:
        (name,) = names
        if not results["length"]:
            metrics += [metric for metric in results["metrics"][name] if metric not in results["headline"]]
        rows: list[list[object]] = [[m, value(results, name, m), interval(results, name, m)] for m in metrics]
        return [name, "value", "95% interval"], rows
    main, *rest = metrics
    columns: dict[str, list[object]] = {"scorer": [*names], main: [value(results, name, main) for name in names]}
    columns["95% interval"] = [interval(results, name, main) for name in names]
    if results["length"]:
        splits = [results["length"].get(name, {}) for name in names]
        columns["bias"] = [split.get("bias") for split in splits]
        columns["length-controlled"] = [split.get("length_controlled") for split in splits]
        columns["ties"] = [results["ties"].get(name) for name in names]
    columns |= {metric: [value(results, name, metric) for name in names] for metric in rest}
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]


def terminal_rows(results: Mapping[str, Any], width: int) -> tuple[list[str], list[list[object]], list[str]]:
    """The columns of the table that fit a terminal, and the headers of the others."""
    headers, rows = full_rows(results)
    rows = [[_short(str(row[0])), *row[1:]] for row in rows]
    kept: list[int] = []
    for i, header in enumerate(headers):
        if header not in ("length-controlled", "ties"):
            width -= max(len(cell_text(cell)) for cell in (header, *(row[i] for row in rows))) + 2
            if width < -2:
                break
            kept.append(i)
    left_out = [header for i, header in enumerate(headers) if i not in kept]
    return [headers[i] for i in kept], [[row[i] for i in kept] for row in rows], left_out


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown table; numbers right-aligned."""
    sides = ["---" if any(isinstance(row[i], str) for row in rows) else "---:" for i in range(len(headers))]
    cells = [[markdown_text(cell_text(cell)).replace("|", "\\|") for cell in row] for row in (headers, *rows)]
    first, *lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([first, f"|{'|'.join(sides)}|", *lines])


def markdown_page(results: Mapping[str, Any]) -> str:
    """Markdown page: the table, with notes on how to read it."""
    settings = ", ".join(f"{key} {val}" for key, val in results["settings"].items() if val not in (None, False))
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    numbers = f"{counted(results['num_items'], 'item')}, {counted(results['tokens'], 'token')}"
    note = f"{numbers}, {results['seconds']:.0f} s. {how_to_read(results)}"
    blocks = [
        f"## {markdown_text(results['title'])}: {markdown_text(results['model'])}",
        f"**{markdown_text(results['verdict'])}**",
        f"{note} {LENGTH_NOTE}" if results["length"] else note,
        markdown_table(*full_rows(results)),
        "\n".join(f"- {markdown_text(statement)}" for statement in results["statements"]),
        f"Settings: {markdown_text(settings)}. Versions: {versions}.",
        f"```bash\n{results['command']}\n```\n",
    ]
    return "\n\n".join(filter(None, blocks))


def _short(name: str) -> str:
    half = LONGEST_NAME // 2
    return name if len(name) <= LONGEST_NAME else f"{name[: half - 1]}…{name[-half:]}"


def markdown_text(text: str) -> str:
    """Text of data and users, escaped for a line of Markdown: no tag, link or image."""
    return " ".join(text.splitlines()).replace("<", "&lt;").replace("](", "]\\(")
