# SPDX-License-Identifier: Apache-2.0
"""Forecasts of RL on a reward of a frozen model, from samples of the frozen model."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checks import lasting_repr
from ..evaluation.engine import Engine
from ..evaluation.generation import loaded_placement
from ..evaluation.intervals import Unit
from ..evaluation.questions import read_questions
from ..evaluation.results import estimates_to_json, rounded
from ..evaluation.run_folder import open_folder
from ..frozen.loaded_model import weights_digest
from ..grading import VERSION
from ..reporting import notebook_cell
from ..rewards.endogenous import EndogenousReward
from . import BETAS, TEMPERATURES, ScaleRewards, Trainer
from .collect import Grade, Grader, collect
from .policies import Objective
from .sampling import Mixture, MixtureSampler
from .summary import Record, Summary
from .verdict import suggested_beta, verdict


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Forecast:
    r"""
    Forecast outcome of RL on the reward.

    Attributes:
        verdict (`str`):
            Verdict in plain words.
        betas (`list[dict]`):
            For each KL penalty, from the mildest: `beta`; `accuracy` (`None` without labels), `length` (tokens),
            `truncated` (fraction), `distinct` (different answers per group), `agreement` (with the frozen model's
            majority answer), `kl` (nats per completion), `reward` (as trainers log it), each with its 95% interval
            over questions (`accuracy_interval`, ...); `ess`, the effective sample size (median over questions), and
            `ess_below_5`, the fraction of questions where it is below 5, so that there are too few samples.
        alternatives (`dict[str, float | None]`):
            Accuracy without training: `sampled` (T = 1), `greedy`, `temperature=0.5`, `majority`, `best_of_n` (by the
            reward), `best_of_n_length` (the longest), the last three over the samples at T = 1.
        suggested_beta (`float`, *optional*):
            See [`suggested_beta`].
        details (`dict[str, Any]`):
            `alternatives` with all metrics and intervals, `slope` (of the accuracy in $1/\beta$, at 0),
            `wrong_more_probable` (fraction of the questions with right and wrong answers), and the settings.
    """

    verdict: str
    betas: list[dict[str, Any]]
    alternatives: dict[str, float | None]
    suggested_beta: float | None
    details: dict[str, Any] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Content of `forecast.json`."""
        return {**{name: value for name, value in vars(self).items() if name != "details"}, **self.details}

    def _repr_html_(self) -> str:
        from .page import body

        return notebook_cell(body(self))


