# SPDX-License-Identifier: Apache-2.0
"""
What a trainer shares stays as it is, to the bit, whatever is trained; what would change it is refused by `attach`, and
noticed if it comes later. The naive rewards are those of a fresh copy of the checkpoint, one sequence at a time.
"""

import copy
import pickle
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOTrainer
from trl.trainer.callbacks import SyncRefModelCallback

from endotrl import EndogenousReward
from endotrl.rewards import InformationGain

from ..support import trainers
from ..support.reference import completion_log_probs
from ..support.tiny_policy import save_tiny_policy


PROMPT, COMPLETIONS = [1, 7, 8, 9], [[10, 11, 2], [7, 7, 7, 12, 2], [9, 2]]
ROWS = {"prompts": ["<bos> a b c"] * 3, "completions": ["d e", "a a a f", "c"], "completion_ids": COMPLETIONS}
lora = partial(peft.LoraConfig, task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "down_proj"])
oft = partial(peft.OFTConfig, task_type="CAUSAL_LM", target_modules=["q_proj"], oft_block_size=4, r=0)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """The tiny policy, with biases."""
    folder = tmp_path_factory.mktemp("biased")
    save_tiny_policy(folder, attention_bias=True, mlp_bias=True)
    return str(folder)


def naive_rewards(model):
    """Log-probabilities, from full logits: what the default Bellman rewards of finished completions come to."""
    if isinstance(model, str):
        model = AutoModelForCausalLM.from_pretrained(model)
    return [sum(completion_log_probs(model.eval(), PROMPT, ids)) for ids in COMPLETIONS]


def make_trainer(model, folder, dtype=torch.float32, **settings):
    if isinstance(model, str):
        name, model = model, AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    else:
        name = model.config._name_or_path
    settings = {"per_device_train_batch_size": 2, "num_generations": 2, "max_completion_length": 4, **settings}
    rewards = settings.pop("reward_funcs", trainers.length)
    settings |= {"processing_class": AutoTokenizer.from_pretrained(name), "learning_rate": 0.05}
    return trainers.make_trainer(GRPOTrainer, model, folder, rewards, **settings)


def train(model, steps=3):
    """Optimiser steps on everything that is to be trained."""
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=0.05)
    ids = torch.arange(3, 15)[None]
    for _ in range(steps):
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


