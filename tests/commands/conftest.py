# SPDX-License-Identifier: Apache-2.0
from ..evaluation.conftest import own_code, reward_model_path, sentence_model_path


__all__ = ["own_code", "reward_model_path", "sentence_model_path"]
