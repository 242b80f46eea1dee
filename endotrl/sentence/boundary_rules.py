# SPDX-License-Identifier: Apache-2.0
"""Rule-based sentence segmentation of language model output: no model and no download."""

import re
from bisect import bisect_right


# Ends a sentence if followed by whitespace or the end of the line.
_SPACED = ".!?…"
# Ends a sentence whatever follows: CJK, Devanagari, Arabic, Urdu, Armenian, Ethiopic, Khmer, Burmese.
_UNSPACED = "。！？｡．।॥؟۔։።។။"
_CLOSERS = r"\"'”’»›)\]}」』）】〉》*_~`"
_OPENERS = r"\"'“‘„«‹(\[{「『（【〈《*_~`¿¡"

# Full stops, with closing characters: quotes and brackets, also of German (.“ .«) and French (! »), emphasis, and
# notes ([1], ²).
_MARK = re.compile(
    rf"(?P<stops>[{_SPACED}{_UNSPACED}]++)"
    rf"(?:[{_CLOSERS}¹²³⁰⁴-⁹]|\[\^?\d{{1,3}}\])*+(?:[“«](?=\s|$)|[ \u00a0\u202f]»(?!\w))?"
    r"|\n\s*+"
)
_SPACE = re.compile(r"\s*+")
_OPENING = re.compile(rf"[{_OPENERS}]*+")
# Including the letter before a single one: z. B., J. K.
_WORD_BEFORE = re.compile(r"(?:(?<![\w.])[^\W\d_]\.[ \u00a0\u202f](?=[^\W\d_]$))?[\w.'’-]+$")
_LETTERS = re.compile(r"(?:[^\W\d_]\.)*[^\W\d_]")
_WORD = re.compile(r"\w")
# Start of a list item: "- ", "1. ", "1.2. ", "(a) ", "iv) ", also in bold or as a heading.
_ITEM = re.compile(
    r"[#>*_ \t]{0,8}(?:[-*+•‣◦▪–]|\(?(?:\d{1,4}(?:\.\d{1,2}){0,3}|[A-Za-z]|[ivxIVX]{2,5})[.)．、])(?:[*_]{0,3})(?=\s)"
)
# A line that is a unit of its own, or starts one: heading, quote, table row, rule.
_BLOCK_LINE = re.compile(r"[ \t]*(?:#{1,6}\s|>|\||(?:[-*_][ \t\r]*){3,}$)", re.MULTILINE)

# Openers of spans in which no sentence ends. Escaped characters come first, so that
# `\$` and `\\[2pt]` open none.
_PROTECTED = re.compile(
    r"\\\\|\\\$|\\`"
    r"|(?P<fence>^[ \t>]*(?:(?:[-*+]|\d{1,4}[.)])[ \t]+)?(?P<ticks>`{3,}+(?=[^`\n]*$)|~{3,})[^\n]*)"
    r"|(?P<line>^[ \t]*(?:\|[^\n]*|\#{1,6}[ \t][^\n]{0,120}$))"  # table row or heading
    r"|(?P<url>(?:https?://|www\.)[^\s<>\"“”「」。！？]+)"
    r"|(?P<code>`+)"
    r"|(?P<display>\$\$|\\\[|\\\(|\\begin\{(?P<environment>[A-Za-z]+\*?)\})"
    r"|(?P<dollar>\$(?=\S))",
    re.MULTILINE,
)
_FENCE_END = {
    "`": re.compile(r"^[ \t>]*(`{3,})[ \t\r]*$", re.MULTILINE),
    "~": re.compile(r"^[ \t>]*(~{3,})[ \t\r]*$", re.MULTILINE),
}
_DISPLAY_END = {"$$": "$$", r"\[": r"\]", r"\(": r"\)"}
# Longer "formulas" are openers that were never closed. The bound keeps the search linear in the length of the text.
_LONGEST_FORMULA, _LONGEST_INLINE = 5000, 1000

# Words after which a full stop ends no sentence.
# Before a capitalised name: Dr. Li, but "one more rep. Then".
TITLES = frozenset(
    """
    adm brig capt cmdr col comdr cpl dr drs fr frau gen gov herr hon hr insp lt maj messrs mlle mm mme mr mrs ms mt mx
    prof pvt rep rev sen sgt sr sra srta st supt
    """.split()
)
# In the middle of a sentence.
INNER = frozenset(
    """
    approx bzw ca cf dept dist e.g eg engr esp est evtl ex ext ggf hrsg i.e ie incl inkl misc p.ex prop resp s.a d.h
    temp trans u.a univ v vgl viz vs z.b
    """.split()
)
# Before a number: No. 5, Fig. A2, Dec. 25, Li et al. (2020).
NUMBERED = frozenset(
    """
    abs al apr art aug ave bd bldg ch chap chr dec def eq eqs feb fig figs jan jul jun lem mar max min no nos nov nr
    num oct op p par para pp prop pt sec sect sep sept tab tel thm vol vols
    """.split()
)
# End a sentence if a capital letter follows.
AMBIGUOUS = frozenset(
    """
    a.m al am b.sc bros co corp etc inc jr ltd m.sc p.m ph.d pm sr usw
    """.split()
)
# After a letter with a dot, or several (J. R. R., U.S.), these start a sentence; other capitalised words count as a
# name.
STARTERS = frozenset(
    """
    a after all also although an and as at because before but by do each every finally first for from hence here how
    however i if in is it its let many most next no now of on one or our people she since so some that the their then
    there therefore these they this those though thus to we what when where which while who why with yes yet you your
    """.split()
)
# After a day's number and a dot: am 3. Mai.
MONTHS = frozenset(
    "januar jänner februar märz april mai juni juli "  # codespell:ignore
    "august september oktober november dezember".split()  # codespell:ignore
)


