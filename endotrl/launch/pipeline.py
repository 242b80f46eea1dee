# SPDX-License-Identifier: Apache-2.0
"""What a recipe does before and after the trainer is made."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from trl import DatasetMixtureConfig, GRPOConfig, ModelConfig, RewardConfig, get_peft_config, get_quantization_config

from ..demo.grpo_runs import make_head_input_contiguous
from ..frozen import names
from ..frozen.sharded_weights import shards_weights
from ..monitoring import CollapseMonitor
from ..monitoring.monitor import Action
from ..reporting import terminal_table
from ..rewards import EndogenousReward, SentenceReward
from ..runs.record import make_record
from ..runs.resumption import end, find_checkpoint, train_and_save
from ..runs.wandb_run import check_wandb_login
from ..trainers.base import DenseRewardTrainer
from .arguments import RecipeArguments, RewardArguments
from .completion_heat_maps import HeatMaps
from .data import check_number, load_prompts
from .lengths import fit_lengths
from .preflight import check_generation, check_model, check_optimizer, check_packages
from .reward_functions import make_reward_funcs
from .tracking import Tracking


logger = get_logger(__name__)


class Job(NamedTuple):
    """A recipe whose settings were checked: what a trainer is made of. No weights are loaded yet."""

    script_args: RecipeArguments
    training_args: GRPOConfig
    reward_args: RewardArguments
    model_args: ModelConfig
    train_dataset: Dataset | IterableDataset
    eval_dataset: Dataset | IterableDataset | None
    reward_funcs: list[Callable[..., Any]]
    collapse_monitor: CollapseMonitor | None
    record: dict[str, Any]


def prepare(
    script_args: RecipeArguments,
    training_args: GRPOConfig,
    reward_args: RewardArguments,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> Job:
    """
    Loads the data, makes the rewards and checks all settings, before any weights are loaded.

    Args:
        script_args ([`RecipeArguments`]), training_args ([`~trl.GRPOConfig`]), reward_args ([`RewardArguments`]),
        model_args ([`~trl.ModelConfig`]), dataset_args ([`~trl.DatasetMixtureConfig`]):
            What the parser of [`make_parser`] returns.

    Returns:
        [`Job`]: what [`run`] runs.

    Raises:
        `ValueError`, `ImportError`, `OSError`: If something is wrong: see [`load_prompts`], [`make_reward_funcs`],
            [`fit_lengths`], [`check_model`], [`check_packages`], [`check_optimizer`], [`check_generation`] and
            [`check_wandb_login`].
    """
    check_packages(training_args, model_args)
    check_optimizer(training_args)
    check_generation(training_args)
    check_model(model_args, training_args)
    monitor = None if script_args.on_collapse == "none" else CollapseMonitor(cast(Action, script_args.on_collapse))
    if monitor is not None:
        monitor.check(training_args)
    train_dataset, eval_dataset = load_prompts(script_args, training_args, dataset_args)
    reward_funcs = make_reward_funcs(script_args, training_args, reward_args, model_args, train_dataset)
    resolve_model(model_args, training_args)
    lengths = (script_args, training_args, model_args, reward_funcs)
    train_dataset = fit_lengths(train_dataset, *lengths)
    check_number(train_dataset, training_args)
    eval_dataset = None if eval_dataset is None else fit_lengths(eval_dataset, *lengths)
    record = make_record({"data": script_args, "training": training_args, "reward": reward_args, "model": model_args})
    if script_args.resume:
        find_checkpoint(training_args, record)
    check_wandb_login(training_args)
    return Job(
        script_args, training_args, reward_args, model_args, train_dataset, eval_dataset, reward_funcs, monitor, record
    )


def run(trainer_class: type[DenseRewardTrainer], job: Job) -> DenseRewardTrainer:
    """
    Trains what was prepared.

    Args:
        trainer_class (`type`):
            [`DenseGRPOTrainer`] or [`PPOTrainer`], or a class derived from them.
        job ([`Job`]):
            What [`prepare`] returns.

    Returns:
        [`DenseGRPOTrainer`] or [`PPOTrainer`]: the trainer, done.
    """
    trainer = make_trainer(trainer_class, job)
    train(trainer, job.record, job.script_args.dataset_name)
    return trainer


def make_trainer(trainer_class: type[DenseRewardTrainer], job: Job) -> DenseRewardTrainer:
    """The trainer of [`run`], with its weights, rewards and callbacks, before it trains."""
    trainer = trainer_class(
        model=job.model_args.model_name_or_path,
        reward_funcs=job.reward_funcs,
        args=job.training_args,
        train_dataset=job.train_dataset,
        eval_dataset=job.eval_dataset,
        quantization_config=get_quantization_config(job.model_args),
        peft_config=get_peft_config(job.model_args),
    )
    share_frozen_weights(trainer, job.reward_args, job.model_args)
    if job.collapse_monitor is not None:
        job.collapse_monitor.attach(trainer)
    # In front of the trackers, which log what they add.
    if job.script_args.heat_map_steps:
        trainer.callback_handler.callbacks.insert(0, HeatMaps(trainer, job.script_args.heat_map_steps))
    trainer.callback_handler.callbacks.insert(0, Tracking(trainer, job.record))
    return trainer


def resolve_model(model_args: ModelConfig, training_args: GRPOConfig | RewardConfig) -> None:
    """
    Turns the model name `"quickstart"` into the path of SmolLM2-135M-Instruct, and puts what TRL's
    [`~trl.ModelConfig`] says about loading into `training_args.model_init_kwargs`, as TRL's scripts do.
    """
    if model_args.model_name_or_path is not None:
        model_args.model_name_or_path = names.resolve_model(model_args.model_name_or_path)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }


def share_frozen_weights(trainer: DenseRewardTrainer, reward_args: RewardArguments, model_args: ModelConfig) -> None:
    """
    Lets the endogenous reward read the frozen weights that the trainer has in memory anyway: the policy without its
    adapter, or the reference model. Where there are none, or where `reward_model` names a model, the reward keeps its own
    copy. Under DeepSpeed ZeRO-3 and FSDP2, frozen weights are split over the processes; with `reward_shard: false`, the
    reward keeps a whole copy on each.

    Raises:
        `ValueError`: If a copy is needed and would be of another revision than the policy.
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
                "The trainer has no frozen weights to share, and the reward's own copy would be of the revision 'main', "
                f"not {model_args.model_revision!r}. Download that revision, and give its path as `model_name_or_path`."
            )
        elif reward_args.reward_shard and not reward_args.reward_offload:
            reward.shard(trainer)
        logger.info(f"Frozen model of the reward: {reward}")


