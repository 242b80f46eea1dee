# SPDX-License-Identifier: Apache-2.0
"""
The mistakes that users are most likely to make: the error says what was given, what is wrong, and how to fix it.
"""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, CLIPVisionConfig
from trl import GRPOTrainer

from endotrl import EndogenousReward
from endotrl.rewards import AccuracyReward, FormatReward, InformationGain

from ..support.helpers import SMALL
from ..support.trainers import make_trainer


TEXT = {"prompts": ["a"], "completions": ["b"]}


def test_a_folder_without_tokenizer(tiny_policy_path, tmp_path):
    folder = shutil.copytree(tiny_policy_path, tmp_path / "model", ignore=shutil.ignore_patterns("*token*"))
    with pytest.raises(OSError, match=r"tokenizer of '.*model' cannot be loaded.*pass it as `processing_class`"):
        EndogenousReward(str(folder))(**TEXT)


def test_a_model_that_writes_no_text(tmp_path):
    CLIPVisionConfig(image_size=8, patch_size=4, **SMALL).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="type 'clip_vision_model'.*one that `AutoModelForCausalLM` can") as caught:
        EndogenousReward(str(tmp_path))
    assert len(str(caught.value)) < 600  # without transformers' list of all models


@pytest.mark.parametrize("ids", [[1.5], ["7"], None, 7])
def test_completion_ids_that_are_none(ids, tiny_policy_path):
    with pytest.raises(TypeError, match="`completion_ids` of row 0 must be a list of token ids"):
        EndogenousReward(tiny_policy_path)(**TEXT, completion_ids=[ids])


@pytest.mark.parametrize("given", [None, torch.nn.Linear(1, 1)])
def test_attached_to_what_is_no_trainer(given):
    with pytest.raises(TypeError, match="`trainer` must be the one with this reward.* got (NoneType|Linear)"):
        EndogenousReward(None).attach(given)


def test_attached_twice_and_late(tiny_policy_path, tmp_path):
    """Neither is wrong: the reference model is what it was before the first step."""
    reward = EndogenousReward(None)
    trainer = make_trainer(GRPOTrainer, tiny_policy_path, tmp_path, reward, beta=0.1, learning_rate=0.01)
    before = reward.attach(trainer).attach(trainer)(**TEXT)
    trainer.train()
    own = EndogenousReward(tiny_policy_path)(**TEXT)
    assert reward.attach(trainer)(**TEXT) == before == pytest.approx(own, abs=1e-5)


def test_the_policy_itself_as_frozen_model(tiny_policy_path, tmp_path):
    """In mixed precision, before its first update."""
    policy = AutoModelForCausalLM.from_pretrained(tiny_policy_path)
    trainer = make_trainer(GRPOTrainer, policy, tmp_path, EndogenousReward(policy), bf16=True)
    with pytest.raises(ValueError, match=r"is the policy that is trained.*reward\.attach\(trainer\)"):
        trainer.train()


def test_answers_in_a_column_that_is_not_there():
    with pytest.raises(ValueError, match=r"column 'answer', but the dataset only has \['solution'\]"):
        AccuracyReward("answer")(completions=["a"], solution=["a"])


PARTS = [{"type": "text", "text": "It is "}, {"type": "text", "text": "4"}]


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        # Without text.
        ([], 0.0),
        ([{"role": "assistant"}], 0.0),
        ([{"role": "assistant", "content": None}], 0.0),
        ([{"role": "assistant", "content": []}], 0.0),
        ([{"role": "assistant", "content": PARTS}], 1.0),
    ],
)
def test_text_of_completions(completion, expected):
    assert FormatReward("^It is 4$")(prompts=["a"], completions=[completion]) == [expected]
    assert AccuracyReward("answer")(completions=[completion], answer=["4"]) == [expected]


@pytest.mark.parametrize("weight", [lambda p: p[:1], lambda p: p[:, None], lambda p: p * torch.nan, lambda p: None])
def test_a_weight_that_is_none(weight, tiny_policy_path):
    gain = InformationGain(tiny_policy_path, weight=weight)
    reward = EndogenousReward(tiny_policy_path, token_reward="log_prob", correction=gain)
    with pytest.raises(ValueError, match="`weight` of `InformationGain`"):
        reward(prompts=["a"], completions=["b c"])
