# SPDX-License-Identifier: Apache-2.0
"""
The reward's share of a GRPO step, for each place that its frozen weights can have.

    python -m benchmarks.training_step                     # about 5 minutes on 2 CPU cores
    python -m benchmarks.training_step --device cuda
    python -m benchmarks.training_step --quick             # shows in seconds that everything runs
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.measure import add_common_options, describe_run, machine_line, markdown_table, spread, synchronize
from endotrl import EndogenousReward
from endotrl.demo.grpo_runs import load_model
from endotrl.frozen.names import resolve_model
from endotrl.reporting import quiet_libraries, terminal_table


TARGET = 0.05
QUESTIONS = (
    "Explain how rain forms.",
    "Describe the city of Paris to a child.",
    "Why do leaves change their colour in autumn?",
    "Write a short story about a lighthouse.",
    "How does a bicycle stay upright?",
    "What should one know before buying a dog?",
    "Explain what a prime number is, with examples.",
    "Describe how bread is made.",
)


@dataclass(frozen=True)
class Placement:
    """
    One way of training with the reward.

    Attributes:
        label (`str`):
            For tables.
        lora (`bool`):
            Whether the policy is an adapter on a frozen base.
        beta (`float`):
            Weight of TRL's KL penalty; above 0, TRL runs a reference model over every completion.
        shared (`bool`):
            Whether the reward shares the trainer's frozen weights.
    """

    label: str
    lora: bool
    beta: float
    shared: bool


PLACEMENTS = {
    "own_copy": Placement("own copy, all weights trained, beta = 0", lora=False, beta=0.0, shared=False),
    "lora": Placement("shared with LoRA, beta = 0", lora=True, beta=0.0, shared=True),
    "lora_beta": Placement("shared with LoRA, beta > 0", lora=True, beta=0.05, shared=True),
    "reference": Placement("shared reference, all weights trained, beta > 0", lora=False, beta=0.05, shared=True),
}


class TimedReward(EndogenousReward):
    """
    The reward, with a clock.

    Args:
        synchronized_device (`str`):
            Device whose pending work is waited for before the clock starts; the rest is as in `EndogenousReward`.

    Attributes:
        seconds (`list[float]`):
            Duration of every call.
    """

    def __init__(self, *args: Any, synchronized_device: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seconds: list[float] = []
        self._synchronized_device = synchronized_device

    def __call__(self, *args: Any, **kwargs: Any) -> list[float | None]:
        synchronize(self._synchronized_device)
        started = time.perf_counter()
        # Rewards are numbers: nothing is pending on the device when they are there.
        rewards = super().__call__(*args, **kwargs)
        self.seconds.append(time.perf_counter() - started)
        return rewards


class _Bar(TrainerCallback):
    def __init__(self, title: str) -> None:
        self._title = title

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar = tqdm(total=state.max_steps, desc=self._title, unit=" steps")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.close()


def main() -> None:
    """Runs the benchmark and writes its JSON and page."""
    args = make_parser().parse_args()
    if args.steps < 1:
        raise SystemExit(f"--steps is {args.steps}, but at least one step must be counted.")
    quiet_libraries()
    console = Console(width=min(80, Console().width))
    path = resolve_model(args.model)
    new_tokens = 8 if args.quick else 64
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    # TRL runs one prompt a step: 8 generations are the batch.
    prompts = [[{"role": "user", "content": QUESTIONS[i % len(QUESTIONS)]}] for i in range(args.steps + 1)]
    results: dict[str, Any] = {
        "run": describe_run("benchmarks.training_step", args.device),
        "settings": {
            "model": "SmolLM2-135M-Instruct" if args.model == "quickstart" else args.model,
            "dtype": args.dtype,
            "device": args.device,
            "steps": args.steps,
            "num_generations": 8,
            "max_completion_length": new_tokens,
            "seed": args.seed,
            "quick": args.quick,
        },
        "placements": {
            name: run_placement(
                placement,
                lambda: load_model(path, args.dtype),
                tokenizer,
                path,
                prompts,
                args.device,
                new_tokens,
                dtype=args.dtype,
                seed=args.seed,
            )
            for name, placement in PLACEMENTS.items()
        },
    }
    for name in PLACEMENTS:
        # An own copy has no target: it is what the others are there to avoid.
        share = results["placements"][name]["added"]["median"]
        results["placements"][name]["reached"] = share < TARGET if PLACEMENTS[name].shared else None
    console.print(
        terminal_table(
            ["step, s", "reward, s", "adds", "MB", "< 5%", "placement"],
            [
                [
                    f"{entry['step_seconds']['median']:.2f}",
                    f"{entry['reward_seconds']['median']:.3f}",
                    f"{entry['added']['median']:.1%}",
                    f"{entry['extra_bytes'] / 1e6:,.0f}",
                    {True: "yes", False: "no", None: "–"}[entry["reached"]],
                    entry["label"],
                ]
                for entry in results["placements"].values()
            ],
            title="What the reward adds to a GRPO step",
        )
    )
    folder = args.output / "results"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "training_step.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    page = folder / "training_step.md"
    page.write_text(make_page(results), encoding="utf-8")
    console.print(f"Written: {page}, {page.with_suffix('.json')}", markup=False, highlight=False, soft_wrap=True)


def make_parser() -> argparse.ArgumentParser:
    """Options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training_step", description=__doc__.strip().splitlines()[0]
    )
    add_common_options(parser)
    parser.add_argument("--steps", type=int, default=4, help="counted steps, after one to warm up (default: 4)")
    return parser


