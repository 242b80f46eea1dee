# SPDX-License-Identifier: Apache-2.0
"""The recipe of the sentence-level reward model."""

from collections.abc import Sequence
from contextlib import ExitStack

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, get_peft_config, get_quantization_config

from ..runs.record import make_record
from ..runs.resumption import end, find_checkpoint, only_run_in, train_and_save
from ..runs.wandb_run import check_wandb_login
from ..sentence import SentenceRewardTrainer, SentenceRewardTrainerConfig
from ..sentence.trainer import reward_model_config
from .data import load_preferences
from .launcher import end_with_launcher
from .parser import RecipeParser
from .pipeline import resolve_model
from .preflight import check_model, check_optimizer, check_packages
from .script import WRONG_SETTINGS, exit_with, parse
from .tracking import Tracking


def make_sentence_reward_parser() -> RecipeParser:
    """
    Parser of the recipe's command line and YAML file (`--config`), of which the command line wins.

    Returns:
        [`RecipeParser`], whose `parse_args_and_config` returns [`~trl.ScriptArguments`],
        [`SentenceRewardTrainerConfig`], [`~trl.ModelConfig`] and [`~trl.DatasetMixtureConfig`].
    """
    return RecipeParser((ScriptArguments, SentenceRewardTrainerConfig, ModelConfig, DatasetMixtureConfig))


def launch_sentence_reward(argv: Sequence[str] | None = None) -> SentenceRewardTrainer:
    """
    Trains a sentence-level reward model from the command line. What is wrong with the settings is said as by
    [`launch`].

    Args:
        argv (`Sequence[str]`, *optional*):
            Arguments. Defaults to those of the process.

    Returns:
        [`SentenceRewardTrainer`]: the trainer, done.
    """
    end_with_launcher()
    with ExitStack() as stack:
        try:
            script_args, args, model_args, dataset_args = parse(make_sentence_reward_parser(), argv)
            stack.enter_context(only_run_in(args.output_dir))
            check_packages(args, model_args)
            check_optimizer(args)
            check_model(model_args, args)
            reward_model_config(args)  # raises for what it cannot be
            train_dataset, eval_dataset = load_preferences(script_args, args, dataset_args)
            resolve_model(model_args, args)
            record = make_record({"data": script_args, "training": args, "model": model_args})
            find_checkpoint(args, record)
            check_wandb_login(args)
            trainer = SentenceRewardTrainer(
                model=model_args.model_name_or_path,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                quantization_config=get_quantization_config(model_args),
                peft_config=get_peft_config(model_args),
            )
        except WRONG_SETTINGS as error:
            exit_with(error)
        # In front of the trackers, which log what it adds.
        trainer.callback_handler.callbacks.insert(0, Tracking(trainer, record))
        terminated = train_and_save(trainer, record)
        if not terminated and eval_dataset is not None:
            trainer.log_metrics("eval", trainer.evaluate())
        if not terminated and args.push_to_hub:
            trainer.push_to_hub(dataset_name=script_args.dataset_name)
        end(trainer, terminated)
        return trainer
