# SPDX-License-Identifier: Apache-2.0
"""What came out of `endotrl score`, in a table and in words."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..data.formats import message_text
from ..reporting import correlation_in_words, number, terminal_table
from ..rewards.residuals import RESIDUALS
from .rows import Row
from .run import Example, ScoreReport


if TYPE_CHECKING:
    from rich.table import Table

    from ..rewards.sentence import SentenceScores

SHOWN_SENTENCES = 3  # rows whose sentences are on the terminal
MAX_SHOWN = 40  # sentences of a response on the terminal
SENTENCE_HEADERS = ["", "reward", "weight", "contribution", "sentence"]
SENTENCE_DECIMALS = 4  # the contributions of long responses are small


def show_report(
    report: ScoreReport,
    output: str,
    html: str | None = None,
    top: int | None = None,
    bottom: int | None = None,
    by_sentence: bool = False,
) -> None:
    """
    Table and summary on the terminal; on standard error if the output goes to standard output. `top` and `bottom` are
    numbers of rows to show, of the highest and of the lowest rewards; by default the first rows are shown.
    """
    from rich.console import Console

    console = Console(stderr=output == "-", highlight=False)
    tally = report.tally
    tables = [("Highest rewards", tally.top[:top])] if top else []
    tables += [("Lowest rewards", tally.bottom[:bottom])] if bottom else []
    for title, rows in tables or [("First rows", tally.head[:10])]:
        per_token = [] if by_sentence else ["per token"]
        cells = [_table_row(row, record, by_sentence) for row, record in rows]
        console.print()
        console.print(terminal_table(["line", "reward", "tokens", *per_token, "completion"], cells, title))
    if by_sentence:
        for sentences in sentence_tables(report.examples[:SHOWN_SENTENCES]):
            console.print()
            console.print(sentences)
    for line in summary_lines(report, output, unit="" if by_sentence else " nats"):
        console.print(line, markup=False, soft_wrap=False)
    for what, path in (("Rewards", output), ("Heat map", html)):
        if path is not None and path != "-":
            console.print(f"{what}: {path}", markup=False, soft_wrap=True)


def _table_row(row: Row, record: dict[str, Any], by_sentence: bool) -> list[object]:
    error = record.get("error") or record.get("reason")
    text = f"({error})" if error else message_text(row.completion)
    per_token = [] if by_sentence else [record.get("reward_per_token")]
    return [row.line, record["reward"], record.get("num_tokens"), *per_token, text]


def summary_lines(report: ScoreReport, output: str, unit: str = " nats") -> list[str]:
    """What came out, in words."""
    tally = report.tally
    scored = tally.rows - tally.errors
    speed = f"{tally.tokens:,} tokens in {report.seconds:,.1f} s ({report.tokens_per_second:,.0f} tokens/s)"
    lines = [f"{_rows(scored)} scored, {speed}."]
    if report.resumed_rows:
        kept, new = report.resumed_rows, tally.rows - report.resumed_rows
        lines.append(f"{_rows(kept)} {'was' if kept == 1 else 'were'} done by earlier runs, {new:,} by this one.")
    if tally.mean_reward is not None:
        words = f"Mean reward {number(tally.mean_reward)}{unit}"
        if tally.length_correlation is not None:
            words += f"; {correlation_in_words(tally.length_correlation)}"
        lines.append(f"{words}.")
    for domain, slopes in report.slopes.items():
        found = ", ".join(
            f"{number(slope)} × {kind}" for slope, kind in zip(slopes, RESIDUALS["style_residual"], strict=False)
        )
        lines.append(f"Taken out among the responses to a prompt{f' ({domain})' if domain else ''}: {found}.")
    if tally.skipped:
        lines.append(f"{_rows(tally.skipped)} got no reward (null, with the reason).")
    if tally.errors:
        where = "" if output == "-" else f"; {output}.errors.jsonl says why"
        lines.append(f"{_rows(tally.errors)} could not be scored{where}.")
    return lines


def _rows(count: int) -> str:
    return f"{count:,} row{'' if count == 1 else 's'}"


def sentence_rows(scores: "SentenceScores") -> list[list[object]]:
    """Rows of a table with the columns [`SENTENCE_HEADERS`]: the prompt, and every sentence."""
    texts = ["(prompt)", *(scores.sentences.text[start:end].strip() for start, end in scores.sentences.spans)]
    rewards, weights = scores.sentence_rewards.tolist(), scores.weights.tolist()
    return [
        [i or None, reward, weight, reward * weight, text]
        for i, (text, reward, weight) in enumerate(zip(texts, rewards, weights, strict=True))
    ]


def sentence_tables(examples: Sequence[Example]) -> list["Table"]:
    """Tables of the sentences of rows, for the terminal."""
    tables = []
    for example in examples:
        rows = sentence_rows(example.stats)
        if (left_out := len(rows) - 1 - MAX_SHOWN) > 0:
            rows[1 + MAX_SHOWN :] = [[None] * 4 + [f"({left_out:,} more: see --html)"]]
        title = f"Sentences of line {example.row.line}"
        tables.append(terminal_table(SENTENCE_HEADERS, rows, title, decimals=SENTENCE_DECIMALS))
    return tables
