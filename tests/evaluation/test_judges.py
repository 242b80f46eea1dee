# SPDX-License-Identifier: Apache-2.0
"""Judges and reward models against naive passes over one sequence at a time."""

import itertools
import shutil

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BloomConfig,
    GPT2Config,
    MambaConfig,
)

from endotrl.evaluation import model_scorers
from endotrl.evaluation.engine import Engine
from endotrl.evaluation.items import Item
from endotrl.evaluation.model_scorers import Judge, RewardModel
from endotrl.evaluation.scorers import check_names, make_scorer
from endotrl.frozen.own_copy import OwnCopy

from ..support.reference import chatml


@pytest.fixture
def items():
    return [Item("a", "g", "1+1?", ("2", "3")), Item("b", "g", "Hi", ("Hello", "Go", "No"), criterion="Be kind.")]


# Families without position ids: positions by distance, and a state.
OTHER_FAMILIES = {
    "bloom": BloomConfig(hidden_size=32, n_layer=2, n_head=4),
    "mamba": MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256),
}


def reply_probabilities(model, tokenizer, ids, words):
    """Of replies to one prompt, alone."""
    with torch.no_grad():
        logits = model(torch.tensor([ids[-256:]])).logits[0, -1]
    return logits[[tokenizer(word)["input_ids"][0] for word in words]].softmax(-1).tolist()


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_families(family, items, tokenizer, tmp_path):
    """A judge of a family whose forward pass has no `position_ids` says what a pass of one prompt says."""
    config = OTHER_FAMILIES[family]
    config.vocab_size, config.eos_token_id = len(tokenizer), tokenizer.eos_token_id
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    judge = Judge("judge_verifier", Engine(OwnCopy(str(tmp_path), device="cpu")))
    expected = []
    for prompt in [judge._question(item, i) for item in items for i in range(len(item.responses))]:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        expected.append(reply_probabilities(model, tokenizer, ids, ("Yes", "No"))[0])
    assert sum(judge.score_items(items), []) == pytest.approx(expected, abs=1e-5)


@pytest.fixture
def naive(model, tokenizer):
    def probabilities(prompt, words):
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return reply_probabilities(model, tokenizer, ids, words)

    return probabilities


def asked(text, system=None):
    messages = [{"role": "system", "content": system}] if system else []
    return chatml([*messages, {"role": "user", "content": text}], generation_prompt=True)


class TestJudge:
    def test_pairwise_in_both_orders(self, engine, items, naive, monkeypatch):
        # A short question, so that it fits the tiny model's context.
        monkeypatch.setitem(model_scorers._ASK, "judge_pairwise", ("{question}|{first}|{second}|", "A or B?"))
        judge = Judge("judge_pairwise", engine)
        ab, ba = naive(asked("1+1?|2|3|A or B?"), "AB"), naive(asked("1+1?|3|2|A or B?"), "AB")
        expected = [(ab[0] + ba[1]) / 2, (ab[1] + ba[0]) / 2]
        assert judge.score(items[0], []) == pytest.approx(expected, abs=1e-5)
        assert sum(expected) == pytest.approx(1.0)
        # Three answers: each pair in both orders; the criterion is the system message.
        texts, wins = items[1].responses, [0.0] * 3
        for i, j in itertools.permutations(range(3), 2):
            p = naive(asked(f"Hi|{texts[i]}|{texts[j]}|A or B?", system="Be kind."), "AB")
            wins[i] += p[0] / 4
            wins[j] += p[1] / 4
        assert judge.score(items[1], []) == pytest.approx(wins, abs=1e-5)

    def test_pointwise_is_an_expectation(self, engine, items, naive, monkeypatch):
        monkeypatch.setitem(model_scorers._ASK, "judge_pointwise", ("{question}|{first}|", "1 to 9?"))
        scores = Judge("judge_pointwise", engine).score(items[0], [])
        for answer, score in zip("23", scores, strict=True):
            p = naive(asked(f"1+1?|{answer}|1 to 9?"), "123456789")
            assert score == pytest.approx(sum((k + 1) * p[k] for k in range(9)), abs=1e-4)
            assert 1 <= score <= 9

    @pytest.mark.parametrize("name", model_scorers.JUDGES)
    def test_one_by_one_equals_together(self, engine, items, name):
        judge = Judge(name, engine)
        together = judge.score_items(items)
        assert [len(row) for row in together] == [2, 3]
        assert name == "judge_pointwise" or all(0 < score < 1 for row in together for score in row)
        for item, row in zip(items, together, strict=True):
            assert judge.score(item, []) == pytest.approx(row, abs=1e-5)


class TestRewardModel:
    @pytest.mark.parametrize("chat", [True, False])
    def test_last_token(self, chat, placement, reward_model_path, items):
        model = AutoModelForSequenceClassification.from_pretrained(reward_model_path).eval()
        tokenizer = AutoTokenizer.from_pretrained(reward_model_path)
        items = items if chat else items[:1]  # a criterion is a message
        expected = []
        for item, response in [(each, response) for each in items for response in each.responses]:
            messages = [{"role": "system", "content": item.criterion}] if item.criterion else []
            messages += [{"role": "user", "content": item.prompt}, {"role": "assistant", "content": response}]
            text = chatml(messages) if chat else item.prompt + response + "<|im_end|>"
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                hidden = model.model(torch.tensor([ids])).last_hidden_state[0]
            # transformers reads the last token that is not padding; here padding is the token that ends turns.
            last = max(i for i, token in enumerate(ids) if token != tokenizer.pad_token_id)
            expected.append(model.score(hidden[last]).item())
        scores = RewardModel(reward_model_path, Engine(placement, chat=chat), device="cpu").score_items(items)
        assert [score for row in scores for score in row] == pytest.approx(expected, abs=1e-4)

    def test_a_checkpoint_without_its_head(self, engine, tiny_model_path, reward_model_path, tmp_path):
        # transformers would fill the head with random numbers.
        AutoModelForCausalLM.from_pretrained(tiny_model_path).save_pretrained(tmp_path)
        AutoTokenizer.from_pretrained(tiny_model_path).save_pretrained(tmp_path)
        shutil.copy(f"{reward_model_path}/config.json", tmp_path)
        with pytest.raises(OSError, match=r"lacks weights: score\.weight"):
            make_scorer(f"reward_model:{tmp_path}", engine, device="cpu")

    def test_code_of_its_own(self, engine, reward_model_path, items, own_code):
        path = own_code(reward_model_path)
        name = f"reward_model:{path}"
        with pytest.raises(OSError, match="trust_remote_code"):
            make_scorer(name, engine, device="cpu")
        check_names([name], trust_remote_code=True)
        scorer = make_scorer(name, engine, device="cpu", trust_remote_code=True)
        expected = RewardModel(reward_model_path, engine, device="cpu").score_items(items)
        assert scorer.score_items(items) == expected
