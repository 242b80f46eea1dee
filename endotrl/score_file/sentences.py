# SPDX-License-Identifier: Apache-2.0
"""What a sentence reward model said about rows: in the output, on the page and on the terminal."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from .. import __version__
from ..reporting import ColorScale, legend, number, page, plain, table, terminal_table, token_heat_map
from .rows import Row, message_text


if TYPE_CHECKING:
    from rich.table import Table

    from ..rewards.sentence import SentenceReward
    from ..sentence.scorer import SentenceScores
    from .run import Example, ScoreReport

DECIMALS = 6
HEADERS = ["", "reward", "weight", "contribution", "sentence"]


def sentence_record(row: Row, scores: "SentenceScores", details: bool) -> dict[str, Any]:
    """Output line of a row; the sentences are left out without `details`."""
    record = {
        "line": row.line,
        **row.extra,
        "reward": round(scores.score, DECIMALS) + 0.0,
        "num_tokens": len(scores.completion_ids),
    }
    if details:
        numbers = [
            {"reward": round(reward, DECIMALS) + 0.0, "weight": round(weight, DECIMALS)}
            for reward, weight in zip(scores.sentence_rewards.tolist(), scores.weights.tolist(), strict=True)
        ]
        texts = [scores.sentences.text[start:end] for start, end in scores.sentences.spans]
        record["sentence_scores"] = {
            "prompt": numbers[0],
            "sentences": [{"text": text, **entry} for text, entry in zip(texts, numbers[1:], strict=True)],
        }
    return record


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
    return [
        terminal_table(HEADERS, sentence_rows(example.stats), f"Sentences of line {example.row.line}")
        for example in examples
    ]


def sentence_page(
    report: "ScoreReport", args: argparse.Namespace, command: str, output: str, reward: "SentenceReward"
) -> str:
    """The first rows, with every sentence in the colour of its contribution, and the command that makes the page."""
    from .summary import summary_lines

    examples = report.examples[: args.html_rows]
    scale = ColorScale.of(example.stats.contributions.tolist() for example in examples)
    blocks = []
    for example in examples:
        scores = example.stats
        name = f"line {example.row.line}" + (f" · id {example.row.extra['id']}" if "id" in example.row.extra else "")
        blocks.append(
            token_heat_map(
                scores.sentences.text,
                scores.sentences.spans,
                scores.contributions.tolist(),
                scale,
                unit="sentence",
                others={"r": scores.sentence_rewards[1:].tolist(), "weight": scores.weights[1:].tolist()},
                prompt=message_text(example.row.prompt),
                meta=f"{name} · score {number(scores.score)} · {len(scores.sentences.spans)} sentences",
            )
        )
        blocks.append(
            Markup("<details><summary>Sentences</summary>{}</details>").format(
                table(HEADERS, [[*row[:-1], plain(str(row[-1]))] for row in sentence_rows(scores)])
            )
        )
    return page(
        f"Sentence rewards of {Path(args.file).name}",
        [
            ("", Markup("").join([legend(scale, "contribution of a sentence"), *blocks])),
            ("Settings", table(["setting", "value"], [["segmenter", reward.config.segmenter]])),
        ],
        lead=f"The sentence reward model {args.model}, for the first {len(examples)} rows. A sentence's contribution is its "
        "weight a times its reward r; with the prompt's, which the first sentence has in its own, they sum to the score. "
        + " ".join(summary_lines(report, output, unit="")),
        footer=f"endotrl {__version__} · {command}",
    )
