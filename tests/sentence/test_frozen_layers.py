# SPDX-License-Identifier: Apache-2.0
from typing import Any

import datasets
import pytest
import torch
import transformers as hf
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from transformers import AutoModel, AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer

from endotrl import SentenceReward, SentenceRewardModel, SentenceRewardTrainer
from endotrl.sentence import SentenceRewardConfig
from endotrl.sentence.frozen_layers import FrozenLayers
from endotrl.sentence.preferences import DataCollatorForSentencePreference

from ..support.helpers import QUIET, SMALL
from .test_trainer import make_args


# Of unlike lengths, so that batches are padded.
TEXTS = {"prompt": ("What is it?", 3), "chosen": (" It is good.", 4), "rejected": (" No. Bad.", 2)}
ROWS = [{column: text * (1 + i % most) for column, (text, most) in TEXTS.items()} for i in range(12)]
DATASET = Dataset.from_list(ROWS)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def make_model(path: str, **config: Any) -> SentenceRewardModel:
    torch.manual_seed(0)
    config = SentenceRewardConfig(attention_dim=8, **config)
    return SentenceRewardModel.from_backbone(path, config, dtype=torch.float32)


def losses_and_weights(trainer: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    torch.manual_seed(0)  # of the order of rows
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log], trainer.model.state_dict()


@pytest.mark.parametrize(
    ("count", "marker", "settings"),
    [
        (1, False, {"gradient_checkpointing": True, "pad_to_multiple_of": 16}),
        (1, True, {"train_sampling_strategy": "group_by_length"}),
        (2, False, {}),
        (2, True, {"bf16": True}),
    ],
)
def test_is_training_with_layers_frozen_in_place(count, marker, settings, tiny_model_path, tmp_path):
    args = dict(per_device_train_batch_size=4, max_steps=4, learning_rate=1e-2, **settings)
    plain = make_model(tiny_model_path, marker=marker)
    for module in (plain.get_input_embeddings(), plain.marker, *plain.backbone.layers[:count]):
        if module is not None:
            module.requires_grad_(False)
    whole = SentenceRewardTrainer(plain, make_args(tmp_path, **args), train_dataset=DATASET)
    expected, weights = losses_and_weights(whole)
    model, args = make_model(tiny_model_path, marker=marker), make_args(tmp_path, freeze_layers=count, **args)
    trainer = SentenceRewardTrainer(model, args, train_dataset=DATASET, eval_dataset=DATASET)
    start = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    before = trainer.evaluate()["eval_loss"]
    losses, trained = losses_and_weights(trainer)
    assert losses == pytest.approx(expected, rel=1e-2 if "bf16" in settings else 1e-5)
    assert trainer.evaluate()["eval_loss"] < before
    for name, weight in weights.items():
        torch.testing.assert_close(trained[name], weight, rtol=1e-3, atol=2e-2 if "bf16" in settings else 1e-4)
    moved = {name for name in start if not torch.equal(start[name], trained[name])}
    assert moved == {name for name, parameter in plain.named_parameters() if parameter.requires_grad}
    ids = trainer.train_dataset[3]["chosen_ids"]  # all frozen: the prompt's end and four sentences
    assert (len(ids) == 5) == (count == 2)


SIZES = {**SMALL, "num_hidden_layers": 3, "vocab_size": 50}
GROUPED = {**SIZES, "num_key_value_heads": 1, "head_dim": 8}
WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}


