# SPDX-License-Identifier: Apache-2.0
"""
pytest plugin of `studies.trl_suites`: substitutes rewards and trainers in TRL's tests, and compares rewards with an
oracle, which uses nothing of this package: token ids from the trainer, logits from transformers.
"""

import json
import os
from collections.abc import Callable
from functools import cache, wraps
from inspect import signature
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers as hf
import trl
from peft import PeftModel
from PIL import Image
from trl import import_utils
from trl.experimental.online_dpo import OnlineDPOTrainer
from trl.trainer import base_config

from endotrl import DenseGRPOConfig, DenseGRPOTrainer, EndogenousReward, PPOConfig, PPOTrainer
from studies.trl_suites import leave_out_videos


OPTIONS = json.loads(os.environ["TRL_SUITES"])
MODES: list[str] = OPTIONS["modes"]
RESULTS = Path(OPTIONS["results"])
TRAINERS = {"dense": (DenseGRPOTrainer, DenseGRPOConfig), "ppo": (PPOTrainer, PPOConfig)}
# Relative to the oracle; an attached reward reads a bfloat16 pass of the trainer, where that makes one.
TOLERANCE = 1e-2 if "attach" in MODES and "float32" not in MODES else 1e-5
PROMPTS = [f"Rule {i} is better than" for i in range(OPTIONS["rows"])]

_last: dict[str, Any] = {}  # what the trainer generated last
_distances: list[float] = []  # of the rewards of this test from the oracle


def load_dataset(path: str, name: str | None = None, split: str | None = None, streaming: bool = False) -> Any:
    """Stand-ins for the data sets of `trl-internal-testing`."""
    turns = [[{"role": "user", "content": f"{prompt} what?"}] for prompt in PROMPTS]
    columns: dict[str, Any] = {"prompt": PROMPTS if name == "standard_prompt_only" else turns}
    pictures = [Image.new("RGB", (20 + 4 * (i % 4), 28), (9 * i, 90, 200 - 9 * i)) for i in range(len(PROMPTS))]
    if path.endswith("zen-image"):
        columns["image"] = pictures
    elif path.endswith("zen-multi-image"):
        columns["images"] = [[picture, pictures[0]] for picture in pictures]
    data = datasets.Dataset.from_dict(columns)
    whole: Any = datasets.DatasetDict({"train": data, "test": data.select(range(2))})
    if streaming:
        whole = datasets.IterableDatasetDict({key: part.to_iterable_dataset() for key, part in whole.items()})
    return whole if split is None else whole[split]


def checks_of_other_versions(name: str) -> Callable[[], bool]:
    """`is_..._available` of packages that tests of another version of TRL ask for, and this one does not know."""
    if name.startswith("is_") and name.endswith("_available"):
        return lambda: False
    raise AttributeError(name)


def without_bfloat16(post_init: Callable[[Any], None]) -> Callable[[Any], None]:
    """`__post_init__` of TRL's configurations, whose default is bfloat16."""

    def in_float32(self: Any) -> None:
        self.bf16 = False
        post_init(self)

    return in_float32


def name_of(model: Any) -> str:
    """Hub id of a policy or reward model."""
    if isinstance(model, str):
        return model
    return str((model.get_base_model() if isinstance(model, PeftModel) else model).config._name_or_path)