ADAPTERS: dict[str, Any] = {
    "LoRA": lora(),
    "LoRA with a bias of its own": lora(lora_bias=True),
    "DoRA": lora(use_dora=True),
    "LoRA of the embedding": lora(target_modules=["embed_tokens"]),
    "modules_to_save": lora(modules_to_save=["lm_head", "embed_tokens", "norm"]),
    "trainable_token_indices": lora(trainable_token_indices=[7, 8]),
    "IA3": peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "LN tuning": peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm", "norm"]),
    "VeRA": peft.VeraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4),
    "LoHa": peft.LoHaConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], r=2),
    "LoKr": peft.LoKrConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], r=2),
    "OFT": oft(),
    "HRA": peft.HRAConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2),
}
VIRTUAL_TOKENS: dict[str, Any] = {
    "prompt tuning": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix tuning": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}
MOVES_THE_BASE: dict[str, Any] = {
    "all": lora(bias="all"),
    "lora_only": lora(bias="lora_only"),
    "oft_only": oft(bias="oft_only"),
}


class TestAdapters:
    @pytest.mark.parametrize("adapter", [*ADAPTERS, *VIRTUAL_TOKENS])
    def test_the_base_stays_to_the_bit(self, adapter, path, tmp_path):
        policy = AutoModelForCausalLM.from_pretrained(path)
        base = [(name, weight, weight.detach().clone()) for name, weight in policy.named_parameters()]
        config = copy.deepcopy({**ADAPTERS, **VIRTUAL_TOKENS}[adapter])
        trainer = make_trainer(policy, tmp_path, peft_config=config)
        reward = EndogenousReward(model=None).attach(trainer)
        expected = naive_rewards(path)
        assert reward(**ROWS) == pytest.approx(expected, abs=1e-4)
        train(trainer.model)
        assert reward(**ROWS) == pytest.approx(expected, abs=1e-4)
        assert all(torch.equal(weight, before) for _, weight, before in base), "the base has moved"
        if adapter in VIRTUAL_TOKENS:
            return
        # What was trained is used, and is the reward of nothing.
        assert max(abs(a - b) for a, b in zip(naive_rewards(trainer.model), expected, strict=True)) > 0.01
        with pytest.raises(ValueError, match="adapter is not at zero"):
            EndogenousReward(model=None).attach(trainer)

    @pytest.mark.parametrize("adapter", ["LoRA", "DoRA", "IA3", "OFT", "HRA"])
    def test_in_bfloat16(self, adapter, path, tmp_path):
        # The bases of multiplying methods round differently with the adapter and without it.
        trainer = make_trainer(path, tmp_path, torch.bfloat16, peft_config=copy.deepcopy(ADAPTERS[adapter]))
        EndogenousReward(model=None).attach(trainer)
        train(trainer.model)
        with pytest.raises(ValueError, match="adapter is not at zero"):
            EndogenousReward(model=None).attach(trainer)

    @pytest.mark.parametrize("bias", MOVES_THE_BASE)
    def test_biases_of_the_base_are_refused(self, bias, path, tmp_path):
        trainer = make_trainer(path, tmp_path, peft_config=copy.deepcopy(MOVES_THE_BASE[bias]))
        with pytest.raises(ValueError, match=r'trains weights of the base.*q_proj\.bias.*bias="none"'):
            EndogenousReward(model=None).attach(trainer)
        # It is true: with the adapter off, the model is another one after training.
        train(trainer.model)
        with trainer.model.disable_adapter():
            moved = naive_rewards(trainer.model)
        assert max(abs(a - b) for a, b in zip(moved, naive_rewards(path), strict=True)) > 0.1

    def test_biases_that_the_model_does_not_have(self, tiny_policy_path, tmp_path):
        # Llama has none: nothing is trained but the adapter, whatever its config says.
        trainer = make_trainer(tiny_policy_path, tmp_path, peft_config=lora(bias="all"))
        with pytest.warns(UserWarning, match="bias configured to be 'all'"):  # PEFT's
            reward = EndogenousReward(model=None).attach(trainer)
            train(trainer.model)
            assert reward(**ROWS) == pytest.approx(naive_rewards(tiny_policy_path), abs=1e-4)

    def test_a_layer_that_is_unfrozen(self, path, tmp_path):
        trainer = make_trainer(path, tmp_path, peft_config=lora())
        reward = EndogenousReward(model=None).attach(trainer)
        trainer.model.get_base_model().model.norm.requires_grad_(True)
        with pytest.raises(ValueError, match=r"trains weights of the base.*norm\.weight"):
            EndogenousReward(model=None).attach(trainer)
        reward(**ROWS)  # it has not changed yet
        train(trainer.model, steps=1)
        with pytest.raises(RuntimeError, match="weights have changed since `attach`"):
            reward(**ROWS)

    @pytest.mark.parametrize("initialisation", [False, "pissa", "olora"])
    def test_adapters_that_start_elsewhere(self, initialisation, path, tmp_path):
        trainer = make_trainer(path, tmp_path, peft_config=lora(init_lora_weights=initialisation))
        with pytest.raises(ValueError, match="adapter is not at zero"):
            EndogenousReward(model=None).attach(trainer)

    def test_one_token_that_was_trained(self, path, tmp_path):
        config = lora(target_modules=["embed_tokens"])
        trainer = make_trainer(path, tmp_path, peft_config=config)
        layer = trainer.model.get_base_model().model.embed_tokens
        layer.lora_embedding_A["default"].data[:, 18] = 0.5
        with pytest.raises(ValueError, match="adapter is not at zero"):
            EndogenousReward(model=None).attach(trainer)

    def test_an_inactive_adapter_that_was_trained(self, path, tmp_path):
        policy = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(path), lora(), adapter_name="first")
        train(policy)
        policy.add_adapter("second", lora())
        policy.set_adapter("second")
        trainer = make_trainer(policy, tmp_path, beta=0.0)
        assert EndogenousReward(model=None).attach(trainer)(**ROWS) == pytest.approx(naive_rewards(path), abs=1e-4)
        policy.set_adapter("first")
        with pytest.raises(ValueError, match="adapter is not at zero"):
            EndogenousReward(model=None).attach(trainer)


