# SPDX-License-Identifier: Apache-2.0
"""GPU memory and step time per parallelism engine (DDP, FSDP2, ZeRO), estimated from the model's config."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)


EngineName = Literal["ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2"]
ENGINES: tuple[EngineName, ...] = ("ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2")
SHARDING = ("zero3", "zero3_offload", "fsdp2")
GIB = 2**30
TRAINING, SCORING, DECODING = 0.35, 0.5, 0.5  # assumed fractions of a GPU's peak (of its bandwidth) that are achieved
# The CUDA context, kernel workspaces and what the allocator cannot use: an assumption, not measured here.
OVERHEAD = 1.5 * GIB
LOGIT_TOKENS, LOGIT_WORDS = 4096, 32768  # the largest tile of logits that TRL's fused head holds


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a model."""

    parameters: int  # tied ones counted once, including those of an adapter
    trainable: int
    largest_layer: int  # most parameters held directly by one module: what ZeRO-3 must gather at a time
    block: int  # parameters of the largest transformer block: what FSDP2 must gather at a time
    layers: int  # transformer blocks
    hidden: int  # widths, each from the layer in which it is largest
    intermediate: int
    key_value: int  # of all keys (or values) per token
    vocabulary: int


@dataclass(frozen=True)
class Hardware:
    """GPUs."""

    gpus: int  # of all machines together
    gpu_memory: float  # bytes per GPU


@dataclass(frozen=True)
class FrozenModel:
    """A frozen model beside the policy: a reference model, or a reward's model."""

    size: ModelSize
    weight_bytes: int = 2  # per weight
    sharded: bool = True  # wherever the policy is
    gathered: bool = True  # for a forward pass, as a reward does; a reference model is gathered block by block
    offloaded: bool = False  # to CPU memory between passes
    only_where_split: bool = False  # exists only where the policy is sharded, as with `reward_shard: false`


@dataclass(frozen=True)
class Workload:
    """Settings of a run that determine its memory."""

    micro_batch: int  # sequences per forward and backward pass on a GPU
    generation_batch: int  # completions that a GPU generates at a time; 0 if none, or if a server generates them
    prompt_tokens: int  # of the longest
    completion_tokens: int  # of the longest
    weight_bytes: int = 2  # per weight as loaded: 2 for bfloat16, 4 for float32
    mixed_precision: bool = True  # `bf16: true`
    gradient_checkpointing: bool = True  # activations are recomputed in the backward pass
    frozen: tuple[FrozenModel, ...] = ()  # except the policy without its adapter
    value_model: bool = False  # PPO trains a second model as critic
    vllm_share: float = 0.0  # fraction of a GPU's memory used by vLLM in the training process; 0 without it
    vllm_sleeps: bool = False  # vLLM frees its memory while the policy is trained
    sequences: int = 1  # per row of the micro-batch: 2 for pairs of a reward model, which has no logits


@dataclass
class Plan:
    """
    Bytes on a GPU under one engine, by content. The three phases of a step do not overlap: the largest one counts.
    """

    engine: EngineName
    weights: float = 0.0
    optimizer: float = 0.0  # optimizer states, including the float32 weights
    frozen_models: float = 0.0
    vllm: float = 0.0  # its share, unless it sleeps
    gradients: float = 0.0
    gathered_weights: float = 0.0  # in training, what an engine with sharded weights gathers at a time
    activations: float = 0.0  # in the forward and backward pass
    logits: float = 0.0
    generation: float = 0.0  # gathered weights, and the key-value cache (or vLLM's share, if it sleeps)
    scoring: float = 0.0  # a gathered frozen model, and its activations
    cpu_memory: float = 0.0  # per GPU process: what is offloaded

    @property
    def total(self) -> float:
        """Bytes of the largest phase, with an allowance for the CUDA context and fragmentation."""
        resident = self.weights + self.optimizer + self.frozen_models + self.vllm
        training = self.gradients + self.gathered_weights + self.activations + self.logits
        return OVERHEAD + resident + max(training, self.generation, self.scoring)


