# SPDX-License-Identifier: Apache-2.0
import html
import io
import itertools
import math
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup
from rich.cells import cell_len
from rich.console import Console

from endotrl.reporting import (
    HeatMapRow,
    curves,
    figure,
    heat_maps,
    number,
    page,
    sparkline,
    table,
    terminal_heat_map,
    terminal_table,
    terminal_text,
)
from endotrl.reporting.heat_map import OPACITY, STEPS, ColorScale, legend, token_heat_map


NASTY = [
    "<script>alert(1)</script>",
    "</style></title><script>alert(1)</script>",
    '" onmouseover="alert(1)" x="',
    "' onfocus='alert(1)",
    "<img src=x onerror=alert(1)>",
    "&lt;b&gt; &amp; &#60;script&#62;",
    "{{ 7 * 7 }} {% raw %} {title} %s",
    "[bold red]markup[/bold red] [link=http://example.com]x[/link] [/]",
    "\x1b[31mred\x1b[0m \x1b]8;;http://example.com\x07link\x1b]8;;\x07 \x9b31m \x07\x08\x00",
    "\u202eevil\u202c \u2066isolate\u2069 \u200bzero\u200b \ufeff \u2028line\u2029",
    "مرحبا بالعالم שלום",
    "👩‍👩‍👧 🇫🇷 é e\u0301 \U0001f9d1🏽",
    "\ud800 lone surrogate",
    "a\r\nb\tc\n",
    "",
]
PNG = b"\x89PNG\r\n\x1a\n" + bytes(16)  # a narrow one


class Document(HTMLParser):
    """What a browser would make of a page: its tags, attributes and text."""

    VOID = ("meta", "img", "br", "hr", "link", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, f"left open: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def spans(text: str) -> list[tuple[int, int]]:
    """One token a character."""
    return [(i, i + 1) for i in range(len(text))]


def heat(text, offsets, rewards, limit=1.0, meta="", unit="token", **row):
    row = HeatMapRow(text, offsets, rewards, total=None, **row)
    return token_heat_map(row, ColorScale(limit), meta, unit)


class TestPage:
    def test_nothing_is_loaded_or_run(self):
        blocks = [table(["a"], [[1]]), legend(ColorScale(1.0), "nats"), figure(PNG, "One pixel")]
        document = Document(page("Title", [("Section", Markup("").join(blocks))], lead="Lead", footer="Footer"))
        tags = [tag for tag, _ in document.tags]
        assert not {"script", "link", "iframe", "object", "embed", "form", "base"} & set(tags)
        for tag, attributes in document.tags:
            assert not any(name.startswith("on") for name in attributes)
            for name in ("src", "href", "srcset", "action"):
                assert (attributes.get(name) or "data:image/png;base64,").startswith("data:image/png;base64,"), tag
        assert "url(" not in document.text and "@import" not in document.text  # the text of <style> is in it
        policy = next(a["content"] for _, a in document.tags if a.get("http-equiv") == "Content-Security-Policy")
        assert "default-src 'none'" in policy and "script-src" not in policy and "http" not in policy

    @pytest.mark.parametrize("nasty", NASTY)
    def test_text_stays_text(self, nasty):
        sections = [
            (nasty, heat(nasty, spans(nasty), [0.5] * len(nasty), prompt=nasty, meta=nasty)),
            ("", nasty),
            ("x", table([nasty], [[nasty]], caption=nasty)),
            ("", figure(PNG, nasty)),
        ]
        written = page(nasty, sections, lead=nasty, footer=nasty)
        written.encode("utf-8")  # no surrogate is left
        document = Document(written)
        empty = page("", [("", heat("", [], []))])
        allowed = {tag for tag, _ in Document(empty).tags} | set(
            "header h1 h2 footer section p div span i bdi".split()
        )
        allowed |= set("table thead tbody tr th td caption figure figcaption img".split())
        assert {tag for tag, _ in document.tags} <= allowed
        names = {name for _, attributes in document.tags for name in attributes}
        assert not any(name.startswith("on") for name in names) and "style" not in names
        # No character that acts on its surroundings is left, not even as a reference.
        acting = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2028-\u202e\u2066-\u2069\ufeff]"
        assert not re.search(acting, html.unescape(written))

    def test_a_string_is_text_and_markup_is_kept(self):
        text = page("T", [("", "<b>a</b>"), ("", Markup("<b>b</b>"))])
        assert "<p>&lt;b&gt;a&lt;/b&gt;</p>" in text and "<b>b</b>" in text
        assert type(text) is str  # a Markup would escape what its user appends


