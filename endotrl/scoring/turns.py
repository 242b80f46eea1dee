# SPDX-License-Identifier: Apache-2.0
"""Completions of several messages: which of their tokens the policy wrote, and which came from tools or the template."""

from collections.abc import Sequence
from typing import NamedTuple

from .ends import Ends
from .messages import Message
from .template import Template


class Turns(NamedTuple):
    """
    A completion of several messages.

    Attributes:
        ids (`list[int]`):
            Its tokens.
        positions (`list[int]`):
            Positions in `ids` that the policy wrote.
        rerendered (`bool`):
            `True` if ids of the policy were given, but the template's own tokens do not stand in them, so that `ids` are
            others.
    """

    ids: list[int]
    positions: list[int]
    rerendered: bool


def render_turns(
    template: Template,
    ends: Ends,
    prompt: Sequence[Message],
    prompt_text: str,
    completion: Sequence[Message],
    ids: list[int] | None,
) -> Turns:
    """
    A completion of several messages: tool results and the template's own tokens are read, but not scored. Those
    after the last turn are left out, unless they are in `ids`: then the completion was cut off after them.

    Args:
        template ([`Template`]), ends ([`Ends`]):
            Of the frozen model.
        prompt (`list[dict]`):
            Messages before the completion.
        prompt_text (`str`):
            The same, rendered with the generation prompt.
        completion (`list[dict]`):
            Messages of the completion.
        ids (`list[int]`, *optional*):
            Token ids as the policy generated them, those of tools in between.

    Raises:
        `ValueError`: If the template rewrites earlier messages when later ones follow.
    """
    pieces: list[tuple[list[int], bool]] = []  # (token ids, written by the policy)
    text = prompt_text
    for i, message in enumerate(completion):
        if message["role"] != "assistant":
            continue
        before = [*prompt, *completion[:i]]
        opened = prompt_text if i == 0 else template.apply(before, add_generation_prompt=True)
        closed = template.apply([*before, message], add_generation_prompt=False)
        if opened != text:
            pieces.append((template.encode(_appended(template, text, opened)), False))
        answer = template.encode(_appended(template, opened, closed))
        ended = ends.close_turn(answer)
        pieces.append((ended, True))
        # What the template writes after the end of a turn opens the next one.
        surplus = 0 if len(ended) >= len(answer) else len(template.decode(answer[len(ended) :]))
        text = closed[: len(closed) - surplus]
    if ids is not None:
        between = [piece for piece, written in pieces if not written]
        tails: list[list[int]] = [[]]
        if completion[-1]["role"] != "assistant":
            # TRL opens the next turn before it finds that there is no room for it; other rollouts may not.
            whole = [*prompt, *completion]
            tails = [
                template.encode(_appended(template, text, template.apply(whole, opens))) for opens in (True, False)
            ]
        for tail in tails:
            end = len(ids) - len(tail)
            positions = positions_outside(ids[:end], between) if end >= 0 and ids[end:] == tail else None
            if positions is not None:
                return Turns(ids, positions, rerendered=False)
        if tails[0]:
            pieces.append((tails[0], False))
        elif not ends.is_end(ids):
            last, _ = pieces.pop()  # was cut off, so that its end is the template's
            pieces.append((last[:-1] if ends.is_end(last) else last, True))
    flags = [written for piece, written in pieces for _ in piece]
    return Turns(
        [token_id for piece, _ in pieces for token_id in piece],
        [i for i, written in enumerate(flags) if written],
        rerendered=ids is not None,
    )


def _appended(template: Template, text: str, longer: str) -> str:
    """What a rendering of more messages adds to one of fewer."""
    if not longer.startswith(text):
        raise ValueError(
            f"The chat template of {template.tokenizer.name_or_path!r} rewrites earlier messages when later ones "
            "follow, so the tokens of a completion of several messages cannot be told apart. Give the "
            "tokenizer a prefix-preserving template: `trl.chat_template_utils.get_training_chat_template`."
        )
    return longer[len(text) :]


def positions_outside(ids: list[int], pieces: list[list[int]]) -> list[int] | None:
    """Positions of `ids` outside `pieces`, which must occur in this order; `None` if one of them is not there."""
    positions: list[int] = []
    start = 0
    for piece in pieces:
        found = next((i for i in range(start, len(ids) - len(piece) + 1) if ids[i : i + len(piece)] == piece), None)
        if found is None:
            return None
        positions.extend(range(start, found))
        start = found + len(piece)
    positions.extend(range(start, len(ids)))
    return positions
