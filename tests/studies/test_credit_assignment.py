# SPDX-License-Identifier: Apache-2.0
"""`studies/credit_assignment.py`: its reward, its statistics, and a few steps of every arm."""

from pathlib import Path

import pytest
import torch

from benchmarks.measure import read_figures
from studies import credit_assignment as benchmark


def test_reward_looks_at_one_word() -> None:
    right, wrong = 7, 8
    reward = benchmark.DecidingWord({"q0": right})
    ids = [[wrong, wrong, right, wrong], [right, right, wrong, right], [right, right], [wrong, wrong, right]]
    batch = {"prompts": ["q0"] * 4, "completions": [""] * 4, "completion_ids": ids}
    assert reward(**batch) == [1.0, 0.0, 0.0, 1.0]
    scores = reward.outcome_and_token_rewards(**batch)
    assert scores.outcomes == reward(**batch)
    assert [row.tolist() for row in scores.token_rewards] == [[0, 0, 1, 0], [0, 0, 0, 0], [0, 0], [0, 0, 1]]


def test_samples_to_threshold() -> None:
    assert benchmark.WINDOW == 5
    rates = [0.0] * 5 + [1.0] * 5
    # The mean of five steps is 0.8 when four of them are 1: at step 9.
    assert benchmark.samples_to_threshold(rates) == 9 * benchmark.BATCH
    assert benchmark.samples_to_threshold([0.5] * 20) is None
    assert benchmark.samples_to_threshold([1.0] * 4) is None  # too few steps to say


def test_interval_covers_the_mean() -> None:
    values = torch.tensor([[0.0, 1.0], [0.5, 1.0], [1.0, 1.0]], dtype=torch.float64)
    mean, low, high = benchmark.mean_interval(values)
    assert mean == [0.5, 1.0] and low[1] == high[1] == 1.0
    assert 0.0 <= low[0] < 0.5 < high[0] <= 1.0


def test_table_and_best_learning_rate() -> None:
    runs = {
        "grpo": {"0.001": [[0.1] * 10] * 3, "0.003": [[0.2] * 10] * 3},
        "dense": {"0.001": [[0.9] * 10] * 3, "0.003": [[1.0] * 10] * 3},
    }
    reached = {
        "grpo": {"0.001": [None, 500, None], "0.003": [None, None, None]},
        "dense": {"0.001": [400, 320, 500], "0.003": [None, 320, 320]},
    }
    best = {arm: benchmark.best_learning_rate(runs[arm], reached[arm], 640) for arm in runs}
    assert best == {"grpo": "0.001", "dense": "0.001"}
    assert benchmark.best_learning_rate(runs["grpo"], {rate: [None] for rate in runs["grpo"]}, 640) == "0.003"
    results = {"best_learning_rate": best, "success_rates": runs, "samples_to_threshold": reached}
    results["settings"] = {"samples": 640}
    _, rows = benchmark.summary_rows(results)
    assert [row[1:] for row in rows] == [["0.001", "> 640", "1 of 3", "10%"], ["0.001", "400", "3 of 3", "90%"]]
    assert len(benchmark.summary_rows(results, every_rate=True)[1]) == 4


@pytest.mark.slow
def test_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--seeds", "1", "--steps", "2", "--learning_rates", "1e-3", "--workers", "1"]
    assert benchmark.main([*settings, "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert all(label in printed for label in benchmark.LABELS.values())
    results = read_figures(tmp_path / "credit.json.gz")
    rates = {arm: by_rate["0.001"] for arm, by_rate in results["success_rates"].items()}
    assert rates.keys() == benchmark.LABELS.keys()
    for runs in rates.values():
        assert len(runs) == 1 and len(runs[0]) == 2
        assert all(0 <= rate <= 0.5 for rate in runs[0])
    # The same model, and for the two with groups the same questions and samples, before anything is learned.
    assert rates["grpo"][0][0] == rates["dense"][0][0]
    assert rates["ppo"][0][0] == rates["ppo_outcome"][0][0]
    assert "![Right responses against samples](credit.png)" in (tmp_path / "credit.md").read_text(encoding="utf-8")
    assert (tmp_path / "credit.png").stat().st_size < 200_000
