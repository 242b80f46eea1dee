# SPDX-License-Identifier: Apache-2.0
"""
`PPOTrainer` on tiny models: advantages and losses against naive references (one sequence at a time, plain forward
passes, loops over tokens), and optima that are known.
"""

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from endotrl import EndogenousReward, PPOTrainer
from endotrl.rewards import DenseScores
from endotrl.trainers.value_head import CRITIC_FILE, critic_of, is_critic

from ..support import trainers
from ..support.helpers import assert_same_to_the_bit, weights
from ..support.trainers import LORA, PROMPTS, history, rollout, rows_of, set_head


EOS = 2


def make_trainer(
    path: Any, output_dir: Path, reward: Any = None, dataset: Any = PROMPTS, **settings: Any
) -> PPOTrainer:
    defaults = {"max_steps": 4, "learning_rate": 1e-2, "value_learning_rate": 1e-2, "logging_steps": 1}
    reward = EndogenousReward(path) if reward is None else reward
    return trainers.make_trainer(
        PPOTrainer, path, output_dir, reward, train_dataset=dataset, **{**defaults, **settings}
    )


@pytest.fixture
def make(tiny_policy_path, tmp_path):
    """[`make_trainer`] with the tiny policy, in the test's folder."""
    return functools.partial(make_trainer, tiny_policy_path, tmp_path)


def policy_weights(trainer: PPOTrainer) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights(trainer.model).items() if not is_critic(name)}


@torch.no_grad()
def naive(model: Any, prompt: list[int], completion: list[int]) -> tuple[list[float], list[float], Tensor]:
    """Log-probabilities and soft values (one more) of a completion, and the hidden states of its states."""
    outputs = model(torch.tensor([prompt + completion]), output_hidden_states=True)
    logits = outputs.logits[0, len(prompt) - 1 :].float()
    log_probs = logits[:-1].log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
    return log_probs.tolist(), logits.logsumexp(-1).tolist(), outputs.hidden_states[-1][0, len(prompt) - 1 :]


def naive_gae(
    rewards: list[float], values: list[float], gamma: float, lam: float, final: float
) -> tuple[list[float], list[float]]:
    """Advantages as the sum over all later TD errors (no recurrence), and returns."""
    following = [*values[1:], final]
    td = [r + gamma * w - v for r, w, v in zip(rewards, following, values, strict=True)]
    advantages = [sum((gamma * lam) ** (k - h) * td[k] for k in range(h, len(td))) for h in range(len(td))]
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


