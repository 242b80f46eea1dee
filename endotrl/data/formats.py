# SPDX-License-Identifier: Apache-2.0
"""
Row formats: TRL's dataset formats (https://huggingface.co/docs/trl/dataset_formats), plain and conversational.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


_ONLY_ROW = re.compile(r"\b([Rr])ows? 0\b(?: of 1\b)?")
ROW_FORMAT = '{"prompt": ..., "completion": ...}'


@dataclass(frozen=True)
class Responses:
    """
    The prompt of a row and its responses: one from prompt-completion rows, `{"prompt", "completion"}` or
    `{"messages"}`; two from preferences, `{"chosen", "rejected"}` with or without `"prompt"`; any number of
    candidates, `{"prompt", "completions"}`. All are text or messages.
    """

    prompt: Any
    completions: list[Any]
    completion_ids: list[list[int] | None]  # for each, its tokens as the policy generated them
    names: list[str | int | None]  # "chosen" and "rejected", numbers from 0, or None for a single response
    extra: dict[str, Any]  # the row's other keys


def responses_of(row: Mapping[str, Any]) -> Responses:
    """Parses a row with responses in any of TRL's formats. Raises `ValueError` with the reason if it has none."""
    row = dict(row)
    names: list[str | int | None] = [None]
    if "completion" in row or not row.keys() & {"completions", "chosen", "rejected", "messages"}:
        for key in ("prompt", "completion"):
            if key not in row:
                raise ValueError(f'The key "{key}" is missing. A row is {ROW_FORMAT}, or of another format of TRL.')
        prompt, completions, ids = row.pop("prompt"), [row.pop("completion")], [row.pop("completion_ids", None)]
    elif "completions" in row:
        prompt, completions = _get(row, "prompt"), row.pop("completions")
        if "labels" in row or not isinstance(completions, list) or not completions:
            raise ValueError("The completions must be a list of one or more whole responses, not the steps of one.")
        ids, names = row.pop("completion_ids", None) or [None] * len(completions), [*range(len(completions))]
        if not isinstance(ids, list) or len(ids) != len(completions):
            raise ValueError("The completion_ids must be one list of token ids for each of the completions, in order.")
    elif "chosen" in row or "rejected" in row:
        completions, names = [_get(row, "chosen"), _get(row, "rejected")], ["chosen", "rejected"]
        for name, completion in zip(names, completions, strict=True):
            _check(str(name), completion)
        if isinstance(completions[0], str) != isinstance(completions[1], str):
            raise ValueError("The chosen and the rejected must both be texts, or both be lists of messages.")
        prompt, *completions = (
            [row.pop("prompt"), *completions] if row.get("prompt") is not None else split_prompt(*completions)
        )
        row.pop("prompt", None)
        ids = [None, None]
    else:
        messages = row.pop("messages")
        _check("messages", messages)
        if isinstance(messages, str) or len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise ValueError("The messages must end with one of the assistant, which is scored, and begin before it.")
        prompt, completions, ids = messages[:-1], [messages[-1:]], [None]
    _check("prompt", prompt)
    for name, completion, token_ids in zip(names, completions, ids, strict=True):
        _check("completion" if name is None else name if isinstance(name, str) else f"completion {name}", completion)
        if isinstance(prompt, str) and not isinstance(completion, str):
            raise ValueError("The prompt is text, but the completion is messages. Give both alike.")
        _check_ids(token_ids)
    return Responses(prompt, completions, ids, names, row)


def images_of(row: Mapping[str, Any]) -> list[Any] | None:
    """Images of a row, from `images` (a list) or `image` (one), or `None`. `ValueError` if `images` is not a list."""
    images, image = row.get("images"), row.get("image")
    if images is not None and not isinstance(images, list):
        raise ValueError(f"`images` is a {type(images).__name__}, but must be a list of images; one is `image`.")
    return images if images is not None else None if image is None else [image]


def about_this_row(message: str) -> str:
    """Error message about the only row of a batch, without its number (0): the reader knows which row it is."""
    return _ONLY_ROW.sub(lambda match: "This row" if match[1] == "R" else "this row", message)


def split_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """
    Splits two whole conversations or texts into their common prefix, which TRL takes as the prompt, and the rest of
    each. Text is split before a space that both share, so that it belongs to the responses. Raises `ValueError` if
    there is no common prefix, or nothing follows it.
    """
    length = 0
    while length < min(len(chosen), len(rejected)) and chosen[length] == rejected[length]:
        length += 1
    if isinstance(chosen, str) and length and chosen[length - 1] == " ":
        length -= 1
    if length == 0:
        raise ValueError('There is no "prompt", and "chosen" and "rejected" have no common beginning to take for it.')
    if not isinstance(chosen, str) and min(len(chosen), len(rejected)) == length:
        raise ValueError('One of "chosen" and "rejected" has no message after their common beginning.')
    return chosen[:length], chosen[length:], rejected[length:]


def message_text(value: str | Sequence[Mapping[str, Any]]) -> str:
    """Prompt or completion as readable text: the content of its messages, with the roles if there are several."""
    if isinstance(value, str):
        return value
    turns = []
    for message in value:
        content = message.get("content") or ""
        if not isinstance(content, str):
            content = " ".join(map(_part_text, content))
        if message.get("tool_calls"):
            content += json.dumps(message["tool_calls"], ensure_ascii=False)
        turns.append(content if len(value) == 1 else f"{message['role']}: {content}")
    return "\n".join(turns)


def _part_text(part: Any) -> str:
    if not isinstance(part, dict):
        return str(part)
    is_image = str(part.get("type")).removeprefix("input_").startswith("image")
    return "[image]" if is_image else str(part.get("text", part))


def check_text(key: str, value: object) -> str | None:
    """Reason why a prompt or completion, called `key`, is neither text nor messages; `None` if it is one of them."""
    if isinstance(value, str):
        return (
            "The prompt is empty, so that the first token has no context." if key == "prompt" and value == "" else None
        )
    if not isinstance(value, list):
        return f"The {key} must be text or a list of messages, but it is of type {type(value).__name__}."
    if not value:
        return f"The {key} is an empty list of messages. It needs at least one."
    for i, message in enumerate(value, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return f'Message {i} of the {key} must be an object {{"role": ..., "content": ...}} with a role as text.'
        content = message.get("content")
        if not isinstance(content, str | list) and not (content is None and message.get("tool_calls")):
            return f"Message {i} of the {key} has no content that is text or a list of parts."
    return None


def _get(row: dict[str, Any], key: str) -> Any:
    if key not in row:
        raise ValueError(f'The key "{key}" is missing. There are {sorted(row)}.')
    return row.pop(key)


def _check(key: str, value: object) -> None:
    reason = check_text(key, value)
    if reason is not None:
        raise ValueError(reason)


def _check_ids(ids: object) -> None:
    if ids is None:  # `null` in a table: the row has none
        return
    if not isinstance(ids, list):
        raise ValueError(f"The completion_ids must be a list of token ids, but they are of type {type(ids).__name__}.")
    for i, token_id in enumerate(ids, start=1):
        if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
            entry = json.dumps(token_id)[:40]
            raise ValueError(f"Entry {i} of the completion_ids is {entry}, but a token id is a whole number from 0.")
