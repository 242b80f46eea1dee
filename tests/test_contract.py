# SPDX-License-Identifier: Apache-2.0
"""
What endotrl relies on in TRL, transformers and peft, name by name: signatures, fields and attributes, so that a change
upstream fails here first. What they compute is tested where we use it.
"""

import dataclasses
import inspect
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import CodeType, MethodType
from typing import Any, get_type_hints

import peft
import pytest
import torch
import transformers.integrations.deepspeed
import trl.chat_template_utils
import trl.trainer.utils
from accelerate.hooks import AlignDevicesHook
from datasets import Dataset
from packaging.requirements import Requirement
from packaging.version import Version
from transformers import AutoModelForCausalLM, PretrainedConfig, Trainer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from trl.experimental.utils import get_reward
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import get_callable_name, get_config_model_id, shuffle_sequence_dict, split_tensor_dict


HAS_OURS = Version(version("trl")) >= Version("1.15")
ours_only = pytest.mark.skipif(not HAS_OURS, reason="The trainers of endotrl need TRL 1.15.")
PASS = "self model input_ids attention_mask logits_to_keep batch_size ..."


def signatures() -> Iterator[tuple[Callable[..., Any], str]]:
    """Functions and their parameters; "..." stands for any more."""
    for trainer in (GRPOTrainer, RLOOTrainer):
        # Recorders stand in for the reward functions while they run, and the monitor behind both.
        yield trainer._calculate_rewards, "self inputs prompts completions completion_ids_list"
        yield trainer._generate_and_score_completions, "self inputs"
        # What rewards log, the questions that are held out, and passes that are recorded
        yield trainer._log_completion_extra, "self column values"
        yield trainer._log_metric, "self name value"
        yield trainer._generate, "self prompts"
        yield trainer._get_per_token_logps_and_entropies, PASS
    method = OnlineDPOTrainer._calculate_rewards_from_functions
    yield method, "self prompts completions completion_ids_list reward_kwargs"
    # A swapped-in template is taken over for completions of several messages, too.
    yield trl.chat_template_utils.get_training_chat_template, "processing_class ..."
    yield trl.chat_template_utils.is_chat_template_prefix_preserving, "processing_class ..."
    yield get_reward, "model query_responses pad_token_id context_length"
    if not HAS_OURS:
        return
    yield SyncRefModelCallback.on_step_end, "self args state control ..."
    yield Trainer.pop_callback, "self callback"
    yield GRPOTrainer.__init__, "self model reward_funcs args train_dataset ..."
    yield GRPOTrainer._get_train_sampler, "self dataset"  # a resumed run draws the orders of earlier epochs again
    # Checkpoints
    yield GRPOTrainer._get_output_dir, "self trial"
    yield GRPOTrainer._load_best_model, "self"
    yield GRPOTrainer._save, "self output_dir state_dict"
    yield GRPOTrainer._save_checkpoint, "self model trial"
    yield GRPOTrainer._load_from_checkpoint, "self resume_from_checkpoint model"
    yield GRPOTrainer._load_optimizer_and_scheduler, "self checkpoint"
    yield GRPOTrainer.create_optimizer, "self model"


@pytest.mark.parametrize(
    ("function", "expected"), list(signatures()), ids=lambda value: getattr(value, "__qualname__", "")
)
def test_signatures(function, expected):
    found, names = list(inspect.signature(function).parameters), expected.split()
    assert (found[: len(names) - 1] if names[-1] == "..." else found) == [name for name in names if name != "..."]


