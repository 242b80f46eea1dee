# SPDX-License-Identifier: Apache-2.0
"""`EndogenousReward` by itself. Inside TRL's trainers: `test_trl_integration.py`."""

import copy
import itertools
import math
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from endotrl import EndogenousReward, TokenStats
from endotrl.rewards import ClipTokens, InformationGain, LengthControl, endogenous_reward
from endotrl.rewards.environment import reward_from_environment
from endotrl.rewards.rule import batch_diagnostics
from endotrl.rewards.scored import heat_map_row

from ..support.helpers import count_forwards, encode
from ..support.reference import ReferenceScores, chatml, scores_from_logits, state_logits
from ..support.reference import token_rewards as reference_token_rewards


FORMS: list[Any] = ["bellman", "log_prob", "centered"]
USER = [{"role": "user", "content": "Capital of France?"}]
PARIS = [{"role": "assistant", "content": "Paris."}]


@dataclass(frozen=True)
class Case:
    """A batch as a trainer passes it, and the logits of each row, from which the reference computes all rewards."""

    prompts: list[Any]
    completions: list[Any]
    completion_ids: list[list[int]]
    finished: list[bool]
    logits: list[Tensor]

    @property
    def batch(self) -> tuple[list[Any], list[Any], list[list[int]]]:
        return self.prompts, self.completions, self.completion_ids

    def scores(self, alpha: float) -> list[ReferenceScores]:
        return [scores_from_logits(f, a, alpha) for f, a in zip(self.logits, self.completion_ids, strict=True)]

    def take(self, rows: list[int]) -> "Case":
        return Case(*([column[i] for i in rows] for column in vars(self).values()))


def make_case(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, default_system: str = "") -> Case:
    """
    Four ragged rows: one turn, several turns, a system message, and again one turn; two of them are cut off. What the
    model must read is written out by hand; `default_system` is what the template puts before messages without one.
    """
    system = {"role": "system", "content": "Answer in one word."}
    conversations = [
        USER,
        [*USER, {"role": "assistant", "content": "Rome."}, {"role": "user", "content": "Sure? 😀"}],
        [system, {"role": "user", "content": "2+2?"}],
        [{"role": "user", "content": "Name a colour."}],
    ]
    texts = ["The capital of France is Paris.", "No: Par", "4", "Blue, as the sky above"]
    finished = [True, False, True, False]
    end = [tokenizer.eos_token_id]
    ids = [encode(tokenizer, text) + (end if done else []) for text, done in zip(texts, finished, strict=True)]
    logits = []
    for messages, completion_ids in zip(conversations, ids, strict=True):
        if default_system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": default_system}, *messages]
        prompt_ids = encode(tokenizer, chatml(messages, generation_prompt=True))
        logits.append(state_logits(model, prompt_ids, completion_ids))
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    return Case(conversations, completions, ids, finished, logits)


def assert_token_rewards(
    actual: list[Tensor], case: Case, form: str, alpha: float, gamma: float, truncation: str, tolerance: float
) -> None:
    for rewards, scores, finished in zip(actual, case.scores(alpha), case.finished, strict=True):
        assert rewards.dtype == torch.float32
        assert rewards.shape == (len(scores.taken),)
        if truncation == "skip" and not finished:
            assert rewards.isnan().all()
            continue
        wanted = reference_token_rewards(scores, form, alpha, gamma, finished, truncation)
        torch.testing.assert_close(rewards, torch.tensor(wanted), atol=tolerance, rtol=0)


def aggregate_by_hand(rewards: list[float], first_value: float, form: str, aggregate: str, discount: float) -> float:
    if aggregate == "discounted":
        return sum(discount**h * r for h, r in enumerate(rewards))
    total = sum(rewards) - (first_value if form == "bellman" else 0.0)
    return total / len(rewards) if aggregate == "mean" else total


@pytest.fixture(scope="module")
def model(tiny_model_path):
    return AutoModelForCausalLM.from_pretrained(tiny_model_path).eval()


@pytest.fixture(scope="module")
def case(model, tiny_model_path):
    return make_case(model, AutoTokenizer.from_pretrained(tiny_model_path))


