# SPDX-License-Identifier: Apache-2.0
"""Numbers as people and LaTeX write them: exact values, without evaluating anybody's code."""

import ast
import math
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any


# Of 1.234 nobody knows what it is, of 1.234.567 everybody.
GROUPED = r"(?:\d{1,3}(?:(?:,|\s|'|_)\d{3})+|\d{1,3}(?:\.\d{3}){2,})(?!\d)"
_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
MULTIPLIERS = {"dozen": 12, "hundred": 100, "thousand": 10**3, "k": 10**3, "M": 10**6}
MULTIPLIERS |= {"million": 10**6, "billion": 10**9, "bn": 10**9, "trillion": 10**12}
_COUNTS = {word: i for i, word in enumerate(_ONES.split())}
_COUNTS |= {word: 10 * i for i, word in enumerate(_TENS.split(), start=2)}
_PARTS = {"half": 2, "halves": 2, "quarter": 4} | {
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
# What an exponent may have in exact arithmetic.
_MAX_EXPONENT = 400
_MAX_LENGTH = 200  # characters of an expression

_MIXED = re.compile(r"(\d+)(?:\s+(?:and\s+)?(\d+)\s*/\s*(\d+)|\s*\\frac\{(\d+)\}\{(\d+)\})")
# Innermost groups of LaTeX first, as Python writes them.
_GROUPS = (
    (r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"((\1)/(\2))"),
    (r"\\sqrt\s*(?:\[([^][{}]*)\])?\s*\{([^{}]*)\}", r"root(\2,\1)"),
    (r"\\?sqrt\s*\(", "root("),
    (r"(?<!frac)(?<!\})\\?\{([^{}]*)\\?\}", r"(\1)"),
)
_ONE_DIGIT = re.compile(r"(\\frac(?:\{[^{}]*\})?|\\sqrt(?:\[[^][{}]*\])?)\s*(\d)")
_TIMES = re.compile(r"(?<=[\d)ie])\s*(?=\()|(?<=[\d)i])\s*(?=pi|root\(|e(?![\w+-]))")
_LITERAL = re.compile(rf"(?<![\w.])({GROUPED}(?:\.\d+)?|\d+\.\d+|\.\d+|\d+)(?:[eE]([-+]?\d{{1,4}})(?![\w.]))?")
_ARITHMETIC = re.compile(r"(?:[\d+\-*/(), ]|pi|inf|e|root)*")
_LATEX = (
    (r"\\(?:left|right|[bB]ig[lr]?|displaystyle|q?quad|mathstrut)(?![A-Za-z])|\\[,!;: ]|~", " "),
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
    (r"\\(?:implies|[rR]ightarrow|to|longrightarrow|approx|simeq|sim|equiv)(?![A-Za-z])|[≈≃]", "="),
)


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
    return _rewritten(text, _LATEX).strip()


def read_number(text: str) -> Number | None:
    """
    The number that a whole text (see [`plain_math`]) is: an integer with or without separators, a decimal, a fraction,
    a mixed number, in scientific notation, in words, or an expression of numbers with roots, powers and pi.
    """
    text = text.strip()
    if text.casefold() == "half" or NUMBER_WORDS.fullmatch(text.removeprefix("-")):
        number = _of_words(text.removeprefix("-"))
        return Number(-number.value, number.digits) if number and text.startswith("-") else number
    if not text or len(text) > _MAX_LENGTH or not re.search(r"\d|pi|inf|\\sqrt", text):
        return None
    try:
        value = _evaluated(ast.parse(_as_python(text), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError, RecursionError, MemoryError):
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
    if (scale := re.fullmatch(r"half\s+an?\s+(\w+)", text, re.IGNORECASE)) is not None:
        return Number(Fraction(MULTIPLIERS[scale[1].casefold()], 2), 0)
    parts = re.fullmatch(rf"(?:(?P<whole>.+)\s+and\s+)?(?:(?P<count>.+)[\s-]+)?(?P<part>{_PART})", text.casefold())
    if parts is None:
        count = _count(text)
        return None if count is None else Number(count, 0)
    whole, count = _count(parts["whole"] or "zero"), _count(parts["count"] or "one")
    if whole is None or count is None:
        return None
    return Number(whole + Fraction(count, _PARTS.get(parts["part"]) or _PARTS[parts["part"][:-1]]))


def _count(text: str) -> Fraction | None:
    total, count, room = 0, 0, 10**3
    words = re.findall(r"[a-z]+", text.casefold())
    if words in (["a"], ["an"]):
        return Fraction(1)
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
    Whether a number is the right one. Decimals are equal as numbers; an exact one is given by a decimal of at least
    four significant digits that rounds it or cuts it off, and is right where the right one is a decimal of three or
    more that it rounds to.
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
    except OverflowError:  # beyond what a float holds, where only exact numbers are compared
        pass
    return False


def _rewritten(text: str, rules: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


def _as_python(text: str) -> str:
    """An expression in Python's notation, of integers only: `2.5` is `(25/10)`."""
    text = _MIXED.sub(lambda m: f"({m[1]}+{m[2] or m[4]}/{m[3] or m[5]})", text)
    while (braced := _ONE_DIGIT.sub(r"\1{\2}", text)) != text:
        text = braced
    while (rewritten := _rewritten(text, _GROUPS)) != text:
        text = rewritten
    text = re.sub(r"(?<=[\d)])\s*x\s*(?=10\s*(?:\^|\*\*))", "*", text).replace("[", "(").replace("]", ")")
    text = _LITERAL.sub(_integers, _TIMES.sub("*", " ".join(text.split())).replace("^", "**"))
    if not _ARITHMETIC.fullmatch(text):
        raise ValueError("no number")
    return text


def _integers(literal: re.Match[str]) -> str:
    plain = re.sub(r"[,\s'_]", "", literal[1])
    whole, _, decimals = (plain.replace(".", "") if plain.count(".") > 1 else plain).partition(".")
    number = str(int(whole + decimals))
    if decimals:
        number += f"/10**{len(decimals)}"
    if literal[2]:
        if abs(int(literal[2])) > _MAX_EXPONENT:
            raise ValueError("too large")
        number += f"*10**{int(literal[2])}"
    return f"({number})" if decimals or literal[2] else number


def _evaluated(node: ast.expr) -> Fraction | float:
    """Value of sums, products, powers and roots of integers; else `ValueError`."""
    match node:
        case ast.Constant(value=int(value)):
            return Fraction(value)
        case ast.Name(id="pi" | "e" | "inf" as name):
            return getattr(math, name)
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=operand):
            return -_evaluated(operand) if isinstance(sign, ast.USub) else _evaluated(operand)
        case ast.BinOp(left=left, op=operation, right=right) if type(operation) in _OPERATIONS:
            return _OPERATIONS[type(operation)](_evaluated(left), _evaluated(right))
        case ast.Call(func=ast.Name(id="root"), args=[value, *degree]):
            return _root(_evaluated(value), _evaluated(degree[0]) if degree else Fraction(2))
    raise ValueError("no number")


def _power(base: Fraction | float, exponent: Fraction | float) -> Fraction | float:
    if isinstance(exponent, Fraction) and exponent.denominator == 1 and abs(exponent) <= _MAX_EXPONENT:
        if isinstance(base, Fraction) and max(abs(base.numerator), base.denominator) < 10**6:
            return base ** int(exponent)
    power = float(base) ** float(exponent)
    if isinstance(power, complex):
        raise ValueError("not real")
    return power


def _root(value: Fraction | float, degree: Fraction | float) -> Fraction | float:
    if value < 0 or degree <= 0:
        raise ValueError("not real")
    if isinstance(value, Fraction) and degree == 2:
        a, b = math.isqrt(value.numerator), math.isqrt(value.denominator)
        if a * a == value.numerator and b * b == value.denominator:
            return Fraction(a, b)
    return float(value) ** (1 / float(degree))


_OPERATIONS: dict[type[ast.operator], Callable[[Any, Any], Fraction | float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv, ast.Pow: _power,
}  # fmt: skip
