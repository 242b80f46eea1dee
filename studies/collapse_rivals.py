# SPDX-License-Identifier: Apache-2.0
"""
The runs of `studies.collapse` under other monitors, which read the same logs step by step: rldoctor, rlprobe, rlwatch.

    pip install rldoctor==0.2.0 rlprobe==0.1.0 rlwatch==0.5.1
    python -m studies.collapse_rivals docs/results/collapse.json.gz --first-seed 3
"""

import argparse
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.measure import read_figures
from endotrl.monitoring import Detector

from .collapse import lost_by
from .collapse_runs import ARMS


Log = list[dict[str, float]]
HELD_OUT = "collapse/held_out/accuracy"
OF_HELD_OUT = ("collapse/held_out", "collapse/agreement", "collapse/change", "collapse/slope")


def ours(log: Log) -> int | None:
    """First alarm of the monitor of this package."""
    detector = Detector()
    return next((int(entry["step"]) for entry in log if detector.update(entry).alarm), None)


def rldoctor(log: Log, **settings: Any) -> int | None:
    """First warning of its live monitor."""
    from rl_doctor.live import LiveMonitor

    monitor = LiveMonitor(config={"num_generations": 8}, on_finding=lambda finding: None, **settings)
    return next((int(entry["step"]) for entry in log if monitor.log(_scalars(entry), int(entry["step"]))), None)


def rlprobe(log: Log) -> int | None:
    """First finding above a note."""
    from rlprobe.doctor.engine import diagnose_view
    from rlprobe.doctor.runview import RunView
    from rlprobe.schemas import RunManifest, StepRecord

    names = {
        "reward_mean": "reward",
        "reward_std": "reward_std",
        "kl_mean": "kl",
        "entropy_mean": "entropy",
        "zero_variance_group_frac": "frac_reward_zero_std",
        "grad_norm": "grad_norm",
        "completion_len_mean": "completions/mean_length",
        "truncation_rate": "completions/clipped_ratio",
        "repetition_rate": "collapse/repetition",
    }
    manifest = RunManifest(run_id="run", created_at="2026-01-01T00:00:00", algorithm="grpo")
    rows = []
    for entry in log:
        accuracy = {"accuracy": entry[HELD_OUT]} if HELD_OUT in entry else {}
        found = {name: entry[key] for name, key in names.items() if key in entry}
        rows.append(StepRecord(step=int(entry["step"]), reward_components=accuracy, **found))
        view = RunView(manifest, list(rows))
        if len(rows) >= 8 and any(finding.severity != "info" for finding in diagnose_view(view)):
            return int(entry["step"])
    return None


def rlwatch(log: Log) -> int | None:
    """First alert."""
    from rlwatch.config import RLWatchConfig
    from rlwatch.detectors import DetectorSuite

    suite = DetectorSuite(RLWatchConfig())
    names = {"entropy": "entropy", "kl_divergence": "kl", "reward_mean": "reward", "reward_std": "reward_std"}
    names |= {"grad_norm": "grad_norm", "learning_rate": "learning_rate"}
    for entry in log:
        known = {name: entry[key] for name, key in names.items() if key in entry and name != "learning_rate"}
        if suite.check_step(int(entry["step"]), **known):
            return int(entry["step"])
    return None


MONITORS: dict[str, Callable[[Log], int | None]] = {
    "CollapseMonitor": ours,
    "rldoctor, as it comes": rldoctor,
    "rldoctor, `reward_hacking` at every step": lambda log: rldoctor(
        log, check_every=1, min_steps=8, only=("reward_hacking",)
    ),
    "rlprobe": rlprobe,
    "rlwatch": rlwatch,
}


def _scalars(entry: dict[str, float]) -> dict[str, float]:
    """A log entry with the held-out reward under the name that rldoctor reads."""
    accuracy = {"eval_score": entry[HELD_OUT]} if HELD_OUT in entry else {}
    return {key: value for key, value in entry.items() if not key.startswith("collapse/")} | accuracy


def rows(results: list[dict[str, Any]]) -> Iterator[list[str]]:
    """One row a monitor: with and without the held-out reward, collapses noticed, before five points, false alarms."""
    for name, monitor in MONITORS.items():
        cells = [name]
        for blind in (False, True):
            alarms = []
            for result in results:
                log = [
                    {k: v for k, v in entry.items() if not (blind and k.startswith(OF_HELD_OUT))}
                    for entry in result["log"]
                ]
                alarms.append((result, monitor(log)))
            noticed = [lost_by(r, step) for r, step in alarms if ARMS[r["run"]].collapses and step is not None]
            false = sum(step is not None for r, step in alarms if not ARMS[r["run"]].collapses)
            cells.append(f"{len(noticed)}, {sum(lost < 0.05 for lost in noticed)}, {false}")
        yield cells


def main() -> None:
    """Prints a Markdown table of all runs in the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="Results of `studies.collapse`.")
    parser.add_argument("--first-seed", type=int, default=0, help="Only runs of this seed and above.")
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    results = [r for path in args.files for r in read_figures(path)["results"] if r["seed"] >= args.first_seed]
    number = sum(ARMS[result["run"]].collapses for result in results)
    sys.stdout.write(
        f"Of {number} collapses noticed, of these before 5 points were lost; false alarms in "
        f"{len(results) - number}.\n\n"
        "| monitor | with a held-out reward | without |\n| --- | --- | --- |\n"
    )
    for cells in rows(results):
        sys.stdout.write(f"| {' | '.join(cells)} |\n")


if __name__ == "__main__":
    main()
