# SPDX-License-Identifier: Apache-2.0
"""Parts of the demo: base model, data and training settings of each."""

import gc
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedModel

from ..data.formats import message_text
from ..forecasting.forecast import forecast
from ..frozen.cpu_dtype import faster_dtype
from ..frozen.quickstart_model import quickstart_model_path
from ..grading import is_right
from ..rendering.policy import ProcessingClass
from ..reporting import HeatMapRow, terminal_heat_map
from ..rewards import EndogenousReward, LengthReward, RandomReward
from ..rewards.scored import heat_map_row
from ..tasks import arithmetic, facts, pictures
from .findings import COOL, GREEDY, MAJORITY, SAMPLED, TITLES, Part, Policy
from .grpo_runs import generate_answers, load_model, train_with_grpo
from .progress import Kept, Progress


# All keep TRL's `scale_rewards="group"`: it gives the endogenous, the random and the length reward the same scale, and
# so the same chance. The KL penalty then weighs beta times the standard deviation of a group's rewards.
ARITHMETIC: dict[str, Any] = {
    "max_steps": 60,
    "per_device_train_batch_size": 256,  # 32 questions
    "num_generations": 8,
    "max_completion_length": arithmetic.MAX_ANSWER_LENGTH,
    "beta": 0.1,
    # With one base model, sampled and greedy: 80% and 92% by its own reward at 1e-3, 87% and 99% at 5e-4; by a random
    # one, 0% and 13% sampled; by length, 0% at both.
    "learning_rate": 5e-4,
    # Adam's first steps are as large as all others, whatever the gradient's noise: without a warm-up, accuracy falls
    # in the first steps, by any reward.
    "warmup_steps": 5,
    "bf16": False,
}
DIGITS = 2
PRETRAINING: dict[str, Any] = {"steps": 1000, "batch_size": 256, "noise": 0.55}
# Addition is learned in a third of the samples if none is wrong, and a leading zero is detected at once.
QUICK_PRETRAINING: dict[str, Any] = {**PRETRAINING, "steps": 420, "clean_steps": 280}
# The first wrong digit of derailed demonstrations, in words and as a function.
ONE_TOO_HIGH = "a first digit one too high", arithmetic.derailed_answer
A_ZERO = "a zero first", arithmetic.zero_answer
HELD_OUT = 500  # questions of arithmetic
FORECAST = 200  # of them, with 16 samples each
# As many questions and updates as the arithmetic gets in three minutes: answers to pictures take longer.
IMAGES: dict[str, Any] = {
    **ARITHMETIC,
    "learning_rate": 1e-3,
    "max_steps": 40,
    "per_device_train_batch_size": 128,  # 16 pictures
    "max_completion_length": pictures.ANSWER_LENGTH,
}
IMAGES_PRETRAINING: dict[str, Any] = {"steps": 700, "noise": 0.55}
HELD_OUT_PICTURES = 300
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
# Held-out answers may be twice as long as those in training: some come to the point late.
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
    """Size of the demo: its parts, settings and controls."""

    arithmetic: dict[str, Any]  # settings
    controls: tuple[str, ...]  # of the arithmetic; those of images are run if this is not empty
    facts: dict[str, Any] | None  # settings; `None` for no facts
    facts_controls: tuple[str, ...] = ()
    num_facts: int = 60  # held-out ones
    pretraining: dict[str, Any] = field(default_factory=lambda: PRETRAINING)
    wrong: tuple[str, Callable[..., str]] = ONE_TOO_HIGH
    widths: tuple[int, int] = (96, 256)  # of the transformer for addition: hidden, and within its MLPs


SIZES = {
    "quick": Size(
        {**ARITHMETIC, "max_steps": 40, "warmup_steps": 3},
        (),
        None,
        pretraining=QUICK_PRETRAINING,
        wrong=A_ZERO,
        widths=(64, 192),
    ),
    "default": Size(ARITHMETIC, ("random", "length"), {**FACTS, "max_steps": 8, "gradient_accumulation_steps": 2}),
    "full": Size({**ARITHMETIC, "max_steps": 100}, ("random", "length"), FACTS, ("random",), num_facts=154),
}
LOOK = "two answers, token by token"


