# SPDX-License-Identifier: Apache-2.0
"""The command `endotrl diagnose`: what is wrong with a run, from what it logged."""

import argparse
from pathlib import Path

from rich.console import Console

from ..monitoring.diagnosis import diagnose
from ..monitoring.diagnosis.report import print_diagnoses, report_page
from ..runs.files import replace_text, write_json
from .common import EXIT_FOUND, EXIT_OK


def run(args: argparse.Namespace) -> int:
    """Runs `endotrl diagnose`; returns the exit code."""
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
