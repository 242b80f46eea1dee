# SPDX-License-Identifier: Apache-2.0
"""Configuration of [`PPOTrainer`]."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal, get_args

from trl import GRPOConfig

from ..bellman import check_discount
from ..checks import check_choice
from ..field_help import with_help


Critic = Literal["value_head", "value_model", "none"]
KLPlacement = Literal["reward", "loss"]
PPOTruncation = Literal["terminal", "bootstrap"]

# What became of the options of TRL's own PPO (`trl.experimental.ppo`, up to TRL 1.12), and of its trainer's arguments.
FORMER_OPTIONS = {
    "kl_coef": "`beta`",
    "kl_estimator": "nothing; it is k1 with `kl_placement='reward'`, and k3 with `kl_placement='loss'`",
    "cliprange": "`epsilon`",
    "num_ppo_epochs": "`num_iterations`",
    "num_mini_batches": "`steps_per_generation` over `gradient_accumulation_steps`",
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
}
FORMER_ARGUMENTS = {
    **dict.fromkeys(("policy", "policy_model"), "`model`"),
    "config": "`args`",
    "tokenizer": "`processing_class`",
    "reward_model": "`reward_funcs`, which takes functions and reward models",
    "ref_model": "nothing; the reference is the checkpoint of `model`, or `model` without its adapter",
    "dataset": "`train_dataset`",
    "data_collator": "nothing; prompts are tokenized and padded when they are used",
}


def check_names(given: Iterable[str], former: Mapping[str, str], where: str) -> None:
    """Raises `TypeError` that names the replacement for each name of TRL's own PPO that is `given`."""
    if found := [name for name in given if name in former]:
        raise TypeError(
            f"{where} has no {', '.join(f'`{name}`' for name in found)}, which belonged to TRL's own PPO (up to TRL "
            f"1.12). {' '.join(f'`{name}`: now {former[name]}.' for name in found)} See docs/questions/coming-from.md."
        )


class _NumGenerations(int):
    """A number that passes `GRPOConfig`'s check `num_generations < 2`, which is for its group baseline."""

    def __lt__(self, other: object) -> bool:
        return False


