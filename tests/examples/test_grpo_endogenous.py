# SPDX-License-Identifier: Apache-2.0
"""The example in one file computes what the package and TRL compute."""

import ast
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import GRPOTrainer

from endotrl import EndogenousReward

from ..support.trainers import make_trainer


FILE = Path(__file__).parents[2] / "examples" / "grpo_endogenous.py"
BETA = 0.3


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("grpo_endogenous", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_needs_only_the_formulas() -> None:
    source = FILE.read_text(encoding="utf-8")
    imported = [node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    assert [name for name in imported if name and name.startswith("endotrl")] == ["endotrl.bellman"]
    assert not any(name and name.startswith("trl") for name in imported)
    assert len(source.splitlines()) <= 150


def test_its_step_is_that_of_trl(example: ModuleType, tiny_policy_path: str, tmp_path: Path) -> None:
    reward = EndogenousReward(tiny_policy_path)
    prompts = ["a b c", "d", "e f", "g h i j"]
    settings = {"beta": BETA, "scale_rewards": "none", "loss_type": "bnpo", "num_generations": 2, "seed": 3}
    settings |= {"max_completion_length": 6, "train_dataset": Dataset.from_dict({"prompt": prompts})}
    trainer = make_trainer(GRPOTrainer, tiny_policy_path, tmp_path, reward, **settings)
    with torch.no_grad():  # a policy that has moved away from the frozen model
        for parameter in trainer.model.parameters():
            parameter.mul_(1.1)
    trainer.model.train()
    output = trainer._generate_and_score_completions([{"prompt": p} for p in prompts for _ in range(2)])
    mask = output["completion_mask"].bool()
    lengths = mask.sum(dim=1)
    last = output["completion_ids"].gather(1, lengths[:, None] - 1)[:, 0]
    batch = example.Batch(
        ids=torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1),
        attention_mask=torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1),
        completion_mask_NT=mask,
    )
    finished = last == trainer.processing_class.eos_token_id
    assert len(set(lengths.tolist())) > 1 and finished.any() and not finished.all()

    frozen = AutoModelForCausalLM.from_pretrained(tiny_policy_path, dtype=torch.float32).eval()
    rewards_N, frozen_log_probs_NT = example.endogenous_rewards(frozen, batch)
    torch.testing.assert_close(rewards_N.tolist(), trainer._logs["rewards"]["endogenous_reward"], rtol=0, atol=1e-4)
    advantages_N = example.group_advantages(rewards_N, 2)
    torch.testing.assert_close(advantages_N, output["advantages"], rtol=0, atol=1e-4)

    trainer.current_gradient_accumulation_steps = 1
    trainer._compute_loss(trainer.model, output).backward()
    expected = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
    trainer.model.zero_grad(set_to_none=True)
    log_probs_NT = example.log_probs(example.completion_logits(trainer.model, batch), batch)
    example.grpo_loss(log_probs_NT, frozen_log_probs_NT, advantages_N, mask, BETA).backward()
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5)


def test_it_samples_whole_completions(example: ModuleType, tiny_policy_path: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_policy_path)
    policy = AutoModelForCausalLM.from_pretrained(tiny_policy_path).eval()
    torch.manual_seed(0)
    batch = example.sample(policy, tokenizer, ["a b c", "d"], num_generations=16, length=8)
    length = batch.completion_mask_NT.shape[1]
    rows = [ids[mask].tolist() for ids, mask in zip(batch.completion_ids_NT, batch.completion_mask_NT, strict=True)]
    assert all(row.index(2) == len(row) - 1 if 2 in row else len(row) == length for row in rows)  # 2 is the end
    assert any(2 in row for row in rows) and not all(2 in row for row in rows)
