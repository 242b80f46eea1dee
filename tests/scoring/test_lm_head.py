# SPDX-License-Identifier: Apache-2.0
"""The LM head in blocks against all logits at once."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

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


def fused(hidden_states, head, token_ids, alpha, transform):
    """The path of GPUs: TRL's kernel, which TRL also has in plain torch."""
    if not lm_head.TRL_HAS_KERNEL:
        pytest.skip("TRL has the kernel from 1.15 on.")
    return fused_statistics(hidden_states, head, token_ids, alpha, transform, True, True)


TRANSFORMS = [
    (LogitTransform(), lambda z: z),
    (LogitTransform(scale=0.25), lambda z: 0.25 * z),
    (LogitTransform(softcap=2.0), lambda z: 2 * torch.tanh(z / 2)),
    (LogitTransform(scale=3.0, softcap=1.5), lambda z: 1.5 * torch.tanh(2 * z)),
]


@pytest.mark.parametrize("compute", [all_statistics, fused], ids=["blocks", "fused"])
@pytest.mark.parametrize(("transform", "formula"), TRANSFORMS, ids=lambda value: getattr(value, "scale", ""))
@pytest.mark.parametrize("bias", [False, True])
@settings(max_examples=30, deadline=None)
@given(
    num_tokens=st.integers(1, 20),
    vocab_size=st.integers(1, 50),
    token_block=st.integers(1, 25),
    vocab_block=st.integers(1, 60),
    alpha=st.sampled_from([0.2, 0.7, 1.0, 3.0]),
    seed=st.integers(0, 10_000),
)
def test_equal_to_all_logits(
    compute, transform, formula, bias, num_tokens, vocab_size, token_block, vocab_block, alpha, seed
):
    hidden_states, head, token_ids = random_problem(num_tokens, 6, vocab_size, bias=bias, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_head, "TOKEN_BLOCK", token_block)
        patch.setattr(lm_head, "VOCAB_BLOCK", vocab_block)
        actual = compute(hidden_states, head, token_ids, alpha, transform)
    expected = naive_statistics(formula(exact_logits(hidden_states, head)), token_ids, alpha)
    assert_equal_statistics(actual, expected)


class CosineHead(nn.Linear):
    """Inherits from a linear head, and is none."""

    def forward(self, hidden_states):
        return super().forward(nn.functional.normalize(hidden_states, dim=-1))


def special_heads():
    """Names, states, heads, and their logits."""
    states, linear, _ = random_problem(11, 8, 37, bias=True)
    # Applied as they are: their weight alone does not say what they do.
    yield "not linear", states, nn.Sequential(linear, nn.Tanh()), exact_logits(states, linear).tanh()
    cosine = CosineHead(8, 37, bias=False).requires_grad_(False)
    cosine.weight.copy_(linear.weight)
    yield "inherits", states, cosine, exact_logits(states / states.norm(dim=-1, keepdim=True), cosine)
    # The running maximum is found in the first block, in the last one, or moves with every word.
    rising, ramp = nn.Linear(2, 29, bias=False).requires_grad_(False), torch.linspace(-200, 200, 29)
    rising.weight.copy_(torch.stack([ramp, ramp.flip(0)], dim=1))
    yield "falling and rising", torch.eye(2), rising, exact_logits(torch.eye(2), rising)
    # A bias of minus infinity forbids words: here the first and last blocks, and all but one word in the middle.
    states, forbidding, _ = random_problem(5, 4, 37, bias=True)
    forbidding.bias[[k for k in range(37) if k not in (12, 17, 18, 20)]] = -torch.inf
    yield "forbidden words", states, forbidding, exact_logits(states, forbidding)


@pytest.mark.parametrize(
    ("states", "head", "logits"), [pytest.param(*rest, id=name) for name, *rest in special_heads()]
)
def test_special_heads(blocks, states, head, logits):
    token_ids = torch.tensor([12, 17, 18, 20] * 3)[: len(states)]
    assert_equal_statistics(all_statistics(states, head, token_ids, 0.7), naive_statistics(logits, token_ids, 0.7))


@pytest.mark.parametrize("size", [1e4, -1e4, 1e30])
def test_large_logits_do_not_overflow(blocks, size):
    # Every logit is `size`, so V = size + ln 9 (in float32, ln 9 is lost next to 1e30) and the entropy is ln 9.
    head = nn.Linear(1, 9, bias=False).requires_grad_(False)
    head.weight.fill_(size)
    chosen, values, entropies, _ = token_statistics(torch.ones(2, 1), head, torch.tensor([0, 8]))
    ln9 = 2.1972246
    assert chosen.tolist() == pytest.approx([size] * 2, rel=1e-6)
    assert values.tolist() == pytest.approx([size + ln9] * 2, rel=1e-6)
    assert entropies is not None and entropies.tolist() == pytest.approx([ln9] * 2, rel=1e-6)


def test_a_head_that_keeps_its_output_is_not_disturbed():
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
    def test_fused_log_probs_are_never_positive(self):
        hidden_states, head, token_ids = random_problem(200, 64, 1000)
        head.weight[token_ids] += hidden_states
        hidden_states, head = hidden_states.bfloat16(), head.bfloat16()
        fused = fused_statistics(hidden_states, head, token_ids, 1.0, LogitTransform(), False, False)
        assert (fused.chosen_logits - fused.soft_values).max() <= 1e-5
        assert fused.entropies is None and fused.mean_logits is None