class TestTokenHeatMap:
    def test_every_token_has_its_numbers(self):
        columns = {"log-prob": [-2.0, -0.5, -0.125], "soft value": [10.0, 9.25, 8.75]}
        offsets = [(0, 2), (2, 6), (6, 16)]
        block = heat("Hi you<|im_end|>", offsets, [-1.25, 0.0, 7.5], 5.0, columns=columns, eos=True)
        tips = [a["data-tip"] for _, a in Document(block).tags if "data-tip" in a]
        assert tips == [
            "token 1  “Hi”\ncontribution −1.250 · log-prob −2.000 · soft value 10.000",
            "token 2  “ you”\ncontribution 0.000 · log-prob −0.500 · soft value 9.250",
            "token 3  “<|im_end|>”\ncontribution +7.500 · log-prob −0.125 · soft value 8.750",
        ]
        classes = [a["class"].split() for _, a in Document(block).tags if "data-tip" in a]
        assert classes == [["t", "n2"], ["t"], ["t", "p8", "eos"]]
        assert Document(block).text == "Hi youEOS"

    def test_extremes_stand_below_in_words(self):
        text = "one two\nthree four five six seven eight"
        tokens = [(m.start(), m.end()) for m in re.finditer(r"\s?\S+", text)]
        rewards = [-1.0, -9.0, -8.0, math.nan, -0.5, 0.25, 2.0, 1.0]
        block = heat(text, tokens, rewards, 5.0)
        assert len(rewards) == 8 and "Lowest" not in block  # seven have a reward: seen at a glance
        rewards[3] = 0.0
        document = Document(heat(text, tokens, rewards, 5.0))
        assert document.text.endswith(
            "Lowest: “two” −9.00, “↵three” −8.00, “one” −1.00. Highest: “seven” +2.00, “eight” +1.00, “six” +0.25."
        )
        assert sum(tag == "bdi" for tag, _ in document.tags) == 6  # a number beside Arabic stays as it is

    @pytest.mark.parametrize(
        ("text", "offsets", "shown"),
        [
            # White space, a character that is hidden, and one whose first token is only a part of it.
            ("a\n\n  \t 9\u200bé", [(0, 1), (1, 3), (3, 6), (6, 9), (9, 9), (9, 10)], "a↵\n↵\n··→\t 9U+200B▯é"),
            # Joiners are shown only when alone.
            ("👩\u200d👧", [(0, 3)], "👩\u200d👧"),
            ("👩\u200d👧", spans("👩\u200d👧"), "👩U+200D👧"),
        ],
    )
    def test_text_as_shown(self, text, offsets, shown):
        document = Document(heat(text, offsets, [1.0] * len(offsets)))
        assert document.text == shown
        assert next(a for _, a in document.tags if a.get("class") == "tokens")["dir"] == "auto"  # for Arabic

    def test_text_that_is_not_scored_has_no_colour(self):
        document = Document(heat("call 42 done!", [(0, 4), (7, 12)], [1.0, 1.0]))
        assert document.text == "call 42 done!"
        assert [a["class"] for tag, a in document.tags if tag == "span"] == ["t p8", "gap", "t p8", "gap"]


