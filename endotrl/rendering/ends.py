# SPDX-License-Identifier: Apache-2.0
"""End of a completion, and the tokens in it that were written by the policy, not by a tool or template."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from .images import ImageInputs
from .messages import Completion, Message, Prompt, Template, as_messages, continued, says_more, text_of
from .policy import special_token_ids


# Message keys that hold a policy's reasoning before the content.
REASONING = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class ReadPrompt:
    """A prompt, with the text and tokens that it is rendered to."""

    prompt: Prompt
    text: str
    special: bool  # whether the tokenizer has added its own tokens
    goes_on: bool  # whether the completion continues its last message
    ids: list[int]
    plain_ids: list[int]  # before a processor has expanded the placeholders of images
    images: ImageInputs | None = None


class Ends:
    """
    Tokens that end completions: where generation stops (`eos_token_ids`), and the special tokens with which the chat
    template ends a turn. `padded` is whether padding follows the end of completions; `None` if unknown: then a special
    token that is repeated from the end to the last position is padding.
    """

    def __init__(self, template: Template, eos_token_ids: Sequence[int], padded: bool | None = None) -> None:
        self._template, self._padded = template, padded
        self._special = special_token_ids(template.tokenizer)
        self.stops = frozenset(eos_token_ids)  # where generation stops
        eos = template.tokenizer.eos_token_id
        self.of_text = list(eos_token_ids[:1]) if eos is None else [eos]
        _, tail = template.finished_turn
        self.of_turn = self._end_in(template.encode(tail)) or self.of_text
        # A base model's EOS does not end a turn, but policies that share its tokenizer and template end theirs by it.
        self.token_ids = self.stops | {*self.of_turn[-1:]}
        call_tail, follower = (template.encode(text) for text in template.finished_call)
        # GLM's tool calls are ended by the next role.
        self._calls_are_followed = bool(follower) and follower[0] in self.stops
        self._of_call = follower[:1] if self._calls_are_followed else self.of_turn
        self.token_ids |= self._special.intersection(call_tail[: self.turn_length(call_tail)][-1:])

    def _end_in(self, tail: list[int]) -> list[int]:
        """The end within the template's text after a turn, up to the token at which generation stops."""
        stop = next((i for i, token_id in enumerate(tail) if token_id in self.stops), None)
        text = next((i for i, token_id in enumerate(tail) if token_id not in self._special), len(tail))
        if stop is not None and stop <= text:
            return tail[: stop + 1]
        # Text that the template writes between a turn and its end is not the policy's.
        return tail[:text] if text > 0 or stop is None else [tail[stop]]

    def of(self, message: Message) -> list[int]:
        """Tokens that end a turn of the assistant if the template does not end it."""
        return self._of_call if message.get("tool_calls") else self.of_turn

    def is_end(self, ids: Sequence[int]) -> bool:
        """Whether the last token ends a completion."""
        return bool(ids) and ids[-1] in self.token_ids

    def finishes(self, ids: Sequence[int]) -> bool:
        """Whether the last token ends a turn, and does not follow an end at which generation continued."""
        return self.is_end(ids) and (ids[-1] in self.stops or self.token_ids.isdisjoint(ids[:-1]))

    def close(self, ids: list[int], end_ids: list[int]) -> list[int]:
        """Appends the end if there is none."""
        return ids if self.is_end(ids) else [*ids, *end_ids]

    def turn_length(self, ids: Sequence[int]) -> int | None:
        """Tokens of a turn up to the end, or other special tokens, after its last word; `None` if it has no end."""
        start = len(ids)
        while start > 0 and (ids[start - 1] in self._special or self._template.decode([ids[start - 1]]).isspace()):
            start -= 1
        end = next((i for i in range(start, len(ids)) if ids[i] in self.token_ids), None)
        if end is None and not self._calls_are_followed:
            special = [i for i in range(start, len(ids)) if ids[i] in self._special]
            end = next((i for i in special if i + 1 not in special), None)
        return None if end is None else end + 1

    def without_padding(self, ids: list[int]) -> list[int]:
        """Strips the padding after the end: OnlineDPO passes its completions with padding, GRPO and RLOO do not."""
        ended = until_first(ids, self.stops)
        padding = set(ids[len(ended) :])
        padded = len(padding) == 1 and padding <= self._special | self.stops if self._padded is None else self._padded
        return ended if padded else ids

    def before_padding(self, ids: list[int], pad_token_id: int) -> list[int]:
        """Cuts at the first pad token, itself an end if generation stops at it, unless it follows another end."""
        if pad_token_id not in ids:
            return ids
        end = ids.index(pad_token_id)
        is_end = pad_token_id in self.stops and not (end > 0 and ids[end - 1] in self.stops)
        return ids[: end + is_end]


