# SPDX-License-Identifier: Apache-2.0
"""Each fault is found in a log that has it, by its name and level, and none in a log that has none."""

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from endotrl import diagnose
from endotrl.monitoring import Diagnosis

from .runs import changed, healthy, noise, write_state


def diagnosed(path: Path, rows: list[dict[str, Any]], **options: Any) -> Diagnosis:
    return diagnose(write_state(path / "trainer_state.json", rows), **options)


def levels(diagnosis: Diagnosis) -> dict[str, str]:
    return {finding.name: finding.level for finding in diagnosis.findings}


def test_a_healthy_run(tmp_path: Path) -> None:
    diagnosis = diagnosed(tmp_path, healthy())
    assert (diagnosis.status, diagnosis.findings) == ("healthy", [])
    assert diagnosis.held_out == ["accuracy"], "The reward does not depend on it."
    assert diagnosis.verdict.startswith("No problems found. The reward went from -1.9")


wobble = noise(0.01, 7)
FAULTS: list[tuple[dict[str, Any], str, str]] = [
    ({"grad_norm": math.nan}, "not_finite", "failure"),
    ({"loss": lambda t: math.nan if t > 0.7 else 0.1}, "not_finite", "failure"),
    ({"reward": None}, "not_finite", "failure"),
    ({"learning_rate": 0.0}, "learning_rate", "failure"),
    ({"learning_rate": lambda t: 1e-6 * (t + 0.01)}, "learning_rate", "warning"),
    ({"grad_norm": 0.0}, "zero_gradient", "failure"),
    ({"kl": 0.0}, "unchanged_weights", "failure"),
    ({"zero": 1.0, "reward": 0.0, "reward_std": 0.0, "grad_norm": 0.0}, "equal_rewards", "failure"),
    ({"zero": 0.7, "reward": lambda t: wobble()}, "equal_rewards", "warning"),
    ({"clipped": 1.0}, "truncated", "failure"),
    ({"clipped": lambda t: t}, "truncated", "warning"),
    ({"entropy": lambda t: 0.5 * math.exp(-8 * t)}, "entropy", "failure"),
    ({"kl": lambda t: 0.01 * math.exp(7 * t)}, "kl_divergence", "failure"),
    ({"collapse/length_correlation": 0.97}, "reward_is_length", "warning"),
    ({"collapse/length_correlation": -0.97, "length": lambda t: 100 - 70 * t}, "reward_is_length", "failure"),
    ({"accuracy": lambda t: 0.9 - 0.6 * t + wobble()}, "collapse", "failure"),
    ({"accuracy": lambda t: 0.6 + 3 * wobble()}, "reward_alone", "warning"),
    ({"reward": lambda t: -1 + 10 * wobble()}, "not_learning", "warning"),
    ({"reward": lambda t: -1 - t + wobble()}, "not_learning", "failure"),
    (
        {"reward": lambda t: -1 + (4 * t if t < 0.4 else max(0, 1.6 - 4 * (t - 0.4))) + wobble()},
        "not_learning",
        "warning",
    ),
    ({"grad_norm": lambda t: math.exp(10 * t)}, "off_policy", "warning"),
    ({"ppo/explained_variance": -0.2}, "critic", "warning"),
]


@pytest.mark.parametrize(("keys", "name", "level"), FAULTS, ids=[f"{f[1]}-{i}" for i, f in enumerate(FAULTS)])
def test_a_fault_is_found(keys: dict[str, Any], name: str, level: str, tmp_path: Path) -> None:
    found = levels(diagnosed(tmp_path, changed(**keys)))
    assert found.get(name) == level, found


def test_the_cause_comes_first(tmp_path: Path) -> None:
    equal = {"zero": 1.0, "reward": 0.0, "reward_std": 0.0}
    for cause, first in (
        # Equal rewards have a gradient of zero, and weights that do not change: one thing is to be mended.
        ({"grad_norm": 0.0, "kl": 0.0}, ["equal_rewards", "unchanged_weights"]),
        ({"clipped": 1.0}, ["truncated", "equal_rewards"]),
    ):
        findings = diagnosed(tmp_path, changed(**equal, **cause)).findings
        assert [finding.name for finding in findings][:2] == first


def test_what_is_no_fault(tmp_path: Path) -> None:
    once = changed(grad_norm=lambda t: math.inf if t == 0.05 else 0.5)  # float16 finds its scale so
    assert levels(diagnosed(tmp_path, once)) == {}
    groups_of_one = changed(zero=1.0, **{"ppo/advantages_std": 1.0})  # PPO: TRL logs 1 for each
    assert levels(diagnosed(tmp_path, groups_of_one)) == {}
    converged = changed(zero=lambda t: min(1.0, 2 * t), reward=lambda t: min(1.0, 0.3 + t) + wobble())
    assert levels(diagnosed(tmp_path, converged)) == {"equal_rewards": "note"}
    rises = [{"step": i, "reward": 0.1 * i, "reward_std": 0.0} for i in range(30)]  # without the fraction
    assert levels(diagnosed(tmp_path, rises)) == {"equal_rewards": "failure"}
    (finding,) = diagnosed(tmp_path, changed(reward=lambda t: math.nan if t == 0.05 else t)).findings
    assert (finding.level, finding.says) == ("warning", "The reward functions return no reward at some steps.")


@pytest.mark.parametrize("steps", [1, 4, 9])
def test_too_few_points(steps: int, tmp_path: Path) -> None:
    diagnosis = diagnosed(tmp_path, healthy()[:steps])
    assert diagnosis.status == "unclear" and diagnosis.verdict.startswith("Too few log entries to judge")


