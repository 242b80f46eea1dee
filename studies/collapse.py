# SPDX-License-Identifier: Apache-2.0
r"""
Runs driven into collapse on purpose, and healthy ones, under the collapse monitor: when it speaks, and what was lost
by then.

Three-digit addition, on whose runs the monitor's thresholds were chosen, and another one, letters to be written
backwards, on which they were not. TRL's GRPO at a constant learning rate. Some runs are driven hard, and lose 20
points in one update, which no monitor can prevent; *slow* ones move as a real run does: 512 answers per step, a
learning rate so low that five points take ten steps or more. The *misled* base model was shown, for some
more steps, demonstrations of which 60% are wrong in one and the same way: it is sure of what is wrong, and sharpening
it makes it wrong more often. Accuracy is a reward of weight 0, on the questions that are trained on; what is lost is
measured on 1,000 others.

    python -m studies.collapse --bases DIR                     # about 25 minutes on one core; finished runs are kept
    python -m studies.collapse --bases DIR --runs entropy      # one of the runs
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from tqdm.auto import tqdm

from benchmarks.measure import write_figures
from endotrl.monitoring.detector import FIRST_LOG_PROB_CHANGE as FIRST_LOG_PROB
from endotrl.reporting import terminal_table
from endotrl.reporting.curves import COLORS

from .arithmetic_runs import NUM_HELD_OUT
from .collapse_runs import ARMS, EVERY, TASKS, described, judged_again, kept_results, run, use_one_thread


def held_out_at(result: dict[str, Any], step: int) -> float:
    """Held-out accuracy at a step, between two measurements by a straight line."""
    points = sorted((int(s), a) for s, a in result["held_out"].items())
    for (before, low), (after, high) in zip(points, points[1:], strict=False):
        if before <= step <= after:
            return low + (high - low) * (step - before) / (after - before)
    return points[-1][1]


def lost_by(result: dict[str, Any], step: int) -> float:
    """Held-out accuracy lost at a step, from the best measurement until then."""
    best = max(a for s, a in result["held_out"].items() if int(s) <= step)
    return best - held_out_at(result, step)


def five_lost(result: dict[str, Any]) -> int | None:
    """The first measured step at which five points were lost for good."""
    steps = sorted(map(int, result["held_out"]))
    below = [lost_by(result, step) > 0.05 for step in steps]
    return next((step for i, step in enumerate(steps) if all(below[i:])), None)


SUMMARY = ["runs", "number", "alarm", "before 5 points were lost", "without held-out reward: alarm", "before 5 points"]
FIRST_NEW_SEED = 3  # thresholds were chosen on runs of those before
SLOW_ANSWERS = 512
HEADER = [
    "run",
    "seed",
    "answers, learning rate",
    "accuracy: first, best, last",
    "5 points lost at step",
    "alarm at step",
    "lost by then",
    "without held-out reward",
]


def table_rows(results: list[dict[str, Any]], task: str) -> list[list[str]]:
    """One row a run of a task: those meant to collapse first."""
    rows = []
    of_task = [result for result in results if ARMS[result["run"]].task == task]
    for result in sorted(of_task, key=lambda r: (list(ARMS).index(r["run"]), r["seed"])):
        values = list(result["held_out"].values())
        alarm = result["alarms"][0][0] if result["alarms"] else None
        blind = result["blind"]
        arm, late = ARMS[result["run"]], five_lost(result)
        silent = "none" if knows_first_policy(result) else "none (first policy not logged)"
        rows.append(
            [
                arm.label,
                str(result["seed"]),
                f"{arm.answers}, {arm.learning_rate:.0e}".replace("e-0", "e-"),
                f"{values[0]:.1%}, {max(values):.1%}, {values[-1]:.1%}",
                "" if late is None else str(late),
                "none" if alarm is None else str(alarm),
                "" if alarm is None else f"{100 * lost_by(result, alarm):.1f} points",
                silent if blind is None else f"step {blind[0]} ({100 * lost_by(result, blind[0]):.1f} points)",
            ]
        )
    return rows


def kind_of(result: dict[str, Any]) -> str:
    """Of a run: healthy, or how it is driven into collapse."""
    arm = ARMS[result["run"]]
    if not arm.collapses:
        return "healthy"
    what = "sure of what is wrong (misled base)" if arm.misled else "the reward leads away"
    return f"{what}, {'slow' if arm.answers == SLOW_ANSWERS else 'driven hard'}"


def summary_rows(results: list[dict[str, Any]]) -> list[list[str]]:
    """Runs of each kind, and how many of them raised an alarm, with and without a held-out reward."""
    rows = []
    for name in sorted({kind_of(result) for result in results}, key=lambda name: (name == "healthy", name)):
        runs = [result for result in results if kind_of(result) == name]
        row = [name, str(len(runs))]
        for blind in (False, True):
            judged = [r for r in runs if not blind or knows_first_policy(r)]
            steps = [(r, r["blind"] if blind else next(iter(r["alarms"]), None)) for r in judged]
            lost = [lost_by(r, alarm[0]) for r, alarm in steps if alarm is not None]
            row.append(f"{len(lost)} of {len(judged)}" if judged else "")
            row.append("" if name == "healthy" or not judged else str(sum(points < 0.05 for points in lost)))
        rows.append(row)
    return rows


def slow_collapses(results: list[dict[str, Any]]) -> str:
    """Alarms in slow runs that lost five points, in a sentence."""
    runs = [r for r in results if ARMS[r["run"]].collapses and ARMS[r["run"]].answers == SLOW_ANSWERS]
    lost = [r for r in runs if five_lost(r) is not None]
    alarmed = [r for r in lost if r["alarms"]]
    in_time = sum(lost_by(r, r["alarms"][0][0]) < 0.05 for r in alarmed)
    return (
        f"Of {len(runs)} slow runs that were meant to collapse, {len(lost)} lost 5 points for good: {len(alarmed)} of "
        f"these raised the alarm, {in_time} of them before 5 points were lost."
    )


def knows_first_policy(result: dict[str, Any]) -> bool:
    """Whether the log has the first policy's log-probability, by which a run without a held-out reward is judged."""
    return any(FIRST_LOG_PROB in entry for entry in result["log"])


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Held-out accuracy over steps, with the alarm."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(len(TASKS), 2, figsize=(10, 4 * len(TASKS)), layout="constrained", sharey=True)
    kinds = [(task, collapses) for task in TASKS for collapses in (True, False)]
    for panel, (task, collapses) in zip(panels.flat, kinds, strict=True):
        arms = [name for name, arm in ARMS.items() if (arm.task, arm.collapses) == (task, collapses)]
        for result in results:
            if result["run"] not in arms:
                continue
            number = arms.index(result["run"])
            color, style = COLORS[number % len(COLORS)], ("-", "--", ":")[number // len(COLORS) % 3]
            points = sorted((int(step), accuracy) for step, accuracy in result["held_out"].items())
            first_seed = min(r["seed"] for r in results if r["run"] == result["run"])
            label = ARMS[result["run"]].label if result["seed"] == first_seed else None
            panel.plot(*zip(*points, strict=True), color=color, linestyle=style, label=label, linewidth=1.5)
            if result["alarms"]:
                step = result["alarms"][0][0]
                panel.plot(step, held_out_at(result, step), "v", color=color, markersize=9, markeredgecolor="black")
        kind = "meant to collapse (▼ alarm)" if collapses else "healthy"
        panel.set(title=f"{TASKS[task].label}: {kind}", xlabel="step")
        panel.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        if panel.lines:
            panel.legend(frameon=False, fontsize=8)
    figure.supylabel("accuracy on held-out questions")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]]


