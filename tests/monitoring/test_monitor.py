# SPDX-License-Identifier: Apache-2.0
"""The monitor in TRL's trainers, on a tiny policy whose held-out reward follows a script."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOTrainer, RLOOTrainer
from trl.experimental.online_dpo import OnlineDPOTrainer

from endotrl import CollapseMonitor, DenseGRPOTrainer, EndogenousReward, PPOTrainer
from endotrl.monitoring.batch_statistics import change_since, repetition

from ..support import trainers
from ..support.helpers import assert_same_to_the_bit, weights
from ..support.reference import completion_log_probs


pytestmark = pytest.mark.slow
FALLS_AFTER = 14
TRAINERS = [GRPOTrainer, RLOOTrainer, DenseGRPOTrainer, PPOTrainer]
ADAPTER = LoraConfig(target_modules=["q_proj", "v_proj"])
MOVED = {"beta": 0.05, "sync_ref_model": True, "ref_model_sync_steps": 1}
FIRST = {
    "copy": (GRPOTrainer, {"beta": 0.0}),
    "reference": (GRPOTrainer, {"beta": 0.05}),
    "adapter": (GRPOTrainer, {"beta": 0.0, "peft_config": ADAPTER, "learning_rate": 3e-2}),
    "RLOO": (RLOOTrainer, {"beta": 0.05}),
    "PPO": (PPOTrainer, {"beta": 0.0}),
    "value head": (PPOTrainer, {"beta": 0.0, "critic": "value_head"}),
    "value model": (PPOTrainer, {"beta": 0.0, "critic": "value_model"}),
    "moved": (GRPOTrainer, MOVED),
    "moved, value head": (PPOTrainer, {"critic": "value_head", **MOVED}),
}


class ScriptedAccuracy:
    """Right three times out of four until a step, and every other time after it."""

    def __init__(self, falls_after: float) -> None:
        self.__name__ = "accuracy"
        self.falls_after = falls_after

    def __call__(self, completions: list[Any], trainer_state: Any, **kwargs: Any) -> list[float]:
        step = trainer_state.global_step
        wrong = [step % 4] if step < self.falls_after else [step % 4, (step + 1) % 4]
        return [float(i % 4 not in wrong) for i in range(len(completions))]


def make_trainer(
    path: str, folder: Path, falls_after: float = FALLS_AFTER, kind: type = GRPOTrainer, **settings: Any
) -> Any:
    common = {"beta": 0.05, "learning_rate": 1e-4, "max_steps": 24, "per_device_train_batch_size": 32, "seed": 3}
    common |= {"num_generations": 4, "reward_weights": [1.0, 0.0], "logging_steps": 1}
    if kind is PPOTrainer:
        common |= {"critic": "none", "scale_rewards": "none"}
    rewards = [EndogenousReward(path), ScriptedAccuracy(falls_after)]
    return trainers.make_trainer(kind, path, folder, rewards, **{**common, **settings})


def steps(trainer: Any) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "reward" in entry]


@pytest.mark.parametrize("kind", TRAINERS)
def test_figures_of_every_trainer(kind: type, tiny_policy_path: str, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_policy_path, tmp_path, math.inf, kind, max_steps=3, logging_steps=3)
    monitor = CollapseMonitor().attach(trainer)
    seen: list[tuple[list[list[int]], torch.Tensor]] = []
    calculate = trainer._calculate_rewards

    def watch(inputs: Any, prompts: Any, completions: Any, ids: Any) -> torch.Tensor:
        rewards = calculate(inputs, prompts, completions, ids)
        seen.append((ids, rewards))
        return rewards

    trainer._calculate_rewards = watch
    reported: list[str] = []
    reporting = TrainerCallback()  # such as W&B's
    reporting.on_log = lambda args, state, control, logs, **_: reported.extend(logs)
    trainer.add_callback(reporting)
    trainer.train()
    assert seen and not monitor.alarms
    (entry,) = steps(trainer)
    distinct = [len({tuple(row) for row in ids[i : i + 4]}) for ids, _ in seen for i in range(0, 32, 4)]
    assert entry["collapse/distinct_completions"] == pytest.approx(sum(distinct) / len(distinct))
    batches = [[part for row in ids if (part := repetition(row)) is not None] for ids, _ in seen]
    means = [sum(batch) / len(batch) for batch in batches]
    assert entry["collapse/repetition"] == pytest.approx(sum(means) / len(means), rel=1e-5)
    accuracy = torch.stack([rewards[:, 1] for _, rewards in seen]).mean().item()
    assert entry["collapse/held_out/accuracy"] == pytest.approx(accuracy) == pytest.approx(0.75)
    correlations = []
    for ids, rewards in seen:
        pair = torch.stack([rewards[:, 0], torch.tensor([float(len(row)) for row in ids])]).double().view(2, -1, 4)
        correlations.append(torch.corrcoef((pair - pair.mean(2, keepdim=True)).flatten(1))[0, 1])
    assert entry["collapse/length_correlation"] == pytest.approx(torch.stack(correlations).mean().item(), abs=1e-4)
    # The reward is the log-probability under the model that the policy began as.
    assert entry["collapse/probability_correlation"] > 0.9
    assert entry["collapse/alarm"] == 0.0
    assert "collapse/held_out/accuracy" in reported
    json.dumps(trainer.state.log_history, allow_nan=False)


def log_probs(model: Any, output: dict[str, Any]) -> torch.Tensor:
    """Naively, row by row and without padding."""
    return torch.tensor([sum(completion_log_probs(model, *row)) for row in trainers.rows_of(output)])


@pytest.mark.parametrize(("kind", "settings"), FIRST.values(), ids=FIRST)
def test_compared_with_the_first_policy(
    kind: type, settings: dict[str, Any], tiny_policy_path: str, tmp_path: Path
) -> None:
    settings = {"max_steps": 4, "learning_rate": 3e-3, "num_iterations": 1, **settings}
    trainer = make_trainer(tiny_policy_path, tmp_path, math.inf, kind, **settings)
    CollapseMonitor().attach(trainer)
    first = AutoModelForCausalLM.from_pretrained(tiny_policy_path)
    generate, calculate = trainer._generate_and_score_completions, trainer._calculate_rewards
    seen, rewards, per_token, probability = ([] for _ in range(4))

    def watch_rewards(*args: Any) -> torch.Tensor:
        rewards.append(calculate(*args))
        return rewards[-1]

    def watch(inputs: Any) -> dict[str, Any]:
        output = generate(inputs)
        at_first = log_probs(first, output)
        ratios = at_first - log_probs(trainer.model, output)
        seen.append(change_since(rewards[-1][:, 1], ratios, 4))
        per_token.append(at_first / output["completion_mask"].sum(1))
        probability.append(change_since(per_token[-1], ratios, 4))
        return output

    trainer._generate_and_score_completions, trainer._calculate_rewards = watch, watch_rewards
    trainer.train()
    entries = steps(trainer)
    assert len(entries) == len(seen) == 4
    for entry, change in zip(entries, seen, strict=True):
        assert change is not None
        assert entry["collapse/change/accuracy"] == pytest.approx(change[0], abs=2e-5)
        assert entry["collapse/change_error/accuracy"] == pytest.approx(math.hypot(change[1], 1 / 32), rel=1e-3)
    for entry, values, change in zip(entries, per_token, probability, strict=True):
        assert change is not None
        assert entry["collapse/first_log_prob"] == pytest.approx(values.mean().item(), abs=2e-5)
        assert entry["collapse/first_log_prob_change"] == pytest.approx(change[0], abs=2e-5)
        error = math.hypot(change[1], values.std().item() / 32)
        assert entry["collapse/first_log_prob_error"] == pytest.approx(error, rel=1e-3)
    assert seen[0][0] == pytest.approx(0.0, abs=1e-6) and abs(seen[-1][0]) > 1e-4, "The policy has moved."


def test_no_copy_without_leave(tiny_policy_path: str, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_policy_path, tmp_path, max_steps=2, beta=0.0)
    CollapseMonitor(copy_weights=False).attach(trainer)
    trainer.train()
    assert not any(key.startswith(("collapse/change", "collapse/first")) for entry in steps(trainer) for key in entry)


@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_watching_changes_nothing(beta: float, tiny_dropout_policy_path: str, tmp_path: Path) -> None:
    trained = []
    for watched in (False, True):
        trainer = make_trainer(tiny_dropout_policy_path, tmp_path, max_steps=4, beta=beta)
        if watched:
            CollapseMonitor().attach(trainer)
        trainer.train()
        trained.append(weights(trainer.model))
    assert_same_to_the_bit(*trained)


def test_warns_once(tiny_policy_path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(tiny_policy_path, tmp_path)
    monitor = CollapseMonitor().attach(trainer)
    with caplog.at_level(logging.WARNING, logger="endotrl"):
        trainer.train()
    ((step, reason),) = monitor.alarms
    assert FALLS_AFTER < step <= FALLS_AFTER + 4
    assert "`accuracy`" in reason
    (message,) = [record.getMessage() for record in caplog.records if "Collapse" in record.getMessage()]
    assert f"step {step}" in message
    assert trainer.state.global_step == 24
    alarms = [entry["step"] for entry in steps(trainer) if entry["collapse/alarm"]]
    assert alarms == list(range(step, 25))


def test_a_verifier_may_lead_away(tiny_policy_path: str, tmp_path: Path) -> None:
    """Of a reward that says right or wrong, the first policy's belief is no judge; of a count, it is."""
    for reward, judged in ((lambda completions, **_: [float("a" in c) for c in completions], False), (count_a, True)):
        settings = {"max_steps": 1, "per_device_train_batch_size": 32, "logging_steps": 1}
        trainer = trainers.make_trainer(GRPOTrainer, tiny_policy_path, tmp_path, reward, **settings)
        CollapseMonitor().attach(trainer)
        trainer.train()
        assert ("collapse/first_log_prob_change" in steps(trainer)[0]) is judged


