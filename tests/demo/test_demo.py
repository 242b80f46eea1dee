# SPDX-License-Identifier: Apache-2.0
"""The demo's data and statistics, and the demo itself, in small."""

import json
import random
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from endotrl.demo import demo, parts, run_demo
from endotrl.demo.findings import half_width, paired_half_width
from endotrl.grading import is_right
from endotrl.tasks import arithmetic, facts


class TestArithmetic:
    def test_answers_have_their_last_digit_first(self) -> None:
        assert arithmetic.question_text((437, 286)) == "437+286="
        assert arithmetic.answer_text((437, 286)) == "327"  # 723

    def test_wrong_answers_differ_in_one_digit(self) -> None:
        generator = random.Random(0)
        for question in arithmetic.make_questions(200, seed=0):
            right, wrong = arithmetic.answer_text(question), arithmetic.wrong_answer(question, generator)
            assert len(wrong) == len(right)
            assert sum(a != b for a, b in zip(right, wrong, strict=True)) == 1

    def test_one_token_a_character(self) -> None:
        tokenizer = arithmetic.make_tokenizer()
        ids = tokenizer("437+286=")["input_ids"]
        assert len(ids) == arithmetic.QUESTION_LENGTH and ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == "437+286="

    def test_accuracy_wants_the_whole_answer_and_nothing_else(self) -> None:
        given = ["327", "3270", "32", ""]
        assert arithmetic.accuracy(completions=given, answer=["327"] * 4) == [1.0, 0.0, 0.0, 0.0]


class TestFacts:
    def test_no_held_out_subject_is_trained_on(self) -> None:
        train, held_out = facts.load_questions()
        assert len(held_out) == 154 and len(train) > 1000
        subjects = {relation["name"]: relation for relation in _relations()}
        for question in held_out:
            (subject,) = {
                fact[0]
                for fact in subjects[question.relation]["facts"]
                for template in subjects[question.relation]["templates"]
                if template.format(subject=fact[0]) == question.text
            }
            texts = {t.format(subject=subject) for t in subjects[question.relation]["templates"]}
            assert not texts & {q.text for q in train if q.relation == question.relation}

    def test_no_question_contains_its_answer(self) -> None:
        train, held_out = facts.load_questions()
        for question in [*train, *held_out]:
            assert not is_right(question.text, question.answers), question

    def test_subjects_are_unique_in_a_relation(self) -> None:
        for relation in _relations():
            subjects = [fact[0] for fact in relation["facts"]]
            assert len(subjects) == len(set(subjects))

    @pytest.mark.parametrize(
        ("completion", "right"),
        [
            ("The capital is Paris.", True),
            ("paris", True),
            ("It's Paris, of course", True),
            ("Parisian food", False),  # part of a word
            ("Rome", False),
            ("", False),
        ],
    )
    def test_is_right(self, completion: str, right: bool) -> None:
        assert is_right(completion, ["Lutetia", "Paris"]) is right


class TestStatistics:
    def test_interval_of_an_accuracy(self) -> None:
        # sqrt(0.5 * 0.5 / 100) = 0.05, times 1.96
        assert half_width(0.5, 100) == pytest.approx(0.098)

    def test_interval_of_a_difference_on_the_same_questions(self) -> None:
        # Two of four answers changed, one each way: differences 1, -1, 0, 0, mean 0, variance 1/2, standard error
        # sqrt(1/2 / 4) = 0.35355.
        before, after = [False, True, True, False], [True, False, True, False]
        assert paired_half_width(before, after) == pytest.approx(1.96 * 0.35355, rel=1e-4)
        assert paired_half_width(before, before) == 0.0


@pytest.fixture
def small_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "quiet", lambda: None)  # it mutes the libraries for the rest of the process
    monkeypatch.setattr(parts, "PRETRAINING_STEPS", 3)
    tiny = {"max_steps": 2, "per_device_train_batch_size": 8, "num_generations": 4}
    monkeypatch.setattr(parts, "ARITHMETIC", {**parts.ARITHMETIC, **tiny})
    monkeypatch.setattr(parts, "FACTS", {**parts.FACTS, **tiny, "max_completion_length": 4})
    monkeypatch.setattr(parts, "FACTS_ANSWER_LENGTH", 4)
    train, held_out = facts.load_questions()
    monkeypatch.setattr(facts, "load_questions", lambda seed: (train[:16], held_out[:6]))


def check_folder(folder: Path, part: str, controls: list[str]) -> None:
    metrics = json.loads((folder / "metrics.json").read_text())
    assert set(metrics) == {part, "seconds", "environment"}
    names = ["accuracy_before", "accuracy_after", "greedy_before", *[f"{name}_reward_after" for name in controls]]
    assert sorted(metrics[part]) == sorted(names)
    assert all(0.0 <= value <= 1.0 for value in metrics[part].values())
    page = (folder / "report.html").read_text()
    assert "data:image/png;base64," in page and "http" not in page.split("</style>")[1].split("data:image")[0]
    assert (folder / f"{part}.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "wandb").glob("offline-run-*"))


@pytest.mark.slow
class TestRunDemo:
    def test_arithmetic(
        self, small_demo: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("COLUMNS", "80")
        run_demo("arithmetic", tmp_path)
        check_folder(tmp_path, "arithmetic", ["random", "length"])
        for name in ("base_model", "trained_model"):
            folder = tmp_path / "arithmetic" / name
            AutoModelForCausalLM.from_pretrained(folder)
            assert AutoTokenizer.from_pretrained(folder)("1+1=")["input_ids"]
        out = capsys.readouterr().out
        assert "On the same footing: the random reward" in " ".join(out.split())
        wide = [
            line
            for line in out.splitlines()
            if len(line) > 80 and "report.html" not in line and "[WARNING]" not in line
        ]
        assert not wide, wide

    def test_facts(self, small_demo: None, smollm2_path: str, tmp_path: Path) -> None:
        run_demo("facts", tmp_path)
        check_folder(tmp_path, "facts", ["random"])
        assert (tmp_path / "facts" / "adapter" / "adapter_model.safetensors").exists()

    def test_a_missing_package_is_missed_before_anything_runs(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(demo, "find_spec", lambda name: None)
        with pytest.raises(ImportError, match="matplotlib, peft, gguf, which are not installed"):
            run_demo("all", tmp_path / "output")
        assert not (tmp_path / "output").exists()

    def test_an_unknown_task(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="'poetry'.*'arithmetic', 'facts' or 'all'"):
            run_demo("poetry", tmp_path)


def _relations() -> list[dict]:
    return json.loads(Path(facts.__file__).with_name("facts.json").read_text())["relations"]
