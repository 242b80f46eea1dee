# SPDX-License-Identifier: Apache-2.0
"""
Logs of finished and running runs, of any trainer of TRL: `trainer_state.json`, offline W&B runs, TensorBoard events,
JSON Lines, and the completions that TRL writes as Parquet.

What is read becomes entries as in `trainer.state.log_history`: `reward`, not W&B's `train/reward`; `eval_reward`, not
`eval/reward`.
"""

import gzip
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from ...reporting import counted
from ...runs.checkpoints import checkpoints
from ..detector import REWARD_KEYS
from ..series import FEWEST, MOST, Noise
from .wandb_file import read_wandb_file


STATE_FILE = "trainer_state.json"
LOG_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
KINDS = (
    "a `trainer_state.json`, an output folder or a checkpoint, an offline W&B run (`offline-run-...` or `*.wandb`), "
    "TensorBoard events, `completions/*.parquet`, or JSON Lines with one log entry per line"
)


@dataclass
class Run:
    """
    What a run left behind.

    `entries` are those of the log with their `step`, in order, those of evaluations apart. `None` in TRL's log is NaN
    here.
    """

    path: Path  # what was asked for
    source: str = ""  # what the entries were read from
    entries: list[dict[str, float]] = field(default_factory=list)
    completions: list[Path] = field(default_factory=list)  # Parquet files, in order of steps
    checkpoints: list[Path] = field(default_factory=list)  # folders with weights, in order of steps
    settings: dict[str, Any] = field(default_factory=dict)  # training arguments, as far as the log has them
    max_steps: int | None = None  # that the run is to have
    notes: list[str] = field(default_factory=list)  # what else is there, and was not read

    @property
    def steps(self) -> list[dict[str, float]]:
        """Entries of training, without evaluations."""
        return [entry for entry in self.entries if not any(key.startswith("eval_") for key in entry)]

    def series(self, *keys: str) -> list[tuple[float, float]]:
        """Steps and values of the first of these numbers that was logged, NaN included."""
        for key in keys:
            found = [(entry["step"], entry[key]) for entry in self.entries if key in entry]
            if found:
                return found
        return []

    def values(self, *keys: str) -> list[float]:
        """Finite values of the first of these numbers that was logged."""
        return [value for _, value in self.series(*keys) if math.isfinite(value)]


class Trend(NamedTuple):
    """Means of the first eighth (at least 3 entries) and of the last third, and their difference over its noise."""

    first: float
    last: float
    z: float


