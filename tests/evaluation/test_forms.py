# SPDX-License-Identifier: Apache-2.0
"""Forms of the reward against naive formulas, on the logits of one sequence at a time."""

import math

import pytest
import torch

from endotrl import EndogenousReward
from endotrl.evaluation.engine import Engine, step_spans
from endotrl.evaluation.forms import Control, Form, RelativePerplexity
from endotrl.evaluation.items import Item, step_item
from endotrl.evaluation.scorers import SETS, STEP_SETS, base_names, expand_names, make_form
from endotrl.rewards.residuals import markdown_density, residuals

from ..support.reference import chatml, scores_from_logits, state_logits, token_rewards


@pytest.fixture(scope="module")
def item():
    responses = ("Rome.", "The capital of Italy is Rome, the city.", "")
    return Item("x", "g", "What is the capital of Italy?", responses, ((0, 1),))


@pytest.fixture(scope="module")
def references(item, model, tokenizer):
    """Logits of each response at its states, and its tokens."""
    text = chatml([{"role": "user", "content": item.prompt}], generation_prompt=True)
    prompt = tokenizer(text, add_special_tokens=False)
    rows = []
    for response in item.responses:
        ids = tokenizer(response + "<|im_end|>", add_special_tokens=False)["input_ids"]
        logits = state_logits(model, prompt["input_ids"], ids)
        rows.append((logits, ids, scores_from_logits(logits, ids, alpha=1.0)))
    return rows


@pytest.fixture
def scored(placement, item):
    return Engine(placement).score([item], alone=True)[0]


def score(name, item, scored):
    return Form.parse(name).score(item, scored)


class TestForms:
    @pytest.mark.parametrize("token", ["bellman", "log_prob", "centered"])
    @pytest.mark.parametrize(
        ("aggregate", "of_row"),  # token rewards, and V of the prompt, which Bellman rewards have in their sum
        [
            ("sum", lambda row, v: sum(row) - v),
            ("mean", lambda row, v: (sum(row) - v) / len(row)),
            ("discounted=0.9", lambda row, v: sum(0.9**h * r for h, r in enumerate(row))),
            ("power=0.7", lambda row, v: (sum(row) - v) / len(row) ** 0.7),
            ("first=3", lambda row, v: sum(row[:3]) - v),
            ("min", lambda row, v: min(row)),
        ],
    )
    def test_of_token_rewards(self, token, aggregate, of_row, item, scored, references):
        expected = []
        for *_, ref in references:
            first = ref.values[0] if token == "bellman" else 0.0
            expected.append(of_row(token_rewards(ref, token, 1.0, 1.0, True, "terminal"), first))
        assert score(f"{token}.{aggregate}", item, scored) == pytest.approx(expected, abs=1e-4)

    def test_contributions_are_of_single_tokens(self, item, scored, references):
        log_probs = references[0][2].log_probs
        found = Form.parse("bellman.sum").contributions(scored[0])
        assert found.tokens.tolist() == pytest.approx(log_probs, abs=1e-4)
        found = Form.parse("log_prob.min").contributions(scored[0])
        lowest = min(range(len(log_probs)), key=lambda h: log_probs[h])
        expected = [log_probs[h] if h == lowest else 0.0 for h in range(len(log_probs))]
        assert found.tokens.tolist() == pytest.approx(expected, abs=1e-4)

    def test_gain_and_relative_perplexity(self, item, scored, references, model, tokenizer):
        empty = tokenizer(chatml([{"role": "user", "content": ""}], generation_prompt=True), add_special_tokens=False)
        gains, relative = [], []
        for _, ids, ref in references:
            alone = scores_from_logits(state_logits(model, empty["input_ids"], ids), ids, 1.0).log_probs
            gains.append(sum(ref.log_probs) - sum(alone))
            with_prompt, without = (math.exp(-sum(row) / len(row)) for row in (ref.log_probs, alone))
            relative.append(max(-1.0, min(1.0, (without - with_prompt) / without)))
        assert score("gain.sum", item, scored) == pytest.approx(gains, abs=3e-4)
        assert RelativePerplexity().score(item, scored) == pytest.approx(relative, abs=1e-4)

    def test_controls(self, item, scored, references):
        lengths = [float(len(ids)) for _, ids, _ in references]
        assert Control("length").score(item, scored) == lengths
        assert Control("shortness").score(item, scored) == [-n for n in lengths]
        draws = Control("random").score(item, scored)
        assert draws == Control("random").score(item, scored) and len(set(draws)) == 3

    @pytest.mark.parametrize("name", ["bellman.first=3", "negative_entropy.mean", "self_certainty.sum"])
    def test_the_same_as_the_reward(self, name, item, scored, tiny_model_path):
        token_reward, aggregate = name.split(".", 1)
        reward = EndogenousReward(tiny_model_path, token_reward=token_reward, aggregate=aggregate, device="cpu")
        prompts = [[{"role": "user", "content": item.prompt}]] * 3
        completions = [[{"role": "assistant", "content": text}] for text in item.responses]
        assert score(name, item, scored) == pytest.approx(reward(prompts=prompts, completions=completions), abs=1e-5)

    def test_cut_responses_are_scored_by_their_beginning(self, placement, item, references):
        cut = Engine(placement, max_response_tokens=4).score([item])[0]
        expected = [sum(ref.log_probs[:4]) for _, _, ref in references]
        assert [response.cut for response in cut] == [len(ids) > 4 for _, ids, _ in references]
        assert score("bellman.sum", item, cut) == pytest.approx(expected, abs=1e-4)

    def test_longer_than_the_context(self, placement):
        # The tiny model's context has 256 tokens.
        long = Item("x", "g", "a b c " * 20, ("d e f " * 200, "ok"))
        cut, whole = Engine(placement).score([long])[0]
        assert cut.cut and not whole.cut and len(cut.stats.token_ids) < 256
        # The prompt's beginning is.
        assert Engine(placement).score([Item("x", "g", "a b c " * 200, ("ok",))])[0][0].cut

    def test_plain_text(self, placement, model, tokenizer):
        item = Item("x", "g", "The capital of France is", (" Paris", " Rome"))
        scored = Engine(placement, chat=False).score([item])[0]
        prompt = tokenizer(item.prompt)["input_ids"]
        expected = []
        for response in item.responses:
            ids = [*tokenizer(item.prompt + response)["input_ids"][len(prompt) :], tokenizer.eos_token_id]
            expected.append(sum(scores_from_logits(state_logits(model, prompt, ids), ids, 1.0).log_probs))
        assert score("bellman.sum", item, scored) == pytest.approx(expected, abs=1e-4)

    def test_separator_of_questions_without_a_template(self, placement):
        question = Item("x", "g", "Where?", ("Here",))
        continued = Item("x", "g", "Where?\n\n", ("Here",))
        assert Engine(placement, chat=False, separator="\n\n").prompt(question) == continued.prompt
        assert Engine(placement, separator="\n\n").prompt(question) == [{"role": "user", "content": "Where?"}]

    def test_criterion(self, placement, item, model, tokenizer):
        judged = Item("x", "g", "Hi", ("Hello",), criterion="Be kind.")
        prompt = chatml([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}], True)
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        ids = tokenizer("Hello<|im_end|>", add_special_tokens=False)["input_ids"]
        expected = sum(scores_from_logits(state_logits(model, prompt_ids, ids), ids, 1.0).log_probs)
        found = score("bellman.sum", judged, Engine(placement).score([judged])[0])
        assert found == [pytest.approx(expected, abs=1e-4)]


