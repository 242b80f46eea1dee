# SPDX-License-Identifier: Apache-2.0
"""
How good a reward is, and what training on it did: the work behind `endotrl eval`. Files become items, one forward pass
(`engine.py`) their token statistics, scorers (`forms.py`, rivals, judges, controls) make scores of these, and
`benchmarks/` make units of them, of which `intervals.py` takes means. Nothing heavy is imported here.
"""
