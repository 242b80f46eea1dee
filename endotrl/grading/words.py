# SPDX-License-Identifier: Apache-2.0
"""Answers of words: whether a text states an accepted one, and leaves no other beside it."""

import re
from collections.abc import Sequence
from functools import lru_cache

from .spelling import fold, plain_text, tidy
from .statements import LIKELY, POSSIBLY, after_corrections, first_line, is_denied, said, sentences


# Stands in a text for whatever is accepted. A capital letter, as segmenters look for.
_MARK = "Ꙭ"
_NAME = r"(?:[Tt]he )?[A-Z0-9][\w.'-]*(?:\s+(?:of|the|de|la|da|von|van|[A-Z0-9][\w.'-]*)){0,3}"
# Capitalised at the start of a sentence, and no name.
_LEAD = (
    r"(?i:yes|no|not|neither|sure|well|so|ok|okay|oh|hmm|right|of course|certainly|thus|hence|therefore|indeed|answer"
    r"|absolutely|correct|in|on|at|by|for|from|after|before|during|with|as|since|when|while|although|if|because|it"
    r"|this|that|he|she|they|there|i|we|you|to|an?|let|note|first|finally|given|based|according|step|solution"
    r"|explanation|reasoning)\b"
)
# Not the answer itself: New York is not York, and Jupiter's moon is not Jupiter.
_PART = re.compile(
    r"\b(?:(?:New|North|South|East|West|North(?:east|west)|South(?:east|west)|(?:North|South|East|West)ern|Papua|Real"
    rf"|San|Santa|Los|Equatorial|Upper|Lower|Inner|Outer|Anti|Non)[\s-]{_MARK}|{_MARK}'s\s+\w)"
)
# What something is compared with, comes after, or belongs to; what others say.
_ASIDE = re.compile(
    r"\b(?:than|(?:followed|succeeded|preceded)(?: by)?|over|(?:as|so) (?:is|are|was|were)|(?:way|second(?: only)?"
    r"|next|close|similar|compared|prior|adjacent|opposite|akin|superior|inferior|equivalent|thanks|according|heir"
    r"|lost|wrote|married|related) to|\w+ed from|(?!being|including|meaning|becoming|remaining|speaking|naming"
    r"|choosing|saying|picking)\w{3,}ing|after|before|beyond|like|such as|near|next to|behind|around|ahead of"
    r"|close to|(?<!go )(?<!filled )(?<!starts )(?<!ends )(?<!made )with|(?<!stands )for|(?:suburbs?|outskirts|north"
    r"|south|east|west|edge|vicinity|moons?|satellites?|sons?|daughters?|wife|husband|brothers?|sisters?|mother"
    r"|father|friends?|rivals?|students?|pupils?|teachers?|work|contemporar(?:y|ies)|successors?|predecessors?"
    r"|neighbou?rs?|instead|ahead|front|opponents?|followers?|compounds?|oxides?|isotopes?|mixtures?|hints?|traces?"
    rf"|touch|shades?|descendants?|ancestors?|assistants?|colleagues?|members?) of)\s+(?:the\s+|in\s+)?{_MARK}"
    r"|\b(?:some|many|most|a few|other)s?\s+(?:people\s+)?(?:also\s+|might\s+|may\s+)?(?:say|think|believe|claim"
    rf"|answer|guess|assume|call)\b[^,.;]*{_MARK}",
    re.IGNORECASE,
)
# Behind a name, what kind of thing it is.
_KIND = (
    r"(?:River|Desert|Ocean|Sea|City|Mountains?|Islands?|Republic|Empire|Kingdom|Province|County|State|Lake|Canal"
    r"|Valley|Peninsula|Bonaparte|[IVX]+|Jr|Sr|The|It|He|She|This|That|[A-Z])\b"
)
_NOT_SAID = r"(?<!\bis )(?<!\bwas )(?<!'s )(?<!\bby )(?<!\bis the )"
_TOO = r"(?:also|too|merely|only|just|another|the second|second|its|even)\b"
# What leaves another answer beside it, or in its place.
_OTHERS = re.compile(
    "|".join(
        (
            # "Paris or Rome", "Paris/Rome", but not "Paris, or rather the city on the Seine"
            rf"{_MARK}[\"'*_)]*(?:,? (?:perhaps|maybe|possibly))?\s*[,.?!]?\s*(?:(?i:or|and/or)\s+(?!(?:so|more|less"
            r"|fewer|at least|rather|simply|just|about|as|in other words|better)\b)|/\s*|\bvs\.?\s+)\S",
            rf"\w[\"'*_)]*,?\s+\(?(?i:or|and/or)\s+(?i:the |in |maybe |perhaps |possibly |even )?[\"'*_(]*{_MARK}",
            # "Paris and Rome", "red and Paris"
            rf"{_MARK}\s+(?:and|&)\s+{_NAME}",
            rf"{_NAME}\s+(?:and|&)\s+(?:the )?{_MARK}",
            rf"^\W*\w+(?:\s\w+)?(?:,\s*\w+(?:\s\w+)?)*,?\s+(?:and|or)\s+{_MARK}\W*$",
            rf"{_MARK}\s+(?:is|was)\b[^.,{_MARK}]*,\s+(?!{_LEAD}){_NAME}\s+(?:is|was)\b",
            # Lists
            rf"{_MARK}(?:,\s*{_NAME})+,?\s+(?:or|and|&)\s+(?:the )?[A-Z0-9]",
            rf"{_MARK}(?:,\s*{_NAME}){{2,}}\s*(?:[.:!]|$|,?\s*etc)",
            rf"{_MARK}\s+(?!{_KIND})(?:[A-Z][a-z'-]+)",
            # "Rome, the rival of Paris", "It is Rome (before, Paris was)", but not "Hamlet, a play, is by Shakespeare"
            rf"^\W*(?:(?i:it|that|this|he|she)(?:'s| is| was) )?(?!{_LEAD}|The [^,]*, {_MARK}\W*$){_NAME}(?:[,;]"
            rf"|\s\((?!{_MARK}\))|\s[-–—>]\s|\s(?:is|was)\b[^;]*;)[^{_MARK}]*"
            r"(?<!\bis )(?<!\bwas )(?<!\bbeen )(?<!\bby )(?<!\bis the )(?<!\bwas the )(?<!\bit's )(?<!\bi\.e\. )("
            rf"?<!called )(?<!\bas ){_MARK}",
            # "It is Rome; Paris is larger", "Paris is larger, but Rome is the capital"
            rf"^(?![^;]*\b(?:not|no|n't)\b)[^;{_MARK}]*(?:\b(?:is|was)\b[^;.{_MARK}]*;\s*(?:the )?{_MARK}"
            rf"|;\s*(?:the )?{_MARK}\s+[a-z])",
            # "An alloy of Paris called Rome", "It is Rome, the opposite of Paris"
            rf"{_MARK}(?!\s+(?:is|was|are|were|has|also|often|sometimes)\b)[^.,;{_MARK}]*\b(?:called|named)\s+\w",
            rf"^[^,;{_MARK}]*(?:\b(?:is|was|are|were)|'s)\b\s[^,;{_MARK}]+,\s+(?:an?|the|another|one|his|her|its|once"
            rf"|home)\s+(?:(?!(?:is|was|are|were|by|called|named)\b)[\w'-]+\s+)+{_MARK}",
            rf"^\W*(?:(?i:while|although|though) )?{_MARK}\s[^.{_MARK}]*(?:;|\b(?:but|while|whereas|however"
            rf"|yet)\b)[^.{_MARK}]*\b(?:is|was)\s+(?:the |in )?[A-Z]",
            rf"{_NOT_SAID}{_MARK}[^.{_MARK}]*(?:;|\b(?:but|while|whereas|however)\b),?\s+(?!{_LEAD}){_NAME}\s+(?:is"
            rf"|was|are|were)\b(?!\s{_TOO})",
            # "Rome is the capital, and Paris is merely its rival"
            rf"^(?!.*\b(?:not|n't|no)\b)[^{_MARK}]*\b(?:is|was|are|were)\b[^{_MARK}]*(?:,? and"
            rf"|, but) (?:the )?{_MARK}\s+(?:is|was|are|were)\b(?:\s(?!{_TOO})\w+)?\s{_TOO}",
            rf"{_MARK}[\"'*_)]*\?",
            rf"^\W*(?=[^.]*{_MARK})(?:\w+(?:\s\w+)?,\s*){{3,}}\w+(?:\s\w+)?\W*$",
        )
    )
)
# "People from Paris call it Rome", "The opposite of Paris is Rome"
_OF_SUBJECT = re.compile(
    rf"^\W*(?:(?!is\b|was\b)[\w'-]+ ){{1,4}}(?<!city )(?<!name )(?<!word )(?:of|from|near"
    rf"|like) (?:the )?{_MARK}(?= (?:is|was|are|were|calls?)\b)"
)
_SAME = re.compile(
    rf"{_MARK}(?:[\"'*_]*\s*(?:,?\s*\b(?:or|and|aka|also known as|also called)\b|[,(/=:-](?:or )?)\s*(?:the "
    rf"|an? )?[\"'*_(]*{_MARK}[\"'*_)]*)+"
)
_RELATIVE = re.compile(
    r"^\W*(?:[Ii]f|[Uu]nless)\b[^,]*,|,\s+(?:which|who|whose|whom|where|when|while|whereas|(?:al)?though|since|because"
    rf"|if)\b(?!\s(?:is|was)\s+(?:the )?{_MARK})[^,;]*"
)
_IN_THE_END = re.compile(rf"^(?P<before>[^{_MARK}]*{_MARK}.*?)[,;]?\s(?:but|yet|however|so)\b[:,]?\s(?P<main>.*)$")
_SO_THEN = re.compile(r"\W*(?:so|therefore|thus|hence)\b[:,]?\s+(?:it is |it's )?[\w' -]{1,30}\W*$", re.IGNORECASE)
_NAME_ALONE = re.compile(rf"\W*(?:(?i:it|that|this|he|she)(?:'s| is| was) )?(?!{_LEAD}){_NAME}[.!]")
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
    if not verdicts or not verdicts[-1] or _NAME_ALONE.fullmatch(parts[0]):
        return False
    if _SO_THEN.match(parts[-1]) and _MARK not in parts[-1]:
        return False
    return not (_lists_others(text) or _guesses_twice(parts) or _says_otherwise(parts))


