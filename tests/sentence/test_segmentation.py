# SPDX-License-Identifier: Apache-2.0
import pickle
import sys
import time
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from endotrl.sentence import RuleSegmenter, SatSegmenter, load_segmenter
from endotrl.sentence.segmentation import align, check_tiling


def split(text: str) -> list[str]:
    """Sentences without the whitespace around them."""
    return [text[start:end].strip() for start, end in RuleSegmenter()(text)]


# Each case is written as its sentences; the text is what joins them.
PROSE = [
    ["It rains.", "We stay home!", "Why not?", "No reason"],
    ["Dr. Smith met Mrs. Jones at 5 p.m. on Dec. 5.", "They left."],
    ["J. K. Rowling wrote it.", "So did George R. R. Martin."],
    ["Plan B. failed, e.g. in Fig. 3, No. 5 and approx. five others.", "No.", "That is wrong."],
    ["He moved to the U.S. in 1999.", "It cost $3.50, i.e. 2.5% of it.", "See v1.2.3 of app.py."],
    ["One more rep.", "Then rest.", "I like art.", "You do not."],
    ["Apples, pears, etc. are fruit.", "We sell apples, pears, etc.", "Nobody buys them."],
    ['"Really?" he asked.', '"Yes."', '"Stop!" she said.', "(They left.)", "He stayed."],
    ["Well... maybe.", "Well…", "Then again no."],
    ["i like it.", "it is good.", "what?", "ok"],
    ["See https://example.com/a.b?c=d. ", "And www.example.org/x.y, too."],
    ["It is I.", "Not you.", "Option A.", "The end."],
    ["We pay $5.", "You pay $10.", "They pay nothing."],
    ["Am 3. mai war es.", "Danach z.B. nicht."],
    ["Wait?!", "What!!", "Really."],
    ["Great.", "🎉 It works.", "Next one! 😀😀"],
    ["J.R.R. Tolkien met the U.S. Army in Washington, D.C. in 1944.", "It was in the U.S.", "Then he left."],
    ["Smith et al. (2019) say so, as Li et al. 2020 and Fig. A1 do.", "See Eq. (3)."],
    ["Bob a.k.a. Rob takes i.i.d. samples w.r.t. $x$.", "He ends."],
    ["So it is.[1]", "And so.[2][3]", "That too.²", "Done [4]."],
    ["Am 3. Mai 2020 kam er, d. h. spät.", "Es war z. B. gut.", "Er war 5.", "„Ja.“", "»Nein.«", "„Gut.“ sagte er."],
    ["« Bonjour ! » dit-il.", "« Oui. »", "Elle rit."],
    # Delimiters that are not closed, or escaped, protect nothing.
    [r"Pay \$5.", "Then $6.", r"Then \[ never closed.", "Then `this.", "End"],
    [],
]


@pytest.mark.parametrize("sentences", PROSE, ids=lambda sentences: "".join(sentences[:1]))
def test_prose(sentences):
    assert split(" ".join(sentences)) == [sentence.strip() for sentence in sentences]


# These scripts need no space between sentences.
@pytest.mark.parametrize(
    "sentences",
    [
        ["我喜欢你。", "你呢？", "好的！", "“真的吗？”", "他说「行。」", "完"],
        ["今日は３．５度です。", "寒い！", "「はい。」と言った。", "「いいえ。」、「はい。」と。"],
        ["هل هذا صحيح؟", "نعم۔", "لا"],
        ["यह वाक्य है।", "दूसरा वाक्य॥", "तीसरा"],
        ["Բարև։", "Այո։"],
    ],
    ids=["zh", "ja", "ar", "hi", "hy"],
)
@pytest.mark.parametrize("space", ["", " "])
def test_scripts(sentences, space):
    assert split(space.join(sentences)) == sentences


# Lines that are units; a tuple is one unit of several lines.
MARKDOWN = [
    ["# Title", "A sentence.", "", "Another"],
    ["1. First.", "2. **Second.**", "(a) Third", "iv) Fourth.", "- fifth", "* sixth"],
    [("| a | b. c |", "|---|---|"), "| 1. D | 2 |", "| 3 | 4 |", "After."],
    ["Code:", ("```python", "x = 1.  # Dot. Dot", "", "y = 2", "```"), "Done."],
    ["Code:", ("~~~", "```", "a. B", "```", "~~~"), "Done."],
    ["Cut off:", ("```", "x = 1.", "", "Y = 2. Z")],
    [("> quoted", "---"), "- a", "- b", ""],
    [("We have", r"\[ x = 1. Y = 2. \]", "where y."), "So z."],
    [("A line that somebody has wrapped at about seventy characters, as in", "London mails"), "", "New paragraph"],
    [("A wrapped", "line.")],
    ["# 1. Title. More", "## 1.2. Section", "Text.", "1.1. Sub", "1.2. Sub"],
    ["1. Run:", ("```bash", "   ls. A", "", "   cd ..", "   ```"), "2. Stop.", "Now."],
    [("1. ```bash", "   ls. A", "   ```"), ("2. ```bash", "   cd", "   ```"), ("- ```", "x", "```"), "End."],
    ["```x = 1. Y``` is code.", "Next."],
    ["", ("```", "x", "```"), "", ("~~~", "y", "~~~"), "", "1. One."],
]


