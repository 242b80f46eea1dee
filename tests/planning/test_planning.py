# SPDX-License-Identifier: Apache-2.0
"""Plans against DeepSpeed's own estimators, against what small runs hold, and against what every plan must satisfy."""

import functools
import importlib
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3nTextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
)

from endotrl.commands.main import main
from endotrl.commands.plan import advice, read_recipe
from endotrl.planning.memory import (
    ENGINES,
    GIB,
    FrozenModel,
    Hardware,
    ModelSize,
    Plan,
    Workload,
    activation_numbers,
    model_size,
    plan_memory,
    plan_time,
)


RECIPES = Path(__file__).parents[2] / "recipes"
GRPO = str(RECIPES / "qwen2.5-math-7b" / "grpo.yaml")
WORK = Workload(micro_batch=4, generation_batch=32, prompt_tokens=512, completion_tokens=512)
# Sizes of Llama 2 7B, which is LlamaConfig's default.
SEVEN_B = LlamaConfig()


# Qwen2.5-VL-3B's
TEXT = {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16}
TEXT |= {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True}
VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048}
VL_3B = Qwen2_5_VLConfig(
    text_config={**TEXT, "max_position_embeddings": 128000}, vision_config=VISION, tie_word_embeddings=True
)


@pytest.fixture(scope="module")
def seven_b():
    return model_size(SEVEN_B)


def small_config(**changes: Any) -> PretrainedConfig:
    sizes = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4}
    return LlamaConfig(vocab_size=512, num_key_value_heads=2, **{**sizes, **changes})


class TestSizes:
    def test_against_a_model_with_weights(self):
        config = small_config()
        model = LlamaForCausalLM(config)
        size = model_size(config)
        assert size.parameters == size.trainable == model.num_parameters()
        assert size.largest_layer == 512 * 128  # the embedding
        assert size.block == sum(p.numel() for p in model.model.layers[0].parameters())
        assert (size.layers, size.hidden, size.intermediate, size.key_value) == (4, 128, 352, 64)

    def test_tied_weights_count_once(self):
        tied, untied = (model_size(small_config(tie_word_embeddings=tie)) for tie in (True, False))
        assert untied.parameters - tied.parameters == 512 * 128
        assert model_size(small_config(tie_word_embeddings=False), head=False).parameters == tied.parameters

    def test_a_vision_tower_is_counted(self):
        """The model card: 3.75 billion parameters, 0.67 of them in the tower."""
        whole, text = (model_size(config).parameters for config in (VL_3B, Qwen2Config(**TEXT)))
        assert whole == pytest.approx(3.75e9, rel=0.01) and whole - text == pytest.approx(0.67e9, rel=0.01)

    def test_adapter(self):
        config = small_config()
        size = model_size(config, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
        # A of (8, in) and B of (out, 8) for a projection of 128 to 128 and one of 128 to 64, in 4 blocks.
        assert size.trainable == 4 * (8 * (128 + 128) + 8 * (128 + 64))
        assert size.parameters == model_size(config).parameters + size.trainable


# What differs in how its sizes are written: names of their own, one number a layer, no heads, sizes in parts.
FAMILIES = (
    *("bloom", "dbrx", "deepseek_v3", "falcon", "falcon_mamba", "gemma3", "gemma3n_text", "gpt2", "gpt_oss", "jamba"),
    *("mamba", "mpt", "opt", "recurrent_gemma", "rwkv"),
)


class TestFamilies:
    @pytest.mark.parametrize("kind", FAMILIES)
    def test_planned_or_refused(self, kind):
        try:
            size = model_size(CONFIG_MAPPING[kind]())
        except ValueError as error:
            assert "transformers cannot build" in str(error) and "\n" not in str(error)
            return
        with torch.device("meta"):
            expected = sum(p.numel() for p in _reference(CONFIG_MAPPING[kind]()).parameters())
        assert size.parameters == size.trainable == expected
        assert all(isinstance(value, int) for value in vars(size).values())
        for engine in ENGINES:
            plan = plan_memory(size, WORK, Hardware(2, 24 * GIB), engine)
            assert math.isfinite(plan.total) and plan.total > size.block
        assert size.key_value == 0 or kind not in ("mamba", "falcon_mamba", "rwkv")  # no cache that grows

    def test_the_largest_layer_counts(self):
        sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
        sizes |= {"vocab_size": 400}
        sizes |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 400, "laurel_rank": 4}
        sizes |= {"intermediate_size": [64, 96, 64, 64], "num_hidden_layers": 4, "altup_num_inputs": 2}
        config = Gemma3nTextConfig(**sizes, num_kv_shared_layers=1, activation_sparsity_pattern=[0.0] * 4)
        size = model_size(config)
        assert (size.layers, size.hidden, size.intermediate, size.key_value) == (4, 32, 96, 16)
        assert size.parameters == sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())

    @pytest.mark.parametrize("kind", ["clip", "t5", "resnet", "whisper"])
    def test_no_language_model(self, kind):
        with pytest.raises(ValueError, match="transformers cannot build|must be of a causal language model"):
            model_size(CONFIG_MAPPING[kind](is_encoder_decoder=kind in ("t5", "whisper")))


