# SPDX-License-Identifier: Apache-2.0
"""Scores are the same in one run or in pieces, with or without the model."""

import json
from pickle import UnpicklingError

import numpy as np
import pytest
import torch

from endotrl.evaluation.engine import Engine
from endotrl.evaluation.items import Item
from endotrl.evaluation.model_scorers import Judge
from endotrl.evaluation.results import scores_of
from endotrl.evaluation.run_folder import RunFolder
from endotrl.evaluation.scorers import make_scorer, score_items
from endotrl.rewards.residuals import markdown_density

from ..support.helpers import count_forwards


NAMES = ["bellman.sum", "self_certainty", "centered.discounted=0.95", "length"]
SETTINGS = {"benchmark": "preference", "model": "tiny"}


def run(folder, items, names, placement, engines=None):
    folder = RunFolder(folder.folder)  # whose lock ends with it
    folder.open(SETTINGS)

    def make_engine():
        if engines is not None:
            engines.append(1)
        return Engine(placement)

    records = score_items(items, names, folder, make_engine, make_scorer, block_size=2)
    return {name: scores_of(name, items, records)[0] for name in names}


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run")


class TestOnePass:
    def test_all_single_pass_forms_share_it(self, folder, placement, pair_items):
        with placement.active() as model:
            # The first call checks the engine.
            run(RunFolder(folder.folder / "warm"), pair_items[:1], ["length"], placement)
            with count_forwards(model) as one:
                run(RunFolder(folder.folder / "a"), pair_items, ["bellman.sum"], placement)
            names = [*NAMES, "negative_entropy"]
            with count_forwards(model) as many:
                run(RunFolder(folder.folder / "b"), pair_items, names, placement)
        assert len(many) == len(one) > 0

    def test_independent_of_blocks_and_neighbours(self, placement, pair_items):
        together = Engine(placement).score(pair_items)
        for item, row in zip(pair_items, together, strict=True):
            for a, b in zip(row, Engine(placement).score([item])[0], strict=True):
                assert a.stats.log_probs.tolist() == pytest.approx(b.stats.log_probs.tolist(), abs=1e-4)


class TestResume:
    def test_nothing_is_done_twice(self, folder, placement, pair_items):
        whole = run(RunFolder(folder.folder / "whole"), pair_items, NAMES, placement)
        run(folder, pair_items[:4], NAMES, placement)
        engines = []
        resumed = run(RunFolder(folder.folder), pair_items, NAMES, placement, engines)
        for name in NAMES:
            assert np.array(resumed[name]) == pytest.approx(np.array(whole[name]), abs=1e-4)
        assert run(RunFolder(folder.folder), pair_items, NAMES, placement, engines) == resumed
        assert len(engines) == 1
        assert len(folder.scores_path.read_bytes().splitlines()) == 6

    def test_damaged_lines_are_scored_again(self, folder, placement, pair_items, warnings_logged):
        before = run(folder, pair_items, NAMES, placement)
        first, _, *rest = folder.scores_path.read_bytes().splitlines(keepends=True)
        for damaged in ([first, b"{}\n", *rest], [first, *rest, rest[0][:-15]]):  # a bad line, and half a line
            folder.scores_path.write_bytes(b"".join(damaged))
            assert run(RunFolder(folder.folder), pair_items, NAMES, placement) == before
        assert any("scores.jsonl" in message and "Skipping 1 damaged line" in message for message in warnings_logged())
        assert len(list(map(json.loads, folder.scores_path.read_bytes().splitlines()))) == 6

    def test_changed_items_are_scored_anew(self, folder, placement, pair_items):
        run(folder, pair_items, NAMES, placement)
        other = [Item("q0", "g", "Question 0?", ("Paris!", "Rome"), ((0, 1),)), *pair_items[1:]]
        first, second = (run(folder, items, ["bellman.sum"], placement) for items in (other, pair_items))
        assert first["bellman.sum"][0] != second["bellman.sum"][0]

    def test_other_settings_are_refused(self, folder, placement, pair_items):
        run(folder, pair_items[:1], NAMES, placement)
        with pytest.raises(ValueError, match="`model` was 'tiny' and is 'other'"):
            RunFolder(folder.folder).open({**SETTINGS, "model": "other"})
        RunFolder(folder.folder).open({**SETTINGS, "model": "other"}, overwrite=True)
        assert not folder.scores_path.exists() and not folder.stats_path.exists()


class TestTokenStats:
    def test_only_the_second_pass_needs_the_model_again(self, folder, placement, pair_items):
        run(folder, pair_items, ["bellman.sum"], placement)
        names, engines = [*NAMES, "log_prob.power=0.5"], []
        new = run(RunFolder(folder.folder), pair_items, names, placement, engines)
        assert not engines and new == run(RunFolder(folder.folder / "x"), pair_items, names, placement)
        run(RunFolder(folder.folder), pair_items, ["gain.sum"], placement, engines)
        assert len(engines) == 1

    def test_round_trip(self, folder, placement, pair_items):
        run(folder, pair_items, ["gain.sum"], placement)
        expected = Engine(placement).score(pair_items[:2], alone=True)
        for item, row in zip(pair_items[:2], expected, strict=True):
            for loaded, response in zip(RunFolder(folder.folder).load_stats(item.key), row, strict=True):
                for field in ("token_ids", "positions", "chosen_logits", "soft_values", "entropies", "mean_logits"):
                    assert getattr(loaded.stats, field).equal(getattr(response.stats, field)), field
                assert loaded.log_probs_alone.equal(response.log_probs_alone)
                assert loaded.stats.finished == response.stats.finished and loaded.cut == response.cut

    def test_no_pickle_is_read(self, folder, placement, pair_items):
        run(folder, pair_items[:1], NAMES, placement)
        (path,) = folder.stats_path.glob("*.pt")
        torch.save({pair_items[0].key: [Item]}, path)
        with pytest.raises(UnpicklingError):
            folder.load_stats(pair_items[0].key)


def test_equal_responses_tie(folder, placement, monkeypatch):
    # As if the two had been in batches of different shape.
    monkeypatch.setattr(Judge, "_score_items", lambda self, items, progress: [0.5, 0.1, 0.5 + 1e-7])
    item = Item("x", "g", "p", ("a", "b", "a"), better=((0, 2),))
    assert run(folder, [item], ["judge_verifier"], placement)["judge_verifier"] == [[0.5, 0.1, 0.5]]


class TestResiduals:
    def test_style_takes_markdown_too(self, folder, placement):
        answers = [
            ("Paris is it.", "**Paris** is it, I think."),
            ("- 4", "It is 5, as all know."),
            ("Yes" * 9, "# No"),
        ]
        items = [Item(f"q{i}", "g", f"Question {i}?", answers[i % 3], better=((0, 1),)) for i in range(6)]
        names = [f"{residual}log_prob.mean" for residual in ("", "residual:", "style_residual:")]
        scores = run(folder, items, names, placement)
        plain, length, style = (np.array(rows) for rows in scores.values())
        marks = np.array([[markdown_density(text) for text in item.responses] for item in items])

        def slope(rows):  # within items
            return ((rows - rows.mean(1, keepdims=True)) * (marks - marks.mean(1, keepdims=True))).sum()

        assert slope(style) == pytest.approx(0.0, abs=1e-9)
        assert abs(slope(length)) > 1e-3 and abs(slope(plain)) > 1e-3