class TestHeatMaps:
    def test_the_sum_is_stated(self):
        rows = [
            HeatMapRow("ab", spans("ab"), [-2.0, -0.5], total=-2.5, meta="line 1"),
            HeatMapRow("a", spans("a"), [-1.0], total=9.0, rest={"V of the prompt": 10.0}, details=Markup("<p>D</p>")),
            HeatMapRow("a", spans("a"), [math.nan], total=None),
        ]
        document = Document(heat_maps(rows))
        for shown in (
            "line 1 · reward −2.500 · 2 tokens",
            "reward 9.000 = 1 token −1.000 + V of the prompt 10.000",
            "no reward · 1 token",
        ):
            assert shown in document.text
        assert document.text.endswith("no reward · 1 tokena") and "aD" in document.text
        tips = [a["data-tip"] for _, a in document.tags if "data-tip" in a]
        assert tips[0] == "token 1  “a”\ncontribution −2.000"
        classes = [a["class"] for _, a in document.tags if "data-tip" in a]
        assert classes == ["t n8", "t n2", "t n4", "t bad"]  # one scale, to −2

    def test_another_sum_is_refused(self):
        rows = [HeatMapRow("ab", spans("ab"), [-2.0, -0.5], total=-2.7)]
        with pytest.raises(ValueError, match="they sum to -2.5, and its reward is -2.7"):
            heat_maps(rows)

    def test_shares_of_a_mean_keep_their_digits(self):
        text = heat_maps([HeatMapRow("ab", spans("ab"), [-0.00123, -0.00045], total=-0.00168)])
        assert "contribution −0.001230" in text and "contribution −0.000450" in text


class TestColorScale:
    @pytest.mark.parametrize(
        ("values", "sides", "shown", "shades"),
        [
            ([-4.0, 0.0], "below", "≤ −4.00.0neutral at 0.0.", STEPS + 1),
            ([0.0, 2.0], "above", "0.0≥ +2.0neutral at 0.0.", STEPS + 1),
            ([-4.0, 2.0], "both", "≤ −4.0≥ +4.0neutral", 2 * STEPS + 1),
        ],
    )
    def test_numbers_of_one_sign_have_a_sequential_scale(self, values, sides, shown, shades):
        scale = ColorScale.of([values])
        assert scale.sides == sides
        document = Document(legend(scale, "nats"))
        assert shown in document.text and [tag for tag, _ in document.tags].count("i") == shades

    def test_shades_are_symmetric_about_the_center(self):
        scale = ColorScale(limit=4.0, center=1.0)
        assert [scale.shade(1.0 + d) for d in (-100, -4, -2, -0.2, 0, 0.2, 2, 4, math.inf)] == [
            "n8", "n8", "n4", "", "", "", "p4", "p8", "p8",
        ]  # fmt: skip
        assert scale.shade(math.nan) == "bad"

    def test_few_extreme_tokens_do_not_set_the_scale(self):
        assert ColorScale.of([[float(i) for i in range(100)], [1e6]]).limit == 95.0
        assert ColorScale.of([[4.0, -1.0]], center=1.0) == ColorScale(3.0, 1.0)
        assert ColorScale.of([[0.0], [], [math.nan]]) == ColorScale(1.0)  # nothing to scale by

    def test_text_has_contrast_on_every_shade_in_both_modes(self):
        """WCAG 2: at least 4.5 to 1, computed from the colours of the style sheet."""

        def luminance(rgb):
            linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (x / 255 for x in rgb)]
            return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

        def contrast(a, b):
            high, low = sorted((luminance(a), luminance(b)), reverse=True)
            return (high + 0.05) / (low + 0.05)

        modes = re.findall(r":root \{(.*?)\}", page("", []), re.DOTALL)
        assert len(modes) == 2
        for mode in modes:
            colors = {k: [int(v[i : i + 2], 16) for i in (0, 2, 4)] for k, v in re.findall(r"--(\w+): #(\w{6})", mode)}
            overlays = {k: list(map(int, v.split())) for k, v in re.findall(r"--(pos|neg): ([\d ]+);", mode)}
            for overlay, step in itertools.product(overlays.values(), range(STEPS + 1)):
                opacity = OPACITY * step / STEPS
                shade = [opacity * o + (1 - opacity) * p for o, p in zip(overlay, colors["paper"], strict=True)]
                assert contrast(colors["text"], shade) >= 4.5
            for paper in ("paper", "card"):
                assert contrast(colors["soft"], colors[paper]) >= 4.5


