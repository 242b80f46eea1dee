# SPDX-License-Identifier: Apache-2.0
"""Proximal policy optimization with token rewards and a critic, on TRL's `GRPOTrainer`."""

import functools
import json
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import create_model_from_path, disable_dropout_in_model, get_config_model_id

from ..credit import generalized_advantage_estimate, whiten
from ..learning_rates import has_one_learning_rate, set_learning_rate
from ..rewards.endogenous import EndogenousReward
from ..scoring.reference_pass import loss_mask, token_log_probs
from .dense_reward_trainer import DenseRewardTrainer, checked_args
from .ppo_config import FORMER_ARGUMENTS, PPOConfig, check_names
from .ppo_math import adapted_kl_coefficient, clipped_value_loss, explained_variance, kl_k3
from .scored_batch import ScoredBatch
from .setting_checks import check_token_credit, check_token_rewards, warn_of_constants
from .value_head import (
    Critic,
    ForwardRecorder,
    SyncPolicyOnly,
    ValueHead,
    add_critic,
    critic_of,
    is_critic,
    load_critic,
    save_critic,
    send_policy_only,
    split_state_dict,
    without_critic,
)


logger = get_logger(__name__)

STATE_FILE = "ppo_state.json"


class PPOTrainer(DenseRewardTrainer):
    r"""
    Trainer for Proximal Policy Optimization (PPO, https://huggingface.co/papers/1707.06347), with a reward for every
    token and a critic.

    It is TRL's `GRPOTrainer`, with its generation, clipped policy loss, reference model and logs, but with advantages
    from generalized advantage estimation over the token rewards,

    $$
    r_h = \sum_i w_i r^{(i)}(s_h, a_h) + [h = H] \sum_j w_j R_j - \beta \big(\log \pi(a_h|s_h) - \log
    \pi_\text{ref}(a_h|s_h)\big),
    $$

    where $r^{(i)}$ are dense rewards such as [`EndogenousReward`], and $R_j$ those of all other reward functions.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Policy, as in [`~trl.GRPOTrainer`].
        reward_funcs (`RewardFunc | list[RewardFunc]`):
            Reward functions. A dense one rewards every token, any other one the last token of a completion.
        args ([`PPOConfig`], *optional*):
            Configuration.
        value_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            With `critic="value_model"`, the model whose hidden states are the value head's input: a path or hub id, or
            an instance, which is trained in place. If it is a classifier with one label, the value head starts from
            its head (`score`), otherwise at zero. Defaults to a second copy of the policy's checkpoint.
        **kwargs:
            All other arguments of [`~trl.GRPOTrainer`].

    Example:
    ```python
    >>> from datasets import load_dataset
    >>> from endotrl import EndogenousReward, PPOConfig, PPOTrainer

    >>> trainer = PPOTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     reward_funcs=EndogenousReward("Qwen/Qwen2.5-0.5B-Instruct"),
    ...     args=PPOConfig(output_dir="ppo"),
    ...     train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    ... )
    >>> trainer.train()
    ```
    """

    beta: float
    _tag_names = ["trl", "endotrl", "ppo"]
    _name = "PPO"
    _paper = {
        "title": "Proximal Policy Optimization Algorithms",
        "id": "1707.06347",
        "citation": textwrap.dedent("""\
            @article{schulman2017proximal,
                title        = {{Proximal Policy Optimization Algorithms}},
                author       = {John Schulman and Filip Wolski and Prafulla Dhariwal and Alec Radford and Oleg Klimov},
                year         = 2017,
                eprint       = {arXiv:1707.06347},
            }"""),
    }

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: PPOConfig | None = None,
        train_dataset: Any = None,
        *,
        value_model: str | PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        check_names(kwargs, FORMER_ARGUMENTS, "PPOTrainer")
        if isinstance(model, GRPOConfig):
            raise TypeError(
                f"The first argument of `PPOTrainer` is the policy, got a `{type(model).__name__}`. Unlike TRL's own "
                "PPO, the order is `model`, `reward_funcs`, `args`, `train_dataset`. Pass them by name."
            )
        args = checked_args(args, PPOConfig, model)
        rewards = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        _check_arguments(model, rewards, args, value_model, kwargs.get("optimizers"), kwargs.get("peft_config"))
        super().__init__(model, reward_funcs, args, train_dataset, **kwargs)
        if args.critic != "none":
            add_critic(self._base_policy, self._make_critic(value_model))
            if self.use_vllm:
                send_policy_only(self.vllm_generation)
            if args.sync_ref_model:
                self.add_callback(SyncPolicyOnly(self.pop_callback(SyncRefModelCallback), self._base_policy))

    @property
    def _base_policy(self) -> PreTrainedModel:
        """The policy without wrappers and adapter: the model that contains the critic."""
        policy = self.accelerator.unwrap_model(self.model)
        return policy.get_base_model() if is_peft_model(policy) else policy

    def _make_critic(self, value_model: Any) -> Critic:
        policy, args = self._base_policy, self.args
        backbone = trained_head = None
        if args.critic == "value_model":
            if not isinstance(value_model, PreTrainedModel):
                value_model = create_model_from_path(
                    get_config_model_id(policy.config) if value_model is None else value_model,
                    dtype=policy.dtype,
                    device_map=None,
                    trust_remote_code=args.trust_remote_code,
                )
            vocab_size = value_model.get_input_embeddings().num_embeddings
            if vocab_size < len(self._tokenizer):
                raise ValueError(
                    f"The value model has embeddings for {vocab_size} tokens, but the policy's tokenizer has "
                    f"{len(self._tokenizer)}. The value model reads the policy's token ids, so it must use the same "
                    "tokenizer."
                )
            kind, theirs = value_model.config.model_type, policy.config.model_type
            if self._is_vlm and kind != theirs:
                raise ValueError(
                    f"The value model is a {kind!r}, but the policy is a {theirs!r}, which reads images. Both get the "
                    "same inputs, so the value model must have the same model type."
                )
            trained_head = dict(value_model.named_children()).get("score")
            if trained_head is not None and trained_head.out_features != 1:
                raise ValueError(
                    f"The value model has a head with {trained_head.out_features} labels, but a value is one number. "
                    "Load it with `num_labels=1`, or pass its `base_model`, the model without the head."
                )
            backbone = value_model.base_model.requires_grad_(True)
            if args.disable_dropout:
                disable_dropout_in_model(backbone)
        hidden_size = (policy if backbone is None else backbone).config.get_text_config().hidden_size
        # FSDP shards parameters of one dtype together; otherwise float32 preserves small updates of the head.
        head = ValueHead(hidden_size, policy.dtype if self.is_fsdp_enabled else torch.float32)
        if trained_head is not None:
            head.copy_from(trained_head)
        return Critic(head, backbone, detach=args.detach_value).to(policy.get_output_embeddings().weight.device)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        created = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if created and self.args.critic != "none" and self.args.value_learning_rate is not None:
            critic = [p for name, p in (model or self.model).named_parameters() if is_critic(name)]
            set_learning_rate(optimizer, critic, self.args.value_learning_rate)
        return optimizer

    def _compute_advantages(self, output: dict[str, Any], scored: ScoredBatch) -> Tensor:
        args = self.args
        mask = scored.mask & loss_mask(output) & scored.scorable[scored.local][:, None]  # (B, T)
        values, old_log_probs = self._values_and_log_probs(output)  # (B, T + 1), (B, T)

        # Rewards of whole completions go to the last token; to token 0 if there is none, which the mask excludes.
        ends = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(dim=1, keepdim=True)  # (B, 1)
        last = (ends - 1).clamp(min=0)
        rewards = scored.weighted(scored.token_rewards).scatter_add(1, last, scored.weighted_outcomes[:, None])
        if self.beta != 0.0:
            log_ratio = torch.where(mask, old_log_probs - output["ref_per_token_logps"], 0.0)
            if args.kl_placement == "reward":
                rewards = rewards - self.beta * log_ratio
        _check_finite("rewards", rewards, mask)
        _check_finite("values", values[:, :-1], mask)

        # The critic predicts what the soft values leave of the returns.
        soft_values = scored.weighted(scored.state_values if args.soft_value_baseline else {})
        final_values = None
        if args.truncation == "bootstrap":
            # After an EOS that is followed by what a tool wrote, there was no room for another turn.
            lengths = output["completion_mask"].sum(dim=1, keepdim=True)  # (B, 1)
            is_eos = torch.isin(output["completion_ids"], torch.tensor(self.eos_token_ids, device=mask.device))
            finished = is_eos.gather(1, last) & (ends == lengths)
            final_values = torch.where(finished, 0.0, values.gather(1, lengths))[:, 0]
        values = values[:, :-1]
        advantages, returns = generalized_advantage_estimate(
            rewards, soft_values + values, mask, args.gamma, args.lam, final_values
        )
        targets = torch.where(mask, returns - soft_values, 0.0)
        all_targets = self._gather_masked(targets, mask)
        self._log_rollout(advantages, values, all_targets, mask)
        if self.beta != 0.0:
            self._log_and_adapt_kl(log_ratio, mask)
        if args.critic != "none":
            scale = targets.new_ones(())
            if args.scale_value_loss and all_targets.numel():
                scale = all_targets.square().mean().sqrt().clamp(min=1e-4)
            output |= {"old_values": torch.where(mask, values, 0.0), "value_targets": targets}
            output |= {"value_mask": mask, "value_scale": scale}
        if args.whiten_advantages:
            advantages = whiten(advantages, mask, self._gather_masked(advantages, mask))
        return advantages

    def _values_and_log_probs(self, output: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """
        The critic's values before each token and after the last, of shape `(B, T + 1)`, 0 without a critic, and the
        policy's log-probabilities of shape `(B, T)`, at the rollout; `None` for those that are not needed.
        """
        args, (num_rows, num_tokens) = self.args, output["completion_ids"].shape
        values = torch.zeros(num_rows, num_tokens + 1, device=output["completion_ids"].device)
        old_log_probs = output.get("old_per_token_logps")
        has_critic = args.critic != "none"
        if not has_critic and (old_log_probs is not None or self.beta == 0.0):
            return values, old_log_probs
        recorder = ForwardRecorder(self.model, has_critic)
        batch_size = args.per_device_train_batch_size if self.model.training else args.per_device_eval_batch_size
        log_probs = token_log_probs(self, recorder, output, batch_size)
        return recorder.values if has_critic else values, log_probs if old_log_probs is None else old_log_probs

    @functools.wraps(GRPOTrainer._get_per_token_logps_and_entropies)
    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        outputs = super()._get_per_token_logps_and_entropies(model, input_ids, attention_mask, *args, **kwargs)
        if isinstance(model, ForwardRecorder):
            model.finish(outputs[0], attention_mask)
        return outputs

    def _log_rollout(self, advantages: Tensor, values: Tensor, all_targets: Tensor, mask: Tensor) -> None:
        metrics = self._metrics["train" if self.model.training else "eval"]
        gathered = {"returns": all_targets, "advantages": self._gather_masked(advantages, mask)}
        if all_targets.numel() == 0:
            return
        for name, numbers in gathered.items():
            metrics[f"ppo/{name}_mean"].append(numbers.mean().item())
            metrics[f"ppo/{name}_std"].append(numbers.std(correction=0).item())
        if self.args.critic != "none":
            all_values = self._gather_masked(values, mask)
            metrics["ppo/values_mean"].append(all_values.mean().item())
            metrics["ppo/explained_variance"].append(explained_variance(all_values, all_targets))

    def _log_and_adapt_kl(self, log_ratio: Tensor, mask: Tensor) -> None:
        """`log_ratio` `(B, T)` is that of policy to reference, 0 where `mask` is `False`."""
        args, metrics = self.args, self._metrics["train" if self.model.training else "eval"]
        stats = torch.stack([log_ratio.sum(), kl_k3(log_ratio).sum(), mask.sum(), mask.any(dim=1).sum()])
        total, total_k3, num_tokens, num_completions = self.accelerator.reduce(stats, reduction="sum").tolist()
        if num_completions == 0:
            return
        kl = total / num_completions
        metrics["ppo/kl_per_completion"].append(kl)
        metrics["ppo/kl_coef"].append(self.beta)
        if args.kl_placement == "reward":
            metrics["kl"].append(total_k3 / num_tokens)
            metrics["ppo/kl_reward"].append(-self.beta * kl)
        if args.kl_target is not None and self.model.training:
            self.beta = adapted_kl_coefficient(self.beta, kl, args.kl_target, int(num_completions), args.kl_horizon)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        args, beta, mode = self.args, self.beta, "train" if self.model.training else "eval"
        accumulation_steps = self.current_gradient_accumulation_steps if mode == "train" else 1
        recorder = ForwardRecorder(model, args.critic != "none")
        if args.kl_placement == "reward":
            self.beta = 0.0  # It is in the advantages: TRL must not add it to the loss again.
        try:
            policy_loss = super()._compute_loss(recorder, inputs)
        finally:
            self.beta = beta

        # Average number of tokens over all processes in a micro-batch: sums over one divided by it have the mean over
        # tokens as their mean over micro-batches. TRL's normalizer of `loss_type="dapo"`.
        num_items = inputs["num_items_in_batch"].clamp(min=1.0)
        if mode == "train":
            num_items = num_items / args.steps_per_generation
        # Gradients are averaged over processes and summed over micro-batches.
        num_processes = self.accelerator.num_processes
        scale = num_processes / accumulation_steps
        log_probs, old_log_probs = recorder.log_probs.detach(), inputs.get("old_per_token_logps")
        log_ratio = torch.zeros_like(log_probs) if old_log_probs is None else old_log_probs - log_probs
        sums = {"ppo/approx_kl": torch.where(loss_mask(inputs), kl_k3(log_ratio), 0.0).sum()}  # of the old policy
        loss = policy_loss
        if args.critic != "none":
            value_mask = inputs["value_mask"]
            old = inputs["old_values"], inputs["value_targets"], inputs["value_scale"]
            losses, clipped = clipped_value_loss(recorder.values[:, :-1], *old, args.cliprange_value)
            value_loss = torch.where(value_mask, losses, 0.0).sum()
            loss = policy_loss + args.vf_coef * value_loss / num_items * scale
            sums["ppo/value_loss"] = value_loss.detach()
            sums["ppo/value_clip_ratio"] = (clipped & value_mask).sum()
        sums["ppo/policy_loss"] = policy_loss.detach() * num_items * accumulation_steps / num_processes
        totals = self.accelerator.reduce(torch.stack([total.float() for total in sums.values()]), reduction="sum")
        for name, value in zip(sums, (totals / num_items).tolist(), strict=True):
            self._metrics[mode][name].append(value)
        return loss

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.args.critic == "none":
            super()._save(output_dir, state_dict)
            return
        # The model is saved without the critic, so that it loads like any other, and the critic next to it.
        policy, critic = split_state_dict(self.model.state_dict() if state_dict is None else state_dict)
        super()._save(output_dir, policy)
        if self.args.should_save and critic:
            save_critic(critic, self.args.output_dir if output_dir is None else output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with self._critic_from(resume_from_checkpoint, own_file=not self.is_fsdp_enabled):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        own_file = not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        with self._critic_from(self.state.best_model_checkpoint, own_file):
            super()._load_best_model()

    @contextmanager
    def _critic_from(self, checkpoint: str | None, own_file: bool) -> Iterator[None]:
        """Loads the critic after the policy if it has its `own_file`; FSDP's checkpoints have the wrapped model."""
        if self.args.critic == "none" or not own_file:
            yield
            return
        with without_critic(self._base_policy):
            yield
        load_critic(critic_of(self._base_policy), str(checkpoint))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.kl_target is not None and self.args.should_save and not self.args.save_only_model:
            (self._checkpoint_folder(trial) / STATE_FILE).write_text(json.dumps({"beta": self.beta}))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.args.kl_target is not None and checkpoint is not None and (Path(checkpoint) / STATE_FILE).exists():
            self.beta = json.loads((Path(checkpoint) / STATE_FILE).read_text())["beta"]


def _check_arguments(
    model: Any, rewards: list[Any], args: PPOConfig, value_model: Any, optimizers: Any = None, peft_config: Any = None
) -> None:
    """Raises `TypeError` or `ValueError` before any model is loaded, and warns of constants in the logits."""
    if not isinstance(value_model, str | PreTrainedModel | None):
        raise TypeError(
            f"`value_model` is a {type(value_model).__name__}, but it must be a path or hub id, or a model of "
            "transformers. Merge adapters first."
        )
    if not isinstance(model, str) and is_peft_model(model):
        peft_config = model.active_peft_config
    has_critic, bootstrap = args.critic != "none", args.truncation == "bootstrap"
    if value_model is not None and args.critic != "value_model":
        raise ValueError(
            f"A `value_model` was given, but `critic` is {args.critic!r}, which does not use it. Set "
            "`critic='value_model'` in `PPOConfig`, or remove `value_model`."
        )
    if isinstance(value_model, PreTrainedModel) and value_model is model:
        raise ValueError(
            "`value_model` is the policy itself. Use `critic='value_head'` for a value head on the policy, or pass a "
            "second instance."
        )
    if args.critic == "value_model" and peft_config is not None and peft_config.is_prompt_learning:
        raise ValueError(
            f"`peft_config` is a {type(peft_config).__name__}, but the value model does not read its virtual tokens. "
            "Use `critic='value_head'`, or LoRA."
        )
    if has_critic and any(part is not None for part in optimizers or ()):
        raise ValueError(
            "`optimizers` was given, but it does not contain the critic's parameters, which the trainer creates. "
            "Configure the optimizer in `PPOConfig` (`optim`, `learning_rate`, ...), or use `critic='none'`."
        )
    if has_critic and args.value_learning_rate is not None and has_one_learning_rate(args):
        raise ValueError(
            "The `optimizer` in DeepSpeed's configuration has one learning rate for all parameters, but "
            "`value_learning_rate` is set. Remove the `optimizer` there, or set `value_learning_rate=None`."
        )
    if args.multi_objective_aggregation != "sum_then_normalize":
        raise ValueError(
            f"`multi_objective_aggregation` is {args.multi_objective_aggregation!r}, but PPO does not compare "
            "completions with each other. Use 'sum_then_normalize' with `reward_weights`."
        )
    if bootstrap and args.mask_truncated_completions:
        raise ValueError(
            "`truncation='bootstrap'` estimates the return of truncated completions, but "
            "`mask_truncated_completions=True` excludes them from the loss. Use only one of them."
        )
    check_token_credit(args)
    check_token_rewards(rewards)
    for reward in rewards:
        # The soft value that the reward subtracts for the state after a truncated completion must be restored by the
        # critic.
        has_soft_value = isinstance(reward, EndogenousReward) and reward.token_reward == "bellman"
        if bootstrap and has_soft_value and (reward.truncation == "bootstrap") == args.soft_value_baseline:
            raise ValueError(
                "With `truncation='bootstrap'` in `PPOConfig`, the reward must subtract the soft value of the state "
                "where a completion was truncated if, and only if, the critic learns that soft value, but the reward "
                f"has `truncation={reward.truncation!r}` and `soft_value_baseline={args.soft_value_baseline}`. Use "
                "the defaults, `EndogenousReward(truncation='terminal')` and `soft_value_baseline=True`."
            )
    warn_of_constants(rewards, args.gamma, baseline=args.soft_value_baseline, bootstrap=bootstrap)


def _check_finite(what: str, values: Tensor, mask: Tensor) -> None:
    bad = mask & ~values.isfinite()
    if bad.any():
        row, position = bad.nonzero()[0].tolist()
        raise ValueError(
            f"The {what} of {int(bad.any(dim=1).sum())} of {len(values)} completions are NaN or infinite; the first "
            f"is {values[row, position].item()} at token {position} of row {row}. Make sure that reward functions "
            "return finite numbers or `None`. If they do, lower the learning rate or use a wider dtype."
        )
