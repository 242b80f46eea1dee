# SPDX-License-Identifier: Apache-2.0
import copy
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoTokenizer
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import RewardConfig

from endotrl import SentenceReward, SentenceRewardModel, SentenceRewardTrainer, SentenceRewardTrainerConfig
from endotrl.sentence.preferences import DataCollatorForSentencePreference, PairEncoder

from ..support.helpers import QUIET


def make_args(tmp_path: Path, **settings: Any) -> SentenceRewardTrainerConfig:
    defaults = {"output_dir": str(tmp_path / "run"), "gradient_checkpointing": False, "logging_steps": 1, **QUIET}
    defaults |= {"per_device_train_batch_size": 8, "attention_dim": 8}
    return SentenceRewardTrainerConfig(**{**defaults, **settings})


GOOD, BAD = "It is good. Really.", "It is bad. No way."
PROMPT = "What is it?"


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


# The same preference in the four forms that TRL's reward trainer takes.
ROWS: dict[str, dict[str, Any]] = {
    "explicit": {"prompt": PROMPT, "chosen": f" {GOOD}", "rejected": f" {BAD}"},
    "implicit": {"chosen": f"{PROMPT} {GOOD}", "rejected": f"{PROMPT} {BAD}"},
    "explicit messages": {"prompt": [user(PROMPT)], "chosen": [assistant(GOOD)], "rejected": [assistant(BAD)]},
    "implicit messages": {
        "chosen": [user(PROMPT), assistant(GOOD)],
        "rejected": [user(PROMPT), assistant(BAD)],
    },
}


@pytest.mark.parametrize("form", ROWS)
def test_every_form_of_a_preference(form, tiny_model_path, tmp_path):
    dataset = Dataset.from_list([ROWS[form]] * 4)
    trainer = SentenceRewardTrainer(tiny_model_path, make_args(tmp_path), train_dataset=dataset)
    row = trainer.train_dataset[0]
    tokenizer = trainer.processing_class
    for which, text in (("chosen", GOOD), ("rejected", BAD)):
        ids, ends = row[f"{which}_ids"], row[f"{which}_ends"]
        assert len(ends) == 3
        # Without the markers the tokens are the text, up to its end; and between the ends are its sentences.
        pieces = [tokenizer.decode(ids[start + 1 : end]) for start, end in zip(ends, ends[1:], strict=False)]
        shared = "It is " if form == "implicit" else ""  # both start so, and what both start with is the prompt
        assert "".join(pieces).strip() == text.removeprefix(shared) + "<|im_end|>"
        assert pieces[0].strip() == text.split(".")[0].removeprefix(shared) + "."
        assert PROMPT in tokenizer.decode(ids[: ends[0]])
    assert row["length"] == max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def test_implicit_prompts_are_cut_between_words(tiny_model_path):
    config = SentenceRewardModel.from_backbone(tiny_model_path).config
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    encode = PairEncoder(tokenizer, config)
    row = encode({"chosen": "Human: hi\nBot: I can. Yes", "rejected": "Human: hi\nBot: I can't. No"})
    assert tokenizer.decode(row["chosen_ids"][: row["chosen_ends"][0]]) == "Human: hi\nBot: I"
    assert tokenizer.decode(row["chosen_ids"][row["chosen_ends"][0] + 1 : row["chosen_ends"][1]]).strip() == "can."
    # Nothing in common: there is still a state before the response.
    for chosen, rejected in (("Yes.", "No."), ("Yes.", "Yesterday."), ("Yes.", "Yes."), ("", "")):
        row = encode({"chosen": chosen, "rejected": rejected})
        assert row["chosen_ids"][0] == tokenizer.eos_token_id
        assert row["chosen_ends"][0] == 1
        assert tokenizer.decode(row["chosen_ids"][2:-1]) == chosen + "<|im_end|>"


