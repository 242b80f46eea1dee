# SPDX-License-Identifier: Apache-2.0
"""Each setting of TRL's `GRPOConfig`: it goes with the credit of tokens, or it is refused when the trainer is made."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainingArguments
from trl import GRPOConfig

from endotrl import DenseGRPOTrainer, EndogenousReward, PPOTrainer
from endotrl.trainers.value_head import critic_of

from ..support import trainers


TRAINERS = {"dense": DenseGRPOTrainer, "ppo": PPOTrainer}

# For each setting that `GRPOConfig` adds to transformers', a value that is not its default, and what it may need.
FINE: dict[str, Any] = {
    "model_init_kwargs": {"dtype": "float32"},
    "trust_remote_code": True,
    "router_aux_loss_coef": 0.01,
}
FINE |= {"disable_dropout": True, "cast_lm_head_to_fp32": True, "num_generations": 2, "num_generations_eval": 2}
FINE |= {"max_completion_length": 4, "ds3_gather_for_generation": False, "shuffle_dataset": False}
FINE |= {"pad_to_multiple_of": 8, "generation_batch_size": 16, "steps_per_generation": 2}
# What completions are drawn from. Log-probabilities are those of the policy at `temperature`, as in TRL.
FINE |= {"temperature": 0.8, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "generation_kwargs": {"typical_p": 0.9}}
FINE |= {"chat_template_kwargs": {"enable_thinking": False}, "repetition_penalty": 1.1}
FINE |= {"cache_implementation": "dynamic", "use_transformers_continuous_batching": True}
FINE |= {"transformers_continuous_batching_config": {"block_size": 16}}
# vLLM's importance ratio is one factor a completion in its default mode, and is not differentiated: tokens keep
# theirs.
FINE |= {"use_vllm": True, "vllm_mode": "server", "vllm_model_impl": "transformers"}
FINE |= {"vllm_enable_sleep_mode": True, "vllm_structured_outputs_regex": "a+"}
FINE |= {"vllm_server_base_url": "http://localhost:1", "vllm_server_host": "localhost", "vllm_server_port": 1}
FINE |= {"vllm_server_timeout": 1.0, "vllm_group_port": 1, "vllm_gpu_memory_utilization": 0.1}
FINE |= {"vllm_max_model_length": 64, "vllm_tensor_parallel_size": 2}
FINE |= {"vllm_importance_sampling_correction": False, "vllm_importance_sampling_mode": "token_truncate"}
FINE |= {"vllm_importance_sampling_clip_max": 2.0, "vllm_importance_sampling_clip_min": 0.5}
# `scale_rewards` has no effect in PPO, as its docs say; `TestCredit` has all losses.
FINE |= {"max_tool_calling_iterations": 2, "beta": 0.2, "num_iterations": 2, "epsilon": 0.1, "delta": 1.5}
FINE |= {"epsilon_high": 0.3, "sapo_temperature_neg": 2.0, "sapo_temperature_pos": 2.0, "vespo_k_pos": 1.0}
FINE |= {"vespo_lambda_pos": 1.0, "vespo_k_neg": 1.0, "vespo_lambda_neg": 1.0, "reward_weights": [0.5]}
FINE |= {"scale_rewards": "batch", "loss_type": "luspo", "mask_truncated_completions": True}
FINE |= {"sync_ref_model": True, "ref_model_mixup_alpha": 0.5, "ref_model_sync_steps": 2}
FINE |= {"top_entropy_quantile": 0.5, "entropy_coef": 0.01, "use_adaptive_entropy": True}
FINE |= {"entropy_coef_min": 0.01, "entropy_coef_max": 0.1, "entropy_coef_delta": 0.1, "entropy_target": 2.0}
FINE |= {"use_bias_correction_kl": False, "log_completions": True, "log_multimodal": False}
FINE |= {"num_completions_to_print": 1, "log_unique_prompts": True, "log_completions_hub_repo": "a/b"}
NEEDED: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("sapo_temperature_neg", "sapo_temperature_pos"), {"loss_type": "sapo"}),
    **dict.fromkeys(("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"), {"loss_type": "vespo"}),
    "sync_ref_model": {"beta": 0.1},
    **dict.fromkeys(("ref_model_mixup_alpha", "ref_model_sync_steps"), {"sync_ref_model": True, "beta": 0.1}),
    **{f"entropy_{name}": {"use_adaptive_entropy": True} for name in ("coef_min", "coef_max", "coef_delta", "target")},
    "log_completions_hub_repo": {"log_completions": True},
}
# And those that would undo the credit of tokens, or have no meaning: of both trainers, or of PPO.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "importance_sampling_level": ({"importance_sampling_level": "sequence"}, "one importance ratio before all tokens"),
    "off_policy_mask_threshold": ({"off_policy_mask_threshold": 0.5}, "drops whole completions"),
}
REFUSED_BY_PPO: dict[str, tuple[dict[str, Any], str]] = {
    "multi_objective_aggregation": (
        {"multi_objective_aggregation": "normalize_then_sum"},
        "PPO compares no completions",
    ),
    "mask_truncated_completions": (
        {"mask_truncated_completions": True, "truncation": "bootstrap"},
        "leaves such completions out",
    ),
}
# They warn, and set another one.
DEPRECATED = {"use_transformers_paged", "vllm_importance_sampling_cap"}


def length(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


def every_second(completion_ids: list[list[int]], **kwargs: Any) -> list[list[float]]:
    return [[float(h % 2) for h in range(len(ids))] for ids in completion_ids]


def make_trainer(kind: str, path: str, output_dir: Path, reward: Any, **settings: Any) -> Any:
    return trainers.make_trainer(TRAINERS[kind], path, output_dir, reward, **settings)


def test_all_settings_are_decided_on():
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    fields = {field.name for field in dataclasses.fields(GRPOConfig)} - inherited
    decided = FINE.keys() | REFUSED.keys() | REFUSED_BY_PPO.keys() | DEPRECATED
    assert fields == decided, "Does the new setting of TRL go with the credit of tokens?"


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("name", FINE)
def test_fine(name, kind, tmp_path):
    # Nothing is said against it, and the trainer goes on to the model, whose path leads nowhere.
    settings = {name: FINE[name], **NEEDED.get(name, {})}
    with pytest.raises(OSError, match="nowhere"):
        make_trainer(kind, "/nowhere", tmp_path, EndogenousReward("quickstart"), **settings)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [(kind, *case) for kind in TRAINERS for case in REFUSED.values()]
    + [("ppo", *case) for case in REFUSED_BY_PPO.values()],
    ids=str,
)
def test_refused(kind, settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(kind, "/nowhere", tmp_path, EndogenousReward("quickstart"), **settings)


class TestDense:
    """Where all tokens of a completion are credited alike, TRL's settings mean what they mean in TRL."""

    @pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=str)
    def test_credit_of_whole_completions(self, settings, message, tiny_policy_path, tmp_path):
        for rewards, credit in ((EndogenousReward(tiny_policy_path), "outcome"), (length, "token")):
            make_trainer("dense", tiny_policy_path, tmp_path, rewards, credit=credit, **settings).train()
        trainer = make_trainer("dense", tiny_policy_path, tmp_path, every_second, **settings)
        with pytest.raises(ValueError, match=f"{message}.*or `credit='outcome'`"):  # it turns out to be dense
            trainer.train()

    def test_normalize_then_sum(self, tmp_path):
        with pytest.raises(OSError, match="nowhere"):
            make_trainer("dense", "/nowhere", tmp_path, length, multi_objective_aggregation="normalize_then_sum")


