# SPDX-License-Identifier: Apache-2.0
"""Logs as TRL writes them, made up: a healthy run, to which tests add one fault each."""

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def noise(size: float, seed: int) -> Callable[[], float]:
    generator = random.Random(seed)
    return lambda: generator.gauss(0.0, size)


def healthy(steps: int = 60) -> list[dict[str, Any]]:
    """Reward and accuracy (of weight 0) rise beyond their noise; everything else is as usual."""
    reward, accuracy, rest = noise(0.1, 0), noise(0.03, 1), noise(0.02, 2)
    return [
        {
            "step": i + 1,
            "epoch": i / steps,
            "loss": 0.01 + rest(),
            "grad_norm": 0.5 + rest(),
            "learning_rate": 1e-5 * (1 - i / steps),
            "reward": (r := -2 + i / steps + reward()),
            "rewards/endogenous_reward/mean": r,
            "rewards/accuracy/mean": 0.6 + 0.3 * i / steps + accuracy(),
            "reward_std": 0.4 + rest(),
            "frac_reward_zero_std": 0.1 + abs(rest()),
            "entropy": 0.5 - 0.2 * i / steps + rest(),
            "kl": 0.001 * i + abs(rest()) * 1e-3,
            "completions/mean_length": 100 + 100 * rest(),
            "completions/clipped_ratio": abs(rest()),
        }
        for i in range(steps)
    ]


def changed(**keys: Any) -> list[dict[str, Any]]:
    """The healthy log with other numbers: a value, or a function of the fraction of the run that is over."""
    rows = healthy()
    for i, row in enumerate(rows):
        for key, value in keys.items():
            name = {"accuracy": "rewards/accuracy/mean", "clipped": "completions/clipped_ratio"}.get(key, key)
            name = {"length": "completions/mean_length", "zero": "frac_reward_zero_std"}.get(key, name)
            row[name] = value(i / len(rows)) if callable(value) else value
        if "reward" in keys:
            row["rewards/endogenous_reward/mean"] = row["reward"]
    return rows


def write_state(path: Path, rows: list[Mapping[str, Any]], **state: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"global_step": rows[-1]["step"] if rows else 0, "log_history": rows, **state}))
    return path
