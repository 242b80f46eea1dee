# SPDX-License-Identifier: Apache-2.0
"""
Any preference dataset of TRL (https://huggingface.co/docs/trl/dataset_formats#preference): explicit or implicit
prompt, text or messages.
"""

from collections.abc import Iterable

from ...data.formats import responses_of
from ...data.sources import Row
from ..items import Item
from .base import Benchmark, accuracy_metrics


def read(rows: Iterable[Row]) -> list[Item]:
    """
    Rows `{"prompt", "chosen", "rejected"}`, or `{"chosen", "rejected"}` whose common beginning is the prompt, as TRL
    has it. Two equal conversations have no response after their common beginning, and are left out; two equal
    responses to a given prompt are a tie.
    """
    items = []
    for row in rows:
        if row.data.get("prompt") is None and row.get("chosen") == row.get("rejected"):
            continue
        try:
            pair = responses_of({key: row.data[key] for key in ("prompt", "chosen", "rejected") if key in row.data})
        except ValueError as error:
            raise row.error(str(error)) from error
        items.append(Item(row.name("id"), row.stem, pair.prompt, tuple(pair.completions), better=((0, 1),)))
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
)
