# SPDX-License-Identifier: Apache-2.0
"""Coming from TRL's own PPO: each of its options and arguments works here, or the error says what to use instead."""

import copy
import dataclasses
import inspect
import pickle
import re
from typing import Any

import pytest
from datasets import Dataset
from trl import GRPOTrainer

from endotrl import DenseGRPOConfig, PPOConfig, PPOTrainer
from endotrl.launch.arguments import make_parser
from endotrl.trainers.ppo_migration import ARGUMENTS, CONFIG


# The fields that TRL 1.12's `PPOConfig` adds to transformers', with its defaults, and the arguments of its
# `PPOTrainer`.
FIELDS: dict[str, Any] = {"dataset_num_proc": None, "num_mini_batches": 1, "total_episodes": None}
FIELDS |= {"local_rollout_forward_batch_size": 64, "num_sample_generations": 10, "response_length": 53}
FIELDS |= {"stop_token": None, "stop_token_id": None, "temperature": 0.7, "missing_eos_penalty": None}
FIELDS |= {"sft_model_path": "EleutherAI/pythia-160m", "world_size": None, "num_total_batches": None}
FIELDS |= {"micro_batch_size": None, "local_batch_size": None, "batch_size": None, "local_mini_batch_size": None}
FIELDS |= {"mini_batch_size": None, "push_to_hub": False, "reward_model_path": "EleutherAI/pythia-160m"}
FIELDS |= {"model_adapter_name": None, "ref_adapter_name": None, "num_ppo_epochs": 4, "whiten_rewards": False}
FIELDS |= {"kl_coef": 0.05, "kl_estimator": "k1", "cliprange": 0.2, "vf_coef": 0.1, "cliprange_value": 0.2}
FIELDS |= {"gamma": 1.0, "lam": 0.95, "ds3_gather_for_generation": True}
PARAMETERS = [
    *("args", "processing_class", "model", "ref_model", "reward_model", "train_dataset", "value_model"),
    *("data_collator", "eval_dataset", "optimizers", "callbacks", "peft_config"),
]
CPU: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": []}


@pytest.mark.parametrize("name", [*FIELDS, "exp_name"])
def test_options(name, tmp_path):
    value = FIELDS.get(name, "run")
    if name in {field.name for field in dataclasses.fields(PPOConfig)}:
        assert getattr(PPOConfig(str(tmp_path), **{**CPU, name: value}), name) == value
        assert name not in CONFIG
    else:
        with pytest.raises(TypeError, match=re.escape(f"`{name}`: now {CONFIG[name]}.")):
            PPOConfig(str(tmp_path), **{**CPU, name: value})


def test_successors_exist(tmp_path):
    fields = {field.name for field in dataclasses.fields(PPOConfig)}
    parameters = set(inspect.signature(PPOTrainer).parameters) | set(inspect.signature(GRPOTrainer).parameters)
    assert CONFIG.keys() == (FIELDS.keys() | {"exp_name"}) - fields
    others = {"eos_token_id", "completion_ids", "PPOTrainer", "EndogenousReward", "PeftModel"}
    for name, successor in {**CONFIG, **ARGUMENTS}.items():
        for word in re.findall(r"`(\w+)", successor):
            assert word in fields | parameters | others, f"{name}: {word}"


def test_several_at_once(tmp_path):
    with pytest.raises(TypeError, match=r"has no `kl_coef`, `cliprange`: .* `beta`\. `cliprange`: now `epsilon`"):
        PPOConfig(str(tmp_path), kl_coef=0.05, gamma=1.0, cliprange=0.1)


def test_other_mistakes_are_python_s(tmp_path):
    with pytest.raises(TypeError, match="unexpected keyword argument 'kl_coeff'"):
        PPOConfig(str(tmp_path), kl_coeff=0.05)


def test_copies(tmp_path):
    args = PPOConfig(str(tmp_path), lam=0.5, **CPU)
    for other in (copy.copy(args), copy.deepcopy(args), pickle.loads(pickle.dumps(args))):
        assert (other.lam, other.num_generations) == (0.5, 1)


def test_command_line():
    words = ["--use_cpu", "True", "--bf16", "False", "--kl_coef", "0.05"]
    with pytest.raises(ValueError, match=r"--kl_coef \(of TRL's own PPO: now `beta`\)"):
        make_parser(PPOConfig).parse_args_and_config(words)
    with pytest.raises(ValueError, match=r"no setting --kl_coef") as raised:
        make_parser(DenseGRPOConfig).parse_args_and_config(words)
    assert "PPO" not in str(raised.value)


@pytest.mark.parametrize("name", [*PARAMETERS, "policy", "policy_model", "config", "tokenizer", "dataset"])
def test_arguments(name, tmp_path):
    if name in inspect.signature(PPOTrainer).parameters or name in inspect.signature(GRPOTrainer).parameters:
        assert name not in ARGUMENTS
        return
    with pytest.raises(TypeError, match=re.escape(f"`{name}`: now {ARGUMENTS[name]}.")):
        PPOTrainer("/nowhere", args=PPOConfig(str(tmp_path), **CPU), **{name: None})


def test_its_order_of_arguments(tmp_path):
    with pytest.raises(TypeError, match="first argument of `PPOTrainer` is the policy"):
        PPOTrainer(PPOConfig(str(tmp_path), **CPU), None, "/nowhere", Dataset.from_dict({"prompt": ["a"]}))
