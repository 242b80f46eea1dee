# SPDX-License-Identifier: Apache-2.0
"""`studies.evaluation` runs, goes on, and says what its runs say. What it measures is not tested."""

import json
import sys
from types import SimpleNamespace

import pytest

import studies.evaluation
from benchmarks.measure import read_figures
from endotrl.commands.main import make_parser
from studies.evaluation import RUNS, main

from .rows import RM_BENCH_ROW, write


@pytest.fixture
def in_this_process(monkeypatch):
    """Runs what the benchmark hands to new interpreters in this one, which has imported everything already."""

    def run(command, env):
        _, _, code, *arguments = command
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["-c", *arguments])
            with pytest.raises(SystemExit) as end:
                exec(code, {})
        return SimpleNamespace(returncode=end.value.code)

    monkeypatch.setattr(studies.evaluation, "subprocess", SimpleNamespace(run=run))


def test_one_command(tmp_path, tiny_model_path, capsys, in_this_process):
    for name, rows in (
        ("rm_bench/chat_filtered.json", [{**RM_BENCH_ROW, "id": i, "prompt": f"{i}+2?"} for i in range(3)]),
        ("math/mawps/singleop.jsonl", [{"input": f"{i}+1?", "target": i + 1} for i in range(2)]),
    ):
        (tmp_path / "data" / name).parent.mkdir(parents=True)
        write(tmp_path / "data" / name, rows)
    command = ["--data", str(tmp_path / "data"), "--work", str(tmp_path / "work"), "--output", str(tmp_path / "docs")]
    command += ["--model", tiny_model_path, "--quick", "--jobs", "1"]
    command += ["--only", "rm-bench-chat", "best-of-n", "llmbar"]
    assert main(command) == 0
    assert "llmbar is left out" in capsys.readouterr().err
    page = (tmp_path / "docs" / "results" / "evaluation.md").read_text()
    assert "## RM-Bench: substance against style" in page and "## Best of 8, MAWPS" in page
    assert str(tmp_path) not in page
    assert "endotrl eval rm-bench --model" in page and "--data DIR/rm_bench/chat_filtered.json" in page
    data = read_figures(tmp_path / "docs" / "results" / "evaluation.json.gz")
    results = json.loads((tmp_path / "work" / "rm-bench-chat" / "results.json").read_text())
    assert data["results"]["rm-bench-chat"]["metrics"] == results["metrics"] and results["num_items"] == 2
    assert (tmp_path / "docs" / "images" / "evaluation-rm-bench.png").exists()
    # Done is done: with the files of the runs as they are, nothing is run.
    changed = {**results, "num_items": 77}
    (tmp_path / "work" / "rm-bench-chat" / "results.json").write_text(json.dumps(changed))
    assert main(command) == 0
    assert "77 items" in (tmp_path / "docs" / "results" / "evaluation.md").read_text()


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_every_run_is_a_command(run, tmp_path):
    assert make_parser().parse_args(run.arguments(tmp_path, "m")).benchmark == run.what


def test_no_files(tmp_path):
    with pytest.raises(SystemExit, match="has none of the files"):
        main(["--data", str(tmp_path)])


def test_speed(tmp_path, tiny_model_path):
    from benchmarks.evaluation_speed import OURS, WHOLE
    from benchmarks.evaluation_speed import main as measure

    path = write(tmp_path / "chat.json", [{**RM_BENCH_ROW, "id": i, "prompt": f"{i}+2?"} for i in range(3)])
    options = ["--model", tiny_model_path, "--dtype", "float32", "--quick", "--output", str(tmp_path)]
    assert measure(["--data", path, *options]) == 0  # it checks that the naive reward is the same
    found = json.loads((tmp_path / "results" / "evaluation_speed.json").read_text())
    assert found["settings"]["responses"] == 12 and found["largest difference"] < 0.01
    assert found["ratios"][OURS]["median"] > 0 and found["ratios"][WHOLE]["median"] > 0
    assert str(tmp_path) not in (tmp_path / "results" / "evaluation_speed.md").read_text().replace(tiny_model_path, "")
