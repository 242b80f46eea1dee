# SPDX-License-Identifier: Apache-2.0
"""
Logs of finished and running runs, of any TRL trainer: `trainer_state.json`, offline W&B runs, TensorBoard events,
JSON Lines, and the completions that TRL writes as Parquet.

All are converted to entries as in `trainer.state.log_history`: `reward`, not W&B's `train/reward`; `eval_reward`, not
`eval/reward`.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from ...data.sources import SUFFIXES, Reader
from ...reporting import counted
from ...runs.checkpoints import checkpoints
from ..detector import REWARD_KEYS
from ..series import FEWEST, MOST, Noise
from .wandb_file import wandb_history


STATE_FILE = "trainer_state.json"
KINDS = (
    "a `trainer_state.json`, an output folder or a checkpoint, an offline W&B run (`offline-run-...` or `*.wandb`), "
    "TensorBoard events, `completions/*.parquet`, or JSON Lines with one log entry per line"
)


@dataclass
class Run:
    """Logs and checkpoints of a run."""

    path: Path  # as given
    source: str = ""  # file or folder that the entries were read from
    # Of the log, with their `step`, in order, evaluations as separate entries. `None` in TRL's log is NaN here.
    entries: list[dict[str, float]] = field(default_factory=list)
    completions: list[Path] = field(default_factory=list)  # Parquet files, in order of steps
    checkpoints: list[Path] = field(default_factory=list)  # folders with weights, in order of steps
    max_steps: int | None = None  # planned steps, if `trainer_state.json` exists
    held_out: list[str] = field(default_factory=list)  # reward functions that are not trained on
    notes: list[str] = field(default_factory=list)  # further logs that were not read

    @property
    def steps(self) -> list[dict[str, float]]:
        """Training entries, without evaluations."""
        return [entry for entry in self.entries if not any(key.startswith("eval_") for key in entry)]

    def first_logged(self, *keys: str) -> str:
        """The first of these metrics that was logged, or else the first of all."""
        return next((key for key in keys if any(key in entry for entry in self.entries)), keys[0])

    def series(self, *keys: str) -> list[tuple[float, float]]:
        """Steps and values of the first of these metrics that was logged, including NaN."""
        key = self.first_logged(*keys)
        return [(entry["step"], entry[key]) for entry in self.entries if key in entry]

    def values(self, *keys: str) -> list[float]:
        """Finite values of the first of these metrics that was logged."""
        return [value for _, value in self.series(*keys) if math.isfinite(value)]


class Trend(NamedTuple):
    """Means of the first eighth (at least 3 entries) and of the last third, and their difference relative to noise."""

    first: float
    last: float
    z: float


def tail(values: Sequence[float], part: int = 3) -> Sequence[float]:
    """The last entries: of `part` equal parts the last one, and at least three."""
    return values[-max(3, len(values) // part) :]


def trend(values: Sequence[float]) -> Trend:
    """Change of a series from its beginning to its end; `z` is in standard errors of that difference."""
    head, end = values[: max(3, len(values) // 8)], tail(values)
    first, last = fmean(head), fmean(end)
    return Trend(first, last, evidence_of(values, last - first, len(head), len(end)))


def evidence_of(values: Sequence[float], difference: float, *numbers: int) -> float:
    """A difference of means over `numbers` entries each, in standard errors; 0 if there are too few values."""
    if len(values) < FEWEST:
        return 0.0
    block = math.ceil(len(values) / MOST)
    noise = Noise([fmean(values[i : i + block]) for i in range(0, len(values), block)])
    return noise.evidence(difference, *(max(1, number // block) for number in numbers))


def read_run(path: str | Path) -> Run:
    """
    Reads the logs of a TRL trainer, or of its tracker; of several logs in a folder, the one that reaches furthest,
    with earlier entries from the others.

    Raises:
        `FileNotFoundError`: If the path does not exist.
        `ValueError`: If it contains no log, or a log is damaged.
        `ImportError`: If the package that reads it is not installed.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist. Give {KINDS}.")
    run = _read_folder(path) if path.is_dir() else _read_file(path)
    if not _is_log(run.entries) and not run.completions:
        raise ValueError(
            f"{run.source or path} contains no log entry: nothing has been logged yet, the file is still being "
            f"written, or it is not a log. Give {KINDS}."
        )
    return run


def _read_file(path: Path) -> Run:
    if path.suffix == ".parquet":
        return Run(path, str(path), completions=[path])
    if path.suffix == ".wandb":
        return Run(path, str(path), _entries(wandb_history(path)))
    if "tfevents" in path.name:
        return Run(path, str(path.parent), _entries(_event_rows(path.parent)))
    if path.name.endswith(SUFFIXES):
        return _read_json(path)
    raise ValueError(f"{path} is not a log of a known format. Give {KINDS}.")


