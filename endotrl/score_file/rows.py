# SPDX-License-Identifier: Apache-2.0
"""Rows of the input: what a line must be, and the reading of lines one after the other."""

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any, Self


STREAM = "-"  # standard input or standard output
# Keys that the scoring uses up; the others are carried over.
INPUT_KEYS = ("prompt", "completion", "completion_ids")
# Keys that an output line can have. A row of the input must not bring its own.
OUTPUT_KEYS = {"line", "error", "reward", "reason", "num_tokens", "finished", "reward_per_token", "entropy"}
# Those that `--no-tokens` leaves out.
TOKEN_KEYS = {"tokens", "token_rewards", "chosen_logits", "soft_values", "entropies", "contributions"}
TOKEN_KEYS |= {"prompt_contribution", "cut_off_contribution", "sentence_scores"}
OUTPUT_KEYS |= TOKEN_KEYS
ROW_FORMAT = '{"prompt": ..., "completion": ...}'


@dataclass(frozen=True)
class Row:
    """
    One line of the input.

    Attributes:
        line (`int`):
            Line number, from 1.
        prompt (`str` or `list[dict]`):
            Text, or messages.
        completion (`str` or `list[dict]`):
            Of the same kind as `prompt`.
        extra (`dict[str, Any]`):
            The row's other keys, which are carried over.
        error (`str`, *optional*):
            Why the row cannot be scored.
        completion_ids (`list[int]`, *optional*):
            Tokens of the completion as the policy generated them, EOS included if it was generated. `None` if the row
            has only text.
    """

    line: int
    prompt: Any = ""
    completion: Any = ""
    extra: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    completion_ids: list[int] | None = None


class Reader:
    """Rows of the input, with a running digest of the lines read, by which an earlier input is known again."""

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self.lines = 0
        self.digest = hashlib.sha256()
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Self:
        self._file = sys.stdin.buffer if self.path == STREAM else open(self.path, "rb")
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None and self.path != STREAM:
            self._file.close()

    def __iter__(self) -> "Reader":
        return self

    def __next__(self) -> Row:
        assert self._file is not None
        for data in self._file:
            self.lines += 1
            # Without its end, as the last line may get one later.
            data = data.rstrip(b"\r\n")
            self.digest.update(data + b"\n")
            if data.strip():
                return parse_row(self.lines, data)
        raise StopIteration

    def count_rows(self, limit: int | None) -> int | None:
        """Number of rows, for the progress bar; `None` for a stream."""
        if self.path == STREAM:
            return limit
        with open(self.path, "rb") as file:
            return sum(1 for _ in islice((None for data in file if data.strip()), limit))

    def prefix_digest(self, lines: int) -> str:
        """Digest of the file's first lines."""
        digest = hashlib.sha256()
        with open(self.path, "rb") as file:
            for data in islice(file, lines):
                digest.update(data.rstrip(b"\r\n") + b"\n")
        return digest.hexdigest()


def parse_row(line: int, data: bytes) -> Row:
    """
    Reads one line of the input. What is wrong with it is said in `error`; nothing is raised.

    Example:
    ```python
    >>> from endotrl.score_file import parse_row

    >>> parse_row(1, b'{"prompt": "2+2=", "completion": "4", "id": 7}').extra
    {'id': 7}

    >>> parse_row(2, b'{"prompt": "2+2="}').error
    'The key "completion" is missing. A row is {"prompt": ..., "completion": ...}.'
    ```
    """
    try:
        row = json.loads(data.decode("utf-8-sig" if line == 1 else "utf-8"), parse_constant=_reject_constant)
    except RecursionError:
        return Row(line, error="The JSON is nested too deeply.")
    except ValueError as error:  # not JSON, not UTF-8, NaN
        return Row(line, error=f"Not valid JSON: {error}.")
    if not isinstance(row, dict):
        return Row(line, error=f"A row must be a JSON object, but this is of type {type(row).__name__}.")
    extra = {key: value for key, value in row.items() if key not in INPUT_KEYS}
    reason = _check_row(row, extra)
    if reason is not None:
        row_id = row.get("id")
        keep_id = isinstance(row_id, int) or (isinstance(row_id, str) and row_id.isprintable())
        return Row(line, extra={"id": row_id} if keep_id else {}, error=reason)
    return Row(line, row["prompt"], row["completion"], extra, completion_ids=row.get("completion_ids"))


def message_text(value: str | Sequence[Mapping[str, Any]]) -> str:
    """A prompt or completion as people read it: messages as their text, with the roles if there are several."""
    if isinstance(value, str):
        return value
    turns = []
    for message in value:
        content = message.get("content") or ""
        if not isinstance(content, str):
            content = " ".join(_part_text(part) for part in content)
        if message.get("tool_calls"):
            content += json.dumps(message["tool_calls"], ensure_ascii=False)
        turns.append(content if len(value) == 1 else f"{message['role']}: {content}")
    return "\n".join(turns)


def _part_text(part: Any) -> str:
    if not isinstance(part, dict):
        return str(part)
    is_image = str(part.get("type")).removeprefix("input_").startswith("image")
    return "[image]" if is_image else str(part.get("text", part))


def check_text(key: str, value: object) -> str | None:
    """Why a prompt or completion, called `key`, is neither text nor messages; `None` if it is."""
    if isinstance(value, str):
        return (
            "The prompt is empty, so that the first token has no context." if key == "prompt" and value == "" else None
        )
    if not isinstance(value, list):
        return f"The {key} must be text or a list of messages, but it is of type {type(value).__name__}."
    if not value:
        return f"The {key} is an empty list of messages. It needs at least one."
    for i, message in enumerate(value, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return f'Message {i} of the {key} must be an object {{"role": ..., "content": ...}} with a role as text.'
        content = message.get("content")
        if not isinstance(content, str | list) and not (content is None and message.get("tool_calls")):
            return f"Message {i} of the {key} has no content that is text or a list of parts."
    return None


def _check_row(row: dict[str, Any], extra: dict[str, Any]) -> str | None:
    """Why a row cannot be scored, or `None`."""
    for key in ("prompt", "completion"):
        if key not in row:
            return f'The key "{key}" is missing. A row is {ROW_FORMAT}.'
        reason = check_text(key, row[key])
        if reason is not None:
            return reason
    kinds = ["text" if isinstance(row[key], str) else "messages" for key in ("prompt", "completion")]
    if kinds[0] != kinds[1]:
        return f"The prompt is {kinds[0]}, but the completion is {kinds[1]}. Give both as text, or both as messages."
    reason = _check_ids(row.get("completion_ids"))
    if reason is not None:
        return reason
    taken = sorted(OUTPUT_KEYS & extra.keys())
    if taken:
        return f'The key "{taken[0]}" is one that the output uses itself. Rename it in the input.'
    try:
        json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        return "The text contains one half of a surrogate pair (\\ud800 to \\udfff), which is not valid Unicode."
    except ValueError:
        return "A number is too large for a float."
    return None


def _check_ids(ids: object) -> str | None:
    if ids is None:  # `null` is how a table writes that a row has none
        return None
    if not isinstance(ids, list):
        return f"The completion_ids must be a list of token ids, but they are of type {type(ids).__name__}."
    for i, token_id in enumerate(ids, start=1):
        if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
            entry = json.dumps(token_id)[:40]
            return f"Entry {i} of the completion_ids is {entry}, but a token id is a whole number from 0."
    return None


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")