def count_a(completions: list[Any], **kwargs: Any) -> list[float]:
    return [float(str(completion).count("a")) for completion in completions]


def test_restores_the_best_checkpoint(tiny_policy_path: str, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_policy_path, tmp_path, save_strategy="steps", save_steps=5, save_total_limit=2)
    CollapseMonitor(action="restore").attach(trainer)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    # Saved at 5 (too early to judge), 10 and 15, when the first answers had just become wrong.
    assert best.name == "checkpoint-10"
    expected = AutoModelForCausalLM.from_pretrained(best)
    assert_same_to_the_bit(weights(expected), weights(trainer.model))


def test_goes_on_after_an_interruption(tiny_policy_path: str, tmp_path: Path) -> None:
    whole = make_trainer(tiny_policy_path, tmp_path / "whole")
    monitor = CollapseMonitor().attach(whole)
    whole.train()
    # Interrupted just before the fall, which is one from the level until then.
    first = make_trainer(tiny_policy_path, tmp_path / "parts", save_strategy="steps", save_steps=FALLS_AFTER)
    interrupt = TrainerCallback()
    interrupt.on_save = lambda args, state, control, **_: setattr(control, "should_training_stop", True)
    before = CollapseMonitor().attach(first)
    first.add_callback(interrupt)
    first.train()
    assert before.alarms == []
    second = make_trainer(tiny_policy_path, tmp_path / "parts")
    after = CollapseMonitor().attach(second)
    second.train(resume_from_checkpoint=True)
    assert after.alarms == monitor.alarms
    for entry, other in zip(steps(whole), steps(second), strict=True):
        # What follows from the script: sampled completions need not be the same after a pause.
        for key in ("held_out/accuracy", "held_out_error/accuracy", "evidence", "alarm"):
            key = f"collapse/{key}"
            assert other[key] == pytest.approx(entry[key], rel=1e-6), (entry["step"], key)