SHARED = "ref_model"
TOOLS = "tools chat_template _env_tools _multi_environment _is_vlm"
CREDIT = "reward_funcs reward_func_names reward_weights num_generations num_generations_eval scale_rewards"
CREDIT += " multi_objective_aggregation _tokenizer _metrics eos_token_ids use_vllm num_iterations beta"
NAMED: list[tuple[Callable[..., Any], str]] = [
    # Attributes that a trainer has, and who says that its reference model moves
    *((trainer.__init__, f"{SHARED} vllm_generation SyncRefModelCallback") for trainer in (GRPOTrainer, RLOOTrainer)),
    (OnlineDPOTrainer.__init__, SHARED),
    (GRPOTrainer.__init__, TOOLS),
    # What rewards are passed
    *((trainer._calculate_rewards, "log_extra log_metric trainer_state") for trainer in (GRPOTrainer, RLOOTrainer)),
    # The policy is merged for vLLM, by a method that `attach` can wrap, to give the base its weights back.
    (VLLMGeneration.sync_weights, "_iter_named_params"),
    (OnlineDPOTrainer._move_model_to_vllm, "_move_model_to_vllm_inner"),
    *(
        (method, "merge_adapter unmerge_adapter")
        for method in (VLLMGeneration._iter_named_params, OnlineDPOTrainer._move_model_to_vllm_inner)
    ),
    *([(GRPOTrainer.__init__, CREDIT), (GRPOTrainer._get_train_sampler, "RepeatSampler")] if HAS_OURS else []),
    # The table of completions
    *([(GRPOTrainer._generate_and_score_completions, "_logs advantages")] if HAS_OURS else []),
]


def names_in(code: CodeType) -> set[str]:
    names = {*code.co_names, *(constant for constant in code.co_consts if isinstance(constant, str))}
    return names.union(*(names_in(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


@pytest.mark.parametrize(("function", "names"), NAMED, ids=lambda value: getattr(value, "__qualname__", ""))
def test_names(function, names):
    assert set(names.split()) <= names_in(inspect.unwrap(function).__code__)


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (GRPOTrainer._generate_and_score_completions, "prompts prompt_ids_list completion_ids_list tool_mask_list"),
        (RLOOTrainer._generate_and_score_completions, "prompts prompt_ids_list completion_ids_list"),
        (OnlineDPOTrainer.training_step, "prompts prompt_ids prompt_mask completion_ids_list"),
    ],
)
def test_where_a_reward_finds_the_ids_of_prompts(function, names):
    code = inspect.unwrap(function).__code__
    assert set(names.split()) <= {*code.co_varnames, *code.co_cellvars}


@pytest.mark.parametrize(
    ("config", "present", "absent"),
    [
        *(
            # Changes that are open in TRL: passes without padding, which PPO's critic refuses
            # (https://github.com/huggingface/trl/pull/7087), and another key of the completions table, whose columns
            # docs/trl.md names (https://github.com/huggingface/trl/pull/6568).
            (config, "sync_ref_model chat_template_kwargs beta", "padding_free wandb_log_completions_by_step")
            for config in (GRPOConfig, RLOOConfig)
        ),
        (OnlineDPOConfig, "beta", "sync_ref_model chat_template_kwargs"),  # `attach` and the renderer must read them
        (GRPOConfig, "num_iterations num_generations" + " steps_per_generation" * HAS_OURS, ""),
        (trl.trainer.utils.FusedCausalLMOutput if HAS_OURS else GRPOConfig, "", "state_values"),
    ],
)
def test_fields(config, present, absent):
    fields = {field.name for field in dataclasses.fields(config)}
    assert set(present.split()) <= fields and not set(absent.split()) & fields


def test_installed_trl_is_in_the_supported_range():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    requirement = next(r for r in map(Requirement, project["dependencies"]) if r.name == "trl")
    assert version("trl") in requirement.specifier, (
        f"TRL {version('trl')} is outside {requirement}. If this whole file passes with it, widen the range."
    )


def test_attributes():
    class Named:
        __name__ = "mine"

        def __call__(self) -> None: ...

    assert get_callable_name(Named()) == "mine"
    assert get_config_model_id(PretrainedConfig(name_or_path="a/b")) == "a/b"
    assert callable(peft.PeftModel.disable_adapter) and callable(peft.PeftModel.get_base_model)
    assert {"execution_device", "offload"} <= inspect.signature(AlignDevicesHook.__init__).parameters.keys()
    assert "_name_or_path" in vars(PretrainedConfig())
    # Private: put back after loading a whole model while a ZeRO-3 trainer exists.
    assert hasattr(transformers.integrations.deepspeed, "_hf_deepspeed_config_weak_ref")


def test_defaults_that_the_docs_explain(tmp_path):
    args = GRPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True)
    assert (args.beta, args.scale_rewards, args.use_bias_correction_kl) == (0.0, "group", True)
    assert args.multi_objective_aggregation == "sum_then_normalize"
    rloo = RLOOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True)
    assert (rloo.beta, rloo.normalize_advantages) == (0.05, False)