class TestBlocks:
    def test_table_and_figure(self):
        block = table(["name", "value"], [["a", 0.12345], ["b", None], [Markup("<b>c</b>"), -2]], caption="Values")
        assert "<caption><span>Values</span></caption>" in block and "<td><b>c</b></td>" in block
        assert re.findall(r'<td class="r">(.*?)</td>', block) == ["0.123", "–", "-2"]
        assert 'alt="A &amp; B"' in figure(PNG, caption="A & B")

    def test_number(self):
        values = [None, 1.0, -0.0004, -12.3456, math.nan, -math.inf]
        assert list(map(number, values)) == ["–", "1.000", "0.000", "−12.346", "nan", "−inf"]


class TestTerminal:
    def render(self, renderable, width=80):
        console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
        console.print(renderable)
        return console.file.getvalue()

    @pytest.mark.parametrize("width", [40, 80, 120])
    def test_fits_the_width(self, width):
        rows = [[i, -123.456789, 512, -0.25, "word " * 50] for i in range(3)] + [[99, None, None, None, "人" * 99]]
        lines = self.render(terminal_table(["line", "reward", "tokens", "per token", "completion"], rows), width)
        assert max(cell_len(line) for line in lines.splitlines()) <= width
        if width >= 80:
            assert "−123.457" in lines and "…" in lines

    @pytest.mark.parametrize("nasty", NASTY)
    def test_text_cannot_steer_the_terminal(self, nasty):
        written = self.render(terminal_table([nasty, "b"], [[nasty, nasty]], title=nasty), width=200)
        body = written.replace("\n", "")
        assert not re.search("[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]", body)

    def test_rich_markup_is_text(self):
        assert "[bold red]x[/bold red] [/]" in self.render(terminal_table(["a"], [["[bold red]x[/bold red] [/]"]]))

    @given(st.text(alphabet=st.characters(codec=None)))
    def test_one_clean_line(self, text):
        clean = terminal_text(text)
        assert all(c.isspace() or c.isprintable() for c in clean)
        assert len(clean) <= 300 and "\n" not in clean and "\x1b" not in clean
        assert terminal_text(clean) == clean

    def test_escape_sequences_go_as_a_whole(self):
        assert terminal_text("\x1b[1;31mred\x1b[0m \x1b]0;title\x07x\x1b]8;;u\x1b\\y\x1b(Bz\ra") == "red xyza"


def test_sparkline() -> None:
    assert sparkline([0.0, 1.0, 2.0, 7.0]) == "▁▂▃█"
    assert sparkline([1.0, 1.0]) == "▁▁" and sparkline([]) == ""
    assert sparkline([0.0, float("nan"), 7.0]) == "▁·█"
    assert sparkline([0.0, 0.0, 7.0, 7.0, 3.0, 3.0], width=3) == "▁█▄"


def test_curves() -> None:
    svg = curves({"<a>": [(0, 1.0), (5, float("nan")), (10, 3.0)], "empty": []})
    # From the lower left to the upper right, with a margin of 6 in 480 by 110.
    assert '<polyline points="6.0,104.0 474.0,6.0"' in svg and svg.count("<polyline") == 1
    assert "&lt;a&gt; (1 to 3)" in svg and "<a>" not in svg and "step 0 to 10" in svg
    assert curves({"empty": []}) == "" and "<circle" in curves({"one": [(1, 2.0)]})


def test_a_heat_map_in_a_terminal() -> None:
    rows = [
        HeatMapRow("A cat\x1b[2J", [(0, 1), (1, 5), (5, 9)], [-0.5, -4.0, 0.0], total=-4.5, prompt="Say\nit"),
        HeatMapRow("No", [(0, 2), (2, 2)], [1.0, 2.0], total=3.0, eos=True),
    ]
    text = terminal_heat_map(rows)
    assert text.plain == (
        "  Say↵it\n  A cat\n    reward −4.5 nats; lowest: “cat” −4.0\n"
        "  No EOS\n    reward +3.0 nats; lowest: “No” +1.0\n"
    )
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    # The strongest orange: 255 + 0.75 (224 - 255), and so on; an eighth of the scale's limit for the other token.
    assert styles[" cat"] == "black on rgb(232,139,71)"
    assert styles["A"] == "black on rgb(252,240,232)"
