# SPDX-License-Identifier: Apache-2.0
"""Renderer: from prompts and completions, as text, messages or token ids, to the frozen model's token ids."""

import json
import logging
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from operator import index
from typing import Any, Literal

from PIL.Image import Image

from ..reporting import counted
from .ends import Ends, ReadPrompt, encode_answer, render_turns
from .images import (
    ImageInputs,
    Images,
    Placeholders,
    load_picture,
    picture_digest,
    place_images,
    read_by_processor,
    without_images,
)
from .messages import (
    Completion,
    Completions,
    Prompt,
    Prompts,
    Template,
    TokenIds,
    add_criterion,
    as_messages,
    check_batch,
    image_parts,
    says_more,
    text_of,
)
from .policy import PolicyRow, PolicyTokens, ProcessingClass, foreign_token_ids


logger = logging.getLogger(__name__)

OverlongPrompt = Literal["error", "truncate_left"]
Overlong = Literal[OverlongPrompt, "cut"]


@dataclass(frozen=True)
class Rendered:
    """One prompt and completion, ready to be scored."""

    prompt_ids: list[int]
    completion_ids: list[int]
    action_positions: list[int]  # of tokens in `completion_ids` written by the policy, not by a tool; in order
    finished: bool  # whether it ends with a token of the policy that ends a response
    cut: bool = False  # whether the row was too long, and lost tokens
    images: ImageInputs | None = None

    @property
    def prompt(self) -> tuple[tuple[int, ...], ImageInputs | None]:
        """Everything before the completion: equal for completions of one prompt, and for no others."""
        return tuple(self.prompt_ids), self.images


