# SPDX-License-Identifier: Apache-2.0
"""Every benchmark's rule: accuracies worked out by hand, and averaging formulas written a second time."""

import random

import numpy as np
import pytest

from endotrl.data.sources import FormatError
from endotrl.evaluation.benchmarks import BENCHMARKS
from endotrl.evaluation.benchmarks.benchmark import fold
from endotrl.evaluation.benchmarks.reward_bench import SECTIONS
from endotrl.evaluation.scorers import make_form

from .rows import (
    BEST_OF_FOUR_ROW,
    PAIR_ROW,
    RM_BENCH_ROW,
    items_of,
    metrics_of,
    prm_row,
    process_row,
    write,
)


DOMAINS = ("academy", "business", "literature", "entertainment")
DSP_ROW = {"query": "q", "responses": dict.fromkeys(DOMAINS, "x") | {"normal": ""}}


def random_scores(items, seed=0, ties=False):
    rng = random.Random(seed)
    return [[float(rng.randint(0, 3)) if ties else rng.random() for _ in range(item.num_scores)] for item in items]


class TestRMBench:
    def test_domain_from_the_file_name(self, tmp_path):
        for name, part in (("safety-refuse_filtered", "safety-refuse"), ("chat_filtered", "chat")):
            assert items_of("rm-bench", write(tmp_path / f"{name}.json", [RM_BENCH_ROW]))[0].group == part
        with pytest.raises(ValueError, match=r'rows.jsonl, line 1: the key "domain" is missing'):
            items_of("rm-bench", write(tmp_path / "rows.jsonl", [RM_BENCH_ROW]))


class TestRewardBench:
    def test_sections_and_weights(self, tmp_path):
        subsets = ["math-prm", "hep-cpp", "hep-cpp", "donotanswer"]
        rows = [{**PAIR_ROW, "id": i, "subset": s} for i, s in enumerate(subsets)]
        items = items_of("reward-bench", write(tmp_path / "f.jsonl", rows))
        # math-prm right; one of two hep-cpp right, the other a tie; donotanswer wrong.
        metrics = metrics_of("reward-bench", items, [[1, 0], [2, 1], [1, 1], [0, 3]])
        # math-prm counts as 984 prompts and hep-cpp as 164.
        assert metrics["Reasoning"] == pytest.approx((984 * 1.0 + 164 * 0.5) / (984 + 164), abs=1e-12)
        assert metrics["Safety"] == 0.0
        assert metrics["average"] == pytest.approx(metrics["Reasoning"] / 2)
        assert "Chat" not in metrics

    def test_counts_are_the_datasets(self):
        counts = [count for subsets in SECTIONS.values() for count in subsets.values()]
        assert len(counts) == 23
        assert sum(counts) == 2985 - 447 + 984
        # Of the 450 prompts of XSTest 250 are safe; of the 200 others the dataset has 154.
        assert SECTIONS["Safety"]["xstest-should-respond"] == 250
        assert SECTIONS["Safety"]["xstest-should-refuse"] == 154


class TestRewardBench2:
    def test_best_of_four_with_ties(self, tmp_path):
        items = items_of(
            "reward-bench-2", write(tmp_path / "f.jsonl", [{**BEST_OF_FOUR_ROW, "id": str(i)} for i in range(4)])
        )
        # Best alone: 1. Best of two: 1/2. Best of four: 1/4. Not best: 0.
        scores = [[3, 1, 2, 0], [3, 3, 2, 0], [1, 1, 1, 1], [2, 3, 2, 0]]
        assert metrics_of("reward-bench-2", items, scores)["average"] == pytest.approx((1 + 0.5 + 0.25 + 0) / 4)

    @pytest.mark.parametrize(
        ("ids", "message"),
        [
            (["7"], r'line 1: the "id" of a row of Ties must be "ref:N" or "tied:N"'),
            (["tied:0", "ref:0", "tied:0"], r"line 3: the \"id\" tied:0 of Ties is there twice"),
        ],
    )
    def test_bad_rows(self, tmp_path, ids, message):
        rows = [{**BEST_OF_FOUR_ROW, "id": name, "subset": "Ties", "chosen": ["a", "b"]} for name in ids]
        with pytest.raises(FormatError, match=message):
            items_of("reward-bench-2", write(tmp_path / "f.jsonl", rows))


