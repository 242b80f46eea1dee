# SPDX-License-Identifier: Apache-2.0
"""Each setting of TRL's `GRPOConfig` either works with token-level credit or is rejected by the trainer's `__init__`."""

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

# Settings that `GRPOConfig` adds to transformers', and that go with the credit of tokens. vLLM's importance ratio is one
# factor per completion in its default mode, and is not differentiated: tokens keep theirs. `scale_rewards` has no effect
# in PPO, as its docs say.
FINE = """
    beta cache_implementation cast_lm_head_to_fp32 chat_template_kwargs delta disable_dropout ds3_gather_for_generation
    entropy_coef entropy_coef_delta entropy_coef_max entropy_coef_min entropy_target epsilon epsilon_high
    generation_batch_size generation_kwargs log_completions log_completions_hub_repo log_multimodal log_unique_prompts
    loss_type mask_truncated_completions max_completion_length max_tool_calling_iterations min_p model_init_kwargs
    num_completions_to_print num_generations num_generations_eval num_iterations pad_to_multiple_of
    ref_model_mixup_alpha ref_model_sync_steps repetition_penalty reward_weights router_aux_loss_coef
    sapo_temperature_neg sapo_temperature_pos scale_rewards shuffle_dataset steps_per_generation sync_ref_model
    temperature top_entropy_quantile top_k top_p transformers_continuous_batching_config trust_remote_code
    use_adaptive_entropy use_bias_correction_kl use_transformers_continuous_batching use_vllm vespo_k_neg vespo_k_pos
    vespo_lambda_neg vespo_lambda_pos vllm_enable_sleep_mode vllm_gpu_memory_utilization vllm_group_port
    vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min vllm_importance_sampling_correction
    vllm_importance_sampling_mode vllm_max_model_length vllm_mode vllm_model_impl vllm_server_base_url vllm_server_host
    vllm_server_port vllm_server_timeout vllm_structured_outputs_regex vllm_tensor_parallel_size
""".split()
# Settings that would undo token-level credit or have no meaning, in both trainers or in PPO.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "importance_sampling_level": ({"importance_sampling_level": "sequence"}, "one importance ratio for all tokens"),
    "off_policy_mask_threshold": ({"off_policy_mask_threshold": 0.5}, "drop whole completions"),
}
BY_FUNCTION = {"multi_objective_aggregation": "normalize_then_sum"}
MASKED = {"mask_truncated_completions": True, "truncation": "bootstrap"}
REFUSED_BY_PPO: dict[str, tuple[dict[str, Any], str]] = {
    "multi_objective_aggregation": (BY_FUNCTION, "PPO does not compare completions"),
    "mask_truncated_completions": (MASKED, "excludes them from the loss"),
}
# They warn and set another field.
DEPRECATED = {"use_transformers_paged", "vllm_importance_sampling_cap"}


def every_second(completion_ids: list[list[int]], **kwargs: Any) -> list[list[float]]:
    return [[float(h % 2) for h in range(len(ids))] for ids in completion_ids]


def make_trainer(kind: str, path: str, output_dir: Path, reward: Any, **settings: Any) -> Any:
    return trainers.make_trainer(TRAINERS[kind], path, output_dir, reward, **settings)


def test_all_settings_are_decided_on():
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    fields = {field.name for field in dataclasses.fields(GRPOConfig)} - inherited
    decided = {*FINE, *REFUSED, *REFUSED_BY_PPO, *DEPRECATED}
    assert fields == decided, "Does the new setting of TRL go with the credit of tokens?"


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [(kind, *case) for kind in TRAINERS for case in REFUSED.values()]
    + [("ppo", *case) for case in REFUSED_BY_PPO.values()],
    ids=str,
)
def test_refused(kind, settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(kind, "/nowhere", tmp_path, EndogenousReward("quickstart"), **settings)


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=str)
def test_credit_of_whole_completions(settings, message, tiny_policy_path, tmp_path):
    """If all tokens of a completion get the same credit, TRL's settings keep their meaning."""
    for rewards, credit in ((EndogenousReward(tiny_policy_path), "outcome"), (trainers.length, "token")):
        make_trainer("dense", tiny_policy_path, tmp_path, rewards, credit=credit, **settings).train()
    trainer = make_trainer("dense", tiny_policy_path, tmp_path, every_second, **settings)
    with pytest.raises(ValueError, match=f"{message}.*or `credit='outcome'`"):  # it turns out to be dense
        trainer.train()


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
def test_gradient(settings, kind, tiny_policy_path, tmp_path):
    """At the initial policy, the gradient of a token is proportional to its advantage within a completion."""
    trainer = make_trainer(kind, tiny_policy_path, tmp_path, EndogenousReward(tiny_policy_path), **settings)
    output = trainers.rollout(trainer)
    log_probs: list[Tensor] = []
    compute = trainer._get_per_token_logps_and_entropies

    def keep(*args: Any, **kwargs: Any) -> Any:
        outputs = compute(*args, **kwargs)
        outputs[0].retain_grad()
        log_probs.append(outputs[0])
        return outputs

    trainer._get_per_token_logps_and_entropies = keep
    trainer._compute_loss(trainer.model, output).backward()
    told_apart = 0
    rows = zip(log_probs[0].grad, output["advantages"], output["completion_mask"].bool(), strict=True)
    for gradient, advantage, mask in rows:
        kept = mask & (gradient != 0)  # `top_entropy_quantile` leaves tokens out
        if kept.sum() > 1:
            g, a = gradient[kept], advantage[kept]
            torch.testing.assert_close(g * a.sum(), a * g.sum(), atol=1e-5, rtol=1e-3)
            told_apart += int(g.std() > 1e-4)
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
