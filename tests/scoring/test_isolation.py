# SPDX-License-Identifier: Apache-2.0
"""
A row's numbers are those of the row alone, whatever ran before it, stands beside it or is compiled. (What stands beside
it, for every family: `test_scorer.py`.)
"""

import copy
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch._dynamo import eval_frame
from transformers import BertGenerationConfig, LlamaConfig, LlamaForCausalLM

from endotrl import EndogenousReward
from endotrl.frozen.loaded_model import LoadedModel
from endotrl.frozen.own_copy import OwnCopy
from endotrl.scoring import FrozenScorer

from .families import (
    BY_LENGTH,
    FAMILIES,
    SIZES,
    Capacity,
    OneScale,
    assert_numbers,
    each_alone,
    group_rows,
    make_model,
    make_rows,
    numbers,
    replace_linear,
    score_counted,
    with_rope,
)


class TestLengths:
    """Frequencies of rotary positions that depend on the longest row of a pass."""

    def test_rows_of_one_side_share_their_pass(self):
        _, counts = score_counted(make_model(FAMILIES["phi3, longrope"]()), group_rows())
        # Prompts of 7 and 5 tokens in turns, with 3, 4, ..., 8: all but 7 + 7 and 5 + 8 have at most 12 tokens.
        assert counts == [7 + 7 + 5 + 8, 7 + 3 + 5 + 5 + 4 + 6]

    @pytest.mark.parametrize("name", BY_LENGTH)
    def test_what_ran_before(self, name):
        # transformers keeps the frequencies of the longest pass until one comes that is shorter than the original
        # length.
        model, rows = make_model(FAMILIES[name]()), make_rows()
        fresh = copy.deepcopy(model)
        model(torch.arange(2, 42)[None])
        found = {key: tensor.clone() for key, tensor in model.named_buffers()}
        scorer = FrozenScorer(LoadedModel(model))
        expected = each_alone(fresh, rows[::-1])
        for _ in range(2):
            assert_numbers(scorer(rows[::-1]), expected)
        # And the model is the user's: as it was found.
        if "longrope" not in name:
            assert all(torch.equal(found[key], tensor) for key, tensor in model.named_buffers())

    @pytest.mark.parametrize(
        ("rope_type", "depends_on"), [("new", "positions"), ("new", "tokens"), ("default", "positions")]
    )
    def test_what_no_config_names_is_tried_out(self, rope_type, depends_on, caplog):
        model, rows = with_rope(rope_type, depends_on), make_rows()
        with caplog.at_level(logging.INFO, logger="endotrl"):
            assert_numbers(FrozenScorer(LoadedModel(model))(rows), each_alone(model, rows))
        assert "each completion needs its own pass (its rotary positions depend on the longest row" in caplog.text

    def test_an_unknown_type_that_depends_on_nothing_is_packed(self):
        model, rows = with_rope("new", "nothing"), group_rows()
        actual, counts = score_counted(model, rows)
        assert counts == [39]
        assert_numbers(actual, each_alone(model, rows))


class TestWholePass:
    """Layers whose output for a token depends on all tokens of the pass."""

    @pytest.mark.parametrize("family", ["llama, untied head", "mixtral, experts", "mamba, recurrent"])
    @pytest.mark.parametrize(
        ("kind", "part"), [(OneScale, "backbone"), (OneScale, "all"), (Capacity, "backbone"), (OneScale, "head")]
    )
    def test_one_row_per_pass(self, family, kind, part, caplog):
        model, rows = make_model(FAMILIES[family]()), make_rows()
        parts = {"backbone": model.base_model, "all": model, "head": model.get_output_embeddings()}
        replace_linear(parts[part], kind)
        expected = each_alone(model, rows)
        with caplog.at_level(logging.INFO, logger="endotrl"):
            for budget in (10_000, 1):
                assert_numbers(FrozenScorer(LoadedModel(model), budget)(rows), expected)
        assert "each completion needs its own pass (its layers share one scale or capacity" in caplog.text

    @pytest.mark.parametrize("family", ["llama, untied head", "mixtral, experts"])
    def test_in_half_precision(self, family):
        # Where one scale for all changes less than the rounding of two kernels.
        model, rows = make_model(FAMILIES[family]()).bfloat16(), make_rows()
        replace_linear(model.base_model, OneScale)
        scorer = FrozenScorer(LoadedModel(model))
        for stats, row in zip(scorer(rows), rows, strict=True):
            assert all(map(torch.equal, numbers(stats), numbers(scorer([row])[0])))

    @pytest.mark.parametrize("family", ["llama, untied head", "mixtral, experts", "qwen3"])
    def test_rounding_of_half_precision_is_no_dependence(self, family):
        scorer = FrozenScorer(LoadedModel(make_model(FAMILIES[family]()).bfloat16()))
        assert all(values.dtype == torch.float32 for stats in scorer(group_rows()) for values in numbers(stats))
        assert scorer._rules is not None and scorer._rules.alone is None


