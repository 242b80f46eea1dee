# SPDX-License-Identifier: Apache-2.0
"""The command `endotrl score`: from its options to the files, the page and the terminal."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..reporting import say
from .heat_map_page import heat_map_page
from .rows import STREAM
from .run import ScoreReport, score_file
from .storage import model_digest
from .summary import show_report


if TYPE_CHECKING:
    from ..rewards.endogenous import EndogenousReward


SHOWN_ERRORS = 20  # bad rows named on the terminal; the error file has them all


def run(args: argparse.Namespace, command: str) -> ScoreReport:
    """
    Runs `endotrl score`.

    Args:
        args (`argparse.Namespace`):
            Options, as the parser of the command line gives them.
        command (`str`):
            The same as a line for the shell, for the page.

    Returns:
        [`ScoreReport`]: what is on the terminal and in the files by now.

    Raises:
        `ValueError`, `OSError`: With one message for the user, if the command cannot run or cannot go on.
        `KeyboardInterrupt`: After Ctrl-C, with a message that says what is saved.
    """
    if args.file != STREAM and not Path(args.file).is_file():
        raise ValueError(f"There is no file {args.file}.")
    output = args.output
    if output is None:
        output = STREAM if args.file == STREAM else str(Path(args.file).with_suffix(".scores.jsonl"))
    if args.html is not None:
        if not Path(args.html).parent.is_dir():
            raise ValueError(f"The folder of the page, {Path(args.html).parent}, does not exist. Make it first.")
        if Path(args.html).resolve() in (Path(args.file).resolve(), Path(output).resolve()):
            raise ValueError(f"--html {args.html} is also the input or the output. Choose another name.")
    reward, settings = _make_reward(args)
    shown = 0

    def on_error(line: int, error: str) -> None:
        nonlocal shown
        shown += 1
        if shown <= SHOWN_ERRORS:
            say(f"line {line}: {error}")
        elif shown == SHOWN_ERRORS + 1:
            say(f"More rows are bad: {'the output' if output == STREAM else f'{output}.errors.jsonl'} names them all.")

    try:
        report = score_file(
            reward,
            args.file,
            output,
            settings,
            block_size=args.block_size,
            limit=args.limit,
            overwrite=args.overwrite,
            tokens=not args.no_tokens,
            keep=max(10, args.top or 0, args.bottom or 0),
            num_examples=0 if args.html is None else args.html_rows,
            progress=not args.quiet,
            on_error=on_error,
        )
    except KeyboardInterrupt as interrupt:
        saved = "" if output == STREAM else f" What was scored is in {output}; the same command goes on behind it."
        raise KeyboardInterrupt(f"Interrupted.{saved}") from interrupt
    except RuntimeError as error:
        import torch

        if not isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(
            f"The device has not enough memory for batches of {args.max_tokens_per_batch} tokens. Run the same command "
            "with a smaller --max-tokens-per-batch: it goes on behind what was scored."
        ) from error
    if args.html is not None:
        Path(args.html).write_text(heat_map_page(report, args, command, output, reward), encoding="utf-8")
    if not args.quiet:
        show_report(report, args, output)
    return report


def _make_reward(args: argparse.Namespace) -> tuple["EndogenousReward", dict[str, Any]]:
    """The reward that the options ask for, and the settings that its numbers depend on."""
    import torch
    from accelerate import PartialState

    from ..rewards.endogenous import EndogenousReward
    from ..scoring.placement import resolve_dtype

    device = args.device
    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from error
    # Numbers depend on these, but not on the three below: a run may go on with smaller batches, or on another device.
    settings = {
        "alpha": args.alpha,
        "gamma": args.gamma,
        "token_reward": args.token_reward,
        "aggregate": args.aggregate,
        "discount": args.discount,
        "truncation": args.truncation,
        "criterion": args.criterion,
        "chat_template_kwargs": args.chat_template_kwargs,
        "overlong_prompt": args.overlong_prompt,
        "dtype": args.dtype,
    }
    reward = EndogenousReward(
        args.model,
        **settings,
        max_tokens_per_batch=args.max_tokens_per_batch,
        device=device,
        trust_remote_code=args.trust_remote_code,
    )
    # What "auto" and the name stand for today: on another machine, or after training, it can be something else.
    resolved = resolve_dtype(args.dtype, PartialState().device if device is None else torch.device(device))
    version = model_digest(reward.config._name_or_path) or reward.config._commit_hash
    return reward, {
        "model": args.model,
        "model_version": version,
        **settings,
        "dtype": str(resolved).removeprefix("torch."),
    }
