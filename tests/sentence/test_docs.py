# SPDX-License-Identifier: Apache-2.0
"""The snippets of docs/sentence.md run as they stand, one after the other, with a tiny model and one step."""

import functools
import re
from pathlib import Path
from typing import Any

import pytest

import endotrl


TEXT = (Path(__file__).parents[2] / "docs" / "sentence.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_snippets(tiny_model_path, tmp_path, monkeypatch):
    settings: dict[str, Any] = {"report_to": [], "use_cpu": True, "bf16": False, "max_steps": 1, "save_strategy": "no"}
    for name in ("SentenceRewardTrainerConfig", "DenseGRPOConfig"):
        small = {**settings, "max_completion_length": 8} if name == "DenseGRPOConfig" else settings
        monkeypatch.setattr(endotrl, name, functools.partial(getattr(endotrl, name), **small))
    monkeypatch.chdir(tmp_path)
    assert len(SNIPPETS) == 4
    for snippet in SNIPPETS:
        code = snippet.replace("Qwen/Qwen2.5-0.5B-Instruct", tiny_model_path)
        names: dict[str, Any] = {}
        exec(compile(code, "docs/sentence.md", "exec"), names)
        if "trainer" in names:
            assert names["trainer"].state.global_step == 1
