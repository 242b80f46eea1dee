# SPDX-License-Identifier: Apache-2.0
"""
The page of `endotrl score --html`: the first rows, with every token in the colour of what it contributes to the
reward.
"""

from collections.abc import Mapping
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from .. import __version__
from ..reporting import figure, heat_maps, page, table
from .blocks import images_of_row
from .rows import Row, message_text
from .run import ScoreReport
from .summary import summary_lines


if TYPE_CHECKING:
    from ..rewards.endogenous import EndogenousReward


MAX_PIXELS = 320  # of a picture on the page, on its longer side


def _pictures(row: Row) -> Markup:
    """The images of a row's prompt, scaled down and embedded in the page."""
    from ..rendering.images import load_picture, place_images

    shown = []
    _, pictures = place_images(0, row.prompt, images_of_row(row))
    for number, picture in enumerate(pictures, start=1):
        image = load_picture(0, picture).convert("RGB")
        image.thumbnail((MAX_PIXELS, MAX_PIXELS))
        buffer = BytesIO()
        image.save(buffer, format="png")
        shown.append(figure(buffer.getvalue(), alt=f"Image {number} of the prompt"))
    return Markup("").join(shown)


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
    from ..rewards.contributions import heat_map_row

    rows = [
        replace(
            heat_map_row(
                reward,
                example.stats,
                prompt=message_text(example.row.prompt),
                meta=f"line {example.row.line}"
                + (f" · id {example.row.extra['id']}" if "id" in example.row.extra else ""),
            ),
            details=_pictures(example.row),
        )
        for example in report.examples
    ]
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