class TestAgainstTheReference:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("truncation", ["terminal", "bootstrap", "skip"])
    @pytest.mark.parametrize(("alpha", "gamma"), [(1.0, 1.0), (0.7, 1.0), (0.7, 0.9)])
    def test_tokens_and_outcomes(self, model, case, form, truncation, alpha, gamma):
        settings: dict[str, Any] = {"alpha": alpha, "gamma": gamma, "token_reward": form, "truncation": truncation}
        reward = EndogenousReward(model, **settings)
        tokens, stats = reward.token_rewards(*case.batch), reward.score(*case.batch)
        assert_token_rewards(tokens, case, form, alpha, gamma, truncation, tolerance=1e-4)
        for row, rewards in zip(stats, tokens, strict=True):
            torch.testing.assert_close(reward.token_rewards_from(row), rewards, atol=1e-5, rtol=0, equal_nan=True)
        assert [reward.aggregate_from(row) for row in stats] == pytest.approx(reward(*case.batch), abs=1e-5)
        for aggregate in ("sum", "mean", "discounted"):
            reward = EndogenousReward(None, aggregate=aggregate, discount=0.8, **settings)
            for row, scores, finished in zip(stats, case.scores(alpha), case.finished, strict=True):
                value = reward.aggregate_from(row)
                if truncation == "skip" and not finished:
                    assert value is None
                    continue
                by_token = reference_token_rewards(scores, form, alpha, gamma, finished, truncation)
                wanted = aggregate_by_hand(by_token, scores.values[0], form, aggregate, 0.8)
                assert value == pytest.approx(wanted, abs=1e-4, rel=1e-5)
                # The contributions in heat maps sum to it. Parts that belong to no token are named separately.
                page = heat_map_row(reward, row)
                coloured = sum(page.contributions) + sum(page.rest.values())
                assert page.total == value == pytest.approx(coloured, abs=1e-5)
                names = ["V of the prompt"] * (form == "bellman" and aggregate == "discounted")
                cut_off = form == "bellman" and truncation == "bootstrap" and not finished
                assert list(page.rest) == names + ["V of the state where it was cut off"] * cut_off

    def test_rows_without_a_token(self, model, tokenizer):
        reward = EndogenousReward(model)
        eos = tokenizer.eos_token_id
        batch = ([USER] * 3, ["", "", "Paris."], [[], [eos], [*encode(tokenizer, "Paris."), eos]])
        nothing, end, paris = reward(*batch)
        logits = state_logits(model, encode(tokenizer, chatml(USER, generation_prompt=True)), [])
        assert nothing is None
        assert end == pytest.approx(torch.log_softmax(logits[0], -1)[eos].item(), abs=1e-4)
        assert paris is not None
        assert [len(rewards) for rewards in reward.token_rewards(*batch)] == [0, 1, len(batch[2][2])]
        assert reward([USER], [""], [[]]) == [None]  # alone, too


@pytest.mark.parametrize("max_tokens_per_batch", [1, 50, 130, 100_000])
@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 0, 3, 1, 0, 0, 2]], ids=["in order", "with neighbours"])
def test_batches_padding_and_neighbours_change_nothing(
    model, tokenizer, case, max_tokens_per_batch, padding_side, order
):
    tokenizer.padding_side = padding_side
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    reward = EndogenousReward(model, tokenizer, max_tokens_per_batch=max_tokens_per_batch)
    rows = case.take(order)
    assert_token_rewards(reward.token_rewards(*rows.batch), rows, "bellman", 1.0, 1.0, "terminal", 1e-4)


def test_scored_completions_have_their_text_without_what_a_tool_wrote(model):
    completion = [
        {"role": "assistant", "content": "Let me see. 😀"},
        {"role": "tool", "name": "search", "content": "Rome"},
        {"role": "assistant", "content": "Paris."},
    ]
    (stats,) = EndogenousReward(model).score([USER], [completion])
    assert stats.text is not None and stats.offsets is not None and "Rome" in stats.text
    written = "".join(stats.text[start:stop] for start, stop in stats.offsets)
    assert written == "Let me see. 😀<|im_end|>Paris.<|im_end|>"


LN2, LN3, LN4, LN5 = math.log(2), math.log(3), math.log(4), math.log(5)


