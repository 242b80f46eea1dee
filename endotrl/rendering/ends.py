# SPDX-License-Identifier: Apache-2.0
"""Whether a completion ended, and where."""

from collections.abc import Collection, Sequence

from .messages import Message
from .policy_tokens import special_token_ids
from .template import Template


class Ends:
    """
    The tokens that end completions: where generation stops (`eos_token_ids`), and the special tokens with which the
    chat template ends a turn. `padded` says whether padding follows the end of completions; `None` if that is not
    known: then one special token that is repeated to the last behind the end is padding.
    """

    def __init__(self, template: Template, eos_token_ids: Sequence[int], padded: bool | None = None) -> None:
        self._template, self._padded = template, padded
        self._special = special_token_ids(template.tokenizer)
        self.stops = frozenset(eos_token_ids)  # where generation stops
        eos = template.tokenizer.eos_token_id
        self.of_text = list(eos_token_ids[:1]) if eos is None else [eos]
        _, tail = template.finished_turn
        self.of_turn = self._end_in(template.encode(tail)) or self.of_text
        # A base model's EOS is not what ends a turn, but policies that share its tokenizer and template end theirs so.
        self.token_ids = self.stops | {*self.of_turn[-1:]}
        call_tail, follower = (template.encode(text) for text in template.finished_call)
        # GLM's calls are ended by the role that comes next.
        self._calls_are_followed = bool(follower) and follower[0] in self.stops
        self._of_call = follower[:1] if self._calls_are_followed else self.of_turn
        self.token_ids |= self._special.intersection(call_tail[: self.turn_length(call_tail)][-1:])

    def _end_in(self, tail: list[int]) -> list[int]:
        """The end in what the chat template writes after a turn, up to the token at which generation stops."""
        stop = next((i for i, token_id in enumerate(tail) if token_id in self.stops), None)
        text = next((i for i, token_id in enumerate(tail) if token_id not in self._special), len(tail))
        if stop is not None and stop <= text:
            return tail[: stop + 1]
        if text > 0:
            return tail[:text]
        # Text that the template writes between a turn and its end is not the policy's.
        return [] if stop is None else [tail[stop]]

    def of(self, message: Message) -> list[int]:
        """What ends a turn of the assistant that the template does not end."""
        return self._of_call if message.get("tool_calls") else self.of_turn

    def is_end(self, ids: Sequence[int]) -> bool:
        """Whether the last token ends a completion."""
        return bool(ids) and ids[-1] in self.token_ids

    def finishes(self, ids: Sequence[int]) -> bool:
        """Whether the last token ends a turn, and is not behind an end at which generation went on."""
        return self.is_end(ids) and (ids[-1] in self.stops or self.token_ids.isdisjoint(ids[:-1]))

    def close(self, ids: list[int], end_ids: list[int]) -> list[int]:
        """Adds the end where there is none."""
        return ids if self.is_end(ids) else [*ids, *end_ids]

    def turn_length(self, ids: Sequence[int]) -> int | None:
        """
        Tokens of a turn in what a template writes of it: up to the first end after the last word, or to other special
        tokens. `None` if the template does not end the turn.
        """
        start = len(ids)
        while start > 0 and (ids[start - 1] in self._special or self._template.decode([ids[start - 1]]).isspace()):
            start -= 1
        end = next((i for i in range(start, len(ids)) if ids[i] in self.token_ids), None)
        if end is None and not self._calls_are_followed:
            special = [i for i in range(start, len(ids)) if ids[i] in self._special]
            end = next((i for i in special if i + 1 not in special), None)
        return None if end is None else end + 1

    def without_padding(self, ids: list[int]) -> list[int]:
        """Cuts the padding behind the end: OnlineDPO hands its completions over padded, GRPO and RLOO do not."""
        ended = until_first(ids, self.stops)
        padding = set(ids[len(ended) :])
        if self._padded is None:
            return ended if len(padding) == 1 and padding <= self._special | self.stops else ids
        return ended if self._padded else ids

    def before_padding(self, ids: list[int], pad_token_id: int) -> list[int]:
        """Cuts at the first pad token. One at which generation stops is an end itself, unless it is behind another."""
        if pad_token_id not in ids:
            return ids
        end = ids.index(pad_token_id)
        is_end = pad_token_id in self.stops and not (end > 0 and ids[end - 1] in self.stops)
        return ids[: end + is_end]


def until_first(ids: Sequence[int], token_ids: Collection[int]) -> list[int]:
    """Token ids up to the first one of `token_ids`, which is kept; all of them, if there is none."""
    end = next((i for i, token_id in enumerate(ids) if token_id in token_ids), len(ids))
    return list(ids[: end + 1])
