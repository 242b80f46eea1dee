# SPDX-License-Identifier: Apache-2.0
"""Statements in prose: whether a text affirms what it mentions, denies it, or leaves it open among alternatives."""

import re
from collections.abc import Callable
from typing import NamedTuple

from ..sentence.segmentation import RuleSegmenter
from .extraction import without_markdown


_segment = RuleSegmenter()
# Characters that are read of a sentence, and around a mention.
_LONGEST_SENTENCE, _AROUND = 600, 200
_LONGEST_LINE, _MOST_CORRECTIONS, _MOST_STATEMENTS = 1000, 5, 8
_NO_DENIAL = re.compile(
    r"\bnot (?:only|just|merely)|\bno (?:doubt|question)|\bwithout (?:a |any )?doubt|\b(?:none|nothing|no) (?:but"
    r"|other than)|\bdoubtless",
    re.IGNORECASE,
)
_DENIAL = re.compile(
    r"\b(?:not|never|no|none|neither|nor|cannot|without|isn't|(?:rul|exclud|eliminat|reject|discard|refus)(?:e[sd]?"
    r"|ed|s|ing)|(?:rather|other) than|instead of|except|unlike|far from|(?:incorrect|wrong|false|mistaken)(?:ly)?"
    r"|den(?:y|ies|ied)|anything but|opposed to|doubt(?:s|ed|ful)?|unlikely|hardly|nobody|unknown|gave up|considered"
    r"|replaced|assum(?:e|ing)|suppos(?:e|ing)|unwise|whether|(?:know|sure|see|check|say|confirm) if|nicht|kein\w*"
    r"|pas|niet|não)\b|n't\b|[不]",
    re.IGNORECASE,
)
_DENIAL_BEHIND = re.compile(
    r"\s*(?!<[\w-]+>)[<>≤≥]|[\"'*_)\s]*(?:'s\s+)?(?:\w+\s+(?!(?:are|were|did|do)(?:n't| not)))?(?:squared\b|cubed\b"
    r"|[+*^±]|/(?!\s?[a-z]{3})|(?:plus|minus|times|divided by|multiplied by|(?:more|less|fewer"
    r"|greater) than)\s+(?:[$€£]?\d|one|two)|(?:plus|minus|times) the\b|(?:\w+n't|cannot|(?:is|was|are|were|does|did"
    r"|do|has|can|could|will|would|should|must)\s+(?:not|never))\b(?! (?:only|just))|would (?:be"
    r"|have been)\b[^.]*\bif\b|ha[sd] nothing to do with\b|(?:is|was|are|were|seems|looks|(?:can|would"
    r"|must) be)\s+(?:\w+\s+){0,2}?(?:wrong|incorrect|false|mistaken|untrue|impossible|out\b|too \w+|a (?:bad|wrong"
    r"|poor|common) \w+|(?:a|the) (?:mistake|distractor|\w+ of a different)|excluded|eliminated|rejected)"
    r"|if\b[^.]*\botherwise\b|or\s+(?:more|less|fewer|\w+er)\b)",
    re.IGNORECASE,
)
# A bound is not a value, and "all but Paris" is not Paris.
_DENIAL_BEFORE = re.compile(
    r"(?:\b(?:less|more|\w+er)\s+(?:\w+\s+)?than|\bat\s+(?:most|least)"
    r"|(?<!add )(?<!adds )(?<!come )(?<!us )(?<!round )(?<!rounds )(?<!rounded )\bup\s+to|[<>≤≥]"
    r"|\\[lg]eq?)\s*[$€£¥(\\]*$|\b(?:twice|double|triple|half|root of|(?:square|cube|factorial|reciprocal|inverse"
    r"|multiple|factor|power|negative) of|close to|nearly|almost|over|above|below|under|exceeds|(?<!named )after"
    r"|before|since|until|prior to|page|step|chapter|figure|section|question|problem|part|line)\s+[$€£(]*$|\b(?:any"
    r"|every|all)(?:one|body|thing)? (?:but|except)\s+(?:the\s+)?$",
    re.IGNORECASE,
)
# "It is 42, but I can't tell."
_RETRACTED = re.compile(
    r"\b(?:but|yet|though) (?:i|we) (?:\w+ly )?(?:have no|can't|cannot|don't|do not|doubt)|\bnot (?:\w+ )?enough\b",
    re.IGNORECASE,
)
# Opinions of others, earlier beliefs, and mere reasons.
ATTRIBUTED = re.compile(
    r"\b(?:(?<!\bi )(?<!\bwe )(?<!'d )(?<!would )(?<!my )(?<!best )(?<!the )(?:say|think|believe|claim|guess|suggest"
    r"|expect)s?|(?<!is )(?<!are )(?<!ly )(?<!been )(?:said|thought|believed|claimed|told|expected)|according to"
    r"|(?:first|initial|common|naive|obvious) (?:guess|thought|idea|choice|mistake)|torn|tempt(?:ed|ing)|attributed"
    r"|credited|would(?: have|'ve)|at first|initially|seems|used to be|formerly|previously)\b|^\W*because\b",
    re.IGNORECASE,
)
_CONTRAST = re.compile(
    r"\b(?:now|today|nowadays|but|however|yet|actually|in (?:fact|reality)|the truth|instead|whereas|others?)\b",
    re.IGNORECASE,
)
# Retracts an earlier statement.
_CORRECTION = re.compile(
    r"(?:^|(?<=[.!?;:,\n—–(])|(?<=- ))\s*(?:(?:oh|hmm+|ah|uh|but|and|no|ok(?:ay)?|well|so)[,.!]* )*(?:wait\b|hold on"
    r"|oops|sorry|my (?:mistake|bad)|i (?:mean|meant|mis\w+)\b|(?:or )?rather,|make that|actually(?:,| (?=it|the|that"
    r"|i))|correction\b|(?:scratch|strike|forget) that|edit:|on (?:second thoughts?|reflection)|let me (?:re-?"
    r"|double.)?(?:check|think again|redo|compute|calculate|correct|try again|fix)|i (?:made|was) (?:an? )?(?:mistake"
    r"|error|wrong)|no, |that(?:'s| is| was| can't be) (?:wrong|incorrect|not right|right))",
    re.IGNORECASE,
)
_QUESTION = re.compile(
    r"\W*(?:(?:so|now|and|but),? )?(?:wh\w+|how|is|are|was|were|do|does|did|can|could|should|would|will)\b.*\?",
    re.IGNORECASE | re.DOTALL,
)
# "Answer" or "result" in languages that models slip into.
_ANSWER = r"(?:\b(?:antworte?n?|ergebnis|réponse|respuesta|resultado|resposta|ответ)|答案|答え)"
_LABEL = re.compile(
    rf"(?:^|(?<=[\s.:(*_]))answers?(?:\s*\([^()\n]{{0,40}}\))?(?: (?:is|are|below|here|choice))?\s*(?::|=>|->)\s*"
    rf"|{_ANSWER}\s*:\s*",
    re.IGNORECASE,
)
_SAID = re.compile(
    rf"\b(?:answers?|solutions?|options?|choices?|results?|responses?)\b(?:\s*\([^()\n]{{0,40}}\))?(?:\s+(?:to|for|of"
    rf"|in|that|which|we|you|i)\s+[^.:;=?\n]{{0,120}}?)?\s*,?\s*(?:=|\b(?:is|are|was|equals?|becomes|remains"
    r"|turns? out to be|comes? (?:out )?to(?: be)?|(?:must|should|would|could|might|may|can|will"
    r"|has to)\s+(?:\w+\s+)?be)\b|(?=\b(?:isn't|aren't|wasn't|can't|cannot|won't)\b))|\bI(?:'ll| will|'d)? (?:say"
    rf"|answer|choose|pick|go with|go for|settle on)\b|\bI'm going (?:with|for)\b|{_ANSWER}(?:\s+(?:final|finale"
    r"|correcta?))*\s*(?:\b(?:ist|lautet|est|es|é)\b|是|は)\s*:?\s*",
    re.IGNORECASE,
)
POSSIBLY = re.compile(
    r"\b(?:maybe|perhaps|possibly|might(?: also)? be|could(?: also)? be|may(?: also)? be|either)\b", re.IGNORECASE
)
MATH = re.compile(
    r"\$\$(?P<a>.+?)\$\$|\\\[(?P<b>.+?)\\\]|\\\((?P<c>.+?)\\\)|(?<![\\\w])\$(?P<d>[^$\n]+?)(?<!\\)\$(?!\d)", re.DOTALL
)
# The order of a list matters.
ORDERED = re.compile(
    r"(?<!any )(?<!particular )(?<!second-)\border(?:ed|ing)?\b(?! to | pair| triple)|\bsort(?:ed|ing)\b|\barrang"
    r"|\b(?:smallest|least|lowest|largest|greatest|highest) to\b",
    re.IGNORECASE,
)
# Placeholders for any accepted answer, and for "the answer is". Capital letters, as segmenters look for them.
MARK, LABEL = "Ꙭ", "Ꙛ"
# Capitalised at the start of a sentence, but not a name.
LEAD = (
    r"(?i:yes|no|not|neither|sure|well|so|ok|okay|oh|hmm|right|correct|absolutely|thus|hence|therefore|indeed|answer"
    r"|in|on|at|among|within|despite|by|for|from|of|to|after|before|behind|above|below|during|with|as|since|when"
    r"|while|although|if|because|it|its|this|that|these|those|he|his|she|her|they|their|there|here|i|my|we|you|your"
    r"|an?|let|note|first|given|based|step|solution|both|each|many|some|most|people|one|what|which|who|\w+(?:al"
    r"|[trsbde])ly)\b"
)
PROPER = r"[A-Z0-9][\w.'-]*(?:\s+(?:(?:of|the|de|la|da|von|van)\s+){0,2}[A-Z0-9][\w.'-]*){0,4}"
# End of a clause.
_BREAK = re.compile(
    r"(\s*(?:[;|)\]]|:(?!\d\d)|,(?!\d)|[—–]|\.\.\.|…|\s[->=]+(?=\s))\s*(?:and\s+)?|\s+[(\[]|\s+(?=(?:but|yet|so"
    r"|while|whereas|although|though|because(?! of)|since|if|unless|than|however|therefore|thus|hence|(?:after"
    rf"|before|without) \w+ing)\b)|(?<=[a-zꙬ)][.?!])\s+|\s+and\s+(?=(?:the )?(?:{MARK}|{PROPER}|it|he|she|they"
    rf"|its) (?!and\b|or\b|&)[a-z])|(?={LABEL}))"
)
_SUBORDINATE = re.compile(
    r"\W*(?:\w+ly )?(?:which|who|whose|whom|where|when|while|whereas|although|(?:even )?though|since(?! (?:then|\d))"
    r"|if|unless|than|until|as|after|before|because|whether|given(?! by)|(?!being\b)\w{2,}ing|followed|succeeded"
    r"|preceded|compared)\b",
    re.IGNORECASE,
)
# A main clause, although it begins like a subordinate one.
_RESULT = re.compile(
    r"\W*(?:(?:which|whose (?:\w+ ){0,2}(?:root|area|volume|sum|product|solution|value)) (?:is|are|equals|gives|makes"
    r"|means|comes|leaves|totals|adds|rounds)|\w+ing)\b"
)


