# SPDX-License-Identifier: Apache-2.0
"""Frozen model behind HTTP servers (vLLM, SGLang, OpenAI-style `echo`) that return log-probabilities of tokens."""

from .model import ServedModel, is_url


__all__ = ["ServedModel", "is_url"]
