# SPDX-License-Identifier: Apache-2.0
"""Correctness of a completion's final answer; the expected answer determines how the completion is read."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .extraction import MONTHS, marked, plain_text, same_words, tidy, visible, without_markdown
from .numbers import NUMBER_WORDS, plain_math, read_number
from .statements import MATH, ORDERED, after_corrections, clauses, first_line, formula, is_denied, said, sentences
from .symbolic import same_expression
from .values import Collection, Quantity, Stated, Value, is_numeric, quantities, read_value, same_value
from .words import OPTION, states_choice, states_truth, states_words


_CHOICE = re.compile(r"^\W*(?P<letter>[A-Ja-j])[^\w+#]*$")
# An exact value followed by its rounded one.
_ROUNDED = re.compile(r"(=[^=≈$\n]{1,80}?)\s*(?:\\approx|≈)[^=$\n]*")
_DURATION = re.compile(rf"(?:{NUMBER_WORDS.pattern}|\b\d+)\s+(?:years?|months?|weeks?|days?|hours?)\b", re.IGNORECASE)
# "1 in 6", for a fraction.
_CHANCE = re.compile(
    rf"(?:{NUMBER_WORDS.pattern}|\b\d+) (?:in|out of) (?:{NUMBER_WORDS.pattern}|\d+\b)", re.IGNORECASE
)
# Longer texts are not bare answers.
_BARE = 80
_FILLER = re.compile(
    r"^(?:[\s\"'*_:=≈~]|\\approx|(?:approximately|about|around|exactly|equal to|given by|just|only)\b)+", re.IGNORECASE
)
# Precedes a stated value: a verb, or any word right before a number, except prepositions and the like.
_COPULA = re.compile(
    r"\b(?:is|are|was|were|be|(?:that|it|there|here)'s|equals?|equal to|has|have|had|left with|total of|so|thus|hence"
    r"|therefore|i\.e\.,?|(?:mak|giv|gett?|leav|cost|yield|round|amount|com|bring|tak)(?:e?s?|ing)(?:(?: us| her| him"
    r"| them| it| up)? to)?|results? in|(?<!\bin )(?<!\bon )(?<!\bof )(?<!\bat )(?<!\bfor )(?!(?:about|after|all|and"
    r"|at|before|between|but|by|each|every|first|for|from|in|into|last|next|of|old|on|only|or|other|over|per|plus"
    r"|than|that|the|their|then|these|those|times|to|with)\b)(?-i:[a-z]){3,}(?= [$£€]?\d))(?!\w| (?:at|from|with)\b)"
    r"|, or (?=[$£€]?\d)|[:=≈]",
    re.IGNORECASE,
)
_CONNECTED = re.compile(
    r"\s*(?:[,;/–-]|\b(?:or|and|to)\b)\s*(?:or |and |possibly |maybe |perhaps |the |also |it could (?:also )?be "
    r"|[a-z] = )*",
    re.IGNORECASE,
)
_RATIO = re.compile(r"(?<![\w:.])\d+(?:\.\d+)?(?:\s?:\s?\d+(?:\.\d+)?)+(?![\w:])")
_DATE = re.compile(rf"\b(?:{'|'.join(MONTHS)}) \d{{1,2}}(?:, (?=\d{{4}}\b)|\b)")
_COMPARED = re.compile(r"\s+(?:\w+\s+)?(?:more|less|fewer|\w+er)\s+(?:\w+\s+)?than\b")
# A sentence about something else, or the same thing from another side.
_ELSEWHERE = re.compile(
    r"\(.*\)\W*$|(?!.*\b(?:so|then|thus|hence|therefore|total|get|find|gives|yields)\b)(?:.*\b(?:(?:by|in"
    r"|for) (?:contrast|comparison)|by the way)\b|[^=]*\bwould\b[^=]*$|\W*(?:the other \d|conversely|note that"
    r"|(?:as a |to double-?|to )?(?:check|verify)\b|(?:to )?put (?:it )?(?:another way|different))|that(?:'s"
    r"| is) an average|(?:plugg|substitut|putt)ing (?:\w+ ){0,3}back)",
    re.IGNORECASE,
)
# Before an adjunct: "in two months".
_ADJUNCT = re.compile(r"\b(?:in|for|from|within|over|during|among|after|before)\s+[$€£(]*$", re.IGNORECASE)
# Before a number that is compared with, or was given.
_GIVEN = re.compile(
    r"\b(?:from|among|by|per|than|out of|over|times)\s+[$(]*|\b(?:the|all|these|those|his|her|its|their|our"
    r"|other)\s+[$(]*|(?:[\d%]|half|third|quarter|each)\s+(?:\w+\s+)?of\s+|\bto (?!about|an?\b|the\b|be\b"
    r"|get\b)[a-z]+\s+",
    re.IGNORECASE,
)


def final_answer(value: Any) -> str:
    r"""
    Extracts the answer from a data set's answer field. Raises `ValueError` if that has fields of its own.

    Example:
    ```python
    >>> from endotrl.grading import final_answer

    >>> [final_answer(x) for x in (27.0, "6 * 3 = 18\n#### 18", r"so \boxed{\frac{1}{2}}", ["2"])]
    ['27', '18', '\\frac{1}{2}', '2']
    ```
    """
    if isinstance(value, list | tuple):
        return ", ".join(final_answer(part) for part in value)
    if isinstance(value, Mapping):
        raise ValueError(
            f"An answer must be text, a number, true, false or a list of these, got {value!r}. Keep only the part "
            "that is the answer."
        )
    if isinstance(value, bool):
        return "yes" if value else "no"
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


def accepted_answers(value: Any) -> list[Any]:
    """The accepted answers in a data set's answer field: those of a list, or the only one."""
    return list(value) if isinstance(value, list | tuple) else [value]


