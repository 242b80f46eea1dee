# SPDX-License-Identifier: Apache-2.0
"""Numbers as people and LaTeX write them: exact values, without evaluating anybody's code."""

import math
import re
from dataclasses import dataclass
from fractions import Fraction


GROUPED = r"\d{1,3}(?:(?:,|\s|')\d{3})+(?!\d)"
MULTIPLIERS = {"dozen": 12, "hundred": 100, "thousand": 10**3, "k": 10**3}
MULTIPLIERS |= {"million": 10**6, "billion": 10**9, "trillion": 10**12}
_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
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
_CLOSING = {"(": ")", "{": "}", "[": "]"}
_MIXED = re.compile(
    r"\s*(?P<whole>\d+)\s*(?:(?<=\d)\s+(?P<a>\d+)\s*/\s*(?P<b>\d+)|\\frac\{(?P<c>\d+)\}\{(?P<d>\d+)\})"
)
_LATEX = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:left|right|[bB]ig[lr]?|displaystyle|[,!;:]|q?quad|mathstrut)(?![A-Za-z])|\\ |~", " "),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\(?:text(?:bf|rm|it)?|math(?:rm|bf|it)|mbox|operatorname|boldsymbol)\s*\{([^{}]*)\}", r" \1 "),
        (r"\\(?:cdot|times|ast)(?![A-Za-z])|[×·⋅]", "*"),
        (r"\\div(?![A-Za-z])|÷", "/"),
        (r"\\pi(?![A-Za-z])|π", " pi "),
        (r"\\infty(?![A-Za-z])|∞", " inf "),
        (r"\\pm(?![A-Za-z])", "±"),
        (r"√", r"\\sqrt"),
        (r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree", "°"),
        (r"\\(%|\$|&|#)", r"\1"),
        (r"\{,\}", ","),
        (r"\\(?:approx|simeq|sim|equiv)(?![A-Za-z])|[≈≃]", "="),
    )
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
    try:
        return right.value == given.value or _nearly_same(right, given)
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
        if not self._text[self._position :].strip():
            return None
        return self._token()[0].strip()

    def _token(self) -> re.Match[str]:
        if (match := _TOKEN.match(self._text, self._position)) is None:
            raise ValueError("no number")
        return match

    def _take(self) -> re.Match[str]:
        match = self._token()
        self._position = match.end()
        return match

    def _took(self, *signs: str) -> str | None:
        """The next sign, if it is one of these, which is then behind."""
        sign = self.peek()
        if sign not in signs:
            return None
        self._take()
        return sign

    def expression(self) -> Fraction | float:
        value = self._product()
        while sign := self._took("+", "-"):
            term = self._product()
            value = value + term if sign == "+" else value - term
        return value

    def _product(self) -> Fraction | float:
        if sign := self._took("+", "-"):
            return -self._product() if sign == "-" else self._product()
        value = self._power()
        while True:
            if sign := self._took("*", "/"):
                factor = self._signed_power()
                value = value * factor if sign == "*" else value / factor
                continue
            sign = self.peek()
            if sign == "x" and re.match(r"\s*x\s*10\s*\^", self._text[self._position :]):  # 1.5 x 10^3
                self._take()
            elif sign is None or not (sign[0] in "\\([{" or sign in ("pi", "sqrt", "e")):
                return value
            value *= self._power()

    def _signed_power(self) -> Fraction | float:
        return -self._power() if self._took("-") else self._power()

    def _power(self) -> Fraction | float:
        base = self._atom()
        if not self._took("^", "**"):
            return base
        exponent = self._argument() if self.peek() == "{" else self._signed_power()
        if isinstance(exponent, Fraction) and exponent.denominator == 1 and abs(exponent) <= _MAX_EXPONENT:
            if isinstance(base, Fraction) and max(abs(base.numerator), base.denominator) < 10**6:
                return base ** int(exponent)
        power = float(base) ** float(exponent)
        if isinstance(power, complex):
            raise ValueError("not real")
        return power

    def _atom(self) -> Fraction | float:
        if mixed := _MIXED.match(self._text, self._position):
            self._position = mixed.end()
            return int(mixed["whole"]) + Fraction(int(mixed["a"] or mixed["c"]), int(mixed["b"] or mixed["d"]))
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
        if word in ("pi", "e", "inf"):
            return getattr(math, word)
        if word == "\\frac":
            return self._argument() / self._argument()
        if word in ("\\sqrt", "sqrt"):
            root = self._group() if self.peek() == "[" else Fraction(2)
            return _root(self._argument(), root)
        if match["sign"] in _CLOSING:
            self._position -= 1
            return self._group()
        raise ValueError("no number")

    def _argument(self) -> Fraction | float:
        """What follows `\\frac` or `\\sqrt`: a group, or one digit."""
        if self.peek() in ("{", "("):
            return self._group()
        digit = re.match(r"\s*(\d)", self._text[self._position :])
        if digit is None:
            return self._atom()
        self._position += digit.end()
        return Fraction(int(digit[1]))

    def _group(self) -> Fraction | float:
        opening = self._take()["sign"]
        value = self.expression()
        if not self._took(_CLOSING[opening]):
            raise ValueError("not closed")
        return value


def _root(value: Fraction | float, degree: Fraction | float) -> Fraction | float:
    if value < 0 or degree <= 0:
        raise ValueError("not real")
    if isinstance(value, Fraction) and degree == 2:
        a, b = math.isqrt(value.numerator), math.isqrt(value.denominator)
        if a * a == value.numerator and b * b == value.denominator:
            return Fraction(a, b)
    return float(value) ** (1 / float(degree))
