# SPDX-License-Identifier: Apache-2.0
"""Small tasks with known answers, for the demo, recipes, studies and tests."""
