# SPDX-License-Identifier: Apache-2.0
"""Answers of words: whether a text states an accepted one, and leaves no other beside it."""

import re
from collections.abc import Sequence

from .spelling import fold, plain_text, tidy
from .statements import after_corrections, first_line, is_denied, said, sentences


# Stands in a text for whatever is accepted. A capital letter, as segmenters look for.
_MARK = "Ꙭ"
_NAME = r"(?:[Tt]he )?[A-Z0-9][\w.'-]*(?:\s+(?:of|the|de|la|da|von|van|[A-Z0-9][\w.'-]*)){0,3}"
# Capitalised at the start of a sentence, and no name.
_LEAD = (
    r"(?i:yes|no|sure|well|so|ok|okay|oh|hmm|right|of course|certainly|thus|hence|therefore|indeed|answer|absolutely"
    r"|correct|in|on|at|by|for|from|after|before|during|with|as|since|when|while|although|if|because|it|this|that|he"
    r"|she|they|there|i|we|you|to|an?|let|note|first|finally|given|based|according|step|solution"
    r"|explanation|reasoning)\b"
)
# Not the answer itself: New York is not York, and Jupiter's moon is not Jupiter.
_PART = re.compile(
    r"\b(?:(?:New|North|South|East|West|North(?:east|west)|South(?:east|west)|(?:North|South|East|West)ern|Papua"
    rf"|Equatorial|Upper|Lower|Inner|Outer|Anti|Non)[\s-]{_MARK}|{_MARK}'s\s+\w)"
)
# What something is compared with, comes after, or belongs to; what others say.
_ASIDE = re.compile(
    rf"\b(?:than|followed|succeeded|preceded|after|before|beyond|like|such as|near|next to|behind|around|ahead of"
    r"|close to|(?<!go )with|(?<!stands )for|(?!(?:city|state|country|name|republic|kingdom|word|number|island|river"
    r"|planet|element|capital|province|county|town|year|consists?|composed|made|because|think)\b)\w+ of)\s+(?:the\s+"
    rf"|in\s+)?{_MARK}"
    r"|\b(?:some|many|most|a few|other)s?\s+(?:people\s+)?(?:also\s+|might\s+|may\s+)?(?:say|think|believe|claim"
    rf"|answer|guess|assume|call)\b[^,.;]*{_MARK}",
    re.IGNORECASE,
)
# What leaves another answer beside it, or in its place.
_OTHERS = re.compile(
    "|".join(
        (
            # "Paris or Rome", "Paris/Rome", but not "Paris, or rather the city on the Seine"
            rf"{_MARK}[\"'*_)]*\s*,?\s*(?:(?i:or|and/or)\s+(?!(?:so|more|less|fewer|at least|rather|simply|just|about"
            r"|as|in other words|better)\b)|/\s*|\bvs\.?\s+)\S",
            rf"\w[\"'*_)]*,?\s+(?i:or|and/or)\s+(?i:the |in |maybe |perhaps |possibly |even )?[\"'*_(]*{_MARK}",
            rf"\w/{_MARK}",
            # "Paris and Rome", "red and Paris"
            rf"{_MARK}\s+(?:and|&)\s+{_NAME}",
            rf"{_NAME}\s+(?:and|&)\s+(?:the )?{_MARK}",
            rf"^\W*\w+(?:\s\w+)?(?:,\s*\w+(?:\s\w+)?)*,?\s+(?:and|or)\s+{_MARK}\W*$",
            # Lists
            rf"{_MARK}(?:,\s*{_NAME})+,?\s+(?:or|and|&)\s+(?:the )?[A-Z0-9]",
            rf"{_MARK}(?:,\s*{_NAME}){{2,}}\s*(?:[.!]|$|,?\s*etc)",
            rf"(?:{_NAME},\s*){{2,}}(?:(?:or|and|&)\s+)?(?:the )?{_MARK}",
            rf"^\W*{_MARK}(?:\s+[A-Z][\w'-]+){{2,}}\W*$",
            # "Rome, the rival of Paris", "It is Rome (before, Paris was)", but not "Hamlet, a play, is by Shakespeare"
            rf"^\W*(?:(?i:it|that|this|he|she)(?:'s| is| was) )?(?!{_LEAD}){_NAME}"
            rf"(?:[,;]|\s\((?!{_MARK}\))|\s[-–—>]\s|\s(?:is|was)\b[^;]*;)[^{_MARK}]*"
            rf"(?<!\bis )(?<!\bwas )(?<!\bby )(?<!\bis the )(?<!\bwas the )(?<!\bit's ){_MARK}",
            # "It is Rome; Paris is larger", "Paris is larger, but Rome is the capital"
            rf"\b(?:is|was)\b[^;.{_MARK}]*;\s*(?:the )?{_MARK}",
            rf"{_MARK}[^.{_MARK}]*(?:;|\b(?:but|while|whereas|however)\b),?\s+(?!{_LEAD}){_NAME}\s+"
            r"(?:is|was|are|were)\b",
            rf"{_MARK}[\"'*_)]*\?",
        )
    )
)
_SAME = re.compile(
    rf"{_MARK}(?:[\"'*_]*\s*(?:,?\s*\b(?:or|and|aka|also known as|also called)\b|[,(/=:-])\s*(?:the |an? )?[\"'*_(]*"
    rf"{_MARK}[\"'*_)]*)+"
)
_POSSIBLY = re.compile(
    r"\b(?:maybe|perhaps|possibly|might(?: also)? be|could(?: also)? be|may(?: also)? be|either)\b", re.IGNORECASE
)
_UNKNOWN = re.compile(
    rf"\b(?:hard to say|can(?:'t|not) (?:say|tell|decide)|don't know|unclear|unknown)\b[^.!?]*{_MARK}", re.IGNORECASE
)
_NAME_ALONE = re.compile(rf"\W*(?!{_LEAD}){_NAME}[.!]")
_SUBJECT = re.compile(r"^(?P<what>[^.]{3,80}?)\s+(?:is|was|are|were)\s+(?:the |a )?[A-Z0-9].*$")


