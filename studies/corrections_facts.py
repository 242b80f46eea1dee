# SPDX-License-Identifier: Apache-2.0
r"""
Corrections of the endogenous reward on a pretrained model: SmolLM2-135M-Instruct and the demo's factual questions.

GRPO with the demo's settings (LoRA, ten steps of 64 answers, constant learning rate of 1e-3). A cell is
`<reward>:<beta>`. Accuracy on questions about other facts, sampled at T = 1, every 5 steps. Runs that are in the
results are kept.

    python -m studies.corrections_facts                        # 5 to 7 minutes a cell on 2 cores
    python -m studies.corrections_facts --cells none:0 clip:0  # some of them
"""

import argparse
import contextlib
import io
import json
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

from peft import LoraConfig
from rich.console import Console
from tqdm.auto import tqdm
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from benchmarks.measure import describe_run, machine_line, markdown_table, write_figures
from endotrl import CollapseMonitor, EndogenousReward
from endotrl.demo.grpo_runs import generate_answers, load_model
from endotrl.demo.parts import FACTS, FACTS_ANSWER_LENGTH, LORA
from endotrl.frozen.cpu_dtype import faster_dtype
from endotrl.frozen.quickstart_model import quickstart_model_path
from endotrl.grading import is_right
from endotrl.reporting import quiet_libraries, terminal_table
from endotrl.tasks import facts

from .collapse_runs import Ask, kept_results
from .corrections import lost


STEPS = FACTS["max_steps"]
EVERY = 5  # steps between two measurements on held-out questions
SAMPLES = 2  # answers to each of them


def verdict(completions: list[Any], answers: list[list[str]], **kwargs: Any) -> list[float]:
    """A verifiable reward: whether the answer is right."""
    return facts.accuracy(completions, answers)


# Settings of the reward; the last has a verifier beside it. No model with SmolLM2's tokenizer is at hand that knows
# less, for the information gain.
REWARDS: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("endogenous (default)", {}),
    "centered": ("centered", {"token_reward": "centered"}),
    "length": ("length control", {"correction": "length"}),
    "clip": ("clipped at -5 nats per token", {"token_reward": "log_prob", "correction": "clip"}),
    "mixed": ("mixed with right or wrong, 1 : 0.3", {}),
}
CELLS = [f"{name}:{beta}" for beta in (FACTS["beta"], 0) for name in REWARDS]


class AskFacts(Ask):
    """Accuracy on held-out questions, and the length of the answers."""

    def __init__(self, tokenizer: Any, questions: list[facts.Question]) -> None:
        super().__init__(tokenizer, 0, EVERY, self._accuracy)
        self._questions = questions * SAMPLES
        self.lengths: list[float] = []  # tokens, one mean for each accuracy

    def _accuracy(self, model: Any, tokenizer: Any, seed: int) -> float:
        prompts = [question.prompt for question in self._questions]
        texts, ids = generate_answers(model, tokenizer, prompts, FACTS_ANSWER_LENGTH, seed=seed, batch_size=160)
        self.lengths.append(sum(map(len, ids)) / len(ids))
        right = sum(is_right(text, q.answers) for text, q in zip(texts, self._questions, strict=True))
        return right / len(self._questions)


