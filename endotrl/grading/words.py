# SPDX-License-Identifier: Apache-2.0
"""
Answers in words, read clause by clause. A clause claims an accepted answer if that is alone in it, is its subject, or
follows its verb, with nothing beside it; it claims another answer if something else is in that position. The first
claim counts, unless a stronger one follows, or one that contradicts it ("but", "so").
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from .extraction import MONTHS, fold, plain_text, tidy, without_markdown
from .statements import (
    ATTRIBUTED,
    LABEL,
    LEAD,
    MARK,
    ORDERED,
    POSSIBLY,
    PROPER,
    after_corrections,
    clauses,
    is_denied,
    mark_labels,
    sentences,
)


# Form of another answer, to a question for a name and to one for another word.
_NAME = rf"(?:[Tt]he )?(?!{LEAD}|[Tt]he\b){PROPER}"
_TERM = rf"(?:(?:[Tt]he|[Aa]n?) )?(?!{LEAD})[\w-]+(?: [\w-]+)?"
_WHEN = rf"(?:(?:{'|'.join(MONTHS)}) \d{{1,2}}(?:,? \d{{4}})?|\d{{1,2}}(?:st|nd|rd|th) century)"
# An option, as written in the question.
OPTION = re.compile(r"^\W{0,3}(?P<letter>[A-J]|[a-j](?=\)))[).:]\s+(?!(?:or|and)\b|[/,])", re.MULTILINE)
_CHOICE = (
    r"(?:(?<![\w'\\$-])\(?(?:(?i:option|choice) \(?)?[A-J]\b\)?(?!['\w+#-])(?!(?<=[AI])\s+(?!or\b|and\b|is\b"
    r"|because\b|since\b|as\b)[a-z]))"
)
_TRUTH = r"(?i:\b(?:true|false)\b(?!\?))"
# "No idea" and "no such thing" answer nothing, nor does "Yes?".
_YES_NO = r"(?i:\b(?:yes|yeah|yep|true|false|nope|no(?! (?!it|he|she|they|the|because|since|as|in|but)[a-z]))\b(?!\?))"
_BE = (
    r"(?:\b(?:is|are|was|were|be|been|becam?e|becomes|remains|means|called|named|ist|sind|est|sont|es|è|é)\b"
    r"|(?i:(?<=\bit)|(?<=\bhe)|(?<=she)|(?<=hat)|(?<=this)|(?<=here)|(?<=name)|(?<=one))'s\b|(?<=\w)'(?:re|m)\b)"
)
_ADVERB = (
    r"(?:(?:\w+ly|not only|indeed|in fact|of course|also|just|now|still|always|often|perhaps|maybe|thus|so"
    r"|none other than|nothing (?:but|other than)|yes)\b,?\s*)*"
)
# Before the text proper: headings, tables, the language of a code block.
_ABOVE = re.compile(r"^#+ *([^\n]*?):?$(?=\s*[\w|])|^[ \t]*\|.*\|[ \t]*$(?=[\s\S]*[^|\s]\s*\Z)|^'''\w+$", re.MULTILINE)
_TURN = re.compile(
    r"\W*(?:(?:but|yet|so|however|therefore|thus|hence|actually|instead|now(?:adays)?|today|since then|finally|namely"
    r"|in (?:fact|truth|reality|the end|other words)|the truth is|(?:also )?(?:called|known as))\b[,:]?\s*"
    r"|i\.e\.,?\s*)+",
    re.IGNORECASE,
)
# After an answer: alternatives, or a remark that it is not the only one or the first.
_BESIDE = re.compile(
    r"(?:,? (?:perhaps|maybe|possibly))?\s*[,.]?\s*(?:(?i:or|and/or)\s+(?!(?:so|more|less|fewer|at least|rather"
    rf"|simply|just|about|as|in other words|better)\b)\S|/\s*\S|\bvs\.?\s|\?|(?:,\s*(?:[\w-]+ ?){{1,2}})*,?\s+(?:and"
    rf"|or|&)\s+(?:{_NAME}|(?:the )?[\w-]+\W*$)|(?:,\s*(?:[\w-]+ ?){{1,2}}){{2,}}(?:and (?:[\w-]+ ?){{1,2}})?(?:\W*$"
    r"|:))"
)
_LESS = re.compile(r" (?:is|was|are|were|only) (?!the only)(?:\w+ )?(?:also|only|another|second)\b")
# Not the answer itself: New York is not York, nor Jupiter's moon Jupiter, but the Nile River is the Nile.
_PART = re.compile(
    rf"\b(?:New|(?:North|South|East|West)\w*|Papua|Real|San|Santa|Los)[\s-]{MARK}|{MARK}'s\s+\w"
    rf"|{MARK}[^\S\n]+(?!(?:River|Desert|Ocean|Sea|City|Mountains?|Islands?|Republic|Empire|[IVX]+|Jr|Sr|Inc|Ltd|Corp"
    r"|The|It|He|She|This|That|[A-Z])\b)(?=[A-Z][a-z'-]+)"
)
_SAME = re.compile(
    rf"{MARK}(?:[*_]*\s*(?:,?\s*\b(?:or|and|aka|also known as|also called|i\.e\.)|[,(/=:-](?:or )?)\s*(?:the "
    rf"|an? )?[*_(]*{MARK}[*_)]*)+"
)
# After these words comes not the answer, but what it is compared with, comes after, or belongs to.
_GOVERNOR = re.compile(
    r"(?:\b(?:than|after|before|beyond|behind|near|like|unlike|around|about|over|under|between|among|against|without"
    r"|except|besides|despite|and|or|nor|whether|if|when|while|such as|until|since|then|(?:close|next"
    r"|second(?: only)?|similar|compared|prior|opposed|superior|inferior|according|lost|married|related|way"
    r"|attributed|connected) to)|(?<!\bgo )(?<!going )(?<!filled )(?<!made )\bwith|(?<!stands )\bfor"
    r"|(?<!comes )(?<!came )(?<!is )(?<!was )(?<!are )(?<!were )\bfrom|(?<!n )(?<!ed )(?<!\bit )\bas"
    r"|(?<!is )(?<!are )(?<!'m )(?<!am )(?<!was )(?<!were )\b(?!(?:being|meaning|choosing|saying"
    r"|picking)\b)\w{3,}ing)\s+$",
    re.IGNORECASE,
)
# "Made of it", and "Rome is the capital of it", but not "it is the capital of it".
_OF_IT = re.compile(
    r"(?:\b(?:consists?|made|composed|speaking|because|result|form|account|work|help)(?: \w+ly)?(?: out)?|\b(?:in"
    rf"|from|through|by(?= [\w ]+s of\b)) (?:the )?(?:[\w'-]+ ){{0,2}}[\w'-]+|\bout|^(?!\W*(?:it|he|she|that"
    rf"|this)\b).*{_BE}\s+{_ADVERB}(?:the|an?|another)\s+(?:[\w'-]+\s+){{1,4}}?)\s*of\s+$",
    re.IGNORECASE,
)
# "Venus, by contrast, is", "Connally, who": a subject with more to follow.
_GOES_ON = re.compile(r",\s(?:who|whose|which)\b|,\s(?!(?:but|so|not)\b)[a-z][^,;.]*,\s(?!(?:but|so|not)\b)[a-z]")
_COMPLEMENT = re.compile(rf"(?<=\w)\s*{_BE}\s+{_ADVERB}(?:(?:[a-z-]+\s+){{0,4}}by\s+)?")


class _Claim(NamedTuple):
    """
    Whether a clause gives an accepted answer or another one, with a weight: 0 for reported opinions, 1 for a plain
    statement, 2 for a predicate ("it is ..."), 3 for an answer marked as such; its subject (empty if the answer stands
    alone), and whether it contradicts what comes before.
    """

    right: bool
    weight: int
    subject: str = ""
    turns: bool = False


def states_words(text: str, answers: Sequence[str]) -> bool:
    """Whether a text states one of the accepted answers."""
    text = _with_labels(text)
    # "Yen" is a word, not a name, if the text also writes "yen".
    words = [a for a in answers if any(m[0] == a.lower() != a for m in _pattern(a).finditer(text))]
    text = _with_marks(text, answers)
    if all(re.fullmatch(_WHEN, answer) for answer in answers):
        return _decides(re.sub(r"(?<=\d), (?=\d{4}\b)", " ", text), _WHEN)
    return _decides(text, _NAME if not words and re.search("[A-Z0-9]", "".join(answers)) else _TERM)


def states_choice(text: str, letter: str) -> bool:
    """Whether a text chooses the option with this letter."""
    text = without_markdown(text)
    text = _with_labels(OPTION.sub(lambda m: m["letter"].upper() + "; ", text))
    text = re.sub(rf"(?:\A|{LABEL})\W*[a-j]\W*\Z", lambda m: m[0].upper(), text)
    text = re.sub(r"\b([A-J])\. (?=[A-Z])", r"\1; ", text)
    return _decides(re.sub(_CHOICE, lambda m: MARK if letter in m[0] else m[0], text), _CHOICE)


def states_truth(text: str, word: str) -> bool:
    """Whether a text says yes or no, true or false, in agreement with `word`."""
    text = re.sub(
        r"(?i)\b(?:not|isn't|wasn't|(?:no|any)thing but) (?:really )?(true|false)\b",
        lambda m: "false" if m[1].casefold() == "true" else "true",
        _with_labels(text),
    )
    words = _TRUTH if word in ("true", "false") else _YES_NO
    means = word in ("yes", "true")
    text = re.sub(
        words, lambda m: MARK if (m[0].casefold() in ("yes", "yeah", "yep", "true")) is means else m[0], text
    )
    return _decides(text, words)


def _with_labels(text: str) -> str:
    text = text.translate(dict.fromkeys(map(ord, MARK + LABEL), " "))
    text = _ABOVE.sub(lambda m: m[1] + ":" if m[1] and "nswer" in m[1] else "", text)
    return mark_labels(plain_text(text), f" {LABEL} ")


def _decides(text: str, other: str) -> bool:
    if other not in (_NAME, _TERM) and re.fullmatch(rf"(?=.*{other})(?:\W*(?:{MARK}|{other}|and\b)){{2,}}\W*", text):
        return False
    text = after_corrections(text, lambda rest: re.search(rf"[A-Z0-9]\w|\bis\b|{MARK}|{other}", rest) is not None)
    best: _Claim | None = None
    for claim in _claims(text, other):
        if best is None or claim.weight > best.weight or claim.turns:
            best = claim
        elif claim.right != best.right and claim.weight == best.weight != 1 and claim.subject == best.subject:
            best = best._replace(right=False)
    return best is not None and best.right


def _claims(text: str, other: str) -> list[_Claim]:
    claims: list[_Claim] = []
    for sentence in sentences(text):
        sentence = re.sub(r"^\W*\d{1,2}[.)]\s+", "", sentence)
        turns = False
        for part in clauses(sentence):
            if part.is_subordinate(sentence):
                continue
            start, end, opened, closed = part
            before, clause, after = sentence[:start], sentence[start:end], sentence[end:]
            turn = _TURN.match(clause)
            turns = turns or turn is not None
            called = clause.lstrip().startswith(LABEL)
            skipped = clause.index(LABEL) + 1 if called else turn.end() if turn else 0
            opens = turns or opened == "" or POSSIBLY.match(clause) is not None
            claim = _claim(before + clause[:skipped], clause[skipped:], after, other, opened, closed, opens)
            if ATTRIBUTED.search(clause):
                claim = (claim or _Claim(False, 0))._replace(weight=0)
            if claim is not None:
                weight = 3 if called and claim.weight else claim.weight
                claims.append(claim._replace(weight=weight, turns=turns and weight > 0))
                turns = False
    return claims


def _claim(before: str, clause: str, after: str, other: str, opened: str, closed: str, opens: bool) -> _Claim | None:
    """The claim of a clause between `before` and `after`, opened and closed by these signs."""
    sentence, position = before + clause + after, len(before)
    for mention in (*re.finditer(MARK, clause), *(re.finditer(other, clause) if other == _WHEN else ())):
        left, right = clause[: mention.start()], clause[mention.end() :]
        governed = re.sub(rf"(?:(?:the|an?)\s+)?{_ADVERB}$", "", left, flags=re.IGNORECASE)
        if (
            is_denied(sentence, position + mention.start(), position + mention.end())
            or _GOVERNOR.search(governed)
            or (re.search(r"\bof\s+$", governed) and not _OF_IT.search(governed))
            or (not left.strip() and re.fullmatch(rf"\W*{_ADVERB}(?:\w+ )?{other}\s+and\s+", before))
        ):
            continue
        if _BESIDE.match(right + after) or _LESS.match(right):
            return _Claim(False, 1)
        verb = re.match(rf"(.*?)\s*{_BE}", left)
        strong = (
            verb
            or other == _WHEN
            or re.match(rf"\s*{_BE}", right)
            or (len(left.split()) <= 2 and not re.match(r"\W*\w", right))
        ) and not (closed == ":" or (not left.strip() and _GOES_ON.match(after)))
        subject = verb[1] if verb else left if other == _WHEN else ""
        return _Claim(mention[0] == MARK, 2 if strong else 1, subject.strip().casefold())
    if opened == "(" or _LESS.search(clause):
        return None
    if (
        opens
        and closed not in (":", "and", "!", "=")
        and re.fullmatch(rf"\W*{_ADVERB}(?:(?:in|by|on) )?{other}\.?\s*", clause)
    ):
        listed = re.compile(rf"(?:\s*,\s*{other})*,?\s+and\s+{other}\s+[a-z]")
        weak = closed == "(" or (closed == "," and clause.startswith("The ")) or _GOES_ON.match(after)
        return _Claim(False, 1 if weak or listed.match(after) else 2)
    complement = re.compile(rf"(?:the )?{other}" + r"\W*$" * (other == _TERM))
    for verb in _COMPLEMENT.finditer(clause):
        if complement.match(clause, verb.end()):
            return _Claim(False, 2, clause[: verb.start()].strip().casefold())
    told = re.match(
        rf"\W*{_ADVERB}{other}(?=\s+(?:({_BE}\s+(?:the|its|right|correct)\b)|(?!of\b|and\b|or\b)[a-z']))", clause
    )
    if told is None or is_denied(sentence, position, position + told.end()) or other == _TERM:
        return None
    truth = other in (_YES_NO, _TRUTH)
    return _Claim(False, 2 if told[1] or truth else 1, "" if truth else "-")


def _with_marks(text: str, answers: Sequence[str]) -> str:
    text = re.sub(r'(?<!\d)"', "", fold(text))
    for answer in sorted(answers, key=len, reverse=True):
        text = _in_any_order(answer, _pattern(answer).sub(MARK, text))
    return _PART.sub(" ", _SAME.sub(MARK, text))


def _in_any_order(answer: str, text: str) -> str:
    """A text with the members of a list marked, whatever their order."""
    items = re.split(r"\s*[,;]\s*(?:and\s+)?|\s+and\s+|\s+&\s+", fold(tidy(answer)).strip(" ."))
    if len(items) < 2 or ORDERED.search(text) or not all(re.fullmatch(r"[^\W\d][\w' -]*", item) for item in items):
        return text
    item = "(?:the )?(?:" + "|".join(map(re.escape, items)) + r")(?: [-–(:][^\n]*$)?"
    listed = re.compile(
        rf"\b{item}(?:(?:\s*[,;/\n]\s*(?:and\s+|\d[.)] *)?|\s+and\s+|\s+&\s+){item}){{{len(items) - 1}}}(?!\w)",
        re.IGNORECASE | re.MULTILINE,
    )
    return listed.sub(lambda m: MARK if all(i.casefold() in m[0].casefold() for i in items) else m[0], text)


@lru_cache(maxsize=1024)
def _pattern(answer: str) -> re.Pattern[str]:
    answer = re.sub(r"^(?:the|an?)\s+(?=\w)", "", fold(tidy(answer)).strip().rstrip(".").strip(), flags=re.IGNORECASE)
    # Everest matches Mount Everest, the Pacific matches the Pacific Ocean.
    mount = r"(?:(?:Mount|Mt\.?) )?" if re.match(r"(?:Mount|Mt\.?) ", answer) else ""
    answer = re.sub(r"^(?:Mount|Mt\.?) (?=[A-Z])|(?<=\w) (?:Ocean|River|Desert)$", "", answer)
    words = re.findall(r"\w+", answer)
    if not words or re.search(r"[^\w\s.,'()/:!?&-]", answer):
        return re.compile(rf"(?<!\w){re.escape(answer)}(?!\w)", re.IGNORECASE) if answer else re.compile("(?!)")
    if len(words) == 1 and answer.isupper() and len(answer) <= 4 and answer.isalpha():
        # "US" matches "U.S.", but not "us".
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
