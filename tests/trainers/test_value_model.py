# SPDX-License-Identifier: Apache-2.0
"""PPO's critic as a separate model: it gets the policy's inputs and keeps its trained head."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from endotrl import PPOTrainer
from endotrl.trainers.value_head import critic_of

from ..support import trainers
from ..support.helpers import SMALL
from ..support.trainers import PROMPTS, length, rollout, rows_of, set_head
from ..support.vision import picture, save_vision_model


IMAGES = Dataset.from_dict(
    {"prompt": [[{"role": "user", "content": "What is it?"}]] * 4, "image": [picture(seed) for seed in range(4)]}
)


@pytest.fixture(scope="module")
def tiny_vlm_path(tiny_model_path, tmp_path_factory):
    return save_vision_model("llava_next", tiny_model_path, tmp_path_factory.mktemp("tiny-vlm"))


def make_trainer(path: str, output_dir: Path, dataset: Dataset = PROMPTS, **settings: Any) -> PPOTrainer:
    small = {"per_device_train_batch_size": 4, "max_completion_length": 4, "max_steps": 1, "num_iterations": 1}
    rates = {"learning_rate": 1e-2, "value_learning_rate": 1e-2}
    return trainers.make_trainer(
        PPOTrainer, path, output_dir, length, train_dataset=dataset, **{**small, **rates, **settings}
    )


class TestImages:
    def test_values_depend_on_the_image(self, tiny_vlm_path, tmp_path):
        trainer = make_trainer(tiny_vlm_path, tmp_path, IMAGES, critic="value_model")
        critic = critic_of(trainer._base_policy)
        set_head(trainer)
        output = rollout(trainer, 4)
        found, _ = trainer._values_and_log_probs(output)
        # By hand: the value model, one row at a time.
        for i, (values, (prompt, completion)) in enumerate(zip(found, rows_of(output), strict=True)):
            pictures = {name: output[name][i : i + 1] for name in ("pixel_values", "image_sizes")}
            with torch.no_grad():
                hidden = critic.backbone(torch.tensor([prompt + completion]), **pictures).last_hidden_state[0]
            expected = (hidden @ critic.head.weight + critic.head.bias)[len(prompt) - 1 :]
            torch.testing.assert_close(values[: len(completion) + 1], expected, atol=1e-4, rtol=1e-4)
        # The prompts are the same: with one image for all, so are the values of their first states.
        assert found[:, 0].std() > 1e-4
        blind = {**output, "pixel_values": output["pixel_values"][:1].expand_as(output["pixel_values"])}
        assert trainer._values_and_log_probs(blind)[0][:, 0].std() < 1e-6
        before = critic.head.bias.clone()
        trainer.train()
        assert not torch.equal(critic.head.bias, before)

    def test_value_model_without_eyes(self, tiny_vlm_path, tmp_path):
        blind = LlamaForCausalLM(LlamaConfig(vocab_size=400, **SMALL))
        with pytest.raises(ValueError, match=r"'llama', but the policy is a 'llava_next', which reads images"):
            make_trainer(tiny_vlm_path, tmp_path, IMAGES, critic="value_model", value_model=blind)


class TestTrainedHead:
    @pytest.mark.parametrize("auto", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
    @pytest.mark.parametrize("from_path", [False, True])
    def test_loads(self, auto, from_path, tiny_policy_path, tmp_path):
        value_model = auto.from_pretrained(tiny_policy_path, num_labels=1)
        with torch.no_grad():
            value_model.score.weight.normal_()
        weight = value_model.score.weight[0].clone()
        if from_path:
            value_model.save_pretrained(tmp_path / "value")
        given = str(tmp_path / "value") if from_path else value_model
        trainer = make_trainer(tiny_policy_path, tmp_path, critic="value_model", value_model=given)
        head = critic_of(trainer._base_policy).head
        assert torch.equal(head.weight, weight)
        bias = value_model.score.bias
        assert head.bias.item() == pytest.approx(0.0 if bias is None else bias.item())
        output = rollout(trainer, 4)
        prompt, completion = rows_of(output)[0]
        with torch.no_grad():
            hidden = value_model.base_model(torch.tensor([prompt + completion])).last_hidden_state
            expected = value_model.score(hidden)[0, len(prompt) - 1 : -1, 0]
        torch.testing.assert_close(output["old_values"][0, : len(completion)], expected, atol=1e-4, rtol=1e-4)

    def test_several_labels(self, tiny_policy_path, tmp_path):
        value_model = AutoModelForSequenceClassification.from_pretrained(tiny_policy_path, num_labels=2)
        with pytest.raises(ValueError, match="a head with 2 labels"):
            make_trainer(tiny_policy_path, tmp_path, critic="value_model", value_model=value_model)


VIRTUAL_TOKENS = [
    PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
    PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
]


@pytest.mark.parametrize("peft_config", VIRTUAL_TOKENS, ids=lambda config: type(config).__name__)
class TestPromptLearning:
    @pytest.mark.filterwarnings("ignore:Position ids are not supported")
    def test_value_head(self, peft_config, tiny_policy_path, tmp_path):
        same_length = Dataset.from_dict({"prompt": ["a b c", "d e f", "g h i", "j k l"] * 4})  # no padding on the left
        trainer = make_trainer(tiny_policy_path, tmp_path, same_length, peft_config=peft_config)
        head = critic_of(trainer._base_policy).head
        set_head(trainer, bias=0.0)
        output = rollout(trainer, 4)
        seen: list[torch.Tensor] = []
        trainer._base_policy.base_model.register_forward_hook(lambda *args: seen.append(args[2].last_hidden_state))
        for values, (prompt, completion) in zip(output["old_values"], rows_of(output), strict=True):
            ids, length = torch.tensor([prompt + completion]), len(completion)
            seen.clear()
            with torch.no_grad():
                trainer.model(input_ids=ids, attention_mask=torch.ones_like(ids))
            expected = (seen[0][0] @ head.weight)[-length - 1 : -1]
            torch.testing.assert_close(values[:length], expected, atol=1e-4, rtol=1e-4)
        trainer.train()
        assert head.bias.any()

    def test_value_model(self, peft_config, tmp_path):
        with pytest.raises(ValueError, match="does not read its virtual tokens"):
            make_trainer("/nowhere", tmp_path, critic="value_model", peft_config=peft_config)
