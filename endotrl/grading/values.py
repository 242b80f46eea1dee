# SPDX-License-Identifier: Apache-2.0
"""
Parsing and comparison of mathematical answers: quantities with units, tuples, intervals, sets and lists of them, and
other expressions.
"""

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from itertools import takewhile
from typing import NamedTuple

from .numbers import (
    GROUPED,
    MULTIPLIERS,
    NUMBER_WORDS,
    STOP_WORDS,
    Number,
    canonical_unit,
    plain_math,
    read_number,
    same_number,
    singular,
)
from .statements import MATH, formula


@dataclass(frozen=True)
class Quantity:
    """A number with its unit, which may be any words; `""` for none."""

    number: Number
    unit: str = ""


@dataclass(frozen=True)
class Collection:
    """Several values: ordered in `"()"` and `"[)"`, unordered in `"{}"` and in a list without brackets, `""`."""

    items: tuple["Value", ...]
    brackets: str = ""


# An expression that is not a number is kept as text, without insignificant parts.
Value = Quantity | Collection | str


class Stated(NamedTuple):
    """A value in a text: its span, and its formula, empty for one in prose."""

    start: int
    end: int
    value: Value
    written: str = ""


_CURRENCY = r"(?:US\$|\$|€|£|¥|₹|USD\s|EUR\s|GBP\s)"
_EXPONENT = r"(?:[eE][-+]?\d{1,3}(?![\w])|\s?[x*×]\s?10\s?(?:\^|\*\*)\s?(?:\{[-+]?\d{1,3}\}|[-+]?\d{1,3}))"
_PLAIN = rf"(?:{GROUPED}(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
# A time, or a number with its currency before it. A minus must be unary: "10 - 7" and "x -7" are differences.
_AMOUNT = re.compile(
    r"\s?(?<![\w.:])(?P<hour>[01]?\d|2[0-4])(?=:|\s?(?i:[ap]\.?\s?m\b"
    r"|in the ))(?:(?P<minute>:[0-5]\d)(?P<second>:[0-5]\d)?)?(?:\s?(?P<half>(?i:[ap]\.?\s?m\b|in the (?:morning"
    rf"|afternoon|evening))))?\.?(?![\w:])|(?P<sign>(?:(?<![\w.)\]}}%])(?<![\d)\]}}%]\s)(?<!\b[A-Za-z]\s)(?:-"
    r"|(?<==\s)-\s)(?=[$€£¥₹.\d])|\b(?i:minus"
    rf"|negative)\s+)?)(?P<currency>{_CURRENCY}?)\s?(?:(?P<number>(?<![\w.])(?:(?:{_PLAIN}\s?)?(?:\\?sqrt(?:\{{\d+\}}"
    rf"|\(\d+\))|pi\b)(?:\s?/\s?\d+)?|\d+\s+(?:and\s+)?\d+/\d+|{_PLAIN}\s?/\s?{_PLAIN}|{_PLAIN}{_EXPONENT}?))(?![\d_]"
    rf"|[.,]\d)|(?P<words>(?i:{NUMBER_WORDS.pattern})))"
)
_MULTIPLIER = re.compile(r"\s?(?P<multiplier>(?i:dozen|hundred|thousand|k|[mb]illion|bn|trillion)|(?<=\d)M)(?![\w/])")
_UNIT = re.compile(
    r"\s?(?P<symbol>%|°\s?[CF]?\b|°|¢|[€£¥₹])|[\s-]?(?P<words>[A-Za-zµμ]+(?:(?: ?/ ?"
    r"| )[A-Za-z]+){0,3}(?:\^\{?-?\d\}?)?)"
)
# Words not in any table that may be the unit of a number: up to three, and not a sentence.
_WORDS_BEHIND = re.compile(
    rf"[ -]*(?!(?:{'|'.join(STOP_WORDS)}|st|nd|rd|th)\b)(?=\S\S)[a-z][\w%°/.^{{}}-]*(?: [a-z][\w%°/.^{{}}-]*){{0,2}}",
    re.IGNORECASE,
)
_LEFT_SIDE = re.compile(
    r"^(?:\([a-z](?:,\s?[a-z])+\)|[A-Za-z]\w{0,12}(?:_\{?\w{1,6}\}?)?'{0,2}(?:\s?\([^()]{0,20}\))?)\s*(?:=|:="
    r"|\\in(?![A-Za-z])|∈)\s*(?=\S)"
)
_RANGE = re.compile(
    r"(?:(?:between|from)\s+)?(\d[\d.,]*)\s*(?:-|–|\bto\b|\band\b)\s*(\d[\d.,]*)(\s?[A-Za-z%°€]*)", re.IGNORECASE
)
_BETWEEN = re.compile(
    rf"(?<![\d.,]){GROUPED}|(?P<bracket>[][(){{}}])|(?P<separator>\s*(?:,|;)\s*(?:(?:and|or)\s+)?|\s+(?:and|or)\s+)",
    re.IGNORECASE,
)
_WORDY = re.compile(
    r"(?<!\\)\b(?!(?:sqrt|sin|cos|tan|cot|sec|csc|log|ln|exp|frac|inf|min|max|mod|det|arcsin|arccos"
    r"|arctan)\b)(?:[A-Za-z]{3,}|(?:as|i\.e|is|so|we)\b)"
)


