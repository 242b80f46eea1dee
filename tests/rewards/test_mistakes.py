# SPDX-License-Identifier: Apache-2.0
"""
The mistakes that users are most likely to make: each is answered by what was given, what is wrong, and what to do.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from trl import GRPOConfig, GRPOTrainer

from endotrl import DenseGRPOConfig, DenseGRPOTrainer, EndogenousReward
from endotrl.rewards import AccuracyReward, FormatReward, InformationGain

from ..support.helpers import QUIET, SMALL


CHAT = {"prompts": [[{"role": "user", "content": "a"}]], "completions": [[{"role": "assistant", "content": "b"}]]}
TEXT = {"prompts": ["a"], "completions": ["b"]}
PROMPTS = Dataset.from_dict({"prompt": ["a b", "c d"] * 4})


def make_trainer(model: Any, reward: Any, folder: Path, **config: Any) -> GRPOTrainer:
    settings = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 6,
        "learning_rate": 0.01,
        "beta": 0.1,
        **QUIET,
        **config,
    }
    tokenizer = None if isinstance(model, str) else AutoTokenizer.from_pretrained(model.config._name_or_path)
    return GRPOTrainer(model, reward, args=GRPOConfig(**settings), train_dataset=PROMPTS, processing_class=tokenizer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": "1e-1"}, "`alpha` is '1e-1', but the temperature .* positive and finite"),  # so YAML reads it
        ({"gamma": None}, "`gamma` is None, but a discount must be"),
        ({"max_tokens_per_batch": "8192"}, "`max_tokens_per_batch` is '8192', but"),
        ({"device": "gpu0"}, "`device` is 'gpu0', but it must be one of torch"),
        ({"processing_class": "gpt2"}, "`processing_class` is a str, but it must be a tokenizer"),
        ({"criterion": ["be brief"]}, r"`criterion` is \['be brief'\], but it must be a string, a dictionary"),
        ({"criterion": {"law": 3}}, "`criterion` is .*, but it must be a string, a dictionary"),
        ({"criterion": " "}, "`criterion` is ' ', .* no string may be empty"),
        ({"correction": InformationGain(None), "token_reward": "log_prob"}, "`generalist` .* is None"),
    ],
)
def test_settings(settings, message, tiny_policy_path):
    with pytest.raises((ValueError, TypeError), match=message):
        EndogenousReward(tiny_policy_path, **settings)


def test_a_name_of_no_model():
    with pytest.raises(OSError, match=r"frozen model 'Qwen/Qwen2.5-0.5B-Instrukt' cannot be loaded.*Check the name"):
        EndogenousReward("Qwen/Qwen2.5-0.5B-Instrukt")


def test_a_folder_without_tokenizer(tiny_policy_path, tmp_path):
    folder = shutil.copytree(tiny_policy_path, tmp_path / "model", ignore=shutil.ignore_patterns("*token*"))
    with pytest.raises(OSError, match=r"tokenizer of '.*model' cannot be loaded.*pass it as `processing_class`"):
        EndogenousReward(str(folder))(**TEXT)


def vision_language_model(folder: Path, tokenizer: str) -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(image_size=8, patch_size=4, **SMALL)
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(vocab_size=19, **SMALL), image_token_index=18)
    model = LlavaForConditionalGeneration(config)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return model


def test_a_model_that_reads_images(tiny_policy_path, tmp_path):
    model = vision_language_model(tmp_path, tiny_policy_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy_path)
    (value,) = EndogenousReward(model, tokenizer)(**TEXT)
    assert value is not None and value < 0
    assert EndogenousReward(str(tmp_path), tokenizer)(**TEXT) == pytest.approx([value])
    with pytest.raises(OSError, match="processor of .* cannot be loaded. Pass it.*or the tokenizer alone"):
        EndogenousReward(str(tmp_path))(**TEXT)


def test_a_model_that_writes_no_text(tmp_path):
    CLIPVisionConfig(image_size=8, patch_size=4, **SMALL).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="type 'clip_vision_model'.*one that `AutoModelForCausalLM` loads") as caught:
        EndogenousReward(str(tmp_path))
    assert len(str(caught.value)) < 600  # transformers lists all the models that there are


@pytest.mark.parametrize(
    "part", [{"type": "image", "image": b"x"}, {"type": "image_url", "image_url": "x"}, {"type": "input_audio"}]
)
@pytest.mark.parametrize("side", ["prompt", "completion"])
def test_what_the_model_would_not_see_is_not_scored(part, side, tiny_model_path):
    """Only text is read: an image would be left out, and the reward that of an answer to another question."""
    row = {name: [dict(message) for message in CHAT[f"{name}s"][0]] for name in ("prompt", "completion")}
    row[side][0]["content"] = [part, {"type": "text", "text": "What is this?"}]
    expected = "(has a part of type .* only text|has 1 image, and the frozen model reads only text)"
    with pytest.raises(ValueError, match=f"{side} of row 0 {expected}"):
        EndogenousReward(tiny_model_path)(prompts=[row["prompt"]], completions=[row["completion"]])


def test_content_that_the_template_cannot_write(tiny_model_path):
    prompt = [{"role": "user", "content": 5}]
    with pytest.raises(ValueError, match="chat template of .* refuses these messages: .*Most templates want `role`"):
        EndogenousReward(tiny_model_path)(prompts=[prompt], completions=CHAT["completions"])


@pytest.mark.parametrize("ids", [[1.5], ["7"], None, 7])
def test_completion_ids_that_are_none(ids, tiny_policy_path):
    with pytest.raises(TypeError, match="`completion_ids` of row 0 must be a list of whole numbers"):
        EndogenousReward(tiny_policy_path)(**TEXT, completion_ids=[ids])


def test_completion_ids_of_other_kinds_of_integers(tiny_policy_path):
    reward = EndogenousReward(tiny_policy_path)
    assert reward(**TEXT, completion_ids=[torch.tensor([8, 2])]) == reward(**TEXT, completion_ids=[[8, 2]])


@pytest.mark.parametrize("given", [None, torch.nn.Linear(1, 1)])
def test_attached_to_what_is_no_trainer(given):
    with pytest.raises(TypeError, match="A .* was given, but the reward needs the trainer"):
        EndogenousReward(None).attach(given)


def test_attached_twice_and_late(tiny_policy_path, tmp_path):
    """Neither is wrong: the reference model is what it was before the first step."""
    reward = EndogenousReward(None)
    trainer = make_trainer(tiny_policy_path, reward, tmp_path, bf16=False)
    before = reward.attach(trainer).attach(trainer)(**TEXT)
    trainer.train()
    assert (
        reward.attach(trainer)(**TEXT) == before == pytest.approx(EndogenousReward(tiny_policy_path)(**TEXT), abs=1e-5)
    )


def test_the_policy_itself_as_frozen_model(tiny_policy_path, tmp_path):
    """In mixed precision, before its first update."""
    policy = AutoModelForCausalLM.from_pretrained(tiny_policy_path)
    trainer = make_trainer(policy, EndogenousReward(policy), tmp_path, beta=0.0, bf16=True)
    with pytest.raises(ValueError, match=r"is the policy that is trained.*reward\.attach\(trainer\)"):
        trainer.train()


def test_answers_in_a_column_that_is_not_there():
    with pytest.raises(ValueError, match=r"column 'answer', which the dataset does not have. It has \['solution'\]"):
        AccuracyReward("answer")(completions=["a"], solution=["a"])


@pytest.mark.parametrize(
    "completion",
    [[], [{"role": "assistant"}], [{"role": "assistant", "content": None}], [{"role": "assistant", "content": []}]],
)
def test_completions_without_text_earn_nothing(completion):
    assert FormatReward()(prompts=["a"], completions=[completion]) == [0.0]
    assert AccuracyReward("answer")(completions=[completion], answer=["4"]) == [0.0]


def test_text_in_parts():
    completion = [
        {"role": "assistant", "content": [{"type": "text", "text": "It is "}, {"type": "text", "text": "4"}]}
    ]
    assert FormatReward("^It is 4$")(prompts=["a"], completions=[completion]) == [1.0]
    assert AccuracyReward("answer")(completions=[completion], answer=["4"]) == [1.0]


@pytest.mark.parametrize("weight", [lambda p: p[:1], lambda p: p[:, None], lambda p: p * torch.nan, lambda p: None])
def test_a_weight_that_is_none(weight, tiny_policy_path):
    gain = InformationGain(tiny_policy_path, weight=weight)
    reward = EndogenousReward(tiny_policy_path, token_reward="log_prob", correction=gain)
    with pytest.raises(ValueError, match="`weight` of `InformationGain`"):
        reward(prompts=["a"], completions=["b c"])


def test_an_infinite_reward_does_not_spoil_the_policy(tiny_policy_path, tmp_path):
    def boundless(completions: list[Any], **kwargs: Any) -> list[float]:
        return [float("inf")] * len(completions)

    args = DenseGRPOConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=6,
        **QUIET,
    )
    trainer = DenseGRPOTrainer(tiny_policy_path, boundless, args=args, train_dataset=PROMPTS)
    with pytest.raises(ValueError, match="'boundless' returned an infinite reward"):
        trainer.train()
