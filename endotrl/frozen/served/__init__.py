# SPDX-License-Identifier: Apache-2.0
"""A frozen model behind HTTP servers (vLLM, SGLang, OpenAI-style `echo`), which give log-probabilities of tokens."""

from .model import ServedModel, is_url


__all__ = ["ServedModel", "is_url"]
