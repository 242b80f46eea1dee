# SPDX-License-Identifier: Apache-2.0
"""The page of `endotrl score --html` with a sentence reward model: the first rows, every sentence in the colour of its share."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

from .. import __version__
from ..reporting import ColorScale, legend, number, page, plain, table, token_heat_map
from .rows import message_text
from .run import ScoreReport
from .sentences import HEADERS, SHOWN_DECIMALS, sentence_rows
from .summary import summary_lines


if TYPE_CHECKING:
    from ..rewards.sentence import SentenceReward


def sentence_page(
    report: ScoreReport, args: argparse.Namespace, command: str, output: str, reward: "SentenceReward"
) -> str:
    """The first rows, with every sentence in the colour of its contribution, and the command that makes the page."""
    examples = report.examples[: args.html_rows]
    scale = ColorScale.of(example.stats.contributions.tolist() for example in examples)
    blocks = []
    for example in examples:
        scores = example.stats
        name = f"line {example.row.line}" + (f" · id {example.row.extra['id']}" if "id" in example.row.extra else "")
        count = len(scores.sentences.spans)
        blocks.append(
            token_heat_map(
                scores.sentences.text,
                scores.sentences.spans,
                scores.contributions.tolist(),
                scale,
                unit="sentence",
                name="contribution",
                decimals=SHOWN_DECIMALS,
                others={"reward": scores.sentence_rewards[1:].tolist(), "weight": scores.weights[1:].tolist()},
                prompt=message_text(example.row.prompt),
                meta=f"{name} · score {number(scores.score)} · {count:,} sentence{'' if count == 1 else 's'}",
            )
        )
        blocks.append(
            Markup("<details><summary>Sentences</summary>{}</details>").format(
                table(
                    HEADERS,
                    [[*row[:-1], plain(str(row[-1]))] for row in sentence_rows(scores)],
                    decimals=SHOWN_DECIMALS,
                )
            )
        )
    return page(
        f"Sentence rewards of {Path(args.file).name}",
        [
            ("", Markup("").join([legend(scale, "contribution of a sentence"), *blocks])),
            ("Settings", table(["setting", "value"], [["segmenter", reward.config.segmenter]])),
        ],
        lead=f"The sentence reward model {args.model}, for the first {len(examples)} rows. A sentence's contribution is its "
        "weight times its reward; with the prompt's, which the first sentence has in its own, they sum to the score. "
        + " ".join(summary_lines(report, output, unit="")),
        footer=f"endotrl {__version__} · {command}",
    )
