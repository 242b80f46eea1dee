# SPDX-License-Identifier: Apache-2.0
"""Whether a text says something of what it mentions: affirms it, denies it, or leaves it open among others."""

import re
from collections.abc import Callable, Iterable

from ..sentence.segmentation import RuleSegmenter


_segment = RuleSegmenter()
# Characters of a sentence, and of what stands around a mention, that are read.
_LONGEST_SENTENCE, _AROUND = 600, 200
_MOST_CORRECTIONS = 5
# Where a statement ends within a sentence.
_BOUNDARY = re.compile(
    r"[,;:()\[\]—–\n]|\s-\s|[.!?]\s|\b(?:but|however|although|though|while|whereas|instead(?! of)|rather(?! "
    r"than)|so|because|since|yet|and)\b",
    re.IGNORECASE,
)
_NO_DENIAL = re.compile(
    r"\bnot (?:only|just|merely|surprisingly|to be confused with [^,.;]*)|\bno (?:doubt|question|other than)"
    r"|\bwithout (?:a |any )?doubt|\bnone other than|\bnothing (?:but|other than)|\bno one but"
    r"|\bcannot be (?:anything|other)[^,.;]*|\bdoubt(?:less|lessly)\b",
    re.IGNORECASE,
)
_DENIAL = re.compile(
    r"\b(?:not|never|no|none|neither|nor|cannot|without|isn't|rul(?:e[sd]?|ing) out|exclud(?:e[sd]?|ing)"
    r"|eliminat(?:e[sd]?|ing)|reject(?:s|ed|ing)?|discard(?:s|ed|ing)?|rather than|instead of|other than"
    r"|except(?: for)?|unlike|far from|incorrect(?:ly)?|wrong(?:ly)?|false(?:ly)?|mistaken(?:ly)?|den(?:y|ies|ied)"
    r"|anything but|opposed to)\b|n't\b",
    re.IGNORECASE,
)
_DENIAL_BEHIND = re.compile(
    r"^[\"'*_)\s]*(?:'s\s+)?(?:\w+\s+){0,1}?(?:(?:is|was|are|were|does|did|do|has|had|can|could|would|will|should"
    r"|must|may|might)(?:n't\b|\s+not\b|\s+never\b|not\b)(?!\s+(?:only|just))|(?:is|was|are|were|seems|looks|sounds"
    r"|would be|must be)\s+(?:\w+\s+){0,2}?(?:wrong|incorrect|false|ruled out|mistaken|untrue|impossible|out\b"
    r"|too (?:large|small|big|high|low)|eliminated|excluded|a (?:common )?(?:mistake|misconception|trap))|(?:can"
    r"|could|may|might|should|must) be (?:ruled out|excluded|eliminated|discarded|rejected))",
    re.IGNORECASE,
)
_DISTANCE = re.compile(
    r"\b(?:(?:might|may|could|would)\s+(?:\w+\s+)?(?:guess|think|say|assume|expect|believe|answer)|(?:thought|assumed|believed|guessed|expected|claimed"
    r"|tempt(?:ed|ing)|attributed|credited)|(?:first|initial|common|naive|obvious)\s+(?:guess|thought|answer|mistake|choice)|(?:many|some|most|people|others)\s+(?:people\s+)?"
    r"(?:think|say|believe|claim|answer|guess|assume)|at first|it (?:seems|looks|appears)|commonly "
    r"(?:mistaken|confused)|used to be|formerly|previously"
    r"|was once)\b",
    re.IGNORECASE,
)
_ASIDE = re.compile(
    r"\b(?:than|followed|succeeded|preceded|after|before|like|such as|near|next to|behind|ahead of"
    r"|close to)\s+(?:the\s+|in\s+)?$|\b(?:some|many|most|a few|other)s?\s+(?:people\s+)?(?:also\s+|might\s+"
    r"|may\s+)?(?:say|think|believe|claim|answer|guess|assume|call)\b[^,.;]*$",
    re.IGNORECASE,
)
# A bound is no value.
_BOUND = re.compile(
    r"(?:\b(?:less|more|greater|fewer|larger|smaller|higher|lower|bigger|older|younger|longer|shorter)\s+than(?:\s+or\s+equal\s+to)?|\bat\s+(?:most|least)"
    r"|\bup\s+to)\s*[$€£¥(\\]*$",
    re.IGNORECASE,
)
_BOUND_BEHIND = re.compile(
    r"^\s*(?:\w+\s+)?or\s+(?:more|less|fewer|greater|higher|lower|larger|smaller)\b", re.IGNORECASE
)
_ALL_BUT = re.compile(r"\b(?:any|every|all)(?:one|body|thing)?\s+(?:but|except)\s+(?:the\s+)?$", re.IGNORECASE)
_DOUBT = re.compile(r"^[\"'*_)]*\?\s*(?:i doubt|no\b|not\b|hardly|unlikely|wrong|incorrect|never)", re.IGNORECASE)
_CONTRAST = re.compile(
    r"\b(?:but|however|yet|actually|in fact|in reality|instead|whereas|(?<!no )others?)\b(?=[^.]*\b(?:is|was|are|it's"
    r"|be|say|think|answer|moved|correct|right|became|not)\b)|\bothers?\b",
    re.IGNORECASE,
)
# What takes back what was said before.
CORRECTION = re.compile(
    r"(?:^|(?<=[.!?;:,\n—–])|(?<=\.\.)|(?<=- ))\s*(?:oh,? |hmm,? |oops,? |sorry,? |but )?(?:no,? )?"
    r"(?:wait\b|actually,|actually (?=it|the|that|i)|correction\b|scratch that|on second thoughts?|on reflection|let "
    r"me (?:re-?|double.)?(?:check|think again|redo|recompute|recalculate|correct)"
    r"|i (?:made|was) (?:a |an )?(?:mistake|error|wrong)|that(?:'s| is| was) (?:wrong|incorrect|not right)|no, )",
    re.IGNORECASE,
)
_QUESTION = re.compile(
    r"^\W*(?:so,? |now,? |and |but )?(?:what|which|who|whom|whose|where|when|why|how|is|are|was|were|do|does|did|can"
    r"|could|should|would|will|tell me|name the|the question (?:asks|is)|(?:we|you) (?:are|were) asked|i (?:am"
    r"|was) asked|question\s*:|q\s*:)\b",
    re.IGNORECASE,
)
_POSSIBLY = re.compile(
    r"\b(?:maybe|perhaps|possibly|might(?: also)? be|could(?: also)? be|may(?: also)? be|either)\b", re.IGNORECASE
)
_NAME = r"(?:the )?[A-Z0-9][\w.'-]*(?:\s+(?:of|the|de|la|da|von|van|[A-Z0-9][\w.'-]*)){0,3}"
# Others beside a mention: behind it, before it, and in lists.
_OR_BEHIND = re.compile(
    r"^[\"'*_)]*\s*(?:,\s*)?(?:(?:or|and/or)\s+(?:maybe |perhaps |possibly |even |else )?|/\s*|\bvs\.?\s+)"
    r"(?P<other>\S.*)",
    re.IGNORECASE,
)
_REWORDING = re.compile(
    r"(?:so|more|less|fewer|at least|rather|simply|just|about|as|in other words|better)\b", re.IGNORECASE
)
_OR_BEFORE = re.compile(
    r"([\w.' -]*)(?:,\s*|\s+)(?:or|and/or)\s+(?:the |in |maybe |perhaps |possibly |even )?[\"'*_(]*$|([\w.' -]+)/$",
    re.IGNORECASE,
)
_AND_BEHIND = re.compile(rf"^\s+(?:and|&)\s+(?P<other>{_NAME})")
_AND_BEFORE = re.compile(rf"({_NAME})\s+(?:and|&)\s+(?:the )?$")
_LIST_BEHIND = re.compile(
    rf"^(?:,\s*{_NAME})+,?\s+(?:or|and|&)\s+(?:the )?[A-Z0-9]|^(?:,\s*{_NAME}){{2,}}\s*(?:[.!]|$|,?\s*etc)"
)
_LIST_BEFORE = re.compile(rf"(?:{_NAME},\s*){{2,}}(?:(?:or|and|&)\s+)?(?:the )?$")
_WORDS_BEFORE = re.compile(r"(\W*\w+(?:\s\w+)?(?:,\s*\w+(?:\s\w+)?)*),?\s+(?:and|or)\s+")
_INTERJECTION = (
    r"(?i:yes|no|sure|well|so|ok|okay|oh|hmm|right|of course|certainly|thus|hence|therefore|indeed|answer|absolutely"
    r"|correct)"
)
_NAME_BEFORE = re.compile(rf"\W*(?!{_INTERJECTION},)({_NAME}),\s*(?:and )?\W*")


