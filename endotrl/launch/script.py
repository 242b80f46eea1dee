# SPDX-License-Identifier: Apache-2.0
"""What the scripts in `recipes/` do when `accelerate launch` starts them."""

import logging
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NoReturn

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, parse_flag_from_env
from trl import GRPOConfig

from ..reporting import say
from ..runs.resumption import only_run_in
from ..trainers.base import DenseRewardTrainer
from .arguments import make_parser
from .launcher import end_with_launcher
from .parser import RecipeParser
from .pipeline import make_trainer, prepare, train
from .precision import choose_precision


EXIT_WRONG_SETTINGS = 2
# What TRL, transformers and their backends raise for settings before anything is trained.
WRONG_SETTINGS = (ValueError, TypeError, ImportError, OSError, RuntimeError)

logger = logging.getLogger(__name__)


def launch(
    trainer_class: type[DenseRewardTrainer], training_config: type[GRPOConfig], argv: Sequence[str] | None = None
) -> DenseRewardTrainer:
    """
    Runs a recipe from the command line. What is wrong with its settings is said in one line, before a model is loaded
    if it can be known then and before anything is trained, and ends the process with exit code 2.

    Args:
        trainer_class (`type`):
            [`DenseGRPOTrainer`] or [`PPOTrainer`], or a class derived from them.
        training_config (`type`):
            Its configuration class.
        argv (`Sequence[str]`, *optional*):
            Arguments. Defaults to those of the process.

    Returns:
        [`DenseGRPOTrainer`] or [`PPOTrainer`]: the trainer, done.
    """
    end_with_launcher()
    with ExitStack() as stack:
        try:
            parsed = parse(make_parser(training_config), argv)
            stack.enter_context(only_run_in(parsed[1].output_dir))
            job = prepare(*parsed)
            trainer = make_trainer(trainer_class, job)
        except WRONG_SETTINGS as error:
            exit_with(error)
        train(trainer, job.record, job.script_args.dataset_name)
        return trainer


def exit_with(error: Exception) -> NoReturn:
    """Ends the process with what is wrong, said by one process of a machine."""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        say(f"{os.path.basename(sys.argv[0])}: error: {' '.join(str(error).split())}")
    logger.debug("Where it was found", exc_info=error)
    sys.exit(EXIT_WRONG_SETTINGS)


def parse(parser: RecipeParser, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """
    Settings of a recipe: those of the YAML file (`--config`), of which the command line wins. Where `accelerate` was
    asked for DeepSpeed or FSDP and there is no accelerator, the processes are made to shard on the CPU.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if shards_on_cpu():
        uses_deepspeed = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
        if uses_deepspeed:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
            do_without_shared_memory()
        # accelerate shards on accelerators only: on CPUs it would take plain DDP, without a word.
        state = PartialState(cpu=True)
        state.distributed_type = DistributedType.DEEPSPEED if uses_deepspeed else DistributedType.MULTI_GPU
        argv += ["--accelerator_config", '{"use_configured_state": true}']
    parser.settle = choose_precision
    return parser.parse_args_and_config(argv)


def shards_on_cpu() -> bool:
    """Whether `accelerate launch` was asked for DeepSpeed or FSDP on a machine without an accelerator."""
    asked = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") or parse_flag_from_env("ACCELERATE_USE_FSDP")
    return asked and "LOCAL_RANK" in os.environ and not torch.accelerator.is_available()


def do_without_shared_memory() -> None:
    """
    Keeps DeepSpeed from compiling its collectives in shared memory: gloo has all that is needed. The compiler may not be there,
    it takes minutes, and a process that is killed meanwhile leaves a lock that later ones wait for without end.
    """
    import deepspeed.ops

    # Looked at when process groups are made, and else worked out by looking for compilers.
    vars(deepspeed.ops)["__compatible_ops__"] = {}
