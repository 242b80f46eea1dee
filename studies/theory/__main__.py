# SPDX-License-Identifier: Apache-2.0
"""`python -m studies.theory`, or `make theory`: every experiment, a table, plots, JSON and a page."""

import argparse
import sys
from collections.abc import Sequence

from endotrl.reporting import say

from .run import run_theory


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.theory",
        description="Measures the papers' bounds on exact token MDPs. Writes theory.json.gz, theory.md and plots.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--output", metavar="DIR", default="theory-output", help="folder to write (default: %(default)s)"
    )
    parser.add_argument("--seeds", type=int, default=20, help="seeds of every experiment (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.seeds < 2:
        parser.error(f"--seeds is {args.seeds}, but intervals need at least 2.")
    try:
        run_theory(args.output, args.seeds)
    except OSError as error:
        say(f"studies.theory: error: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
