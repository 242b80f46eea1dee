# SPDX-License-Identifier: Apache-2.0
"""The frozen model's tokenizer and chat template: messages to text, and text to tokens."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

from jinja2.exceptions import TemplateError
from PIL.Image import Image
from torch import Tensor
from transformers import ProcessorMixin

from .images import ImageInputs
from .messages import Message, Prompt, as_parts, as_text, image_parts, is_image_part, texts_of, with_texts
from .policy_tokens import ProcessingClass, tokenizer_of


# A template is a program: what it says of a message that it was not written for is any of Python's errors.
REFUSALS = (TemplateError, TypeError, AttributeError, LookupError)

# Stand in the place of what messages say, to see whether a template writes it: words that none writes itself.
WORD, MARK = "Endotrl", "endotrl_probe"
# Texts that other ones are put behind, to see how they are encoded inside a text.
ANCHORS = ("x", "\n", ".", "1", "\u4e00")


def _unchanged(message: Message) -> Message:
    return message


@dataclass(frozen=True)
class ReadPrompt:
    """A prompt, and the text and tokens that it is read as."""

    prompt: Prompt
    text: str
    special: bool  # the tokenizer has added its own tokens
    goes_on: bool  # the completion continues its last message
    ids: list[int]
    plain_ids: list[int]  # before a processor has put as many placeholders there as an image takes
    images: ImageInputs | None = None


class _LeftOut(Exception):
    """What a template does not write."""


class Template:
    """
    A tokenizer, or a processor with its own template, BOS and expansion of text, and arguments for the chat template.

    The content of messages is text or a list of parts, and templates read one of them, or both; of the other they
    write nothing, or a Python list. Messages are put into the form that the template reads, and what it still does not
    write is refused: a template that knows no role "tool" would leave out what a tool has said. What it does to a text
    that it writes (it strips white space, or cuts the reasoning of earlier turns) is its own affair.
    """

    def __init__(self, processing_class: ProcessingClass, chat_template_kwargs: dict[str, Any] | None = None) -> None:
        self.processing_class = processing_class
        self.tokenizer = tokenizer_of(processing_class)
        self.chat_template_kwargs = chat_template_kwargs or {}
        # A processor without a template has that of its tokenizer.
        has_own = isinstance(processing_class, ProcessorMixin) and processing_class.chat_template is not None
        self._writer: Any = processing_class if has_own else self.tokenizer
        # How messages of each shape are given to the template.
        self._forms: dict[Any, Callable[[Message], Message]] = {}

    @property
    def exists(self) -> bool:
        return self._writer.chat_template is not None or self.chat_template_kwargs.get("chat_template") is not None

    @cached_property
    def prefix_preserving(self) -> "Template":
        """This template, or, if it rewrites earlier turns when later ones follow, TRL's version of it for training."""
        from trl.chat_template_utils import get_training_chat_template, is_chat_template_prefix_preserving

        if "chat_template" in self.chat_template_kwargs:
            return self
        try:
            preserves = is_chat_template_prefix_preserving(self._writer)
            training = None if preserves else get_training_chat_template(self._writer)
        except (*REFUSALS, ValueError):  # a template that cannot call tools, or that TRL does not know
            return self
        if training is None:
            return self
        return Template(self.processing_class, {**self.chat_template_kwargs, "chat_template": training})

    def apply(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        has_criterion: bool = False,
        continue_final_message: bool = False,
    ) -> str:
        """Messages as text. `ValueError` if the template refuses them, or leaves out what one of them says."""
        if not self.exists:
            raise ValueError(
                f"The prompts are messages, but the tokenizer {self.tokenizer.name_or_path!r} of the frozen model has "
                "no chat template. Pass a `processing_class` with one (the model's processor, if that has it; "
                "`trl.clone_chat_template` copies it from another model), or use plain-text prompts."
            )
        flags = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
        try:
            key = (*flags.values(), *(_shape(message) for message in messages))
            if key not in self._forms:
                self._forms[key] = self._find_form(messages, flags)
            return self._write([self._forms[key](message) for message in messages], flags)
        except (*REFUSALS, _LeftOut) as error:
            fix = (
                " The criterion is put before the prompt as a system message, and a template without a system role "
                "cannot take it: write the criterion into the first user message of the prompts instead, or pass a "
                "`processing_class` whose template has a system role."
                if has_criterion
                else ""
            )
            name = self.tokenizer.name_or_path
            if isinstance(error, _LeftOut):
                raise ValueError(
                    f"The chat template of {name!r} leaves out {error}, so that the frozen model would not read "
                    f"it.{fix} Pass a `processing_class` with a template that writes it, or leave such messages out."
                ) from None
            if type(error) is not TemplateError:  # that one is what the template says itself
                fix += " Most templates want `role` and `content`, as text, in every message."
            reason = str(error).rstrip(".")
            raise ValueError(f"The chat template of {name!r} refuses these messages: {reason}.{fix}") from error

    def reads_as_given(self, messages: Sequence[Message]) -> bool:
        """Whether [`apply`] gives the template the content of a prompt in the form in which it is, as trainers do."""
        self.apply(messages, add_generation_prompt=True)
        return self._forms[(True, False, *(_shape(message) for message in messages))] is _unchanged

    def _write(self, messages: Sequence[Message], flags: dict[str, bool]) -> str:
        return self._writer.apply_chat_template(list(messages), tokenize=False, **flags, **self.chat_template_kwargs)

    def _find_form(self, messages: Sequence[Message], flags: dict[str, bool]) -> Callable[[Message], Message]:
        """The form of content in which the template writes all that messages of this shape say."""
        # TRL's GRPO gives messages to processors as parts.
        given = as_parts if isinstance(self.processing_class, ProcessorMixin) else _unchanged
        left_out: _LeftOut | None = None
        refused = given
        images = len(image_parts(messages))
        for form in (given, as_text, lambda message: as_parts(as_text(message))):
            try:
                formed = [form(message) for message in messages]
                if len(image_parts(formed)) < images:
                    continue  # a form that has no place for them
                self._check_all_written(formed, flags)
            except _LeftOut as error:
                left_out = left_out or error
            except REFUSALS as error:
                if type(error) is TemplateError and refused is given:  # says itself what is wrong
                    refused = form
            else:
                return form
        if left_out is not None:
            raise left_out
        return refused  # the messages, or just the words that stood in them

    def _check_all_written(self, messages: Sequence[Message], flags: dict[str, bool]) -> None:
        """Raises `_LeftOut` if the template does not write a word that stands in the place of a text."""
        words = [
            [f"{WORD}{i}x{j}y" if text.strip() else text for j, text in enumerate(texts_of(message))]
            for i, message in enumerate(messages)
        ]
        probes = [with_texts(message, texts, MARK) for message, texts in zip(messages, words, strict=True)]
        written = self._write(probes, flags)
        for i, (message, texts) in enumerate(zip(messages, words, strict=True)):
            calls = _tool_names(message)
            where = f"message {i + 1} (role {message['role']!r})"
            # Many templates write a call and not what is said before it.
            if not calls and any(text not in written for text in texts):
                raise _LeftOut(f"what {where} says")
            if any(name not in written for name in calls):
                raise _LeftOut(f"the call of a tool in {where}")
        if MARK in written:
            raise _LeftOut("the form of content, and writes a Python list of its parts")
        for i, message in enumerate(probes):
            parts = message["content"] if image_parts([message]) else ()
            for j in (j for j, part in enumerate(parts) if is_image_part(part)):
                without = {**message, "content": [*parts[:j], *parts[j + 1 :]]}
                if self._write([*probes[:i], without, *probes[i + 1 :]], flags) == written:
                    raise _LeftOut(f"an image in message {i + 1} (role {message['role']!r})")

    @cached_property
    def finished_turn(self) -> tuple[str, str]:
        """What the template writes around the text of a finished turn (`<think>`, say); empty if that is not clear."""
        opened, closed = self._probe([{"role": "assistant", "content": WORD}])
        before, found, after = closed.rpartition(WORD)
        return (before.removeprefix(opened) if before.startswith(opened) else "", after) if found else ("", "")

    @cached_property
    def finished_call(self) -> tuple[str, str]:
        """What the template writes behind a tool's arguments and, where the result follows, after the turn."""
        call = {"type": "function", "function": {"name": WORD, "arguments": {WORD: WORD}}}
        message = {"role": "assistant", "content": "", "tool_calls": [call]}
        _, closed = self._probe([message])
        _, continued = self._probe([message, {"role": "tool", "name": WORD, "content": ""}])
        _, found, after = closed.rpartition(WORD)
        return (after, continued.removeprefix(closed) if continued.startswith(closed) else "") if found else ("", "")

    def _probe(self, completion: Sequence[Message]) -> tuple[str, str]:
        """A short conversation before and with `completion`; empty if the template is for other messages."""
        if not self.exists:
            return "", ""
        prompt = [{"role": "user", "content": "a"}]
        try:
            return self.apply(prompt, True), self.apply([*prompt, *completion], False)
        except ValueError:
            return "", ""  # whoever renders some hears of what it refuses

    def encode_prompt(
        self, text: str, special: bool, pictures: Sequence[Image] = ()
    ) -> tuple[list[int], ImageInputs | None]:
        """
        Token ids of a prompt, and what the model is given beside them for its images. A processor encodes it itself:
        it may write more than its text, and puts as many placeholders there as an image takes.
        """
        if not isinstance(self.processing_class, ProcessorMixin):
            if pictures:
                raise ValueError(
                    "The prompts have images, and of the frozen model there is only the tokenizer "
                    f"{self.tokenizer.name_or_path!r}. Pass its processor as `processing_class`: "
                    "`AutoProcessor.from_pretrained` loads it."
                )
            return self.encode(text, special), None
        given: dict[str, Any] = {"images": [list(pictures)], "return_tensors": "pt"} if pictures else {}
        try:
            encoded = self.processing_class(text=[text], add_special_tokens=special, **given)
        except (ValueError, TypeError, LookupError, StopIteration) as error:
            raise ValueError(
                f"The {type(self.processing_class).__name__} of the frozen model refuses a prompt with "
                f"{len(pictures)} images: {error}"
            ) from error
        left = {key: value for key, value in encoded.items() if key not in ("input_ids", "attention_mask")}
        lists = [key for key, value in left.items() if not isinstance(value, Tensor)] if pictures else []
        if lists:
            raise ValueError(
                f"The {type(self.processing_class).__name__} gives {lists[0]} of images as no tensor, which endotrl "
                "does not know. Please open an issue with the model's name."
            )
        return [int(i) for i in encoded["input_ids"][0]], ImageInputs.of(left) if pictures else None

    def adds_special_tokens(self, text: str, is_chat: bool) -> bool:
        """Whether a prompt gets the tokenizer's own tokens: text, and of processors messages without a BOS."""
        bos = self.tokenizer.bos_token
        return not is_chat or not (self._writer is self.tokenizer or (bos is not None and text.startswith(bos)))

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids of a text; with `special`, with the tokens that the tokenizer adds itself."""
        return self.tokenizer(text, add_special_tokens=special)["input_ids"]

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, special tokens kept."""
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def continuation(self, prompt_text: str, prompt_ids: list[int], text: str, special: bool) -> list[int]:
        """
        Token ids of `text` as it continues the prompt, whose own tokens stay: together they decode to what the
        tokenizer makes of both texts at once.
        """
        joint_ids = self.encode(prompt_text + text, special=special)
        if joint_ids[: len(prompt_ids)] == prompt_ids:
            return joint_ids[len(prompt_ids) :]
        # A token would straddle the border, which generation cannot do.
        alone = self.encode(text)
        # The second is for prompts that the policy has read in other tokens than these.
        wanted = (self._decode_raw(joint_ids), self._decode_raw(prompt_ids) + text)
        candidates = chain([alone], self._behind_anchors(text))
        return next((ids for ids in candidates if self._decode_raw([*prompt_ids, *ids]) in wanted), alone)

    def _behind_anchors(self, text: str) -> Iterator[list[int]]:
        """Token ids of `text` inside a longer one: at its beginning, many tokenizers see a space before a word."""
        for anchor in ANCHORS:
            anchor_ids, joint_ids = self.encode(anchor), self.encode(anchor + text)
            if joint_ids[: len(anchor_ids)] == anchor_ids:
                yield joint_ids[len(anchor_ids) :]

    def _decode_raw(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _shape(message: Message) -> Any:
    """All of a message that decides what a template writes, but for the texts themselves."""
    content = message.get("content")
    parts = (
        tuple(str(p.get("type")) if isinstance(p, dict) else "" for p in content) if isinstance(content, list) else ()
    )
    blank = tuple(not text.strip() for text in texts_of(message))
    keys = tuple(sorted(key for key, value in message.items() if value is not None))
    return message["role"], type(content), parts, blank, keys, _tool_names(message)


def _tool_names(message: Message) -> tuple[str, ...]:
    calls = message.get("tool_calls") or ()
    names = [(call.get("function") or call).get("name") for call in calls]
    return tuple(name for name in names if isinstance(name, str))