@ours_only
class TestOurTrainers:
    def test_advantages_by_token(self):
        tensors = {"advantages": torch.arange(8).view(4, 2)}
        parts = split_tensor_dict(shuffle_sequence_dict(tensors), 2)
        assert sorted(row for part in parts for row in part["advantages"].tolist()) == tensors["advantages"].tolist()

    def test_sampler(self):
        sampler = trl.trainer.utils.RepeatSampler([0] * 5, mini_repeat_count=1, shuffle=True, seed=3)
        generator = torch.Generator().manual_seed(3)
        for _ in range(2):
            assert list(sampler) == torch.randperm(5, generator=generator).tolist()
        assert (sampler.shuffle, sampler.num_samples) == (True, 5)

    def test_async_functions(self):
        async def later() -> None: ...

        is_async_callable = trl.trainer.utils.is_async_callable
        assert is_async_callable(later) and not is_async_callable(len)

    def test_values_of_a_pass(self):
        # A recorder in the model's place is told what TRL made of the pass.
        hints = get_type_hints(inspect.unwrap(GRPOTrainer._get_per_token_logps_and_entropies))
        assert hints["return"] == tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]

    def test_fused_forward_belongs_to_the_model(self, tiny_policy_path):
        # `add_critic` takes it as a function of the model, so that copies of the model have their own.
        model = AutoModelForCausalLM.from_pretrained(tiny_policy_path)
        trl.trainer.utils.add_fused_lm_head(model)
        assert isinstance(model.forward, MethodType) and model.forward.__self__ is model


@ours_only
class TestOpenChanges:
    """
    Changes that are open in TRL, and touch what we touch. Each is met by the tests that are named here; when one of
    these tests fails, the change is in the installed version: try them with it, and put what they show in the place of
    the test.
    """

    def test_hook_for_gathered_advantages(self):
        # https://github.com/huggingface/trl/pull/7298. A subclass of ours that overrides it would have no effect.
        for trainer in (GRPOTrainer, RLOOTrainer):
            assert not hasattr(trainer, "_transform_advantages"), "It sees TRL's advantages, which ours replace."

    def test_importance_ratios_in_the_loss(self):
        # https://github.com/huggingface/trl/pull/5413: on the policy, vLLM's batches have no `old_per_token_logps`
        # then. Met by `test_ppo_trainer.py::TestSettings::test_batches_without_old_log_probs`.
        made = inspect.unwrap(GRPOTrainer._generate_and_score_completions).__code__.co_consts
        assert {"old_per_token_logps", "importance_sampling_ratio"} <= set(made), "Made in `_compute_loss` now?"

    def test_moving_reference_adapter(self, tiny_policy_path, tmp_path):
        # https://github.com/huggingface/trl/pull/6975. Met by `test_first_policy.py`; `EndogenousReward.attach`
        # refuses `sync_ref_model`.
        args = {"use_cpu": True, "bf16": False, "report_to": [], "beta": 0.1, "sync_ref_model": True}
        for trainer, config in ((GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)):
            with pytest.raises(NotImplementedError, match="sync_ref_model"):
                trainer(
                    tiny_policy_path,
                    reward_funcs=len,
                    args=config(str(tmp_path), **args),
                    train_dataset=Dataset.from_dict({"prompt": ["a"]}),
                    peft_config=peft.LoraConfig(target_modules=["q_proj"]),
                )
