# SPDX-License-Identifier: Apache-2.0
"""Several completions in one row, against each sequence alone."""

import logging
import math
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    FalconH1Config,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
)

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

from .test_scorer import EOS, FAMILIES, SIZES, VOCAB_SIZE, assert_equal_stats, make_model


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


def random_states(num_tokens, dtype=torch.float32):
    generator = torch.Generator().manual_seed(num_tokens)
    # Two queries a key, and values of another size than keys, as latent attention has them.
    shapes = [(1, 4, num_tokens, 16), (1, 2, num_tokens, 16), (1, 2, num_tokens, 16)]
    query, key, value = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return query, key, value


class TestAttention:
    @settings(max_examples=40, deadline=None)
    @given(
        groups=st.lists(
            st.tuples(st.integers(1, 40), st.lists(st.integers(0, 40), min_size=1, max_size=4)), min_size=1, max_size=3
        ),
        query_block=st.sampled_from([3, 16, 1024]),
        kept=st.sampled_from([0, 500, 2**25]),
    )
    def test_equal_to_all_scores(self, groups, query_block, kept):
        row = PackedRow.of([Group([1] * prompt, [[2] * n for n in lengths]) for prompt, lengths in groups])
        query, key, value = random_states(row.input_ids.shape[1])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(forward_pass, "QUERY_BLOCK", query_block)
            patch.setattr(forward_pass, "KEPT_MASK_ELEMENTS", kept)
            actual = attend(row, query, key, value, 0.3)
            again = attend(row, query, key, value, 0.3)  # with masks that were kept
        expected = naive_attention(row, query, key, value, 0.3)
        torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(actual, again)

    def test_half_precision(self):
        row = PackedRow.of([Group([1] * 50, [[2] * 33, [3] * 70]), Group([4] * 7, [[5] * 9])])
        query, key, value = random_states(row.input_ids.shape[1], torch.bfloat16)
        actual = attend(row, query, key, value, 0.25)
        assert actual.dtype == torch.bfloat16
        expected = naive_attention(row, query, key, value, 0.25)
        assert (actual.double() - expected).abs().max() < 0.02

    def test_masks_that_do_not_fit_are_not_kept(self, monkeypatch):
        monkeypatch.setattr(forward_pass, "KEPT_MASK_ELEMENTS", 10 * 32)
        row = PackedRow.of([Group([1] * 5, [[2] * 10, [2] * 11])])
        attend(row, *random_states(26), 1.0)
        assert [tuple(mask.shape) for mask in row._kept["masks"].values()] == [(10, 32)]

    @pytest.mark.parametrize(
        ("special", "named"),
        [
            ({"softcap": 30.0}, "softcap"),
            ({"s_aux": torch.zeros(4)}, "s_aux"),
            ({"position_bias": torch.zeros(1)}, "position_bias"),
            ({"sliding_window": 7}, "window"),
        ],
    )
    def test_other_kinds_of_attention_are_refused(self, special, named):
        row = PackedRow.of([Group([1] * 5, [[2] * 3])])
        with pytest.raises(NotPackable, match=named):
            attend(row, *random_states(8), 1.0, **special)

    def test_a_window_that_all_fit_in(self):
        row = PackedRow.of([Group([1] * 5, [[2] * 3])])
        states = random_states(8)
        assert torch.equal(attend(row, *states, 1.0, sliding_window=8), attend(row, *states, 1.0))


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
        # What fills the row stands after everything else, and is in no state.
        row = PackedRow.of([Group([1] * 1000, [[2] * 50])])
        assert row.input_ids.shape == row.position_ids.shape == (1, 1056)
        assert row.states(0, 0) == list(range(999, 1050))


@contextmanager
def tokens_run(model):
    """Lists how many tokens each pass embeds."""
    counts: list[int] = []
    handle = model.get_input_embeddings().register_forward_hook(lambda _, args, __: counts.append(args[0].numel()))
    yield counts
    handle.remove()


