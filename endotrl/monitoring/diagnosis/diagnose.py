# SPDX-License-Identifier: Apache-2.0
"""Diagnosis of a run: reads its logs, runs all checks, and reports the most important finding first."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...reporting import counted
from ..detector import ENTROPY_KEYS, HELD_OUT, REWARD_KEYS
from .run_logs import Run, read_run, trend
from .symptoms import CLIPPED, ENOUGH, LENGTH, PROGRESS, ZERO_STD, Finding, all_findings, progress


Status = Literal["failure", "warning", "unclear", "healthy"]


@dataclass(frozen=True)
class Diagnosis:
    """
    Diagnosis of a run. `status` is the level of the most severe finding, `"failure"` or `"warning"`; `"unclear"` if
    there are too few log entries; `"healthy"` if nothing was found.
    """

    run: Run
    verdict: str  # the most important finding, in a sentence or two
    status: Status
    findings: list[Finding]  # failures, warnings, notes; each in order of importance
    held_out: list[str]  # reward functions that were given, or have weight 0 according to the log
    not_checked: list[str]  # checks that could not be run, because their metrics were not logged

    def to_dict(self) -> dict[str, Any]:
        """The diagnosis as JSON values."""
        return {
            "run": str(self.run.path),
            "source": self.run.source,
            "status": self.status,
            "verdict": self.verdict,
            "log_entries": len(self.run.steps),
            "last_step": self.run.entries[-1]["step"] if self.run.entries else None,
            "held_out": self.held_out,
            "findings": [asdict(finding) for finding in self.findings],
            "not_checked": self.not_checked,
            "notes": self.run.notes,
        }

    def __str__(self) -> str:
        lines = [f"- {finding.level}: {finding.says} {finding.evidence}" for finding in self.findings]
        return "\n".join([self.verdict, *lines])


def diagnose(path: str | Path, held_out: Sequence[str] | None = None) -> Diagnosis:
    """
    Diagnoses a finished or running run of any TRL trainer from its logs: whether it learns or collapses, and whether
    it has a common fault, such as a zero gradient, or a reward that is only length.

    Args:
        path (`str` or `Path`):
            `trainer_state.json`, an output folder or checkpoint, an offline W&B run, TensorBoard events, the folder
            of TRL's `completions/*.parquet`, or JSON Lines with a log entry per line.
        held_out (`list[str]`, *optional*):
            Names of reward functions that are not trained on. By default, if the logged `reward` is that of one
            function, all others with values in $[0, 1]$.

    Raises:
        `FileNotFoundError`, `ValueError`, `ImportError`: See [`read_run`]; also if a name of `held_out` was not
        logged.

    Example:
    ```python
    >>> from endotrl import diagnose

    >>> diagnosis = diagnose("outputs/grpo")
    >>> print(diagnosis.verdict)
    Failing: The gradient is zero: no parameter is trained, whatever the curves show.
    ```
    """
    run = read_run(path)
    if run.completions:
        from .completions import completion_entries  # imports torch

        entries, by_step = completion_entries(run.completions), {entry["step"]: entry for entry in run.steps}
        run.entries += [] if by_step else entries
        for entry in entries:
            step = by_step.get(entry["step"], {})
            step |= entry | step  # the log has precedence
    if not run.entries:
        raise ValueError(f"{run.completions[-1]} is not a Parquet file, or is being written, and is the only log.")
    logged = {key for entry in run.entries for key in entry}
    known = sorted(key[8:-5] for key in logged if key.startswith("rewards/") and key.endswith("/mean"))
    for name in held_out or []:
        if name not in known:
            raise ValueError(
                f"`held_out` contains {name!r}, but the run did not log a reward function of that name. It logged: "
                f"{', '.join(known) or 'none'}."
            )
    run.held_out = rewards_without_weight(run) if held_out is None else list(held_out)
    findings = all_findings(run)
    names = run.held_out or sorted(key.removeprefix(HELD_OUT) for key in logged if key.startswith(HELD_OUT))
    status, verdict = _verdict(run, findings, bool(names))
    needs: dict[str, tuple[str, ...]] = {"gradient": ("grad_norm",)}
    if has_reward := bool(run.series(*REWARD_KEYS)):
        needs |= {"groups with equal rewards": (ZERO_STD, "reward_std"), "truncation": (CLIPPED,)}
        needs |= {"entropy": ENTROPY_KEYS, "KL": ("kl",), "reward and length within groups": (LENGTH,)}
    else:
        needs["evaluation"] = ("eval_loss",)
    missing = [what for what, keys in needs.items() if not run.series(*keys)]
    missing += ["held-out reward"] if has_reward and not names else []
    missing += [] if run.checkpoints else ["weights of checkpoints"]
    return Diagnosis(run, verdict, status, findings, names, missing)


def rewards_without_weight(run: Run) -> list[str]:
    """
    Names of the reward functions that are not trained on, with values in [0, 1]: if the logged `reward` is that of one
    function, times its weight, all others.
    """
    keys = list(dict.fromkeys(k for e in run.steps for k in e if k.startswith("rewards/") and k.endswith("/mean")))
    rows = [[e.get(k, math.nan) for k in ("reward", *keys)] for e in run.steps]
    table = np.array([row for row in rows if all(map(math.isfinite, row))])
    if len(keys) < 2 or len(table) < len(keys) + 2:
        return []
    total, parts = table[:, :1], table[:, 1:]
    weights = (total * parts).sum(axis=0) / np.maximum((parts**2).sum(axis=0), 1e-300)
    is_reward = np.isclose(total, weights * parts, rtol=1e-5, atol=1e-8).all(axis=0) & (weights != 0)
    held_out = ~is_reward & (parts >= 0).all(axis=0) & (parts <= 1).all(axis=0) & (is_reward.sum() == 1)
    return [key[8:-5] for key, is_held_out in zip(keys, held_out, strict=True) if is_held_out]


def _verdict(run: Run, findings: Sequence[Finding], has_held_out: bool) -> tuple[Status, str]:
    faults = [finding for finding in findings if finding.level != "note"]
    if faults:
        more = f" ({counted(len(faults) - 1, 'more problem')} below.)" if len(faults) > 1 else ""
        fails = faults[0].level == "failure"
        return ("failure" if fails else "warning"), f"{'Failing' if fails else 'Warning'}: {faults[0].says}{more}"
    key, values, z = progress(run)
    if len(values) < ENOUGH or (len(values) < 2 * ENOUGH and z <= 2):
        what = f"of `{key}`" if key else "with a reward or a loss"
        return "unclear", (
            f"Too few log entries to judge: the run has {len(values)} {what}, but a trend requires {2 * ENOUGH}. Log "
            "more often (`logging_steps=1`), or try again later."
        )
    change = trend(values)
    verdict = f"No problems found. {PROGRESS[key]} went from {change.first:.3g} to {change.last:.3g} in {len(values)} "
    verdict += "log entries"
    if z <= 2:
        return "healthy", f"{verdict}, and was good from the start."
    verdict += f" ({z:+.0f} standard errors)."
    if key in REWARD_KEYS and not has_held_out:
        verdict += " The trained reward alone does not show whether the answers improve: log a held-out reward."
    return "healthy", verdict
