# SPDX-License-Identifier: Apache-2.0
r"""
Final answer extraction: from `\boxed{}`, `<answer>`, after `####`, after words such as "the answer is", or from
unmarked text.
"""

import re
from typing import NamedTuple

from .spelling import tidy


# Characters of a completion that are read, from its end. Some searches are quadratic in a sentence's length, and a
# collapsing policy writes long ones.
LONGEST = 8000
_THOUGHT_END = re.compile(r"</(?:think|thinking|thought|reasoning|scratchpad)>|<\|end_of_thought\|>", re.IGNORECASE)
_THOUGHT_START = re.compile(r"<(?:think|thinking|thought|reasoning|scratchpad)>|<\|begin_of_thought\|>", re.IGNORECASE)
_TAG = re.compile(
    r"<(?:answer|final_answer)>(?P<inside>.*?)(?:</(?:answer|final_answer)>|$)", re.IGNORECASE | re.DOTALL
)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|(?P<number>\d[\d.,]*(?<=\d)))")
_HASHES = re.compile(r"^[ \t]*####[ \t]*(?P<answer>.*)$", re.MULTILINE)


class Claim(NamedTuple):
    """Answer given by a completion; `boxed` if all of `text` is the answer, and nothing else is."""

    text: str
    boxed: bool


def visible(completion: str) -> str:
    """A completion without its reasoning; empty if the reasoning never ends."""
    text = tidy(completion)
    ends = list(_THOUGHT_END.finditer(text))
    if ends:
        text = text[ends[-1].end() :]
    start = _THOUGHT_START.search(text)
    if start is not None:
        text = text[: start.start()]
    return text.strip()[-LONGEST:]


def marked(text: str) -> Claim | None:
    r"""
    The marked answer of a text: in the last `\boxed{}` (adjacent ones form one answer, a list), in `<answer>`, or
    after `####` at its end. A box that was never closed is an answer that was cut off: it is empty.
    """
    tags = list(_TAG.finditer(text))
    if tags:
        inside = tags[-1]["inside"].strip()
        return _boxed(inside) or Claim(inside, boxed=False)
    return _boxed(text)


def _boxed(text: str) -> Claim | None:
    together: list[str] = []  # boxes that form one answer
    end = 0
    while match := _BOX.search(text, end):
        if not re.fullmatch(r"(?:\W|and|or|\\[a-z]+|\b[a-z] ?=)*", text[end : match.start()]):
            together = []
        depth, end = 0 if match["number"] else 1, match.end()
        while depth and end < len(text):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        if depth:
            return Claim("", boxed=True)
        together.append(match["number"] or text[match.end() : end - 1].strip())
    if together:
        return Claim(", ".join(dict.fromkeys(together)), boxed=True)
    hashes = list(_HASHES.finditer(text))
    if hashes and not text[hashes[-1].end() :].strip():
        return Claim(hashes[-1]["answer"].strip(), boxed=False)
    return None