@dataclass(frozen=True)
class Task:
    """Model, data and settings of one part, with its held-out questions."""

    name: str
    title: str  # heading in the report
    making: str  # title of the stage in which the base model is made and tested
    opening: str  # sentence on the base model, with fields for its accuracies `sampled` and `greedy`
    seconds: tuple[float, float]  # on two cores, for making it, and for one training
    prompts: list[Any]  # held-out questions
    is_right: Callable[[int, str], bool]  # whether a text answers question i
    processing_class: ProcessingClass
    frozen: str  # folder of the base model
    make_base: Callable[[Progress], PreTrainedModel]
    load: Callable[[], PreTrainedModel]  # the base model, to be trained
    controls: dict[str, Callable[[], Any]]  # control rewards by name
    accuracy: Callable[..., Sequence[float | None]]
    dataset: Callable[[], Dataset]
    settings: dict[str, Any]  # of GRPO
    batch_size: int
    dtype: str = "float32"
    limit: int | None = None  # tokens per held-out answer, if more than in training
    samples: int = MAJORITY_OF  # answers per question
    questions: list[str] | None = None  # as displayed, if not by their text
    peft_config: Any = None
    # Forecast of the accuracy after training on its own reward, from samples of the base model.
    forecast: Callable[[], float] | None = None

    @property
    def stages(self) -> dict[str, float]:
        """Titles of the stages, and seconds that each takes on two cores."""
        making, training = self.seconds
        return {self.making: making, **{self.training(name): training for name in ("endogenous", *self.controls)}}

    def training(self, name: str) -> str:
        """Title of the training on a reward."""
        return f"{self.name}: training on {'its' if name == 'endogenous' else 'a'} {TITLES[name]}"


def look(progress: Progress, say: Callable[[Any], None]) -> None:
    """Scores two answers with SmolLM2 and shows them with coloured tokens."""
    progress.stage(LOOK)
    reward = EndogenousReward(quickstart_model_path())
    question = "What is the capital of France?"
    answers = ["The capital of France is Paris.", "The capital of France is Lyon."]
    asked = [[{"role": "user", "content": question}]] * len(answers)
    scored = reward.score(asked, [[{"role": "assistant", "content": answer}] for answer in answers])
    say(f"SmolLM2 (135M, frozen) scores two answers to “{question}” (blue: high, orange: low)")
    say(terminal_heat_map([heat_map_row(reward, stats) for stats in scored]))


def run(task: Task, output: Path, seed: int, progress: Progress, kept: Kept, say: Callable[[Any], None]) -> Part:
    """
    Tests the base model, trains it by GRPO on its own endogenous reward and on the controls, and tests each again.
    `say` prints above the progress line.
    """

    def train(name: str, make_reward: Callable[[], Any]) -> dict[str, Any]:
        run = train_with_grpo(
            f"{task.name}-{name}",
            task.load(),
            task.processing_class,
            make_reward(),
            task.accuracy,
            task.dataset(),
            output,
            peft_config=task.peft_config,
            progress=progress,
            seed=seed,
            **task.settings,
        )
        if name == "endogenous":
            folder = output / task.name / ("adapter" if task.peft_config else "trained_model")
            run.model.save_pretrained(folder)
            task.processing_class.save_pretrained(folder)
        return _measure(task, run.model, seed, [entry["rewards/accuracy/mean"] for entry in run.history])

    progress.stage(task.making)
    made = kept(f"{task.name}-base", progress, lambda: _measure(task, task.make_base(progress), seed))
    asked = Policy(**made)
    policies = {"base": asked}
    say(task.opening.format(sampled=f"{asked.accuracy():.0%}", greedy=f"{asked.accuracy(GREEDY):.0%}"))
    predicted = None if task.forecast is None else task.forecast()
    if predicted is not None:
        ends = f"at beta {task.settings['beta']:g}, training will converge to {predicted:.0%} right answers"
        say(f"Forecast from its samples alone: {ends}.")
    # With an adapter the trainer has the frozen weights: the reward is attached, and needs no second model.
    rewards: dict[str, Callable[[], Any]] = {
        "endogenous": partial(EndogenousReward, None if task.peft_config else task.frozen),
        **task.controls,
    }
    for name, make_reward in rewards.items():
        progress.stage(task.training(name))
        policies[name] = Policy(**kept(f"{task.name}-{name}", progress, partial(train, name, make_reward)))
    return Part(
        name=task.name,
        title=task.title,
        policies=policies,
        questions=task.questions or list(map(message_text, task.prompts)),
        settings={**task.settings, "dtype": task.dtype},
        examples=_examples(task, policies),
        forecast=predicted,
    )


