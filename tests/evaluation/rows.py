# SPDX-License-Identifier: Apache-2.0
"""Hand-made rows of every benchmark, and the steps from a file to units."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from endotrl.data.sources import read_rows
from endotrl.evaluation.benchmarks import BENCHMARKS
from endotrl.evaluation.intervals import point_values
from endotrl.evaluation.items import Item


RM_BENCH_ROW = {
    "id": 1,
    "prompt": "What is 2+2?",
    "chosen": ["4.", "It is 4, as 2+2=4.", "**4**, as 2+2=4."],
    "rejected": ["5.", "It is 5, as 2+2=5.", "**5**, as 2+2=5."],
}
BEST_OF_FOUR_ROW = {"id": "a", "prompt": "p", "subset": "Math", "chosen": ["a"], "rejected": ["b", "c", "d"]}
JUDGE_ROW = {"pair_id": "x", "source": "livebench-math", "question": "q", "label": "A>B"}
JUDGE_ROW |= {"response_A": "a", "response_B": "b"}
DATA = Path(os.environ.get("ENDOTRL_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
PAIR_ROW = {"prompt": "Say hi", "chosen": "Hi!", "rejected": "No."}


def process_row(label: int, steps: int = 4, id: str = "gsm8k-0") -> dict[str, Any]:
    return {"id": id, "problem": "1+1?", "steps": [f"Step {i} of {id}." for i in range(steps)], "label": label}


def prm_row(errors: list[int], kind: str = "circular", idx: str = "p0") -> dict[str, Any]:
    row = {"idx": idx, "modified_question": "q", "original_question": "q", "classification": kind}
    row |= dict.fromkeys(("modified_process", "original_process"), [f"{idx} step {i}" for i in range(4)])
    return {**row, "error_steps": errors}


def write(path: Path, rows: list[Any]) -> str:
    text = json.dumps(rows, indent=1) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return str(path)


def items_of(name: str, path: str) -> list[Item]:
    return BENCHMARKS[name].read(read_rows(path, None, name))


def metrics_of(name: str, items: list[Item], scores: list[list[float]]) -> dict[str, float]:
    return point_values(BENCHMARKS[name].units(items, scores), BENCHMARKS[name].metrics)


def real_file(name: str) -> str:
    """A real file of `../shared/data`, or of the folder that `ENDOTRL_TEST_DATA` names; skips the test without it."""
    if not (DATA / name).exists():
        pytest.skip(f"The real file {name} is not here.")
    return str(DATA / name)
