# SPDX-License-Identifier: Apache-2.0
"""Terminal tables and messages, safe against control characters in text of users and models."""

import logging
import re
import sys
import warnings
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from .heat_map import OPACITY, ColorScale, HeatMapRow
from .text import JOINERS, cell_text, is_hidden, is_number, number


if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text


_ANSI_SEQUENCE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_].*?(?:\x07|\x1b\\|\Z)|[ -/]*[0-~])", re.DOTALL)


def ignore_upstream_warnings() -> None:
    """
    Silences warnings that users cannot act on: TRL 1.16 sets `gradient_checkpointing` by default, which transformers
    5.23 has renamed. Can be removed once TRL follows.
    """
    warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing(_kwargs)?` is deprecated", FutureWarning)


def quiet_libraries() -> None:
    """Silences progress bars and advice of the libraries, except errors."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl")
    import datasets
    from transformers.utils import logging as transformers_logging

    datasets.disable_progress_bars()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("trl").setLevel(logging.ERROR)


def terminal(stderr: bool = False) -> "Console":
    """Console for a command's results, on standard output by default; text is never parsed as markup."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, markup=False)


def show_verdict(console: "Console", verdict: str) -> None:
    """Prints a verdict, which stands out and has room for names from data."""
    console.print(f"\n{terminal_text(verdict, 1000)}\n", style="bold")


def working(what: str, shown: bool = True) -> AbstractContextManager[object]:
    """Context with a spinner on a terminal, for work without a progress bar."""
    from rich.console import Console

    return Console(stderr=True).status(f"{terminal_text(what)} ...") if shown else nullcontext()


def terminal_text(text: str, limit: int = 300) -> str:
    """
    Text of a model for one line of a terminal: escape sequences and control, zero-width and direction characters are
    removed, line breaks become `↵`, and the text is truncated to `limit` characters.
    """
    text = _ANSI_SEQUENCE.sub("", text[: 4 * limit]).replace("\r\n", "\n").replace("\n", "↵").replace("\t", " ")
    return "".join(c for c in text if not is_hidden(c) and c not in JOINERS)[:limit]


def terminal_table(
    headers: Sequence[str], rows: Iterable[Sequence[object]], title: str = "", fold: bool = False, decimals: int = 3
) -> "Table":
    """
    A table for [`rich.console.Console.print`]. Numbers are right-aligned; a last column of text takes the remaining
    width, and wraps (`fold`) or is truncated with an ellipsis; text is never parsed as markup.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    def text(cell: object) -> Text:
        shown = cell_text(cell, decimals)
        return Text(shown if is_number(cell) else terminal_text(shown))

    cells = [list(row) for row in rows]
    numeric = [all(row[i] is None or is_number(row[i]) for row in cells) for i in range(len(headers))]
    result = Table(
        title=text(title) if title else None,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        expand=not numeric[-1],
    )
    for i, header in enumerate(headers):
        last = i == len(headers) - 1 and not numeric[i]
        result.add_column(
            text(header),
            justify="right" if numeric[i] else "left",
            ratio=1 if last else None,
            no_wrap=not (last and fold),
            overflow="fold" if last and fold else "ellipsis",
        )
    for row in cells:
        result.add_row(*map(text, row))
    return result


def terminal_heat_map(rows: Sequence[HeatMapRow]) -> "Text":
    """
    Completions coloured by the contributions of their tokens, on one scale, like [`heat_maps`], for
    [`rich.console.Console.print`]. For readers who see no colours, the lowest token is named.
    """
    from rich.text import Text

    scale = ColorScale.of(row.contributions for row in rows)
    result = Text()
    for row in rows:
        result.append(f"  {terminal_text(row.prompt)}\n  " if row.prompt else "  ")
        for i, ((start, stop), contribution) in enumerate(zip(row.offsets, row.contributions, strict=True), 1):
            share = scale.share(contribution)
            # The pages' blue and orange, blended with white.
            shade = (33, 102, 172) if share > 0 else (224, 100, 10)
            red, green, blue = (round(255 + OPACITY * abs(share) * (part - 255)) for part in shade)
            token = " EOS" if row.eos and i == len(row.offsets) else terminal_text(row.text[start:stop])
            result.append(token, style=f"black on rgb({red},{green},{blue})")
        worst = min(range(len(row.contributions)), key=row.contributions.__getitem__)
        token = terminal_text(row.text[slice(*row.offsets[worst])]).strip()
        lowest = number(row.contributions[worst], 1, sign=True)
        result.append(f"\n    reward {number(row.total, 1, sign=True)} nats; lowest: “{token}” {lowest}\n")
    return result


def say(message: str) -> None:
    """Prints a line to standard error; text of users and models in it cannot control the terminal."""
    from tqdm import tqdm

    # Above the progress bar, if there is one.
    tqdm.write(terminal_text(message, limit=1000), file=sys.stderr)
