# SPDX-License-Identifier: Apache-2.0
"""Rivals as TRL rewards, against formulas on the logits of one sequence at a time."""

import math
import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOTrainer

from endotrl.rewards import MeanLogProbReward, NegativeEntropyReward, RelativePerplexityReward, SelfCertaintyReward
from endotrl.rewards.intrinsic import relative_perplexity
from endotrl.rewards.rule import self_certainty

from ..support.helpers import encode
from ..support.reference import chatml, scores_from_logits, state_logits
from ..support.trainers import history, make_trainer


ALL = (SelfCertaintyReward, NegativeEntropyReward, MeanLogProbReward, RelativePerplexityReward)
QUESTION = "What is the capital of France?"
ANSWERS = ("Paris.", "The capital of France is Rome, or so.")


@pytest.fixture(scope="module")
def model(tiny_model_path):
    return AutoModelForCausalLM.from_pretrained(tiny_model_path).eval()


@pytest.fixture(scope="module")
def logits(tiny_model_path, model):
    """For both answers: tokens, logits at their states with the question, and without."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    prompt, empty = (encode(tokenizer, chatml([{"role": "user", "content": text}], True)) for text in (QUESTION, ""))
    rows = []
    for answer in ANSWERS:
        ids = encode(tokenizer, answer + "<|im_end|>")
        rows.append((ids, state_logits(model, prompt, ids), state_logits(model, empty, ids)))
    return rows


BATCH = {
    "prompts": [[{"role": "user", "content": QUESTION}]] * 2,
    "completions": [[{"role": "assistant", "content": answer}] for answer in ANSWERS],
}


class TestFormulas:
    def test_self_certainty(self):
        torch.manual_seed(0)
        logits = torch.randn(5, 7)
        for alpha in (1.0, 2.5):
            p = (logits / alpha).softmax(-1).double()
            expected = (1 / 7 * (math.log(1 / 7) - p.log())).sum(-1)  # KL(U || p)
            value = alpha * (logits / alpha).logsumexp(-1)
            assert torch.allclose(self_certainty(value, logits.mean(-1), 7, alpha).double(), expected, atol=1e-6)

    def test_relative_perplexity(self):
        # Perplexities 2 and 4: the prompt takes away one half. The other way round, 1 - 4 / 2 = -1, where it is
        # clipped.
        two, four, nine = (torch.full((3,), 1 / x).log() for x in (2, 4, 9))
        assert relative_perplexity(two, four) == pytest.approx(0.5)
        assert relative_perplexity(four, two) == pytest.approx(-1.0)
        assert relative_perplexity(nine, two) == -1.0
        assert relative_perplexity(two, two) == 0.0


class TestRewards:
    def test_naive(self, tiny_model_path, logits):
        scores = [scores_from_logits(rows, ids, 1.0) for ids, rows, _ in logits]
        alone = [scores_from_logits(rows, ids, 1.0) for ids, _, rows in logits]
        uniform = [
            (-math.log(308) - rows[: len(ids)].double().log_softmax(-1)).mean().item() for ids, rows, _ in logits
        ]
        ppl, ppl_alone = ([math.exp(-sum(s.log_probs) / len(s.log_probs)) for s in x] for x in (scores, alone))
        expected = {
            SelfCertaintyReward: uniform,
            NegativeEntropyReward: [-sum(s.entropies) / len(s.entropies) for s in scores],
            MeanLogProbReward: [sum(s.log_probs) / len(s.log_probs) for s in scores],
            RelativePerplexityReward: [max(-1, 1 - a / b) for a, b in zip(ppl, ppl_alone, strict=True)],
        }
        for kind in ALL:
            assert kind(tiny_model_path, device="cpu")(**BATCH) == pytest.approx(expected[kind], abs=2e-4), kind

    def test_rows_without_tokens_names_pickles_and_metrics(self, tiny_model_path):
        names = ("self_certainty", "negative_entropy", "mean_log_prob", "relative_perplexity")
        for kind, name in zip(ALL, names, strict=True):
            reward = kind(tiny_model_path, device="cpu")
            assert reward.__name__ == f"{name}_reward"
            copy = pickle.loads(pickle.dumps(reward))
            metrics = {}
            assert copy(**BATCH, log_metric=metrics.__setitem__) == reward(**BATCH)
            assert f"{name}_reward/length_correlation" in metrics
            ragged = {"prompts": ["The capital", "The"], "completions": ["", " end"], "completion_ids": [[], [5, 6]]}
            without, with_tokens = reward(**ragged)
            assert without is None and math.isfinite(with_tokens)
        assert SelfCertaintyReward(tiny_model_path, name="mine").__name__ == "mine"

    @pytest.mark.parametrize("kind", ALL)
    def test_attached_as_by_path(self, kind, tiny_policy_path, tmp_path):
        shared, own = kind(None), kind(tiny_policy_path, device="cpu", name="own")
        trainer = make_trainer(GRPOTrainer, tiny_policy_path, tmp_path, [shared, own], max_steps=1, beta=0.1)
        shared.attach(trainer)
        trainer.train()
        (ours, theirs) = (history(trainer, f"rewards/{name}/mean") for name in (shared.__name__, "own"))
        assert ours == pytest.approx(theirs, abs=1e-4) and len(ours) == 1
