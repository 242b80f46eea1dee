# SPDX-License-Identifier: Apache-2.0
"""Comparison of expressions by math-verify, which is optional."""

import logging
import re
import threading
from importlib.util import find_spec


# Longer ones are not answers; towers of powers would never finish, and outside the main thread nothing would stop
# them.
_MAX_LENGTH = 300
_TOWER = re.compile(r"\^\s*\{?[^{}^]*\{?[^{}^]*\^|\^\s*\{?\s*\d{4,}|\d{3,}\s*!")


def has_math_verify() -> bool:
    """Whether math-verify is installed."""
    return find_spec("math_verify") is not None


def require_math_verify() -> None:
    """Raises `ImportError` if math-verify is not installed."""
    if not has_math_verify():
        raise ImportError(
            "Comparing expressions requires the package `math-verify`, which is not installed. Install it with "
            "`pip install 'endotrl[eval]'`."
        )


def same_expression(right: str, given: str) -> bool:
    """Whether an expression in LaTeX equals the right one, by math-verify."""
    from math_verify import parse, verify

    if any(len(text) > _MAX_LENGTH or _TOWER.search(text) for text in (right, given)):
        return False
    # math-verify's timeouts are signals, which only reach the main thread: TRL's `accuracy_reward` has none elsewhere.
    # They are wall-clock time, which must suffice on a machine with other load: expressions are bounded above.
    timeout = 20 if threading.current_thread() is threading.main_thread() else None
    if timeout is None:
        for name in ("math_verify.parser", "math_verify.grader"):
            logging.getLogger(name).setLevel(logging.ERROR)
    a, b = (parse(f"${text.strip().strip('$')}$", parsing_timeout=timeout) for text in (right, given))
    return bool(a and b) and bool(verify(a, b, timeout_seconds=timeout))
