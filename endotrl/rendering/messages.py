# SPDX-License-Identifier: Apache-2.0
"""Prompts and completions as text or messages, and the chat template that renders messages to text."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError


if TYPE_CHECKING:  # slow imports, not needed by commands that only read results
    from transformers import PreTrainedTokenizerBase, ProcessorMixin


Message = Mapping[str, Any]
Prompt = str | Sequence[Message]
Completion = str | Sequence[Message]
# Of a batch
Prompts = Sequence[Prompt]
Completions = Sequence[Completion]
TokenIds = Sequence[Sequence[int]]
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")  # dataset columns for rendering a row

# A template is a program: on a message that it was not written for, it may raise any of Python's errors.
REFUSALS = (TemplateError, TypeError, AttributeError, LookupError)
# Placeholders for the texts of messages, to test whether a template writes them: words in no template.
WORD, MARK = "Endotrl", "endotrl_probe"
# Texts to encode another one after, to see its encoding inside a text.
ANCHORS = ("x", "\n", ".", "1", "\u4e00")


def check_batch(prompts: Prompts, completions: Completions, completion_ids: TokenIds | None) -> None:
    """Raises for a batch without one entry per row, and for rows other than text or messages, or with other parts."""
    if isinstance(prompts, str) or isinstance(completions, str):
        raise TypeError("`prompts` and `completions` must be lists with one entry per row, got a string.")
    check_lengths(len(prompts), completions=completions, completion_ids=completion_ids)
    if len(prompts) == 0:
        raise ValueError("The batch is empty, so there is nothing to score. Pass at least one prompt and completion.")
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        _check_value(row, "prompt", prompt)
        _check_value(row, "completion", completion)
        if isinstance(prompt, str) and not isinstance(completion, str):
            raise TypeError(
                f"The prompt of row {row} is a string, but its completion is a list of messages. Pass both as strings "
                "or both as messages."
            )
        if len(prompt) == 0 and not isinstance(prompt, str):
            raise ValueError(f"The prompt of row {row} is an empty list of messages. Pass at least one message.")


def check_lengths(num_rows: int, **columns: Sequence[Any] | None) -> None:
    """Raises `ValueError` for a column of a batch that does not have one entry per prompt."""
    for name, column in columns.items():
        if column is not None and len(column) != num_rows:
            raise ValueError(
                f"`{name}` has {len(column)} entries for {num_rows} prompts. Pass one entry per prompt, and repeat a "
                "prompt that has several completions."
            )


def _check_value(row: int, name: str, value: Prompt | Completion) -> None:
    if isinstance(value, str):
        return
    if not isinstance(value, Sequence) or not all(isinstance(m, Mapping) and "role" in m for m in value):
        raise TypeError(
            f"The {name} of row {row} must be a string or a list of messages such as "
            f'[{{"role": "user", "content": "..."}}], got {type(value).__name__} {repr(value)[:60]}.'
        )
    for part in [part for message in as_messages(value) if has_parts(message) for part in message["content"]]:
        if _part_text(part) is None and not (name == "prompt" and is_image_part(part)):
            kind = str(part.get("type")) if isinstance(part, Mapping) else type(part).__name__
            raise ValueError(
                f"The {name} of row {row} has a content part of type {kind!r}, which the frozen model would not see: "
                "prompts can contain text and images, completions only text. Remove such rows, or score them with "
                "another reward function."
            )


def add_criterion(prompt: Prompt, criterion: str | None) -> Prompt:
    """A prompt with a criterion before it: in its system message, as templates accept only one, or as a paragraph."""
    if criterion is None:
        return prompt
    if isinstance(prompt, str):
        return f"{criterion}\n\n{prompt}"
    if not prompt or prompt[0]["role"] != "system":
        return [{"role": "system", "content": criterion}, *prompt]
    content = prompt[0].get("content")
    joined: str | list[Any] = f"{criterion}\n\n{content}" if content else criterion
    if content and not isinstance(content, str):  # parts, which templates concatenate
        joined = [{"type": "text", "text": f"{criterion}\n\n"}, *content]
    return [{**prompt[0], "content": joined}, *prompt[1:]]


def criteria_of_rows(
    criterion: str | Mapping[str, str] | None, domain: Sequence[str] | None, num_rows: int
) -> list[str | None]:
    """Criterion per row: the same for all, or by the row's domain."""
    if criterion is None or isinstance(criterion, str):
        return [criterion] * num_rows
    if domain is None:
        raise ValueError(
            f"`criterion` is a dictionary with the domains {sorted(criterion)}, but the dataset has no column "
            "`domain`. Add one, or pass a single criterion as a string."
        )
    check_lengths(num_rows, domain=domain)
    if unknown := sorted(set(domain) - set(criterion), key=repr):
        raise ValueError(
            f"There is no criterion for the domains {unknown}; `criterion` has {sorted(criterion)}. Add the others."
        )
    return [criterion[d] for d in domain]


