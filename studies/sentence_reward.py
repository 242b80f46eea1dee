# SPDX-License-Identifier: Apache-2.0
r"""
Does reading a response by sentences help? Reward models on the same language model, of the same human preferences.

Fine-tuned (the last layers and what is new), in TRL's trainers, on the same pairs, with the same settings, steps and
seeds:

- `response`: TRL's RewardTrainer, a score at the last token.
- `attention`: SentenceRewardTrainer, sentence rewards weighted by attention
  (https://huggingface.co/papers/2503.04793). As there: markers, random weights at first, and one learning rate for all
  parameters.
- `equal`: from equal weights (`attention_init="equal"`), with the trainer's own learning rate of the attention,
  without markers.
- `sum`: the paper's ablation, the plain sum of sentence rewards.

Frozen, a cheap look at all pairs by cross-validation: the language model is run once, without markers, and only heads
are trained on its states. The plain sum telescopes to the value of the last state there, so that it is the
response-level model.

- `frozen response`: a linear head on the last state.
- `frozen attention`: the sentence head on the states at the ends of sentences.
- `frozen equal`: the same from equal weights, with the trainer's own learning rate of the attention.

`longer` prefers the longer response, and shows what length alone explains. Pairs of Anthropic's HH-RLHF, as a file
(`harmless-base.test.jsonl.gz` of https://github.com/anthropics/hh-rlhf) whose rows have `chosen` and `rejected`
dialogues.

    python -m studies.sentence_reward --data harmless-base.test.jsonl.gz           # about 50 minutes on 2 cores
    python -m studies.sentence_reward --data ... --train-pairs 16 --test-pairs 16 --frozen-pairs 32 --seeds 1
"""

import argparse
import gzip
import json
import math
import platform
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from rich.console import Console
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging as transformers_logging
from trl import RewardConfig, RewardTrainer

from benchmarks.measure import write_figures
from endotrl import SentenceRewardModel, SentenceRewardTrainer, SentenceRewardTrainerConfig
from endotrl.frozen.quickstart_model import quickstart_model_path
from endotrl.learning_rates import set_learning_rate
from endotrl.reporting import terminal_table
from endotrl.scoring.batching import plan_batches
from endotrl.sentence import SentenceRewardConfig
from endotrl.sentence.aggregation import attention_weights, sentence_rewards
from endotrl.sentence.encoding import pad_batch
from endotrl.sentence.head import SentenceHead
from endotrl.sentence.preferences import PairEncoder


LABELS = {
    "longer": "longer response wins",
    "response": "response-level (TRL's RewardTrainer)",
    "attention": "sentence-level, attention",
    "equal": "sentence-level, attention from equal weights, no markers",
    "sum": "sentence-level, plain sum",
    "frozen response": "frozen model: response-level (= plain sum)",
    "frozen attention": "frozen model: sentence-level, attention",
    "frozen equal": "frozen model: sentence-level, attention from equal weights",
}
TUNED = ("response", "attention", "equal", "sum")
FROZEN = ("frozen response", "frozen attention", "frozen equal")
RIVALS = {
    "attention": "response",
    "equal": "response",
    "sum": "response",
    "frozen attention": "frozen response",
    "frozen equal": "frozen response",
}
FOLDS, EPOCHS, LEARNING_RATES = 5, 10, (3e-4, 3e-3)
BOOTSTRAP = 10_000