def _reference(config: PretrainedConfig) -> torch.nn.Module:
    try:
        return AutoModelForCausalLM.from_config(config)
    except ValueError:
        return AutoModelForImageTextToText.from_config(config)


def model_states(plan: Plan) -> float:
    return plan.weights + plan.gradients + plan.optimizer + plan.gathered_weights


class TestAgainstDeepSpeed:
    @pytest.mark.parametrize("gpus", [1, 2, 8, 64])
    def test_model_states(self, gpus: int, seven_b: ModelSize) -> None:
        # Named like the functions that DeepSpeed re-exports, which hide the modules from `import ... as`.
        stage2 = importlib.import_module("deepspeed.runtime.zero.stage_1_and_2")
        stage3 = importlib.import_module("deepspeed.runtime.zero.stage3")
        hardware = Hardware(gpus, 80 * GIB)

        def ours(engine: Any) -> float:
            return model_states(plan_memory(seven_b, WORK, hardware, engine))

        _, zero2 = stage2.estimate_zero2_model_states_mem_needs(seven_b.parameters, gpus, 1, cpu_offload=False)
        assert ours("zero2") == pytest.approx(zero2, rel=1e-6)
        sizes = (seven_b.parameters, seven_b.largest_layer, gpus, 1)
        _, zero3, _ = stage3.estimate_zero3_model_states_mem_needs(*sizes, cpu_offload=False)
        assert ours("zero3") == pytest.approx(zero3, rel=1e-6)
        _, offloaded, _ = stage3.estimate_zero3_model_states_mem_needs(*sizes, cpu_offload=True)
        assert ours("zero3_offload") == pytest.approx(offloaded, rel=1e-6)


class TestAgainstMeasured:
    @pytest.mark.parametrize("adapter", [False, True])
    def test_model_states(self, adapter, tmp_path):
        """One process in float32: what weights, gradients and Adam's moments hold, byte by byte."""
        config = small_config()
        lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"]) if adapter else None
        model: Any = LlamaForCausalLM(config)
        model = model if lora is None else get_peft_model(model, lora)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
        optimizer.step()
        weights = sum(p.nbytes for p in model.parameters())
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        moments = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.ndim > 0)
        work = replace(WORK, weight_bytes=4, mixed_precision=False)
        plan = plan_memory(model_size(config, lora), work, Hardware(1, GIB), "ddp")
        assert (plan.weights, plan.gradients, plan.optimizer) == (weights, gradients, moments)

    @pytest.mark.parametrize("checkpointing", [False, True])
    @pytest.mark.parametrize(("batch", "length"), [(2, 128), (4, 256)])
    def test_activations(self, checkpointing, batch, length):
        """What autograd keeps for the backward pass of the blocks of a small model in float32."""
        config = small_config(hidden_size=256, intermediate_size=704, num_hidden_layers=6)
        model = LlamaForCausalLM(config).model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        kept: dict[int, int] = {}
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        tokens = torch.randint(0, 512, (batch, length))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            hidden = model(input_ids=tokens, use_cache=False).last_hidden_state
        measured = sum(kept.values())
        size = model_size(config)
        planned = 4 * activation_numbers(size, batch * length, checkpointing)
        if checkpointing:  # before the backward pass there is no block whole yet
            planned -= 4 * (
                activation_numbers(size, batch * length, True) - size.layers * batch * length * size.hidden
            )
        assert hidden.requires_grad
        assert planned == pytest.approx(measured, rel=0.35)


