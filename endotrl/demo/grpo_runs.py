# SPDX-License-Identifier: Apache-2.0
"""Shared by the parts of the demo: a GRPO run on any reward, and generated answers before and after."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.trainer_callback import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from ..frozen.cpu_dtype import make_head_input_contiguous
from ..rendering.ends import until_first
from ..rendering.policy import ProcessingClass, tokenizer_of
from ..rewards.endogenous import EndogenousReward
from .progress import Progress


@dataclass(frozen=True)
class Run:
    """A finished GRPO run: the trainer's log, one entry per step, and the trained policy."""

    history: list[dict[str, float]]
    seconds: float
    model: PreTrainedModel


def train_with_grpo(
    name: str,
    model: PreTrainedModel,
    processing_class: ProcessingClass,
    reward: Any,
    accuracy: Callable[..., Sequence[float | None]],
    dataset: Dataset,
    output_dir: Path,
    peft_config: Any = None,
    trainer_class: type[GRPOTrainer] = GRPOTrainer,
    config_class: type[GRPOConfig] = GRPOConfig,
    progress: Progress | None = None,
    **grpo: Any,
) -> Run:
    """
    Trains a policy with TRL's `GRPOTrainer`, or a subclass. The only rewards are `reward` (weight 1; an
    [`EndogenousReward`] made with `model=None` is attached) and, for monitoring, `accuracy` (weight 0). `name` is
    that of the folder, and is shown on the progress line, unless `progress` of a longer run is given. `grpo` are
    further arguments of the configuration.
    """
    args = config_class(
        output_dir=str(output_dir / name),
        reward_weights=[1.0, 0.0],
        temperature=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        gradient_checkpointing=False,
        **grpo,
    )
    trainer = trainer_class(
        model=model,
        reward_funcs=[reward, accuracy],
        args=args,
        train_dataset=dataset,
        processing_class=processing_class,
        peft_config=peft_config,
    )
    if isinstance(reward, EndogenousReward) and reward.is_shared:
        reward.attach(trainer)
    trainer.remove_callback(PrinterCallback)
    line = progress or Progress({name: 1.0})
    trainer.add_callback(line)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    if progress is None:
        line.close()
    history = [entry for entry in trainer.state.log_history if "reward" in entry]
    return Run(history, seconds, trainer.accelerator.unwrap_model(trainer.model).eval())


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel,
    processing_class: ProcessingClass,
    prompts: Sequence[str] | Sequence[list[dict[str, Any]]],
    max_new_tokens: int,
    greedy: bool = False,
    seed: int = 0,
    batch_size: int = 128,
    temperature: float = 1.0,
) -> tuple[list[str], list[list[int]]]:
    """
    Generates one answer per prompt: the most probable token at every step (`greedy`), or sampled from the whole
    distribution at `temperature`. Returns the texts, and the token ids with EOS where it was generated.
    """
    torch.manual_seed(seed)
    model.eval()
    sampling: dict[str, Any] = {"do_sample": not greedy}
    if not greedy:
        sampling |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    answers: list[list[int]] = []
    tokenizer = tokenizer_of(processing_class)
    tokenizer.padding_side = "left"  # as an argument, chat templates would take it for one of their own
    batching: dict[str, Any] = {"padding": True, "return_tensors": "pt"}
    encode: Callable[..., Any] = tokenizer
    if not isinstance(prompts[0], str):
        encode = processing_class.apply_chat_template
        batching |= {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    sampling |= {"max_new_tokens": max_new_tokens, "pad_token_id": tokenizer.pad_token_id}
    for start in range(0, len(prompts), batch_size):
        batch = encode(list(prompts[start : start + batch_size]), **batching)
        output = model.generate(**batch, **sampling)
        rows = output[:, batch["input_ids"].shape[1] :].tolist()
        answers += [until_first(row, [tokenizer.eos_token_id]) for row in rows]
    return tokenizer.batch_decode(answers, skip_special_tokens=True), answers


def load_model(path: str | Path, dtype: str = "float32") -> PreTrainedModel:
    """Loads a causal language model for fast generation on a CPU: see [`make_head_input_contiguous`]."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    make_head_input_contiguous(model)
    return model
