# SPDX-License-Identifier: Apache-2.0
"""The GPU run in tiny sizes: every part ends, is right where it can be wrong, and is not measured twice."""

import functools
import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_cells, methods
from benchmarks.flops import Work, useful_work
from benchmarks.gpu_page import BEGIN, END, write_page
from benchmarks.workloads import TokenSource

from .support.accelerate_server import python


SOURCE = TokenSource(range(4096), seed=0)


@pytest.fixture(autouse=True)
def no_garbage_is_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark does it often, which takes a second each time in a process with many objects."""
    monkeypatch.setattr(gc, "collect", lambda *args: 0)


@pytest.mark.slow
def test_all_parts_and_a_second_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "--cpu", "--minutes", "60", "--output", str(tmp_path)])
    monkeypatch.setattr(gpu_cells, "quiet_libraries", lambda: None)  # it mutes them for the rest of the process
    monkeypatch.setattr(gc, "freeze", lambda: None)
    shortest, *_, longest = gpu_cells.workloads(tiny=True).items()
    monkeypatch.setattr(gpu_cells, "workloads", lambda tiny: dict([shortest, longest]))
    with pytest.raises(SystemExit, match="0"):
        gpu_cells.main()
    cells = json.loads((tmp_path / "results" / "gpu.json").read_text())["cells"]
    assert {key.split("/")[0] for key in cells} == set(gpu.PARTS)
    assert len(cells) == len(list(dict.fromkeys(cells))) >= 28
    assert all(cell["right"] for key, cell in cells.items() if key.startswith("exactness/") and "autocast" not in key)
    capsys.readouterr()
    with pytest.raises(SystemExit, match="0"):
        gpu_cells.main()  # nothing is left to do
    assert " s  " not in capsys.readouterr().out
    page = (tmp_path / "results" / "gpu.md").read_text()
    assert "the figures mean nothing" in page and "Not measured" not in page

    former = json.loads((tmp_path / "results" / "gpu.json").read_text())
    former["run"]["processor"] = "H100"
    (tmp_path / "results" / "gpu.json").write_text(json.dumps(former))
    with pytest.raises(SystemExit, match=r"another machine or other versions \(processor\)"):
        gpu_cells.main()


@pytest.mark.slow
def test_all_parts_on_a_device_that_refuses_mixed_tensors(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    finished = python("tests/support/fake_cuda_run.py", str(file))
    assert finished.returncode == 0, finished.stderr[-6000:]
    results = json.loads(file.read_text())
    assert results["failed"] == {}, finished.stderr[-6000:]
    cells = results["cells"]
    assert "exactness/packed rows, bfloat16, kernel varlen" in cells and len(cells) >= 24
    assert all(cell["right"] for key, cell in cells.items() if key.startswith("exactness/") and "autocast" not in key)
    assert all(not cell["absent"] for key, cell in cells.items() if key.startswith("scoring/"))


def test_the_page_says_what_was_not_measured_and_what_cannot_be(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"Before\n{BEGIN}\nold\n{END}\nAfter\n")
    (tmp_path / "results").mkdir()
    run = dict.fromkeys("processor command date system torch transformers trl python".split(), "NVIDIA H200")
    run |= {"tiny": False, "cores": 1, "threads": 1}
    cell: dict[str, Any] = {
        "seconds": {"endotrl": 0.5, "padded_logits": 2.0},
        "ratios": {"endotrl": 1.0, "padded_logits": 4.0},
        "batch_rows": {"endotrl": 16, "padded_logits": 8},
        "impossible": ["padded_logits"],
        "peak_bytes": {"endotrl": 10**9, "padded_logits": 3 * 10**10},
        "absent": {"fused_head": "out of memory", "reward_model": "ImportError: no kernel"},
        "kernels": [{"tokens": 8192, "chosen": "varlen", "seconds": {"blocks": 0.004, "varlen": 0.001, "flex": None}}],
        **{"scored_tokens_per_second": 12345.0, "share_of_peak": 0.51, "roofline_seconds": 0.25},
        **{"matmul_peak": 7e14, "bandwidth": 3e12},
    }
    failed = {"step/7B: own copy": "out of memory"}
    results = {"run": run, "cells": {"scoring/7B: a group": cell}, "failed": failed}
    page, text = write_page(results, tmp_path, readme).read_text(), readme.read_text()
    assert page.count("Not measured.") == 3 and "- Failed: 7B: own copy: out of memory" in page
    assert "| 7B: a group | 8,192 | 4.00 | 1.00 | failed | varlen |" in page
    assert "as more did not fit: (a) padded batch, full logits of 7B: a group: 8 rows." in page
    assert "Not there: (b) padded batch, TRL's fused head: out of memory; (c)" in page and "no kernel." in page
    assert text.startswith("Before\n") and text.endswith("After\n") and "old" not in text
    row = "| 7B: a group | 0.500 | 0.250 | 12,345 | 51% | 4.0x **impossible** | out of memory | failed | 1.0 | 30.0 |"
    assert row in text


def test_a_cell_that_fails_stops_no_other_and_comes_last_in_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    broken = {"a": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"), "c": ImportError("no peft")}

    def cell(name: str) -> dict[str, float]:
        calls.append(name)
        if name in broken:
            raise broken[name]
        return {"value": 1.0}

    def part(names: str) -> Callable[[Any], dict[str, Any]]:
        return lambda machine: {name: functools.partial(cell, name) for name in names}

    monkeypatch.setattr(gpu_cells, "PARTS", {"step": part("ab"), "learning": part("c")})
    monkeypatch.setattr(gpu_cells, "SHARES", {"step": 0.5, "learning": 0.5})
    machine = gpu_cells.Machine("cpu", True, tmp_path)
    results: dict[str, Any] = {"cells": {}, "failed": {}}

    def measure(minutes: float, skip: Sequence[str] = ()) -> list[str]:
        end = time.time() + 60 * minutes
        return gpu_cells.measure(machine, results, ["step", "learning"], end, lambda: None, skip)

    assert measure(1) == [] and calls == ["a", "b", "c"] and list(results["cells"]) == ["step/b"]
    assert results["failed"] == {"step/a": "out of memory", "learning/c": "ImportError: no peft"}
    del results["cells"]["step/b"], broken["c"]
    assert measure(1, skip=["learning/c"]) == [] and calls[3:] == ["b", "a"]
    assert measure(1) == [] and calls[5:] == ["a", "c"]
    assert results["failed"] == {"step/a": "out of memory"} and set(results["cells"]) == {"step/b", "learning/c"}
    assert measure(-1) == ["step/a"] and len(calls) == 7  # no time


# Ends as it is told to: each word of the first argument is what one process does.
WORKER = """
import os, pathlib, sys, time
deeds, file = sys.argv[1].split(), pathlib.Path(sys.argv[2])
runs = len(file.read_text().split()) if file.exists() else 0
file.write_text(file.read_text() + " x" if runs else "x")
assert ("--restarted" in sys.argv) == (runs > 0)
if deeds[runs] == "hang":
    time.sleep(60)