@dataclass(eq=False)
class Renderer:
    """
    Renders rows of a TRL batch to token ids, by one rule: what the policy generated is scored as it was generated.

    - The prompt's tokens are those that the policy read, if known. Otherwise it is rendered as in TRL's trainers: by
      the chat template, or as plain text; with `continues_turns`, as in OnlineDPO.
    - `completion_ids` are scored unchanged if policy and frozen model share a tokenizer; if that is unknown, if they
      decode to the completion. Otherwise its text is rendered with this tokenizer and template.
    - A completion given as text is a complete answer: the end of the turn (of plain text, EOS) is scored too, but
      nothing else that the template writes into a finished turn.
    - In completions of several messages, only the assistant's tokens are scored.

    The tokenizer or processor, its `eos_token_ids`, the `vocab_size`, the context of `max_length` tokens and the
    `placeholders` of images are the frozen model's; `policy_tokens` describe the `completion_ids`. With
    `keeps_prompts`, prompts stay as rendered here even if the policy has read others. `overlong_prompt`: see [`fit`];
    `images` and `chat_template_kwargs`: see [`FrozenModelReward`].
    """

    processing_class: ProcessingClass
    eos_token_ids: Collection[int]
    vocab_size: int
    max_length: int | None = None
    overlong_prompt: Overlong = "error"
    chat_template_kwargs: dict[str, Any] | None = None
    policy_tokens: PolicyTokens | None = None
    continues_turns: bool = False
    keeps_prompts: bool = False
    placeholders: Placeholders = Placeholders()
    images: Images = "read"

    def __post_init__(self) -> None:
        self._placeholder_ids = self.placeholders.all
        self._template = Template(self.processing_class, self.chat_template_kwargs)
        self.tokenizer = self._template.tokenizer
        policy, stops = self.policy_tokens, [*self.eos_token_ids]
        # Ids of the policy with another meaning here; `None` if it is unknown, or has another tokenizer.
        self._foreign_ids = None if policy is None else foreign_token_ids(self.tokenizer, policy.processing_class)
        if policy is None or self._foreign_ids is None:
            self.ends = Ends(self._template, stops)
        else:
            self.ends = Ends(self._template, [*policy.eos_token_ids] or stops, policy.padded)
        self.eos_token_ids = self.ends.token_ids  # that end a response
        self._said: set[str] = set()

    def render(
        self,
        prompts: Prompts,
        completions: Completions,
        completion_ids: TokenIds | None = None,
        criteria: Sequence[str | None] | None = None,
        images: Sequence[Sequence[Any] | None] | None = None,
        policy_rows: Sequence[PolicyRow] | None = None,
    ) -> list[Rendered]:
        """
        Renders a batch. `criteria` are put before the prompts; `images` are those of each row's columns. If the
        policy's tokens have the same meaning here, the prompts of `policy_rows` are scored, unless `keeps_prompts` or
        a criterion prevents it. `ValueError` or `TypeError` for rows that cannot be scored.
        """
        check_batch(prompts, completions, completion_ids)
        nothing = [None] * len(prompts)
        kept_ids = nothing if completion_ids is None else self._kept_ids(completions, completion_ids)
        columns = prompts, completions, kept_ids, criteria or nothing, images or nothing, policy_rows or nothing
        prompt_cache: dict[str, ReadPrompt] = {}
        rendered = []
        for row, (prompt, completion, ids, criterion, column, policy_row) in enumerate(zip(*columns, strict=True)):
            has_images = bool(column) or _shows_images(prompt)
            ignored = has_images and self.images == "ignore"
            pictures: list[Image] = []
            if ignored:
                prompt = without_images(prompt)
            elif has_images:
                prompt, pictures = self._place(row, prompt, column)
            prompt = add_criterion(prompt, criterion)
            # A GRPO group repeats its prompt: rendered once.
            template = self._template_for(completion)
            key = prompt if isinstance(prompt, str) else json.dumps(prompt, default=repr)
            key = f"{id(template)} {key} {[picture_digest(picture) for picture in pictures]}"
            if key not in prompt_cache:
                prompt_cache[key] = self._render_prompt(template, prompt, pictures, criterion is not None)
            read = prompt_cache[key]
            if policy_row is not None and criterion is None and not ignored:
                read = self._settle(row, read, policy_row.prompt_ids)
            self._check_placeholders(row, read)
            written = None if policy_row is None else policy_row.written
            result = self._render_completion(read, completion, ids, written)
            self._check_unfilled(row, "completion", self._placeholder_ids, result.completion_ids)
            result = replace(result, images=read.images)
            rendered.append(fit(row, result, self.max_length, self.overlong_prompt))
        return rendered

    def prompt_ids(self, prompts: Prompts) -> list[list[int]]:
        """Token ids of prompts alone, of any length."""
        check_batch(prompts, [""] * len(prompts), None)
        for row, prompt in enumerate(prompts):
            if _shows_images(prompt):
                raise ValueError(f"The prompt of row {row} has images, but only text is read here. Remove such rows.")
        return [self._render_prompt(self._template, prompt, []).ids for prompt in prompts]

    def render_ids(self, prompt_ids: Sequence[Sequence[int]], completion_ids: TokenIds) -> list[Rendered]:
        """Result of [`render`] for rows that are token ids of this tokenizer already, without padding."""
        rendered = []
        for row, (prompt, completion) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
            ids = list(completion)
            self._check_unfilled(row, "response", self._placeholder_ids, [*prompt, *ids])
            rendered.append(fit(row, self._as_row(list(prompt), ids), self.max_length, self.overlong_prompt))
        return rendered

    def _template_for(self, completion: Completion) -> Template:
        """Template under which the turns of a completion of several messages stay the same when others follow."""
        return self._template if _is_turn(completion) else self._template.prefix_preserving

    def _place(self, row: int, prompt: Prompt, column: Sequence[Any] | None) -> tuple[Prompt, list[Image]]:
        """A prompt with bare placeholders, and its pictures."""
        prompt, pictures = place_images(row, prompt, column)
        if self.placeholders.image is None:
            raise ValueError(
                f"The prompt of row {row} has {counted(len(pictures), 'image')}, but the frozen model reads only "
                "text. Use a vision-language model, remove such rows, or score answers to the text alone with "
                '`EndogenousReward(..., images="ignore")`.'
            )
        return prompt, [load_picture(row, picture) for picture in pictures]

    def _render_prompt(
        self, template: Template, prompt: Prompt, pictures: Sequence[Image], has_criterion: bool = False
    ) -> ReadPrompt:
        goes_on = self.continues_turns and not isinstance(prompt, str) and prompt[-1]["role"] == "assistant"
        text = prompt if isinstance(prompt, str) else template.apply(prompt, not goes_on, has_criterion, goes_on)
        special = not self.continues_turns and template.adds_special_tokens(text, not isinstance(prompt, str))
        if template.is_processor:
            ids, images = read_by_processor(template.processing_class, text, special, pictures)
        elif pictures:
            raise ValueError(
                f"The prompts have images, but `processing_class` is a tokenizer ({self.tokenizer.name_or_path!r}). "
                "Pass the frozen model's processor, which `AutoProcessor.from_pretrained` loads."
            )
        else:
            ids, images = template.encode(text, special), None
        plain_ids = ids if images is None else template.encode(text, special)
        return ReadPrompt(prompt, text, special, goes_on, ids, plain_ids, images)

    def _check_placeholders(self, row: int, read: ReadPrompt) -> None:
        """Raises `ValueError` if there are placeholders without images, or images without placeholders."""
        if read.images is not None and self.placeholders.image not in read.ids:
            raise ValueError(
                f"The prompt of row {row} has images, but no image token of the frozen model "
                f"({self.placeholders.image}). Pass the model's own processor as `processing_class`."
            )
        unfilled = self._placeholder_ids if read.images is None else self.placeholders.others
        self._check_unfilled(row, "prompt", unfilled, read.ids)

    def _check_unfilled(self, row: int, what: str, placeholders: frozenset[int], ids: list[int]) -> None:
        if unread := placeholders.intersection(ids):
            raise ValueError(
                f"The {what} of row {row} has a token that stands for an image, video or audio "
                f"({self._template.decode([*unread])!r}), but no input for it. Pass the image in the messages or in "
                "the column `images`, or remove the token (`generation_kwargs={'suppress_tokens': ...}` keeps a "
                "policy from generating it)."
            )

    def _settle(self, row: int, read: ReadPrompt, theirs: list[int]) -> ReadPrompt:
        """Chooses the prompt to score: the one rendered here, or the one that the policy has read."""
        ours = read.ids
        if ours == theirs or not self._means_the_same(theirs):
            return read
        at = len(os.path.commonprefix([ours, theirs]))
        here, there = (self._template.decode(ids[at : at + 8]) for ids in (ours, theirs))
        scored = "The policy's prompts are scored."
        if self.keeps_prompts:
            scored = (
                "The reward's prompts are scored, because it was given a `processing_class` or "
                "`chat_template_kwargs`. Remove these arguments to score the policy's."
            )
        self._warn_once(
            "prompts",
            f"The policy and the reward read different prompts. That of row {row} has "
            f"{counted(len(theirs), 'token')} for the policy and {len(ours)} for the reward, and they differ from "
            f"token {at} on: {there!r} for the policy, {here!r} for the reward. {scored}",
        )
        if self.keeps_prompts:
            return read
        if read.images is None:
            return replace(read, ids=theirs, plain_ids=theirs)
        of_policy, of_reward = (ids.count(self.placeholders.image) for ids in (theirs, ours))  # type: ignore[arg-type]
        if of_policy != of_reward:
            raise ValueError(
                f"The images of row {row} take {of_policy} tokens for the policy, but {of_reward} with the reward's "
                "processor. Give the reward the policy's processor."
            )
        return replace(read, ids=theirs, images=read.images.with_token_types(ours, theirs))

    def _render_completion(
        self, read: ReadPrompt, completion: Completion, ids: list[int] | None, written: list[int] | None
    ) -> Rendered:
        if ids is not None and written is not None:
            return self._as_row(read.ids, ids, [i for i, flag in enumerate(written[: len(ids)]) if flag])
        if not _is_turn(completion):
            turns, positions = render_turns(self._template_for(completion), self.ends, read, completion, ids)
            if ids is not None and turns is not ids:
                self._warn_once(
                    "results",
                    "The `completion_ids` of a completion do not contain its tool results as the frozen model's chat "
                    "template writes them, so the policy's own tokens cannot be identified. The messages are rendered "
                    "again for scoring. Pass a `processing_class` with the chat template that the policy is trained "
                    "with.",
                )
            return self._as_row(read.ids, turns, positions)
        if ids is not None:
            return self._as_row(read.ids, ids)
        if written is not None and not all(written):
            raise ValueError(
                "An environment wrote some tokens of a completion (`env_mask`), but the frozen model has another "
                "tokenizer than the policy, so the policy's own tokens cannot be identified. Use a frozen model with "
                "the policy's tokenizer."
            )
        return self._as_row(read.ids, encode_answer(self._template, self.ends, read, completion, self._warn_once))

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._said:
            logger.warning("%s (Shown once.)", message)
            self._said.add(kind)

    def _kept_ids(self, completions: Completions, completion_ids: TokenIds) -> list[list[int] | None]:
        """`completion_ids` without padding; `None` for those of another tokenizer, whose text is encoded instead."""
        batch: list[list[int]] = []
        for row, (completion, given) in enumerate(zip(completions, completion_ids, strict=True)):
            ids = _token_ids(row, given)
            batch.append(self.ends.without_padding(ids) if _is_turn(completion) else ids)
        verdicts = list(map(self._is_own, batch, completions))
        # Undecidable rows follow the others. Without a token, they are the same for every tokenizer.
        by_default = True in verdicts or False not in verdicts
        kept = [
            ids if ((by_default or not ids) if is_own is None else is_own) else None
            for ids, is_own in zip(batch, verdicts, strict=True)
        ]
        if None in kept:
            self._warn_once(
                "tokenizer",
                "`completion_ids` do not decode to the completions with the frozen model's tokenizer: policy and "
                "frozen model have different tokenizers. The text of the completions is tokenized again for scoring, "
                "as complete answers.",
            )
        elif not any(verdicts) and any(ids and not self.ends.is_end(ids) for ids in batch):
            self._warn_once(
                "empty",
                "All completions of a batch are empty texts, so the tokenizer of their `completion_ids` is unknown. "
                "They are scored as tokens of the frozen model. In a trainer, or after `reward.bind(trainer)`, the "
                "policy's tokenizer is known.",
            )
        return kept

    def _means_the_same(self, ids: list[int]) -> bool:
        """Whether a known policy's token ids have the same meaning for this tokenizer."""
        return self._foreign_ids is not None and self._foreign_ids.isdisjoint(ids)

    def _is_own(self, ids: list[int], completion: Completion) -> bool | None:
        """Whether token ids of a completion are of this tokenizer, too; `None` if undecidable."""
        if any(token_id >= self.vocab_size for token_id in ids):
            return False
        if self.policy_tokens is not None:
            return self._means_the_same(ids)
        # The policy is unknown: its ids must decode to the completion.
        text = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
        written = [message for message in as_messages(completion) if message["role"] == "assistant"]
        contents = [content for message in written if (content := text_of([message]).strip())]
        is_parsed = any(says_more(message) for message in written)  # reasoning and tool calls, out of the content
        if not contents:
            if not text:
                return None
            # No text to compare with. Ids of another tokenizer read as words cut at odd places, which this tokenizer
            # would cut differently.
            as_decoded = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            return is_parsed and self._template.encode(as_decoded) == ids
        # Users and parsers may have kept the special tokens in the text, including or without the last one.
        body = ids[:-1] if self.ends.is_end(ids) else ids
        texts = [text, self._template.decode(ids).strip(), self._template.decode(body).strip()]
        if isinstance(completion, str):
            return contents[0] in texts
        if len(completion) == 1 and not is_parsed:
            # Reasoning before the content may have been dropped.
            return any(text.endswith(contents[0]) for text in texts)
        return any(all(content in text for content in contents) for text in texts)

    def _as_row(self, prompt_ids: list[int], ids: list[int], positions: list[int] | None = None) -> Rendered:
        positions = list(range(len(ids))) if positions is None else positions
        # A tool result also ends with the token that ends turns, but the policy's turn follows.
        others = set(range(len(ids))).difference(positions)
        finished = self.ends.finishes(ids[max(others, default=-1) + 1 :])
        return Rendered(prompt_ids, ids, positions, finished)


