# SPDX-License-Identifier: Apache-2.0
"""Frozen model: names, own copies, loaded models, and weights shared with a trainer."""