@lru_cache(maxsize=2048)
def read_value(text: str) -> Value | None:
    """Parses a whole text as a value; `None` for text that is not a mathematical answer."""
    if len(text) > 1000:
        return None
    if (match := MATH.match(text := text.strip().rstrip(" ."))) and match.end() == len(text):
        text = formula(match)
    return _read_plain(" ".join(plain_math(text).rstrip(" .").split()))


def _read_plain(text: str, depth: int = 0) -> Value | None:
    if not text or depth > 4:
        return None
    if (ends := _RANGE.fullmatch(text)) and (bounds := _collection([ends[1], ends[2] + ends[3]], "", depth)):
        low, high = bounds.items
        if isinstance(low, Quantity) and isinstance(high, Quantity) and low.number.value < high.number.value:
            return bounds
    quantity = _read_quantity(text)
    if quantity is not None:
        return quantity
    named = [part for part in _split(text) if re.match(r"[A-Za-z]\s*=", part)]
    if len({part[0] for part in named}) == len(named) > 1:  # x and y form a point
        return _collection(sorted(named), "()", depth)
    stripped = _LEFT_SIDE.sub("", text)
    if stripped != text:
        return _read_plain(stripped, depth + 1)
    if len(terms := text.split(":")) > 1 and (ratio := _collection(terms, ":", depth)) and is_numeric(ratio):
        return ratio
    if "±" in text:
        return _collection([text.replace("±", sign, 1).removeprefix("+") for sign in "+-"], "", depth)
    if "\\cup" in text or "∪" in text:
        return _collection([part.strip() for part in re.split(r"\\cup|∪", text)], "{}", depth)
    collection = _read_collection(text, depth)
    if collection is not None:
        return collection
    right = text.rpartition("=")[2].strip()
    if right != text and not _WORDY.search(text) and (value := _read_quantity(right)) is not None:
        return value  # of a chain of equations, the last side
    return _read_symbols(text)


def _read_quantity(text: str) -> Quantity | None:
    """Parses a whole text as a quantity, including all words after its number."""
    if number := read_number(text):
        return Quantity(number)
    found = quantities(re.sub(r"(?<=\d) in\Z", " inch", text))
    if len(found) == 1 and found[0][0] == 0:
        _, end, quantity = found[0]
        return quantity if end >= len(text) or _WORDS_BEHIND.fullmatch(text, end) else None
    match = re.fullmatch(r"(.*(?:[\d)}]|pi)) ?([A-Za-zµμ%°].*)", text)  # an expression
    number = read_number(match[1]) if match else None
    return Quantity(number, match[2]) if match and number and canonical_unit(match[2]) else None