class TestReference:
    """That it stays to the bit: `tests/rewards/test_trl_integration.py`."""

    def test_synchronised_by_a_callback(self, path, tmp_path):
        # Without the setting, of which the setting's callback is made.
        trainer = make_trainer(path, tmp_path, beta=0.1)
        trainer.add_callback(SyncRefModelCallback(trainer.ref_model, trainer.accelerator))
        with pytest.raises(ValueError, match="synchronises its reference model.*`sync_ref_model=True`"):
            EndogenousReward(model=None).attach(trainer)

    def test_moved_later(self, path, tmp_path):
        reward = EndogenousReward(model=None)
        trainer = make_trainer(path, tmp_path, beta=0.1, reward_funcs=reward, ref_model_sync_steps=1, max_steps=3)
        reward.attach(trainer)
        trainer.add_callback(SyncRefModelCallback(trainer.ref_model, trainer.accelerator))
        with pytest.raises(RuntimeError, match="reference model, whose weights have changed since `attach`"):
            trainer.train()
        assert trainer.state.global_step == 1

    def test_one_value_in_a_thousand_steps(self, path, tmp_path):
        trainer = make_trainer(path, tmp_path, beta=0.1)
        reward = EndogenousReward(model=None).attach(trainer)
        for weight in trainer.ref_model.parameters():
            weight.data.mul_(1 + 1e-6)  # no optimizer, no version counter
        with pytest.raises(RuntimeError, match="weights have changed since `attach`"):
            reward(**ROWS)

    def test_a_trainer_that_casts_its_model(self, path, tmp_path):
        # As DeepSpeed does when training starts. The same weights, in fewer bits.
        trainer = make_trainer(path, tmp_path, beta=0.1)
        reward = EndogenousReward(model=None).attach(trainer)
        trainer.ref_model.bfloat16()
        assert reward(**ROWS) == pytest.approx(naive_rewards(path), rel=0.05)
        trainer.ref_model.lm_head.weight.data.mul_(1.01)
        with pytest.raises(RuntimeError, match="weights have changed"):
            reward(**ROWS)


class TestSentToVLLM:
    """TRL merges the adapter into its base, sends it and takes the adapter out again, which leaves rounding errors."""

    @staticmethod
    def make(path, folder, method):
        trainer = make_trainer(path, folder, torch.bfloat16, peft_config=lora())

        def send():
            trainer.model.merge_adapter()
            trainer.sent = trainer.model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight.clone()
            trainer.model.unmerge_adapter()

        trainer.args.use_vllm, trainer.send = True, send
        if method == "sync_weights":
            trainer.vllm_generation = SimpleNamespace(sync_weights=send)
        else:
            trainer._move_model_to_vllm = send
        return trainer

    @pytest.mark.parametrize("method", ["sync_weights", "_move_model_to_vllm"])
    def test_the_base_gets_its_weights_back(self, method, path, tmp_path):
        trainer = self.make(path, tmp_path, method)
        weight = trainer.model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
        before = weight.clone()
        reward = EndogenousReward(model=None).attach(trainer)
        first = reward(**ROWS)
        train(trainer.model)
        for _ in range(2):
            (trainer.vllm_generation.sync_weights if method == "sync_weights" else trainer._move_model_to_vllm)()
            assert torch.equal(weight, before)
            assert not torch.equal(trainer.sent, before)  # the policy, and not its base
        assert reward(**ROWS) == first
        trainer.send()
        assert not torch.equal(weight, before)  # so it would be

    def test_a_quantised_base_is_refused(self, path, tmp_path):
        trainer = self.make(path, tmp_path, "sync_weights")
        layer = trainer.model.get_base_model().model.layers[0].mlp.gate_proj
        codes = nn.Parameter((layer.weight * 100).to(torch.int8), requires_grad=False)
        layer.forward = partial(nn.functional.linear, weight=layer.weight.detach(), bias=layer.bias.detach())
        layer.weight = codes
        with pytest.raises(ValueError, match="`use_vllm=True` and a quantised base model"):
            EndogenousReward(model=None).attach(trainer)


def change_one_row(model):
    model.lm_head.weight.data[11] *= 3
    return model


def merge_an_adapter(model):
    return peft.get_peft_model(model, lora(init_lora_weights=False)).merge_and_unload()


def rotate_otherwise(model):
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 17.0}
    return type(model).from_pretrained(model.config._name_or_path, config=model.config)


