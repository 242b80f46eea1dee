# SPDX-License-Identifier: Apache-2.0
"""The command `endotrl plan`: memory table, suggested changes and rough time for a recipe's YAML file."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from trl import DatasetMixtureConfig, GRPOConfig, ScriptArguments, get_peft_config

from ..frozen.names import load_config
from ..frozen.served import is_url
from ..launch import RewardArguments, make_parser
from ..launch.data import count_rows
from ..planning.memory import (
    DECODING,
    ENGINES,
    GIB,
    SHARDING,
    TRAINING,
    FrozenModel,
    Hardware,
    ModelSize,
    Plan,
    Workload,
    model_size,
    plan_memory,
    plan_time,
)
from ..reporting import counted, terminal, terminal_table, working
from ..sentence.trainer_config import ADAPTER_TASK, SentenceRewardTrainerConfig
from ..shipped import SCHEME, local_path
from ..trainers.dense_grpo_config import DenseGRPOConfig
from ..trainers.ppo_config import PPOConfig


CONFIGS: dict[str, Any] = {"sentence_reward": SentenceRewardTrainerConfig, "ppo": PPOConfig, "grpo": DenseGRPOConfig}


@dataclass(frozen=True)
class Recipe:
    """A recipe's values that `endotrl plan` uses."""

    name: str  # of the model
    size: ModelSize
    work: Workload
    training_args: Any
    data: tuple[ScriptArguments, DatasetMixtureConfig]
    uses_peft: bool
    attached: bool = False  # the reward uses frozen weights of the trainer, under every engine


def run(args: argparse.Namespace) -> None:
    """Runs `endotrl plan`: a plan for each engine."""
    bad = [setting for setting in args.set if setting.find("=") < 1]
    if bad:
        raise ValueError(f"--set takes KEY=VALUE, such as use_peft=true, got {bad[0]!r}.")
    path = local_path(args.recipe)
    if not Path(path).is_file():
        raise ValueError(f"The file {path} does not exist. `endotrl recipes` lists the names for {SCHEME}NAME.")
    overrides = [word for setting in args.set for word in f"--{setting}".split("=", 1)]
    hardware = Hardware(args.gpus, args.gpu_memory * GIB)
    with working("Reading the recipe, the model's config and the number of rows"):
        read = partial(read_recipe, path, args.kind, overrides, args.model, args.prompt_tokens)
        recipe = read()
        plans = [plan_memory(recipe.size, recipe.work, hardware, engine) for engine in ENGINES]
        fits = any(plan.total <= hardware.gpu_memory for plan in plans)
        changes = [] if fits else advice(recipe, read, hardware)
        times = time_lines(recipe, args)
    _show(recipe, hardware, plans, changes, times)


def read_recipe(
    path: str, kind: str | None, overrides: list[str], model: str | None, prompt_tokens: int, changes: str = ""
) -> Recipe:
    """Reads a recipe, with `changes` of its settings as options, and its model's config."""
    kind = kind or next((kind for kind in CONFIGS if kind in Path(path).stem), None)
    if kind is None:
        raise ValueError(f"{Path(path).name} does not name its kind of recipe. Pass --kind ({', '.join(CONFIGS)}).")
    # Planning may be done without a GPU; the file's own value is read again.
    words = ["--config", path, "--use_cpu", "True", *overrides, *changes.split()]
    parsed = make_parser(CONFIGS[kind]).parse_args_and_config(words)
    training_args, reward_args, model_args = parsed[1], parsed[2], parsed[-2]
    data = parsed[0], parsed[-1]
    name, peft = model or model_args.model_name_or_path, model_args.use_peft
    if name is None:
        raise ValueError(f"{path} has no `model_name_or_path`. Pass --model.")
    config, head = load_config(name), kind != "sentence_reward"
    if not head:
        model_args.lora_task_type = ADAPTER_TASK
    size = model_size(config, get_peft_config(model_args) if peft else None, head)
    work = Workload(
        micro_batch=training_args.per_device_train_batch_size,
        generation_batch=0,
        prompt_tokens=prompt_tokens,
        completion_tokens=0,
        weight_bytes=4 if model_args.dtype == "float32" else 2,
        mixed_precision=training_args.bf16 or training_args.fp16,
        gradient_checkpointing=training_args.gradient_checkpointing,
    )
    if kind == "sentence_reward":
        work = replace(work, prompt_tokens=training_args.max_length or prompt_tokens, sequences=2)
        return Recipe(name, size, work, training_args, data, peft)
    completion_tokens = training_args.max_completion_length
    if training_args.vllm_max_model_length:
        prompt_tokens = training_args.vllm_max_model_length - completion_tokens
    colocated = training_args.use_vllm and training_args.vllm_mode == "colocate"
    elsewhere = training_args.use_vllm and not colocated  # generation on a server
    # Whether the trainer has frozen weights that the reward can use: the policy without its adapter, or a reference
    # model.
    shares = peft or (training_args.beta > 0 and not training_args.sync_ref_model)
    own_copy = reward_args.reward_model is not None or not shares
    whole = model_size(config) if peft else size
    work = replace(
        work,
        generation_batch=0 if elsewhere else work.micro_batch * training_args.steps_per_generation,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        frozen=frozen_models(training_args, reward_args, whole, work.weight_bytes, peft, own_copy),
        value_model=kind == "ppo" and training_args.critic == "value_model",
        vllm_share=training_args.vllm_gpu_memory_utilization if colocated else 0.0,
        vllm_sleeps=colocated and training_args.vllm_enable_sleep_mode,
    )
    attached = "endogenous" in reward_args.reward and not own_copy and reward_args.reward_shard
    return Recipe(name, size, work, training_args, data, peft, attached)


