# SPDX-License-Identifier: Apache-2.0
"""The scoring engine against one sequence at a time with all logits."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Cohere2Config,
    CohereConfig,
    FalconConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    GraniteConfig,
    Lfm2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from endotrl.frozen.loaded_model import LoadedModel
from endotrl.rendering.renderer import Rendered
from endotrl.scoring import FrozenScorer, lm_head

from ..support.helpers import LargestTensor, assert_same_to_the_bit, count_forwards, weights
from ..support.reference import scores_from_logits, state_logits


VOCAB_SIZE, EOS = 97, 1
SHARED = {"vocab_size": VOCAB_SIZE, "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": EOS}
# Most families take these. Weights are larger than usual, so that a random model has opinions.
SIZES = {
    **SHARED,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
MAMBA_SIZES = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_chunk_size": 8}
GPT_SIZES = {**SHARED, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}

FAMILIES: list[tuple[str, Callable[[], PretrainedConfig]]] = [
    ("llama, untied head", lambda: LlamaConfig(**SIZES, tie_word_embeddings=False)),
    ("llama, tied head", lambda: LlamaConfig(**SIZES, tie_word_embeddings=True)),
    ("qwen2", lambda: Qwen2Config(**SIZES)),
    ("qwen3", lambda: Qwen3Config(**SIZES, head_dim=8)),
    ("gemma2, soft cap", lambda: Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0)),
    ("gemma3, sliding window", lambda: Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=4)),
    ("granite, logit scale", lambda: GraniteConfig(**SIZES, logits_scaling=4.0)),
    ("cohere, logit scale", lambda: CohereConfig(**SIZES, logit_scale=0.25)),
    ("cohere2, logit scale", lambda: Cohere2Config(**SIZES, head_dim=8, logit_scale=0.25)),
    ("phi, head with bias", lambda: PhiConfig(**SIZES)),
    ("gpt-j, head with bias", lambda: GPTJConfig(**GPT_SIZES, rotary_dim=4)),
    ("gpt2, learned positions", lambda: GPT2Config(**GPT_SIZES)),
    ("gpt-neox", lambda: GPTNeoXConfig(**SIZES)),
    ("opt, projected embeddings", lambda: OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=16, init_std=0.3)),
    ("bloom, ALiBi", lambda: BloomConfig(**SHARED, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3)),
    ("falcon", lambda: FalconConfig(**{k: v for k, v in SIZES.items() if k != "intermediate_size"})),
    ("mixtral, experts", lambda: MixtralConfig(**SIZES, num_local_experts=4)),
    ("mamba, recurrent", lambda: MambaConfig(**SHARED, hidden_size=32, num_hidden_layers=2, state_size=4)),
    ("qwen2, window not used", lambda: Qwen2Config(**SIZES, sliding_window=16, use_sliding_window=False)),
    ("mistral, window", lambda: MistralConfig(**SIZES, sliding_window=16)),
    ("lfm2, convolutions", lambda: Lfm2Config(**SIZES, full_attn_idxs=[1])),
    ("falcon-h1, attention and state space", lambda: FalconH1Config(**SIZES, **MAMBA_SIZES)),
]


def make_model(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    head = model.get_output_embeddings()
    if head.bias is not None:
        torch.nn.init.normal_(head.bias)
    return model


def make_rows():
    """Ragged rows: finished ones and cut-off ones, a prompt of one token, a completion of one, and one of none."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for num_prompt, num_completion, finished in [
        (5, 7, True),
        (1, 12, False),
        (9, 1, True),
        (3, 0, False),
        (2, 4, False),
    ]:
        ids = torch.randint(2, VOCAB_SIZE, (num_prompt + num_completion,), generator=generator).tolist()
        if finished:
            ids[-1] = EOS
        rows.append(Rendered(ids[:num_prompt], ids[num_prompt:], list(range(num_completion)), finished))
    # A tool wrote the tokens 2 to 5.
    rows.append(replace(rows[1], action_positions=[0, 1, 6, 7, 8, 9, 10, 11]))
    return rows


@pytest.fixture(scope="module")
def model():
    return make_model(LlamaConfig(**SIZES))


@pytest.fixture(scope="module")
def expected(model):
    """Every row scored alone."""
    return [FrozenScorer(LoadedModel(model))([row])[0] for row in make_rows()]


def expected_numbers(model, row, alpha):
    """Chosen logits, soft values and entropies at the positions that the policy wrote."""
    scores = scores_from_logits(state_logits(model, row.prompt_ids, row.completion_ids), row.completion_ids, alpha)
    last = 0.0 if row.finished else scores.values[-1]
    at = row.action_positions
    return (
        torch.tensor([scores.taken[p] for p in at]),
        torch.tensor([scores.values[p] for p in at] + [last]),
        torch.tensor([scores.entropies[p] for p in at]),
    )


def numbers(stats):
    assert stats.entropies is not None
    return stats.chosen_logits, stats.soft_values, stats.entropies


