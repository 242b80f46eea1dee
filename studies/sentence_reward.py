# SPDX-License-Identifier: Apache-2.0
r"""
Does reading a response by sentences help? Reward models on the states of one frozen language model, of the same pairs.

SmolLM2-135M-Instruct is frozen and run once; what is trained are heads on its states, by the Bradley-Terry loss with
an L2 penalty. States are scaled to length 1, standardised and whitened, as far as a shrinkage says, for all arms alike:
the penalty is then one on the variance of values, and keeps out what differs from sentence to sentence without
telling pairs apart. Arms:

- `response`: response-level, a value of the state at EOS, as TRL's RewardTrainer has it (and the plain sum of
  differences, which telescopes to it; `tests/sentence/test_frozen_layers.py` has both losses equal).
- `paper`: differences weighted by attention, from random weights (https://huggingface.co/papers/2503.04793).
- `equal`: the same from equal weights.
- `own`: every sentence has a value of its own, weighted by attention from equal weights.
- `own-sum`: the sum of values of their own, `differences=False, aggregator="sum"`.
- `told`: the same, told which sentences of the training pairs are right: a bound for heads.
- `response-layers`, `own-sum-layers`: models of which the five layers below the head are trained, too, on the same pairs
  (of `facts`), from the head of `response` and `own-sum` on.

Depth, shrinkage and penalty are chosen on pairs that are in no final figure. Data:

- `facts`: answers of 3 to 6 sentences, each a fact that is right or wrong; no fact of the test is in training. Which
  sentence is wrong is asked of models that were never told.
- `fresh`: the same about facts of other kinds, made when arms, layers and penalties were fixed (by `facts`).
- `helpful`, `webgpt`: human preferences, by 5-fold cross-validation.
- `prmbench`: solutions against themselves with a wrong step, by cross-validation; which step is wrong?
- `processbench`: right solutions of language models (GSM8K) against wrong ones of other problems; which step is the
  first wrong one?

    python -m studies.sentence_reward --data shared/data --states /tmp/states     # about 40 minutes on one core
    python -m studies.sentence_reward --data ... --states ... --datasets facts    # what is there is kept
"""

import argparse
import itertools
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from tqdm.auto import tqdm

from benchmarks.measure import describe_run, read_figures, write_figures
from endotrl.reporting import terminal_table
from endotrl.sentence.head import attention_weights, sentence_rewards

from . import sentence_ablation
from .sentence_layers import as_model, judge_pairs, train_layers
from .sentence_page import ARMS, HEADERS, LAYERS, page, plot, summarize, table_rows, verdict
from .sentence_states import DATASETS, DEPTHS, States
from .sentence_statistics import accuracy


# Arms with attention, which take longer, have the depth of the one without and two shrinkages to choose from; `told`
# has all settings of the one that is not told.
DEPTH_OF = {"paper": "response", "equal": "response", "own": "own-sum"}
CHOOSERS = {
    "fresh": "facts",
    "prmbench": "facts",
    "processbench": "facts",
    "webgpt": "helpful",
}  # whose settings others have
FRESH_ARMS = ("response", "own-sum", "told")
SEEDS, FOLDS = 5, 5
PENALTIES = (30.0, 100.0, 300.0, 1000.0, 3000.0)
SHRINKAGES = (0.1, 0.3, 1.0, 1000.0)  # the last leaves states as they are
ITERATIONS, ATTENTION = 60, 64
DEVELOPMENT_PAIRS = 300  # of `helpful`, in no final figure