def stats_by_hand(finished: bool, with_gap: bool = False, entropies: bool = True) -> TokenStats:
    # As in tests/test_bellman.py: f = ln 3 of V = ln 4, f = ln 2 of V = ln 3, then V = ln 5. A tool may have written
    # one token in between.
    return TokenStats(
        token_ids=torch.tensor([1, 0]),
        positions=torch.tensor([0, 2] if with_gap else [0, 1]),
        chosen_logits=torch.tensor([LN3, LN2]),
        soft_values=torch.tensor([LN4, LN3, 0.0 if finished else LN5]),
        entropies=torch.tensor([0.5, 0.6]) if entropies else None,
        finished=finished,
        alpha=1.0,
        num_completion_tokens=3 if with_gap else 2,
    )


class TestPure:
    """Rewards from statistics, without a model, by hand."""

    @pytest.mark.parametrize(
        ("settings", "finished", "by_token", "total"),
        [
            # sum: ln 3/4 + ln 2/3 = ln 1/2
            ({}, True, [0.0, LN2], -LN2),
            ({}, False, [0.0, LN2], -LN2),
            ({"truncation": "bootstrap"}, False, [0.0, LN2 - LN5], -LN2 - LN5),
            ({"truncation": "skip"}, True, [0.0, LN2], -LN2),
            ({"truncation": "skip"}, False, [math.nan, math.nan], None),
            ({"aggregate": "mean"}, True, [0.0, LN2], -LN2 / 2),
            ({"aggregate": "discounted", "discount": 0.5}, True, [0.0, LN2], LN2 / 2),
            ({"gamma": 0.5}, True, [LN3 / 2, LN2], LN3 / 2 + LN2 - LN4),
            ({"token_reward": "log_prob"}, False, [LN3 - LN4, LN2 - LN3], -LN2),
            ({"token_reward": "centered"}, True, [LN3 - LN4 + 0.5, LN2 - LN3 + 0.6], -LN2 + 1.1),
        ],
    )
    def test_by_hand(self, settings, finished, by_token, total):
        reward = EndogenousReward(None, **settings)
        for stats, gap in ((stats_by_hand(finished), []), (stats_by_hand(finished, with_gap=True), [0.0])):
            expected = [by_token[0], *gap, by_token[1]]
            assert reward.token_rewards_from(stats).tolist() == pytest.approx(expected, abs=1e-6, nan_ok=True)
            assert reward.aggregate_from(stats) == pytest.approx(total, abs=1e-6)

    @pytest.mark.parametrize(
        ("rewards", "missing"),
        [([None, None], 5), ([-1.0, None], 1), ([-1.0, -1.0], 1)],
        ids=["no reward", "one reward", "all rewards and lengths the same"],
    )
    def test_what_is_not_defined_is_left_out(self, rewards, missing):
        figures = batch_diagnostics(rewards, rewards, [stats_by_hand(True)] * 2)
        assert len(figures) == 6 - missing
        assert "length_correlation" not in figures
        assert all(math.isfinite(value) for value in figures.values())


@pytest.mark.parametrize("used", [False, True], ids=["before use", "after use"])
@pytest.mark.parametrize("kind", [str, Path, "instance"])
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_a_reward_travels_without_weights(tiny_model_path, model, case, clone, kind, used):
    settings: dict[str, Any] = {
        "alpha": 0.7, "gamma": 0.9, "token_reward": "centered", "aggregate": "discounted", "discount": 0.8,
        "truncation": "bootstrap", "criterion": "Be exact.", "max_tokens_per_batch": 50, "name": "mine",
    }  # fmt: skip
    reward = EndogenousReward(model if kind == "instance" else kind(tiny_model_path), **settings)
    if used:
        reward(*case.batch)
    if kind == "instance" and clone is not copy.deepcopy:
        with pytest.raises(TypeError, match="loaded model cannot be pickled.*with that path"):
            clone(reward)
        return
    other = clone(reward)
    assert other.__name__ == "mine"
    if kind == "instance":
        assert other._placement._model is model  # the user's, of which there is one
    else:
        assert other._placement._model is None
        assert len(pickle.dumps(reward)) < 40_000  # the weights are 150 kB; a loaded tokenizer travels along
    assert other(*case.batch) == reward(*case.batch) == EndogenousReward(model, **settings)(*case.batch)


