# SPDX-License-Identifier: Apache-2.0
"""
A frozen model on a server: equal to the local one, refused in the handshake if it is not what it must be, and waited for
while it is gone. The server is `tests/support/fake_server.py`; `make test-vllm` runs the same with vLLM.
"""

import asyncio
import logging
import math
import pickle
import threading
import time
from functools import partial
from itertools import permutations, product

import pytest
import torch
from transformers import AutoTokenizer
from trl import GRPOTrainer

from endotrl import DenseGRPOTrainer, EndogenousReward, ServedModel
from endotrl.frozen.served.client import ServerError
from endotrl.rewards import (
    InformationGain,
    MeanLogProbReward,
    RelativePerplexityReward,
    RoutedReward,
    SelfCertaintyReward,
)
from endotrl.rewards.rule import RewardRule
from endotrl.scoring.token_stats import TokenStats

from ..support.fake_server import FakeServer
from ..support.trainers import make_trainer


QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ANSWERS = ["Paris.", "The capital of France is Rome, or so.", "Paris.", "東京 🙂", ""]
BATCH = {
    "prompts": [QUESTION] * len(ANSWERS),
    "completions": [[{"role": "assistant", "content": answer}] for answer in ANSWERS],
}


@pytest.fixture
def server(tiny_model_path):
    with FakeServer(tiny_model_path) as server:
        yield server


def served(server, tokenizer, **settings):
    return EndogenousReward(ServedModel(server.url, asynchronous=False), tokenizer, **settings)


class TestNumbers:
    @pytest.mark.parametrize("protocol", ["vllm", "sglang", "echo"])
    def test_those_of_the_local_engine(self, tiny_model_path, tokenizer, protocol):
        with FakeServer(tiny_model_path, protocol=protocol) as server:
            some = [{}, {"token_reward": "log_prob", "aggregate": "discounted"}]
            more = [{"aggregate": "mean", "criterion": "Be short."}, {"correction": "length"}]
            more += [{"token_reward": "log_prob", "correction": "clip"}]
            for settings in [*some, *(more if protocol == "vllm" else [])]:
                expected = EndogenousReward(tiny_model_path, **settings)(**BATCH)
                assert served(server, tokenizer, **settings)(**BATCH) == pytest.approx(expected, abs=1e-4), settings
            log_prob = {"token_reward": "log_prob"}
            for ours, local in zip(
                served(server, tokenizer, **log_prob).token_rewards(**BATCH),
                EndogenousReward(tiny_model_path, **log_prob).token_rewards(**BATCH),
                strict=True,
            ):
                torch.testing.assert_close(ours, local, atol=1e-5, rtol=0)
            for rival in (MeanLogProbReward, RelativePerplexityReward) if protocol == "vllm" else ():
                url = server.url
                assert rival(url, tokenizer)(**BATCH) == pytest.approx(rival(tiny_model_path)(**BATCH), abs=1e-5)

    def test_generated_ids_unfinished_and_empty(self, tiny_model_path, tokenizer, server):
        ids = [[65, 66, 67], [65, tokenizer.eos_token_id], []]
        batch = {"prompts": ["ab"] * 3, "completions": tokenizer.batch_decode(ids), "completion_ids": ids}
        for truncation in ("terminal", "skip"):
            expected = EndogenousReward(tiny_model_path, truncation=truncation)(**batch)
            ours = served(server, tokenizer, truncation=truncation)(**batch)
            assert ours == pytest.approx(expected, abs=1e-5) and ours[2] is None

    def test_equal_rows_are_sent_once(self, tokenizer, server):
        reward = served(server, tokenizer).load()
        before = len(server.bodies)
        reward(**BATCH)
        assert len(server.bodies) - before == 1 + len(set(ANSWERS))  # the first asks whether it is the same model

    def test_generalist_on_a_server(self, tiny_model_path, tokenizer, server):
        gain = {"token_reward": "log_prob", "correction": InformationGain(server.url)}
        assert EndogenousReward(tiny_model_path, tokenizer, **gain)(**BATCH) == pytest.approx([0.0] * 5, abs=1e-4)

    def test_async_and_pickled(self, tiny_model_path, tokenizer, server):
        reward = EndogenousReward(server.url)  # its tokenizer lies where the server says
        again = pickle.loads(pickle.dumps(reward))
        expected = pytest.approx(EndogenousReward(tiny_model_path)(**BATCH), abs=1e-4)
        assert asyncio.run(reward(**BATCH)) == expected
        assert asyncio.run(again(**BATCH)) == expected and asyncio.run(pickle.loads(pickle.dumps(again))(**BATCH))
        assert reward.model.card.max_length == 255 and reward.config.vocab_size == len(tokenizer)