class RuleSegmenter:
    r"""
    Splits text into sentences by rules for language model output, in time linear in the length of the text.

    - Sentences end at `.`, `!`, `?` and `…` before whitespace, and at the full stops of other scripts (`。`, `！`,
      `？`, `।`, `؟`, `۔`, ...) anywhere; quotes, brackets and Markdown emphasis after them belong to the sentence.
    - Abbreviations (Dr., e.g., etc.), initials, decimals, ordinals, list numbers and ellipses do not end one.
    - A line ends a sentence, unless it looks wrapped. List items, headings and table rows are units.
    - A fenced code block is one unit. Nothing ends inside inline code, URLs, or LaTeX: `$...$`, `$$...$$`, `\(...\)`,
      `\[...\]`, `\begin{...}...\end{...}`.
    - Text without letters or digits (a rule, an emoji, a closing bracket) belongs to the sentence before it.

    Example:
    ```python
    >>> from endotrl.sentence import RuleSegmenter

    >>> text = "Dr. Li paid $3.50. Why? Nobody knows..."
    >>> [text[start:end] for start, end in RuleSegmenter()(text)]
    ['Dr. Li paid $3.50. ', 'Why? ', 'Nobody knows...']
    ```
    """

    def __call__(self, text: str) -> list[tuple[int, int]]:
        """
        Character spans `(start, end)` of the sentences, which tile the text; whitespace belongs to the sentence before
        it.
        """
        if not text:
            return []
        protected, fences = _protected_spans(text)
        starts = [0, *_sentence_starts(text, protected), len(text)]
        fence_starts = {start for start, _ in fences}
        cuts = sorted({*starts, *(cut for fence in fences for cut in fence)})
        spans: list[tuple[int, int]] = []
        pending = 0  # start of the next span: text without a word waits for the first span with one
        for start, end in zip(cuts, cuts[1:], strict=False):
            if start in fence_starts or _WORD.search(text, start, end):
                spans.append((pending, end))
            elif spans:
                spans[-1] = (spans[-1][0], end)
            else:
                continue
            pending = end
        return spans or [(0, len(text))]

    def __repr__(self) -> str:
        return "RuleSegmenter()"


