# SPDX-License-Identifier: Apache-2.0
"""
The page of `endotrl score --html` with a sentence reward model: the first rows, every sentence in the colour of its
share.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

from .. import __version__
from ..data.formats import message_text
from ..reporting import HeatMapRow, heat_maps, page, plain, table
from .run import Example, ScoreReport
from .score_summary import summary_lines
from .sentences import HEADERS, SHOWN_DECIMALS, sentence_rows


if TYPE_CHECKING:
    from ..rewards.sentence import SentenceReward


def sentence_page(
    report: ScoreReport,
    reward: "SentenceReward",
    *,
    file: str,
    model: str,
    output: str,
    command: str,
    num_rows: int,
) -> str:
    """The first `num_rows` rows, with every sentence in the colour of its contribution: see [`heat_map_page`]."""
    examples = report.examples[:num_rows]
    rows = [_heat_map_row(example) for example in examples]
    return page(
        f"Sentence rewards of {Path(file).name}",
        [
            ("", heat_maps(rows, "contribution of a sentence", "score", "sentence", decimals=SHOWN_DECIMALS)),
            ("Settings", table(["setting", "value"], [["segmenter", reward.config.segmenter]])),
        ],
        lead=f"The sentence reward model {model}, for the first {len(examples)} rows. A sentence's contribution is "
        "its "
        "weight times its reward; with the prompt's, which the first sentence has in its own, they sum to the score. "
        + " ".join(summary_lines(report, output, unit="")),
        footer=f"endotrl {__version__} · {command}",
    )


def _heat_map_row(example: Example) -> HeatMapRow:
    row, scores = example.row, example.stats
    sentences = [[*cells[:-1], plain(str(cells[-1]))] for cells in sentence_rows(scores)]
    return HeatMapRow(
        text=scores.sentences.text,
        offsets=scores.sentences.spans,
        contributions=scores.contributions.tolist(),
        total=scores.score,
        rest={} if scores.sentences.spans else {"prompt": scores.score},
        columns={"reward": scores.sentence_rewards[1:].tolist(), "weight": scores.weights[1:].tolist()},
        prompt=message_text(row.prompt),
        meta=f"line {row.line}" + (f" · id {row.extra['id']}" if "id" in row.extra else ""),
        details=Markup("<details><summary>Sentences</summary>{}</details>").format(
            table(HEADERS, sentences, decimals=SHOWN_DECIMALS)
        ),
    )