class Clause(NamedTuple):
    """Span of a clause in a sentence, and the signs that open and close it."""

    start: int
    end: int
    opened: str
    closed: str

    def is_subordinate(self, sentence: str) -> bool:
        """Whether the clause is not a main clause."""
        begins = _SUBORDINATE.match(sentence[self.start : self.end])
        return begins is not None and (self.start > 0 or self.closed == ",")

    def is_aside(self, sentence: str) -> bool:
        """Whether the clause is in brackets, or is subordinate without stating a result."""
        text = sentence[self.start : self.end]
        if self.opened == "(":
            return re.match(r"or\b|maybe|perhaps|possibly", text) is None
        return self.is_subordinate(sentence) and not (self.start > 0 and _RESULT.match(text))


def clauses(sentence: str) -> list[Clause]:
    """Splits a sentence into clauses."""
    found, start, opened = [], 0, ""
    for match in (*_BREAK.finditer(sentence), None):
        end, sign = (match.start(), match[0].strip()) if match else (len(sentence), "")
        inside = sentence.rfind("(", 0, start) > sentence.rfind(")", 0, start)
        found.append(Clause(start, end, "(" if inside else opened, sign))
        start, opened = match.end() if match else end, sign
    return found


def formula(match: re.Match[str]) -> str:
    """Inner part of a match of [`MATH`]."""
    return match[match.lastgroup or 0].strip()


