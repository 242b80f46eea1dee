# SPDX-License-Identifier: Apache-2.0
r"""
How good is the reward: every benchmark whose files are there, with one small model, by `endotrl eval`.

    python -m studies.evaluation --data DIR               # about 40 core-minutes
    python -m studies.evaluation --data DIR --quick       # shows in a minute or two that everything runs
    python -m studies.evaluation --data DIR --only dsp llmbar

`DIR` holds the authors' files; what is not there is left out, by name:

    rm_bench/{chat,safety-response,safety-refuse,code}_filtered.json    data/ of github.com/THU-KEG/RM-Bench
    llmbar/natural.json                                  Dataset/LLMBar/Natural/dataset.json of princeton-nlp/LLMBar
    judgebench/*.jsonl                                   data/ of ScalerLab/JudgeBench
    prmbench/*.jsonl                                     mr_eval/tasks/prmtest_classified/data of ssmisya/PRMBench
    dsp/domain_specific_preference.test.json             data/ of Linear95/DSP
    hh_rlhf/harmless-base.test.jsonl.gz                  harmless-base/test.jsonl.gz of anthropics/hh-rlhf
    math/mawps/singleop.jsonl                            evaluation/data of QwenLM/Qwen2.5-Math

A subset is always the first items of a part (`--limit`). Runs are kept in `--work`, and the same command goes on where
it was cut off; a run that is done is not run again. Writes results/evaluation.{md,json} and plots into images/.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from benchmarks.measure import describe_run
from endotrl.reporting import say
from studies.evaluation_page import write_page


CHOICE_SCORERS = (
    "bellman.sum",
    "bellman.mean",
    "bellman.discounted=0.93",
    "centered.mean",
    "self_certainty",
    "length",
)
SAMPLING = ("--samples", "8", "--max-new-tokens", "128")


@dataclass(frozen=True)
class Run:
    """
    One `endotrl eval`.

    Attributes:
        name (`str`):
            Its folder.
        title (`str`):
            On the page.
        what (`str`):
            The benchmark, as on the command line.
        data (`str`):
            Its file or folder under `--data`.
        options (`tuple[str, ...]`):
            Other options.
    """

    name: str
    title: str
    what: str
    data: str
    options: tuple[str, ...] = ()

    def arguments(self, data: Path, model: str, dtype: str = "bfloat16") -> list[str]:
        """Arguments of `endotrl`, without `--output`."""
        common = ["--model", model, "--dtype", dtype, "--data", str(data / self.data)]
        return ["eval", self.what, *common, *self.options]


# All of chat and safety-response.
RM_BENCH_PARTS = {"chat": 129, "safety-response": 157, "safety-refuse": 120, "code": 100}
RUNS = (
    *(
        Run(
            f"rm-bench-{part}",
            f"RM-Bench, {part}",
            "rm-bench",
            f"rm_bench/{part}_filtered.json",
            ("--limit", str(limit), "--max-response-tokens", "512"),
        )
        for part, limit in RM_BENCH_PARTS.items()
    ),
    Run(
        "llmbar",
        "LLMBar Natural, with judges",
        "llmbar",
        "llmbar/natural.json",
        ("--limit", "40", "--scorers", "single-pass", "two-pass", "judges", "controls"),
    ),
    Run("judge-bench", "JudgeBench", "judge-bench", "judgebench", ("--limit", "12")),
    Run("prm-bench", "PRMBench", "prm-bench", "prmbench", ("--scorers", "single-pass", "two-pass", "controls")),
    Run("dsp", "DSP", "dsp", "dsp/domain_specific_preference.test.json", ("--limit", "12")),
    Run("preference", "HH-RLHF harmless", "preference", "hh_rlhf/harmless-base.test.jsonl.gz", ("--limit", "200")),
    Run(
        "best-of-n",
        "Best of 8, MAWPS",
        "best-of-n",
        "math/mawps/singleop.jsonl",
        ("--limit", "32", *SAMPLING, "--scorers", *CHOICE_SCORERS),
    ),
    Run(
        "generation-chat",
        "Answers to MAWPS, chat template",
        "generation",
        "math/mawps/singleop.jsonl",
        ("--limit", "16", *SAMPLING, "--k", "1", "4", "8"),
    ),
    Run(
        "generation-plain",
        "Answers to MAWPS, plain text",
        "generation",
        "math/mawps/singleop.jsonl",
        ("--limit", "16", *SAMPLING, "--k", "1", "4", "8", "--no-chat"),
    ),
)
COMPARED = ("generation-chat", "generation-plain")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is not done yet, and writes the page."""
    args = make_parser().parse_args(argv)
    chosen = [run for run in RUNS if args.only is None or run.name in args.only]
    missing = [run for run in chosen if not (args.data / run.data).exists()]
    for run in missing:
        say(f"{run.name} is left out: {args.data / run.data} is not there.")
    runs = [quick(run) if args.quick else run for run in chosen if run not in missing]
    if not runs:
        raise SystemExit(f"--data {args.data} has none of the files: see the head of studies/evaluation.py.")
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(evaluate, run, args) for run in runs]
        for job in tqdm(jobs, desc="Evaluating", unit=" runs"):
            job.result()
    done = {run.name: json.loads((args.work / run.name / "results.json").read_text(encoding="utf-8")) for run in runs}
    shown = {run.name: " ".join(["endotrl", *run.arguments(Path("DIR"), args.model, args.dtype)]) for run in runs}
    options = [*(["--quick"] if args.quick else []), *(["--only", *args.only] if args.only else [])]
    page = write_page(
        describe_run("studies.evaluation", "cpu", " ".join(["--data DIR", *options])),
        {run.name: run.title for run in runs},
        shown,
        done,
        COMPARED,
        args.output,
    )
    say(f"Written: {page}")
    return 0


def evaluate(run: Run, args: argparse.Namespace) -> None:
    """
    Runs one of them in a process of its own, unless it is done.

    Raises:
        `SystemExit`: If it fails.
    """
    arguments = run.arguments(args.data, args.model, args.dtype)
    folder = args.work / run.name
    marker = folder / "done.json"
    if marker.exists() and json.loads(marker.read_text(encoding="utf-8")) == arguments:
        return
    threads = str(max(1, (os.cpu_count() or 1) // args.jobs))
    code = "import sys; from endotrl.commands.main import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--output", str(folder), "--quiet"],
        env={**os.environ, "OMP_NUM_THREADS": threads},
    )
    if process.returncode != 0:
        raise SystemExit(f"{run.name} failed with exit code {process.returncode}; its message is above.")
    marker.write_text(json.dumps(arguments), encoding="utf-8")


def quick(run: Run) -> Run:
    """The same with two items of each part and short answers."""
    options: list[Any] = list(run.options)
    for option, value in (("--limit", "2"), ("--max-new-tokens", "8")):
        if option in options:
            options[options.index(option) + 1] = value
        elif option == "--limit":
            options += [option, value]
    return replace(run, options=tuple(options))


def make_parser() -> argparse.ArgumentParser:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the benchmarks' files")
    parser.add_argument("--work", type=Path, default=Path("evaluation-runs"), help="where runs are kept")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder of results/ and images/")
    parser.add_argument("--model", default="quickstart", help="path, hub id, or quickstart (SmolLM2-135M-Instruct)")
    parser.add_argument("--dtype", default="bfloat16", help="of the model (default: bfloat16)")
    parser.add_argument("--only", nargs="+", choices=[run.name for run in RUNS], help="only these runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; the cores are shared among them")
    parser.add_argument("--quick", action="store_true", help="two items of each part, whose figures mean nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main())
