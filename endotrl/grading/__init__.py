# SPDX-License-Identifier: Apache-2.0
"""Answer grading for rewards, evaluation and the demo: the final answer of a completion, and its correctness."""

from .grader import accepted_answers, final_answer, is_right, same_answer
from .symbolic import has_math_verify, require_math_verify


__all__ = [
    "VERSION",
    "accepted_answers",
    "final_answer",
    "has_math_verify",
    "is_right",
    "require_math_verify",
    "same_answer",
]

# Verdicts of different versions must not be mixed in one file.
VERSION = 8
