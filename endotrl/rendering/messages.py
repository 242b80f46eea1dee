# SPDX-License-Identifier: Apache-2.0
"""Prompts and completions as users give them: text or messages."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any


Message = Mapping[str, Any]
Prompt = str | Sequence[Message]
Completion = str | Sequence[Message]
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")  # of a dataset, by which a row is rendered


def check_batch(
    prompts: Sequence[Prompt], completions: Sequence[Completion], completion_ids: Sequence[Sequence[int]] | None
) -> None:
    """
    Raises `ValueError` or `TypeError` for a batch that is empty or has not one entry a row, and for rows that are
    neither text nor messages, not of one kind, or have a part that is no text, images of prompts excepted.
    """
    if isinstance(prompts, str) or isinstance(completions, str):
        raise TypeError("`prompts` and `completions` must be lists with one entry a row, but a string was given.")
    if len(prompts) != len(completions):
        raise ValueError(
            f"There are {len(prompts)} prompts and {len(completions)} completions. Every completion needs its prompt: "
            "repeat a prompt that has several completions."
        )
    if completion_ids is not None and len(completion_ids) != len(completions):
        raise ValueError(
            f"There are {len(completion_ids)} lists of `completion_ids` for {len(completions)} completions. Pass one "
            "list a completion, or leave `completion_ids` out to have the text encoded."
        )
    if len(prompts) == 0:
        raise ValueError("The batch is empty: `prompts` and `completions` have no rows, so there is nothing to score.")
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        _check_value(row, "prompt", prompt)
        _check_value(row, "completion", completion)
        if isinstance(prompt, str) and not isinstance(completion, str):
            raise TypeError(
                f"The prompt of row {row} is a string, but its completion is a list of messages. Make both of one "
                "kind."
            )
        if len(prompt) == 0 and not isinstance(prompt, str):
            raise ValueError(f"The prompt of row {row} is an empty list of messages. It needs at least one message.")


def _check_value(row: int, name: str, value: Prompt | Completion) -> None:
    if isinstance(value, str):
        return
    if not isinstance(value, Sequence) or not all(isinstance(m, Mapping) and "role" in m for m in value):
        raise TypeError(
            f"The {name} of row {row} is {_brief(value)}, but it must be a string or a list of messages such as "
            '[{"role": "user", "content": "..."}].'
        )
    for part in (part for message in as_messages(value) if has_parts(message) for part in message["content"]):
        if _part_text(part) is None and not (name == "prompt" and is_image_part(part)):
            kind = str(part.get("type")) if isinstance(part, Mapping) else type(part).__name__
            what = "text, and of prompts images, are read" if name == "prompt" else "text is scored"
            raise ValueError(
                f"The {name} of row {row} has a part of type {kind!r}, which the frozen model would not get to see: "
                f"only {what}. Leave such rows out, or reward them by another function."
            )


def add_criterion(prompt: Prompt, criterion: str | None) -> Prompt:
    """A prompt behind a criterion: in its system message, as templates accept only one, or as a first paragraph."""
    if criterion is None:
        return prompt
    if not isinstance(criterion, str):
        raise TypeError(f"A criterion is {_brief(criterion)}, but it must be a string, or `None` for no criterion.")
    if isinstance(prompt, str):
        return f"{criterion}\n\n{prompt}"
    if prompt and prompt[0]["role"] == "system":
        content = prompt[0].get("content")
        if not content:
            joined: str | list[Any] = criterion
        elif isinstance(content, str):
            joined = f"{criterion}\n\n{content}"
        else:  # parts, which templates write one after the other
            joined = [{"type": "text", "text": f"{criterion}\n\n"}, *content]
        return [{**prompt[0], "content": joined}, *prompt[1:]]
    return [{"role": "system", "content": criterion}, *prompt]


def criteria_of_rows(
    criterion: str | Mapping[str, str] | None, domain: Sequence[str] | None, num_rows: int
) -> list[str | None]:
    """The criterion of each row: the same for all, or by the row's domain."""
    if criterion is None or isinstance(criterion, str):
        return [criterion] * num_rows
    if domain is None:
        raise ValueError(
            f"`criterion` is a dictionary with the domains {sorted(criterion)}, so every row needs a domain, "
            "but the dataset has no column `domain`. Add one, or pass one criterion as a string."
        )
    if len(domain) != num_rows:
        raise ValueError(
            f"There are {len(domain)} entries in `domain` for {num_rows} prompts. Pass one a row: it selects the "
            "criterion under which the row is judged."
        )
    unknown = sorted(set(domain) - set(criterion), key=repr)
    if unknown:
        raise ValueError(f"There is no criterion for the domains {unknown}; `criterion` has {sorted(criterion)}.")
    return [criterion[d] for d in domain]