def lengths(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """A reward of the whole completion."""
    return [len(ids) / 4 - 1 for ids in completion_ids]


class TestAdvantages:
    @pytest.mark.parametrize("token_reward", ["bellman", "log_prob"])
    @pytest.mark.parametrize(
        ("truncation", "reward_truncation", "soft_value_baseline"),
        [
            ("terminal", "terminal", True),
            ("terminal", "terminal", False),
            ("terminal", "bootstrap", True),
            ("bootstrap", "terminal", True),
            ("bootstrap", "bootstrap", False),
        ],
    )
    def test_by_hand(self, token_reward, truncation, reward_truncation, soft_value_baseline, tiny_policy_path, make):
        gamma, lam, beta = 0.9, 0.7, 0.1
        form = {"token_reward": token_reward, "gamma": gamma, "truncation": reward_truncation}
        settings = {"reward_weights": [0.5, 2.0], "gamma": gamma, "lam": lam, "beta": beta, "truncation": truncation}
        settings |= {"soft_value_baseline": soft_value_baseline, "whiten_advantages": False, "scale_value_loss": False}
        trainer = make([EndogenousReward(tiny_policy_path, **form), lengths], **settings)
        set_head(trainer)
        with torch.no_grad():  # so that the policy is not the reference any more
            trainer.model.lm_head.weight.mul_(1.3)
        head = critic_of(trainer._base_policy).head
        output = rollout(trainer)
        frozen = AutoModelForCausalLM.from_pretrained(tiny_policy_path).eval()
        rows = rows_of(output)
        for i, (prompt, completion) in enumerate(rows):
            log_probs, _, hidden = naive(trainer.model, prompt, completion)
            ref_log_probs, soft_values, _ = naive(frozen, prompt, completion)
            predicted = (hidden @ head.weight + head.bias).tolist()
            rewards, offset = [], []
            finished = completion[-1] == EOS
            for h in range(len(completion)):
                ends = h + 1 == len(completion) and (finished or reward_truncation == "terminal")
                next_value = 0.0 if ends else soft_values[h + 1]
                reward = ref_log_probs[h]
                if token_reward == "bellman":
                    reward += soft_values[h] - gamma * next_value
                reward *= 0.5
                reward -= beta * (log_probs[h] - ref_log_probs[h])
                rewards.append(reward)
                offset.append(0.5 * soft_values[h] if token_reward == "bellman" and soft_value_baseline else 0.0)
            rewards[-1] += 2.0 * (len(completion) / 4 - 1)
            final = predicted[len(completion)] if truncation == "bootstrap" and not finished else 0.0
            values = [u + v for u, v in zip(predicted, offset, strict=False)]
            advantages, returns = naive_gae(rewards, values, gamma, lam, final)
            targets = [r - v for r, v in zip(returns, offset, strict=True)]
            n = len(completion)
            found = {"advantages": advantages, "value_targets": targets, "old_values": predicted[:n]}
            for name, expected in found.items():
                torch.testing.assert_close(output[name][i, :n], torch.tensor(expected), atol=2e-4, rtol=1e-4)
                assert not output[name][i, n:].any(), f"{name} of padding"
            assert output["value_mask"][i].tolist() == [h < n for h in range(output["value_mask"].shape[1])]
        assert len({len(completion) for _, completion in rows}) > 1  # the test has padding,
        assert {completion[-1] == EOS for _, completion in rows} == {True, False}  # and completions of both kinds

    def test_a_call_of_a_tool_without_room_for_an_answer(self, tiny_policy_path, make):
        """It is truncated, though the policy's last token is EOS: the value is that of the state after the result."""
        prompt, completion = [3, 4], [7, EOS, 9, 10]
        row = {"prompt_ids": prompt, "completion_ids": completion, "logprobs": [0.0] * 4, "env_mask": [1, 1, 0, 0]}
        settings = {"rollout_func": lambda prompts, trainer: {k: [v] * len(prompts) for k, v in row.items()}}
        settings |= {"truncation": "bootstrap", "lam": 1.0, "beta": 0.0, "whiten_advantages": False}
        trainer = make(EndogenousReward(tiny_policy_path, token_reward="log_prob"), **settings)
        set_head(trainer)
        output = rollout(trainer)
        log_probs, _, hidden = naive(trainer.model, prompt, completion)
        head = critic_of(trainer._base_policy).head
        final = (hidden[-1] @ head.weight + head.bias).item()
        expected = [log_probs[0] + log_probs[1] + final, log_probs[1] + final]
        assert output["value_targets"][0, :2].tolist() == pytest.approx(expected, abs=1e-4)

    def test_td_error_of_the_soft_value_is_the_log_probability(self, tiny_policy_path, make):
        trainer = make(critic="none", lam=0.0, beta=0.0, whiten_advantages=False, max_steps=1)
        output = rollout(trainer)
        assert "old_values" not in output
        frozen = AutoModelForCausalLM.from_pretrained(tiny_policy_path).eval()
        for i, (prompt, completion) in enumerate(rows_of(output)):
            expected = torch.tensor(naive(frozen, prompt, completion)[0])
            torch.testing.assert_close(output["advantages"][i, : len(completion)], expected, atol=1e-4, rtol=1e-4)

    def test_numbers_that_are_not_finite(self, make):
        def infinite(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
            return [0.0, math.inf] * (len(completion_ids) // 2)

        with pytest.raises(ValueError, match="'infinite' returned an infinite reward"):
            make(infinite).train()
        trainer = make()
        set_head(trainer, bias=math.nan)
        with pytest.raises(ValueError, match="values of 8 of 8 completions are NaN"):
            rollout(trainer)

    def test_completions_without_a_reward(self, make):
        def every_second(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
            return [None if i % 2 else 1.0 for i in range(len(completion_ids))]

        trainer = make(every_second)
        output = rollout(trainer)
        assert not output["advantages"][1::2].any()
        assert not output["value_mask"][1::2].any()
        assert output["value_mask"][::2].any(dim=1).all()

    def test_masked_truncated_completions(self, make):
        trainer = make(mask_truncated_completions=True)
        output = rollout(trainer)
        truncated = ~(output["completion_ids"] == EOS).any(dim=1)
        assert truncated.any() and not truncated.all()
        assert not output["advantages"][truncated].any()
        assert torch.equal(output["value_mask"].any(dim=1), ~truncated)


class TestLoss:
    @pytest.mark.parametrize("constant", [None, 0.7])
    def test_reinforce(self, constant, tiny_policy_path, make):
        """
        One update with lam = gamma = 1 and a constant baseline b is REINFORCE: the gradient of -(R - b) log pi(y|x).
        """
        critic = "none" if constant is None else "value_head"
        settings = {"lam": 1.0, "beta": 0.0, "num_iterations": 1, "whiten_advantages": False, "vf_coef": 0.0}
        trainer = make(lengths, critic=critic, **settings)
        if constant is not None:
            set_head(trainer, bias=constant, seed=None)
        output = rollout(trainer)
        trainer._compute_loss(trainer.model, output).backward()
        found = {name: p.grad for name, p in trainer.model.named_parameters() if not is_critic(name)}

        model = AutoModelForCausalLM.from_pretrained(tiny_policy_path)
        rows = rows_of(output)
        num_tokens = sum(len(completion) for _, completion in rows)
        for prompt, completion in rows:
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            log_prob = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).sum()
            (-(len(completion) / 4 - 1 - (constant or 0.0)) * log_prob / num_tokens).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-3)

    @pytest.mark.parametrize("cliprange_value", [None, 0.1])
    @pytest.mark.parametrize("scale_value_loss", [True, False])
    def test_value_loss_by_hand(self, cliprange_value, scale_value_loss, make):
        settings = {"cliprange_value": cliprange_value, "scale_value_loss": scale_value_loss, "vf_coef": 0.3}
        trainer = make(**settings)
        output = rollout(trainer)
        set_head(trainer, bias=-3.0)  # the critic has moved since
        loss = trainer._compute_loss(trainer.model, output)
        mask = output["value_mask"]
        targets = output["value_targets"][mask].double()
        unit = targets.square().mean().sqrt() if scale_value_loss else torch.tensor(1.0)
        assert output["value_scale"].item() == pytest.approx(unit.item(), rel=1e-5)
        head, total = critic_of(trainer._base_policy).head, 0.0
        for i, (prompt, completion) in enumerate(rows_of(output)):
            hidden = naive(trainer.model, prompt, completion)[2]
            for h in range(len(completion)):
                value = (hidden[h] @ head.weight + head.bias).item()
                target, errors = output["value_targets"][i, h].item(), []
                errors.append(value - target)
                if cliprange_value is not None:
                    limit = cliprange_value * unit.item()
                    errors.append(min(max(value, -limit), limit) - target)  # it was 0 at the rollout
                total += 0.5 * max(error**2 for error in errors) / unit.item() ** 2
        metrics = trainer._metrics["train"]
        assert metrics["ppo/value_loss"][-1] == pytest.approx(total / len(targets), rel=1e-4)
        assert (metrics["ppo/value_clip_ratio"][-1] > 0) == (cliprange_value is not None)
        policy_loss = metrics["ppo/policy_loss"][-1]
        assert loss.item() == pytest.approx(policy_loss + 0.3 * total / len(targets), rel=1e-4)

    def test_kl_is_in_one_place(self, make):
        losses = {}
        places = {"none": {"beta": 0.0}, "reward": {"beta": 5.0}, "loss": {"beta": 5.0, "kl_placement": "loss"}}
        for name, settings in places.items():
            trainer = make(vf_coef=0.0, num_iterations=1, whiten_advantages=False, **settings)
            with torch.no_grad():
                trainer.model.lm_head.weight.mul_(1.3)
            output = rollout(trainer)
            losses[name] = (output["advantages"], trainer._compute_loss(trainer.model, output).item())
            assert trainer.beta == settings["beta"]  # put back
            kl = trainer._metrics["train"]["kl"]
            assert len(kl) == (name != "none")  # by TRL or by us, never twice
        assert not torch.allclose(losses["reward"][0], losses["none"][0])
        torch.testing.assert_close(losses["loss"][0], losses["none"][0])
        mask = output["value_mask"]
        for name in ("none", "reward"):  # at ratio 1, the loss is minus the mean advantage and nothing else
            advantages, loss = losses[name]
            assert loss == pytest.approx(-advantages[mask].mean().item(), abs=1e-4)
        assert losses["loss"][1] > losses["none"][1] + 0.1

    def test_approx_kl(self, tiny_policy_path, make):
        trainer = make()
        output = rollout(trainer)
        trainer._compute_loss(trainer.model, output)
        assert trainer._metrics["train"]["ppo/approx_kl"] == [pytest.approx(0.0, abs=1e-6)]
        old = AutoModelForCausalLM.from_pretrained(tiny_policy_path).eval()
        with torch.no_grad():
            trainer.model.lm_head.weight.mul_(1.5)
        trainer._compute_loss(trainer.model, output)
        ratios = []
        for prompt, completion in rows_of(output):
            new_log_probs, old_log_probs = (naive(m, prompt, completion)[0] for m in (trainer.model, old))
            ratios += [a - b for a, b in zip(new_log_probs, old_log_probs, strict=True)]
        expected = sum(math.exp(x) - 1 - x for x in ratios) / len(ratios)
        assert trainer._metrics["train"]["ppo/approx_kl"][-1] == pytest.approx(expected, rel=1e-3)


A = 7


def path_reward(completion_ids: list[list[int]], **kwargs: Any) -> list[list[float]]:
    """
    A token MDP of 4 steps: the k-th "a" in a row from the start earns 0.1, 0.4, 0.7, 1.0; EOS earns 0.5 and ends;
    anything else earns 0. A myopic policy grabs the EOS at once; four times "a" earns 2.2 and is the best there is.
    """
    rewards = []
    for ids in completion_ids:
        on_path = [ids[: h + 1] == [A] * (h + 1) for h in range(len(ids))]
        rewards.append([0.1 + 0.3 * h if on_path[h] else 0.5 * (token == EOS) for h, token in enumerate(ids)])
    return rewards


@pytest.mark.slow
class TestOptimum:
    @pytest.mark.parametrize("critic", ["value_head", "value_model", "none"])
    def test_known_mdp(self, critic, make):
        settings = {"beta": 0.0, "lam": 1.0, "max_completion_length": 4, "per_device_train_batch_size": 32}
        settings |= {"max_steps": 160 if critic == "none" else 240, "value_learning_rate": 2e-2}
        trainer = make(path_reward, critic=critic, **settings)
        trainer.train()
        rewards = history(trainer, "reward")
        assert sum(rewards[:3]) / 3 < 0.6
        assert sum(rewards[-5:]) / 5 > 0.95 * 2.2
        if critic == "none":
            return
        trainer.args.whiten_advantages = False
        output = rollout(trainer)
        best = (output["completion_ids"] == A).all(dim=1)
        assert best.sum() >= 6
        values = output["old_values"][best].mean(dim=0)
        optimal = torch.tensor([2.2, 2.1, 1.7, 1.0])
        if critic == "value_model":
            torch.testing.assert_close(values, optimal, atol=0.15, rtol=0)
        else:  # the trunk of this policy hardly tells the steps apart
            assert values.mean().item() == pytest.approx(optimal.mean().item(), abs=0.15)

    def test_kl_in_the_reward_leads_to_the_power_distribution(self, tiny_policy_path, make):
        # Completions of one token: the optimum of r - beta KL with r = log pi_hat is pi_hat^(1 + 1 / beta),
        # normalised.
        beta = 1.0
        settings = {"max_completion_length": 1, "per_device_train_batch_size": 64, "num_iterations": 1}
        settings |= {"beta": beta, "learning_rate": 2e-2, "max_steps": 60, "whiten_advantages": False}
        trainer = make(dataset=Dataset.from_dict({"prompt": ["a b c"] * 64}), **settings)
        trainer.train()
        ids = torch.tensor([trainer.processing_class("a b c")["input_ids"]])
        with torch.no_grad():
            found = trainer.model.eval()(ids).logits[0, -1].log_softmax(-1)
            reference = AutoModelForCausalLM.from_pretrained(tiny_policy_path)(ids).logits[0, -1].log_softmax(-1)
        optimum = ((1 + 1 / beta) * reference).log_softmax(-1)

        def kl(p: Tensor, q: Tensor) -> float:
            return (p.exp() * (p - q)).sum().item()

        assert kl(reference, optimum) > 0.2
        assert kl(found, optimum) < 0.02


class TestCritic:
    def test_detached_critic_does_not_touch_the_policy(self, make):
        def run(**kwargs: Any) -> dict[str, Tensor]:
            # One generation batch of two updates: after that the critic's values are in the advantages. Clipping by
            # the norm of all gradients would couple the two.
            trainer = make(max_grad_norm=0.0, num_iterations=2, max_steps=2, **kwargs)
            trainer.train()
            return policy_weights(trainer)

        assert_same_to_the_bit(run(vf_coef=0.1), run(vf_coef=10.0))
        attached = [run(vf_coef=vf_coef, detach_value=False) for vf_coef in (0.1, 10.0)]
        assert any(not torch.equal(attached[0][name], attached[1][name]) for name in attached[0])

    @pytest.mark.parametrize(("own", "expected"), [(1e-2, 1e-2), (None, 1e-3)])
    def test_learning_rates(self, own, expected, make):
        # The first update of Adam moves every weight with a gradient by the learning rate.
        trainer = make(max_steps=1, learning_rate=1e-3, value_learning_rate=own, weight_decay=0.0)
        trainer.train()
        bias = critic_of(trainer._base_policy).head.bias
        torch.testing.assert_close(bias.abs(), torch.full((1,), expected), rtol=1e-3, atol=0)
        assert history(trainer, "learning_rate") == [1e-3]


class TestCheckpoints:
    @pytest.mark.parametrize("critic", ["value_head", "value_model"])
    def test_export_is_a_plain_model(self, critic, tmp_path, make):
        trainer = make(critic=critic)
        trainer.train()
        trainer.save_model(str(tmp_path / "final"))
        model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "final", output_loading_info=True)
        assert not any(info.values()), info
        assert_same_to_the_bit(policy_weights(trainer), model.state_dict())
        assert "ppo_critic" not in (tmp_path / "final" / "config.json").read_text()
        saved = load_file(tmp_path / "final" / CRITIC_FILE)
        assert_same_to_the_bit(weights(critic_of(trainer._base_policy)), saved)
        assert saved["head.weight"].any()

    def test_best_model(self, make):
        settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
        settings |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_completions/mean_length"}
        trainer = make(eval_dataset=PROMPTS.select(range(8)), **settings)
        trainer.train()
        best = Path(trainer.state.best_model_checkpoint)
        assert_same_to_the_bit(load_file(best / CRITIC_FILE), weights(critic_of(trainer._base_policy)))
        assert_same_to_the_bit(load_file(best / "model.safetensors"), policy_weights(trainer))
        assert len(history(trainer, "eval_ppo/explained_variance")) == 4

    def test_checkpoint_of_another_critic(self, tmp_path, make):
        make(critic="none", save_strategy="steps", save_steps=2).train()
        with pytest.raises(FileNotFoundError, match="not written by a PPO run with a critic"):
            make().train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))

    def test_other_number_of_processes(self, tiny_policy_path, tmp_path, make):
        make(save_strategy="steps", save_steps=1).train()
        path = tmp_path / "checkpoint-1" / "rollout_state.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "world_size": 2}))
        resumed = make_trainer(tiny_policy_path, tmp_path / "resumed")
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        assert resumed.state.global_step == 4