def until_first(ids: Sequence[int], token_ids: Collection[int]) -> list[int]:
    """Token ids up to and including the first one in `token_ids`; all of them if there is none."""
    end = next((i for i, token_id in enumerate(ids) if token_id in token_ids), len(ids))
    return list(ids[: end + 1])


def encode_answer(
    template: Template, ends: Ends, read: ReadPrompt, completion: Completion, warn_once: Callable[[str, str], None]
) -> list[int]:
    """Token ids of a completion, given as one message or as plain text, including the token that ends it."""

    def encode(text: str) -> list[int]:
        return template.continuation(read.text, read.plain_ids, text, read.special)

    if isinstance(read.prompt, str):
        return ends.close(encode(str(completion)), ends.of_text)
    messages = as_messages(completion)
    if not messages or not says_more(messages[0]):
        # Rendered as the policy continued the prompt, whatever the template adds to a finished turn.
        text, (header, _) = text_of(messages), template.finished_turn
        if text.strip() and header.strip():
            warn_once(
                "header",
                f"The chat template of {template.tokenizer.name_or_path!r} writes {header!r} before the text of a "
                "finished turn. Completions given as text are scored without it, as a policy would have to generate "
                "it. To score it, add it to the prompts (`chat_template_kwargs`, such as `enable_thinking=False`) or "
                "to the completions.",
            )
        return ends.close(encode(text), ends.of_turn)
    (message,) = messages
    whole = continued(read.prompt, message) if read.goes_on else [*read.prompt, message]
    full_text = template.apply(whole, add_generation_prompt=False)
    turn = full_text.removeprefix(read.text)
    turn = turn.removeprefix(header_of(template, message, turn))
    continues = full_text.startswith(read.text)
    if not continues or any(str(message[key]).strip() not in turn for key in REASONING if message.get(key)):
        problem = "leaves out the reasoning" if continues else "does not continue the prompt with a finished turn"
        raise ValueError(
            f"The chat template of {template.tokenizer.name_or_path!r} {problem}, so what the policy wrote is unknown "
            f"from a message with the keys {sorted(message)}. Pass `completion_ids`, or the whole text as `content`."
        )
    ids = encode(turn)
    length = ends.turn_length(ids)
    return [*ids, *ends.of(message)] if length is None else ids[:length]


def render_turns(
    template: Template, ends: Ends, read: ReadPrompt, completion: Completion, ids: list[int] | None
) -> tuple[list[int], list[int]]:
    """
    Token ids of a completion of several messages, and the positions of those written by the policy, not by tools or
    the template. They are the given `ids`, if they contain the template's text, or else rendered. Ids after the last
    turn are left out, unless they are in `ids`: then the completion was cut off after them. `ValueError` if the
    template rewrites earlier messages when later ones follow.
    """
    assert not isinstance(read.prompt, str) and not isinstance(completion, str)  # ensured by `check_batch`
    text = _Transcript(template, ends, read, completion)
    if ids is None:
        text.close()
        return text.turns()
    between = [piece for piece, written in text.pieces if not written]
    tails: list[list[int]] = [[]]
    if completion[-1]["role"] != "assistant":
        # TRL opens the next turn before it finds that there is no room for it; other rollouts may not.
        tails = [text.encode(template.apply([*read.prompt, *completion], opens)) for opens in (True, False)]
    for tail in tails:
        if (positions := positions_outside(ids, between, tail)) is not None:
            return ids, positions
    if tails[0]:
        text.pieces.append((tails[0], False))
    elif ends.is_end(ids):
        text.close()
    else:
        last, _ = text.pieces.pop()  # cut off, so that its end was added by the template
        text.pieces.append((last[:-1] if ends.is_end(last) else last, True))
    return text.turns()


