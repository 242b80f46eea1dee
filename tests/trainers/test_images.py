# SPDX-License-Identifier: Apache-2.0
"""Policies that read images: what each trainer hands to the reward, against each row alone in float32."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin
from trl import GRPOTrainer, RLOOTrainer
from trl.experimental.online_dpo import OnlineDPOTrainer

from endotrl import CollapseMonitor, DenseGRPOTrainer, EndogenousReward, PPOTrainer
from endotrl.scoring import FrozenScorer
from endotrl.scoring.reference_pass import KNOWN_INPUTS

from ..support import trainers
from ..support.vision import make_model, make_processor, make_tokenizer, picture, reference_log_prob, save_vision_model


TRAINERS = [GRPOTrainer, RLOOTrainer, DenseGRPOTrainer, PPOTrainer]
LORA = LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def paths(tiny_model_path, tmp_path_factory):
    families = ("llava", "gemma3")
    return {f: save_vision_model(f, tiny_model_path, tmp_path_factory.mktemp(f)) for f in families}


class Watched:
    """A reward whose calls are compared with each row alone."""

    def __init__(self, reward: Any, model: PreTrainedModel, processor: ProcessorMixin) -> None:
        self.reward, self.model, self.processor = reward, model, processor
        self.__name__ = "watched"
        self.compared = 0

    def __call__(self, prompts: list[Any], completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
        values = self.reward(prompts=prompts, completion_ids=completion_ids, **kwargs)
        for prompt, ids, value in zip(prompts, completion_ids, values, strict=True):
            pictures: list[Image.Image] = []
            bare = []
            for message in prompt:
                content = message["content"]
                if isinstance(content, list):
                    pictures += [part["image"] for part in content if part["type"] == "image"]
                    content = [{"type": "image"} if part["type"] == "image" else part for part in content]
                else:
                    content = [{"type": "text", "text": content}]
                bare.append({**message, "content": content})
            expected = reference_log_prob(self.model, self.processor, bare, pictures, ids).sum().item()
            assert value == pytest.approx(expected, abs=2e-4)
            self.compared += 1
        return values


def parity(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [float(ids[0] % 2) for ids in completion_ids]


def dataset(kind: str) -> Dataset:
    """The same question about four pictures, or, in "several", about one or two pictures each."""
    question = [{"role": "user", "content": "What is it?"}]
    pictures = [picture(seed) for seed in range(4)]
    if kind == "image":
        return Dataset.from_dict({"prompt": [question] * 4, "image": pictures})
    if kind == "several":
        given: list[Any] = [[pictures[0]], [pictures[1]], [pictures[1], pictures[2]], [pictures[3]]]
        return Dataset.from_list([{"prompt": question, "images": images} for images in given])
    return Dataset.from_dict({"prompt": [question] * 8, "images": [[image] for image in pictures * 2]})


def make_trainer(trainer: type, model: Any, reward: Any, folder: Path, kind: str, **settings: Any) -> Any:
    defaults: dict[str, Any] = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    defaults |= {"num_generations": 1 if trainer is PPOTrainer else 2, "max_completion_length": 5}
    defaults |= {"learning_rate": 1e-2, "logging_steps": 1, "beta": 0.1, "dataloader_pin_memory": False}
    return trainers.make_trainer(
        trainer, model, folder, reward, train_dataset=dataset(kind), **{**defaults, **settings}
    )


def test_what_trainers_give_a_model_for_images():
    """TRL's argument names: a recorded pass with other inputs is not used."""
    for trainer in (GRPOTrainer, RLOOTrainer):
        names = set(inspect.signature(trainer._get_per_token_logps_and_entropies).parameters)
        assert names >= KNOWN_INPUTS


