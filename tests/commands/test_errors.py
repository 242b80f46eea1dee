# SPDX-License-Identifier: Apache-2.0
"""What each command says to mistakes, before it has written anything."""

import io
import json
import shlex
from pathlib import Path

import pytest

from endotrl.commands.main import main

from ..evaluation.rows import PAIR_ROW, RM_BENCH_ROW, write


ANSWERS = [f" {j}" + " a" * j for j in range(4)]
# Folders and files that the commands below name
FILES = {
    "rows.jsonl": [{"prompt": "1 + 1 =", "completion": " 2", "id": "a"}],
    "groups.jsonl": [{"id": i, "prompt": f"{i} + 1 =", "completions": ANSWERS} for i in range(30)],
    "other.jsonl": [{}],
    "pairs.jsonl": [PAIR_ROW],
    "chat.json": [RM_BENCH_ROW],
    "questions.jsonl": [{"question": "2 + 2?", "answer": "4"}] * 20,
    "long.jsonl": [{"question": "2 + 2?", "answer": "4"}] * 20 + [{"question": "long " * 300, "answer": "1"}],
    "nan.jsonl": [{"question": "2 + 2?", "answer": float("nan")}],
}
SCORE, PAIRS = "score rows.jsonl --model MODEL", "pairs groups.jsonl --model MODEL --device cpu"
EVAL = "eval rm-bench --model MODEL --data chat.json"
FORECAST = "forecast --model MODEL --data questions.jsonl --max-new-tokens 4 --grader text --samples 8"
PLAN = "plan other.yaml --gpus 1 --gpu-memory 80"
MISTAKES = {
    # What argparse says
    "": "required: COMMAND",
    "evla rm-bench": "(did you mean eval?)",
    "score f": "required: --model",
    "score f --model m --limit 0": "'0' is not a whole number of at least 1",
    "score f --model m --chat-template-kwargs [1]": "'[1]' is not a JSON object",
    """score f --model m --criterion '{"law": 1}'""": "one message, as text, for each domain",
    "score f --model m --over": "unrecognized arguments: --over",
    "score '' --model m": "FILE must not be empty",
    "diagnose a ''": "RUNS must not be empty",
    "eval generation --model m --data d --top-p nan": "'nan' is not a number above 0 and",
    "eval generation --model m --data d --temperature 1e-30": "of at least 0.01",
    "forecast --model m --data d --temperatures 1 0": "'0' is not a number of at least",
    "eval rmbench": "(did you mean rm-bench?)",
    "plan other.yaml --gpus 1 --gpu-memory 0": "is not a number above 0",
    # What the commands say
    "score rows.jsonl --model no/such-model": "The frozen model 'no/such-model' cannot be loaded",
    "score no.jsonl --model MODEL": "no.jsonl: there is no such file or folder",
    "score t.csv --model MODEL": "t.csv: the file must end with .json, .jsonl,",
    "score - --model MODEL": "The input has no rows. It must have lines such as {",
    f"{SCORE} --alpha 0": "--alpha is 0.0, but the temperature",
    f"{SCORE} --device cuda:99": "--device cuda:99 cannot be used",
    f"{SCORE} --output /proc/x": "/proc/x cannot be written",
    f"{SCORE} --output no/out.jsonl": "The folder of the output, no, does not exist",
    f"{SCORE} --html no/page.html": "The folder of --html no/page.html does not exist",
    f"{SCORE} --html rows.jsonl": "is also the input or the output",
    f"{SCORE} --output rows.jsonl": "would overwrite the input",
    "score rows.jsonl --model SENTENCES --token-reward log_prob": "--token-reward applies to the endogenous reward",
    f"{PAIRS} --margin -1": "--margin must be a finite number of at least 0, got -1.0",
    f"{PAIRS} --fraction 0": "--fraction must be greater than 0 and at most 1, got 0.0",
    f"{PAIRS} --form gain.sum": "--form gain.sum needs a second forward pass",
    f"{PAIRS} --form length": "There is no scorer 'length'",
    f"{PAIRS} --form bellman.sum --aggregate mean": "--form bellman.sum cannot be combined with --aggregate",
    f"{PAIRS} --output groups.jsonl": "would overwrite the input",
    f"{PAIRS} --output other.jsonl": "other.jsonl exists, but there is no other.jsonl.scores",
    f"{EVAL} --scorers loss.sum": "There is no scorer 'loss.sum'",
    f"{EVAL} --data none.json": "there is no such file or folder",
    f"{EVAL} --device cuda:77": "--device cuda:77 cannot be used",
    f"{EVAL} --scorers reward_model:no-such-model": "'no-such-model' cannot be loaded",
    f"{EVAL} --scorers reward_model:MODEL": "A reward model must have one output, but ",
    "eval generation --data nan.jsonl --model MODEL --seeds 1 1": "--seeds must differ, got 1 1",
    "eval generation --data long.jsonl --model MODEL --max-new-tokens 6 --instruction= --quiet": (
        "the model's context has 256. Remove or shorten that question: it leaves no room for --max-new-tokens."
    ),
    "eval compare rows.jsonl none": "is not a run of `endotrl eval`",
    "eval compare a b ./a": "./a is given twice",
    "forecast --data nan.jsonl --model MODEL": 'nan.jsonl, line 1: "answer" must be text or a finite number, got nan',
    f"{FORECAST} --temperatures 0.5": "--temperatures must be at least 0.01 and include 1",
    f"{FORECAST} --samples 2": "--samples must be at least 4 for 3 temperatures, got 2",
    f"{FORECAST} --max-new-tokens 600": "the model's context has 256",
    f"{FORECAST} --power-sampling 2 --alpha 0.5": "default settings. Leave out",
    f"{FORECAST} --grader best": "FILE.py:FUNCTION, got 'best'",
    "diagnose empty": "contains no log entry",
    PLAN: "Pass --kind",
    f"{PLAN} --kind grpo": "'nowhere' cannot be loaded",
    "forecast --data none.jsonl --model no/model": "none.jsonl: there is no such file or folder",
    "plan endotrl://smollm2-135m/grpo.yaml --set nothing=3": "Unknown setting: nothing. Run the recipe's script with `--help`",
    "plan endotrl://smollm2-135m/grpo.yaml --set betaa=3": "Unknown setting: betaa (did you mean beta?)",
    "recipes smollm2-135m --copy t.csv/x": "t.csv/x cannot be used: Not a directory. Choose another path.",
    "plan none.yaml": "The file none.yaml does not exist. `endotrl recipes` lists the names for endotrl://NAME.",
    "recipes --copy .": "--copy requires a NAME",
    "recipes smollm2-135m --copy t.csv": "t.csv cannot be used: File exists.",
    "demo --task arithmetic --output t.csv": "t.csv cannot be used: File exists.",
}


