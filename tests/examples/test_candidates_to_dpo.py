# SPDX-License-Identifier: Apache-2.0
"""The example runs from candidates to a trained model, with a tiny one."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM


FILE = Path(__file__).parents[2] / "examples" / "candidates_to_dpo.py"


@pytest.mark.slow
def test_it_trains(
    tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "out")
    options = ["--questions", "6", "--length", "30", "--num-candidates", "6", "--steps", "2", "--output", output]
    monkeypatch.setattr(sys, "argv", ["candidates_to_dpo.py", tiny_model_path, *options])
    runpy.run_path(str(FILE), run_name="__main__")
    said = capsys.readouterr().out
    assert " pairs from 6 questions with 6 answers each" in said and "step 2: loss 0." in said
    before, after = (AutoModelForCausalLM.from_pretrained(path).lm_head.weight for path in (tiny_model_path, output))
    assert not torch.equal(before, after)
