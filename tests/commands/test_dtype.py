# SPDX-License-Identifier: Apache-2.0
"""The dtype of commands on a CPU: what is told, what the run has that is gone on with, or what is faster there."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from endotrl.commands import models
from endotrl.commands.main import main
from endotrl.frozen import cpu_dtype

from ..evaluation.rows import write


ROWS = [{"prompt": f"{i} + 1 =", "completions": [" a b", " c"]} for i in range(3)]
BENCH = [{"prompt": "b", "chosen": "c d", "rejected": "e", "subset": "alpacaeval-easy", "id": i} for i in range(3)]


@pytest.fixture
def dtype_of(
    tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str | None]]:
    """Runs a command; gives the exit code, and the dtype that the files say."""
    write(tmp_path / "in.jsonl", ROWS)
    write(tmp_path / "rows.jsonl", [{"prompt": row["prompt"], "completion": row["completions"][0]} for row in ROWS])
    write(tmp_path / "bench.jsonl", BENCH)
    write(tmp_path / "q.jsonl", [{"prompt": "a", "answer": "b"}] * 2)
    commands = {
        "score": (["score", "rows.jsonl"], "rows.scores.jsonl.meta.json"),
        "pairs": (["pairs", "in.jsonl"], "in.pairs.jsonl.scores/settings.json"),
        "eval": (["eval", "reward-bench", "--data", "bench.jsonl"], "eval-reward-bench/settings.json"),
        "forecast": (
            "forecast --data q.jsonl --grader exact --samples 4 --max-new-tokens 3".split(),
            "forecast/settings.json",
        ),
    }

    def run(name: str, faster: str, *options: str, narrow: int = 1) -> tuple[int, str | None]:
        monkeypatch.setattr(models, "NARROW", narrow)
        seconds = {"bfloat16": 1.0, "float32": 1.0, faster: 0.25}
        monkeypatch.setattr(cpu_dtype, "matmul_seconds", lambda: seconds)
        words, file = commands[name]
        code = main([*words, "--model", tiny_model_path, "--device", "cpu", *options])
        settings: dict[str, Any] = json.loads((tmp_path / file).read_text())
        return code, settings.get("settings", settings)["dtype"]

    return run


@pytest.mark.parametrize("command", ["score", "pairs", "eval", "forecast"])
def test_the_faster_one_and_a_resumed_run_keeps_it(
    command: str, dtype_of: Callable[..., tuple[int, str | None]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert dtype_of(command, "bfloat16") == (0, "bfloat16")
    said = " ".join(capsys.readouterr().err.split())
    assert "Using bfloat16 on this CPU, as it multiplies matrices 4.0 times as fast in bfloat16 as in float32" in said
    assert dtype_of(command, "float32") == (0, "bfloat16")  # goes on
    assert "Using" not in capsys.readouterr().err
    assert dtype_of(command, "float32", "--overwrite", "--quiet") == (0, "float32")
    assert "Using" not in capsys.readouterr().err
    assert dtype_of(command, "float32", "--overwrite", "--dtype", "bfloat16") == (0, "bfloat16")
    assert dtype_of(command, "bfloat16", "--overwrite", narrow=10_000) == (0, "float32")  # not worth a measurement
    assert "Using" not in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the variables are of x86")
def test_a_cpu_without_instructions_for_bfloat16_is_found_out_in_seconds() -> None:
    """Products of the size that tells two fast dtypes apart would take a minute there."""
    code = "import time; from endotrl.frozen.cpu_dtype import faster_dtype; "
    code += "started = time.time(); print(faster_dtype()[0], time.time() - started)"
    old = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "1"}
    finished = subprocess.run([sys.executable, "-c", code], env=old, capture_output=True, text=True, check=True)
    dtype, seconds = finished.stdout.split()
    assert dtype == "float32" and float(seconds) < 10