def test_first_step_is_the_loss_by_hand(tiny_model_path, tmp_path):
    rows = [{**ROWS["explicit"], "margin": margin} for margin in (0.0, 0.5, -2.0, 1.0)]
    centered = {"center_rewards_coefficient": 0.1, "center_sentences_coefficient": 20.0}
    args = make_args(tmp_path, max_steps=1, per_device_train_batch_size=4, **centered)
    trainer = SentenceRewardTrainer(tiny_model_path, args, train_dataset=Dataset.from_list(rows))
    reward = SentenceReward(copy.deepcopy(trainer.model), processing_class=trainer.processing_class)
    scores = reward.score([PROMPT] * 2, [f" {GOOD}", f" {BAD}"])
    chosen, rejected = (row.score for row in scores)
    sentences = torch.cat([row.sentence_rewards[1:] for row in scores])  # two of each, without the prompt's
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["largest_weight"] == pytest.approx(sum(max(row.weights.tolist()) for row in scores) / 2, abs=1e-5)
    margins = torch.tensor([row["margin"] for row in rows])
    loss = -torch.nn.functional.logsigmoid(chosen - rejected - margins).mean() + 0.1 * (chosen + rejected) ** 2
    loss += 20.0 * sum(sentences**2) / 4
    assert log["loss"] == pytest.approx(loss.item(), abs=1e-4)
    assert log["margin"] == pytest.approx(chosen - rejected, abs=1e-4)
    assert log["accuracy"] == float(chosen > rejected)


@pytest.mark.parametrize(
    ("given", "expected", "adapter"),
    [(None, 1e-2 / (4 * math.sqrt(8)), False), (3e-3, 3e-3, False), (0.0, 0.0, False), (3e-3, 3e-3, True)],
)
def test_attention_has_a_learning_rate_of_its_own(given, expected, adapter, tiny_model_path, tmp_path):
    # The first step of Adam moves every entry by its learning rate, whatever the gradient is.
    rates = {"learning_rate": 1e-2, "attention_learning_rate": given, "weight_decay": 0.0, "max_grad_norm": 1e9}
    kwargs = {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])} if adapter else {}
    dataset = Dataset.from_list([ROWS["explicit"]] * 8)
    args = make_args(tmp_path, max_steps=1, **rates)
    trainer = SentenceRewardTrainer(tiny_model_path, args, train_dataset=dataset, **kwargs)
    parameters = {name.split(".")[-2]: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    before = {name: parameters[name].detach().clone() for name in ("query", "key", "value")}
    trainer.train()
    moved = {name: (parameters[name] - weight).abs().max().item() for name, weight in before.items()}
    assert moved == pytest.approx({"query": expected, "key": expected, "value": 1e-2}, rel=0.02)
    assert trainer.state.log_history[0]["learning_rate"] == 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(("marker", "aggregator"), [(True, "attention"), (False, "attention"), (True, "sum")])
def test_learns_a_preference(marker, aggregator, tiny_model_path, tmp_path):
    # Responses that say "Paris" in one of their sentences are preferred: told from the others by what they say, not by
    # length or place. Held out are other combinations of sentences.
    fillers = ["It is.", "What is it?", "The tool is.", "I am.", "So it is.", "Yes it is."]
    rows = []
    for first, second, place in itertools.product(fillers, fillers, range(3)):
        good, bad = [first, second], [first, second]
        good.insert(place, "Paris is.")
        bad.insert((place + 1) % 3, "Italy is.")
        rows.append({"prompt": "Hi?", "chosen": " " + " ".join(good), "rejected": " " + " ".join(bad)})
    dataset = Dataset.from_list(rows).train_test_split(0.25, seed=0)
    args = make_args(
        tmp_path, marker=marker, aggregator=aggregator, learning_rate=5e-3, num_train_epochs=2, eval_strategy="epoch"
    )
    trainer = SentenceRewardTrainer(
        tiny_model_path, args, train_dataset=dataset["train"], eval_dataset=dataset["test"]
    )
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    untrained = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] > max(0.9, untrained)
    # In the plain sum, v_N, of a pair the bias cancels; all else is trained.
    same = {name for name, weight in trainer.model.named_parameters() if torch.equal(before[name], weight)}
    assert same == ({"sentence_head.value.bias"} if aggregator == "sum" else set())


