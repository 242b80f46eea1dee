# SPDX-License-Identifier: Apache-2.0
"""The page of `endotrl score --html`: the first rows, with every token in the colour of what it contributes to the reward."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__
from ..reporting import heat_maps, page, table
from .rows import message_text
from .run import ScoreReport
from .summary import summary_lines


if TYPE_CHECKING:
    from ..rewards.endogenous import EndogenousReward


def heat_map_page(
    report: ScoreReport, args: argparse.Namespace, command: str, output: str, reward: "EndogenousReward"
) -> str:
    """The first rows, with every token in the colour of what it contributes, and the command that makes the page."""
    from ..rewards.contributions import heat_map_row

    rows = [
        heat_map_row(
            reward,
            example.stats,
            prompt=message_text(example.row.prompt),
            meta=f"line {example.row.line}"
            + (f" · id {example.row.extra['id']}" if "id" in example.row.extra else ""),
        )
        for example in report.examples
    ]
    settings = [
        ("token reward", args.token_reward), ("aggregate", args.aggregate), ("alpha", args.alpha), ("gamma", args.gamma),
        ("truncation", args.truncation), ("criterion", args.criterion),
    ]  # fmt: skip
    return page(
        f"Token rewards of {Path(args.file).name}",
        [
            ("", heat_maps(rows)),
            ("Settings", table(["setting", "value"], [[k, None if v is None else str(v)] for k, v in settings])),
        ],
        lead=f"The endogenous reward of {args.model}, in nats, for the first {len(rows)} rows. Colour is "
        "what a token contributes: the numbers of a row sum to its reward. " + " ".join(summary_lines(report, output)),
        footer=f"endotrl {__version__} · {command}",
    )
