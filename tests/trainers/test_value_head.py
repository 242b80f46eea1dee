# SPDX-License-Identifier: Apache-2.0
"""The critic inside the policy's forward pass: same numbers as by hand, and nothing else changes."""

import copy
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from trl.distributed import DistributedBackend
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer.utils import add_fused_lm_head

from endotrl.trainers.value_head import (
    Critic,
    ForwardRecorder,
    ValueHead,
    add_critic,
    critic_of,
    is_critic,
    send_policy_only,
    without_critic,
)


def random_head(hidden_size: int = 16) -> ValueHead:
    head = ValueHead(hidden_size)
    with torch.no_grad():
        head.weight.copy_(torch.randn(hidden_size, generator=torch.Generator().manual_seed(0)))
        head.bias.fill_(0.5)
    return head


def policy_with(path: str, critic: Critic) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(path)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    add_critic(model, critic)
    return model


def batch() -> dict[str, Tensor]:
    """Two rows, the second padded on both sides."""
    input_ids = torch.tensor([[7, 8, 9, 10, 11, 12], [0, 8, 9, 10, 2, 0]])
    attention_mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0]])
    labels = torch.tensor([[-100, -100, -100, 10, 11, 12], [-100, -100, -100, 10, 2, -100]])
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


class TestForward:
    @pytest.mark.parametrize("own_model", [False, True])
    def test_values_by_hand(self, own_model, tiny_policy_path):
        backbone = AutoModelForCausalLM.from_pretrained(tiny_policy_path).base_model
        if own_model:  # another model than the policy
            with torch.no_grad():
                backbone.norm.weight.mul_(2.0)
        head = random_head()
        model = policy_with(tiny_policy_path, Critic(head, backbone if own_model else None))
        outputs = model(**batch(), fused_lm_head=True, return_values=True)
        naive = backbone(input_ids=batch()["input_ids"], attention_mask=batch()["attention_mask"]).last_hidden_state
        expected = (naive * head.weight).sum(-1) + head.bias
        torch.testing.assert_close(outputs.state_values, expected)
        # Each value belongs to the state after its token: it is that of the sequence cut off there.
        prefix = backbone(input_ids=batch()["input_ids"][:1, :4]).last_hidden_state[0, -1]
        torch.testing.assert_close(outputs.state_values[0, 3], prefix @ head.weight + head.bias[0])

    @pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}, {"cast_lm_head_to_fp32": True}], ids=str)
    def test_the_rest_of_the_forward_is_that_of_trl(self, settings, tiny_policy_path):
        dtype = torch.bfloat16 if settings else torch.float32
        plain, model = (AutoModelForCausalLM.from_pretrained(tiny_policy_path, dtype=dtype) for _ in range(2))
        fields = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
        add_fused_lm_head(plain, outputs=fields, **settings)
        expected = plain(**batch(), fused_lm_head=True)
        values = []
        for _ in range(2):  # TRL patches a policy once more, if another trainer is made for it
            add_fused_lm_head(model, outputs=fields, **settings)
            add_critic(model, Critic(random_head()))
            without, found = (model(**batch(), fused_lm_head=True, **kw) for kw in ({}, {"return_values": True}))
            values.append(found.state_values)
            assert (without.keys(), found.keys()) == (expected.keys(), {*expected, "state_values"})
            for outputs in (without, found):
                assert all(torch.equal(outputs[name], expected[name]) for name in expected)
        assert torch.equal(*values)
        ids = batch()["input_ids"]
        assert torch.equal(model(ids).logits, plain(ids).logits)
        generated = [m.generate(ids[:1, :3], do_sample=False, max_new_tokens=4) for m in (model, plain)]
        assert torch.equal(*generated)
        assert not model.base_model._forward_hooks  # nothing stays behind

    @pytest.mark.parametrize("own_model", [False, True])
    @pytest.mark.parametrize("mixed_precision", [False, True])
    def test_deep_copy_has_its_own_weights(self, mixed_precision, own_model, tiny_policy_path):
        backbone = AutoModel.from_pretrained(tiny_policy_path) if own_model else None
        model = policy_with(tiny_policy_path, Critic(random_head(), backbone))
        if mixed_precision:  # accelerate patches the forward, too
            AcceleratorState._reset_state(reset_partial_state=True)
            model = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)

        def everything(of: PreTrainedModel) -> list[Tensor]:
            with torch.no_grad():
                outputs = of(**batch(), fused_lm_head=True, return_values=True)
                ids = batch()["input_ids"][:1, :3]
                return [
                    *(outputs.log_probs, outputs.state_values, of(ids).logits),
                    of.generate(ids, do_sample=False, max_new_tokens=4),
                ]

        before = everything(model)
        copied = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(-1.3)
        assert all(torch.equal(a, b) for a, b in zip(everything(copied), before, strict=True))
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.mul_(-1.3)
        assert all(torch.equal(a, b) for a, b in zip(everything(copied), everything(model), strict=True))
        AcceleratorState._reset_state(reset_partial_state=True)

    @pytest.mark.parametrize("kind", ["detached", "attached", "own model"])
    def test_who_gets_the_gradient(self, kind, tiny_policy_path):
        backbone = AutoModel.from_pretrained(tiny_policy_path) if kind == "own model" else None
        model = policy_with(tiny_policy_path, Critic(random_head(), backbone, detach=kind != "attached"))
        model(**batch(), fused_lm_head=True, return_values=True).state_values.sum().backward()
        trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert {"ppo_critic.head.weight", "ppo_critic.head.bias"} <= trained
        assert any(name.startswith("ppo_critic.backbone") for name in trained) == (kind == "own model")
        assert any(not is_critic(name) for name in trained) == (kind == "attached")

    def test_mixed_precision(self, tiny_policy_path):
        # accelerate rebuilds outputs from their items, like dictionaries.
        AcceleratorState._reset_state(reset_partial_state=True)  # that of trainers in other tests
        policy = policy_with(tiny_policy_path, Critic(random_head()))
        model = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(policy)
        outputs = model(**batch(), fused_lm_head=True, return_values=True)
        assert outputs.state_values.dtype == outputs.log_probs.dtype == torch.float32
        assert callable(outputs.values) and len(list(outputs.values())) == len(outputs)
        hidden = torch.randn(2, 3, 16)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            values = critic_of(policy)(hidden)
        assert values.dtype == torch.float32 and torch.equal(values, critic_of(policy)(hidden))
        AcceleratorState._reset_state(reset_partial_state=True)


