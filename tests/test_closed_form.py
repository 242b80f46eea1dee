# SPDX-License-Identifier: Apache-2.0
r"""
RL on the endogenous reward with a KL penalty has a closed-form optimum, and training must reach it.

With $r(y) = \alpha \log \hat\pi(y)$ the maximiser of $E_\pi[r] - \beta\,KL(\pi\|\hat\pi)$ is the power distribution
$\hat\pi^{1 + \alpha/\beta}$, normalised. Vocabulary and completions are so small that every completion is enumerated.
One that is cut off at the last token is a leaf too: `truncation="terminal"` gives it its log-probability, as the
closed form wants.

What TRL's trainers optimise on-policy at temperature 1, with G completions a group ($s$: state, $\pi_s$: the policy's
next token in it):

- **RLOO** subtracts $\beta \log(\pi/\hat\pi)$ of the whole completion from its reward, and its baseline leaves the
  completion out: the gradient is exact. Fixed point: the power distribution, for completions of any length.
- **GRPO**'s baseline, the mean of the group, includes the completion itself, which scales the gradient of the reward,
  but not of the KL, by $c = 1 - 1/G$. Its KL is a loss of each token, $k_3 = e^d - d - 1$ with
  $d = \log(\hat\pi_s/\pi_s)$:
  - `use_bias_correction_kl=True` (default since TRL 1.16) multiplies it by $\pi_s / \mathrm{stopgrad}(\pi_s)$, so that
    its gradient is that of the reverse KL, $KL(\pi_s\|\hat\pi_s)$. Fixed point: $\pi_s(a) \propto \hat\pi_s(a)
    e^{c Q(s,a)/\beta}$, $Q$ the expected reward that follows. With one free token: $\hat\pi^{1 +
    c\alpha/\beta}$. With more, it is not the power distribution, because the KL of later tokens is not counted against earlier ones.
  - `use_bias_correction_kl=False` takes the gradient of $k_3$ alone, which is that of the forward KL,
    $KL(\hat\pi_s\|\pi_s)$. Fixed point: $\pi_s(a) = \hat\pi_s(a) / (\lambda - c Q(s,a)/\beta)$, $\lambda$ normalises
    it.
- GRPO needs `scale_rewards="none"`: dividing by the standard deviation of the group multiplies $\beta$ by it. And it
  needs a `loss_type` that weighs all tokens alike (not `"grpo"`, which weighs those of shorter completions more).
"""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from trl import GRPOTrainer, RLOOTrainer

from endotrl import EndogenousReward
from endotrl.forecasting.policies import Objective, Samples

from .support.trainers import make_trainer


WORDS = ["<eos>", "a", "b", "c", "d", "?"]
EOS, PROMPT = 0, "?"
PROMPT_IDS = [WORDS.index(PROMPT)]
LOSS = {"scale_rewards": "none", "loss_type": "dr_grpo"}


def save(path: Path, model: PreTrainedModel) -> str:
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}))
    backend.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>").save_pretrained(path)
    model.save_pretrained(path)
    return str(path)


def llama_config(**kwargs: Any) -> LlamaConfig:
    special = {"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": EOS}
    return LlamaConfig(vocab_size=len(WORDS), max_position_embeddings=16, **special, **kwargs)


@pytest.fixture(scope="module")
def transformer(tmp_path_factory):
    """A small random transformer, with log-probabilities about 1 nat apart."""
    torch.manual_seed(3)
    config = llama_config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, initializer_range=0.15
    )
    return save(tmp_path_factory.mktemp("transformer"), LlamaForCausalLM(config))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """
    A table of next-token probabilities: without a layer, the state of a Llama is its last token. The second token is
    free in some states (a, c) and uniform in the others (b, d), so that its KL depends on the first token.
    """
    peaked, uniform = [0.36, 0.16, 0.16, 0.16, 0.16, 1e-6], [0.2, 0.2, 0.2, 0.2, 0.2, 1e-6]
    first = [0.1, 0.25, 0.25, 0.2, 0.2, 1e-6]
    probabilities = torch.tensor([uniform, peaked, uniform, peaked, uniform, first])  # (state, token)
    size = 8
    model = LlamaForCausalLM(
        llama_config(hidden_size=size, intermediate_size=size, num_hidden_layers=0, num_attention_heads=1)
    )
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(len(WORDS), size))
        # The norm before the head makes a one-hot embedding sqrt(size) long.
        model.lm_head.weight.zero_()
        model.lm_head.weight[:, : len(WORDS)] = probabilities.log().T / math.sqrt(size)
    return save(tmp_path_factory.mktemp("table"), model)