class TestGauge:
    def test_needs_logits_is_whether_the_soft_values_cancel(self):
        """Oracle: a form is gauge-free if its outcome is the same after V(s) is taken out of every state's logits."""
        torch.manual_seed(0)
        logits, values = torch.randn(4), torch.randn(5) + 3
        forms = product(
            ["bellman", "log_prob"],
            ["sum", "mean", "discounted=0.9", "discounted=1.0", "power=0.5", "first=2", "min"],
            [1.0, 0.9],
            ["terminal", "bootstrap", "skip"],
        )
        for token_reward, aggregate, gamma, truncation in forms:
            rule = RewardRule(token_reward, aggregate, gamma=gamma, truncation=truncation)
            same = True
            for finished in (True, False):
                ends = torch.cat([values[:-1], torch.zeros(1)]) if finished else values
                common = dict(
                    token_ids=torch.arange(4), positions=torch.arange(4), entropies=None, finished=finished,
                    alpha=1.0, num_completion_tokens=4,
                )  # fmt: skip
                full = rule.outcome(TokenStats(chosen_logits=logits, soft_values=ends, **common))
                bare = rule.outcome(
                    TokenStats(chosen_logits=logits - values[:-1], soft_values=torch.zeros(5), **common)
                )
                same = same and (full == bare if full is None else math.isclose(full, bare, abs_tol=1e-5))
            assert same == (rule.needs_logits is None), (token_reward, aggregate, gamma, truncation)

    @pytest.mark.parametrize(
        "settings",
        [
            {"token_reward": "centered"},
            {"token_reward": "self_certainty", "aggregate": "mean"},
            {"alpha": 0.5},
            {"gamma": 0.9},
            {"aggregate": "discounted"},
            {"truncation": "bootstrap"},
        ],
        ids=str,
    )
    def test_refused_before_any_request(self, settings):
        with pytest.raises(ValueError, match="on a server, which only returns log-probabilities"):
            EndogenousReward("http://127.0.0.1:9/v1", **settings)
        for placed in ({"dtype": "float32"}, {"device": "cpu"}, {"offload": True}):
            with pytest.raises(ValueError, match="`(dtype|device|offload)` cannot be set for a model on a server"):
                EndogenousReward("http://127.0.0.1:9/v1", **placed)

    def test_of_rivals_and_tokens(self, tokenizer, server):
        with pytest.raises(ValueError, match="whole next-token distribution"):
            SelfCertaintyReward(server.url)
        for ask in ("token_rewards", "outcome_and_token_rewards"):
            with pytest.raises(ValueError, match='Use `token_reward="log_prob"`'):
                getattr(served(server, tokenizer), ask)(**BATCH)


