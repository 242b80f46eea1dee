# SPDX-License-Identifier: Apache-2.0
"""Several completions in one row: attention over it against one mask made token by token, and what is run of whom."""

import logging
import math

import pytest
import torch
from torch import nn
from transformers import Llama4TextConfig, LlamaConfig, MistralConfig

from endotrl.frozen.loaded_model import LoadedModel
from endotrl.rendering.renderer import Rendered
from endotrl.scoring import FrozenScorer, forward_pass
from endotrl.scoring.forward_pass import (
    Group,
    NotPackable,
    PackedRow,
    packed_attention,
    shared_prefix_attention,
)
from endotrl.scoring.isolation import longest_packable, why_not_packable

from .families import (
    FAMILIES,
    SIZES,
    VOCAB_SIZE,
    assert_numbers,
    drawer,
    each_alone,
    group_rows,
    make_model,
    numbers,
    score_counted,
)


def visible_pairs(row, length):
    """Which token sees which, of shape `(length, length)`, made token by token; behind the row, none sees any."""
    sees = torch.zeros(length, length, dtype=torch.bool)
    for start, prompt_end, continuations in row.spans:
        for i in range(start, prompt_end):
            sees[i, start : i + 1] = True
        for first, end in continuations:
            for i in range(first, end):
                sees[i, start:prompt_end] = True
                sees[i, first : i + 1] = True
    return sees


