# SPDX-License-Identifier: Apache-2.0
"""vLLM in the process that generates: `endotrl eval generation --backend vllm`."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from .conftest import PYTHON


pytestmark = pytest.mark.slow


def test_eval_generation(smollm2_path: str, tmp_path: Path) -> None:
    rows = [{"question": f"What is {a} + 1?", "answer": str(a + 1)} for a in range(4)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = json.dumps({"max_model_len": 512, "enforce_eager": True, "gpu_memory_utilization": 0.5})
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "2", "VLLM_NO_USAGE_STATS": "1"}
    command = [str(PYTHON), "-m", "endotrl.commands.main", "eval", "generation", "--model", smollm2_path]
    command += ["--data", "questions.jsonl", "--backend", "vllm", "--vllm-kwargs", settings, "--dtype", "float32"]
    command += ["--samples", "2", "--max-new-tokens", "16", "--output", "run", "--quiet"]
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **environment, "PYTHONPATH": root}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("Initializing a V1 LLM engine") <= 1  # one engine for both passes
    answers = [json.loads(line) for line in (tmp_path / "run" / "answers.jsonl").read_text().splitlines()]
    assert {(answer["seed"], len(answer["texts"])) for answer in answers} == {("greedy", 1), ("0", 2)}
    assert all(0 < count <= 16 for answer in answers for count in answer["tokens"])
