# SPDX-License-Identifier: Apache-2.0
"""
How good a reward is, and what training on it did: the work behind `endotrl eval`.

```text
file or hub  ->  items  ->  Engine (one forward pass)  ->  scorers: forms of the reward, rivals, judges, controls
                                     |                              |
                                token_stats/                   scores.jsonl  ->  units  ->  metrics, intervals, report
```

One module per benchmark (`benchmarks/`), one for statistics without models (`intervals.py`), one for formulas
(`forms.py`). Nothing heavy is imported here.
"""
