# SPDX-License-Identifier: Apache-2.0
"""The cells of [`benchmarks.gpu`]'s tables: what is measured on one GPU, in one process."""

import gc
import json
import math
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    Gemma2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer

from benchmarks.flops import ModelShape, Work, useful_work
from benchmarks.gpu import LOST_DEVICE, make_parser
from benchmarks.gpu_page import write_page
from benchmarks.measure import (
    alternate,
    describe_run,
    matmul_peak,
    memory_bandwidth,
    peak_memory,
    spread,
    synchronize,
)
from benchmarks.methods import METHODS, RIVALS, FusedHead, PaddedLogits, exact_log_probs, log_probs_of
from benchmarks.workloads import TokenSource, Workload
from endotrl import EndogenousReward
from endotrl.demo.grpo_runs import load_model
from endotrl.demo.parts import ARITHMETIC, DIGITS, PRETRAINING
from endotrl.frozen.loaded_model import LoadedModel
from endotrl.rendering.images import ImageInputs
from endotrl.rendering.renderer import Rendered
from endotrl.reporting import quiet_libraries
from endotrl.rewards import LengthReward, RandomReward
from endotrl.runs.files import write_json
from endotrl.scoring import attention_kernels as kernels
from endotrl.scoring import forward_pass
from endotrl.scoring.scorer import FrozenScorer
from endotrl.tasks import arithmetic


if TYPE_CHECKING:
    from benchmarks.training_step import Placement

Cell = Callable[[], dict[str, Any]]
# Errors above which a number is wrong, in nats per token: rounding of float32, and of half precision at logits of
# about 1, which is what random weights give.
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.1}
ROUNDS = 3  # of which the first also asks the driver for memory
# Part of a bound below which a time is a mistake: the peak is a measurement, too.
TOO_FAST = 0.95
LEARNING_SECONDS = 20.0


