# SPDX-License-Identifier: Apache-2.0
"""The snippets of docs/selection.md run as they stand, with a tiny model."""

import re
from pathlib import Path
from typing import Any

import pytest

from endotrl import EndogenousReward


TEXT = (Path(__file__).parents[2] / "docs" / "selection.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)


def run(number: int, model: str) -> dict[str, Any]:
    # As a module, so that Ray can send its class to other processes.
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(SNIPPETS[number].replace('"quickstart"', repr(model)), "docs/selection.md", "exec"), names)
    return names


def test_library_calls(tiny_model_path):
    names = run(0, tiny_model_path)
    assert sorted(names["ranking"][0]) == [0, 1] and len(names["best"]) == len(names["chosen"]) == 2
    assert names["pairs"].column_names[:3] == ["prompt", "chosen", "rejected"]
    assert len(names["scored"]["scores"][1]) == 2


def test_map_of_datasets(tiny_model_path):
    scored = run(1, tiny_model_path)["scored"]
    (expected,) = EndogenousReward(tiny_model_path)(prompts=["2 + 2 ="], completions=[" 5"])
    assert scored["reward"][1] == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_ray_data(tiny_model_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="needs Ray: pip install 'ray[data]'")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]), prepend=":")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        scored = run(2, tiny_model_path)["scored"]
    finally:
        ray.shutdown()
    rows = {row["prompt"]: row for row in scored}
    assert len(rows) == 100
    row = rows["7 + 1 ="]
    (expected,) = EndogenousReward(tiny_model_path)(prompts=[row["prompt"]], completions=[row["completion"]])
    assert row["reward"] == pytest.approx(expected, abs=1e-4)
