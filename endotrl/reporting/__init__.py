# SPDX-License-Identifier: Apache-2.0
"""
Building blocks of reports: self-contained HTML and terminal tables.

A page needs no network, script or font, works on a phone, in dark mode and on paper, and trusts no text: every block
takes plain strings, escapes them, and returns [`~markupsafe.Markup`]. A string that is not `Markup` is always text, so
nothing that a model writes can become part of the page.
"""

from .curves import curves, sparkline
from .heat_map import HeatMapRow, heat_maps
from .html import figure, notebook_cell, page, paragraph, png_address, settings_table, table
from .terminal import (
    ignore_upstream_warnings,
    quiet_libraries,
    say,
    show_verdict,
    terminal,
    terminal_heat_map,
    terminal_table,
    terminal_text,
    working,
)
from .text import cell_text, counted, interval_text, number, plain


__all__ = [
    "HeatMapRow",
    "cell_text",
    "counted",
    "curves",
    "figure",
    "heat_maps",
    "ignore_upstream_warnings",
    "interval_text",
    "notebook_cell",
    "number",
    "page",
    "paragraph",
    "plain",
    "png_address",
    "quiet_libraries",
    "say",
    "settings_table",
    "show_verdict",
    "sparkline",
    "table",
    "terminal",
    "terminal_heat_map",
    "terminal_table",
    "terminal_text",
    "working",
]