def _with_marks(text: str, answers: Sequence[str]) -> str:
    text = fold(plain_text(text)).replace(_MARK, " ")
    for answer in sorted(answers, key=len, reverse=True):
        text = _in_any_order(answer, _pattern(answer).sub(_MARK, text))
    return _PART.sub(" ", _SAME.sub(_MARK, text))


def _in_any_order(answer: str, text: str) -> str:
    """A text in which the members of a list are marked, in whatever order they are."""
    items = re.split(r"\s*[,;]\s*(?:and\s+)?|\s+and\s+|\s+&\s+", fold(tidy(answer)).strip(" ."))
    if len(items) < 2 or not all(re.fullmatch(r"[^\W\d][\w' -]*", item) for item in items):
        return text
    item = "(?:the )?(?:" + "|".join(map(re.escape, items)) + ")"
    listed = re.compile(
        rf"\b{item}(?:(?:\s*[,;/]\s*(?:and\s+)?|\s+and\s+|\s+&\s+){item}){{{len(items) - 1}}}\b", re.IGNORECASE
    )
    return listed.sub(lambda m: _MARK if all(i.casefold() in m[0].casefold() for i in items) else m[0], text)


@lru_cache(maxsize=1024)
def _pattern(answer: str) -> re.Pattern[str]:
    answer = re.sub(r"^(?:the|an?)\s+(?=\w)", "", fold(tidy(answer)).strip().rstrip(".").strip(), flags=re.IGNORECASE)
    # Everest is Mount Everest, the Pacific the Pacific Ocean.
    mount = r"(?:(?:Mount|Mt\.?) )?" if re.match(r"(?:Mount|Mt\.?) ", answer) else ""
    answer = re.sub(r"^(?:Mount|Mt\.?) (?=[A-Z])|(?<=\w) (?:Ocean|River|Desert)$", "", answer)
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
    return re.compile(rf"(?<![\w])(?<!\w-){mount}{joined}(?![\w+#])(?!-\w)(?!\.\d)", re.IGNORECASE)


def _verdict(sentence: str) -> bool | None:
    """Whether a sentence affirms the answer; `None` if it does not speak of it."""
    sentence = _RELATIVE.sub("", sentence)
    if (
        (end := _IN_THE_END.match(sentence))
        and _MARK not in end["main"]
        and not re.search(rf"\b(?:is|was|by|it's|are) (?:the )?{_MARK}", end["before"])
    ):
        if re.search(r"\b(?:is|was) (?:the )?[A-Z]|^\w+\W*$", end["main"]):
            return False
    asides = {match.end() for pattern in (_ASIDE, _OF_SUBJECT) for match in pattern.finditer(sentence)}
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
    return any(POSSIBLY.search(part) and len([*POSSIBLY.finditer(part), *LIKELY.finditer(part)]) > 1 for part in parts)


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