def sentences(text: str) -> list[str]:
    """Sentences of a text, except those that are only questions."""
    parts = (text[start:end].strip()[-_LONGEST_SENTENCE:] for start, end in _segment(text))
    return [part for part in parts if part and not _QUESTION.fullmatch(part)]


def is_denied(sentence: str, start: int, end: int) -> bool:
    """Whether a sentence denies its part between `start` and `end`, or mentions it as a bound."""
    before, after = sentence[max(0, start - _AROUND) : start], sentence[end : end + _AROUND]
    clause = _NO_DENIAL.sub(" ", before[max((m.end() for m in _BREAK.finditer(before)), default=0) :])
    if _DENIAL.search(clause) or _DENIAL_BEFORE.search(before) or _DENIAL_BEHIND.match(after[:80]):
        return True
    if _RETRACTED.search(before + after):
        return True
    whole = before[max((m.end() for m in re.finditer(r"[.!?]\s", before)), default=0) :]
    return _CONTRAST.search(after) is not None and ATTRIBUTED.search(whole) is not None


def after_corrections(text: str, says_something: Callable[[str], bool]) -> str:
    """The part of a text after its last correction, if that part says something."""
    for match in reversed(list(_CORRECTION.finditer(text))[-_MOST_CORRECTIONS:]):
        if text[: match.start()].strip() and says_something(text[match.end() :]):
            return text[match.end() :]
    return text