def sentences(text: str) -> list[str]:
    """Sentences of a text, without those that only ask."""
    parts = [text[start:end].strip()[-_LONGEST_SENTENCE:] for start, end in _segment(text)]
    return [part for part in parts if part and not _asks(part)]


def _asks(sentence: str) -> bool:
    match = _QUESTION.match(sentence)
    return match is not None and (
        sentence.endswith("?")
        or "ask" in match[0].lower()
        or match[0].lower().strip(" :").startswith(("question", "q", "tell", "name"))
    )


def is_denied(sentence: str, start: int, end: int) -> bool:
    """Whether a sentence denies what it mentions between `start` and `end`."""
    before = sentence[max(0, start - _AROUND) : start]
    boundaries = [m.end() for m in _BOUNDARY.finditer(before)]
    clause = _NO_DENIAL.sub(" ", before[boundaries[-1] if boundaries else 0 :])
    if _DENIAL.search(clause) or _BOUND.search(before) or _ALL_BUT.search(before):
        return True
    following = sentence[end : end + 80]
    if _DENIAL_BEHIND.match(following) or _BOUND_BEHIND.match(following):
        return True
    contrast = _CONTRAST.search(sentence[end : end + _AROUND])
    clause_start = max((m.end() for m in re.finditer(r"[.!?]\s", before)), default=0)
    return contrast is not None and _DISTANCE.search(before[clause_start:]) is not None


