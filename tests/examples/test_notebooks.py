# SPDX-License-Identifier: Apache-2.0
"""The notebooks run from top to bottom, with a tiny model and fewer steps, and have outputs of a whole run."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest


FOLDER = Path(__file__).parents[2] / "examples"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SMALLER = {"max_steps=8": "max_steps=1", "max_steps=6": "max_steps=1", "held_out[::6]": "held_out[:2]"}
SMALLER |= {
    "samples=24": "samples=4",
    "[::20]": "[::100]",
    "max_new_tokens=32": "max_new_tokens=150",  # a random model seldom ends
    "per_device_train_batch_size=32": "per_device_train_batch_size=8",
}


def cells(path: Path) -> list[dict[str, Any]]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def last_value(source: str, names: dict[str, Any]) -> object:
    """Runs a cell as a kernel does, and returns what it would show."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), names)


def test_there_are_three() -> None:
    assert len(NOTEBOOKS) == 3


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path, tiny_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells(path):
        source = "".join(cell["source"]).replace("quickstart", tiny_model_path)
        for whole, small in SMALLER.items():
            source = source.replace(whole, small)
        value = last_value(source, names)
        shown = {mime for output in cell["outputs"] for mime in output.get("data", ())}
        assert ("text/html" in shown) == hasattr(value, "_repr_html_")  # what is stored is of this code
        if hasattr(value, "_repr_html_"):
            assert "<table" in value._repr_html_() or 'class="heat"' in value._repr_html_()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_outputs_are_of_a_whole_run(path: Path) -> None:
    counts = [cell["execution_count"] for cell in cells(path)]
    assert counts == list(range(1, len(counts) + 1))
    assert not any(output["output_type"] == "error" for cell in cells(path) for output in cell["outputs"])
