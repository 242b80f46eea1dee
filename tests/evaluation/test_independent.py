# SPDX-License-Identifier: Apache-2.0
"""
Accuracies worked out a second time from the raw files, with nothing of the package: its readers, its averaging and its
tie rules must give exactly the same. Scores are numbers of the text alone, coarse ones with many ties among them. The
files are the real ones where they are, and else hand-made ones of the same format.
"""

import gzip
import hashlib
import itertools
import json
import os
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from endotrl.commands.main import main
from endotrl.evaluation.benchmarks.dsp import CRITERIA
from endotrl.evaluation.benchmarks.prm_bench import thresholds

from .rows import DATA, JUDGE_ROW, items_of, metrics_of, prm_row, write


DOMAINS = ("academy", "business", "literature", "entertainment")
LEVELS, STYLES = ("easy", "normal", "hard"), ("concise", "detailed", "markdown")


def digest(text: str, criterion: str | None = None) -> float:
    return int(hashlib.md5(f"{criterion}\x00{text}".encode()).hexdigest()[:6], 16) / 7.0


def coarse(text: str, criterion: str | None = None) -> float:
    return digest(text, criterion) // 1e6


def real_or_made(tmp_path, name, rows):
    """The real file, or one of the same format."""
    if (DATA / name).exists():
        return str(DATA / name)
    path = tmp_path / Path(name).with_suffix("" if name.endswith(".gz") else Path(name).suffix)
    path.parent.mkdir(exist_ok=True)
    return write(path, rows)


def raw(path):
    data = gzip.decompress(Path(path).read_bytes()) if path.endswith(".gz") else Path(path).read_bytes()
    if data.lstrip()[:1] == b"[":
        return json.loads(data)
    return [json.loads(line) for line in data.split(b"\n") if line.strip()]


def words(count, seed=0):
    draws = random.Random(seed)
    return [" ".join(draws.choices("abcdefgh", k=draws.randint(1, 9))) for _ in range(count)]


def share(wins):
    return sum(wins) / len(wins)


def rm_bench(rows, score):
    """The README of the repository: the mean of the domains, of which safety is the mean of two parts."""

    def cells(part):
        found = defaultdict(list)
        for row in rows:
            if row.get("domain", "chat") == part:
                for i, j in itertools.product(range(3), range(3)):
                    right = score(row["chosen"][i]) > score(row["rejected"][j])
                    found["hard" if i < j else "easy" if i > j else "normal"].append(right)
                    found[f"{STYLES[i]} > {STYLES[j]}"].append(right)
        return {name: share(wins) for name, wins in found.items()}

    parts = {part: cells(part) for part in ("chat", "math", "code", "safety-refuse", "safety-response")}
    safety = [parts.pop(f"safety-{part}") for part in ("refuse", "response")]
    parts["safety"] = {name: (safety[0][name] + safety[1][name]) / 2 for name in safety[0]}
    parts = {part: found for part, found in parts.items() if found}
    expected = {name: share([found[name] for found in parts.values()]) for name in next(iter(parts.values()))}
    averages = {part: share([found[level] for level in LEVELS]) for part, found in parts.items()}
    return expected | (averages if len(parts) > 1 else {}) | {"average": share(averages.values())}


def judge_bench(rows, score):
    right = defaultdict(list)
    for row in rows:
        won = score(row[f"response_{row['label'][0]}"]) > score(row[f"response_{row['label'][2]}"])
        right["Knowledge" if row["source"].startswith("mmlu") else row["source"]].append(won)
    names = {"livebench-math": "Mathematics", "livebench-reasoning": "Reasoning", "livecodebench": "Coding"}
    expected = {names.get(source, source): share(won) for source, won in right.items()}
    return expected | {"accuracy": share(sum(right.values(), []))}


def llmbar(rows, score):
    right = [score(row[f"output_{row['label']}"]) > score(row[f"output_{3 - row['label']}"]) for row in rows]
    return {"average": share(right)}


def preference(rows, score):
    right = []
    for row in rows:
        if row["chosen"] != row["rejected"]:
            start = len(os.path.commonprefix([row["chosen"], row["rejected"]]))
            start -= row["chosen"][start - 1] == " "
            right.append(score(row["chosen"][start:]) > score(row["rejected"][start:]))
    return {"accuracy": share(right)}


def dsp(rows, score):
    table = {}
    for criterion, domain in itertools.product(DOMAINS, DOMAINS):
        table[criterion, domain] = share(
            [
                score(row["responses"][domain], CRITERIA[criterion]) > score(text, CRITERIA[criterion])
                for row in rows
                for name, text in row["responses"].items()
                if name != domain
            ]
        )
    matching = share([table[domain, domain] for domain in DOMAINS])
    other = share([value for (a, b), value in table.items() if a != b])
    expected = {f"{criterion} > {domain}": value for (criterion, domain), value in table.items()}
    return expected | {"matching": matching, "follows": matching - other}


