# SPDX-License-Identifier: Apache-2.0
"""
Forecast against truth: small transformers that learned from faulty demonstrations are forecast, then trained by TRL's
RLOO and GRPO at several beta.

Three base models of 0.16 M parameters learned to add two numbers of two digits from right demonstrations, then met
faulty ones: *scattered* (30% have one digit changed), *derailing* (55% have the first written digit one too high, and
random digits after it) and *misled* (60% are the sum plus 10: the wrong answer is the most probable one). A fourth,
*reversed*, is a GPT-2 of 0.10 M parameters and a task of this page alone: to write the four digits backwards. Where
the first number is below 40, 60% of the demonstrations are not reversed; of the others, 40% have a digit drawn anew.

*facts* is SmolLM2-135M-Instruct, which ends six sentences about facts, in five tokens, and is trained by LoRA. A
seed has sentences of its own.

    python -m studies.forecast                     # goes on where an earlier run was cut off
"""

import argparse
import itertools
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from benchmarks.measure import describe_run, machine_line, markdown_table, write_figures
from endotrl import EndogenousReward, forecast
from endotrl.demo.grpo_runs import generate_answers, load_model, train_with_grpo
from endotrl.demo.parts import LORA
from endotrl.frozen.names import resolve_model
from endotrl.reporting import quiet_libraries, terminal_table
from endotrl.reporting.curves import COLORS
from endotrl.reporting.plots import as_png, pyplot
from endotrl.runs.jsonl import append_lines, read_lines
from endotrl.tasks import arithmetic, facts
from studies.arithmetic_runs import plus_10


NUM_UNSEEN, NUM_QUESTIONS, NUM_FACTS = 128, 64, 6
COST_QUESTIONS, COST_GROUP = 200, 2
# Of each beta, from the policy of the beta before it, on derailing base models; half of them on others, whose optima are
# nearer.
STEPS = {4.0: 150, 2.0: 150, 1.0: 300, 0.5: 300}
LONG_STEPS = 600  # of GRPO on derailing base models, beside the runs with the steps above
PRETRAINING_STEPS = (400, 300)  # on right, then on faulty demonstrations
TRAINING: dict[str, Any] = {
    "learning_rate": 5e-4,
    "per_device_train_batch_size": 256,
    "num_generations": 8,
    "max_completion_length": arithmetic.MAX_ANSWER_LENGTH,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 5,
    "bf16": False,
}


class Task(NamedTuple):
    """How questions are asked, and a policy is trained on them."""

    samples: int  # to each question, for the forecast
    evaluations: int  # answers to each, of a trained policy
    length: int  # of answers, in tokens
    batch_size: int  # of evaluations
    grader: str | Callable[[str, Any], bool]
    is_right: Callable[[str, Any], bool]
    accuracy: Callable[..., Any]
    steps: dict[float, int]
    training: dict[str, Any] = {}
    adapter: dict[str, Any] | None = None  # of LoRA
    dtype: str = "float32"


def begins_with(completion: str, answers: list[str]) -> bool:
    """Whether the end of a sentence begins with an accepted answer."""
    return completion.lstrip().startswith(tuple(answers))


def accuracy_of_facts(completions: list[str], answer: list[list[str]], **_: Any) -> list[float]:
    """[`begins_with`], as a reward function of TRL."""
    return [float(begins_with(*row)) for row in zip(completions, answer, strict=True)]