def _holds_frozen_weights(trainer: DenseRewardTrainer, reward_args: RewardArguments) -> bool:
    if trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2:
        return False
    if shards_weights(trainer.accelerator) and not reward_args.reward_shard:
        return False
    if is_peft_model(trainer.accelerator.unwrap_model(trainer.model)):
        return True
    return trainer.ref_model is not None and not trainer.args.sync_ref_model


def train(trainer: DenseRewardTrainer, record: dict[str, Any], dataset_name: str | None = None) -> None:
    """
    Trains, from `resume_from_checkpoint` if it is set; saves to `output_dir`, pushes to the hub if asked to, and prints how
    the most telling metrics went. After SIGTERM, what there is by then is a checkpoint, and the process ends with code 143.

    Args:
        trainer ([`DenseGRPOTrainer`] or [`PPOTrainer`]):
            The trainer.
        record (`dict[str, Any]`):
            What the run is made of: see [`Job`].
        dataset_name (`str`, *optional*):
            Name for the model card on the hub.

    Raises:
        `FloatingPointError`: For NaN or infinite gradients or loss.
        `OSError`: If the disk is full.
        `SystemExit`: After SIGTERM.
    """
    args = trainer.args
    if args.device.type == "cpu":
        make_head_input_contiguous(trainer.accelerator.unwrap_model(trainer.model))
    terminated = train_and_save(trainer, record)
    if not terminated:
        if trainer.accelerator.is_main_process:
            print_summary(trainer.state.log_history, args.output_dir)
        # Of a file, others have nothing.
        on_hub = (
            None
            if dataset_name is None or dataset_name == "quickstart" or Path(dataset_name).exists()
            else dataset_name
        )
        trainer.create_model_card(model_name=Path(args.output_dir).name, dataset_name=on_hub)
        if args.push_to_hub:
            trainer.push_to_hub(dataset_name=on_hub)
    end(trainer, terminated)


def print_summary(history: list[dict[str, Any]], output_dir: str) -> None:
    """
    Prints a table of the metrics that tell most: means over the first and the last fifth of what was logged in training,
    and the first and last evaluation.
    """
    from rich.console import Console

    evaluations = [entry for entry in history if "eval_reward" in entry]
    steps = [entry for entry in history if "reward" in entry]
    rows = [row for entries in (steps, evaluations) for row in _start_and_end(entries, entries is steps)]
    if rows:
        Console().print(
            terminal_table(["metric", "start", "end"], rows, title=f"{output_dir}: start and end of training")
        )


def _start_and_end(entries: list[dict[str, Any]], averaged: bool) -> list[tuple[str, float, float]]:
    if len(entries) < 2:
        return []
    window = max(1, len(entries) // 5) if averaged else 1

    def mean(part: list[dict[str, Any]], key: str) -> float:
        values = [entry[key] for entry in part if key in entry]
        return sum(values) / len(values) if values else float("nan")

    keys = [key for key in entries[0] if _tells(key.removeprefix("eval_"))]
    return [(key, mean(entries[:window], key), mean(entries[-window:], key)) for key in keys]


def _tells(key: str) -> bool:
    return (
        (key.startswith("rewards/") and key.endswith("/mean"))
        or key in ("kl", "completions/mean_length", "ppo/explained_variance")
        or key.startswith("endogenous_reward/")
    )