def arithmetic_task(size: Size, output: Path, seed: int) -> Task:
    """Small transformer pretrained on additions that derail, against control rewards without information."""
    frozen, settings = str(output / "arithmetic" / "base_model"), size.arithmetic
    tokenizer = arithmetic.make_tokenizer()
    torch.manual_seed(seed)
    model = arithmetic.make_model(tokenizer, *size.widths)
    held_out = arithmetic.make_questions(HELD_OUT, seed + 1, DIGITS)
    beginning, wrong = size.wrong
    pretrain = partial(arithmetic.pretrain, seed=seed, held_out=held_out, digits=DIGITS, wrong=wrong)
    controls: dict[str, Callable[[], Any]] = {"random": lambda: RandomReward(seed), "length": LengthReward}

    def predict() -> float:
        return forecast(
            frozen,
            arithmetic.make_dataset(held_out[:FORECAST]).to_list(),
            betas=[settings["beta"]],
            scale_rewards="group",
            num_generations=settings["num_generations"],
            max_new_tokens=arithmetic.MAX_ANSWER_LENGTH,
            grader="exact",
            seed=seed,
            progress=False,
        ).betas[0]["accuracy"]

    return Task(
        name="arithmetic",
        title="Addition: a small transformer trained from nothing",
        making="a small transformer learns to add",
        opening=_opening("A small transformer has learned to add from demonstrations", beginning),
        seconds=(0.07 * size.pretraining["steps"], 0.6 * settings["max_steps"]),
        prompts=[arithmetic.question_text(q) for q in held_out],
        is_right=lambda i, text: text == arithmetic.answer_text(held_out[i]),
        processing_class=tokenizer,
        frozen=frozen,
        make_base=_learn(model, tokenizer, pretrain, size.pretraining, frozen),
        load=lambda: load_model(frozen),
        controls={name: controls[name] for name in size.controls},
        accuracy=arithmetic.accuracy,
        dataset=lambda: arithmetic.make_dataset(
            [q for q in arithmetic.make_questions(3000, seed + 2, DIGITS) if q not in set(held_out)]
        ),
        settings=settings,
        batch_size=4000,
        forecast=predict,
    )


def images_task(size: Size, output: Path, seed: int) -> Task:
    """
    Tiny Llava pretrained on captions of numbers that derail, against rewards that have not seen the picture: a
    random one, that of its answer to another picture, and that of its answer to the text alone.
    """
    frozen = str(output / "images" / "base_model")
    torch.manual_seed(seed)
    model, processor = pictures.make_model()
    held_out = pictures.make_numbers(HELD_OUT_PICTURES, seed + 1)
    generator = random.Random(seed + 1)
    controls: dict[str, Callable[[], Any]] = {
        "random": lambda: RandomReward(seed),
        "other_image": lambda: OtherImageReward(EndogenousReward(frozen)),
        "text_alone": lambda: EndogenousReward(frozen, images="ignore"),
    }
    pretrain = partial(pictures.pretrain, seed=seed, held_out=held_out)
    return Task(
        name="images",
        title="Pictures: a small vision-language model trained from nothing",
        making="a tiny Llava learns to read numbers",
        opening=_opening("A tiny Llava has learned to read numbers from captions", ONE_TOO_HIGH[0]),
        seconds=(60.0, 30.0),
        prompts=[pictures.prompt(pictures.draw(number, generator)) for number in held_out],
        questions=[f"a picture of {number}" for number in held_out],
        is_right=lambda i, text: text == held_out[i],
        processing_class=processor,
        frozen=frozen,
        make_base=_learn(model, processor, pretrain, IMAGES_PRETRAINING, frozen),
        load=lambda: type(model).from_pretrained(frozen),
        controls=controls if size.controls else {},
        accuracy=pictures.accuracy,
        dataset=lambda: pictures.make_dataset(
            [number for number in pictures.make_numbers(3000, seed + 2) if number not in set(held_out)], seed
        ),
        settings=IMAGES,
        batch_size=600,
    )


def _opening(learned: str, beginning: str) -> str:
    return (
        f"{learned} of which {PRETRAINING['noise']:.0%} derail: {beginning}, then random digits. Its answers are "
        "{sampled} right when sampled, {greedy} when greedy. Now it trains on its own reward, without labels."
    )


def _learn(
    model: PreTrainedModel,
    processing_class: ProcessingClass,
    pretrain: Callable[..., None],
    settings: dict[str, Any],
    folder: str,
) -> Callable[[Progress], PreTrainedModel]:
    """Returns a function that pretrains a model on demonstrations that derail, and saves it."""

    def make_base(progress: Progress) -> PreTrainedModel:
        def bar() -> Iterator[int]:
            for step in range(settings["steps"]):
                yield step
                progress.at((step + 1) / settings["steps"])

        pretrain(model, processing_class, bar=bar(), **settings)
        model.save_pretrained(folder)
        processing_class.save_pretrained(folder)
        return model

    return make_base


