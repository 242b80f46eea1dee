# SPDX-License-Identifier: Apache-2.0
"""Training pipeline: from a recipe's command line to a trained model."""

import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, TypeAlias, cast

from accelerate.utils import is_peft_model
from trl import (
    DatasetMixtureConfig,
    GRPOConfig,
    ModelConfig,
    RewardConfig,
    RewardTrainer,
    get_peft_config,
    get_quantization_config,
)

from ..frozen.cpu_dtype import make_head_input_contiguous
from ..frozen.names import resolve_model
from ..frozen.sharded_weights import shards_weights
from ..monitoring import CollapseMonitor
from ..monitoring.detector import HELD_OUT
from ..monitoring.monitor import Action
from ..reporting import say, terminal_table
from ..rewards import EndogenousReward, SentenceReward
from ..runs.processes import end_with_launcher
from ..runs.record import make_record
from ..runs.resumption import Interruptions, end_run, find_checkpoint, only_run_in, train_and_save
from ..runs.wandb_run import active_run, check_wandb_login, log_table
from ..sentence import SentenceRewardTrainer, SentenceRewardTrainerConfig
from ..sentence.trainer import reward_model_config
from ..trainers.dense_reward_trainer import DenseRewardTrainer
from .arguments import RecipeArguments, RewardArguments, RunArguments, make_parser
from .callbacks import add_callbacks
from .cpu import choose_precision, shard_on_cpu
from .data import Data, check_number, fit_lengths, load_preferences, load_prompts
from .preflight import check_settings
from .reward_functions import make_reward_funcs


TrainerClass: TypeAlias = type[DenseRewardTrainer | SentenceRewardTrainer]

EXIT_WRONG_SETTINGS = 2
# Exceptions of TRL, transformers and their backends for wrong settings, before training.
WRONG_SETTINGS = (ValueError, TypeError, ImportError, OSError, RuntimeError)

# Most informative metrics
TELLING = rf"(eval_)?(rewards/.*/mean|({HELD_OUT}|endogenous_reward/).*|kl|.*/mean_length|ppo/explained_variance)"

logger = logging.getLogger(__name__)


class Job(NamedTuple):
    """A recipe with validated settings: the input of a trainer. No weights are loaded yet."""

    script_args: RunArguments
    training_args: GRPOConfig | RewardConfig
    model_args: ModelConfig
    train_dataset: Data
    eval_dataset: Data | None
    record: dict[str, Any]
    # For a policy, but not for a reward model
    reward_args: RewardArguments | None = None
    reward_funcs: list[Callable[..., Any]] | None = None
    collapse_monitor: CollapseMonitor | None = None


def launch(
    trainer_class: TrainerClass,
    training_config: type[GRPOConfig | SentenceRewardTrainerConfig],
    argv: Sequence[str] | None = None,
) -> Any:
    """
    Runs a recipe from the command line, and returns the finished trainer. Wrong settings are reported in one line, if
    possible before a model is loaded; the process then exits with code 2.
    """
    end_with_launcher()
    with ExitStack() as stack:
        try:
            parser = make_parser(training_config)
            parser.settle = choose_precision
            words = sys.argv[1:] if argv is None else argv
            settings = parser.parse_args_and_config([*words, *shard_on_cpu()])
            stack.enter_context(only_run_in(settings[1].output_dir))
            job = prepare_reward_model(*settings) if issubclass(training_config, RewardConfig) else prepare(*settings)
            trainer, interruptions = make_trainer(trainer_class, job)
        except WRONG_SETTINGS as error:
            if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # one process per machine reports it
                say(f"{os.path.basename(sys.argv[0])}: error: {' '.join(str(error).split())}")
            logger.debug("Invalid settings", exc_info=error)
            sys.exit(EXIT_WRONG_SETTINGS)
        train(trainer, interruptions, job)
        return trainer


