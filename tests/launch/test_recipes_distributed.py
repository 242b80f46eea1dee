# SPDX-License-Identifier: Apache-2.0
"""
Recipes in two processes, as `accelerate launch` starts them with the files in `accelerate_configs/`, agree with one
process. On CPUs, over gloo.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..support.accelerate_server import accelerate
from ..support.helpers import ON_CPU, as_arguments


pytestmark = pytest.mark.slow

PROMPTS = ["a b c", "d e", "f", "g h i j", "a a", "k l", "b", "c d e f"] * 4
# Name of the launcher's file, and what runs then.
ENGINES = {"multi_gpu": "DistributedDataParallel", "fsdp2": "FSDP"}
ENGINES |= dict.fromkeys(("zero1", "zero2", "zero3"), "DeepSpeedEngine")
PPO = ["ppo", "--max_steps", "6", "--value_learning_rate", "1e-2"]
SHORT_PPO = ["ppo", "--num_iterations", "1", "--value_learning_rate", "1e-2"]  # generates at each step
RUNS: dict[str, list[str]] = {
    # The frozen model is the reference model, the policy without its adapter, and a copy.
    "shared": ["grpo", "--beta", "0.1", "--num_generations", "2"],
    "adapter": "ppo --use_peft True --lora_target_modules q_proj v_proj --lora_dropout 0 --num_iterations 1".split(),
    "own": ["grpo", "--beta", "0", "--num_generations", "2", "--credit", "outcome"],
    # PPO. Step 2 of 6 is in the middle of a generation batch.
    "whole": [*PPO, "--save_strategy", "steps", "--save_steps", "2"],
    "resumed": [*PPO, "--resume_from_checkpoint", "FOLDER/whole/checkpoint-2"],
    "value_model": [*SHORT_PPO, "--critic", "value_model"],
    "moving reference": [*SHORT_PPO, "--sync_ref_model", "True", "--ref_model_sync_steps", "1"],
}
WHERE = dict.fromkeys(RUNS, "the trainer's reference model")
WHERE |= {"adapter": "the policy's frozen base (adapter disabled)"}
WHERE |= dict.fromkeys(("own", "moving reference"), "own copy of")
# Whole weights are on each process under DDP, and under ZeRO-1 and 2, whose optimizer is in shards.
RUNS_OF = {"multi_gpu": [*RUNS][:5], **dict.fromkeys(("zero1", "zero2"), [*RUNS][:3])}
RUNS_OF |= dict.fromkeys(("zero3", "fsdp2"), [name for name in RUNS if name != "own"])  # "moving reference" is one
COMPARED = ["loss", "grad_norm", "reward", "endogenous_reward/reward_per_token"]
OF_PPO = ["kl", "ppo/value_loss", "ppo/explained_variance", "ppo/returns_std", "ppo/approx_kl"]


def launch(folder: Path, model: str, launcher: str, num_processes: int) -> Path:
    """All runs, one after the other, in one launch."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in PROMPTS))
    settings = {"model_name_or_path": model, "dataset_name": prompts, "max_steps": 3, "max_completion_length": 8}
    settings |= {"per_device_train_batch_size": 8 // num_processes, "shuffle_dataset": False, "learning_rate": 1e-2}
    settings |= {"logging_steps": 1, "save_strategy": "no", "scale_rewards": "none", **ON_CPU}
    settings |= {"reward_dtype": "float32"}
    files = []
    for name in RUNS_OF.get(launcher, RUNS):
        kind, *arguments = RUNS[name]
        given = {**settings, "output_dir": folder / name}
        if kind == "ppo":
            del given["scale_rewards"]
        words = [kind, *as_arguments(given), *(word.replace("FOLDER", str(folder)) for word in arguments)]
        files.append(folder / f"{name}.json")
        files[-1].write_text(json.dumps(words))
    extensions = folder / "extensions"
    finished = accelerate(
        launcher, num_processes, "tests/support/recipe_run.py", *map(str, files), TORCH_EXTENSIONS_DIR=str(extensions)
    )
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-6000:]
    assert not extensions.exists()  # nothing was compiled
    return folder


@pytest.fixture(scope="module")
def alone(tiny_policy_path, tmp_path_factory):
    return launch(tmp_path_factory.mktemp("alone"), tiny_policy_path, "cpu", 1)