def all_completions(horizon: int) -> list[list[int]]:
    """Every completion of at most `horizon` tokens: ended by EOS, or cut off at the horizon."""
    words = [token for token in range(len(WORDS)) if token != EOS]
    ended = [[*prefix, EOS] for length in range(horizon) for prefix in itertools.product(words, repeat=length)]
    return ended + [list(prefix) for prefix in itertools.product(words, repeat=horizon)]


def endogenous_rewards(reward: EndogenousReward, horizon: int) -> Tensor:
    """Reward of every completion, float64."""
    ids = all_completions(horizon)
    texts = [" ".join(WORDS[token] for token in row if token != EOS) for row in ids]
    return torch.tensor(
        reward(prompts=[PROMPT] * len(ids), completions=texts, completion_ids=ids), dtype=torch.float64
    )


@torch.no_grad()
def next_token_log_probs(model: PreTrainedModel, prefix: list[int], temperature: float = 1.0) -> Tensor:
    logits = model.eval()(torch.tensor([PROMPT_IDS + prefix])).logits[0, -1]
    return (logits.double() / temperature).log_softmax(-1)


def log_probs_of(model: PreTrainedModel, horizon: int, temperature: float = 1.0) -> Tensor:
    """Log-probability of every completion; plain forward passes, not endotrl's."""
    states = {tuple(ids[:h]) for ids in all_completions(horizon) for h in range(len(ids))}
    table = {state: next_token_log_probs(model, list(state), temperature) for state in states}
    return torch.stack(
        [sum(table[tuple(ids[:h])][ids[h]] for h in range(len(ids))) for ids in all_completions(horizon)]
    )


def power(log_probs: Tensor, exponent: float) -> Tensor:
    """Log-probabilities of the power distribution."""
    return (exponent * log_probs).log_softmax(0)


def kl(log_p: Tensor, log_q: Tensor) -> float:
    return (log_p.exp() * (log_p - log_q)).sum().item()


def grpo_fixed_point(model: PreTrainedModel, horizon: int, beta: float, scale: float, corrected: bool) -> Tensor:
    """
    Where GRPO ends (see above), by backward recursion over states; `scale` is c. Log-probability of every completion.
    """
    completions = [tuple(ids) for ids in all_completions(horizon)]
    value = dict(zip(completions, log_probs_of(model, horizon).tolist(), strict=True))  # reward of a leaf
    policy = {}
    for state in sorted({ids[:h] for ids in completions for h in range(len(ids))}, key=len, reverse=True):
        reference = next_token_log_probs(model, list(state))
        q = torch.tensor([value[*state, token] for token in range(len(WORDS))], dtype=torch.float64)
        x = scale * q / beta
        if corrected:
            probabilities = (reference + x).softmax(0)
        else:
            low, high = x.max().item(), x.max().item() + 1  # the sum falls from infinity to at most 1 on the way
            for _ in range(100):
                middle = (low + high) / 2
                low, high = (middle, high) if (reference.exp() / (middle - x)).sum() > 1 else (low, middle)
            probabilities = reference.exp() / (high - x)
        policy[state] = probabilities.log()
        value[state] = (probabilities * q).sum().item()
    return torch.stack([sum(policy[ids[:h]][ids[h]] for h in range(len(ids))) for ids in completions])


