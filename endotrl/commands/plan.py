# SPDX-License-Identifier: Apache-2.0
"""The command `endotrl plan`: from a recipe's YAML file to a table and advice."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from trl import DatasetMixtureConfig, GRPOConfig, ScriptArguments, get_peft_config

from ..frozen.names import load_config
from ..launch import RewardArguments, make_parser
from ..launch.data import count_rows
from ..planning.memory import (
    DECODING,
    ENGINES,
    GIB,
    SHARDING,
    TRAINING,
    Engine,
    FrozenModel,
    Hardware,
    Plan,
    Workload,
    plan_memory,
    plan_time,
)
from ..planning.sizes import ModelSize, model_size
from ..reporting import counted, say, terminal_table, working
from ..sentence import SentenceRewardTrainerConfig
from ..shipped import SCHEME, local_path
from ..trainers.dense_grpo_config import DenseGRPOConfig
from ..trainers.ppo_config import PPOConfig


@dataclass(frozen=True)
class Recipe:
    """What `endotrl plan` reads of a recipe."""

    name: str
    size: ModelSize
    full_size: ModelSize
    work: Workload
    accumulation: int  # micro-batches of an optimizer step
    micro_batches: int  # and of a generation batch
    iterations: int
    max_steps: int
    uses_peft: bool
    num_epochs: float
    data: tuple[ScriptArguments, DatasetMixtureConfig]
    frozen_with_adapter: tuple[FrozenModel, ...] = ()  # beside a policy with an adapter
    attached: bool = False  # the reward reads frozen weights that the trainer has anyway


def run(args: argparse.Namespace) -> None:
    """Runs `endotrl plan`: a plan for each engine."""
    bad = [setting for setting in args.set if setting.find("=") < 1]
    if bad:
        raise ValueError(f"--set takes settings as KEY=VALUE, such as use_peft=true, and not {bad[0]!r}.")
    path = local_path(args.recipe)
    if not Path(path).is_file():
        raise ValueError(f"There is no file {path}. `endotrl recipes` lists what {SCHEME}NAME can be.")
    overrides = [word for setting in args.set for word in f"--{setting}".split("=", 1)]
    rows = args.rows
    with working("Reading the recipe, its model's config and its number of rows"):
        recipe = read_recipe(path, args.kind, overrides, args.model, args.prompt_tokens)
        if rows is None and recipe.max_steps <= 0:
            try:
                rows = count_rows(*recipe.data)
            except ValueError as error:
                say(str(error))
    hardware = Hardware(args.gpus, args.gpu_memory * GIB)
    plans = [plan_memory(recipe.size, recipe.work, hardware, engine) for engine in ENGINES]
    _show(recipe, hardware, plans, args, rows)


def read_recipe(path: str, kind: str | None, overrides: list[str], model: str | None, prompt_tokens: int) -> Recipe:
    """Reads a recipe and its model's config."""
    configs = {"sentence_reward": SentenceRewardTrainerConfig, "ppo": PPOConfig, "grpo": DenseGRPOConfig}
    kind = kind or next((kind for kind in configs if kind in Path(path).stem), None)
    if kind is None:
        raise ValueError(f"The name {Path(path).name} does not tell its script: pass --kind {', '.join(configs)}.")
    parser = make_parser(configs[kind])
    # Planned where there may be no GPU; read again for what the file itself says.
    parsed = parser.parse_args_and_config(["--config", path, "--use_cpu", "True", *overrides])
    script_args, training_args, reward_args, model_args = parsed[0], parsed[1], parsed[2], parsed[-2]
    name, peft = model or model_args.model_name_or_path, model_args.use_peft
    if name is None:
        raise ValueError(f"{path} names no model. Pass --model.")
    config, head = load_config(name), kind != "sentence_reward"
    full = model_size(config, head=head)
    micro_batch, accumulation = training_args.per_device_train_batch_size, training_args.gradient_accumulation_steps
    work = Workload(
        micro_batch=micro_batch,
        generation_batch=0,
        prompt_tokens=prompt_tokens,
        completion_tokens=0,
        weight_bytes=4 if model_args.dtype == "float32" else 2,
        mixed_precision=training_args.bf16 or training_args.fp16,
        gradient_checkpointing=training_args.gradient_checkpointing,
    )
    recipe = Recipe(
        name,
        size=model_size(config, get_peft_config(model_args), head) if peft else full,
        full_size=full,
        work=work,
        accumulation=accumulation,
        micro_batches=accumulation,
        iterations=1,
        max_steps=training_args.max_steps,
        uses_peft=peft,
        num_epochs=training_args.num_train_epochs,
        data=(script_args, parsed[-1]),
    )
    if kind == "sentence_reward":
        length = training_args.max_length or prompt_tokens
        return replace(recipe, work=replace(work, prompt_tokens=length, sequences=2))
    frozen, frozen_with_adapter = (
        frozen_models(training_args, reward_args, full, work.weight_bytes, adapter) for adapter in (peft, True)
    )
    completion_tokens = training_args.max_completion_length
    if training_args.vllm_max_model_length:
        prompt_tokens = training_args.vllm_max_model_length - completion_tokens
    colocated = training_args.use_vllm and training_args.vllm_mode == "colocate"
    elsewhere = training_args.use_vllm and not colocated  # a server generates
    work = replace(
        work,
        generation_batch=0 if elsewhere else micro_batch * training_args.steps_per_generation,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        frozen=frozen,
        value_model=kind == "ppo" and training_args.critic == "value_model",
        vllm_share=training_args.vllm_gpu_memory_utilization if colocated else 0.0,
        vllm_sleeps=colocated and training_args.vllm_enable_sleep_mode,
    )
    return replace(
        recipe,
        work=work,
        micro_batches=training_args.steps_per_generation,
        iterations=training_args.num_iterations,
        # Rows of the dataset are prompts, each of which is a group of sequences.
        num_epochs=training_args.num_train_epochs * training_args.num_generations,
        frozen_with_adapter=frozen_with_adapter,
        attached="endogenous" in reward_args.reward and not _keeps_own_copy(training_args, reward_args, peft),
    )