def tail(values: Sequence[float], part: int = 3) -> Sequence[float]:
    """The last entries: of `part` equal parts the last one, and at least three."""
    return values[-max(3, len(values) // part) :]


def trend(values: Sequence[float]) -> Trend:
    """The change of a series from its beginning to its end; `z` is in standard errors of that difference."""
    head, end = values[: max(3, len(values) // 8)], tail(values)
    first, last = fmean(head), fmean(end)
    return Trend(first, last, evidence(values, last - first, len(head), len(end)))


def evidence(values: Sequence[float], difference: float, *numbers: int) -> float:
    """A difference of means of so many entries, in standard errors; 0 if they are too few to tell."""
    if len(values) < FEWEST:
        return 0.0
    block = math.ceil(len(values) / MOST)
    noise = Noise([fmean(values[i : i + block]) for i in range(0, len(values), block)])
    return noise.evidence(difference, *(max(1, number // block) for number in numbers))


def read_run(path: str | Path) -> Run:
    """
    Reads what a trainer of TRL, or its tracker, wrote; of several logs in a folder, the one that goes furthest.

    Raises:
        `FileNotFoundError`: If it is not there.
        `ValueError`: If no log is found in it, or a log is damaged.
        `ImportError`: If what reads it is not installed.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist. A run is {KINDS}.")
    run = _read_folder(path) if path.is_dir() else _read_file(path)
    if not _is_log(run.entries) and not run.completions:
        what = "nothing was logged yet, it is being written, or it is something else"
        raise ValueError(f"{run.source or path} has no log entry: {what}. A run is {KINDS}.")
    run.path = path
    return run


def _read_file(path: Path) -> Run:
    name = path.name
    if name.endswith(".parquet"):
        return Run(path, source=str(path), completions=[path])
    if name.endswith(".wandb"):
        history, config = read_wandb_file(path)
        return Run(path, str(path), _entries(history), settings=config, max_steps=_max_steps(config))
    if "tfevents" in name:
        return _read_events(path)
    if name.endswith(LOG_SUFFIXES):
        return _read_json(path)
    raise ValueError(f"{path} is of no kind that is known. A run is {KINDS}.")


def _read_folder(folder: Path) -> Run:
    there = checkpoints(folder)
    with_weights = [path for path in there.values() if any(path.glob("*.safetensors"))]
    if not there and any(folder.glob("*.safetensors")):
        with_weights = [folder]
    # The last one may be half written.
    states = [folder / STATE_FILE, *[path / STATE_FILE for path in there.values()][-2:]]
    logs, notes = [path for path in states if path.is_file()], []
    wandb_files = {path.resolve(): path for path in folder.glob("**/*.wandb")}  # `latest-run` is a link
    # A run that was resumed has a file for each time: of W&B all of the same name, of TensorBoard in the same folder.
    wandb_runs = {path.name: path for path in sorted(wandb_files.values(), key=_modified)}
    event_files = {path.parent: path for path in sorted(folder.glob("**/*tfevents*"), key=_modified)}
    for kind, found in (("W&B", list(wandb_runs.values())), ("TensorBoard", list(event_files.values()))):
        if found:
            logs.append(max(found, key=_modified))
        if len(found) > 1:
            notes.append(
                f"{counted(len(found) - 1, f'older {kind} run')} in the folder: the newest is read, give the path of "
                "another to read that"
            )
    runs: list[Run] = []
    missing: list[Exception] = []
    if not logs:
        for path in sorted(path for path in folder.iterdir() if path.name.endswith((".jsonl", ".jsonl.gz"))):
            try:
                logs += [path] if _is_log(_read_json(path).entries) else []  # data has this suffix, too
            except ValueError as error:
                missing.append(error)
        others = ", ".join(path.name for path in logs[1:4]) + (", ..." if len(logs) > 4 else "")
        notes += [f"Not read, of the same folder: {others}"] if others else []
        logs = logs[:1]
    for path in logs:
        try:
            run = _read_file(path)
            earlier = [p for p in wandb_files.values() if p.name == path.name and p != path]
            for before in sorted(earlier, key=_modified, reverse=True):
                _prepend(run, _read_file(before))
            runs.append(run)
        except (ImportError, ValueError) as error:  # another log may do
            if isinstance(error, ValueError) and path.name != STATE_FILE:
                raise
            missing.append(error)
    if not runs and missing:
        raise missing[0]
    runs = [run for run in runs if run.entries]
    # The log that goes furthest: checkpoints lag behind.
    run = max(runs, key=lambda run: run.entries[-1]["step"], default=Run(folder))
    for other in sorted(runs, key=lambda run: run.entries[0]["step"], reverse=True):
        _prepend(run, other)  # of a run that was resumed, a tracker may have the end only
        run.settings = {**other.settings, **run.settings}
        run.max_steps = run.max_steps or other.max_steps
    parquet = {path.resolve(): path for place in (folder / "completions", folder) for path in place.glob("*.parquet")}
    run.completions = sorted(parquet.values(), key=lambda path: path.name)
    run.checkpoints, run.notes = with_weights, notes + [str(error) for error in missing]
    if not run.entries and not run.completions:
        raise ValueError(f"No log is in {folder}. A run is {KINDS}.")
    if not run.source:
        run.source = str(run.completions[0].parent)
    return run


def _prepend(run: Run, earlier: Run) -> None:
    """Adds what was logged before; what was done again after that counts once."""
    start = run.entries[0]["step"] if run.entries else math.inf
    run.entries[:0] = [entry for entry in earlier.entries if entry["step"] < start]


def _is_log(entries: Iterable[Mapping[str, float]]) -> bool:
    """Whether they are of a training run, and not of another program."""
    return any(key in ("loss", *REWARD_KEYS) or key.startswith("eval_") for entry in entries for key in entry)


def _modified(path: Path) -> float:
    return path.stat().st_mtime


def _read_json(path: Path) -> Run:
    try:
        opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")
        with opened as file:
            text = file.read()
    except (EOFError, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged, is being written, or is no text: {error}.") from error
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if path.name == STATE_FILE:
            raise ValueError(f"{path} is damaged, or is being written: {error}.") from error
        content = _lines(path, text)
    state = content if isinstance(content, dict) else {}
    rows = state.get("log_history", [content] if state else content)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(
            f"{path} holds no log: it must be a `{STATE_FILE}`, or a JSON object with numbers for each log entry."
        )
    return Run(path, str(path), _entries(rows), max_steps=_max_steps(state))


def _lines(path: Path, text: str) -> list[Any]:
    rows = []
    lines = text.splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            if number == len(lines):
                break  # being written
            raise ValueError(f"{path}, line {number}, is no JSON: {error}.") from error
    return rows


def _read_events(path: Path) -> Run:
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError as error:
        raise ImportError(
            f"{path} holds TensorBoard events, which take tensorboard to read: pip install tensorboard. Or give the "
            f"run's `{STATE_FILE}`, which is in its checkpoints."
        ) from error
    # All files of the folder: a run that was resumed has several.
    accumulator = EventAccumulator(str(path.parent), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    by_step: dict[tuple[bool, int], dict[str, Any]] = {}
    for tag in accumulator.Tags()["scalars"]:
        for event in accumulator.Scalars(tag):
            row = by_step.setdefault((tag.startswith("eval/"), event.step), {"step": event.step})
            row[tag] = event.value
    rows = [by_step[key] for key in sorted(by_step, key=lambda key: (key[1], key[0]))]
    written = "args/text_summary" in accumulator.Tags()["tensors"]  # by transformers' callback
    text = accumulator.Tensors("args/text_summary")[-1].tensor_proto.string_val[0] if written else "{}"
    settings = json.loads(text)
    return Run(path, str(path.parent), _entries(rows), settings=settings, max_steps=_max_steps(settings))


def _max_steps(settings: Mapping[str, Any]) -> int | None:
    value = settings.get("max_steps")
    return value if isinstance(value, int) and value > 0 else None


def _entries(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Rows of any tracker as entries of `log_history`."""
    entries: list[dict[str, float]] = []
    latest = -math.inf
    for row in rows:
        parts: dict[bool, dict[str, float]] = {False: {}, True: {}}  # of an evaluation: True
        for key, value in row.items():
            if key.startswith(("_", "profiling/")):  # W&B's own, and TRL's timers in it
                continue
            evaluation = key.startswith(("eval/", "eval_"))
            name = f"eval_{key[5:]}" if evaluation else key.removeprefix("train/")
            number = _number(value)
            if number is not None:
                parts[evaluation][name] = number
        step = parts[False].pop("step", parts[False].pop("global_step", None))
        if step is not None and step < latest:  # a run that was resumed: what was done again counts once
            entries = [entry for entry in entries if entry["step"] < step]
        latest = latest if step is None else step
        step = _number(row.get("_step")) if step is None else step
        parts[False].pop("global_step", None)
        for part in parts.values():
            # The summary at the end has means of the whole run.
            names = part.keys() - {"epoch"}
            if names and not any(name.endswith("train_runtime") for name in names):
                entries.append({"step": float(len(entries)) if step is None else step, **part})
    return entries


def _number(value: object) -> float | None:
    """A logged number; `None` (TRL writes it for a mean over nothing) is NaN, and what is no number `None`."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None
