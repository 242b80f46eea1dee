# SPDX-License-Identifier: Apache-2.0
"""
Any preference dataset of TRL (https://huggingface.co/docs/trl/dataset_formats#preference): explicit or implicit
prompt, text or messages.
"""

from collections.abc import Iterable
from typing import Any

from ..items import Item
from ..sources import Row
from .base import STRICT, Benchmark, accuracy_metrics, pair_units


def read(rows: Iterable[Row]) -> list[Item]:
    """
    Rows `{"prompt", "chosen", "rejected"}`, or `{"chosen", "rejected"}` whose common beginning is the prompt, as TRL
    has it. Two equal conversations have no response after their common beginning, and are left out; two equal
    responses to a given prompt are a tie.
    """
    items = []
    for row in rows:
        chosen, rejected = row.get("chosen"), row.get("rejected")
        for key in ("chosen", "rejected"):
            _check(row, key, empty="prompt" in row.data)
        if isinstance(chosen, str) != isinstance(rejected, str):
            raise row.error('"chosen" and "rejected" must both be texts, or both be lists of messages.')
        if "prompt" in row.data:
            prompt = row.get("prompt")
            _check(row, "prompt", empty=False)
            if isinstance(prompt, str) and not isinstance(chosen, str):
                raise row.error('"prompt" is a text, but "chosen" is a list of messages. Give both alike.')
        elif chosen == rejected:
            continue
        else:
            prompt, chosen, rejected = split_prompt(row, chosen, rejected)
        items.append(Item(row.name("id"), row.stem, prompt, (chosen, rejected), better=((0, 1),)))
    return items


def split_prompt(row: Row, chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """
    The common beginning of two whole conversations or texts, and what follows. A text is cut before a space that both
    share, so that it belongs to the responses.
    """
    length = 0
    while length < min(len(chosen), len(rejected)) and chosen[length] == rejected[length]:
        length += 1
    if isinstance(chosen, str) and length and chosen[length - 1] == " ":
        length -= 1
    if length == 0:
        raise row.error(
            'there is no key "prompt", and "chosen" and "rejected" have no common beginning to take for it.'
        )
    if not isinstance(chosen, str) and min(len(chosen), len(rejected)) == length:
        raise row.error('one of "chosen" and "rejected" has no message after their common beginning.')
    return chosen[:length], chosen[length:], rejected[length:]


def _check(row: Row, key: str, empty: bool) -> None:
    value = row.data[key]
    if isinstance(value, str) and (value or empty):
        return
    if isinstance(value, list) and value and all(_is_message(message) for message in value):
        return
    text = "a text" if empty else "a text that is not empty"
    raise row.error(f'"{key}" must be {text}, or a list of messages {{"role": ..., "content": ...}}.')


def _is_message(message: object) -> bool:
    return (
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and (isinstance(message.get("content"), str | list) or "tool_calls" in message)
    )


BENCHMARK = Benchmark(
    name="preference",
    title="Preference dataset",
    paper="https://huggingface.co/docs/trl/dataset_formats#preference",
    hub=None,
    read=read,
    units=pair_units,
    metrics=accuracy_metrics,
    headline=("accuracy",),
    tie_rule=STRICT,
    chat=False,
)
