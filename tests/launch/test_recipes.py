# SPDX-License-Identifier: Apache-2.0
"""The recipes: their files are read by their real parsers, their mistakes are found early, and they train."""

import importlib
import inspect
import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from datasets import Dataset
from trl import ModelConfig, get_peft_config

from endotrl import CollapseMonitor, DenseGRPOConfig, DenseGRPOTrainer, EndogenousReward, PPOConfig, PPOTrainer
from endotrl import launch as recipes
from endotrl.launch import load_prompts, make_parser, make_reward_funcs
from endotrl.launch.callbacks import HeatMaps, Tracking, add_callbacks
from endotrl.launch.cpu import choose_precision
from endotrl.launch.parser import CHOICES, RANGES
from endotrl.launch.preflight import _check_generation
from endotrl.rewards import AccuracyReward, FormatReward, LengthReward, RandomReward
from endotrl.runs.callback_order import add_in_order
from endotrl.sentence import SentenceRewardTrainer, SentenceRewardTrainerConfig

from ..support.helpers import as_arguments
from ..support.recipes import refusal


ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
RL_RECIPES = [path for path in RECIPES if path.stem != "sentence_reward"]
LAUNCHERS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))


def classes(recipe: Path) -> tuple[Any, Any]:
    """Trainer and configuration of a recipe."""
    others = {"ppo": (PPOTrainer, PPOConfig), "sentence_reward": (SentenceRewardTrainer, SentenceRewardTrainerConfig)}
    return others.get(recipe.stem, (DenseGRPOTrainer, DenseGRPOConfig))


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    questions = ["a b", "c", "d e f", "g"] * 4
    rows = [{"prompt": [{"role": "user", "content": q}], "answer": "h", "question": q} for q in questions]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture
