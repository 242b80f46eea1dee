# SPDX-License-Identifier: Apache-2.0
"""Ranges of settings that several objects have."""

from collections.abc import Mapping, Sequence
from typing import Any


def check_choice(name: str, value: object, choices: Sequence[str], reasons: Mapping[str, str] | None = None) -> None:
    """Raises `ValueError` if the setting `value`, called `name`, is no choice, with its reason if there is one."""
    if isinstance(value, str) and reasons and value in reasons:
        raise ValueError(f"`{name}` is {value!r}, {reasons[value]}.")
    if value not in choices:
        raise ValueError(f"`{name}` is {value!r}, but it must be one of {', '.join(map(repr, choices))}.")


def check_criterion(criterion: Any) -> Any:
    """The criterion. Raises `TypeError` if it is no text, no dictionary of texts, and not `None`."""
    texts = criterion.values() if isinstance(criterion, Mapping) else [criterion]
    if criterion is not None and not all(isinstance(text, str) for text in texts):
        raise TypeError(
            f"`criterion` is {criterion!r}, but it must be a string, a dictionary with one string for each domain, or "
            "`None`."
        )
    return criterion