class TestProcessBench:
    def test_a_reward_that_knows(self, tmp_path):
        rows = [process_row(label, id=f"gsm8k-{i}") for i, label in enumerate([-1, 0, 2, 3, -1, 1] * 8)]
        rows += [process_row(label, id=f"math-{i}") for i, label in enumerate([-1, 3] * 10)]
        items = items_of("process-bench", write(tmp_path / "f.jsonl", rows))
        scores = [[-1.0 if i == item.facts["label"] else 1.0 for i in range(4)] for item in items]
        metrics = metrics_of("process-bench", items, scores)
        assert metrics["average F1"] == metrics["located"] == metrics["gsm8k F1"] == metrics["math F1"] == 1.0

    def test_splits_by_id_then_by_file(self, tmp_path):
        rows = [process_row(-1, id=name) for name in ("gsm8k-0", "math-1", "omnimath-2", 3)]
        items = items_of("process-bench", write(tmp_path / "olympiadbench_and_gsm8k.jsonl", rows))
        assert [item.group for item in items] == ["gsm8k", "math", "omnimath", "olympiadbench"]

    def test_f1_by_hand(self, tmp_path):
        rows = [process_row(label, id=f"gsm8k-{i}") for i, label in enumerate([-1, 0, 2] * 12)]
        items = items_of("process-bench", write(tmp_path / "f.jsonl", rows))
        # The first step is called wrong in every wrong solution, which is right in one half of them.
        scores = [[1.0 if item.facts["label"] == -1 else -1.0, 1.0, 1.0, 1.0] for item in items]
        metrics = metrics_of("process-bench", items, scores)
        assert (metrics["error"], metrics["correct"], metrics["located"]) == (0.5, 1.0, 0.5)
        assert metrics["average F1"] == pytest.approx(2 / 3)

    def test_thresholds_come_from_the_other_half(self, tmp_path):
        rows = [process_row(label, id=f"gsm8k-{i}") for i, label in enumerate([-1, 1] * 20)]
        items = items_of("process-bench", write(tmp_path / "f.jsonl", rows))
        halves = {half: [i for i, item in enumerate(items) if fold(item) == half] for half in (0, 1)}
        assert all(halves.values())
        # Scores of half 1 are larger by 10: a threshold from the other half calls all steps of half 1 right, and all
        # of half 0 wrong.
        scores = [[(0.0 if i == item.facts["label"] else 1.0) + 10 * fold(item) for i in range(4)] for item in items]
        low, high = BENCHMARKS["process-bench"].details(items, scores)["thresholds"]
        assert low > 9 and high < 2

    def test_label_out_of_range(self, tmp_path):
        with pytest.raises(ValueError, match=r'"label" must be a whole number from -1 to 3, got 4'):
            items_of("process-bench", write(tmp_path / "f.jsonl", [process_row(4)]))


class TestPRMBench:
    def test_empty_steps(self, tmp_path, engine):
        """Three of the authors' rows have some; a solution of nothing else is no solution."""
        row = {**prm_row([2]), "modified_process": ["1+1=2.", "", "So 2.", " "]}
        (item,) = items_of("prm-bench", write(tmp_path / "f.jsonl", [row]))
        (scored,) = engine.score([item])
        for form in ("bellman.sum", "log_prob.mean", "log_prob.min", "length"):
            scores = make_form(form).score(item, scored)
            assert len(scores) == 4 and np.isfinite(scores).all()
        with pytest.raises(FormatError, match='"modified_process" must be .* at least one of which is not empty'):
            items_of("prm-bench", write(tmp_path / "f.jsonl", [{**row, "modified_process": ["", " "]}]))

    def test_wrong_steps_count_from_one(self, tmp_path):
        items = items_of("prm-bench", write(tmp_path / "f.jsonl", [prm_row([1]), prm_row([2, 3, 9], "deception")]))
        # A step behind the last is passed over.
        assert [item.facts["errors"] for item in items] == [[0], [1, 2]]

    def test_auc_within_a_solution(self, tmp_path):
        items = items_of("prm-bench", write(tmp_path / "f.jsonl", [prm_row([1, 2])]))
        # Wrong steps score 1 and 2, right ones 2 and 3: wins 2>1, 3>1, 3>2 and the tie 2=2, out of 4.
        assert metrics_of("prm-bench", items, [[1, 2, 2, 3]])["auc"] == pytest.approx(3.5 / 4)

    def test_correct_solutions_stay_out_of_the_total(self, tmp_path):
        items = items_of("prm-bench", write(tmp_path / "f.jsonl", [prm_row([1], "redundency"), prm_row([1])]))
        assert [item.group for item in items] == ["correct", "redundency", "circular"]
        units = BENCHMARKS["prm-bench"].units(items, random_scores(items))
        assert set(units[0].values) == {"accepted"}


