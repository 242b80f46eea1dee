# SPDX-License-Identifier: Apache-2.0
"""
The page of `endotrl score --html`: the first rows, with every token in the colour of what it contributes to the
reward.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..data.formats import images_of
from ..reporting import heat_maps, page, table
from .run import ScoreReport
from .score_summary import summary_lines


if TYPE_CHECKING:
    from ..rewards.endogenous import EndogenousReward


def heat_map_page(
    report: ScoreReport,
    reward: "EndogenousReward",
    *,
    file: str,
    model: str,
    output: str,
    command: str,
    settings: Mapping[str, Any],
) -> str:
    """
    The first rows, with every token in the colour of what it contributes. Names of `file`, `model` and `output`, the
    `command` and the `settings` of the reward are shown as they are given.
    """
    from ..rewards.scored import heat_map_row

    rows = []
    for example in report.examples:
        row = example.row
        name = f" · id {row.extra['id']}" if "id" in row.extra else ""
        meta = f"line {row.line}{name}"
        rows.append(heat_map_row(reward, example.stats, row.prompt, meta, images=images_of(row.extra)))
    shown = [[name.replace("_", " "), None if value is None else str(value)] for name, value in settings.items()]
    return page(
        f"Token rewards of {Path(file).name}",
        [
            ("", heat_maps(rows)),
            ("Settings", table(["setting", "value"], shown)),
        ],
        lead=f"The endogenous reward of {model}, in nats, for the first {len(rows)} rows. Colour is "
        "what a token contributes: the numbers of a row sum to its reward. " + " ".join(summary_lines(report, output)),
        footer=f"endotrl {__version__} · {command}",
    )
