# SPDX-License-Identifier: Apache-2.0
import importlib.machinery
import sys
import types
import weakref
from types import SimpleNamespace

import pytest

from ..evaluation.conftest import own_code, reward_model_path, sentence_model_path


__all__ = ["own_code", "reward_model_path", "sentence_model_path"]


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def fake_vllm(monkeypatch):
    """A stand-in for vLLM, which says the same two tokens always, and notes what it is asked."""
    notes = SimpleNamespace(started=[], asked=[])

    class LLM:
        def __init__(self, model, **settings):
            notes.started.append((weakref.ref(self), settings))

        def generate(self, prompts, settings, use_tqdm=False):
            notes.asked.append(settings)
            answer = SimpleNamespace(token_ids=[34, 35])
            return [SimpleNamespace(outputs=[answer] * row.n) for row in settings]

    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, lambda **settings: SimpleNamespace(**settings)
    module.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    monkeypatch.setitem(sys.modules, "vllm", module)
    return notes