class Drift(nn.Linear):
    """Notes the largest input so far, as observers do that calibrate a scale."""

    largest = 0.0

    def forward(self, inputs):
        self.largest = max(self.largest, inputs.shape[1])
        return super().forward(inputs) * self.largest


def test_rows_without_a_score_of_their_own():
    not_causal = make_model(BertGenerationConfig(**{**SIZES, "num_attention_heads": 4}, is_decoder=False))
    with pytest.raises(ValueError, match="BertGenerationDecoder depend on later tokens"):
        FrozenScorer(LoadedModel(not_causal))(group_rows())
    keeps = make_model(LlamaConfig(**SIZES))
    keeps.model.layers[0].mlp.down_proj.__class__ = Drift
    with pytest.raises(ValueError, match="random, or keeps state between passes"):
        FrozenScorer(LoadedModel(keeps))(group_rows())


class TestThreads:
    @pytest.mark.parametrize("training", [False, True])
    def test_scorers_of_one_instance_and_of_another(self, training):
        # The user trains with dropout: whoever is done first must not set training mode back for the other.
        model = make_model(LlamaConfig(**{**SIZES, "num_hidden_layers": 6}, attention_dropout=0.5)).train(training)
        rows = group_rows()
        placements = [LoadedModel(model), LoadedModel(model), LoadedModel(copy.deepcopy(model))]
        scorers = [FrozenScorer(p, budget) for p, budget in zip(placements, (8192, 20, 8192), strict=True)]
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(lambda k: scorers[k % 3]([*rows, *rows[: k % 4]]), range(24)))
        assert all(module.training == training for module in model.modules())
        assert model.config._attn_implementation == "sdpa"
        assert eval_frame._stance.stance == "default"  # what the user has compiled is run as such again
        expected = each_alone(model.eval(), rows)
        for result in results:
            assert_numbers(result[: len(rows)], expected)

    def test_a_copy_is_loaded_once(self, tiny_policy_path, monkeypatch):
        loads, load = [], OwnCopy._from_pretrained

        def slow_load(self, *args):
            loads.append(threading.get_ident())
            threading.Event().wait(0.2)
            return load(self, *args)

        monkeypatch.setattr(OwnCopy, "_from_pretrained", slow_load)
        reward = EndogenousReward(tiny_policy_path)
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(lambda _: reward(["What is"], [" the capital"])[0], range(8)))
        assert len(loads) == 1
        assert len(set(results)) == 1

    def test_a_pass_of_the_users_own_fails_rather_than_lies(self):
        model, rows = make_model(LlamaConfig(**SIZES)), group_rows()
        inside, done = threading.Event(), threading.Event()

        def pause(*args):
            if model.config._attn_implementation != "sdpa":
                inside.set()
                done.wait(5)

        handle = model.model.layers[0].register_forward_pre_hook(pause)
        with ThreadPoolExecutor(1) as pool:
            scored = pool.submit(FrozenScorer(LoadedModel(model)), rows)
            assert inside.wait(5)
            handle.remove()
            with pytest.raises(RuntimeError, match="called while an endogenous reward was scoring with it"):
                model(torch.arange(5)[None])
            done.set()
            assert_numbers(scored.result(), each_alone(model, rows))
        model(torch.arange(5)[None])


@contextmanager
def compiled_with(function):
    """Counts graphs that are compiled."""
    graphs: list[int] = []

    def backend(module, inputs):
        graphs.append(len(inputs))
        return module.forward

    function(backend)
    try:
        yield graphs
    finally:
        torch._dynamo.reset()


class TestCompiled:
    @pytest.mark.parametrize("part", ["backbone", "layers"])
    def test_same_numbers_and_nothing_compiled_again(self, part):
        model, rows = make_model(LlamaConfig(**SIZES)), make_rows()
        expected = each_alone(model, rows)
        parts = [model.model] if part == "backbone" else list(model.model.layers)

        def compile_parts(backend):
            for module in parts:
                module.compile(backend=backend, fullgraph=True)

        ids = torch.arange(2, 12)[None]
        with compiled_with(compile_parts) as graphs:
            with torch.no_grad():
                before = model(ids).logits
            num_graphs = len(graphs)
            scorer = FrozenScorer(LoadedModel(model), max_tokens_per_batch=60)
            for _ in range(2):
                assert_numbers(scorer(rows), expected)
            assert num_graphs == len(graphs) > 0
            # And what the user runs is compiled as before.
            with torch.no_grad():
                torch.testing.assert_close(model(ids).logits, before)
            assert len(graphs) == num_graphs

    def test_a_wrapped_model_is_unwrapped(self, tiny_policy_path):
        plain = LlamaForCausalLM.from_pretrained(tiny_policy_path)
        tokenizer = EndogenousReward(tiny_policy_path)._tokenizer
        expected = EndogenousReward(plain, tokenizer)(["What is"], [" the capital"])
        reward = EndogenousReward(torch.compile(plain, backend="eager"), tokenizer)
        assert reward(["What is"], [" the capital"]) == expected
        torch._dynamo.reset()
