# SPDX-License-Identifier: Apache-2.0
"""Base class of the trainers with token-level credit: TRL's `GRPOTrainer` with access to token rewards."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import RepeatSampler, get_config_model_id, is_async_callable

from ..rendering.policy import find_call
from ..rewards.frozen_model_reward import FrozenModelReward
from ..rewards.protocol import DenseReward, DenseScores
from ..rewards.sentence import SentenceReward
from ..scoring.reference_pass import loss_mask
from .model_card import with_rewards
from .resume import load_rollouts, save_rollouts, skip_epochs
from .scored_batch import RewardRecorder, ScoredBatch, pad_rows
from .setting_checks import check_prompts


Config = TypeVar("Config", bound=GRPOConfig)


class DenseRewardTrainer(GRPOTrainer, ABC):
    """
    Base class of [`DenseGRPOTrainer`] and [`PPOTrainer`], which differ in the computation of advantages from rewards:
    `_compute_advantages`. `reward_funcs` may be dense: see [`RewardRecorder`].
    """

    reward_funcs: list[Any]
    # Whether to request dense rewards per token, or as one number per completion like all others.
    _keep_token_rewards = True
    # Prompts, completions and token ids that this process has rewarded last, for inspection.
    last_completions: tuple[list[Any], list[Any], list[list[int]]] = ([], [], [])
    _train_sampler: RepeatSampler | None = None

    def __init__(self, model: Any, reward_funcs: Any, args: GRPOConfig, train_dataset: Any, **kwargs: Any) -> None:
        check_prompts("train_dataset", train_dataset)
        check_prompts("eval_dataset", kwargs.get("eval_dataset"))
        super().__init__(model, reward_funcs, args, train_dataset, **kwargs)
        for reward in self.reward_funcs:
            if isinstance(reward, FrozenModelReward | SentenceReward):
                reward.bind(self)

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: list[list[int]]
    ) -> Tensor:
        # For this one call, recorders replace the functions that may be dense.
        reward_funcs = self.reward_funcs
        self.reward_funcs = [
            RewardRecorder(reward, name, self._keep_token_rewards) if self._may_be_dense(reward) else reward
            for reward, name in zip(reward_funcs, self.reward_func_names, strict=True)
        ]
        try:
            rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
            call = find_call(prompts)
            self._recorded = self.reward_funcs, rewards_per_func, (call and call.rows) or []
            self.last_completions = (prompts, completions, completion_ids_list)
        finally:
            self.reward_funcs = reward_funcs
        return rewards_per_func

    def _may_be_dense(self, reward: Any) -> bool:
        if is_async_callable(reward):  # which cannot return token rewards
            return self._keep_token_rewards and isinstance(reward, DenseReward)
        return not isinstance(reward, nn.Module)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        scored = self._scored_batch(output)
        output["advantages"] = self._compute_advantages(output, scored)
        self._log_credit(output["advantages"], loss_mask(output), scored)
        return output

    @abstractmethod
    def _compute_advantages(self, output: dict[str, Any], scored: ScoredBatch) -> Tensor:
        """
        Advantages, of shape `(B, T)`: 0 for tokens that are not in the loss. `output` is TRL's processed batch;
        tensors of shape `(B, ...)` that are added to it arrive in `_compute_loss`.
        """

    def _scored_batch(self, output: dict[str, Any]) -> ScoredBatch:
        """Scores kept by the recorders, padded like the batch."""
        (reward_funcs, rewards_per_func, rows), completion_ids = self._recorded, self.last_completions[2]
        for index in rewards_per_func.isinf().any(dim=0).nonzero()[:, 0].tolist():
            raise ValueError(
                f"The reward function '{self.reward_func_names[index]}' returned an infinite reward. It must return a "
                "finite number, or `None` for a completion that has no reward."
            )
        num_positions, device = output["completion_ids"].shape[1], output["completion_ids"].device
        scores = [reward.scores if isinstance(reward, RewardRecorder) else None for reward in reward_funcs]
        first = self.accelerator.process_index * len(completion_ids)
        local = slice(first, first + len(completion_ids))
        token_rewards: dict[int, Tensor] = {}
        state_values: dict[int, Tensor] = {}
        for index in self._dense_functions(scores, rewards_per_func[local]):
            # Without scores it is dense on another process, and gave only `None` here.
            score = scores[index] or DenseScores([], [torch.empty(0)] * len(completion_ids))
            token_rewards[index] = pad_rows(score.token_rewards, num_positions, device)
            if score.state_values is not None:
                state_values[index] = pad_rows(score.state_values, num_positions, device)
        written = [torch.ones(len(ids)) for ids in completion_ids]
        if "tool_mask" in output:
            # Not this mask, which TRL clears for completions that `mask_truncated_completions` drops.
            written = [torch.tensor(row.written, dtype=torch.float32) for row in rows]
        mask = pad_rows(written, num_positions, device).bool()
        weights = self.reward_weights.to(device)
        return ScoredBatch(rewards_per_func, weights, local, token_rewards, state_values, mask, completion_ids)

    def _dense_functions(self, scores: list[DenseScores | None], local_rewards: Tensor) -> list[int]:
        """Indices of the reward functions that gave token rewards on any process: the same list on all."""
        dense = torch.tensor([score is not None for score in scores], device=local_rewards.device)
        gave_numbers = ~dense & ~local_rewards.isnan().all(dim=0)
        any_dense, any_numbers = (
            self.accelerator.reduce(flags.float(), reduction="sum").bool() for flags in (dense, gave_numbers)
        )
        for index in (any_dense & any_numbers).nonzero()[:, 0].tolist():
            raise ValueError(
                f"The reward function '{self.reward_func_names[index]}' returned one number per token on some "
                "processes and one number per completion on others. It must return the same kind on all processes."
            )
        return any_dense.nonzero()[:, 0].tolist()

    def _gather_ragged(self, values: Tensor) -> Tensor:
        """Rows of all processes, whose completions may be padded to different lengths."""
        return self.accelerator.gather(self.accelerator.pad_across_processes(values, dim=1))

    def _gather_masked(self, values: Tensor, mask: Tensor) -> Tensor:
        """The values where `mask` is `True`, of all processes, of shape `(N,)`."""
        flat = self.accelerator.pad_across_processes(values[mask], dim=0, pad_index=torch.nan)
        gathered = self.accelerator.gather(flat)
        return gathered[~gathered.isnan()]

    def _log_credit(self, advantages: Tensor, in_loss: Tensor, scored: ScoredBatch) -> None:
        metrics = self._metrics["train" if self.model.training else "eval"]
        row_means = (advantages * in_loss).sum(dim=1, keepdim=True) / in_loss.sum(dim=1, keepdim=True).clamp(min=1)
        # In the table of completions, instead of TRL's advantages
        means, logged = self.accelerator.gather(row_means[:, 0]).tolist(), self._logs["advantages"]
        before = [*logged][: -len(means)]
        logged.clear()
        logged.extend([*before, *means])
        tokens = self._gather_masked(advantages, in_loss)
        within = self._gather_masked(advantages - row_means, in_loss).square().sum()
        if tokens.numel():
            metrics["advantage/std"].append(tokens.std(correction=0).item())
            if (total := (tokens - tokens.mean()).square().sum()) > 0:
                metrics["advantage/within_completion"].append((within / total).item())
        for index, token_rewards in scored.token_rewards.items():
            gave_one = ~scored.rewards_per_func[scored.local, index, None].isnan()
            rewards = self._gather_masked(token_rewards, scored.mask & gave_one)
            if rewards.numel():
                metrics[f"token_rewards/{self.reward_func_names[index]}/mean"].append(rewards.mean().item())

    def _get_train_sampler(self, dataset: Any = None) -> RepeatSampler:
        self._train_sampler = super()._get_train_sampler(dataset)
        return self._train_sampler

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if not self.args.save_only_model:
            save_rollouts(self, self._checkpoint_folder(trial))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            path = Path(self.args.output_dir) / "README.md"
            path.write_text(with_rewards(path.read_text("utf-8"), self), "utf-8")

    def _checkpoint_folder(self, trial: Any) -> Path:
        return Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            load_rollouts(self, Path(checkpoint))
            skip_epochs(self._train_sampler, Path(checkpoint))


def checked_args(args: Any, config_class: type[Config], model: Any) -> Config:
    """The trainer's configuration, by default a `config_class`. Raises `TypeError` for one of another class."""
    name = config_class.__name__.removesuffix("Config")
    if args is None:
        model_name = model if isinstance(model, str) else get_config_model_id(model.config)
        return config_class(f"{model_name.split('/')[-1]}-{name}")
    if not isinstance(args, config_class):
        raise TypeError(
            f"`args` is a {type(args).__name__}, but {name}Trainer needs a `{name}Config`, which extends TRL's "
            "`GRPOConfig`."
        )
    return args