def fit(row: int, rendered: Rendered, max_length: int | None, overlong: Overlong, markers: int = 0) -> Rendered:
    """
    Truncates a row to a context length, in tokens (`None`: no limit), if `markers` more will be inserted in the
    completion. A longer row is an error, or, by `overlong`, loses the beginning of its prompt (`"truncate_left"`), or
    the end of its completion (`"cut"`). With `"cut"`, a prompt of more than three quarters of the context loses its
    beginning, too.
    """
    if not rendered.prompt_ids:
        raise ValueError(
            f"The prompt of row {row} is empty, and the tokenizer adds no BOS token, so the first token of the "
            "completion has no context to be scored in. Pass a prompt that is not empty."
        )
    num_prompt, num_completion = len(rendered.prompt_ids), len(rendered.completion_ids)
    if max_length is None or num_prompt + num_completion + markers <= max_length:
        return rendered
    room = max_length - num_completion - markers  # for the prompt
    if overlong == "cut":
        room = max(room, max_length - max_length // 4)
    fix = None
    if rendered.images is not None and num_prompt > room:
        fix = (
            "A prompt with images is not truncated. Make the images smaller (the processor's `size` or `max_pixels`), "
            "or shorten the prompt or the completion."
        )
    elif room < 1:
        fix = (
            "Shorten the completion (lower `max_completion_length` in the trainer's config), or use a frozen model "
            "with a longer context."
        )
    elif overlong == "error":
        fix = 'Shorten the prompt, or pass `overlong_prompt="truncate_left"` to drop its beginning.'
    if fix is not None:
        counts = [counted(num_prompt, "prompt token"), counted(num_completion, "completion token")]
        counts += [counted(markers, "marker")] if markers else []
        raise ValueError(
            f"Row {row} has {' and '.join(counts)}, more than the {max_length} tokens of the frozen model's context. "
            f"{fix}"
        )
    rendered = replace(rendered, prompt_ids=rendered.prompt_ids[-room:], cut=True)
    left = max_length - len(rendered.prompt_ids)
    # With more markers than room for them, the completion loses as much of both.
    length = left - markers if left > markers else left * num_completion // (num_completion + markers)
    return cut_completion(rendered, length)


def cut_completion(row: Rendered, length: int) -> Rendered:
    """The row with at most the first `length` tokens of its completion; a shortened completion is not finished."""
    if length >= len(row.completion_ids):
        return row
    positions = [position for position in row.action_positions if position < length]
    ids = row.completion_ids[:length]
    return replace(row, completion_ids=ids, action_positions=positions, finished=False, cut=True)


def truncate_left(rows: Sequence[list[int]], max_length: int | None, what: str) -> list[list[int]]:
    """The last `max_length` tokens of each row; warns of the number of longer rows, named by `what`."""
    if max_length is None:
        return list(rows)
    if too_long := sum(len(row) > max_length for row in rows):
        message = "%d %s are longer than the model's context of %d tokens and are truncated on the left."
        logger.warning(message, too_long, what, max_length)
    return [row[-max_length:] for row in rows]


def _shows_images(prompt: Prompt) -> bool:
    return not isinstance(prompt, str) and bool(image_parts(prompt))


def _is_turn(completion: Completion) -> bool:
    """Whether a completion is a single turn of the assistant."""
    return isinstance(completion, str) or [message["role"] for message in completion] in ([], ["assistant"])


def _token_ids(row: int, given: Sequence[int]) -> list[int]:
    wanted = f"`completion_ids` of row {row} must be a list of token ids, without padding,"
    try:
        ids = [index(token_id) for token_id in given]
    except TypeError as error:
        raise TypeError(f"{wanted} but {error}.") from error
    if ids and min(ids) < 0:
        raise ValueError(f"{wanted} got {min(ids)}.")
    return ids
