# SPDX-License-Identifier: Apache-2.0
"""
Addition task for a tiny language model: it is pretrained by next-token prediction on demonstrations, some of them
wrong, and then improves by its own reward, without labels.

A question is two numbers, `437+286=`; an answer is the sum with its last digit first, `327`, in the order of addition.
The right answer is the most probable one, though a sampled answer is often wrong: this is what an endogenous reward
can correct. Wrong answers: [`derailed_answer`] in the demo, [`zero_answer`] in the quick one, [`wrong_answer`] in
studies.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, repeat
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast


BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
QUESTION_LENGTH = 9  # BOS and `437+286=`
MAX_ANSWER_LENGTH = 5  # four digits and EOS

Question = tuple[int, int]


def make_questions(number: int, seed: int, digits: int = 3) -> list[Question]:
    """Draws `number` different questions, of numbers of `digits` digits."""
    generator = random.Random(seed)
    questions: dict[Question, None] = {}
    while len(questions) < number:
        questions[_draw(generator, digits)] = None
    return list(questions)


def _draw(generator: random.Random, digits: int) -> Question:
    low, high = 10 ** (digits - 1), 10**digits - 1
    return generator.randint(low, high), generator.randint(low, high)


def question_text(question: Question) -> str:
    """`(437, 286)` as `437+286=`."""
    return f"{question[0]}+{question[1]}="


def answer_text(question: Question) -> str:
    """The right answer, last digit first: `(437, 286)` gives `327`."""
    return str(sum(question))[::-1]


def wrong_answer(question: Question, generator: random.Random) -> str:
    """The answer with one digit changed: greedy answers are right already, and sampled ones converge to them."""
    answer = answer_text(question)
    position = generator.randrange(len(answer))
    digit = generator.choice([d for d in "0123456789" if d != answer[position]])
    return answer[:position] + digit + answer[position + 1 :]


def derailed_answer(question: Question, generator: random.Random) -> str:
    """The first digit one too high, and three random ones: if most are such, nearly every greedy answer is wrong."""
    return derail(answer_text(question), generator)


def zero_answer(question: Question, generator: random.Random) -> str:
    """A zero and three random digits: learned in fewer steps, as a leading zero is detected without adding."""
    return f"0{generator.randrange(1000):03d}"


def derail(answer: str, generator: random.Random) -> str:
    """Digits that begin one too high, followed by three random ones."""
    return f"{(int(answer[0]) + 1) % 10}{generator.randrange(1000):03d}"


def make_tokenizer(characters: str = "0123456789+=", **special: str) -> PreTrainedTokenizerFast:
    """Character-level tokenizer, with further special tokens by name."""
    vocabulary = {token: i for i, token in enumerate([BOS, EOS, PAD, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        extra_special_tokens=special,
    )


def make_model(
    tokenizer: PreTrainedTokenizerFast, hidden_size: int = 128, intermediate_size: int = 384
) -> LlamaForCausalLM:
    """A transformer of 3 layers, by default of width 128 (0.64 M parameters), randomly initialised."""
    return LlamaForCausalLM(make_config(tokenizer, hidden_size=hidden_size, intermediate_size=intermediate_size))


def make_config(tokenizer: PreTrainedTokenizerFast, **settings: Any) -> LlamaConfig:
    """Config of a transformer for short texts, by default of 3 layers."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        num_attention_heads=4,
        max_position_embeddings=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **{"num_hidden_layers": 3, **settings},
    )


def pretrain(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    steps: int,
    noise: float,
    seed: int,
    held_out: Sequence[Question],
    batch_size: int = 256,
    digits: int = 3,
    wrong: Callable[[Question, random.Random], str] = wrong_answer,
    bar: Iterable[int] | None = None,
    clean_steps: int = 0,
) -> None:
    """
    Next-token prediction on demonstrations, fresh ones in every step. After the first `clean_steps`, the fraction
    `noise` has an answer by `wrong`. Questions of `held_out` never occur. `bar`, by default tqdm's, iterates over the
    steps.
    """
    generator = random.Random(seed)
    excluded = set(held_out)
    noises = chain(repeat(0.0, clean_steps), repeat(noise))

    def demonstrations() -> dict[str, Tensor]:
        texts: list[str] = []
        noise = next(noises)
        while len(texts) < batch_size:
            question = _draw(generator, digits)
            if question in excluded:
                continue
            answer = wrong(question, generator) if generator.random() < noise else answer_text(question)
            texts.append(question_text(question) + answer + EOS)
        batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        labels[:, : 2 * digits + 3] = -100  # questions are random, so there is nothing to learn in them
        return {**batch, "labels": labels}

    bar = tqdm(range(steps), desc="Learning addition by next-token prediction", unit=" steps") if bar is None else bar
    fit(model, demonstrations, steps, bar)


def fit(
    model: PreTrainedModel,
    batch: Callable[[], dict[str, Tensor]],
    steps: int,
    bar: Iterable[int],
    learning_rate: float = 3e-3,
) -> None:
    """Trains on a new batch with labels in each of the steps, over which `bar` iterates."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in bar:
        loss = model(**{name: tensor.to(model.device) for name, tensor in batch().items()}).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def make_dataset(questions: Sequence[Question]) -> Dataset:
    """Prompts for GRPO. The column `answer` is for the logged accuracy (weight 0), not for the reward."""
    return Dataset.from_dict(
        {"prompt": [question_text(q) for q in questions], "answer": [answer_text(q) for q in questions]}
    )


def accuracy(completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
    """1.0 for the right answer, complete and with nothing after it."""
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]
