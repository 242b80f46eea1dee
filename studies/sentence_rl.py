# SPDX-License-Identifier: Apache-2.0
r"""
From preferences to a policy, by sentences: a sentence reward model is trained on pairs, and a policy on its rewards.

The language: a response is up to 24 words out of 16, of which one is the full stop. A sentence with the word "good"
counts +1, one with "bad" -1; the gold score of a response is their sum, which only the preferences show to anybody.
Policy and reward model start from random transformers.

1. SentenceRewardTrainer learns from pairs of random responses, of which the one with the higher gold score is
  preferred.
2. The same random policy is trained on that model, with as many responses: by DenseGRPOTrainer on the rewards of the
  sentences, and by
   TRL's GRPOTrainer on the score of the response.

    python -m studies.sentence_rl                                 # about 3 minutes on 2 quiet cores
    python -m studies.sentence_rl --pairs 64 --steps 2 --seeds 1  # a look
"""

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging as transformers_logging
from trl import GRPOConfig, GRPOTrainer

from benchmarks.measure import write_figures
from endotrl import (
    DenseGRPOConfig,
    DenseGRPOTrainer,
    SentenceReward,
    SentenceRewardTrainer,
    SentenceRewardTrainerConfig,
)
from endotrl.reporting import terminal_table


LENGTH = 24
WORDS = [".", "good", "bad", *(f"w{i}" for i in range(13))]
PROMPTS = [f"q{i}" for i in range(8)]
LABELS = {"dense": "DenseGRPO, rewards of sentences", "scalar": "GRPO (TRL), score of the response"}


def gold(text: str) -> int:
    """Sentences with "good" less those with "bad"."""
    sentences = [sentence.split() for sentence in text.split(".")]
    return sum("good" in words for words in sentences) - sum("bad" in words for words in sentences)


def save_random_model(path: Path, seed: int) -> None:
    """A transformer that writes words at random, and the tokenizer of the language."""
    vocabulary = ["<eos>", "<pad>", *PROMPTS, *WORDS]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<pad>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=128, bos_token_id=None, eos_token_id=0, pad_token_id=1,
        )
    )  # fmt: skip
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def preferences(count: int, seed: int) -> Dataset:
    """Pairs of random responses with different gold scores."""
    rng = random.Random(seed)
    rows = []
    while len(rows) < count:
        pair = sorted((" ".join(rng.choices(WORDS, k=rng.randint(8, LENGTH))) for _ in range(2)), key=gold)
        if gold(pair[0]) != gold(pair[1]):
            rows.append({"prompt": rng.choice(PROMPTS), "chosen": f" {pair[1]}", "rejected": f" {pair[0]}"})
    return Dataset.from_list(rows)


def settings(folder: Path, seed: int) -> dict[str, Any]:
    """What all three trainers have in common."""
    return {
        "output_dir": str(folder), "seed": seed, "report_to": "none", "bf16": False, "gradient_checkpointing": False,
        "use_cpu": not torch.cuda.is_available(), "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1,
    }  # fmt: skip


def train_reward_model(base: Path, folder: Path, pairs: int, seed: int) -> float:
    """Trains the reward model into `folder`; its accuracy on held-out pairs."""
    args = SentenceRewardTrainerConfig(
        **settings(folder, seed),
        per_device_train_batch_size=32,
        learning_rate=2e-3,
        num_train_epochs=2,
        attention_dim=32,
    )
    data = preferences(pairs + 400, seed)
    trainer = SentenceRewardTrainer(
        str(base), args, train_dataset=data.select(range(pairs)), eval_dataset=data.select(range(pairs, pairs + 400))
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    accuracy = trainer.evaluate()["eval_accuracy"]
    trainer.save_model()
    return accuracy


def train_policy(arm: str, base: Path, reward_model: Path, folder: Path, steps: int, seed: int) -> list[float]:
    """Trains the policy; the mean gold score of its responses at every step."""
    curve: list[float] = []

    def gold_score(completions: list[str], **kwargs: Any) -> list[float]:
        scores = [float(gold(completion)) for completion in completions]
        curve.append(statistics.mean(scores))
        return scores

    common = {
        **settings(folder, seed), "per_device_train_batch_size": 64, "num_generations": 8, "max_steps": steps,
        "max_completion_length": LENGTH, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "beta": 0.0,
        "reward_weights": [1.0, 0.0],  # the gold score is only looked at
    }  # fmt: skip
    trainer_class, config_class = (DenseGRPOTrainer, DenseGRPOConfig) if arm == "dense" else (GRPOTrainer, GRPOConfig)
    trainer = trainer_class(
        str(base),
        reward_funcs=[SentenceReward(str(reward_model)), gold_score],
        args=config_class(**common),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS * 8}),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return curve


def main() -> None:
    """Runs both steps for every seed, and writes JSON."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=4000, help="preferences to learn from")
    parser.add_argument("--steps", type=int, default=60, help="policy updates, each on 64 responses")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("sentence-rl.json.gz"))
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    start = time.perf_counter()
    accuracies: list[float] = []
    curves: dict[str, list[list[float]]] = {arm: [] for arm in LABELS}
    with tqdm(total=args.seeds * 3, desc="Training", unit=" runs") as bar:
        for seed in range(args.seeds):
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                save_random_model(folder / "base", seed)
                accuracies.append(train_reward_model(folder / "base", folder / "reward", args.pairs, seed))
                bar.update()
                for arm in LABELS:
                    curves[arm].append(
                        train_policy(arm, folder / "base", folder / "reward", folder / arm, args.steps, seed)
                    )
                    bar.update()
    last = max(1, args.steps // 10)
    rows: list[list[object]] = []
    for arm, label in LABELS.items():
        ends = [statistics.mean(curve[-last:]) for curve in curves[arm]]
        spread = statistics.stdev(ends) if len(ends) > 1 else None
        rows.append([statistics.mean(curve[0] for curve in curves[arm]), statistics.mean(ends), spread, label])
    output = {
        "reward_model_accuracy": accuracies,
        "gold_scores": curves,
        "settings": {"pairs": args.pairs, "steps": args.steps, "seeds": args.seeds},
        "seconds": time.perf_counter() - start,
    }
    write_figures(args.output, output)
    console = Console()
    console.print(f"Reward model: {100 * statistics.mean(accuracies):.1f}% of held-out pairs in the right order.")
    title = f"Gold score of the policy's responses: first step, and mean of the last {last}"
    console.print(terminal_table(["before", "after", "std over seeds", "trained by"], rows, title))
    console.print(f"{args.output}, {output['seconds']:.0f} s", soft_wrap=True)


if __name__ == "__main__":
    main()
