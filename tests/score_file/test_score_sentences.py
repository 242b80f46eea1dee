# SPDX-License-Identifier: Apache-2.0
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from endotrl import SentenceReward
from endotrl.commands.main import main


ROWS = [
    {"id": 1, "prompt": "What is it?", "completion": "It is <b>good</b>. Really.\x1b[31m No"},
    {"id": 2, "prompt": [{"role": "user", "content": "Hi?"}], "completion": [{"role": "assistant", "content": ""}]},
    {"id": 3, "prompt": "Hi?"},
    {"id": 4, "prompt": "So?", "completion": "Yes."},
    {"id": 5, "prompt": "And?", "completion": "No."},
]


@pytest.fixture
def score(
    sentence_model_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Any:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def run(*options: str) -> tuple[int, Any]:
        code = main(["score", "rows.jsonl", "--model", sentence_model_path, "--device", "cpu", *options])
        return code, capsys.readouterr()

    return run


def test_sentences_in_the_output_and_on_the_page(score: Any, sentence_model_path: str, tmp_path: Path) -> None:
    code, printed = score("--html", "page.html")
    assert code == 1  # row 3 is bad
    records = [json.loads(line) for line in (tmp_path / "rows.scores.jsonl").read_text().splitlines()]
    assert "completion" in records[2]["error"]
    reward = SentenceReward(sentence_model_path)
    (expected,) = reward.score([ROWS[0]["prompt"]], [ROWS[0]["completion"]])
    record = records[0]
    assert record["reward"] == pytest.approx(expected.score, abs=1e-5)
    sentences = record["sentence_scores"]["sentences"]
    assert [entry["text"] for entry in sentences] == ["It is <b>good</b>. ", "Really.\x1b[31m No<|im_end|>"]
    entries = [record["sentence_scores"]["prompt"], *sentences]
    assert [entry["reward"] for entry in entries] == pytest.approx(expected.sentence_rewards.tolist(), abs=1e-5)
    assert sum(entry["weight"] for entry in entries) == pytest.approx(1.0, abs=1e-5)
    assert sum(entry["weight"] * entry["reward"] for entry in entries) == pytest.approx(record["reward"], abs=1e-5)
    assert "It is <b>good</b>." in printed.out and "\x1b[31m" not in printed.out
    assert "nats" not in printed.out and "per token" not in printed.out
    page = (tmp_path / "page.html").read_text()
    assert "&lt;b&gt;good" in page and "<b>good" not in page
    assert "weight" in page and "nats" not in page
    # The numbers have the same names as in the table.
    contribution, reward, weight = expected.contributions[0], expected.sentence_rewards[1], expected.weights[1]
    numbers = f"contribution {contribution:+.4f} · reward {reward:.4f} · weight {weight:.4f}".replace("-", "−")
    assert numbers in page
    shown = f"score {expected.score:.3f} · 2 sentences<".replace("-", "−")
    assert shown in page and " · 1 sentence<" in page


def test_goes_on_and_leaves_sentences_out(score: Any, tmp_path: Path) -> None:
    score("--limit", "2", "--block-size", "2")
    code, printed = score("--block-size", "2")
    assert "Earlier runs processed 2 rows" in " ".join(printed.out.split())
    assert len((tmp_path / "rows.scores.jsonl").read_text().splitlines()) == 5
    score("--overwrite", "--no-tokens")
    assert "sentence_scores" not in (tmp_path / "rows.scores.jsonl").read_text()


def test_another_model_does_not_go_on(score: Any, sentence_model_path: str, tmp_path: Path) -> None:
    score("--limit", "1")
    other = tmp_path / "other"
    shutil.copytree(sentence_model_path, other)
    code, printed = score("--model", str(other))
    assert code == 2
    assert "--model was" in printed.err
