# SPDX-License-Identifier: Apache-2.0
import itertools
import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import endotrl
from endotrl.evaluation.engine import Engine
from endotrl.forecasting.collect import Grader
from endotrl.forecasting.sampling import Mixture, MixtureSampler, ServedMixtureSampler, power_samples
from endotrl.frozen.own_copy import OwnCopy

from ..support.reference import scores_from_logits, state_logits
from ..support.tiny_policy import WORDS, save_tiny_policy


LIMIT = 3
PROMPTS = [[{"role": "user", "content": text}] for text in ("a", "a b c d e", "f g")]


@pytest.fixture(scope="module")
def engine(tiny_policy_path):
    return Engine(OwnCopy(tiny_policy_path, device="cpu"), AutoTokenizer.from_pretrained(tiny_policy_path))


@pytest.fixture(scope="module")
def model(tiny_policy_path):
    return AutoModelForCausalLM.from_pretrained(tiny_policy_path).eval()


@pytest.fixture(scope="module")
def two_tokens(engine, model):
    """Log-probabilities of the first token after the first prompt, and of the second after each first one."""
    (ids,) = engine.renderer.prompt_ids(PROMPTS[:1])
    with torch.no_grad():
        first = model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
        second = model(torch.tensor([[*ids, a] for a in range(len(WORDS))])).logits[:, -1].double().log_softmax(-1)
    return first, second


class TestMixture:
    def test_counts(self):
        assert Mixture.of(16, [1.0, 0.7, 0.5]).counts == {1.0: 8, 0.7: 4, 0.5: 4, 0.0: 1}
        assert Mixture.of(5, [1.0]).counts == {1.0: 5, 0.0: 1}
        assert sum(Mixture.of(11, [1.0, 0.7, 0.5]).counts.values()) == 12

    def test_density(self):
        mixture = Mixture({1.0: 2, 0.5: 1, 0.0: 1})
        density = mixture.log_density({1.0: np.log([0.5, 0.2]), 0.5: np.log([0.8, 0.1])}, [True, False])
        assert np.exp(density) == pytest.approx([0.5 * 0.5 + 0.25 * 0.8 + 0.25, 0.5 * 0.2 + 0.25 * 0.1])

    def test_errors(self):
        with pytest.raises(ValueError, match="must be at least 0.01 and include 1"):
            Mixture.of(16, [0.5])
        with pytest.raises(ValueError, match="`samples` must be at least 4 for 3 temperatures, got 3"):
            Mixture.of(3, [1.0, 0.7, 0.5])


