# SPDX-License-Identifier: Apache-2.0
"""A row's numbers are those of the row alone, whatever stands beside it, came before it, or is compiled."""

import copy
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from transformers import (
    BertGenerationConfig,
    Gemma3TextConfig,
    GraniteMoeConfig,
    JambaConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MiniCPM3Config,
    Ministral3Config,
    MistralConfig,
    Phi3Config,
    PhimoeConfig,
    PretrainedConfig,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from endotrl import EndogenousReward
from endotrl.frozen.loaded_model import LoadedModel
from endotrl.frozen.own_copy import OwnCopy
from endotrl.rendering.renderer import Rendered
from endotrl.scoring import FrozenScorer
from endotrl.scoring.forward_pass import Group, PackedRow, RopeLengths
from endotrl.scoring.isolation import reads_padding
from endotrl.scoring.reference_pass import ReferenceRecorder

from .test_packing import group_rows, tokens_run
from .test_scorer import EOS, FAMILIES, SIZES, VOCAB_SIZE, assert_equal_stats, expected_numbers, make_model, numbers


ORIGINAL = 12  # length in tokens beyond which frequencies change


def longrope(**more):
    return {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": ORIGINAL,
        **more,
    }


def dynamic(**more):
    return {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0, **more}


BY_LAYER = {"full_attention": dynamic(), "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
LLAMA_4_SCALING = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "llama_4_scaling_beta": 0.5,
}
SHORT = {**SIZES, "max_position_embeddings": ORIGINAL}

BY_LENGTH: list[tuple[str, Callable[[], PretrainedConfig]]] = [
    ("llama, dynamic", lambda: LlamaConfig(**SHORT, rope_parameters=dynamic())),
    ("mistral with a window, dynamic", lambda: MistralConfig(**SHORT, sliding_window=9, rope_parameters=dynamic())),
    (
        "gemma3, dynamic in some layers",
        lambda: Gemma3TextConfig(
            **SHORT,
            head_dim=8,
            sliding_window=64,
            rope_parameters=BY_LAYER,
            layer_types=["full_attention", "sliding_attention"],
        ),
    ),
    (
        "phi3, longrope",
        lambda: Phi3Config(**SIZES, original_max_position_embeddings=ORIGINAL, rope_parameters=longrope()),
    ),
    ("minicpm3, longrope", lambda: MiniCPM3Config(**{**SIZES, **LATENT}, rope_parameters=longrope())),
    (
        "phimoe, longrope and scales by length",
        lambda: PhimoeConfig(
            **SIZES, num_local_experts=4, rope_parameters=longrope(short_mscale=1.0, long_mscale=1.5)
        ),
    ),
]
MORE: list[tuple[str, Callable[[], PretrainedConfig]]] = [
    *BY_LENGTH,
    ("ministral3, attention scaled by position", lambda: Ministral3Config(**SIZES, rope_parameters=LLAMA_4_SCALING)),
    (
        "recurrentgemma, gated recurrence",
        lambda: RecurrentGemmaConfig(**{**SIZES, "num_hidden_layers": 3}, lru_width=32, attention_window_size=16),
    ),
    (
        "jamba, state space and experts",
        lambda: JambaConfig(**SIZES, num_experts=4, attn_layer_offset=1, attn_layer_period=2, mamba_d_state=4),
    ),
    (
        "qwen3-next, linear attention",
        lambda: Qwen3NextConfig(
            **SIZES,
            layer_types=["linear_attention", "full_attention"],
            head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
        ),
    ),
    ("granite, experts", lambda: GraniteMoeConfig(**SIZES, num_local_experts=4)),
]
EVERY = dict([*FAMILIES, *MORE])


def rows_of_many_lengths():
    """Total lengths from 5 to 40, many of them around `ORIGINAL` and some equal, of three prompts."""
    generator = torch.Generator().manual_seed(2)

    def draw(count):
        return torch.randint(2, VOCAB_SIZE, (count,), generator=generator).tolist()

    prompts = [draw(7), draw(5), draw(3)]
    finished = [(0, 4), (0, 5), (1, 7), (0, 6), (1, 8), (0, 6), (2, 20)]
    cut = [(1, 0), (2, 2), (2, 9), (0, 33), (0, 9)]
    return [
        *(Rendered(prompts[k], [*draw(n - 1), EOS], list(range(n)), True) for k, n in finished),
        *(Rendered(prompts[k], draw(n), list(range(n)), False) for k, n in cut),
    ]


def each_alone(model, rows):
    """Every row by itself, all logits, by a model that has run nothing else."""
    has_state = bool(RopeLengths.from_config(model.config).limits)
    return [expected_numbers(copy.deepcopy(model) if has_state else model, row, alpha=1.0) for row in rows]


def assert_numbers(actual, expected):
    for stats, theirs in zip(actual, expected, strict=True):
        for a, b in zip(numbers(stats), theirs, strict=True):
            torch.testing.assert_close(a, b, atol=5e-5, rtol=1e-5)


def assert_equal_to_alone(actual, model, rows):
    assert_numbers(actual, each_alone(model, rows))


class TestEveryFamily:
    @pytest.mark.parametrize("name", EVERY)
    def test_packed_and_padded(self, name):
        model, rows = make_model(EVERY[name]()), rows_of_many_lengths()
        expected = each_alone(model, rows)
        scorer = FrozenScorer(LoadedModel(model))
        for scorer.max_tokens_per_batch in (10_000, 1):
            assert_numbers(scorer(rows), expected)
        scorer.max_tokens_per_batch = 45
        assert_numbers(scorer(rows[::-1]), expected[::-1])

    @pytest.mark.parametrize("name", EVERY)
    def test_recorded(self, name):
        # As trainers do it: prompts padded on the left, completions on the right, a mask, and no positions.
        model, rows = make_model(EVERY[name]()), rows_of_many_lengths()
        recorder = ReferenceRecorder(model, is_frozen=lambda: True, current_step=lambda: 0)
        run_padded(model, rows)
        with torch.no_grad():
            for row in rows:
                ids = [*row.prompt_ids, *row.completion_ids]
                if (states := recorder.find(tuple(ids))) is not None:
                    logits = model.get_output_embeddings()(states)
                    expected = model.base_model(torch.tensor([ids])).last_hidden_state[0]
                    torch.testing.assert_close(logits, model.get_output_embeddings()(expected), atol=5e-5, rtol=1e-5)
        recorder.close()


@torch.no_grad()
def run_padded(model, rows, **more):
    prompt_width = max(len(row.prompt_ids) for row in rows) + 5
    width = prompt_width + max(len(row.completion_ids) for row in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for k, row in enumerate(rows):
        start, end = prompt_width - len(row.prompt_ids), prompt_width + len(row.completion_ids)
        input_ids[k, start:end] = torch.tensor([*row.prompt_ids, *row.completion_ids])
        mask[k, start:end] = 1
    model(input_ids=input_ids, attention_mask=mask, use_cache=False, **more)


class TestLengths:
    @pytest.mark.parametrize(
        ("config", "expected"),
        [
            (LlamaConfig(), ((), None, ())),
            (LlamaConfig(**SHORT, rope_parameters=dynamic()), ((), 12, ())),
            (Gemma3TextConfig(**SHORT, rope_parameters=BY_LAYER), ((), 12, ())),
            (dict(BY_LENGTH)["phi3, longrope"](), ((12,), None, ())),
        ],
    )
    def test_from_config(self, config, expected):
        lengths = RopeLengths.from_config(config)
        assert (lengths.switches, lengths.grows_beyond, lengths.unknown) == expected

    def test_classes(self):
        switches = RopeLengths(True, (4,), None, ())
        assert [switches.length_class(n) == switches.length_class(4) for n in (1, 4, 5)] == [True, True, False]
        assert switches.length_class(5) == switches.length_class(500)
        grows = RopeLengths(True, (), 4, ())
        assert [grows.length_class(n) == grows.length_class(4) for n in (1, 4, 5)] == [True, True, False]
        assert grows.length_class(5) != grows.length_class(6)

    @pytest.mark.parametrize(("name", "config"), BY_LENGTH)
    def test_lengths_matter_here(self, name, config):
        # Otherwise the tests above would show nothing.
        ids, states = torch.tensor([[3, 4, 5, 7]] * 2), []
        for last in (3, 400):
            positions = torch.tensor([[0, 1, 2, 3], [0, 1, 2, last]])
            states.append(make_model(config()).base_model(ids, position_ids=positions).last_hidden_state[0])
        assert (states[0] - states[1]).norm() > 1e-3 * states[0].norm(), name

    def test_rows_of_one_side_share_their_pass(self):
        model, rows = make_model(dict(BY_LENGTH)["phi3, longrope"]()), group_rows()
        scorer = FrozenScorer(LoadedModel(model))
        scorer(rows[:1])
        with tokens_run(model) as counts:
            scorer(rows)
        # Prompts of 7 and 5 tokens in turns, with 3, 4, ..., 8: all but 7 + 7 and 5 + 8 have at most 12 tokens.
        assert counts == [7 + 7 + 5 + 8, 7 + 3 + 5 + 5 + 4 + 6]

    @pytest.mark.parametrize("name", [name for name, _ in BY_LENGTH])
    def test_what_ran_before(self, name):
        # transformers keeps the frequencies of the longest pass until one comes that is shorter than the original
        # length.
        model, rows = make_model(EVERY[name]()), rows_of_many_lengths()
        fresh = copy.deepcopy(model)
        model(torch.arange(2, 42)[None])
        found = {key: tensor.clone() for key, tensor in model.named_buffers()}
        scorer = FrozenScorer(LoadedModel(model))
        for _ in range(2):
            assert_equal_to_alone(scorer(rows[::-1]), fresh, rows[::-1])
        # And the model is the user's: as it was found.
        if "longrope" not in name:
            assert all(torch.equal(found[key], tensor) for key, tensor in model.named_buffers())

    def test_filler_is_at_no_new_position(self):
        row = PackedRow.of([Group([1] * 5, [[2]] * 1000)])
        assert row.input_ids.shape[1] > 1005
        assert row.position_ids.max() == 5


class LengthRope(nn.Module):
    """Frequencies by a rule that no config names."""

    def __init__(self, inner, depends_on, beyond):
        super().__init__()
        self.inner, self.depends_on, self.beyond = inner, depends_on, beyond

    def forward(self, x, position_ids):
        length = int(position_ids.max()) + 1 if self.depends_on == "positions" else x.shape[1]
        if self.depends_on == "nothing" or length <= self.beyond:
            return self.inner(x, position_ids)
        return self.inner(x, position_ids * 3)


@pytest.fixture
def unknown_type():
    def as_default(config, *args, **kwargs):
        return LlamaForCausalLM(LlamaConfig(**SIZES)).model.rotary_emb.inv_freq, 1.0

    ROPE_INIT_FUNCTIONS["new"] = as_default
    yield "new"
    del ROPE_INIT_FUNCTIONS["new"]


class TestUnknownLengths:
    def make(self, rope_type, depends_on):
        model = make_model(LlamaConfig(**SIZES, rope_parameters={"rope_type": rope_type, "rope_theta": 1e4}))
        model.model.rotary_emb = LengthRope(model.model.rotary_emb, depends_on, 30)
        return model

    @pytest.mark.parametrize("depends_on", ["positions", "tokens"])
    def test_tried_out(self, unknown_type, depends_on, caplog):
        model, rows = self.make(unknown_type, depends_on), rows_of_many_lengths()
        with caplog.at_level(logging.INFO, logger="endotrl"):
            assert_equal_to_alone(FrozenScorer(LoadedModel(model))(rows), model, rows)
        assert "one completion per pass (its rotary positions depend on the longest row" in caplog.text

    def test_a_known_type_that_does_not_do_as_it_says(self):
        model, rows = self.make("default", "positions"), rows_of_many_lengths()
        assert_equal_to_alone(FrozenScorer(LoadedModel(model))(rows), model, rows)

    @pytest.mark.parametrize("rope_type", ["new", "default"])
    def test_recorded_rows_are_not_read(self, unknown_type, rope_type):
        model, rows = self.make(rope_type, "positions"), rows_of_many_lengths()
        recorder = ReferenceRecorder(model, is_frozen=lambda: True, current_step=lambda: 0)
        run_padded(model, rows)
        with torch.no_grad():
            assert not any(recorder.find((*row.prompt_ids, *row.completion_ids)) is not None for row in rows)

    def test_an_unknown_type_that_depends_on_nothing_is_packed(self, unknown_type):
        model, rows = self.make(unknown_type, "nothing"), group_rows()
        scorer = FrozenScorer(LoadedModel(model))
        scorer(rows[:1])
        with tokens_run(model) as counts:
            actual = scorer(rows)
        assert counts == [39]
        assert_equal_to_alone(actual, model, rows)


class OneScale(nn.Linear):
    """Activations of eight bits, with one scale for the whole input."""

    def forward(self, inputs):
        scale = inputs.abs().max().float() / 448
        rounded = (inputs.float() / scale).to(torch.float8_e4m3fn).float() * scale
        return nn.functional.linear(rounded.to(inputs.dtype), self.weight, self.bias)


class Capacity(nn.Linear):
    """Drops what is beyond the capacity of the pass, as experts with a capacity do."""

    def forward(self, inputs):
        flat = inputs.flatten(0, -2)
        rank = (flat[:, 0].argsort(descending=True).argsort() < 0.75 * len(flat)).to(inputs.dtype)
        return super().forward((flat * rank[:, None]).view_as(inputs))


def replace_linear(module, kind):
    for part in module.modules():
        if type(part) is nn.Linear:
            part.__class__ = kind


class TestWholePass:
    @pytest.mark.parametrize("family", ["llama, untied head", "mixtral, experts", "mamba, recurrent"])
    @pytest.mark.parametrize(("kind", "part"), [(OneScale, "backbone"), (OneScale, "all"), (Capacity, "backbone")])
    def test_one_row_per_pass(self, family, kind, part, caplog):
        model, rows = make_model(EVERY[family]()), rows_of_many_lengths()
        replace_linear(model if part == "all" else model.base_model, kind)
        with caplog.at_level(logging.INFO, logger="endotrl"):
            for budget in (10_000, 1):
                assert_equal_to_alone(FrozenScorer(LoadedModel(model), budget)(rows), model, rows)
        assert "one completion per pass (its layers take one scale, or one capacity" in caplog.text

    def test_of_the_head_alone(self):
        model, rows = make_model(LlamaConfig(**SIZES, tie_word_embeddings=False)), rows_of_many_lengths()
        replace_linear(model.lm_head, OneScale)
        assert_equal_to_alone(FrozenScorer(LoadedModel(model))(rows), model, rows)

    @pytest.mark.parametrize("family", ["llama, untied head", "mixtral, experts"])
    def test_in_half_precision(self, family):
        # Where one scale for all changes less than the rounding of two kernels.
        model, rows = make_model(EVERY[family]()).bfloat16(), rows_of_many_lengths()
        replace_linear(model.base_model, OneScale)
        scorer = FrozenScorer(LoadedModel(model))
        for stats, row in zip(scorer(rows), rows, strict=True):
            assert all(map(torch.equal, numbers(stats), numbers(scorer([row])[0])))

    @pytest.mark.parametrize("family", ["llama, untied head", "mixtral, experts", "qwen3"])
    def test_rounding_of_half_precision_is_no_dependence(self, family):
        scorer = FrozenScorer(LoadedModel(make_model(EVERY[family]()).bfloat16()))
        scorer(group_rows())
        assert scorer._rules is not None and scorer._rules.alone is None

    def test_its_recorded_rows_are_not_read(self):
        model, rows = make_model(LlamaConfig(**SIZES)), group_rows()
        replace_linear(model.base_model, OneScale)
        recorder = ReferenceRecorder(model, is_frozen=lambda: True, current_step=lambda: 0)
        run_padded(model, rows)
        with torch.no_grad():
            assert recorder.find((*rows[0].prompt_ids, *rows[0].completion_ids)) is None


class TestNoScoreOfItsOwn:
    def test_not_causal(self):
        sizes = {**SIZES, "num_attention_heads": 4}
        model = make_model(BertGenerationConfig(**sizes, is_decoder=False))
        with pytest.raises(ValueError, match="BertGenerationDecoder depend on the tokens that follow"):
            FrozenScorer(LoadedModel(model))(group_rows())

    def test_keeps_what_it_ran_before(self):
        class Drift(nn.Linear):
            """Notes the largest input so far, as observers do that calibrate a scale."""

            largest = 0.0

            def forward(self, inputs):
                self.largest = max(self.largest, inputs.shape[1])
                return super().forward(inputs) * self.largest

        model = make_model(LlamaConfig(**SIZES))
        model.model.layers[0].mlp.down_proj.__class__ = Drift
        with pytest.raises(ValueError, match="random, or keeps what it ran before"):
            FrozenScorer(LoadedModel(model))(group_rows())


class TestRecordedPasses:
    @pytest.mark.parametrize(
        ("name", "reads"),
        [
            ("llama, untied head", True),
            ("qwen3", True),
            ("gemma3, sliding window", True),
            ("mixtral, experts", True),
            ("ministral3, attention scaled by position", False),
            ("recurrentgemma, gated recurrence", False),
            ("gpt2, learned positions", False),
        ],
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @torch.no_grad()
    def test_padding(self, name, reads, dtype):
        assert reads_padding(make_model(EVERY[name]()).to(dtype)) == reads

    @pytest.mark.parametrize("name", ["phi3, longrope", "llama, dynamic"])
    def test_not_of_models_that_see_the_length_of_the_pass(self, name):
        model, rows = make_model(EVERY[name]()), group_rows()
        recorder = ReferenceRecorder(model, is_frozen=lambda: True, current_step=lambda: 0)
        run_padded(model, rows)
        assert recorder.find((*rows[0].prompt_ids, *rows[0].completion_ids)) is None

    @pytest.mark.parametrize("more", ["position_ids", "token_type_ids"])
    def test_a_row_that_is_more_than_its_ids(self, more):
        model, row = make_model(LlamaConfig(**SIZES)), group_rows()[0]
        recorder = ReferenceRecorder(model, is_frozen=lambda: True, current_step=lambda: 0)
        ids = torch.tensor([[*row.prompt_ids, *row.completion_ids]])
        for kwargs, found in (({}, True), ({more: torch.ones_like(ids)}, False)):
            recorder.clear()
            with torch.no_grad():
                model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **kwargs)
                assert (recorder.find(tuple(ids[0].tolist())) is not None) == found

    @pytest.mark.parametrize(
        ("config", "records"),
        [
            (lambda: EVERY["mixtral, experts"](), True),
            (lambda: EVERY["phimoe, longrope and scales by length"](), False),  # jitter of the router
        ],
    )
    def test_noise_of_training_mode(self, config, records):
        model, rows = make_model(config()).train(), group_rows()
        recorder = ReferenceRecorder(model, is_frozen=lambda: True, current_step=lambda: 0)
        run_padded(model, rows)
        assert bool(recorder._passes) == records


class TestThreads:
    def test_numbers_and_the_models_own_attention(self):
        model, rows = make_model(LlamaConfig(**{**SIZES, "num_hidden_layers": 6})), group_rows()
        scorer = FrozenScorer(LoadedModel(model))
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(lambda k: scorer([*rows, *rows[: k % 3]]), range(24)))
        assert model.config._attn_implementation == "sdpa"
        expected = scorer(rows)
        assert_equal_to_alone(expected, model, rows)
        for result in results:
            assert_equal_stats(result[: len(rows)], expected)

    def test_two_scorers_of_one_instance(self):
        # The user trains with dropout: whoever is done first must not set training mode back for the other.
        model = make_model(LlamaConfig(**{**SIZES, "num_hidden_layers": 6}, attention_dropout=0.5)).train()
        rows = group_rows()
        scorers = [FrozenScorer(LoadedModel(model)), FrozenScorer(LoadedModel(model), max_tokens_per_batch=20)]
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(lambda k: scorers[k % 2](rows), range(16)))
        assert all(module.training for module in model.modules())
        assert_equal_to_alone(results[0], model.eval(), rows)
        for result in results:
            assert_equal_stats(result, results[0])

    def test_a_copy_is_loaded_once(self, tiny_policy_path, monkeypatch):
        loads, load = [], OwnCopy._from_pretrained

        def slow_load(self, *args):
            loads.append(threading.get_ident())
            barrier.wait(timeout=0.2)
            return load(self, *args)

        barrier = threading.Barrier(2)
        monkeypatch.setattr(OwnCopy, "_from_pretrained", slow_load)
        monkeypatch.setattr(barrier, "wait", lambda timeout: threading.Event().wait(timeout))
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
            with pytest.raises(RuntimeError, match="run while an endogenous reward scored with it in another thread"):
                model(torch.arange(5)[None])
            done.set()
            assert_equal_to_alone(scored.result(), model, rows)
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
        model, rows = make_model(LlamaConfig(**SIZES)), rows_of_many_lengths()
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

    def test_the_setting_comes_back_when_the_last_thread_is_done(self):
        models = [make_model(LlamaConfig(**SIZES)) for _ in range(2)]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda k: FrozenScorer(LoadedModel(models[k % 2]))(group_rows()), range(6)))
        from torch._dynamo import eval_frame

        assert eval_frame._stance.stance == "default"