def test_as_a_plain_callback_it_reads_the_log(tiny_policy_path: str, tmp_path: Path) -> None:
    monitor = CollapseMonitor(held_out=["accuracy"])
    make_trainer(tiny_policy_path, tmp_path, callbacks=[monitor]).train()
    assert len(monitor.alarms) == 1 and monitor.alarms[0][0] > FALLS_AFTER


def test_online_dpo(tiny_policy_path: str, tmp_path: Path) -> None:
    lasts: list[int] = []

    def shorter(prompts: list[str], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        """
        Completions come with their padding, which `LengthReward` would count, after either of two ends. What depends
        on the prompt alone does not matter within pairs.
        """
        lengths = [
            min((i + 1 for i, token in enumerate(ids) if token in (2, 9)), default=len(ids)) for ids in completion_ids
        ]
        lasts.extend(ids[length - 1] for ids, length in zip(completion_ids, lengths, strict=True))
        return [100.0 * len(prompt) - length for prompt, length in zip(prompts, lengths, strict=True)]

    model = AutoModelForCausalLM.from_pretrained(tiny_policy_path)
    model.generation_config.eos_token_id = [2, 9]
    settings = {"max_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 16}
    settings |= {"processing_class": AutoTokenizer.from_pretrained(tiny_policy_path, padding_side="left")}
    trainer = trainers.make_trainer(OnlineDPOTrainer, model, tmp_path, shorter, **settings)
    monitor = CollapseMonitor().attach(trainer)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "objective/scores" in entry]
    assert {2, 9} <= set(lasts) and len(entries) == 2 and not monitor.alarms
    for entry in entries:
        # Within pairs: the order is right, and the observed completions end where they do.
        assert entry["collapse/length_correlation"] == pytest.approx(-1.0)
        assert 1.0 <= entry["collapse/distinct_completions"] <= 2.0


def test_what_does_not_go_with_a_trainer(tiny_policy_path: str, tmp_path: Path) -> None:
    for setting, says in ({"action": "halt"}, "`action`.*'halt'"), ({"held_out": "a"}, r"list of names.*\['a'\]"):
        with pytest.raises(ValueError, match=says):
            CollapseMonitor(**setting)
    trainer = make_trainer(tiny_policy_path, tmp_path)
    for name, says in (("accuracies", "not a reward function"), ("endogenous_reward", "trained on")):
        with pytest.raises(ValueError, match=f"'{name}' is {says}.* weight 0 are: accuracy"):
            CollapseMonitor(held_out=[name]).attach(trainer)
    monitor = CollapseMonitor(action="restore").attach(trainer)
    with pytest.raises(ValueError, match="already attached to a trainer"):
        monitor.attach(trainer)
    with pytest.raises(ValueError, match='`save_strategy` is "no"'):
        trainer.train()
