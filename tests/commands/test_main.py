# SPDX-License-Identifier: Apache-2.0
import html as html_entities
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

from endotrl import EndogenousReward, __version__
from endotrl.commands.evaluate_options import BENCHMARK_HELP
from endotrl.commands.main import main, make_parser
from endotrl.reporting import counted

from ..evaluation.rows import write
from ..monitoring.diagnosis.runs import healthy, write_state


ROWS = [
    {"prompt": "1 + 1 =", "completion": " 2", "id": "a"},
    {"prompt": "What is 2 + 2?", "completion": " It is, beyond any doubt, 4."},
    {"prompt": "3 + 3 =", "completion": " [bold]six[/bold] \x1b[31m<script>"},
    {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Hello there!"}]},
]


@pytest.fixture
def source(tmp_path):
    return Path(write(tmp_path / "in.jsonl", ROWS))


@pytest.fixture
def score(tiny_model_path, source):
    """Runs `endotrl score` on the rows with the tiny model."""
    options = ["--model", tiny_model_path, "--device", "cpu"]
    return lambda *more, file=source: main(["score", str(file), *options, *more])


class TestParser:
    def test_heavy_libraries_are_not_imported(self, tmp_path):
        log = write_state(tmp_path / "run" / "trainer_state.json", healthy()).parent
        code = (
            "import sys; from endotrl.commands.main import main\n"
            "eval_kinds = ['eval rm-bench', 'eval compare', 'eval generation', 'eval best-of-n']\n"
            "commands = ['', 'demo', 'score', 'pairs', 'eval', 'forecast', 'diagnose', 'plan', 'recipes', 'workspace']\n"
            "for words in [*commands, *eval_kinds]:\n"
            "    try: main([*words.split(), '--help'])\n"
            "    except SystemExit as stop: assert stop.code == 0\n"
            "heavy = {'torch', 'transformers', 'trl', 'accelerate'}\n"
            "assert not (heavy | {'numpy', 'rich', 'tqdm'}) & set(sys.modules)\n"
            "assert main(['diagnose', sys.argv[1]]) == 0\n"
            "assert not heavy & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code, str(log)], check=True, stdout=subprocess.DEVNULL)

    @pytest.mark.parametrize(
        "words",
        [
            *("demo", "score", "pairs", "eval generation", "forecast", "plan", "eval best-of-n", "eval compare"),
            *(f"eval {name}" for name in BENCHMARK_HELP),
        ],
    )
    def test_help(self, words, capsys):
        with pytest.raises(SystemExit):
            main([*words.split(), "--help"])
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= 80
        shown = " ".join(" ".join(lines).split())
        assert not re.search(r"\(default: (\)|\[|None|False|default\))", shown)
        if words == "forecast":
            assert "(default: 1.0 0.7 0.5)" in shown and "sampling seed (default: 0)" in shown

    def test_version(self, capsys):
        with pytest.raises(SystemExit) as stop:
            main(["--version"])
        assert stop.value.code == 0 and capsys.readouterr().out == f"endotrl {__version__}\n"

    def test_criterion(self):
        parse = lambda text: make_parser().parse_args(["score", "f", "--model", "m", "--criterion", text]).criterion  # noqa: E731
        assert parse("Be exact.") == "Be exact."
        assert parse('{"law": "Be exact."}') == {"law": "Be exact."}


class TestDemo:
    @pytest.mark.parametrize("options", [[], ["--task", "facts", "--output", "there", "--seed", "7", "--quick"]])
    def test_runs_the_quickstart(self, options, monkeypatch):
        calls = []
        quickstart = ModuleType("endotrl.demo")
        quickstart.run_demo = lambda **settings: calls.append(settings)
        monkeypatch.setitem(sys.modules, "endotrl.demo", quickstart)
        assert main(["demo", *options]) == 0
        default = {"task": "all", "output_dir": "demo-output", "seed": 0, "size": "default"}
        assert calls == [{"task": "facts", "output_dir": "there", "seed": 7, "size": "quick"} if options else default]


class TestScore:
    def test_end_to_end(self, score, source, tmp_path, capsys):
        page = tmp_path / "page.html"
        assert score("--html", str(page)) == 0
        rows = [json.loads(line) for line in (tmp_path / "in.scores.jsonl").read_text().splitlines()]
        assert [row["line"] for row in rows] == [1, 2, 3, 4] and rows[0]["id"] == "a"
        out = capsys.readouterr().out
        # A line that names a file is as long as the name.
        assert max(len(line) for line in out.splitlines() if ".jsonl" not in line and ".html" not in line) <= 80
        assert "[bold]six[/bold] <script>" in out and "\x1b" not in out
        tokens = sum(row["num_tokens"] for row in rows)
        assert f"4 rows scored, {tokens} tokens" in out
        assert "longer answers score lower (r = −" in out  # sums of log-probabilities
        html = page.read_text(encoding="utf-8")
        assert html.count('data-tip="') == tokens and "<script" not in html and html.count("EOS</span>") == 4
        assert "line 1 · id a · reward −" in html

    def test_settings_reach_the_reward(self, score, tmp_path, tiny_model_path, capsys):
        settings = {"alpha": 0.7, "gamma": 0.9, "token_reward": "centered", "aggregate": "discounted", "discount": 0.9}
        settings["criterion"] = "Be brief."
        options = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        assert score(*options, "--output", str(tmp_path / "o.jsonl")) == 0
        reward = EndogenousReward(tiny_model_path, device="cpu", **settings)
        for line, row in zip((tmp_path / "o.jsonl").read_text().splitlines(), ROWS, strict=True):
            (expected,) = reward(prompts=[row["prompt"]], completions=[row["completion"]])
            assert json.loads(line)["reward"] == pytest.approx(expected, abs=1e-4)
        meta = json.loads((tmp_path / "o.jsonl.meta.json").read_text())["settings"]
        assert meta["alpha"] == 0.7 and meta["criterion"] == "Be brief." and meta["dtype"] == "float32"
        assert "max_tokens_per_batch" not in meta  # may change from run to run

    def test_the_command_on_the_page_makes_the_page(self, score, tmp_path):
        page = tmp_path / "page.html"
        options = ["--html", str(page), "--output", "-", "--aggregate", "mean", "--criterion", "Is it 'brief'?"]
        assert score(*options) == 0
        command = re.search(r"endotrl score .*?(?=<)", html_entities.unescape(page.read_text(encoding="utf-8")))[0]
        maps = page.read_text(encoding="utf-8").split("endotrl score")[0]
        page.unlink()
        assert main(shlex.split(command)[1:]) == 0
        seconds = r"in [\d.,]+ s \([\d,]+ tokens/s\)"
        again = page.read_text(encoding="utf-8").split("endotrl score")[0]
        assert re.sub(seconds, "", again) == re.sub(seconds, "", maps)

    def test_bad_rows(self, score, source, tmp_path, capsys):
        with source.open("a") as file:
            file.write('{"prompt": "a"}\nnot json\n' + json.dumps({"prompt": "a b " * 200, "completion": "c"}) + "\n")
        assert score() == 1
        captured = capsys.readouterr()
        assert 'line 5: The key "completion" is missing.' in captured.err
        assert "line 6: Not valid JSON: Expecting value" in captured.err
        assert "Shorten the prompt, or pass --overlong-prompt truncate_left to drop" in captured.err
        assert "3 rows could not be scored" in captured.out
        assert len((tmp_path / "in.scores.jsonl.errors.jsonl").read_text().splitlines()) == 3
        assert score() == 1  # resumed, nothing to do, and still not all well

    def test_many_bad_rows_do_not_flood_the_terminal(self, score, tmp_path, capsys):
        bad = tmp_path / "bad.jsonl"
        bad.write_text("{}\n" * 100)
        assert score("--quiet", file=bad) == 1
        captured = capsys.readouterr()
        assert captured.err.count("line ") == 20 and captured.out == ""
        assert "more invalid rows; bad.scores.jsonl.errors.jsonl lists all of them" in captured.err

    def test_from_and_to_standard_streams(self, tiny_model_path, source):
        options = ["--model", tiny_model_path, "--device", "cpu"]
        command = [sys.executable, "-m", "endotrl.commands.main", "score", "-", *options]
        done = subprocess.run(command, stdin=source.open("rb"), capture_output=True, check=True)
        assert [json.loads(line)["line"] for line in done.stdout.splitlines()] == [1, 2, 3, 4]
        assert b"First rows" in done.stderr and b"Traceback" not in done.stderr

    def test_out_of_memory_then_smaller_batches(self, score, source, tmp_path, monkeypatch, capsys):
        score_rows = EndogenousReward.score
        calls = []

        def fail_once(self, *args, **kwargs):
            calls.append(1)
            if len(calls) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return score_rows(self, *args, **kwargs)

        monkeypatch.setattr(EndogenousReward, "score", fail_once)
        assert score("--block-size", "1") == 2
        assert "does not have enough memory for batches of 8192 tokens" in capsys.readouterr().err
        assert score("--block-size", "1", "--max-tokens-per-batch", "64") == 0
        assert "Earlier runs processed 1 row, this run 3." in capsys.readouterr().out

    @pytest.mark.slow
    def test_interruption_by_signal_and_kill(self, score, tiny_model_path, tmp_path):
        """Ctrl-C, then a kill that cannot be caught, then to the end: the bytes of a run without a break."""
        source, output = tmp_path / "many.jsonl", tmp_path / "many.out.jsonl"
        write(source, [{"prompt": "a", "completion": "b" * (i % 200)} for i in range(800)])
        assert score("--quiet", "--block-size", "8", "--output", str(tmp_path / "whole.jsonl"), file=source) == 0
        options = ["score", str(source), "--model", tiny_model_path, "--device", "cpu", "--block-size", "8"]
        for number, code in ((signal.SIGINT, 130), (signal.SIGKILL, -9)):
            size = output.stat().st_size if output.exists() else 0
            process = subprocess.Popen(
                [sys.executable, "-m", "endotrl.commands.main", *options, "--output", str(output)],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                # A shell starts background jobs (this suite, perhaps) with Ctrl-C ignored, and children inherit that.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
            while not output.exists() or output.stat().st_size <= size:
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(number)
            _, err = process.communicate(timeout=60)
            assert process.returncode == code and b"Traceback" not in err
            assert (b"Run the same command again to resume." in err) == (number == signal.SIGINT)
        assert 0 < output.stat().st_size < (tmp_path / "whole.jsonl").stat().st_size
        assert main([*options, "--quiet", "--output", str(output)]) == 0
        assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_numbers_of_things():
    found = [counted(1, "row"), counted(0, "row"), counted(1200, "log entry"), counted(1, "log entry")]
    assert found == ["1 row", "0 rows", "1,200 log entries", "1 log entry"]


def test_a_workspace_that_is_refused(monkeypatch, capsys):
    wandb = pytest.importorskip("wandb")

    class Refused:
        def save(self):
            raise wandb.errors.CommError("permission denied")

    monkeypatch.setattr("endotrl.runs.wandb_workspace.make_workspace", lambda *_: Refused())
    assert main(["workspace", "a/b"]) == 2
    assert "W&B cannot save a workspace for a/b: permission denied" in capsys.readouterr().err