class TestExactGradient:
    @pytest.mark.parametrize("alpha", [1.0, 0.7])
    def test_reward_of_every_completion(self, alpha, transformer):
        model = AutoModelForCausalLM.from_pretrained(transformer)
        log_probs = log_probs_of(model, horizon=3, temperature=alpha)
        assert len(log_probs) == 1 + 5 + 25 + 125
        assert log_probs.exp().sum().item() == pytest.approx(1.0)
        rewards = endogenous_rewards(EndogenousReward(transformer, alpha=alpha), horizon=3)
        torch.testing.assert_close(rewards, alpha * log_probs, rtol=0, atol=1e-5)

    @pytest.mark.parametrize(
        ("shift", "alpha", "beta"), [(0.0, 1.0, 1.0), (0.0, 1.0, 0.3), (0.0, 0.7, 1.0), (3.0, 0.7, 0.3)]
    )
    def test_ascent_reaches_the_power_distribution(self, shift, alpha, beta, transformer, tmp_path):
        horizon = 3
        reference = log_probs_of(AutoModelForCausalLM.from_pretrained(transformer), horizon, temperature=alpha)
        reward = EndogenousReward(with_state_constants(transformer, tmp_path, shift), alpha=alpha)
        rewards = endogenous_rewards(reward, horizon)

        completions = all_completions(horizon)
        states = sorted({tuple(ids[:h]) for ids in completions for h in range(len(ids))})
        row_of = {state: row for row, state in enumerate(states)}
        # Position of (state, token) in the flattened table for every token of every completion; one more for "no
        # token".
        places = torch.full((len(completions), horizon), len(states) * len(WORDS))
        for i, ids in enumerate(completions):
            for h, token in enumerate(ids):
                places[i, h] = row_of[tuple(ids[:h])] * len(WORDS) + token

        logits = torch.zeros(len(states), len(WORDS), dtype=torch.float64, requires_grad=True)

        def policy() -> Tensor:
            table = torch.cat([logits.log_softmax(-1).flatten(), torch.zeros(1, dtype=torch.float64)])
            return table[places].sum(-1)

        optimizer = torch.optim.Adam([logits], lr=0.1)
        for _ in range(1500):
            log_probs = policy()
            objective = (log_probs.exp() * (rewards - beta * (log_probs - reference))).sum()
            optimizer.zero_grad()
            (-objective).backward()
            optimizer.step()

        target = power(reference, 1 + alpha / beta)
        assert kl(reference, target) > 0.1
        assert kl(policy().detach(), target) < 1e-3


def with_state_constants(model: str, path: Path, scale: float) -> str:
    """
    The same model with a random constant of each state added to its logits: the same row to all words of the head.
    """
    shifted = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        constant = torch.randn(shifted.lm_head.weight.shape[1], generator=torch.Generator().manual_seed(0))
        shifted.lm_head.weight += scale * constant
    return save(path, shifted)


