# SPDX-License-Identifier: Apache-2.0
"""Prompts and completions, as text or messages, to the token ids that the frozen model reads."""