class TestProperties:
    def test_sharding_saves_and_gpus_help(self, seven_b):
        work = replace(WORK, frozen=(FrozenModel(seven_b),))
        eight, sixteen = ({e: plan_memory(seven_b, work, Hardware(n, 80 * GIB), e) for e in ENGINES} for n in (8, 16))
        assert model_states(eight["zero1"]) > model_states(eight["zero2"]) > model_states(eight["zero3"])
        assert eight["zero3"].total > eight["zero3_offload"].total
        for engine in ENGINES[1:-2]:
            assert sixteen[engine].total < eight[engine].total
        assert eight["zero3"].frozen_models == eight["zero2"].frozen_models / 8  # split as the policy is
        kinds = ({"sharded": False}, {"sharded": False, "only_where_split": True}, {"offloaded": True})
        works = (replace(WORK, frozen=(FrozenModel(seven_b, **kind),)) for kind in kinds)
        whole, only_there, waiting = (
            {e: plan_memory(seven_b, work, Hardware(8, 80 * GIB), e) for e in ENGINES} for work in works
        )
        assert whole["zero3"].frozen_models == eight["zero2"].frozen_models == 2 * seven_b.parameters
        assert (only_there["zero2"].frozen_models, only_there["fsdp2"].frozen_models) == (0, 2 * seven_b.parameters)
        # It waits in CPU memory, and is whole for a call.
        assert (
            waiting["ddp"].frozen_models == 0
            and waiting["ddp"].scoring - eight["ddp"].scoring == 2 * seven_b.parameters
        )

    def test_vllm(self, seven_b):
        hardware = Hardware(8, 80 * GIB)
        resident = plan_memory(seven_b, replace(WORK, vllm_share=0.3), hardware, "zero3")
        asleep = plan_memory(seven_b, replace(WORK, vllm_share=0.3, vllm_sleeps=True), hardware, "zero3")
        assert resident.vllm == 0.3 * 80 * GIB and resident.generation == 0
        assert asleep.vllm == 0 and asleep.generation == 0.3 * 80 * GIB
        assert asleep.total < resident.total

    def test_time(self, seven_b):
        seconds = plan_time(seven_b, WORK, accumulation=8)
        # 4 * 8 sequences of 1024 tokens, 8 operations a parameter with checkpointing, 35% of 312 TFLOPS.
        assert seconds["training"] == pytest.approx(8 * 6.738e9 * 32 * 1024 / (0.35 * 312e12), rel=1e-3)
        assert plan_time(seven_b, WORK, 8, iterations=2)["training"] == 2 * seconds["training"]
        assert all(value > 0 and math.isfinite(value) for value in seconds.values())