class TestHandshake:
    def refused(self, server, tokenizer, match):
        with pytest.raises(ServerError, match=match):
            served(server, tokenizer).load()

    def test_other_tokenizer(self, tiny_model_path, tiny_policy_path):
        for theirs, ours in permutations((tiny_model_path, tiny_policy_path)):
            with FakeServer(theirs) as server:  # the smaller one knows few ids of the larger
                self.refused(server, AutoTokenizer.from_pretrained(ours), "split a text into different tokens")

    @pytest.mark.parametrize("protocol", ["vllm", "sglang", "echo"])
    def test_bos(self, tiny_model_path, tokenizer, protocol, tmp_path):
        # The same tokens, but the server's tokenizer begins texts with one more.
        from tokenizers.processors import TemplateProcessing

        other = AutoTokenizer.from_pretrained(tiny_model_path)
        other.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", other.convert_tokens_to_ids("<|im_start|>"))]
        )
        other.save_pretrained(tmp_path)
        with FakeServer(tiny_model_path, tokenizer=str(tmp_path), protocol=protocol) as server:
            self.refused(server, tokenizer, "different tokens")

    @pytest.mark.parametrize("shift", [0.0, -30.0])
    @pytest.mark.parametrize("max_logprobs", [-1, 20])
    @pytest.mark.parametrize("protocol", ["vllm", "sglang", "echo"])
    def test_logits(self, tiny_model_path, tokenizer, shift, max_logprobs, protocol):
        # Shifted, none is above 0, as those of GPT-2.
        settings = {"mode": "raw_logits", "shift": shift, "max_logprobs": max_logprobs, "protocol": protocol}
        with FakeServer(tiny_model_path, **settings) as server:
            self.refused(server, tokenizer, "not log-probabilities: ")

    def test_generated_tokens_only(self, tiny_model_path, tokenizer):
        with FakeServer(tiny_model_path, protocol="generated") as server:
            self.refused(server, tokenizer, "does not return log-probabilities of prompt tokens")

    def test_no_server_of_models(self, tokenizer, monkeypatch):
        monkeypatch.setattr("endotrl.frozen.served.client.FIRST_CONTACT", 0.2)
        with pytest.raises(ServerError, match="No server responded"):
            EndogenousReward("http://127.0.0.1:9/v1", tokenizer).load()

    def test_which_model(self, tiny_model_path, tokenizer):
        with FakeServer(tiny_model_path, names=("a", "b")) as server:
            self.refused(server, tokenizer, "has the models a, b. Add the name of one to the URL")
            reward = EndogenousReward(f"{server.url}#b", tokenizer).load()
            assert server.bodies[-1]["model"] == "b" and "b served at" in repr(reward)
            with pytest.raises(ServerError, match="no model 'c'. Its models: a, b"):
                EndogenousReward(f"{server.url}#c", tokenizer).load()

    def test_key(self, tiny_model_path, tokenizer, monkeypatch, caplog):
        caplog.set_level(logging.DEBUG)
        with FakeServer(tiny_model_path, key="sk-secret") as server:
            self.refused(server, tokenizer, "ENDOTRL_API_KEY")
            monkeypatch.setenv("ENDOTRL_API_KEY", "sk-secret")
            reward = served(server, tokenizer).load()
            assert b"sk-secret" not in pickle.dumps(reward) and "sk-secret" not in repr(vars(reward.model))
            monkeypatch.setenv("ENDOTRL_API_KEY", "sk-other")
            with pytest.raises(ServerError) as error:  # the server repeats it
                served(server, tokenizer).load()
            assert "sk-other" not in str(error.value)
        assert "sk-" not in caplog.text
        with pytest.raises(ValueError, match="would appear in logs"):
            ServedModel("http://me:pass@host/v1")

    def test_length_limit(self, tiny_model_path, tokenizer):
        with FakeServer(tiny_model_path, max_model_len=130) as server:
            with pytest.raises(ValueError, match="129"):
                served(server, tokenizer)(prompts=["a"], completions=["b" * 129])
            cut = served(server, tokenizer, overlong_prompt="truncate_left")
            assert cut(prompts=["a" * 200], completions=["b"])[0] < 0


class TestFaults:
    """After each, the numbers are those without it, or there is an error."""

    @pytest.mark.parametrize("faults", [["500"], ["503", "429"], ["half"], ["drop", "drop"], ["short"], ["", "500"]])
    def test_temporary(self, tokenizer, server, faults):
        reward = served(server, tokenizer)
        expected = reward(**BATCH)
        server.faults = list(faults)
        assert reward(**BATCH) == expected and not server.faults

    @pytest.mark.parametrize(
        ("fault", "error", "match"),
        [("nan", ValueError, "NaN"), ("wrong_id", (ServerError), "other tokens|different tokens")],
    )
    def test_lasting(self, tokenizer, server, fault, error, match, monkeypatch):
        monkeypatch.setattr("endotrl.frozen.served.client.BROKEN_ANSWERS", 1)
        reward = served(server, tokenizer).load()
        server.faults = ["", *[fault] * 20]  # it is the same model
        with pytest.raises(error, match=match):
            reward(prompts=["a"], completions=["b"])

    def test_errors_that_do_not_end(self, tokenizer, server, monkeypatch):
        monkeypatch.setattr("endotrl.frozen.served.client.BROKEN_ANSWERS", 3)
        reward = served(server, tokenizer).load()
        server.faults = ["500"] * 100
        with pytest.raises(ServerError, match="3 unusable responses. Last error: HTTP 500, .*fault 500"):
            reward(**BATCH)

    def test_slow(self, tokenizer, server):
        reward = EndogenousReward(ServedModel(server.url, timeout=0.5, asynchronous=False), tokenizer).load()
        server.faults = ["slow"]
        began = time.monotonic()
        assert reward(prompts=["a"], completions=["b"])[0] < 0
        assert time.monotonic() - began < 3.0  # it was not waited for

    def test_concurrency(self, tokenizer, server):
        reward = EndogenousReward(ServedModel(server.url, concurrency=3, asynchronous=False), tokenizer).load()
        server.delay, server.most_at_once = 0.05, 0
        reward(prompts=["a"] * 12, completions=[str(i) for i in range(12)])
        assert server.most_at_once == 3

    def test_killed_and_restarted(self, tiny_model_path, tokenizer, server, caplog):
        reward = served(server, tokenizer)
        expected = reward(**BATCH)
        server.__exit__()
        result = []
        thread = threading.Thread(target=lambda: result.append(reward(**BATCH)))
        thread.start()
        time.sleep(0.7)
        assert not result  # it waits
        with FakeServer(tiny_model_path, port=server.port):
            thread.join(20)
        assert result == [expected] and "does not respond" in caplog.text

    def test_another_model_comes_back(self, tiny_model_path, tokenizer, server, tmp_path):
        reward = served(server, tokenizer).load()
        server.__exit__()
        torch.manual_seed(3)
        model = type(server.model)(server.model.config)
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        with FakeServer(str(tmp_path), port=server.port):
            with pytest.raises(ServerError, match="now runs another model than before"):
                reward(**BATCH)

    def test_one_of_two_dies(self, tiny_model_path, tokenizer, server):
        with FakeServer(tiny_model_path) as other:
            reward = EndogenousReward(ServedModel([server.url, other.url], asynchronous=False), tokenizer)
            expected = reward(**BATCH)
            assert server.bodies and other.bodies  # in turn
            server.__exit__()
            assert reward(**BATCH) == expected


