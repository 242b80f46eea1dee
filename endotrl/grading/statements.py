# SPDX-License-Identifier: Apache-2.0
"""Whether a text says something of what it mentions: affirms it, denies it, or leaves it open among others."""

import re
from collections.abc import Callable

from ..sentence.segmentation import RuleSegmenter
from .spelling import without_markdown


_segment = RuleSegmenter()
# Characters of a sentence, and of what stands around a mention, that are read.
_LONGEST_SENTENCE, _AROUND = 600, 200
_LONGEST_LINE, _MOST_CORRECTIONS, _MOST_STATEMENTS = 1000, 5, 8
# Where a statement ends within a sentence.
_BOUNDARY = re.compile(
    r"[,;:()\[\]—–\n]|\s-\s|[.!?]\s|\b(?:but|however|although|though|while|whereas|instead(?! of)|rather(?! than)|so"
    r"|because|since|yet|and)\b",
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
    r"|anything but|opposed to|doubt(?:s|ed|ful)?|unlikely|hardly)\b|n't\b",
    re.IGNORECASE,
)
_DENIAL_BEHIND = re.compile(
    r"^\s*[<>≤≥]|^[\"'*_)\s]*(?:'s\s+)?(?:\w+\s+)?(?:(?:is|was|are|were|does|did|do|has|had|can|could|would|will"
    r"|should|must|may|might)(?:n't\b|\s+not\b|\s+never\b|not\b)(?!\s+(?:only|just))|ha[sd] nothing to do with\b"
    r"|if\b[^.]*\botherwise\b|(?:is|was|are|were|seems|looks|sounds|would be|must be)\s+(?:\w+\s+){0,2}?(?:wrong"
    r"|incorrect|false|ruled out|mistaken|untrue|impossible|out\b|too (?:large|small|big|high|low)|eliminated"
    r"|excluded|a (?:common )?(?:mistake|misconception|trap))|(?:can|could|may|might|should|must) be (?:ruled out"
    r"|excluded|eliminated|discarded|rejected)|(?:\w+\s+)?or\s+(?:more|less|fewer|greater|higher|lower|larger"
    r"|smaller)\b)",
    re.IGNORECASE,
)
# A bound is no value, and "all but Paris" is not Paris.
_DENIAL_BEFORE = re.compile(
    r"(?:\b(?:less|more|greater|fewer|larger|smaller|higher|lower|bigger|older|younger|longer"
    r"|shorter)\s+than(?:\s+or\s+equal\s+to)?|\bat\s+(?:most|least)|\bup\s+to|[<>≤≥]|\\[lg]eq?)\s*[$€£¥(\\]*$"
    r"|\b(?:any|every|all)(?:one|body|thing)?\s+(?:but|except)\s+(?:the\s+)?$",
    re.IGNORECASE,
)
_DISTANCE = re.compile(
    r"\b(?:(?:might|may|could|would)\s+(?:\w+\s+)?(?:guess|think|say|said|assume|expect|believe|answer)|(?:thought"
    r"|assumed|believed|guessed|expected|claimed|tempt(?:ed|ing)|attributed|credited)|(?:first|initial|common|naive"
    r"|obvious)\s+(?:guess|thought|answer|mistake|choice)|(?:many|some|most|people|others|every(?:one"
    r"|body))\s+(?:people\s+)?(?:\w+ly\s+|always\s+)?(?:thinks?|says?|believes?|claims?|answers?|guess(?:es)?"
    r"|assumes?|expects?)|at first|it (?:seems|looks|looked|appears)|commonly (?:mistaken|confused)|going to say"
    r"|used to be|formerly|previously|was once)\b",
    re.IGNORECASE,
)
_CONTRAST = re.compile(
    r"\b(?:but|however|yet|actually|in fact|in reality|the truth|instead|whereas)\b(?=[^.]*\b(?:is|was|are|it's|be"
    r"|say|think|answer|moved|correct|right|became|not)\b)|\bothers?\b",
    re.IGNORECASE,
)
# What takes back what was said before.
CORRECTION = re.compile(
    r"(?:^|(?<=[.!?;:,\n—–])|(?<=\.\.)|(?<=- ))\s*(?:oh,? |hmm,? |oops,? |sorry,? |but )?(?:no,? )?(?:wait\b"
    r"|actually,|actually (?=it|the|that|i)|correction\b|scratch that|on second thoughts?|on reflection"
    r"|let me (?:re-?|double.)?(?:check|think again|redo|recompute|recalculate|correct)|i (?:made|was) (?:a "
    r"|an )?(?:mistake|error|wrong)|that(?:'s| is| was) (?:wrong|incorrect|not right)|no, )",
    re.IGNORECASE,
)
_QUESTION = re.compile(
    r"^\W*(?:so,? |now,? |and |but )?(?:what|which|who|whom|whose|where|when|why|how|is|are|was|were|do|does|did|can"
    r"|could|should|would|will|tell me|name the|the question (?:asks|is)|(?:we|you) (?:are|were) asked|i (?:am"
    r"|was) asked|question\s*:|q\s*:)\b",
    re.IGNORECASE,
)
_KIND = (
    r"(?:final|correct|right|best|overall|actual|true|real|my|our|your|numerical|exact|possible|likely|desired"
    r"|required|proper|only|valid|complete|short)"
)
_LABEL = re.compile(
    rf"(?:^|(?<=[\s.:(*_]))(?:{_KIND}\s+)*answers?(?:\s*\([^()\n]{{0,40}}\))?"
    r"(?:\s+(?:is|are|below|here|choice))?\s*:\s*",
    re.IGNORECASE,
)
_SAID = re.compile(
    rf"\b(?:{_KIND}\s+)*(?:answers?|solutions?|options?|choices?|results?|responses?)\b(?:\s*\([^()\n]{{0,40}}\))?"
    r"(?:\s+(?:to|for|of|in|that|which|we|you|i)\s+[^.:;=?\n]{0,120}?)?\s*,?\s*"
    r"(?:=|\b(?:(?:is|are|was|equals?|becomes|remains)\b|turns? out to be\b|comes? out to(?: be)?\b|comes? to\b"
    r"|(?:must|should|would|could|might|may|can|will|has to|have to|ought "
    r"to)\s+(?:\w+\s+)?be\b)|(?=\b(?:isn't|aren't|wasn't|can't|cannot|won't)\b))"
    r"(?:\s+(?:therefore|thus|then|hence|simply|just|clearly|indeed|definitely|certainly|now|also|equal to|given "
    r"by|going to be))*"
    r"\s*:?\s*",
    re.IGNORECASE,
)
MATH = re.compile(
    r"\$\$(?P<a>.+?)\$\$|\\\[(?P<b>.+?)\\\]|\\\((?P<c>.+?)\\\)|(?<![\\\w])\$(?P<d>[^$\n]+?)(?<!\\)\$(?!\d)", re.DOTALL
)


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
    """Whether a sentence denies what it mentions between `start` and `end`, or has it as a bound."""
    before, after = sentence[max(0, start - _AROUND) : start], sentence[end : end + _AROUND]
    clause = _NO_DENIAL.sub(" ", before[max((m.end() for m in _BOUNDARY.finditer(before)), default=0) :])
    if _DENIAL.search(clause) or _DENIAL_BEFORE.search(before) or _DENIAL_BEHIND.match(after[:80]):
        return True
    whole = before[max((m.end() for m in re.finditer(r"[.!?]\s", before)), default=0) :]
    return _CONTRAST.search(after) is not None and _DISTANCE.search(whole) is not None