class TestSteps:
    def test_spans(self):
        steps = ["First.", "Then first.", "End"]
        text = "First.\n\nThen first.\n\nEnd<|im_end|>"
        spans = step_spans(steps, text)
        assert [text[a:b] for a, b in spans] == ["First.\n\n", "Then first.\n\n", "End"]
        assert step_spans(steps, "first.\n\nthen") is None
        # An empty step has the white space up to the next one; behind the last, nothing.
        assert step_spans(["a", "", "b", ""], "a\n\n\n\nb\n\n") == [(0, 1), (1, 5), (5, 6), (6, 6)]
        # Cut in the second step: it keeps what is there, and the third has nothing.
        cut = "First.\n\nThen f"
        assert [cut[a:b] for a, b in step_spans(steps, cut, whole=False)] == ["First.\n\n", "Then f", ""]

    def test_bellman_sum_is_the_steps_log_probability_and_values(self, placement):
        item = step_item("s", "g", "1+1?", ["We add 1 and 1.", "That is 2.", "So: 2"], {})
        response = Engine(placement).score([item])[0][0]
        owner, stats = response.step_of_token, response.stats
        assert owner[-1] == -1 and (owner[:-1].diff() >= 0).all() and set(owner[:-1].tolist()) == {0, 1, 2}
        sums = score("bellman.sum", item, [response])
        for step in range(3):
            tokens = (owner == step).nonzero().squeeze(1)
            first, after = tokens[0], tokens[-1] + 1
            expected = stats.log_probs[tokens].sum() + stats.soft_values[first] - stats.soft_values[after]
            assert sums[step] == pytest.approx(expected.item(), abs=1e-4)
        lows = score("log_prob.min", item, [response])
        assert lows == [stats.log_probs[owner == step].min().item() for step in range(3)]

    def test_only_what_scores_steps(self):
        assert "bellman.sum" in expand_names(["single-pass"], steps=True)
        for name in ("bellman.discounted=0.95", "residual:bellman.sum", "judge_pairwise", "reward_model:x"):
            with pytest.raises(ValueError, match="cannot score steps"):
                expand_names([name], steps=True)


