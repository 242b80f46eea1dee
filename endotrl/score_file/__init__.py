# SPDX-License-Identifier: Apache-2.0
"""
Scoring of a file: rewards of rows of any source into a JSON Lines file, one line per response in the order of the
input, beside `.errors.jsonl` with only the invalid rows and `.meta.json` with settings, versions and checkpoint: the
implementation of `endotrl score`.

Memory is that of a block, whatever the file's length. A block is written and synced before the checkpoint counts it,
and the output alone shows what is done. So after a crash, a full disk or a power failure the same command resumes
after the last complete block, and ends with the same bytes as an uninterrupted run.
"""

from .run import Example, ScoreReport, score_file


__all__ = ["Example", "ScoreReport", "score_file"]
