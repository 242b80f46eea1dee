# SPDX-License-Identifier: Apache-2.0
"""Token ids of completions that are text or messages, and which of them the policy wrote, and no tool or template."""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from .ends import Ends
from .messages import Completion, Message, as_messages, continued, says_more, text_of
from .template import ReadPrompt, Template


# Under these names, messages hold what a policy has thought before it wrote the content.
REASONING = ("reasoning_content", "reasoning", "thinking")


def encode_answer(
    template: Template, ends: Ends, read: ReadPrompt, completion: Completion, warn_once: Callable[[str, str], None]
) -> list[int]:
    """
    Token ids of a completion of one message or of plain text, with the token that ends it. `ValueError` if the
    template does not show what in a message the policy wrote.
    """

    def encode(text: str) -> list[int]:
        return template.continuation(read.text, read.plain_ids, text, read.special)

    if isinstance(read.prompt, str):
        return ends.close(encode(str(completion)), ends.of_text)
    messages = as_messages(completion)
    if not messages or not says_more(messages[0]):
        # As the policy continued the prompt, whatever the template makes of a finished turn.
        text, (header, _) = text_of(messages), template.finished_turn
        if text.strip() and header.strip():
            warn_once(
                "header",
                f"The chat template of {template.tokenizer.name_or_path!r} writes {header!r} before the text of a "
                "finished turn, which a policy would have to write itself: completions that are given as text are "
                "scored without it. If it belongs there, put it into the prompts (`chat_template_kwargs`, such as "
                "`enable_thinking=False`) or into the completions.",
            )
        return ends.close(encode(text), ends.of_turn)
    (message,) = messages
    whole = continued(read.prompt, message) if read.goes_on else [*read.prompt, message]
    full_text = template.apply(whole, add_generation_prompt=False)
    turn = full_text.removeprefix(read.text)
    turn = turn.removeprefix(header_of(template, message, turn))
    problem = None
    if not full_text.startswith(read.text):
        problem = (
            "does not render a finished turn as a continuation of the generation prompt, so of a message with "
            f"{sorted(message)} it cannot be told what the policy wrote"
        )
    elif any(str(message[key]).strip() not in turn for key in REASONING if message.get(key)):
        problem = (
            f"leaves out the reasoning of a message with {sorted(message)}, so the policy's tokens cannot be told"
        )
    if problem is not None:
        raise ValueError(
            f"The chat template of {template.tokenizer.name_or_path!r} {problem}. Pass `completion_ids`, or the whole "
            "text as `content`."
        )
    ids = encode(turn)
    length = ends.turn_length(ids)
    return [*ids, *ends.of(message)] if length is None else ids[:length]


def render_turns(
    template: Template, ends: Ends, read: ReadPrompt, completion: Completion, ids: list[int] | None, of_trainer: bool
) -> tuple[list[int], list[int]]:
    """
    Token ids of a completion of several messages, and the positions of those that the policy wrote, and not tools or
    the template. They are the `ids` that are given, if what the template writes stands in them, or else rendered.
    Those after the last turn are left out, unless they are in `ids`: then the completion was cut off after them.
    `of_trainer`: the `ids` come from a trainer of TRL. `ValueError` if the template rewrites earlier messages when
    later ones follow.
    """
    assert not isinstance(read.prompt, str) and not isinstance(completion, str)  # `check_batch` has seen to it
    if ids is not None and of_trainer:
        positions = _outside_results(template, completion, ids)
        if positions is not None:
            return ids, positions
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
        positions = positions_outside(ids, between, tail)
        if positions is not None:
            return ids, positions
    if tails[0]:
        text.pieces.append((tails[0], False))
    elif ends.is_end(ids):
        text.close()
    else:
        last, _ = text.pieces.pop()  # was cut off, so that its end is the template's
        text.pieces.append((last[:-1] if ends.is_end(last) else last, True))
    return text.turns()


