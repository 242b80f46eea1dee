# SPDX-License-Identifier: Apache-2.0
"""
Evaluation of rewards, and of policies trained on them: the implementation of `endotrl eval`. Files become items, one
forward pass (`engine.py`) gives their token statistics, scorers (`forms.py`, rivals, judges, controls) turn these into
scores, and `benchmarks/` into units, whose means `intervals.py` estimates. Nothing heavy is imported here.
"""
