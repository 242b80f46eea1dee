# SPDX-License-Identifier: Apache-2.0
"""Validation of settings and rewards, suggestions for misspelled names, reproducible `repr`."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any


def lasting_repr(value: object) -> str:
    """`repr` without the memory addresses that those of functions and images contain: the same in every process."""
    return re.sub(" at 0x[0-9a-fA-F]+", "", repr(value))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean X?)` with the known name that contains `word` or is close to it; empty if there is none."""
    known = [name for name in known if name != word]
    similar = [name for name in known if word and word in name] or get_close_matches(word, known, n=1, cutoff=0.7)
    return f" (did you mean {similar[0]}?)" if similar else ""


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raises `ValueError` if `value`, the setting called `name`, is not one of `choices`."""
    if value not in choices:
        meant = did_you_mean(value, choices) if isinstance(value, str) else ""
        raise ValueError(f"`{name}` is {value!r}, but it must be one of {', '.join(map(repr, choices))}{meant}.")


def check_rewards(rewards: Iterable[float | None], count: int) -> list[float | None]:
    """Rewards of `count` completions as a list. Raises `ValueError` unless each is a finite number or `None`."""
    found = list(rewards)
    if len(found) != count:
        raise ValueError(
            f"The reward function returned {len(found)} rewards for {count} completions. It must return one for each."
        )
    for i, value in enumerate(found):
        try:
            fits = value is None or math.isfinite(value)
        except TypeError:
            fits = False
        if not fits:
            raise ValueError(f"The reward of completion {i} is {value!r}, but it must be a finite number or `None`.")
    return found


def check_criterion(criterion: Any) -> Any:
    """Returns the criterion. Raises `TypeError` unless it is a string, a dictionary of strings, or `None`."""
    texts = criterion.values() if isinstance(criterion, Mapping) else [criterion]
    if criterion is not None and not all(isinstance(text, str) and text.strip() for text in texts):
        raise TypeError(
            f"`criterion` is {criterion!r}, but it must be a string, a dictionary with one string per domain, or "
            "`None`. Strings must not be empty."
        )
    return criterion