def _protected_spans(text: str) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Spans in which no sentence ends, in order; and those of fenced code blocks, with the whitespace after them."""
    spans: list[tuple[int, int]] = []
    fences: list[tuple[int, int]] = []
    searched: dict[str, int] = {}  # closing of a formula -> there is none before this position
    position = 0
    while match := _PROTECTED.search(text, position):
        start, end = match.span()
        position = end
        kind = match.lastgroup  # the outermost
        if kind is None:  # an escaped character
            continue
        if kind == "fence":
            # An unclosed fence (the response was cut off) extends to the end.
            position = _fence_end(text, match["ticks"], end)
            first, next_start = _skip(_SPACE, text, start), _skip(_SPACE, text, position)
            fences.append((first, next_start))
            item = _ITEM.match(text, next_start)  # the dot of a list number ends nothing
            spans.append((start, item.end() if item else next_start))
            continue
        if kind == "url":
            position = start + len(match[0].rstrip(".,;:!?…)]}'\"*_~"))
        elif kind == "code":
            close = text.find(match[0], end, _line_end(text, end))
            if close < 0:
                continue
            position = close + len(match[0])
        elif kind == "display":
            environment = match["environment"]
            closing = f"\\end{{{environment}}}" if environment else _DISPLAY_END[match[0]]
            close = text.find(closing, max(end, searched.get(closing, 0)), end + _LONGEST_FORMULA)
            if close < 0:
                searched[closing] = end + _LONGEST_FORMULA - len(closing)
                continue
            position = close + len(closing)
        elif kind == "dollar":
            # Pandoc's rule, which distinguishes formulas from prices: no space inside the dollars, no digit after
            # them.
            close = text.find("$", end, _line_end(text, end))
            if close < 0 or text[close - 1].isspace() or text[close + 1 : close + 2].isdigit():
                continue
            position = close + 1
        spans.append((start, position))
    return spans, fences


def _fence_end(text: str, ticks: str, position: int) -> int:
    for match in _FENCE_END[ticks[0]].finditer(text, position):
        if len(match[1]) >= len(ticks):
            return min(match.end() + 1, len(text))
    return len(text)


def _skip(pattern: re.Pattern[str], text: str, position: int) -> int:
    """End of the match, possibly empty, of a pattern that matches everywhere, at a position."""
    match = pattern.match(text, position)
    assert match is not None
    return match.end()


def _line_end(text: str, position: int) -> int:
    """End of the line, or of the maximum length of an inline formula in it."""
    end = text.find("\n", position, position + _LONGEST_INLINE)
    return min(position + _LONGEST_INLINE, len(text)) if end < 0 else end


def _sentence_starts(text: str, protected: list[tuple[int, int]]) -> list[int]:
    """Positions at which a sentence starts, without the first, in order."""
    protected_starts = [start for start, _ in protected]
    starts: list[int] = []
    item = _ITEM.match(text, _skip(_SPACE, text, 0))
    item_end = item.end() if item else 0  # the dot of a list number ends nothing
    for mark in _MARK.finditer(text):
        index = bisect_right(protected_starts, mark.start()) - 1
        if (index >= 0 and mark.start() < protected[index][1]) or mark.start() < item_end:
            continue
        start = _line_break(text, mark) if mark[0][0] == "\n" else _full_stop(text, mark, starts[-1] if starts else 0)
        if start is None or start >= len(text):
            continue
        starts.append(start)
        item = _ITEM.match(text, start)
        item_end = item.end() if item else 0
    return starts


def _line_break(text: str, mark: re.Match[str]) -> int | None:
    """Start of the next sentence if a line break ends one, else `None`."""
    if mark[0].count("\n") > 1:
        return mark.end()
    line_start = text.rfind("\n", max(0, mark.start() - 200), mark.start()) + 1 or max(0, mark.start() - 200)
    line = text[line_start : mark.start()].rstrip().rstrip("\"'”’»)]*_")
    # Only the line's beginning shows whether it is a block; a longer line is prose.
    is_block = (line_start == 0 or text[line_start - 1] == "\n") and _BLOCK_LINE.match(text, line_start, mark.start())
    line_of_next = mark.start() + 1 + mark[0].rfind("\n")
    if is_block or _BLOCK_LINE.match(text, line_of_next) or _ITEM.match(text, mark.end()):
        return mark.end()
    if not line or line[-1] in f"{_SPACED}{_UNSPACED}:;：；":
        return mark.end()
    following = text[mark.end() : mark.end() + 2]
    # A wrapped line, or a formula set off from its sentence.
    wrapped = len(line) >= 60 and not _ITEM.match(text, line_start)
    if wrapped or following[:1].islower() or following in (r"\[", "$$", r"\b"):
        return None
    return mark.end()


def _full_stop(text: str, mark: re.Match[str], sentence_start: int) -> int | None:
    """Start of the next sentence if a punctuation mark ends one, else `None`."""
    stops, closed = mark["stops"], mark["stops"] != mark[0]
    start = _skip(_SPACE, text, mark.end())
    space = text[mark.end() : start]
    if any(stop in _UNSPACED for stop in stops):
        after = text[mark.end() : mark.end() + 1]
        # 「はい。」と言った
        inside = (stops == "．" and after.isdigit()) or (closed and after in ("と", "，", "、"))
        return None if inside or "\n" in space else start
    if not space or "\n" in space:  # inside a word; or the line break decides
        return None
    opened = _skip(_OPENING, text, start)
    following = text[opened : opened + 20]
    lower = following[:1].islower()
    if lower and (closed or stops.endswith(("...", "…"))):
        return None  # "Stop!" he said. Well... yes.
    if stops != ".":
        return start
    before = _WORD_BEFORE.search(text, max(sentence_start, mark.start() - 30), mark.start())
    if before is None or closed:
        return start
    written = "".join(before[0].split()).strip("'’-.")
    word = written.lower()
    if (
        word in INNER
        or (word in TITLES and written[:1].isupper())
        or (word in NUMBERED and re.match(r"[A-Z]?\d", following))
        or (word in AMBIGUOUS and lower)
    ):
        return None
    if word in AMBIGUOUS:
        return start
    if lower and ("." in word or word.isdigit()):  # a.b. next; 3. mai
        return None
    if len(word) == 1 and re.match(r"[^\W\d_]\.", following):  # z. B.
        return None
    next_word = re.split(r"\W", following, maxsplit=1)[0].lower()
    if _LETTERS.fullmatch(written) and ("." in written or written.isupper()) and word != "i":
        # Initials or U.S., unless the next word shows that the sentence ends.
        return start if next_word in STARTERS else None
    if word.isdigit() and len(word) <= 2 and next_word in MONTHS:
        return None
    return start