def images_of_rows(
    image: Sequence[Any] | None, images: Sequence[Any] | None, num_rows: int
) -> list[list[Any] | None] | None:
    """Images of the columns `image` (one per row) and `images` (several), which takes precedence, as in TRL."""
    check_lengths(num_rows, image=None if images is not None else image, images=images)
    if images is None:
        return None if image is None else [None if entry is None else [entry] for entry in image]
    for row, entry in enumerate(images):
        if entry is not None and not isinstance(entry, list | tuple):
            raise TypeError(
                f"`images` of row {row} must be a list of images, got {type(entry).__name__}. Name the column `image` "
                "if it has one image per row."
            )
    return [None if entry is None else list(entry) for entry in images]


def template_kwargs_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Chat template arguments from a row's `tools` (a list, or its JSON) and `chat_template_kwargs`."""
    tools, kwargs = row.get("tools") or [], row.get("chat_template_kwargs") or {}
    if isinstance(tools, str):
        with suppress(ValueError):
            tools = json.loads(tools) or []
    for name, value, kind in (("tools", tools, list), ("chat_template_kwargs", kwargs, Mapping)):
        if not isinstance(value, kind):
            raise ValueError(
                f"`{name}` of a row must be a {kind.__name__.lower()} for the chat template, got "
                f"{type(value).__name__}. Rename the column if it contains something else."
            )
    return {**({"tools": tools} if tools else {}), **kwargs}


def as_messages(value: Prompt | Completion, role: str = "assistant") -> list[Message]:
    """A completion, or a prompt with a `role`, as a list of messages."""
    return [{"role": role, "content": value}] if isinstance(value, str) else list(value)


def continued(prompt: Sequence[Message], message: Message) -> list[Message]:
    """A prompt whose last message is continued by the text of another one."""
    return [*prompt[:-1], {**prompt[-1], **message, "content": "".join([*texts_of(prompt[-1]), *texts_of(message)])}]


def text_of(completion: Completion) -> str:
    """The last text of a completion: for messages, that of the last one."""
    if isinstance(completion, str):
        return completion
    return "".join(texts_of(completion[-1])) if completion else ""


def texts_of(message: Message) -> list[str]:
    """Texts of a message: its content, or the text parts of its content."""
    if has_parts(message):
        return [_part_text(part) or "" for part in message["content"]]
    content = message.get("content")
    return [content] if isinstance(content, str) and content else []


def _with_texts(message: Message, texts: Sequence[str]) -> Message:
    """A message with new texts, one for each of [`texts_of`]; text parts get `MARK` as another key."""

    def changed(part: Any, text: str) -> Any:
        if is_image_part(part) or not isinstance(part, Mapping):
            return part if is_image_part(part) else text
        return {**part, "text" if "text" in part else part["type"]: text, MARK: MARK}

    if has_parts(message):
        return {**message, "content": list(map(changed, message["content"], texts))}
    return {**message, "content": texts[0]} if texts else message