@pytest.mark.parametrize(
    "config",
    [
        hf.GPT2Config(n_layer=3, n_embd=16, n_head=2, vocab_size=50),
        hf.GPTNeoXConfig(**SIZES),
        hf.OPTConfig(num_hidden_layers=3, hidden_size=16, ffn_dim=16, num_attention_heads=2, vocab_size=50),
        hf.Qwen3Config(**GROUPED),
        hf.Gemma3TextConfig(**GROUPED, **WINDOWS),
    ],
    ids=lambda config: config.model_type,
)
def test_families(config, tmp_path):
    torch.manual_seed(0)
    model = SentenceRewardModel.from_backbone(AutoModel.from_config(config), SentenceRewardConfig(attention_dim=8))
    frozen = FrozenLayers(model, 2, make_args(tmp_path))  # compares itself with the whole model
    below = [p for layer in frozen._layers for p in layer.parameters()] + [model.get_input_embeddings().weight]
    assert not any(p.requires_grad for p in below)
    assert model.marker is not None and not model.marker.weight.requires_grad
    assert any(p.requires_grad for p in model.backbone.parameters())
    # Longer than the sliding window; against what transformers calls the hidden states.
    rows = [(list(range(3, 21)), [2, 9, 17]), ([4, 5, 6, 7], [0, 3])]
    recorded = frozen._record(rows)
    frozen._check(rows, recorded)
    model.marker = None
    states = model.eval().backbone(torch.tensor([rows[0][0]]), output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(frozen._record(rows)[0].states, states[0].detach())


def test_what_cannot_start_in_the_middle(tiny_model_path, tmp_path):
    model = make_model(tiny_model_path)
    model.backbone.layers[1].mlp = model.backbone.layers[0].mlp
    with pytest.raises(ValueError, match="share weights"):
        FrozenLayers(model, 1, make_args(tmp_path))
    model = make_model(tiny_model_path)
    upper = model.backbone.layers[1]
    forward = upper.forward
    # A layer that reads the embeddings, too.
    kept: list[torch.Tensor] = []
    model.backbone.layers[0].register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    upper.forward = lambda states, **kwargs: forward(states + kept[-1] * (len(kept) % 2), **kwargs)
    with pytest.raises(ValueError, match="gives other .* from the states of layer 1"):
        FrozenLayers(model, 1, make_args(tmp_path))


def test_states_are_made_once(tiny_model_path, tmp_path, monkeypatch):
    calls: list[int] = []
    original = FrozenLayers._with_states
    monkeypatch.setattr(FrozenLayers, "_with_states", lambda self, rows: calls.append(1) or original(self, rows))

    def train(model: SentenceRewardModel, dataset: Dataset = DATASET, count: int = 1) -> SentenceRewardTrainer:
        args = make_args(tmp_path, freeze_layers=count, max_steps=1)
        return SentenceRewardTrainer(model, args, train_dataset=dataset)

    first = train(make_model(tiny_model_path))
    assert len(calls) == 1
    first.train()
    train(first.model)  # what is trained changes no state
    train(make_model(tiny_model_path, attention_init="equal", aggregator="sum"))
    assert len(calls) == 1
    train(make_model(tiny_model_path), first.train_dataset.select([3, 1]))  # has them
    assert len(calls) == 1
    other = make_model(tiny_model_path)
    other.backbone.layers[0].mlp.up_proj.weight.data[0, 0] += 1e-4
    with pytest.raises(ValueError, match="states of other frozen weights"):
        train(other, first.train_dataset)
    train(other)
    train(make_model(tiny_model_path), count=2)
    assert len(calls) == 3


def test_resumed_run_is_the_same(tiny_model_path, tmp_path):
    settings = dict(freeze_layers=1, max_steps=4, save_strategy="steps", save_steps=2, learning_rate=1e-2)
    args = make_args(tmp_path, per_device_train_batch_size=4, **settings)
    whole, again = (SentenceRewardTrainer(make_model(tiny_model_path), args, train_dataset=DATASET) for _ in range(2))
    losses, weights = losses_and_weights(whole)
    torch.manual_seed(0)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert [log["loss"] for log in again.state.log_history if "loss" in log] == pytest.approx(losses)
    for name, weight in again.model.state_dict().items():
        torch.testing.assert_close(weight, weights[name])


def test_sum_without_markers_is_trls_response_level_model(tiny_model_path, tmp_path):
    model = make_model(tiny_model_path, marker=False, aggregator="sum")
    args = dict(per_device_train_batch_size=4, max_steps=3, learning_rate=1e-2)
    trainer = SentenceRewardTrainer(model, make_args(tmp_path, freeze_layers=1, **args), train_dataset=DATASET)
    # TRL reads the last token that is not padding; that of the tiny model is EOS, which ends every response.
    classifier = AutoModelForSequenceClassification.from_pretrained(tiny_model_path, num_labels=1)
    classifier.score.weight.data.copy_(model.sentence_head.value.weight)
    for module in (classifier.model.embed_tokens, classifier.model.layers[0]):
        module.requires_grad_(False)
    config = RewardConfig(str(tmp_path / "trl"), logging_steps=1, **QUIET, **args)
    encoded = trainer.train_dataset.select_columns(["chosen_ids", "rejected_ids"])
    trainer.processing_class.pad_token = "~"
    rival = RewardTrainer(classifier, config, train_dataset=encoded, processing_class=trainer.processing_class)
    expected, _ = losses_and_weights(rival)
    assert losses_and_weights(trainer)[0] == pytest.approx(expected, rel=1e-4)


def test_the_first_layers_of_a_model_are_a_model(tiny_model_path, tmp_path):
    args = make_args(tmp_path, freeze_layers=1, marker=False, max_steps=1, model_init_kwargs={"num_hidden_layers": 1})
    trainer = SentenceRewardTrainer(tiny_model_path, args, train_dataset=DATASET)
    trainer.train()
    trainer.save_model()
    reward = SentenceReward(args.output_dir)
    assert reward.config.backbone_config.num_hidden_layers == 1
    row, row_states = ROWS[0], trainer.train_dataset[0]
    batch = trainer.data_collator([row_states])
    with trainer._frozen_layers.replaced_by(batch.pop("states")), torch.no_grad():
        expected = trainer.model.eval()(**batch).logits[:, 0].tolist()
    assert reward([row["prompt"]] * 2, [row["chosen"], row["rejected"]]) == pytest.approx(expected, abs=1e-5)


def test_what_is_refused(tiny_model_path, tmp_path, monkeypatch):
    def make(count: int = 1, dataset: Any = DATASET, **kwargs: Any) -> SentenceRewardTrainer:
        args = make_args(tmp_path, freeze_layers=count, max_steps=1)
        return SentenceRewardTrainer(make_model(tiny_model_path), args, train_dataset=dataset, **kwargs)

    with pytest.raises(ValueError, match="at most 2, the number of layers of LlamaModel, got 3"):
        make(3)
    with pytest.raises(ValueError, match="an adapter is trained"):
        make(peft_config=LoraConfig(r=2))
    with pytest.raises(ValueError, match="train dataset is an `IterableDataset`"):
        make(dataset=IterableDataset.from_generator(lambda: iter(ROWS)))
    with pytest.raises(ValueError, match="Remove `data_collator`"):
        make(data_collator=DataCollatorForSentencePreference(0)).train()
    args = make_args(tmp_path)
    monkeypatch.setattr(args.distributed_state, "distributed_type", "MULTI_CPU")
    with pytest.raises(ValueError, match="in a single process"):
        FrozenLayers(make_model(tiny_model_path), 1, args)