def _labels(text: str) -> list[tuple[int, int]]:
    """Spans of "the answer is" and "Answer:" in a text."""
    spans = sorted(match.span() for pattern in (_LABEL, _SAID) for match in pattern.finditer(text))
    return [
        (start, end) for start, end in spans if not (is_denied(text, start, end) or _DENIAL.search(text, start, end))
    ]


def said(text: str) -> list[str]:
    """Texts after each of the last "the answer is" and "Answer:", up to the end of the text; last one first."""
    text = without_markdown(text)
    ends = sorted({end for _, end in _labels(text)}, reverse=True)
    return [text[end:].strip() for end in ends[:_MOST_STATEMENTS]]


def mark_labels(text: str, mark: str) -> str:
    """Replaces each "the answer is" and "Answer:" of a text by a mark."""
    done = len(text)
    for start, end in reversed(_labels(text)):
        if end <= done:
            text, done = text[:start] + mark + text[end:].lstrip(), start
    return text


def first_line(rest: str) -> str:
    """The first sentence, or the block after a line break, including formulas of several lines."""
    rest = rest.lstrip(" \t:\n")[:_LONGEST_LINE]
    math = MATH.match(rest)
    start = math.end() if math else 0
    line = rest[start:].split("\n", 1)[0]
    return rest[:start] + next(iter(sentences(line)), line)
