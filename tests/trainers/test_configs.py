# SPDX-License-Identifier: Apache-2.0
"""
Configurations and arguments of both trainers: TRL's parser, errors before a model is loaded, and replacements for the
options of TRL's own PPO.
"""

import dataclasses
import importlib
import inspect
import json
import re
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset, DatasetDict
from torch.optim import SGD
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

import endotrl.trainers
from endotrl import DenseGRPOConfig, DenseGRPOTrainer, EndogenousReward, PPOConfig, PPOTrainer
from endotrl.launch.arguments import make_parser
from endotrl.trainers.ppo_config import FORMER_ARGUMENTS, FORMER_OPTIONS

from ..support import trainers
from ..support.helpers import QUIET
from ..support.trainers import PROMPTS, length


TOKENIZED = Dataset.from_dict({"input_ids": [[5, 6]] * 8, "attention_mask": [[1, 1]] * 8})
BOTH = [DenseGRPOTrainer, PPOTrainer]


class TestConfigs:
    @pytest.mark.parametrize(("config", "count"), [(PPOConfig, 17), (DenseGRPOConfig, 4)])
    def test_the_rest_is_trls_and_what_is_new_is_documented(self, config, count, tmp_path):
        inherited = {field.name: field.default for field in dataclasses.fields(GRPOConfig)}
        new = [field for field in dataclasses.fields(config) if inherited.get(field.name, ...) != field.default]
        assert len(new) == count
        for field in new:
            assert field.metadata["help"] and f"{field.name} (`" in (config.__doc__ or ""), field.name
        args = config(str(tmp_path), **QUIET)
        json.dumps(args.to_dict())
        if config is DenseGRPOConfig:
            assert (args.credit, args.gamma, args.baseline, args.segmenter) == ("token", 1.0, "group", "rules")

    @pytest.mark.parametrize(
        ("config", "settings", "message"),
        [
            (PPOConfig, {"gamma": 0.0}, "`gamma` is 0.0"),
            (PPOConfig, {"lam": -0.1}, "`lam` is -0.1"),
            (PPOConfig, {"beta": -1.0}, "`beta` is -1.0"),
            (PPOConfig, {"cliprange_value": 0.0}, "`cliprange_value` is 0.0"),
            (PPOConfig, {"value_learning_rate": 0.0}, "`value_learning_rate` is 0.0"),
            (PPOConfig, {"critic": "head"}, "`critic` is 'head', .* one of 'value_head', 'value_model', 'none'"),
            (PPOConfig, {"truncation": "skip"}, "`truncation` is 'skip'"),
            (PPOConfig, {"kl_placement": "both"}, "`kl_placement` is 'both'"),
            (PPOConfig, {"critic": "none", "truncation": "bootstrap"}, "needs a critic"),
            (PPOConfig, {"critic": "none", "detach_value": False}, "`detach_value=False`"),
            (PPOConfig, {"kl_target": 0.0}, "`kl_target` is 0.0"),
            (PPOConfig, {"kl_target": 6.0, "beta": 0.0}, "`beta` is 0"),
            (PPOConfig, {"kl_target": 6.0, "sync_ref_model": True}, "`sync_ref_model=True` updates"),
            (PPOConfig, {"num_generations": 0}, "at least 1 completion"),
            (PPOConfig, {"num_generations": 3}, "must be divisible by num_generations"),
            (DenseGRPOConfig, {"credit": "word"}, "`credit` is 'word"),
            (DenseGRPOConfig, {"baseline": "mean"}, "`baseline` is 'mean"),
            (DenseGRPOConfig, {"gamma": 0.0}, "`gamma` is 0.0"),
        ],
        ids=str,
    )
    def test_errors(self, config, settings, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            config(str(tmp_path), per_device_train_batch_size=8, **{**QUIET, **settings})

    @pytest.mark.parametrize(
        ("settings", "generations", "batch"),
        [
            *(
                ({"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}, 1, size * steps)
                for size, steps in ((1, 1), (1, 3), (7, 1), (8, 4))
            ),
            ({"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 3}, 1, 8),
            ({"num_generations": 4, "per_device_train_batch_size": 8}, 4, 8),
        ],
        ids=str,
    )
    def test_ppo_needs_one_completion_only(self, settings, generations, batch, tmp_path):
        args = PPOConfig(str(tmp_path), **QUIET, **settings)
        assert type(args.num_generations) is int
        assert (args.num_generations, args.generation_batch_size) == (generations, batch)
        # As TRL's scripts and sweeps do; the derived batch size must be given up for that.
        assert dataclasses.replace(args, lam=0.5, generation_batch_size=None).num_generations == generations


class TestArguments:
    """Errors before any model is loaded: the model's path does not exist."""

    @pytest.mark.parametrize(
        ("kinds", "settings", "error", "message"),
        [
            ([PPOTrainer], {"value_model": "path"}, ValueError, "`critic` is 'value_head', which does not use it"),
            ([PPOTrainer], {"critic": "value_model", "value_model": 3}, TypeError, "`value_model` is a int"),
            ([PPOTrainer], {"optimizers": (SGD([torch.zeros(1)]), None)}, ValueError, "`optimizers` was given"),
            (BOTH, {"train_dataset": TOKENIZED}, ValueError, "`train_dataset` is tokenized: it has a column"),
            (BOTH, {"train_dataset": TOKENIZED.to_iterable_dataset()}, ValueError, "`train_dataset` is tokenized"),
            (BOTH, {"eval_dataset": DatasetDict({"a": TOKENIZED})}, ValueError, "`eval_dataset` is tokenized"),
            (BOTH, {"rewards": EndogenousReward("quickstart", aggregate="mean")}, ValueError, "cannot be credited to"),
        ],
        ids=str,
    )
    def test_errors(self, kinds, settings, error, message, tmp_path):
        settings = dict(settings)
        rewards = settings.pop("rewards", length)
        for kind in kinds:
            with pytest.raises(error, match=message):
                trainers.make_trainer(kind, "/nowhere", tmp_path, rewards, **settings)

    @pytest.mark.parametrize("kind", BOTH)
    def test_other_config(self, kind, tmp_path):
        needed = trainers.CONFIGS[kind].__name__
        with pytest.raises(TypeError, match=f"`args` is a GRPOConfig, but {kind.__name__} needs a `{needed}`"):
            kind("/nowhere", length, GRPOConfig(str(tmp_path), **QUIET), PROMPTS)

    @pytest.mark.parametrize("kind", BOTH)
    def test_no_config(self, kind, tiny_policy_path, tmp_path, monkeypatch):
        config = trainers.CONFIGS[kind]
        fields = [("use_cpu", bool, True), ("bf16", Any, False)]
        on_cpu = dataclasses.make_dataclass(config.__name__, fields, bases=(config,))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(f"{kind.__module__}.{config.__name__}", on_cpu)
        trainer = kind(tiny_policy_path, length, train_dataset=PROMPTS)
        assert trainer.args.output_dir.endswith({DenseGRPOTrainer: "-DenseGRPO", PPOTrainer: "-PPO"}[kind])

    def test_value_models_that_do_not_go_with_the_policy(self, tiny_policy_path, tiny_model_path, tmp_path):
        policy = AutoModelForCausalLM.from_pretrained(tiny_policy_path)
        for model, value_model, message in (
            (policy, policy, "is the policy itself"),
            (tiny_model_path, tiny_policy_path, "has embeddings for 19 tokens, but the policy's tokenizer has 3"),
        ):
            with pytest.raises(ValueError, match=message):
                settings = {"critic": "value_model", "value_model": value_model}
                trainers.make_trainer(PPOTrainer, model, tmp_path, length, **settings)

    def test_old_trl(self, monkeypatch):
        monkeypatch.setattr(trl, "__version__", "1.14.2")
        with pytest.raises(ImportError, match=r"need TRL 1\.15 or newer, and TRL 1\.14\.2 is installed"):
            importlib.reload(endotrl.trainers)


# The fields that TRL 1.12's `PPOConfig` adds to transformers', without adapters and the sizes that it works out itself,
# and the arguments of its `PPOTrainer`.
FIELDS = """
    exp_name num_mini_batches total_episodes local_rollout_forward_batch_size num_sample_generations response_length
    stop_token stop_token_id temperature missing_eos_penalty sft_model_path push_to_hub reward_model_path num_ppo_epochs
    whiten_rewards kl_coef kl_estimator cliprange vf_coef cliprange_value gamma lam ds3_gather_for_generation
""".split()
PARAMETERS = """
    args processing_class model ref_model reward_model train_dataset value_model data_collator eval_dataset optimizers
    callbacks peft_config
""".split()
NOW = {field.name for field in dataclasses.fields(PPOConfig)}
ACCEPTED = set(inspect.signature(PPOTrainer).parameters) | set(inspect.signature(GRPOTrainer).parameters)


class TestComingFromTrlsPPO:
    """Each of its options and arguments works here, or the error says what to use instead."""

    def test_each(self, tmp_path):
        args = PPOConfig(str(tmp_path), **QUIET)
        for name in (*PARAMETERS, "policy", "policy_model", "config", "tokenizer", "dataset"):
            assert (name in ACCEPTED) != (name in FORMER_ARGUMENTS), name
            if name in FORMER_ARGUMENTS:
                with pytest.raises(TypeError, match=re.escape(f"`{name}`: now {FORMER_ARGUMENTS[name]}.")):
                    PPOTrainer("/nowhere", **{"args": args, name: None})
        for name in FIELDS:
            assert (name in NOW) != (name in FORMER_OPTIONS), name
            if name in FORMER_OPTIONS:
                with pytest.raises(TypeError, match=re.escape(f"`{name}`: now {FORMER_OPTIONS[name]}.")):
                    PPOConfig(str(tmp_path), **QUIET, **{name: None})

    def test_several_at_once_and_pythons_own_errors(self, tmp_path):
        with pytest.raises(TypeError, match=r"has no `kl_coef`, `cliprange`, .* `beta`\. `cliprange`: now `epsilon`"):
            PPOConfig(str(tmp_path), kl_coef=0.05, gamma=1.0, cliprange=0.1)
        with pytest.raises(TypeError, match="unexpected keyword argument 'kl_coeff'"):
            PPOConfig(str(tmp_path), kl_coeff=0.05)
        with pytest.raises(TypeError, match="first argument of `PPOTrainer` is the policy"):
            PPOTrainer(PPOConfig(str(tmp_path), **QUIET), None, "/nowhere", Dataset.from_dict({"prompt": ["a"]}))

    def test_command_line(self):
        words = ["--use_cpu", "True", "--bf16", "False", "--kl_coef", "0.05"]
        with pytest.raises(ValueError, match=r"Unknown setting: kl_coef \(an option of TRL's own PPO: now `beta`\)"):
            make_parser(PPOConfig).parse_args_and_config(words)
        with pytest.raises(ValueError, match=r"Unknown setting: kl_coef") as raised:
            make_parser(DenseGRPOConfig).parse_args_and_config(words)
        assert "PPO" not in str(raised.value)
