# SPDX-License-Identifier: Apache-2.0
"""Progress line over a whole run, and results that survive an interruption."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from ..reporting import counted
from ..runs.files import write_json


PRIOR_SECONDS = 20.0  # of expected work, so that a machine's speed is not judged by its first seconds


class Progress(TrainerCallback):
    """
    A line such as `stage 2 of 5: learning to add, about 3 minutes left`. As a trainer callback, it follows the
    training steps. `stages` maps titles to the seconds that each takes on two cores: the remaining time is scaled by
    the speed measured so far.
    """

    def __init__(self, stages: Mapping[str, float]) -> None:
        self._titles, self._seconds = list(stages), list(stages.values())
        self._stage, self._skipped = 0, 0.0
        self._started = time.perf_counter()
        self._bar = tqdm(total=100, bar_format="{desc} |{bar}| {percentage:3.0f}%", leave=False, mininterval=0.5)

    def stage(self, title: str) -> None:
        """Begins a stage."""
        self._stage = self._titles.index(title)
        self.at(0.0)

    def skip(self) -> None:
        """Marks the stage as done in an earlier run, which has no bearing on the speed of this one."""
        self._skipped += self._seconds[self._stage]

    def at(self, fraction: float) -> None:
        """Shows that a fraction of the stage is done."""
        total = sum(self._seconds)
        done = sum(self._seconds[: self._stage]) + fraction * self._seconds[self._stage]
        elapsed = time.perf_counter() - self._started
        speed = (elapsed + PRIOR_SECONDS) / (max(0.0, done - self._skipped) + PRIOR_SECONDS)
        left = (total - done) * speed
        minutes = "less than a minute" if left < 45 else f"about {counted(max(1, round(left / 60)), 'minute')}"
        stage = f"stage {self._stage + 1} of {len(self._titles)}: {self._titles[self._stage]}"
        self._bar.set_description_str(f"{stage}, {minutes} left", refresh=False)
        self._bar.update(100 * done / total - self._bar.n)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Updates the line after each training step."""
        self.at(state.global_step / state.max_steps)

    def close(self) -> None:
        """Removes the line."""
        self._bar.close()


class Kept:
    """
    Results in a folder, one JSON file each, from which an interrupted run is resumed. A result made with other
    `settings` is made again.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self._folder, self._settings = folder, json.loads(json.dumps(settings))
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, name: str, progress: Progress, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of that name: the stored one, or else made now and stored."""
        path = self._folder / f"{name}.json"
        if path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["settings"] == self._settings:
                progress.skip()
                return kept["result"]
        result = make()
        write_json(path, {"settings": self._settings, "result": result})
        return result