def is_right(completion: str, answers: Sequence[Any], math: bool = False) -> bool:
    r"""
    Whether a completion gives an accepted answer as its final answer.

    The final answer is in `\boxed{}` or `<answer>`, after `####`, after "the answer is" or "Answer:", or else the last
    number, or what the text states. Reasoning before `</think>` is ignored. What is denied ("not Paris"), retracted
    ("Paris. No, wait: Rome") or left open ("Paris or Rome") is not an answer.

    The comparison depends on the accepted answer: numbers by value (1,000 is 1e3; 1/2 is 0.5; 50% is 0.5; units
    are converted, and may be left out), tuples, intervals, sets and lists by their members, choices by their letter,
    yes and no by meaning, all else by its words, ignoring case and accents.

    Args:
        completion (`str`):
            What the model wrote.
        answers (`list[str]`):
            Accepted answers, as read by [`final_answer`]; numbers, and `True` and `False` for yes and no, are allowed.
        math (`bool`, *optional*, defaults to `False`):
            Whether expressions that are not numbers are compared by math-verify, which knows that $(x+1)^2$ is
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
    if isinstance(answers, str) or not answers or any(answer is None or answer == "" for answer in answers):
        raise ValueError(
            f"`answers` must be a non-empty list of non-empty answers, got {answers!r}. Pass a single answer as "
            "`[answer]`."
        )
    text = visible(completion)
    accepted = [tidy(final_answer(answer)) for answer in answers]
    return any(_gives(text, answer, accepted, math) for answer in accepted)


def same_answer(texts: Sequence[str], math: bool = False) -> list[int]:
    """For each text, the index of the first one with an equal final answer (possibly itself): for a majority vote."""
    claims = [_final(visible(text)) for text in texts]
    groups: list[int] = []
    for i, claim in enumerate(claims):
        others = dict.fromkeys(groups) if claim else ()
        groups.append(next((j for j in others if claims[j] and _equal(claims[j], claim, math)), i))
    return groups


def _final(text: str) -> str:
    """Final answer of a text without an expected answer, as text."""
    if (claim := marked(text)) is not None:
        return claim.text
    stated = _stated(text)
    return "" if stated is None else stated.written or _written(stated.value)


def _written(value: Value) -> str:
    if isinstance(value, Quantity):
        return f"{value.number.value} {value.unit}".strip()
    if isinstance(value, str):
        return value
    return value.brackets[:1] + ", ".join(map(_written, value.items)) + value.brackets[1:]


def _gives(text: str, right: str, answers: Sequence[str], math: bool) -> bool:
    """Whether a text gives the answer `right`, one of the accepted `answers`."""
    if ORDERED.search(text[-200:]) and isinstance(value := read_value(right), Collection) and not value.brackets:
        right = f"({right})"
    text, boxed = marked(text) or (text, False)
    if not text or not right.strip():
        return False
    if boxed and (text == right or _equal(right, text, math)):
        return True
    text = plain_text(text) if boxed else text
    word = right.strip(" .").casefold()
    if word in ("yes", "no", "true", "false"):
        return states_truth(text, word)
    choice, value = _CHOICE.match(right), read_value(right)
    if choice is not None and states_choice(text, choice["letter"].upper()):
        return True
    if value is not None:
        return _gives_value(text, right, value, math)
    return choice is None and states_words(text, answers)


def _equal(right: str, given: str, math: bool) -> bool:
    """Whether two isolated answers are equal."""
    if same_words(right, given) or ("\\" in right and "".join(right.split()) == "".join(given.split())):
        return True
    plain = plain_text(given)
    choice = _CHOICE.match(right)
    other = _CHOICE.match(plain) or OPTION.match(plain)
    if choice is not None and other is not None:
        return choice["letter"].upper() == other["letter"].upper()
    a, b = read_value(right), read_value(given)
    if same_value(a, b):
        return True
    is_expression = (a is not None or "\\" in right) and not (is_numeric(a) and is_numeric(b))
    if math and is_expression and not re.search(r"\s(?:or|and)\s", given):
        return same_expression(right, given)
    return same_words(plain_text(right), plain)


# ------------------------------------------------------------------------------------------------------------------
# Values in prose
# ------------------------------------------------------------------------------------------------------------------


def _gives_value(text: str, right: str, value: Value, math: bool) -> bool:
    symbolic = not isinstance(value, Quantity)
    if re.fullmatch(r"1\d{3}|20\d\d", right):
        text = _DURATION.sub(" ", text)
    if isinstance(value, Quantity) and 0 < value.number.value < 1:
        text = _CHANCE.sub(_ratio, text)
    stated = _stated(_ROUNDED.sub(r"\1", text), symbolic)
    if stated is None:
        return False
    if same_value(value, stated.value):
        return True
    numeric = is_numeric(value) and is_numeric(stated.value)
    several = isinstance(stated.value, Collection) and not stated.value.brackets and not isinstance(value, Collection)
    return math and not numeric and not several and stated.written != "" and same_expression(right, stated.written)


def _ratio(match: re.Match[str]) -> str:
    above, below = (read_number(part) for part in re.split(" in | out of ", match[0]))
    return f"{above.value}/{below.value}" if above and below and above.value <= below.value else match[0]


def _stated(text: str, symbolic: bool = True) -> Stated | None:
    """The stated value of a text: after "the answer is", the text itself, or that of the last sentence with one."""
    text = after_corrections(text, lambda rest: bool(_values(rest, symbolic)) or MATH.search(rest) is not None)
    for rest in said(text):
        if (stated := _first_value(rest)) is not None:
            return stated
    whole = without_markdown(text).strip()
    value = read_value(whole) if symbolic or len(text) <= _BARE else None
    if value is not None and not (isinstance(value, str) and re.match(r"[A-Za-z]{2,}\s|.*\$", whole)):
        return Stated(0, len(whole), value, whole)
    found = [(part, _sentence_value(part, symbolic)) for part in sentences(without_markdown(text))]
    found = [(part, value) for part, value in found if value is not None]
    found = [(part, value) for part, value in found if not _ELSEWHERE.match(part)] or found
    return found[-1][1] if found else None


def _written_first(rest: str) -> str:
    line = _FILLER.sub("", first_line(rest))
    match = MATH.match(line)
    return formula(match) if match is not None else line.rstrip(" .!*")


def _first_value(rest: str) -> Stated | None:
    """The value, or list of values, at the beginning of a statement."""
    line, written = _FILLER.sub("", first_line(rest)), _written_first(rest)
    if (value := read_value(line.rstrip(" .!*"))) is not None:
        return Stated(0, len(line), value, written)
    if MATH.match(line) or re.match(r"[-+$€£¥₹.\d]", line) or NUMBER_WORDS.match(line):
        stated = _chosen_value(line, symbolic=True, first=True)
        return stated and stated._replace(written=written)
    return None


def _sentence_value(sentence: str, symbolic: bool) -> Stated | None:
    if symbolic and not MATH.search(sentence) and (verbs := list(_COPULA.finditer(sentence))):
        start, written = verbs[-1].end(), sentence[verbs[-1].end() :].strip(" .")
        if isinstance(value := read_value(written), str | Collection):
            return Stated(start, len(sentence), value, written)
    return _chosen_value(sentence, symbolic)


def _chosen_value(line: str, symbolic: bool, first: bool = False) -> Stated | None:
    """The stated value of a sentence: after its last equation or its verb, or the first or last one."""
    line = plain_math(line)
    found = _values(line, symbolic)
    prose, found = _main_clauses(MATH.sub(lambda m: "_" * len(m[0]), line), found)
    if not found:
        return None
    # The last verb followed by a value; what comes after a statement is not part of it, except for its equation.
    verbs = [match.end() for match in _COPULA.finditer(prose)]
    if first:
        equation = re.match(r"[^A-Za-z]*=", prose[found[0].end :])
        verbs = [found[0].end + equation.end()] if equation else []
    free = [item for item in found if not _is_adjunct(prose, item)]
    stating = [
        end for end in verbs if next((item for item in found if item.start >= end), None) in (found if first else free)
    ]
    verb = max(stating, default=0 if first else (free or found)[-1].start)
    low = high = next(i for i, item in enumerate(found) if item.start >= verb)
    while high + 1 < len(found) and _connected(line, found[high], found[high + 1]):
        high += 1
    while low > 0 and _connected(line, found[low - 1], found[low]):
        low -= 1
    together = [item.value for item in found[low : high + 1]]
    alike = all(same_value(together[0], other) for other in together)
    return found[low] if alike else Stated(0, 0, Collection(tuple(together)))


def _is_adjunct(prose: str, item: Stated) -> bool:
    """Whether a value only tells when or how, as in "in two months"."""
    unit = item.value.unit if isinstance(item.value, Quantity) else ""
    return unit != "" and _ADJUNCT.search(prose[: item.start]) is not None


def _main_clauses(prose: str, found: list[Stated]) -> tuple[str, list[Stated]]:
    """A sentence without its asides, and the values it states, without those that were given."""
    main, given = prose, {match.end() for match in _GIVEN.finditer(prose)}
    kept: list[Stated] = []
    for clause in clauses(prose):
        behind = [item for item in found if item.start >= clause.start]
        if clause.opened == ":" and "=" not in prose and len(behind) > 1 == len(kept):
            main = main[: clause.start]  # "There are 6: 2 boys and 4 girls"
            break
        if clause.is_aside(prose):
            main = main[: clause.start] + " " * (clause.end - clause.start) + main[clause.end :]
        else:
            kept += [item for item in behind if item.start < clause.end]
    if not kept:
        main, kept = prose, found
    return main, [item for item in kept if item.start not in given] or kept


def _values(line: str, symbolic: bool) -> list[Stated]:
    """Values of a line that are not denied: formulas (only numbers, unless `symbolic`), and quantities in prose."""
    found = []
    for match in (*_DATE.finditer(line), *MATH.finditer(line), *(_RATIO.finditer(line) if symbolic else ())):
        written = formula(match) if match.re is MATH else ""
        value = None if match.re is _DATE else read_value(written or match[0])
        if value is not None and (symbolic or is_numeric(value)):
            found.append(Stated(match.start(), match.end(), value, written))
        if value is not None or match.re is _DATE:
            line = line[: match.start()] + " " * len(match[0]) + line[match.end() :]
    found += [Stated(*quantity) for quantity in quantities(line)]
    return [item for item in sorted(found, key=lambda item: item.start) if not is_denied(line, item.start, item.end)]


def _connected(line: str, one: Stated, other: Stated) -> bool:
    between = line[one.end : other.start]
    if "=" in between and not re.search(r"(?<![\w)])[a-z]\w?\s*=\s*$", line[: one.start], re.IGNORECASE):
        return False  # "2x = 6 and x = 3"
    if _COMPARED.match(line, other.end):
        return False  # "36 stamps, 4 fewer than before"
    if isinstance(one.value, Quantity) and " to " not in between:
        between = between.lstrip().removeprefix(one.value.unit)
    return _CONNECTED.fullmatch(between.rstrip("$ (") + " " * between.endswith(" ")) is not None
