# SPDX-License-Identifier: Apache-2.0
"""Whether a completion gives the right answer: what is expected decides how the completion is read."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from .extraction import marked, said, visible
from .numbers import NUMBER_WORDS, plain_math
from .statements import after_corrections, is_aside, is_denied, is_doubted, is_open, offers_several, sentences
from .symbolic import same_expression
from .text import fold, same_words, tidy, without_markdown
from .units import canonical_unit
from .values import Collection, Quantity, Symbols, Value, is_numeric, quantities, read_value, same_value


_YES_NO = {"yes": True, "no": False, "true": True, "false": False, "yeah": True, "yep": True, "nope": False}
_YES_NO_WORD = re.compile(rf"\b(?:{'|'.join(_YES_NO)})\b", re.IGNORECASE)
_CHOICE = re.compile(r"^\W*(?P<letter>[A-Ja-j])\W*$")
_OPTION = re.compile(r"^\W{0,3}(?P<letter>[A-J])[).:]\s")
_LETTER = re.compile(
    r"(?<![\w'\\$-])\(?(?P<letter>[A-J])\b\)?(?!['\w-])(?!(?<=[AI])\s+(?!or\b|and\b|is\b|because\b|since\b|as\b)[a-z])"
)
_ENDORSED = re.compile(
    r"\b(?i:left with|leaves|leaving|so|therefore|thus|hence|choose|pick|select|go with|it is|it's|must be"
    r"|is)\s*,?\s*(?i:only |option |choice |answer )?\(?(?P<a>[A-J])\b\)?(?!\s+[a-z]+\b(?<!because)(?<!since)(?<!as))"
    r"|\b(?P<b>[A-J])\)?\s+(?:is|must be|would be)\s+(?:the\s+)?(?:only\s+)?(?:correct|right|best|true|answer)\b"
)
LONGEST_LINE = 1000  # characters
# Longer texts are no bare answers.
_BARE = 80
_MATH = re.compile(
    r"\$\$(?P<a>.+?)\$\$|\\\[(?P<b>.+?)\\\]|\\\((?P<c>.+?)\\\)|(?<![\\\w])\$(?P<d>[^$\n]+?)(?<!\\)\$(?!\d)", re.DOTALL
)
_FILLER = re.compile(
    r"^(?:[\s\"'*_:=]+|(?:approximately|about|around|roughly|nearly|exactly|precisely|simply|just|only|therefore|thus"
    r"|then|now|equal to|given by|indeed|also|definitely|certainly|clearly|the (?:number|value|integer|fraction"
    r"|decimal|expression|interval|set|point|pair)|option|choice|letter|answer|a total of|at(?! (?:most|least)))\b"
    r"|(?:\\approx|\\sim|≈|~)\s*)+",
    re.IGNORECASE,
)
_COPULA = re.compile(
    r"\b(?:is|are|was|were|be|equals?|equal to|has|have|had|makes?|gets?|left with|total(?:s|ing)?(?: of)?|comes? to"
    r"|gives?|yields?|costs?|earns?|needs?|takes?|spends?|saves?|sold|bought|pays?|paid|made|becomes?|leaves|remains?"
    r"|means?|get|find|obtain|there (?:are|is))\b|[:=≈]",
    re.IGNORECASE,
)
_CONNECTED = re.compile(
    r"\s*(?:,\s*(?:and|or)?|;|/|\bor\b|\band\b|\bto\b|-|–|\bthrough\b|\bversus\b|\bvs\b)\s*(?:or |and |possibly "
    r"|maybe |perhaps |even |the |also |(?:it|they|that) (?:could|might|may|can) (?:also )?be |[a-z] = )*",
    re.IGNORECASE,
)
_DATE = re.compile(
    r"\b(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\.?\s+"
    r"\d{1,2}(?:st|nd|rd|th)?,?\s+(?=\d{4}\b)|\b\d{1,2}(?:st|nd|rd|th)?\s+(?:of\s+)?(?=(?:january|february|march|april|may|june|july|august|september|october"
    r"|november|december)\b)",
    re.IGNORECASE,
)
# New York is not York.
_MODIFIERS = (
    "new north south east west northern southern eastern western papua equatorial upper lower inner outer anti non "
    "northeast northwest southeast southwest"
).split()


def final_answer(value: Any) -> str:
    r"""
    The answer itself out of what a data set has for it.

    Example:
    ```python
    >>> from endotrl.grading import final_answer

    >>> [final_answer(x) for x in (27.0, "6 * 3 = 18\n#### 18", r"so \boxed{\frac{1}{2}}", ["2"])]
    ['27', '18', '\\frac{1}{2}', '2']
    ```
    """
    if isinstance(value, list | tuple):
        return ", ".join(final_answer(part) for part in value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value)
    if "####" in text:
        return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text.rpartition("####")[2].strip())
    claim = marked(text) if "boxed" in text else None
    if claim is not None and claim.text:
        return claim.text
    text = text.strip()
    if len(text) > _BARE and (statements := said(text)):
        return _written_first(statements[0])  # of a worked solution
    return text.strip("$").strip() if len(text) > 2 and text[0] == text[-1] == "$" else text


def is_right(completion: str, answers: Sequence[Any], math: bool = False) -> bool:
    r"""
    Whether a completion gives an accepted answer as its final one.

    The final answer is what stands in `\boxed{}` or `<answer>`, behind `####`, behind "the answer is" or "Answer:", or
    else the last number, or what the text states. Reasoning before `</think>` is not read. What is denied ("not
    Paris"), taken back ("Paris. No, wait: Rome") or left open ("Paris or Rome") is no answer.

    How it is compared depends on the accepted answer: numbers by value (1,000 is 1e3; 1/2 is 0.5; 50% is 0.5; units
    are converted, and may be left out), tuples, intervals, sets and lists by their members, choices by their letter,
    yes and no by meaning, all else by its words, in any case and without accents.

    Args:
        completion (`str`):
            What the model wrote.
        answers (`list[str]`):
            Accepted answers, as [`final_answer`] reads them: numbers, too.
        math (`bool`, *optional*, defaults to `False`):
            Whether expressions that are no numbers are compared by math-verify, which knows that $(x+1)^2$ is
            $x^2+2x+1$. Otherwise they must be written alike.

    Example:
    ```python
    >>> from endotrl.grading import is_right

    >>> is_right("It is Paris, not Rome.", ["Paris"]), is_right("It is not Paris.", ["Paris"])
    (True, False)
    >>> is_right(r"So we get $x = \frac{1}{2}$.", ["0.5"]), is_right("The answer is 40, 41 or 42.", ["42"])
    (True, False)
    ```
    """
    text = visible(completion)
    if not text:
        return False
    accepted = [tidy(final_answer(answer)) for answer in answers]
    return any(_gives(text, answer, accepted, math) for answer in accepted)


def same_answer(texts: Sequence[str], math: bool = False) -> list[int]:
    """
    Groups texts by their final answer, for a majority vote: the index of the first text with an equal one. A text
    without an answer is alone.
    """
    claims = [_final(visible(text)) for text in texts]
    groups: list[int] = []
    for i, claim in enumerate(claims):
        others = dict.fromkeys(groups) if claim else ()
        groups.append(next((j for j in others if claims[j] and _equal(claims[j], claim, math)), i))
    return groups


def _final(text: str) -> str:
    """The final answer of a text for which nothing is expected, as text."""
    claim = marked(text)
    if claim is not None:
        return claim.text
    for rest in said(text):
        value = _first_value(rest)
        if value is not None:
            return _first_line(rest) if isinstance(value, Symbols) else _written(value)
    value, _ = _stated_value(text)
    return "" if value is None else _written(value)


def _written(value: Value) -> str:
    if isinstance(value, Quantity):
        return f"{value.number.value} {value.unit}".strip()
    if isinstance(value, Symbols):
        return value.text
    return value.brackets[:1] + ", ".join(map(_written, value.items)) + value.brackets[1:]


def _gives(text: str, right: str, answers: Sequence[str], math: bool) -> bool:
    """Whether a text gives the answer `right`, one of the accepted `answers`."""
    claim = marked(text)
    boxed = claim is not None and claim.boxed
    if claim is not None:
        text = claim.text
    if not text or not right.strip():
        return False
    if boxed and (text == right or _equal(right, text, math)):
        return True
    text = _plain_text(text) if boxed else text
    if not boxed and same_words(right, without_markdown(text)):
        return True
    word = right.strip(" .").casefold()
    if word in ("yes", "no", "true", "false"):
        return _yes_or_no(text, word in ("true", "false")) is _YES_NO[word]
    choice, value = _CHOICE.match(right), read_value(right)
    mathematical = _is_mathematical(right, value)
    if boxed:  # A phrase in a box states words, and no more.
        return not choice and not mathematical and _states(text, right, answers)
    if choice is not None and _chosen(text) == choice["letter"].upper():
        return True
    if mathematical:
        # "O" is a variable, or oxygen.
        symbol = choice is None and re.fullmatch(r"[A-Z]", right.strip()) is not None
        return _gives_value(text, right, value, math) or (symbol and _states(text, right, answers))
    return choice is None and _states(text, right, answers)


def _is_mathematical(right: str, value: Value | None) -> bool:
    # "12 Angry Men" and "50 Cent" are names.
    if isinstance(value, Quantity):
        return not re.search(r"\s[A-Z][a-z]+", right)
    return value is not None


def _equal(right: str, given: str, math: bool) -> bool:
    """Whether two answers are the same, each alone."""
    if same_words(right, given):
        return True
    plain = _plain_text(given)
    choice = _CHOICE.match(right)
    other = _CHOICE.match(plain) or re.match(r"^\W*(?P<letter>[A-J])[).:]\s(?!or\b|and\b)", plain)
    if choice is not None and other is not None:
        return choice["letter"].upper() == other["letter"].upper()
    a, b = read_value(right), read_value(given)
    if same_value(a, b):
        return True
    if (
        math
        and not (is_numeric(a) and is_numeric(b))
        and (a is not None or "\\" in right)
        and not re.search(r"\s(?:or|and)\s", given)
    ):
        return same_expression(right, given)
    return same_words(_plain_text(right), plain)


def _plain_text(text: str) -> str:
    r"""Text of `\text{}` and the like."""
    return without_markdown(re.sub(r"\\(?:text|textbf|mathrm|mathbf|textit|mbox)\s*\{([^{}]*)\}", r"\1", text)).strip(
        " $"
    )


# ------------------------------------------------------------------------------------------------------------------
# Mathematics
# ------------------------------------------------------------------------------------------------------------------


def _gives_value(text: str, right: str, value: Value | None, math: bool) -> bool:
    def fits(found: Value | None, written: str) -> bool:
        if same_value(value, found):
            return True
        numeric = is_numeric(value) and is_numeric(found)
        several = isinstance(found, Collection) and not found.brackets and not isinstance(value, Collection)
        return math and not numeric and not several and bool(written) and same_expression(right, written)

    text = after_corrections(text, lambda rest: bool(_affirmed(rest)) or _MATH.search(rest) is not None)
    for rest in said(text):
        found = _first_value(rest)
        if found is not None:
            return fits(found, _written_first(rest))
    if isinstance(value, Symbols | Collection) or len(text) <= _BARE:
        whole = without_markdown(text).strip()
        found = read_value(whole)
        if found is not None:
            if fits(found, whole):
                return True
            if not isinstance(found, Symbols):
                return False
    found, written = _stated_value(text, symbolic=not isinstance(value, Quantity))
    return found is not None and fits(found, written)


def _inside(match: re.Match[str]) -> str:
    return next(group for group in match.groups() if group is not None).strip()


def _first_line(rest: str) -> str:
    """The first sentence, or the block behind a line break, formulas with several lines included."""
    rest = rest.lstrip(" \t:\n")[:LONGEST_LINE]
    math = _MATH.match(rest)
    if math is not None:
        formula, behind = rest[: math.end()], rest[math.end() :]
        return formula if behind[:1] in "\n" else formula + (sentences(behind) or [""])[0]
    line = rest.split("\n", 1)[0]
    parts = sentences(line)
    return parts[0] if parts else line


def _written_first(rest: str) -> str:
    line = _FILLER.sub("", _first_line(rest))
    math = _MATH.match(line)
    return _inside(math) if math is not None else line.rstrip(" .")


def _affirmed(text: str) -> list[tuple[int, int, Quantity]]:
    """The quantities that a text does not deny."""
    text = _mask_dates(text)
    return [found for found in quantities(text) if not is_denied(text, found[0], found[1])]


def _mask_dates(text: str) -> str:
    return _DATE.sub(lambda m: " " * len(m[0]), text)


def _first_value(rest: str) -> Value | None:
    """
    The value that a statement begins with, a list if others follow it; or the one in it, if nothing else is said.
    """
    first = _first_line(rest)
    line = _mask_dates(first)
    stripped = _FILLER.sub("", line)
    whole = read_value(stripped.rstrip(" .!*"))
    if whole is not None and not (isinstance(whole, Quantity) and is_denied(line, 0, 0)):
        return whole
    math = _MATH.match(stripped)
    if math is not None:
        value = read_value(_inside(math))
        unit = re.match(r"\s*(?:\\?%|[A-Za-z°]+(?:\^?\d)?)", stripped[math.end() :])
        if isinstance(value, Quantity) and not value.unit and unit:
            value = read_value(f"{_inside(math)} {unit[0].strip()}") or value
            if isinstance(value, Quantity) and canonical_unit(value.unit) is None:
                value = Quantity(value.number)
        others = _CONNECTED.match(stripped, math.end())
        if value is not None and others and (another := _MATH.match(stripped, others.end())):
            second = read_value(_inside(another))
            return None if second is None else Collection((value, second))
        if value is not None and not is_denied(stripped, 0, math.end()):
            return value
    begins = re.match(r"[-+$€£¥₹.\d]", stripped) or re.match(
        rf"(?:{'|'.join(NUMBER_WORDS)})\b", stripped, re.IGNORECASE
    )
    if begins or "=" in stripped or len(rest.strip()) <= len(first.strip()) + 1:
        return _chosen_quantity(stripped, first=bool(begins))
    return None


def _chosen_quantity(line: str, first: bool) -> Value | None:
    """The quantity that a sentence states: behind its last equation or its verb, or the first or last one."""
    line = plain_math(_mask_dates(line))
    formulas = list(_MATH.finditer(line))
    if formulas and not first:
        value = read_value(_inside(formulas[-1]))
        if value is not None and not is_denied(line, formulas[-1].start(), formulas[-1].end()):
            return value
    found = _affirmed(line)
    if not found:
        return None
    equation = line.rfind("=")
    if first and re.search(r"[A-Za-z]{2,}", line[found[0][1] : max(0, equation)]):
        equation = -1  # of what follows the statement
    verbs = [m.end() for m in _COPULA.finditer(line)]
    behind_equation = [i for i, (start, _, _) in enumerate(found) if start > equation >= 0]
    behind_verb = [i for i, (start, _, _) in enumerate(found) if verbs and start >= verbs[-1]]
    low = high = (behind_equation or ([0] if first else behind_verb) or [len(found) - 1])[0]
    while high + 1 < len(found) and _connected(line, found[high], found[high + 1]):
        high += 1
    while low > 0 and _connected(line, found[low - 1], found[low]):
        low -= 1
    distinct: list[Quantity] = []
    for _, _, value in found[low : high + 1]:
        if not any(same_value(value, other) for other in distinct):
            distinct.append(value)
    return distinct[0] if len(distinct) == 1 else Collection(tuple(distinct))


def _connected(line: str, one: tuple[int, int, Quantity], other: tuple[int, int, Quantity]) -> bool:
    between = line[one[1] : other[0]]
    words = between.lstrip().removeprefix(one[2].unit)
    return _CONNECTED.fullmatch(words.rstrip("$ (") + " " * between.endswith(" ")) is not None


def _stated_value(text: str, symbolic: bool = True) -> tuple[Value | None, str]:
    """The value of the last sentence that states one, and how it is written there."""
    for sentence in reversed(sentences(without_markdown(text))):
        formulas = [_inside(formula) for formula in _MATH.finditer(sentence)]
        if symbolic and not formulas and (verbs := list(_COPULA.finditer(sentence))):
            written = sentence[verbs[-1].end() :].strip(" .")
            value = read_value(written)
            if isinstance(value, Symbols | Collection) and not is_denied(sentence, verbs[-1].end(), len(sentence)):
                return value, written
        value = _chosen_quantity(sentence, first=False)
        if value is not None:
            return value, formulas[-1] if formulas else ""
        if symbolic:
            for written in reversed(formulas):
                value = read_value(written)
                if value is not None:
                    return value, written
    return None, ""


# ------------------------------------------------------------------------------------------------------------------
# Choices, yes and no
# ------------------------------------------------------------------------------------------------------------------


def _chosen(text: str) -> str | None:
    """The letter that a text chooses."""
    text = without_markdown(text)
    text = after_corrections(text, lambda rest: _LETTER.search(rest) is not None)
    bare = _CHOICE.match(_plain_text(text))
    if bare is not None:
        return bare["letter"].upper()
    for rest in said(text):
        line = _first_line(rest)
        letters = _letters(line)
        if letters:
            # Of "(A) Paris, not B or Rome", the first.
            return letters[0] if len(set(letters)) == 1 or _option_text(_FILLER.sub("", line)) else None
        if lower := _CHOICE.match(line):
            return lower["letter"].upper()
    parts = sentences(text)
    listed = [option for part in parts if (option := _OPTION.match(part))]
    options = [option["letter"] for option in listed if not re.match(r"or\b|and\b", option.string[option.end() :])]
    if len(set(options)) > 1:
        parts = [part for part in parts if not _OPTION.match(part)]
    elif options and _OPTION.match(parts[0]):
        return options[0]
    for part in reversed(parts):
        endorsed = {m["a"] or m["b"] for m in _ENDORSED.finditer(part) if not is_denied(part, m.start(), m.end())}
        if len(endorsed) == 1:
            return endorsed.pop()
    letters = next(filter(None, map(_letters, reversed(parts))), [])
    return letters[0] if len(set(letters)) == 1 else None


def _option_text(line: str) -> bool:
    several = re.match(r"^\(?[A-J]\)?[).:]?\s*(?:,|or|and|/)\s*(?:or |and )?\(?[A-J]\b", line)
    return not several and re.match(r"^\(?([A-J])[).:]\s+\w", line) is not None


def _letters(line: str) -> list[str]:
    return [m["letter"] for m in _LETTER.finditer(line) if not is_denied(line, m.start(), m.end())]


def _yes_or_no(text: str, of_truth: bool) -> bool | None:
    """What a text says to a question for yes or no, or (`of_truth`) for true or false."""
    text = without_markdown(text)
    for part in (*said(text), text, *reversed(sentences(text))):
        line = _first_line(part)
        words = list(_YES_NO_WORD.finditer(line))
        if not words:
            continue
        start, word = words[0].start(), words[0][0].casefold()
        if re.match(r"\W*(?:and|or|/)\W*(?:yes|no|true|false)\b", line[words[0].end() :], re.IGNORECASE):
            return None
        if of_truth and word not in ("true", "false"):
            continue
        begins = part is not text or not line[:start].strip(" \"'*(")
        if begins or (len({_YES_NO[m[0].casefold()] for m in words}) == 1 and len(line) <= _BARE):
            return _YES_NO[word] != (is_denied(line, start, start) and not (begins and word == "no"))
    return None


# ------------------------------------------------------------------------------------------------------------------
# Words
# ------------------------------------------------------------------------------------------------------------------


def _states(text: str, right: str, answers: Sequence[str]) -> bool:
    """Whether a text states an answer of words."""
    pattern = _pattern(right)
    accepted = [_pattern(answer) for answer in answers]
    text = fold(without_markdown(_plain_text(text)))

    def is_accepted(words: str) -> bool:
        return any(
            (match := p.search(words)) is not None and not words[: match.start()].strip(" the(\"'*") for p in accepted
        )

    def mentions(words: str) -> bool:
        return any(p.search(words) for p in accepted)

    text = after_corrections(text, lambda rest: bool(re.search(r"[A-Z0-9]\w|\bis\b", rest)) or mentions(rest))
    if any(is_doubted(text, match.end()) for match in pattern.finditer(text)):
        return False
    statements = said(text)
    if statements:
        claims = [claim for claim in map(_first_line, statements) if claim]
        if not claims:
            return False
        verdict = _verdict(claims[0], pattern, is_accepted)
        # "The answer is simple." leaves it to the rest.
        if verdict is not None or _is_name(claims[0]):
            return bool(verdict)
    parts = sentences(text)
    if _enumerates(text, mentions) or offers_several(parts, mentions):
        return False
    verdicts = [_verdict(part, pattern, is_accepted) for part in parts]
    last = next((verdict for verdict in reversed(verdicts) if verdict is not None), None)
    return bool(last) and not _contradicted(parts, mentions)


def _is_name(claim: str) -> bool:
    return re.search(r"[A-Z0-9]", claim) is not None or len(claim.split()) <= 3


def _verdict(sentence: str, pattern: re.Pattern[str], is_accepted: Callable[[str], bool]) -> bool | None:
    """Whether a sentence affirms what it mentions; `None` if it does not mention it."""
    verdict = None
    for match in pattern.finditer(sentence):
        before = re.search(r"(\w+)[\s-]$", sentence[: match.start()])
        if before is not None and before[1][0].isupper() and before[1].casefold() in _MODIFIERS:
            continue
        if is_aside(sentence, match.start()):
            continue
        if is_open(sentence, match.start(), match.end(), is_accepted):
            return False
        denied = is_denied(sentence, match.start(), match.end())
        verdict = (not denied) if verdict is None else verdict and not denied
    return verdict


def _pattern(answer: str) -> re.Pattern[str]:
    answer = re.sub(r"^(?:the|an?)\s+(?=\w)", "", fold(tidy(answer)).strip().rstrip(".").strip(), flags=re.IGNORECASE)
    words = re.findall(r"\w+", answer)
    if not words or re.search(r"[^\w\s.,'()/:!?&-]", answer):
        return re.compile(rf"(?<!\w){re.escape(answer)}(?!\w)", re.IGNORECASE)
    if len(words) == 1 and answer.isupper() and len(answer) <= 4 and answer.isalpha():
        # Of "US", not "us", but "U.S.".
        return re.compile(r"(?<!\w)(?<!\w-)" + r"\.?".join(answer) + r"(?![\w+#])(?!-\w)")
    joined = words[0]
    for word, following in zip(words, words[1:], strict=False):
        gap = re.search(rf"{re.escape(word)}(\W+){re.escape(following)}", answer)
        strict = gap is not None and (word[-1].isdigit() or following[0].isdigit())
        letters = len(word) == 1 or len(following) == 1
        joined += (
            re.escape(gap[1]) if strict and gap else r"[\s.\-']*" if letters else r"(?:[\s.,\-'()]+|\s*&\s*|\s+and\s+)"
        ) + following
    return re.compile(rf"(?<![\w])(?<!\w-){joined}(?![\w+#])(?!-\w)(?!\.\d)", re.IGNORECASE)


def _enumerates(text: str, mentions: Callable[[str], bool]) -> bool:
    """Whether a text is a list of short items, of which the answer is one."""
    items = [m[1] for m in re.finditer(r"^\s*(?:[-*•]|\d{1,2}[.)])?\s*([^\n]{1,40}?)\s*$", text, re.MULTILINE)]
    short = [item for item in items if item and len(item.split()) <= 4 and not re.search(r"[:.]$", item)]
    return len(short) > 1 and any(map(mentions, short)) and not all(map(mentions, short))


def _contradicted(parts: Sequence[str], mentions: Callable[[str], bool]) -> bool:
    """Whether a later sentence says something else of the same thing: "The capital is Paris. The capital is Rome."."""
    said_of: dict[str, str] = {}
    for part in parts:
        match = re.match(r"^(?P<what>[^.]{3,80}?)\s+(?:is|was|are|were)\s+(?P<which>(?:the |a )?[A-Z0-9].*)$", part)
        if match is None:
            continue
        what = match["what"].casefold()
        if what in said_of and mentions(said_of[what]) and not mentions(part):
            return True
        said_of[what] = part
    return False