def run(cell: str, seed: int) -> dict[str, Any]:
    """Trains one cell."""
    name, _, beta = cell.partition(":")
    path, (dtype, _) = quickstart_model_path(), faster_dtype()
    tokenizer = AutoTokenizer.from_pretrained(path)
    questions, held_out = facts.load_questions(seed=seed)
    ask, monitor = AskFacts(tokenizer, held_out), CollapseMonitor()
    reward = EndogenousReward(None, **REWARDS[name][1])
    rewards: list[Any] = [reward, *([verdict] if name == "mixed" else []), facts.accuracy]
    settings: dict[str, Any] = {**FACTS, "max_steps": STEPS, "beta": float(beta), "seed": seed}
    if name == "mixed":
        settings["multi_objective_aggregation"] = "normalize_then_sum"
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(
            output_dir=folder,
            reward_weights=[1.0, 0.3, 0.0] if name == "mixed" else [1.0, 0.0],
            temperature=1.0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            gradient_checkpointing=False,
            bf16=dtype == "bfloat16",
            **settings,
        )
        trainer = GRPOTrainer(
            model=load_model(path, dtype),
            reward_funcs=rewards,
            args=args,
            train_dataset=facts.make_dataset(questions),
            processing_class=tokenizer,
            peft_config=LoraConfig(**LORA),
            callbacks=[ask],
        )
        reward.attach(trainer)
        monitor.attach(trainer)
        with contextlib.redirect_stdout(io.StringIO()):  # the Trainer prints a dictionary a step
            trainer.train()
    return {
        "cell": cell,
        "seed": seed,
        "held_out": ask.accuracies,
        "lengths": dict(zip(ask.accuracies, ask.lengths, strict=True)),
        "alarms": monitor.alarms,
        "dtype": dtype,
        "seconds": time.perf_counter() - started,
    }


HEADER = ["reward", "β", "accuracy", "best", "gain (points)", "answer (tokens)", "5 points below its best", "alarm"]


def table_rows(results: list[dict[str, Any]]) -> list[list[str]]:
    """One row a cell."""
    rows = []
    for result in sorted(results, key=lambda r: (CELLS.index(r["cell"]), r["seed"])):
        name, _, beta = result["cell"].partition(":")
        points = sorted((int(s), a) for s, a in result["held_out"].items())
        lengths = [length for _, length in sorted((int(s), n) for s, n in result["lengths"].items())]
        first, last = points[0][1], points[-1][1]
        once, _ = lost(result)
        rows.append(
            [
                REWARDS[name][0],
                beta,
                f"{first:.1%} to {last:.1%}",
                f"{max(a for _, a in points):.1%}",
                f"{100 * (last - first):+.1f}",
                f"{lengths[0]:.1f} to {lengths[-1]:.1f}",
                "never" if once is None else f"step {once}",
                str(result["alarms"][0][0]) if result["alarms"] else "none",
            ]
        )
    return rows


def page(results: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """The results page, in Markdown."""
    number = len(facts.load_questions()[1])
    missing = [f"`{cell}`" for cell in CELLS if cell not in {result["cell"] for result in results}]
    return (
        "\n\n".join(
            [
                "# Which corrections hold on SmolLM2?",
                machine_line(settings),
                "The factual questions of `endotrl demo`: SmolLM2-135M-Instruct with a LoRA adapter, GRPO, 64 "
                "answers per step, constant learning "
                f"rate of {FACTS['learning_rate']:g}, {STEPS} steps, one seed. Accuracy on {number} facts that no "
                f"training question is about, {SAMPLES} answers each sampled at T = 1, every {EVERY} steps (standard "
                "error about 3 "
                "points). The last column is the first step at which `CollapseMonitor` raised the alarm. In "
                "*mixed*, the verifier sees the answers to the training questions, which the others never do.",
                markdown_table(HEADER, table_rows(results)),
                *([f"Not run: {', '.join(missing)}."] if missing else []),
            ]
        )
        + "\n"
    )


def main() -> None:
    """Runs the cells and writes figures and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="*", choices=CELLS, default=CELLS, help="Which; none: only the page.")
    parser.add_argument("--seed", type=int, default=0, help="Seed.")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="Folder of `results/`.")
    args = parser.parse_args()
    quiet_libraries()
    logging.getLogger("endotrl").setLevel(logging.ERROR)
    file, settings, results = kept_results(args.output, "corrections-facts")
    there = {(result["cell"], result["seed"]) for result in results}
    for cell in tqdm([c for c in args.cells if (c, args.seed) not in there], desc="Cells", unit=" runs"):
        results.append(json.loads(json.dumps(run(cell, args.seed))))
        settings = describe_run("studies.corrections_facts", "cpu", "")
        write_figures(file, {"settings": settings, "results": results})
    (args.output / "results" / "corrections-facts.md").write_text(page(results, settings), encoding="utf-8")
    Console().print(terminal_table(HEADER[:3], [row[:3] for row in table_rows(results)]))


if __name__ == "__main__":
    main()
