# SPDX-License-Identifier: Apache-2.0
"""Commands in two processes, as `accelerate launch` starts them: the results are those of one, also after a kill."""

import json
from pathlib import Path

import pytest

from endotrl.commands.main import main

from ..evaluation.rows import write
from ..support.accelerate_server import torchrun


WORKER = "tests/support/commands_worker.py"


def commands(model: str, folder: Path, data: Path) -> list[list[str]]:
    common = ["--model", model, "--device", "cpu", "--quiet"]
    score = ["--block-size", "8", *common, "--output"]
    return [
        ["score", str(data / "rows.jsonl"), *score, str(folder / "scores.jsonl")],
        ["score", str(data / "rows.jsonl"), "--form", "style_residual:log_prob.mean", *score, str(folder / "form.jsonl")],
        ["pairs", str(data / "rows.jsonl"), *score, str(folder / "pairs.jsonl")],
        ["eval", "preference", "--data", str(data / "pairs.jsonl"), *common, "--output", str(folder / "preference")],
        [
            *("eval", "generation", "--data", str(data / "questions.jsonl"), *common, "--output", str(folder / "answers")),
            *("--max-new-tokens", "3", "--samples", "2", "--instruction", ""),
        ],
        [
            *("forecast", "--data", str(data / "questions.jsonl"), *common, "--output", str(folder / "forecast")),
            *("--max-new-tokens", "3", "--samples", "4", "--grader", "text"),
        ],
    ]  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [
        {"id": i, "prompt": f"{i // 4} + 1 =", "completion": " a" * (1 + 5 * i % 13) + f" {i % 4}"} for i in range(120)
    ]
    rows[50] = {"id": 50, "prompt": "What?", "chosen": "b", "rejected": "c"}
    pairs = [{"id": i, "prompt": f"{i}", "chosen": "a" * (i % 7), "rejected": "b c"} for i in range(100)]
    questions = [{"question": f"{i}?", "answer": str(i)} for i in range(40)]
    for name, table in (("rows", rows), ("pairs", pairs), ("questions", questions)):
        write(tmp_path / f"{name}.jsonl", table)
    return tmp_path


@pytest.mark.slow
def test_two_processes_make_what_one_makes(tiny_model_path: str, data: Path) -> None:
    one, two = data / "one", data / "two"
    for folder in (one, two):
        folder.mkdir()
    for words in commands(tiny_model_path, one, data):
        assert main(words) == 0
    todo = data / "commands.json"
    todo.write_text(json.dumps(commands(tiny_model_path, two, data)))
    killed = torchrun(2, WORKER, str(todo), "3")
    assert killed.returncode != 0
    assert not (two / "scores.jsonl").exists()  # but what was scored is there
    assert sum(path.read_bytes().count(b"\n") for path in (two / "scores.jsonl.shards").glob("*.jsonl")) > 0
    done = torchrun(2, WORKER, str(todo))
    assert done.returncode == 0, done.stderr
    for name in ("scores.jsonl", "form.jsonl", "pairs.jsonl"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert not (two / "scores.jsonl.shards").exists() and (two / "form.jsonl.shards" / "1.jsonl").exists()
    for name in ("preference", "answers"):
        results = [json.loads((folder / name / "results.json").read_text()) for folder in (one, two)]
        assert results[0]["units"] == results[1]["units"] and results[0]["metrics"] == results[1]["metrics"], name
    forecasts = [json.loads((folder / "forecast" / "forecast.json").read_text()) for folder in (one, two)]
    assert forecasts[0]["betas"] == forecasts[1]["betas"]
    assert (two / "forecast" / "answers.1.jsonl").read_bytes().count(b"\n") == 16  # a block of three
    for name in ("preference/scores.1.jsonl", "answers/answers.1.jsonl"):
        assert (two / name).stat().st_size > 0
    examples = [json.loads((folder / "preference" / "results.json").read_text())["examples"] for folder in (one, two)]
    assert examples[0] == examples[1]
    # What two have begun, one goes on with: nothing is left to do.
    assert main(commands(tiny_model_path, two, data)[3]) == 0