class Head(nn.Module):
    """The head of an arm, on states `(B, N + 1, D)`: before the response, at the ends of sentences, and at EOS."""

    def __init__(self, arm: str, size: int) -> None:
        super().__init__()
        self.arm = arm
        self.value = nn.Linear(size, 1)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)
        if arm in ("paper", "equal", "own"):
            self.query, self.key = nn.Linear(size, ATTENTION, bias=False), nn.Linear(size, ATTENTION, bias=False)
            nn.init.orthogonal_(self.key.weight)
            if arm == "paper":
                nn.init.orthogonal_(self.query.weight)
            else:
                nn.init.zeros_(self.query.weight)

    def forward(self, states: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Scores `(B,)`, and what each sentence is worth, `(B, N)`; `lengths` are numbers of sentences."""
        rows = torch.arange(len(states))
        places = torch.arange(states.shape[1] - 1).repeat(len(states), 1)
        mask = places <= lengths[:, None]
        own = self.arm.startswith("own")
        if not own:  # the last sentence is read at EOS, which stands behind it
            places[rows, lengths] += 1
        values = self.value(states).squeeze(-1)[rows[:, None], places]
        rewards = sentence_rewards(values, mask, differences=not own)
        if self.arm in ("response", "own-sum"):  # differences add up to the last value
            return rewards.sum(dim=-1), rewards[:, 1:]
        query = self.query(states[rows, places[rows, lengths]])[:, None].expand(-1, places.shape[1], -1)
        terms = rewards * attention_weights(query, self.key(states)[rows[:, None], places], mask)
        return terms.sum(dim=-1), terms[:, 1:]


def stack(rows: Sequence[dict[str, Any]], depth: int) -> tuple[Tensor, Tensor]:
    """States `(2 P, N + 2, D)` at a depth, chosen and rejected in turn, of length 1; and numbers of sentences."""
    states = [state[DEPTHS.index(depth)].float() for row in rows for state in row["states"]]
    lengths = torch.tensor([len(state) - 2 for state in states])
    padded = nn.utils.rnn.pad_sequence([nn.functional.normalize(state, dim=-1) for state in states], batch_first=True)
    return padded, lengths


def members(pairs: Sequence[int]) -> list[int]:
    """Answers of pairs, by their place in [`stack`]."""
    return [i for pair in pairs for i in (2 * pair, 2 * pair + 1)]


def whitening(states: Tensor, shrinkage: float) -> tuple[Tensor, Tensor]:
    """
    Mean `(D,)` and matrix `(D, D)`: states `(M, D)` less the mean, times the matrix, are standardised and whitened, with
    a covariance that is shrunk to that of independent features, the more the higher the shrinkage.
    """
    mean, std = states.mean(dim=0), states.std(dim=0) + 1e-6
    standard = (states - mean) / std
    values, vectors = torch.linalg.eigh(standard.T @ standard / len(standard))
    scales = ((values.clamp(min=0.0) + shrinkage) / (1 + shrinkage)).rsqrt()
    return mean, vectors * scales @ vectors.T / std[:, None]


def train(
    arm: str, states: Tensor, lengths: Tensor, pairs: Sequence[int], setting: dict[str, Any], seed: int
) -> tuple[Head, Tensor, Tensor]:
    """A head trained on pairs, with the [`whitening`] of their states."""
    states, lengths = states[members(pairs)], lengths[members(pairs)]
    mean, matrix = whitening(states[torch.arange(states.shape[1]) <= lengths[:, None] + 1], setting["shrinkage"])
    states = (states - mean) @ matrix
    torch.manual_seed(seed)
    head = Head(arm, states.shape[-1])
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        scores, _ = head(states, lengths)
        # The paper's attention would be drawn to equal weights by a penalty, and is left alone.
        penalised = [weight for name, weight in head.named_parameters() if arm != "paper" or name == "value.weight"]
        squares = sum(weight.square().sum() for weight in penalised if weight.dim() > 1)
        total = -nn.functional.logsigmoid(scores[::2] - scores[1::2]).sum() + setting["penalty"] / 2 * squares
        total.backward()
        return total

    optimizer.step(loss)
    return head, mean, matrix


def told(
    states: Tensor, lengths: Tensor, pairs: Sequence[int], rows: list[dict[str, Any]], setting: dict[str, Any]
) -> tuple[Head, Tensor, Tensor]:
    """As [`train`], by ridge regression on which sentences are right: what these states can say at most."""
    flat = torch.cat([states[i, 1 : lengths[i] + 1] for i in members(pairs)])
    marks = [flag for pair in pairs for flags in rows[pair]["right"] for flag in flags]
    flat = flat[torch.tensor([flag is not None for flag in marks])]
    right = torch.tensor([float(flag) for flag in marks if flag is not None])
    mean, matrix = whitening(flat, setting["shrinkage"])
    flat = (flat - mean) @ matrix
    head = Head("own-sum", flat.shape[-1])
    gram = flat.T @ flat + setting["penalty"] * torch.eye(flat.shape[-1])
    head.value.weight.data[0] = torch.linalg.solve(gram, flat.T @ (right - right.mean()))
    return head, mean, matrix


@torch.no_grad()
def judge(trained: tuple[Head, Tensor, Tensor], states: Tensor, lengths: Tensor, pairs: Sequence[int]) -> Any:
    """Margins of pairs, and the worth of each sentence of both answers."""
    head, mean, matrix = trained
    states, lengths = states[members(pairs)], lengths[members(pairs)]
    scores, terms = head((states - mean) @ matrix, lengths)
    margins = (scores[::2] - scores[1::2]).tolist()
    return margins, [row[:n].tolist() for row, n in zip(terms, lengths.tolist(), strict=True)]


def folds(count: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """Training and test pairs of each fold."""
    order = random.Random(seed).sample(range(count), count)
    return [([i for j, i in enumerate(order) if j % FOLDS != f], order[f::FOLDS]) for f in range(FOLDS)]


def choose(
    dataset: str,
    rows: list[dict[str, Any]],
    splits: list[tuple[list[int], list[int]]],
    choices: dict[str, Any],
    save: Any,
) -> None:
    """Fills `choices` with the settings of the best accuracy on development pairs; what was tried is kept."""
    for arm in tqdm(sorted(ARMS, key=lambda arm: arm in DEPTH_OF), desc=f"Settings, {dataset}", unit=" arms"):
        choice = choices.setdefault(f"{dataset} {arm}", {"tried": []})
        if "depth" in choice:
            continue
        tried = choice["tried"]
        depths: Sequence[int] = DEPTHS
        shrinkages: Sequence[float] = SHRINKAGES
        if arm in DEPTH_OF:
            depths, shrinkages = (choices[f"{dataset} {DEPTH_OF[arm]}"]["depth"],), SHRINKAGES[::3]
        for depth in depths:
            states, lengths = stack(rows, depth)
            for shrinkage, penalty in itertools.product(shrinkages, PENALTIES):
                setting = {"depth": depth, "shrinkage": shrinkage, "penalty": penalty}
                if any(setting.items() <= other.items() for other in tried):
                    continue
                margins: list[float] = []
                for training, held_out in splits:
                    trained = train(arm, states, lengths, training, setting, seed=0)
                    margins += judge(trained, states, lengths, held_out)[0]
                tried.append({"accuracy": accuracy(margins), **setting})
                save()
        choice.update(max(tried, key=lambda setting: setting["accuracy"]))
        save()


def run(arm: str, seed: int, rows: list[dict[str, Any]], setting: dict[str, Any], by_part: bool) -> dict[str, Any]:
    """One cell: margins and worth of sentences of all test pairs, by their number."""
    states, lengths = stack(rows, setting["depth"])
    if by_part:
        splits = [(training_pairs(rows, seed), [i for i, row in enumerate(rows) if row["part"] == "test"])]
    else:
        splits = folds(len(rows), seed)
    judged: dict[int, tuple[float, list[list[float]]]] = {}
    for training, held_out in splits:
        if arm == "told":
            trained = told(states, lengths, training, rows, setting)
        else:
            trained = train(arm, states, lengths, training, setting, seed)
        found, terms = judge(trained, states, lengths, held_out)
        judged.update({pair: (found[i], terms[2 * i : 2 * i + 2]) for i, pair in enumerate(held_out)})
    return cell(arm, seed, judged, "right" in rows[held_out[0]])


def training_pairs(rows: list[dict[str, Any]], seed: int) -> list[int]:
    """Nine tenths of the pairs to learn from, so that seeds differ in data as well."""
    training = [i for i, row in enumerate(rows) if row["part"] == "train"]
    return random.Random(seed).sample(training, len(training) * 9 // 10)


def _short(value: float) -> float:
    """Three significant digits, as margins of a strong penalty are small."""
    return float(f"{value:.3g}")


def cell(arm: str, seed: int, judged: dict[int, tuple[float, list[list[float]]]], with_worth: bool) -> dict[str, Any]:
    """What is kept of margins and worth of sentences, by pair."""
    kept: dict[str, Any] = {"arm": arm, "seed": seed, "pairs": sorted(judged)}
    kept["margins"] = [_short(judged[i][0]) for i in kept["pairs"]]
    if with_worth:
        kept["worth"] = [[[_short(v) for v in row] for row in judged[i][1]] for i in kept["pairs"]]
    return kept


def compute(figures: dict[str, Any], datasets: Sequence[str], states: States, save: Any) -> None:
    """Chooses settings and runs the cells that are not there, dataset by dataset; `save()` after each."""
    for dataset in datasets:
        rows = states.read(dataset)
        if dataset == "fresh":
            rows = [row for row in states.read("facts") if row["part"] == "train"] + rows
        by_part, chooser = dataset in ("facts", "fresh"), CHOOSERS.get(dataset, dataset)
        if dataset == "helpful":
            development, rows = rows[:DEVELOPMENT_PAIRS], rows[DEVELOPMENT_PAIRS:]
        if chooser == dataset and by_part:
            training, held_out = ([i for i, r in enumerate(rows) if r["part"] == part] for part in ("train", "dev"))
            choose(dataset, rows, [(training, held_out)], figures["choices"], save)
        elif chooser == dataset:
            choose(dataset, development, folds(len(development), seed=0)[:3], figures["choices"], save)
        cells = figures["cells"].setdefault(dataset, [])
        done = {(cell["arm"], cell["seed"]) for cell in cells}
        arms = FRESH_ARMS if dataset == "fresh" else (*ARMS, "told") if "right" in rows[0] else ARMS
        jobs = [(arm, seed) for arm in arms for seed in range(SEEDS) if (arm, seed) not in done]
        for arm, seed in tqdm(jobs, desc=f"Heads, {dataset}", unit=" runs"):
            setting = figures["choices"][f"{chooser} {'own-sum' if arm == 'told' else arm}"]
            cells.append(run(arm, seed, rows, setting, by_part))
            save()
        tested = cells[0]["pairs"]
        if "right" in rows[tested[0]]:
            figures["endogenous"][dataset] = {
                "worth": [rows[i]["endogenous"] for i in tested],
                "right": [rows[i]["right"] for i in tested],
            }
        counts = [[state.shape[1] - 2 for state in rows[i]["states"]] for i in tested]
        figures["sizes"][dataset] = {
            "pairs": len(tested),
            "training": sum(row["part"] == "train" for row in rows) * 9 // 10 if by_part else len(rows) * 4 // 5,
            "sentences": statistics.mean(itertools.chain.from_iterable(counts)),
            "longer": accuracy([first - second for first, second in counts]),
            "counts": counts,
        }
        save()
    if {"facts", "fresh"} <= set(datasets):
        done = {(cell["arm"], cell["seed"]) for cell in figures["cells"]["fresh"]}
        for arm, seed in tqdm([job for job in itertools.product(LAYERS, range(SEEDS)) if job not in done], "Layers"):
            run_layers(arm, seed, figures, states)
            save()


def run_layers(arm: str, seed: int, figures: dict[str, Any], states: States) -> None:
    """Trains layers on the facts, and adds a cell of the facts and one of the fresh facts."""
    setting, rows, pairs = figures["choices"][f"facts {LAYERS[arm]}"], states.read("facts"), states.pairs("facts")
    training = training_pairs(rows, seed)
    head = train(LAYERS[arm], *stack(rows, setting["depth"]), training, setting, seed)
    model = as_model(head, setting["depth"], states.path, LAYERS[arm] == "response", torch.float32)
    reward = train_layers(model, states.path, [pairs[i] for i in training], seed)
    for dataset in ("facts", "fresh"):
        tested = [pair for pair in states.pairs(dataset) if pair.part == "test"]
        judged = [
            (margin, worth)
            for pair, margin, worth in zip(tested, *judge_pairs(reward, tested), strict=True)
            if list(map(len, worth)) == list(map(len, pair.right or ()))  # as in the states
        ]
        cells = figures["cells"][dataset]
        cells.append(cell(arm, seed, dict(zip(cells[0]["pairs"], judged, strict=True)), True))


def main() -> None:
    """Runs what is missing, and writes figures, page and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with `preferences/` and `prmbench/`")
    parser.add_argument("--states", type=Path, required=True, help="folder for the frozen states, 1 GB")
    parser.add_argument("--datasets", nargs="*", choices=DATASETS, default=DATASETS, help="which; none: only the page")
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="folder of figures and page")
    args = parser.parse_args()
    file = args.output / "sentence.json.gz"
    parts = "choices", "cells", "endogenous", "sizes"
    figures = read_figures(file) if file.exists() else {part: {} for part in parts}
    figures["settings"] = describe_run("studies.sentence_reward", "cpu", "--data DIR --states DIR")
    compute(figures, args.datasets, States(args.states, args.data), lambda: write_figures(file, figures))
    summaries = {name: summarize(figures, name) for name in DATASETS if name in figures["sizes"]}
    ablation = args.output / sentence_ablation.FILE
    text = page(figures, summaries, read_figures(ablation) if ablation.exists() else None)
    (args.output / "sentence.md").write_text(text, encoding="utf-8")
    plot(summaries, args.output / "sentence.png")
    console = Console()
    console.print(verdict(summaries))
    for name, summary in summaries.items():
        rows = [[arm, *row[1:]] for arm, row in zip(summary, table_rows(summary), strict=True)]
        console.print(terminal_table([name, *HEADERS[1:]], rows))


if __name__ == "__main__":
    main()
