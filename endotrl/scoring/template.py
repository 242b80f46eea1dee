# SPDX-License-Identifier: Apache-2.0
"""The frozen model's tokenizer and its chat template: messages to text, text to tokens."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from .messages import Message


# A word that no template writes itself.
WORD = "Endotrl"
# Texts that other ones are put behind, to see how they are encoded inside a text.
ANCHORS = ("x", "\n", ".", "1", "\u4e00")


class Template:
    """
    A tokenizer with a fixed set of arguments for its chat template.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the frozen model.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Further arguments for the chat template, such as `enable_thinking` or `tools`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: dict[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self.chat_template_kwargs = chat_template_kwargs or {}

    def apply(self, messages: Sequence[Message], add_generation_prompt: bool, has_criterion: bool = False) -> str:
        """
        Messages as text.

        Raises:
            `ValueError`: If the template refuses them; with `has_criterion`, the criterion may be why.
        """
        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **self.chat_template_kwargs,
            )
        except (TemplateError, TypeError, AttributeError, LookupError) as error:
            # A template is a program: what it says of a message that it was not written for is any of Python's errors.
            fix = (
                " The criterion is put before the prompt as a system message, and a template without a system role "
                "cannot take it: write the criterion into the first user message of the prompts instead, or pass a "
                "`processing_class` whose template has a system role."
                if has_criterion
                else ""
            )
            if type(error) is not TemplateError:  # that one is what the template says itself
                fix += " Most templates want `role` and `content`, as text, in every message."
            reason = str(error).rstrip(".")
            raise ValueError(
                f"The chat template of {self.tokenizer.name_or_path!r} refuses these messages: {reason}.{fix}"
            ) from error

    @cached_property
    def finished_turn(self) -> tuple[str, str]:
        """
        What the chat template writes around the content of a finished turn of the assistant: behind the generation prompt
        (an empty `<think>` block, say), and after the content. Both are empty if that cannot be told.
        """
        for content in (WORD, [{"type": "text", "text": WORD}]):
            opened, closed = self._probe([{"role": "assistant", "content": content}])
            before, found, after = closed.rpartition(WORD)
            if found:
                return before.removeprefix(opened) if before.startswith(opened) else "", after
        return "", ""

    @cached_property
    def finished_call(self) -> tuple[str, str]:
        """What the chat template writes after the arguments of a tool's call, and where the result follows, after the turn."""
        call = {"type": "function", "function": {"name": WORD, "arguments": {WORD: WORD}}}
        message = {"role": "assistant", "content": "", "tool_calls": [call]}
        _, closed = self._probe([message])
        _, continued = self._probe([message, {"role": "tool", "name": WORD, "content": ""}])
        _, found, after = closed.rpartition(WORD)
        return (after, continued.removeprefix(closed) if continued.startswith(closed) else "") if found else ("", "")

    def _probe(self, completion: Sequence[Message]) -> tuple[str, str]:
        """A short conversation before and with `completion`; empty if the template is for other messages."""
        prompt = [{"role": "user", "content": "a"}]
        try:
            return self.apply(prompt, True), self.apply([*prompt, *completion], False)
        except ValueError:
            return "", ""  # whoever renders some hears of what it refuses

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids of a text; with `special`, with the tokens that the tokenizer adds itself."""
        return self.tokenizer(text, add_special_tokens=special)["input_ids"]

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, special tokens kept."""
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def continuation(self, prompt_text: str, prompt_ids: list[int], text: str, special: bool) -> list[int]:
        """
        Token ids of `text` as it continues the prompt, whose own tokens stay as they are: all of them together decode to what
        the tokenizer makes of both texts at once.

        Args:
            prompt_text (`str`), prompt_ids (`list[int]`):
                The prompt.
            text (`str`):
                What follows.
            special (`bool`):
                Whether the prompt has the tokens that the tokenizer adds itself.
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
        """
        Token ids of `text` inside a longer one. At the beginning of a text, many tokenizers take a word for one with a space
        before it, SentencePiece's and WordPiece's among them.
        """
        for anchor in ANCHORS:
            anchor_ids, joint_ids = self.encode(anchor), self.encode(anchor + text)
            if joint_ids[: len(anchor_ids)] == anchor_ids:
                yield joint_ids[len(anchor_ids) :]

    def _decode_raw(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
