# SPDX-License-Identifier: Apache-2.0
"""`PPOConfig`: one completion a prompt, what TRL's parser makes of it, and errors before a model is loaded."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from trl import GRPOConfig, TrlParser

from endotrl import PPOConfig


CPU = {"use_cpu": True, "bf16": False, "report_to": []}


def config(tmp_path: Path, **kwargs: Any) -> PPOConfig:
    return PPOConfig(output_dir=str(tmp_path), **{**CPU, **kwargs})


class TestNumGenerations:
    @pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 1), (1, 3), (7, 1), (8, 4)])
    def test_one(self, batch_size, accumulation, tmp_path):
        args = config(tmp_path, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation)
        assert type(args.num_generations) is int
        assert args.num_generations == 1
        assert args.generation_batch_size == batch_size * accumulation

    def test_one_with_evaluation(self, tmp_path):
        args = config(tmp_path, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=3)
        assert args.num_generations == 1
        with pytest.raises(ValueError, match="generations used for evaluation"):
            config(tmp_path, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=3, num_generations_eval=2)

    def test_more(self, tmp_path):
        assert config(tmp_path, num_generations=4, per_device_train_batch_size=8).num_generations == 4
        with pytest.raises(ValueError, match="must be divisible by num_generations"):
            config(tmp_path, num_generations=3, per_device_train_batch_size=8)
        with pytest.raises(ValueError, match="at least 1 completion"):
            config(tmp_path, num_generations=0)

    def test_grpo_still_refuses_one(self, tmp_path):
        with pytest.raises(ValueError, match="at least 2 generations"):
            GRPOConfig(output_dir=str(tmp_path), num_generations=1, **CPU)

    def test_replace(self, tmp_path):
        # As TRL's scripts and sweeps do; the derived batch size must be given up for that.
        args = config(tmp_path, lam=0.9)
        assert dataclasses.replace(args, gamma=0.5, generation_batch_size=None).num_generations == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma": 0.0}, "`gamma` is 0.0"),
        ({"gamma": 1.1}, "`gamma` is 1.1"),
        ({"lam": -0.1}, "`lam` is -0.1"),
        ({"lam": 1.5}, "`lam` is 1.5"),
        ({"beta": -1.0}, "`beta` is -1.0"),
        ({"beta": float("nan")}, "`beta` is nan"),
        ({"vf_coef": -0.1}, "`vf_coef` is -0.1"),
        ({"cliprange_value": 0.0}, "`cliprange_value` is 0.0"),
        ({"value_learning_rate": 0.0}, "`value_learning_rate` is 0.0"),
        ({"critic": "head"}, "`critic` is 'head', but it must be one of 'value_head', 'value_model', 'none'"),
        ({"truncation": "skip"}, "`truncation` is 'skip'"),
        ({"kl_placement": "both"}, "`kl_placement` is 'both'"),
        ({"critic": "none", "truncation": "bootstrap"}, "from the critic"),
        ({"critic": "none", "detach_value": False}, "`detach_value=False`"),
        ({"critic": "value_model", "detach_value": False}, "`detach_value=False`"),
        ({"kl_target": 0.0}, "`kl_target` is 0.0"),
        ({"kl_target": 6.0, "beta": 0.0}, "`beta` is 0"),
        ({"kl_target": 6.0, "sync_ref_model": True}, "moves that model"),
        ({"kl_horizon": 0}, "`kl_horizon` is 0"),
    ],
)
def test_errors(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **settings)


def test_trl_parser(tmp_path):
    path = tmp_path / "ppo.yaml"
    path.write_text(
        f"output_dir: {tmp_path}\nuse_cpu: true\nbf16: false\nreport_to: none\nlam: 0.9\ncritic: none\nkl_target: "
        "6.0\n"
    )
    (args,) = TrlParser((PPOConfig,)).parse_args_and_config(["--config", str(path), "--lam", "0.8"])
    assert (args.lam, args.critic, args.kl_target, args.num_generations) == (0.8, "none", 6.0, 1)


def test_every_new_parameter_is_documented():
    inherited = {field.name: field.default for field in dataclasses.fields(GRPOConfig)}
    new = [field for field in dataclasses.fields(PPOConfig) if inherited.get(field.name, ...) != field.default]
    assert len(new) == 17
    for field in new:
        assert field.metadata["help"]
        assert f"{field.name} (`" in (PPOConfig.__doc__ or ""), field.name