def small(tiny_policy_path, prompts, tmp_path):
    """Overrides that make a recipe a matter of seconds."""
    overrides = {"model_name_or_path": tiny_policy_path, "dataset_name": prompts, "output_dir": tmp_path / "output"}
    overrides |= {"max_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 8, "max_completion_length": 8}
    overrides |= {"bf16": False, "dtype": "float32", "use_cpu": True, "lora_target_modules": ".*_proj"}
    return as_arguments(overrides)


def parse(recipe: Path, *arguments: str) -> tuple[Any, ...]:
    return make_parser(classes(recipe)[1]).parse_args_and_config(["--config", str(recipe), *arguments])


def recipe(name: str) -> Path:
    return ROOT / "recipes" / "smollm2-135m" / f"{name}.yaml"


def prepare(arguments: list[str], *more: str, name: str = "grpo") -> Any:
    return recipes.prepare(*parse(recipe(name), *arguments, *more))


def read_prompts(*arguments: str) -> tuple[Any, Any]:
    script_args, training_args, _, _, dataset_args = parse(recipe("grpo"), *arguments)
    return load_prompts(script_args, training_args, dataset_args)


def run(name: str, arguments: list[str], logged: str = "reward") -> list[dict[str, Any]]:
    """Runs a recipe in this process, and returns what was logged in training, or with another key."""
    trainer = recipes.run(classes(recipe(name))[0], prepare(arguments, name=name))
    return [entry for entry in trainer.state.log_history if logged in entry]


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


# Here there is no GPU, which they are for.
ON_CPU = ["--use_cpu", "True"]


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_recipe_is_read(path, tmp_path):
    script_args, training_args, *reward_args, model_args, _ = parse(path, "--output_dir", str(tmp_path), *ON_CPU)
    given = yaml.safe_load(path.read_text())
    # The values of the file arrive; the command line wins.
    assert training_args.output_dir == str(tmp_path)
    assert training_args.learning_rate == given["learning_rate"]
    assert model_args.model_name_or_path == given["model_name_or_path"]
    assert script_args.dataset_name == given["dataset_name"]
    assert (path.parent / "README.md").is_file()
    if not reward_args:
        assert training_args.attention_dim == given["attention_dim"]
        return
    assert training_args.beta == given["beta"] > 0
    assert reward_args[0].reward == [given["reward"]]
    assert model_args.dtype == given["dtype"]
    assert (get_peft_config(model_args) is not None) == given.get("use_peft", False)


@pytest.mark.parametrize("control", ["random", "length", "format"])
@pytest.mark.parametrize("path", RL_RECIPES, ids=name_of)
def test_controls_of_each_recipe(path, control, tmp_path):
    """One override, without weights: with what the recipe reads of its data."""
    script_args, training_args, reward_args, model_args, _ = parse(
        path, "--output_dir", str(tmp_path), "--reward", control, *ON_CPU
    )
    dataset = Dataset.from_dict(
        {script_args.dataset_prompt_column: ["a"], script_args.answer_column or "answer": ["b"]}
    )
    made = make_reward_funcs(script_args, training_args, reward_args, model_args, dataset)
    assert type(made[0]) is {"random": RandomReward, "length": LengthReward, "format": FormatReward}[control]
    assert training_args.reward_weights == [1.0, *([0.0] * (len(made) - 1))]


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_launcher_is_read(path):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import DistributedType

    config = load_config_from_file(str(path))  # an unknown key is an error
    stage = {"zero1": 1, "zero2": 2, "zero3": 3, "zero3_offload": 3, "multi_node": 3}.get(path.stem)
    if stage is not None:
        assert config.distributed_type == DistributedType.DEEPSPEED
        assert config.deepspeed_config["zero_stage"] == stage
        assert (config.deepspeed_config["offload_param_device"] == "cpu") == (path.stem == "zero3_offload")
    if path.stem == "fsdp2":
        assert (config.distributed_type, config.fsdp_config["fsdp_version"]) == (DistributedType.FSDP, 2)
    assert config.num_machines == (2 if path.stem == "multi_node" else 1)
    assert config.use_cpu == (path.stem == "cpu")


class TestRanges:
    """The tables name settings and choices that TRL has."""

    def test_names(self):
        parsers = (make_parser(DenseGRPOConfig), make_parser(PPOConfig), make_parser(SentenceRewardTrainerConfig))
        known = {action.dest for parser in parsers for action in parser._actions}
        named = {name for names in RANGES.values() for name in names} | set(CHOICES)
        assert named <= known
        assert sum(map(len, RANGES.values())) == len({name for names in RANGES.values() for name in names})

    def test_choices(self):
        source = inspect.getsource(importlib.import_module("trl.trainer.grpo_trainer"))
        known = re.findall(r"self\.loss_type (?:==|in) (\[[^]]*\]|\"[^\"]*\")", source)
        assert {name for one in known for name in re.findall(r'"(\w+)"', one)} == set(CHOICES["loss_type"])
        for name, choices in CHOICES.items():
            assert all(f'"{choice}"' in source or f"'{choice}'" in source for choice in choices), name


ASKED = [{"role": "user", "content": "d e f ?"}]
MISTAKES: dict[str, list[tuple[Any, str]]] = {
    # By recipe: on the command line (a list), in its YAML (a mapping), or in place of it (text), and what is said; "…"
    # stands for anything.
    "grpo": [
        # Names
        (["--reward_alfa", "2"], "Unknown setting: reward_alfa (did you mean reward_alpha?). Run the…`--help`"),
        ({"reward_alfa": 2.0}, "Unknown setting: reward_alfa (did you mean reward_alpha?)"),
        (["--config"], "must be followed by the path"),
        ("beta: [1\nb: }", "is not valid YAML: while parsing a flow sequence…line 1"),
        ("- beta", "must contain a YAML mapping"),
        # Data, models and rewards
        (["--dataset_name", "other.jsonl"], "The file 'other.jsonl' of `dataset_name` does not exist"),
        (["--eval_strategy", "steps"], "no split 'test', only 'train'"),
        (["--per_device_train_batch_size", "136"], "16 prompts, fewer than the 17 of one generation batch"),
        (["--dataset_prompt_column", "text"], "no column 'text'…'prompt', 'answer', 'question'"),
        (["--answer_column", "gold"], "no answer column gold"),
        (["--reward_model", "/nowhere"], "The frozen model '/nowhere' cannot be loaded"),
        (["--model_name_or_path", "nowhere/at", "--reward", "random"], "The model 'nowhere/at' cannot be loaded"),
        (["--reward_alpha", "-1"], "`reward_...` setting: `alpha` is -1"),
        (["--reward_pattern", "("], "`pattern` must be a regular expression"),
        (["--reward_truncation", "skip"], "normalize_then_sum"),
        (["--reward", "randon"], "Unknown reward 'randon'"),
        (["--reward", "sentence"], "`reward_sentence_model`"),
        (["--reward", "nowhere.at_all"], "Cannot import…'nowhere.at_all': No module named 'nowhere'"),
        (["--reward", "json.at_all"], "Cannot import…'json.at_all': module 'json' has no attribute"),
        (["--reward", "json.JSONDecoder"], "must be a function or a callable instance, got <class"),
        (["--reward", "random", "length", "--reward_weights", "1"], "one weight for each of the 2 rewards…got 1"),
        ({"reward_criterion": {"h": "Be kind.", "x": "Be brief."}}, "There is no criterion for the domains [None]"),
        (["--heat_map_steps", "-1"], "`heat_map_steps` must be at least 0, got -1"),
        (["--output_dir", __file__ + "/output"], "Cannot write to `output_dir`"),
        (["--output_dir", ""], "`output_dir` must not be empty"),
        (["--num_generations", "7"], "divisible by"),
        (["--resume_from_checkpoint", "nowhere"], "The folder 'nowhere' of `resume_from_checkpoint`"),
        # What trains nothing
        (["--num_iterations", "0"], "`num_iterations` must be at least 1, got 0"),
        (["--max_steps", "0"], "`max_steps` must be at least 1, or -1"),
        (["--max_steps", "-1", "--num_train_epochs", "0"], "`num_train_epochs` must be greater than 0"),
        (["--learning_rate", "0"], "`learning_rate` must be greater than 0, got 0.0"),
        (["--num_generations", "1"], "at least 2 generations"),
        (["--reward_weights", "0"], "`reward_weights` must have a weight other than 0"),
        (["--eval_on_start", "True"], "`eval_on_start: true` requires an evaluation dataset"),
        (["--remove_unused_columns", "True"], "drops the columns that reward functions read"),
        # Ranges
        (["--temperature", "0"], "`temperature` must be greater than 0, got 0.0"),
        (["--temperature", "nan"], "`temperature` must be finite, got nan"),
        (["--max_completion_length", "0"], "`max_completion_length` must be at least 1, got 0"),
        (["--top_p", "1.5"], "greater than 0 and at most 1"),
        (["--lora_dropout", "1"], "at least 0 and less than 1"),
        (["--loss_type", "gpro"], "`loss_type` is 'gpro', but it must be one of 'grpo'"),
        # What libraries need
        (["--use_vllm", "True"], "`use_vllm: true` requires vllm…Run `pip install 'endotrl[vllm]"),
        (["--optim", "adamw_bnb_8bit"], "the optimizer of `optim: adamw_bnb_8bit`: …bitsandbytes"),
        (["--attn_implementation", "flash_attention_2"], "`attn_implementation: flash_attention_2` cannot be used"),
        (["--report_to", "mlflow"], "`report_to: mlflow` requires a package…pip install mlflow"),
        (["--push_to_hub", "True"], "`push_to_hub: true` requires a login"),
        (["--generation_kwargs", '{"beams": 2}'], "`generation_kwargs` has an unknown key 'beams'"),
        (["--generation_kwargs", '{"min_p": 3}'], "Cannot generate with `generation_kwargs` {'min_p': 3}"),
        (
            ["--lr_scheduler_type", "cosine", "--lr_scheduler_kwargs", '{"cycles": 2}'],
            "Cannot create the scheduler `cosine` with {'cycles': 2}",
        ),
        # What YAML reads
        ({"beta": "much"}, "argument --beta: invalid float value: 'much'"),
        ({"temperature": None}, "`temperature` must not be null"),
        ({"num_iterations": 1.5}, "invalid int value: '1.5'"),
        ({"num_generations": [2]}, "`num_generations` must be a single value, got [2]"),
        ({"eval_strategy": False}, "invalid choice: 'False'…YAML reads unquoted no, off"),
        ({"chat_template_kwargs": "thinking"}, "must be a mapping"),
        ({"parallelism_config": {"a": 1}}, "The settings cannot be combined"),
    ],
    "dense_grpo": [(["--reward_aggregate", "mean"], "cannot be credited to single tokens")],
    "ppo": [(["--reward_aggregate", "mean"], "cannot be credited to single tokens")],
    "sentence_reward": [(["--eval_strategy", "no"], "must have the columns 'chosen' and 'rejected'")],
}


def test_generation_settings_are_tried_with_the_models_vocabulary():
    _check_generation({"bad_words_ids": [[99_999]]}, vocab_size=100_000)
    with pytest.raises(ValueError, match="Cannot generate with `generation_kwargs`"):
        _check_generation({"min_p": 3.0}, vocab_size=100_000)


class TestMistakes:
    """Found before any model is loaded."""

    @pytest.fixture(autouse=True)
    def no_model(self, monkeypatch):
        def load(*args: Any, **kwargs: Any) -> None:
            raise AssertionError("A model was loaded.")

        monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", load)

    @pytest.mark.parametrize(
        ("name", "given", "message"),
        [(name, *case) for name, cases in MISTAKES.items() for case in cases],
        ids=lambda value: str(value)[:60],
    )
    def test_said_in_one_line(self, name, given, message, small, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr("endotrl.launch.preflight.find_spec", lambda name: None)
        monkeypatch.setattr("endotrl.launch.preflight.get_token", lambda: None)
        monkeypatch.setattr(sys, "argv", ["recipes/grpo.py"])
        path, words = recipe(name), list(zip(small[::2], small[1::2], strict=True))
        if not isinstance(given, list):
            path = tmp_path / path.name
            of_yaml = {**yaml.safe_load(recipe(name).read_text()), **given} if isinstance(given, dict) else None
            path.write_text(yaml.safe_dump(of_yaml) if of_yaml else given)
            words = [(key, value) for key, value in words if key[2:] not in given]
        if name == "sentence_reward":
            words = [(key, value) for key, value in words if key == "--dataset_name"]
        more = given if isinstance(given, list) else []
        said = refusal(capsys, *classes(path), ["--config", str(path), *sum(words, ()), *more])
        assert said.count("grpo.py: error:") == 1 and "Traceback" not in said and "usage:" not in said
        assert re.search(".*".join(map(re.escape, message.split("…"))), said), said

    @pytest.mark.parametrize(
        ("rows", "settings", "message"),
        [
            *(
                ([{"prompt": ASKED}] * 15 + [{"prompt": bad}], {}, f"Row 15 of the dataset is invalid: {message}")
                for bad, message in (
                    (None, "The prompt must be text or a list of messages"),
                    ([], ".*empty list"),
                    ([{"content": "a"}], ".*role"),
                    ([{"role": "user"}], "The content of message 1 of the prompt must be text"),
                )
            ),
            # TRL gives prompts to the policy's template as they are, and ChatML concatenates content.
            (
                [{"prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}] * 16,
                {"model_name_or_path": "tiny_model_path"},
                "^Row 0 of the dataset is invalid: The content of a message is a list",
            ),
        ],
        ids=lambda value: str(value)[-60:],
    )
    def test_rows(self, rows, settings, message, small, prompts, tmp_path, request):
        prompts.write_text("\n".join(map(json.dumps, rows)))
        path = tmp_path / "grpo.yaml"
        path.write_text(yaml.safe_dump({**yaml.safe_load(recipe("grpo").read_text()), **settings}))
        words = list(small)
        if "model_name_or_path" in settings:
            words += ["--model_name_or_path", request.getfixturevalue("tiny_model_path")]
        with pytest.raises(ValueError, match=message):
            recipes.prepare(*parse(path, *words))

    def test_whole_numbers_stand_for_others(self, tmp_path):
        given = yaml.safe_load(recipe("grpo").read_text())
        given |= {"output_dir": str(tmp_path), "adam_beta1": 0, "top_p": 1}
        (tmp_path / "grpo.yaml").write_text(yaml.safe_dump(given))
        args = parse(tmp_path / "grpo.yaml")[1]
        # torch's Adam refuses betas of two types.
        assert (args.adam_beta1, type(args.adam_beta1), type(args.top_p)) == (0.0, float, float)
        assert type(args.num_generations) is int

    def test_prompts_without_chat_template(self, small, tiny_policy_path, tmp_path):
        model = shutil.copytree(tiny_policy_path, tmp_path / "model")
        (model / "chat_template.jinja").unlink()
        with pytest.raises(ValueError, match="chat"):
            prepare(small, "--model_name_or_path", str(model), "--reward", "random")


def reward_funcs(
    *arguments: str, columns: dict[str, list[Any]], model: str = "none"
) -> tuple[list[Callable[..., Any]], Any]:
    script_args, training_args, reward_args, *_ = parse(recipe("grpo"), *arguments)
    dataset = Dataset.from_dict(columns)
    made = make_reward_funcs(script_args, training_args, reward_args, ModelConfig(model_name_or_path=model), dataset)
    return made, training_args.reward_weights


def brevity(completions: list[Any], **kwargs: Any) -> list[float]:
    return [-float(len(c[0]["content"])) for c in completions]


class TestRewards:
    def test_controls_and_own(self):
        made, weights = reward_funcs(
            *["--reward", "random", "length", "format", "tests.launch.test_recipes.brevity"],
            *["--reward_weights", "1", "2", "3", "4"],
            columns={"prompt": ["a"], "answers": [["b"]]},
        )
        assert [type(f) for f in made[:3]] == [RandomReward, LengthReward, FormatReward]
        assert made[3].__name__ == "brevity"
        assert isinstance(made[4], AccuracyReward)
        assert weights == [1, 2, 3, 4, 0]

    @pytest.mark.parametrize(
        ("columns", "expected"),
        [
            (["solution", "answer"], ("solution", True)),
            (["answer"], ("answer", True)),
            (["answers"], ("answers", False)),
            ([], None),
        ],
    )
    def test_accuracy_by_columns(self, columns, expected, monkeypatch):
        rows = {"prompt": ["a"], **{column: ["b"] for column in columns}}
        made, weights = reward_funcs("--reward", "random", columns=rows)
        assert weights == [1.0] + [0.0] * (expected is not None)
        found = [(f.column, f.math) for f in made if isinstance(f, AccuracyReward)]
        assert found == ([] if expected is None else [expected])

        # Without math-verify, text; if it is asked for, an error.
        monkeypatch.setattr("endotrl.launch.reward_functions.find_spec", lambda name: None)
        monkeypatch.setattr("endotrl.grading.symbolic.find_spec", lambda name: None)
        made, _ = reward_funcs("--reward", "random", columns=rows)
        assert not any(f.math for f in made if isinstance(f, AccuracyReward))
        if columns:
            with pytest.raises(ImportError, match="math-verify"):
                reward_funcs("--reward", "random", "--accuracy", "math", columns=rows)


class TestPrompts:
    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            ([], "d e f"),
            (["--dataset_prompt_suffix", " ?"], "d e f ?"),
            (["--dataset_prompt_chat", "True"], [{"role": "user", "content": "d e f"}]),
            (["--dataset_prompt_chat", "True", "--dataset_prompt_suffix", " ?"], ASKED),
            (["--dataset_prompt_column", "prompt", "--dataset_prompt_suffix", " ?"], ASKED),
        ],
    )
    def test_wording(self, arguments, expected, small):
        train, evaluation = read_prompts(*small, "--dataset_prompt_column", "question", *arguments)
        assert train[2]["prompt"] == expected and evaluation is None
        assert ("question" in train.column_names) == ("prompt" in arguments)  # otherwise it is renamed

    def test_quickstart(self, tmp_path):
        train, evaluation = read_prompts("--output_dir", str(tmp_path), "--eval_strategy", "steps")
        asked = {row["prompt"][0]["content"] for row in train}
        assert evaluation is not None and len(evaluation) > 100
        assert not asked & {row["prompt"][0]["content"] for row in evaluation}

    @pytest.mark.parametrize("content", ["parts", "image last", "text"])
    def test_suffix_of_parts(self, content, prompts, small):
        image, text = {"type": "image", "text": None}, {"type": "text", "text": "a"}
        given, expected = {
            "parts": ([image, text], [image, {"type": "text", "text": "a ?"}]),
            "image last": ([text, image], [text, image, {"type": "text", "text": " ?"}]),
            "text": ("a", "a ?"),
        }[content]
        # The only column, too.
        prompts.write_text("\n".join([json.dumps({"prompt": [{"role": "user", "content": given}]})] * 16))
        train, _ = read_prompts(*small, "--dataset_prompt_suffix", " ?")
        assert train[3]["prompt"] == [{"role": "user", "content": expected}]


class TestLengths:
    """The tiny policy has a context of 64 tokens. Its template adds two: who asks, and who answers."""

    def test_fits_to_the_token(self, small):
        job = prepare(small, "--max_completion_length", "59")  # "d e f" is 5 tokens
        assert len(job.train_dataset) == 16
        said = (
            "4 of 16 prompts are too long for the context of the policy, 64 tokens, with `max_completion_length` 60. The "
            "first is row 2, with 5 tokens. Lower `max_completion_length`.*`dataset_overlong: drop`"
        )
        with pytest.raises(ValueError, match=said):
            prepare(small, "--max_completion_length", "60")

    def test_drop(self, small, capsys):
        drop = ["--dataset_overlong", "drop"]
        job = prepare(small, "--max_completion_length", "60", *drop)
        assert [row["question"] for row in job.train_dataset] == ["a b", "c", "g"] * 4
        assert "4 of 16 prompts" in capsys.readouterr().err
        stream = prepare(small, "--max_completion_length", "60", "--dataset_streaming", "True", *drop)
        assert [row["question"] for row in stream.train_dataset] == ["a b", "c", "g"] * 4
        with pytest.raises(ValueError, match="No prompt is left"):
            prepare(small, "--max_completion_length", "64", *drop)
        with pytest.raises(ValueError, match="has 12 prompts, fewer than the 16 of one generation batch"):
            prepare(small, "--max_completion_length", "60", "--per_device_train_batch_size", "128", *drop)

    def test_the_frozen_model_reads_more(self, small, tmp_path):
        """The criterion is a message of its own, of three tokens."""
        criterion = ["--reward_criterion", "k l"]
        assert prepare(small, "--max_completion_length", "56", *criterion)
        with pytest.raises(
            ValueError, match="4 of 16 prompts are too long for the context of the frozen .*with 8 tokens"
        ):
            prepare(small, "--max_completion_length", "57", *criterion)
        # Its beginning is cut, if that is wanted, and no other reward reads it.
        for other in (["--reward_overlong_prompt", "truncate_left"], ["--reward", "random"]):
            assert prepare(small, "--max_completion_length", "57", *criterion, *other)


class TestPrecision:
    @pytest.fixture
    def settle(self, small, monkeypatch):
        i = small.index("--bf16")
        words = [word for k, word in enumerate(small) if k not in range(i, i + 4)]  # and --dtype

        def settle(faster: str, *arguments: str) -> tuple[bool, str, str]:
            seconds = {"bfloat16": 1.0, "float32": 1.0, faster: 0.25}
            monkeypatch.setattr("endotrl.frozen.cpu_dtype.matmul_seconds", lambda: seconds)
            parser = make_parser(DenseGRPOConfig)
            parser.settle = choose_precision
            given = ["--config", str(recipe("grpo")), *words, *arguments]
            _, args, reward, model, _ = parser.parse_args_and_config(given)
            return args.bf16, model.dtype, reward.reward_dtype

        return settle

    def test_the_faster_one(self, settle, capsys):
        assert settle("float32") == (False, "float32", "float32")
        said = " ".join(capsys.readouterr().err.split())
        chosen = "`bf16: false`, `dtype: float32`, `reward_dtype: float32`"
        assert f"Using {chosen} on this CPU, as it multiplies matrices 4.0 times as fast in float32" in said
        assert settle("bfloat16") == (True, "bfloat16", "bfloat16")

    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            (["--bf16", "True"], (True, "float32", "float32")),
            (["--dtype", "bfloat16"], (False, "bfloat16", "float32")),
            (["--bf16", "True", "--dtype", "bfloat16"], (True, "bfloat16", "float32")),
            (["--reward_dtype", "bfloat16"], (False, "float32", "bfloat16")),
            # A copy that is not on the CPU, or whose dtype is said in another way
            (["--reward_device", "meta"], (False, "float32", "auto")),
            (["--reward_model_init_kwargs", '{"dtype": "bfloat16"}'], (False, "float32", "auto")),
            (["--reward_model", "http://127.0.0.1:1/v1"], (False, "float32", "auto")),
        ],
    )
    def test_what_is_said_holds(self, arguments, expected, settle):
        assert settle("float32", *arguments) == expected

    @pytest.mark.parametrize(("kept", "expected"), [({"reward_dtype": "bfloat16"}, "bfloat16"), ({}, "auto")])
    def test_a_resumed_run_keeps_its_own(self, kept, expected, settle, tmp_path):
        record = {"settings": {"training": {"bf16": True}, "reward": kept, "model": {"dtype": "bfloat16"}}}
        (tmp_path / "output").mkdir()
        (tmp_path / "output" / "recipe.json").write_text(json.dumps(record))
        assert settle("float32") == (True, "bfloat16", expected)
        assert settle("float32", "--resume", "False") == (False, "float32", "float32")


