# SPDX-License-Identifier: Apache-2.0
"""Numbers as people and LaTeX write them: exact values, without evaluating anybody's code."""

import math
import re
from dataclasses import dataclass
from fractions import Fraction


GROUPED = r"\d{1,3}(?:(?:,|\s|')\d{3})+(?!\d)"
MULTIPLIERS = {
    "dozen": 12,
    "hundred": 100,
    "thousand": 10**3,
    "k": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
)
_ONES += "eighteen nineteen"
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
NUMBER_WORDS = {word: i for i, word in enumerate(_ONES.split())}
NUMBER_WORDS |= {word: 10 * i for i, word in enumerate(_TENS.split(), start=2)}
NUMBER_WORDS |= {
    f"{ten}-{one}": NUMBER_WORDS[ten] + NUMBER_WORDS[one] for ten in _TENS.split() for one in _ONES.split()[1:10]
}
# What an exponent may have in exact arithmetic.
_MAX_EXPONENT = 400
_MAX_LENGTH = 200  # characters of an expression

_TOKEN = re.compile(
    rf"\s*(?:(?P<number>{GROUPED}(?:\.\d+)?|\d+\.\d+|\.\d+|\d+)(?P<exponent>[eE][-+]?\d{{1,4}}(?![\w.]))?"
    r"|(?P<word>\\?[A-Za-z]+)|(?P<sign>\*\*|[-+*/^(){}\[\]|]))"
)
_MIXED = re.compile(r"(?P<whole>\d+)\s*(?:(?<=\d)\s+(?P<a>\d+)\s*/\s*(?P<b>\d+)|\\frac\{(?P<c>\d+)\}\{(?P<d>\d+)\})")
_LATEX = [
    (
        re.compile(r"\\(?:left|right|bigl|bigr|big|Big|displaystyle|,|!|;|:|quad|qquad|mathstrut)(?![A-Za-z])|\\ |~"),
        " ",
    ),
    (re.compile(r"\\[dtc]frac"), r"\\frac"),
    (
        re.compile(
            r"\\(?:text|mathrm|textbf|mathbf|textrm|mbox|operatorname|textit|mathit|boldsymbol)\s*\{([^{}]*)\}"
        ),
        r" \1 ",
    ),
    (re.compile(r"\\(?:cdot|times|ast)(?![A-Za-z])|[×·⋅]"), "*"),
    (re.compile(r"\\div(?![A-Za-z])|÷"), "/"),
    (re.compile(r"\\pi(?![A-Za-z])|π"), " pi "),
    (re.compile(r"\\infty(?![A-Za-z])|∞"), " inf "),
    (re.compile(r"\\pm(?![A-Za-z])"), "±"),
    (re.compile(r"√"), r"\\sqrt"),
    (re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree"), "°"),
    (re.compile(r"\\(%|\$|&|#)"), r"\1"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\(?:approx|simeq|sim|equiv)(?![A-Za-z])|[≈≃]"), "="),
]


@dataclass(frozen=True)
class Number:
    """
    A number, exact (`Fraction`) if it is rational. Of one that is written as a decimal, `digits` are its decimals and
    `significant` its significant digits; `None` of a fraction, a root, an expression.
    """

    value: Fraction | float
    digits: int | None = None
    significant: int = 0


def plain_math(text: str) -> str:
    """LaTeX of numbers in the notation of [`read_number`]: one sign for each operation, no layout."""
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    return text.strip()


def read_number(text: str) -> Number | None:
    """
    The number that a whole text (see [`plain_math`]) is: an integer with or without separators, a decimal, a fraction,
    a mixed number, in scientific notation, in words, or an expression of numbers with roots, powers and pi.
    """
    text = text.strip()
    words = text.casefold()
    if words.removeprefix("-") in NUMBER_WORDS:
        count = NUMBER_WORDS[words.removeprefix("-")]
        return Number(Fraction(-count if words.startswith("-") else count), 0)
    if not text or len(text) > _MAX_LENGTH or not re.search(r"\d|pi|inf|\\sqrt", text):
        return None
    try:
        parser = _Parser(text)
        value = parser.expression()
        if parser.peek() is not None:
            return None
    except (ValueError, ZeroDivisionError, OverflowError, RecursionError):
        return None
    if isinstance(value, complex) or value != value:
        return None
    literal = re.fullmatch(rf"[-+]?\s*(?P<whole>{GROUPED}|\d*)(?:\.(?P<decimals>\d+))?", text)
    if literal is None:
        return Number(value)
    decimals = literal["decimals"] or ""
    significant = len((re.sub(r"\D", "", literal["whole"]) + decimals).lstrip("0"))
    return Number(value, len(decimals), significant)


def same_number(right: Number, given: Number) -> bool:
    """
    Whether a number is the right one. Decimals are equal as numbers; an exact one is given by a decimal of at least
    four significant digits that rounds it or cuts it off, and is right where the right one is a decimal of three or
    more that it rounds to.
    """
    a, b = right.value, given.value
    if a == b:
        return True
    try:
        return _nearly_same(right, given)
    except OverflowError:  # beyond what a float holds, where only exact numbers are compared
        return False


def _nearly_same(right: Number, given: Number) -> bool:
    a, b = right.value, given.value
    if math.isinf(a) or math.isinf(b):
        return False
    if math.isclose(a, b, rel_tol=1e-9, abs_tol=0.0) and (isinstance(a, float) or isinstance(b, float)):
        return True
    for exact, decimal, needed in ((right, given, 4), (given, right, 3)):
        if exact.digits is None and decimal.digits and decimal.significant >= needed:
            unit = 10.0**-decimal.digits
            if abs(float(exact.value) - float(decimal.value)) < unit * (1.0 if exact is right else 0.5) * (1 + 1e-9):
                return True
    return False


class _Parser:
    """Recursive descent over sums, products, powers, fractions and roots of numbers; else `ValueError`."""

    def __init__(self, text: str) -> None:
        self._text, self._position = text, 0

    def peek(self) -> str | None:
        match = _TOKEN.match(self._text, self._position)
        if match is None:
            if self._text[self._position :].strip():
                raise ValueError("no number")
            return None
        return match[0].strip()

    def expression(self) -> Fraction | float:
        value = self._product()
        while (sign := self.peek()) in ("+", "-"):
            self._take()
            term = self._product()
            value = value + term if sign == "+" else value - term
        return value

    def _product(self) -> Fraction | float:
        sign = self.peek()
        if sign in ("+", "-"):
            self._take()
            value = self._product()
            return -value if sign == "-" else value
        value = self._power()
        while True:
            sign = self.peek()
            if sign in ("*", "/"):
                self._take()
                factor = self._signed_power()
                value = value * factor if sign == "*" else value / factor
            elif sign == "x" and re.match(r"\s*x\s*10\s*\^", self._text[self._position :]):  # 1.5 x 10^3
                self._take()
                value *= self._power()
            elif sign is not None and (sign[0] in "\\([{" or sign in ("pi", "sqrt", "e")):
                value *= self._power()
            else:
                return value

    def _signed_power(self) -> Fraction | float:
        if self.peek() == "-":
            self._take()
            return -self._power()
        return self._power()

    def _power(self) -> Fraction | float:
        base = self._atom()
        if self.peek() in ("^", "**"):
            self._take()
            exponent = self._argument() if self.peek() == "{" else self._signed_power()
            if isinstance(exponent, Fraction) and exponent.denominator == 1 and abs(exponent) <= _MAX_EXPONENT:
                if isinstance(base, Fraction) and max(abs(base.numerator), base.denominator) < 10**6:
                    return base ** int(exponent)
            power = float(base) ** float(exponent)
            if isinstance(power, complex):
                raise ValueError("not real")
            return power
        return base

    def _atom(self) -> Fraction | float:
        mixed = _MIXED.match(self._text[self._position :].lstrip())
        if mixed is not None:
            self._position += (
                len(self._text[self._position :]) - len(self._text[self._position :].lstrip()) + mixed.end()
            )
            a, b = (mixed["a"], mixed["b"]) if mixed["a"] else (mixed["c"], mixed["d"])
            return int(mixed["whole"]) + Fraction(int(a), int(b))
        match = self._take()
        if match["number"]:
            value = Fraction(re.sub(r"[,\s']", "", match["number"]))
            if match["exponent"]:
                exponent = int(match["exponent"][1:])
                if abs(exponent) > _MAX_EXPONENT:
                    raise ValueError("too large")
                value *= Fraction(10) ** exponent
            return value
        word = match["word"]
        if word == "pi":
            return math.pi
        if word == "e":
            return math.e
        if word == "inf":
            return math.inf
        if word == "\\frac":
            return self._argument() / self._argument()
        if word in ("\\sqrt", "sqrt"):
            root: Fraction | float = Fraction(2)
            if self.peek() == "[":
                root = self._group("]")
            return _root(self._argument(), root)
        if match["sign"] in ("(", "{", "["):
            self._position -= 1
            return self._group({"(": ")", "{": "}", "[": "]"}[match["sign"]])
        raise ValueError("no number")

    def _argument(self) -> Fraction | float:
        """What follows `\\frac` or `\\sqrt`: a group, or one digit."""
        if self.peek() in ("{", "("):
            return self._group("}" if self.peek() == "{" else ")")
        digit = re.match(r"\s*(\d)", self._text[self._position :])
        if digit is None:
            return self._atom()
        self._position += digit.end()
        return Fraction(int(digit[1]))

    def _group(self, close: str) -> Fraction | float:
        self._take()
        value = self.expression()
        if self.peek() != close:
            raise ValueError("not closed")
        self._take()
        return value

    def _take(self) -> re.Match[str]:
        match = _TOKEN.match(self._text, self._position)
        if match is None:
            raise ValueError("no number")
        self._position = match.end()
        return match


def _root(value: Fraction | float, degree: Fraction | float) -> Fraction | float:
    if value < 0 or degree <= 0:
        raise ValueError("not real")
    if isinstance(value, Fraction) and degree == 2:
        a, b = math.isqrt(value.numerator), math.isqrt(value.denominator)
        if a * a == value.numerator and b * b == value.denominator:
            return Fraction(a, b)
    return float(value) ** (1 / float(degree))