def load_pairs(path: Path, tokenizer: Any, max_length: int) -> list[dict[str, Any]]:
    """Pairs as conversations that differ in their last turn, of at most `max_length` tokens."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    pairs = []
    for row in rows:
        chosen, rejected = _turns(row["chosen"]), _turns(row["rejected"])
        if chosen[:-1] != rejected[:-1] or not chosen[-1]["content"] or not rejected[-1]["content"]:
            continue
        lengths = [len(tokenizer.apply_chat_template(turns)["input_ids"]) for turns in (chosen, rejected)]
        if max(lengths) <= max_length:
            pairs.append(
                {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:], "length": max(lengths)}
            )
    return pairs


def _turns(dialogue: str) -> list[dict[str, str]]:
    roles = {"Human": "user", "Assistant": "assistant"}
    turns: list[dict[str, str]] = []
    for part in dialogue.split("\n\n"):
        name, _, content = part.partition(":")
        if name in roles:
            turns.append({"role": roles[name], "content": content.strip()})
        elif turns:
            turns[-1]["content"] += f"\n\n{part}"
    return turns


def tuned_margins(
    arm: str, model: str, train: list[dict[str, Any]], test: list[dict[str, Any]], seed: int, args: argparse.Namespace
) -> tuple[list[float], float]:
    """Trains one arm; the margin of every test pair, and the seconds that training took."""
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {
            "output_dir": folder,
            "seed": seed,
            "num_train_epochs": args.epochs,
            "per_device_train_batch_size": args.batch_size,
            "learning_rate": args.learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.1,
            "max_length": None,  # the same pairs for every arm
            "gradient_checkpointing": False,
            "train_sampling_strategy": "group_by_length",
            "remove_unused_columns": False,  # TRL's trainer would drop the lengths
            "report_to": "none",
            "save_strategy": "no",
            "use_cpu": not torch.cuda.is_available(),
            "disable_tqdm": True,
            "logging_strategy": "no",
        }
        data = {"train_dataset": Dataset.from_list(train), "eval_dataset": Dataset.from_list(test)}
        trainer: RewardTrainer
        set_seed(seed)  # for the heads
        if arm == "response":
            classifier = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.bfloat16)
            train_top(classifier, [classifier.score], args.layers)
            trainer = RewardTrainer(classifier, RewardConfig(**settings), **data)
        else:
            config = SentenceRewardConfig(
                aggregator="sum" if arm == "sum" else "attention",
                attention_init="equal" if arm == "equal" else "orthogonal",
                marker=arm != "equal",
            )
            reward_model = SentenceRewardModel.from_backbone(model, config, dtype=torch.bfloat16)
            new = [reward_model.sentence_head, *([] if reward_model.marker is None else [reward_model.marker])]
            train_top(reward_model, new, args.layers)
            settings["attention_learning_rate"] = None if arm == "equal" else args.learning_rate
            trainer = SentenceRewardTrainer(reward_model, SentenceRewardTrainerConfig(**settings), **data)
        trainer.remove_callback(PrinterCallback)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        return list(_margins(trainer)), seconds


# What a fine-tuned model depends on.
RUN_SETTINGS = ("model", "train_pairs", "test_pairs", "max_length", "epochs", "batch_size", "learning_rate", "layers")


def settings_of_runs(args: argparse.Namespace, num_pairs: int) -> dict[str, Any]:
    """Settings under which runs can be compared."""
    return {"data": args.data.name, "pairs": num_pairs, **{name: getattr(args, name) for name in RUN_SETTINGS}}


def finished_runs(args: argparse.Namespace, num_pairs: int) -> dict[str, Any]:
    """
    Fine-tuned runs that were finished before.

    Raises:
        `SystemExit`: If they were made with other settings.
    """
    if not args.runs.exists():
        return {}
    kept = json.loads(args.runs.read_text(encoding="utf-8"))
    if kept["settings"] != settings_of_runs(args, num_pairs):
        raise SystemExit(
            f"{args.runs} has runs with other settings, {kept['settings']}. Name another file with --runs."
        )
    return kept["runs"]


def train_top(model: PreTrainedModel, new: Sequence[nn.Module], num_layers: int) -> None:
    """Freezes a model in bfloat16, but for its last layers, its last norm and what is new, in float32."""
    model.requires_grad_(False)
    backbone = model.base_model
    for module in (*backbone.layers[-num_layers:], backbone.norm, *new):
        module.float().requires_grad_(True)


def _margins(trainer: RewardTrainer) -> Iterator[float]:
    """Score of the chosen response minus that of the rejected one, for every pair of the test set, in its order."""
    rows = list(trainer.eval_dataset)
    margins: dict[int, float] = {}
    trainer.model.eval()
    with torch.no_grad(), trainer.accelerator.autocast():
        for batch in plan_batches([2 * max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in rows], 4096):
            inputs = trainer._prepare_inputs(trainer.data_collator([rows[i] for i in batch]))
            chosen, rejected = trainer.model(**inputs).logits.float().squeeze(-1).chunk(2)
            margins.update(zip(batch, (chosen - rejected).tolist(), strict=True))
    return (margins[i] for i in range(len(rows)))


def frozen_states(model: str, pairs: list[dict[str, Any]], tokenizer: Any) -> list[tuple[Tensor, Tensor]]:
    """
    States of the language model before the response and at the ends of its sentences: chosen and rejected, (N, D).
    """
    reward_model = SentenceRewardModel.from_backbone(model, SentenceRewardConfig(marker=False), dtype=torch.bfloat16)
    encode = PairEncoder(tokenizer, reward_model.config)
    rows = []
    for pair in pairs:
        encoded = encode(pair)
        rows += [(encoded[f"{which}_ids"], encoded[f"{which}_ends"]) for which in ("chosen", "rejected")]
    states: dict[int, Tensor] = {}
    with torch.no_grad(), tqdm(total=len(rows), desc="States of the frozen model", unit=" responses") as bar:
        for batch in plan_batches([len(ids) for ids, _ in rows], 4096):
            inputs = pad_batch([rows[i] for i in batch], pad_token_id=0)
            hidden = reward_model.backbone(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
            ).last_hidden_state
            for j, i in enumerate(batch):
                states[i] = hidden[j, rows[i][1]].float()
            bar.update(len(batch))
    return [(states[2 * i], states[2 * i + 1]) for i in range(len(pairs))]


class FrozenHead(nn.Module):
    """The head of an arm on states of the frozen model: at the last one only, or at all with attention."""

    def __init__(self, arm: str, backbone_config: Any) -> None:
        super().__init__()
        aggregator = "sum" if arm == "frozen response" else "attention"
        self.head = SentenceHead(SentenceRewardConfig(backbone_config, aggregator=aggregator))
        nn.init.zeros_(self.head.value.weight)
        nn.init.zeros_(self.head.value.bias)
        if self.head.has_attention:
            nn.init.orthogonal_(self.head.query.weight)
            nn.init.orthogonal_(self.head.key.weight)
            if arm == "frozen equal":
                nn.init.zeros_(self.head.query.weight)

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """Scores of shape `(B,)` of responses, each of states `(N, D)`."""
        if not self.head.has_attention:
            return self.head(torch.stack([row[-1] for row in states])[:, None])[0][:, 0]
        padded = nn.utils.rnn.pad_sequence(list(states), batch_first=True)
        mask = torch.arange(padded.shape[1]) < torch.tensor([len(row) for row in states])[:, None]
        values, queries, keys = self.head(padded)
        return (attention_weights(queries, keys, mask) * sentence_rewards(values, mask)).sum(dim=-1)


def frozen_margins(arm: str, states: list[tuple[Tensor, Tensor]], backbone_config: Any, seed: int) -> list[float]:
    """
    Margin of every pair under a head that was trained on the other folds; learning rate and epoch by held-out pairs of
    those.
    """
    order = list(range(len(states)))
    random.Random(seed).shuffle(order)
    margins: dict[int, float] = {}
    for fold in range(FOLDS):
        test = order[fold::FOLDS]
        rest = [i for i in order if i not in set(test)]
        split = max(1, len(rest) * 15 // 100)
        validation, train = rest[:split], rest[split:]
        flat = torch.cat([state for i in train for state in states[i]])
        mean, std = flat.mean(dim=0), flat.std(dim=0) + 1e-6
        scaled = {i: tuple((state - mean) / std for state in states[i]) for i in order}
        best_loss, best_margins = float("inf"), torch.zeros(len(test))
        for learning_rate in LEARNING_RATES:
            set_seed(seed)
            head = FrozenHead(arm, backbone_config)
            optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=0.1)
            if arm == "frozen equal":  # as the trainer does it
                attention = [head.head.query.weight, head.head.key.weight]
                set_learning_rate(optimizer, attention, learning_rate / math.sqrt(len(attention[0])))

            def margin(pairs: list[int], head: FrozenHead = head, scaled: Any = scaled) -> Tensor:
                scores = head([scaled[i][0] for i in pairs] + [scaled[i][1] for i in pairs])
                return scores[: len(pairs)] - scores[len(pairs) :]

            for epoch in range(EPOCHS):
                shuffled = random.Random(seed * 1000 + epoch).sample(train, len(train))
                # Of similar length, so that little is padded.
                shuffled.sort(key=lambda i: max(map(len, states[i])))
                batches = [shuffled[j : j + 64] for j in range(0, len(shuffled), 64)]
                for batch in random.Random(epoch).sample(batches, len(batches)):
                    loss = -nn.functional.logsigmoid(margin(batch)).mean()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                with torch.no_grad():
                    validation_loss = -nn.functional.logsigmoid(margin(validation)).mean().item()
                    if validation_loss < best_loss:
                        best_loss, best_margins = validation_loss, margin(test)
        margins.update(zip(test, best_margins.tolist(), strict=True))
    return [margins[i] for i in range(len(states))]


def correctness(margins: Sequence[float]) -> Tensor:
    """1 for a pair in the right order, 0 for one in the wrong order, 0.5 for a tie."""
    values = torch.tensor(margins, dtype=torch.float64)
    return (values > 0).double() + 0.5 * (values == 0).double()


def interval(per_pair: Tensor) -> list[float]:
    """95% interval of a mean over pairs, by bootstrap."""
    generator = torch.Generator().manual_seed(0)
    means = []
    for _ in range(BOOTSTRAP // 1000):
        picks = torch.randint(len(per_pair), (1000, len(per_pair)), generator=generator)
        means.append(per_pair[picks].mean(dim=1))
    return torch.quantile(torch.cat(means), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()


def summarize(margins: dict[str, list[list[float]]], selections: dict[str, list[bool]]) -> dict[str, Any]:
    """
    Accuracy of each arm with intervals over pairs, its spread over seeds, and the paired difference to its rival.
    """
    results: dict[str, Any] = {}
    right = {
        arm: torch.stack([correctness(seed) for seed in seeds]) for arm, seeds in margins.items()
    }  # (seeds, pairs)
    for arm, table in right.items():
        per_pair = table.mean(dim=0)
        by_seed = table.mean(dim=1).tolist()
        results[arm] = {
            "accuracy": per_pair.mean().item(),
            "interval": interval(per_pair),
            "accuracy_by_seed": by_seed,
            "std_over_seeds": statistics.stdev(by_seed) if len(by_seed) > 1 else None,
            "pairs": len(per_pair),
        }
        several = torch.tensor(selections["frozen" if arm.startswith("frozen") else "tuned"])
        if several.any():
            results[arm]["accuracy_several_sentences"] = per_pair[several].mean().item()
            results[arm]["pairs_several_sentences"] = int(several.sum())
        if arm in RIVALS and RIVALS[arm] in right:
            difference = per_pair - right[RIVALS[arm]].mean(dim=0)
            results[arm]["difference"] = difference.mean().item()
            results[arm]["difference_interval"] = interval(difference)
    return results


def table_rows(results: dict[str, Any]) -> list[list[str]]:
    """Rows of the table of results, as text."""

    def percent(value: float, sign: bool = False) -> str:
        return f"{100 * value:{'+' if sign else ''}.1f}"

    rows = []
    for arm, result in results.items():
        low, high = result["interval"]
        difference = "–"
        if "difference" in result:
            ends = " to ".join(percent(end, sign=True) for end in result["difference_interval"])
            difference = f"{percent(result['difference'], sign=True)} ({ends})"
        spread = "–" if result["std_over_seeds"] is None else percent(result["std_over_seeds"])
        several = result.get("accuracy_several_sentences")
        rows.append(
            [
                LABELS[arm],
                str(result["pairs"]),
                f"{percent(result['accuracy'])} ({percent(low)} to {percent(high)})",
                spread,
                difference,
                "–" if several is None else f"{percent(several)} (n = {result['pairs_several_sentences']})",
            ]
        )
    return rows


HEADERS = ["reward model", "pairs", "accuracy, %", "std over seeds", "to response-level", "3+ sentences"]


def markdown(output: dict[str, Any]) -> str:
    """The results as a document."""
    settings = output["settings"]
    rows = [HEADERS, ["---"] * len(HEADERS), *table_rows(output["results"])]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"""# Sentence-level reward model: does it judge better?

