# SPDX-License-Identifier: Apache-2.0
"""HTML and terminal reports of diagnoses, several runs side by side."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup

from ... import __version__
from ...reporting import counted, curves, page, plain, sparkline, table, terminal_text
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
    several = len(diagnoses) > 1
    names = [f"{d.run.path}: " if several else "" for d in diagnoses]
    sections: list[tuple[str, Markup | str]] = []
    if several:
        blocks = [table(["run", "status", "verdict"], [[str(d.run.path), d.status, d.verdict] for d in diagnoses])]
        for key in _compared(diagnoses)[:4]:
            blocks.append(curves({f"{d.run.path}: {key}": d.run.series(key) for d in diagnoses}))
        sections.append(("Side by side", Markup("").join(blocks)))
    for name, diagnosis in zip(names, diagnoses, strict=True):
        for finding in diagnosis.findings:
            shown = dict(list(curve_series(diagnosis.run, finding.curves).items())[:4])
            content = Markup("<p>{}</p>{}<p><b>Change:</b> {}</p><p class=meta>See {}</p>").format(
                _with_code(finding.evidence), curves(shown), _with_code(finding.change), plain(finding.reference)
            )
            sections.append((f"{name}{MARKS[finding.level]} {finding.says}", content))
        sections.append((f"{name}What was read", _source(diagnosis)))
    headers = ["number", *(f"{name}{what}" for name in names for what in ("first → last", "curve"))]
    rows = [[key, *(cell for d in diagnoses for cell in _ends(d.run, key))] for key in _compared(diagnoses)]
    sections.insert(1 if several else len(sections), ("Numbers" if several else "Curves", table(headers, rows)))
    title = "Diagnosis of " + (" and ".join(str(d.run.path) for d in diagnoses))
    lead = "" if several else Markup('<p class="verdict">{}</p>').format(_with_code(diagnoses[0].verdict))
    return page(title, sections, lead=lead, footer=f"endotrl {__version__}")


def print_diagnoses(diagnoses: Sequence[Diagnosis], console: "Console") -> None:
    """Prints diagnoses to a terminal: the verdict first, then each finding with a sparkline."""
    from rich.padding import Padding
    from rich.text import Text

    from ...reporting import terminal_table

    for diagnosis in diagnoses:
        if len(diagnoses) > 1:
            console.print(Text(terminal_text(str(diagnosis.run.path)), style="underline"))
        console.print(Text(terminal_text(diagnosis.verdict), style=STYLES[diagnosis.status]))
        for finding in diagnosis.findings:
            console.print()
            mark = f"{MARKS[finding.level]} {finding.level}: "
            console.print(Text(mark, style=STYLES[finding.level]) + Text(terminal_text(finding.says), style="bold"))
            lines = [terminal_text(finding.evidence, 600)]
            shown = list(curve_series(diagnosis.run, finding.curves).items())[:2]
            lines += [f"{sparkline([value for _, value in points])}  {key}" for key, points in shown]
            lines += [f"Change: {terminal_text(finding.change, 600)}", f"See {finding.reference}"]
            for line in lines:
                console.print(Padding(Text(line), (0, 0, 0, 2)))
        console.print(Text(f"\n{terminal_text(_source(diagnosis), 1000)}\n", style="dim"))
    if len(diagnoses) > 1:
        headers = ["number", *[f"run {i + 1}" for i in range(len(diagnoses))], ""]
        rows = [[key, *[_ends(d.run, key)[0] for d in diagnoses], ""] for key in _compared(diagnoses)]
        console.print(terminal_table(headers, rows, title="First and last values"))


def curve_series(run: Run, names: Sequence[str]) -> dict[str, list[tuple[float, float]]]:
    """Logged series by name; a name that ends in `/` matches all that begin with it."""
    logged = dict.fromkeys(key for entry in run.entries for key in entry)
    keys = [k for name in names for k in ([n for n in logged if n.startswith(name)] if name[-1] == "/" else [name])]
    found = {key: run.series(key) for key in dict.fromkeys(keys)}
    return {key: points for key, points in found.items() if points}


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
    if diagnosis.not_checked:
        text += f" Not checked, for it was not logged: {', '.join(diagnosis.not_checked)}."
    return " ".join([text, *(f"{note}." for note in run.notes)])


def _compared(diagnoses: Sequence[Diagnosis]) -> list[str]:
    extra = sorted({key for d in diagnoses for e in d.run.steps for key in e if key.startswith("rewards/")})
    return [key for key in [*COMPARED, *extra] if any(d.run.series(key) for d in diagnoses)]


def _ends(run: Run, key: str) -> tuple[str | None, str | None]:
    """First and last value of a metric."""
    values = run.values(key)
    return (
        (f"{values[0]:.3g} → {values[-1]:.3g}", sparkline([value for _, value in run.series(key)]))
        if values
        else (None, None)
    )