def run_placement(
    placement: Placement,
    make_policy: Callable[[], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    frozen: str | PreTrainedModel,
    prompts: Sequence[Any],
    device: str,
    new_tokens: int,
    seed: int,
    **reward_settings: Any,
) -> dict[str, Any]:
    """Trains one step per prompt, of which the first is not counted, and reads the clocks."""
    dataset = Dataset.from_dict({"prompt": list(prompts)})
    reward = TimedReward(
        None if placement.shared else frozen,
        tokenizer,
        device=device if isinstance(frozen, str) or placement.shared else None,
        synchronized_device=device,
        **reward_settings,
    )
    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(
            output_dir=folder,
            max_steps=len(prompts),
            per_device_train_batch_size=8,
            num_generations=8,
            max_completion_length=new_tokens,
            beta=placement.beta,
            learning_rate=1e-6,
            seed=seed,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=torch.device(device).type == "cpu",
            gradient_checkpointing=False,
            bf16=False,  # the weights have the dtype already
        )
        trainer = GRPOTrainer(
            model=make_policy(),
            reward_funcs=reward,
            args=args,
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=16, target_modules=["q_proj", "v_proj"]) if placement.lora else None,
        )
        if placement.shared:
            reward.attach(trainer)
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(_Bar(placement.label))
        trainer.train()
    log = [entry for entry in trainer.state.log_history if "step_time" in entry][1:]
    step_seconds, reward_seconds = [entry["step_time"] for entry in log], reward.seconds[1:]
    extra = own_parameters(reward, trainer)
    return {
        "label": placement.label,
        "step_seconds": spread(step_seconds),
        "reward_seconds": spread(reward_seconds),
        "added": spread([r / (s - r) for r, s in zip(reward_seconds, step_seconds, strict=True)]),
        "completion_tokens": statistics.mean(entry["completions/mean_length"] for entry in log),
        "extra_parameters": sum(p.numel() for p in extra),
        "extra_bytes": sum(p.nbytes for p in extra),
        "rounds": {"step_seconds": step_seconds, "reward_seconds": reward_seconds},
    }


def own_parameters(reward: EndogenousReward, trainer: GRPOTrainer) -> list[torch.nn.Parameter]:
    """The frozen model's parameters that are not the trainer's."""
    models = [trainer.model, *([] if trainer.ref_model is None else [trainer.ref_model])]
    known = {id(parameter) for model in models for parameter in model.parameters()}
    with reward._require_placement().active() as frozen:
        return [parameter for parameter in frozen.parameters() if id(parameter) not in known]


def make_page(results: dict[str, Any]) -> str:
    """The page, in Markdown."""
    settings, entries = results["settings"], results["placements"]
    missed = [entry["label"] for entry in entries.values() if entry["reached"] is False]
    verdict = (
        f"The target, that a shared reward adds less than {TARGET:.0%} to a step, is missed by: {'; '.join(missed)}."
        if missed
        else f"The target, that a shared reward adds less than {TARGET:.0%} to a step, is reached in all three cases."
    )
    blocks = [
        "# What the reward adds to a GRPO step",
        machine_line(results["run"]),
        *(["**A quick run with tiny sizes: its figures mean nothing.**"] if settings["quick"] else []),
        f"{settings['model']} in {settings['dtype']} on {settings['device']}, TRL's `GRPOTrainer`: one prompt, "
        f"{settings['num_generations']} generations of at most {settings['max_completion_length']} tokens per step; "
        f"median of {settings['steps']} steps after one to warm up. A step is TRL's `step_time` (generation, reward, "
        "reference "
        "pass, loss and gradients). *Adds* is the reward call divided by the rest of the step. The call includes the "
        "entropies that the reward logs.",
        verdict,
        markdown_table(
            [
                "placement",
                "step, s",
                "reward call, s",
                "range",
                "adds",
                "range",
                "extra parameters, M",
                "extra MB",
                "< 5%",
            ],
            [
                [
                    entry["label"],
                    f"{entry['step_seconds']['median']:.2f}",
                    f"{entry['reward_seconds']['median']:.3f}",
                    f"{entry['reward_seconds']['min']:.3f} to {entry['reward_seconds']['max']:.3f}",
                    f"{entry['added']['median']:.1%}",
                    f"{entry['added']['min']:.1%} to {entry['added']['max']:.1%}",
                    f"{entry['extra_parameters'] / 1e6:.1f}",
                    f"{entry['extra_bytes'] / 1e6:,.0f}",
                    {True: "yes", False: "**no**", None: "no target"}[entry["reached"]],
                ]
                for entry in entries.values()
            ],
        ),
        "With LoRA and `beta = 0`, the reward runs its own pass over the policy without its adapter. With `beta > 0`, "
        "it "
        "reads TRL's reference pass and applies only the LM head.",
    ]
    return "\n\n".join(blocks) + "\n"


if __name__ == "__main__":
    main()
