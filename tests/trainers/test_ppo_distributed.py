# SPDX-License-Identifier: Apache-2.0
"""
Two processes agree with one, whatever the engine: DDP, DeepSpeed ZeRO-3, FSDP2. On CPUs, over gloo.

accelerate takes DeepSpeed and FSDP for accelerators only; `ppo_run.py` says how it is led past that.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from endotrl.trainers.value_head import CRITIC_FILE

from ..support.accelerate_server import torchrun


pytestmark = pytest.mark.slow

# ZeRO-2, which holds whole weights as DDP does, runs in `tests/launch/test_recipes_distributed.py`.
ENGINES: dict[str, dict[str, Any]] = {
    "DistributedDataParallel": {},
    "zero3": {
        "deepspeed": {
            **dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto"),
            "gradient_clipping": "auto",
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
        }
    },
    "fsdp2": {
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
            "state_dict_type": "FULL_STATE_DICT",
        },
    },
}
COMPARED = ("loss", "grad_norm", "reward", "kl")
COMPARED += ("ppo/value_loss", "ppo/explained_variance", "ppo/returns_std", "ppo/approx_kl")
# Step 2 of 6 is in the middle of a generation batch.
RUNS: dict[str, dict[str, Any]] = {
    "whole": {"save_strategy": "steps", "save_steps": 2},
    "resumed": {"resume": "whole/checkpoint-2"},
    "value_model": {"critic": "value_model"},
    "lora": {"lora": True},
    "moving reference": {"sync_ref_model": True, "ref_model_sync_steps": 1},
}


def launch(folder: Path, model: str, num_processes: int, engine: dict[str, Any]) -> Path:
    """All runs, one after the other, in one launch."""
    files = []
    for name, settings in RUNS.items():
        (folder / name).mkdir()
        files.append(str(folder / name / "settings.json"))
        settings = {"model": model, "output_dir": str(folder / name), "max_steps": 6, **engine, **settings}
        settings["per_device_train_batch_size"] = 8 // num_processes
        if "resume" in settings:
            settings["resume"] = str(folder / settings["resume"])
        Path(files[-1]).write_text(json.dumps(settings))
    finished = torchrun(num_processes, "tests/trainers/ppo_run.py", *files)
    assert finished.returncode == 0, finished.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def alone(tiny_policy_path, tmp_path_factory):
    return launch(tmp_path_factory.mktemp("alone"), tiny_policy_path, 1, {})


def result_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def assert_same_weights(found: Path, expected: Path, **tolerance: float) -> None:
    for file in (CRITIC_FILE, "adapter_model.safetensors" if expected.parent.name == "lora" else "model.safetensors"):
        theirs = load_file(found / file)
        for name, tensor in load_file(expected / file).items():
            torch.testing.assert_close(theirs[name], tensor, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_agree_with_one(engine, alone, tiny_policy_path, tmp_path):
    launch(tmp_path, tiny_policy_path, 2, ENGINES[engine])
    for name in RUNS:
        found, expected = result_of(tmp_path / name), result_of(alone / name)
        # What ran is what was asked for; accelerate falls back to DDP in silence.
        stage = 3 if engine == "zero3" else 0
        assert (found["zero_stage"], found["fsdp_version"]) == (stage, 2 if engine == "fsdp2" else None)
        assert found["engine"].startswith({"fsdp2": "FSDP", "zero3": "DeepSpeedEngine"}.get(engine, engine))
        for key in COMPARED:
            values = [[entry[key] for entry in result["history"] if key in entry] for result in (found, expected)]
            assert values[1], key
            assert values[0] == pytest.approx(values[1], rel=1e-3, abs=1e-4), (name, key)
        assert_same_weights(tmp_path / name / "final", alone / name / "final", atol=2e-4, rtol=1e-3)
    # A checkpoint holds what is left of the generation batch, for each process,
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    names = {path.name for path in checkpoint.glob("rollout_*")}
    assert names == {"rollout_state.json", "rollout_0.pt", "rollout_1.pt"}
    # so that a resumed run is the uninterrupted one,
    assert_same_weights(tmp_path / "resumed" / "final", tmp_path / "whole" / "final", atol=1e-6, rtol=0)
    # and what is saved at the end is a plain model.
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "final", output_loading_info=True)
    assert not any(info.values()), info