def assert_same_weights(found: Path, expected: Path, **tolerance: float) -> None:
    files = sorted(path.name for path in expected.glob("*.safetensors") if path.name != "frozen.safetensors")
    assert len(files) == (2 if RUNS[expected.name][0] == "ppo" else 1)  # a critic, too
    for file in files:
        theirs = load_file(found / file)
        for name, tensor in load_file(expected / file).items():
            torch.testing.assert_close(theirs[name], tensor, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("launcher", ENGINES)
def test_two_processes_agree_with_one(launcher, alone, tiny_policy_path, tmp_path):
    launch(tmp_path, tiny_policy_path, launcher, 2)
    for name in RUNS_OF[launcher]:
        found: dict[str, Any] = json.loads((tmp_path / name / "result.json").read_text())
        expected = json.loads((alone / name / "result.json").read_text())
        # What ran is what was asked for.
        assert found["engine"].startswith(ENGINES[launcher])
        assert (found["num_processes"], expected["num_processes"]) == (2, 1)
        stage = int(launcher[-1]) if launcher.startswith("zero") else 0
        assert (found["zero_stage"], found["fsdp_version"]) == (stage, 2 if launcher == "fsdp2" else None)
        assert WHERE[name] in found["reward"] and WHERE[name] in expected["reward"]
        sharded = WHERE[name] == "own copy of" and launcher in ("zero3", "fsdp2")
        assert (", sharded" in found["reward"]) == sharded
        for key in [*COMPARED, *(OF_PPO if RUNS[name][0] == "ppo" else [])]:
            values = [[entry[key] for entry in result["history"] if key in entry] for result in (found, expected)]
            assert values[1], key
            assert values[0] == pytest.approx(values[1], rel=1e-3, abs=1e-4), (name, key)
        frozen = load_file(tmp_path / name / "frozen.safetensors")
        for key, tensor in load_file(Path(tiny_policy_path) / "model.safetensors").items():
            assert torch.equal(frozen[key], tensor), (name, key)
        assert_same_weights(tmp_path / name, alone / name, atol=2e-4, rtol=1e-3)
    if "whole" in RUNS_OF[launcher]:
        # A checkpoint holds what is left of the generation batch, for each process,
        names = {path.name for path in (tmp_path / "whole" / "checkpoint-2").glob("rollout_*")}
        assert names == {"rollout_state.json", "rollout_0.pt", "rollout_1.pt"}
        # so that a resumed run is the uninterrupted one,
        assert_same_weights(tmp_path / "resumed", tmp_path / "whole", atol=1e-6, rtol=0)
        # and what is saved at the end is a plain model.
        _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", output_loading_info=True)
        assert not any(info.values()), info


def test_all_processes_have_the_dtype_that_the_first_measures(tiny_policy_path, tmp_path):
    script = tmp_path / "parse.py"
    script.write_text(
        "import json, os, sys\n"
        "from endotrl import DenseGRPOConfig\n"
        "from endotrl.frozen import cpu_dtype\n"
        "from endotrl.launch.arguments import make_parser\n"
        "from endotrl.launch.cpu import choose_precision\n"
        "from endotrl.runs.processes import leave\n"
        "folder, *words = sys.argv[1:]\n"
        "rank = os.environ['RANK']\n"
        "cpu_dtype.matmul_seconds = lambda: {'bfloat16': 1.0 + int(rank), 'float32': 1.5}\n"
        "parser = make_parser(DenseGRPOConfig)\n"
        "parser.settle = choose_precision\n"
        "_, args, reward, model, _ = parser.parse_args_and_config(words)\n"
        "with open(f'{folder}/{rank}.json', 'w') as file:\n"
        "    json.dump([args.bf16, model.dtype, reward.reward_dtype], file)\n"
        "leave()\n"
    )
    words = ["--model_name_or_path", tiny_policy_path, "--dtype", "auto", "--use_cpu", "True", "--report_to", "none"]
    words += ["--output_dir", str(tmp_path / "output"), "--per_device_train_batch_size", "8"]
    finished = accelerate("multi_gpu", 2, str(script), str(tmp_path), *words)
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-6000:]
    for rank in "01":
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [True, "bfloat16", "bfloat16"]


def test_the_readmes_command_for_zero3(smollm2_path, tmp_path):
    """
    The pretrained model's tokenizer and 17 of its 30 layers, narrow ones, in two processes, each with half of the
    weights, as recipes/smollm2-135m/README.md says.
    """
    narrow = {"num_hidden_layers": 17, "hidden_size": 72, "intermediate_size": 64, "head_dim": 8}
    config = AutoConfig.from_pretrained(smollm2_path, **narrow)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(smollm2_path).save_pretrained(tmp_path / "model")
    arguments = ["--output_dir", str(tmp_path / "run"), "--bf16", "false", "--dtype", "float32"]
    arguments += ["--model_name_or_path", str(tmp_path / "model"), "--save_strategy", "no"]
    arguments += ["--per_device_train_batch_size", "8", "--max_steps", "1", "--max_completion_length", "4"]
    finished = accelerate("zero3", 2, "recipes/grpo.py", "--config", "recipes/smollm2-135m/grpo.yaml", *arguments)
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-6000:]
    assert "rewards/endogenous_reward/mean" in finished.stdout
    adapter = load_file(tmp_path / "run" / "adapter_model.safetensors")
    # Layers 15 and 16 have one, whole, and it has learned something.
    assert len(adapter) == 2 * 2 * 2
    assert any(weight.abs().max() > 0 for name, weight in adapter.items() if "lora_B" in name)