def _read_folder(folder: Path) -> Run:
    saved = list(checkpoints(folder).values())
    states = [path / STATE_FILE for path in (folder, *saved[-2:])]  # the last one may be incomplete
    tracked, notes = _tracked_runs(folder)
    logs = [[path] for path in states if path.is_file()] + tracked
    is_explicit = bool(logs)
    if not is_explicit:  # data sets have these suffixes, too
        logs = [[path] for path in sorted(folder.iterdir()) if path.name.endswith((".jsonl", ".jsonl.gz"))]
    runs, errors = [], []
    for newest, *earlier in logs:
        try:
            run = _read_file(newest)
            for path in earlier if newest.suffix == ".wandb" else []:
                _prepend(run, _read_file(path))
        except (ImportError, ValueError) as error:  # another log may be readable
            errors.append(error)
        else:
            runs += [run] if run.entries and (is_explicit or _is_log(run.entries)) else []
    if not is_explicit and len(runs) > 1:
        names = ", ".join(Path(run.source).name for run in runs[1:4]) + (", ..." if len(runs) > 4 else "")
        notes, runs = [f"Skipped in the same folder: {names}"], runs[:1]
    if not runs and errors:
        raise errors[0]
    # Checkpoints lag behind, and the tracker of a resumed run may have only the end.
    found = max(runs, key=lambda run: run.entries[-1]["step"], default=Run(folder, str(folder)))
    for run in sorted(runs, key=lambda run: run.entries[0]["step"], reverse=True):
        _prepend(found, run)
        found.max_steps = found.max_steps or run.max_steps
    parquet = {path.resolve(): path for place in (folder / "completions", folder) for path in place.glob("*.parquet")}
    found.path, found.notes = folder, notes + [str(error) for error in errors]
    found.completions = sorted(parquet.values(), key=lambda path: path.name)
    found.checkpoints = [path for path in saved or [folder] if any(path.glob("*.safetensors"))]
    return found


def _tracked_runs(folder: Path) -> tuple[list[list[Path]], list[str]]:
    """Files of the newest run of each tracker, newest first, and notes on older runs."""
    newest, notes = [], []
    # A resumed run has several files: those of W&B share a name, those of TensorBoard a folder.
    for kind, pattern, which in (("W&B", "*.wandb", "name"), ("TensorBoard", "*tfevents*", "parent")):
        by_run: dict[Any, list[Path]] = {}
        files = {path.resolve() for path in folder.rglob(pattern)}  # `latest-run` is a link
        for path in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True):
            by_run.setdefault(getattr(path, which), []).append(path)
        newest += list(by_run.values())[:1]
        if len(by_run) > 1:
            older = counted(len(by_run) - 1, f"older {kind} run")
            notes.append(f"Skipped {older} in the folder: to read another one, give its path")
    return newest, notes


def _prepend(run: Run, earlier: Run) -> None:
    """Prepends earlier entries; steps that were repeated after resuming count once."""
    start = run.entries[0]["step"] if run.entries else math.inf
    run.entries[:0] = [entry for entry in earlier.entries if entry["step"] < start]


def _is_log(entries: Iterable[Mapping[str, float]]) -> bool:
    """Whether entries are of a training run, rather than another program."""
    return any(key in ("loss", *REWARD_KEYS) or key.startswith("eval_") for entry in entries for key in entry)


def _read_json(path: Path) -> Run:
    if path.suffix == ".json":
        try:
            state = json.loads(path.read_bytes())
        except ValueError as error:  # may be JSON Lines
            if path.name == STATE_FILE:
                raise ValueError(f"{path} is damaged or still being written: {error}.") from error
            state = None
        if isinstance(state, dict):
            history = [row for row in state.get("log_history") or [] if isinstance(row, dict)]
            return Run(path, str(path), _entries(history), max_steps=state.get("max_steps"))
    rows = list(Reader(path))
    if rows and rows[-1].problem:
        rows.pop()  # still being written
    for row in rows:
        if row.problem:
            raise row.error(row.problem)
    return Run(path, str(path), _entries(row.data for row in rows))


def _event_rows(folder: Path) -> list[dict[str, Any]]:
    """Rows of all event files in a folder: a resumed run has several."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError as error:
        raise ImportError(
            f"Reading the TensorBoard events in {folder} requires tensorboard: `pip install tensorboard`. Or give the "
            f"run's `{STATE_FILE}`, which is in its checkpoints."
        ) from error
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    by_step: dict[tuple[int, bool], dict[str, Any]] = {}
    for tag in accumulator.Tags()["scalars"]:
        for event in accumulator.Scalars(tag):
            by_step.setdefault((event.step, tag.startswith("eval/")), {"step": event.step})[tag] = event.value
    return [by_step[key] for key in sorted(by_step)]


def _entries(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Rows of any tracker as entries of `log_history`."""
    entries: list[dict[str, float]] = []
    latest = -math.inf
    for row in rows:
        training: dict[str, float] = {}
        evaluation: dict[str, float] = {}
        for key, value in row.items():
            number = _number(value)
            if number is None or key.startswith(("_", "profiling/")):  # W&B's own, and TRL's timers there
                continue
            if key.startswith(("eval/", "eval_")):
                evaluation[f"eval_{key[5:]}"] = number
            else:
                training[key.removeprefix("train/")] = number
        global_step = training.pop("global_step", None)
        step = training.pop("step", global_step)
        if step is None:
            step = float(row.get("_step", len(entries)))
        else:
            if step < latest:  # a resumed run: repeated steps count once
                entries = [entry for entry in entries if entry["step"] < step]
            latest = step
        for part in (training, evaluation):
            # The summary at the end contains means over the whole run.
            if part.keys() - {"epoch"} and not any(name.endswith("train_runtime") for name in part):
                entries.append({"step": step, **part})
    return entries


def _number(value: object) -> float | None:
    """A logged number; NaN for `None` (TRL's mean over nothing), and `None` for anything that is not a number."""
    if value is None:
        return math.nan
    try:
        return None if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
