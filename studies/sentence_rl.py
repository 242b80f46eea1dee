# SPDX-License-Identifier: Apache-2.0
r"""
Does RL gain from rewards of sentences? Policies trained on them and on scores of whole responses, by the samples that
they take.

**Facts** (`--states DIR`; docs/results/sentence-rl.md). The policy, a small transformer, answers prompts about 4 to 6
facts by one sentence each, of which half are right at first: it has learned from such answers. Facts are those that no
reward model was trained on. The reward models are those of [`studies.sentence_reward`], of that study's depth and
penalty: heads on the states of the frozen SmolLM2-135M-Instruct. All arms are `DenseGRPOTrainer`, with one policy,
batch size, KL penalty and learning rate (the best of some for `response`, on a seed of its own), and for each seed the
same prompts. The truth is only measured.

- `sentences`: the sentence model (own values, sum); a sentence is credited with its own reward (`gamma=0.1`).
- `to-go`: the same; a sentence is credited with its own and all later rewards (`gamma=1`, the default).
- `score`: the same rewards, added up; all sentences are credited with the score. Only credit differs from the first.
- `response`: the score of the response-level model. Only the reward model differs from `score`.
- `true-sentences`, `true-to-go`, `true-score`: the same without a reward model: which sentences are right, and their
  number. That is what credit can give at all.

**A made-up language** (the default). A response is up to 24 words out of 16, of which one is the full stop. A sentence
with the word "good" counts +1, one with "bad" -1; the gold score of a response is their sum, which only the
preferences show to anybody. SentenceRewardTrainer learns from pairs of random responses; the same random policy is
trained on that model by DenseGRPOTrainer on the rewards of the sentences, and by TRL's GRPOTrainer on the score.

    python -m studies.sentence_rl                                 # about 3 minutes on 2 quiet cores
    python -m studies.sentence_rl --pairs 64 --steps 2 --seeds 1  # a look
    python -m studies.sentence_rl --states DIR                    # about 30 minutes of one core; what is there is kept
"""

import argparse
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging as transformers_logging
from trl import GRPOConfig, GRPOTrainer

from benchmarks.measure import describe_run, machine_line, markdown_table, read_figures, write_figures
from endotrl import (
    DenseGRPOConfig,
    DenseGRPOTrainer,
    SentenceReward,
    SentenceRewardModel,
    SentenceRewardTrainer,
    SentenceRewardTrainerConfig,
)
from endotrl.reporting import terminal_table
from endotrl.rewards.protocol import DenseScores
from endotrl.sentence import RuleSegmenter
from endotrl.sentence.tokens import find_sentences
from endotrl.tasks import facts

from .sentence_layers import as_model
from .sentence_reward import stack, train, training_pairs
from .sentence_states import States, statement
from .sentence_statistics import percent


BATCH = 64  # responses of a step
LENGTH = 24
WORDS = [".", "good", "bad", *(f"w{i}" for i in range(13))]
PROMPTS = [f"q{i}" for i in range(8)]
LABELS = {"dense": "DenseGRPO, rewards of sentences", "scalar": "GRPO (TRL), score of the response"}


def gold(text: str) -> int:
    """Sentences with "good" less those with "bad"."""
    sentences = [sentence.split() for sentence in text.split(".")]
    return sum("good" in words for words in sentences) - sum("bad" in words for words in sentences)


def random_model(words: Sequence[str], hidden_size: int, seed: int) -> tuple[LlamaForCausalLM, Any]:
    """A transformer that writes words at random, and its tokenizer."""
    vocabulary = ["<eos>", "<pad>", *words]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<pad>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary), hidden_size=hidden_size, intermediate_size=2 * hidden_size,
            num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128, bos_token_id=None,
            eos_token_id=0, pad_token_id=1,
        )
    )  # fmt: skip
    return model, tokenizer