@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("units", MARKDOWN, ids=str)
def test_markdown(units, newline):
    text = newline.join(newline.join(unit) if isinstance(unit, tuple) else unit for unit in units)
    assert split(text) == [unit if isinstance(unit, str) else newline.join(unit) for unit in units if unit]


@pytest.mark.parametrize(
    "whole",
    [
        "Let $a = 1. B$ and `c. D` and ``e. ` F`` be",
        r"Let \(a. B\) and $$c. D$$ and \[e. F\] be",
        r"Let \begin{align*} a. B \\[2pt] c. D \end{align*} be",
        "1. ",
        "a.b.c",
        "word",
        "...",
        "😀 😀! 😀",
        "  \n ",
    ],
)
def test_one_sentence(whole):
    assert RuleSegmenter()(whole) == [(0, len(whole))]


# Characters that the rules look at, so that they meet in every order.
SIGNS = " \n\r\t.!?…。؟।\"'()[]{}*_`~$\\#|>-1aBI😀é़"
STRINGS = ["```", "\n\n", "\\[", "\\]", "www.", "\\begin{a}", "\n- ```", ". . .", "[1]"]
RULE_TEXT = st.lists(st.sampled_from([*SIGNS, *STRINGS])).map("".join)


@given(st.one_of(st.text(), RULE_TEXT))
@settings(max_examples=400, deadline=None)
def test_spans_always_tile(text):
    check_tiling(text, RuleSegmenter()(text))


PLAIN = [". ", ".", " ", " .", '."', "a. (((", "A. ", "J. ", ".[1]", "http://"]
MARKED = ["$a", "\\[", "`", "` ", "``` a\n", "\\begin{a}", "\n> ", "| a |\n", "* ", "\n- ```", "\n# a. "]


@pytest.mark.parametrize("pattern", [*PLAIN, *MARKED])
def test_linear_time(pattern):
    # A quadratic rule needs minutes for so long a text, a linear one a second.
    text = pattern * (200_000 // len(pattern))
    start = time.process_time()
    check_tiling(text, RuleSegmenter()(text))
    assert time.process_time() - start < 10


def test_sat_says_what_to_install(monkeypatch):
    monkeypatch.setattr("endotrl.sentence.segmentation.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"endotrl\[sat\]"):
        load_segmenter("sat-3l")


def test_sat_segments_are_placed_in_the_text(monkeypatch):
    class SaT:
        """Splits as wtpsplit does: whitespace is kept behind sentences, but line breaks are dropped."""

        def __init__(self, name: str, **kwargs: object) -> None:
            self.name, self.kwargs = name, kwargs

        def split(self, text: str) -> list[str]:
            assert (self.name, self.kwargs) == ("sat-3l-sm", {"language": "en"})
            return ["this is one ", "this is two", "", "three"]

    module = types.ModuleType("wtpsplit")
    module.SaT = SaT
    monkeypatch.setitem(sys.modules, "wtpsplit", module)
    monkeypatch.setattr("endotrl.sentence.segmentation.find_spec", lambda name: True)
    segmenter = SatSegmenter("sat-3l-sm", language="en")
    text = "this is one this is two\n\nthree\n"
    spans = segmenter(text)
    check_tiling(text, spans)
    assert [text[start:end] for start, end in spans] == ["this is one ", "this is two\n\n", "three\n"]
    assert pickle.loads(pickle.dumps(segmenter))._sat is None


def test_align_refuses_another_text():
    with pytest.raises(ValueError, match="continues differently from character 2"):
        align("a b c", ["a ", "c"])
    with pytest.raises(ValueError, match="left out the text from character 1"):
        align("a b", ["a"])
    assert align("  ", []) == [(0, 2)]
    assert align(" a", ["a"]) == [(0, 2)]


@pytest.mark.parametrize("spans", [[(0, 2)], [(0, 1), (2, 3)], [(0, 2), (1, 3)], [(1, 3)], [(0, 3), (3, 3)], []])
def test_check_tiling(spans):
    with pytest.raises(ValueError, match="do not tile"):
        check_tiling("abc", spans)
