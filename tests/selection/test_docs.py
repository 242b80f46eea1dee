# SPDX-License-Identifier: Apache-2.0
"""The snippets of docs/selection.md run as they stand, with a tiny model."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from endotrl import EndogenousReward


TEXT = (Path(__file__).parents[2] / "docs" / "selection.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)


def run(number: int, model: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
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


class Rows(list):
    """Stands for a dataset of Ray, which is not installed: one batch, in this process."""

    def map_batches(self, kind, fn_constructor_args, **settings):
        batch = kind(*fn_constructor_args)({key: [row[key] for row in self] for key in self[0]})
        return Rows(dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))

    def take_all(self):
        return self


def test_ray_data(tiny_model_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(data=SimpleNamespace(from_items=Rows)))
    scored = run(2, tiny_model_path)["scored"]
    (expected,) = EndogenousReward(tiny_model_path)(prompts=["7 + 1 ="], completions=[" 8"])
    assert len(scored) == 100 and scored[7]["reward"] == pytest.approx(expected, abs=1e-4)