def save(path: Path, model: Any, tokenizer: Any) -> None:
    """Saves a policy."""
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
    """What all trainers have in common."""
    return {
        "output_dir": str(folder), "seed": seed, "report_to": "none", "bf16": False, "gradient_checkpointing": False,
        "use_cpu": not torch.cuda.is_available(), "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1,
    }  # fmt: skip


def train_reward_model(base: Path, folder: Path, pairs: int, seed: int) -> float:
    """Trains the reward model of the made-up language into `folder`; its accuracy on held-out pairs."""
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


def train_policy(
    base: Path, reward: Any, measure: Callable[..., list[float]], prompts: list[str], seed: int, **options: Any
) -> None:
    """
    Trains the policy, by TRL's GRPOTrainer if `options` name no `credit`; they are settings of the trainer.
    `measure` is called with all responses like a reward function, and has no weight.
    """
    trainer_class, config_class = (
        (DenseGRPOTrainer, DenseGRPOConfig) if "credit" in options else (GRPOTrainer, GRPOConfig)
    )
    with tempfile.TemporaryDirectory() as folder:
        args = config_class(
            **settings(Path(folder), seed),
            per_device_train_batch_size=BATCH,
            lr_scheduler_type="constant",
            reward_weights=[1.0, 0.0],
            **options,
        )
        dataset = Dataset.from_dict({"prompt": prompts})
        trainer = trainer_class(str(base), reward_funcs=[reward, measure], args=args, train_dataset=dataset)
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def made_up_language(pairs: int, steps: int, seeds: int, output: Path) -> None:
    """Runs both steps for every seed, and writes JSON."""
    start = time.perf_counter()
    accuracies: list[float] = []
    curves: dict[str, list[list[float]]] = {arm: [] for arm in LABELS}
    with tqdm(total=seeds * 3, desc="Training", unit=" runs") as bar:
        for seed in range(seeds):
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                save(folder / "base", *random_model([*PROMPTS, *WORDS], 64, seed))
                accuracies.append(train_reward_model(folder / "base", folder / "reward", pairs, seed))
                bar.update()
                for arm in LABELS:
                    curve: list[float] = []

                    def gold_score(completions: list[str], curve: list[float] = curve, **kwargs: Any) -> list[float]:
                        scores = [float(gold(completion)) for completion in completions]
                        curve.append(statistics.mean(scores))
                        return scores

                    train_policy(
                        folder / "base", SentenceReward(str(folder / "reward")), gold_score, PROMPTS * 8, seed,
                        max_steps=steps, num_generations=8, max_completion_length=LENGTH, learning_rate=1e-3, beta=0.0,
                        **({"credit": "token"} if arm == "dense" else {}),
                    )  # fmt: skip
                    curves[arm].append(curve)
                    bar.update()
    last = max(1, steps // 10)
    rows: list[list[object]] = []
    for arm, label in LABELS.items():
        ends = [statistics.mean(curve[-last:]) for curve in curves[arm]]
        spread = statistics.stdev(ends) if len(ends) > 1 else None
        rows.append([statistics.mean(curve[0] for curve in curves[arm]), statistics.mean(ends), spread, label])
    figures = {
        "reward_model_accuracy": accuracies,
        "gold_scores": curves,
        "settings": {"pairs": pairs, "steps": steps, "seeds": seeds},
        "seconds": time.perf_counter() - start,
    }
    write_figures(output, figures)
    console = Console()
    console.print(f"Reward model: {100 * statistics.mean(accuracies):.1f}% of held-out pairs in the right order.")
    title = f"Gold score of the policy's responses: first step, and mean of the last {last}"
    console.print(terminal_table(["before", "after", "std over seeds", "trained by"], rows, title))
    console.print(f"{output}, {figures['seconds']:.0f} s", soft_wrap=True)


ARMS = {
    "sentences": "sentence rewards, each sentence its own",
    "to-go": "sentence rewards, own and later ones",
    "score": "sentence rewards, added up",
    "response": "response-level score",
    "true-sentences": "truth, each sentence its own",
    "true-to-go": "truth, own and later sentences",
    "true-score": "truth, number of right sentences",
}
PAIRED = {"sentences": "response", "to-go": "response", "score": "response", "true-sentences": "true-score"}
PAIRED["true-to-go"] = "true-score"
CREDIT: dict[str, dict[str, Any]] = {
    "sentences": {"credit": "sentence", "gamma": 0.1},
    "to-go": {"credit": "sentence"},
    "score": {"credit": "outcome"},
}
SEEDS, STEPS = 3, 32
LEARNING_RATES, TRIAL_SEED = (1e-4, 3e-4), 100
AT_ALL_RATES = ("sentences", "response", "true-sentences", "true-score")
KL = 0.05
GENERATIONS = 4  # responses to a prompt
SENTENCES = (4, 6)  # of an answer
ANSWER_LENGTH = 64  # words
BASE_STEPS = 1000  # of the policy on answers of which half of the sentences are right
SIGNAL_PROMPTS = 64
WINDOW = 5  # steps over which the share of right sentences is averaged


class Facts:
    """Prompts about facts that no reward model was trained on, answers to them, and which sentences are right."""

    def __init__(self) -> None:
        _, questions = facts.load_questions()
        # A topic is one word to the policy, such as "The_capital_of_France_is_?.".
        self.questions = {q.statement.replace("{answer}", "?").replace(" ", "_"): q for q in questions}
        self.segmenter = RuleSegmenter()

    def prompts(self, count: int, seed: int) -> list[str]:
        """Topics, and a colon."""
        generator = random.Random(seed)
        topics = list(self.questions)
        return [" ".join([*generator.sample(topics, generator.randint(*SENTENCES)), ":"]) for _ in range(count)]

    def answer(self, prompt: str, generator: random.Random) -> str:
        """One sentence for each topic, of which half are right, as in the reward models' training pairs."""
        everything = list(self.questions.values())
        return " ".join(
            statement(self.questions[topic], generator.random() < 0.5, everything, generator)
            for topic in prompt.split()[:-1]
        )

    def right(self, prompt: str, sentences: Sequence[str]) -> list[bool]:
        """Which sentences say a right answer to one of the topics, and the first time."""
        missing = [
            {question.statement.replace("{answer}", answer) for answer in question.answers}
            for question in (self.questions[topic] for topic in prompt.split()[:-1])
        ]
        flags = []
        for sentence in sentences:
            said = [wanted for wanted in missing if sentence.strip() in wanted]
            missing = [wanted for wanted in missing if wanted not in said]
            flags.append(bool(said))
        return flags

    def words(self) -> list[str]:
        """The vocabulary of prompts and answers."""
        texts = {
            question.statement.replace("{answer}", other.answers[0])
            for question in self.questions.values()
            for other in self.questions.values()
            if other.relation == question.relation
        }
        return [*self.questions, ":", *sorted({word for text in texts for word in text.split()})]


def train_base(task: Facts, folder: Path) -> None:
    """The policy before RL: it has learned from answers of which half of the sentences are right."""
    model, tokenizer = random_model(task.words(), 128, seed=0)
    generator = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, BASE_STEPS)
    bar = tqdm(range(BASE_STEPS), desc="Policy before RL", unit=" steps")
    for step in bar:
        prompts = task.prompts(BATCH, seed=-1 - step)
        rows = tokenizer(
            [f"{prompt} {task.answer(prompt, generator)} <eos>" for prompt in prompts],
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
        for row, prompt in zip(labels, prompts, strict=True):
            row[: len(prompt.split())] = -100
        loss = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    save(folder, model, tokenizer)


class TrueReward:
    """1 for every right sentence, at its last token."""

    __name__ = "truth"

    def __init__(self, task: Facts, tokenizer: Any) -> None:
        self.task, self.tokenizer = task, tokenizer

    def __call__(self, prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
        """The number of right sentences."""
        return [
            float(sum(self.task.right(prompt, [text[a:b] for a, b in self.task.segmenter(text)])))
            for prompt, text in zip(prompts, completions, strict=True)
        ]

    def outcome_and_token_rewards(
        self, prompts: list[str], completions: list[str], completion_ids: list[list[int]], **kwargs: Any
    ) -> DenseScores:
        """The same, and for every token."""
        token_rewards = []
        for prompt, ids in zip(prompts, completion_ids, strict=True):
            found = find_sentences(self.tokenizer, self.task.segmenter, ids)
            texts = [found.text[a:b].replace("<eos>", "") for a, b in found.spans]
            token_rewards.append(torch.zeros(len(ids)))
            token_rewards[-1][found.last_tokens] = torch.tensor(self.task.right(prompt, texts), dtype=torch.float32)
        return DenseScores([rewards.sum().item() for rewards in token_rewards], token_rewards)


class TrainedReward:
    """A reward model, for which the policy's responses are answers to the prompts that it was trained on."""

    def __init__(self, reward: SentenceReward) -> None:
        self.reward, self.__name__ = reward, reward.__name__

    def __call__(self, prompts: list[str], completions: list[str], **kwargs: Any) -> list[float | None]:
        """One number per response."""
        return self.outcome_and_token_rewards(prompts, completions, **kwargs).outcomes

    def outcome_and_token_rewards(self, prompts: list[str], completions: list[str], **kwargs: Any) -> DenseScores:
        """The same, and for every token."""
        asked = [[{"role": "user", "content": f"Tell me {len(prompt.split()) - 1} facts."}] for prompt in prompts]
        answers = [[{"role": "assistant", "content": text}] for text in completions]
        return self.reward.outcome_and_token_rewards(asked, answers, kwargs["completion_ids"])


def reward_of(arm: str) -> str:
    """What judges the responses of an arm: the truth, or an arm of [`studies.sentence_reward`]."""
    return "truth" if arm.startswith("true") else "response" if arm == "response" else "own-sum"


def credit_of(arm: str) -> dict[str, Any]:
    """Settings of the trainer that say how an arm credits."""
    return CREDIT["score" if arm == "response" else arm.removeprefix("true-")]


def credited(rewards: Sequence[float], credit: str, gamma: float = 1.0) -> list[float]:
    """What each sentence is credited with."""
    if credit == "outcome":
        return [sum(rewards)] * len(rewards)
    return [sum(gamma**i * reward for i, reward in enumerate(rewards[k:])) for k in range(len(rewards))]


def correlation(prompts: Sequence[str], first: Sequence[list[float]], second: Sequence[list[float]]) -> float:
    """Of values of sentences, less their means over the responses to a prompt, sentence by sentence."""
    groups: dict[tuple[str, int], list[list[float]]] = {}
    for prompt, *rows in zip(prompts, first, second, strict=True):
        for k, pair in enumerate(zip(*rows, strict=True)):
            groups.setdefault((prompt, k), []).append(list(pair))
    centred = torch.cat([torch.tensor(group) - torch.tensor(group).mean(dim=0) for group in groups.values()])
    return torch.corrcoef(centred.T)[0, 1].item()


class FactsRuns:
    """Cells of arm, seed and learning rate: what is not in the figures is run."""

    def __init__(self, states: States, output: Path) -> None:
        self.states, self.task = states, Facts()
        self.base = states.folder / "policy"
        self.choices = read_figures(output / "sentence.json.gz")["choices"]
        self.path = output / "sentence-rl.json.gz"
        self.figures = read_figures(self.path) if self.path.exists() else {"trial": [], "cells": []}
        self.figures["settings"] = describe_run("studies.sentence_rl", "cpu", "--states DIR")

    @cached_property
    def tokenizer(self) -> Any:
        """Of the policy, which is trained if it is not there."""
        if not (self.base / "model.safetensors").exists():
            train_base(self.task, self.base)
        return AutoTokenizer.from_pretrained(self.base)

    @cached_property
    def training(self) -> list[dict[str, Any]]:
        """The pairs that reward models learn from."""
        return [row for row in self.states.read("facts") if row["part"] == "train"]

    def run_all(self, arms: Sequence[str], seeds: int) -> None:
        """Chooses the learning rate, and runs the cells that are missing."""
        for rate in LEARNING_RATES:
            self._keep("trial", "response", TRIAL_SEED, rate)
        best_rate = self.learning_rate
        jobs = [(seed, arm, best_rate) for seed in range(seeds) for arm in arms]
        others = [rate for rate in LEARNING_RATES if rate != best_rate]
        jobs += itertools.product(range(seeds), [arm for arm in arms if arm in AT_ALL_RATES], others)
        for seed, arm, rate in tqdm(jobs, desc="Policies", unit=" runs"):
            self._keep("cells", arm, seed, rate)

    @property
    def learning_rate(self) -> float:
        """The one with which the response-level arm gets furthest, as a mean of all its runs."""
        runs = [*self.figures["trial"], *(cell for cell in self.figures["cells"] if cell["arm"] == "response")]
        furthest = {
            rate: [best(cell["right"]) for cell in runs if cell["learning_rate"] == rate] for rate in LEARNING_RATES
        }
        return max(LEARNING_RATES, key=lambda rate: statistics.mean(furthest[rate]))

    def _keep(self, part: str, arm: str, seed: int, rate: float) -> None:
        cell = {"arm": arm, "seed": seed, "learning_rate": rate}
        if not any(cell.items() <= other.items() for other in self.figures[part]):
            self.figures[part].append(cell | self._run(arm, seed, rate))
            write_figures(self.path, self.figures)

    def _run(self, arm: str, seed: int, rate: float) -> dict[str, Any]:
        """Shares of right sentences and numbers of sentences, step by step."""
        truth = TrueReward(self.task, self.tokenizer)
        curves: dict[str, list[float]] = {"right": [], "sentences": []}
        started = time.perf_counter()

        def measure(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
            counts = truth(prompts, completions)
            curves["right"].append(sum(counts) / sum(len(prompt.split()) - 1 for prompt in prompts))
            curves["sentences"].append(statistics.mean(len(self.task.segmenter(text)) for text in completions))
            return counts

        train_policy(
            self.base, self._reward(reward_of(arm), seed), measure,
            self.task.prompts(STEPS * BATCH // GENERATIONS, seed), seed,
            max_steps=STEPS, num_generations=GENERATIONS, max_completion_length=ANSWER_LENGTH, learning_rate=rate,
            beta=KL, **credit_of(arm),
        )  # fmt: skip
        return {**curves, "seconds": time.perf_counter() - started}

    def measure_signal(self, seeds: int) -> None:
        """
        How much the credit of a sentence says about it: its correlation with whether the sentence is right, both less
        their means over the responses to the prompt, before RL. By arm, of each seed.
        """
        prompts = [prompt for prompt in self.task.prompts(SIGNAL_PROMPTS, TRIAL_SEED) for _ in range(GENERATIONS)]
        rows = self.tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
        policy = AutoModelForCausalLM.from_pretrained(self.base)
        torch.manual_seed(0)
        written = policy.generate(**rows, do_sample=True, top_k=0, max_new_tokens=ANSWER_LENGTH)
        ids, eos = written[:, rows["input_ids"].shape[1] :].tolist(), policy.config.eos_token_id
        ids = [row[: row.index(eos) + 1] if eos in row else row for row in ids]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        ends = [find_sentences(self.tokenizer, self.task.segmenter, row).last_tokens for row in ids]
        whole = [i for i, prompt in enumerate(prompts) if len(ends[i]) == len(prompt.split()) - 1]
        signal: dict[str, list[float]] = {arm: [] for arm in ARMS}
        for seed in range(seeds):
            rewards = {}
            for reward in dict.fromkeys(map(reward_of, ARMS)):
                scores = self._reward(reward, seed).outcome_and_token_rewards(prompts, texts, completion_ids=ids)
                rewards[reward] = [scores.token_rewards[i][ends[i]].tolist() for i in whole]
            for arm in ARMS:
                credit = [credited(row, **credit_of(arm)) for row in rewards[reward_of(arm)]]
                signal[arm].append(correlation([prompts[i] for i in whole], credit, rewards["truth"]))
        self.figures["signal"] = signal
        write_figures(self.path, self.figures)

    def _reward(self, reward: str, seed: int) -> Any:
        """A reward function, by the name of [`reward_of`]."""
        if reward == "truth":
            return TrueReward(self.task, self.tokenizer)
        reader = AutoTokenizer.from_pretrained(self.states.path)
        model = self._reward_model(reward, seed)
        return TrainedReward(SentenceReward(model, reader, policy_processing_class=self.tokenizer))

    def _reward_model(self, arm: str, seed: int) -> SentenceRewardModel:
        """A head of [`studies.sentence_reward`] on the lower layers of SmolLM2."""
        setting = self.choices[f"facts {arm}"]
        pairs = training_pairs(self.training, seed)
        head = train(arm, *stack(self.training, setting["depth"]), pairs, setting, seed)
        return as_model(head, setting["depth"], self.states.path, arm == "response", torch.bfloat16)


def smooth(curve: Sequence[float]) -> list[float]:
    """Means of the last steps, `WINDOW` or as many as there are."""
    return [statistics.mean(curve[max(0, i + 1 - WINDOW) : i + 1]) for i in range(len(curve))]


def best(curve: Sequence[float]) -> float:
    """The highest smoothed share."""
    return max(smooth(curve)[WINDOW - 1 :])


def samples_to(curve: Sequence[float], target: float) -> int | None:
    """Responses sampled until the smoothed share of right sentences has reached a target."""
    reached = [i for i, value in enumerate(smooth(curve)) if value >= target and i + 1 >= WINDOW]
    return BATCH * (reached[0] + 1) if reached else None


def curves(cells: Sequence[dict[str, Any]]) -> dict[str, dict[int, list[float]]]:
    """Shares of right sentences by arm and seed."""
    found: dict[str, dict[int, list[float]]] = {arm: {} for arm in ARMS}
    for cell in sorted(cells, key=lambda cell: cell["seed"]):
        found[cell["arm"]][cell["seed"]] = cell["right"]
    return {arm: runs for arm, runs in found.items() if runs}


def summarize(figures: dict[str, Any], rate: float) -> dict[str, dict[str, Any]]:
    """
    Of each arm at a learning rate: shares before and after, and samples to what it and its rival both reach, with the
    rival's.
    """
    summary: dict[str, dict[str, Any]] = {}
    cells = [cell for cell in figures["cells"] if cell["learning_rate"] == rate]
    found = curves(cells)
    for arm, runs in found.items():
        summary[arm] = {
            "seeds": len(runs),
            "before": statistics.mean(curve[0] for curve in runs.values()),
            "best": [best(curve) for curve in runs.values()],
            "after": [statistics.mean(curve[-WINDOW:]) for curve in runs.values()],
            "sentences": [c["sentences"][-1] for c in cells if c["arm"] == arm],
        }
        rivals = found.get(PAIRED.get(arm, ""), {})
        seeds = [seed for seed in runs if seed in rivals]
        if seeds:
            # The highest share, in steps of 2.5 points, that all of the runs reach.
            target = int(40 * min(best(some[seed]) for some in (runs, rivals) for seed in seeds)) / 40
            own, other = ([samples_to(some[seed], target) or 0 for seed in seeds] for some in (runs, rivals))
            summary[arm] |= {"target": target, "samples": own, "rival": other}
            summary[arm]["share"] = [a / b for a, b in zip(own, other, strict=True)]
    return summary


def spread(values: Sequence[float], show: Callable[[float], str]) -> str:
    """Mean of the seeds, least and most if there are several."""
    if len(values) == 1:
        return show(values[0])
    return f"{show(statistics.mean(values))} ({show(min(values))} to {show(max(values))})"


def table_rows(summary: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Rows of the table, as text."""
    rows = []
    for arm, figures in summary.items():
        row = [
            ARMS[arm],
            str(figures["seeds"]),
            percent(figures["before"]),
            spread(figures["best"], percent),
            percent(statistics.mean(figures["after"])),
        ]
        row += [f"{statistics.mean(figures['sentences']):.1f}", "–", "–", "–"]
        if "share" in figures:
            row[-3:] = [
                percent(figures["target"]),
                f"{statistics.mean(figures['samples']):.0f} : {statistics.mean(figures['rival']):.0f}",
                spread(figures["share"], lambda share: f"{100 * share:.0f}%"),
            ]
        rows.append(row)
    return rows


HEADERS = [
    *("trained on", "seeds", "right before, %", "at best, %", "after, %", "sentences, after"),
    *("both reach, %", "samples : rival's", "share of the rival's"),
]


def verdict(summary: dict[str, dict[str, Any]]) -> str:
    """What was found, in sentences."""
    said = []
    for arm, rival in (("sentences", "response"), ("true-sentences", "true-score")):
        if "share" in summary.get(arm, {}):
            figures = summary[arm]
            said.append(
                f"Trained on {ARMS[arm]}, a policy has {percent(figures['target'])}% of its sentences right after "
                f"{spread(figures['share'], lambda share: f'{100 * share:.0f}%')} of the samples that it takes on "
                f"{ARMS[rival]}."
            )
    return " ".join(said)


def page(figures: dict[str, Any], summaries: dict[float, dict[str, dict[str, Any]]], rate: float) -> str:
    """The results as a document."""
    summary = summaries[rate]
    signal = [
        [ARMS[arm], spread(values, lambda value: f"{value:.2f}")] for arm, values in figures.get("signal", {}).items()
    ]
    trial = [
        [f"{cell['learning_rate']:g}", percent(best(cell["right"])), percent(statistics.mean(cell["right"][-WINDOW:]))]
        for cell in figures["trial"]
    ]
    others = "".join(
        f"At a learning rate of {other:g}:\n\n{markdown_table(HEADERS, table_rows(found))}\n\n"
        for other, found in summaries.items()
        if other != rate and found
    )
    return f"""# Does RL gain from rewards of sentences?

{verdict(summary)}

![](sentence-rl.png)

{markdown_table(HEADERS, table_rows(summary))}

Samples are responses until the share of right sentences, the mean of {WINDOW} steps, has reached what the arm and its
rival both reach with all seeds. The rival is the arm with one score per response: {ARMS["response"]} for reward models, the number of
right sentences for the truth. In brackets: least and most of the seeds, prompts of which are the same for both.

{others}## Why

What the credit of a sentence says about it: its correlation with whether the sentence is right, both less their means
over the {GENERATIONS} responses to a prompt, before RL. The reward models are those of the seeds above.

{markdown_table(["trained on", "correlation"], signal)}

On the truth, credit by sentence is all that differs: what it saves there is the noise of the other sentences. It is less in
larger groups and shorter answers. In first trials on the truth, with groups of 8, answers of 3 to 5 sentences and one seed, both took about the same samples at a
learning rate of 3e-4, and the sizes of this study were chosen after that, so that noise counts; these trials are not among the figures.

What a reward model gets wrong of a fact, it gets wrong every time: credit cannot help there, and the share of right sentences falls again once the policy
writes what the model prefers. At a learning rate of 3e-4, responses of the response-level arm became shorter, too.

## How

The policy answers prompts about {SENTENCES[0]} to {SENTENCES[1]} of 154 facts, one sentence each. It is a transformer of 0.5M parameters whose
words are those of the answers, and it has learned from answers of which half of the sentences are right (wrong ones have the
answer to another question of their kind). No reward model was trained on these facts; the arms of reward models were found by
looking at answers about them ([sentence.md](sentence.md)). The reward models are those of that page, heads on the states of the frozen
SmolLM2-135M-Instruct, trained for each seed on pairs of its own.

All arms are `DenseGRPOTrainer` with {BATCH} responses a step, {GENERATIONS} to a prompt, {STEPS} steps, temperature 1, a KL penalty of {KL}, and the same prompts.
"Each sentence its own" is `credit="sentence", gamma=0.1`, "own and later ones" `credit="sentence"`, all others `credit="outcome"`.
The learning rate of the first table, {rate:g} for all arms, is the one with which the response-level arm gets furthest, as a mean of all
its runs. On the seed of the trial alone (below), which was to choose it, that is 0.0003, at which this arm falls again on the other seeds: at that rate
the share that all seeds reach says little. Both tables are given.

{markdown_table(["learning rate", "right at best, %", f"in the last {WINDOW} steps, %"], trial)}

Not measured here: policies that know more than these facts, sentences that depend on each other, and facts that the policy is not trained on; not run yet:
{"; ".join(label for arm, label in ARMS.items() if arm not in summary) or "nothing"}.

{machine_line(figures["settings"])}
"""


def plot(figures: dict[str, Any], rate: float, path: Path) -> None:
    """Shares of right sentences over samples: means and bands of the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", sharey=True)
    for arm, runs in curves([cell for cell in figures["cells"] if cell["learning_rate"] == rate]).items():
        panel = panels[int(arm.startswith("true"))]
        smoothed = torch.tensor([smooth(curve) for curve in runs.values()])
        samples = BATCH * torch.arange(1, smoothed.shape[1] + 1)
        color = f"C{('sentences', 'to-go', 'score', 'response').index(arm.removeprefix('true-'))}"
        panel.plot(samples, 100 * smoothed.mean(dim=0), color=color, label=ARMS[arm])
        panel.fill_between(
            samples, 100 * smoothed.amin(dim=0), 100 * smoothed.amax(dim=0), color=color, alpha=0.2, linewidth=0
        )
    for panel, title in zip(panels, ("reward models", "the truth as reward"), strict=True):
        panel.set_title(title)
        panel.set_xlabel("responses sampled")
        panel.legend(fontsize=8)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("right sentences, %")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Runs one of the two tasks."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=4000, help="preferences to learn from, made-up language")
    parser.add_argument("--steps", type=int, default=60, help="policy updates, each on 64 responses")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--states", type=Path, help="folder for frozen states and the policy: facts, in place of it")
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS), help="of facts; none: only the page")
    parser.add_argument("--output", type=Path, default=None, help="file of figures; of facts, the folder")
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    if args.states is None:
        made_up_language(args.pairs, args.steps, args.seeds, args.output or Path("sentence-rl.json.gz"))
        return
    output = args.output or Path("docs/results")
    runs = FactsRuns(States(args.states, Path()), output)
    runs.run_all(args.arms, args.seeds)
    if "signal" not in runs.figures:
        runs.measure_signal(args.seeds)
    summaries = {rate: summarize(runs.figures, rate) for rate in LEARNING_RATES}
    summary = summaries[runs.learning_rate]
    (output / "sentence-rl.md").write_text(page(runs.figures, summaries, runs.learning_rate), encoding="utf-8")
    plot(runs.figures, runs.learning_rate, output / "sentence-rl.png")
    console = Console()
    console.print(verdict(summary))
    console.print(terminal_table(HEADERS, table_rows(summary), "Right sentences"))


if __name__ == "__main__":
    main()
