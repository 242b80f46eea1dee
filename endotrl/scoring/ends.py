# SPDX-License-Identifier: Apache-2.0
"""Where a response ends: which tokens end one, what is padding behind the end, and what closes a text that has none."""

from collections.abc import Sequence

from .template import Template


class Ends:
    """
    The tokens that end a response of a frozen model.

    Args:
        template ([`Template`]):
            Tokenizer and chat template of the frozen model.
        eos_token_ids (`Sequence[int]`):
            Tokens that end a response. The special token with which the chat template ends a turn is one, too.

    Attributes:
        token_ids (`frozenset[int]`):
            All of them.
        of_text (`list[int]`):
            What closes a completion that is given as text: one token, or none, where a completion just stops.
        of_turn (`list[int]`):
            The same, for a message.
    """

    def __init__(self, template: Template, eos_token_ids: Sequence[int]) -> None:
        turn_end = template.turn_end()
        # A base model's EOS is not what ends a turn, but policies that share its tokenizer and template end theirs so.
        self.token_ids = frozenset(eos_token_ids) | frozenset(turn_end)
        eos = template.tokenizer.eos_token_id
        self.of_text = list(eos_token_ids[:1]) if eos is None else [eos]
        self.of_turn = turn_end or self.of_text

    def is_end(self, ids: list[int]) -> bool:
        """Whether the last token ends a response."""
        return bool(ids) and ids[-1] in self.token_ids

    def close(self, ids: list[int], end_ids: list[int]) -> list[int]:
        """Adds the end where there is none."""
        return ids if self.is_end(ids) else [*ids, *end_ids]

    def close_turn(self, ids: list[int]) -> list[int]:
        """Cuts what a template writes after the end of the turn, and adds the end where there is none."""
        for position in reversed(range(len(ids))):
            if ids[position] in self.token_ids:
                return ids[: position + 1]
        return self.close(ids, self.of_turn)

    def without_padding(self, ids: list[int]) -> list[int]:
        """Cuts the padding after the end of a turn: OnlineDPO hands its completions over padded, GRPO does not."""
        end = len(ids)
        while end > 1 and ids[end - 1] == ids[-1] and ids[end - 1] not in self.token_ids:
            end -= 1
        if end > 0 and ids[end - 1] not in self.token_ids:
            return ids  # was cut off, and is not padded
        while end > 1 and ids[end - 2] == ids[end - 1]:  # padded with the EOS token
            end -= 1
        if 1 < end < len(ids) and ids[end - 1] == ids[-1] and ids[end - 2] in self.token_ids:
            end -= 1  # padded with one EOS token after the turn was ended by another
        return ids[:end]
