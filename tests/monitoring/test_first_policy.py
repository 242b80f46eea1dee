# SPDX-License-Identifier: Apache-2.0
"""What the present policy is compared with, where the reference of the trainer moves."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import GRPOTrainer

from endotrl.monitoring.first_policy import FirstPolicy

from ..support.trainers import length, make_trainer, rollout


@pytest.mark.parametrize("moved", [False, True])
def test_adapter_of_the_reference(moved: bool, tiny_policy_path: str, tmp_path: Path) -> None:
    """TRL keeps a copy of a trained adapter as "ref". With `sync_ref_model`, it may follow the policy."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_policy_path),
        LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    )
    trainer = make_trainer(GRPOTrainer, model, tmp_path, length, beta=0.1)
    trainer.args.sync_ref_model = moved  # which TRL 1.16 refuses for adapters
    first = FirstPolicy(trainer, None)
    output = rollout(trainer)

    def distance() -> float:
        log_probs = first.log_probs(output)
        return (log_probs[0] - log_probs[1]).abs().max().item()

    assert distance() < 1e-4
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ref." in name:
                parameter.mul_(3.0)
    output["ref_per_token_logps"] = output["ref_per_token_logps"] + 1.0  # of the moved adapter
    assert (distance() < 1e-4) == moved