def group_rows(seed=0):
    """Two prompts in turns, of 7 and 5 tokens, with completions of 3, 4, ..., 8 tokens."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count):
        return torch.randint(2, VOCAB_SIZE, (count,), generator=generator).tolist()

    prompts = [draw(7), draw(5)]
    return [
        Rendered(prompts[i % 2], [*draw(n - 1), EOS], list(range(n)), finished=True) for i, n in enumerate(range(3, 9))
    ]


class TestScoring:
    def test_equal_completions_are_run_once(self):
        model = make_model(LlamaConfig(**SIZES))
        scorer, rows = FrozenScorer(LoadedModel(model)), group_rows()
        expected = scorer(rows)
        with tokens_run(model) as counts:
            actual = scorer([*rows, *rows, rows[0]])
        assert counts == [39]
        assert_equal_stats(actual, [*expected, *expected, expected[0]])

    @pytest.mark.parametrize("budget", [1, 9, 14, 20])
    def test_a_group_larger_than_the_budget(self, budget):
        model = make_model(LlamaConfig(**SIZES))
        rows = group_rows()
        expected = FrozenScorer(LoadedModel(model))(rows)
        scorer = FrozenScorer(LoadedModel(model), max_tokens_per_batch=budget)
        scorer(rows[:1])
        with tokens_run(model) as counts:
            assert_equal_stats(scorer(rows), expected)
        # At most the budget, or one row that is larger.
        longest = max(len(row.prompt_ids) + len(row.completion_ids) - 1 for row in rows)
        assert max(counts) <= max(budget, longest)

    def test_the_models_own_attention_comes_back(self):
        for implementation in ("sdpa", "eager"):
            model = make_model(LlamaConfig(**SIZES, attn_implementation=implementation))
            FrozenScorer(LoadedModel(model))(group_rows())
            assert model.config._attn_implementation == implementation

    def test_the_models_own_attention_comes_back_after_an_error(self):
        model = make_model(LlamaConfig(**SIZES))
        with pytest.raises(ZeroDivisionError), packed_attention(model, PackedRow.of([Group([1], [[2]])])):
            raise ZeroDivisionError
        assert model.config._attn_implementation == "sdpa"

    def test_a_row_of_8000_tokens(self):
        # Longer than a block of queries, next to others of its prompt; the reference is the row alone.
        model = make_model(LlamaConfig(**{**SIZES, "max_position_embeddings": 8192}))
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(2, VOCAB_SIZE, (3, 8000), generator=generator).tolist()
        rows = [Rendered(ids[0][:50], ids[k][:n], list(range(n)), finished=False) for k, n in ((1, 7950), (2, 1500))]
        scorer = FrozenScorer(LoadedModel(model), max_tokens_per_batch=10_000)
        alone = [scorer([row])[0] for row in rows]
        assert_equal_stats(scorer(rows), alone)


FAMILY = dict(FAMILIES)
PACKABLE = {
    "llama, untied head": math.inf,
    "qwen2, window not used": math.inf,
    "mistral, window": 16,
    "gpt2, learned positions": math.inf,
    "opt, projected embeddings": math.inf,
}
PADDED = [
    "gemma2, soft cap",
    "gpt-j, head with bias",
    "bloom, ALiBi",
    "mamba, recurrent",
    "lfm2, convolutions",
    "falcon-h1, attention and state space",  # side by side in a layer: nothing in the config tells
]


class TestFamilies:
    @pytest.mark.parametrize(("name", "limit"), PACKABLE.items())
    def test_packed(self, name, limit):
        model = make_model(FAMILY[name]())
        assert why_not_packable(model) is None
        assert longest_packable(model.config) == limit
        scorer, rows = FrozenScorer(LoadedModel(model)), group_rows()
        scorer(rows[:1])
        with tokens_run(model) as counts:
            assert_equal_stats(scorer(rows), [scorer([row])[0] for row in rows])
        assert counts[0] == 39

    @pytest.mark.parametrize("name", PADDED)
    def test_padded_and_said_once(self, name, caplog):
        model = make_model(FAMILY[name]())
        assert why_not_packable(model) is not None
        scorer, rows = FrozenScorer(LoadedModel(model)), group_rows()
        with caplog.at_level(logging.INFO, logger="endotrl"):
            together = scorer(rows)
            alone = [scorer([row])[0] for row in rows]
        assert_equal_stats(together, alone)
        assert [record.name for record in caplog.records if "padded" in record.message] == [
            "endotrl.scoring.isolation"
        ]

    def test_only_rows_longer_than_the_window_are_padded(self):
        # A window of 14 tokens: rows have up to 7 + 7 = 14 and 5 + 7 tokens; one has 20.
        model = make_model(MistralConfig(**SIZES, sliding_window=14))
        rows = group_rows()
        ids = torch.randint(2, VOCAB_SIZE, (14,), generator=torch.Generator().manual_seed(5)).tolist()
        rows.append(Rendered(rows[0].prompt_ids, ids, list(range(14)), finished=False))
        scorer = FrozenScorer(LoadedModel(model))
        scorer(rows[:1])
        with tokens_run(model) as counts:
            together = scorer(rows)
        assert counts == [39, 21]
        # The window matters for the long row, so that packing it would show.
        unlimited = make_model(MistralConfig(**SIZES, sliding_window=None))
        unlimited.load_state_dict(model.state_dict())
        assert_equal_stats(together[:-1], FrozenScorer(LoadedModel(unlimited))(rows)[:-1])
        difference = together[-1].soft_values - FrozenScorer(LoadedModel(unlimited))(rows)[-1].soft_values
        assert difference.abs().max() > 0.01

    @pytest.mark.parametrize(
        ("config", "limit"),
        [
            (Llama4TextConfig(attention_chunk_size=512), 512),
            (FalconH1Config(), math.inf),  # attention and state space side by side in a layer: only trying it shows
            (MambaConfig(), math.inf),
        ],
    )
    def test_length_from_the_config(self, config, limit):
        assert longest_packable(config) == limit
