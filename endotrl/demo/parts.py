# SPDX-License-Identifier: Apache-2.0
"""The parts of the demo: what each trains, and on what."""

import gc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..frozen.cpu_dtype import faster_dtype
from ..frozen.quickstart_model import quickstart_model_path
from ..grading import is_right
from ..reporting import HeatMapRow, terminal_heat_map
from ..rewards import EndogenousReward, LengthReward, RandomReward
from ..rewards.contributions import heat_map_row
from ..tasks import arithmetic, facts
from .findings import COOL, GREEDY, MAJORITY, SAMPLED, Part, Policy
from .grpo_runs import Run, generate_answers, load_model, train_with_grpo
from .progress import Kept, Progress


# Both leave TRL's `scale_rewards="group"` on: it gives the endogenous, the random and the length reward the same
# scale, and so the same chance. The KL penalty then weighs beta times the standard deviation of a group's rewards.
ARITHMETIC: dict[str, Any] = {
    "max_steps": 60,
    "per_device_train_batch_size": 256,  # 32 questions
    "num_generations": 8,
    "max_completion_length": arithmetic.MAX_ANSWER_LENGTH,
    "beta": 0.1,
    "learning_rate": 1e-3,
    # Adam's first steps are as large as all others, whatever the gradient's noise: without a warm-up, accuracy falls
    # in the first of them, by any reward.
    "warmup_steps": 5,
    "bf16": False,
}
DIGITS = 2
PRETRAINING: dict[str, Any] = {"steps": 1000, "batch_size": 256, "noise": 0.55}
HELD_OUT = 500  # questions of arithmetic
MAJORITY_OF = 16

FACTS: dict[str, Any] = {
    "max_steps": 10,
    "per_device_train_batch_size": 16,  # with the next line, 8 questions, in the memory of two
    "gradient_accumulation_steps": 4,
    "num_generations": 8,
    "max_completion_length": 16,
    "beta": 0.05,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
}
# Held-out answers may be twice as long as those in training, so that an answer that comes to the point late counts
# too.
FACTS_ANSWER_LENGTH = 32
# Only the upper half of the 30 layers, so that the backward pass ends there.
LORA: dict[str, Any] = {
    "r": 16,
    "lora_alpha": 32,
    "target_modules": ["q_proj", "v_proj"],
    "layers_to_transform": list(range(15, 30)),
    "task_type": "CAUSAL_LM",
}


@dataclass(frozen=True)
class Size:
    """
    How much of the demo is run: settings of the arithmetic and of the facts (`None` for no facts), the controls of
    each, and held-out facts.
    """

    arithmetic: dict[str, Any]
    controls: tuple[str, ...]
    facts: dict[str, Any] | None
    facts_controls: tuple[str, ...] = ()
    num_facts: int = 60


SIZES = {
    "quick": Size({**ARITHMETIC, "max_steps": 40, "warmup_steps": 3}, (), None),
    "default": Size(ARITHMETIC, ("random", "length"), {**FACTS, "max_steps": 8, "gradient_accumulation_steps": 2}),
    "full": Size({**ARITHMETIC, "max_steps": 100}, ("random", "length"), FACTS, ("random",), num_facts=154),
}
# Titles, and seconds on two cores.
LOOK, LEARN, TRAIN, CONTROLS, REAL = (
    "two answers, token by token",
    "a small transformer learns to add",
    "it trains on its own reward",
    "rewards that know nothing",
    "SmolLM2 trains on its own reward",
)
SECONDS = {LOOK: 10.0, LEARN: 70.0, TRAIN: 40.0, CONTROLS: 70.0, REAL: 150.0}


@dataclass(frozen=True)
class Session:
    """What the parts of one run of the demo share; `say` prints above the progress line."""

    output: Path
    seed: int
    size: Size
    progress: Progress
    kept: Kept
    say: Callable[[Any], None]


def look(session: Session) -> None:
    """Scores two answers of SmolLM2 and shows them in the colours of their tokens."""
    session.progress.stage(LOOK)
    reward = EndogenousReward(quickstart_model_path())
    question = "What is the capital of France?"
    answers = ["The capital of France is Paris.", "The capital of France is Lyon."]
    scored = reward.score(
        [[{"role": "user", "content": question}]] * 2, [[{"role": "assistant", "content": a}] for a in answers]
    )
    session.say(f"SmolLM2 (135M, frozen) scores two answers to “{question}” (blue: high, orange: low)")
    session.say(terminal_heat_map([heat_map_row(reward, stats) for stats in scored]))