def forecast(
    model: str | PreTrainedModel,
    questions: str | Iterable[Any],
    *,
    processing_class: PreTrainedTokenizerBase | None = None,
    reward: Callable[..., Sequence[float | None]] | None = None,
    betas: Sequence[float] = BETAS,
    trainer: Trainer = "grpo",
    num_generations: int = 8,
    scale_rewards: ScaleRewards = "none",
    samples: int = 16,
    temperatures: Sequence[float] = TEMPERATURES,
    max_new_tokens: int = 256,
    grader: str | Grade = "math",
    question: str | None = None,
    answer: str | None = None,
    limit: int | None = None,
    instruction: str = "",
    chat: bool = False,
    seed: int = 0,
    output: str | Path | None = None,
    dtype: str = "auto",
    device: str | None = None,
    progress: bool = True,
) -> Forecast:
    r"""
    Forecasts the outcome of RL on a reward of a frozen model, before it is run: from samples of the frozen model, by
    the formulas in [`policies`]. For the endogenous reward, RLOO ends at the power distribution
    $\hat\pi^{1+1/\beta}$ (https://huggingface.co/papers/2605.04542).

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Frozen model, as in [`EndogenousReward`].
        questions (`str` or `Iterable`):
            As in [`read_questions`]: file, dataset on the hub, or rows with prompts and, for accuracy, answers.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer. Loaded with the model if not given.
        reward (`Callable`, *optional*):
            Reward function of TRL's contract, used for training. Defaults to [`EndogenousReward`] with its default
            settings.
        betas (`Sequence[float]`, *optional*):
            KL penalties.
        trainer (`str`, *optional*, defaults to `"grpo"`):
            `"rloo"`, `"grpo"` (both TRL's), `"dense_grpo"` or `"ppo"` (ours).
        num_generations (`int`, *optional*, defaults to `8`):
            Completions per group. RLOO and PPO do not depend on it.
        scale_rewards (`str`, *optional*, defaults to `"none"`):
            As in [`~trl.GRPOConfig`], whose default is `"group"`.
        samples (`int`, *optional*, defaults to `16`):
            Samples per question.
        temperatures (`Sequence[float]`, *optional*):
            Temperatures of the mixture, including 1: see [`Mixture.of`].
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Maximum completion length in tokens, as in training.
        grader (`str` or `Callable`, *optional*, defaults to `"math"`):
            As in [`Grader`].
        question, answer, limit, instruction, chat:
            As in [`read_questions`].
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sampling.
        output (`str` or `Path`, *optional*):
            Folder for the samples, from which the same call resumes after an interruption.
        dtype, device:
            As in [`EndogenousReward`].
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        [`Forecast`], which renders itself in a notebook.

    Raises:
        `ValueError`: If a setting is out of range, there are no questions, or they do not fit into the model's
        context.

    Example:
    ```python
    >>> import endotrl

    >>> questions = [{"prompt": [{"role": "user", "content": "What is 2 + 2?"}], "answer": "4"}]
    >>> result = endotrl.forecast("quickstart", questions, betas=[0.5], max_new_tokens=16, progress=False)
    >>> result.betas[0]["beta"]
    0.5
    ```
    """
    objective = Objective(trainer, num_generations, scale_rewards)
    mixture, judge = Mixture.of(samples, temperatures), Grader(grader)
    if not isinstance(betas, Iterable) or not betas or not all(0 < beta < math.inf for beta in betas):
        raise ValueError(f"`betas` must be a non-empty list of finite numbers above 0, got {betas!r}.")
    if reward is not None and not callable(reward):
        raise TypeError(f"`reward` must be a reward function, or None for the endogenous reward, got {reward!r}.")
    found = read_questions(questions, question, answer, limit, instruction, chat)
    frozen = EndogenousReward(model, processing_class, dtype=dtype, device=device)
    engine = Engine(frozen._require_placement(), frozen._tokenizer, chat)
    if not chat and engine.tokenizer.chat_template is not None and any(isinstance(q.prompt, str) for q in found):
        logger.warning(
            "The model has a chat template, but the questions are plain text, which it continues. Pass `chat=True` "
            "to ask them in the template, unless training continues the same text."
        )
    placement = loaded_placement(engine)  # raises now if the model is on a server
    folder = None
    if output is not None:
        with placement.active() as loaded:
            version = weights_digest(loaded)
        settings = {
            "model": str(frozen),
            "model_version": version,
            "dtype": str(dtype),
            "samples": samples,
            "temperatures": [*temperatures],
            "seed": seed,
            "max_new_tokens": max_new_tokens,
            # Identifies a function or an object in another process, too
            "reward": None if reward is None else lasting_repr(reward),
            "grader": grader if isinstance(grader, str) else lasting_repr(grader),
            "grader_version": VERSION,
        }
        folder = open_folder(output, settings)
    sampler = MixtureSampler(engine, max_new_tokens, mixture.recorded)
    records = collect(found, engine, sampler, mixture, judge, max_new_tokens, reward, folder, seed, progress)
    return from_records(records, mixture, objective, betas)


def from_records(
    records: Sequence[Record],
    mixture: Mixture,
    objective: Objective,
    betas: Sequence[float],
    others: Mapping[str, list[Unit]] | None = None,
) -> Forecast:
    """A forecast from the records of [`collect`], and further alternatives."""
    summary = Summary(records, mixture, objective, betas, others or {})
    details = {
        "trainer": objective.trainer,
        "num_generations": objective.num_generations if objective.has_groups else None,
        "scale_rewards": objective.scale_rewards if objective.has_groups else None,
        "num_questions": len(records),
        "samples": {f"{t:g}": n for t, n in mixture.counts.items()},
        "votes": summary.num_votes,
        "slope": None if summary.slope is None else rounded(vars(summary.slope)),
        "wrong_more_probable": summary.wrong_more_probable,
        "alternative_details": {name: estimates_to_json(summary.estimates[name]) for name in summary.alternatives},
    }
    words = verdict(summary, objective, len({record["key"] for record in records}))
    rows = [rounded(row) for row in summary.betas]
    return Forecast(words, rows, summary.alternatives, suggested_beta(summary), details)
