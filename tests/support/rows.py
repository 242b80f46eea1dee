# SPDX-License-Identifier: Apache-2.0
"""Rows of `endotrl score`, one by one."""

from endotrl.data.sources import parse_json, why_no_row
from endotrl.score_file.rows import Row, rows_of


def parse_row(line: int, data: bytes) -> Row:
    """The response of one line of JSON Lines."""
    value, problem = parse_json(data, first=line == 1)
    problem = problem or why_no_row(value)
    return rows_of(line, {} if problem else value, problem)[0]