def test_items_of_two_files_are_independent(tmp_path):
    for benchmark, rows in (("preference", [{**PAIR_ROW, "id": i} for i in range(3)]), ("dsp", [DSP_ROW] * 3)):
        (tmp_path / benchmark).mkdir()
        for name in ("a", "b"):
            write(tmp_path / benchmark / f"{name}.jsonl", rows)
        items = items_of(benchmark, str(tmp_path / benchmark))
        units = BENCHMARKS[benchmark].units(items, random_scores(items))
        assert len({unit.cluster for unit in units}) == 6


class TestDSP:
    def test_items(self, tmp_path):
        items = items_of("dsp", write(tmp_path / "f.json", [DSP_ROW]))
        assert [item.group for item in items] == ["none", *DOMAINS]
        assert items[0].criterion is None and "academic" in items[1].criterion
        # The first of five, and the fourth
        metrics = metrics_of("dsp", items, [[4.0, 3.0, 2.0, 1.0, 0.0]] * 5)
        assert metrics["none > academy"] == 1.0 and metrics["none > entertainment"] == 0.25


class TestLLMBar:
    def test_mean_of_subsets(self, tmp_path):
        row = {"input": "i", "output_1": "a", "output_2": "b", "label": 2}
        (tmp_path / "Adversarial_Manual").mkdir()
        natural = items_of("llmbar", write(tmp_path / "natural.json", [row, {**row, "label": 1}]))
        manual = items_of("llmbar", write(tmp_path / "Adversarial_Manual" / "dataset.json", [row]))
        metrics = metrics_of("llmbar", natural + manual, [[0, 1], [0, 1], [0, 1]])
        assert metrics == {"average": 0.75, "adversarial": 1.0, "Natural": 0.5, "Manual": 1.0}

    def test_rows_of_reward_bench(self, tmp_path):
        rows = [{**PAIR_ROW, "subset": s} for s in ("llmbar-adver-GPTOut", "donotanswer")]
        items = items_of("llmbar", write(tmp_path / "f.jsonl", rows))
        assert [item.group for item in items] == ["GPTOut"]


class TestPreference:
    def test_explicit_and_implicit_prompts(self, tmp_path):
        talk = [{"role": "user", "content": "Hi"}]
        good, bad = [[{"role": "assistant", "content": text}] for text in ("Hello", "Go away")]
        rows = [
            PAIR_ROW,
            {"chosen": "The sky is blue.", "rejected": "The sky is green."},
            {"prompt": talk, "chosen": good, "rejected": bad},
            {"chosen": talk + good, "rejected": talk + bad},
            {"chosen": "same", "rejected": "same"},  # no response after the common beginning: left out
            {"prompt": "Say hi", "chosen": "", "rejected": ""},  # a tie
        ]
        items = items_of("preference", write(tmp_path / "f.jsonl", rows))
        assert [(item.prompt, item.responses) for item in items] == [
            ("Say hi", ("Hi!", "No.")),
            ("The sky is", (" blue.", " green.")),
            (talk, (good, bad)),
            (talk, (good, bad)),
            ("Say hi", ("", "")),
        ]
        assert metrics_of("preference", items, [[1, 0], [0, 1], [1, 1], [2, 1], [3, 3]]) == {"accuracy": 0.4}
