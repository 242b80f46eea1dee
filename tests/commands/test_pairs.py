# SPDX-License-Identifier: Apache-2.0
"""`endotrl pairs` as users run it, and `--form`."""

import io
import json
import sys
from types import SimpleNamespace

import pytest
from datasets import load_dataset

from endotrl import EndogenousReward, preference_pairs
from endotrl.commands.main import main

from ..evaluation.rows import write


ROWS = [
    {"id": i, "prompt": f"{i} + 1 =", "completions": [" a" * (1 + (3 * i + 5 * j) % 7) + f" {j}" for j in range(4)]}
    for i in range(30)
]


@pytest.fixture(autouse=True)
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "in.jsonl", ROWS)


@pytest.fixture
def pairs(tiny_model_path):
    return lambda *options, file="data/in.jsonl": main(
        ["pairs", str(file), "--model", tiny_model_path, "--device", "cpu", *options]
    )


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_end_to_end(pairs, tmp_path, tiny_model_path, capsys, monkeypatch):
    assert pairs() == 0
    out = capsys.readouterr().out
    assert out.startswith("30 pairs from 30 prompts with 120 responses.\n") and max(map(len, out.splitlines())) <= 80
    assert "It is shorter than the rejected one in" in out and "style_residual" in out  # a sum of log-probabilities
    assert not list((tmp_path / "data").glob("in.*.*"))  # nothing beside the input
    written = lines(tmp_path / "in.pairs.jsonl")
    reward = EndogenousReward(tiny_model_path, device="cpu")
    assert written == preference_pairs(reward, ROWS).to_list()
    assert load_dataset("json", data_files="in.pairs.jsonl", split="train", cache_dir="cache").column_names == [
        "prompt", "chosen", "rejected", "id", "score_chosen", "score_rejected",
    ]  # fmt: skip
    # Another choice needs no model.
    monkeypatch.setattr(EndogenousReward, "score", lambda *_, **__: pytest.fail("scored again"))
    assert pairs("--margin", "20", "--per-prompt", "2", "--output", "in.pairs.jsonl") == 0
    assert all(row["score_chosen"] - row["score_rejected"] > 20 for row in lines(tmp_path / "in.pairs.jsonl"))
    assert pairs("--write", "best", "--output", "in.pairs.jsonl", "--quiet") == 0
    best = lines(tmp_path / "in.pairs.jsonl")
    assert [row["score"] for row in best] == [row["score_chosen"] for row in written] and len(best) == 30
    assert pairs("--write", "top", "--fraction", "0.5", "--output", "in.pairs.jsonl") == 0
    assert len(lines(tmp_path / "in.pairs.jsonl")) == 60
    assert pairs("--write", "ranked", "--output", "in.pairs.jsonl") == 0
    for row, ranked in zip(ROWS, lines(tmp_path / "in.pairs.jsonl"), strict=True):
        assert sorted(ranked["completions"]) == sorted(row["completions"])
        assert ranked["scores"] == sorted(ranked["scores"], reverse=True)


def test_in_a_pipe(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO((tmp_path / "data/in.jsonl").read_bytes())))
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(buffer=written, isatty=lambda: False, write=lambda text: 0))
    assert pairs("--form", "style_residual:log_prob.discounted=0.9", "--quiet", "--output", "-", file="-") == 0
    assert len(written.getvalue().splitlines()) == 30
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_preferences_are_labelled_anew(pairs, tmp_path, capsys):
    rows = [{"prompt": f"{i} =", "chosen": " a" * (1 + i % 2), "rejected": " a" * (2 - i % 2)} for i in range(10)]
    assert pairs(file=write(tmp_path / "labelled.jsonl", rows)) == 0
    written = lines(tmp_path / "labelled.pairs.jsonl")
    agree = sum(row["chosen"] == new["chosen"] for row, new in zip(rows, written, strict=True))
    assert f"{agree / 10:.0%} of the pairs agree with the labels of the input." in capsys.readouterr().out


def test_bad_rows_are_named(pairs, tmp_path, capsys):
    with (tmp_path / "data/in.jsonl").open("a") as file:
        file.write('{"prompt": "a"}\nnot json\n')
    assert pairs() == 1
    captured = capsys.readouterr()
    assert 'line 31: The key "completion" is missing' in captured.err and "line 32: Not valid JSON" in captured.err
    assert "Left out: 2 responses without a reward." in captured.out


def test_form_is_that_of_the_settings(tiny_model_path, tmp_path):
    write(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": " b c"}])
    command = ["score", "rows.jsonl", "--model", tiny_model_path, "--device", "cpu", "--quiet", "--output"]
    assert main([*command, "a.jsonl", "--form", "log_prob.discounted=0.9"]) == 0
    settings = ["--token-reward", "log_prob", "--aggregate", "discounted", "--discount", "0.9"]
    assert main([*command, "b.jsonl", *settings]) == 0
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    settings = [json.loads((tmp_path / f"{name}.jsonl.meta.json").read_text())["settings"] for name in "ab"]
    assert settings[0] == settings[1]
