# SPDX-License-Identifier: Apache-2.0
"""
Answers of words, read clause by clause. A clause claims the accepted answer if that stands alone in it, is its
subject, or is what its verb leads to, and nothing else stands beside it; it claims another one if something else stands
there alone or is said to be what is asked. What counts is the first claim, unless a stronger one follows, or one that
turns against it ("but", "so").
"""

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from .spelling import fold, plain_text, tidy
from .statements import POSSIBLY, after_corrections, is_denied, mark_labels, sentences


# Stand in a text for whatever is accepted, and for "the answer is". Capital letters, as segmenters look for.
_MARK, _LABEL = "Ꙭ", "Ꙛ"
# Capitalised at the start of a sentence, and no name.
_LEAD = (
    r"(?i:yes|no|not|neither|sure|well|so|ok|okay|oh|hmm|right|of|certainly|thus|hence|therefore|indeed|answer|let"
    r"|absolutely|correct|in|on|at|by|for|from|after|before|during|with|as|since|when|while|although|if|because|it"
    r"|this|that|these|those|he|she|they|there|here|i|we|you|to|an?|note|first|finally|given|based|according|step"
    r"|solution|explanation|reasoning|its|his|her|their|my|your|both|each|many|some|most|people|one|of|what|which"
    r"|who|\w+(?:al|[trsbde])ly)\b"
)
_PROPER = r"[A-Z0-9][\w.'-]*(?:\s+(?:(?:of|the|de|la|da|von|van)\s+){0,2}[A-Z0-9][\w.'-]*){0,4}"
_NAME = rf"(?:[Tt]he )?(?!{_LEAD}|[Tt]he\b){_PROPER}"
# What stands for an answer in lower case.
_TERM = rf"(?:(?:[Tt]he|[Aa]n?) )?(?!{_LEAD})[\w-]+(?: [\w-]+)?"
_BE = r"(?:\b(?:is|are|was|were|be|been|becam?e|becomes|remains|means|called|named|ist|sind|est|sont|es|è|é)\b|(?<=\w)'(?:s|re|m)\b)"
_ADVERB = (
    r"(?:(?:\w+ly|not only|indeed|in fact|of course|also|just|now|still|always|often|perhaps|maybe|thus|so"
    r"|none other than|nothing (?:but|other than)|nobody but|well|yes|no doubt)\b,?\s*)*"
)
_THE = r"(?:(?:[Tt]he|[Aa]n?)\s+)?"
_BREAK = re.compile(
    r"\s*(?:[;:|)\]]|,(?!\d)|[—–]|\.\.\.|…|\s[->=]+(?=\s))\s*(?:and\s+)?|\s+[(\[]|\s+(?=(?:but|yet|so|while|whereas"
    r"|although|though|because|since|if|unless|than|however|therefore|thus|hence|(?:after|before|without) \w+ing)\b)|(?<=[a-z)][.?!])\s+|\s+and\s+(?=(?:the )?(?:"
    rf"{_MARK}|{_PROPER}|it|he|she|they|its) (?!and\b|or\b|&)[a-z])|(?={_LABEL})"
)
_TURN = re.compile(
    r"\W*(?:(?:but|yet|so|however|therefore|thus|hence|actually|instead|now(?:adays)?|today|since then|finally|namely|in (?:fact|truth"
    r"|reality|the end|other words)|the truth is|(?:also )?(?:called|known as))\b[,:]?\s*|i\.e\.,?\s*)+",
    re.IGNORECASE,
)
_SUBORDINATE = re.compile(
    r"\W*(?:\w+ly )?(?:which|who|whose|whom|where|when|while|whereas|although|(?:even )?though|since(?! (?:then|\d))|if|unless|than|until|as"
    r"|after|before|whether|(?!being\b)\w{2,}ing|followed|succeeded|preceded|compared)\b",
    re.IGNORECASE,
)
# What others say, or was thought before.
_ATTRIBUTED = re.compile(
    r"\b(?:(?<!\bi )(?<!\bwe )(?<!'d )(?<!would )(?<!my )(?<!the )(?:say|think|believe|claim|guess|assume|answer|insist|suggest|expect"
    r"|call|write)s?|(?<!is )(?<!are )(?<!ly )(?<!been )(?:said|thought|believed|claimed|guessed|assumed|insisted|told"
    r"|expected)|according to|(?:first|initial|common|naive|obvious) (?:guess|thought|idea|choice|instinct|mistake)|tempted"
    r"|attributed|credited|would(?: have|'ve)|(?:could|might) (?:\w+ )?(?:argue|think|guess|say)|at first|initially|seems"
    r"|used to be|formerly|previously|torn)\b",
    re.IGNORECASE,
)
_RETRACTED = re.compile(
    r"\W*(?:but |though )?(?:i (?:believe|think) )?(?:that|it|this|he|she|they|which)(?:'s| is| was| are| were)\s+(?:\w+ )?"
    r"(?:an? |the )?(?:common )?(?:wrong|incorrect|mistaken|mistakes?|errors?|false|misconception|untrue|not (?:right"
    r"|true))\b",
    re.IGNORECASE,
)
# Behind an answer: others beside it, or that it is only one of several.
_LEFT_OPEN = re.compile(
    r"(?:,? (?:perhaps|maybe|possibly))?\s*[,.]?\s*(?:(?i:or|and/or)\s+(?!(?:so|more|less|fewer|at least|rather|simply"
    r"|just|about|as|in other words|better)\b)\S|/\s*\S|\bvs\.?\s|\?|(?:,\s*(?:[\w-]+ ?){1,2})*,?\s+(?:and|or|&)\s+"
    rf"(?:{_NAME}|(?:the )?[\w-]+\W*$)|(?:,\s*(?:[\w-]+ ?){{1,2}}){{2,}}\W*$)|\s+(?:is|was|are|were|comes?|came|only|would be)\s+(?:\w+\s+)?"
    r"(?:also|too|merely|only|another|second|next|later|even|one (?:possibility|option|candidate)|the (?:runner|second))\b"
)
# Behind a name, what kind of thing it is.
_KIND = (
    r"(?:River|Desert|Ocean|Sea|City|Mountains?|Islands?|Republic|Empire|Kingdom|Province|County|State|Lake|Canal"
    r"|Valley|Peninsula|Bonaparte|[IVX]+|Jr|Sr|The|It|He|She|This|That|[A-Z])\b"
)
# Not the answer itself: New York is not York, and Jupiter's moon is not Jupiter.
_PART = re.compile(
    r"\b(?:(?:New|North|South|East|West|North(?:east|west)|South(?:east|west)|(?:North|South|East|West)ern|Papua|Real"
    rf"|San|Santa|Los|Equatorial|Upper|Lower|Inner|Outer|Anti|Non)[\s-]{_MARK}|{_MARK}'s\s+\w"
    rf"|{_MARK}[^\S\n]+(?!{_KIND})(?=[A-Z][a-z'-]+))"
)
_SAME = re.compile(
    rf"{_MARK}(?:[*_]*\s*(?:,?\s*\b(?:or|and|aka|also known as|also called|i\.e\.)|[,(/=:-](?:or )?)\s*(?:the |an? )?[*_(]*"
    rf"{_MARK}[*_)]*)+"
)
# Words that no answer follows, but what one is compared with, comes after, or belongs to.
_GOVERNOR = re.compile(
    r"(?:\b(?:than|after|before|beyond|behind|near|like|unlike|around|about|over|above|below|under|between|among"
    r"|against|without|except|besides|despite|and|or|nor|whether|if|when|while|such as|via|till|until|since|then|where|who"
    r"|which|because)|(?<!\bgo )(?<!\bgoing )(?<!filled )(?<!starts )(?<!begins )(?<!ends )(?<!made )\bwith|(?<!stands )"
    r"(?<!going )\bfor|(?<!comes )(?<!came )(?<!is )(?<!was )(?<!are )(?<!were )\bfrom|\b(?:close|next|second(?: only)?|similar"
    r"|compared|prior|adjacent|opposite|opposed|akin|superior|inferior|equivalent|thanks|according|heir|lost|married"
    r"|related|due|way|attributed) to|(?<!known )\bas"
    r"|(?<!is )(?<!are )(?<!'m )(?<!am )(?<!was )(?<!were )\b(?!(?:being|meaning|choosing|saying|picking)\b)\w{3,}ing)\s+$",
    re.IGNORECASE,
)
_OF = re.compile(rf"\bof\s+$", re.IGNORECASE)
_OF_IT = re.compile(
    rf"(?:\b(?:consists?|made|composed|speaking)(?: \w+ly)?|{_BE}\s+{_ADVERB}(?:the|another)\s+(?:[\w'-]+\s+){{1,4}}?)\s*of\s+$",
    re.IGNORECASE,
)
_DESCRIBED = re.compile(rf"(?<=\w)\s*{_BE}\s+{_ADVERB}(?:(?:[a-z-]+\s+){{0,4}}by\s+)?")
_ITEM = re.compile(r"^\W*\d{1,2}[.)]\s+")
_PRONOUNS = ("it", "that", "this", "he", "she", "the answer")


