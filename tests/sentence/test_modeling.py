# SPDX-License-Identifier: Apache-2.0
import itertools
import json
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from endotrl.sentence import SentenceRewardConfig, SentenceRewardModel
from endotrl.sentence.encoding import pad_batch


# Rows of input_ids and sentence_ends.
ROWS = [
    (list(range(10, 30)), [3, 9, 14, 19]),
    (list(range(40, 47)), [2, 6]),
    (list(range(70, 72)), [1]),
    (list(range(100, 112)), [0, 4, 5, 11]),
]


@pytest.fixture(scope="module")
def make_model(tiny_model_path):
    def make(**config: Any) -> SentenceRewardModel:
        torch.manual_seed(0)
        config = {"attention_dim": 8, **config}
        return SentenceRewardModel.from_backbone(tiny_model_path, SentenceRewardConfig(**config)).eval()

    return make


def score(model: torch.nn.Module, rows: list[tuple[list[int], list[int]]], **kwargs: Any) -> Any:
    with torch.no_grad():
        return model(**pad_batch(rows, pad_token_id=0, **kwargs))


@pytest.mark.parametrize("marker", [True, False])
@pytest.mark.parametrize("aggregator", ["attention", "sum"])
@pytest.mark.parametrize("differences", [True, False])
def test_against_a_naive_loop(make_model, marker, aggregator, differences):
    model = make_model(marker=marker, aggregator=aggregator, differences=differences, rope_theta=100.0)
    head = model.sentence_head
    assert hasattr(head, "query") == (aggregator == "attention")
    # In another order and with more padding, too.
    outputs = [score(model, ROWS), score(model, ROWS[::-1], multiple=32)]
    for i, (ids, ends) in enumerate(ROWS):
        embeddings = model.backbone.embed_tokens(torch.tensor([ids])).detach()
        if marker:
            for end in ends:
                embeddings[0, end] = model.marker.weight[0].detach()
        states = model.backbone(inputs_embeds=embeddings).last_hidden_state[0, ends].detach()  # (N, D)
        values = [head.value(state).item() for state in states]
        rewards = [0.0, *values[1:]]
        if differences:
            rewards = [values[0], *(b - a for a, b in itertools.pairwise(values))]
        count = len(ends)
        weights = torch.ones(count)
        if aggregator == "attention":
            angles = torch.arange(4) * -2 / 8
            turned = []
            for j, state in enumerate(states):
                turn = torch.polar(torch.ones(4), j * 100.0**angles)
                query, key = head.query.weight.detach() @ state, head.key.weight.detach() @ state
                turned.append((torch.complex(query[:4], query[4:]) * turn, torch.complex(key[:4], key[4:]) * turn))
            query = turned[-1][0]
            weights = (torch.stack([(query * key.conj()).real.sum() for _, key in turned]) / 8**0.5).softmax(dim=0)
        expected = sum(float(w) * r for w, r in zip(weights, rewards, strict=True))
        for output, row in zip(outputs, (i, len(ROWS) - 1 - i), strict=True):
            given, weighed = output.sentence_rewards[row], output.weights[row]
            torch.testing.assert_close(given[:count], torch.tensor(rewards), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(weighed[:count], weights, rtol=1e-4, atol=1e-5)
            assert output.logits[row, 0].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
            assert given[count:].abs().sum() == weighed[count:].abs().sum() == 0
            assert (given * weighed).sum() == output.logits[row, 0]


def test_save_and_load(make_model, tmp_path):
    model = make_model(marker=False, aggregator="sum", max_sentences=33, segmenter="sat-3l")
    model.save_pretrained(tmp_path)
    loaded = SentenceRewardModel.from_pretrained(tmp_path).eval()
    assert torch.equal(score(loaded, ROWS).logits, score(model, ROWS).logits)
    assert (loaded.config.max_sentences, loaded.config.segmenter) == (33, "sat-3l")
    assert isinstance(AutoConfig.from_pretrained(tmp_path), SentenceRewardConfig)
    assert isinstance(AutoModel.from_pretrained(tmp_path), SentenceRewardModel)
    # Half precision is the backbone's; the heads, and so the rewards, stay in float32.
    half = SentenceRewardModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.backbone.dtype == torch.bfloat16
    assert half.sentence_head.value.weight.dtype == torch.float32
    torch.testing.assert_close(score(half, ROWS).logits, score(model, ROWS).logits, rtol=0.1, atol=0.1)


def test_embeddings_can_grow(make_model, tmp_path):
    # As with a chat template that brings tokens of its own.
    model = make_model()
    expected = score(model, ROWS).logits
    model.resize_token_embeddings(400, mean_resizing=False)
    assert torch.equal(score(model, ROWS).logits, expected)
    model.save_pretrained(tmp_path)
    loaded = SentenceRewardModel.from_pretrained(tmp_path).eval()
    assert torch.equal(score(loaded, ROWS).logits, expected)
    assert loaded.config.backbone_config.vocab_size == len(loaded.get_input_embeddings().weight) == 400


def test_start_of_training(make_model, tiny_model_path):
    language_model = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    model = make_model()
    for name, weight in language_model.model.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[name], weight), name
    torch.testing.assert_close(model.marker.weight[0], language_model.model.embed_tokens.weight.mean(dim=0))
    for projection in (model.sentence_head.query.weight, model.sentence_head.key.weight):  # (8, 32)
        torch.testing.assert_close(projection @ projection.T, torch.eye(8), rtol=1e-4, atol=1e-5)
    assert model.sentence_head.value.bias.item() == 0
    assert 0 < model.sentence_head.value.weight.abs().max() < 2
    # A loaded model serves as well.
    again = SentenceRewardModel.from_backbone(language_model, SentenceRewardConfig(attention_dim=8))
    assert again.backbone is language_model.model


