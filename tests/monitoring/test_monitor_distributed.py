# SPDX-License-Identifier: Apache-2.0
"""The monitor in two processes, over gloo: they decide together, and as one process does."""

import json
from pathlib import Path
from typing import Any

import pytest

from ..support.accelerate_server import accelerate


pytestmark = pytest.mark.slow


def run(launcher: str, num_processes: int, model: str, folder: Path) -> list[dict[str, Any]]:
    folder.mkdir()
    finished = accelerate(
        launcher, num_processes, "tests/monitoring/monitor_worker.py", model, str(folder), str(32 // num_processes)
    )
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-6000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(num_processes)]


def test_two_processes_decide_together(tiny_policy_path: str, tmp_path: Path) -> None:
    (alone,) = run("cpu", 1, tiny_policy_path, tmp_path / "alone")
    first, second = run("multi_gpu", 2, tiny_policy_path, tmp_path / "two")
    assert (alone["num_processes"], first["num_processes"]) == (1, 2)
    assert 14 < alone["step"] < 24, "It stopped, and did not come to its end."
    assert first["step"] == second["step"] == alone["step"]
    assert first["alarms"] == second["alarms"]
    assert [step for step, _ in first["alarms"]] == [step for step, _ in alone["alarms"]] == [alone["step"]]
    for entry, other, expected in zip(first["history"], second["history"], alone["history"], strict=True):
        figures = {key: value for key, value in expected.items() if key.startswith("collapse/")}
        assert "collapse/held_out/accuracy" in figures and "collapse/length_correlation" in figures
        for key, value in figures.items():
            # Log-probabilities are sums in another order.
            assert entry[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key
            assert other[key] == entry[key], key
    asked = [entry["step"] for entry in alone["history"] if "collapse/held_out/questions" in entry]
    assert asked == [1, 10], "Before the first step, and after the tenth."
    changes = [entry["collapse/change/accuracy"] for entry in alone["history"] if "collapse/change/accuracy" in entry]
    assert len(changes) > 1 and changes[0] == 0.0 and any(changes)
