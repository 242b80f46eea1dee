# SPDX-License-Identifier: Apache-2.0
"""
Mathematical answers as values: quantities with units, tuples, intervals, sets and lists of them, and other
expressions.
"""

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import takewhile

from .numbers import GROUPED, MULTIPLIERS, NUMBER_WORDS, Number, plain_math, read_number, same_number
from .units import STOP_WORDS, canonical_unit, singular


@dataclass(frozen=True)
class Quantity:
    """A number with its unit; `""` for none. The unit may be any words."""

    number: Number
    unit: str = ""


@dataclass(frozen=True)
class Collection:
    """Several values: in order in `"()"` and `"[)"`, in any order in `"{}"` and in a list without brackets, `""`."""

    items: tuple["Value", ...]
    brackets: str = ""


@dataclass(frozen=True)
class Symbols:
    """An expression that is no number, as text without what does not matter."""

    text: str


Value = Quantity | Collection | Symbols

_CURRENCY = r"(?:US\$|\$|€|£|¥|₹|USD\s|EUR\s|GBP\s)"
_EXPONENT = r"(?:[eE][-+]?\d{1,3}(?![\w])|\s?[x*×]\s?10\s?(?:\^|\*\*)\s?(?:\{[-+]?\d{1,3}\}|[-+]?\d{1,3}))"
_PLAIN = rf"(?:{GROUPED}(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
# A number in prose, with the currency before it.
IN_PROSE = re.compile(
    rf"(?P<sign>(?:(?<![\w.)\]}}%])(?<![\w)\]}}%]\s)-\s?|\b(?:minus|negative)\s+)?)(?P<currency>{_CURRENCY}?)\s?"
    rf"(?P<number>(?<![\w.])(?:\d+\s+\d+/\d+|{_PLAIN}\s?/\s?{_PLAIN}|{_PLAIN}{_EXPONENT}?)(?![\w]|[.,]\d))"
)
_WORD_IN_PROSE = re.compile(
    rf"(?<![\w-])(?:{'|'.join(sorted(NUMBER_WORDS, key=len, reverse=True))})(?![\w-])", re.IGNORECASE
)
_MULTIPLIER = re.compile(rf"\s?(?P<multiplier>{'|'.join(MULTIPLIERS)})\b", re.IGNORECASE)
_UNIT = re.compile(
    r"\s?(?P<symbol>%|°\s?[CF]?\b|°|¢|[€£¥₹])|[\s-]?(?P<words>[A-Za-zµμ]+(?:[ /][A-Za-z]+){0,3}(?:\^\{?-?\d\}?)?)"
)
_LEFT_SIDE = re.compile(
    r"^[A-Za-z]\w{0,12}(?:_\{?\w{1,6}\}?)?'{0,2}(?:\s?\([^()]{0,20}\))?\s*(?:=|:=|\\in(?![A-Za-z])|∈)\s*(?=\S)"
)
_ORDINALS = ("st", "nd", "rd", "th")
_SEPARATOR = re.compile(r"\s*(?:,|;)\s*(?:(?:and|or)\s+)?|\s+(?:and|or)\s+", re.IGNORECASE)
_WORDY = re.compile(
    r"(?<!\\)\b(?!(?:sqrt|sin|cos|tan|cot|sec|csc|log|ln|exp|frac|inf|min|max|mod"
    r"|det|arcsin|arccos|arctan)\b)[A-Za-z]{3,}"
)


def read_value(text: str) -> Value | None:
    """The value that a whole text is; `None` for text that is no mathematical answer."""
    if len(text) > 1000:
        return None
    text = _without_delimiters(text.strip())
    text = plain_math(text).strip().rstrip(".").strip()
    return _read_plain(text)


def _without_delimiters(text: str) -> str:
    for start, end in (("$$", "$$"), ("\\[", "\\]"), ("\\(", "\\)"), ("$", "$")):
        if len(text) >= len(start) + len(end) and text.startswith(start) and text.rstrip(".").endswith(end):
            inside = text.rstrip(".")[len(start) : -len(end)]
            if inside.strip() and start not in inside:
                return inside.strip()
    return text


