# SPDX-License-Identifier: Apache-2.0
"""HTML and terminal reports of diagnoses, several runs side by side."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup

from ... import __version__
from ...reporting import counted, curves, page, plain, sparkline, table, terminal_table, terminal_text
from ..detector import ENTROPY_KEYS, REWARD_KEYS
from .diagnose import Diagnosis
from .run_logs import Run
from .symptoms import CLIPPED, ZERO_STD


if TYPE_CHECKING:
    from rich.console import Console

MARKS = {"failure": "✗", "warning": "!", "note": "·"}
STYLES = {"failure": "bold red", "warning": "bold yellow", "unclear": "bold", "healthy": "bold green", "note": "dim"}
# Metrics by which runs are compared.
COMPARED = [*REWARD_KEYS, "loss", "kl", *ENTROPY_KEYS, "grad_norm", "learning_rate", "completions/mean_length"]
COMPARED += [CLIPPED, ZERO_STD, "mean_token_accuracy", "eval_loss", "eval_reward"]


def report_page(diagnoses: Sequence[Diagnosis]) -> str:
    """HTML page of one diagnosis, or of several side by side."""
    several, paths = len(diagnoses) > 1, [str(d.run.path) for d in diagnoses]
    names = [f"{path}: " for path in paths] if several else [""]
    sections: list[tuple[str, Markup | str]] = []
    for name, diagnosis in zip(names, diagnoses, strict=True):
        for finding in diagnosis.findings:
            shown = curves(_curves_of(diagnosis.run, finding.curves, limit=4))
            content = Markup("<p>{}</p>{}<p><b>Change:</b> {}</p><p class=meta>See {}</p>").format(
                _with_code(finding.evidence), shown, _with_code(finding.change), plain(finding.reference)
            )
            sections.append((f"{name}{MARKS[finding.level]} {finding.says}", content))
        sections.append((f"{name}Logs", _source(diagnosis)))
    compared = _compared(diagnoses)
    headers = ["number", *(f"{name}{what}" for name in names for what in ("first → last", "curve"))]
    numbers = table(headers, [[key, *(cell for d in diagnoses for cell in _ends(d.run, key))] for key in compared])
    if several:
        rows = [[path, d.status, d.verdict] for path, d in zip(paths, diagnoses, strict=True)]
        blocks = [table(["run", "status", "verdict"], rows)]
        blocks += [curves({f"{d.run.path}: {key}": d.run.series(key) for d in diagnoses}) for key in compared[:4]]
        sections = [("Side by side", Markup("").join(blocks)), ("Numbers", numbers), *sections]
    else:
        sections.append(("Curves", numbers))
    lead = "" if several else Markup('<p class="verdict">{}</p>').format(_with_code(diagnoses[0].verdict))
    return page(f"Diagnosis of {' and '.join(paths)}", sections, lead=lead, footer=f"endotrl {__version__}")


def print_diagnoses(diagnoses: Sequence[Diagnosis], console: "Console") -> None:
    """Prints diagnoses to a terminal: the verdict first, then each finding with a sparkline."""
    from rich.padding import Padding
    from rich.text import Text

    several = len(diagnoses) > 1
    for diagnosis in diagnoses:
        if several:
            console.print(Text(terminal_text(str(diagnosis.run.path)), style="underline"))
        console.print(Text(terminal_text(diagnosis.verdict), style=STYLES[diagnosis.status]))
        for finding in diagnosis.findings:
            mark = f"\n{MARKS[finding.level]} {finding.level}: "
            console.print(Text(mark, style=STYLES[finding.level]) + Text(terminal_text(finding.says), style="bold"))
            lines = [terminal_text(finding.evidence, 600)]
            shown = _curves_of(diagnosis.run, finding.curves, limit=2)
            lines += [f"{sparkline([value for _, value in points])}  {key}" for key, points in shown.items()]
            lines += [f"Change: {terminal_text(finding.change, 600)}", f"See {finding.reference}"]
            console.print(Padding(Text("\n".join(lines)), (0, 0, 0, 2)))
        console.print(Text(f"\n{terminal_text(_source(diagnosis), 1000)}\n", style="dim"))
    if several:
        headers = ["number", *[f"run {i + 1}" for i in range(len(diagnoses))], ""]
        rows = [[key, *[_ends(d.run, key)[0] for d in diagnoses], ""] for key in _compared(diagnoses)]
        console.print(terminal_table(headers, rows, title="First and last values"))


def _curves_of(run: Run, names: Sequence[str], limit: int) -> dict[str, list[tuple[float, float]]]:
    """The first logged series of these names; a name that ends in `/` matches all that begin with it."""
    logged = dict.fromkeys(key for entry in run.entries for key in entry)
    keys = [key for name in names for key in logged if key == name or (name[-1] == "/" and key.startswith(name))]
    return {key: run.series(key) for key in list(dict.fromkeys(keys))[:limit]}


def _with_code(text: str) -> Markup:
    """Text with its words in backticks as code."""
    marks = (Markup("{}"), Markup("<code>{}</code>"))
    return Markup("").join(marks[i % 2].format(part) for i, part in enumerate(plain(text).split("`")))


def _source(diagnosis: Diagnosis) -> str:
    run = diagnosis.run
    text = f"Read: {counted(len(run.steps), 'log entry')} of {run.source}"
    text += f", {counted(len(run.completions), 'file')} of completions" if run.completions else ""
    text += f", {counted(len(run.checkpoints), 'checkpoint')}." if run.checkpoints else "."
    text += f" Held out: {', '.join(diagnosis.held_out)}." if diagnosis.held_out else ""
    text += f" Not checked (not logged): {', '.join(diagnosis.not_checked)}." if diagnosis.not_checked else ""
    return " ".join([text, *(f"{note}." for note in run.notes)])


def _compared(diagnoses: Sequence[Diagnosis]) -> list[str]:
    extra = sorted({key for d in diagnoses for e in d.run.steps for key in e if key.startswith("rewards/")})
    return [key for key in [*COMPARED, *extra] if any(d.run.series(key) for d in diagnoses)]


def _ends(run: Run, key: str) -> tuple[str | None, str | None]:
    """First and last value of a metric, and its sparkline."""
    values, curve = run.values(key), sparkline([value for _, value in run.series(key)])
    return (f"{values[0]:.3g} → {values[-1]:.3g}", curve) if values else (None, None)