def frozen_models(
    training_args: GRPOConfig, reward_args: RewardArguments, policy: ModelSize, policy_bytes: int, adapter: bool
) -> tuple[FrozenModel, ...]:
    """The models beside a policy with or without an adapter, as the recipe shares them: see `share_frozen_weights`."""
    rewards = set(reward_args.reward)
    own_bytes = 4 if reward_args.reward_dtype == "float32" else 2
    models = []
    own = _keeps_own_copy(training_args, reward_args, adapter)
    if not adapter and training_args.beta > 0:  # a reference model
        models.append(FrozenModel(policy, policy_bytes, gathered="endogenous" in rewards and not own))
    if "endogenous" in rewards:
        size = policy if reward_args.reward_model is None else model_size(load_config(reward_args.reward_model))
        split = reward_args.reward_shard and not reward_args.reward_offload
        if own or not reward_args.reward_shard:
            offloaded = reward_args.reward_offload
            models.append(FrozenModel(size, own_bytes, split, offloaded=offloaded, only_where_split=not own))
    if "sentence" in rewards:  # whole on each GPU, and about the size of the policy
        models.append(FrozenModel(policy, own_bytes, sharded=False))
    return tuple(models)


def _keeps_own_copy(training_args: GRPOConfig, reward_args: RewardArguments, adapter: bool) -> bool:
    """Whether the reward has weights of its own, or the trainer has them anyway."""
    shares = adapter or (training_args.beta > 0 and not training_args.sync_ref_model)
    return reward_args.reward_model is not None or not shares


def advice(recipe: Recipe, hardware: Hardware) -> list[tuple[str, Engine, float]]:
    """Changes that make a recipe fit which does not: what to set, under which engine, and the bytes it then takes."""
    work = recipe.work
    smaller = f"--per_device_train_batch_size 1 --gradient_accumulation_steps {recipe.accumulation * work.micro_batch}"
    if recipe.micro_batches != recipe.accumulation:
        smaller += f" --steps_per_generation {recipe.micro_batches * work.micro_batch}"
    changes: dict[str, dict[str, Any]] = {}
    if not work.gradient_checkpointing:
        changes["--gradient_checkpointing true"] = {"gradient_checkpointing": True}
    if work.micro_batch > 1:  # the same batch in smaller parts
        changes[smaller] = {"micro_batch": 1}
    if work.vllm_share and not work.vllm_sleeps:
        changes["--vllm_enable_sleep_mode true"] = {"vllm_sleeps": True}
    everything: dict[str, dict[str, Any]] = {
        " ".join(changes): {key: value for change in changes.values() for key, value in change.items()}
    }
    tried = [
        (words, recipe.size, replace(work, **change)) for words, change in (changes | everything).items() if words
    ]
    if not recipe.uses_peft:
        # An adapter of about a hundredth of the weights.
        adapter = recipe.full_size.parameters // 100
        size = replace(recipe.full_size, parameters=recipe.full_size.parameters + adapter, trainable=adapter)
        option = "--use_peft true --lora_target_modules all-linear"
        if work.sequences == 2:  # a reward model
            option += " --lora_task_type TOKEN_CLS"
        for words, change in [("", {}), *everything.items()]:
            changed = replace(work, frozen=recipe.frozen_with_adapter, **change)
            tried.append((f"{option} {words}".strip(), size, changed))
    found = []
    for words, size, changed in tried:
        plans = [plan_memory(size, changed, hardware, engine) for engine in ENGINES]
        best = next((plan for plan in plans if plan.total <= hardware.gpu_memory), None)
        if best is not None:
            found.append((words, best.engine, best.total))
    return found