class TestBadSettings:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"alpha": 0.0}, "`alpha` is 0.0.*positive and finite"),
            ({"alpha": math.nan}, "`alpha` is nan.*positive and finite"),
            ({"alpha": "1e-1"}, "`alpha` is '1e-1', but the temperature .* positive and finite"),  # so YAML reads it
            ({"gamma": 0.0}, "`gamma` is 0.0.*greater than 0 and at most 1"),
            ({"gamma": None}, "`gamma` is None, but a discount must be"),
            ({"discount": -0.1}, "`discount` is -0.1.*greater than 0 and at most 1"),
            ({"token_reward": "q"}, "`token_reward` is 'q', but it must be one of 'bellman', 'log_prob', 'centered'"),
            ({"aggregate": "max"}, "`aggregate` is 'max', but it must be one of 'sum', 'mean', 'discounted'"),
            ({"aggregate": "power"}, "needs a number, such as power=0.5"),
            ({"aggregate": "min=2"}, "'min' takes no number"),
            ({"aggregate": "first=0"}, "its number must be finite and at least 1"),
            ({"truncation": "drop"}, "`truncation` is 'drop', but it must be one of 'terminal', 'bootstrap', 'skip'"),
            ({"overlong_prompt": "cut"}, "`overlong_prompt` is 'cut', but it must be one of 'error', 'truncate_left'"),
            ({"max_tokens_per_batch": 0}, "`max_tokens_per_batch` is 0.*at least one token"),
            ({"dtype": "int8"}, "`dtype` must be .* got 'int8'"),
            ({"device": "gpu0"}, "`device` must be a torch device such as"),
            ({"processing_class": "gpt2"}, "`processing_class` is a str, but it must be a tokenizer"),
            ({"criterion": ["be brief"]}, r"`criterion` is \['be brief'\], but it must be a string, a dictionary"),
            ({"criterion": " "}, "`criterion` is ' ', .* Strings must not be empty"),
            ({"correction": "longer"}, "`correction` is"),
            ({"correction": LengthControl}, "`correction` is"),
            ({"correction": "clip"}, "arbitrary constants"),  # of Bellman rewards
            ({"correction": InformationGain("x"), "token_reward": "centered"}, "difference of log-probabilities"),
            *(({"model": model}, f"`model` is a {type(model).__name__}.*path or hub id, a loaded.*or None")
              for model in (3, torch.nn.Linear(2, 2), LN2)),
        ],
        ids=str,
    )  # fmt: skip
    def test_out_of_range_or_unknown(self, tiny_model_path, settings, message):
        with pytest.raises((ValueError, TypeError), match=message):
            EndogenousReward(**{"model": tiny_model_path, **settings})

    def test_of_corrections(self):
        with pytest.raises(ValueError, match=r"`low` must be less than `high`, got 2\.0 and 1\.0"):
            ClipTokens(2.0, 1.0)

    @pytest.mark.parametrize("aggregate", ["mean", "power=0.5", "min"])
    def test_aggregates_without_token_credit(self, aggregate, tiny_model_path):
        reward = EndogenousReward(tiny_model_path, aggregate=aggregate)
        with pytest.raises(ValueError, match="cannot be credited to single tokens"):
            reward.outcome_and_token_rewards(["a"], ["b"])
        assert reward._scorer is None  # raised before anything was computed