class TestSettings:
    @pytest.mark.parametrize("shared", [False, True])
    def test_lora(self, shared, tiny_policy_path, tmp_path, make):
        reward = EndogenousReward(None if shared else tiny_policy_path)
        trainer = make(reward, peft_config=LORA, max_steps=6)
        if shared:
            reward.attach(trainer)
        before = weights(trainer.model)
        trainer.train()
        after = trainer.model.state_dict()
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        head = "base_model.model.ppo_critic.head"
        assert {name for name in moved if is_critic(name)} == {f"{head}.weight", f"{head}.bias"}
        assert all("lora" in name or is_critic(name) for name in moved)
        assert sum("lora" in name for name in moved) == sum("lora" in name for name in before)
        trainer.save_model(str(tmp_path / "final"))
        assert not any(is_critic(name) for name in load_file(tmp_path / "final" / "adapter_model.safetensors"))
        assert (tmp_path / "final" / CRITIC_FILE).exists()

    def test_adaptive_kl(self, make):
        trainer = make(kl_target=1e-3, kl_horizon=8, max_steps=12, beta=0.01)
        trainer.train()
        coefficients, kls = history(trainer, "ppo/kl_coef"), history(trainer, "ppo/kl_per_completion")
        assert len(coefficients) == 3  # a generation batch serves four steps
        expected = 0.01
        for coefficient, kl in zip(coefficients, kls, strict=True):
            assert coefficient == pytest.approx(expected)
            expected *= 1 + min(max(kl / 1e-3 - 1, -0.2), 0.2)
        assert trainer.beta == pytest.approx(expected)

    def test_dense_scores_of_the_user(self, make):
        class Custom:
            def __call__(self, completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
                return [float(len(ids)) for ids in completion_ids]

            def outcome_and_token_rewards(self, completion_ids: list[list[int]], **kwargs: Any) -> DenseScores:
                values = [torch.arange(len(ids), 0, -1).float() for ids in completion_ids]
                return DenseScores(self(completion_ids), [torch.ones(len(ids)) for ids in completion_ids], values)

        trainer = make(Custom(), whiten_advantages=False, beta=0.0)
        output = rollout(trainer)
        # Its state values are exact: nothing is left for the critic to learn.
        assert output["advantages"].abs().max() < 1e-5
        assert output["value_targets"].abs().max() < 1e-5

    def test_batches_without_old_log_probs(self, tiny_policy_path, make):
        # TRL leaves them out where it does not need them; the KL of the reward does.
        trainer = make(num_iterations=1, whiten_advantages=False, beta=0.5)
        with torch.no_grad():
            trainer.model.lm_head.weight.mul_(1.3)
        output = rollout(trainer)
        assert "old_per_token_logps" not in output
        frozen = AutoModelForCausalLM.from_pretrained(tiny_policy_path).eval()
        kls = []
        for prompt, completion in rows_of(output):
            ours, theirs = (naive(model, prompt, completion)[0] for model in (trainer.model, frozen))
            kls.append(sum(ours) - sum(theirs))
        found = trainer._metrics["train"]["ppo/kl_per_completion"]
        assert found == [pytest.approx(sum(kls) / len(kls), rel=1e-3)]