def with_our_rewards(init: Callable[..., None]) -> Callable[..., None]:
    """`__init__` of a trainer whose rewards become endogenous ones, under the names of those that they replace."""

    @wraps(init)
    def substituted(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature(init).bind(self, *args, **kwargs)
        given = bound.arguments.get("reward_funcs")
        theirs = given if isinstance(given, list) else [] if given is None else [given]
        names = [getattr(reward, "__name__", None) or name_of(reward).split("/")[-1] for reward in theirs]
        model = None if "attach" in MODES else name_of(bound.arguments["model"])
        ours = [EndogenousReward(model, name=name) for name in names]
        if given is not None:
            bound.arguments["reward_funcs"] = ours
        init(*bound.args, **bound.kwargs)
        for reward in ours if "attach" in MODES else []:
            try:
                reward.attach(self)
            except ValueError as error:
                pytest.skip(f"not attached: {error}")

    return substituted


def remembering(generate: Callable[..., Any]) -> Callable[..., Any]:
    """`_generate` of a trainer, which notes what the policy read and wrote."""

    @wraps(generate)
    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = generate(self, *args, **kwargs)
        _last.clear()
        _last["trainer"] = self
        if isinstance(self, OnlineDPOTrainer):
            ids, kept, completion_ids, completion_kept, seen = output
            _last["prompt_ids"] = [row[mask.bool()].tolist() for row, mask in zip(ids, kept, strict=True)]
            pairs = zip(completion_ids, completion_kept, strict=True)
            _last["completion_ids"] = [row[mask.bool()].tolist() for row, mask in pairs]
            _last["seen"] = [{key: value[i : i + 1] for key, value in (seen or {}).items()} for i in range(len(ids))]
        else:
            _last["prompts"], _last["prompt_ids"], _last["completion_ids"] = args[0], output[0], output[1]
            if isinstance(self, trl.GRPOTrainer):
                _last["written"] = output[2]  # 0 for what tools wrote
        return output

    return noted


@cache
def frozen_model(name: str) -> tuple[Any, Any]:
    """The policy's first weights in float32, and the processor of one that reads images."""
    if "ConditionalGeneration" not in name:
        return hf.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval(), None
    model = hf.AutoModelForImageTextToText.from_pretrained(name, dtype=torch.float32).eval()
    return model, hf.AutoProcessor.from_pretrained(name)


@torch.no_grad()
def oracle(row: int) -> float:
    """Log-probability of what the policy wrote in one row: that row alone, from all logits, in float32."""
    trainer = _last["trainer"]
    model, processor = frozen_model(name_of(trainer.accelerator.unwrap_model(trainer.model)))
    prompt, prompt_ids = _last.get("prompts", {row: ""})[row], list(_last["prompt_ids"][row])
    completion_ids = list(_last["completion_ids"][row])
    inputs = dict(_last["seen"][row]) if "seen" in _last else {}
    if any("image" in part for turn in prompt if isinstance(turn, dict) for part in turn["content"]):
        inputs = dict(
            processor.apply_chat_template(
                [prompt], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        )
        assert inputs["input_ids"][0].tolist() == prompt_ids
        for key in {"token_type_ids", "mm_token_type_ids"} & set(inputs):
            inputs[key] = torch.cat([inputs[key], torch.zeros(1, len(completion_ids)).long()], dim=1)
    inputs["input_ids"] = torch.tensor([prompt_ids + completion_ids])
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.autocast("cpu", enabled=False):
        logits = model(**inputs, use_cache=False).logits[0, len(prompt_ids) - 1 : -1].double()
    taken = logits.log_softmax(-1).gather(1, torch.tensor(completion_ids)[:, None])[:, 0]
    written = _last.get("written")
    return float((taken if written is None else taken[torch.tensor(written[row]).bool()]).sum())


def checked(call: Callable[..., Any]) -> Callable[..., Any]:
    """A method of the reward, of whose outcomes none goes unchecked."""

    @wraps(call)
    def compared(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = call(self, *args, **kwargs)
        for given, ids in zip(kwargs["completion_ids"], _last["completion_ids"], strict=True):
            assert list(given)[: len(ids)] == list(ids)  # OnlineDPO leaves the padding
        for row, reward in enumerate(output if isinstance(output, list) else output.outcomes):
            expected = oracle(row)
            assert reward is not None, f"row {row} has no reward, and the oracle gives {expected}"
            _distances.append(abs(reward - expected) / max(1.0, abs(expected)))
            assert _distances[-1] <= TOLERANCE, f"row {row} has the reward {reward}, and the oracle gives {expected}"
        return output

    return compared


def pytest_configure() -> None:
    """Puts the stand-ins and our rewards where TRL's tests look."""
    datasets.load_dataset = load_dataset
    import_utils.__getattr__ = checks_of_other_versions
    leave_out_videos()
    if "float32" in MODES:
        base_config._BaseConfig.__post_init__ = without_bfloat16(base_config._BaseConfig.__post_init__)
    if not {"own-copy", "attach"}.isdisjoint(MODES):
        for trainer in (trl.GRPOTrainer, trl.RLOOTrainer, OnlineDPOTrainer):
            trainer.__init__ = with_our_rewards(trainer.__init__)
            trainer._generate = remembering(trainer._generate)
        for method in ("__call__", "outcome_and_token_rewards"):
            setattr(EndogenousReward, method, checked(getattr(EndogenousReward, method)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves out what was run, and puts our trainers into the modules of tests."""
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    done = {row["test"] for row in rows}
    items[:] = [item for item in items if item.nodeid not in done]
    for mode in set(MODES) & set(TRAINERS):
        for item in items:
            if hasattr(item.module, "GRPOTrainer"):
                item.module.GRPOTrainer, item.module.GRPOConfig = TRAINERS[mode]


def pytest_runtest_logstart() -> None:
    """Forgets the rewards of the test before."""
    _distances.clear()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Writes the line of a test."""
    if report.when == "call" or report.outcome != "passed":
        reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr or "")
        row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 1)}
        row |= {"rewards": len(_distances), "furthest": max(_distances, default=0.0), "reason": reason[-3000:]}
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
