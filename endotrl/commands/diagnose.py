# SPDX-License-Identifier: Apache-2.0
"""The command `endotrl diagnose`: what is wrong with a run, from what it logged."""

import argparse
from pathlib import Path
from typing import Any

from .common import EXIT_FOUND, EXIT_OK, HelpFormatter


def add_diagnose(commands: Any) -> None:
    """Adds `endotrl diagnose` to the commands."""
    parser = commands.add_parser(
        "diagnose",
        help="say what is wrong with a finished or running training run",
        description="Reads what a trainer of TRL logged, and says whether the run learns, whether it collapses, and "
        "which of the usual faults it has, each with its evidence and what to change. A run is a "
        "`trainer_state.json`, an output folder or checkpoint, an offline W&B run, TensorBoard events, "
        "`completions/*.parquet`, or JSON Lines.",
        epilog="Exit code: 0, or 1 if --fail-on is given and something as grave was found; a run with too few points "
        "to tell counts as a warning.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="+", help="file or folder of a run; several are compared")
    add(
        "--held-out",
        metavar="NAME",
        nargs="+",
        help="reward functions that are not trained on (default: those that the logged reward does not depend on)",
    )
    add("--output", metavar="DIR", help="folder for report.html and findings.json")
    add("--fail-on", choices=("warning", "failure"), help="exit with code 1 if something as grave is found")
    parser.set_defaults(run=run_diagnose)


def run_diagnose(args: argparse.Namespace) -> int:
    """
    Runs `endotrl diagnose`.

    Returns:
        `int`: exit code.

    Raises:
        `ValueError`, `OSError`, `ImportError`: With one message for the user.
    """
    from rich.console import Console

    from ..monitoring.diagnosis import diagnose
    from ..monitoring.diagnosis.report import print_diagnoses, report_page
    from ..runs.files import replace_text, write_json

    diagnoses = [diagnose(run, args.held_out) for run in args.runs]
    print_diagnoses(diagnoses, Console(highlight=False))
    if args.output:
        folder = Path(args.output)
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / "report.html", report_page(diagnoses))
        write_json(folder / "findings.json", {"runs": [diagnosis.to_dict() for diagnosis in diagnoses]})
        Console(highlight=False).print(f"Report: {folder / 'report.html'}", markup=False)
    grave = {"failure": ("failure",), "warning": ("failure", "warning", "unclear"), None: ()}[args.fail_on]
    return EXIT_FOUND if any(diagnosis.status in grave for diagnosis in diagnoses) else EXIT_OK
