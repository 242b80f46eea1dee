# SPDX-License-Identifier: Apache-2.0
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from endotrl import EndogenousReward, SentenceReward, SentenceRewardModel
from endotrl.rewards import DenseReward, DenseScores, SentencePooledReward
from endotrl.sentence import SentenceRewardConfig

from ..support.helpers import encode


PROMPTS = ["What is it?", "Hi?", "So?", "And?"]
COMPLETIONS = ["It is good. Really. Yes", "No.", "", "One.\n\n- two\n- three. Four"]


@pytest.fixture(scope="module")
def model_path(tiny_model_path, tmp_path_factory):
    """A sentence reward model with random heads, and its tokenizer."""
    path = str(tmp_path_factory.mktemp("models") / "sentence-reward")
    torch.manual_seed(0)
    model = SentenceRewardModel.from_backbone(tiny_model_path, SentenceRewardConfig(attention_dim=8))
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_model_path).save_pretrained(path)
    return path


def messages(role: str, texts: list[str]) -> list[list[dict[str, str]]]:
    return [[{"role": role, "content": text}] for text in texts]


@pytest.mark.parametrize("kind", ["text", "messages"])
def test_dense_rewards_stand_at_sentence_ends_and_sum_to_the_score(model_path, kind):
    reward = SentenceReward(model_path)
    prompts: Any = PROMPTS if kind == "text" else messages("user", PROMPTS)
    completions: Any = COMPLETIONS if kind == "text" else messages("assistant", COMPLETIONS)
    scores, token_rewards, values = reward.outcome_and_token_rewards(prompts, completions)
    assert values is None
    assert scores == reward(prompts=prompts, completions=completions)
    for score, rewards, row in zip(scores, token_rewards, reward.score(prompts, completions), strict=True):
        assert rewards.sum().item() == pytest.approx(score, abs=1e-5)
        assert rewards.nonzero().flatten().tolist() == row.sentences.last_tokens
        terms = row.weights * row.sentence_rewards
        # The prompt's own term comes with the first sentence's.
        expected = [terms[0] + terms[1], *terms[2:]]
        assert rewards[row.sentences.last_tokens].tolist() == pytest.approx([float(e) for e in expected])
    assert [len(row.sentences.spans) for row in reward.score(prompts, completions)] == [3, 1, 1, 4]