def after_corrections(text: str, says_something: Callable[[str], bool]) -> str:
    """What a text says after it has taken back the rest, if it then says something."""
    for match in reversed(list(CORRECTION.finditer(text))[-_MOST_CORRECTIONS:]):
        if text[: match.start()].strip() and says_something(text[match.end() :]):
            return text[match.end() :]
    return text


def said(text: str) -> list[str]:
    """What follows each of the last "the answer is" and "Answer:", to the end of the text; the last first."""
    text = without_markdown(text)
    matches = (match for pattern in (_LABEL, _SAID) for match in pattern.finditer(text))
    ends = {match.end() for match in matches if not is_denied(text, *match.span())}
    return [text[end:].strip() for end in sorted(ends, reverse=True)[:_MOST_STATEMENTS]]


def first_line(rest: str) -> str:
    """The first sentence, or the block behind a line break, formulas with several lines included."""
    rest = rest.lstrip(" \t:\n")[:_LONGEST_LINE]
    math = MATH.match(rest)
    if math is not None:
        formula, behind = rest[: math.end()], rest[math.end() :]
        return formula if behind[:1] in "\n" else formula + (sentences(behind) or [""])[0]
    line = rest.split("\n", 1)[0]
    parts = sentences(line)
    return parts[0] if parts else line