def run_arithmetic(session: Session) -> Part:
    """
    Pretrains a small transformer on demonstrations of addition that derail, then trains it by GRPO on its own
    endogenous reward, and on rewards that know nothing.
    """
    seed, progress, settings = session.seed, session.progress, session.size.arithmetic
    folder = session.output / "arithmetic"
    base_dir = folder / "base_model"
    tokenizer = arithmetic.make_tokenizer()
    held_out = arithmetic.make_questions(HELD_OUT, seed + 1, DIGITS)
    prompts = [arithmetic.question_text(q) for q in held_out]
    truths = [arithmetic.answer_text(q) for q in held_out]

    def measure(model: PreTrainedModel, run: Run | None = None) -> dict[str, Any]:
        return _measure(
            model,
            tokenizer,
            prompts,
            lambda i, text: text == truths[i],
            run,
            samples=MAJORITY_OF,
            limit=arithmetic.MAX_ANSWER_LENGTH,
            seed=seed,
            batch_size=4000,
        )

    def pretrain() -> dict[str, Any]:
        torch.manual_seed(seed)
        base = arithmetic.make_model(tokenizer, hidden_size=96, intermediate_size=256)
        steps = _followed(PRETRAINING["steps"], progress)
        arithmetic.pretrain(
            base,
            tokenizer,
            seed=seed,
            held_out=held_out,
            digits=DIGITS,
            wrong=arithmetic.derailed_answer,
            bar=steps,
            **PRETRAINING,
        )
        base.save_pretrained(base_dir)
        tokenizer.save_pretrained(base_dir)
        return measure(base)

    def train(name: str) -> dict[str, Any]:
        rewards = {
            "endogenous": EndogenousReward(str(base_dir)),
            "random": RandomReward(seed),
            "length": LengthReward(),
        }
        dataset = arithmetic.make_dataset(
            [q for q in arithmetic.make_questions(3000, seed + 2, DIGITS) if q not in set(held_out)]
        )
        run = train_with_grpo(
            f"arithmetic-{name}",
            load_model(base_dir),
            tokenizer,
            rewards[name],
            arithmetic.accuracy,
            dataset,
            session.output,
            progress=progress,
            seed=seed,
            **settings,
        )
        if name == "endogenous":
            run.model.save_pretrained(folder / "trained_model")
            tokenizer.save_pretrained(folder / "trained_model")
        return measure(run.model, run)

    progress.stage(LEARN)
    policies = {"base": Policy(**session.kept("arithmetic-base", progress, pretrain))}
    base = policies["base"]
    session.say(
        f"A small transformer has learned to add from demonstrations of which {PRETRAINING['noise']:.0%} derail: a "
        f"first digit one too high, then anything. It answers {base.accuracy():.0%} right when sampled, "
        f"{base.accuracy(GREEDY):.0%} when greedy. Now it trains on its own reward, without labels."
    )
    progress.stage(TRAIN)
    policies["endogenous"] = Policy(**session.kept("arithmetic-endogenous", progress, partial(train, "endogenous")))
    for name in _each(session.size.controls, progress, CONTROLS):
        policies[name] = Policy(**session.kept(f"arithmetic-{name}", progress, partial(train, name)))
    return Part(
        name="arithmetic",
        title="Addition: a small transformer trained from nothing",
        policies=policies,
        questions=prompts,
        groups=["addition"] * len(prompts),
        settings={
            **{f"pretraining {key}": value for key, value in PRETRAINING.items()},
            "dtype": "float32",
            **settings,
        },
        examples=_examples(EndogenousReward(str(base_dir)), prompts, prompts, policies),
    )


