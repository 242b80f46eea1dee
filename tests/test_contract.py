# SPDX-License-Identifier: Apache-2.0
"""
What endotrl relies on in TRL, transformers and peft, name by name: signatures, fields, attributes and calls, so that a
change upstream fails here first, and says what it changes for us. What they compute is tested where we use it.
"""

import ast
import dataclasses
import inspect
import re
import textwrap
import tomllib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import MethodType
from typing import Any, get_type_hints

import accelerate.hooks
import peft
import pytest
import torch
import transformers.integrations.deepspeed
import trl.chat_template_utils
import trl.data_utils
import trl.scripts.grpo
import trl.trainer.utils
from datasets import Dataset
from packaging.requirements import Requirement
from packaging.version import Version
from transformers import AutoModelForCausalLM, PretrainedConfig, Trainer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from trl.experimental.utils import get_reward
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import (
    get_callable_name,
    get_config_model_id,
    shuffle_sequence_dict,
    split_tensor_dict,
)


GROUP_TRAINERS = [GRPOTrainer, RLOOTrainer]
TRAINERS = [*GROUP_TRAINERS, OnlineDPOTrainer]
# Where a trainer calls its reward functions.
CALLER = {
    GRPOTrainer: "_calculate_rewards",
    RLOOTrainer: "_calculate_rewards",
    OnlineDPOTrainer: "_calculate_rewards_from_functions",
}


def tree_of(function: Callable[..., Any]) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(function)))


def calls_of(function: Callable[..., Any], name: str) -> list[ast.Call]:
    """Calls of `name(...)` or `something.name(...)` in the source of a function."""
    calls = [node for node in ast.walk(tree_of(function)) if isinstance(node, ast.Call)]
    return [c for c in calls if name in (getattr(c.func, "id", None), getattr(c.func, "attr", None))]


def keywords(call: ast.Call) -> dict[str, str]:
    """Keyword arguments of a call, as written. `**kwargs` has the key "**"."""
    return {keyword.arg or "**": ast.unparse(keyword.value) for keyword in call.keywords}


def assigned(function: Callable[..., Any]) -> set[str]:
    """What a function assigns to, as written: `self.ref_model`, `reward_kwargs['log_extra']`."""
    targets: set[str] = set()
    for node in ast.walk(tree_of(function)):
        if isinstance(node, ast.Assign):
            targets.update(ast.unparse(target) for target in node.targets)
    return targets


def has_field(config: type, name: str) -> bool:
    return name in {field.name for field in dataclasses.fields(config)}


def test_installed_trl_is_in_the_supported_range():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    requirement = next(r for r in map(Requirement, project["dependencies"]) if r.name == "trl")
    assert version("trl") in requirement.specifier, (
        f"TRL {version('trl')} is outside {requirement}. If this whole file passes with it, widen the range."
    )


class TestRewardFunctions:
    """[`EndogenousReward.__call__`] takes what the trainers pass."""

    @pytest.mark.parametrize("trainer", TRAINERS)
    def test_arguments(self, trainer):
        calls = calls_of(getattr(trainer, CALLER[trainer]), "reward_func")
        # One call is of classifiers, with a tokenized batch; one is of functions.
        (given,) = [keywords(call) for call in calls if keywords(call).get("**") == "reward_kwargs"]
        assert not any(call.args for call in calls), "Reward functions are now called with positional arguments."
        assert given.keys() == {"prompts", "completions", "completion_ids", "**"}, f"Called with {sorted(given)}."
        assert given["completion_ids"] == "completion_ids_list", "`completion_ids` are no longer lists of ids."

    @pytest.mark.parametrize("trainer", GROUP_TRAINERS)
    def test_loggers(self, trainer):
        targets = assigned(trainer._calculate_rewards)
        for name in ("log_extra", "log_metric", "trainer_state"):
            assert f"reward_kwargs['{name}']" in targets, f"{trainer.__name__} no longer passes `{name}` to rewards."
        assert list(inspect.signature(trainer._log_completion_extra).parameters) == ["self", "column", "values"]
        assert list(inspect.signature(trainer._log_metric).parameters) == ["self", "name", "value"]

    def test_name(self):
        class Named:
            def __init__(self) -> None:
                self.__name__ = "mine"

            def __call__(self) -> None: ...

        assert get_callable_name(Named()) == "mine", "TRL no longer names a reward by its `__name__`."


