# SPDX-License-Identifier: Apache-2.0
"""Two processes give the advantages, the losses and the weights of one, whatever the lengths on each."""

import json
from typing import Any

import pytest

from ..support.accelerate_server import torchrun
from .dense_worker import RUNS, main


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def one(tiny_policy_path, tmp_path_factory):
    output = tmp_path_factory.mktemp("one")
    main(tiny_policy_path, output)
    return json.loads((output / "rank-0.json").read_text())


@pytest.fixture(scope="module")
def two(tiny_policy_path, tmp_path_factory):
    """Results of the two processes."""
    output = tmp_path_factory.mktemp("two")
    finished = torchrun(
        2, "-m", "tests.trainers.dense_worker", tiny_policy_path, str(output), ACCELERATE_USE_CPU="true"
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return [json.loads((output / f"rank-{rank}.json").read_text()) for rank in range(2)]


def joined(ranks: list[dict[str, Any]], key: str) -> list[list[list[float]]]:
    """Rows of all processes, batch by batch."""
    return [[row for part in parts for row in part] for parts in zip(*(rank[key] for rank in ranks), strict=True)]


@pytest.mark.parametrize("run", RUNS)
def test_two_processes_are_one(run, one, two):
    single, ranks = one[run], [rank[run] for rank in two]
    for key in ("advantages", "eval_advantages"):
        expected, actual = joined([single], key), joined(ranks, key)
        assert len(expected) == len(actual) > 0
        for batch, other_batch in zip(expected, actual, strict=True):
            for row, other_row in zip(batch, other_batch, strict=True):
                assert other_row == pytest.approx(row, abs=1e-5)
    assert len({value for batch in joined([single], "advantages") for row in batch for value in row}) > 20
    compared = set()
    for entry, other in zip(single["logs"], ranks[0]["logs"], strict=True):
        for key in ("loss", "reward", "advantage/std", "advantage/within_completion", "token_rewards/dense/mean"):
            if key in entry:
                assert other[key] == pytest.approx(entry[key], abs=1e-5), key
                compared.add(key)
    assert len(compared) == 5
    for rank in ranks:
        for name, values in single["weights"].items():
            assert rank["weights"][name] == pytest.approx(values, abs=1e-5), name


def test_a_function_that_differs_by_process_is_refused_on_all(one, two):
    for rank in two:
        assert "'one_kind_here_another_there' returned one number per token on some processes" in rank["error"]
    assert "'one_kind_here_another_there' returned one number per token for some completions" in one["error"]
