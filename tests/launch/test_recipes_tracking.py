# SPDX-License-Identifier: Apache-2.0
"""What W&B shows of a run, read back from what an offline run has written."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from endotrl import DenseGRPOConfig, DenseGRPOTrainer, PPOConfig, PPOTrainer
from endotrl import launch as recipes
from endotrl.monitoring.diagnosis.wandb_file import _records as records
from endotrl.runs.record import make_record
from endotrl.runs.wandb_run import WANDB_ID_FILE
from endotrl.sentence import SentenceRewardTrainer, SentenceRewardTrainerConfig

from ..support.helpers import ON_CPU, as_arguments
from ..support.recipes import refusal


pytestmark = pytest.mark.slow
SECRET = "hf_nobody_is_to_read_this"

PANELS = {
    # learning
    *("reward", "rewards/endogenous_reward/mean", "rewards/accuracy/mean", "loss", "grad_norm", "learning_rate"),
    # the reward's parts
    *("endogenous_reward/reward_per_token", "endogenous_reward/log_prob_per_token", "endogenous_reward/soft_value"),
    # collapse
    *("completions/mean_length", "entropy", "kl", "endogenous_reward/entropy", "endogenous_reward/truncated_fraction"),
    *("endogenous_reward/length_correlation", "completions/clipped_ratio"),
    *("collapse/repetition", "collapse/held_out/accuracy", "collapse/distinct_completions", "collapse/alarm"),
    # speed and memory
    *("perf/tokens_per_second", "perf/seconds_per_step", "perf/memory_gib", "num_tokens"),
}


@pytest.fixture
def arguments(tiny_policy_path, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    # Prompts that look like a page's own text.
    rows = [{"prompt": f"{word} <script>alert(1)</script>", "answer": "h"} for word in "abcd" * 4]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    settings = {"model_name_or_path": tiny_policy_path, "dataset_name": prompts, "output_dir": tmp_path / "run"}
    settings |= {"max_steps": 2, "save_steps": 2, "logging_steps": 1, "heat_map_steps": 2, "accuracy": "match"}
    settings |= {"per_device_train_batch_size": 16, "num_generations": 4, "beta": 0.1, "max_completion_length": 8}
    settings |= {"dataset_test_split": "train", "eval_strategy": "steps", "eval_steps": 2, "num_generations_eval": 2}
    return as_arguments({**settings, "per_device_eval_batch_size": 8, **ON_CPU, "hub_token": SECRET})


def read_offline_run(path: Path) -> tuple[set[str], dict[str, Any], str]:
    """Keys of what was logged, the config, and the run's id."""
    from wandb.proto import wandb_internal_pb2

    keys: set[str] = set()
    config: dict[str, Any] = {}
    run_id = ""
    for data in records(path):
        record = wandb_internal_pb2.Record.FromString(data)
        keys |= {item.key or item.nested_key[0] for item in record.history.item}
        updates = [*record.run.config.update, *record.config.update]
        config |= {item.key or item.nested_key[0]: json.loads(item.value_json) for item in updates}
        run_id = record.run.run_id or run_id
    return keys, config, run_id


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    for key in ("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_DIR"):
        # Set in the process by the recipe; put back after the test.
        monkeypatch.setenv(key, "")
        monkeypatch.delenv(key)
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))  # where artifacts wait for being uploaded
    module = pytest.importorskip("wandb")
    end_process(module)
    yield module
    end_process(module)


def end_process(wandb: Any) -> None:
    """As at the end of a process: all is written, and the environment will be read again."""
    if wandb.run is not None:
        wandb.finish()
    wandb.teardown()


def read_back(wandb: Any, output_dir: Path) -> tuple[set[str], dict[str, Any], str]:
    end_process(wandb)
    (file,) = (output_dir / "wandb").glob("offline-run-*/*.wandb")
    return read_offline_run(file)


def check_config(config: dict[str, Any], output_dir: Path) -> dict[str, Any]:
    """What a run was made of, in the config and in its folder, and no secrets."""
    record = config["recipe"]
    assert record["settings"]["training"]["learning_rate"] == config["learning_rate"]
    assert record["versions"].keys() >= {"endotrl", "torch", "transformers", "trl", "accelerate", "datasets", "python"}
    assert record["git"] is None or len(record["git"]["revision"]) == 40
    on_disk = (output_dir / "recipe.json").read_text()
    assert json.loads(on_disk) == record
    assert SECRET not in json.dumps(config) + on_disk
    return record