class TestPrompts:
    """The renderer builds the prompt's tokens as the trainers do."""

    @pytest.mark.parametrize("trainer", GROUP_TRAINERS)
    def test_messages(self, trainer):
        for call in calls_of(trainer._tokenize_prompts, "apply_chat_template"):
            given = keywords(call)
            assert given["add_generation_prompt"] == "True"
            assert "self.chat_template_kwargs" in ast.unparse(call)
            unknown = given.keys() - {
                *("conversation", "tools", "chat_template", "add_generation_prompt", "tokenize", "return_dict", "**")
            }
            assert not unknown, f"Prompts are now rendered with {sorted(unknown)} too: the renderer must follow."


class TestPolicyPrompts:
    """
    A reward finds the trainer that calls it, and the token ids of the prompts that its policy has read: [`find_call`].
    """

    @pytest.mark.parametrize("trainer", GROUP_TRAINERS)
    def test_group_trainers(self, trainer):
        method = trainer._generate_and_score_completions
        names = {name for target in assigned(method) for name in re.findall(r"\w+", target)}
        assert {"prompts", "prompt_ids_list"} <= names, "Where are the token ids of the prompts now?"
        if trainer is GRPOTrainer:
            assert "tool_mask_list" in names, "Where is the mask of what tools and environments have written?"
        (call,) = calls_of(method, "_calculate_rewards")
        assert ast.unparse(call.args[1]) == "prompts", "Rewards are asked for other prompts than those tokenized."

    def test_online_dpo(self):
        variables = OnlineDPOTrainer.training_step.__code__.co_varnames
        assert {"prompts", "prompt_ids", "prompt_mask"} <= set(variables), "Where are the prompts' token ids now?"

    def test_tools_and_templates(self):
        targets = assigned(GRPOTrainer.__init__)
        for name in ("tools", "chat_template", "_env_tools", "_multi_environment", "_is_vlm"):
            assert any(f"self.{name}" in target for target in targets), f"`GRPOTrainer.{name}` is gone."
        # A swapped-in template is taken over for completions of several messages, too.
        for name in ("get_training_chat_template", "is_chat_template_prefix_preserving"):
            parameters = list(inspect.signature(getattr(trl.chat_template_utils, name)).parameters)
            assert parameters[0] == "processing_class"


class TestHeldOutQuestions:
    """[`HeldOut`] generates as the trainer does, in evaluation mode."""

    @pytest.mark.parametrize(("trainer", "place"), [(GRPOTrainer, 3), (RLOOTrainer, 2)])
    def test_generate(self, trainer, place):
        assert list(inspect.signature(trainer._generate).parameters) == ["self", "prompts"]
        returned = [node.value for node in ast.walk(tree_of(trainer._generate)) if isinstance(node, ast.Return)]
        (names,) = [[ast.unparse(name) for name in value.elts] for value in returned if isinstance(value, ast.Tuple)]
        assert (names[1], names[place]) == ("completion_ids", "completions"), names

    @pytest.mark.parametrize("trainer", GROUP_TRAINERS)
    def test_metrics_of_an_evaluation_are_apart(self, trainer):
        source = inspect.getsource(trainer._generate)
        assert 'mode = "train" if self.model.training else "eval"' in source
        assert re.search(r'if mode == "train":\n\s+self.state.num_input_tokens_seen \+=', source)


