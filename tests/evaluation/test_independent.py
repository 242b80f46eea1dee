# SPDX-License-Identifier: Apache-2.0
"""
Accuracies worked out a second time from the raw files, with nothing of the package: its readers, its averaging and its
tie rules must give exactly the same. Scores are numbers of the text alone, coarse ones with many ties among them. The
files are the real ones where they are, and else hand-made ones of the same format.
"""

import gzip
import hashlib
import json
import os
import random
from collections import defaultdict
from fractions import Fraction
from pathlib import Path

import pytest

from endotrl.commands.main import main
from endotrl.evaluation.benchmarks.dsp import CRITERIA
from endotrl.evaluation.benchmarks.prm_bench import thresholds

from .rows import DATA, items_of, metrics_of, write


DOMAINS = ("academy", "business", "literature", "entertainment")


def digest(text: str, criterion: str | None = None) -> float:
    return int(hashlib.md5(f"{criterion}\x00{text}".encode()).hexdigest()[:6], 16) / 7.0


def coarse(text: str, criterion: str | None = None) -> float:
    return digest(text, criterion) // 1e6


SCORES = pytest.mark.parametrize("score", [digest, coarse])


def real_or_made(tmp_path, name, rows):
    """The real file, or one of the same format."""
    if (DATA / name).exists():
        return str(DATA / name)
    return write(tmp_path / Path(name).name.removesuffix(".gz"), rows)


def raw(path):
    data = gzip.decompress(Path(path).read_bytes()) if path.endswith(".gz") else Path(path).read_bytes()
    if data.lstrip()[:1] == b"[":
        return json.loads(data)
    return [json.loads(line) for line in data.split(b"\n") if line.strip()]


def ours(benchmark, path, score):
    items = items_of(benchmark, path)
    scores = [[score(text, item.criterion) for text in item.steps or item.responses] for item in items]
    return metrics_of(benchmark, items, scores)


def words(count, seed=0):
    draws = random.Random(seed)
    return [" ".join(draws.choices("abcdefgh", k=draws.randint(1, 9))) for _ in range(count)]


@SCORES
@pytest.mark.parametrize("part", ["chat", "safety-response"])
def test_rm_bench(tmp_path, part, score):
    made = [{"id": i, "prompt": "p", "chosen": words(3, i), "rejected": words(3, 99 + i)} for i in range(40)]
    path = real_or_made(tmp_path, f"rm_bench/{part}_filtered.json", made)
    wins = defaultdict(int)
    rows = raw(path)
    for row in rows:
        for i, chosen in enumerate(row["chosen"]):
            for j, rejected in enumerate(row["rejected"]):
                level = "hard" if i < j else "easy" if i > j else "normal"
                wins[level] += score(chosen) > score(rejected)
    expected = {level: Fraction(count, 3 * len(rows)) for level, count in wins.items()}
    found = ours("rm-bench", path, score)
    for level, value in expected.items():
        assert found[level] == pytest.approx(float(value), abs=1e-12)
    assert found["average"] == pytest.approx(float(sum(expected.values()) / 3), abs=1e-12)


@SCORES
def test_judge_bench(tmp_path, score):
    made = [
        {"pair_id": str(i), "source": source, "question": "q", "response_A": a, "response_B": b, "label": label}
        for i, (a, b) in enumerate(zip(words(40), words(40, 1), strict=True))
        for source, label in [(("mmlu-pro-law", "livebench-math", "livecodebench")[i % 3], ("A>B", "B>A")[i % 2])]
    ]
    path = real_or_made(tmp_path, "judgebench/claude-3-5-sonnet.jsonl", made)
    right = [
        score(row[f"response_{row['label'][0]}"]) > score(row[f"response_{row['label'][2]}"]) for row in raw(path)
    ]
    assert ours("judge-bench", path, score)["accuracy"] == pytest.approx(sum(right) / len(right), abs=1e-12)


@SCORES
def test_llmbar(tmp_path, score):
    made = [
        {"input": "i", "output_1": a, "output_2": b, "label": 1 + i % 2}
        for i, (a, b) in enumerate(zip(words(40), words(40, 1), strict=True))
    ]
    path = real_or_made(tmp_path, "llmbar/natural.json", made)
    rows = raw(path)
    right = sum(score(row[f"output_{row['label']}"]) > score(row[f"output_{3 - row['label']}"]) for row in rows)
    assert ours("llmbar", path, score)["average"] == pytest.approx(right / len(rows), abs=1e-12)