def images_of_rows(
    image: Sequence[Any] | None, images: Sequence[Any] | None, num_rows: int
) -> list[list[Any] | None] | None:
    """
    Images of the columns `image` (one a row) and `images` (several), which decides where both are, as in TRL.
    `ValueError` or `TypeError` for a column that has not one entry, or list, for each row.
    """
    name, column = ("images", images) if images is not None else ("image", image)
    if column is None:
        return None
    if len(column) != num_rows:
        raise ValueError(
            f"The column `{name}` has {len(column)} entries for {num_rows} prompts. It needs one for each."
        )
    if name == "image":
        return [None if entry is None else [entry] for entry in column]
    for row, entry in enumerate(column):
        if entry is not None and not isinstance(entry, list | tuple):
            raise TypeError(
                f"`images` of row {row} is a {type(entry).__name__}, but it must be a list of images. A column with "
                "one image a row is called `image`."
            )
    return [None if entry is None else list(entry) for entry in column]


def template_kwargs_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """
    Arguments for the chat template that a row of a dataset brings in its columns `tools` (a list, or its JSON) and
    `chat_template_kwargs`, as TRL's trainers on datasets read them. `ValueError` if they are something else.
    """
    tools, kwargs = row.get("tools") or None, row.get("chat_template_kwargs") or None
    if isinstance(tools, str):
        with suppress(ValueError):
            tools = json.loads(tools)
    for name, value, kind in (("tools", tools, list), ("chat_template_kwargs", kwargs, Mapping)):
        if value is not None and not isinstance(value, kind):
            raise ValueError(
                f"`{name}` of a row is a {type(value).__name__}, but it must be a "
                f"{'list' if kind is list else 'mapping'}, as the chat template takes it. Rename the column if it is "
                "something else."
            )
    return {**({"tools": tools} if tools else {}), **(kwargs or {})}


def as_messages(value: Prompt | Completion, role: str = "assistant") -> list[Message]:
    """A completion, or the prompt of a `role`, as a list of messages."""
    return [{"role": role, "content": value}] if isinstance(value, str) else list(value)


def continued(prompt: Sequence[Message], message: Message) -> list[Message]:
    """A prompt whose last message goes on with what another one says."""
    return [*prompt[:-1], {**prompt[-1], **message, "content": "".join([*texts_of(prompt[-1]), *texts_of(message)])}]


def text_of(completion: Completion) -> str:
    """The text that a completion ends with: of messages, that of the last one."""
    if isinstance(completion, str):
        return completion
    return "".join(texts_of(completion[-1])) if completion else ""


def texts_of(message: Message) -> list[str]:
    """Texts of a message: of its content, or of the parts that its content has."""
    if has_parts(message):
        return [_part_text(part) or "" for part in message["content"]]
    content = message.get("content")
    return [content] if isinstance(content, str) and content else []


def with_texts(message: Message, texts: Sequence[str], mark: str) -> Message:
    """A message with other texts, one for each of [`texts_of`]; `mark` is added to every part as a key."""
    if not has_parts(message):
        return {**message, "content": texts[0]} if texts else message
    parts: list[Any] = []
    for part, text in zip(message["content"], texts, strict=True):
        if not isinstance(part, Mapping) or is_image_part(part):
            parts.append(part if isinstance(part, Mapping) else text)
            continue
        key = "text" if "text" in part else part["type"]
        parts.append({**part, key: text, mark: mark})
    return {**message, "content": parts}


def as_text(message: Message) -> Message:
    """A message whose content is one string, whatever parts it had."""
    return {**message, "content": "".join(texts_of(message))} if has_parts(message) else message


def as_parts(message: Message) -> Message:
    """A message whose content is a list of parts, as models that also read images have it."""
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def has_parts(message: Message) -> bool:
    """Whether the content of a message is a list of parts."""
    return isinstance(message.get("content"), list | tuple)


def _part_text(part: Any) -> str | None:
    """Text of a part of a message; `None` if it is no text."""
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        return None
    kind = part.get("type", "text")
    if _modality(part) in ("image", "video", "audio"):
        return None
    # `{"type": "thinking", "thinking": "..."}` is text as well. Datasets fill keys that other parts have with `None`.
    text = (part["text"] or "") if "text" in part else part.get(kind)
    return text if isinstance(text, str) else None


def is_image_part(part: Any) -> bool:
    """Whether a part of a message is an image, given or to come."""
    return isinstance(part, Mapping) and _modality(part) == "image"


def image_parts(messages: Sequence[Message]) -> list[Any]:
    """Parts of messages that are images."""
    return [part for m in messages if has_parts(m) for part in m["content"] if is_image_part(part)]


def _modality(part: Mapping[str, Any]) -> str | None:
    kind = part.get("type", "text")
    return kind.removesuffix("_url").removeprefix("input_") if isinstance(kind, str) else None


def says_more(message: Message) -> bool:
    """Whether there is more in a message than its content: the call of a tool, reasoning."""
    return any(value for key, value in message.items() if key not in ("role", "content", "name"))


def _brief(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