def _read_plain(text: str, depth: int = 0) -> Value | None:
    if not text or depth > 4:
        return None
    quantity = _read_quantity(text)
    if quantity is not None:
        return quantity
    stripped = _LEFT_SIDE.sub("", text)
    if stripped != text:
        return _read_plain(stripped, depth + 1)
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
    number = read_number(text)
    if number is not None:
        return Quantity(number)
    if match := re.match(rf"^(?P<sign>-?)\s*(?P<currency>{_CURRENCY})\s*(?P<rest>.+)$", text):
        inner = _read_quantity(match["sign"] + match["rest"])
        return None if inner is None or inner.unit else Quantity(inner.number, match["currency"].strip())
    if match := re.match(r"^(?:minus|negative)\s+(?P<rest>.+)$", text, re.IGNORECASE):
        return _read_quantity("-" + match["rest"])
    # From the right: the shortest unit that leaves a number.
    for split in re.finditer(r"(?<=[\d)}\]ieI])\s*(?=[A-Za-zµμ%°¢€£¥₹])|\s+(?=[A-Za-zµμ%°¢€£¥₹])|-(?=[A-Za-z])", text):
        number, unit = read_number(text[: split.start()]), text[split.end() :].strip()
        if number is None or not re.fullmatch(r"[A-Za-zµμ%°¢€£¥₹](?:[A-Za-z %°/.-]|\^\{?-?\d\}?)*", unit):
            continue
        if unit.split()[0].casefold() in STOP_WORDS or unit.casefold() in NUMBER_WORDS or unit in _ORDINALS:
            return None  # a sentence
        variable = len(unit) == 1 and unit not in MULTIPLIERS
        if canonical_unit(unit) is None and (variable or re.search(r"\d\s*[-+]", text[: split.start()])):
            return None  # an expression
        return _scaled(number, unit)
    return None


def _scaled(number: Number, unit: str) -> Quantity | None:
    if match := re.match(rf"^({'|'.join(MULTIPLIERS)})\b\s*(?P<rest>.*)$", unit, re.IGNORECASE):
        scaled = Number(number.value * MULTIPLIERS[match[1].casefold()], 0, number.significant)
        return _scaled(scaled, match["rest"]) if match["rest"] else Quantity(scaled)
    if canonical_unit(unit) is None and len(unit.split()) > 3:
        return None  # a sentence
    return Quantity(number, unit)


def _read_collection(text: str, depth: int) -> Value | None:
    if match := re.match(r"^(\\?\{|[(\[])(?P<inner>.*?)(\\?\}|[)\]])$", text, re.DOTALL):
        opening, inner, closing = match[1][-1], match["inner"], match[3][-1]
        if not _balanced(inner):
            return None
        parts = _split(inner)
        if len(parts) == 1 and opening + closing in ("()", "[]", "{}"):
            return _read_plain(inner.strip(), depth + 1)
        return _collection(parts, opening + closing, depth) if len(parts) > 1 else None
    parts = _split(text)
    if text[0] in "([{" or text.startswith("\\{") or len(parts) < 2:
        return None
    found = _collection(parts, "", depth)
    words = found and any(
        isinstance(item, Symbols) and _WORDY.search(part) for item, part in zip(found.items, parts, strict=True)
    )
    return None if words else found


def _collection(parts: list[str], brackets: str, depth: int) -> Collection | None:
    items = tuple(item for part in parts if (item := _read_plain(part, depth + 1)) is not None)
    return Collection(items, brackets) if len(items) == len(parts) else None


def _balanced(text: str) -> bool:
    depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return False
    return depth == 0


def _split(text: str) -> list[str]:
    """Parts between the separators that stand in no brackets, and group no thousands."""
    parts, start, depth, position = [], 0, 0, 0
    grouped = [m.span() for m in re.finditer(rf"(?<![\d.,]){GROUPED}", text)]
    while position < len(text):
        depth += (text[position] in "([{") - (text[position] in ")]}")
        match = _SEPARATOR.match(text, position) if depth == 0 else None
        if match and not any(a < match.start() < b for a, b in grouped):
            parts.append(text[start : match.start()].strip())
            start = position = match.end()
        else:
            position += 1
    parts.append(text[start:].strip())
    return [part for part in parts if part]


def _read_symbols(text: str) -> Symbols | None:
    if (
        _WORDY.search(text)
        or re.fullmatch(r"\d+(?:st|nd|rd|th)", text)
        or not re.search(r"[\\^_=+*/<>|]|\d[a-z]|^[a-zA-Z]$|[\w)]\s?-\s?[\w(]|[a-z]\(", text)
    ):
        return None
    text = re.sub(r"\s+|\*|\\(?=[a-z]+)", "", text.replace("**", "^"))
    text = re.sub(r"\{(\w)\}", r"\1", text)
    return Symbols(text)