_ASIDE = re.compile(rf"(?<=\w)\s*\([^(){_MARK}]*\)")
_TABLE = re.compile(
    r"\A\s*\|.*\|[^\S\n]*\n\s*\|[\s:|-]+\|[^\S\n]*\n|^[^\S\n]*\|.*\|(?=[^|\n]+\|[^\S\n]*$)|\|[^\S\n]*$", re.MULTILINE
)


class _Claim(NamedTuple):
    """
    An answer that a clause gives: whether it is an accepted one, of what (empty if it stands alone), whether the clause
    turns against what comes before, and its weight: 0 of what others say, 1 of what is told, 2 of what something is
    said to be, 3 of what is called the answer.
    """

    right: bool
    weight: int
    turns: bool
    subject: str


def states_words(text: str, answers: Sequence[str]) -> bool:
    """Whether a text states one of the accepted answers."""
    text = _with_marks(
        mark_labels(plain_text(text.translate({ord(_MARK): " ", ord(_LABEL): " "})), f" {_LABEL} "), answers
    )
    text = after_corrections(text, lambda rest: re.search(rf"[A-Z0-9]\w|\bis\b|{_MARK}", rest) is not None)
    other = _NAME if any(re.search("[A-Z0-9]", answer) for answer in answers) else _TERM
    claims: list[_Claim] = []
    for sentence in sentences(text):
        _read(_ITEM.sub("", sentence), other, claims)
    best: _Claim | None = None
    for claim in claims:
        if best is None or claim.weight > best.weight or claim.weight == 3:
            best = claim
        elif claim.turns and claim.weight and best.weight < 3:
            best = claim
        elif claim.right != best.right and claim.weight == best.weight != 1 and claim.subject == best.subject:
            return False
    return best is not None and best.right