def train(
    trainer_class: type,
    model: str,
    output_dir: Path,
    horizon: int,
    beta: float,
    lr: float,
    alpha: float = 1.0,
    **kwargs: Any,
) -> PreTrainedModel:
    """
    A TRL trainer on the one prompt, of 256 completions a step. There are few different ones: the reward of each is
    calculated when it is first seen. (What the reward is with its batches: `tests/rewards/test_trl_integration.py`.)
    """
    endogenous, known = EndogenousReward(model, alpha=alpha), {}

    def reward(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        new = {tuple(ids): i for i, ids in enumerate(completion_ids) if tuple(ids) not in known}
        if new:
            columns = ([column[i] for i in new.values()] for column in (prompts, completions, completion_ids))
            known.update(zip(new, endogenous(*columns), strict=True))
        return [known[tuple(ids)] for ids in completion_ids]

    settings = {"per_device_train_batch_size": 256, "num_generations": 256, "max_steps": 100, "seed": 0}
    settings |= {"max_grad_norm": math.inf, "logging_steps": 1000, "max_completion_length": horizon, **kwargs}
    trainer = make_trainer(
        trainer_class,
        model,
        output_dir,
        reward,
        learning_rate=lr,
        beta=beta,
        temperature=alpha,  # the policy is softmax(f/alpha), as the reward takes it
        train_dataset=Dataset.from_dict({"prompt": [PROMPT] * 256}),
        **settings,
    )
    trainer.train()
    return trainer.model


@pytest.mark.slow
class TestTrainers:
    @pytest.mark.parametrize("alpha", [1.0, 0.7])
    def test_grpo_with_one_free_token(self, alpha, transformer, tmp_path):
        base = log_probs_of(AutoModelForCausalLM.from_pretrained(transformer), 1, temperature=alpha)
        target = power(base, 1 + alpha)
        trained = train(GRPOTrainer, transformer, tmp_path, 1, beta=1.0, lr=0.01, alpha=alpha, **LOSS)
        assert kl(base, target) > 0.1
        assert kl(log_probs_of(trained, 1, temperature=alpha), target) < 2e-3

    def test_small_groups_weaken_the_reward_in_grpo(self, transformer, tmp_path):
        base = log_probs_of(AutoModelForCausalLM.from_pretrained(transformer), 1)
        trained = train(GRPOTrainer, transformer, tmp_path, 1, beta=0.5, lr=0.01, num_generations=2, **LOSS)
        log_probs = log_probs_of(trained, 1)
        assert kl(log_probs, power(base, 1 + (1 - 1 / 2) / 0.5)) < 4e-3
        assert kl(log_probs, power(base, 1 + 1 / 0.5)) > 2e-2

    @pytest.mark.parametrize("corrected", [True, False])
    def test_grpo_with_two_free_tokens(self, corrected, table, tmp_path):
        model, beta = AutoModelForCausalLM.from_pretrained(table), 0.25
        predictions = {kind: grpo_fixed_point(model, 2, beta, 255 / 256, kind) for kind in (True, False)}
        base = log_probs_of(model, 2)
        target = power(base, 1 + 1 / beta)
        trained = train(GRPOTrainer, table, tmp_path, 2, beta=beta, lr=0.02, use_bias_correction_kl=corrected, **LOSS)
        log_probs = log_probs_of(trained, 2)
        assert kl(base, target) > 1.0
        assert kl(log_probs, predictions[corrected]) < 1e-2
        assert kl(log_probs, predictions[not corrected]) > 0.1
        # Near the power distribution, but not at it.
        assert 0.03 < kl(log_probs, target) < 0.12

    def test_grpo_divided_by_the_deviation_of_the_group(self, table, tmp_path):
        model, beta, ids = AutoModelForCausalLM.from_pretrained(table), 2.0, all_completions(2)
        base = log_probs_of(model, 2)
        samples = Samples([ids], [base.numpy()], [[0.0] * len(ids)], [base.numpy()])
        target = torch.from_numpy(samples.policy(Objective("grpo", 8, "group"), beta))
        scaled = {**LOSS, "scale_rewards": "group"}
        trained = train(GRPOTrainer, table, tmp_path, 2, beta=beta, lr=0.02, num_generations=8, max_steps=80, **scaled)
        assert kl(base, target) > 0.03
        assert kl(log_probs_of(trained, 2), target) < 5e-3

    def test_rloo_with_two_free_tokens(self, table, tmp_path):
        base, beta = log_probs_of(AutoModelForCausalLM.from_pretrained(table), 2), 0.25
        target = power(base, 1 + 1 / beta)
        trained = train(RLOOTrainer, table, tmp_path, 2, beta=beta, lr=0.02, num_generations=8)
        assert kl(base, target) > 1.0
        assert kl(log_probs_of(trained, 2), target) < 5e-3

    def test_rloo_with_three_free_tokens(self, transformer, tmp_path):
        base = log_probs_of(AutoModelForCausalLM.from_pretrained(transformer), 3)
        target = power(base, 2)
        trained = train(RLOOTrainer, transformer, tmp_path, 3, beta=1.0, lr=0.005, max_steps=150)
        assert kl(base, target) > 0.3
        # What is left is the optimizer's, on a transformer: the tables above go further.
        assert kl(log_probs_of(trained, 3), target) < 0.1 * kl(base, target)