def watched(path: str, reward: EndogenousReward) -> Watched:
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    return Watched(reward, model, AutoProcessor.from_pretrained(path))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "placement"),
    [
        *((trainer, "adapter off") for trainer in TRAINERS),
        *((trainer, placement) for trainer in TRAINERS[::3] for placement in ("own copy", "reference model")),
    ],
)
def test_training(trainer, placement, paths, tmp_path, monkeypatch):
    path = paths["llava"]
    reward = EndogenousReward(path if placement == "own copy" else None)
    seen = watched(path, reward)
    kwargs = {"peft_config": LORA} if placement == "adapter off" else {}
    # The monitor compares the policy with the initial one on a held-out reward, in its own forward passes.
    rewards = [seen, parity]
    made = make_trainer(trainer, path, rewards, tmp_path, "images", reward_weights=[1.0, 0.0], **kwargs)
    if placement != "own copy":
        reward.attach(made)
    CollapseMonitor().attach(made)
    before = {name: weight.detach().clone() for name, weight in made.model.named_parameters() if weight.requires_grad}
    passes: list[Any] = []
    run = FrozenScorer._image_passes

    def watch(scorer: FrozenScorer, model: Any, pending: Any) -> Any:
        passes.extend(pending)
        return run(scorer, model, pending)

    monkeypatch.setattr(FrozenScorer, "_image_passes", watch)
    made.train()
    assert seen.compared >= 8
    # An attached reward reads the trainer's pass over the same rows.
    assert bool(passes) == (placement == "own copy")
    after = dict(made.model.named_parameters())
    assert any(not torch.equal(after[name], weight) for name, weight in before.items())


@pytest.mark.parametrize("kind", ["image", "several"])
@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_what_trl_hands_over(kind, family, paths, tmp_path):
    path = paths[family]
    seen = watched(path, EndogenousReward(path))
    make_trainer(GRPOTrainer, path, seen, tmp_path, kind, max_steps=1, beta=0.0).train()
    assert seen.compared == 8


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_positions_of_qwen(family, tiny_model_path, tmp_path):
    """Positions are part of the model's state, which the policy's own passes leave behind."""
    tokenizer = make_tokenizer(tiny_model_path, family)
    processor, model = make_processor(tokenizer, family), make_model(tokenizer, family)
    reward = EndogenousReward(None)
    seen = Watched(reward, make_model(tokenizer, family), processor)
    kwargs = {"peft_config": LORA, "processing_class": processor, "max_steps": 1}
    trainer = make_trainer(GRPOTrainer, model, seen, tmp_path, "images", **kwargs)
    reward.attach(trainer)
    trainer.train()
    assert seen.compared == 8


def test_a_policy_that_sees_and_a_reward_that_ignores(paths, tmp_path):
    """The reward reads the text alone, and not the prompt that the policy read."""
    reward = EndogenousReward(paths["llava"], images="ignore")
    seen = watched(paths["llava"], reward)
    text = [{"role": "user", "content": [{"type": "text", "text": "What is it?"}]}]
    found, expected = [], []

    def kept(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
        found.extend(reward(completion_ids=completion_ids, **kwargs))
        expected.extend(reference_log_prob(seen.model, seen.processor, text, [], ids).sum() for ids in completion_ids)
        return found[-len(completion_ids) :]

    make_trainer(GRPOTrainer, paths["llava"], kept, tmp_path, "images", max_steps=1, beta=0.0).train()
    assert len(found) == 8 and found == pytest.approx([value.item() for value in expected], abs=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["own copy", "reference model"])
def test_online_dpo(placement, paths, tmp_path):
    """OnlineDPO leaves placeholders in prompts, and the pictures in their column."""
    path = paths["llava"]
    reward = EndogenousReward(path if placement == "own copy" else None)
    seen = watched(path, reward)

    def filled(prompts: list[Any], completion_ids: list[list[int]], image: list[Any], **kwargs: Any) -> Any:
        given = []
        for prompt, shown in zip(prompts, image, strict=True):
            (message,) = prompt
            parts = [{**part, "image": shown} if part["type"] == "image" else part for part in message["content"]]
            given.append([{**message, "content": parts}])
        expected = Watched(lambda **_: values, seen.model, seen.processor)
        values = reward(prompts=prompts, completion_ids=completion_ids, image=image, **kwargs)
        eos = seen.processor.tokenizer.eos_token_id
        ids = [row[: row.index(eos) + 1] if eos in row else row for row in completion_ids]
        expected(given, ids)
        seen.compared += expected.compared
        return values

    settings = {"per_device_train_batch_size": 2, "max_steps": 1, "max_completion_length": 5, "max_length": 256}
    settings |= {"generation_kwargs": {"suppress_tokens": [seen.model.config.image_token_id]}, "temperature": 1.0}
    settings |= {"processing_class": seen.processor, "train_dataset": dataset("image")}
    model = AutoModelForImageTextToText.from_pretrained(path)
    trainer = trainers.make_trainer(OnlineDPOTrainer, model, tmp_path, filled, **settings)
    if placement != "own copy":
        reward.attach(trainer)
    trainer.train()
    assert seen.compared == 4