def test_default_lora_is_that_of_the_backbone(tiny_model_path, tmp_path):
    args = make_args(tmp_path)
    adapter = LoraConfig(r=2)
    trainer = SentenceRewardTrainer(
        tiny_model_path, args, train_dataset=Dataset.from_list([ROWS["explicit"]] * 4), peft_config=adapter
    )
    adapted = {name.split(".lora_")[0] for name, _ in trainer.model.named_parameters() if "lora_" in name}
    # What PEFT adapts in a Llama: the queries and values of both layers.
    assert {name.split(".")[-1] for name in adapted} == {"q_proj", "v_proj"} and len(adapted) == 4
    assert adapter.target_modules is None  # the caller's stays as it is


@pytest.mark.slow
def test_lora_adapter_is_saved_and_loaded(tiny_model_path, tmp_path):
    dataset = Dataset.from_list([ROWS["explicit messages"]] * 16)
    args = make_args(tmp_path, learning_rate=1e-2, gradient_checkpointing=True, max_steps=3, aggregator="sum")
    peft_config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SentenceRewardTrainer(tiny_model_path, args, train_dataset=dataset, peft_config=peft_config)
    assert peft_config.modules_to_save is None and peft_config.task_type == "CAUSAL_LM"  # the caller's stays as it is
    trainer.train()
    trainer.save_model()
    assert not (Path(args.output_dir) / "model.safetensors").exists()
    pairs = dict(prompts=[[user(PROMPT)]] * 2, completions=[[assistant(GOOD)], [assistant(BAD)]])
    loaded = SentenceReward(args.output_dir)
    trained = SentenceReward(trainer.model, processing_class=trainer.processing_class)
    untrained = SentenceReward(SentenceRewardModel.from_backbone(tiny_model_path), trainer.processing_class)
    assert loaded(**pairs) == pytest.approx(trained(**pairs), abs=1e-4)
    assert loaded(**pairs) != pytest.approx(untrained(**pairs), abs=1e-2)
    assert loaded.config.aggregator == "sum"


@pytest.mark.slow
def test_a_trained_model_is_trained_further(tiny_model_path, tmp_path):
    dataset = Dataset.from_list([ROWS["explicit"]] * 16)
    args = make_args(tmp_path, max_steps=1, marker=False, segmenter="rules", save_strategy="steps", save_steps=1)
    trainer = SentenceRewardTrainer(tiny_model_path, args, train_dataset=dataset)
    trainer.train()
    checkpoint = Path(args.output_dir) / "checkpoint-1"
    card = (Path(args.output_dir) / "README.md").read_text()
    assert "sentence-reward" in card and "2503.04793" in card
    assert f'SentenceReward("{args.output_dir}")' in card and "pipeline" not in card
    assert json.loads((checkpoint / "config.json").read_text())["model_type"] == "sentence_reward"
    # `args` of the second run ask for markers; the model that is there has none.
    again = SentenceRewardTrainer(str(checkpoint), make_args(tmp_path, max_steps=1), train_dataset=dataset)
    assert again.model.marker is None
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], weight), name
    again.train()


def test_streamed_datasets_and_grouping_by_length(tiny_model_path, tmp_path):
    rows = [{**ROWS["explicit"], "chosen": " Yes." * n} for n in range(1, 17)]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    args = make_args(tmp_path, max_steps=2)
    SentenceRewardTrainer(tiny_model_path, args, train_dataset=stream).train()

    args = make_args(tmp_path, train_sampling_strategy="group_by_length", per_device_train_batch_size=4)
    trainer = SentenceRewardTrainer(tiny_model_path, args, train_dataset=Dataset.from_list(rows))
    sampler = trainer.get_train_dataloader().batch_sampler.sampler
    assert isinstance(sampler, LengthGroupedSampler)
    # The longer response of a row is the chosen one from the second " Yes." on or so: lengths rise.
    assert sampler.lengths == list(trainer.train_dataset["length"]) == sorted(sampler.lengths)