class TestSampler:
    temperatures = (1.0, 1.0, 1.0, 0.5, 0.5, 0.0)

    def test_densities_and_greedy(self, model, engine):
        drawn = MixtureSampler(engine, LIMIT, [1.0, 0.5])(PROMPTS, self.temperatures, seed=1)
        for prompt_ids, row in zip(engine.renderer.prompt_ids(PROMPTS), drawn, strict=True):
            for temperature, values in row.log_probs.items():
                for value, ids in zip(values, (list(sample.token_ids) for sample in row.samples), strict=True):
                    naive = scores_from_logits(state_logits(model, prompt_ids, ids), ids, alpha=temperature).log_probs
                    assert value == pytest.approx(sum(naive), abs=1e-5)
            greedy: list[int] = []
            while len(greedy) < LIMIT and greedy[-1:] != [2]:
                greedy.append(model(torch.tensor([prompt_ids + greedy])).logits[0, -1].argmax().item())
            assert list(row.samples[-1].token_ids) == greedy
        assert {s.finished for row in drawn for s in row.samples} == {True, False}

    def test_each_temperature_has_its_distribution(self, engine):
        """Frequencies of first tokens against the densities."""
        drawn = MixtureSampler(engine, 1, [1.0, 0.5])(PROMPTS[:1], [1.0] * 4000 + [0.5] * 4000, 0)[0]
        for first, temperature in ((0, 1.0), (4000, 0.5)):
            tokens = [s.token_ids[0] for s in drawn.samples[first : first + 4000]]
            for token in set(tokens):
                density = math.exp(drawn.log_probs[temperature][first + tokens.index(token)])
                assert abs(tokens.count(token) / 4000 - density) < 4 * math.sqrt(density / 4000) + 1e-3

    def test_settings_of_the_model_do_not_hold(self, tiny_policy_path, engine, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(tiny_policy_path)
        model.generation_config.repetition_penalty = 5.0
        model.generation_config.min_new_tokens = 3
        model.save_pretrained(tmp_path)
        other = Engine(OwnCopy(str(tmp_path), device="cpu"), engine.tokenizer)
        same = [MixtureSampler(e, LIMIT, [1.0])(PROMPTS, self.temperatures, 0) for e in (engine, other)]
        assert same[0] == same[1]

    def test_served_samples_are_scored(self, engine):
        own = MixtureSampler(engine, LIMIT, [1.0, 0.5])(PROMPTS, self.temperatures, 0)

        def generator(temperature):
            def generate(prompts, num_samples, seed=0, progress=False):
                places = [i for i, t in enumerate(self.temperatures) if t == temperature]
                assert num_samples == len(places)
                return [[row.samples[i] for i in places] for row in own]

            return generate

        served = ServedMixtureSampler(engine, generator, [1.0, 0.5])(PROMPTS, self.temperatures, 0)
        for a, b in zip(own, served, strict=True):
            assert a.samples == b.samples
            assert all(a.log_probs[t] == pytest.approx(b.log_probs[t], abs=1e-4) for t in (1.0, 0.5))


class TestPowerSampling:
    def test_reaches_the_power_distribution(self, engine, two_tokens):
        """First tokens of many chains against the enumeration of all completions of two tokens."""
        (first, second), exponent, chains = two_tokens, 2.0, 400
        samples = power_samples(engine, PROMPTS[:1] * chains, 2, exponent, steps=30)
        completions = first[:, None] + second
        weights = (exponent * completions).exp().sum(1)
        weights[2] = (exponent * first[2]).exp()  # ended
        share = weights / weights.sum()
        tempered = (exponent * first).softmax(0)
        found = torch.bincount(torch.tensor([s.token_ids[0] for s in samples]), minlength=len(WORDS)) / chains
        assert (found - share).abs().sum() < 0.25
        assert (tempered - share).abs().sum() > 0.4  # which sampling at a low temperature would give


class TestForecast:
    def test_against_enumeration(self, tiny_policy_path, engine, two_tokens):
        """Expected accuracy and KL of the power distribution, by enumeration of all completions of two tokens."""
        prompt, beta = PROMPTS[0], 0.5
        questions = [{"prompt": prompt, "answer": [w for w in WORDS if w > "f"]}]
        kwargs = {"max_new_tokens": 2, "grader": first_word, "progress": False, "chat": True}
        result = endotrl.forecast(
            tiny_policy_path, questions, betas=[beta], trainer="rloo", samples=6000, temperatures=[1.0, 0.5], **kwargs
        )
        first, second = two_tokens
        leaves = [([2], first[2].item())]
        for a, b in itertools.product(range(len(WORDS)), repeat=2):
            if a != 2:
                leaves.append(([a, b], (first[a] + second[a, b]).item()))
        log_probs = np.array([value for _, value in leaves])
        texts = [engine.tokenizer.decode(i, skip_special_tokens=True) for i, _ in leaves]
        right = np.array([first_word(text, questions[0]["answer"]) for text in texts])
        power = np.exp((1 + 1 / beta) * log_probs)
        power /= power.sum()
        row = result.betas[0]
        assert row["accuracy"] == pytest.approx(power @ right, abs=0.03)
        assert row["kl"] == pytest.approx(power @ (np.log(power) - log_probs), abs=0.06)
        assert result.alternatives["sampled"] == pytest.approx(np.exp(log_probs) @ right, abs=0.03)
        assert row["length"] == pytest.approx(power @ np.array([len(i) for i, _ in leaves]), abs=0.05)
        assert row["truncated"] == pytest.approx(power @ np.array([i[-1] != 2 for i, _ in leaves]), abs=0.05)

    def test_seeds(self, tiny_policy_path):
        """Each seed has samples of its own, and the same ones again."""
        kwargs = {"betas": [1.0], "samples": 8, "max_new_tokens": 6, "grader": "text", "progress": False}
        rewards = [endotrl.forecast(tiny_policy_path, ["a b", "c d"], seed=s, **kwargs).betas[0] for s in (0, 1, 2, 0)]
        assert rewards[0] == rewards[3]
        assert len({row["reward"] for row in rewards}) == 3

    def test_no_labels(self, tiny_policy_path, caplog):
        result = endotrl.forecast(
            tiny_policy_path, ["a b", "c d"], betas=[1.0], samples=8, max_new_tokens=3, grader="text", progress=False
        )
        assert result.alternatives["greedy"] is None
        assert result.betas[0]["accuracy"] is None
        assert 0 <= result.betas[0]["agreement"] <= 1
        json.dumps(result.to_dict(), allow_nan=False)
        assert "Pass `chat=True`" in caplog.text  # plain text, to a model with a chat template


def test_a_folder_belongs_to_a_model_and_a_reward(tmp_path):
    """Samples of other weights, or rewards of other settings, are refused, however they are called."""
    path = tmp_path / "model"
    save_tiny_policy(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    questions = [{"prompt": "a", "answer": "b"}, {"prompt": "c", "answer": "d"}]

    def run(folder, model=str(path), **kwargs):
        kwargs = {"betas": [1.0], "samples": 4, "max_new_tokens": 2, "grader": "exact", "progress": False, **kwargs}
        return endotrl.forecast(model, questions, output=tmp_path / folder, **kwargs)

    first = run("path")
    assert run("path", betas=[1.0, 0.5]).betas[0] == first.betas[0]
    run("object", model, processing_class=tokenizer)
    run("reward", reward=endotrl.EndogenousReward(str(path), alpha=2.0))
    with pytest.raises(ValueError, match=r"other settings: `reward` was .*alpha=2.0"):
        run("reward", reward=endotrl.EndogenousReward(str(path), token_reward="centered"))
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    model.save_pretrained(path)
    for folder, kwargs in {"path": {}, "object": {"model": model, "processing_class": tokenizer}}.items():
        with pytest.raises(ValueError, match="other settings: `model_version`"):
            run(folder, **kwargs)


def test_a_reward_that_needs_answers(tiny_policy_path):
    """A verifier's optimum at a small penalty: right wherever a sample is."""

    def verifier(completions, answer, **kwargs):
        return [first_word(text, right) for text, right in zip(completions, answer, strict=True)]

    questions = [{"prompt": "a b", "answer": list("abcdefghijkl")}]
    result = endotrl.forecast(
        tiny_policy_path, questions, reward=verifier, betas=[0.01], trainer="rloo", samples=32, max_new_tokens=2,
        grader=first_word, progress=False,
    )  # fmt: skip
    assert 0 < result.alternatives["sampled"] < 1
    assert result.betas[0]["accuracy"] == pytest.approx(1.0)
    assert "<table" in result._repr_html_()


def first_word(completion: str, answer: list[str]) -> float:
    return float(completion.split()[:1] != [] and completion.split()[0] in answer)


@pytest.mark.parametrize(
    ("grade", "message"),
    [
        (lambda text, answer: None, "failed on completion 'a' and answer 'b': TypeError"),
        (lambda text: 1.0, "failed on completion 'a' and answer 'b': TypeError"),
        (lambda text, answer: float("nan"), "from 0 .wrong. to 1 .right., but the grader returned nan for 'a'"),
        (lambda text, answer: 34, "returned 34.0 for 'a'"),
    ],
)
def test_a_grader_that_gives_no_grade(grade, message):
    with pytest.raises(ValueError, match=message):
        Grader(grade).grade(["a"], "b")


@pytest.mark.parametrize(
    ("setting", "error"),
    [
        ({"betas": []}, ValueError),
        ({"betas": 0.5}, ValueError),
        ({"betas": [0.0]}, ValueError),
        ({"betas": [1.0, float("nan")]}, ValueError),
        ({"reward": "length"}, TypeError),
    ],
)
def test_mistakes_are_found_before_a_model_is_loaded(setting, error, tmp_path):
    with pytest.raises(error, match=f"`{next(iter(setting))}` must be "):
        endotrl.forecast(str(tmp_path / "no model"), ["a"], grader="text", **setting)


def test_answers_are_checked_before_anything_is_sampled(tiny_policy_path, monkeypatch):
    monkeypatch.setattr(MixtureSampler, "__call__", lambda *_: pytest.fail("sampled"))
    questions = [{"prompt": "a", "answer": "b"}, {"prompt": "c", "answer": {"value": "d"}, "id": "x"}]
    with pytest.raises(ValueError, match="x: An answer must be text"):
        endotrl.forecast(tiny_policy_path, questions, grader="text", max_new_tokens=2)


def test_graders(tmp_path):
    assert Grader("exact").grade(["12", " 12\n", "12."], "12") == [1.0, 1.0, 0.0]
    assert Grader("text").grade(["The answer is 12."], ["11", 12]) == [1.0]
    assert Grader("exact").grade(["12"], 12.0) == [1.0]  # as pandas writes whole numbers beside missing ones
    assert Grader("text").groups(["It is 3.", "4", "3"]) == [0, 1, 0]
    (tmp_path / "mine.py").write_text("def half(completion, answer):\n    return 0.5\n")
    assert Grader(f"{tmp_path}/mine.py:half").grade(["x"], "y") == [0.5]
    for name in ("best", f"{tmp_path}/mine.py:none"):
        with pytest.raises(ValueError, match=r"The grader must be|has no function"):
            Grader(name)