def test_batches_and_order_change_nothing(model_path):
    one_by_one = SentenceReward(model_path, max_tokens_per_batch=1)
    together = SentenceReward(model_path)
    expected = [together([p], [c])[0] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert one_by_one(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-5)
    assert together(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-5)
    assert together(PROMPTS[::-1], COMPLETIONS[::-1]) == pytest.approx(expected[::-1], abs=1e-5)


def test_neighbours_of_another_length_change_nothing(tiny_model_path, tmp_path):
    # transformers takes other rotary frequencies for a pass of more than 16 tokens.
    rope: dict[str, Any] = {"rope_type": "longrope", "rope_theta": 1e4}
    config = AutoConfig.from_pretrained(tiny_model_path)
    half = config.head_dim // 2
    rope |= {"short_factor": [1.0] * half, "long_factor": [4.0] * half, "original_max_position_embeddings": 16}
    config.rope_parameters = rope
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = SentenceRewardModel.from_backbone(str(tmp_path), SentenceRewardConfig(attention_dim=8)).eval()
    reward = SentenceReward(model, AutoTokenizer.from_pretrained(tiny_model_path))
    completions = ["No.", "Yes. " * 20, "It is."]
    alone = [reward(["Hi?"], [completion])[0] for completion in completions]
    assert reward(["Hi?"] * 3, completions) == pytest.approx(alone, abs=1e-5)
    # The split matters: a pass with both lengths gives different numbers.
    model.config.get_text_config().rope_parameters["rope_type"] = "default"
    assert reward(["Hi?"] * 3, completions) != pytest.approx(alone, abs=1e-5)


def test_the_policys_tokens_are_scored_as_they_are(model_path):
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    reward = SentenceReward(model_path)
    text = "It is. No."
    ids = [i for character in text for i in encode(tokenizer, character)]
    ended = [*ids, tokenizer.eos_token_id]
    scores, token_rewards, _ = reward.outcome_and_token_rewards(["Hi?"] * 2, [text] * 2, [ids, ended])
    assert [len(rewards) for rewards in token_rewards] == [len(ids), len(ids) + 1]
    assert token_rewards[0].nonzero().flatten().tolist() == [6, 9]  # after "It is. ", where the space is a token
    assert token_rewards[1].nonzero().flatten().tolist() == [6, 10]  # at EOS
    assert scores[0] != scores[1]
    assert scores[1] != reward(["Hi?"], [text])[0]  # other tokens than the tokenizer's own


def test_policy_with_another_tokenizer(model_path, tiny_policy_path, caplog):
    # The policy's tokens are words; its vocabulary has "a" to "l", and no full stop but by name.
    policy_tokenizer = AutoTokenizer.from_pretrained(tiny_policy_path)

    def by_letter(text: str) -> list[tuple[int, int]]:
        """A sentence ends behind every "c"."""
        ends = [i + 1 for i, character in enumerate(text) if character == "c"]
        ends = [end for end in ends if end < len(text)] + ([len(text)] if text else [])
        return list(zip([0, *ends], ends, strict=False))

    reward = SentenceReward(model_path, segmenter=by_letter)
    text = "a b c d c e"
    ids = [*encode(policy_tokenizer, text), policy_tokenizer.eos_token_id]
    assert len(ids) == 7
    with pytest.raises(ValueError, match="policy_processing_class"):
        reward.outcome_and_token_rewards(["a b"], [text], [ids])
    reward = SentenceReward(model_path, segmenter=by_letter, policy_processing_class=policy_tokenizer)
    scores, (token_rewards,), _ = reward.outcome_and_token_rewards(["a b"], [text], [ids])
    (row,) = reward.score(["a b"], [text], [ids])
    assert len(row.completion_ids) > len(ids)
    # a b c | d c | e <eos>
    assert token_rewards.nonzero().flatten().tolist() == [2, 4, 6]
    torch.testing.assert_close(token_rewards[[2, 4, 6]], row.contributions)
    assert scores[0] == reward(["a b"], [text])[0]
    assert not [record for record in caplog.records if "approximate" in record.message]


def test_logs(model_path):
    metrics: dict[str, float] = {}
    columns: dict[str, list[Any]] = {}
    reward = SentenceReward(model_path, name="mine")
    reward(PROMPTS, COMPLETIONS, log_extra=columns.__setitem__, log_metric=metrics.__setitem__)
    assert metrics == {"mine/sentences": 9 / 4}
    rows = reward.score(PROMPTS, COMPLETIONS)
    start, end = rows[0].sentences.spans[rows[0].contributions.argmin()]
    assert columns["mine/weakest_sentence"][0] == rows[0].sentences.text[start:end].strip()
    assert columns["mine/weakest_sentence"][1:3] == ["No.<|im_end|>", "<|im_end|>"]


def test_pickles_and_loaded_models(model_path):
    reward = SentenceReward(model_path, name="mine")
    expected = reward(PROMPTS, COMPLETIONS)
    data = pickle.dumps(reward)
    assert len(data) < 100_000  # no weights
    again = pickle.loads(data)
    assert again(PROMPTS, COMPLETIONS) == expected and again.__name__ == "mine"
    model = SentenceRewardModel.from_pretrained(model_path).train()
    loaded = SentenceReward(model)
    assert loaded(PROMPTS, COMPLETIONS) == expected and model.training
    with pytest.raises(TypeError, match="Save the model"):
        pickle.dumps(loaded)


def test_what_is_refused(tiny_model_path, model_path, tmp_path):
    with pytest.raises(ValueError, match="not a sentence reward model"):
        SentenceReward(AutoModelForCausalLM.from_pretrained(tiny_model_path))
    with pytest.raises(ValueError, match="`overlong_prompt` is 'cut'"):
        SentenceReward(model_path, overlong_prompt="cut")
    with pytest.raises(TypeError, match="`model` is a int"):
        SentenceReward(7)
    with pytest.raises(OSError, match="nowhere"):
        SentenceReward("nowhere")
    with pytest.raises(ValueError, match="more than the 256"):  # tokens of context
        SentenceReward(model_path)(["Hi?"], ["A b. " * 5000])
    model = SentenceRewardModel.from_pretrained(model_path)
    with torch.no_grad():
        model.sentence_head.value.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="rows 0, 1 of 2"):
        SentenceReward(model)(PROMPTS[:2], COMPLETIONS[:2])
    model.config._name_or_path = ""
    with pytest.raises(ValueError, match="processing_class"):
        SentenceReward(model)(PROMPTS, COMPLETIONS)


