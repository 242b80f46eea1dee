# SPDX-License-Identifier: Apache-2.0
"""Ranges of settings that several objects have."""

from collections.abc import Mapping, Sequence
from typing import Any, SupportsFloat


def check_alpha(alpha: float) -> None:
    """Raises `ValueError` if `alpha` is not a positive finite number."""
    if not (_is_number(alpha) and 0.0 < alpha < float("inf")):
        raise ValueError(f"`alpha` is {alpha!r}, but the temperature of the soft value must be positive and finite.")


def check_discount(name: str, value: float) -> None:
    """Raises `ValueError` if the discount `value`, called `name`, is not in `(0, 1]`."""
    if not (_is_number(value) and 0.0 < value <= 1.0):
        raise ValueError(f"`{name}` is {value!r}, but a discount must be greater than 0 and at most 1.")


def check_choice(name: str, value: object, choices: Sequence[str], reasons: Mapping[str, str] | None = None) -> None:
    """
    Raises `ValueError` if the setting `value`, called `name`, is not among the choices, with its reason if there is
    one.
    """
    if isinstance(value, str) and value in (reasons or {}):
        raise ValueError(f"`{name}` is {value!r}, {(reasons or {})[value]}.")
    if value not in choices:
        raise ValueError(f"`{name}` is {value!r}, but it must be one of {', '.join(map(repr, choices))}.")


def check_criterion(criterion: Any) -> Any:
    """The criterion. Raises `TypeError` if it is no text, no dictionary of texts, and not `None`."""
    texts = list(criterion.values()) if isinstance(criterion, Mapping) else [criterion]
    if not all(isinstance(text, str) or (text is None and criterion is None) for text in texts):
        raise TypeError(
            f"`criterion` is {criterion!r}, but it must be a string, a dictionary with one string for each domain, or "
            "`None`."
        )
    return criterion


def _is_number(value: object) -> bool:
    # Tensors too; and YAML reads `1e-1` as text.
    return isinstance(value, SupportsFloat)