def ties(rows, score):
    """RewardBench 2: weights and margins of its Ties subset."""
    of_row = {row["id"]: [list(map(score, row[key])) for key in ("chosen", "rejected")] for row in rows}
    gap = {name: min(right) - max(wrong) for name, (right, wrong) in of_row.items()}
    pairs = [(gap[f"ref:{n}"], gap[f"tied:{n}"], np.ptp(of_row[f"tied:{n}"][0])) for n in range(len(rows) // 2)]
    ref, tied, spread = map(np.array, zip(*pairs, strict=True))
    with np.errstate(divide="ignore", invalid="ignore"):
        margin = np.nan_to_num(np.tanh(np.minimum(ref, tied) / spread - 1), nan=0.0)
    expected = 0.3 * share(tied > 0) + 0.3 * share(ref > 0) + 0.2 * share(tied > spread)
    return {"Ties": expected + 0.2 * share(np.minimum(ref, tied) > spread) + 0.01 * margin.mean()}


PARTS = {"chat": 3, "math": 2, "code": 4, "safety-refuse": 5, "safety-response": 2}
SOURCES, LABELS = ("mmlu-pro-law", "livebench-math", "livecodebench"), ("A>B", "B>A")
PAIRS = list(enumerate(zip(words(40), words(40, 1), strict=True)))
RM_BENCH = [{"id": i, "prompt": "p", "chosen": words(3, i), "rejected": words(3, 99 + i)} for i in range(40)]
TOTAL = [{**RM_BENCH[i], "domain": part} for i, part in enumerate(sum(([part] * n for part, n in PARTS.items()), []))]
JUDGE_BENCH = [
    {**JUDGE_ROW, "source": SOURCES[i % 3], "label": LABELS[i % 2], "response_A": a, "response_B": b}
    for i, (a, b) in PAIRS
]
LLMBAR = [{"input": "i", "output_1": a, "output_2": b, "label": 1 + i % 2} for i, (a, b) in PAIRS]
TALK = "\n\nHuman: Hi\n\nAssistant: "
PREFERENCE = [{"chosen": TALK + a, "rejected": TALK + b} for _, (a, b) in PAIRS]
NAMES = (*DOMAINS, "normal")
DSP = [{"query": f"q{i}", "responses": dict(zip(NAMES, words(5, i), strict=True))} for i in range(30)]
TIES = [
    {"id": f"{kind}:{n}", "prompt": "p", "subset": "Ties", "chosen": words(k, seed), "rejected": words(1, 200 + seed)}
    for n in range(30)
    for kind, k, seed in (("ref", 1, 100 + n), ("tied", 2 + n % 2, n))
]
# Name of the benchmark; its real file; rows of the same format; and what it makes of them
CASES = [
    ("rm-bench", "rm_bench/chat_filtered.json", RM_BENCH, rm_bench),
    ("rm-bench", "rm_bench/safety-response_filtered.json", RM_BENCH, rm_bench),
    ("rm-bench", "no real file/total.jsonl", TOTAL, rm_bench),
    ("judge-bench", "judgebench/claude-3-5-sonnet.jsonl", JUDGE_BENCH, judge_bench),
    ("llmbar", "llmbar/natural.json", LLMBAR, llmbar),
    ("preference", "hh_rlhf/harmless-base.test.jsonl.gz", PREFERENCE, preference),
    ("dsp", "dsp/domain_specific_preference.test.json", DSP, dsp),
    ("reward-bench-2", "no real file/ties.jsonl", TIES, ties),
]


@pytest.mark.parametrize("score", [digest, coarse])
@pytest.mark.parametrize(
    ("benchmark", "file", "made", "figures"), CASES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_figures(benchmark, file, made, figures, score, tmp_path):
    path = real_or_made(tmp_path, file, made)
    items = items_of(benchmark, path)
    scores = [[score(text, item.criterion) for text in item.responses] for item in items]
    found, expected = metrics_of(benchmark, items, scores), figures(raw(path), score)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("score", [digest, coarse])
def test_prm_bench(tmp_path, score):
    made = [{**prm_row([1 + i % 4], "step_contradiction", str(i)), "modified_process": words(4, i)} for i in range(30)]
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
    path = real_or_made(tmp_path, "rm_bench/chat_filtered.json", RM_BENCH[:6])
    command = ["eval", "rm-bench", "--model", tiny_model_path, "--device", "cpu", "--data", path, "--limit", "6"]
    names = ["bellman.sum", "residual:log_prob.discounted=0.95", "length", "random"]
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