@dataclass
class Machine:
    """
    Where the run is, and how large its parts are.

    Attributes:
        device (`str`):
            `"cuda"` or `"cpu"`.
        tiny (`bool`):
            Sizes that show only that everything runs.
        folder (`Path`):
            For checkpoints of random models.
    """

    device: str
    tiny: bool
    folder: Path
    configs: dict[str, PretrainedConfig] = field(default_factory=dict)
    _kept: dict[str, PreTrainedModel] = field(default_factory=dict)
    _sizes: dict[str, ModelShape] = field(default_factory=dict)

    def __post_init__(self) -> None:
        small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        small |= {"num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 4096}
        half = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
        half |= {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True}
        half |= {"max_position_embeddings": 40960}
        seven = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
        seven |= {"num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 40960}
        self.configs = {
            "0.5B": Qwen2Config(**(small if self.tiny else half)),
            "7B": Qwen2Config(**(small if self.tiny else seven)),
            "exact": Qwen2Config(**(small if self.tiny else {**half, "num_hidden_layers": 6})),
            # Soft-capped attention, which is padded instead of packed.
            "padded": Gemma2Config(**small, head_dim=16),
        }

    def model(self, shape: str, dtype: torch.dtype = torch.bfloat16, **kwargs: Any) -> PreTrainedModel:
        """Random weights, made on the device."""
        torch.manual_seed(0)
        with torch.device(self.device):
            return AutoModelForCausalLM.from_config(self.configs[shape], dtype=dtype, **kwargs).eval()

    def kept(self, shape: str) -> PreTrainedModel:
        """The same in bfloat16; one at a time stays."""
        if shape not in self._kept:
            self.release()
            self._kept[shape] = self.model(shape)
        return self._kept[shape]

    def release(self) -> None:
        """Gives what is not used any more back to the device."""
        self._kept.clear()
        free_memory()

    @cached_property
    def rooflines(self) -> dict[str, float]:
        """Operations per second of bfloat16 products, and bytes per second of the memory."""
        return {
            "matmul_peak": matmul_peak(torch.bfloat16, self.device, 128 if self.tiny else 8192),
            "bandwidth": memory_bandwidth(self.device, 2**20 if self.tiny else 2**31),
        }

    def size(self, shape: str) -> ModelShape:
        """What determines the work of a model of this shape."""
        if shape not in self._sizes:
            with torch.device("meta"):
                self._sizes[shape] = ModelShape.of(AutoModelForCausalLM.from_config(self.configs[shape]))
        return self._sizes[shape]

    def bound(self, shape: str, work: Work) -> float:
        """Seconds of a pass in bfloat16: of its products at the measured peak, or of reading each weight once."""
        size = self.size(shape)
        weights = (size.linear if work.tokens else 0) + (size.head if work.positions else 0)
        return max(work.flops(size) / self.rooflines["matmul_peak"], 2 * weights / self.rooflines["bandwidth"])

    def grpo(self, folder: str, **settings: Any) -> GRPOConfig:
        """Settings of the runs that train."""
        common = {"beta": 0.1, "bf16": False, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
        common["gradient_checkpointing"] = False
        return GRPOConfig(folder, use_cpu=self.device == "cpu", **{**common, **settings})

    def checkpoint(self, shape: str) -> str:
        """The same on disk, in bfloat16, with a tokenizer."""
        path = self.folder / shape
        if not path.exists():
            self.model(shape).save_pretrained(path)
            self.tokenizer(shape).save_pretrained(path)
        return str(path)

    def tokenizer(self, shape: str) -> PreTrainedTokenizerFast:
        """One word per token: `t0 <eos> <pad> t3 t4`."""
        words = {{1: "<eos>", 2: "<pad>"}.get(i, f"t{i}"): i for i in range(self.configs[shape].vocab_size)}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", padding_side="left"
        )

    def source(self, shape: str) -> TokenSource:
        """Random tokens."""
        return TokenSource.of_vocabulary(self.configs[shape].vocab_size, seed=0)


# Exactness


def exactness(machine: Machine) -> dict[str, Cell]:
    """Every way of scoring against float32, one row at a time, from full logits."""
    source, longest = machine.source("exact"), 16 if machine.tiny else 300
    rows = [
        row
        for _ in range(3)
        for row in source.group(
            source.random.randint(longest // 8, longest // 2), [source.random.randint(1, longest) for _ in range(5)]
        )
    ]

    @cache
    def truth(dtype: str) -> list[Tensor]:
        return exact_log_probs(machine.checkpoint("exact"), getattr(torch, dtype), machine.device, rows)

    def errors(found: Sequence[Tensor], dtype: str, expected: Sequence[Tensor] | None = None) -> dict[str, Any]:
        pairs = zip(found, truth(dtype) if expected is None else expected, strict=True)
        differences = torch.cat([a.double() - b.double() for a, b in pairs])
        largest = differences.abs().max().item()
        return {
            "dtype": dtype,
            "max": largest,
            "rms": differences.square().mean().sqrt().item(),
            "right": largest <= TOLERANCES[dtype],
        }

    def loaded(dtype: str, **kwargs: Any) -> PreTrainedModel:
        path = machine.checkpoint("exact")
        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), **kwargs)
        return model.to(machine.device).eval()

    def ours(model: PreTrainedModel) -> list[Tensor]:
        return [stats.log_probs for stats in FrozenScorer(LoadedModel(model))(rows)]

    def one_by_one(dtype: str) -> dict[str, Any]:
        return errors(log_probs_of(loaded(dtype), rows), dtype)

    def rival(method: type, dtype: str) -> dict[str, Any]:
        return errors(method(machine.checkpoint("exact"), getattr(torch, dtype), machine.device)([rows]), dtype)

    def packed(dtype: str) -> dict[str, Any]:
        return errors(ours(loaded(dtype)), dtype)

    def by_kernel(name: str, dtype: str) -> dict[str, Any]:
        attend, forward_pass.attend = forward_pass.attend, kernels.KERNELS[name]
        compiled = kernels.flex_kernel
        if machine.tiny:  # as below
            from torch.nn.attention.flex_attention import flex_attention as as_written

            kernels.flex_kernel = lambda: as_written  # type: ignore[assignment]
        try:
            return packed(dtype)
        finally:
            forward_pass.attend, kernels.flex_kernel = attend, compiled

    def padded() -> dict[str, Any]:
        model = machine.model("padded", torch.float32)
        tokens = machine.source("padded").group(12, [5, 14, 9])
        found = [stats.log_probs for stats in FrozenScorer(LoadedModel(model))(tokens)]
        return errors(found, "float32", log_probs_of(model, tokens))

    def with_images() -> dict[str, Any]:
        found, expected = image_log_probs(machine)
        return errors(found, "float32", expected)

    def autocast() -> dict[str, Any]:
        with torch.autocast(machine.device, torch.bfloat16):
            # The weights are float32: the truth, too, is of weights that are not rounded.
            return {**errors(ours(loaded("float32")), "float32"), "right": None}

    def compiled() -> dict[str, Any]:
        model = loaded("float32")
        # What inductor makes of a tiny model takes half a minute, and is not what is asked there.
        model.forward = torch.compile(model.forward, dynamic=True, backend="eager" if machine.tiny else "inductor")
        return errors(ours(model), "float32")

    def offloaded() -> dict[str, Any]:
        tokenizer = machine.tokenizer("exact")
        reward = EndogenousReward(machine.checkpoint("exact"), tokenizer, dtype="float32", offload=True)
        ids = [row.completion_ids for row in rows]
        prompts, texts = (
            [" ".join(tokenizer.convert_ids_to_tokens(part)) for part in parts]
            for parts in ([row.prompt_ids for row in rows], ids)
        )
        scored = reward.score(prompts, texts, completion_ids=ids)
        return errors([stats.log_probs for stats in scored], "float32")

    def attached(lora: bool) -> dict[str, Any]:
        rewards, expected = attached_rewards(machine, lora)
        return errors(rewards, "float32", expected)

    cells: dict[str, Cell] = {
        "one row at a time, bfloat16: what half precision itself loses": partial(one_by_one, "bfloat16"),
        "padded batch, full logits, bfloat16": partial(rival, PaddedLogits, "bfloat16"),
    }
    for dtype in ("float32", "bfloat16"):
        cells[f"TRL's fused head, {dtype}"] = partial(rival, FusedHead, dtype)
        cells[f"packed rows, {dtype}"] = partial(packed, dtype)
        for name in kernels.KERNELS:
            # PyTorch's flash-attention is in half precision, and on GPUs.
            if name != "varlen" or (dtype == "bfloat16" and machine.device == "cuda"):
                cells[f"packed rows, {dtype}, kernel {name}"] = partial(by_kernel, name, dtype)
    cells["padded rows (soft-capped attention), float32"] = padded
    cells["a prompt with an image, float32"] = with_images
    cells["float32 weights under bfloat16 autocast"] = autocast
    cells["a compiled model, float32"] = compiled
    cells["offloaded copy, float32"] = offloaded
    cells["attached: adapter off, own pass"] = partial(attached, lora=True)
    cells["attached: the trainer's reference pass"] = partial(attached, lora=False)
    if find_spec("flash_attn"):
        flash = partial(loaded, "bfloat16", attn_implementation="flash_attention_2")
        cells["a model with flash-attention, bfloat16"] = lambda: errors(ours(flash()), "bfloat16")
    return cells


def image_log_probs(machine: Machine) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probabilities of completions behind a prompt with an image, ours and those of the model's own logits."""
    picture, size, image_token = {"hidden_size": 32, "image_size": 16, "patch_size": 8}, 512, 3
    text = {**picture, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**text),
        text_config=LlamaConfig(**text, vocab_size=size),
        image_token_id=image_token,
    )
    model = LlavaForConditionalGeneration(config).to(machine.device).eval()
    pixels = torch.randn(1, 3, 16, 16)
    source = TokenSource([4 + i * 7919 % (size - 4) for i in range(500)], seed=0)
    # Two by two patches.
    prompt, completions = [*source.draw(5), *[image_token] * 4, *source.draw(9)], [source.draw(n) for n in (5, 14, 1)]
    images = ImageInputs.of({"pixel_values": pixels})
    rows = [Rendered(prompt, ids, list(range(len(ids))), finished=True, images=images) for ids in completions]
    expected = []
    for ids in completions:
        with torch.inference_mode():
            given = torch.tensor([[*prompt, *ids]], device=machine.device)
            logits = model(input_ids=given, pixel_values=pixels.to(machine.device)).logits[0, len(prompt) - 1 : -1]
        expected.append(logits.log_softmax(-1).gather(1, given[0, len(prompt) :, None]).squeeze(1).cpu())
    return [stats.log_probs for stats in FrozenScorer(LoadedModel(model))(rows)], expected


