# SPDX-License-Identifier: Apache-2.0
"""The served scorer with a real vLLM server, on a CPU: `make test-vllm`, about 15 minutes."""

import asyncio
import random
import threading

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback
from trl import GRPOTrainer

from endotrl import EndogenousReward, ServedModel
from endotrl.frozen.served.client import ServerError

from ..support.helpers import SMALL
from ..support.trainers import history, make_trainer


pytestmark = pytest.mark.slow
WORDS = "the cat sat on a mat and 42 dogs, (naïve) 東京 said: return x ** 2; Paris is in France.\n".split(" ")


@pytest.fixture(scope="module")
def server(start_vllm):
    return start_vllm()


@pytest.fixture(scope="module")
def tokenizer(smollm2_path):
    return AutoTokenizer.from_pretrained(smollm2_path)


def texts(count, longest, seed):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, longest))) for _ in range(count)]


def test_exact_on_ragged_rows(server, smollm2_path, tokenizer):
    prompts = [[{"role": "user", "content": text}] for text in texts(16, 200, 0)]
    completions = [[{"role": "assistant", "content": text}] for text in texts(16, 100, 1)]
    local = EndogenousReward(smollm2_path, token_reward="log_prob").token_rewards(prompts, completions)
    served = EndogenousReward(server.url, tokenizer, token_reward="log_prob").token_rewards(prompts, completions)
    errors = torch.cat([a - b for a, b in zip(local, served, strict=True)]).abs()
    print(f"{len(errors)} tokens: mean error {errors.mean():.2g} nats, largest {errors.max():.2g}")
    assert errors.mean() < 1e-4 and errors.max() < 1e-3


def test_handshake_and_errors(server, tokenizer, tiny_model_path):
    with pytest.raises(ServerError, match="different tokens"):
        EndogenousReward(server.url, AutoTokenizer.from_pretrained(tiny_model_path)).load()
    with pytest.raises(ServerError, match="no model 'other'"):
        EndogenousReward(f"{server.url}#other", tokenizer).load()
    reward = EndogenousReward(server.url, tokenizer).load()
    assert reward.model.card.max_length == 1023  # vLLM needs one for what it generates
    ids = [[504] * 1022, [504] * 1023]
    fits, too_long = (
        {"prompts": ["a"], "completions": tokenizer.batch_decode([i]), "completion_ids": [i]} for i in ids
    )
    assert asyncio.run(reward(**fits))[0] < 0
    with pytest.raises(ValueError, match="1023"):
        asyncio.run(reward(**too_long))


def test_logits_are_refused(start_vllm, tokenizer):
    server = start_vllm("--logprobs-mode", "raw_logits")
    with pytest.raises(
        ServerError, match=r"not log-probabilities: the probabilities of \d+ tokens sum to .*raw_logprobs"
    ):
        EndogenousReward(server.url, tokenizer).load()
    server.kill()


def test_killed_and_restarted_during_training(server, smollm2_path, tokenizer, tmp_path):
    torch.manual_seed(0)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SMALL, **ids)).save_pretrained(tmp_path / "policy")

    class Kill(TrainerCallback):
        restart = None

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                server.kill()
                self.restart = threading.Timer(5.0, server.start)
                self.restart.start()

    reward = EndogenousReward(ServedModel(server.url, patience=900), tokenizer).load()
    rewards = [reward, EndogenousReward(smollm2_path, name="local")]
    settings = {"per_device_train_batch_size": 4, "max_completion_length": 12, "max_steps": 4, "beta": 0.1}
    settings |= {"train_dataset": Dataset.from_dict({"prompt": texts(8, 10, 2)}), "logging_steps": 1}
    settings |= {"processing_class": tokenizer, "callbacks": [Kill()]}
    trainer = make_trainer(GRPOTrainer, str(tmp_path / "policy"), tmp_path, rewards, **settings)
    trainer.train()
    served, local = (history(trainer, f"rewards/{name}/mean") for name in ("endogenous_reward", "local"))
    assert served == pytest.approx(local, abs=1e-2) and len(served) == 4  # nothing is lost