@pytest.mark.parametrize(
    ("kind", "settings", "more"),
    [
        (
            "dense_grpo",
            ["--credit", "token", "--reward_correction", "length", "--reward", "endogenous", "random"],
            {
                *("endogenous_reward/correction", "endogenous_reward/length_slope", "rewards/random_reward/mean"),
                *("token_rewards/endogenous_reward/mean", "advantage/within_completion"),
            },
        ),
        (
            "ppo",
            ["--reward_token_reward", "log_prob", "--reward_correction", "clip", "--num_iterations", "1"],
            {"endogenous_reward/correction", "ppo/kl_reward", "ppo/explained_variance", "ppo/values_mean"},
        ),
    ],
)
def test_wandb(kind, settings, more, arguments, tmp_path, wandb):
    classes = (PPOTrainer, PPOConfig) if kind == "ppo" else (DenseGRPOTrainer, DenseGRPOConfig)
    words = [*arguments, *settings, "--report_to", "wandb"]
    recipes.launch(*classes, words)
    run = tmp_path / "run"
    keys, config, run_id = read_back(wandb, run)
    assert {f"train/{panel}" for panel in PANELS | more} <= keys
    assert "eval/rewards/accuracy/mean" in keys  # held-out accuracy
    assert "token_rewards" in keys
    assert run_id == (run / WANDB_ID_FILE).read_text()
    assert config["learning_rate"] == 1e-6 and config["beta"] == 0.1
    assert check_config(config, run)["settings"]["reward"]["reward_alpha"] == 1.0
    # Text of users and models is escaped. A table's pages are an artifact.
    pages = "".join(
        path.read_text() for path in (tmp_path / "data").rglob("*") if path.is_file() and b"<html" in path.read_bytes()
    )
    assert pages.count('class="heat"') == 4 and "&lt;script&gt;" in pages and "<script" not in pages
    page = (run / "completions" / "token_rewards_2.html").read_text()
    assert "<script" not in page and page.count('class="heat"') == 4

    if kind == "dense_grpo":  # The same command, to a later step, goes on with the same run.
        del os.environ["WANDB_RUN_ID"]
        recipes.launch(*classes, [*words, "--max_steps", "3"])
        end_process(wandb)
        files = list((run / "wandb").glob("offline-run-*/*.wandb"))
        assert len(files) == 2 and {read_offline_run(path)[2] for path in files} == {run_id}


def test_wandb_of_the_sentence_reward(tiny_model_path, tmp_path, wandb):
    pairs = [{"prompt": f"{w} ", "chosen": "Yes. It is.", "rejected": "No. Not so."} for w in "abcd"]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    settings = {"model_name_or_path": tiny_model_path, "dataset_name": tmp_path / "pairs.jsonl", **ON_CPU}
    settings |= {"output_dir": tmp_path / "run", "max_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 2}
    settings |= {"dataset_test_split": "train", "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no"}
    settings |= {"hub_token": SECRET, "report_to": "wandb"}
    recipes.launch(SentenceRewardTrainer, SentenceRewardTrainerConfig, as_arguments(settings))
    keys, config, run_id = read_back(wandb, tmp_path / "run")
    panels = {"loss", "grad_norm", "learning_rate", "accuracy", "margin", "mean_reward", "num_tokens"}
    panels |= {"perf/tokens_per_second", "perf/seconds_per_step", "perf/memory_gib"}
    assert {f"train/{panel}" for panel in panels} | {"eval/accuracy"} <= keys
    assert run_id == (tmp_path / "run" / WANDB_ID_FILE).read_text()
    check_config(config, tmp_path / "run")


def test_secrets_of_a_command(monkeypatch):
    kwargs = json.dumps({"dtype": "bfloat16", "token": SECRET})
    words = [
        "recipes/grpo.py",
        "--hub_token",
        SECRET,
        f"--hub-token={SECRET}",
        *("--model_init_kwargs", kwargs, "--wandb_api_key", SECRET, "--beta", "0"),
    ]
    monkeypatch.setattr(sys, "argv", words)
    record = make_record({"training": DenseGRPOConfig(use_cpu=True, model_init_kwargs=json.loads(kwargs))})
    assert SECRET not in json.dumps(record)
    hidden = {1: "--hub_token", 2: "<SECRET>", 3: "--hub-token=<SECRET>"}
    hidden |= {5: json.dumps({"dtype": "bfloat16", "token": "<SECRET>"}), 7: "<SECRET>"}
    assert record["command"] == [hidden.get(index, word) for index, word in enumerate(words)]
    assert record["settings"]["training"]["model_init_kwargs"] == {"dtype": "bfloat16", "token": "<SECRET>"}


def test_without_an_account(arguments, tmp_path, wandb, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr(DenseGRPOTrainer, "__init__", lambda *args, **kwargs: pytest.fail("A trainer was made."))
    said = refusal(capsys, DenseGRPOTrainer, DenseGRPOConfig, [*arguments, "--report_to", "wandb"])
    assert "`report_to: wandb` requires a W&B login" in said and "set WANDB_MODE=offline" in said