def adapter() -> Any:
    """A LoRA adapter. peft is imported here, so that everything else runs without it."""
    from peft import LoraConfig

    return LoraConfig(r=8, target_modules=["q_proj", "v_proj"])


def attached_rewards(machine: Machine, lora: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Rewards of three GRPO steps on shared weights, and what they are from the checkpoint, one row at a time."""
    path, tokenizer = machine.checkpoint("exact"), machine.tokenizer("exact")
    seen: list[tuple[list[int], list[int], float]] = []

    class Recorded(EndogenousReward):
        def __call__(self, prompts: Any, completions: Any, completion_ids: Any = None, **kwargs: Any) -> Any:
            rewards = super().__call__(prompts, completions, completion_ids=completion_ids, **kwargs)
            for prompt, ids, reward in zip(prompts, completion_ids, rewards, strict=True):
                seen.append((tokenizer(prompt)["input_ids"], list(ids), reward))
            return rewards

    reward = Recorded(None, tokenizer)
    source = machine.source("exact")
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=load_model(path, "float32"),
            reward_funcs=reward,
            args=machine.grpo(
                folder, max_steps=3, per_device_train_batch_size=4, num_generations=4, max_completion_length=12
            ),
            train_dataset=Dataset.from_dict(
                {"prompt": [" ".join(f"t{i}" for i in source.draw(10)) for _ in range(4)]}
            ),
            processing_class=tokenizer,
            peft_config=adapter() if lora else None,
        )
        reward.attach(trainer)
        trainer.train()
    rows = [Rendered(prompt, ids, list(range(len(ids))), finished=True) for prompt, ids, _ in seen]
    # The checkpoint is in bfloat16, and TRL has read it as float32.
    expected = log_probs_of(load_model(path, "float32").to(machine.device).eval(), rows)
    return [torch.tensor([r / len(row.completion_ids)]) for row, (_, _, r) in zip(rows, seen, strict=True)], [
        log_probs.mean()[None] for log_probs in expected
    ]


# Scoring


def scoring(machine: Machine) -> dict[str, Cell]:
    """Speed and memory beside (a), (b) and (c), and the roofline of the useful work."""

    def run(shape: str, make: Callable[[TokenSource], Workload], first: bool) -> dict[str, Any]:
        # vLLM reads a checkpoint and takes a minute to start: once, for the small one.
        vllm = first and shape == "0.5B" and find_spec("vllm") is not None
        return score_workload(machine, shape, make(machine.source(shape)), compiles=first, vllm=vllm)

    return {
        f"{shape}: {name}": partial(run, shape, make, first=i == 0)
        for shape in ("7B", "0.5B")
        for i, (name, make) in enumerate(workloads(machine.tiny).items())
    }


def workloads(tiny: bool) -> dict[str, Callable[[TokenSource], Workload]]:
    """Groups behind prompts of 512 tokens, sixes as in RM-Bench, and one long completion."""
    unit = 1 if tiny else 32

    def group(source: TokenSource, size: int) -> Workload:
        lengths = [8 * unit + (56 * unit * i) // (size - 1) for i in range(size)]
        return Workload("group", "", [source.group(16 * unit, lengths)])

    def sixes(source: TokenSource) -> Workload:
        def length(smallest: int, largest: int) -> int:
            return source.random.randint(smallest * unit, largest * unit)

        return Workload("sixes", "", [source.group(length(1, 8), [length(2, 20) for _ in range(6)]) for _ in range(4)])

    def long(source: TokenSource) -> Workload:
        return Workload("long", "", [source.group(4 * unit, [1024 * unit])])

    return {
        "8 completions of 256 to 2,048 tokens, prompt of 512": partial(group, size=8),
        "16 completions of 256 to 2,048 tokens, prompt of 512": partial(group, size=16),
        "4 prompts with 6 responses of 64 to 640 tokens": sixes,
        "one completion of 32,768 tokens": long,
    }


def score_workload(machine: Machine, shape: str, workload: Workload, compiles: bool, vllm: bool) -> dict[str, Any]:
    """
    One row of the table: seconds of each method in rounds by turns, after a pass that shows its memory and warms it
    up. FlexAttention, which compiles for seconds, is tried only if `compiles`.
    """
    model = machine.kept(shape)
    # In the second pass, so not for the few tokens on which a model is tried.
    kernels.CALLS_BEFORE_COMPILING = model.config.num_hidden_layers if compiles else math.inf
    runs: dict[str, Callable[[], object]] = {}
    peaks: dict[str, int] = {}
    absent: dict[str, str] = {}
    kernels.choices.clear()
    sizes: dict[str, int] = {}
    for name in ("endotrl", *RIVALS):
        batches, size = workload.batches, max(map(len, workload.batches))
        while name not in runs and name not in absent:
            free_memory()
            try:
                method = METHODS[name](model, model.dtype, machine.device)
                for _ in range(2 if name == "endotrl" else 0):
                    method(batches)  # chooses the kernel of the attention, which takes memory
                with peak_memory(machine.device) as peak:
                    method(batches)
                peaks[name], sizes[name], runs[name] = peak.extra, size, partial(method, batches)
            except torch.OutOfMemoryError as error:
                if name == "endotrl":
                    raise
                if size == 1:
                    absent[name] = in_a_line(error)
                # As a user would: micro-batches of half the size.
                size = max(1, size // 2)
                batches = [rows[i : i + size] for rows in workload.batches for i in range(0, len(rows), size)]
            except Exception as error:  # a rival that fails is shown as one that fails
                if name == "endotrl":
                    raise
                absent[name] = in_a_line(error)
    free_memory()
    title = f"{workload.name}, {len(workload.rows)} rows"
    times = alternate(runs, 1 if machine.tiny else ROUNDS, machine.device, title, warm=True)
    seconds = {name: spread(values)["median"] for name, values in times.items()}
    if vllm:
        free_memory()
        try:
            seconds["vllm"] = vllm_seconds(machine.checkpoint(shape), workload.rows)
        except Exception as error:
            absent["vllm"] = in_a_line(error)
    work, peak_rates = useful_work(workload.rows), machine.rooflines
    bound = machine.bound(shape, work)
    # A reward model has no LM head; all others must do at least the useful work.
    least = {**dict.fromkeys(seconds, bound), "reward_model": machine.bound(shape, replace(work, positions=0))}
    return {
        "seconds": seconds,
        "ratios": {name: value / seconds["endotrl"] for name, value in seconds.items()},
        "peak_bytes": peaks,
        "batch_rows": sizes,
        "absent": absent,
        "kernels": [
            {
                "tokens": 2**token_bits,
                "chosen": choice.name,
                "seconds": {name: value if math.isfinite(value) else None for name, value in choice.seconds.items()},
            }
            for (*_, token_bits, _), choice in kernels.choices.items()
        ],
        "scored_tokens_per_second": work.positions / seconds["endotrl"],
        "share_of_peak": work.flops(machine.size(shape)) / seconds["endotrl"] / peak_rates["matmul_peak"],
        "roofline_seconds": bound,
        "impossible": [name for name, value in seconds.items() if value < TOO_FAST * least[name]],
        **peak_rates,
    }


def vllm_seconds(path: str, rows: Sequence[Rendered]) -> float:
    """Seconds in which vLLM gives the log-probabilities of all tokens of prompts and completions."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=path,
        dtype="bfloat16",
        skip_tokenizer_init=True,
        gpu_memory_utilization=0.4,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    prompts = [{"prompt_token_ids": [*row.prompt_ids, *row.completion_ids]} for row in rows]
    settings = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        llm.generate(prompts, settings, use_tqdm=False)
        times.append(time.perf_counter() - started)
    return min(times)


# A GRPO step


# Name -> shape, placement of `benchmarks.training_step` (and whether it is put on an adapter), settings of the reward.
STEPS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "7B: shared with LoRA, beta = 0": ("7B", "lora", {}),
    "7B: shared with LoRA, riding on the reference pass": ("7B", "lora_beta", {}),
    "7B: own copy, LoRA, beta > 0": ("7B", "lora_own", {}),
    "0.5B: own copy, all weights trained, beta = 0": ("0.5B", "own_copy", {}),
    "0.5B: own copy, offloaded, all weights trained": ("0.5B", "own_copy", {"offload": True}),
    "0.5B: shared with LoRA, beta = 0": ("0.5B", "lora", {}),
    "0.5B: shared with LoRA, riding on the reference pass": ("0.5B", "lora_beta", {}),
    "0.5B: shared reference, all weights trained": ("0.5B", "reference", {}),
}


