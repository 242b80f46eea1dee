# SPDX-License-Identifier: Apache-2.0
"""Rendering: from prompts and completions, as text or messages, to the frozen model's token ids."""
