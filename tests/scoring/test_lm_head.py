# SPDX-License-Identifier: Apache-2.0
"""The LM head in blocks against all logits at once."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import CohereConfig, FalconH1Config, Gemma2Config, GraniteConfig, LlamaConfig, RecurrentGemmaConfig

from endotrl.scoring import lm_head
from endotrl.scoring.lm_head import LogitTransform, fused_statistics, token_statistics


all_statistics = partial(token_statistics, mean_logits=True)


def naive_statistics(logits, token_ids, alpha):
    """From all logits, of shape (N, V), as one would write it on a blackboard; float64 in, float64 out."""
    chosen = logits[torch.arange(len(token_ids)), token_ids]
    values = alpha * torch.logsumexp(logits / alpha, dim=-1)
    entropies = torch.distributions.Categorical(logits=logits / alpha).entropy()
    return chosen, values, entropies, logits.mean(dim=-1)


def random_problem(num_tokens, hidden_size, vocab_size, bias=False, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(hidden_size, vocab_size, bias=bias)
    with torch.no_grad():
        head.weight.copy_(scale * torch.randn(vocab_size, hidden_size, generator=generator))
        if bias:
            head.bias.copy_(3 * torch.randn(vocab_size, generator=generator))
    hidden_states = torch.randn(num_tokens, hidden_size, generator=generator)
    return hidden_states, head.requires_grad_(False), torch.randint(vocab_size, (num_tokens,), generator=generator)


def exact_logits(hidden_states, head):
    logits = hidden_states.double() @ head.weight.double().T
    return logits if head.bias is None else logits + head.bias.double()


def assert_equal_statistics(actual, expected):
    for ours, reference in zip(actual, expected, strict=True):
        assert ours is not None and ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), reference, atol=1e-4, rtol=1e-5)


@pytest.fixture(
    params=[(1, 1), (3, 5), (4, 64), (1000, 7), (256, 8192)], ids=lambda blocks: f"{blocks[0]}x{blocks[1]}"
)
def blocks(request, monkeypatch):
    """Block sizes, most of them tiny and none a divisor of the sizes in the tests, so that many blocks are merged."""
    monkeypatch.setattr(lm_head, "TOKEN_BLOCK", request.param[0])
    monkeypatch.setattr(lm_head, "VOCAB_BLOCK", request.param[1])
    return request.param


class TestTokenStatistics:
    @pytest.mark.parametrize("alpha", [1.0, 0.7, 3.0])
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("shape", [(1, 4, 1), (11, 8, 37)])
    def test_equal_to_all_logits(self, blocks, shape, bias, alpha):
        hidden_states, head, token_ids = random_problem(*shape, bias=bias)
        expected = naive_statistics(exact_logits(hidden_states, head), token_ids, alpha)
        assert_equal_statistics(all_statistics(hidden_states, head, token_ids, alpha), expected)

    @pytest.mark.parametrize(
        ("transform", "formula"),
        [
            (LogitTransform(scale=0.25), lambda z: 0.25 * z),
            (LogitTransform(softcap=2.0), lambda z: 2 * torch.tanh(z / 2)),
            (LogitTransform(scale=3.0, softcap=1.5), lambda z: 1.5 * torch.tanh(2 * z)),
        ],
    )
    def test_transforms(self, blocks, transform, formula):
        hidden_states, head, token_ids = random_problem(11, 8, 37, bias=True)
        expected = naive_statistics(formula(exact_logits(hidden_states, head)), token_ids, 0.7)
        assert_equal_statistics(all_statistics(hidden_states, head, token_ids, 0.7, transform), expected)

    def test_a_head_that_is_not_linear(self, blocks):
        # Applied as it is: its weight alone does not say what it does.
        hidden_states, linear, token_ids = random_problem(11, 8, 37, bias=True)
        head = nn.Sequential(linear, nn.Tanh())
        expected = naive_statistics(exact_logits(hidden_states, linear).tanh(), token_ids, 0.7)
        assert_equal_statistics(all_statistics(hidden_states, head, token_ids, 0.7), expected)

    def test_a_head_that_only_inherits_from_linear(self, blocks):
        class CosineHead(nn.Linear):
            def forward(self, hidden_states):
                return super().forward(nn.functional.normalize(hidden_states, dim=-1))

        hidden_states, linear, token_ids = random_problem(11, 8, 37)
        head = CosineHead(8, 37, bias=False)
        head.weight = linear.weight
        normalized = hidden_states / hidden_states.norm(dim=-1, keepdim=True)
        expected = naive_statistics(exact_logits(normalized, linear), token_ids, 1.0)
        assert_equal_statistics(all_statistics(hidden_states, head, token_ids), expected)

    def test_a_head_that_keeps_its_output_is_not_disturbed(self):
        # The engine works in place. A head that returns a tensor it holds must not see that.
        class TableHead(nn.Module):
            def __init__(self):
                super().__init__()
                self.table = nn.Parameter(torch.tensor([[1.0, 2.0, 3.0]]), requires_grad=False)

            def forward(self, hidden_states):
                return self.table

        head = TableHead()
        token_statistics(torch.zeros(1, 4), head, torch.tensor([1]), 0.5, LogitTransform(scale=2.0, softcap=4.0))
        assert head.table.tolist() == [[1.0, 2.0, 3.0]]

    @pytest.mark.parametrize("size", [1e4, -1e4, 1e30])
    def test_large_logits_do_not_overflow(self, blocks, size):
        # Every logit is `size`, so V = size + ln 9 (in float32, ln 9 is lost next to 1e30) and the entropy is ln 9.
        head = nn.Linear(1, 9, bias=False).requires_grad_(False)
        head.weight.fill_(size)
        chosen, values, entropies, _ = token_statistics(torch.ones(2, 1), head, torch.tensor([0, 8]))
        ln9 = 2.1972246
        assert chosen.tolist() == pytest.approx([size] * 2, rel=1e-6)
        assert values.tolist() == pytest.approx([size + ln9] * 2, rel=1e-6)
        assert entropies is not None and entropies.tolist() == pytest.approx([ln9] * 2, rel=1e-6)

    def test_falling_and_rising_logits(self, blocks):
        # The running maximum is found in the first block, in the last one, or moves with every word.
        ramp = torch.linspace(-200, 200, 29)
        head = nn.Linear(2, 29, bias=False).requires_grad_(False)
        head.weight.copy_(torch.stack([ramp, ramp.flip(0)], dim=1))
        hidden_states, token_ids = torch.eye(2), torch.tensor([0, 3])
        expected = naive_statistics(exact_logits(hidden_states, head), token_ids, 0.7)
        assert_equal_statistics(all_statistics(hidden_states, head, token_ids, 0.7), expected)

    def test_forbidden_words(self, blocks):
        # A bias of minus infinity forbids words: here the first and last blocks, and all but one word in the middle.
        hidden_states, head, _ = random_problem(5, 4, 37, bias=True)
        allowed = torch.zeros(37, dtype=torch.bool)
        allowed[[12, 17, 18, 20]] = True
        head.bias[~allowed] = -torch.inf
        token_ids = torch.tensor([17, 12, 20, 18, 17])
        small = nn.Linear(4, 4).requires_grad_(False)
        small.weight.copy_(head.weight[allowed])
        small.bias.copy_(head.bias[allowed])
        places = torch.tensor([1, 0, 3, 2, 1])  # of `token_ids` among the words that are allowed
        expected = naive_statistics(exact_logits(hidden_states, small), places, 0.7)
        actual = all_statistics(hidden_states, head, token_ids, 0.7)
        assert_equal_statistics(actual[:3], expected[:3])
        assert actual.mean_logits is not None and (actual.mean_logits == -torch.inf).all()

    def test_entropy_only_when_asked(self):
        hidden_states, head, token_ids = random_problem(3, 4, 9)
        chosen, values, entropies, means = token_statistics(hidden_states, head, token_ids, entropy=False)
        assert entropies is None and means is None
        with_entropy = token_statistics(hidden_states, head, token_ids)
        torch.testing.assert_close(chosen, with_entropy[0], atol=0, rtol=0)
        torch.testing.assert_close(values, with_entropy[1], atol=0, rtol=0)

    def test_no_tokens(self):
        _, head, _ = random_problem(1, 4, 9)
        chosen, values, entropies, _ = token_statistics(torch.zeros(0, 4), head, torch.zeros(0, dtype=torch.long))
        assert chosen.shape == values.shape == (0,)
        assert entropies is not None and entropies.shape == (0,)

    @settings(max_examples=40, deadline=None)
    @given(
        num_tokens=st.integers(1, 20),
        vocab_size=st.integers(1, 50),
        token_block=st.integers(1, 25),
        vocab_block=st.integers(1, 60),
        alpha=st.floats(0.2, 4.0),
        seed=st.integers(0, 10_000),
    )
    def test_any_blocks(self, num_tokens, vocab_size, token_block, vocab_block, alpha, seed):
        hidden_states, head, token_ids = random_problem(num_tokens, 6, vocab_size, bias=True, seed=seed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lm_head, "TOKEN_BLOCK", token_block)
            patch.setattr(lm_head, "VOCAB_BLOCK", vocab_block)
            actual = all_statistics(hidden_states, head, token_ids, alpha)
        assert_equal_statistics(actual, naive_statistics(exact_logits(hidden_states, head), token_ids, alpha))


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("softcap", [None, 30.0])
    def test_half_precision_is_no_worse_than_all_logits_in_it(self, dtype, softcap, monkeypatch):
        monkeypatch.setattr(lm_head, "TOKEN_BLOCK", 64)
        monkeypatch.setattr(lm_head, "VOCAB_BLOCK", 128)
        # The truth is computed in float64 from the same rounded hidden states and weights. The rival is what
        # transformers and a user write: logits in half precision, capped in it, and then turned into float32.
        hidden_states, head, token_ids = random_problem(200, 64, 1000)
        hidden_states, head = hidden_states.to(dtype), head.to(dtype)
        exact = exact_logits(hidden_states, head)
        rival = head(hidden_states)
        if softcap is not None:
            exact = softcap * torch.tanh(exact / softcap)
            rival = softcap * torch.tanh(rival / softcap)
        truth = naive_statistics(exact, token_ids, 1.0)
        naive = naive_statistics(rival.float(), token_ids, 1.0)
        ours = all_statistics(hidden_states, head, token_ids, transform=LogitTransform(softcap=softcap))
        for name, true, theirs, mine in zip(("chosen", "value", "entropy", "mean"), truth, naive, ours, strict=True):
            assert mine is not None
            our_error, naive_error = (mine - true).abs(), (theirs - true).abs()
            assert our_error.mean() <= 1.05 * naive_error.mean() + 1e-4, name
            assert our_error.max() <= 1.05 * naive_error.max() + 1e-3, name

    def test_float32_to_a_few_units_in_the_last_place(self):
        hidden_states, head, token_ids = random_problem(300, 64, 20_000, scale=0.2)
        truth = naive_statistics(exact_logits(hidden_states, head), token_ids, 1.0)
        for ours, true in zip(all_statistics(hidden_states, head, token_ids), truth, strict=True):
            assert ours is not None and (ours - true).abs().max() < 3e-5

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_log_probs_of_a_sure_model(self, dtype):
        # A logit of 100 is rounded by up to 0.25 in bfloat16. Where it stands out, the soft value equals it, and their
        # difference must be neither positive nor of that size.
        hidden_states, head, token_ids = random_problem(200, 64, 1000)
        head.weight[token_ids] += hidden_states  # each token's logit grows by about 64
        hidden_states, head = hidden_states.to(dtype), head.to(dtype)
        chosen, values, *_ = token_statistics(hidden_states, head, token_ids)
        truth = naive_statistics(exact_logits(hidden_states, head), token_ids, 1.0)
        log_probs, true_log_probs = (chosen - values).double(), truth[0] - truth[1]
        assert (log_probs <= 0).all()
        sure = true_log_probs > -1e-3
        assert sure.sum() > 50
        assert (log_probs - true_log_probs)[sure].abs().max() < 1e-3

    def test_autocast_does_not_round_the_chosen_logit(self):
        hidden_states, head, token_ids = random_problem(50, 64, 300)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            chosen, *_ = token_statistics(hidden_states, head, token_ids)
        torch.testing.assert_close(
            chosen.double(), exact_logits(hidden_states, head)[range(50), token_ids], atol=1e-5, rtol=1e-5
        )


@pytest.mark.skipif(not lm_head.TRL_HAS_KERNEL, reason="TRL has the kernel from 1.15 on")
class TestFused:
    """The path of GPUs: TRL's kernel, which TRL also has in plain torch."""

    @pytest.mark.parametrize("alpha", [1.0, 0.7])
    @pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(scale=0.5, softcap=3.0)])
    @pytest.mark.parametrize("bias", [False, True])
    def test_equal_to_blocks(self, alpha, transform, bias):
        hidden_states, head, token_ids = random_problem(30, 8, 200, bias=bias)
        fused = fused_statistics(hidden_states, head, token_ids, alpha, transform, True, True)
        for theirs, ours in zip(fused, all_statistics(hidden_states, head, token_ids, alpha, transform), strict=True):
            torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-5)
        bare = fused_statistics(hidden_states, head, token_ids, alpha, transform, False, False)
        assert bare.entropies is None and bare.mean_logits is None

    def test_log_probs_are_never_positive_in_half_precision(self):
        hidden_states, head, token_ids = random_problem(200, 64, 1000)
        head.weight[token_ids] += hidden_states
        hidden_states, head = hidden_states.bfloat16(), head.bfloat16()
        fused = fused_statistics(hidden_states, head, token_ids, 1.0, LogitTransform(), False, False)
        assert (fused.chosen_logits - fused.soft_values).max() <= 1e-5


class TestLogitTransformFromConfig:
    @pytest.mark.parametrize(
        ("config", "expected"),
        [
            (LlamaConfig(), LogitTransform()),
            (CohereConfig(logit_scale=0.25), LogitTransform(scale=0.25)),
            (GraniteConfig(logits_scaling=8.0), LogitTransform(scale=0.125)),
            (FalconH1Config(lm_head_multiplier=0.5), LogitTransform(scale=0.5)),
            (Gemma2Config(final_logit_softcapping=30.0), LogitTransform(softcap=30.0)),
            (Gemma2Config(final_logit_softcapping=None), LogitTransform()),
            (RecurrentGemmaConfig(logits_soft_cap=20.0), LogitTransform(softcap=20.0)),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_families(self, config, expected):
        assert LogitTransform.from_config(config) == expected