class _Transcript:
    """
    A completion of several messages as rendered by its chat template, up to the end of the last turn:

        prompt | turn, end | tool result, header | turn, end      the policy wrote the turns with their ends
    """

    def __init__(self, template: Template, ends: Ends, read: ReadPrompt, completion: Sequence[Message]) -> None:
        self._template, self._ends = template, ends
        self._text, self._ids = read.text, read.plain_ids  # of everything so far
        self._missing_end: list[int] = []
        self.pieces: list[tuple[list[int], bool]] = []  # token ids, and whether the policy wrote them
        messages: list[Any] = [*read.prompt, *completion]
        start = len(read.prompt)
        turns = [i for i in range(start, len(messages)) if messages[i]["role"] == "assistant"]
        if not turns:
            roles = [message["role"] for message in completion]
            raise ValueError(
                f"The completion of messages with the roles {roles} has none with the role 'assistant', the only role "
                "that is scored. Give the policy's messages that role, or remove such rows."
            )
        opened = [read.text if i == start else template.apply(messages[:i], True) for i in turns]
        for i, before, following in zip(turns, opened, [*opened[1:], None], strict=True):
            between = self.encode(before)
            # A turn that the template does not end is ended by the next role's first token, if generation stops there.
            num_written = int(bool(self._missing_end) and ends.stops.issuperset(between[:1]))
            self._add(self._appended(before), between[:num_written], written=True)
            self._add("", between[num_written:], written=False)
            is_ended = self._add_turn(messages[i], template.apply(messages[: i + 1], False), following)
            self._missing_end = [] if is_ended else ends.of(messages[i])

    def close(self) -> None:
        """Ends the last turn if the template does not."""
        self._add("", self._missing_end, written=True)

    def turns(self) -> tuple[list[int], list[int]]:
        flags = [written for piece, written in self.pieces for _ in piece]
        ids = [token_id for piece, _ in self.pieces for token_id in piece]
        return ids, [i for i, written in enumerate(flags) if written]

    def encode(self, longer: str) -> list[int]:
        """Token ids of the text added by a rendering of more messages."""
        return self._continue(self._appended(longer))

    def _continue(self, text: str, after: str = "", after_ids: Sequence[int] = ()) -> list[int]:
        return self._template.continuation(self._text + after, [*self._ids, *after_ids], text, special=False)

    def _appended(self, longer: str) -> str:
        if not longer.startswith(self._text):
            raise ValueError(
                f"The chat template of {self._template.tokenizer.name_or_path!r} rewrites earlier messages when later "
                "ones follow, so the policy's tokens in a completion of several messages cannot be identified. Use a "
                "prefix-preserving template, such as that of `trl.chat_template_utils.get_training_chat_template`."
            )
        return longer[len(self._text) :]

    def _add(self, text: str, ids: list[int], written: bool) -> None:
        self._text, self._ids = self._text + text, [*self._ids, *ids]
        if ids:
            self.pieces.append((ids, written))

    def _add_turn(self, message: Message, closed: str, following: str | None) -> bool:
        """Adds a turn up to its end; returns whether it has one."""
        turn = self._appended(closed)
        written_before = header_of(self._template, message, turn)
        turn = turn.removeprefix(written_before)
        # Some templates leave it out of earlier turns.
        for header in [written_before, ""] if written_before else [""]:
            header_ids = self._continue(header)
            ids = self._continue(turn, header, header_ids)
            length = self._ends.turn_length(ids)
            surplus = [] if length is None else ids[length:]
            # Text after the end of a turn opens the next one.
            ended = turn[: len(turn) - len(self._template.decode(surplus))]
            if following is None or following.startswith(self._text + header + ended):
                break
        self._add(header, header_ids, written=False)
        self._add(ended, ids[:length], written=True)
        return length is not None


def header_of(template: Template, message: Message, turn: str) -> str:
    """Text of a template before a message's content, such as an empty `<think>` block; not white space alone."""
    header, _ = template.finished_turn
    text = text_of([message]).strip()
    if header.strip() and turn.startswith(header):
        return header
    before, found, _ = (turn, "", "") if says_more(message) or not text else turn.partition(text)
    return before if found and before.strip() else ""


def positions_outside(ids: list[int], pieces: list[list[int]], tail: Sequence[int] = ()) -> list[int] | None:
    """Positions of `ids` outside `pieces`, in this order, and before `tail`; `None` if a piece is missing."""
    end = len(ids) - len(tail)
    if end < 0 or ids[end:] != list(tail):
        return None
    positions: list[int] = []
    start = 0
    for piece in pieces:
        found = next((i for i in range(start, end - len(piece) + 1) if ids[i : i + len(piece)] == piece), None)
        if found is None:
            return None
        positions.extend(range(start, found))
        start = found + len(piece)
    return [*positions, *range(start, end)]
