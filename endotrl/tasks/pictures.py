# SPDX-License-Identifier: Apache-2.0
"""
Picture task for a tiny vision-language model: a Llava learns to read numbers in generated pictures, from captions some
of which derail ([`~endotrl.tasks.arithmetic.derail`]), and then improves by its own reward.

A picture has four digits, in two rows. Under the captions the most probable first digit is wrong, and the most
probable whole answer is right.
"""

import random
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import cycle
from typing import Any

import torch
from datasets import Dataset
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from . import arithmetic


CELL = 12  # pixels of a digit, and of a patch of the vision tower
SIZE = 2 * CELL
QUESTION = "="
ANSWER_LENGTH = 5  # four digits and EOS
TEMPLATE = (
    "<bos>{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{% endif %}{{ '<eos>' if message['role'] == 'assistant' }}{% endfor %}"
)


def make_numbers(count: int, seed: int) -> list[str]:
    """Different numbers of four digits, as text."""
    return [f"{number:04d}" for number in random.Random(seed).sample(range(10_000), count)]


def draw(number: str, generator: random.Random) -> Image.Image:
    """A picture of four digits, each at a random place in its quarter and in a bright colour, on a dark background."""
    picture = Image.new("RGB", (SIZE, SIZE), (generator.randint(0, 80),) * 3)
    for i, digit in enumerate(number):
        place = (CELL * (i % 2) + generator.randint(1, 4), CELL * (i // 2) + generator.randint(-2, 0))
        colour = tuple(generator.randint(140, 255) for _ in range(3))
        ImageDraw.Draw(picture).text(place, digit, fill=colour, font=_font())
    return picture


@cache
def _font() -> Any:
    return ImageFont.load_default(size=11)


def prompt(picture: Image.Image) -> list[dict[str, Any]]:
    """The question which number a picture shows."""
    return [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]}]


def make_dataset(numbers: Sequence[str], seed: int) -> Dataset:
    """Prompts for GRPO. The column `answer` is for the logged accuracy (weight 0), not for the reward."""
    generator = random.Random(seed)
    question = [{"role": "user", "content": QUESTION}]
    pictures = [draw(number, generator) for number in numbers]
    return Dataset.from_dict({"prompt": [question] * len(numbers), "image": pictures, "answer": list(numbers)})


def accuracy(completions: list[Any], answer: list[str], **kwargs: Any) -> list[float]:
    """1.0 for the number, complete and with nothing after it."""
    return arithmetic.accuracy([completion[0]["content"] for completion in completions], answer)


def make_model() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """
    A Llava of 0.3 M parameters, randomly initialised, and its processor. Models as narrow as this need larger weights
    than transformers' default of 0.02: with it, they do not begin to read the picture in 400 steps.
    """
    tokenizer = arithmetic.make_tokenizer("0123456789=", image_token="<image>")
    shape = {"height": SIZE, "width": SIZE}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size=shape, crop_size=shape, image_mean=[0.5] * 3, image_std=[0.5] * 3),
        tokenizer,
        patch_size=CELL,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    common: dict[str, Any] = {"intermediate_size": 256, "initializer_range": 0.08}
    tower = CLIPVisionConfig(
        image_size=SIZE,
        patch_size=CELL,
        hidden_size=64,
        projection_dim=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        **common,
    )
    text = arithmetic.make_config(tokenizer, hidden_size=96, num_hidden_layers=2, **common)
    config = LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlavaForConditionalGeneration(config), processor


def pretrain(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    steps: int,
    noise: float,
    seed: int,
    held_out: Sequence[str],
    bar: Iterable[int],
    batch_size: int = 128,
    num_pictures: int = 4000,
) -> None:
    """
    Next-token prediction on captions of pictures, of which the fraction `noise` derails. Numbers of `held_out` never
    occur. Every eighth step is without pictures: the range of answers, for a reward that reads only the text.
    """
    generator = random.Random(seed)
    numbers = [number for number in make_numbers(num_pictures, seed) if number not in set(held_out)]
    pictures = [prompt(draw(number, generator)) for number in numbers]
    seen = processor.apply_chat_template(pictures, tokenize=True, return_dict=True, return_tensors="pt")
    blind = processor.tokenizer(QUESTION, return_tensors="pt")["input_ids"]
    steps_without = cycle([False] * 7 + [True])

    def captions() -> dict[str, Tensor]:
        is_blind = next(steps_without)
        chosen = generator.choices(range(len(numbers)), k=batch_size)
        right = [numbers[i] for i in chosen]
        texts = [arithmetic.derail(n, generator) if generator.random() < noise else n for n in right]
        answers = processor.tokenizer(
            [text + arithmetic.EOS for text in texts], add_special_tokens=False, return_tensors="pt"
        )["input_ids"]
        asked = blind.expand(batch_size, -1) if is_blind else seen["input_ids"][chosen]
        ids = torch.cat([asked, answers], dim=1)
        batch = {"input_ids": ids, "labels": torch.cat([torch.full_like(asked, -100), answers], dim=1)}
        return batch if is_blind else {**batch, "pixel_values": seen["pixel_values"][chosen]}

    arithmetic.fit(model, captions, steps, bar, learning_rate=2e-3)