def test_pooled_endogenous_reward_is_a_difference_of_values(tiny_model_path, tokenizer):
    inner = EndogenousReward(tiny_model_path)
    pooled = SentencePooledReward(inner, tokenizer)
    assert isinstance(pooled, DenseReward)
    text = "It is. The capital."
    ids = [*encode(tokenizer, text), tokenizer.eos_token_id]
    arguments: dict[str, Any] = dict(prompts=["Hi?"], completions=[text], completion_ids=[ids])
    scores = pooled.outcome_and_token_rewards(**arguments)
    assert isinstance(scores, DenseScores)
    assert scores.outcomes == pooled(**arguments) == inner(**arguments)
    (stats,) = inner.score(**arguments)
    end = ids.index(encode(tokenizer, "The")[0])  # where the second sentence starts
    values, log_probs = stats.soft_values, stats.log_probs
    rewards = scores.token_rewards[0]
    assert rewards.nonzero().flatten().tolist() == [end - 1, len(ids) - 1]
    # alpha log pi(sentence | context) + V(start) - V(end), with no value after the end.
    first = log_probs[:end].sum() + values[0] - values[end]
    second = log_probs[end:].sum() + values[end]
    torch.testing.assert_close(rewards[[end - 1, len(ids) - 1]], torch.stack([first, second]), rtol=1e-4, atol=1e-4)
    # A baseline stays one: the value of a state, and what its sentence has earned so far.
    assert scores.state_values is not None
    for h in range(len(ids)):
        start = 0 if h < end else end
        expected = values[h] + log_probs[start:h].sum() + values[start] - values[h]
        assert scores.state_values[0][h].item() == pytest.approx(float(expected), abs=1e-3)


def returning(*scores: Any) -> Any:
    """A dense reward that always returns the same."""
    return SimpleNamespace(outcome_and_token_rewards=lambda **batch: DenseScores(*scores))


def test_pooled_rewards_skip_what_tools_wrote(tokenizer):
    ids = encode(tokenizer, "It is. A. tool. So")
    start, stop = 7, 12  # a tool wrote what is between
    given = torch.arange(1.0, len(ids) + 1)
    given[start:stop] = 0.0
    pooled = SentencePooledReward(returning([given.sum().item()], [given]), tokenizer)
    turns = [{"role": role, "content": "x"} for role in ("assistant", "tool", "assistant")]
    scores = pooled.outcome_and_token_rewards(prompts=[[turns[0]]], completions=[turns], completion_ids=[ids])
    rewards = scores.token_rewards[0]
    assert rewards[start:stop].count_nonzero() == 0
    assert rewards.sum().item() == scores.outcomes[0]
    with pytest.raises(ValueError, match="completion_ids"):
        pooled.outcome_and_token_rewards(prompts=["a"], completions=["b"])


def test_pooled_rewards_do_not_read_what_has_no_outcome(tokenizer):
    ids = encode(tokenizer, "It is. A.")
    given = [torch.empty(0), torch.ones(len(ids))]
    pooled = SentencePooledReward(returning([None, float(len(ids))], given, given), tokenizer)
    batch = {"prompts": ["a"], "completions": ["It is. A."], "completion_ids": [ids]}
    scores = pooled.outcome_and_token_rewards(**{name: column * 2 for name, column in batch.items()})
    assert scores.outcomes == [None, len(ids)]
    assert scores.token_rewards[1].sum() == len(ids)
    assert scores.state_values is not None and len(scores.state_values) == 2
    with pytest.raises(TypeError, match="`reward` is a function"):
        SentencePooledReward(lambda **kwargs: [1.0], tokenizer)