class TestRuns:
    @pytest.mark.parametrize("name", ["grpo", "dense_grpo", "ppo"])
    def test_lora(self, name, small, tmp_path, monkeypatch):
        attached: list[EndogenousReward] = []
        monkeypatch.setattr(EndogenousReward, "attach", _watched_attach(attached))
        steps = run(name, small)
        assert len(steps) == (1 if name == "ppo" else 2)  # PPO trains for four steps on what it has generated
        assert len(attached) == 1 and attached[0].is_shared
        for step in steps:
            assert step["rewards/endogenous_reward/mean"] < 0
            assert 0 <= step["rewards/accuracy/mean"] <= 1
            # The accuracy has the weight 0.
            assert step["reward"] == pytest.approx(step["rewards/endogenous_reward/mean"])
            # Credit by token: advantages differ within completions, and do not with the credit of the outcome.
            assert (step["advantage/within_completion"] > 1e-3) == (name != "grpo")
        assert (tmp_path / "output" / "adapter_model.safetensors").is_file()

    @pytest.mark.parametrize(
        ("arguments", "shared"),
        [
            (["--use_peft", "False"], True),  # the reference model
            (["--use_peft", "False", "--beta", "0"], False),
            (["--use_peft", "False", "--sync_ref_model", "True"], False),
            (["--reward_model", "{model}"], False),
        ],
    )
    def test_shared_or_own(self, arguments, shared, small, tiny_policy_path, monkeypatch):
        attached: list[EndogenousReward] = []
        monkeypatch.setattr(EndogenousReward, "attach", _watched_attach(attached))
        arguments = [argument.format(model=tiny_policy_path) for argument in arguments]
        steps = run("grpo", [*small, "--max_steps", "1", *arguments])
        assert len(attached) == shared
        assert steps[0]["rewards/endogenous_reward/mean"] < 0

    def test_evaluation(self, small, prompts):
        evaluation = ["--eval_strategy", "steps", "--eval_on_start", "True", "--dataset_test_split", "train"]
        evaluations = run("grpo", [*small, "--max_steps", "1", "--eval_steps", "1", *evaluation], "eval_reward")
        assert len(evaluations) == 2
        assert all(0 <= entry["eval_rewards/accuracy/mean"] <= 1 for entry in evaluations)

    def test_sentence_reward_and_rl_on_it(self, tiny_model_path, small, prompts, tmp_path):
        overrides = {"model_name_or_path": tiny_model_path, "output_dir": tmp_path / "reward", "max_steps": 2}
        overrides |= {"per_device_train_batch_size": 4, "eval_strategy": "no"}  # or it ends with an evaluation
        words = ["--config", str(recipe("sentence_reward")), *as_arguments(overrides)]
        trained = recipes.launch(*classes(recipe("sentence_reward")), words)
        assert len([entry for entry in trained.state.log_history if "loss" in entry]) == 2
        on_it = ["--reward", "sentence", "--reward_sentence_model", str(tmp_path / "reward"), "--max_steps", "1"]
        (step,) = run("dense_grpo", [*small, *on_it])
        assert math.isfinite(step["rewards/sentence_reward/mean"])


def _watched_attach(attached: list[EndogenousReward]) -> Callable[..., EndogenousReward]:
    attach = EndogenousReward.attach

    def watched(self: EndogenousReward, trainer: Any) -> EndogenousReward:
        attached.append(self)
        return attach(self, trainer)

    return watched


def test_order_of_callbacks():
    handler = SimpleNamespace(callbacks=["W&B"])
    trainer = SimpleNamespace(
        accelerator=None, args=SimpleNamespace(save_total_limit=None), reward_funcs=[], callback_handler=handler
    )
    interruptions = add_callbacks(trainer, {}, heat_map_steps=1)
    add_in_order(trainer, CollapseMonitor())
    assert handler.callbacks[0] is interruptions
    assert [type(callback) for callback in handler.callbacks[1:]] == [Tracking, HeatMaps, CollapseMonitor, str]