def _clock(match: re.Match[str]) -> Quantity:
    """Minutes after midnight; `unit` tells whether the half of the day is ambiguous."""
    hour, half = int(match["hour"]), (match["half"] or "").casefold()
    if half:
        hour = hour % 12 + 12 * (half[0] == "p" or "noon" in half or "eve" in half)
    minutes, seconds = int((match["minute"] or ":0")[1:]), int((match["second"] or ":0")[1:])
    return Quantity(Number(60 * hour + minutes + Fraction(seconds, 60)), "clock" if half or hour > 12 else "clock?")


def _read_collection(text: str, depth: int) -> Value | None:
    match = re.match(r"^(\\?\{|[(\[])(?P<inner>.*?)(\\?\}|[)\]])$", text, re.DOTALL)
    if match and (parts := _split(match["inner"])):
        opening, inner, closing = match[1][-1], match["inner"], match[3][-1]
        if len(parts) == 1 and opening + closing in ("()", "[]", "{}"):
            return _read_plain(inner.strip(), depth + 1)
        return _collection(parts, opening + closing, depth) if len(parts) > 1 else None
    parts = _split(text)
    listed = _collection(parts, "", depth) if len(parts) > 1 else None
    return listed.items[0] if listed and all(same_value(listed.items[0], item) for item in listed.items) else listed


def _collection(parts: list[str], brackets: str, depth: int) -> Collection | None:
    items = tuple(item for part in parts if (item := _read_plain(part, depth + 1)) is not None)
    return Collection(items, brackets) if len(items) == len(parts) else None


def _split(text: str) -> list[str]:
    """Parts between separators outside brackets and thousands groups; empty if brackets do not match."""
    parts, start, depth = [], 0, 0
    for match in _BETWEEN.finditer(text):
        if match["bracket"]:
            depth += 1 if match[0] in "([{" else -1
            if depth < 0:
                return []
        elif match["separator"] and depth == 0:
            parts.append(text[start : match.start()].strip())
            start = match.end()
    parts.append(text[start:].strip())
    return [part for part in parts if part]


def _read_symbols(text: str) -> str | None:
    if _WORDY.search(text) or not re.search(
        r"[\\^_=+*/<>|]|\d(?!(?:st|nd|rd|th)\b)[a-z]|^[a-zA-Z]$|[\w)]\s?-\s?[\w(]|[a-z]\(", text
    ):
        return None
    text = re.sub(r"\s+|\*|\\(?=[a-z]+)", "", text.replace("**", "^"))
    return re.sub(r"\{(\w)\}", r"\1", text)


def is_numeric(value: Value | None) -> bool:
    """Whether a value consists of numbers only, which are compared exactly."""
    return all(map(is_numeric, value.items)) if isinstance(value, Collection) else isinstance(value, Quantity)


def same_value(right: Value | None, given: Value | None) -> bool:
    """Whether a value equals the right one."""
    if isinstance(right, Quantity) and isinstance(given, Quantity):
        return _same_quantity(right, given)
    if isinstance(right, str) and isinstance(given, str):
        return right in (given, given.rpartition("=")[2])
    if isinstance(right, Collection) and isinstance(given, Collection):
        if len(right.items) != len(given.items):
            return False
        if right.brackets and given.brackets and right.brackets != given.brackets:
            return False
        if ":" in right.brackets + given.brackets and is_numeric(right) and is_numeric(given):
            a, b = ([q.number.value for q in ratio.items if isinstance(q, Quantity)] for ratio in (right, given))
            return all(x * b[0] == y * a[0] for x, y in zip(a, b, strict=True))
        if all(same_value(a, b) for a, b in zip(right.items, given.items, strict=True)):
            return True
        if (right.brackets or given.brackets) not in ("", "{}"):
            return False
        left = list(given.items)
        for item in right.items:
            if (match := next((other for other in left if same_value(item, other)), None)) is None:
                return False
            left.remove(match)
        return True
    return False