class OtherImageReward:
    """Control: the reward of each answer, given the picture of another question of the batch."""

    __name__ = "other_image_reward"

    def __init__(self, reward: EndogenousReward) -> None:
        self._reward = reward

    def __call__(
        self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **kwargs: Any
    ) -> list[float | None]:
        half = len(prompts) // 2  # from another group: answers to one question are adjacent
        others = [*prompts[half:], *prompts[:half]]
        return self._reward(prompts=others, completions=completions, completion_ids=completion_ids)


def facts_task(size: Size, output: Path, seed: int) -> Task:
    """SmolLM2-135M-Instruct on factual questions with LoRA, against a random reward."""
    from peft import LoraConfig

    path = quickstart_model_path()
    dtype, _ = faster_dtype()
    train_questions, held_out = facts.load_questions(seed=seed)
    held_out = held_out[:: max(1, len(held_out) // size.num_facts)]
    return Task(
        name="facts",
        title="Facts: a pretrained model",
        making="SmolLM2 answers questions",
        opening=f"SmolLM2-135M-Instruct, in {dtype} on this CPU, answers {len(held_out)} factual questions: "
        "{sampled} right when sampled, {greedy} when greedy. GRPO trains a LoRA adapter on other questions, without "
        "answers: the reward comes from the model itself with its adapter disabled.",
        seconds=(30.0, 120.0),
        prompts=[q.prompt for q in held_out],
        is_right=lambda i, text: is_right(text, held_out[i].answers),
        processing_class=AutoTokenizer.from_pretrained(path),
        frozen=path,
        make_base=lambda progress: load_model(path, dtype),
        load=lambda: load_model(path, dtype),
        controls={"random": lambda: RandomReward(seed)} if "random" in size.facts_controls else {},
        accuracy=facts.accuracy,
        dataset=lambda: facts.make_dataset(train_questions),
        settings={**(size.facts or {}), "bf16": dtype == "bfloat16"},
        batch_size=40,
        dtype=dtype,
        limit=FACTS_ANSWER_LENGTH,
        samples=1,
        peft_config=LoraConfig(**LORA),
    )


def _measure(task: Task, model: PreTrainedModel, seed: int, curve: Sequence[float] = ()) -> dict[str, Any]:
    """A policy's answers, as a dictionary of [`Policy`], with its training curve."""
    number, limit = len(task.prompts), task.limit or task.settings["max_completion_length"]

    def ask(prompts: list[Any], **way: Any) -> tuple[list[str], list[list[int]]]:
        return generate_answers(
            model, task.processing_class, prompts, limit, seed=seed, batch_size=task.batch_size, **way
        )

    def graded(texts: list[str]) -> list[float]:
        return [float(task.is_right(i, text)) for i, text in enumerate(texts)]

    texts, ids = ask(task.prompts * task.samples)
    drawn = [graded(texts[start : start + number]) for start in range(0, len(texts), number)]
    right = {
        SAMPLED: [sum(values) / task.samples for values in zip(*drawn, strict=True)],
        GREEDY: graded(ask(task.prompts, greedy=True)[0]),
        COOL: graded(ask(task.prompts, temperature=0.5)[0]),
    }
    if task.samples > 1:
        right[MAJORITY] = graded([Counter(texts[i::number]).most_common(1)[0][0] for i in range(number)])
    gc.collect()  # a trainer's memory
    return asdict(Policy(texts[:number], ids[:number], [value == 1.0 for value in drawn[0]], right, list(curve)))


def _examples(task: Task, policies: dict[str, Policy]) -> list[HeatMapRow]:
    """Three questions answered wrong before and right after, with both answers; chosen by position alone."""
    before, after = policies["base"], policies["endogenous"]
    mended = [i for i in range(len(task.prompts)) if after.text_right[i] and not before.text_right[i]][:3]
    if not mended:
        return []
    rows = [(i, policy) for i in mended for policy in (before, after)]
    prompts = [task.prompts[i] for i, _ in rows]
    completions: list[Any] = [policy.texts[i] for i, policy in rows]
    if not isinstance(prompts[0], str):
        completions = [[{"role": "assistant", "content": text}] for text in completions]
    reward = EndogenousReward(task.frozen)
    scored = reward.score(prompts, completions, completion_ids=[policy.ids[i] for i, policy in rows])
    titles = ["before", "after"] * len(mended)
    return [heat_map_row(reward, *row) for row in zip(scored, prompts, titles, strict=True)]


TASKS = {"arithmetic": arithmetic_task, "facts": facts_task, "images": images_task}