class TestSharing:
    """[`EndogenousReward.attach`] finds the trainer's frozen weights."""

    @pytest.mark.parametrize("trainer", TRAINERS)
    def test_attributes(self, trainer):
        assert "self.ref_model" in assigned(trainer.__init__)

    @pytest.mark.parametrize("config", [GRPOConfig, RLOOConfig])
    def test_settings(self, config):
        for name in ("sync_ref_model", "chat_template_kwargs", "beta"):
            assert has_field(config, name), f"`{config.__name__}.{name}` is gone."

    def test_online_dpo_cannot_sync(self):
        assert not has_field(OnlineDPOConfig, "sync_ref_model"), "`share_with` must look at it now."
        assert not has_field(OnlineDPOConfig, "chat_template_kwargs"), (
            "Is it rendered with? `PromptSettings` takes it over."
        )

    @pytest.mark.parametrize("trainer", GROUP_TRAINERS)
    def test_reference_is_loaded_by_name(self, trainer):
        # So it is the base model, even if the policy was given as a trained instance. `attach` compares weights.
        loads = [ast.unparse(call) for call in calls_of(trainer.__init__, "create_model_from_path")]
        assert any("get_config_model_id(self.model.config)" in load for load in loads)

    @pytest.mark.parametrize("trainer", GROUP_TRAINERS)
    def test_continued_adapter_is_called_ref(self, trainer):
        assert any(ast.unparse(call.args[0]) == "'ref'" for call in calls_of(trainer.__init__, "add_adapter"))

    def test_peft(self):
        for name in ("disable_adapter", "get_base_model"):
            assert callable(getattr(peft.PeftModel, name))
        # What an adapter is put around, by which the base model is told from it.

    def test_the_policy_is_merged_for_vllm(self):
        # By a method that `attach` can wrap, to give the base its weights back.
        assert calls_of(VLLMGeneration.sync_weights, "_iter_named_params")
        assert calls_of(OnlineDPOTrainer._move_model_to_vllm, "_move_model_to_vllm_inner")
        for method in (VLLMGeneration._iter_named_params, OnlineDPOTrainer._move_model_to_vllm_inner):
            assert calls_of(method, "merge_adapter") and calls_of(method, "unmerge_adapter")
        for trainer in GROUP_TRAINERS:
            assert "self.vllm_generation" in assigned(trainer.__init__)
            # Its name says that the reference model moves.
            assert calls_of(trainer.__init__, "SyncRefModelCallback")

    def test_accelerate(self):
        hook = inspect.signature(accelerate.hooks.AlignDevicesHook.__init__).parameters
        assert {"execution_device", "offload"} <= hook.keys(), "Where do offloaded weights compute now?"

    def test_transformers(self):
        assert "_name_or_path" in vars(PretrainedConfig()), "Models are no longer known by `config._name_or_path`."
        # Private: put back after loading a whole model while a ZeRO-3 trainer exists.
        assert hasattr(transformers.integrations.deepspeed, "_hf_deepspeed_config_weak_ref")


@pytest.mark.skipif(Version(version("trl")) < Version("1.15"), reason="The trainers of endotrl need TRL 1.15.")
class TestTokenCredit:
    """[`DenseGRPOTrainer`] takes the rewards where TRL calculates them, and gives back advantages of shape (B, T)."""

    def test_version(self):
        assert Version(version("trl")) >= Version("1.15"), "endotrl.trainers refuses this version."

    def test_where_rewards_are_calculated(self):
        method = GRPOTrainer._calculate_rewards
        expected = ["self", "inputs", "prompts", "completions", "completion_ids_list"]
        assert list(inspect.signature(method).parameters) == expected
        # Recorders stand in for the functions while it runs.
        (call,) = calls_of(GRPOTrainer._generate_and_score_completions, "_calculate_rewards")
        assert [ast.unparse(argument) for argument in call.args] == expected[1:]

    def test_batch(self):
        method = GRPOTrainer._generate_and_score_completions
        assert list(inspect.signature(method).parameters) == ["self", "inputs"]

    def test_advantages_by_token(self):
        tensors = {"advantages": torch.arange(8).view(4, 2)}
        parts = split_tensor_dict(shuffle_sequence_dict(tensors), 2)
        assert sorted(row for part in parts for row in part["advantages"].tolist()) == tensors["advantages"].tolist()

    def test_attributes(self):
        targets = assigned(GRPOTrainer.__init__)
        for name in (
            *("reward_funcs", "reward_func_names", "reward_weights", "num_generations", "num_generations_eval"),
            *("scale_rewards", "multi_objective_aggregation", "_tokenizer", "_metrics"),
        ):
            assert f"self.{name}" in targets, f"`GRPOTrainer.{name}` is gone."

    def test_constructors(self):
        from endotrl import DenseGRPOTrainer, PPOTrainer

        for trainer in (GRPOTrainer, DenseGRPOTrainer, PPOTrainer):
            parameters = list(inspect.signature(trainer.__init__).parameters)[:5]
            assert parameters == ["self", "model", "reward_funcs", "args", "train_dataset"], trainer

    def test_sampler(self):
        # A resumed run draws the orders of earlier epochs again.
        assert calls_of(GRPOTrainer._get_train_sampler, "RepeatSampler")
        assert list(inspect.signature(GRPOTrainer._get_train_sampler).parameters) == ["self", "dataset"]
        sampler = trl.trainer.utils.RepeatSampler([0] * 5, mini_repeat_count=1, shuffle=True, seed=3)
        generator = torch.Generator().manual_seed(3)
        for _ in range(2):
            assert list(sampler) == torch.randperm(5, generator=generator).tolist(), (
                "An epoch's order is drawn otherwise."
            )
        assert (sampler.shuffle, sampler.num_samples) == (True, 5)

    def test_helpers(self):
        async def later() -> None: ...

        is_async_callable = trl.trainer.utils.is_async_callable
        assert is_async_callable(later) and not is_async_callable(len)
        assert get_config_model_id(PretrainedConfig(name_or_path="a/b")) == "a/b"


