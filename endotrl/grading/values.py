# SPDX-License-Identifier: Apache-2.0
"""
Mathematical answers as values: quantities with units, tuples, intervals, sets and lists of them, and other
expressions.
"""

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
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
# A number in prose, with the currency before it. A minus stands alone before it: "10 - 7" and "x -7" are differences.
IN_PROSE = re.compile(
    rf"(?P<sign>(?:(?<![\w.)\]}}%])(?<![\d)\]}}%]\s)(?<!\b[A-Za-z]\s)(?:-|(?<==\s)-\s)(?=[$€£¥₹.\d])|\b(?:minus|negat"
    rf"ive)\s+)?)(?P<currency>{_CURRENCY}?)\s?(?P<number>(?<![\w.])(?:\d+\s+(?:and\s+)?\d+/\d+|{_PLAIN}\s?/\s?{_PLAIN}"
    rf"|{_PLAIN}{_EXPONENT}?))(?![\d_]|[.,]\d)"
)
_CLOCK = re.compile(
    r"(?<![\w.:])(?P<hour>[01]?\d|2[0-4])(?::(?P<minute>[0-5]\d)(?::(?P<second>[0-5]\d))?)?\s?(?P<half>[ap]\.?\s?m\b"
    r"|in the (?:morning|afternoon|evening))?\.?(?![\w:])",
    re.IGNORECASE,
)
_MULTIPLIER = re.compile(r"\s?(?P<multiplier>(?i:dozen|hundred|thousand|k|[mb]illion|bn|trillion)|(?<=\d)M)(?![\w/])")
_UNIT = re.compile(
    r"\s?(?P<symbol>%|°\s?[CF]?\b|°|¢|[€£¥₹])|[\s-]?(?P<words>[A-Za-zµμ]+(?:[ /][A-Za-z]+){0,3}(?:\^\{?-?\d\}?)?)"
)
_LEFT_SIDE = re.compile(
    r"^(?:\([a-z](?:,\s?[a-z])+\)|[A-Za-z]\w{0,12}(?:_\{?\w{1,6}\}?)?'{0,2}(?:\s?\([^()]{0,20}\))?)\s*(?:=|:="
    r"|\\in(?![A-Za-z])|∈)\s*(?=\S)"
)
_RANGE = re.compile(
    r"(?:(?:between|from)\s+)?(\d[\d.,]*)\s*(?:-|–|\bto\b|\band\b)\s*(\d[\d.,]*)(\s?[A-Za-z%°€]*)", re.IGNORECASE
)
_ORDINALS = ("st", "nd", "rd", "th")
_SEPARATOR = re.compile(r"\s*(?:,|;)\s*(?:(?:and|or)\s+)?|\s+(?:and|or)\s+", re.IGNORECASE)
_WORDY = re.compile(
    r"(?<!\\)\b(?!(?:sqrt|sin|cos|tan|cot|sec|csc|log|ln|exp|frac|inf|min|max|mod|det|arcsin|arccos"
    r"|arctan)\b)[A-Za-z]{3,}"
)


@lru_cache(maxsize=2048)
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
    if (ends := _RANGE.fullmatch(text)) and (bounds := _collection([ends[1], ends[2] + ends[3]], "", depth)):
        low, high = bounds.items
        if isinstance(low, Quantity) and isinstance(high, Quantity) and low.number.value < high.number.value:
            return bounds
    quantity = _read_quantity(text)
    if quantity is not None:
        return quantity
    named = [part for part in _split(text) if re.match(r"[A-Za-z]\s*=", part)]
    if len({part[0] for part in named}) == len(named) > 1:  # x and y are a point
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
    if (clock := _CLOCK.fullmatch(text)) and (time := _read_clock(clock)):
        return time
    number = read_number(text)
    if number is not None:
        return Quantity(number)
    if match := re.match(rf"^(?P<sign>-?)\s*(?P<currency>{_CURRENCY})\s*(?P<rest>.+)$", text):
        inner = _read_quantity(match["sign"] + match["rest"])
        return None if inner is None or inner.unit else Quantity(inner.number, match["currency"].strip())
    if match := re.match(r"^(?:minus|negative)\s+(?P<rest>.+)$", text, re.IGNORECASE):
        return _read_quantity("-" + match["rest"])
    if (words := NUMBER_WORDS.match(text)) and (number := read_number(words[0])):
        noun = re.fullmatch(r"\s([A-Za-z]+)(?: [A-Za-z]+)*", text[words.end() :])
        return _scaled(number, noun[0].strip()) if noun and noun[1].casefold() not in STOP_WORDS else None
    # From the right: the shortest unit that leaves a number.
    for split in re.finditer(r"(?<=[\d)}\]])\s*(?=[A-Za-zµμ%°¢€£¥₹])|\s+(?=[A-Za-zµμ%°¢€£¥₹])|-(?=[A-Za-z])", text):
        number, unit = read_number(text[: split.start()]), text[split.end() :].strip()
        if number is None or not re.fullmatch(r"[A-Za-zµμ%°¢€£¥₹](?:[A-Za-z %°/.-]|\^\{?-?\d\}?)*", unit):
            continue
        unit = "inch" if unit == "in" else unit
        if unit.split()[0].casefold() in STOP_WORDS or NUMBER_WORDS.fullmatch(unit) or unit.split()[0] in _ORDINALS:
            return None  # a sentence
        variable = len(unit) == 1 and unit not in MULTIPLIERS
        if canonical_unit(unit) is None and (variable or re.search(r"\d\s*[-+]", text[: split.start()])):
            return None  # an expression
        return _scaled(number, unit)
    found = quantities(text) if re.match(r"\d+ ?[a-z]+ (?:and )?\d+ ?[a-z]+$", text, re.IGNORECASE) else []
    return found[0][2] if len(found) == 1 and found[0][:2] == (0, len(text)) else None