def states_words(text: str, answers: Sequence[str]) -> bool:
    """Whether a text states one of the accepted answers."""
    text = _with_marks(text, answers)
    text = after_corrections(text, lambda rest: re.search(rf"[A-Z0-9]\w|\bis\b|{_MARK}", rest) is not None)
    if statements := said(text):
        claim = next(filter(None, map(first_line, statements)), "")
        verdict = _verdict(claim)
        # "The answer is simple." leaves it to the rest.
        if verdict is not None or re.search("[A-Z0-9]", claim) or len(claim.split()) <= 3:
            return bool(verdict)
    parts = sentences(text)
    verdicts = [verdict for verdict in map(_verdict, parts) if verdict is not None]
    if not verdicts or not verdicts[-1] or _UNKNOWN.search(text) or _NAME_ALONE.fullmatch(parts[0]):
        return False
    return not (_lists_others(text) or _guesses_twice(parts) or _says_otherwise(parts))


def _with_marks(text: str, answers: Sequence[str]) -> str:
    text = fold(plain_text(text)).replace(_MARK, " ")
    for answer in sorted(answers, key=len, reverse=True):
        text = _pattern(answer).sub(_MARK, text)
    return _PART.sub(" ", _SAME.sub(_MARK, text))


def _pattern(answer: str) -> re.Pattern[str]:
    answer = re.sub(r"^(?:the|an?)\s+(?=\w)", "", fold(tidy(answer)).strip().rstrip(".").strip(), flags=re.IGNORECASE)
    words = re.findall(r"\w+", answer)
    if not words or re.search(r"[^\w\s.,'()/:!?&-]", answer):
        return re.compile(rf"(?<!\w){re.escape(answer)}(?!\w)", re.IGNORECASE) if answer else re.compile("(?!)")
    if len(words) == 1 and answer.isupper() and len(answer) <= 4 and answer.isalpha():
        # Of "US", not "us", but "U.S.".
        return re.compile(r"(?<!\w)(?<!\w-)" + r"\.?".join(answer) + r"(?![\w+#])(?!-\w)")
    joined = words[0]
    for gap, word in re.findall(r"(\W+)(\w+)", answer[answer.index(words[0]) + len(words[0]) :]):
        if joined[-1].isdigit() or word[0].isdigit():
            joined += r"(?:st|nd|rd|th)?" * joined[-1].isdigit() + re.escape(gap)
        elif len(word) == 1 or re.search(r"(?:^|\W)\w$", joined):
            joined += r"[\s.\-']*"
        else:
            joined += r"(?:[\s.,\-'()]+|\s*&\s*|\s+and\s+)"
        joined += word
    return re.compile(rf"(?<![\w])(?<!\w-){joined}(?![\w+#])(?!-\w)(?!\.\d)", re.IGNORECASE)


def _verdict(sentence: str) -> bool | None:
    """Whether a sentence affirms the answer; `None` if it does not speak of it."""
    asides = {match.end() for match in _ASIDE.finditer(sentence)}
    mentions = [m.span() for m in re.finditer(_MARK, sentence) if m.end() not in asides]
    if not mentions:
        return None
    return not _OTHERS.search(sentence) and not any(is_denied(sentence, start, end) for start, end in mentions)


def _lists_others(text: str) -> bool:
    """Whether a text is a list of short items, of which the answer is one."""
    items = [m[1] for m in re.finditer(r"^\s*(?:[-*•]|\d{1,2}[.)])?\s*([^\n]{1,40}?)\s*$", text, re.MULTILINE)]
    short = [_MARK in item for item in items if item and len(item.split()) <= 4 and not re.search(r"[:.]$", item)]
    return len(short) > 1 and any(short) and not all(short)


def _guesses_twice(parts: Sequence[str]) -> bool:
    """Whether a text guesses more than once, and not always the same: "It may be Paris. It may be Rome."."""
    guesses = [part for part in parts if _POSSIBLY.search(part)]
    hedges = sum(len(_POSSIBLY.findall(part)) for part in guesses)
    return hedges > 1 and (len(guesses) == 1 or not all(_MARK in part for part in guesses))


def _says_otherwise(parts: Sequence[str]) -> bool:
    """Whether a later sentence says something else of the same thing: "The capital is Paris. The capital is Rome."."""
    said_of: dict[str, str] = {}
    for part in parts:
        if match := _SUBJECT.match(part.replace(_MARK, f"A{_MARK}")):
            what = match["what"].casefold()
            if _MARK in said_of.get(what, "") and _MARK not in part:
                return True
            said_of[what] = part
    return False
