# SPDX-License-Identifier: Apache-2.0
"""The page of `endotrl score --html`: the first rows, with every token in the colour of its reward."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

from .. import __version__
from ..reporting import ColorScale, legend, number, page, table, token_heat_map
from .rows import message_text
from .run import ScoreReport
from .summary import summary_lines


if TYPE_CHECKING:
    from ..rewards.endogenous import EndogenousReward


def heat_map_page(
    report: ScoreReport, args: argparse.Namespace, command: str, output: str, reward: "EndogenousReward"
) -> str:
    """The first rows, with every token in the colour of its reward, and the command that makes the page."""
    rewards = [reward.token_rewards_from(example.stats)[example.stats.positions] for example in report.examples]
    # The end of a finished answer gets the whole of f(s_H, a_H), as V of the end is 0: it would set the scale alone.
    inner = [
        row[:-1] if example.stats.finished else row for row, example in zip(rewards, report.examples, strict=True)
    ]
    scale = ColorScale.of(row.tolist() for row in inner)
    maps = []
    for example, row_rewards in zip(report.examples, rewards, strict=True):
        stats, outcome = example.stats, reward.aggregate_from(example.stats)
        name = f"line {example.row.line}" + (f" · id {example.row.extra['id']}" if "id" in example.row.extra else "")
        maps.append(
            token_heat_map(
                stats.text or "",
                stats.offsets or [],
                row_rewards.tolist(),
                scale,
                log_probs=stats.log_probs.tolist(),
                soft_values=stats.soft_values.tolist(),
                entropies=None if stats.entropies is None else stats.entropies.tolist(),
                eos=stats.finished,
                prompt=message_text(example.row.prompt),
                meta=f"{name} · reward {number(outcome)} · {len(stats.token_ids)} tokens",
            )
        )
    settings = [
        ("token reward", args.token_reward), ("aggregate", args.aggregate), ("alpha", args.alpha), ("gamma", args.gamma),
        ("truncation", args.truncation), ("criterion", args.criterion),
    ]  # fmt: skip
    return page(
        f"Token rewards of {Path(args.file).name}",
        [
            ("", Markup("").join([legend(scale), *maps])),
            ("Settings", table(["setting", "value"], [[k, None if v is None else str(v)] for k, v in settings])),
        ],
        lead=f"The endogenous reward of {args.model}, in nats, for the first {len(maps)} rows. "
        + " ".join(summary_lines(report, output)),
        footer=f"endotrl {__version__} · {command}",
    )
