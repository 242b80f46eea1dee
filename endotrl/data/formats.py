# SPDX-License-Identifier: Apache-2.0
"""
Row formats: TRL's dataset formats (https://huggingface.co/docs/trl/dataset_formats), plain and conversational.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
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
    extra = dict(row)

    def take(key: str) -> Any:
        if key not in extra:
            here = f'The key "{key}" is missing. The row has only {sorted(row)}.'
            raise ValueError(f"{here} Use {ROW_FORMAT} or another of TRL's formats.")
        return extra.pop(key)

    names: list[str | int | None] = [None]
    ids: Any = [None]
    if "completion" in row or not row.keys() & {"completions", "chosen", "rejected", "messages"}:
        prompt, completions, ids = take("prompt"), [take("completion")], [extra.pop("completion_ids", None)]
    elif "completions" in row:
        prompt, completions = take("prompt"), take("completions")
        if "labels" in row or not isinstance(completions, list) or not completions:
            raise ValueError("The completions must be a list of one or more whole responses, not the steps of one.")
        ids, names = extra.pop("completion_ids", None) or [None] * len(completions), [*range(len(completions))]
        if not isinstance(ids, list) or len(ids) != len(completions):
            raise ValueError("The completion_ids must be one list of token ids per completion, in the same order.")
    elif row.keys() & {"chosen", "rejected"}:
        names, completions, prompt = ["chosen", "rejected"], [take("chosen"), take("rejected")], row.get("prompt")
        for name, completion in zip(names, completions, strict=True):
            _check(str(name), completion)
        if isinstance(completions[0], str) != isinstance(completions[1], str):
            raise ValueError("The chosen and the rejected response must both be text, or both be lists of messages.")
        if prompt is None:
            prompt, *completions = split_prompt(*completions)
        extra.pop("prompt", None)
        ids = [None, None]
    else:
        messages = take("messages")
        _check("messages", messages)
        if isinstance(messages, str) or len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise ValueError(
                "The messages must end with an assistant message, which is scored, after at least one other message."
            )
        prompt, completions = messages[:-1], [messages[-1:]]
    _check("prompt", prompt)
    for name, completion, token_ids in zip(names, completions, ids, strict=True):
        _check("completion" if name is None else name if isinstance(name, str) else f"completion {name}", completion)
        if isinstance(prompt, str) and not isinstance(completion, str):
            raise ValueError("The prompt is text, but the completion is a list of messages. Use one format for both.")
        _check_ids(token_ids)
    return Responses(prompt, completions, ids, names, extra)


def images_of(row: Mapping[str, Any]) -> list[Any] | None:
    """Images of a row, from `images` (a list) or `image` (one), or `None`. `ValueError` if `images` is not a list."""
    images, image = row.get("images"), row.get("image")
    if images is not None and not isinstance(images, list):
        raise ValueError(f"`images` must be a list, got {type(images).__name__}. Pass a single image as `image`.")
    return [image] if images is None and image is not None else images


def about_this_row(message: str) -> str:
    """Error message about the only row of a batch, without its number (0): the reader knows which row it is."""
    return _ONLY_ROW.sub(lambda match: "This row" if match[1] == "R" else "this row", message)


def split_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """
    Splits two whole conversations or texts into their common prefix, which TRL takes as the prompt, and the rest of
    each. Text is split before a space that both share, so that it belongs to the responses. Raises `ValueError` if
    there is no common prefix, or nothing follows it.
    """
    length = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    if isinstance(chosen, str) and length and chosen[length - 1] == " ":
        length -= 1
    if length == 0:
        raise ValueError('There is no "prompt", and "chosen" and "rejected" share no beginning that could be one.')
    if not isinstance(chosen, str) and min(len(chosen), len(rejected)) == length:
        raise ValueError('"chosen" or "rejected" has no message after the beginning that they share.')
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
        return "The prompt is empty, so the first token has no context." if key == "prompt" and value == "" else None
    if not isinstance(value, list):
        return f"The {key} must be text or a list of messages, got {type(value).__name__}."
    if not value:
        return f"The {key} is an empty list of messages, but it must have at least one."
    for i, message in enumerate(value, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return f'Message {i} of the {key} must be an object {{"role": ..., "content": ...}}, and the role text.'
        content = message.get("content")
        if not isinstance(content, str | list) and not (content is None and message.get("tool_calls")):
            return f"The content of message {i} of the {key} must be text or a list of parts."
    return None


def _check(key: str, value: object) -> None:
    reason = check_text(key, value)
    if reason is not None:
        raise ValueError(reason)


def _check_ids(ids: object) -> None:
    if ids is None:  # `null` in a table: the row has none
        return
    if not isinstance(ids, list):
        raise ValueError(f"The completion_ids must be a list of token ids, got {type(ids).__name__}.")
    for i, token_id in enumerate(ids, start=1):
        if type(token_id) is not int or token_id < 0:
            got = json.dumps(token_id)[:40]
            raise ValueError(f"Entry {i} of the completion_ids must be a token id, a whole number from 0, got {got}.")
