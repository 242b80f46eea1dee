# SPDX-License-Identifier: Apache-2.0
"""Two processes that train a policy that reads images, also from a checkpoint, and with a frozen model in shards."""

import json
from pathlib import Path
from typing import Any

import pytest

from ..support.accelerate_server import torchrun
from ..support.vision import save_vision_model


pytestmark = pytest.mark.slow


def run(tiny_model_path: str, folder: Path, kind: str) -> list[dict[str, Any]]:
    """Results of both processes, each of which has compared every reward with its row alone."""
    path = save_vision_model("llava", tiny_model_path, folder / "model")
    command = ("-m", "tests.trainers.vision_worker", path, str(folder), kind)
    finished = torchrun(2, *command)
    assert finished.returncode == 0, finished.stderr[-4000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


def test_a_run_and_what_goes_on_from_its_checkpoint(tiny_model_path, tmp_path):
    ranks = run(tiny_model_path, tmp_path, "whole")
    assert ranks[0] == ranks[1]  # weights, too
    assert [ranks[0][name]["compared"] for name in ("whole", "resumed")] == [16, 8]
    assert [ranks[0][name]["steps"] for name in ("whole", "resumed")] == [2, 2]


def test_a_frozen_model_in_shards(tiny_model_path, tmp_path):
    for rank in run(tiny_model_path, tmp_path, "sharded"):
        assert rank == {"compared": 8, "sharded": True}
