# SPDX-License-Identifier: Apache-2.0
"""
Rewards of rows of any source, one by one, into a JSON Lines file: the work behind `endotrl score`.

```text
input        ->  blocks of rows  ->  EndogenousReward.score  ->  output.jsonl               one line per response,
                                                                                            input order
                                                                 output.jsonl.errors.jsonl  the bad rows alone
                                                                 output.jsonl.meta.json     settings, versions,
                                                                 checkpoint
```

Memory is that of a block, whatever the file's length. A block is written and synced before the checkpoint says so, and
the output alone tells what is done. So after a crash, a full disk or a power cut the same command goes on behind the
last whole block, and ends with the same bytes as a run without a break.
"""

from typing import TYPE_CHECKING

from .._lazy import attach


__all__ = [
    "DECIMALS",
    "OUTPUT_KEYS",
    "STREAM",
    "Example",
    "Row",
    "ScoreReport",
    "Tally",
    "message_text",
    "model_digest",
    "parse_row",
    "score_file",
]

if TYPE_CHECKING:
    from ..data.formats import message_text
    from ..data.sources import STREAM
    from .blocks import DECIMALS
    from .output_files import model_digest
    from .rows import OUTPUT_KEYS, Row, parse_row
    from .run import Example, ScoreReport, score_file
    from .tally import Tally


# Resolved on first use (PEP 562), so that `endotrl --help`, which knows the options of all commands, does not wait.
_LOCATIONS = {
    "DECIMALS": ".blocks",
    "Example": ".run",
    "OUTPUT_KEYS": ".rows",
    "Row": ".rows",
    "STREAM": "..data.sources",
    "ScoreReport": ".run",
    "Tally": ".tally",
    "message_text": "..data.formats",
    "model_digest": ".output_files",
    "parse_row": ".rows",
    "score_file": ".run",
}

__getattr__, __dir__ = attach(__name__, _LOCATIONS, __all__)