def _show(
    recipe: Recipe, hardware: Hardware, plans: list[Plan], args: argparse.Namespace, rows_of_data: int | None
) -> None:
    console = Console(highlight=False)
    size, work = recipe.size, recipe.work
    trained = "all weights" if size.trainable == size.parameters else f"{size.trainable / 1e6:,.1f} M of them"
    lengths = f"{work.prompt_tokens} + {work.completion_tokens} tokens"
    console.print(
        f"{recipe.name}: {size.parameters / 1e9:.2f} B parameters, trained {trained}; on each GPU "
        f"{counted(work.micro_batch, 'sequence')} of {lengths} at a time; {counted(hardware.gpus, 'GPU')} of "
        f"{hardware.gpu_memory / GIB:g} GiB (--gpus and --gpu-memory plan for others)",
        markup=False,
    )
    kinds: dict[str, Callable[[Plan], float]] = {
        "weights": lambda plan: plan.parameters,
        "optimizer": lambda plan: plan.optimizer,
        "frozen models": lambda plan: plan.frozen,
        "vLLM": lambda plan: plan.vllm,
        "gradients": lambda plan: plan.gradients,
        "activations": lambda plan: plan.gathered + plan.activations,
        "logits": lambda plan: plan.logits,
        "generation": lambda plan: plan.generation,
        "scoring": lambda plan: plan.scoring,
        "total": lambda plan: plan.total,
    }
    engines = [f"{plan.engine:>6}" for plan in plans]  # as wide as the numbers below
    cells = [[name, *(f"{part(plan) / GIB:.1f}" for plan in plans)] for name, part in kinds.items()]
    cells.append(["fits", *("yes" if plan.total <= hardware.gpu_memory else "no" for plan in plans)])
    rows = [[name, *(f"{cell:>{len(e)}}" for cell, e in zip(row, engines, strict=True))] for name, *row in cells]
    title = f"GiB on each GPU, of {hardware.gpu_memory / GIB:g}"
    console.print(terminal_table(["", *engines], rows, title))
    offloaded = next(plan.cpu for plan in plans if plan.engine == "zero3_offload")
    lines = [
        "total: what stays (the rows down to vLLM), and the largest of training (gradients, activations, logits), "
        "generation and scoring, which do not overlap; with 1.5 GiB for CUDA.",
        f"zero3_offload: {offloaded * hardware.gpus / GIB:,.0f} GiB of CPU memory over all machines.",
    ]
    if not any(plan.frozen for plan in plans):
        lines.append("frozen models: the reward shares the trainer's weights (`attach`): 0 GiB.")
    elif recipe.attached:
        lines.append("frozen models: the reference model, which the reward reads too (`attach`: 0 GiB more).")
    fitting = [plan.engine for plan in plans if plan.total <= hardware.gpu_memory]
    if fitting:
        launchers = ["multi_gpu.yaml (DDP)" if engine == "ddp" else f"{engine}.yaml" for engine in fitting]
        lines.append(f"It fits with {', '.join(launchers)}.")
    else:
        lines.append("It does not fit. It would with:")
        changes = advice(recipe, hardware)
        lines += [f"  {name}  ({engine}: {total / GIB:.1f} GiB)" for name, engine, total in changes]
        if not changes:
            need = min(plan.total for plan in plans if plan.engine in SHARDING) / GIB
            lines.append(
                f"  more GPUs, or larger ones: the least is {need:.1f} GiB with {counted(hardware.gpus, 'GPU')}"
            )
    peak = args.gpu_tflops * 1e12, args.gpu_bandwidth * 1e9
    seconds = plan_time(size, work, recipe.micro_batches, recipe.iterations, *peak)
    total = sum(seconds.values())
    sequences = recipe.micro_batches * work.micro_batch * hardware.gpus
    parts = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    lines.append(
        f"Time: about {total:.3g} s for {counted(sequences, 'sequence')} ({parts}), if a GPU has "
        f"{args.gpu_tflops:g} TFLOPS and {args.gpu_bandwidth:g} GB/s, of which {TRAINING:.0%} are reached in training "
        f"and {DECODING:.0%} in decoding, all sequences are of full length, and communication is free."
    )
    if recipe.max_steps > 0:
        lines.append(
            f"{counted(recipe.max_steps, 'step')}: about {_duration(recipe.max_steps * total / recipe.iterations)}."
        )
    elif rows_of_data is not None:
        batches = recipe.num_epochs * rows_of_data / sequences
        lines.append(f"All epochs over {counted(rows_of_data, 'row')}: about {_duration(batches * total)}.")
    else:
        lines.append("All epochs: pass --rows, the number of rows of the dataset, for the time in all.")
    for line in lines:
        # A command stays in one line, to be copied.
        console.print(line, markup=False, soft_wrap=line.startswith("  "))


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