def is_aside(sentence: str, start: int) -> bool:
    """Whether a sentence mentions something only to compare with it, or as what others say."""
    return _ASIDE.search(sentence[max(0, start - _AROUND) : start]) is not None


def is_doubted(text: str, end: int) -> bool:
    """Whether a text asks for what it mentions up to `end`, and says no: "Paris? I doubt it."."""
    return _DOUBT.match(text[end : end + _AROUND]) is not None


def after_corrections(text: str, says_something: Callable[[str], bool]) -> str:
    """What a text says after it has taken back the rest, if it then says something."""
    for match in reversed(list(CORRECTION.finditer(text))[-_MOST_CORRECTIONS:]):
        if text[: match.start()].strip() and says_something(text[match.end() :]):
            return text[match.end() :]
    return text


def is_open(sentence: str, start: int, end: int, is_accepted: Callable[[str], bool]) -> bool:
    """
    Whether a sentence offers others beside what it mentions between `start` and `end`: "Paris or Rome", "Rome, Paris
    and London", "Paris/Rome".
    """
    before, after = sentence[max(0, start - _AROUND) : start], sentence[end : end + _AROUND]
    behind = _OR_BEHIND.match(after)
    if behind and not _REWORDING.match(behind["other"]) and not is_accepted(behind["other"]):
        return True
    if (behind := _AND_BEHIND.match(after)) and not is_accepted(behind["other"]):
        return True
    for pattern in (_OR_BEFORE, _AND_BEFORE):
        other = "".join(filter(None, match.groups())) if (match := pattern.search(before)) else ""
        if re.search(r"\w", other) and not _ends_accepted(other, is_accepted):
            return True
    if _LIST_BEHIND.match(after) or _LIST_BEFORE.search(before):
        return True
    if not re.search(r"\w", after) and (match := _WORDS_BEFORE.fullmatch(before)):
        return not _ends_accepted(match[1], is_accepted)
    alone = _NAME_BEFORE.fullmatch(before) if re.match(r"\W*$", after) else None
    return alone is not None and not _ends_accepted(alone[1], is_accepted)


def _ends_accepted(text: str, is_accepted: Callable[[str], bool]) -> bool:
    words = text.split()
    return any(is_accepted(" ".join(words[-k:])) for k in range(1, min(6, len(words)) + 1))


def offers_several(parts: Iterable[str], mentions: Callable[[str], bool]) -> bool:
    """Whether a text guesses more than once, and not always the same: "It may be Paris. It may be Rome."."""
    guesses = [part for part in parts if _POSSIBLY.search(part)]
    hedges = sum(len(_POSSIBLY.findall(part)) for part in guesses)
    return hedges > 1 and (len(guesses) == 1 or not all(mentions(part) for part in guesses))