class TestNames:
    def test_all_sets_can_be_made(self):
        for sets in (SETS, STEP_SETS):
            for word in ("single-pass", "two-pass", "controls"):
                for name in base_names(expand_names([word], steps=sets is STEP_SETS)):
                    assert make_form(name).name == name

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("bellman", "There is no scorer 'bellman'"),
            ("bellman.discounted", "needs a number: bellman.discounted=0.95"),
            ("bellman.discounted=1.5", "must be greater than 0 and at most 1"),
            ("log_prob.power=x", "'x' is not a number"),
            ("log_prob.power=nan", "must be finite"),
        ],
    )
    def test_bad_names(self, name, message):
        with pytest.raises(ValueError, match=message):
            make_form(name)

    def test_residuals_need_their_base(self):
        names = ["residual:bellman.sum", "length", "bellman.sum", "style_residual:log_prob.mean", "reward_model:a:b"]
        assert base_names(names) == ["bellman.sum", "length", "log_prob.mean", "reward_model:a:b"]


def logs(lengths):
    """The logarithm of the length as the only covariate."""
    return [[[math.log(n)] for n in row] for row in lengths]


class TestResiduals:
    def test_what_is_length_alone_disappears(self):
        lengths = [[10, 20, 70], [5, 9], [40, 8, 6]]
        scores = [[3.0 - 0.5 * math.log(n) for n in row] for row in lengths]  # each item may have its own level
        scores[1] = [s + 100 for s in scores[1]]
        corrected, slopes = residuals(scores, logs(lengths), ["g"] * 3)
        assert slopes == {"g": pytest.approx([-0.5])}
        for row in corrected:
            assert row == pytest.approx([row[0]] * len(row))

    def test_uncorrelated_with_each_covariate_within_items(self):
        torch.manual_seed(0)
        covariates = torch.rand(40, 6, 2).double()
        scores = torch.randn(40, 6).double() - 3 * covariates[..., 0] + 2 * covariates[..., 1]
        corrected, slopes = residuals(scores.tolist(), covariates.tolist(), ["g"] * 40)
        rest = torch.tensor(corrected, dtype=torch.float64)
        rest, centered = rest - rest.mean(1, keepdim=True), covariates - covariates.mean(1, keepdim=True)
        assert (rest[..., None] * centered).sum((0, 1)).tolist() == pytest.approx([0.0, 0.0], abs=1e-9)
        assert slopes["g"] == pytest.approx([-3, 2], abs=0.5)

    @pytest.mark.parametrize("length", [7, 100])
    def test_equal_lengths(self, length):
        # The mean of six times log 100 is not log 100 in floating point.
        scores = [[float((i * k) % 7) for k in range(6)] for i in range(9)]
        assert residuals(scores, logs([[length] * 6] * 9), ["g"] * 9) == (scores, {"g": [0.0]})

    def test_a_group_too_small_keeps_its_scores(self):
        # Two slopes fit the difference of one pair, or of two, exactly: what is left would be rounding.
        covariates = [[[math.log(10), 0.0], [math.log(17), 1.1]], [[math.log(5), 2.0], [math.log(4), 1.0]]]
        for n in (1, 2):
            scores = [[1.3, 2.7], [0.5, 0.1]][:n]
            assert residuals(scores, covariates[:n], ["g"] * n) == (scores, {"g": [0.0, 0.0]})
        # Six differences are enough for two slopes, five are not.
        for n, fitted in ((5, False), (6, True)):
            _, slopes = residuals(([[1.3, 2.7], [0.5, 0.1]] * 5)[:n], (covariates * 5)[:n], ["g"] * n)
            assert (slopes["g"] != [0.0, 0.0]) == fitted

    def test_groups_do_not_mix(self):
        scores = [[1.0, 5.0], [2.0, 1.0], [0.0, 7.0]] * 6
        lengths = [[3, 9], [10, 40], [5, 6]] * 6
        both, slopes = residuals(scores, logs(lengths), ["a", "b", "a"] * 6)
        assert both[1] == pytest.approx(residuals(scores[1::3], logs(lengths[1::3]), ["b"] * 6)[0][0])
        assert slopes["a"] != slopes["b"]


def test_markdown_density():
    text = "## Title\n\nSome **bold** text - and no list.\n\n- one\n* two\n 3. three\n```python\n2 * 3\n```\n"
    # A heading, two halves of bold, three list items, two fences.
    assert markdown_density(text) == pytest.approx(100 * 8 / len(text))
    assert markdown_density("") == markdown_density("It costs 3.5 - or 2 * 4. #1!") == 0