class TestRewardModel:
    """[`RewardModelAdapter`] is called by TRL's `get_reward`, and reads its arguments there."""

    def test_get_reward(self):
        given = list(inspect.signature(get_reward).parameters)
        assert given == ["model", "query_responses", "pad_token_id", "context_length"]


@pytest.mark.skipif(Version(version("trl")) < Version("1.15"), reason="The trainers of endotrl need TRL 1.15.")
class TestPPO:
    """[`PPOTrainer`] and its critic inside the policy's forward pass."""

    def test_one_generation(self):
        for name in ("beta", "num_iterations", "num_generations", "steps_per_generation", "sync_ref_model"):
            assert has_field(GRPOConfig, name), f"`GRPOConfig.{name}` is gone."

    def test_loss_calls_the_model_once(self):
        # So that a recorder can take its place, and values come from the same forward pass.
        uses = [n for n in ast.walk(tree_of(GRPOTrainer._compute_loss)) if isinstance(n, ast.Name) and n.id == "model"]
        (call,) = calls_of(GRPOTrainer._compute_loss, "_get_per_token_logps_and_entropies")
        assert len(uses) == 1 and ast.unparse(call.args[0]) == "model", "The loss uses `model` for something else too."
        method = GRPOTrainer._get_per_token_logps_and_entropies
        (call,) = calls_of(method, "model")
        assert ast.unparse(call) == "model(**model_inputs, labels=labels, fused_lm_head=True)"
        first = ["self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"]
        assert list(inspect.signature(method).parameters)[:6] == first

    def test_fused_forward(self):
        fields = {field.name for field in dataclasses.fields(trl.trainer.utils.FusedCausalLMOutput)}
        assert {"log_probs", "entropy", "aux_loss"} <= fields and "state_values" not in fields

    def test_attributes(self):
        targets = assigned(GRPOTrainer.__init__)
        for name in ("eos_token_ids", "use_vllm", "num_iterations", "beta"):
            assert f"self.{name}" in targets, f"`GRPOTrainer.{name}` is gone."

    def test_checkpoints(self):
        for name, parameters in {
            "_get_output_dir": ["self", "trial"],
            "_load_best_model": ["self"],
            "_save": ["self", "output_dir", "state_dict"],
            "_save_checkpoint": ["self", "model", "trial"],
            "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
            "_load_optimizer_and_scheduler": ["self", "checkpoint"],
            "create_optimizer": ["self", "model"],
        }.items():
            assert list(inspect.signature(getattr(GRPOTrainer, name)).parameters) == parameters
        # TRL restores its own state in the same place.

    def test_values_of_a_pass(self):
        # A recorder in the model's place is told what TRL made of the pass, and for which rows.
        method = GRPOTrainer._get_per_token_logps_and_entropies
        assert list(inspect.signature(method).parameters)[1:4] == ["model", "input_ids", "attention_mask"]
        assert (
            get_type_hints(inspect.unwrap(method))["return"]
            == tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
        )

    def test_synchronised_reference(self):
        # `SyncPolicyOnly` stands around this callback.
        assert "on_step_end" in vars(SyncRefModelCallback), "Where is the reference model synchronised now?"
        assert list(inspect.signature(Trainer.pop_callback).parameters) == ["self", "callback"]

    def test_fused_forward_belongs_to_the_model(self, tiny_policy_path):
        # `add_critic` takes it as a function of the model, so that copies of the model have their own.
        model = AutoModelForCausalLM.from_pretrained(tiny_policy_path)
        trl.trainer.utils.add_fused_lm_head(model)
        assert isinstance(model.forward, MethodType) and model.forward.__self__ is model


