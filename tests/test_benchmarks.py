# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run, in small, and count their operations right. What they measure is not tested."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from benchmarks.flops import ModelShape, padded_work, useful_work
from benchmarks.measure import peak_memory
from benchmarks.methods import METHODS, exact_log_probs, pad
from endotrl.rendering.renderer import Rendered

from .support.accelerate_server import python


PROMPT = [5, 6, 7, 8]
ROWS = [Rendered(PROMPT, ids, list(range(len(ids))), finished=True) for ids in ([9, 10], [11, 12, 13, 14, 15])]


class TestFlops:
    def test_padded_batch_against_the_counter_of_torch(self, tiny_model_path: str) -> None:
        # Eager attention, whose products the counter sees: it knows no formula for the fused kernel of the CPU.
        model = AutoModelForCausalLM.from_pretrained(tiny_model_path, attn_implementation="eager")
        input_ids, mask = pad(ROWS, torch.device("cpu"))
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(input_ids=input_ids, attention_mask=mask)
        assert counter.get_total_flops() == padded_work([ROWS]).flops(ModelShape.of(model))

    def test_useful_work_of_one_sequence_is_a_triangle(self) -> None:
        # 4 prompt tokens and 4 of 5 completion tokens: the token at place i sees i tokens.
        work = useful_work(ROWS[1:])
        assert (work.tokens, work.pairs, work.positions) == (8, sum(range(1, 9)), 5)

    def test_a_shared_prompt_counts_once(self) -> None:
        together, apart = useful_work(ROWS), [useful_work([row]) for row in ROWS]
        assert together.tokens == sum(work.tokens for work in apart) - len(PROMPT)
        assert together.pairs == sum(work.pairs for work in apart) - sum(range(1, len(PROMPT) + 1))
        assert together.positions == sum(work.positions for work in apart)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "reward_model"])
def test_all_methods_compute_the_same(name: str, tiny_model_path: str) -> None:
    found = METHODS[name](tiny_model_path, torch.float32, "cpu")([ROWS])
    for a, b in zip(found, exact_log_probs(tiny_model_path, torch.float32, "cpu", ROWS), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_peak_is_seen_after_it_is_gone() -> None:
    size = 64 * 2**20
    with peak_memory("cpu") as peak:
        torch.ones(size // 4).sum()
    assert 0.9 * size < peak.extra < 2 * size


@pytest.mark.slow
def test_both_run(tiny_model_path: str, tmp_path: Path) -> None:
    options = ["--quick", "--model", tiny_model_path, "--output", str(tmp_path), "--dtype", "float32"]
    commands = {"scoring": ["--rounds", "1", "--scale"], "training_step": ["--steps", "1"]}
    for name, more in commands.items():
        finished = python("-m", f"benchmarks.{name}", *options, *more)
        assert finished.returncode == 0, finished.stderr
        # DeepSpeed logs to the same stream; its lines begin with a bracket.
        lines = finished.stdout.splitlines()
        assert [line for line in lines if len(line) > 80 and not line.startswith(("Written", "["))] == []

    scoring = _results(tmp_path, "scoring")
    assert {"run", "settings", "accuracy", "matmul_peak", "workloads", "sweeps", "scale", "targets"} <= scoring.keys()
    for entry in scoring["workloads"].values():
        assert entry["methods"].keys() == METHODS.keys()
        assert entry["useful_tokens"] < entry["padded_tokens"] and entry["useful_flops"] < entry["padded_flops"]
        assert entry["methods"]["endotrl"]["ratio"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert scoring["accuracy"]["errors"]["endotrl"]["token_max"] < 1e-3
    assert {path.name for path in tmp_path.glob("images/*")} == {"scoring-ratios.png", "scoring-sweeps.png"}

    placements = _results(tmp_path, "training_step")["placements"]
    assert {name for name, entry in placements.items() if entry["extra_parameters"] > 0} == {"own_copy"}
    for entry in placements.values():
        assert 0 < entry["reward_seconds"]["median"] < entry["step_seconds"]["median"]


def _results(folder: Path, name: str) -> dict[str, Any]:
    assert (folder / "results" / f"{name}.md").read_text(encoding="utf-8").startswith("# ")
    return json.loads((folder / "results" / f"{name}.json").read_text(encoding="utf-8"))