class TestCredit:
    """On the policy, the gradient at a token is minus its advantage, times what a completion has in common."""

    @pytest.mark.parametrize("kind", TRAINERS)
    @pytest.mark.parametrize(
        "settings",
        [
            *({"loss_type": name} for name in ("grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo")),
            {"top_entropy_quantile": 0.5},
            {"entropy_coef": 0.1},
            {"delta": 1.5, "epsilon_high": 0.3},
            {"temperature": 0.7},
        ],
        ids=str,
    )
    def test_gradient(self, settings, kind, tiny_policy_path, tmp_path):
        trainer = make_trainer(kind, tiny_policy_path, tmp_path, EndogenousReward(tiny_policy_path), **settings)
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        rows = [trainer.train_dataset[i // trainer.num_generations] for i in range(8)]
        output = trainer._generate_and_score_completions(rows)
        log_probs: list[Tensor] = []
        compute = trainer._get_per_token_logps_and_entropies

        def keep(*args: Any, **kwargs: Any) -> Any:
            outputs = compute(*args, **kwargs)
            outputs[0].retain_grad()
            log_probs.append(outputs[0])
            return outputs

        trainer._get_per_token_logps_and_entropies = keep
        trainer._compute_loss(trainer.model, output).backward()
        gradients, advantages = log_probs[0].grad, output["advantages"]
        told_apart = 0
        for gradient, advantage, mask in zip(gradients, advantages, output["completion_mask"].bool(), strict=True):
            kept = mask & (gradient != 0)  # `top_entropy_quantile` leaves tokens out
            if kept.sum() > 1:
                torch.testing.assert_close(
                    gradient[kept] * advantage[kept].sum(),
                    advantage[kept] * gradient[kept].sum(),
                    atol=1e-5,
                    rtol=1e-3,
                )
                told_apart += int(gradient[kept].std() > 1e-4)
        assert told_apart >= 2


@pytest.mark.parametrize("mixup", [1.0, 0.6])
def test_synchronised_reference_has_no_critic(mixup, tiny_policy_path, tmp_path):
    settings = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": mixup}
    settings |= {"max_steps": 1, "learning_rate": 1e-2}
    trainer = make_trainer("ppo", tiny_policy_path, tmp_path, EndogenousReward(tiny_policy_path), **settings)
    before = {name: tensor.clone() for name, tensor in trainer.ref_model.state_dict().items()}
    trainer.train()
    policy = trainer.model.state_dict()
    for name, tensor in trainer.ref_model.state_dict().items():
        torch.testing.assert_close(tensor, (1 - mixup) * before[name] + mixup * policy[name])
        assert not torch.equal(tensor, before[name])
    assert critic_of(trainer._base_policy).head.bias.abs() > 0  # and the critic is still there, and was trained
