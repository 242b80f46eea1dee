# SPDX-License-Identifier: Apache-2.0
"""Progress line over a whole run, and results that survive an interruption."""

import json
from collections.abc import Callable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from ..runs.files import write_json


class Progress(TrainerCallback):
    """
    A line such as `stage 2 of 5: learning to add |###   |  40%, 03:12 left`. As a trainer callback, it follows the
    training steps. `stages` maps titles to the seconds that each takes on two cores, by which they are weighted.
    """

    def __init__(self, stages: Mapping[str, float]) -> None:
        self._titles = list(stages)
        self._bounds = [0.0, *accumulate(stages.values())]
        self._skipped = 0.0
        line = "{desc} |{bar}| {percentage:3.0f}%, {remaining} left"
        # Without smoothing, the remaining time is that at the average speed since the start.
        self._bar = tqdm(
            total=self._bounds[-1], bar_format=line, leave=False, mininterval=0.5, miniters=0, smoothing=0
        )
        self.stage(self._titles[0])

    def stage(self, title: str) -> None:
        """Begins a stage."""
        self._stage = self._titles.index(title)
        self._bar.set_description_str(f"stage {self._stage + 1} of {len(self._titles)}: {title}", refresh=False)
        self.at(0.0)

    def skip(self) -> None:
        """Marks the stage as done in an earlier run, which has no bearing on the speed of this one."""
        self._skipped += self._bounds[self._stage + 1] - self._bounds[self._stage]
        self._bar.initial = self._skipped

    def at(self, fraction: float) -> None:
        """Shows that a fraction of the stage is done."""
        start, end = self._bounds[self._stage : self._stage + 2]
        self._bar.update(start + fraction * (end - start) - self._bar.n)

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
