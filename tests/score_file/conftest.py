# SPDX-License-Identifier: Apache-2.0
from ..evaluation.conftest import sentence_model_path, tokenizer


__all__ = ["sentence_model_path", "tokenizer"]