def as_text(message: Message) -> Message:
    """A message with its content as one string, whatever its parts."""
    return {**message, "content": "".join(texts_of(message))} if has_parts(message) else message


def as_parts(message: Message) -> Message:
    """A message with its content as a list of parts, as in models that also read images."""
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def has_parts(message: Message) -> bool:
    """Whether the content of a message is a list of parts."""
    return isinstance(message.get("content"), list | tuple)


def _part_text(part: Any) -> str | None:
    """Text of a message part; `None` if it is not text."""
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        return None
    kind = part.get("type", "text")
    if _modality(part) in ("image", "video", "audio"):
        return None
    # `{"type": "thinking", "thinking": "..."}` is text as well. Datasets fill the keys of other parts with `None`.
    text = (part["text"] or "") if "text" in part else part.get(kind)
    return text if isinstance(text, str) else None


def is_image_part(part: Any) -> bool:
    """Whether a message part is an image, or a placeholder for one."""
    return isinstance(part, Mapping) and _modality(part) == "image"


def image_parts(messages: Sequence[Message]) -> list[Any]:
    """Image parts of messages."""
    return [part for m in messages if has_parts(m) for part in m["content"] if is_image_part(part)]


def _modality(part: Mapping[str, Any]) -> str | None:
    kind = part.get("type", "text")
    return kind.removesuffix("_url").removeprefix("input_") if isinstance(kind, str) else None


def says_more(message: Message) -> bool:
    """Whether a message has more than its content: a tool call, reasoning."""
    return any(value for key, value in message.items() if key not in ("role", "content", "name"))


def tokenizer_of(processing_class: "PreTrainedTokenizerBase | ProcessorMixin") -> "PreTrainedTokenizerBase":
    """The tokenizer itself, or that of a processor."""
    from transformers import ProcessorMixin  # slow import: see above

    return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class


def _unchanged(message: Message) -> Message:
    return message


class _LeftOut(Exception):
    """Text that a template leaves out."""