def assert_equal_stats(actual, expected, atol=2e-05):
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a.token_ids, b.token_ids) and torch.equal(a.positions, b.positions)
        assert (a.finished, a.num_completion_tokens) == (b.finished, b.num_completion_tokens)
        for ours, theirs in zip(numbers(a), numbers(b), strict=True):
            torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


class TestFamilies:
    @pytest.mark.parametrize("make_config", [make for _, make in FAMILIES], ids=[name for name, _ in FAMILIES])
    def test_equal_to_all_logits(self, make_config, monkeypatch):
        monkeypatch.setattr(lm_head, "TOKEN_BLOCK", 5)
        monkeypatch.setattr(lm_head, "VOCAB_BLOCK", 32)
        model, rows = make_model(make_config()), make_rows()
        for row, stats in zip(
            rows, FrozenScorer(LoadedModel(model), max_tokens_per_batch=40)(rows, alpha=0.7), strict=True
        ):
            for ours, expected in zip(numbers(stats), expected_numbers(model, row, alpha=0.7), strict=True):
                torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-5)

    def test_a_head_that_is_not_linear(self):
        class ClampedHead(torch.nn.Linear):
            def forward(self, hidden_states):
                return super().forward(hidden_states).clamp(-1, 1)

        model, rows = make_model(LlamaConfig(**SIZES)), make_rows()
        head = ClampedHead(32, VOCAB_SIZE, bias=False)
        head.weight = model.lm_head.weight
        model.lm_head = head
        for row, stats in zip(rows, FrozenScorer(LoadedModel(model))(rows), strict=True):
            expected = expected_numbers(model, row, alpha=1.0)
            assert len(expected[0]) == 0 or expected[0].abs().max() <= 1
            for ours, theirs in zip(numbers(stats), expected, strict=True):
                torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)

    def test_half_precision_is_no_worse_than_all_logits_in_it(self):
        # The truth: float32 with the weights as they were before rounding. The rival: the same model in bfloat16, one
        # sequence at a time, all logits. Most of both errors is the backbone's; the head must not add to it.
        full, rows = make_model(LlamaConfig(**SIZES)), make_rows()
        half = make_model(LlamaConfig(**SIZES)).bfloat16()
        stats = FrozenScorer(LoadedModel(half))(rows)
        errors: dict[str, list[Tensor]] = {"ours": [], "naive": []}
        for row, row_stats in zip(rows, stats, strict=True):
            assert row_stats.chosen_logits.dtype == torch.float32
            truth = torch.cat(expected_numbers(full, row, 1.0))
            errors["ours"].append((torch.cat(numbers(row_stats)) - truth).abs())
            errors["naive"].append((torch.cat(expected_numbers(half, row, 1.0)) - truth).abs())
        ours, naive = torch.cat(errors["ours"]), torch.cat(errors["naive"])
        assert naive.max() > 1e-3  # bfloat16 does cost something here
        assert ours.mean() <= 1.05 * naive.mean() + 1e-3
        assert ours.max() <= 1.05 * naive.max() + 5e-3

    @pytest.mark.parametrize(
        "change",
        [lambda z: 1.5 * z, lambda z: z - z.mean(-1, keepdim=True), lambda z: z.clamp(max=0.5), lambda z: z / z.std()],
        ids=["scale", "shift", "clamp", "norm"],
    )
    def test_an_unknown_family_is_refused(self, change):
        class NewForCausalLM(LlamaForCausalLM):
            def forward(self, *args, **kwargs):
                output = super().forward(*args, **kwargs)
                output.logits = change(output.logits)
                return output

        torch.manual_seed(0)
        scorer = FrozenScorer(LoadedModel(NewForCausalLM(LlamaConfig(**SIZES)).eval()))
        for _ in range(2):  # and it stays refused
            with pytest.raises(
                ValueError, match="logits of NewForCausalLM are not.*rewards would be wrong.*open an issue"
            ):
                scorer(make_rows())

    def test_the_check_runs_once(self, model):
        scorer, rows = FrozenScorer(LoadedModel(model)), make_rows()
        runs = []
        for _ in range(2):
            with count_forwards(model) as ran:
                scorer(rows)
            runs.append((ran.count("LlamaForCausalLM"), ran.count("LlamaModel")))
        # The checks run the model and its backbone; scoring runs the backbone alone, and the six rows fit one batch.
        assert runs[0][0] == 1
        assert runs[1] == (0, 1)


class TestInvariance:
    """One row's numbers depend on that row only; token budgets and orders: `test_isolation.py`."""

    def test_entropy_or_not(self, model, expected):
        for row, other in zip(FrozenScorer(LoadedModel(model))(make_rows(), entropy=False), expected, strict=True):
            assert row.entropies is None
            torch.testing.assert_close(row.soft_values, other.soft_values, atol=2e-5, rtol=0)

    def test_training_mode_of_the_instance(self, expected):
        model = make_model(LlamaConfig(**SIZES, attention_dropout=0.5)).train()
        assert_equal_stats(FrozenScorer(LoadedModel(model))(make_rows()), expected)
        assert model.training


