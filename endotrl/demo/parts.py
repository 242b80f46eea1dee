# SPDX-License-Identifier: Apache-2.0
"""The two parts of the demo: what each trains, and on what."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..frozen.cpu_dtype import faster_dtype
from ..frozen.quickstart_model import quickstart_model_path
from ..grading import is_right
from ..reporting import HeatMapRow
from ..rewards import EndogenousReward, LengthReward, RandomReward
from ..rewards.contributions import heat_map_row
from ..tasks import arithmetic, facts
from .findings import Answers, Part
from .grpo_runs import generate_answers, load_model, train_with_grpo


# Both leave TRL's `scale_rewards="group"` on: it gives the endogenous, the random and the length reward the same
# scale, and so the same chance. The KL penalty then weighs beta times the standard deviation of a group's rewards.
ARITHMETIC: dict[str, Any] = {
    "max_steps": 100,
    "per_device_train_batch_size": 256,  # 32 questions
    "num_generations": 8,
    "max_completion_length": arithmetic.MAX_ANSWER_LENGTH,
    "beta": 0.1,
    "learning_rate": 3e-4,
    "bf16": False,
}
# Adam's first steps are as large as all others, whatever the gradient's noise: without a warm-up, accuracy falls by 20
# points and more in the first of them, by any reward.
WARMUP_STEPS = 10
PRETRAINING_STEPS = 800
WRONG_DEMONSTRATIONS = 0.3

FACTS: dict[str, Any] = {
    "max_steps": 10,
    "per_device_train_batch_size": 64,  # 8 questions
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


def run_arithmetic(output_dir: Path, seed: int, say: Callable[[str], None]) -> Part:
    """
    Pretrains a small transformer on faulty demonstrations of addition, then trains it by GRPO on its own endogenous
    reward, on a random one and on a length reward.
    """
    say(
        "A small transformer (0.64 M parameters) first learns 3-digit addition by next-token prediction. "
        f"{WRONG_DEMONSTRATIONS:.0%} of the demonstrations are wrong."
    )
    torch.manual_seed(seed)
    held_out = arithmetic.make_questions(1000, seed=seed + 1)
    tokenizer = arithmetic.make_tokenizer()
    base = arithmetic.make_model(tokenizer)
    arithmetic.pretrain(base, tokenizer, PRETRAINING_STEPS, WRONG_DEMONSTRATIONS, seed, held_out)
    base_dir = output_dir / "arithmetic" / "base_model"
    base.save_pretrained(base_dir)
    tokenizer.save_pretrained(base_dir)

    prompts = [arithmetic.question_text(q) for q in held_out]
    truths = [arithmetic.answer_text(q) for q in held_out]

    def answer(model: PreTrainedModel, greedy: bool = False) -> Answers:
        texts, ids = generate_answers(
            model, tokenizer, prompts, arithmetic.MAX_ANSWER_LENGTH, greedy=greedy, seed=seed, batch_size=1000
        )
        return _answers(texts, ids, [text == truth for text, truth in zip(texts, truths, strict=True)], tokenizer)

    before, greedy = answer(base), answer(base, greedy=True)
    say(
        f"Asked {len(prompts)} questions that it never saw, it answers {before.accuracy:.0%} right when sampled, "
        f"{greedy.accuracy:.0%} when it takes the most probable digit. Now it is frozen, and GRPO trains a copy of it "
        "on "
        "the frozen model's own reward, with no labels. Then on a random reward and on a length reward, to compare."
    )
    excluded = set(held_out)
    dataset = arithmetic.make_dataset([q for q in arithmetic.make_questions(4000, seed=seed + 2) if q not in excluded])
    rewards = {
        "endogenous": EndogenousReward(str(base_dir)),
        "random": RandomReward(seed),
        "length": LengthReward(),
    }
    settings = {**ARITHMETIC, "warmup_steps": WARMUP_STEPS}
    runs = [
        train_with_grpo(
            f"arithmetic-{name}",
            load_model(base_dir),
            tokenizer,
            reward,
            arithmetic.accuracy,
            dataset,
            output_dir,
            seed=seed,
            **settings,
        )
        for name, reward in rewards.items()
    ]
    after = {run.name: answer(run.model) for run in runs}
    runs[0].model.save_pretrained(output_dir / "arithmetic" / "trained_model")
    tokenizer.save_pretrained(output_dir / "arithmetic" / "trained_model")
    return Part(
        title="Arithmetic: a small transformer trained from nothing",
        runs=runs,
        before=before,
        greedy=greedy,
        after=after,
        questions=prompts,
        groups=["addition"] * len(prompts),
        settings={
            "pretraining steps": PRETRAINING_STEPS,
            "wrong demonstrations": WRONG_DEMONSTRATIONS,
            "dtype": "float32",
            **settings,
        },
    )


def run_facts(output_dir: Path, seed: int, say: Callable[[str], None]) -> Part:
    """
    Trains SmolLM2-135M-Instruct by LoRA GRPO on factual questions, by its own endogenous reward and by a random one.
    """
    from peft import LoraConfig

    path = quickstart_model_path()
    dtype = faster_dtype()
    tokenizer = AutoTokenizer.from_pretrained(path)
    train, held_out = facts.load_questions(seed=seed)
    prompts = [q.prompt for q in held_out]

    def answer(model: PreTrainedModel, greedy: bool = False) -> Answers:
        texts, ids = generate_answers(
            model, tokenizer, prompts, FACTS_ANSWER_LENGTH, greedy=greedy, seed=seed, batch_size=80
        )
        right = [is_right(text, question.answers) for text, question in zip(texts, held_out, strict=True)]
        return _answers(texts, ids, right, tokenizer)

    base = load_model(path, dtype)
    say(f"SmolLM2-135M-Instruct answers {len(held_out)} factual questions before training. (On this CPU in {dtype}.)")
    before, greedy = answer(base), answer(base, greedy=True)
    say(
        f"It answers {before.accuracy:.0%} right when sampled, {greedy.accuracy:.0%} when it takes the most probable "
        "token. Now GRPO trains a LoRA adapter on other questions, without answers: the reward is what the model "
        "itself, "
        "its adapter switched off, thinks of each token. Then on a random reward, to compare."
    )
    runs = []
    for name, reward in {"endogenous": EndogenousReward(None), "random": RandomReward(seed)}.items():
        run = train_with_grpo(
            f"facts-{name}",
            load_model(path, dtype),
            tokenizer,
            reward,
            facts.accuracy,
            facts.make_dataset(train),
            output_dir,
            peft_config=LoraConfig(**LORA),
            bf16=dtype == "bfloat16",
            seed=seed,
            **FACTS,
        )
        runs.append(run)
    after = {run.name: answer(run.model) for run in runs}
    runs[0].model.save_pretrained(output_dir / "facts" / "adapter")
    tokenizer.save_pretrained(output_dir / "facts" / "adapter")
    return Part(
        title="Facts: a pretrained model",
        runs=runs,
        before=before,
        greedy=greedy,
        after=after,
        questions=[q.text for q in held_out],
        groups=[q.relation for q in held_out],
        examples=_examples(base, tokenizer, held_out, before, after[runs[0].name]),
        settings={
            "questions to draw from": len(train),
            **{f"LoRA {key}": value for key, value in LORA.items()},
            "dtype": dtype,
            "longest held-out answer": FACTS_ANSWER_LENGTH,
            **FACTS,
        },
    )


def _answers(texts: list[str], ids: list[list[int]], right: list[bool], tokenizer: PreTrainedTokenizerBase) -> Answers:
    return Answers(texts, ids, right, [bool(row) and row[-1] == tokenizer.eos_token_id for row in ids])


def _examples(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[facts.Question],
    before: Answers,
    after: Answers,
) -> list[HeatMapRow]:
    """Three wrong answers from before, and the answers to the same questions from after."""
    reward = EndogenousReward(base, tokenizer)
    mended = [i for i in range(len(questions)) if after.right[i] and not before.right[i]][:3]
    rows = [(questions[i], answers.texts[i], answers.ids[i]) for i in mended for answers in (before, after)]
    if not rows:
        return []
    scored = reward.score(
        [question.prompt for question, _, _ in rows],
        [[{"role": "assistant", "content": text}] for _, text, _ in rows],
        completion_ids=[ids for _, _, ids in rows],
    )
    return [heat_map_row(reward, stats, row[0].text) for row, stats in zip(rows, scored, strict=True)]


PARTS = {"arithmetic": run_arithmetic, "facts": run_facts}