def test_by_column(tiny_model_path, tokenizer, server):
    def length(completions, **kwargs):
        return [float(len(completion[0]["content"])) for completion in completions]

    frozen = EndogenousReward(server.url, tokenizer, name="frozen")
    reward = RoutedReward({"a": frozen, "b": length}, column="kind")
    kinds = ["b", "a", "a", "b", "a"]
    rewards = asyncio.run(reward(**BATCH, kind=kinds, trainer_state=None))
    local = EndogenousReward(tiny_model_path)(**BATCH)
    expected = [
        len(answer) if kind == "b" else value for kind, answer, value in zip(kinds, ANSWERS, local, strict=True)
    ]
    assert rewards == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ValueError, match="one of \\['a', 'b'\\], but it also contains 'c', 7"):
        asyncio.run(reward(**BATCH, kind=["a", "c", "a", 7, "a"]))
    with pytest.raises(ValueError, match="is missing"):
        asyncio.run(reward(**BATCH))
    with pytest.raises(ValueError, match="distinct names"):
        RoutedReward({"a": frozen, "b": EndogenousReward(server.url, tokenizer, name="frozen")})


class TestTrainers:
    def test_gathered_by_trl(self, tiny_policy_path, tmp_path):
        running = []
        with FakeServer(tiny_policy_path, max_model_len=512) as server:

            async def other(completions, **kwargs):
                running.append(len(server.bodies))
                await asyncio.sleep(0.2)
                running.append(len(server.bodies))
                return [0.0] * len(completions)

            tokenizer = AutoTokenizer.from_pretrained(tiny_policy_path)
            reward = EndogenousReward(server.url, tokenizer).load()
            local = EndogenousReward(tiny_policy_path, name="local")
            settings = {"max_steps": 1, "beta": 0.1}
            trainer = make_trainer(GRPOTrainer, tiny_policy_path, tmp_path, [reward, other, local], **settings)
            trainer.train()
        assert running[1] > running[0]  # requests were sent while the other function waited
        log = trainer.state.log_history[0]
        ours, theirs = (log[f"rewards/{name}/mean"] for name in ("endogenous_reward", "local"))
        assert ours == pytest.approx(theirs, abs=1e-4)

    def test_rewards_of_tokens(self, tiny_policy_path, tmp_path):
        with FakeServer(tiny_policy_path, max_model_len=512) as server:
            tokenizer = AutoTokenizer.from_pretrained(tiny_policy_path)
            make = partial(make_trainer, DenseGRPOTrainer, tiny_policy_path, tmp_path, max_steps=1, beta=0.1)
            with pytest.raises(ValueError, match="Bellman rewards of single tokens"):
                make(EndogenousReward(server.url, tokenizer))
            reward = EndogenousReward(server.url, tokenizer, token_reward="log_prob")
            trainer = make(reward)
            trainer.train()
        assert "token_rewards/endogenous_reward/mean" in trainer.state.log_history[0]
        with pytest.raises(ValueError, match="does not need the trainer's"):
            reward.attach(trainer)