def frozen_models(
    training_args: GRPOConfig,
    reward_args: RewardArguments,
    policy: ModelSize,  # without an adapter
    policy_bytes: int,
    peft: bool,
    own_copy: bool,  # the reward cannot use the trainer's weights
) -> tuple[FrozenModel, ...]:
    """Models held beside a policy, shared as in the recipe: see `share_frozen_weights`."""
    rewards = set(reward_args.reward)
    own_bytes = 4 if reward_args.reward_dtype == "float32" else 2
    models = []
    if not peft and training_args.beta > 0:  # a reference model
        models.append(FrozenModel(policy, policy_bytes, gathered="endogenous" in rewards and not own_copy))
    served = is_url(reward_args.reward_model)
    if "endogenous" in rewards and not served and (own_copy or not reward_args.reward_shard):
        size = policy if reward_args.reward_model is None else model_size(load_config(reward_args.reward_model))
        offloaded = reward_args.reward_offload
        split = reward_args.reward_shard and not offloaded
        models.append(FrozenModel(size, own_bytes, split, offloaded=offloaded, only_where_split=not own_copy))
    if "sentence" in rewards:  # unsharded on each GPU, and about the size of the policy
        models.append(FrozenModel(policy, own_bytes, sharded=False))
    return tuple(models)


def advice(recipe: Recipe, read: Callable[..., Recipe], hardware: Hardware) -> list[tuple[str, Plan]]:
    """Changes of settings that make a recipe fit, with their plans, from `read`, which reads it again with them."""
    args, work, changes = recipe.training_args, recipe.work, []
    if not work.gradient_checkpointing:
        changes.append("--gradient_checkpointing true")
    if work.micro_batch > 1:  # the same batch in smaller micro-batches
        steps = args.gradient_accumulation_steps
        smaller = f"--per_device_train_batch_size 1 --gradient_accumulation_steps {steps * work.micro_batch}"
        if (batches := getattr(args, "steps_per_generation", steps)) != steps:
            smaller += f" --steps_per_generation {batches * work.micro_batch}"
        changes.append(smaller)
    if work.vllm_share and not work.vllm_sleeps:
        changes.append("--vllm_enable_sleep_mode true")
    together = " ".join(changes)
    tried = [*changes, together]
    if not recipe.uses_peft:
        adapter = "--use_peft true --lora_target_modules all-linear"
        tried += [adapter, f"{adapter} {together}".strip()]
    found = []
    for words in filter(None, dict.fromkeys(tried)):
        changed = read(changes=words)
        plans = (plan_memory(changed.size, changed.work, hardware, engine) for engine in ENGINES)
        if best := next((plan for plan in plans if plan.total <= hardware.gpu_memory), None):
            found.append((words, best))
    return found