def _read(sentence: str, other: str, claims: list[_Claim]) -> None:
    """Adds the claims of a sentence."""
    breaks = [m.span() for m in _BREAK.finditer(sentence)]
    starts, ends = [0, *(end for _, end in breaks)], [*(start for start, _ in breaks), len(sentence)]
    before, turns, unreal = "", False, False
    for start, end, following in zip(starts, ends, [*starts[1:], len(sentence)], strict=True):
        clause, before, behind = sentence[start:end], sentence[:start].rstrip()[-1:], sentence[end:following].strip()
        if not re.search(r"\w", clause):
            continue
        if _RETRACTED.match(clause) and claims:
            claims.pop()
            continue
        if _SUBORDINATE.match(clause) and (start or behind[:1] == ","):
            unreal = unreal or re.match(r"\W*if\b", clause, re.IGNORECASE) is not None
            continue
        turn = _TURN.match(clause)
        turns = turns or turn is not None
        begin = start + (turn.end() if turn else 0)
        if not re.search(r"\w", sentence[begin:end]):
            continue
        labelled = clause.lstrip().startswith(_LABEL)
        claim = _claim(
            sentence,
            start + clause.index(_LABEL) + 1 if labelled else begin,
            end,
            other,
            _LABEL if labelled else before,
            behind,
        )
        if _ATTRIBUTED.search(clause) or (unreal and " would " in clause) or clause.lstrip().startswith("because"):
            claim = (claim or _Claim(False, 0, False, ""))._replace(weight=0)
        if claim is not None:
            weight = 3 if labelled and claim.weight else claim.weight
            claims.append(claim._replace(weight=weight, turns=turns or (before == ":" and not claim.subject)))
            turns = False


