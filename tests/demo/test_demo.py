# SPDX-License-Identifier: Apache-2.0
"""The demo's data and statistics, and the demo itself, in small."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from endotrl.demo import demo, findings, parts, run_demo
from endotrl.demo.findings import Part, Policy, half_width, plot_accuracy, summary
from endotrl.demo.grpo_runs import generate_answers, load_model, train_with_grpo
from endotrl.demo.progress import Kept, Progress
from endotrl.grading import is_right
from endotrl.tasks import arithmetic, facts, pictures


class TestArithmetic:
    def test_answers_have_their_last_digit_first_and_count_as_a_whole(self) -> None:
        assert arithmetic.question_text((437, 286)) == "437+286="
        assert arithmetic.answer_text((437, 286)) == "327"  # 723
        given = ["327", "3270", "32", ""]
        assert arithmetic.accuracy(completions=given, answer=["327"] * 4) == [1.0, 0.0, 0.0, 0.0]

    def test_wrong_answers_differ_in_one_digit(self) -> None:
        generator = random.Random(0)
        for question in arithmetic.make_questions(200, seed=0):
            right, wrong = arithmetic.answer_text(question), arithmetic.wrong_answer(question, generator)
            assert len(wrong) == len(right)
            assert sum(a != b for a, b in zip(right, wrong, strict=True)) == 1

    def test_derailed_answers_have_a_first_digit_one_too_high_and_go_anywhere(self) -> None:
        generator = random.Random(0)
        assert {arithmetic.derailed_answer((27, 82), generator)[0] for _ in range(50)} == {"0"}  # 109: 9 and 1 more
        answers = {arithmetic.derailed_answer((18, 42), generator) for _ in range(200)}
        assert {len(answer) for answer in answers} == {4} and len(answers) > 150
        assert {answer[0] for answer in answers} == {"1"}

    def test_demonstrations_without_a_wrong_one_come_first(self) -> None:
        questions: list[arithmetic.Question] = []

        def wrong(question: arithmetic.Question, generator: random.Random) -> str:
            questions.append(question)
            return arithmetic.zero_answer(question, generator)

        tokenizer = arithmetic.make_tokenizer()
        model = arithmetic.make_model(tokenizer, hidden_size=16, intermediate_size=16)
        pretraining: dict[str, Any] = {"noise": 1.0, "seed": 0, "held_out": [], "batch_size": 4, "wrong": wrong}
        arithmetic.pretrain(model, tokenizer, 3, bar=range(3), clean_steps=2, **pretraining)
        assert len(questions) == 4  # of the third step
        answers = {arithmetic.zero_answer(questions[0], random.Random(seed)) for seed in range(50)}
        assert {len(answer) for answer in answers} == {4} and {answer[0] for answer in answers} == {"0"}


class TestPictures:
    def test_the_prompt_and_what_is_read_of_it(self) -> None:
        model, processor = pictures.make_model()
        shown = pictures.draw("4713", random.Random(0))
        text = processor.apply_chat_template(pictures.prompt(shown), tokenize=False)
        assert text == "<bos><image>=" and shown.size == (24, 24)
        read = processor.apply_chat_template(pictures.prompt(shown), tokenize=True, return_dict=True)
        assert read["input_ids"][0] == [0, 14, 14, 14, 14, 13] and model.config.image_token_id == 14
        assert sum(p.numel() for p in model.parameters()) == 318_368

    def test_accuracy_wants_the_whole_number(self) -> None:
        given = [[{"role": "assistant", "content": text}] for text in ("0471", "471", "04710")]
        assert pictures.accuracy(completions=given, answer=["0471"] * 3) == [1.0, 0.0, 0.0]

    def test_the_other_image_is_of_another_question(self) -> None:
        calls = []
        reward = parts.OtherImageReward(lambda **kwargs: calls.append(kwargs))  # type: ignore[arg-type]
        reward(prompts=["a", "a", "b", "b"], completions=["1", "2", "3", "4"], completion_ids=[[1], [2], [3], [4]])
        assert calls[0]["prompts"] == ["b", "b", "a", "a"] and calls[0]["completions"] == ["1", "2", "3", "4"]


class TestFacts:
    def test_no_held_out_subject_is_trained_on(self) -> None:
        train, held_out = facts.load_questions()
        assert len(held_out) == 154 and len(train) > 1000
        subjects = {relation["name"]: relation for relation in _relations()}
        for question in held_out:
            relation = subjects[question.relation]
            phrasings = [{t.format(subject=fact[0]) for t in relation["templates"]} for fact in relation["facts"]]
            (texts,) = (texts for texts in phrasings if question.text in texts)
            assert not texts & {q.text for q in train if q.relation == question.relation}

    def test_no_question_contains_its_answer(self) -> None:
        train, held_out = facts.load_questions()
        for question in [*train, *held_out]:
            assert not is_right(question.text, question.answers), question


class TestSummary:
    def test_interval_of_a_difference_on_the_same_questions(self) -> None:
        # Two of four answers changed, one each way: differences 1, -1, 0, 0, mean 0, variance 1/2, standard error
        # sqrt(1/2 / 4) = 0.35355.
        assert half_width([1.0, -1.0, 0.0, 0.0]) == pytest.approx(1.96 * 0.35355, rel=1e-4)
        assert half_width([0.0] * 4) == 0.0

    def part(self, greedy: float, own: float, random: float) -> Part:
        def policy(sampled: float, greedy: float) -> Policy:
            right = {"sampled": [sampled, sampled + 0.02] * 50, "greedy": [greedy] * 100}
            return Policy([""] * 100, [[]] * 100, [False] * 100, right)

        policies = {"base": policy(0.4, greedy), "endogenous": policy(own, own), "random": policy(random, random)}
        return Part("arithmetic", "t", policies, ["q"] * 100, {})

    def test_training_beats_temperature_0(self) -> None:
        text = summary(self.part(greedy=0.05, own=0.9, random=0.2))
        assert text.startswith(
            "Trained on its own reward, without labels, the model improved: 41% to 91% right (+50 ± 0"
        )
        assert "random reward −20" in text and "Temperature 0 is no substitute: " in text and "5%" in text

    def test_what_was_forecast_is_the_end_of_training(self, monkeypatch: pytest.MonkeyPatch) -> None:
        part = replace(self.part(greedy=0.05, own=0.9, random=0.2), forecast=0.97)
        part.policies["endogenous"].curve.extend([0.4, 0.9])
        assert "its final accuracy was forecast to be 97%; after 2 steps, it is 91%." in summary(part)
        drawn = []
        monkeypatch.setattr(findings, "as_png", lambda fig: drawn.append(fig) or b"")
        plot_accuracy(part)
        dotted = [line for line in drawn[0].axes[0].lines if line.get_linestyle() == ":"]
        assert [line.get_ydata()[0] for line in dotted] == [0.97]
        assert "forecast:\n97%" in [text.get_text() for text in drawn[0].axes[0].texts]

    def test_temperature_0_gives_it_too(self) -> None:
        text = summary(self.part(greedy=0.97, own=0.9, random=0.4))
        assert "the base model is already 97% right" in text and "no substitute" not in text
        assert "random reward +0 ± 0 points, within noise" in text

    def test_a_loss_is_said(self) -> None:
        assert "the model got worse: 41% to 11%" in summary(self.part(greedy=0.05, own=0.1, random=0.4))


class TestAnswers:
    @pytest.mark.parametrize("chat", [True, False])
    def test_prompts_of_other_lengths_change_nothing(self, chat: bool, tiny_model_path: str) -> None:
        model, tokenizer = load_model(tiny_model_path), AutoTokenizer.from_pretrained(tiny_model_path)
        texts = ["Hi", "What is the capital of France?", "2 + 2 ="]
        prompts: Any = [[{"role": "user", "content": text}] for text in texts] if chat else texts
        together, ids = generate_answers(model, tokenizer, prompts, 8, greedy=True)
        alone = [generate_answers(model, tokenizer, [prompt], 8, greedy=True) for prompt in prompts]
        assert ids == [row for _, (row,) in alone]
        assert together == [text for (text,), _ in alone]


class TestProgress:
    def test_one_line_over_all_stages(self, capsys: pytest.CaptureFixture[str]) -> None:
        progress = Progress({"first": 60.0, "second": 240.0})
        assert "stage 1 of 2: first" in progress._bar.desc
        progress.skip()  # which says nothing about the speed
        progress.stage("second")
        progress.at(0.75)
        progress._bar.start_t -= 90  # 180 seconds of work were done in 90
        assert progress._bar.n == progress._bar.format_dict["n"] == 60 + 0.75 * 240
        assert "stage 2 of 2: second |" in str(progress._bar) and " 80%, 00:30 left" in str(progress._bar)
        progress.close()

    def test_results_are_kept_for_the_same_settings_only(self, tmp_path: Path) -> None:
        progress = Progress({"a": 1.0})
        progress.stage("a")
        calls: list[int] = []

        def make() -> dict[str, int]:
            calls.append(1)
            return {"number": len(calls)}

        for settings, expected in (({"seed": 0}, 1), ({"seed": 0}, 1), ({"seed": 1}, 2)):
            assert Kept(tmp_path, settings)("unit", progress, make) == {"number": expected}
        progress.close()


@pytest.fixture
def small_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "quiet_libraries", lambda: None)  # it mutes the libraries for the rest of the process
    monkeypatch.setattr(parts, "PRETRAINING", {**parts.PRETRAINING, "steps": 3})
    monkeypatch.setattr(parts, "HELD_OUT", 20)
    tiny = {"max_steps": 2, "per_device_train_batch_size": 8, "num_generations": 4}
    full = {**parts.FACTS, **tiny, "gradient_accumulation_steps": 1, "max_completion_length": 4}
    size = parts.Size({**parts.ARITHMETIC, **tiny}, ("random", "length"), full, num_facts=6)
    monkeypatch.setitem(parts.SIZES, "default", size)
    monkeypatch.setattr(parts, "FACTS_ANSWER_LENGTH", 4)
    monkeypatch.setattr(parts, "IMAGES", {**parts.IMAGES, **tiny})
    monkeypatch.setattr(parts, "IMAGES_PRETRAINING", {**parts.IMAGES_PRETRAINING, "steps": 3, "num_pictures": 40})
    monkeypatch.setattr(parts, "HELD_OUT_PICTURES", 6)
    train, held_out = facts.load_questions()
    monkeypatch.setattr(facts, "load_questions", lambda seed: (train[:16], held_out[:6]))


def check_folder(folder: Path, part: str, controls: list[str]) -> None:
    metrics = json.loads((folder / "metrics.json").read_text())
    assert set(metrics) == {part, "seconds", "environment"}
    ways = ["sampled", "greedy", "T=0.5", *(["majority"] if part != "facts" else [])]
    when = ["before", "after", *[f"{name}_reward_after" for name in controls]]
    forecast = {"sampled_forecast"} if part == "arithmetic" else set()
    assert set(metrics[part]) == {f"{way}_{time}" for way in ways for time in when} | forecast
    assert all(0.0 <= value <= 1.0 for value in metrics[part].values())
    page = (folder / "report.html").read_text()
    assert "data:image/png;base64," in page and "http" not in page.split("</style>")[1].split("data:image")[0]
    assert (folder / f"{part}.png").read_bytes().startswith(b"\x89PNG")


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
        said = " ".join(out.split())
        assert "Uninformative rewards with the same settings: random reward" in said
        forecast = json.loads((tmp_path / "metrics.json").read_text())["arithmetic"]["sampled_forecast"]
        assert f"at beta 0.1, training will converge to {forecast:.0%} right answers." in said
        assert f"was forecast to be {forecast:.0%}; after " in said
        assert not (tmp_path / "partial").exists()
        wide = [line for line in out.splitlines() if len(line) > 80]
        assert all("report.html" in line or "[WARNING]" in line for line in wide), wide

    def test_facts(self, small_demo: None, smollm2_path: str, tmp_path: Path) -> None:
        run_demo("facts", tmp_path)
        check_folder(tmp_path, "facts", [])
        assert (tmp_path / "facts" / "adapter" / "adapter_model.safetensors").exists()

    def test_images(self, small_demo: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = []
        monkeypatch.setattr(
            parts.OtherImageReward, "__call__", lambda self, **kwargs: seen.append(kwargs) or [0.0] * 8
        )
        run_demo("images", tmp_path)
        check_folder(tmp_path, "images", ["random", "other_image", "text_alone"])
        assert len(seen) == 2
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "images" / "trained_model")
        assert AutoProcessor.from_pretrained(tmp_path / "images" / "base_model").image_token_id == 14
        assert loaded.config.image_token_id == 14

    def test_an_interrupted_run_goes_on(
        self, small_demo: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def train(name: str, *args: Any, **kwargs: Any) -> Any:
            trained.append(name)
            if len(trained) == 2:
                raise KeyboardInterrupt
            return train_with_grpo(name, *args, **kwargs)

        trained: list[str] = []
        monkeypatch.setattr(parts, "train_with_grpo", train)
        with pytest.raises(KeyboardInterrupt, match="Run the same command again to resume"):
            run_demo("arithmetic", tmp_path)
        weights = (tmp_path / "arithmetic" / "base_model" / "model.safetensors").read_bytes()
        run_demo("arithmetic", tmp_path)
        assert trained == [f"arithmetic-{name}" for name in ("endogenous", "random", "random", "length")]
        assert (tmp_path / "arithmetic" / "base_model" / "model.safetensors").read_bytes() == weights

    def test_a_missing_package_is_missed_before_anything_runs(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(demo, "find_spec", lambda name: None)
        with pytest.raises(ImportError, match="The demo requires matplotlib, peft, gguf. In a clone"):
            run_demo("all", tmp_path / "output")
        assert not (tmp_path / "output").exists()

    def test_a_size_without_the_task(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="The quick demo has no facts"):
            run_demo("facts", tmp_path, size="quick")


def _relations() -> list[dict]:
    return json.loads(Path(facts.__file__).with_name("facts.json").read_text())["relations"]
