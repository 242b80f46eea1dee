# SPDX-License-Identifier: Apache-2.0
"""`endotrl eval` as users run it: files, terminal of 80 columns, page, comparison, errors."""

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
import sys

import pytest

from endotrl import SentenceReward
from endotrl.commands.evaluate_options import BENCHMARK_HELP, NEEDS_DATA
from endotrl.commands.main import main
from endotrl.evaluation.benchmarks import BENCHMARKS
from endotrl.evaluation.benchmarks.dsp import DOMAINS
from endotrl.evaluation.examples_page import answer_example
from endotrl.evaluation.generation import Sample
from endotrl.evaluation.questions import Question
from endotrl.evaluation.results import compare
from endotrl.evaluation.tables import markdown_table
from endotrl.reporting import counted

from ..evaluation.rows import PAIR_ROW, RM_BENCH_ROW, write


EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\x1b[31m"


@pytest.fixture
def evaluate(tiny_model_path, tmp_path):
    """Runs `endotrl eval` with the tiny model, and returns what it wrote."""

    def run(name, path, *options, output="out"):
        folder = tmp_path / output
        command = ["eval", name, "--model", tiny_model_path, "--device", "cpu", "--data", path]
        assert main([*command, "--output", str(folder), *options]) == 0
        return json.loads((folder / "results.json").read_text())

    return run


@pytest.fixture
def rm_bench(tmp_path):
    rows = [{**RM_BENCH_ROW, "id": i, "prompt": f"What is {i}+2?"} for i in range(3)]
    rows[1]["prompt"] = EVIL
    rows[2]["chosen"] = [EVIL, "It is 4.", "**4**"]
    return write(tmp_path / "chat.json", rows)


def test_options_name_every_benchmark():
    assert list(BENCHMARK_HELP) == list(BENCHMARKS)
    assert set(NEEDS_DATA) == {name for name, benchmark in BENCHMARKS.items() if benchmark.hub is None}


def browser_data(path):
    """The data of a browser's page; the page runs one script, which is ours."""
    page = path.read_text()
    scripts = re.findall(r"<script([^>]*)>(.*?)</script>", page, re.DOTALL)
    assert [attributes for attributes, _ in scripts] == [' type="application/json" id="data"', ""]
    digest = base64.b64encode(hashlib.sha256(scripts[1][1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page and "default-src 'none'" in page
    assert "innerHTML" not in page and not re.findall(r'(?:src|href)="', page)
    return json.loads(scripts[0][1])


class TestBrowser:
    def test_every_example_is_there_and_runs_nothing(self, evaluate, rm_bench, tmp_path):
        results = evaluate("rm-bench", rm_bench, "--scorers", "bellman.sum", "length")
        page = (tmp_path / "out" / "report.html").read_text()
        assert "<script" not in page and "onerror=alert(2)>" not in page and "&lt;script&gt;" in page
        assert "\x1b" not in page and not re.findall(r'(?:src|href)="(?!data:|examples.html")', page)
        assert 'name="viewport"' in page and 'class="t ' in page and page.count("<figure>") == 1
        assert "<script>alert" not in (tmp_path / "out" / "examples.html").read_text()
        data = browser_data(tmp_path / "out" / "examples.html")
        assert data["scorers"] == ["bellman.sum", "length"] and data["groups"] == ["chat"]
        assert data["examples"][1]["prompt"].startswith("<script>alert(1)</script>") and "\x1b" not in str(data)
        for shown, example in zip(data["examples"], results["examples"], strict=True):
            for scorer, name in enumerate(data["scorers"]):
                scores = example["scores"][name]
                assert shown["scores"][scorer] == pytest.approx(scores, abs=1e-5)
                # The worst pair of three right and three wrong answers.
                margin = min(scores[:3]) - max(scores[3:])
                assert shown["margin"][scorer] == pytest.approx(margin, abs=1e-5)
                assert shown["right"][scorer] == float(margin > 0)
                better, worse = shown["pair"][scorer]
                assert scores[better] == min(scores[:3]) and scores[worse] == max(scores[3:])
            assert [piece["label"] for piece in shown["pieces"]] == ["better"] * 3 + ["worse"] * 3

    def test_samples(self):
        row = {"right": [False, True, True], "texts": ["a", "b", "c"], "finished": [True, False, True]}
        question = Question("7", "1+1?", "2")
        example = answer_example(question, "seed 0", row, {"s": [0.5, 0.25, -1.0], "t": [0.0, 1.0, 1.0]})
        assert example.pieces == [("a", "wrong"), ("b", "right, cut off"), ("c", "right")]
        assert example.choice == [0, 1] and example.right == [0.0, 1.0]
        assert example.margin == [-0.25, 1.0] and example.pair == [(1, 0), (1, 0)]
        alike = answer_example(question, "seed 0", {**row, "right": [True] * 3}, {"s": [0.5, 0.25, -1.0]})
        assert alike.margin == [None] and alike.pair == [(0, 1)]


class TestBenchmark:
    def test_results_say_what_the_scores_say(self, evaluate, rm_bench, capsys, tmp_path):
        names = ["bellman.sum", "residual:bellman.discounted=0.95", "judge_verifier", "length"]
        results = evaluate("rm-bench", rm_bench, "--scorers", *names)
        assert [example["id"] for example in results["examples"]] == ["0", "1", "2"]
        for name in names:
            for estimate in results["metrics"][name].values():
                assert estimate["low"] - 1e-6 <= estimate["value"] <= estimate["high"] + 1e-6
        assert results["num_items"] == 3 and results["tokens"] == sum(sum(e["tokens"]) for e in results["examples"])
        for key in "model model_version settings versions seconds command started tie_rule data".split():
            assert results[key], key
        out = capsys.readouterr().out
        assert max(map(len, out.splitlines()[:16])) <= 80
        first, *lines = filter(None, map(str.strip, out.splitlines()))
        assert first.startswith("No verdict from only 3 distinct items;") and "No verdict" not in "".join(lines)
        values = [estimate["average"]["value"] for estimate in results["metrics"].values()]
        shown = [line.split()[1] for line in lines if line.split()[0] in names]
        assert shown == [f"{value:.3f}" for value in sorted(values, reverse=True)]
        table = (tmp_path / "out" / "results.md").read_text()
        assert "| scorer | average | 95% interval | bias | length-controlled | ties | easy | normal | hard |" in table
        assert results["command"] in table
        page = (tmp_path / "out" / "report.html").read_text()
        assert all("With only 3 distinct items, intervals are too narrow." in text for text in (out, table, page))

    @pytest.mark.parametrize(
        ("scorer", "shown"),
        [
            *((name, name) for name in ("bellman.sum", "bellman.discounted=0.9", "centered.mean", "self_certainty")),
            *(("residual:bellman.mean", "bellman.mean"), ("length", "log_prob.sum"), ("gain.sum", "gain.sum")),
        ],
    )
    def test_shown_tokens_sum_to_the_score(self, evaluate, rm_bench, tmp_path, scorer, shown):
        results = evaluate("rm-bench", rm_bench, "--scorers", scorer, "random")
        page = html.unescape((tmp_path / "out" / "report.html").read_text()).replace("−", "-")
        assert f"token contributions to {shown}," in page
        blocks = page.split('class="heat"')[1:]
        assert blocks
        scores = [score for example in results["examples"] for score in example["scores"][scorer]]
        for block in blocks:
            total, sign, said = re.search(rf"(?<!:){re.escape(shown)} ([-\d.]+) (=|·) ([^<]*)", block).groups()
            parts = said.split(" + ") if sign == "=" else [total]  # of tokens alone, one number is said
            rest = sum(float(part.split()[-1]) for part in parts[1:])
            tokens = [float(number) for number in re.findall(r"\ncontribution ([-+\d.]+)", block)]
            assert sum(tokens) == pytest.approx(float(parts[0].split()[-1]), abs=0.002 * len(tokens))
            assert sum(tokens) + rest == pytest.approx(float(total), abs=0.002 * len(tokens))
            if scorer == shown:
                assert any(abs(float(total) - score) < 0.001 for score in scores)

    def test_quiet(self, evaluate, tmp_path, capfd):
        evaluate("preference", write(tmp_path / "p.jsonl", [PAIR_ROW]), "--scorers", "bellman.sum", "--quiet")
        assert capfd.readouterr() == ("", "")

    def test_tables_fit_80_columns(self, evaluate, tmp_path, capsys):
        rows = [{"prompt": f"Say {i}", "chosen": "yes, yes, yes", "rejected": "no", "id": i} for i in range(24)]
        evaluate("preference", write(tmp_path / "p.jsonl", rows), "--scorers", "length", "shortness", "random")
        out = capsys.readouterr().out
        assert out.strip().startswith("length is the best of 3: accuracy 1.000 (95% interval 1.000 to 1.000).\n")
        evaluate("preference", write(tmp_path / "p.jsonl", rows))
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines[:32])) <= 80
        assert sum(" 0." in line or " 1." in line for line in lines if "residual:" in line) >= 6

    def test_the_same_command_goes_on(self, evaluate, rm_bench):
        few = evaluate("rm-bench", rm_bench, "--limit", "1", "--scorers", "bellman.sum")
        assert few["num_items"] == 1
        many = evaluate("rm-bench", rm_bench, "--scorers", "bellman.sum", "gain.mean")
        assert many["examples"][0]["scores"]["bellman.sum"] == few["examples"][0]["scores"]["bellman.sum"]
        with pytest.raises(AssertionError):  # exit code 2: another setting
            evaluate("rm-bench", rm_bench, "--max-response-tokens", "3")
        assert evaluate("rm-bench", rm_bench, "--max-response-tokens", "3", "--overwrite")["cut"] > 0

    def test_responses_longer_than_a_reward_models_context(
        self, evaluate, reward_model_path, sentence_model_path, tmp_path, caplog
    ):
        rows = [{"prompt": "Say a.", "chosen": "a. " * 300, "rejected": "a. " * 400}]  # the context has 256 tokens
        names = [f"reward_model:{path}" for path in (reward_model_path, sentence_model_path)]
        results = evaluate("preference", write(tmp_path / "pairs.jsonl", rows), "--scorers", *names)
        for name in names:
            assert f"2 responses to {name} are longer than the model's context" in caplog.text
        # Both are cut at the same place, so that they are the same.
        better, worse = results["examples"][0]["scores"][names[1]]
        assert better == pytest.approx(worse, abs=1e-5)

    def test_explicit_reward_models_beside_the_intrinsic_ones(
        self, evaluate, reward_model_path, sentence_model_path, tmp_path
    ):
        pair = {"chosen": "It is 2. I am sure of it.", "rejected": "No idea, sorry."}
        rows = [{"prompt": f"What is {i}+2?", **pair} for i in range(5)]
        classifier, sentence = (f"reward_model:{path}" for path in (reward_model_path, sentence_model_path))
        names = ["bellman.sum", "residual:bellman.sum", classifier, sentence, f"residual:{sentence}", "length"]
        results = evaluate("preference", write(tmp_path / "pairs.jsonl", rows), "--scorers", *names)
        assert list(results["metrics"]) == names
        answers = [row[key] for row in rows for key in ("chosen", "rejected")]
        scores = sum((example["scores"][sentence] for example in results["examples"]), [])
        prompts = [row["prompt"] for row in rows for _ in "ab"]
        expected = SentenceReward(sentence_model_path, device="cpu")(prompts, answers)
        assert scores == pytest.approx(expected, abs=1e-4) and len(set(expected)) > 5
        assert results["verdict"].startswith("No verdict from only 5 distinct items") and results["statements"] == []
        page = (tmp_path / "out" / "report.html").read_text()
        assert all(f">{name}</td>" in page for name in names)

    def test_steps(self, evaluate, tmp_path):
        row = {"id": "gsm8k-1", "problem": "1+1?", "steps": ["Add.", "It is 2.", "So 2."], "label": 1}
        rows = [{**row, "id": f"gsm8k-{i}", "problem": f"{i}+1?", "label": i % 4 - 1} for i in range(8)]
        results = evaluate("process-bench", write(tmp_path / "f.jsonl", rows))
        assert len(results["details"]["bellman.sum"]["thresholds"]) == 2
        assert results["length"] == {} and "average F1" in results["headline"]
        assert all(len(example["scores"]["position"]) == 3 for example in results["examples"])
        scores = [example["scores"]["bellman.sum"] for example in results["examples"]]
        labels = [row["label"] for row in rows]
        missed = [label >= 0 and row[label] > min(row) for label, row in zip(labels, scores, strict=True)]
        assert (tmp_path / "out" / "report.html").read_text().count("first wrong step") == min(4, sum(missed)) > 0

    def test_criteria(self, evaluate, tmp_path):
        responses = dict.fromkeys([*DOMAINS, "normal"], "") | {"academy": "Hello", "normal": "Yo"}
        path = write(tmp_path / "f.json", [{"query": "Hi", "responses": responses}])
        results = evaluate("dsp", path, "--scorers", "bellman.sum")
        assert len(results["examples"]) == 5
        assert "Criterion by domain" in (tmp_path / "out" / "report.html").read_text()


class TestCompare:
    def test_three_models_in_one_table(self, evaluate, tmp_path, capsys):
        short, long = "yes", "no, I will not"
        for output, answers, num in (("a", (short, long), 24), ("b", (long, short), 24), ("c", (short, long), 23)):
            responses = dict(zip(("chosen", "rejected"), answers, strict=True))
            path = write(tmp_path / "p.jsonl", [{"prompt": f"Say {i}", "id": i, **responses} for i in range(num)])
            evaluate("preference", path, "--scorers", "length", "random", output=output)
        capsys.readouterr()
        assert main(["eval", "compare", *"abc", "--markdown", "c.md"]) == 0
        out = capsys.readouterr().out
        verdict = "B is better than A; B is highest (accuracy of length: A 0.000, B 1.000, C 0.000)."
        assert " ".join(out.split()).startswith(verdict)
        assert "Left out because not all runs have them: 2 items." in out
        lines = list(map(str.strip, out.splitlines()))
        row = next(line for line in lines if line.endswith("accuracy, length"))
        assert row.split() == ["0.000", "1.000", "▲", "0.000", "accuracy,", "length"]
        assert max(map(len, out.splitlines()[:10])) <= 80
        table = (tmp_path / "c.md").read_text()
        assert "| length | accuracy of B | 0.000 | 1.000 | +1.000 | +1.000 to +1.000 | better |" in table

    def test_the_whole_verdict_and_nothing_that_controls_the_terminal(self, evaluate, tmp_path, capsys):
        name = f"reward_model:{'very/' * 70}long\x1b[31m"
        path = write(tmp_path / "p.jsonl", [{**PAIR_ROW, "id": i, "prompt": f"Say {i}"} for i in range(24)])
        for output in "ab":
            evaluate("preference", path, "--scorers", "length", output=output)
            text = (tmp_path / output / "results.json").read_text()
            (tmp_path / output / "results.json").write_text(text.replace('"length":', f"{json.dumps(name)}:"))
        capsys.readouterr()
        assert main(["eval", "compare", "a", "b"]) == 0
        out = capsys.readouterr().out
        assert "\x1b" not in out and "/long:A" in "".join(out.split())

    def test_needs_no_torch(self, evaluate, tmp_path):
        evaluate("preference", write(tmp_path / "p.jsonl", [PAIR_ROW]), "--scorers", "length")
        shutil.copytree(tmp_path / "out", tmp_path / "again")
        code = (
            "import sys; from endotrl.commands.main import main\n"
            "assert main(['eval', 'compare', sys.argv[1], sys.argv[2]]) == 0\n"
            "heavy = {'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules)\n"
            "assert not heavy, heavy"
        )
        runs = [str(tmp_path / name) for name in ("out", "again")]
        subprocess.run([sys.executable, "-c", code, *runs], check=True, stdout=subprocess.DEVNULL)

    def test_units_are_joined_by_name(self):
        """In another order, with an id that is there twice, and with items that only one run has."""

        def run(*units):
            values = [{"cluster": c, "group": "g", "values": {"s": {"accuracy": float(right)}}} for c, right in units]
            figures = {"metrics": {"s": {}}, "headline": ["accuracy"], "main_metric": "accuracy"}
            return {"benchmark": "preference", "units": values, **figures}

        # In common: x (1 and 0), the first y (0 and 1), z (1 and 1); A alone has a second y and v, B alone has w.
        a, b = run(("x", 1), ("y", 0), ("y", 1), ("z", 1), ("v", 1)), run(("z", 1), ("y", 1), ("w", 0), ("x", 0))
        found = compare([a, b])
        assert (found["num_units"], found["left_out"]) == (3, 3)
        assert found["rows"][0]["values"] == pytest.approx([2 / 3, 2 / 3])
        assert "of s: A 0.667" in compare([{**a, "main_metric": "greedy"}, b])["verdict"]  # which none has
        assert compare([a, b, run(("y", 0), ("z", 0))])["rows"][0]["values"] == pytest.approx([0.5, 1.0, 0.0])


class TestGeneration:
    def questions(self, tmp_path):
        rows = [{"question": f"{i}+{i}?", "answer": str(2 * i), "id": i} for i in range(4)]
        return write(tmp_path / "q.jsonl", rows)

    def test_pass_at_k(self, evaluate, tmp_path):
        options = ["--samples", "3", "--k", "2", "--seeds", "0", "1", "--max-new-tokens", "6", "--instruction="]
        results = evaluate("generation", self.questions(tmp_path), *options)
        lines = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
        assert len(lines) == 4 * 3  # greedy and two seeds
        sampled = [sum(line["right"]) / 3 for line in lines if line["seed"] != "greedy"]
        assert results["metrics"]["answers"]["pass@1"]["value"] == pytest.approx(sum(sampled) / 8)
        assert set(results["pass@1 by seed"]) == {"0", "1"} and results["headline"] == ["greedy", "pass@1", "pass@2"]
        again = evaluate("generation", self.questions(tmp_path), *options)
        assert again["metrics"] == results["metrics"]
        assert len((tmp_path / "out" / "answers.jsonl").read_text().splitlines()) == 12
        assert "answers" in (tmp_path / "out" / "report.html").read_text()

    def test_questions_asked_twice(self, evaluate, tmp_path, capsys):
        path = write(tmp_path / "twice.jsonl", [{"question": q, "answer": "2"} for q in ("1+1?", "1+1?", "3-1?")])
        for seed in "01":
            evaluate("generation", path, "--max-new-tokens", "4", "--seeds", seed, output=seed)
        assert main(["eval", "compare", "0", "1"]) == 0
        out = capsys.readouterr().out
        assert out.count("3 items (2 distinct)") == 3 and "Right answers to 3 questions (2 distinct)" in out

    def test_each_of_several_answers_is_accepted(self, evaluate, tmp_path, monkeypatch):
        monkeypatch.setattr("endotrl.evaluation.generation.sample_of", lambda *_: Sample("Paris", (1,), True))
        rows = [{"question": "a?", "answers": ["Lutetia", "Paris"]}, {"question": "b?", "answers": ["Rome", "Roma"]}]
        results = evaluate("generation", write(tmp_path / "q.jsonl", rows), "--max-new-tokens", "2")
        assert results["metrics"]["answers"]["greedy"]["value"] == 0.5
        assert "Lutetia or Paris" in (tmp_path / "out" / "examples.html").read_text()

    def test_best_of_n_chooses_among_the_same_samples(self, evaluate, tmp_path, tiny_model_path, monkeypatch):
        # A grader that a random model can satisfy: an answer is right if it has an even number of characters.
        grader = lambda text, answers, math: len(text) % 2 == 0  # noqa: E731
        monkeypatch.setattr("endotrl.commands.evaluate_answers.is_right", grader)
        options = ["--samples", "4", "--max-new-tokens", "6", "--instruction=", "--scorers", "log_prob.mean", "length"]
        results = evaluate("best-of-n", self.questions(tmp_path), *options)
        lines = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
        value = {name: metrics["accuracy"]["value"] for name, metrics in results["metrics"].items()}
        assert list(value) == ["log_prob.mean", "length", "majority", "random", "best possible"]
        assert value["random"] == pytest.approx(sum(sum(line["right"]) for line in lines) / 16)
        assert value["best possible"] == pytest.approx(sum(any(line["right"]) for line in lines) / 4)
        samples = [list(zip(line["right"], line["tokens"], strict=True)) for line in lines]
        longest = [
            [right for right, n in row if n == max(line["tokens"])] for line, row in zip(lines, samples, strict=True)
        ]
        assert value["length"] == pytest.approx(sum(sum(row) / len(row) for row in longest) / 4)
        hopeless = sum(not any(line["right"]) for line in lines)
        assert (f"No sample is right for {counted(hopeless, 'question')} of 4" in results["verdict"]) == (hopeless > 0)
        data = browser_data(tmp_path / "out" / "examples.html")
        assert data["scorers"] == ["log_prob.mean", "length", "majority"]
        for shown, line in zip(data["examples"], lines, strict=True):
            assert shown["scores"][1] == line["tokens"]
            assert shown["choice"][1] == line["tokens"].index(max(line["tokens"]))
        table = (tmp_path / "out" / "report.html").read_text().partition("What each scorer chose")[2]
        assert all(table.count(f">{i}+{i}?</td>") <= 1 for i in range(4)) and "</table>" in table

    def test_one_engine_of_vllm(self, evaluate, tmp_path, fake_vllm):
        options = ["--samples", "2", "--seeds", "0", "1", "--backend", "vllm", "--trust-remote-code"]
        options += ["--vllm-kwargs", '{"enforce_eager": true}', "--max-new-tokens", "4"]
        results = evaluate("generation", self.questions(tmp_path), *options)
        ((started, settings),) = fake_vllm.started  # greedy and two seeds
        assert (settings["trust_remote_code"], settings["enforce_eager"]) == (True, True)
        assert started() is None  # ended with the run
        assert [(call[0].n, call[0].temperature) for call in fake_vllm.asked] == [(1, 0.0), (2, 1.0), (2, 1.0)]
        assert results["metrics"]["answers"]["tokens"]["value"] == 2
        # Nothing is left to answer.
        evaluate("generation", self.questions(tmp_path), *options)
        assert len(fake_vllm.started) == 1

    def test_best_of_n_by_a_model_with_code_of_its_own(self, tiny_model_path, tmp_path, own_code, monkeypatch, capsys):
        monkeypatch.setattr("endotrl.commands.evaluate_answers.is_right", lambda *args, **kwargs: True)
        command = ["eval", "best-of-n", "--model", tiny_model_path, "--reward-model", own_code(tiny_model_path)]
        command += ["--data", self.questions(tmp_path), "--output", "out", "--quiet", "--device", "cpu"]
        command += ["--samples", "2", "--max-new-tokens", "4", "--scorers", "log_prob.mean"]
        assert main(command) == 2
        assert "--trust-remote-code" in capsys.readouterr().err
        assert main([*command, "--trust-remote-code", "--overwrite"]) == 0


def test_markdown_table_escapes():
    assert markdown_table(["a"], [["x|y\nz"], ["w"]]).splitlines()[2:] == ["| x\\|y z |", "| w |"]