ADDITION = Task(128, 64, arithmetic.MAX_ANSWER_LENGTH, 1024, "exact", str.__eq__, arithmetic.accuracy, STEPS)
FACTS = Task(
    *(768, 384, 5, 256, begins_with, begins_with, accuracy_of_facts),
    steps={8.0: 40, 4.0: 50, 2.0: 60, 1.0: 80},
    training={"learning_rate": 5e-4, "per_device_train_batch_size": 48, "max_completion_length": 5},
    adapter=LORA,
    dtype="bfloat16",
)
ARMS: dict[str, tuple[str, type, type, dict[str, Any]]] = {
    "rloo": ("RLOO", RLOOTrainer, RLOOConfig, {}),
    "grpo_none": ('GRPO, scale_rewards="none"', GRPOTrainer, GRPOConfig, {"scale_rewards": "none"}),
    "grpo_group": ('GRPO, scale_rewards="group"', GRPOTrainer, GRPOConfig, {"scale_rewards": "group"}),
}
ARRIVED = 0.05  # nats
WHY = """## What it takes to arrive

A run that has not arrived is off. In a first round, not kept here, all runs started from the base model and had 80 to
150 updates: 9 of 52 were more than 3 points off, at small betas and most on the derailing base model, whose optimum is
a nat away. They still gained in their last quarter, and those by RLOO, whose optimum is known, were up to 1.1 nats short
of it. It was not the samples, nor completions that are cut off, the group factor, or that questions were new.

A policy gradient is noisy, and its noise keeps a policy beside the optimum: of learning rates, 1e-3 in place of 5e-4 did
little, and 2e-3 left the path for good. To begin at the policy of the beta before, with twice as many updates at small
betas, is what helped: on the derailing base model of seed 1, at beta 0.5, the difference went from -5.3 to +0.6 points.

`scale_rewards="group"` was 3.8 and 5.5 points off on the misled base model when the forecast divided by the policy's
standard deviation. It now takes the mean over groups, which TRL divides by theirs.

GRPO takes longer than RLOO: at first, its runs on derailing base models had the steps of the others, which was enough
for two of three (at most 2.0 points off), but not for that of seed 2: -2.5, -4.1, -2.6 and -3.0 points, from the largest
beta on. All three then had 600 steps at every beta; both are below. A forecast from eight times the samples is 0.4 to 0.6
points lower there.

Facts were off by 6.6 and 8.8 points at beta 2 and 1 in an earlier round (twelve sentences, batches of 32 at 1e-3), at
twice the KL divergence that was forecast. It was the study: it passed the adapter of the beta before as the policy, of
which TRL makes the reference, and so the shared reward, too; logged rewards and KL were then beyond the optimum, which
cannot be. Runs now start from that adapter, but have the base model as the reference; sentences, batches and learning
rate were changed along with it (six, 48, 5e-4). Two of 24 runs of facts are more than 3 points off: +6.4 (seed 1, GRPO,
beta 1), which had not converged; and +3.4 (seed 2, RLOO, beta 4), which by its logs had, but is 0.24 nats short of the
optimum: a learning rate that falls hides what is still to be gained. After three times the updates (`--updates 3`,
below, too) they are +2.4 and +1.7.

The runs are of two machines (Intel Xeon and AMD EPYC): bases of the same seed differ by what rounding makes of them."""
KEYS = ("base", "seed", "arm", "beta", "steps", "forecast", "sampled", "trained", "history")


def reversed_demonstration(question: arithmetic.Question, generator: random.Random) -> str:
    """The four digits backwards, or something else."""
    right, place, misled = BASES["reversed"][2](question), generator.randrange(4), question[0] < 40
    wrong = right[::-1] if misled else right[:place] + str(generator.randrange(10)) + right[place + 1 :]
    return wrong if generator.random() < (0.6 if misled else 0.4) else right


# The share of demonstrations that a function makes, the function, and the right answer.
BASES: dict[str, tuple[float, Callable[..., str], Callable[[arithmetic.Question], str]]] = {
    "scattered": (0.3, arithmetic.wrong_answer, arithmetic.answer_text),
    "derailing": (0.55, arithmetic.derailed_answer, arithmetic.answer_text),
    "misled": (0.6, plus_10, arithmetic.answer_text),
    "reversed": (1.0, reversed_demonstration, lambda question: f"{question[0]}{question[1]}"[::-1]),
}
NAMES = (*BASES, "facts")


def questions_of(name: str, seed: int) -> list[dict[str, str]]:
    """Questions that no demonstration has, and all that RL asks: its optimum is known for each of them."""
    if name == "facts":
        found = {q.statement: q.answers for q in facts.load_questions(seed=seed)[0]}  # one of each fact
        ends = " {answer}."
        rows = [{"prompt": s.removesuffix(ends), "answer": a} for s, a in found.items() if s.endswith(ends)]
        return rows[:NUM_FACTS]
    questions = arithmetic.make_questions(NUM_UNSEEN, seed, digits=2)[:NUM_QUESTIONS]
    return [{"prompt": arithmetic.question_text(q), "answer": BASES[name][2](q)} for q in questions]


