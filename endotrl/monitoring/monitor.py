# SPDX-License-Identifier: Apache-2.0
"""Collapse monitor callback."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from ..checks import check_choice
from ..rewards.frozen_model_reward import warn_without_kl_penalty
from ..runs.callback_order import add_in_order
from ..runs.wandb_run import active_run
from .collapse_thresholds import CollapseThresholds
from .detector import REWARD_KEYS, Detector
from .observer import BatchObserver


logger = logging.getLogger(__name__)

# Key for statistics since the last log in the trainer's state, which every checkpoint contains.
MEMORY = "collapse_monitor"
Action = Literal["warn", "stop", "restore"]
_THEN = {"warn": "", "stop": " Training stops.", "restore": " Training stops and restores the best checkpoint."}


class CollapseMonitor(TrainerCallback):
    r"""
    Detects the collapse of a run, reports it, and optionally stops the run. For any TRL trainer and any reward.

    An intrinsic reward keeps rising after the answers have stopped improving
    (https://huggingface.co/papers/2603.08660). The monitor raises an alarm when a **held-out reward**, that is one of
    weight 0, such as an accuracy, falls by more than its noise. Without one, it relies on the log-probability of the
    completions under the initial policy and on symptoms (length, repetition, entropy, diversity within groups, KL,
    correlation of the reward with length): see `docs/collapse.md`.

    Args:
        action (`str`, *optional*, defaults to `"warn"`):
            Action on an alarm: `"warn"`; `"stop"` the training; or stop and `"restore"` the best checkpoint, as with
            `load_best_model_at_end`: the one with the highest held-out reward, or else the last one without a symptom.
        held_out (`list[str]`, *optional*):
            Names of the held-out reward functions. By default, all of weight 0 with values in $[0, 1]$. Required only
            if the monitor is not attached.
        thresholds ([`CollapseThresholds`], *optional*):
            Alarm thresholds.
        copy_weights (`bool`, *optional*):
            Whether to keep a copy of the initial weights, to compare the current policy with the initial one on the
            same completions: this detects a fall several times earlier, and is required without a held-out reward. By
            default, weights of up to 1 GiB are copied. With an adapter, or a reference model (`beta` above 0), no copy
            is needed.

    Raises:
        `ValueError`: If `action` is unknown.

    Example:
    ```python
    >>> from endotrl import CollapseMonitor, EndogenousReward

    >>> args = GRPOConfig(reward_weights=[1.0, 0.0], beta=0.05, scale_rewards="none")
    >>> rewards = [EndogenousReward(model), accuracy]
    >>> trainer = GRPOTrainer(model, reward_funcs=rewards, args=args, train_dataset=dataset)
    >>> CollapseMonitor(action="stop").attach(trainer)
    >>> trainer.train()
    ```
    """

    def __init__(
        self,
        action: Action = "warn",
        held_out: Sequence[str] | None = None,
        thresholds: CollapseThresholds | None = None,
        copy_weights: bool | None = None,
    ) -> None:
        check_choice("action", action, tuple(_THEN))
        if isinstance(held_out, str):
            raise ValueError(f"`held_out` must be a list of names, got the string {held_out!r}. Pass [{held_out!r}].")
        self.action, self.held_out, self.copy_weights = action, held_out, copy_weights
        self.thresholds = thresholds or CollapseThresholds()
        self.alarms: list[tuple[int, str]] = []
        self._observer: BatchObserver | None = None
        self._detector = Detector(self.thresholds, held_out or [])

    def attach(self, trainer: Any) -> "CollapseMonitor":
        """
        Attaches the monitor to a TRL trainer, and returns it. In `GRPOTrainer`, `RLOOTrainer`, `DenseGRPOTrainer`,
        `PPOTrainer` and `OnlineDPOTrainer`, it then observes completions and rewards, which the log does not contain.
        With other trainers, or if passed as `callbacks=[monitor]`, it only reads the log, and its results do not reach
        W&B.

        Raises:
            `ValueError`: If it is already attached, or `held_out` names a reward that is not held out in this trainer.
        """
        if self._observer is not None:
            raise ValueError("This monitor is already attached to a trainer. Create one monitor per trainer.")
        self._observer = BatchObserver(trainer, self.held_out, self.copy_weights)
        warn_without_kl_penalty(trainer)
        add_in_order(trainer, self)
        return self

    def check(self, args: TrainingArguments) -> None:
        """Raises `ValueError` if the action is impossible with these settings; also called when training begins."""
        if self.action != "restore":
            return
        if args.load_best_model_at_end:
            raise ValueError(
                '`CollapseMonitor(action="restore")` and `load_best_model_at_end=True` both select the final '
                'checkpoint. Use only one of them, or set `action="stop"`.'
            )
        if args.save_strategy == SaveStrategy.NO:
            raise ValueError(
                '`CollapseMonitor(action="restore")` needs checkpoints to restore, but `save_strategy` is "no". Set '
                '`save_strategy="steps"` and `save_steps`.'
            )

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **rest: Any) -> None:
        """Reads the log of a resumed run, so that an interruption changes no verdict."""
        self.check(args)
        self._detector = Detector(self.thresholds, self.held_out or [])
        self.alarms = []
        if self._observer is not None:
            known = state.stateful_callbacks.get(MEMORY, {})
            state.stateful_callbacks[MEMORY] = self._observer.remember(known)
        for entry in state.log_history:
            self._judge(entry, int(entry["step"]))
        self.on_save(args, state)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        """Adds `collapse/...` to the log and judges it."""
        is_step = any(key in logs for key in REWARD_KEYS)
        figures = self._observer.pop() if self._observer is not None and is_step else {}
        alarm, verdict = self._judge({**logs, **figures}, state.global_step), self._detector.last
        if alarm and state.is_world_process_zero:
            text = f"{verdict.alarm}{_THEN[self.action]}"
            logger.warning("Collapse detected at step %d. %s", state.global_step, text)
            if "wandb" in args.report_to and (run := active_run()) is not None:
                run.alert("Collapse detected", f"Step {state.global_step}. {text}", level="WARN")
        if is_step:
            figures["collapse/evidence"] = verdict.evidence
            figures["collapse/symptoms"] = float(len(verdict.symptoms))
            figures["collapse/alarm"] = float(verdict.alarm is not None)
            logs.update(figures)
            state.log_history[-1].update(figures)
        # All processes log the same numbers; but if one ever differed, and stopped alone, the others would wait for it
        # forever.
        (decided,) = broadcast_object_list([alarm])
        if decided and self.action != "warn":
            control.should_training_stop = True
            if self.action == "restore":
                # Loaded by the trainer at its end, with DeepSpeed, FSDP and adapters as well.
                args.load_best_model_at_end = state.best_model_checkpoint is not None
                none = "There is no checkpoint from before the collapse to restore: the model is left as it is."
                path = state.best_model_checkpoint
                logger.warning("%s", none if path is None else f"Restoring {path}.")

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: Any, **rest: Any) -> None:
        """Records the best checkpoint as transformers does, so that `save_total_limit` does not delete it."""
        path = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        verdict, level = self._detector.last, self._detector.last.level
        if self.action != "restore" or verdict.alarm is not None or not path.is_dir():
            return
        if not verdict.symptoms if level is None else state.best_metric is None or level >= state.best_metric:
            state.best_model_checkpoint, state.best_global_step = str(path), state.global_step
            state.best_metric = level

    def _judge(self, entry: dict[str, float], step: int) -> bool:
        """Whether this entry raises the alarm. It is raised once, and again only after a quiet period."""
        before, alarm = self._detector.last.alarm, self._detector.update(entry).alarm
        if alarm is None or before is not None:
            return False
        self.alarms.append((step, alarm))
        return True