def _read_clock(match: re.Match[str]) -> Quantity | None:
    """Minutes after midnight; of a time that may be of either half of the day, `unit` says so."""
    if not match["minute"] and not match["half"]:
        return None
    hour, half = int(match["hour"]), (match["half"] or "").casefold()
    if half:
        hour = hour % 12 + 12 * (half[0] == "p" or "noon" in half or "eve" in half)
    minutes = 60 * hour + int(match["minute"] or 0) + Fraction(int(match["second"] or 0), 60)
    return Quantity(Number(Fraction(minutes)), "clock" if half or hour > 12 else "clock?")


def _factor(match: re.Match[str]) -> int:
    return MULTIPLIERS.get(match["multiplier"]) or MULTIPLIERS[match["multiplier"].casefold()]


def _scaled(number: Number, unit: str) -> Quantity | None:
    if match := _MULTIPLIER.match("1" + unit, 1):
        scaled, rest = Number(number.value * _factor(match), 0, number.significant), unit[match.end() - 1 :].strip()
        return _scaled(scaled, rest) if rest else Quantity(scaled)
    if canonical_unit(unit) is None and len(unit.split()) > 3:
        return None  # a sentence
    return Quantity(number, unit)


def _read_collection(text: str, depth: int) -> Value | None:
    match = re.match(r"^(\\?\{|[(\[])(?P<inner>.*?)(\\?\}|[)\]])$", text, re.DOTALL)
    if match and _balanced(match["inner"]):
        opening, inner, closing = match[1][-1], match["inner"], match[3][-1]
        parts = _split(inner)
        if len(parts) == 1 and opening + closing in ("()", "[]", "{}"):
            return _read_plain(inner.strip(), depth + 1)
        return _collection(parts, opening + closing, depth) if len(parts) > 1 else None
    parts = _split(text)
    if len(parts) < 2:
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
        return right.text in (given.text, given.text.rpartition("=")[2])
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
    if {right.unit.casefold(), given.unit.casefold()} <= {"£", "gbp", "pound", "pounds"}:
        return same_number(right.number, given.number)
    percent = ("percent", Fraction(1))
    if percent in (ours, theirs) and None in (ours, theirs):
        return _same_percent(right.number, given.number, ours == percent)
    if ours is not None and theirs is not None:
        if ours[0] != theirs[0]:
            return False
        a, b = (replace(q.number, value=q.number.value * unit[1]) for q, unit in ((right, ours), (given, theirs)))
        return same_number(a, b)
    if "clock" in right.unit + given.unit:
        if not ("clock" in right.unit and "clock" in given.unit):
            return False
        either = right.unit != given.unit  # one says which half of the day
        return (right.number.value - given.number.value) % (720 if either else 1440) == 0
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
    found: list[tuple[int, int, Quantity]] = []
    for match in _CLOCK.finditer(text):
        if time := _read_clock(match):
            found.append((*match.span(), time))
            text = text[: match.start()] + " " * len(match[0]) + text[match.end() :]
    for match in (*IN_PROSE.finditer(text), *NUMBER_WORDS.finditer(text)):
        word = match.re is NUMBER_WORDS
        if (
            word
            and match[0].casefold() == "one"
            and not re.match(r"\s+[a-z]{3,}\b(?<!that)|\W*$", text[match.end() :])
        ):
            continue  # a pronoun
        number = read_number(match[0] if word else re.sub("[x×]", "*", match["number"]))
        if number is None:
            continue
        if not word and match["sign"]:
            number = Number(-number.value, number.digits, number.significant)
        end, currency = match.end(), "" if word else match["currency"].strip()
        if multiplier := _MULTIPLIER.match(text, end):
            number, end = Number(number.value * _factor(multiplier)), multiplier.end()
        unit, attached = currency, re.match(r"[^\W\d]+", text[end:])
        if not currency and (following := _UNIT.match(text, end)):
            kept = (following["symbol"] or following["words"]).split()
            # The longest beginning that is a known unit, or the words up to one that is none.
            known = next((k for k in range(len(kept), 0, -1) if canonical_unit(" ".join(kept[:k]))), 0)
            stop = next((k for k, word in enumerate(kept) if word.casefold() in STOP_WORDS), len(kept))
            unit = " ".join(kept[: known or stop])
            if known:
                end = text.index(kept[known - 1], end) + len(kept[known - 1])
                attached = None
        if attached:
            continue  # 2x, 3rd
        start = match.end() - len(match[0].lstrip())
        found.append((start, end, Quantity(number, unit)))
    return _compounds(text, sorted(found, key=lambda entry: entry[0]))


def _compounds(text: str, found: list[tuple[int, int, Quantity]]) -> list[tuple[int, int, Quantity]]:
    """Of "2 hours and 30 minutes" and "5 feet 3 inches" one quantity."""
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