def training_step(machine: Machine) -> dict[str, Cell]:
    """What the reward adds to a step, for each place that its weights can have."""
    new_tokens, prompt_tokens, num_steps = (8, 16, 2) if machine.tiny else (64, 256, 3)

    def run(shape: str, name: str, settings: dict[str, Any]) -> dict[str, Any]:
        from benchmarks.training_step import PLACEMENTS, Placement, run_placement  # needs peft

        machine.release()
        own = Placement("own copy, LoRA", lora=True, beta=0.05, shared=False)
        placement = {**PLACEMENTS, "lora_own": own}[name]
        source = machine.source(shape)
        prompts = [" ".join(f"t{i}" for i in source.draw(prompt_tokens)) for _ in range(num_steps)]
        # A reference model is loaded by name; 7B has none, and needs no 15 GB on the disk.
        small = shape == "0.5B"
        path = machine.checkpoint(shape) if small else ""
        make_policy = partial(load_model, path, "bfloat16") if small else partial(machine.model, shape)
        frozen = path if small else None if placement.shared else machine.model(shape)
        settings = {"dtype": "bfloat16", **settings} if small else settings
        result = run_placement(
            placement,
            make_policy,
            machine.tokenizer(shape),
            frozen,  # type: ignore[arg-type]  # `None`: shared
            prompts,
            machine.device,
            new_tokens,
            seed=0,
            **settings,
        )
        bounds = step_bounds(machine, shape, placement, prompt_tokens, new_tokens)
        return {
            **{key: value for key, value in result.items() if key != "rounds"},
            **{f"{name}_bound": bound for name, bound in bounds.items()},
            "impossible": [n for n, bound in bounds.items() if result[f"{n}_seconds"]["median"] < TOO_FAST * bound],
        }

    return {name: partial(run, *arguments) for name, arguments in STEPS.items()}


