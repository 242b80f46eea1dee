# SPDX-License-Identifier: Apache-2.0
"""What a sentence reward model said about rows, in tables."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..reporting import terminal_table


if TYPE_CHECKING:
    from rich.table import Table

    from ..rewards.sentence import SentenceScores
    from .run import Example

SHOWN_DECIMALS = 4  # the contributions of long responses are small
MAX_SHOWN = 40  # sentences of a response on the terminal
HEADERS = ["", "reward", "weight", "contribution", "sentence"]


def sentence_rows(scores: "SentenceScores") -> list[list[object]]:
    """Rows of a table with the columns [`HEADERS`]: the prompt, and every sentence."""
    texts = ["(prompt)", *(scores.sentences.text[start:end].strip() for start, end in scores.sentences.spans)]
    rewards, weights = scores.sentence_rewards.tolist(), scores.weights.tolist()
    return [
        [i or None, reward, weight, reward * weight, text]
        for i, (text, reward, weight) in enumerate(zip(texts, rewards, weights, strict=True))
    ]


def sentence_tables(examples: Sequence["Example"]) -> list["Table"]:
    """Tables of the sentences of rows, for the terminal."""
    tables = []
    for example in examples:
        rows = sentence_rows(example.stats)
        if (left_out := len(rows) - 1 - MAX_SHOWN) > 0:
            rows[1 + MAX_SHOWN :] = [[None] * 4 + [f"({left_out:,} more: see --html)"]]
        title = f"Sentences of line {example.row.line}"
        tables.append(terminal_table(HEADERS, rows, title, decimals=SHOWN_DECIMALS))
    return tables