def plan_memory(size: ModelSize, work: Workload, hardware: Hardware, engine: EngineName) -> Plan:
    """
    Memory per GPU. Model states follow DeepSpeed's own estimators: with bfloat16 2 bytes per weight, and 16 for its
    float32 copy, its two moments and its float32 gradient. DDP trains weights as they are loaded, FSDP2 in float32.
    """
    models = 2 if work.value_model else 1
    trained, frozen_part = models * size.trainable, size.parameters - size.trainable
    gpus, sharded, b = hardware.gpus, engine in SHARDING, work.weight_bytes
    plan = Plan(engine)
    if engine == "ddp":
        plan.weights, plan.optimizer = b * (trained + frozen_part), 2.0 * b * trained
        plan.gradients = b * trained * (2 if gpus > 1 else 1)  # with the buckets in which they are sent
    elif engine == "fsdp2":
        # Mixed precision turns trained weights into float32.
        wide = 4 if work.mixed_precision else b
        plan.weights = (wide * trained + b * frozen_part) / gpus
        plan.gradients, plan.optimizer = wide * trained / gpus, 2 * wide * trained / gpus
        plan.gathered_weights = 2 * (2 if work.mixed_precision else b) * size.block  # this block and the next
    else:
        # Without mixed precision the weights are their own float32 copy.
        half, states, fp32_gradients = (2, 12, 4) if work.mixed_precision else (4, 8, 0)
        plan.weights = half * (trained + frozen_part) / (gpus if sharded else 1)
        plan.optimizer = states * trained / gpus
        if engine == "zero1":
            plan.gradients = half * trained + fp32_gradients * trained / gpus
        elif engine == "zero2":
            plan.gradients = (half + fp32_gradients) * trained / gpus
        else:
            plan.gradients = 4 * trained / gpus
            plan.gathered_weights = 4 * size.largest_layer
        if engine == "zero3_offload":
            plan.cpu_memory = plan.weights + plan.optimizer + plan.gradients
            plan.weights = plan.optimizer = plan.gradients = 0.0

    length, compute = work.prompt_tokens + work.completion_tokens, 2 if work.mixed_precision else b
    tokens = work.micro_batch * work.sequences * length
    plan.activations = compute * activation_numbers(size, tokens, work.gradient_checkpointing) * models
    plan.logits = 4.0 * min(tokens, LOGIT_TOKENS) * min(size.vocabulary, LOGIT_WORDS) * (work.sequences == 1)

    models_there = [model for model in work.frozen if sharded or not model.only_where_split]
    for model in models_there:
        whole = float(model.weight_bytes * model.size.parameters)
        held = 0.0 if model.offloaded else whole / gpus if sharded and model.sharded else whole
        plan.frozen_models += held
        # One block's activations at a time.
        scoring = compute * block_numbers(model.size, 8192) + (whole - held) * model.gathered
        plan.scoring = max(plan.scoring, scoring)
    if not models_there and size.trainable < size.parameters and sharded:
        plan.scoring = compute * size.parameters  # the policy without its adapter

    share = work.vllm_share * hardware.gpu_memory
    plan.vllm, plan.generation = (0.0, share) if work.vllm_sleeps else (share, 0.0)
    if work.generation_batch and not work.vllm_share:
        cache = 2 * size.layers * size.key_value * length
        plan.generation = compute * cache * work.generation_batch + (compute * size.parameters if sharded else 0)
    return plan


def block_numbers(size: ModelSize, tokens: int) -> float:
    """
    Numbers that a block keeps for its backward pass: the residual stream and the normed one in both precisions (9
    widths), attention's queries, output and rotated copies (3), keys and values with theirs (3), four of the MLP.
    """
    return tokens * (12 * size.hidden + 3 * size.key_value + 4 * size.intermediate)


def activation_numbers(size: ModelSize, tokens: int, gradient_checkpointing: bool) -> float:
    """Numbers that the forward pass of all blocks keeps: checkpointed, one width per block, and one whole block."""
    if gradient_checkpointing:
        return size.layers * tokens * size.hidden + block_numbers(size, tokens)
    return size.layers * block_numbers(size, tokens)


