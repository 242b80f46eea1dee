# SPDX-License-Identifier: Apache-2.0
"""
Any preference dataset in TRL's format (https://huggingface.co/docs/trl/dataset_formats#preference): explicit or
implicit prompt, text or messages.
"""

from collections.abc import Iterable

from ...data.formats import about_this_row, images_of, responses_of
from ...data.sources import Row
from ...rendering.messages import TEMPLATE_COLUMNS, template_kwargs_of
from ..items import Item
from .benchmark import Benchmark, accuracy_metrics


def read(rows: Iterable[Row]) -> list[Item]:
    """
    Rows `{"prompt", "chosen", "rejected"}`, or `{"chosen", "rejected"}` whose common prefix is the prompt, as in TRL.
    Two equal conversations have no response after their common prefix, and are left out; two equal responses to an
    explicit prompt are a tie. Images are in the prompt's messages, or in the columns `image` and `images`.
    """
    from ...rendering.images import place_images  # with torch

    items = []
    for row in rows:
        if row.data.get("prompt") is None and row.get("chosen") == row.get("rejected"):
            continue
        try:
            pair = responses_of({key: row.data[key] for key in ("prompt", "chosen", "rejected") if key in row.data})
            if not isinstance(pair.prompt, str) and template_kwargs_of(row.data):
                columns = " or ".join(TEMPLATE_COLUMNS)
                raise ValueError(f"It has {columns}, which the scorers compared here do not read.")
            prompt, images = place_images(0, pair.prompt, images_of(row.data))
            responses = tuple(pair.completions)
            item = Item(row.name("id"), row.stem, prompt, responses, better=((0, 1),), images=tuple(images))
            _ = item.key  # reads the images
        except (ValueError, TypeError) as error:
            raise row.error(about_this_row(str(error))) from error
        items.append(item)
    return items


BENCHMARK = Benchmark(
    name="preference",
    title="Preference dataset",
    paper="https://huggingface.co/docs/trl/dataset_formats#preference",
    hub=None,
    read=read,
    metrics=accuracy_metrics,
    headline=("accuracy",),
    chat=False,
    reads_images=True,
)