def make_base(folder: Path, name: str, seed: int) -> Path:
    """The folder of a base model, made if it is not there. The adders of a seed start from one that adds rightly."""
    path = folder / f"{name}-{seed}"
    if name == "facts" and not path.exists():
        path.symlink_to(resolve_model("quickstart"))
    if not path.exists():
        torch.manual_seed(seed)
        tokenizer, fresh = arithmetic.make_tokenizer(), name in ("clean", "reversed")
        if name == "reversed":
            special = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
            sizes = {"vocab_size": len(tokenizer), "n_positions": 32, "n_embd": 64, "n_layer": 2, "n_head": 4}
            model = GPT2LMHeadModel(GPT2Config(**special, **sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
        else:
            model = (
                arithmetic.make_model(tokenizer, 64, 192) if fresh else load_model(make_base(folder, "clean", seed))
            )
        noise, wrong, _ = BASES.get(name, (0.0, plus_10, None))
        unseen = arithmetic.make_questions(NUM_UNSEEN, seed, digits=2)
        arithmetic.pretrain(model, tokenizer, PRETRAINING_STEPS[not fresh], noise, seed, unseen, digits=2, wrong=wrong)
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    return path


def task_of(base: Path) -> Task:
    """The task of a base model."""
    return FACTS if base.name.startswith("facts") else ADDITION


def ask(model: Any, base: Path, questions: list[dict[str, str]]) -> dict[str, float]:
    """Accuracy of a policy, its reward, and its KL to the base model, in nats per completion."""
    tokenizer, task = AutoTokenizer.from_pretrained(base), task_of(base)
    prompts, truths = ([q[key] for q in questions] * task.evaluations for key in ("prompt", "answer"))
    texts, ids = generate_answers(model, tokenizer, prompts, task.length, batch_size=task.batch_size)
    own, reward = (
        sum(value or 0.0 for value in EndogenousReward(m, tokenizer, dtype=task.dtype)(prompts, texts, ids)) / len(ids)
        for m in (model, str(base))
    )
    return {"accuracy": sum(map(task.is_right, texts, truths)) / len(ids), "reward": reward, "kl": own - reward}


def steps_of(name: str, arm: str, beta: float) -> int:
    """Updates of a run."""
    if name == "facts":
        return FACTS.steps[beta]
    if (name, arm) == ("derailing", "grpo_none"):
        return LONG_STEPS
    return STEPS[beta] if name == "derailing" else STEPS[beta] // 2


def weights_of(base: Path, arm: str, beta: float) -> Path:
    """Where the trained weights are kept."""
    return base.parent / "trained" / f"{base.name}-{arm}-{beta:g}.pt"


def run(
    base: Path,
    questions: list[dict[str, str]],
    seed: int,
    arm: str,
    beta: float,
    steps: int,
    start: float | None,
) -> dict[str, Any]:
    """Trains one arm, from the policy of the beta `start` or from the base model, and asks it what was forecast."""
    task = task_of(base)
    policy: Any = load_model(base, task.dtype)
    _, trainer_class, config_class, settings = ARMS[arm]

    class Trainer(trainer_class):
        """Starts from the weights of `start`. With an adapter passed as the policy, TRL would make it the reference."""

        def train(self, *args: Any, **kwargs: Any) -> Any:
            if start is not None:
                loaded = self.model.load_state_dict(torch.load(weights_of(base, arm, start)), strict=False)
                assert not loaded.unexpected_keys
            return super().train(*args, **kwargs)

    trained = train_with_grpo(
        f"{base.name}-{arm}-{beta:g}",
        policy,
        AutoTokenizer.from_pretrained(base),
        EndogenousReward(None),
        task.accuracy,
        Dataset.from_list(questions),
        base.parent / "trained",
        peft_config=LoraConfig(**task.adapter) if task.adapter else None,
        trainer_class=Trainer,
        config_class=config_class,
        seed=seed,
        **{**TRAINING, **task.training, **settings, "beta": beta, "max_steps": steps},
    )
    history = [[entry["rewards/endogenous_reward/mean"], entry["kl"]] for entry in trained.history]
    model: Any = trained.model
    weights = {name: weight for name, weight in model.state_dict().items() if not task.adapter or "lora_" in name}
    torch.save(weights, weights_of(base, arm, beta))
    if task.adapter:
        model = model.merge_and_unload()
    return {"trained": ask(model, base, questions), "history": history, "seconds": trained.seconds}


def cost(folder: Path) -> dict[str, float]:
    """CPU seconds, of one thread, of a forecast for facts that SmolLM2 is asked, and of a GRPO step on the same."""
    questions = facts.load_questions()[0][:COST_QUESTIONS]
    started = time.process_time()
    forecast(
        "quickstart", facts.make_dataset(questions), answer="answers", samples=16, max_new_tokens=16, progress=False
    )
    forecasting = time.process_time() - started
    model = resolve_model("quickstart")
    trained = {
        "max_steps": 1,
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": COST_QUESTIONS * COST_GROUP // 16,
        "num_generations": COST_GROUP,
        "max_completion_length": 16,
        "beta": 0.1,
        "bf16": False,
    }
    policy, tokenizer, dataset = load_model(model), AutoTokenizer.from_pretrained(model), facts.make_dataset(questions)
    started = time.process_time()
    train_with_grpo("cost", policy, tokenizer, EndogenousReward(None), facts.accuracy, dataset, folder, **trained)
    return {"questions": COST_QUESTIONS, "forecast": forecasting, "step": time.process_time() - started}


def short_of_optimum(result: dict[str, Any]) -> float:
    r"""
    What the objective of RLOO, $\mathbb{E}[R] - \beta\, \mathrm{KL}$, is below its optimum, over beta: the KL of the
    trained policy to the forecast one, in nats per completion.
    """
    best, got = (r["reward"] / result["beta"] - r["kl"] for r in (result["forecast"], result["trained"]))
    return best - got


def last_gain(result: dict[str, Any]) -> float:
    """What the last quarter of a run added to its objective over beta, next to the quarter before it, in nats."""
    share = 1.0 if result["arm"] == "rloo" else 1.0 - 1.0 / TRAINING["num_generations"]
    length = result["forecast"]["length"]  # TRL logs the KL of a token
    objective = [share * reward / result["beta"] - length * kl for reward, kl in result["history"]]
    quarter = len(objective) // 4
    return (sum(objective[-quarter:]) - sum(objective[-2 * quarter : -quarter])) / quarter


def has_converged(result: dict[str, Any]) -> bool:
    """By its logs alone."""
    return last_gain(result) <= ARRIVED


def difference(result: dict[str, Any]) -> float:
    """Trained minus forecast, in points."""
    return 100 * (result["trained"]["accuracy"] - result["forecast"]["accuracy"])


def table_rows(results: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The table of all runs."""
    rows = []
    order = [(base, arm) for base in sorted(NAMES) for arm in ARMS]
    for r in sorted(results, key=lambda r: (order.index((r["base"], r["arm"])), -r["beta"], r["seed"])):
        expected, trained = r["forecast"], r["trained"]
        low, high = expected["accuracy_interval"]
        row = {"base": f"{r['base']} {r['seed']}", "trainer": ARMS[r["arm"]][0], "beta": f"{r['beta']:g}"}
        row |= {"sampled": f"{r['sampled']:.1%}", "forecast": f"{expected['accuracy']:.1%}"}
        row |= {"95%": f"{low:.1%} to {high:.1%}", "trained": f"{trained['accuracy']:.1%}"}
        row |= {"difference": f"{difference(r):+.1f}", "effective samples": f"{expected['ess']:.0f}"}
        row |= {
            "steps": f"{r['steps']}",
            "gain of the last quarter": f"{last_gain(r):+.2f}",
        }
        row |= {"KL: forecast, trained": f"{expected['kl']:.2f}, {trained['kl']:.2f}"}
        rows.append(row | {"short of the optimum": f"{short_of_optimum(r):.3f}" if r["arm"] == "rloo" else ""})
    return rows


def summary_rows(results: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Each trainer on each base: how far forecast and truth are apart."""
    rows = []
    for name, arm in itertools.product(NAMES, ARMS):
        some = [r for r in results if (r["base"], r["arm"]) == (name, arm)]
        if some:
            gaps, short = ([f(r) for r in some] for f in (lambda r: abs(difference(r)), short_of_optimum))
            row = {"base": name, "trainer": ARMS[arm][0], "within 3 points": within(some)}
            row |= {"mean difference": f"{sum(gaps) / len(gaps):.1f}", "largest": f"{max(gaps):.1f}"}
            mean = f"{sum(short) / len(short):.2f}, {max(short):.2f}" if arm == "rloo" else ""
            rows.append(row | {"short of the optimum: mean, largest": mean})
    return rows


def table(rows: list[dict[str, str]], form: Callable[[list[str], list[list[str]]], Any]) -> Any:
    """Rows as one of the tables that take headers and lines."""
    return form([*rows[0]], [[*row.values()] for row in rows])


def within(results: list[dict[str, Any]]) -> str:
    """How many runs are within 3 points."""
    return f"{sum(abs(difference(r)) <= 3 for r in results)} of {len(results)}"


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Trained over forecast accuracy, next to equality and 3 points around it; hollow: not converged."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(5.6, 4.4), layout="constrained")
    axis.plot([0, 1], [0, 1], color="#999999", linewidth=1)
    axis.fill_between([0, 1], [-0.03, 0.97], [0.03, 1.03], color="#dddddd", linewidth=0)
    for (name, arm), marker in zip(itertools.product(NAMES, ARMS), "os^DvP*Xphd<>8H", strict=True):
        some = [r for r in results if (r["base"], r["arm"]) == (name, arm)]
        for settled in (True, False) if some else ():
            axis.plot(
                [r["forecast"]["accuracy"] for r in some if has_converged(r) == settled],
                [r["trained"]["accuracy"] for r in some if has_converged(r) == settled],
                marker,
                markersize=5,
                color=COLORS[list(ARMS).index(arm)],
                fillstyle="full" if settled else "none",
                label=f"{name}, {ARMS[arm][0]}" if settled else None,
            )
    axis.set(xlabel="forecast accuracy", ylabel="accuracy after training", xlim=(0, 1), ylim=(0, 1))
    axis.legend(frameon=False, fontsize=8)
    path.write_bytes(as_png(figure))


def page(results: list[dict[str, Any]], costs: list[dict[str, float]], settings: dict[str, Any]) -> str:
    """The results page, in Markdown."""
    sure = [r for r in results if r["forecast"]["ess"] >= 5]
    arrived = [r for r in sure if r["arm"] == "rloo" and short_of_optimum(r) <= ARRIVED]
    verdicts = {r["base"]: r["verdict"] for r in results if (r["seed"], r["arm"]) == (0, "rloo")}
    lines = [
        "# Forecast against truth",
        "",
        f"**{within([r for r in sure if has_converged(r)])} runs that had converged end within 3 points of the "
        f"forecast**: by their logs, the last quarter added at most {ARRIVED:g} nats to the objective. Of all runs, "
        f"{within(sure)}; of the RLOO runs that came within {ARRIVED:g} nats of the optimum, {within(arrived)}. (All "
        "have at least 5 effective samples.)",
        "",
        machine_line(settings),
        "",
        " ".join(str(__doc__).split("    python")[0].split()),
        "",
        f"Forecast: {NUM_QUESTIONS} questions that no demonstration had, {ADDITION.samples} samples each, before a step is "
        f"trained. Training: TRL as it is, on the same questions, {TRAINING['per_device_train_batch_size']} answers "
        f"per step in groups of {TRAINING['num_generations']}, reward `EndogenousReward`. The learning rate falls from "
        f"{TRAINING['learning_rate']:g} to 0. The largest beta starts from the base model, every other from the policy "
        "of the beta before it: the optimum does not depend on where a run begins. "
        f"Trained: {ADDITION.evaluations} sampled answers to each question.",
        "",
        "Verdicts on the base models of the first seed, for RLOO:",
        "",
        *(f"- *{name}*: {verdict}" for name, verdict in verdicts.items()),
        "",
        table(summary_rows(sure), markdown_table),
        "",
        "![Accuracy after training over forecast accuracy; hollow: not converged](forecast.png)",
        "",
        WHY,
        "",
        *(
            f"What it costs (`--cost`), in CPU seconds of one thread: 16 samples of up to 16 tokens of SmolLM2 for "
            f"each of {c['questions']} facts {c['forecast']:.0f} s; one GRPO step of TRL on the same questions, with "
            f"groups of only 2, {c['step']:.0f} s.\n"
            for c in costs[-1:]
        ),
        "## Every run",
        "",
        "*Gain of the last quarter*: what it added to the objective over beta, in nats, by the training logs, next to "
        "the quarter before it; a run that has converged gains nothing, though a learning rate that falls damps a "
        "gain, too. *Short of the optimum*: what the objective lacks at the end, which is the KL divergence of the "
        "trained policy to the forecast one. (GRPO's objective has no such form.)",
        "",
        table(table_rows(results), markdown_table),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Runs what is not there yet, and writes figures and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="Seeds; none writes the page.")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=["rloo", "grpo_none"], help="Trainers.")
    parser.add_argument("--bases", nargs="+", choices=NAMES, default=list(BASES), help="Bases.")
    parser.add_argument(
        "--betas",
        nargs="+",
        type=float,
        default=sorted({*FACTS.steps, *STEPS}, reverse=True),
        help="KL penalties, from the largest on.",
    )
    parser.add_argument("--updates", type=int, default=1, help="Multiple of the usual number of updates.")
    parser.add_argument("--cost", action="store_true", help="Also measure what a forecast costs.")
    parser.add_argument("--folder", type=Path, default=Path("forecast-study"), help="Folder of models and results.")
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="Folder of the page.")
    args = parser.parse_args()
    os.environ |= {"WANDB_MODE": "disabled", "TQDM_DISABLE": "1"}
    quiet_libraries()
    args.folder.mkdir(parents=True, exist_ok=True)
    log, costs = args.folder / "runs.jsonl", args.folder / "cost.jsonl"
    if args.cost:
        append_lines(costs, [cost(args.folder)])
    results = list(read_lines(log, KEYS))
    started = time.perf_counter()
    for seed, arm, name in itertools.product(args.seeds, args.arms, args.bases):
        base, questions = make_base(args.folder, name, seed), questions_of(name, seed)
        trainer, _, scale = arm.partition("_")
        task = task_of(base)
        predicted = forecast(
            str(base),
            questions,
            betas=[beta for beta in args.betas if beta in task.steps],
            trainer=trainer,  # type: ignore[arg-type]
            scale_rewards=scale or "none",  # type: ignore[arg-type]
            num_generations=TRAINING["num_generations"],
            samples=task.samples,
            max_new_tokens=task.length,
            grader=task.grader,
            dtype=task.dtype,
            seed=seed,
            output=args.folder / f"forecast-{name}-{seed}",
            progress=False,
        )
        Console().print(f"{name} {seed}, {ARMS[arm][0]}: {predicted.verdict}", markup=False)
        for row in predicted.betas:
            beta = row["beta"]
            larger = [other for other in task.steps if other > beta and weights_of(base, arm, other).exists()]
            key = {
                "base": name,
                "seed": seed,
                "arm": arm,
                "beta": beta,
                "steps": args.updates * steps_of(name, arm, beta),
            }
            if not any(key.items() <= r.items() for r in results):
                result = {**key, "forecast": row, "sampled": predicted.alternatives["sampled"]}
                result |= {"verdict": predicted.verdict, "alternatives": predicted.alternatives}
                result |= run(base, questions, seed, arm, beta, key["steps"], min(larger, default=None))
                append_lines(log, [result])
                results.append(result)
                Console().print(", ".join(table_rows([result])[0].values()), markup=False)
    seeds = " ".join(sorted({str(r["seed"]) for r in results}))
    settings = {
        **describe_run("studies.forecast", "cpu", f"--cost --seeds {seeds}"),
        "seconds": time.perf_counter() - started,
    }
    measured = list(read_lines(costs, ("questions", "forecast", "step")))
    plot(results, args.output / "forecast.png")
    write_figures(args.output / "forecast.json.gz", {"settings": settings, "results": results, "costs": measured})
    (args.output / "forecast.md").write_text(page(results, measured, settings), encoding="utf-8")
    shown = ("base", "trainer", "beta", "forecast", "trained", "difference")  # 80 columns
    Console().print(table([{key: row[key] for key in shown} for row in table_rows(results)], terminal_table))


if __name__ == "__main__":
    main()
