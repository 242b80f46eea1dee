# SPDX-License-Identifier: Apache-2.0
"""Held-out questions, asked between steps: they change nothing, are graded right, and are judged."""

import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerState

from endotrl import CollapseMonitor, HeldOut
from endotrl.monitoring import Detector
from endotrl.monitoring.batch_statistics import mean_and_error

from ..support.helpers import assert_same_to_the_bit, weights
from .test_monitor import TRAINERS, make_trainer


QUESTIONS = [{"prompt": f"{a} {b}", "answer": b} for a, b in zip("lkjihgf", "abcdeab", strict=True)]


class Grader:
    """Right if the answer's letter was said. Keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[str], list[str]]] = []

    def __call__(self, prompts: list[str], completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
        assert not torch.is_grad_enabled() and len(kwargs["completion_ids"]) == len(prompts)
        self.asked.append((prompts, completions))
        return [float(a in c.split()) for a, c in zip(answer, completions, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", TRAINERS[1:])  # GRPO: below
def test_asks_and_changes_nothing(kind: type, tiny_policy_path: str, tmp_path: Path) -> None:
    logs, results = [], []
    grader = Grader()
    for asks in (False, True):
        trainer = make_trainer(tiny_policy_path, tmp_path, math.inf, kind, max_steps=4, learning_rate=3e-3)
        if asks:
            held_out = HeldOut(QUESTIONS, grader, every=2, num_samples=3).attach(trainer)
        trainer.train()
        results.append(weights(trainer.model))
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
        assert not trainer._metrics["eval"]  # which the next evaluation would log
    assert_same_to_the_bit(*results)
    timings = ("time", "perf/")
    for alone, asked in zip(*logs, strict=True):
        new = asked.keys() - alone.keys()
        names = ("held_out", "held_out_error", "asked_change", "asked_change_error")
        # Asked before step 1, and after 2 and 4.
        assert new == ({f"collapse/{name}/questions" for name in names} if asked["step"] != 3 else set())
        for key in alone:
            assert any(t in key for t in timings) or asked[key] == alone[key], key
    # 21 answers each time, each question three times in a row.
    assert list(held_out.history) == [0, 2, 4] and sum(len(asked) for asked, _ in grader.asked) == 3 * 21
    prompts = [prompt for asked, _ in grader.asked for prompt in asked][:21]
    assert prompts == [row["prompt"] for row in QUESTIONS for _ in range(3)]
    texts = [text for _, answers in grader.asked for text in answers][-21:]
    right = torch.tensor(
        [[float(QUESTIONS[i]["answer"] in texts[3 * i + j].split()) for j in range(3)] for i in range(7)]
    )
    assert held_out.history[4] == pytest.approx(right.mean().item())
    error = math.hypot(right.mean(dim=1).std().item() / 7**0.5, 1 / 21)
    assert logs[1][3]["collapse/held_out_error/questions"] == pytest.approx(error, rel=1e-5)
    change = held_out.history[4] - held_out.history[0]
    assert logs[1][3]["collapse/asked_change/questions"] == pytest.approx(change, abs=1e-6)


@pytest.mark.slow
def test_goes_on_and_is_judged(tiny_policy_path: str, tmp_path: Path) -> None:
    """Right answers until step 6, and wrong ones from then on: the monitor stops at 8, interrupted or not."""

    def make(grader: Any) -> tuple[Any, CollapseMonitor]:
        trainer = make_trainer(tiny_policy_path, tmp_path, math.inf, max_steps=12, save_strategy="steps", save_steps=4)
        grader.trainer = trainer
        HeldOut(QUESTIONS, grader, every=1).attach(trainer)
        return trainer, CollapseMonitor(action="stop").attach(trainer)

    class Falling:
        trainer: Any = None

        def __call__(self, completions: list[str], **kwargs: Any) -> list[float]:
            return [float(self.trainer.state.global_step < 6)] * len(completions)

    trainer, monitor = make(Falling())
    trainer.train()
    assert trainer.state.global_step == 7, "Twice in a row: at 6 and 7."
    assert "`questions` has lost 1.000 since training began" in monitor.alarms[0][1]
    resumed, monitor = make(Falling())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.state.global_step == 7 and "has lost 1.000 since training" in monitor.alarms[0][1]


def test_other_questions_are_asked_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on with as many other questions does not compare them with the grades of the first ones."""
    asked: list[int] = []
    state = TrainerState(stateful_callbacks=[])
    for step, rows in enumerate((QUESTIONS, QUESTIONS, [{**row, "answer": "z"} for row in QUESTIONS])):
        held_out = HeldOut(rows, Grader())
        held_out._trainer = SimpleNamespace(_metrics={"train": {}})
        grades = torch.ones(len(rows), 1)
        monkeypatch.setattr(held_out, "_grades", lambda step=step, grades=grades: asked.append(step) or grades)
        held_out.on_train_begin(None, state)  # type: ignore[arg-type]
    assert asked == [0, 2]


