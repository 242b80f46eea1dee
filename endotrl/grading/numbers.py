# SPDX-License-Identifier: Apache-2.0
"""Parsing of numbers in prose and LaTeX (exact values, without evaluating code), and of the units after them."""

import math
import re
from dataclasses import dataclass
from fractions import Fraction


# 1.234 is ambiguous, 1.234.567 is not.
GROUPED = r"(?:\d{1,3}(?:(?:,|\s|'|_)\d{3})+|\d{1,3}(?:\.\d{3}){2,})(?!\d)"
_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
MULTIPLIERS = {"dozen": 12, "hundred": 100, "thousand": 10**3, "k": 10**3, "m": 10**6}
MULTIPLIERS |= {"million": 10**6, "billion": 10**9, "bn": 10**9, "trillion": 10**12}
_COUNTS = {word: i for i, word in enumerate(_ONES.split())}
_COUNTS |= {word: 10 * i for i, word in enumerate(_TENS.split(), start=2)}
_PARTS = {"half": 2, "halve": 2, "quarter": 4} | {
    part: i for i, part in enumerate("third fourth fifth sixth seventh eighth ninth tenth".split(), start=3)
}
_SCALE = "(?:dozen|hundred|thousand|million|billion|trillion)"
_PART = rf"(?:{'|'.join(_PARTS)})s?"
# A number in words: "three hundred and forty-two", "two thirds", "two and a half".
NUMBER_WORDS = re.compile(
    rf"(?<![\w-])(?:(?:an?\s+{_SCALE}|{'|'.join(_COUNTS)})\b(?:(?:[\s-]+|(?<=red|and|ion)\s+and\s+)(?:{_SCALE}"
    rf"|{'|'.join(_COUNTS)})\b)*(?:[\s-]+{_PART}|\s+and\s+(?:an?|one|three)[\s-]+(?:half|quarters?))?|an?\s+(?:half"
    rf"|third|quarter)|half\s+an?\s+{_SCALE})(?![\w-])",
    re.IGNORECASE,
)
# Limits of exact arithmetic: exponent, and length of an expression.
_MAX_EXPONENT, _MAX_LENGTH = 400, 200
_MIXED = re.compile(r"(\d+)(?: (?:and )?(\d+ ?/ ?\d+)| ?(\\frac\{\d+\}\{\d+\}))")
_LITERAL = rf"(?<![\w.])(?:{GROUPED}(?:\.\d+)?|\d+\.\d+|\.\d+|\d+)(?:[eE][-+]?\d{{1,3}}(?![\w.]))?"
_LATEX = (
    (r"\\(?:left|right|[bB]ig[lr]?|displaystyle|q?quad|mathstrut)(?![A-Za-z])|\\[,!;: ]|~", " "),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\(?:text(?:bf|rm|it)?|math(?:rm|bf|it)|mbox|operatorname|boldsymbol)\s*\{([^{}]*)\}", r" \1 "),
    (r"\\(?:cdot|times|ast)(?![A-Za-z])|[×·⋅]", "*"),
    (r"\\div(?![A-Za-z])|÷", "/"),
    (r"\\pi(?![A-Za-z])|π", " pi "),
    (r"\\infty(?![A-Za-z])|∞", " inf "),
    (r"\\pm(?![A-Za-z])", "±"),
    (r"√(\d+)", r"\\sqrt{\1}"),
    (r"√", r"\\sqrt"),
    (r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree", "°"),
    (r"\\(%|\$|&|#)", r"\1"),
    (r"\{,\}", ","),
    (r"\\(?:implies|[rR]ightarrow|to|longrightarrow|approx|simeq|sim|equiv)(?![A-Za-z])|[≈≃]", "="),
)


@dataclass(frozen=True)
class Number:
    """
    A number, exact (`Fraction`) if it is rational. For one written as a decimal, `digits` is its number of decimals
    and `significant` that of its significant digits; `None` for a fraction, a root, an expression.
    """

    value: Fraction | float
    digits: int | None = None
    significant: int = 0


def plain_math(text: str) -> str:
    """Converts LaTeX of numbers to the notation of [`read_number`]: one sign per operation, no layout."""
    for pattern, replacement in _LATEX:
        text = re.sub(pattern, replacement, text)
    return text.strip()


def read_number(text: str) -> Number | None:
    """
    Parses a whole text (see [`plain_math`]) as a number: an integer with or without separators, a decimal, a fraction,
    a mixed number, in scientific notation, in words, or an expression of numbers with roots, powers and pi.
    """
    text = text.strip()
    if text.casefold() == "half" or NUMBER_WORDS.fullmatch(text.removeprefix("-")):
        number = _of_words(text.removeprefix("-"))
        return Number(-number.value, number.digits) if number and text.startswith("-") else number
    if not text or len(text) > _MAX_LENGTH or not re.search(r"\d|pi|inf|\\sqrt", text):
        return None
    try:
        value = _Expression(text).until(r"\Z")
    except (ValueError, ArithmeticError, RecursionError):
        return None
    if value != value:
        return None
    literal = re.fullmatch(rf"[-+]?\s*(?P<whole>{GROUPED}|\d*)(?:\.(?P<decimals>\d+))?", text)
    if literal is None:
        return Number(value)
    decimals = literal["decimals"] or ""
    significant = len((re.sub(r"\D", "", literal["whole"]) + decimals).lstrip("0"))
    return Number(value, len(decimals), significant)


def _of_words(text: str) -> Number | None:
    words = re.findall(r"\b(?!an?\b)[a-z]+", text.casefold())
    if words[0] == "half" and len(words) > 1:  # a dozen
        return Number(Fraction(MULTIPLIERS[words[-1]], 2), 0)
    part = _PARTS.get(words[-1].removesuffix("s"))
    if part is None:
        count = _count(words)
        return None if count is None else Number(count, 0)
    split = len(words) - words[::-1].index("and") if "and" in words else 0
    whole, count = _count(words[:split]), _count(words[split:-1] or ["one"])
    return None if whole is None or count is None else Number(whole + Fraction(count, part))


def _count(words: list[str]) -> Fraction | None:
    total, count, room = 0, 0, 10**3
    for word in words:
        if word in _COUNTS:
            if _COUNTS[word] >= room:
                return None  # "two three"
            count, room = count + _COUNTS[word], 10 if _COUNTS[word] >= 20 else 0
        elif word in MULTIPLIERS:
            count, room = max(count, 1) * MULTIPLIERS[word], MULTIPLIERS[word]
            if room >= 1000:
                total, count = total + count, 0
    return Fraction(total + count)


def same_number(right: Number, given: Number) -> bool:
    """
    Whether a number equals the right one. Decimals are compared as numbers; an exact one matches a decimal of at least
    four significant digits that rounds or truncates it, and matches a right decimal of three or more that it rounds
    to.
    """
    a, b = right.value, given.value
    try:
        if a == b or math.isinf(a) or math.isinf(b):
            return a == b
        if math.isclose(a, b, rel_tol=1e-9, abs_tol=0.0) and (isinstance(a, float) or isinstance(b, float)):
            return True
        for exact, decimal, needed, part in ((right, given, 4, 1.0), (given, right, 3, 0.5)):
            if exact.digits is None and decimal.digits and decimal.significant >= needed:
                limit = 10.0**-decimal.digits * part * (1 + 1e-9)
                if abs(float(exact.value) - float(decimal.value)) < limit:
                    return True
    except OverflowError:  # out of the range of floats, where only exact numbers are compared
        pass
    return False


class _Expression:
    """Sums, products, powers and roots of numbers, parsed from left to right; `ValueError` for anything else."""

    def __init__(self, text: str) -> None:
        self._text, self._position = _MIXED.sub(r"(\1+\2\3)", " ".join(text.split())), 0

    def _next(self, pattern: str) -> str | None:
        match = re.compile(f" ?({pattern})").match(self._text, self._position)
        if match is None:
            return None
        self._position = match.end()
        return match[1]

    def until(self, closing: str) -> Fraction | float:
        value = self._product()
        while sign := self._next("[-+]"):
            value += self._product() * (-1 if sign == "-" else 1)
        if self._next(closing) is None:
            raise ValueError("no number")
        return value

    def _product(self) -> Fraction | float:
        value = self._factor()
        while (sign := self._next(r"\*(?!\*)|/|x(?= ?10 ?[\^*])|(?=[({]|\\?sqrt|\\frac|pi|e(?![\w+-]))")) is not None:
            factor = self._factor()
            value = value / factor if sign == "/" else value * factor
        return value

    def _factor(self) -> Fraction | float:
        if sign := self._next("[-+]"):
            return self._factor() * (-1 if sign == "-" else 1)
        base = self._atom()
        return _power(base, self._factor()) if self._next(r"\^|\*\*") else base

    def _atom(self) -> Fraction | float:
        if literal := self._next(_LITERAL):
            plain = re.sub(r"[,\s'_]", "", literal)
            return Fraction(plain.replace(".", "") if plain.count(".") > 1 else plain)
        match self._next(r"pi|inf|e|\\frac|\\?sqrt|[({\[]"):
            case "pi" | "inf" | "e" as name:
                return float(getattr(math, name))
            case "\\frac":
                return self._argument() / self._argument()
            case "\\sqrt" | "sqrt":
                degree = self.until("]") if self._next(r"\[") else Fraction(2)
                return _power(self._argument(), 1 / degree)
            case "(" | "{" | "[":
                return self.until(r"[)}\]]")
        raise ValueError("no number")

    def _argument(self) -> Fraction | float:
        """Content of brackets, or one digit."""
        return self.until("[)}]") if self._next("[({]") else Fraction(self._next(r"\d") or "none")


def _power(base: Fraction | float, exponent: Fraction | float) -> Fraction | float:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        if abs(exponent) <= _MAX_EXPONENT and max(abs(base.numerator), base.denominator) < 10**6:
            return base ** int(exponent)
    power = float(base) ** float(exponent)
    if isinstance(power, complex):
        raise ValueError("not real")
    return power


# ------------------------------------------------------------------------------------------------------------------
# Units: synonyms, conversions, and words that are not units
# ------------------------------------------------------------------------------------------------------------------


_UNITS: dict[str, dict[str, int | str | Fraction]] = {
    "length": {
        "m meter metre": 1, "km kilometer kilometre": 1000, "cm centimeter centimetre": "0.01",
        "mm millimeter millimetre": "0.001",
        "µm μm um micrometer micrometre micron": "1e-6", "nm nanometer nanometre": "1e-9",
        "inch inches in.": "0.0254", "ft foot feet": "0.3048", "yd yard": "0.9144", "mi mile": "1609.344",
    },
    "mass": {"g gram gramme": 1, "kg kilogram kilo kilogramme": 1000, "mg milligram": "0.001", "t tonne": 10**6,
             "lb lbs pound": "453.59237", "oz ounce": "28.349523125"},
    "time": {"s sec second": 1, "ms millisecond": "0.001", "min minute": 60, "h hr hour": 3600, "day": 86400,
             "week wk": 604800, "month mo": 2629800,
             "yr year": 31557600},
    "volume": {"l liter litre": 1, "ml milliliter millilitre cc": "0.001", "cl centiliter": "0.01",
               "gallon gal": "3.785411784", "quart qt": "0.946352946", "pint pt": "0.473176473",
               "cup": "0.2365882365", "tablespoon tbsp": "0.01478676478125", "teaspoon tsp": "0.00492892159375"},
    "dollar": {"$ usd us$ dollar buck": 1, "cent ¢": "0.01"},
    "euro": {"€ eur euro": 1},
    "sterling": {"£ gbp quid": 1},
    "yen": {"¥ jpy yen": 1},
    "rupee": {"₹ inr rupee": 1},
    "percent": {"% percent pct": 1},
    "angle": {"° degree deg": 1, "rad radian": "57.29577951308232"},
    "celsius": {"°c celsius centigrade": 1},
    "fahrenheit": {"°f fahrenheit": 1},
    "kelvin": {"kelvin": 1},
    "speed": {"m/s mps": 1, "km/h kph kmh kmph": Fraction(10, 36), "mph": "0.44704"},
    "energy": {"j joule": 1, "kj kilojoule": 1000, "cal calorie": "4.184", "kcal": 4184, "ev": "1.602176634e-19"},
    "force": {"n newton": 1},
    "power": {"w watt": 1, "kw kilowatt": 1000},
    "frequency": {"hz hertz": 1, "khz kilohertz": 1000, "mhz megahertz": 10**6},
    "memory": {"byte": 1, "kb kilobyte": 1000, "mb megabyte": 10**6, "gb gigabyte": 10**9, "bit": Fraction(1, 8)},
    "era": {"ad ce": 1}, "earlier": {"bc bce": 1},
    "voltage": {"v volt": 1}, "current": {"ampere amp": 1}, "resistance": {"ω ohm": 1}, "amount": {"mole mol": 1},
    "pressure": {"pa pascal": 1, "kpa kilopascal": 1000},
}  # fmt: skip
# Name -> dimension, and its factor to the dimension's first unit.
_TABLE = {
    name: (dimension, Fraction(factor))
    for dimension, units in _UNITS.items()
    for names, factor in units.items()
    for name in names.split()
}
# Case-sensitive: the meaning of these letters depends on it.
_CASED = {"M", "K", "G", "T", "MS", "S"}
# Words after a number that are not units, and end one.
STOP_WORDS = frozenset(
    "a an and are as at because but by each every for from had has have he her his i if in is it its left more most "
    "my not of on or our per remaining respectively she since so still than that the their there therefore they this "
    "times to total was we were when where which while who will with you your apiece altogether only too now then can "
    "cannot could may might must should would isn't "
    "after before old long tall high wide away".split()
)


def canonical_unit(text: str) -> tuple[str, Fraction] | None:
    """
    Dimension of a known unit, and its factor to the dimension's first unit: for "square cm",
    `("length^2", Fraction(1, 10000))`.
    """
    text = " ".join(text.split()).strip(" .,;:!?\"'()*")
    if not text or text in _CASED:
        return None
    lower = text.casefold().replace("per cent", "percent").replace("us dollars", "usd")
    lower = re.sub(r"^(?:degrees?|°)\s*(c|f)(?:elsius|ahrenheit)?$", r"°\1", lower)
    lower = re.sub(r"\s*(?:/|\bper\b)\s*", "/", lower)
    if "/" in lower and lower not in _TABLE:
        above, below = lower.split("/", 1)
        a, b = canonical_unit(above), canonical_unit(below)
        if a is None or b is None:
            return None
        return ("speed", a[1] / b[1]) if (a[0], b[0]) == ("length", "time") else (f"{a[0]}/{b[0]}", a[1] / b[1])
    power = 1
    if match := re.match(r"(?:(sq)|cu)(?:uare|bic|\.|(?=ft))? ?(\w+)$", lower):  # square, cubic
        lower, power = match[2], 2 if match[1] else 3
    elif match := re.match(r"(.*?)\s*(?:\^\{?(-?\d)\}?|\b(?:(squared)|cubed))$", lower):
        lower, power = match[1], int(match[2] or (2 if match[3] else 3))
    found = _TABLE.get(lower) or (_TABLE.get(lower[:-1]) if lower.endswith("s") and len(lower) > 2 else None)
    if found is None:
        return None
    return found if power == 1 else (f"{found[0]}^{power}", found[1] ** power)


def singular(word: str) -> str:
    """Singular of a word, accurate enough to compare two."""
    word = word.casefold().strip(".,;:!?\"'()*")
    return word.removesuffix("s") if len(word) > 3 else word