class _Transcript:
    """A completion of several messages as its chat template writes it, up to the end of the last turn."""

    def __init__(self, template: Template, ends: Ends, read: ReadPrompt, completion: Sequence[Message]) -> None:
        self._template, self._ends = template, ends
        self._text, self._ids = read.text, read.plain_ids  # of all that is written
        self._missing_end: list[int] = []
        self.pieces: list[tuple[list[int], bool]] = []  # token ids, and whether the policy wrote them
        prompt: Sequence[Any] = read.prompt
        messages = [*prompt, *completion]
        turns = [i for i in range(len(prompt), len(messages)) if messages[i]["role"] == "assistant"]
        opened = [read.text if i == len(prompt) else template.apply(messages[:i], True) for i in turns]
        for i, before, following in zip(turns, opened, [*opened[1:], None], strict=True):
            between = self.encode(before)
            # A turn that the template does not end is ended by the role that comes next, if generation stops there.
            by_role = bool(self._missing_end) and ends.stops.issuperset(between[:1])
            self._add(self._appended(before), between[:by_role], written=True)
            self._add("", between[by_role:], written=False)
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
        """Token ids of what a rendering of more messages adds."""
        return self._continue(self._appended(longer))

    def _continue(self, text: str, after: str = "", after_ids: Sequence[int] = ()) -> list[int]:
        return self._template.continuation(self._text + after, [*self._ids, *after_ids], text, special=False)

    def _appended(self, longer: str) -> str:
        if not longer.startswith(self._text):
            raise ValueError(
                f"The chat template of {self._template.tokenizer.name_or_path!r} rewrites earlier messages when later "
                "ones follow, so the tokens of a completion of several messages cannot be told apart. Give the "
                "tokenizer a prefix-preserving template: `trl.chat_template_utils.get_training_chat_template`."
            )
        return longer[len(self._text) :]

    def _add(self, text: str, ids: list[int], written: bool) -> None:
        self._text, self._ids = self._text + text, [*self._ids, *ids]
        if ids:
            self.pieces.append((ids, written))

    def _add_turn(self, message: Message, closed: str, following: str | None) -> bool:
        """Adds a turn up to its end, and says whether it has one."""
        turn = self._appended(closed)
        written_before = header_of(self._template, message, turn)
        turn = turn.removeprefix(written_before)
        # Of earlier turns, some templates leave it out.
        for header in [written_before, ""] if written_before else [""]:
            header_ids = self._continue(header)
            ids = self._continue(turn, header, header_ids)
            length = self._ends.turn_length(ids)
            surplus = [] if length is None else ids[length:]
            # What the template writes after the end of a turn opens the next one.
            ended = turn[: len(turn) - len(self._template.decode(surplus))]
            if following is None or following.startswith(self._text + header + ended):
                break
        self._add(header, header_ids, written=False)
        self._add(ended, ids[:length], written=True)
        return length is not None


def header_of(template: Template, message: Message, turn: str) -> str:
    """What a template writes before what a message says, such as an empty `<think>` block; not white space alone."""
    header, _ = template.finished_turn
    text = text_of([message]).strip()
    if header.strip() and turn.startswith(header):
        return header
    before, found, _ = (turn, "", "") if says_more(message) or not text else turn.partition(text)
    return before if found and before.strip() else ""


def _outside_results(template: Template, completion: Sequence[Message], ids: list[int]) -> list[int] | None:
    """Positions of `ids` outside what TRL's trainers write between turns; `None` if that is not there."""
    runs = [
        (role, [*messages]) for role, messages in groupby(completion, lambda message: message["role"] == "assistant")
    ]
    if any(len(messages) > 1 if is_turn else i == 0 for i, (is_turn, messages) in enumerate(runs)):
        return None  # not of TRL: turns that follow each other, or another beginning
    try:
        pieces = [_results_as_trl(template, messages) for is_turn, messages in runs if not is_turn]
    except ValueError:
        return None  # a template for other messages, or one that TRL cannot train with
    tail = [] if runs[-1][0] else pieces.pop()
    return positions_outside(ids, pieces, tail)


def _results_as_trl(template: Template, results: Sequence[Message]) -> list[int]:
    """
    Token ids that TRL's trainers write between the turn that calls tools and the next one: see `_get_tool_suffix_ids`
    of [`~trl.GRPOTrainer`]. `ValueError` if the template does not write results as an addition.
    """
    function: dict[str, Any] = {"name": results[0].get("name"), "arguments": {}}
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    before: list[Message] = [{"role": "user", "content": "dummy"}, call]
    prefix_ids = template.encode(template.apply(before, False))
    whole_ids = template.encode(template.apply([*before, *results], True))
    eos = [i for i, token_id in enumerate(prefix_ids) if token_id == template.tokenizer.eos_token_id]
    length = eos[-1] + 1 if eos else len(prefix_ids)
    if whole_ids[:length] != prefix_ids[:length]:
        raise ValueError("The chat template rewrites the turn before the results of tools.")
    return whole_ids[length:]


def positions_outside(ids: list[int], pieces: list[list[int]], tail: Sequence[int] = ()) -> list[int] | None:
    """Positions of `ids` outside `pieces`, in this order, and before `tail`; `None` if one is not there."""
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