def run_facts(session: Session) -> Part:
    """
    Trains SmolLM2-135M-Instruct by LoRA GRPO on factual questions, by its own endogenous reward, and on rewards that
    know nothing.
    """
    from peft import LoraConfig

    seed, progress, settings = session.seed, session.progress, session.size.facts or {}
    path = quickstart_model_path()
    dtype, _ = faster_dtype()
    tokenizer = AutoTokenizer.from_pretrained(path)
    train_questions, held_out = facts.load_questions(seed=seed)
    held_out = held_out[:: max(1, len(held_out) // session.size.num_facts)]
    prompts = [q.prompt for q in held_out]

    def measure(model: PreTrainedModel, run: Run | None = None) -> dict[str, Any]:
        return _measure(
            model,
            tokenizer,
            prompts,
            lambda i, text: is_right(text, held_out[i].answers),
            run,
            samples=1,
            limit=FACTS_ANSWER_LENGTH,
            seed=seed,
            batch_size=40,
        )

    def train(name: str) -> dict[str, Any]:
        run = train_with_grpo(
            f"facts-{name}",
            load_model(path, dtype),
            tokenizer,
            EndogenousReward(None) if name == "endogenous" else RandomReward(seed),
            facts.accuracy,
            facts.make_dataset(train_questions),
            session.output,
            peft_config=LoraConfig(**LORA),
            progress=progress,
            bf16=dtype == "bfloat16",
            seed=seed,
            **settings,
        )
        if name == "endogenous":
            run.model.save_pretrained(session.output / "facts" / "adapter")
            tokenizer.save_pretrained(session.output / "facts" / "adapter")
        return measure(run.model, run)

    progress.stage(REAL)
    with progress.part(0.0, 0.2):
        policies = {"base": Policy(**session.kept("facts-base", progress, lambda: measure(load_model(path, dtype))))}
    base = policies["base"]
    session.say(
        f"SmolLM2-135M-Instruct, in {dtype} on this CPU, answers {len(held_out)} factual questions "
        f"{base.accuracy():.0%} right when sampled, {base.accuracy(GREEDY):.0%} when greedy. GRPO trains a LoRA "
        "adapter on other questions, without answers: the reward is the model itself, its adapter switched off."
    )
    names = ("endogenous", *session.size.facts_controls)
    for i, name in enumerate(names):
        with progress.part(0.2 + 0.8 * i / len(names), 0.2 + 0.8 * (i + 1) / len(names)):
            policies[name] = Policy(**session.kept(f"facts-{name}", progress, partial(train, name)))
    return Part(
        name="facts",
        title="Facts: a pretrained model",
        policies=policies,
        questions=[q.text for q in held_out],
        groups=[q.relation for q in held_out],
        settings={
            "questions to draw from": len(train_questions),
            **{f"LoRA {key}": value for key, value in LORA.items()},
            "dtype": dtype,
            "longest held-out answer": FACTS_ANSWER_LENGTH,
            **settings,
        },
        examples=_examples(EndogenousReward(path), prompts, [q.text for q in held_out], policies),
    )


def _each(names: Sequence[str], progress: Progress, stage: str) -> Iterator[str]:
    """The names, each with its share of the stage."""
    if names:
        progress.stage(stage)
    for i, name in enumerate(names):
        with progress.part(i / len(names), (i + 1) / len(names)):
            yield name


def _followed(steps: int, progress: Progress) -> Iterator[int]:
    for step in range(steps):
        yield step
        progress.at((step + 1) / steps)


def _measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Any],
    is_right: Callable[[int, str], bool],
    run: Run | None,
    samples: int,
    limit: int,
    seed: int,
    batch_size: int,
) -> dict[str, Any]:
    """
    A policy's answers, as a dictionary of [`Policy`], with the curve of its training. With several `samples` per
    question there is a majority, of answers as they are written.
    """
    number = len(prompts)

    def ask(prompts: list[Any], **way: Any) -> tuple[list[str], list[list[int]]]:
        return generate_answers(model, tokenizer, prompts, limit, seed=seed, batch_size=batch_size, **way)

    def graded(texts: list[str]) -> list[float]:
        return [float(is_right(i, text)) for i, text in enumerate(texts)]

    texts, ids = ask(prompts * samples)
    drawn = [texts[i::number] for i in range(number)]
    right = {
        SAMPLED: [sum(is_right(i, text) for text in row) / samples for i, row in enumerate(drawn)],
        GREEDY: graded(ask(prompts, greedy=True)[0]),
        COOL: graded(ask(prompts, temperature=0.5)[0]),
    }
    if samples > 1:
        right[MAJORITY] = graded([Counter(row).most_common(1)[0][0] for row in drawn])
    gc.collect()  # a trainer's memory
    return asdict(
        Policy(
            texts=texts[:number],
            ids=ids[:number],
            text_right=[is_right(i, text) for i, text in enumerate(texts[:number])],
            ended=[bool(row) and row[-1] == tokenizer.eos_token_id for row in ids[:number]],
            right=right,
            curve=[entry["rewards/accuracy/mean"] for entry in run.history] if run else [],
            seconds=run.seconds if run else 0.0,
        )
    )


def _examples(
    reward: EndogenousReward, prompts: Sequence[Any], questions: Sequence[str], policies: dict[str, Policy]
) -> list[HeatMapRow]:
    """Three questions answered wrong before and right after, with both answers; chosen by position alone."""
    before, after = policies["base"], policies["endogenous"]
    mended = [i for i in range(len(questions)) if after.text_right[i] and not before.text_right[i]][:3]
    rows = [(i, title, policy) for i in mended for title, policy in (("before", before), ("after", after))]
    if not rows:
        return []
    texts = [policy.texts[i] for i, _, policy in rows]
    chat = not isinstance(prompts[0], str)
    scored = reward.score(
        [prompts[i] for i, _, _ in rows],
        [[{"role": "assistant", "content": text}] for text in texts] if chat else texts,
        completion_ids=[policy.ids[i] for i, _, policy in rows],
    )
    return [
        heat_map_row(reward, stats, questions[i], title) for (i, title, _), stats in zip(rows, scored, strict=True)
    ]


PARTS = {"arithmetic": run_arithmetic, "facts": run_facts}
