# SPDX-License-Identifier: Apache-2.0
"""The scoring engine against one sequence at a time with all logits."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from endotrl.frozen.loaded_model import LoadedModel
from endotrl.rendering.renderer import Rendered
from endotrl.scoring import FrozenScorer, lm_head

from ..support.helpers import LargestTensor, assert_same_to_the_bit, count_forwards, weights
from .families import (
    EOS,
    FAMILIES,
    SIZES,
    assert_numbers,
    each_alone,
    group_rows,
    make_model,
    make_rows,
    numbers,
)


@pytest.fixture(scope="module")
def model():
    return make_model(LlamaConfig(**SIZES))


class TestAgainstAllLogits:
    @pytest.mark.parametrize("name", FAMILIES)
    def test_every_family(self, name, monkeypatch):
        """Together, alone, and in batches of another order: a row's numbers are those of the row alone."""
        monkeypatch.setattr(lm_head, "TOKEN_BLOCK", 5)
        monkeypatch.setattr(lm_head, "VOCAB_BLOCK", 32)
        model, rows = make_model(FAMILIES[name]()), make_rows()
        expected = each_alone(model, rows, alpha=0.7)
        scorer = FrozenScorer(LoadedModel(model))
        for budget, step in ((10_000, 1), (1, 1), (45, -1)):
            scorer.max_tokens_per_batch = budget
            scored = scorer(rows[::step], alpha=0.7)
            assert_numbers(scored, expected[::step])
        for row, stats in zip(rows[::-1], scored, strict=True):
            assert stats.token_ids.tolist() == [row.completion_ids[p] for p in row.action_positions]
            assert stats.positions.tolist() == row.action_positions
            assert stats.num_completion_tokens == len(row.completion_ids)
            assert (stats.finished, stats.alpha, stats.text, stats.offsets) == (row.finished, 0.7, None, None)

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
            with pytest.raises(ValueError, match="logits of NewForCausalLM differ.*open an issue"):
                scorer(make_rows())

    def test_the_check_runs_once(self, model):
        scorer, rows = FrozenScorer(LoadedModel(model)), group_rows()
        runs = []
        for _ in range(2):
            with count_forwards(model) as ran:
                scorer(rows)
            runs.append((ran.count("LlamaForCausalLM"), ran.count("LlamaModel")))
        # The checks run the model and its backbone; scoring runs the backbone alone, and the rows fit one batch.
        assert runs[0][0] == 1
        assert runs[1] == (0, 1)


def test_without_entropy(model):
    scorer = FrozenScorer(LoadedModel(model))
    for row, other in zip(scorer(make_rows(), entropy=False), scorer(make_rows()), strict=True):
        assert row.entropies is None
        torch.testing.assert_close(row.soft_values, other.soft_values, atol=2e-5, rtol=0)


def test_rows_do_not_share_memory(model):
    # A view of one row would keep the tensors of the whole batch alive, and writing to it would change others.
    first, second = FrozenScorer(LoadedModel(model))([make_rows()[0]] * 2)
    before = second.soft_values.clone()
    first.soft_values.zero_()
    assert torch.equal(second.soft_values, before)
    assert first.chosen_logits.untyped_storage().nbytes() == 4 * len(first.chosen_logits)


def test_nothing_is_left_behind():
    model = make_model(LlamaConfig(**SIZES))
    before = weights(model)
    stats = FrozenScorer(LoadedModel(model))(make_rows())
    assert_same_to_the_bit(before, weights(model))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())  # the user's own setting stays
    assert not any(tensor.requires_grad for row in stats for tensor in numbers(row))


def test_progress_bar(model, capsys):
    scorer = FrozenScorer(LoadedModel(model))
    scorer(group_rows())
    assert capsys.readouterr().err == ""
    scorer(group_rows(), progress=True)
    assert "6/6" in capsys.readouterr().err


def test_no_tensor_of_tokens_by_vocabulary(monkeypatch):
    monkeypatch.setattr(lm_head, "TOKEN_BLOCK", 64)
    monkeypatch.setattr(lm_head, "VOCAB_BLOCK", 1024)
    vocab_size, num_rows, num_prompt, num_completion = 8192, 16, 8, 40
    model = make_model(LlamaConfig(**{**SIZES, "vocab_size": vocab_size, "hidden_size": 8}))
    places = list(range(num_completion))  # and all different: equal ones are scored once
    rows = [Rendered([5] * num_prompt, [7 + k] * num_completion, places, False) for k in range(num_rows)]
    with LargestTensor() as largest:
        FrozenScorer(LoadedModel(model))(rows)
    # Nothing above one block of logits, or the head check's 8 tokens by vocabulary: a 80th of all logits.
    assert largest.numel == 64 * 1024
    assert largest.numel < num_rows * num_completion * vocab_size / 75


class TestRefused:
    @pytest.mark.parametrize(
        ("prompt_ids", "completion_ids", "settings", "message"),
        [
            ([97], [3], {}, r"Row 1 .*vocabulary of 97 tokens \(ids from 97 to 97\).*another tokenizer"),
            ([3], [4, 500, 2], {}, r"Row 1 .*\(ids from 2 to 500\)"),
            ([3], [-1, 2], {}, r"Row 1 .*\(ids from -1 to 2\)"),
            ([3], [5], {"alpha": -1.0}, "`alpha` is -1.0, but the temperature"),
        ],
    )
    def test_before_the_model_runs(self, model, prompt_ids, completion_ids, settings, message):
        rows = [make_rows()[0], Rendered(prompt_ids, completion_ids, list(range(len(completion_ids))), False)]
        with count_forwards(model) as ran, pytest.raises(ValueError, match=message):
            FrozenScorer(LoadedModel(model))(rows, **settings)
        assert ran == []

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_damaged_weights_of_some_words(self, value):
        model = make_model(LlamaConfig(**SIZES, tie_word_embeddings=False))
        model.get_input_embeddings().weight.data[50] = value
        ids = [([3, 4], [5, EOS]), ([3, 50], [5, EOS]), ([3, 4], [5, 6]), ([3, 4], [50, 6])]
        rows = [Rendered(prompt, tokens, [0, 1], tokens[-1] == EOS) for prompt, tokens in ids]
        message = r"the LlamaForCausalLM given\) gives NaN or infinite logits for rows 1, 3 of 4.*damaged.*float32"
        with pytest.raises(ValueError, match=message):
            FrozenScorer(LoadedModel(model))(rows)

    def test_damaged_head(self):
        model = make_model(LlamaConfig(**SIZES, tie_word_embeddings=False))
        model.lm_head.weight.data[-1, 0] = float("nan")
        with pytest.raises(ValueError, match=r"for rows 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, \.\.\. of 12"):
            FrozenScorer(LoadedModel(model))([Rendered([3, 4], [5, EOS], [0, 1], True)] * 12)