class Template:
    """
    A tokenizer, or a processor with its own template, BOS and expansion of text, and chat template arguments.

    Templates read content as text, as a list of parts, or both; of the other form they write nothing, or a Python
    list. Messages are converted to the form that the template reads, and a message of which it still leaves out
    something (such as the role "tool") is rejected. Changes to text that it writes (stripped white space, removed
    reasoning) are accepted.
    """

    def __init__(
        self,
        processing_class: "PreTrainedTokenizerBase | ProcessorMixin",
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.processing_class = processing_class
        self.tokenizer = tokenizer_of(processing_class)
        self.is_processor = self.tokenizer is not processing_class
        self.chat_template_kwargs = chat_template_kwargs or {}
        # A processor without a template uses its tokenizer's.
        self._writer: Any = self.tokenizer if processing_class.chat_template is None else processing_class
        # Conversion for the template, per shape of messages.
        self._forms: dict[Any, Callable[[Message], Message]] = {}

    @property
    def exists(self) -> bool:
        return self._writer.chat_template is not None or self.chat_template_kwargs.get("chat_template") is not None

    @cached_property
    def prefix_preserving(self) -> "Template":
        """This template, or, if it rewrites earlier turns when later ones follow, TRL's training version of it."""
        from trl.chat_template_utils import get_training_chat_template, is_chat_template_prefix_preserving

        if "chat_template" in self.chat_template_kwargs:
            return self
        try:
            if is_chat_template_prefix_preserving(self._writer):
                return self
            training = get_training_chat_template(self._writer)
        except (*REFUSALS, ValueError):  # a template without tool calls, or unknown to TRL
            return self
        return Template(self.processing_class, {**self.chat_template_kwargs, "chat_template": training})

    def apply(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        has_criterion: bool = False,
        continue_final_message: bool = False,
    ) -> str:
        """Renders messages to text. `ValueError` if the template refuses them, or leaves out part of one."""
        if not self.exists:
            raise ValueError(
                f"The prompts are messages, but the frozen model's tokenizer {self.tokenizer.name_or_path!r} has no "
                "chat template. Pass a `processing_class` with one (the model's processor may have it, and "
                "`trl.clone_chat_template` copies it from another model), or use plain-text prompts."
            )
        flags = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
        try:
            key = (*flags.values(), *(_shape(message) for message in messages))
            if key not in self._forms:
                self._forms[key] = self._find_form(messages, flags)
            return self._write([self._forms[key](message) for message in messages], flags)
        except (*REFUSALS, _LeftOut) as error:
            what = f"rejects these messages: {str(error).rstrip('.')}."
            if isinstance(error, _LeftOut):
                what = (
                    f"leaves out {error}, so the frozen model would not see it. Pass a `processing_class` with a "
                    "template that includes it, or remove such messages."
                )
            elif type(error) is not TemplateError:  # which is raised by the template itself
                what += " Most templates expect `role` and `content`, as text, in every message."
            if has_criterion:
                what += (
                    " The criterion is added as a system message. If the template has no system role, put the "
                    "criterion into the first user message instead."
                )
            raise ValueError(f"The chat template of {self.tokenizer.name_or_path!r} {what}") from error

    def reads_as_given(self, messages: Sequence[Message]) -> bool:
        """Whether [`apply`] passes the content of a prompt to the template unchanged, as trainers do."""
        self.apply(messages, add_generation_prompt=True)
        return self._forms[(True, False, *(_shape(message) for message in messages))] is _unchanged

    def _write(self, messages: Sequence[Message], flags: dict[str, bool]) -> str:
        return self._writer.apply_chat_template(list(messages), tokenize=False, **flags, **self.chat_template_kwargs)

    def _find_form(self, messages: Sequence[Message], flags: dict[str, bool]) -> Callable[[Message], Message]:
        """The form of content in which the template writes all text of messages of this shape."""
        # TRL's GRPO passes messages to processors as parts.
        given = as_parts if self.is_processor else _unchanged
        left_out: _LeftOut | None = None
        for form in (given, as_text, lambda message: as_parts(as_text(message))):
            formed = [form(message) for message in messages]
            if len(image_parts(formed)) < len(image_parts(messages)):
                continue  # a form without image parts
            try:
                self._check_all_written(formed, flags)
                return form
            except _LeftOut as error:
                left_out = left_out or error
            except REFUSALS:
                pass  # because of the messages, or only of the placeholder words
        if left_out is not None:
            raise left_out
        return given

    def _check_all_written(self, messages: Sequence[Message], flags: dict[str, bool]) -> None:
        """Raises `_LeftOut` if the template does not write a placeholder word of a text."""
        words = [
            [f"{WORD}{i}x{j}y" if text.strip() else text for j, text in enumerate(texts_of(message))]
            for i, message in enumerate(messages)
        ]
        probes = list(map(_with_texts, messages, words))
        written = self._write(probes, flags)
        for i, (probe, texts) in enumerate(zip(probes, words, strict=True)):
            where, calls = f"message {i + 1} (role {probe['role']!r})", _tool_names(probe)
            # Many templates write a tool call but not the text before it.
            if not calls and any(text not in written for text in texts):
                raise _LeftOut(f"the text of {where}")
            if any(name not in written for name in calls):
                raise _LeftOut(f"the tool call of {where}")
        if MARK in written:
            raise _LeftOut("the content as text, writing a Python list of its parts instead")
        for i, probe in enumerate(probes):
            for changed in _without_one_image(probe):
                if self._write([*probes[:i], changed, *probes[i + 1 :]], flags) == written:
                    raise _LeftOut(f"an image in message {i + 1} (role {probe['role']!r})")

    @cached_property
    def finished_turn(self) -> tuple[str, str]:
        """The template's text around that of a finished turn (such as `<think>`); empty if unclear."""
        opened, closed = self._probe([{"role": "assistant", "content": WORD}])
        before, found, after = closed.rpartition(WORD)
        return (before.removeprefix(opened) if before.startswith(opened) else "", after) if found else ("", "")

    @cached_property
    def finished_call(self) -> tuple[str, str]:
        """The template's text after a tool call's arguments and, if the result follows, after the turn."""
        call = {"type": "function", "function": {"name": WORD, "arguments": {WORD: WORD}}}
        message = {"role": "assistant", "content": "", "tool_calls": [call]}
        _, closed = self._probe([message])
        _, continued = self._probe([message, {"role": "tool", "name": WORD, "content": ""}])
        _, found, after = closed.rpartition(WORD)
        return (after, continued.removeprefix(closed) if continued.startswith(closed) else "") if found else ("", "")

    def _probe(self, completion: Sequence[Message]) -> tuple[str, str]:
        """Renderings of a short conversation before and with `completion`; empty if the template refuses it."""
        if not self.exists:
            return "", ""
        prompt = [{"role": "user", "content": "a"}]
        try:
            return self.apply(prompt, True), self.apply([*prompt, *completion], False)
        except ValueError:
            return "", ""  # rendering such messages will report the refusal

    def adds_special_tokens(self, text: str, is_chat: bool) -> bool:
        """Whether a prompt gets the tokenizer's own tokens: plain text, and a processor's messages without a BOS."""
        bos = self.tokenizer.bos_token
        return not is_chat or not (self._writer is self.tokenizer or (bos is not None and text.startswith(bos)))

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids of a text; with `special`, including the tokens that the tokenizer adds."""
        return self.tokenizer(text, add_special_tokens=special)["input_ids"]

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, including special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def continuation(self, prompt_text: str, prompt_ids: list[int], text: str, special: bool) -> list[int]:
        """Token ids of `text` that continue the prompt, whose own tokens stay: together they decode to both texts."""
        joint_ids = self.encode(prompt_text + text, special=special)
        if joint_ids[: len(prompt_ids)] == prompt_ids:
            return joint_ids[len(prompt_ids) :]
        # A token would straddle the border, which is impossible in generation: the text is encoded for itself, in the
        # first way that decodes correctly after the prompt, which the policy may have tokenized differently.
        expected = (self._decode_raw(joint_ids), self._decode_raw(prompt_ids) + text)
        alone = self.encode(text)
        candidates = chain([alone], self._behind_anchors(text))
        return next((ids for ids in candidates if self._decode_raw([*prompt_ids, *ids]) in expected), alone)

    def _behind_anchors(self, text: str) -> Iterator[list[int]]:
        """Token ids of `text` inside a longer one: at its beginning, many tokenizers assume a space before a word."""
        for anchor in ANCHORS:
            anchor_ids, joint_ids = self.encode(anchor), self.encode(anchor + text)
            if joint_ids[: len(anchor_ids)] == anchor_ids:
                yield joint_ids[len(anchor_ids) :]

    def _decode_raw(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _without_one_image(message: Message) -> list[Message]:
    """A message without its first image, without its second one, ..."""
    parts = message["content"] if has_parts(message) else ()
    places = [j for j, part in enumerate(parts) if is_image_part(part)]
    return [{**message, "content": [*parts[:j], *parts[j + 1 :]]} for j in places]


def _shape(message: Message) -> Any:
    """All that determines what a template writes for a message, except the texts themselves."""
    content = message.get("content")
    parts = content if isinstance(content, list) else ()
    kinds = tuple(str(part.get("type")) if isinstance(part, dict) else "" for part in parts)
    blank = tuple(not text.strip() for text in texts_of(message))
    keys = tuple(sorted(key for key, value in message.items() if value is not None))
    return message["role"], type(content), kinds, blank, keys, _tool_names(message)


def _tool_names(message: Message) -> tuple[str, ...]:
    calls = message.get("tool_calls") or ()
    names = [(call.get("function") or call).get("name") for call in calls]
    return tuple(name for name in names if isinstance(name, str))