@pytest.mark.skipif(Version(version("trl")) < Version("1.15"), reason="The trainers of endotrl need TRL 1.15.")
class TestOpenChanges:
    """
    Changes that are open in TRL, and touch what we touch. Each is met by the tests that are named here; when one of
    these tests fails, the change is in the installed version: try them with it, and put what they show in the place of
    the test.
    """

    def test_hook_for_gathered_advantages(self):
        # https://github.com/huggingface/trl/pull/7298. A subclass of ours that overrides it would have no effect.
        for trainer in GROUP_TRAINERS:
            assert not hasattr(trainer, "_transform_advantages"), "It sees TRL's advantages, which ours replace."

    def test_padding_free_passes(self):
        # https://github.com/huggingface/trl/pull/7087. PPO's critic refuses them.
        for config in (GRPOConfig, RLOOConfig):
            assert not has_field(config, "padding_free"), (
                "Who reads the model's outputs of a pass must know packed rows."
            )

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

    def test_key_of_the_completions_table(self):
        # https://github.com/huggingface/trl/pull/6568. Nothing of ours reads the table; docs/trl.md names its columns.
        for config in (GRPOConfig, RLOOConfig):
            assert not has_field(config, "wandb_log_completions_by_step"), (
                "The table can have another key: say so in docs."
            )


class TestWhatTheDocsSay:
    """Defaults and formulas of TRL that docs/trl.md explains."""

    def test_defaults(self, tmp_path):
        args = GRPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True)
        assert (args.beta, args.scale_rewards, args.use_bias_correction_kl) == (0.0, "group", True)
        assert args.multi_objective_aggregation == "sum_then_normalize"
        rloo = RLOOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True)
        assert (rloo.beta, rloo.normalize_advantages) == (0.05, False)


class TestCollapseMonitor:
    """What [`CollapseMonitor`] stands behind, reads and sets."""

    @pytest.mark.parametrize("trainer", GROUP_TRAINERS)
    def test_methods_of_group_trainers(self, trainer):
        parameters = list(inspect.signature(trainer._calculate_rewards).parameters)
        assert parameters == ["self", "inputs", "prompts", "completions", "completion_ids_list"]
        assert list(inspect.signature(trainer._generate_and_score_completions).parameters) == ["self", "inputs"]
        assert calls_of(trainer._generate_and_score_completions, "_calculate_rewards")

    @pytest.mark.parametrize("trainer", GROUP_TRAINERS)
    def test_log_probabilities(self, trainer):
        first = ["self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"]
        assert list(inspect.signature(trainer._get_per_token_logps_and_entropies).parameters)[:6] == first

    def test_methods_of_online_dpo(self):
        parameters = list(inspect.signature(OnlineDPOTrainer._calculate_rewards_from_functions).parameters)
        assert parameters == ["self", "prompts", "completions", "completion_ids_list", "reward_kwargs"]

    def test_the_log_is_kept_before_callbacks_see_it(self):
        source = inspect.getsource(Trainer.log)
        assert source.index("log_history.append") < source.index("callback_handler.on_log")