def step_bounds(
    machine: Machine, shape: str, placement: "Placement", prompt: int, new_tokens: int
) -> dict[str, float]:
    """
    Seconds below which a step and the reward in it cannot be: decoding reads the weights for each token; products of
    the trained rows are three passes (two under LoRA, whose frozen weights have no gradients), and one of the
    reference. The reward has a pass of its own, or, riding on the reference pass, only the head.
    """
    rows, reference = 8, placement.beta > 0
    length, positions = prompt + new_tokens, rows * new_tokens
    batch = Work(rows * length, rows * length * (length + 1) // 2, positions)
    pairs = prompt * (prompt + 1) // 2 + rows * (new_tokens * prompt + new_tokens * (new_tokens + 1) // 2)
    shared_prompt = Work(prompt + positions, pairs, positions)
    passes = (2 if placement.lora else 3) + reference
    return {
        "step": new_tokens * machine.bound(shape, Work(1, 1, 1)) + passes * machine.bound(shape, batch),
        "reward": machine.bound(shape, Work(0, 0, positions) if placement.shared and reference else shared_prompt),
    }


# Learning


def learning(machine: Machine) -> dict[str, Cell]:
    """The demo's arithmetic by its own reward and by controls: seconds until 90% of sampled answers are right."""
    base = machine.folder / "arithmetic"

    def run(name: str) -> dict[str, Any]:
        tokenizer = arithmetic.make_tokenizer()
        if not base.exists():
            torch.manual_seed(0)
            model = arithmetic.make_model(tokenizer, hidden_size=96, intermediate_size=256).to(machine.device)
            pretraining = {**PRETRAINING, "seed": 0, "digits": DIGITS, **({"steps": 5} if machine.tiny else {})}
            arithmetic.pretrain(model, tokenizer, held_out=[], wrong=arithmetic.derailed_answer, **pretraining)
            model.save_pretrained(base)
        reward = {
            "own reward": partial(EndogenousReward, str(base), tokenizer),
            "random": partial(RandomReward, 0),
            "length": LengthReward,
        }[name]()
        curve = _Curve(LEARNING_SECONDS)
        size = {"max_steps": 2, "per_device_train_batch_size": 16} if machine.tiny else {"max_steps": 100}
        steps = {**ARITHMETIC, **size}
        with tempfile.TemporaryDirectory() as folder:
            trainer = GRPOTrainer(
                model=load_model(base),
                reward_funcs=[reward, arithmetic.accuracy],
                args=machine.grpo(folder, **steps, reward_weights=[1.0, 0.0], logging_steps=1),
                train_dataset=arithmetic.make_dataset(arithmetic.make_questions(3000, 2, DIGITS)),
                processing_class=tokenizer,
                callbacks=[curve],
            )
            trainer.train()
        reached = [seconds for seconds, accuracy in curve.points if accuracy >= 0.9]
        return {
            "first": curve.points[0][1],
            "last": curve.points[-1][1],
            "seconds": curve.points[-1][0],
            "seconds_to_90": reached[0] if reached else None,
        }

    return {name: partial(run, name) for name in ("own reward", "random", "length")}


class _Curve(TrainerCallback):
    """Accuracy by seconds, of which a run gets no more than these."""

    def __init__(self, seconds: float) -> None:
        self.points: list[tuple[float, float]] = []
        self._seconds = seconds

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "rewards/accuracy/mean" in logs:
            self.points.append((time.perf_counter() - self._started, logs["rewards/accuracy/mean"]))
            control.should_training_stop |= self.points[-1][0] > self._seconds


PARTS = {"exactness": exactness, "scoring": scoring, "step": training_step, "learning": learning}
# Of the minutes, so that a run that is too short has something of each part. Expected of an H100: 65, 130, 70 and 60
# seconds, of which 40 compile FlexAttention.
SHARES = {"exactness": 0.2, "scoring": 0.38, "step": 0.24, "learning": 0.18}


def free_memory() -> None:
    """Gives what is not used any more back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def in_a_line(error: BaseException) -> str:
    """What went wrong, for a table."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words}"[:160].replace("|", "/")


def measure(
    machine: Machine,
    results: dict[str, Any],
    parts: Sequence[str],
    end: float,
    write: Callable[[], object],
    skip: Collection[str] = (),
) -> list[str]:
    """
    Measures what is missing until `end`, in seconds since 1970: each part for its share of the time, then the rest;
    returns what had no time. A cell begins if there is time for one like the last of its part. `write` keeps the
    results, before each cell and after it, with the one that is `"running"`.
    """
    begun, total = time.time(), sum(SHARES[part] for part in parts)
    ends = {
        part: begun + (end - begun) * sum(SHARES[other] for other in parts[: i + 1]) / total
        for i, part in enumerate(parts)
    }
    last = dict.fromkeys(parts, 0.0)
    cells = {f"{part}/{name}": cell for part in parts for name, cell in PARTS[part](machine).items()}
    left = [key for key in cells if key not in results["cells"] and key not in skip]
    # What has failed before comes last.
    left.sort(key=lambda key: key in results["failed"])
    for ends_of_round in (ends, dict.fromkeys(parts, end)):
        for part in parts:
            for key in [key for key in left if key.startswith(f"{part}/")]:
                started = time.time()
                if started + last[part] > ends_of_round[part]:
                    continue
                left.remove(key)
                results["running"] = key
                write()
                try:
                    results["cells"][key] = {**cells[key](), "took": time.time() - started}
                    results["failed"].pop(key, None)
                except Exception as error:
                    # The others are still to be measured; a failed cell is shown, and tried again in the next run.
                    results["failed"][key] = in_a_line(error)
                    tqdm.write(f"FAILED: {key}\n{traceback.format_exc()}")
                del results["running"]
                last[part] = time.time() - started
                write()
                tqdm.write(f"{last[part]:6.1f} s  {key}")
                if not answers(machine.device):
                    return left
            machine.release()
    return left


def answers(device: str) -> bool:
    """Whether the device still works: after an illegal access, nothing runs on it in this process any more."""
    try:
        synchronize(device)
    except RuntimeError:
        return False
    return True


def main() -> None:
    """Runs what is not there yet, as far as the time goes, and writes figures and page."""
    args = make_parser().parse_args()
    device = "cpu" if args.cpu else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device here. `--cpu` runs everything in tiny sizes, to show that it runs.")
    quiet_libraries()
    gc.freeze()  # memory is given back often: to look at all objects of the libraries takes half a second each time
    # Some containers let float32 be rounded to TF32.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    run = {**describe_run("benchmarks.gpu", device, "--cpu" if args.cpu else ""), "tiny": args.cpu}
    file = args.output / "results" / "gpu.json"
    results: dict[str, Any] = {"run": run, "cells": {}, "failed": {}}
    if file.exists():
        former = json.loads(file.read_text(encoding="utf-8"))
        changed = [k for k in run if k not in ("command", "date") and former["run"].get(k) != run[k]]
        if changed:
            raise SystemExit(
                f"{file} is of another machine or other versions ({', '.join(changed)}), which one page must not mix. "
                "Give --fresh to begin anew, or another --output."
            )
        results |= {"cells": former["cells"], "failed": former["failed"]}
        if "running" in former:
            results["failed"][former["running"]] = "the process ended in it, or was stopped"
    file.parent.mkdir(parents=True, exist_ok=True)

    def write() -> Path:
        write_json(file, results)
        return write_page(results, args.output, None if args.cpu else args.readme)

    end = time.time() + 60 * args.minutes if args.until is None else args.until
    with tempfile.TemporaryDirectory() as folder:
        machine = Machine(device, args.cpu, Path(folder))
        # What has ended one process is not tried in the next one of the same run.
        skip = list(results["failed"]) if args.restarted else []
        late = measure(machine, results, args.part or list(PARTS), end, write, skip)
    tqdm.write(write().read_text(encoding="utf-8"))
    if not answers(device):
        tqdm.write("The device does not answer any more.")
        raise SystemExit(LOST_DEVICE)
    if late:
        tqdm.write(f"Not measured in {args.minutes:g} minutes: {'; '.join(late)}. The same command goes on with them.")
    if wrong := [k for k, cell in results["cells"].items() if cell.get("right") is False or cell.get("impossible")]:
        tqdm.write(f"Wrong numbers, or faster than possible: {'; '.join(wrong)}.")
    if failed := results["failed"]:
        tqdm.write(f"Failed: {'; '.join(failed)}.")
    raise SystemExit(1 if failed or wrong else 0)


if __name__ == "__main__":
    main()