class TestCommand:
    @pytest.fixture
    def config_only(self, tmp_path):
        """A folder with a 7B model's config, and no weights."""
        SEVEN_B.save_pretrained(tmp_path / "seven-b")
        return str(tmp_path / "seven-b")

    @pytest.mark.parametrize(
        ("recipe", "engine"),
        [
            *((f"qwen2.5-math-7b/{kind}", "zero3") for kind in ("ppo", "grpo")),
            ("qwen2.5-7b-instruct/grpo", "zero3"),
            *((f"llama-3.1-8b/{kind}", "zero3") for kind in ("sentence_reward", "ppo")),
            ("qwen2.5-vl-3b/grpo", "zero2"),
        ],
    )
    def test_recipes_fit_on_what_their_readme_says(self, recipe, engine, config_only, tmp_path, capsys):
        path, model = str(RECIPES / f"{recipe}.yaml"), config_only
        if "vl" in recipe:
            VL_3B.save_pretrained(tmp_path / "vl-3b")
            model = str(tmp_path / "vl-3b")
            read = read_recipe(path, None, [], model, 512)
            # Only projections of the language model: A and B of rank 64 for q, k, v and o of 36 blocks.
            pairs = [(2048, 2048), (2048, 256), (2048, 256), (2048, 2048)]
            assert read.size.trainable == 36 * sum(64 * (a + b) for a, b in pairs)
            assert read.work.frozen == ()  # the policy without its adapter
        assert main(["plan", path, "--gpus", "8", "--gpu-memory", "80", "--model", model]) == 0
        printed = capsys.readouterr().out
        assert "It fits with" in printed and f"{engine}.yaml" in printed
        assert "`attach`" not in printed or "sentence_reward" not in recipe  # which has no reward

    def test_what_to_change(self, config_only, capsys):
        main(["plan", GRPO, "--gpus", "1", "--gpu-memory", "26", "--model", config_only])
        printed = capsys.readouterr().out
        assert "It does not fit. It would fit with:" in printed
        assert "--use_peft true" in printed

    def test_an_adapter_of_a_reward_model(self, config_only):
        path, peft = str(RECIPES / "llama-3.1-8b" / "sentence_reward.yaml"), ["--use_peft", "true"]
        peft += ["--lora_target_modules", "all-linear"]
        default, told = (
            read_recipe(path, None, [*peft, *task], config_only, 512)
            for task in ((), ("--lora_task_type", "TOKEN_CLS"))
        )
        assert default.size == told.size and default.uses_peft

    def test_what_the_recipe_says_is_read(self, config_only):
        recipe = read_recipe(GRPO, None, ["--per_device_train_batch_size", "2"], config_only, 512)
        work = recipe.work
        assert (work.micro_batch, work.generation_batch) == (2, 32)
        assert (work.prompt_tokens, work.completion_tokens) == (1024, 1024)
        assert work.gradient_checkpointing and work.mixed_precision and work.vllm_share == 0.3
        assert work.frozen == (FrozenModel(recipe.size),)  # the reference model, which the reward reads too

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            # The reward reads the reference model, or has none to read; a reference model that moves is no frozen one.
            ("", {"reference, read"}),
            ("--beta 0", {"copy"}),
            ("--sync_ref_model True", {"reference", "copy"}),
            # Another model is a copy beside the reference model.
            ("--reward_model {model}", {"reference", "copy"}),
            ("--reward_model {model} --reward_offload True", {"reference", "waiting copy"}),
            ("--reward_model http://host:8000/v1", {"reference"}),
            ("--reward_shard False", {"reference, read", "whole copy where split"}),
            # With an adapter, the policy without it.
            ("--use_peft True --lora_target_modules all-linear", set()),
            ("--use_peft True --lora_target_modules all-linear --reward_model {model}", {"copy"}),
            # A sentence reward model is whole everywhere, and is not the reference model.
            ("--reward sentence --reward_sentence_model nowhere", {"reference", "whole"}),
            ("--reward random", {"reference"}),
            ("--reward random --beta 0", set()),
        ],
    )
    def test_frozen_models(self, settings, expected, tmp_path):
        small_config().save_pretrained(tmp_path)
        recipe = read_recipe(GRPO, None, settings.format(model=tmp_path).split(), str(tmp_path), 512)
        size = model_size(small_config())
        kinds = {
            "reference, read": FrozenModel(size),
            "reference": FrozenModel(size, gathered=False),
            "copy": FrozenModel(size),
            "waiting copy": FrozenModel(size, sharded=False, offloaded=True),
            "whole copy where split": FrozenModel(size, sharded=False, only_where_split=True),
            "whole": FrozenModel(size, sharded=False),
        }
        assert set(recipe.work.frozen) == {kinds[name] for name in expected}
        assert len(recipe.work.frozen) == len(expected)

    @pytest.mark.parametrize("name", ["qwen2.5-math-7b/grpo", "qwen2.5-math-7b/ppo", "llama-3.1-8b/sentence_reward"])
    def test_advice_that_is_followed_fits(self, name, tmp_path):
        LlamaConfig(num_hidden_layers=4).save_pretrained(tmp_path)
        path, hardware = str(RECIPES / f"{name}.yaml"), Hardware(1, (6 if "sentence" in name else 14) * GIB)
        without = " --gradient_checkpointing False" + " --use_vllm False" * ("sentence" not in name)

        read = functools.partial(read_recipe, path, None, without.split(), str(tmp_path), 512)
        recipe = read()
        changes = advice(recipe, read, hardware)
        assert any("--use_peft" in words for words, _ in changes)
        for words, plan in changes:
            followed = read(changes=words)
            assert plan.total <= hardware.gpu_memory, words
            # Only memory: it is the same training.
            assert followed.work.generation_batch == recipe.work.generation_batch
            arguments = [r.training_args for r in (followed, recipe)]
            batches = [a.per_device_train_batch_size * a.gradient_accumulation_steps for a in arguments]
            assert batches[0] == batches[1]

    def test_time_of_all_epochs(self, config_only, tmp_path, monkeypatch, capsys):
        """Rows of a file are counted; of 2 epochs over 3200 prompts, each group is 8 of the sequences of a step."""
        monkeypatch.setenv("COLUMNS", "80")
        (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1="}\n' * 3200)
        words = [f"dataset_name={tmp_path / 'rows.jsonl'}", "num_train_epochs=2", "num_generations=8"]
        assert main(["plan", GRPO, "--model", config_only, "--set", *words]) == 0
        shown = capsys.readouterr().out
        assert max(map(len, shown.splitlines())) <= 80
        printed = " ".join(shown.split())
        assert "; 8 GPUs of 80 GiB" in printed
        seconds, sequences = (float(n) for n in re.search(r"about ([\d.]+) s for (\d+) sequences", printed).groups())
        told = r"All epochs over 3,200 rows: about ([\d.]+) (seconds|minutes|hours)\."
        number, unit = re.search(told, printed).groups()
        told = float(number) * {"seconds": 1, "minutes": 60, "hours": 3600}[unit]
        assert told == pytest.approx(2 * 3200 * 8 / sequences * seconds, rel=0.1)
        assert "which the reward reads too (`attach`: 0 GiB more)" in printed