Written by `{output["command"]}` ({output["machine"]}).

{table}

Accuracy: the chosen response of a held-out pair gets the higher score (a tie counts half). In brackets: 95% intervals by
bootstrap over test pairs, of the mean over {settings["seeds"]} seeds. "to response-level" is the paired difference to the
response-level model, "3+ sentences" the accuracy where both responses have so many. The intervals do not cover which pairs
were trained on; the spread over seeds, each of which draws its own, does.

- Data: {settings["pairs"]} pairs of `{settings["data"]}` with up to {settings["max_length"]} tokens. The fine-tuned models learn from
  {settings["train_pairs"]} of them and are tested on {settings["test_pairs"]} others, the same for all; the frozen ones by {FOLDS}-fold
  cross-validation on {settings["frozen_pairs"]}.
- Fine-tuned: {settings["model"]}, its last {settings["layers"]} layers, heads and marker, {settings["epochs"]:g} epochs in batches of
  {settings["batch_size"]} pairs, AdamW, learning rate {settings["learning_rate"]:g} with a cosine schedule, bfloat16 autocast; the other
  layers are frozen, in bfloat16. From equal weights, the attention learns at the trainer's default, a sixteenth of that rate.
- Frozen: heads on standardised last states, {EPOCHS} epochs, learning rate of {" and ".join(f"{lr:g}" for lr in LEARNING_RATES)} and epoch
  by 15% of the training pairs.
