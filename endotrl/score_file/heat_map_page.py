# SPDX-License-Identifier: Apache-2.0
"""
The page of `endotrl score --html`: the first rows, with every token, or sentence, in the colour of what it contributes
to the reward.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from .. import __version__
from ..data.formats import images_of, message_text
from ..reporting import HeatMapRow, heat_maps, page, plain, settings_table, table
from .row_scores import Reward
from .run import Example, ScoreReport
from .score_summary import SENTENCE_DECIMALS, SENTENCE_HEADERS, sentence_rows, summary_lines


def heat_map_page(
    report: ScoreReport,
    reward: Reward,
    *,
    file: str,
    model: str,
    output: str,
    command: str,
    num_rows: int,
    settings: Mapping[str, Any],
) -> str:
    """The first `num_rows` rows; names of files and model, the `command` and the `settings` are shown as given."""
    from ..rewards.endogenous import EndogenousReward
    from ..rewards.scored import heat_map_row

    examples = report.examples[:num_rows]
    if isinstance(reward, EndogenousReward):
        kind, unit = "Token", " nats"
        maps = heat_maps(
            [heat_map_row(reward, e.stats, e.row.prompt, _name(e), images=images_of(e.row.extra)) for e in examples]
        )
        lead = (
            f"The endogenous reward of {model}, in nats, for the first {len(examples)} rows. Colour is what a token "
            "contributes: the numbers of a row sum to its reward."
        )
    else:
        kind, unit = "Sentence", ""
        rows = [_sentence_row(example) for example in examples]
        maps = heat_maps(rows, "contribution of a sentence", "score", "sentence", decimals=SENTENCE_DECIMALS)
        lead = (
            f"The sentence reward model {model}, for the first {len(examples)} rows. A sentence's contribution is its "
            "weight times its reward; with the prompt's, which the first sentence has in its own, they sum to the "
            "score."
        )
    shown = {name.replace("_", " "): value for name, value in settings.items()}
    return page(
        f"{kind} rewards of {Path(file).name}",
        [("", maps), ("Settings", settings_table(shown))],
        lead=" ".join([lead, *summary_lines(report, output, unit)]),
        footer=f"endotrl {__version__} · {command}",
    )


def _name(example: Example) -> str:
    row = example.row
    return f"line {row.line}" + (f" · id {row.extra['id']}" if "id" in row.extra else "")


def _sentence_row(example: Example) -> HeatMapRow:
    scores = example.stats
    sentences = [[*cells[:-1], plain(str(cells[-1]))] for cells in sentence_rows(scores)]
    return HeatMapRow(
        text=scores.sentences.text,
        offsets=scores.sentences.spans,
        contributions=scores.contributions.tolist(),
        total=scores.score,
        rest={} if scores.sentences.spans else {"prompt": scores.score},
        columns={"reward": scores.sentence_rewards[1:].tolist(), "weight": scores.weights[1:].tolist()},
        prompt=message_text(example.row.prompt),
        meta=_name(example),
        details=Markup("<details><summary>Sentences</summary>{}</details>").format(
            table(SENTENCE_HEADERS, sentences, decimals=SENTENCE_DECIMALS)
        ),
    )