class TestRecorder:
    def test_states_of_a_completion(self, tiny_policy_path):
        model = policy_with(tiny_policy_path, Critic(random_head()))
        recorder = ForwardRecorder(model, return_values=True)
        rows = batch()
        outputs = model(**rows, fused_lm_head=True, return_values=True)
        for _ in range(2):  # a second pass begins anew
            for i in range(2):  # TRL calls it in chunks
                recorder(**{name: tensor[i : i + 1] for name, tensor in rows.items()}, fused_lm_head=True)
            recorder.finish(outputs.log_probs[:, -3:], rows["attention_mask"])
            # The state before the first of the last 3 tokens is the one after the third last but one.
            torch.testing.assert_close(recorder.values, outputs.state_values[:, 2:])

    def test_passes_without_padding(self, tiny_policy_path):
        """All tokens in one row, as future versions of TRL may compute them."""
        recorder = ForwardRecorder(policy_with(tiny_policy_path, Critic(random_head())), return_values=True)
        mask = batch()["attention_mask"].bool()
        recorder(**{name: tensor[mask][None] for name, tensor in batch().items()}, fused_lm_head=True)
        with pytest.raises(RuntimeError, match=r"values of shape \(1, 10\) for 2 rows"):
            recorder.finish(torch.zeros(2, 3), batch()["attention_mask"])


def test_without_critic(tiny_policy_path):
    model = policy_with(tiny_policy_path, Critic(random_head()))
    names = list(model.state_dict())
    with pytest.raises(ZeroDivisionError), without_critic(model):
        assert not any(is_critic(name) for name in model.state_dict())
        raise ZeroDivisionError
    assert list(model.state_dict()) == names


def test_what_vllm_is_sent(tiny_policy_path):
    # TRL's own walk over the parameters, without vLLM.
    generation: Any = object.__new__(VLLMGeneration)
    generation.model = policy_with(tiny_policy_path, Critic(random_head()))
    generation._dist = DistributedBackend(Accelerator(cpu=True))
    sent = dict(generation._iter_named_params())
    assert any(is_critic(name) for name in sent)  # why there is a filter

    send_policy_only(generation)
    filtered = [name for name, _ in generation._iter_named_params()]
    assert filtered == [name for name in sent if not is_critic(name)]
    assert len(filtered) == len(list(AutoModelForCausalLM.from_pretrained(tiny_policy_path).named_parameters()))
    assert [name for name, _ in generation._iter_named_params()] == filtered  # TRL walks twice