def test_start_at_equal_weights(make_model):
    weights = score(make_model(attention_init="equal"), ROWS).weights
    for row, (_, ends) in zip(weights, ROWS, strict=True):
        torch.testing.assert_close(row[: len(ends)], torch.full((len(ends),), 1 / len(ends)))


def test_gradient_checkpointing_changes_no_gradient(make_model):
    gradients = []
    for checkpointing in (False, True):
        model = make_model().train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(**pad_batch(ROWS, pad_token_id=0)).logits.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sentence_ends": None}, "SentenceReward"),
        ({"sentence_ends": torch.tensor([[-1]])}, "is empty"),
        ({"attention_mask": torch.tensor([[0, *[1] * 19]])}, "padded on the left"),
    ],
)
def test_batches_that_are_refused(given, message, make_model):
    model = make_model()
    with pytest.raises(ValueError, match=message):
        model(**{**pad_batch(ROWS[:1], pad_token_id=0), **given})
    with pytest.raises(ValueError, match="from_pretrained"):
        SentenceRewardModel.from_backbone(model)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"aggregator": "mean"}, "aggregator"),
        ({"attention_dim": 7}, "even"),
        ({"attention_init": "zero"}, "must be one of 'orthogonal', 'equal'"),
        ({"rope_theta": 0.0}, "rope_theta"),
        ({"max_sentences": 0}, "max_sentences"),
    ],
)
def test_settings_that_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        SentenceRewardConfig(**setting)


def test_folders_that_are_refused(make_model, tiny_model_path, tmp_path):
    with pytest.raises(ValueError, match="'llama', not a sentence reward model"):
        SentenceRewardModel.from_pretrained(tiny_model_path)
    with pytest.raises(ValueError, match="no `backbone_config`"):
        SentenceRewardModel(SentenceRewardConfig())
    with pytest.raises(AttributeError, match="no `backbone_config`"):
        _ = SentenceRewardConfig().hidden_size
    model = make_model()
    model.save_pretrained(tmp_path)
    # An adapter without the head.
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    model.config.save_pretrained(tmp_path / "adapter")
    with pytest.raises(OSError, match="lacks weights: marker, sentence_head"):
        SentenceRewardModel.from_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "config.json").read_text())
    config["backbone_config"]["model_type"] = "of-tomorrow"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="'of-tomorrow', which this version of transformers does not support"):
        SentenceRewardModel.from_pretrained(tmp_path)


SMALL = {"vocab_size": 128, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    "backbone_config",
    [
        *(
            config(**SMALL, intermediate_size=64, num_key_value_heads=2, head_dim=8)
            for config in (transformers.Qwen3Config, transformers.Gemma2Config, transformers.Gemma3TextConfig)
        ),
        transformers.MixtralConfig(**SMALL, intermediate_size=64, num_key_value_heads=2, num_local_experts=4),
        transformers.GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4),
        transformers.OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32),
        transformers.BloomConfig(vocab_size=128, hidden_size=32, n_layer=2, n_head=4),
        transformers.MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=4),
    ],
    ids=lambda config: config.model_type,
)
def test_model_families(backbone_config, tmp_path):
    torch.manual_seed(0)
    language_model = AutoModelForCausalLM.from_config(backbone_config)
    model = SentenceRewardModel.from_backbone(language_model, SentenceRewardConfig(attention_dim=8)).eval()
    output = score(model, ROWS)
    for i, row in enumerate(ROWS):
        torch.testing.assert_close(score(model, [row]).logits[0], output.logits[i], rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = SentenceRewardModel.from_pretrained(tmp_path).eval()
    assert torch.equal(score(loaded, ROWS).logits, output.logits)
