# SPDX-License-Identifier: Apache-2.0
"""The paths of a GPU on a device that only refuses mixed tensors: every kernel gives the numbers of the CPU."""

import pytest
import torch
from transformers import Gemma2Config, Qwen2Config

from endotrl.frozen.loaded_model import LoadedModel
from endotrl.frozen.own_copy import OwnCopy
from endotrl.rendering.renderer import Rendered
from endotrl.scoring import attention_kernels as kernels
from endotrl.scoring import forward_pass, lm_head
from endotrl.scoring.scorer import FrozenScorer

from ..support.fake_cuda import CUDA, entered, fake_cuda
from .families import make_model


SIZE = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZE |= {"vocab_size": 512}
QWEN = Qwen2Config(**SIZE, num_key_value_heads=2)
GEMMA = Gemma2Config(**SIZE, num_key_value_heads=2, head_dim=16)
NARROW = Qwen2Config(**{**SIZE, "num_attention_heads": 8}, num_key_value_heads=2)


def completions():
    ids = (torch.arange(400) * 7919 % 512).tolist()
    groups = [(ids[:30], [ids[30:40], ids[40:47], ids[47:48]]), (ids[50:60], [ids[60:160]]), (ids[7:9], [ids[3:60]])]
    return [
        Rendered(prompt, tokens, list(range(len(tokens))), finished=len(tokens) != 7)
        for prompt, continuations in groups
        for tokens in continuations
    ]


def log_probs(model):
    return torch.cat([stats.log_probs for stats in FrozenScorer(LoadedModel(model))(completions(), mean_logits=True)])


@pytest.fixture(autouse=True)
def fresh_choices(monkeypatch):
    monkeypatch.setattr(kernels, "choices", {})
    monkeypatch.setattr(kernels, "CALLS_BEFORE_COMPILING", 0)


@pytest.mark.parametrize(
    ("config", "dtype", "kernel", "tried"),
    [
        (QWEN, torch.float32, None, {"blocks", "flex"}),
        (QWEN, torch.bfloat16, None, {"blocks", "varlen", "flex"}),
        *((QWEN, torch.bfloat16, name, set()) for name in kernels.KERNELS),
        (GEMMA, torch.float32, None, set()),  # padded rows
        (NARROW, torch.float32, None, set()),  # heads below 16, for which FlexAttention has no kernel on GPUs
    ],
)
def test_numbers_are_those_of_the_cpu(config, dtype, kernel, tried, monkeypatch):
    expected = log_probs(make_model(config).to(dtype))
    if kernel is not None:
        monkeypatch.setattr(forward_pass, "attend", kernels.KERNELS[kernel])
    with fake_cuda():
        found = log_probs(make_model(config).to(dtype).to("cuda"))
    torch.testing.assert_close(found, expected, atol=1e-5 if dtype == torch.float32 else 0.02, rtol=0)
    choices = kernels.choices.values()
    assert {name for choice in choices for name in choice.seconds} == tried
    assert all(seconds < 60 for choice in choices for seconds in choice.seconds.values())


@pytest.mark.parametrize("offload", [False, True])
def test_an_own_copy(offload, tmp_path):
    model = make_model(QWEN)
    model.save_pretrained(tmp_path)
    expected = log_probs(model)
    copy = OwnCopy(str(tmp_path), "float32", "cuda", offload=offload)
    with fake_cuda():
        found = torch.cat([stats.log_probs for stats in FrozenScorer(copy)(completions())])
        place = "cpu" if offload else "cuda"
        assert copy._model is not None and copy._model.device.type == place
        with pytest.raises(ZeroDivisionError), copy.active() as active:
            assert active.device.type == "cuda"
            raise ZeroDivisionError
        assert copy._model.device.type == place  # after an error, too
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_flex_attention_takes_states_of_one_dtype():
    """Under autocast, rotated queries and keys of a model in float32 stay so, and values do not."""
    with fake_cuda():
        states = torch.zeros(1, 1, 1, 16, device="cuda")
        assert kernels.has_flex_attention(states, states)
        assert not kernels.has_flex_attention(states, states.bfloat16())


def test_tf32_is_rounding_and_no_unknown_family():
    """Frozen models in float32 are scored where a user or a container lets GPUs multiply in TF32."""
    model = make_model(QWEN)
    model.lm_head.weight.data *= 100
    expected = log_probs(model)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with fake_cuda():
            found = log_probs(model.to("cuda"))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0)
    assert (found - expected).abs().max() > 1e-4  # it was rounded


@pytest.mark.skipif(not lm_head.TRL_HAS_KERNEL, reason="TRL has the kernel from 1.15 on")
def test_triton_runs_on_the_device_of_the_head(monkeypatch):
    """On another one than the current one, its kernels cannot read the tensors."""
    fused, places = lm_head.fused_statistics, []

    def recorded(*args):
        places.append(list(entered))
        return fused(*args)

    monkeypatch.setattr(lm_head, "fused_statistics", recorded)
    with fake_cuda():
        log_probs(make_model(QWEN).to("cuda"))
    assert places and all(place == [CUDA] for place in places)


def test_words_that_a_bias_forbids():
    head = torch.nn.Linear(8, 3000)
    with torch.no_grad():
        head.bias[:2048] = -torch.inf
        states, tokens = torch.randn(5, 8), torch.tensor([2048, 2999, 2500, 7, 2100])
        logits = head(states)
        with fake_cuda():
            found = lm_head.token_statistics(states.to("cuda"), head.to("cuda"), tokens.to("cuda"))
    torch.testing.assert_close(found.soft_values.cpu(), logits.logsumexp(-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.chosen_logits.cpu(), logits[range(5), tokens], atol=1e-5, rtol=0)