def _same_quantity(right: Quantity, given: Quantity) -> bool:
    ours, theirs = canonical_unit(right.unit), canonical_unit(given.unit)
    if {right.unit.casefold(), given.unit.casefold()} <= {"£", "gbp", "pound", "pounds"}:
        return same_number(right.number, given.number)
    percent = ("percent", Fraction(1))
    if percent in (ours, theirs) and None in (ours, theirs):  # 50% may be given as 50 (if asked for) or as 0.5
        a, b = (
            Number(q.number.value / 100) if unit == percent else q.number
            for q, unit in ((right, ours), (given, theirs))
        )
        return same_number(a, b) or (
            (ours == percent or abs(float(right.number.value)) > 1) and same_number(right.number, given.number)
        )
    if ours is not None and theirs is not None:
        if ours[0] != theirs[0]:
            return False
        a, b = (replace(q.number, value=q.number.value * unit[1]) for q, unit in ((right, ours), (given, theirs)))
        return same_number(a, b)
    if "clock" in right.unit + given.unit:
        if not ("clock" in right.unit and "clock" in given.unit):
            return False
        period = 1440 if right.unit == given.unit else 720  # one is ambiguous about the half of the day
        return (right.number.value - given.number.value) % period == 0
    if not same_number(right.number, given.number):
        return False
    # A unit that is left out is the one asked for.
    words, others = ([singular(word) for word in q.unit.split()] for q in (right, given))
    return not words or not others or words[-1] in others


def quantities(text: str) -> list[tuple[int, int, Quantity]]:
    """Quantities in prose, each with its span, including the words of its unit."""
    found: list[tuple[int, int, Quantity]] = []
    for match in _AMOUNT.finditer(text):
        start = match.end() - len(match[0].lstrip())
        if match["hour"]:
            found.append((start, match.end(), _clock(match)))
            continue
        end, unit = match.end(), match["currency"].strip()
        if match[0].strip().casefold() == "one" and not re.match(r"\s+[a-z]{3,}\b(?<!that)|\W*$", text[end:]):
            continue  # a pronoun
        number = read_number(match["words"] or re.sub("[x×]", "*", match["number"]))
        if number is None:
            continue
        if match["sign"]:
            number = replace(number, value=-number.value)
        if multiplier := _MULTIPLIER.match(text, end):
            factor = MULTIPLIERS[multiplier[1].casefold()]
            number, end = Number(number.value * factor), multiplier.end()
        attached = re.match(r"[^\W\d]", text[end:])
        if not unit and (following := _UNIT.match(text, end)):
            words = (following["symbol"] or following["words"]).split()
            # The longest prefix that is a known unit, or the words up to one that is not a unit.
            known = next((k for k in range(len(words), 0, -1) if canonical_unit(" ".join(words[:k]))), 0)
            unit = " ".join(words[:known] or takewhile(lambda word: word.casefold() not in STOP_WORDS, words))
            if known:
                end, attached = text.index(words[known - 1], end) + len(words[known - 1]), None
        if not attached:  # as in 2x, 3rd
            found.append((start, end, Quantity(number, unit)))
    return _compounds(found, text)


def _compounds(found: list[tuple[int, int, Quantity]], text: str) -> list[tuple[int, int, Quantity]]:
    """Merges "2 hours and 30 minutes" or "5 feet 3 inches" into one quantity."""
    merged = found[:1]
    for start, end, quantity in found[1:]:
        first, last, whole = merged[-1]
        a, b = canonical_unit(whole.unit), canonical_unit(quantity.unit)
        if a and b and a[0] == b[0] and a[1] > b[1] and re.fullmatch(r"\s*(?:,|,?\s*and)?\s*", text[last:start]):
            value = whole.number.value + quantity.number.value * b[1] / a[1]
            merged[-1] = (first, end, Quantity(Number(value), whole.unit))
        else:
            merged.append((start, end, quantity))
    return merged