def model_size(config: PretrainedConfig, peft_config: Any = None, head: bool = True) -> ModelSize:
    """
    Sizes of the causal language model of a config, also of one that reads images; with `peft_config`, of one with a
    trainable adapter; without a `head` that gives logits, of a reward model.
    """
    model = _on_meta(config, head)
    if peft_config is not None:
        from peft import get_peft_model

        with torch.device("meta"):
            model = get_peft_model(model, peft_config)
    text = config.get_text_config()
    embeddings = model.get_input_embeddings().weight
    longest = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len, default=())
    layers = _largest(text, "num_hidden_layers") or len(longest)
    hidden = _largest(text, "hidden_size") or embeddings.shape[1]
    heads = _largest(text, "num_attention_heads")
    if heads:
        head_dim = _largest(text, "head_dim") or hidden // heads
        key_value = (_largest(text, "num_key_value_heads") or heads) * head_dim
    else:  # no attention, or not specified
        key_value = 0 if model._is_stateful else hidden
    blocks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
    return ModelSize(
        parameters=_count(model.parameters()),
        trainable=_count(p for p in model.parameters() if p.requires_grad),
        largest_layer=max(_count(module.parameters(recurse=False)) for module in model.modules()),
        block=max((_count(block.parameters()) for blocks_ in blocks for block in blocks_), default=0),
        layers=layers,
        hidden=hidden,
        intermediate=_largest(text, "intermediate_size") or 4 * hidden,
        key_value=key_value,
        vocabulary=_largest(text, "vocab_size") or embeddings.shape[0],
    )


def _on_meta(config: PretrainedConfig, head: bool) -> Any:
    """Model without weights, on the meta device."""
    kind = type(config)
    reads_images = kind not in MODEL_FOR_CAUSAL_LM_MAPPING
    if (reads_images and kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING) or config.is_encoder_decoder:
        raise ValueError(f"The config must be of a causal language model, got one of type {config.model_type!r}.")
    with_head = AutoModelForImageTextToText if reads_images else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            return (with_head if head else AutoModel).from_config(config)
    except Exception as error:  # many types: for what a config lacks, or a missing package
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        what = f"transformers cannot build a model of type {config.model_type!r} from its config"
        raise ValueError(f"{what}: {reason}") from error


def _largest(config: PretrainedConfig, name: str) -> int:
    """Size from a config, the largest where layers or experts differ; 0 if the config has none of that name."""
    settings = config.to_dict()  # attributes that differ per layer must not be read
    parts = [settings, *(settings.get("per_layer_config") or {}).values()]
    return max(_numbers([part.get(config.attribute_map.get(name, name)) for part in parts]), default=0)


def _numbers(value: Any) -> list[int]:
    if isinstance(value, dict | list | tuple):
        return [n for part in (value.values() if isinstance(value, dict) else value) for n in _numbers(part)]
    return [int(value)] if isinstance(value, int | float) else []


def _count(parameters: Any) -> int:
    return sum(parameter.numel() for parameter in {id(p): p for p in parameters}.values())


def plan_time(
    size: ModelSize,
    work: Workload,
    accumulation: int,
    iterations: int = 1,
    flops: float = 312e12,  # peak of dense bfloat16 products, operations per second
    bandwidth: float = 2e12,  # of the memory, bytes per second
) -> dict[str, float]:
    """
    Seconds that a GPU spends on one generation batch, of `accumulation` micro-batches and for `iterations` epochs, in
    `"generation"`, `"scoring"` and `"training"`. A forward pass costs 2 operations per parameter and token, a backward
    pass 4 (2 with an adapter), a second forward pass for checkpointing 2; decoding reads all weights and the cache
    once per token. Communication is not counted.
    """
    length = work.prompt_tokens + work.completion_tokens
    tokens = work.micro_batch * work.sequences * length * accumulation
    backward = 2 if size.trainable < size.parameters else 4
    again = 2 if work.gradient_checkpointing else 0
    training = (2 + backward + again) * size.parameters * tokens * iterations * (2 if work.value_model else 1)
    # The frozen models; if there are none, the policy without its adapter scores.
    scored = sum(m.size.parameters for m in work.frozen) or size.parameters if work.sequences == 1 else 0
    generation = 0.0
    if work.generation_batch:
        cache = 4 * size.layers * size.key_value * (work.prompt_tokens + work.completion_tokens / 2)
        read = 2 * size.parameters + work.generation_batch * cache
        generation = work.completion_tokens * read / (bandwidth * DECODING)
    return {
        "generation": generation,
        "scoring": 2 * scored * tokens / (flops * SCORING),
        "training": training / (flops * TRAINING),
    }