def _show(
    recipe: Recipe, hardware: Hardware, plans: list[Plan], changes: list[tuple[str, Plan]], times: list[str]
) -> None:
    console = terminal()
    size, work = recipe.size, recipe.work
    trained = "all" if size.trainable == size.parameters else f"{size.trainable / 1e6:,.1f} M"
    console.print(
        f"{recipe.name}: {size.parameters / 1e9:.2f} B parameters, {trained} trained; micro-batches of "
        f"{counted(work.micro_batch, 'sequence')} of {work.prompt_tokens} + {work.completion_tokens} tokens; "
        f"{counted(hardware.gpus, 'GPU')} of {hardware.gpu_memory / GIB:g} GiB (change with --gpus and --gpu-memory)",
    )
    parts = [field.name for field in fields(Plan) if field.name not in ("engine", "cpu_memory")]
    engines = [f"{plan.engine:>6}" for plan in plans]  # as wide as the numbers below
    cells = [
        [name.replace("_", " "), *(f"{getattr(plan, name) / GIB:.1f}" for plan in plans)]
        for name in (*parts, "total", "cpu_memory")
    ]
    cells.insert(-1, ["fits", *("yes" if plan.total <= hardware.gpu_memory else "no" for plan in plans)])
    rows = [[name, *(f"{cell:>{len(e)}}" for cell, e in zip(row, engines, strict=True))] for name, *row in cells]
    console.print(terminal_table(["", *engines], rows, f"GiB on each GPU, of {hardware.gpu_memory / GIB:g}"))
    lines = [
        "total: what stays in memory (the rows down to vllm), the largest of training (gradients to logits), "
        "generation and scoring, which do not overlap, and 1.5 GiB for CUDA. An estimate, not measured on GPUs."
    ]
    if recipe.attached and any(plan.frozen_models for plan in plans):
        lines.append("frozen models: the reference model, which the reward reads too (`attach`: 0 GiB more).")
    elif recipe.attached:
        lines.append("frozen models: the reward shares the trainer's weights (`attach`): 0 GiB.")
    if fitting := [plan.engine for plan in plans if plan.total <= hardware.gpu_memory]:
        launchers = ["multi_gpu.yaml (DDP)" if engine == "ddp" else f"{engine}.yaml" for engine in fitting]
        lines.append(f"It fits with {', '.join(launchers)}.")
    else:
        lines.append("It does not fit. It would fit with:")
        lines += [f"  {words}  ({plan.engine}: {plan.total / GIB:.1f} GiB)" for words, plan in changes]
        if not changes:
            need = min(plan.total for plan in plans if plan.engine in SHARDING) / GIB
            gpus = counted(hardware.gpus, "GPU")
            lines.append(f"  more GPUs, or larger ones: {gpus} of at least {need:.1f} GiB")
    for line in [*lines, *times]:
        # A command stays on one line, to be copied.
        console.print(line, soft_wrap=line.startswith("  "))


def time_lines(recipe: Recipe, args: argparse.Namespace) -> list[str]:
    """Lines on the time per generation batch and for the run, with the assumptions."""
    training_args, work = recipe.training_args, recipe.work
    is_policy = isinstance(training_args, GRPOConfig)
    batches = training_args.steps_per_generation if is_policy else training_args.gradient_accumulation_steps
    iterations = training_args.num_iterations if is_policy else 1
    peak = args.gpu_tflops * 1e12, args.gpu_bandwidth * 1e9
    seconds = plan_time(recipe.size, work, batches, iterations, *peak)
    total, sequences = sum(seconds.values()), batches * work.micro_batch * args.gpus
    parts = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    lines = [
        f"Time: about {total:.3g} s for {counted(sequences, 'sequence')} ({parts}), assuming {args.gpu_tflops:g} "
        f"TFLOPS and {args.gpu_bandwidth:g} GB/s per GPU, of which training reaches {TRAINING:.0%} and decoding "
        f"{DECODING:.0%}, sequences of full length, and no cost of communication."
    ]
    if training_args.max_steps > 0:
        steps = counted(training_args.max_steps, "step")
        return [*lines, f"{steps}: about {_duration(training_args.max_steps * total / iterations)}."]
    try:
        rows = args.rows or count_rows(*recipe.data)
    except ValueError as error:
        return [*lines, f"{str(error).rstrip('.')}. Pass the number of rows with --rows to get the total time."]
    # Rows of the dataset are prompts, each of which gives a group of sequences.
    epochs = training_args.num_train_epochs * (training_args.num_generations if is_policy else 1)
    return [*lines, f"All epochs over {counted(rows, 'row')}: about {_duration(epochs * rows / sequences * total)}."]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
