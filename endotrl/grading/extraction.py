# SPDX-License-Identifier: Apache-2.0
r"""
Text of a completion: one spelling for characters, dates and Markdown, the part after the reasoning, and the answer
that is marked by `\boxed{}`, `<answer>` or `####`.
"""

import re
import unicodedata
from functools import lru_cache
from typing import NamedTuple


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
_SUPERSCRIPTS = {ord(c): d for c, d in zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-", strict=True)}
_SUPERSCRIPT_RUN = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+")
_FRACTION = re.compile(r"(\d?)([¼-¾⅐-⅞])")
_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("−﹣－", "-"),
        **dict.fromkeys("‘’ʼ`´", "'"),
        **dict.fromkeys("“”„«»", '"'),
        **dict.fromkeys("‐‑‒", "-"),
        **dict.fromkeys("→⇒⟹⟶➜", "="),
        **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad✓✔✅", None),
        "。": ". ",
        "⁄": "/",
        "∕": "/",
    }
)
# Special tokens of tokenizers that are left in the text.
_SPECIAL = re.compile(r"<\|(?!(?:begin|end)_of_thought)[^<>|]{1,40}\|>|</?s>|<(?:end_of_turn|eos|pad|bos)>")
_EMPHASIS = re.compile(r"(?<![\w*])(\*{1,3}|__)(?=[^\s*])([^*\n]*?[^\s*])\1(?![\w*])")
_MONTH = (
    r"(?P<month>Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sept?(?:ember)?"
    r"|Oct(?:ober)?|Nov(?:ember)?|Dec(?:ember)?)\b\.?"
)
MONTHS = "January February March April May June July August September October November December".split()
_YEAR = r"(?:,?\s+(?P<year>\d{4})\b)?"
_DATES = (
    re.compile(rf"\b{_MONTH}\s+(?:the\s+)?(?P<day>[0-3]?\d)(?:st|nd|rd|th)?(?![\w.:]\d|\w|,\d){_YEAR}"),
    re.compile(rf"\b(?:the\s+)?(?P<day>[0-3]?\d)(?:st|nd|rd|th)?\s+(?:of\s+)?{_MONTH}{_YEAR}"),
    re.compile(r"(?<![\w-])(?P<year>[12]\d{3})-(?P<month>[01]\d)-(?P<day>[0-3]\d)(?![\w-])"),
)
_CODE = re.compile(r"`([^`\n]+)`")
# Numbers and formulas next to scripts without spaces between words.
_CJK = r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"
_BESIDE_CJK = re.compile(rf"(?<={_CJK})(?=[\w$\\])(?!{_CJK})|(?<=\d)(?={_CJK})")
_HEADING = re.compile(r"^[ \t]*(?:#{1,6}[ \t]+|>[ \t]*|[-*•+][ \t]+(?=[^\d\s.]|\d[\d.,]*\s+[A-Za-z]))", re.MULTILINE)


@lru_cache(maxsize=512)
def tidy(text: str) -> str:
    """Text with one character for all that look alike."""
    text = _SPECIAL.sub("", text)
    text = _SUPERSCRIPT_RUN.sub(lambda m: "^{" + m[0].translate(_SUPERSCRIPTS) + "}", text)
    text = _FRACTION.sub(lambda m: (f"{m[1]} " if m[1] else "") + unicodedata.normalize("NFKC", m[2]), text)
    text = _BESIDE_CJK.sub(" ", unicodedata.normalize("NFKC", text).translate(_CHARACTERS))
    text = re.sub(r"(?<![-<])[-=]>", "=", text)
    text = re.sub(r"(?<=[A-Za-z])\$\s*(\^\{?[23]\}?)\s*\$", r"\1", text)  # m$^2$
    for pattern in _DATES:
        text = pattern.sub(_date, text)
    return text


def _date(match: re.Match[str]) -> str:
    """A date as "July 20, 1969"."""
    month, year = match["month"], match["year"]
    if month.isdigit() and not 1 <= int(month) <= 12:
        return match[0]
    name = MONTHS[int(month) - 1] if month.isdigit() else next(m for m in MONTHS if m.startswith(month[:3]))
    return f"{name} {int(match['day'])}" + (f", {year}" if year else "")


def without_markdown(text: str) -> str:
    """Text without emphasis, inline code, headings, quotes and bullets."""
    text = _CODE.sub(r"\1", text)
    return _HEADING.sub("", _EMPHASIS.sub(r"\2", text))


def fold(text: str) -> str:
    """Text without accents, for words in any case."""
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))


def same_words(a: str, b: str) -> bool:
    """Whether two texts are equal up to case, accents, outer punctuation, white space and a leading article."""
    return _bare(a) == _bare(b) != ""


def _bare(text: str) -> str:
    words = " ".join(fold(text).casefold().split()).strip(" .,;:!?\"'*_")
    return re.sub(r"^(?:the|an?) (?=\w)", "", words)


def plain_text(text: str) -> str:
    r"""Plain text of `\text{}` and the like, without indices and Markdown."""
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf|textit|mbox)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\[ ,;!]|~", " ", text)
    return without_markdown(re.sub(r"(?<=[A-Z])_\{?(\d)\}?", r"\1", text)).strip(" $")


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