def _claim(sentence: str, start: int, end: int, other: str, before: str, behind: str) -> _Claim | None:
    clause = sentence[start:end]
    for mention in re.finditer(_MARK, clause):
        left, right = clause[: mention.start()], clause[mention.end() :]
        if is_denied(sentence, start + mention.start(), start + mention.end()):
            continue
        governed = re.sub(rf"{_THE}{_ADVERB}$", "", left)
        if _GOVERNOR.search(governed) or (_OF.search(governed) and not _OF_IT.search(governed)):
            continue
        if _LEFT_OPEN.match(sentence[start + mention.end() :]):
            return _Claim(False, 1, False, "")
        verb = re.search(rf"(?P<subject>.*?)\s*{_BE}", left)
        if before == "(" and (left.strip() or right.strip()):
            return None
        alone = len(left.split()) <= 2 and not re.match(r"\W*\w", right)
        return _Claim(
            True,
            2 if verb or alone or re.match(rf"\s*{_BE}", right) else 1,
            False,
            _subject(verb["subject"] if verb else ""),
        )
    if before == "(":
        return None
    complement = rf"(?:the )?{other}" + ("" if other == _NAME else r"\W*$")
    if (
        (not start or before in (":", _LABEL, ".") or POSSIBLY.match(clause.lstrip()))
        and behind not in (":", "and", "!", "=")
        and re.fullmatch(rf"\W*{_ADVERB}(?:(?:in|by|on) )?{other}\.?\s*", clause)
    ):
        found = _Claim(False, 1 if clause.startswith("The ") and behind == "," else 2, False, "")
    elif described := next((m for m in _DESCRIBED.finditer(clause) if re.match(complement, clause[m.end() :])), None):
        found = _Claim(False, 2, False, _subject(clause[: described.start()]))
    elif told := re.match(rf"\W*{_ADVERB}{other}\s+(?:(?P<the>{_BE}\s+(?:the|its)\b)|(?!of\b|and\b|or\b)[a-z'])", clause):
        if not told["the"] and other is _TERM:
            return None
        found = _Claim(False, 2 if told["the"] else 1, False, "-")
    else:
        return None
    return None if is_denied(sentence, start, end) else found


def _subject(text: str) -> str:
    subject = " ".join(text.casefold().split())
    return "" if subject in _PRONOUNS else subject


def _with_marks(text: str, answers: Sequence[str]) -> str:
    text = _TABLE.sub("", fold(text)).replace('"', "")
    for answer in sorted(answers, key=len, reverse=True):
        text = _in_any_order(answer, _pattern(answer).sub(_MARK, text))
    return _ASIDE.sub("", _PART.sub(" ", _SAME.sub(_MARK, text)))


def _in_any_order(answer: str, text: str) -> str:
    """A text in which the members of a list are marked, in whatever order they are."""
    items = re.split(r"\s*[,;]\s*(?:and\s+)?|\s+and\s+|\s+&\s+", fold(tidy(answer)).strip(" ."))
    if len(items) < 2 or not all(re.fullmatch(r"[^\W\d][\w' -]*", item) for item in items):
        return text
    item = "(?:the )?(?:" + "|".join(map(re.escape, items)) + ")"
    listed = re.compile(
        rf"\b{item}(?:(?:\s*[,;/\n]\s*(?:and\s+|\d[.)] *)?|\s+and\s+|\s+&\s+){item}){{{len(items) - 1}}}\b",
        re.IGNORECASE,
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