- Seconds of training a run: {", ".join(f"{LABELS[arm]} {seconds:.0f}" for arm, seconds in output["train_seconds"].items()) or "none"}.
"""


def main() -> None:
    """Runs the arms, and writes JSON and a document."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="file of HH-RLHF, .jsonl or .jsonl.gz")
    parser.add_argument(
        "--model", default="quickstart", help='causal language model; "quickstart": SmolLM2-135M-Instruct'
    )
    parser.add_argument("--train-pairs", type=int, default=400)
    parser.add_argument("--test-pairs", type=int, default=400)
    parser.add_argument("--frozen-pairs", type=int, help="pairs for the frozen model; all by default")
    parser.add_argument("--max-length", type=int, default=192, help="longest response with its prompt, in tokens")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--batch-size", type=int, default=16, help="in pairs")
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--layers", type=int, default=6, help="last layers to train")
    parser.add_argument("--only", choices=("tuned", "frozen"), help="run only these arms")
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path("sentence-reward-runs.json"),
        help="where fine-tuned runs are kept, and not repeated",
    )
    parser.add_argument("--output", type=Path, default=Path("sentence-reward.json.gz"))
    parser.add_argument("--markdown", type=Path, help="document to write, too")
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    console = Console()
    model = quickstart_model_path() if args.model == "quickstart" else args.model
    tokenizer = AutoTokenizer.from_pretrained(model)
    pairs = load_pairs(args.data, tokenizer, args.max_length)
    random.Random(0).shuffle(pairs)
    if len(pairs) < args.train_pairs + args.test_pairs:
        parser.error(
            f"{args.data} has {len(pairs)} pairs of at most {args.max_length} tokens, fewer than the "
            f"{args.train_pairs + args.test_pairs} to train and test on."
        )
    test, pool = pairs[: args.test_pairs], pairs[args.test_pairs :]
    frozen_pairs = pairs[: args.frozen_pairs]
    encode = PairEncoder(tokenizer, SentenceRewardModel.from_backbone(model).config)

    def several(rows: list[dict[str, Any]]) -> list[bool]:
        encoded = map(encode, rows)
        return [min(len(row["chosen_ends"]), len(row["rejected_ends"])) > 3 for row in encoded]

    margins: dict[str, list[list[float]]] = {
        "longer": [[len(row["chosen"][0]["content"]) - len(row["rejected"][0]["content"]) for row in test]]
    }
    seconds: dict[str, list[float]] = {}
    done = finished_runs(args, len(pairs))
    if args.only != "frozen":
        jobs = [(seed, arm) for seed in range(args.seeds) for arm in TUNED]
        for seed, arm in tqdm(jobs, desc="Fine-tuning", unit=" runs"):
            if (run := done.get(f"{arm}-{seed}")) is None:
                train = random.Random(seed).sample(pool, args.train_pairs)
                run_margins, train_seconds = tuned_margins(arm, model, train, test, seed, args)
                run = {"margins": run_margins, "seconds": train_seconds}
                done[f"{arm}-{seed}"] = run
                args.runs.write_text(json.dumps({"settings": settings_of_runs(args, len(pairs)), "runs": done}))
            margins.setdefault(arm, []).append(run["margins"])
            seconds.setdefault(arm, []).append(run["seconds"])
            tqdm.write(f"seed {seed}, {arm}: {correctness(run['margins']).mean():.3f} in {run['seconds']:.0f} s")
    if args.only != "tuned":
        states = frozen_states(model, frozen_pairs, tokenizer)
        config = SentenceRewardModel.from_backbone(model).config.backbone_config
        frozen_jobs = [(seed, arm) for seed in range(args.seeds) for arm in FROZEN]
        for seed, arm in tqdm(frozen_jobs, desc="Frozen model", unit=" runs"):
            margins.setdefault(arm, []).append(frozen_margins(arm, states, config, seed))
    results = summarize(margins, {"tuned": several(test), "frozen": several(frozen_pairs)})
    output = {
        "command": shlex.join(["python", "-m", "studies.sentence_reward", *sys.argv[1:]]),
        "settings": {
            **{key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
            "data": args.data.name,
            "pairs": len(pairs),
            "frozen_pairs": len(frozen_pairs),
        },
        "results": results,
        "train_seconds": {arm: statistics.mean(values) for arm, values in seconds.items()},
        "margins": margins,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
    }
    write_figures(args.output, output)
    if args.markdown is not None:
        args.markdown.write_text(markdown(output), encoding="utf-8")
    console.print(terminal_table(HEADERS, table_rows(results), "Held-out preferences"))
    console.print(f"{args.output}" + ("" if args.markdown is None else f", {args.markdown}"), soft_wrap=True)


if __name__ == "__main__":
    main()
