# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import torch

from studies.sentence_reward import Head
from studies.sentence_states import lines, load_pairs
from studies.sentence_statistics import auc, by_sentences


def test_auc_by_hand() -> None:
    # Of four pairs of a right and a wrong sentence, two are in order and one is a tie.
    right = torch.tensor([True, False, True, False])
    assert auc(torch.tensor([3.0, 1.0, 0.5, 0.5]), right) == (1 + 1 + 0 + 0.5) / 4


def test_heads_read_where_they_should() -> None:
    # One feature: before the response, at the ends of two sentences, at EOS; and a row of one sentence.
    states = torch.tensor([[[1.0], [2.0], [4.0], [8.0]], [[1.0], [3.0], [9.0], [0.0]]])
    lengths = torch.tensor([2, 1])
    expected = {"own-sum": ([6.0, 3.0], [2.0, 4.0]), "response": ([8.0, 9.0], [1.0, 6.0])}
    for arm, (scores, worth) in expected.items():
        head = Head(arm, 1)
        torch.nn.init.ones_(head.value.weight)
        given, terms = head(states, lengths)
        assert (given.tolist(), terms[0, :2].tolist()) == (scores, worth)


def test_facts_of_the_test_are_new(tmp_path: Path) -> None:
    pairs = load_pairs("facts", tmp_path)
    subjects = {part: set() for part in ("train", "dev", "test")}
    for pair in pairs:
        assert pair.right is not None and sum(pair.right[0]) > sum(pair.right[1])
        # Right answers only, since a wrong one may be the right one to a question of another part.
        sentences = [[text[a:b] for a, b in lines(text.replace(". ", ".\n"))] for text in pair.answers]
        for texts, flags in zip(sentences, pair.right, strict=True):
            subjects[pair.part] |= {text.strip() for text, flag in zip(texts, flags, strict=False) if flag}
    assert not subjects["test"] & (subjects["train"] | subjects["dev"]) and not subjects["train"] & subjects["dev"]


def test_solutions_of_other_problems_make_pairs(tmp_path: Path) -> None:
    rows = [
        {"problem": f"p{i}", "steps": ["a", f"b{i}", "c"], "label": label} for i, label in enumerate((-1, 1, -1, 0, 2))
    ]
    (tmp_path / "processbench").mkdir()
    (tmp_path / "processbench" / "gsm8k.json").write_text(json.dumps(rows))
    labels = {row["problem"]: row["label"] for row in rows}
    pairs = load_pairs("processbench", tmp_path)
    assert len(pairs) == 2  # of three wrong solutions, one finds no right one
    flags = {-1: [True] * 3, 0: [False, None, None], 1: [True, False, None], 2: [True, True, False]}
    for pair in pairs:
        assert pair.right is not None
        asked = [prompt[0]["content"] for prompt in pair.prompts]
        assert [f"a\nb{name[1:]}\nc" for name in asked] == list(pair.answers)
        assert labels[asked[0]] == -1 != labels[asked[1]]
        assert list(pair.right) == [flags[labels[name]] for name in asked]


def test_differences_by_number_of_sentences() -> None:
    counts = [[1, 2]] * 30 + [[5, 3]] * 30 + [[3, 4]] * 2  # too few of the last
    seeds = [[1.0] * 30 + [-1.0] * 30 + [1.0] * 2] * 2
    others = [[1.0] * 62, [1.0] * 30 + [-1.0] * 32]  # one seed is right where the other is not
    table = by_sentences({"base": seeds, "other": others}, counts, "base")
    assert table == [
        ["1 to 2", "30", "100.0", "+0.0 (+0.0 to +0.0)"],
        ["5 or more", "30", "0.0", "+50.0 (+50.0 to +50.0)"],
    ]
