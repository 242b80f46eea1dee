# SPDX-License-Identifier: Apache-2.0
"""Self-contained HTML pages, tables and figures."""

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from markupsafe import Markup

from .heat_map import SHADES
from .text import cell_text, is_number, plain


_STYLE, _BLOCKS = (
    files(__package__).joinpath(f"{name}.css").read_text(encoding="utf-8") for name in ("style", "blocks")
)
# Light in any notebook theme, which no media query can detect: the colours of the first rule of the page.
_CELL = f".endotrl {{{_STYLE.split('{', 1)[1].split('}', 1)[0]} color-scheme: light; color: var(--text); \
background: var(--paper); padding: .2rem .8rem; max-width: 58rem;\n{_BLOCKS}{SHADES}\n}}"
_PAGE = Markup("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
img-src data:; {scripts}base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<header><h1>{title}</h1>{lead}</header>
<main>
{body}
</main>
{footer}
{script}</body>
</html>
""")
_SCRIPT = '<script type="application/json" id="data">{data}</script>\n<script>{script}</script>\n'
# Maximum number of characters per cell in a column of short text: about that of the longest scorer names. As the first
# column it wraps on a phone, unless it has only words.
MAX_SHORT_TEXT, MAX_WORD = 40, 10
# Pixels, at the 144 dpi of reports: text of 9 points in a picture of 7 inches is still readable at the width of a
# phone.
MAX_PHONE_PIXELS = 1008


def page(
    title: str,
    sections: Sequence[tuple[str, Markup | str]],
    lead: Markup | str = "",
    footer: Markup | str = "",
    script: str = "",
    data: Any = None,
) -> str:
    """
    A self-contained HTML page, to be written as UTF-8. `sections` are headings (as text; `""` for none) and contents:
    anything but `Markup` is text, and becomes a paragraph. `script` is the only script that the page can run: its
    security policy contains the script's digest. `data`, JSON values, is available to it in the element `data`.
    """
    body = Markup("\n").join(
        Markup("<section>{}{}</section>").format(
            Markup("<h2>{}</h2>").format(plain(heading)) if heading else "", paragraph(content)
        )
        for heading, content in sections
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    # No string can end its element.
    values = json.dumps(data, ensure_ascii=False).replace("&", "\\u0026").replace("<", "\\u003c")
    html = _PAGE.format(
        title=plain(title),
        style=Markup(_STYLE + _BLOCKS + SHADES),
        lead=Markup('<div class="lead">{}</div>').format(paragraph(lead)) if lead else "",
        body=body,
        footer=Markup("<footer>{}</footer>").format(paragraph(footer)) if footer else "",
        scripts=Markup(f"script-src 'sha256-{digest}'; ") if script else "",
        script=Markup(_SCRIPT.format(data=values, script=script)) if script else "",
    )
    return str(html)  # the page is complete: no longer `Markup`, which would escape additions


def paragraph(content: Markup | str) -> Markup:
    """Text as a paragraph; `Markup` is kept."""
    return content if isinstance(content, Markup) else Markup("<p>{}</p>").format(plain(content))


def notebook_cell(blocks: Markup) -> str:
    """Blocks of a page as the output of a notebook cell, with scoped styles."""
    return str(Markup('<div class="endotrl"><style>{}</style>{}</div>').format(Markup(_CELL), blocks))


def table(headers: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "", decimals: int = 3) -> Markup:
    """
    An HTML table. Numbers are right-aligned and rounded, `None` is a dash, `Markup` is kept, and anything else is
    text. On a narrow screen it scrolls sideways on its own; columns of short text do not wrap.
    """
    cells = [list(row) for row in rows]
    kinds = [_column_class([row[i] for row in cells]) for i in range(len(headers))]
    classes = [Markup(' class="{}"').format(kind) if kind else "" for kind in kinds]

    def line(tag: str, row: Sequence[object]) -> Markup:
        cell = Markup(f"<{tag}{{}}>{{}}</{tag}>")
        shown = (value if isinstance(value, Markup) else plain(cell_text(value, decimals)) for value in row)
        pairs = zip(classes, shown, strict=True)
        return Markup("<tr>{}</tr>").format(Markup("").join(cell.format(css, text) for css, text in pairs))

    return Markup('<div class="scroll"><table>{}<thead>{}</thead><tbody>{}</tbody></table></div>').format(
        Markup("<caption><span>{}</span></caption>").format(plain(caption)) if caption else "",
        line("th", headers),
        Markup("").join(line("td", row) for row in cells),
    )


def settings_table(settings: Mapping[str, object]) -> Markup:
    """A table of settings by name."""
    return table(["setting", "value"], [[name, None if v is None else str(v)] for name, v in settings.items()])


def png_address(image: bytes) -> str:
    """Data URI of a PNG image."""
    return f"data:image/png;base64,{base64.b64encode(image).decode('ascii')}"


def figure(image: bytes, caption: str = "", alt: str = "") -> Markup:
    """A PNG, embedded in the page; if a narrow screen would make it too small to read, it scrolls sideways."""
    picture = Markup('<img alt="{}" src="{}">').format(plain(alt or caption), png_address(image))
    if int.from_bytes(image[16:20], "big") > MAX_PHONE_PIXELS:  # the width, in the PNG header
        picture = Markup('<div class="scroll">{}</div>').format(picture)
    return Markup("<figure>{}{}</figure>").format(
        picture, Markup("<figcaption>{}</figcaption>").format(plain(caption)) if caption else ""
    )


def _column_class(cells: Sequence[object]) -> str:
    """`"r"` for numbers, `"b"` for a word, `"s"` for short text, `"w"` for text that wraps, `""` for blocks."""
    if not cells or any(isinstance(cell, Markup) for cell in cells):
        return ""
    if all(cell is None or is_number(cell) for cell in cells):
        return "r"
    longest = max(len(cell_text(cell)) for cell in cells)
    return "b" if longest <= MAX_WORD else "s" if longest <= MAX_SHORT_TEXT else "w"