@pytest.mark.parametrize(("words", "reason"), MISTAKES.items())
def test_one_message(words, reason, tiny_model_path, sentence_model_path, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("endotrl.demo.demo.quiet_libraries", lambda: None)
    for name, rows in FILES.items():
        write(tmp_path / name, rows)
    (tmp_path / "t.csv").write_text("prompt,completion\nHi,there\n")
    (tmp_path / "other.yaml").write_text("model_name_or_path: nowhere\noutput_dir: output\n")
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    try:
        code = main(shlex.split(words.replace("MODEL", tiny_model_path).replace("SENTENCES", sentence_model_path)))
    except SystemExit as stop:
        code = stop.code
    err = capsys.readouterr().err
    assert code == 2 and reason in err and "Traceback" not in err and err.count("error:") == 1
    after = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert after == before and not list(tmp_path.glob("*/answers.jsonl"))


def test_nothing_to_write(tiny_model_path, tmp_path, capsys):
    write(tmp_path / "groups.jsonl", FILES["groups.jsonl"])
    assert main([*shlex.split(PAIRS.replace("MODEL", tiny_model_path)), "--margin", "1e9"]) == 2
    said = "No rows to write. Left out: 30 prompts whose rewards do not differ"
    assert said in capsys.readouterr().err


def test_runs_of_different_benchmarks_are_not_compared(tiny_model_path, tmp_path, capsys):
    for name, file, folder in (("rm-bench", "chat.json", "a"), ("preference", "pairs.jsonl", "b")):
        command = f"eval {name} --model {tiny_model_path} --device cpu --scorers length --quiet --output {folder}"
        assert main([*command.split(), "--data", write(tmp_path / file, FILES[file])]) == 0
    assert main(["eval", "compare", "a", "b"]) == 2
    assert "different benchmarks: rm-bench and preference" in capsys.readouterr().err
    results = json.loads(Path("a/results.json").read_text())
    assert results["num_items"] == 1 and main(["eval", "compare", "a"]) == 2