@SCORES
def test_preference(tmp_path, score):
    made = [
        {"chosen": f"\n\nHuman: Hi\n\nAssistant: {a}", "rejected": f"\n\nHuman: Hi\n\nAssistant: {b}"}
        for a, b in zip(words(40), words(40, 1), strict=True)
    ]
    path = real_or_made(tmp_path, "hh_rlhf/harmless-base.test.jsonl.gz", made)
    right = total = 0
    for row in raw(path):
        if row["chosen"] == row["rejected"]:
            continue
        start = len(os.path.commonprefix([row["chosen"], row["rejected"]]))
        if row["chosen"][start - 1] == " ":
            start -= 1
        total += 1
        right += score(row["chosen"][start:]) > score(row["rejected"][start:])
    assert ours("preference", path, score) == {"accuracy": pytest.approx(right / total, abs=1e-12)}


@SCORES
def test_dsp(tmp_path, score):
    made = [
        {"query": f"q{i}", "responses": dict(zip((*DOMAINS, "normal"), words(5, i), strict=True))} for i in range(30)
    ]
    path = real_or_made(tmp_path, "dsp/domain_specific_preference.test.json", made)
    rows, found = raw(path), ours("dsp", path, score)
    table = {}
    for criterion in DOMAINS:
        for domain in DOMAINS:
            wins = [
                score(row["responses"][domain], CRITERIA[criterion]) > score(text, CRITERIA[criterion])
                for row in rows
                for name, text in row["responses"].items()
                if name != domain
            ]
            table[criterion, domain] = sum(wins) / len(wins)
            assert found[f"{criterion} > {domain}"] == pytest.approx(table[criterion, domain], abs=1e-12)
    matching = sum(table[domain, domain] for domain in DOMAINS) / 4
    other = sum(value for (a, b), value in table.items() if a != b) / 12
    assert found["matching"] == pytest.approx(matching, abs=1e-12)
    assert found["follows"] == pytest.approx(matching - other, abs=1e-12)


@SCORES
def test_prm_bench(tmp_path, score):
    made = [
        {
            "idx": str(i), "modified_question": "q", "original_question": "q", "classification": "step_contradiction",
            "modified_process": words(4, i), "original_process": words(4, i), "error_steps": [1 + i % 4],
        }
        for i in range(30)
    ]  # fmt: skip
    path = real_or_made(tmp_path, "prmbench/step_contradiction.jsonl", made)
    items = items_of("prm-bench", path)
    # Which threshold a solution gets is the package's own device; what it makes of it is not.
    scores = [[score(step) for step in item.steps] for item in items]
    of_fold = thresholds(items, scores)
    counts = defaultdict(int)
    for item, row in zip(items, raw(path), strict=True):
        threshold = of_fold[int(item.key, 16) % 2]
        wrong = set(row["error_steps"])
        for number, step in enumerate(row["modified_process"], start=1):
            counts[number in wrong, score(step.strip()) < threshold] += 1
    f1 = 2 * counts[False, False] / (2 * counts[False, False] + counts[True, False] + counts[False, True])
    negative = 2 * counts[True, True] / (2 * counts[True, True] + counts[True, False] + counts[False, True])
    found = metrics_of("prm-bench", items, scores)
    assert found["PRMScore"] == pytest.approx((f1 + negative) / 2, abs=1e-12)
    assert (found["F1"], found["negative F1"]) == pytest.approx((f1, negative), abs=1e-12)


def test_of_the_scores_that_a_run_keeps(tmp_path, tiny_model_path):
    """What `results.json` says is what its own scores give, joined with the raw file by id."""
    made = [{"id": i, "prompt": f"p{i}", "chosen": words(3, i), "rejected": words(3, 99 + i)} for i in range(6)]
    path = real_or_made(tmp_path, "rm_bench/chat_filtered.json", made)
    command = ["eval", "rm-bench", "--model", tiny_model_path, "--device", "cpu", "--data", path, "--limit", "6"]
    names = ["bellman.sum", "log_prob.discounted=0.95", "length", "random"]
    options = ["--max-response-tokens", "40", "--output", str(tmp_path / "out"), "--quiet", "--scorers", *names]
    assert main([*command, *options]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    of_id = {example["id"]: example["scores"] for example in results["examples"]}
    rows = raw(path)[:6]
    assert set(of_id) == {str(row["id"]) for row in rows}
    for name in names:
        scores = [of_id[str(row["id"])][name] for row in rows]
        hard = sum(row[i] > row[3 + j] for row in scores for i, j in ((0, 1), (0, 2), (1, 2)))
        assert results["metrics"][name]["hard"]["value"] == pytest.approx(hard / 18, abs=1e-11)
        assert results["ties"][name] == sum(a == b for row in scores for a in row[:3] for b in row[3:])
