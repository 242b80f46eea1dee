# SPDX-License-Identifier: Apache-2.0
"""Plain `trl grpo --config file.yaml`, as a user types it: the reward by its dotted path, its settings from `env:`."""

import json
import os

import pytest
import yaml

from ..support.accelerate_server import trl


@pytest.mark.slow
def test_trl_grpo(tiny_policy_path, tmp_path, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    prompts = ["a b", "c", "d e f", "g"] * 4
    rows = [json.dumps({"prompt": [{"role": "user", "content": prompt}]}) for prompt in prompts]
    (data / "train.jsonl").write_text("\n".join(rows))
    config = {
        "model_name_or_path": tiny_policy_path,
        "dataset_name": str(data),
        "reward_funcs": ["endotrl.rewards.endogenous_reward"],
        # ENDOTRL_CACHE is of the quickstart model, and stands in the environment of whoever has moved its folder.
        "env": {"ENDOTRL_MODEL": tiny_policy_path, "ENDOTRL_AGGREGATE": "mean", "ENDOTRL_CACHE": str(tmp_path)},
        "output_dir": str(tmp_path / "output"),
        "beta": 0.05,
        "scale_rewards": "none",
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 8,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
    }
    config_file = tmp_path / "grpo.yaml"
    config_file.write_text(yaml.safe_dump(config))
    for key in [key for key in os.environ if key.startswith("ENDOTRL_")]:
        monkeypatch.delenv(key)
    run = trl("grpo", "--config", str(config_file), ACCELERATE_USE_CPU="true")
    assert run.returncode == 0, run.stderr[-4000:]
    state = json.loads((tmp_path / "output" / "checkpoint-2" / "trainer_state.json").read_text())
    steps = [entry for entry in state["log_history"] if "rewards/endogenous_reward/mean" in entry]
    assert [entry["step"] for entry in steps] == [1, 2]
    for entry in steps:
        # The mean of a log-probability per token, in nats, of a model with 19 words.
        assert -6 < entry["rewards/endogenous_reward/mean"] < 0
        # With ENDOTRL_AGGREGATE=mean, the reward is the reward per token.
        assert entry["rewards/endogenous_reward/mean"] == pytest.approx(entry["endogenous_reward/reward_per_token"])
        assert 0 < entry["endogenous_reward/entropy"] < 3