if deeds[runs] == "crash":
    os.abort()
sys.exit(int(deeds[runs]))
"""


@pytest.mark.parametrize(
    ("deeds", "runs", "status"),
    [
        ("0", 1, 0),
        ("1", 1, 1),  # an error that is told
        ("crash 0", 2, 0),
        ("hang 0", 2, 0),
        (f"{gpu.LOST_DEVICE} crash 1", 3, 1),
        ("crash crash crash crash", 3, -6),  # no more tries
    ],
)
def test_a_process_that_dies_or_hangs_is_begun_anew(deeds: str, runs: int, status: int, tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    command = [sys.executable, "-S", "-c", WORKER, deeds, str(file)]
    assert gpu.supervise(command, file, time.time() + 30, longest=1.0, tries=3) == status
    assert len(file.read_text().split()) == runs


def test_the_roofline_is_that_of_the_card() -> None:
    """
    By hand, at the datasheet's 989 TFLOP/s and 3.35 TB/s of an H100. Qwen2.5-7B: 28 layers of 2 * 3584 * 3584 +
    2 * 3584 * 512 + 3 * 3584 * 18944 = 233,046,016 weights, and a head of 152,064 * 3584 = 544,997,376.
    """
    machine = gpu_cells.Machine("cpu", False, Path())
    machine.rooflines = {"matmul_peak": 989e12, "bandwidth": 3.35e12}
    group = useful_work(gpu_cells.workloads(False)["8 completions of 256 to 2,048 tokens, prompt of 512"](SOURCE).rows)
    # A prompt of 512, completions of 256, 512, ... 2,048, 9,216 tokens together, of which 8 last ones are not run.
    assert (group.tokens, group.positions) == (512 + 9216 - 8, 9216)
    # Linear 127 TFLOP, head 10.0, attention 4.6.
    assert machine.bound("7B", group) == pytest.approx(141.5e12 / 989e12, rel=0.003)
    # One token: 13.05 GB of layers and 1.09 of the head.
    assert machine.bound("7B", Work(1, 1, 1)) == pytest.approx(14.14e9 / 3.35e12, rel=0.001)
    assert machine.bound("7B", Work(0, 0, 1)) == pytest.approx(1.09e9 / 3.35e12, rel=0.001)


def test_rivals_that_do_not_fit_run_in_smaller_micro_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full, heights = methods.PaddedLogits.__call__, []

    def small(self: methods.PaddedLogits, batches: methods.Batches) -> list[torch.Tensor]:
        heights.append(max(map(len, batches)))
        if heights[-1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return full(self, batches)

    def never(self: methods.FusedHead, batches: methods.Batches) -> list[torch.Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(methods.PaddedLogits, "__call__", small)
    monkeypatch.setattr(methods.FusedHead, "__call__", never)
    cell = gpu_cells.scoring(gpu_cells.Machine("cpu", True, tmp_path))[
        "0.5B: 8 completions of 256 to 2,048 tokens, prompt of 512"
    ]()
    assert heights[:3] == [8, 4, 2] and set(heights[3:]) == {2}
    assert cell["batch_rows"] == {"endotrl": 8, "padded_logits": 2, "reward_model": 8}
    assert cell["absent"] == {"fused_head": "out of memory"} and "fused_head" not in cell["seconds"]
