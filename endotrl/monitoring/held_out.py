# SPDX-License-Identifier: Apache-2.0
"""Held-out questions, answered and graded between training steps: the monitor's measure of a run."""

import hashlib
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback, TrainerState, TrainingArguments
from trl import GRPOTrainer, RLOOTrainer

from ..checks import check_rewards, lasting_repr
from .batch_statistics import mean_and_error
from .detector import ASKED_CHANGE, HELD_OUT, error_key


logger = logging.getLogger(__name__)

# Key for the grades of the first evaluation in the trainer's state, which every checkpoint contains.
MEMORY = "held_out/"


class HeldOut(TrainerCallback):
    r"""
    Evaluates the policy on held-out questions every few steps and logs the mean grade with its standard error. For
    [`~trl.GRPOTrainer`], [`~trl.RLOOTrainer`], [`DenseGRPOTrainer`] and [`PPOTrainer`], whose own generation is used:
    template, sampling settings, vLLM, several processes.

    Logs the mean grade, `collapse/held_out/<name>`, and its change since before training,
    `collapse/asked_change/<name>`, paired by question: $\frac1n \sum_q (a_q - b_q)$, which is more precise than the
    difference of two means. Both have standard errors over questions, and [`CollapseMonitor`] reads them. Each
    evaluation uses the same random numbers, and the rest of the run stays bit-identical (not tested with vLLM).

    Args:
        questions ([`~datasets.Dataset`] or `list[dict]`):
            Rows with a `prompt`, as in the training dataset, and the columns that the grader needs. None of them may
            be trained on. 50 to 200 are enough to detect a collapse: with 100, a mean of 0.7 has an error of 0.05.
        grader (`Callable`):
            Reward function of TRL, such as [`AccuracyReward`]; grades should be in $[0, 1]$. `None` leaves a
            completion out.
        every (`int`, *optional*, defaults to `10`):
            Steps between two evaluations. There is also one before the first step.
        num_samples (`int`, *optional*):
            Answers per question. Defaults to 1, or with vLLM to the trainer's `num_generations_eval`, of which it must
            be a multiple in that case.
        name (`str`, *optional*, defaults to `"questions"`):
            Name in the log.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the answers.

    Raises:
        `ValueError`: If there are no questions, a row has no `prompt`, or `every` is below 1.

    Example:
    ```python
    >>> from endotrl import CollapseMonitor, HeldOut
    >>> from endotrl.rewards import AccuracyReward

    >>> split = dataset.train_test_split(test_size=100, seed=0)
    >>> trainer = GRPOTrainer(model, reward_funcs=reward, args=args, train_dataset=split["train"])
    >>> HeldOut(split["test"], AccuracyReward("answer"), every=10).attach(trainer)
    >>> CollapseMonitor(action="stop").attach(trainer)
    >>> trainer.train()
    ```
    """

    def __init__(
        self,
        questions: Sequence[Mapping[str, Any]],
        grader: Callable[..., list[float | None]],
        every: int = 10,
        num_samples: int | None = None,
        name: str = "questions",
        seed: int = 0,
    ) -> None:
        rows: list[Any] = list(questions)
        if not callable(grader) or not all(isinstance(row, Mapping) for row in rows):
            raise TypeError(
                "`HeldOut` takes `questions` as rows, such as a dataset, and a reward function as `grader`, got "
                f"{type(questions).__name__} and {type(grader).__name__}."
            )
        if not rows:
            raise ValueError("`questions` is empty: pass at least one held-out question.")
        for index, row in enumerate(rows):
            if "prompt" not in row or row.keys() != rows[0].keys():
                raise ValueError(
                    f"Each row of `questions` must have a `prompt` and the columns of the first row, "
                    f"{sorted(rows[0])}, but row {index} has the columns {sorted(row)}."
                )
        if every < 1:
            raise ValueError(f"`every` must be at least 1 step, got {every!r}.")
        self.questions, self.grader, self.every = rows, grader, every
        self.num_samples, self.name, self.seed = num_samples, name, seed
        self.history: dict[int, float] = {}
        # Grades of other questions are not comparable.
        digest = hashlib.sha256(lasting_repr(rows).encode()).hexdigest()
        self._memory = f"{MEMORY}{name}/{digest[:16]}"
        self._trainer: Any = None
        self._first: Tensor | None = None  # grades of the first evaluation, per question

    def attach(self, trainer: Any) -> "HeldOut":
        """
        Attaches the questions to a trainer, and returns this callback.

        Raises:
            `TypeError`: If the trainer is not supported.
            `ValueError`: If a reward function has the same name, the trainer uses environments, or `num_samples` is
                incompatible with vLLM.
        """
        if not isinstance(trainer, GRPOTrainer | RLOOTrainer):
            raise TypeError(
                "`HeldOut` supports GRPOTrainer, RLOOTrainer, DenseGRPOTrainer and PPOTrainer, got "
                f"{type(trainer).__name__}. With other trainers, evaluate checkpoints with `endotrl eval generation`."
            )
        if self.name in trainer.reward_func_names:
            raise ValueError(f"The trainer already has a reward function {self.name!r}: set another `name`.")
        if getattr(trainer, "environment_factories", None) or getattr(trainer, "environments", None):
            raise ValueError("`HeldOut` does not support environments. Use an `eval_dataset` instead.")
        per_call = trainer.num_generations_eval if trainer.use_vllm else 1
        self.num_samples = self.num_samples or per_call
        if self.num_samples % per_call:
            raise ValueError(
                f"With vLLM, `num_samples` must be a multiple of `num_generations_eval` ({per_call}), got "
                f"{self.num_samples}."
            )
        self._trainer, dataset = trainer, trainer.train_dataset
        if isinstance(dataset, Dataset) and "prompt" in dataset.column_names:  # no stream
            asked = {str(row["prompt"]) for row in self.questions}
            if trained := asked.intersection(map(str, dataset["prompt"])):
                logger.warning(
                    "%d of %d held-out questions are in the training dataset: their grades overestimate the policy.",
                    len(trained),
                    len(asked),
                )
        trainer.add_callback(self)
        return self

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **rest: Any) -> None:
        """Evaluates before the first step; a resumed run restores those grades."""
        if self._trainer is None:
            raise ValueError("`HeldOut` is not attached to a trainer. Call `HeldOut(...).attach(trainer)`.")
        remembered = state.stateful_callbacks.get(self._memory)
        if remembered is not None:
            self._first = torch.tensor([math.nan if grade is None else grade for grade in remembered])
        else:
            self._ask(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **rest: Any) -> None:
        """Evaluates if it is due."""
        if state.global_step % self.every == 0:
            self._ask(state)

    def _ask(self, state: TrainerState) -> None:
        grades = self._grades()
        answers = grades.nanmean(dim=1)
        if self._first is None:
            self._first = answers
            state.stateful_callbacks[self._memory] = [None if math.isnan(a) else a for a in answers.tolist()]
        for key, values in ((HELD_OUT, grades), (ASKED_CHANGE, (answers - self._first)[:, None])):
            mean, error = mean_and_error(values)
            # With the next log entry; of several evaluations before it, the last one.
            self._trainer._metrics["train"] |= {key + self.name: [mean], error_key(key + self.name): [error]}
            if key == HELD_OUT:
                self.history[state.global_step] = mean

    def _grades(self) -> Tensor:
        """Grades of shape `(questions, samples)`, the same on all processes; NaN where there is none."""
        trainer, samples, count = self._trainer, self.num_samples or 1, len(self.questions)
        accelerator, device = trainer.accelerator, trainer.accelerator.device
        each = math.ceil(count / accelerator.num_processes)
        # All processes evaluate equally many, some of them twice: generation may need all processes.
        mine = [(accelerator.process_index * each + i) % count for i in range(each)]
        rows = [self.questions[i] for i in mine for _ in range(samples)]
        size = trainer.args.per_device_train_batch_size * (trainer.args.steps_per_generation or 1)
        size = max(samples, size // samples * samples)
        training, metrics = trainer.model.training, trainer._metrics["eval"]
        trainer._metrics["eval"] = defaultdict(list)  # generation adds to them
        grades: list[float] = []
        on_cpu = device.type == "cpu"
        with torch.random.fork_rng([] if on_cpu else [device], device_type="cuda" if on_cpu else device.type):
            torch.manual_seed(self.seed + accelerator.process_index)
            trainer.model.eval()
            for start in range(0, len(rows), size):
                grades += self._answer(rows[start : start + size])
            trainer.model.train(training)
        trainer._metrics["eval"] = metrics
        return accelerator.gather(torch.tensor(grades, device=device)).view(-1, samples)[:count].double().cpu()

    def _answer(self, rows: Sequence[dict[str, Any]]) -> list[float]:
        prompts = [row["prompt"] for row in rows]
        output = self._trainer._generate(prompts)
        # GRPO returns the mask of its tools between ids and completions.
        completion_ids, completions = output[1], output[3 if isinstance(self._trainer, GRPOTrainer) else 2]
        columns = {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}
        with torch.no_grad():
            grades = self.grader(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
        return [math.nan if grade is None else float(grade) for grade in check_rewards(grades, len(rows))]