def test_held_out_can_be_named(tmp_path: Path) -> None:
    rows = changed(accuracy=lambda t: 0.9 - 0.6 * t + wobble())
    for row in rows:  # it is trained on, with little weight: not found by itself
        row["reward"] = row["rewards/endogenous_reward/mean"] + 0.1 * row["rewards/accuracy/mean"]
    assert "collapse" not in levels(diagnosed(tmp_path, rows))
    assert levels(diagnosed(tmp_path, rows, held_out=["accuracy"]))["collapse"] == "failure"
    with pytest.raises(ValueError, match="contains 'right', but the run did not log .* It logged: accuracy, endo"):
        diagnosed(tmp_path, rows, held_out=["right"])


def per_completion(**changes: Any) -> list[dict[str, float]]:
    """TRL's PPO (until 1.12) and OnlineDPO."""
    rows = [{"scores": i / 30 + wobble(), "kl": i / 10, "entropy": 60 - i / 3} for i in range(60)]
    rows = [row | {key: value(i / 60) for key, value in changes.items()} for i, row in enumerate(rows)]
    return [{f"objective/{key}": value for key, value in row.items()} for row in rows]


OTHER_TRAINERS: dict[str, tuple[list[dict[str, float]], dict[str, str]]] = {
    "sft": ([{"loss": 2 / (1 + i), "grad_norm": 1.0} for i in range(40)], {}),
    # What has been learnt by heart: TRL's SFT logs an entropy, too.
    "by-heart": ([{"loss": 2 / (1 + i), "entropy": math.exp(-i / 5)} for i in range(40)], {}),
    "sft-flat": ([{"loss": 2 + wobble(), "grad_norm": 1.0} for i in range(40)], {"not_learning": "warning"}),
    "dpo-flat": (
        [{"loss": 0.7, "rewards/accuracies": 0.5 + wobble()} for i in range(40)],
        {"not_learning": "warning"},
    ),
    "dpo": ([{"loss": 0.7, "rewards/accuracies": 0.5 + i / 100} for i in range(40)], {}),
    # KTO's `kl` is its baseline, in nats per completion, and always 0 with `loss_type="apo_zero_unpaired"`.
    "kto": ([{"loss": 0.5 - i / 200 + wobble(), "kl": i / 4, "rewards/chosen": 0.1} for i in range(40)], {}),
    "kto-apo": ([{"loss": 0.5 - i / 200 + wobble(), "kl": 0.0, "rewards/chosen": 0.1} for i in range(40)], {}),
    "overfitted": (
        [{"loss": 2 / (1 + i)} for i in range(40)] + [{"eval_loss": x} for x in (2.0, 1.0, 1.5, 1.6)],
        {"overfitting": "warning"},
    ),
    "ppo": (per_completion(), {}),
    "ppo-kl": (per_completion(kl=lambda t: 0.5 * math.exp(7 * t)), {"kl_divergence": "failure"}),
    "ppo-entropy": (per_completion(entropy=lambda t: 60 * math.exp(-12 * t)), {"entropy": "failure"}),
}


@pytest.mark.parametrize(("rows", "expected"), OTHER_TRAINERS.values(), ids=OTHER_TRAINERS)
def test_other_trainers(rows: list[dict[str, float]], expected: dict[str, str], tmp_path: Path) -> None:
    assert levels(diagnosed(tmp_path, [{"step": i + 1, **row} for i, row in enumerate(rows)])) == expected


@pytest.mark.parametrize("moves", [False, True])
def test_weights_of_checkpoints(moves: bool, tmp_path: Path) -> None:
    for step in (10, 60):
        folder = tmp_path / f"checkpoint-{step}"
        write_state(folder / "trainer_state.json", healthy()[:step])
        weights = {"a.weight": torch.ones(3), "embed.weight": torch.ones(2, 2) + (step if moves else 0)}
        save_file(weights, folder / "model.safetensors")
    assert levels(diagnose(tmp_path)) == ({} if moves else {"unchanged_weights": "failure"})


def test_adapter_that_was_never_trained(tmp_path: Path) -> None:
    write_state(tmp_path / "checkpoint-60" / "trainer_state.json", healthy())
    adapter = {"q.lora_A.weight": torch.ones(2, 4), "q.lora_B.weight": torch.zeros(4, 2)}
    save_file(adapter, tmp_path / "checkpoint-60" / "adapter_model.safetensors")
    (finding,) = diagnose(tmp_path).findings
    assert finding.name == "unchanged_weights" and "checkpoint-60" in finding.evidence


def test_recorded_collapses_and_healthy_runs(tmp_path: Path) -> None:
    """The monitor's own runs (docs/results/collapse.md): all collapses are failures, no healthy run is one."""
    root = Path(__file__).parents[3]
    results = json.loads(gzip.decompress((root / "docs" / "results" / "collapse.json.gz").read_bytes()))["results"]
    healthy_runs = {"endogenous", "sharpened_slow", "sharpened", "mean", "verifiable"}
    healthy_runs |= {"backwards", "backwards_sharpened", "backwards_mean", "backwards_verifiable"}
    lost_less_than_a_point = [("small_certainty_slow", 5), ("small_certainty_slow", 6)]
    for result in results:
        expected = "healthy" if result["run"].removeprefix("small_") in healthy_runs else "failure"
        if (result["run"], result["seed"]) in lost_less_than_a_point:
            expected = "warning"
        assert diagnosed(tmp_path, result["log"]).status == expected, result["run"]
    assert len(results) == 66