def page(results: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """The results page, in Markdown."""
    return "\n".join(
        [
            "# Is a collapse caught?",
            "",
            f"Command: `{settings['command']}`. Machine: {settings['machine']}. {settings['versions']}. "
            f"CPU time: {settings['cpu_seconds'] / 60:.0f} minutes.",
            "",
            "Small tasks under `CollapseMonitor()` with its default thresholds: GRPO, constant learning rate, "
            '`scale_rewards="group"`, β = 0 unless it says otherwise. *Slow* runs move as real ones do; the others '
            "are driven harder, some so hard that they lose 20 points in one update. Accuracy on the questions that "
            "are trained on is a reward of weight 0, which the monitor sees; what was lost is measured on "
            f"{NUM_HELD_OUT:,} other questions, asked every {EVERY} steps (standard error 1.5 points; between, a "
            "straight line), from the best measurement on. The columns without a held-out reward say what the monitor "
            "would have said of the same log without it. Alarms are those of the present detector, which reads the "
            "log of a run (`--judge-again`).",
            "",
            f"## New seeds ({FIRST_NEW_SEED} and above)",
            "",
            "No threshold was chosen on these runs, and their logs have everything that the monitor reads.",
            "",
            *_table(SUMMARY, summary_rows([r for r in results if r["seed"] >= FIRST_NEW_SEED])),
            "",
            "## All runs",
            "",
            "Without a held-out reward, only runs that logged the first policy's log-probability are counted: not "
            "those "
            "recorded before it was, and not those of a verdict (*right or wrong*), of which it is not asked.",
            "",
            *_table(SUMMARY, summary_rows(results)),
            "",
            slow_collapses(results),
            "",
            "## Arithmetic",
            "",
            "Three-digit addition (`studies.arithmetic_runs`). The misled base model gives, 60% of the time, the sum "
            "plus 100. The "
            "thresholds were chosen on runs of "
            "seed 0 of this task.",
            "",
            *_table(HEADER, table_rows(results, "arithmetic")),
            "",
            "## Letters backwards",
            "",
            "4 to 7 letters, to be written in reverse (`studies/letters.py`). The misled base model exchanges the "
            "last two and writes one "
            "twice. No threshold was chosen on these runs.",
            "",
            *_table(HEADER, table_rows(results, "letters")),
            "",
            "## Two digits",
            "",
            "Addition of two digits by a smaller transformer (0.1 M parameters). No threshold was chosen on these "
            "runs "
            "but the one of the first policy's log-probability.",
            "",
            *_table(HEADER, table_rows(results, "small")),
            "",
            "![Accuracy on held-out questions over steps, with alarms](../images/collapse.png)",
            "",
        ]
    )


def main() -> None:
    """Runs all arms and writes figures, plot and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--bases", type=Path, required=True, help="Folder where base models are kept (made if missing)."
    )
    parser.add_argument("--runs", nargs="*", choices=list(ARMS), default=list(ARMS), help="Which runs.")
    parser.add_argument("--again", action="store_true", help="Run again what has been run.")
    parser.add_argument(
        "--judge-again", action="store_true", help="Judge the runs recorded before with the detector as it is now."
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="Seeds; each has a base model of its own.")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="Folder of `results/` and `images/`.")
    args = parser.parse_args()
    use_one_thread()
    file, settings, results = kept_results(args.output, "collapse")
    if args.judge_again:
        results = [judged_again(result) for result in results]
    there = set() if args.again or args.judge_again else {(result["run"], result["seed"]) for result in results}
    todo = [(name, seed) for seed in args.seeds for name in args.runs if (name, seed) not in there]
    with tqdm([] if args.judge_again else todo, desc="Runs", unit=" runs", disable=False) as bar:
        for name, seed in bar:
            started = time.process_time()
            task = TASKS[ARMS[name].task]
            base, misled = (args.bases / f"{task.prefix}{kind}-{seed}" for kind in ("base", "misled"))
            if not base.exists():
                task.make_base(base, seed)
            if not misled.exists():
                task.mislead(base, misled, seed)
            result = json.loads(json.dumps(run(name, args.bases, seed)))
            results = [r for r in results if (r["run"], r["seed"]) != (name, seed)] + [result]
            settings = described("collapse", settings["cpu_seconds"] + time.process_time() - started)
            write_figures(file, {"settings": settings, "results": results})
            bar.set_postfix(last=name, alarm=result["alarms"][0][0] if result["alarms"] else "none")
    write_figures(file, {"settings": settings, "results": results})
    plot(results, args.output / "images" / "collapse.png")
    (args.output / "results" / "collapse.md").write_text(page(results, settings), encoding="utf-8")
    for name, task in TASKS.items():
        rows = [[row[0], *row[3:7]] for row in table_rows(results, name)]
        Console().print(terminal_table([HEADER[0], *HEADER[3:7]], rows, title=task.label))


if __name__ == "__main__":
    main()