class TestBadBatches:
    """Errors before the model runs. Everything else that a renderer rejects: `tests/rendering/test_renderer.py`."""

    def test_is_refused(self, model):
        reward = EndogenousReward(model)
        for call in (reward, reward.token_rewards, reward.score):
            with (
                count_forwards(model) as ran,
                pytest.raises(ValueError, match="Row 1 has .* more than the 256 tokens"),
            ):
                call(prompts=["Hi", "word " * 300], completions=["a", "b"])
            assert ran == []

    def test_without_a_tokenizer_or_weights(self, model):
        nameless = copy.deepcopy(model)
        nameless.config._name_or_path = ""
        with pytest.raises(ValueError, match="tokenizer cannot be found. Pass it as `processing_class`"):
            EndogenousReward(nameless)([USER], [PARIS])
        with pytest.raises(RuntimeError, match=r"`model=None`.*Call `reward.attach\(trainer\)` before"):
            EndogenousReward(None)([USER], [PARIS])

    @pytest.mark.parametrize(
        ("domain", "message"),
        [
            (None, r"domains \['art', 'law'\].*no column `domain`. Add one"),
            (["art", "tax"], r"no criterion for the domains \['tax'\]; `criterion` has \['art', 'law'\]"),
            ([None, "tax"], r"no criterion for the domains \['tax', None\]"),
            (["art"], "`domain` has 1 entries for 2 prompts"),
        ],
    )
    def test_criterion_without_its_domain(self, model, domain, message):
        reward = EndogenousReward(model, criterion={"law": "Be exact.", "art": "Be bold."})
        with count_forwards(model) as ran, pytest.raises(ValueError, match=message):
            reward([USER] * 2, [PARIS] * 2, domain=domain)
        assert ran == []


class TestEnvironment:
    @pytest.mark.parametrize(
        ("variables", "message"),
        [
            ({}, "ENDOTRL_MODEL, the path or hub id of the frozen model, is not set.*`env: {ENDOTRL_MODEL: <model>}`"),
            ({"ENDOTRL_MODLE": "x"}, "ENDOTRL_MODLE is not a setting.*The settings are ENDOTRL_MODEL, ENDOTRL_ALPHA"),
            ({"ENDOTRL_NAME": "x"}, "ENDOTRL_NAME is not a setting"),  # of another surface
            ({"ENDOTRL_ALPHA": "one"}, "ENDOTRL_ALPHA is 'one', but it must be a number"),
            ({"ENDOTRL_MAX_TOKENS_PER_BATCH": "8k"}, "is '8k'.*a whole number of at least 1"),
            ({"ENDOTRL_OFFLOAD": "off"}, "ENDOTRL_OFFLOAD is 'off', but it must be true or false"),
        ],
    )
    def test_bad_variables(self, variables, message):
        with pytest.raises(ValueError, match=message):
            reward_from_environment(variables)

    def test_the_instance_that_trl_imports(self, tiny_model_path, model, monkeypatch):
        fresh = type(endogenous_reward)()  # the module's own would keep what this test gives it
        assert fresh.__name__ == "endogenous_reward"
        monkeypatch.delenv("ENDOTRL_MODEL", raising=False)
        with pytest.raises(ValueError, match="ENDOTRL_MODEL.*is not set"):
            fresh(prompts=[USER], completions=[PARIS])
        monkeypatch.setenv("ENDOTRL_MODEL", tiny_model_path)
        monkeypatch.setenv("ENDOTRL_ALPHA", "0.7")
        expected = EndogenousReward(model, alpha=0.7)([USER], [PARIS])
        assert fresh(prompts=[USER], completions=[PARIS], trainer_state=None) == expected
        assert pickle.loads(pickle.dumps(fresh))(prompts=[USER], completions=[PARIS]) == expected


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [1.0, 0.7])
def test_smollm2(alpha, smollm2_path):
    """The same on a real model: float32, ragged rows, several turns, cut-off rows, pad == eos."""
    model = AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"  # its template's own
    case = make_case(model, tokenizer, default_system=system)
    stats = EndogenousReward(model, tokenizer, alpha=alpha).score(*case.batch)
    for form, truncation, gamma in itertools.product(FORMS, ("terminal", "bootstrap", "skip"), (1.0, 0.9)):
        reward = EndogenousReward(None, alpha=alpha, gamma=gamma, token_reward=form, truncation=truncation)
        actual = [reward.token_rewards_from(row) for row in stats]
        assert_token_rewards(actual, case, form, alpha, gamma, truncation, tolerance=1e-3)
    for row, logits, ids in zip(stats, case.logits, case.completion_ids, strict=True):
        log_policy = torch.log_softmax(logits[:-1].double() / alpha, dim=-1)
        outcome = alpha * log_policy.gather(1, torch.tensor(ids)[:, None]).sum().item()
        assert EndogenousReward(None, alpha=alpha).aggregate_from(row) == pytest.approx(outcome, abs=1e-3)