@with_help
@dataclass
class PPOConfig(GRPOConfig):
    r"""
    Configuration class for the [`PPOTrainer`].

    It has all parameters of [`~trl.GRPOConfig`], and those below. Defaults that differ from GRPO's: `num_generations`
    is `1` instead of `8` (the critic is the baseline), `num_iterations` `4` instead of `1`, `beta` `0.01` instead of
    `0.0`. The defaults of `epsilon`, `epsilon_high`, `loss_type` and `importance_sampling_level` give PPO's clipped
    policy loss, averaged over tokens. `scale_rewards`, which scales GRPO's group advantages, has no effect.
    Options of TRL's own PPO (up to TRL 1.12) raise a `TypeError` with their new names.

    Parameters:
        > Parameters that control the rollout and its use

        num_generations (`int`, *optional*, defaults to `1`):
            Completions per prompt in a generation batch. They are not compared with each other.
        num_iterations (`int`, *optional*, defaults to `4`):
            Optimization epochs over each generation batch.

        > Parameters that control the advantages

        gamma (`float`, *optional*, defaults to `1.0`):
            Discount $\gamma$ of the returns, in $(0, 1]$.
        lam (`float`, *optional*, defaults to `0.95`):
            $\lambda$ of generalized advantage estimation (https://huggingface.co/papers/1506.02438), in $[0, 1]$.
        whiten_advantages (`bool`, *optional*, defaults to `True`):
            Whether to scale the advantages of a generation batch to mean 0 and standard deviation 1, over all tokens
            of all processes.
        truncation (`str`, *optional*, defaults to `"terminal"`):
            Value after the last token of a completion without EOS: `"terminal"` uses none, so the return ends there;
            `"bootstrap"` uses the critic's value of the state where the completion was truncated.

        > Parameters that control the critic

        critic (`str`, *optional*, defaults to `"value_head"`):
            `"value_head"`: a linear head on the policy's hidden states. `"value_model"`: a separate model, see the
            argument `value_model` of [`PPOTrainer`]. `"none"`: no trained critic; the baseline is the frozen model's
            soft value if `soft_value_baseline` applies, and 0 otherwise.
        soft_value_baseline (`bool`, *optional*, defaults to `True`):
            Whether the value of a state is the soft value of the endogenous reward's frozen model plus the critic's
            prediction, $V(s) = \hat V(s) + u(s)$, if the reward contains that soft value (`token_reward="bellman"`).
            The critic then learns only $u(s)$, the expected log-probability of the continuation.
        detach_value (`bool`, *optional*, defaults to `True`):
            Whether to detach the value head from the policy's trunk. With `False`, the trunk also learns to predict
            values, and `vf_coef` matters.
        vf_coef (`float`, *optional*, defaults to `0.1`):
            Coefficient of the value loss.
        cliprange_value (`float`, *optional*, defaults to `0.2`):
            Maximum change of a value since the rollout before its loss is clipped, in units of the returns' root mean
            square if `scale_value_loss`, otherwise of the reward (nats). `None` disables clipping.
        scale_value_loss (`bool`, *optional*, defaults to `True`):
            Whether to divide value errors by the root mean square of their targets in the generation batch, so that
            `vf_coef` and `cliprange_value` mean the same for rewards of any size.
        value_learning_rate (`float`, *optional*, defaults to `1e-5`):
            Learning rate of the critic, on the same schedule as the policy's. `None` uses `learning_rate`.

        > Parameters that control the KL penalty

        beta (`float`, *optional*, defaults to `0.01`):
            Coefficient of the KL penalty to the reference model. With `0.0`, there is no reference model.
        kl_placement (`str`, *optional*, defaults to `"reward"`):
            `"reward"` subtracts $\beta (\log \pi(a|s) - \log \pi_\text{ref}(a|s))$ from every token's reward, so the
            penalty is part of returns and values. `"loss"` uses the KL term of TRL's loss.
        kl_target (`float`, *optional*):
            Target KL divergence from the reference model, in nats per completion, to which `beta` is adapted as in
            Section 2.2 of https://huggingface.co/papers/1909.08593. `None` keeps `beta` fixed.
        kl_horizon (`int`, *optional*, defaults to `10000`):
            If `kl_target` is set, number of completions over which `beta` changes by at most 20%.
    """

    # Parameters that control the rollout and its use
    num_generations: int | None = 1
    num_iterations: int = 4

    # Parameters that control the advantages
    gamma: float = 1.0
    lam: float = 0.95
    whiten_advantages: bool = True
    truncation: str = field(default="terminal", metadata={"choices": list(get_args(PPOTruncation))})

    # Parameters that control the critic
    critic: str = field(default="value_head", metadata={"choices": list(get_args(Critic))})
    soft_value_baseline: bool = True
    detach_value: bool = True
    vf_coef: float = 0.1
    cliprange_value: float | None = 0.2
    scale_value_loss: bool = True
    value_learning_rate: float | None = 1e-05

    # Parameters that control the KL penalty
    beta: float = 0.01
    kl_placement: str = field(default="reward", metadata={"choices": list(get_args(KLPlacement))})
    kl_target: float | None = None
    kl_horizon: int = 10000

    def __new__(cls, *args: Any, **kwargs: Any) -> "PPOConfig":
        # Before the dataclass raises "unexpected keyword argument"
        check_names(kwargs, FORMER_OPTIONS, "PPOConfig")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if self.num_generations is None or self.num_generations < 1:
            raise ValueError(f"`num_generations` is {self.num_generations}, but it must be at least 1 completion.")
        given, self.num_generations = self.num_generations, _NumGenerations(self.num_generations)
        super().__post_init__()
        self.num_generations = given
        check_choice("truncation", self.truncation, get_args(PPOTruncation))
        check_choice("critic", self.critic, get_args(Critic))
        check_choice("kl_placement", self.kl_placement, get_args(KLPlacement))
        check_discount("gamma", self.gamma)
        clip, rate, target = self.cliprange_value, self.value_learning_rate, self.kl_target
        for name, is_in_range, rule in [
            ("lam", 0.0 <= self.lam <= 1.0, "between 0 and 1"),
            ("beta", 0.0 <= self.beta < inf, "0 (no KL penalty) or greater, and finite"),
            ("vf_coef", 0.0 <= self.vf_coef < inf, "0 or greater, and finite"),
            ("cliprange_value", clip is None or clip > 0.0, "greater than 0, or `None` to disable clipping"),
            ("value_learning_rate", rate is None or rate > 0.0, "greater than 0, or `None` for the policy's"),
            ("kl_target", target is None or target > 0.0, "greater than 0 nats per completion"),
            ("kl_horizon", self.kl_horizon >= 1, "at least 1 completion"),
        ]:
            if not is_in_range:
                raise ValueError(f"`{name}` is {getattr(self, name)}, but it must be {rule}.")
        if self.critic == "none" and self.truncation == "bootstrap":
            raise ValueError(
                "`truncation='bootstrap'` needs a critic, which estimates the value of the state where a completion "
                "was truncated, but `critic='none'`. Use `truncation='terminal'`, or a critic."
            )
        if self.critic != "value_head" and not self.detach_value:
            raise ValueError(
                "`detach_value=False` trains the policy's trunk with the loss of its value head, but `critic` is "
                f"{self.critic!r}. Remove `detach_value`, or use `critic='value_head'`."
            )
        if target is not None and self.beta == 0.0:
            raise ValueError(
                "`kl_target` multiplies `beta` by factors, but `beta` is 0. Set it to an initial value such as 0.01."
            )
        if target is not None and self.kl_placement == "reward" and self.sync_ref_model:
            raise ValueError(
                "`kl_target` is a KL divergence from the reference model, but `sync_ref_model=True` updates that "
                "model. Use only one of them."
            )