CHANGES = [change_one_row, merge_an_adapter, rotate_otherwise]


class TestIdentity:
    """A model is known by its weights, not by the place from which they were loaded."""

    @pytest.mark.parametrize("change", CHANGES)
    def test_the_reward_of_a_changed_model_is_not_the_base_trainers(self, change, path, tmp_path):
        model = change(AutoModelForCausalLM.from_pretrained(path))
        assert model.config._name_or_path == path
        reward = EndogenousReward(model, AutoTokenizer.from_pretrained(path))
        expected = naive_rewards(model)
        trainer = make_trainer(path, tmp_path, beta=0.1)
        with pytest.raises(ValueError, match=f"was made for the model '{path}'.*have different values"):
            reward.attach(trainer)
        assert not trainer.ref_model.model._forward_hooks  # nothing watches its passes
        assert reward(**ROWS) == pytest.approx(expected, abs=1e-4)  # as before

    @pytest.mark.parametrize(("change", "loaded"), [*((change, False) for change in CHANGES), (change_one_row, True)])
    def test_nor_the_reverse(self, loaded, change, path, tmp_path):
        model = change(AutoModelForCausalLM.from_pretrained(path))
        reward = EndogenousReward(path)
        if loaded:
            reward.load()
        with pytest.raises(ValueError, match="was made for the model"):
            reward.attach(make_trainer(model, tmp_path, peft_config=lora()))

    @pytest.mark.parametrize(
        ("ours", "theirs"),
        [
            *(("path", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
            *((ours, torch.bfloat16) for ours in ("loaded", "instance", "bfloat16")),
            ("bfloat16", torch.float16),
        ],
        ids=str,
    )
    def test_the_same_model_in_another_dtype(self, ours, theirs, path, tmp_path):
        if ours == "instance":
            reward = EndogenousReward(AutoModelForCausalLM.from_pretrained(path, dtype=theirs))
        else:
            reward = EndogenousReward(path, dtype="bfloat16" if ours == "bfloat16" else "auto")
        if ours == "loaded":
            reward.load()
        trainer = make_trainer(path, tmp_path, theirs, peft_config=lora())
        assert reward.attach(trainer).is_shared

    def test_the_instance_that_is_trained(self, path, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(path)
        reward = EndogenousReward(model)
        trainer = make_trainer(model, tmp_path, peft_config=lora())  # puts the adapter into it
        assert reward.attach(trainer)(**ROWS) == pytest.approx(naive_rewards(path), abs=1e-4)
        adapted = EndogenousReward(trainer.model.get_base_model(), AutoTokenizer.from_pretrained(path))
        with pytest.raises(ValueError, match="was made for the model"):
            adapted.attach(trainer)  # that one has its adapter in it

    def test_saved_elsewhere(self, path, tmp_path):
        AutoModelForCausalLM.from_pretrained(path).save_pretrained(tmp_path / "copy")
        AutoTokenizer.from_pretrained(path).save_pretrained(tmp_path / "copy")
        trainer = make_trainer(path, tmp_path, peft_config=lora())
        assert EndogenousReward(str(tmp_path / "copy")).attach(trainer).is_shared

    def test_attached_again(self, path, tiny_policy_path, tmp_path):
        # What it was made for is not forgotten with the copy that it had.
        reward = EndogenousReward(path).attach(make_trainer(path, tmp_path, peft_config=lora()))
        reward.attach(make_trainer(path, tmp_path, beta=0.1))
        with pytest.raises(ValueError, match="was made for the model"):
            pickle.loads(pickle.dumps(reward)).attach(make_trainer(tiny_policy_path, tmp_path, beta=0.1))

    def test_the_generalist(self, path):
        model = change_one_row(AutoModelForCausalLM.from_pretrained(path))
        reward = EndogenousReward(path, token_reward="log_prob", correction=InformationGain(model))
        expected = [a - b for a, b in zip(naive_rewards(path), naive_rewards(model), strict=True)]
        assert copy.deepcopy(reward)(**ROWS) == pytest.approx(expected, abs=1e-4)

    def test_a_generalist_by_its_folder(self, path):
        reward = EndogenousReward(path, token_reward="log_prob", correction=InformationGain(Path(path)))
        assert pickle.loads(pickle.dumps(reward))(**ROWS) == pytest.approx([0.0] * 3, abs=1e-4)
