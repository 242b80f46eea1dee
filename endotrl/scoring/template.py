# SPDX-License-Identifier: Apache-2.0
"""The frozen model's tokenizer and its chat template: messages to text, text to tokens."""

from collections.abc import Sequence
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from .messages import Message


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

    def turn_end(self) -> list[int]:
        """The special token with which the chat template ends an assistant's turn, if there is one."""
        if self.tokenizer.chat_template is None:
            return []
        answer = "Endotrl"  # a word that no template writes itself
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
        try:
            text = self.apply(messages, add_generation_prompt=False)
        except (TypeError, ValueError):
            return []  # a template for other messages than these; whoever renders some hears of what it refuses
        _, found, after = text.rpartition(answer)
        ids = self.encode(after)[:1] if found else []
        return ids if ids and ids[0] in self.tokenizer.all_special_ids else []

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids of a text; with `special`, with the tokens that the tokenizer adds itself."""
        return self.tokenizer(text, add_special_tokens=special)["input_ids"]

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, special tokens kept."""
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def continuation(self, prompt_text: str, prompt_ids: list[int], text: str, special: bool) -> list[int]:
        """Token ids of `text` as it continues the prompt; the prompt's own tokens stay as they are."""
        joint_ids = self.encode(prompt_text + text, special=special)
        if joint_ids[: len(prompt_ids)] == prompt_ids:
            return joint_ids[len(prompt_ids) :]
        return self.encode(text)  # a token would straddle the border, which generation cannot do