def prepare(
    script_args: RecipeArguments,
    training_args: GRPOConfig,
    reward_args: RewardArguments,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> Job:
    """Loads data, creates rewards and validates all settings of a policy; no weights are loaded."""
    check_settings(training_args, model_args)
    monitor = None if script_args.on_collapse == "none" else CollapseMonitor(cast(Action, script_args.on_collapse))
    if monitor is not None:
        monitor.check(training_args)
    train_dataset, eval_dataset = load_prompts(script_args, training_args, dataset_args)
    reward_funcs = make_reward_funcs(script_args, training_args, reward_args, model_args, train_dataset)
    use_model_args(model_args, training_args)
    lengths = (script_args, training_args, model_args, reward_funcs)
    train_dataset = fit_lengths(train_dataset, *lengths)
    check_number(train_dataset, training_args)
    datasets = train_dataset, None if eval_dataset is None else fit_lengths(eval_dataset, *lengths)
    record = _find_run(script_args, training_args, model_args, reward=reward_args)
    return Job(script_args, training_args, model_args, *datasets, record, reward_args, reward_funcs, monitor)


def prepare_reward_model(
    script_args: RunArguments,
    training_args: SentenceRewardTrainerConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> Job:
    """Like [`prepare`], for a sentence-level reward model, with preferences as data: see [`load_preferences`]."""
    check_settings(training_args, model_args)
    reward_model_config(training_args)  # raises for impossible settings
    datasets = load_preferences(script_args, training_args, dataset_args)
    use_model_args(model_args, training_args)
    return Job(script_args, training_args, model_args, *datasets, _find_run(script_args, training_args, model_args))


def _find_run(
    script_args: RunArguments, training_args: GRPOConfig | RewardConfig, model_args: ModelConfig, **others: Any
) -> dict[str, Any]:
    """Record of the run, which resumes from a checkpoint if there is one."""
    record = make_record({"data": script_args, "training": training_args, **others, "model": model_args})
    if script_args.resume:
        find_checkpoint(training_args, record)
    check_wandb_login(training_args)
    return record


def run(trainer_class: TrainerClass, job: Job) -> Any:
    """Trains the result of [`prepare`], and returns the finished trainer."""
    trainer, interruptions = make_trainer(trainer_class, job)
    train(trainer, interruptions, job)
    return trainer


def make_trainer(trainer_class: TrainerClass, job: Job) -> tuple[Any, Interruptions]:
    """The trainer of [`run`] before training, with weights, rewards and callbacks, and its interruption callback."""
    rewards: dict[str, Any] = {} if job.reward_funcs is None else {"reward_funcs": job.reward_funcs}
    trainer: Any = trainer_class(
        model=job.model_args.model_name_or_path,
        args=job.training_args,
        train_dataset=job.train_dataset,
        eval_dataset=job.eval_dataset,
        quantization_config=get_quantization_config(job.model_args),
        peft_config=get_peft_config(job.model_args),
        **rewards,
    )
    if job.reward_args is not None:
        share_frozen_weights(trainer, job.reward_args, job.model_args)
    heat_map_steps = job.script_args.heat_map_steps if isinstance(job.script_args, RecipeArguments) else 0
    return trainer, add_callbacks(trainer, job.record, heat_map_steps, job.collapse_monitor)


def use_model_args(model_args: ModelConfig, training_args: GRPOConfig | RewardConfig) -> None:
    """
    Resolves the model name `"quickstart"` to the path of SmolLM2-135M-Instruct, and copies the loading settings of
    TRL's [`~trl.ModelConfig`] to `training_args.model_init_kwargs`, like TRL's scripts.
    """
    if model_args.model_name_or_path is not None:
        model_args.model_name_or_path = resolve_model(model_args.model_name_or_path)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }


def share_frozen_weights(trainer: DenseRewardTrainer, reward_args: RewardArguments, model_args: ModelConfig) -> None:
    """
    Lets the endogenous reward use the frozen weights that the trainer has in memory anyway, if any, unless
    `reward_model` names a model. The reward's own copy is sharded over the processes if the policy is, unless
    `reward_shard` is false.
    """
    for reward in trainer.reward_funcs:
        if isinstance(reward, SentenceReward):
            reward.attach(trainer)  # for the policy's tokenizer
        if not isinstance(reward, EndogenousReward):
            continue
        if reward_args.reward_model is None and _holds_frozen_weights(trainer, reward_args):
            reward.attach(trainer)
        elif reward_args.reward_model is None and model_args.model_revision != "main":
            raise ValueError(
                "The trainer has no frozen weights to share with the reward, and the reward's own copy would have the "
                f"revision 'main', not {model_args.model_revision!r}. Download the model, and set "
                "`model_name_or_path` to its path."
            )
        elif reward_args.reward_shard and not reward_args.reward_offload and not reward.is_served:
            reward.shard(trainer)
        if trainer.accelerator.is_main_process:
            logger.info("Frozen model of the reward: %r", reward)


def _holds_frozen_weights(trainer: DenseRewardTrainer, reward_args: RewardArguments) -> bool:
    if shards_weights(trainer.accelerator) and not reward_args.reward_shard:
        return False
    is_adapted = is_peft_model(trainer.accelerator.unwrap_model(trainer.model))
    return is_adapted or (trainer.ref_model is not None and not trainer.args.sync_ref_model)


def train(trainer: Any, interruptions: Interruptions, job: Job) -> None:
    """
    Trains, from `resume_from_checkpoint` if it is set; saves to `output_dir`, pushes to the hub on request, and
    prints the course of the most informative metrics, or evaluates a reward model. After SIGTERM, the state so far is
    saved as a checkpoint, and the process exits with code 143.
    """
    args = trainer.args
    if args.device.type == "cpu" and isinstance(trainer, DenseRewardTrainer):
        make_head_input_contiguous(trainer.accelerator.unwrap_model(trainer.model))
    train_and_save(trainer, interruptions, job.record)
    if not interruptions.terminated:
        if isinstance(trainer, RewardTrainer) and job.eval_dataset is not None:
            trainer.log_metrics("eval", trainer.evaluate())
        if trainer.accelerator.is_main_process:
            print_summary(trainer.state.log_history, args.output_dir)
        name = job.script_args.dataset_name
        # The path of a file means nothing to others.
        on_hub = None if name is None or name == "quickstart" or Path(name).exists() else name
        trainer.create_model_card(model_name=Path(args.output_dir).name, dataset_name=on_hub)
        if args.push_to_hub:
            trainer.push_to_hub(dataset_name=on_hub)
    end_run(trainer, interruptions.terminated)


def print_summary(history: list[dict[str, Any]], output_dir: str) -> None:
    """
    Prints a table of the most informative metrics, also to W&B: means over the first and the last fifth of the log,
    and the first and last evaluation.
    """
    from rich.console import Console

    rows: list[tuple[str, float, float]] = []
    for total in ("reward", "eval_reward"):
        entries = [entry for entry in history if total in entry]
        window = max(1, len(entries) // 5) if total == "reward" else 1
        for key in filter(re.compile(TELLING).fullmatch, entries[0] if len(entries) > 1 else []):
            start, end = ([e[key] for e in part if key in e] for part in (entries[:window], entries[-window:]))
            rows += [(key, fmean(start), fmean(end))] if end else []
    rows.sort(key=lambda row: not ("accuracy" in row[0] or HELD_OUT in row[0]))
    if rows:
        headers = ["metric", "start", "end"]
        Console().print(terminal_table(headers, rows, title=f"{output_dir}: start and end of training"))
        if (run := active_run()) is not None:
            log_table(run, "summary", headers, rows)
