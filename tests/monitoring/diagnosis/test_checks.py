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

from .runs import changed, healthy, noise, write_state


def names(path: Path, rows: list[dict[str, Any]], **options: Any) -> dict[str, str]:
    diagnosis = diagnose(write_state(path / "trainer_state.json", rows), **options)
    return {finding.name: finding.level for finding in diagnosis.findings}


def test_a_healthy_run(tmp_path: Path) -> None:
    diagnosis = diagnose(write_state(tmp_path / "trainer_state.json", healthy()))
    assert (diagnosis.status, diagnosis.findings) == ("healthy", [])
    assert diagnosis.held_out == ["accuracy"], "The reward does not depend on it."
    assert diagnosis.verdict.startswith("No fault found: The reward went from -1.9")


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
    found = names(tmp_path, changed(**keys))
    assert found.get(name) == level, found


def test_the_cause_comes_first(tmp_path: Path) -> None:
    # Equal rewards have a gradient of zero, and weights that do not change: one thing is to be mended.
    rows = changed(zero=1.0, reward=0.0, reward_std=0.0, grad_norm=0.0, kl=0.0)
    path = write_state(tmp_path / "trainer_state.json", rows)
    assert [f.name for f in diagnose(path).findings][:2] == ["equal_rewards", "unchanged_weights"]


def test_answers_that_are_cut_off_have_equal_rewards(tmp_path: Path) -> None:
    path = write_state(tmp_path / "trainer_state.json", changed(clipped=1.0, zero=1.0, reward=0.0, reward_std=0.0))
    assert [f.name for f in diagnose(path).findings][:2] == ["truncated", "equal_rewards"]


def test_single_nans_are_no_fault(tmp_path: Path) -> None:
    rows = healthy()
    rows[3]["grad_norm"] = math.inf  # float16 finds its scale so
    assert names(tmp_path, rows) == {}


def test_a_reward_is_missing_once(tmp_path: Path) -> None:
    rows = healthy()
    rows[3]["reward"] = math.nan
    (finding,) = diagnose(write_state(tmp_path / "trainer_state.json", rows)).findings
    assert (finding.level, finding.says) == ("warning", "The reward functions give no reward at single steps.")


def test_converged_is_no_fault(tmp_path: Path) -> None:
    rows = changed(zero=lambda t: min(1.0, 2 * t), reward=lambda t: min(1.0, 0.3 + t) + wobble())
    assert names(tmp_path, rows) == {"equal_rewards": "note"}


def test_groups_of_one_are_no_fault(tmp_path: Path) -> None:
    # PPO: TRL logs 1 for every group of one.
    assert names(tmp_path, changed(zero=1.0, **{"ppo/advantages_std": 1.0})) == {}


@pytest.mark.parametrize("steps", [1, 4, 9])
def test_too_few_points(steps: int, tmp_path: Path) -> None:
    diagnosis = diagnose(write_state(tmp_path / "trainer_state.json", healthy()[:steps]))
    assert diagnosis.status == "unclear" and diagnosis.verdict.startswith("Too few points to tell")


def test_held_out_can_be_named(tmp_path: Path) -> None:
    rows = changed(accuracy=lambda t: 0.9 - 0.6 * t + wobble())
    for row in rows:  # it is trained on, with little weight: not found by itself
        row["reward"] = row["rewards/endogenous_reward/mean"] + 0.1 * row["rewards/accuracy/mean"]
    assert "collapse" not in names(tmp_path, rows)
    assert names(tmp_path, rows, held_out=["accuracy"])["collapse"] == "failure"
    with pytest.raises(ValueError, match="'right', which the run did not log. Its reward functions: accuracy, endo"):
        names(tmp_path, rows, held_out=["right"])


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"loss": 2 / (1 + i), "grad_norm": 1.0} for i in range(40)], {}),
        # What has been learnt by heart: TRL's SFT logs an entropy, too.
        ([{"loss": 2 / (1 + i), "entropy": math.exp(-i / 5)} for i in range(40)], {}),
        ([{"loss": 2 + wobble(), "grad_norm": 1.0} for i in range(40)], {"not_learning": "warning"}),
        ([{"loss": 0.7, "rewards/accuracies": 0.5 + wobble()} for i in range(40)], {"not_learning": "warning"}),
        ([{"loss": 0.7, "rewards/accuracies": 0.5 + i / 100} for i in range(40)], {}),
        # KTO's `kl` is its baseline, in nats per completion, and always 0 with `loss_type="apo_zero_unpaired"`.
        ([{"loss": 0.5 - i / 200 + wobble(), "kl": i / 4, "rewards/chosen": 0.1} for i in range(40)], {}),
        ([{"loss": 0.5 - i / 200 + wobble(), "kl": 0.0, "rewards/chosen": 0.1} for i in range(40)], {}),
        (
            [{"loss": 2 / (1 + i)} for i in range(40)] + [{"eval_loss": x} for x in (2.0, 1.0, 1.5, 1.6)],
            {"overfitting": "warning"},
        ),
    ],
    ids=["sft", "by-heart", "sft-flat", "dpo-flat", "dpo", "kto", "kto-apo", "overfitted"],
)
def test_other_trainers(rows: list[dict[str, float]], expected: dict[str, str], tmp_path: Path) -> None:
    rows = [{"step": i + 1, **row} for i, row in enumerate(rows)]
    assert names(tmp_path, rows) == expected


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, {}),
        ({"objective/kl": lambda t: 0.5 * math.exp(7 * t)}, {"kl_divergence": "failure"}),
        ({"objective/entropy": lambda t: 60 * math.exp(-12 * t)}, {"entropy": "failure"}),
    ],
    ids=["healthy", "kl", "entropy"],
)
def test_numbers_per_completion(keys: dict[str, Any], expected: dict[str, str], tmp_path: Path) -> None:
    """TRL's PPO (until 1.12) and OnlineDPO."""
    usual = {"objective/kl": lambda t: 6 * t, "objective/entropy": lambda t: 60 - 20 * t, **keys}
    rows = [
        {"step": i + 1, "objective/scores": i / 30 + wobble(), **{key: value(i / 60) for key, value in usual.items()}}
        for i in range(60)
    ]
    assert names(tmp_path, rows) == expected


@pytest.mark.parametrize(("moves", "level"), [(False, "failure"), (True, None)])
def test_weights_of_checkpoints(moves: bool, level: str | None, tmp_path: Path) -> None:
    for step in (10, 60):
        folder = tmp_path / f"checkpoint-{step}"
        write_state(folder / "trainer_state.json", healthy()[:step])
        weights = {"a.weight": torch.ones(3), "embed.weight": torch.ones(2, 2) + (step if moves else 0)}
        save_file(weights, folder / "model.safetensors")
    found = {f.name: f for f in diagnose(tmp_path).findings}
    assert (found["unchanged_weights"].level if found else None) == level


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
    for result in results:
        path = write_state(tmp_path / "trainer_state.json", result["log"])
        expected = "healthy" if result["run"].removeprefix("small_") in healthy_runs else "failure"
        assert diagnose(path).status == expected, result["run"]
    assert len(results) == 45