def naive_attention(row, query, key, value, scaling):
    """All scores of all tokens in float64, with a mask made token by token."""
    sees = visible_pairs(row, query.shape[2])
    repeats = query.shape[1] // key.shape[1]
    key, value = key.double().repeat_interleave(repeats, 1), value.double().repeat_interleave(repeats, 1)
    scores = (query.double() @ key.transpose(2, 3) * scaling).masked_fill(~sees, -math.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def attend(row, query, key, value, scaling, **kwargs):
    token = forward_pass._row.set(row)
    try:
        return shared_prefix_attention(nn.Identity(), query, key, value, None, scaling=scaling, **kwargs)[0]
    finally:
        forward_pass._row.reset(token)


def random_states(num_tokens, dtype=torch.float32, heads=(4, 2)):
    """Queries, keys and values of a row, of heads of 16."""
    generator = torch.Generator().manual_seed(num_tokens)
    shapes = [(1, count, num_tokens, 16) for count in (*heads, heads[1])]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


class TestAttention:
    """Its numbers, by every kernel: `test_kernels.py`."""

    @pytest.mark.parametrize(
        ("special", "named"),
        [
            ({"softcap": 30.0}, "softcap"),
            ({"s_aux": torch.zeros(4)}, "s_aux"),
            ({"position_bias": torch.zeros(1)}, "position_bias"),
            ({"sliding_window": 7}, "window"),
            ({"sliding_window": 8}, None),  # in which all fit
        ],
    )
    def test_other_kinds_are_refused(self, special, named):
        row, states = PackedRow.of([Group([1] * 5, [[2] * 3])]), random_states(8)
        if named is None:
            assert torch.equal(attend(row, *states, 1.0, **special), attend(row, *states, 1.0))
            return
        with pytest.raises(NotPackable, match=named):
            attend(row, *states, 1.0, **special)

    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    def test_the_models_own_comes_back(self, implementation):
        model = make_model(LlamaConfig(**SIZES, attn_implementation=implementation))
        FrozenScorer(LoadedModel(model))(group_rows())
        assert model.config._attn_implementation == implementation
        with pytest.raises(ZeroDivisionError), packed_attention(model, PackedRow.of([Group([1], [[2]])])):
            raise ZeroDivisionError
        assert model.config._attn_implementation == implementation


class TestRow:
    def test_tokens_positions_and_states(self):
        row = PackedRow.of([Group([10, 11], [[12], [], [13, 14]]), Group([20], [[21]])])
        assert row.input_ids.tolist() == [[10, 11, 12, 13, 14, 20, 21]]
        assert row.position_ids.tolist() == [[0, 1, 2, 2, 3, 0, 1]]
        assert row.longest == 4
        # The state before the first token of every continuation is the end of its prompt.
        assert [row.states(0, k) for k in range(3)] == [[1, 2], [1], [1, 3, 4]]
        assert row.states(1, 0) == [5, 6]

    def test_few_lengths_and_little_filler(self):
        for shortest, longest, most in ((1, 64, 64), (1000, 2000, 48), (8000, 8192, 2)):
            lengths = {
                n: PackedRow.of([Group([1] * n, [[2]])]).input_ids.shape[1] - 1 for n in range(shortest, longest)
            }
            assert all(0 <= padded - n <= (n + 1) / 32 for n, padded in lengths.items())
            assert len(set(lengths.values())) <= most
        # What fills the row stands after everything else, in no state and at no new position.
        row = PackedRow.of([Group([1] * 1000, [[2] * 50])])
        assert row.input_ids.shape == row.position_ids.shape == (1, 1056)
        assert row.states(0, 0) == list(range(999, 1050))
        assert row.position_ids.max() == 1049


class TestScoring:
    def test_equal_completions_are_run_once(self):
        model, rows = make_model(LlamaConfig(**SIZES)), [*group_rows(), *group_rows(), group_rows()[0]]
        actual, counts = score_counted(model, rows)
        assert_numbers(actual, each_alone(model, rows))
        assert counts == [39]

    @pytest.mark.parametrize("budget", [1, 9, 14, 20])
    def test_a_group_larger_than_the_budget(self, budget):
        model, rows = make_model(LlamaConfig(**SIZES)), group_rows()
        actual, counts = score_counted(model, rows, budget)
        assert_numbers(actual, each_alone(model, rows))
        # At most the budget, or one row that is larger.
        longest = max(len(row.prompt_ids) + len(row.completion_ids) - 1 for row in rows)
        assert max(counts) <= max(budget, longest)

    def test_a_row_of_8000_tokens(self):
        # Longer than a block of queries, next to others of its prompt; the reference is the row alone.
        model = make_model(LlamaConfig(**{**SIZES, "max_position_embeddings": 8192}))
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(2, VOCAB_SIZE, (3, 8000), generator=generator).tolist()
        rows = [Rendered(ids[0][:50], ids[k][:n], list(range(n)), finished=False) for k, n in ((1, 7950), (2, 1500))]
        scorer = FrozenScorer(LoadedModel(model), max_tokens_per_batch=10_000)
        assert_numbers(scorer(rows), [numbers(scorer([row])[0]) for row in rows])


# Tokens up to which a family's rows are packed, `None` for those that are padded.
LIMITS = {
    "llama, untied head": math.inf,
    "qwen2, window not used": math.inf,
    "mistral, window": 16,
    "gpt2, learned positions": math.inf,
    "opt, projected embeddings": math.inf,
    "gemma2, soft cap": None,
    "gpt-j, head with bias": None,
    "bloom, ALiBi": None,
    "mamba, recurrent": None,
    "lfm2, convolutions": None,
    "falcon-h1, attention and state space": None,  # side by side in a layer: nothing in the config tells
}


@pytest.mark.parametrize(("name", "limit"), LIMITS.items())
def test_families_that_are_packed_or_padded(name, limit, caplog):
    model = make_model(FAMILIES[name]())
    with caplog.at_level(logging.INFO, logger="endotrl.scoring.isolation"):
        _, counts = score_counted(model, group_rows())
    if limit is None:
        assert why_not_packable(model) is not None
        assert sum("rows are padded (" in record.message for record in caplog.records) == 1
    else:
        assert longest_packable(model.config) == limit
        assert counts == [39]


def test_only_rows_longer_than_the_window_are_padded():
    # A window of 14 tokens: rows have up to 7 + 7 = 14 and 5 + 7 tokens; one has 20.
    model = make_model(MistralConfig(**SIZES, sliding_window=14))
    rows = group_rows()
    rows.append(Rendered(rows[0].prompt_ids, drawer(5)(14), list(range(14)), finished=False))
    together, counts = score_counted(model, rows)
    assert counts == [39, 21]
    # The window matters for the long row, so that packing it would show.
    unlimited = make_model(MistralConfig(**SIZES, sliding_window=None))
    unlimited.load_state_dict(model.state_dict())
    *short, long = [numbers(stats) for stats in FrozenScorer(LoadedModel(unlimited))(rows)]
    assert_numbers(together[:-1], short)
    assert (together[-1].soft_values - long[1]).abs().max() > 0.01


def test_a_chunk_is_a_window():
    assert longest_packable(Llama4TextConfig(attention_chunk_size=512)) == 512