def test_long_rows_are_left_out(tiny_model_path, tmp_path, caplog):
    rows = [ROWS["explicit"], {**ROWS["explicit"], "chosen": " Yes." * 40}]
    args = make_args(tmp_path, max_length=100)
    trainer = SentenceRewardTrainer(tiny_model_path, args, train_dataset=Dataset.from_list(rows))
    assert len(trainer.train_dataset) == 1
    assert "1 of 2 rows of the train dataset are longer than `max_length=100`" in caplog.text
    with pytest.raises(ValueError, match="1 of 1 rows .* no rows are left"):
        SentenceRewardTrainer(tiny_model_path, args, train_dataset=Dataset.from_list(rows[1:]))


def test_segments_once(tiny_model_path, tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{**ROWS["explicit"], "chosen": f" {tmp_path.name}. Yes."}] * 4))
    calls = []
    original = PairEncoder.__call__
    monkeypatch.setattr(PairEncoder, "__call__", lambda self, row: calls.append(1) or original(self, row))
    for _ in range(2):
        dataset = Dataset.from_json(str(path), cache_dir=str(tmp_path / "cache"))
        SentenceRewardTrainer(tiny_model_path, make_args(tmp_path), train_dataset=dataset)
    assert len(calls) in (4, 5)  # `map` may try the first row before


def test_own_segmenter(tiny_model_path, tmp_path):
    def whole(text: str) -> list[tuple[int, int]]:
        return [(0, len(text))] if text else []

    dataset = Dataset.from_list([ROWS["explicit"]] * 4)
    trainer = SentenceRewardTrainer(tiny_model_path, make_args(tmp_path), segmenter=whole, train_dataset=dataset)
    assert len(trainer.train_dataset[0]["chosen_ends"]) == 2
    trainer.save_model()
    with pytest.raises(ValueError, match="Pass the same one as `segmenter`"):
        SentenceReward(str(tmp_path / "run"))
    SentenceReward(str(tmp_path / "run"), segmenter=whole)


WITHOUT_REJECTED = Dataset.from_list([{"prompt": "a", "chosen": "b"}])
VIRTUAL_TOKENS = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
WITHOUT_SENTENCES = Dataset.from_list([{"chosen_ids": [1, 2], "rejected_ids": [1]}])


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"model": 7}, TypeError, "`model` must be a `SentenceRewardModel`, got int.*from_backbone"),
        ({"args": RewardConfig("never", use_cpu=True, bf16=False)}, TypeError, "`args` must be .* got RewardConfig"),
        ({"train_dataset": WITHOUT_REJECTED}, ValueError, r"columns \['prompt', 'chosen'\].*`rejected`"),
        ({"train_dataset": WITHOUT_SENTENCES}, ValueError, "tokenized without sentences"),
        ({"peft_config": VIRTUAL_TOKENS}, ValueError, "virtual tokens, are not supported"),
    ],
)
def test_what_is_refused(given, error, message, tiny_model_path, tmp_path):
    dataset = Dataset.from_list([ROWS["explicit"]] * 4)
    defaults = {"model": tiny_model_path, "args": make_args(tmp_path), "train_dataset": dataset}
    with pytest.raises(error, match=message):
        SentenceRewardTrainer(**{**defaults, **given})


def test_an_adapter_without_the_head_is_refused(tiny_model_path, tmp_path):
    model = get_peft_model(SentenceRewardModel.from_backbone(tiny_model_path), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"modules_to_save=\['sentence_head', 'marker'\]"):
        SentenceRewardTrainer(model, make_args(tmp_path), train_dataset=Dataset.from_list([ROWS["explicit"]]))


@pytest.mark.parametrize("name", ["attention_learning_rate", "center_sentences_coefficient", "freeze_layers"])
def test_negative_settings_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match=f"`{name}` must not be negative, got -1"):
        make_args(tmp_path, **{name: -1})


def test_collator():
    collator = DataCollatorForSentencePreference(pad_token_id=9)
    row = {"chosen_ids": [1, 2, 3], "chosen_ends": [0, 2], "rejected_ids": [4], "rejected_ends": [0], "margin": 0.5}
    batch = collator([row, {**row, "margin": 1.0}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [1, 2, 3], [4, 9, 9], [4, 9, 9]]
    assert batch["sentence_ends"].tolist() == [[0, 2], [0, 2], [0, -1], [0, -1]]
    assert batch["margin"].tolist() == [0.5, 1.0]
