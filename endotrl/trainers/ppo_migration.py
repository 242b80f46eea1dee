# SPDX-License-Identifier: Apache-2.0
"""Migration from TRL's own PPO, `trl.experimental.ppo` up to TRL 1.12: tables of renamed and removed options."""

from collections.abc import Iterable, Mapping


# Options of its `PPOConfig` that `endotrl.PPOConfig` does not have under the same name.
CONFIG: dict[str, str] = {
    "kl_coef": "`beta`",
    "kl_estimator": "nothing; it is k1 with `kl_placement='reward'`, and k3 with `kl_placement='loss'`",
    "cliprange": "`epsilon`",
    "num_ppo_epochs": "`num_iterations`",
    "num_mini_batches": "`steps_per_generation`, the micro-batches of a generation batch, over "
    "`gradient_accumulation_steps`",
    "whiten_rewards": "`whiten_advantages`; rewards are not whitened",
    "response_length": "`max_completion_length`",
    "stop_token": "nothing; the EOS tokens of the model's generation config and tokenizer end a completion",
    "stop_token_id": "`eos_token_id` of the model's generation config",
    "missing_eos_penalty": "a reward function that returns minus the penalty for `completion_ids` without EOS",
    "total_episodes": "`max_steps` or `num_train_epochs`",
    "local_rollout_forward_batch_size": "`per_device_train_batch_size`, which bounds all forward passes",
    "num_sample_generations": "`log_completions` and `logging_steps`",
    "exp_name": "`run_name`",
    "sft_model_path": "the argument `model` of `PPOTrainer`",
    "reward_model_path": "the argument `reward_funcs` of `PPOTrainer`, which takes the path of a reward model",
    "model_adapter_name": "a `PeftModel` as the argument `model` of `PPOTrainer`: its active adapter is trained",
    "ref_adapter_name": "nothing; the reference is the base model, or a copy of the adapter that the policy began "
    "with",
    "dataset_num_proc": "nothing; prompts are tokenized when they are used",
    **dict.fromkeys(
        (
            *("world_size", "num_total_batches", "batch_size", "micro_batch_size", "mini_batch_size"),
            *("local_batch_size", "local_mini_batch_size"),
        ),
        "nothing; it follows from `per_device_train_batch_size`, `gradient_accumulation_steps` and the number of "
        "processes",
    ),
}

# Arguments of its `PPOTrainer`, of this version and of earlier ones, that `endotrl.PPOTrainer` does not have.
ARGUMENTS: dict[str, str] = {
    "policy": "`model`",
    "policy_model": "`model`",
    "config": "`args`",
    "tokenizer": "`processing_class`",
    "reward_model": "`reward_funcs`, which takes functions, an `EndogenousReward`, and reward models as instances or "
    "paths",
    "ref_model": "nothing; the reference is the checkpoint that `model` was loaded from, or the model under its "
    "adapter; with `beta=0.0` there is none",
    "dataset": "`train_dataset`",
    "data_collator": "nothing; prompts are tokenized and padded when they are used",
}


def check_names(given: Iterable[str], moved: Mapping[str, str], where: str) -> None:
    """Raises `TypeError` that names the successors of options of TRL's own PPO, from [`CONFIG`] or [`ARGUMENTS`]."""
    found = [name for name in given if name in moved]
    if found:
        raise TypeError(
            f"{where} has no {', '.join(f'`{name}`' for name in found)}: that is TRL's own PPO, up to TRL 1.12. "
            f"{' '.join(f'`{name}`: now {moved[name]}.' for name in found)} See docs/questions/coming-from.md."
        )
