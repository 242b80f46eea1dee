# SPDX-License-Identifier: Apache-2.0
"""
Rewards of rows of any source, one by one, into a JSON Lines file, one line per response in the order of the input,
beside `.errors.jsonl` with the bad rows alone and `.meta.json` with settings, versions and checkpoint: the work behind
`endotrl score`.

Memory is that of a block, whatever the file's length. A block is written and synced before the checkpoint says so, and
the output alone tells what is done. So after a crash, a full disk or a power cut the same command goes on behind the
last whole block, and ends with the same bytes as a run without a break.
"""

from .run import Example, ScoreReport, score_file


__all__ = ["Example", "ScoreReport", "score_file"]