def test_judged_between_askings() -> None:
    """The alarm lasts from one asking to the next, and is not raised by one bad asking, or by noise."""

    def alarms(changes: list[float], error: float) -> list[bool]:
        detector, found = Detector(), []
        for step in range(10 * len(changes)):
            entry = {"step": step, "reward": 0.1 * step}
            if step % 10 == 0:
                change = changes[step // 10]
                entry |= {"collapse/held_out/questions": 0.7 + change, "collapse/held_out_error/questions": 0.05}
                entry |= {"collapse/asked_change/questions": change, "collapse/asked_change_error/questions": error}
            found.append(detector.update(entry).alarm is not None)
        return found

    assert alarms([0.0, -0.1, -0.1, -0.1], error=0.03) == [False] * 20 + [True] * 20
    assert not any(alarms([0.0, -0.1, 0.0, -0.1, 0.0, -0.1], error=0.03))
    assert not any(alarms([0.0, -0.08, -0.08, -0.08], error=0.03))
    assert not any(alarms([0.0, -0.01, -0.01, -0.01], error=0.001))


def test_error_of_grades() -> None:
    grades = torch.tensor([[1.0, 0.0], [1.0, math.nan], [0.0, 0.0], [math.nan, math.nan]])
    mean, error = mean_and_error(grades)
    assert mean == pytest.approx(2 / 5)
    # Means of questions are 0.5, 1 and 0; their standard deviation is 0.5.
    assert error == pytest.approx(math.hypot(0.5 / 3**0.5, 1 / 5))
    assert mean_and_error(torch.ones(10, 1)) == (1.0, pytest.approx(0.1))


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"questions": []}, ValueError, "`questions` is empty"),
        ({"questions": [{"question": "a"}]}, ValueError, "must have a `prompt`"),
        ({"questions": [{"prompt": "a", "answer": "b"}, {"prompt": "a"}]}, ValueError, "but row 1 has the columns"),
        ({"every": 0}, ValueError, "`every` must be at least 1 step, got 0"),
        ({"questions": "questions.jsonl"}, TypeError, "takes `questions` as rows, .*, got str and Grader"),
        ({"grader": "accuracy"}, TypeError, "a reward function as `grader`, got list and str"),
    ],
)
def test_bad_settings(arguments: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        HeldOut(**{"questions": QUESTIONS, "grader": Grader(), **arguments})


def test_attach(tiny_policy_path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(tiny_policy_path, tmp_path)
    with pytest.raises(ValueError, match="already has a reward function 'accuracy'"):
        HeldOut(QUESTIONS, Grader(), name="accuracy").attach(trainer)
    with pytest.raises(TypeError, match="supports GRPOTrainer, .*, got GRPOConfig"):
        HeldOut(QUESTIONS, Grader()).attach(trainer.args)
    with caplog.at_level(logging.WARNING, "endotrl.monitoring.held_out"):
        HeldOut([*QUESTIONS, {"prompt": "a b c", "answer": "b"}], Grader()).attach(trainer)
    assert "1 of 8 held-out questions are in the training dataset" in caplog.text
    unattached = make_trainer(tiny_policy_path, tmp_path)
    unattached.add_callback(HeldOut(QUESTIONS, Grader()))
    with pytest.raises(ValueError, match="is not attached"):
        unattached.train()
