# SPDX-License-Identifier: Apache-2.0
"""The GPU run in tiny sizes: every part ends, is right where it can be wrong, and is not measured twice."""

import gc
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import gpu
from benchmarks.gpu_page import BEGIN, END, write_page

from .support.accelerate_server import python


@pytest.fixture(autouse=True)
def objects_of_other_tests_are_left_alone() -> Iterator[None]:
    """The benchmark collects garbage often, which takes a second each time in a process with many objects."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.slow
def test_all_parts_and_a_second_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "--cpu", "--minutes", "60", "--output", str(tmp_path)])
    gpu.main()
    cells = json.loads((tmp_path / "results" / "gpu.json").read_text())["cells"]
    assert {key.split("/")[0] for key in cells} == set(gpu.PARTS)
    assert len(cells) == len(list(dict.fromkeys(cells))) >= 30
    assert all(cell["right"] for key, cell in cells.items() if key.startswith("exactness/") and "autocast" not in key)
    capsys.readouterr()
    gpu.main()  # nothing is left to do
    assert " s  " not in capsys.readouterr().out
    page = (tmp_path / "results" / "gpu.md").read_text()
    assert "the figures mean nothing" in page and "Not measured" not in page

    former = json.loads((tmp_path / "results" / "gpu.json").read_text())
    (tmp_path / "results" / "gpu.json").write_text(
        json.dumps({**former, "run": {**former["run"], "processor": "H100"}})
    )
    with pytest.raises(SystemExit, match=r"another machine or other versions \(processor\)"):
        gpu.main()


@pytest.mark.slow
def test_all_parts_on_a_device_that_refuses_mixed_tensors(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    finished = python("tests/support/fake_cuda_run.py", str(file))
    assert finished.returncode == 0, finished.stderr[-6000:]
    results = json.loads(file.read_text())
    assert results["failed"] == {}, finished.stderr[-6000:]
    cells = results["cells"]
    assert "exactness/packed rows, bfloat16, kernel varlen" in cells and len(cells) >= 28
    assert all(cell["right"] for key, cell in cells.items() if key.startswith("exactness/") and "autocast" not in key)
    assert all(not cell["absent"] for key, cell in cells.items() if key.startswith("scoring/"))


def test_the_readmes_table_is_what_was_measured_and_nothing_else(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"Before\n{BEGIN}\nold\n{END}\nAfter\n")
    (tmp_path / "results").mkdir()
    run = {"tiny": False, "processor": "A card", "command": "c", "date": "d", "cores": 1, "threads": 1, "system": "s"}
    run |= {"torch": "1", "transformers": "2", "trl": "3", "python": "4"}
    results = {"run": run, "cells": {}, "failed": {"step/7B: own copy": "out of memory"}}
    page = write_page(results, tmp_path, readme).read_text()
    assert (
        page.count("Not measured.") == 6
        and "- Failed: 7B: own copy: out of memory" in page
        and "old" in readme.read_text()
    )
    results["cells"]["scoring/7B: a group"] = {
        "seconds": {"endotrl": 0.5, "padded_logits": 2.0},
        "ratios": {"endotrl": 1.0, "padded_logits": 4.0},
        "peak_bytes": {"endotrl": 10**9, "padded_logits": 3 * 10**10},
        "absent": {"fused_head": "out of memory", "reward_model": "ImportError: no kernel"},
        "kernels": [
            {"tokens": 8192, "chosen": "varlen", "seconds": {"blocks": 0.004, "varlen": 0.001, "flex": None}},
            {"tokens": 1024, "chosen": "blocks", "seconds": {"blocks": 0.001}},
        ],
        "scored_tokens_per_second": 12345.0,
        "share_of_peak": 0.51,
        "roofline_seconds": 0.25,
        "matmul_peak": 7e14,
        "bandwidth": 3e12,
    }
    page = write_page(results, tmp_path, readme).read_text()
    assert "| 7B: a group | 8,192 | 4.00 | 1.00 | failed | varlen |" in page
    assert "Not there: (b) padded batch, TRL's fused head: out of memory; (c)" in page and "no kernel." in page
    text = readme.read_text()
    assert text.startswith("Before\n") and text.endswith("After\n") and "old" not in text and "A card" in text
    row = "| 7B: a group | 0.500 | 0.250 | 12,345 | 51% | 4.0x | out of memory | failed | 1.0 | 30.0 |"
    assert row in text


def test_a_cell_that_fails_stops_no_other_and_comes_last_in_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[str] = []
    broken = {"a": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"), "c": ImportError("no peft")}

    def cell(name: str) -> Callable[[], dict[str, float]]:
        def run() -> dict[str, float]:
            calls.append(name)
            if name in broken:
                raise broken[name]
            return {"value": 1.0}

        return run

    monkeypatch.setattr(
        gpu, "PARTS", {"step": lambda _: {n: cell(n) for n in "ab"}, "learning": lambda _: {"c": cell("c")}}
    )
    monkeypatch.setattr(gpu, "SHARES", {"step": 0.5, "learning": 0.5})
    file, machine = tmp_path / "gpu.json", gpu.Machine("cpu", True, tmp_path)
    results: dict[str, dict[str, Any]] = {"cells": {}, "failed": {}}

    def measure(minutes: float) -> list[str]:
        return gpu.measure(machine, results, ["step", "learning"], minutes, file, Console(stderr=True))

    assert measure(1) == []
    assert calls == ["a", "b", "c"] and list(results["cells"]) == ["step/b"]
    assert results["failed"] == {"step/a": "out of memory", "learning/c": "ImportError: no peft"}
    assert "Tried to allocate" in capsys.readouterr().err
    assert json.loads(file.read_text()) == results
    del results["cells"]["step/b"], broken["c"]
    assert measure(1) == [] and calls[3:] == ["b", "a", "c"]
    assert results["failed"] == {"step/a": "out of memory"} and set(results["cells"]) == {"step/b", "learning/c"}
    assert measure(-1) == ["step/a"] and len(calls) == 6  # no time


def test_each_part_has_its_share_and_then_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = [0.0], []

    def cell(name: str) -> Callable[[], dict[str, float]]:
        def run() -> dict[str, float]:
            calls.append(name)
            now[0] += 20
            return {}

        return run

    names = {"step": ["a", "b", "c", "d"], "learning": ["e", "f"]}
    monkeypatch.setattr(gpu, "PARTS", {k: lambda _, v=v: {n: cell(n) for n in v} for k, v in names.items()})
    monkeypatch.setattr(gpu, "SHARES", {"step": 0.25, "learning": 0.25})
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    results: dict[str, dict[str, Any]] = {"cells": {}, "failed": {}}
    late = gpu.measure(
        gpu.Machine("cpu", True, tmp_path), results, list(names), 1.75, tmp_path / "gpu.json", Console(stderr=True)
    )
    # 52 seconds for the first, in which a third would not end; of what is left, one that ends goes to the first again.
    assert calls == ["a", "b", "e", "f", "c"] and late == ["step/d"]


def test_a_device_that_does_not_answer_ends_the_run_with_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = []

    def crash() -> dict[str, float]:
        broken.append(True)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def synchronize(device: str) -> None:
        if broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    cells = {"a": lambda: {"value": 1.0}, "b": crash, "c": lambda: {"value": 3.0}}
    monkeypatch.setattr(gpu, "PARTS", {"step": lambda _: cells})
    monkeypatch.setattr(gpu, "synchronize", synchronize)
    results: dict[str, dict[str, Any]] = {"cells": {}, "failed": {}}
    file, machine = tmp_path / "gpu.json", gpu.Machine("cpu", True, tmp_path)
    assert gpu.measure(machine, results, ["step"], 1, file, Console(stderr=True)) == ["step/c"]
    assert list(results["cells"]) == ["step/a"] and list(results["failed"]) == ["step/b"]
    assert json.loads(file.read_text()) == results