class TestStats:
    def test_shapes_and_meaning(self, model):
        rows = make_rows()
        stats = FrozenScorer(LoadedModel(model))(rows, alpha=0.7)
        for row, s in zip(rows, stats, strict=True):
            num_actions = len(row.action_positions)
            assert s.token_ids.tolist() == [row.completion_ids[p] for p in row.action_positions]
            assert s.positions.tolist() == row.action_positions
            assert s.chosen_logits.shape == s.log_probs.shape == (num_actions,)
            assert s.soft_values.shape == (num_actions + 1,)
            assert s.num_completion_tokens == len(row.completion_ids)
            assert (s.finished, s.alpha) == (row.finished, 0.7)
            assert (s.soft_values[-1] == 0) == row.finished
            assert (s.text, s.offsets) == (None, None)

    def test_rows_do_not_share_memory(self, model):
        # A view of one row would keep the tensors of the whole batch alive, and writing to it would change others.
        first, second = FrozenScorer(LoadedModel(model))([make_rows()[0]] * 2)
        before = second.soft_values.clone()
        first.soft_values.zero_()
        assert torch.equal(second.soft_values, before)
        assert first.chosen_logits.untyped_storage().nbytes() == 4 * len(first.chosen_logits)

    def test_nothing_is_left_behind(self):
        model = make_model(LlamaConfig(**SIZES))
        before = weights(model)
        stats = FrozenScorer(LoadedModel(model))(make_rows())
        assert_same_to_the_bit(before, weights(model))
        assert all(p.requires_grad and p.grad is None for p in model.parameters())  # the user's own setting stays
        assert not any(tensor.requires_grad for row in stats for tensor in numbers(row))

    def test_progress_bar(self, model, capsys):
        scorer = FrozenScorer(LoadedModel(model))
        scorer(make_rows())
        assert capsys.readouterr().err == ""
        scorer(make_rows(), progress=True)
        assert "6/6" in capsys.readouterr().err


class TestMemory:
    def test_no_tensor_of_tokens_by_vocabulary(self, monkeypatch):
        monkeypatch.setattr(lm_head, "TOKEN_BLOCK", 64)
        monkeypatch.setattr(lm_head, "VOCAB_BLOCK", 1024)
        vocab_size, num_rows, num_prompt, num_completion = 8192, 16, 8, 40
        model = make_model(LlamaConfig(**{**SIZES, "vocab_size": vocab_size, "hidden_size": 8}))
        rows = [  # all different: equal ones are scored once
            Rendered([5] * num_prompt, [7 + k] * num_completion, list(range(num_completion)), False)
            for k in range(num_rows)
        ]
        with LargestTensor() as largest:
            FrozenScorer(LoadedModel(model))(rows)
        # Nothing above one block of logits, or the head check's 8 tokens by vocabulary: a 80th of all logits.
        assert largest.numel == 64 * 1024
        assert largest.numel < num_rows * num_completion * vocab_size / 75


class TestBadInput:
    @pytest.mark.parametrize(
        ("prompt_ids", "completion_ids", "message"),
        [
            ([VOCAB_SIZE], [3], r"Row 1 .*vocabulary of 97 tokens \(ids from 97 to 97\).*another tokenizer"),
            ([3], [4, 500, 2], r"Row 1 .*\(ids from 2 to 500\)"),
            ([3], [-1, 2], r"Row 1 .*\(ids from -1 to 2\)"),
        ],
    )
    def test_ids_out_of_vocabulary(self, model, prompt_ids, completion_ids, message):
        rows = [make_rows()[0], Rendered(prompt_ids, completion_ids, list(range(len(completion_ids))), False)]
        with count_forwards(model) as ran, pytest.raises(ValueError, match=message):
            FrozenScorer(LoadedModel(model))(rows)
        assert ran == []

    def test_budget(self, model):
        with pytest.raises(ValueError, match="`max_tokens_per_batch` is 0"):
            FrozenScorer(LoadedModel(model), max_tokens_per_batch=0)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_damaged_weights_of_some_words(self, value):
        model = make_model(LlamaConfig(**SIZES, tie_word_embeddings=False))
        with torch.no_grad():
            model.get_input_embeddings().weight[50] = value
        rows = [
            Rendered([3, 4], [5, EOS], [0, 1], True),
            Rendered([3, 50], [5, EOS], [0, 1], True),
            Rendered([3, 4], [5, 6], [0, 1], False),
            Rendered([3, 4], [50, 6], [0, 1], False),
        ]
        message = r"the LlamaForCausalLM given\) gives NaN or infinite logits for rows 1, 3 of 4.*damaged.*float32"
        with pytest.raises(ValueError, match=message):
            FrozenScorer(LoadedModel(model))(rows)

    def test_damaged_head(self):
        model = make_model(LlamaConfig(**SIZES, tie_word_embeddings=False))
        with torch.no_grad():
            model.lm_head.weight[-1, 0] = float("nan")
        rows = [Rendered([3, 4], [5, EOS], [0, 1], True)] * 12
        with pytest.raises(ValueError, match=r"for rows 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, \.\.\. of 12"):
            FrozenScorer(LoadedModel(model))(rows)