def is_numeric(value: Value | None) -> bool:
    """Whether a value is made of numbers only, which are compared exactly."""
    return all(map(is_numeric, value.items)) if isinstance(value, Collection) else isinstance(value, Quantity)


def same_value(right: Value | None, given: Value | None) -> bool:
    """Whether a value is the right one."""
    if isinstance(right, Quantity) and isinstance(given, Quantity):
        return _same_quantity(right, given)
    if isinstance(right, Symbols) and isinstance(given, Symbols):
        return right.text == given.text
    if isinstance(right, Collection) and isinstance(given, Collection):
        if len(right.items) != len(given.items):
            return False
        if right.brackets and given.brackets and right.brackets != given.brackets:
            return False
        if all(same_value(a, b) for a, b in zip(right.items, given.items, strict=True)):
            return True
        ordered = (right.brackets or given.brackets) not in ("", "{}")
        return not ordered and _same_members(right.items, given.items)
    return False


def _same_members(right: tuple[Value, ...], given: tuple[Value, ...]) -> bool:
    left = list(given)
    for item in right:
        match = next((i for i, other in enumerate(left) if same_value(item, other)), None)
        if match is None:
            return False
        del left[match]
    return True


def _same_quantity(right: Quantity, given: Quantity) -> bool:
    ours, theirs = canonical_unit(right.unit), canonical_unit(given.unit)
    percent = ("percent", Fraction(1))
    if percent in (ours, theirs) and None in (ours, theirs):
        return _same_percent(right.number, given.number, ours == percent)
    if ours is not None and theirs is not None:
        if ours[0] != theirs[0]:
            return False
        a, b = (replace(q.number, value=q.number.value * unit[1]) for q, unit in ((right, ours), (given, theirs)))
        return same_number(a, b)
    if not same_number(right.number, given.number):
        return False
    # A unit that is left out is the one that the question asks for.
    if not right.unit or not _unit_words(given.unit):
        return True
    words = _unit_words(right.unit)
    return not words or words[-1] in _unit_words(given.unit)


def _unit_words(unit: str) -> list[str]:
    words = takewhile(lambda word: word.casefold().strip(".,;:!?()") not in STOP_WORDS, unit.split())
    return list(map(singular, words))


def _same_percent(right: Number, given: Number, right_is_percent: bool) -> bool:
    """Percent on one side only: 50% is given as 50, which the question may ask for, or as 0.5."""
    if right_is_percent:
        return same_number(right, given) or same_number(Number(right.value / 100), given)
    return same_number(right, Number(given.value / 100)) or (abs(float(right.value)) > 1 and same_number(right, given))


def quantities(text: str) -> list[tuple[int, int, Quantity]]:
    """The quantities in prose, each with where it stands, the words of its unit included."""
    found = []
    for match in (*IN_PROSE.finditer(text), *_WORD_IN_PROSE.finditer(text)):
        word = match.re is _WORD_IN_PROSE
        number = read_number(match[0] if word else re.sub("[x×]", "*", match["number"]))
        if number is None:
            continue
        if not word and match["sign"]:
            number = Number(-number.value, number.digits, number.significant)
        end, currency = match.end(), "" if word else match["currency"].strip()
        if multiplier := _MULTIPLIER.match(text, end):
            number, end = Number(number.value * MULTIPLIERS[multiplier["multiplier"].casefold()]), multiplier.end()
        unit = currency
        if not currency and (following := _UNIT.match(text, end)):
            kept = (following["symbol"] or following["words"]).split()
            # The longest beginning that is a known unit, or the words up to one that is none.
            known = next((k for k in range(len(kept), 0, -1) if canonical_unit(" ".join(kept[:k]))), 0)
            stop = next((k for k, word in enumerate(kept) if word.casefold() in STOP_WORDS), len(kept))
            unit = " ".join(kept[: known or stop])
            if known:
                end = text.index(kept[known - 1], end) + len(kept[known - 1])
        start = match.end() - len(match[0].lstrip())
        found.append((start, end, Quantity(number, unit)))
    return sorted(found, key=lambda entry: entry[0])
