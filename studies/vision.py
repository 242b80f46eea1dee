# SPDX-License-Identifier: Apache-2.0
r"""
A model that reads images, improved by its own reward: shapes are drawn by this program, and named by a tiny Llava.

1. Llava (a CLIP tower and a Llama, both random) learns to name them ("red circle") from captions of which 40% are
   wrong: it knows the shapes, and answers wrongly about as often as its captions did.
2. It is frozen, and improved by GRPO on its own reward. Controls: a random reward; the reward of an answer to *another*
   image; and the reward of the answer to the text alone (`images="ignore"`). None of them can teach to look.

Accuracy is exact: the probability of the right answer on held-out images. The page shows rewards beside the pictures.

    python -m studies.vision                                      # about 2 minutes on 2 quiet cores
    python -m studies.vision --pretraining-steps 20 --steps 1     # a look
"""

import argparse
import random
import tempfile
import time
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from PIL import Image, ImageDraw
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging as transformers_logging
from trl import GRPOConfig, GRPOTrainer

from endotrl import EndogenousReward
from endotrl.reporting import figure, heat_maps, page, terminal_table
from endotrl.rewards import RandomReward
from endotrl.rewards.contributions import heat_map_row


SIZE, PATCH = 20, 5  # pixels
COLOURS = {"red": (230, 40, 40), "green": (40, 200, 40), "blue": (50, 70, 240), "yellow": (230, 220, 40)}
SHAPES = ["circle", "square", "triangle"]
NAMES = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
WRONG = 0.4  # of the captions
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{{ '<image> ' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} : {% endif %}"
)
QUESTION = [{"role": "user", "content": "what ?"}]
ARMS = {
    "own reward": "its own reward",
    "random": "a random reward",
    "other image": "its reward for another image",
    "text alone": "its reward for the text alone",
}


def draw(name: str, source: random.Random) -> Image.Image:
    """A shape somewhere in a noisy picture, in about its colour."""
    colour, shape = name.split()
    ink = tuple(max(0, min(255, value + source.randint(-30, 30))) for value in COLOURS[colour])
    picture = Image.new("RGB", (SIZE, SIZE), tuple(source.randint(0, 40) for _ in range(3)))
    left, top, side = source.randint(0, 5), source.randint(0, 5), source.randint(12, 14)
    box, canvas = (left, top, left + side, top + side), ImageDraw.Draw(picture)
    if shape == "circle":
        canvas.ellipse(box, fill=ink)
    elif shape == "square":
        canvas.rectangle(box, fill=ink)
    else:
        canvas.polygon([(left, top + side), (left + side, top + side), (left + side // 2, top)], fill=ink)
    for _ in range(20):
        picture.putpixel((source.randrange(SIZE), source.randrange(SIZE)), (source.randrange(256),) * 3)
    return picture


def make_pictures(count: int, seed: int) -> tuple[list[Image.Image], list[str]]:
    """Pictures, and what they show."""
    source = random.Random(seed)
    names = [source.choice(NAMES) for _ in range(count)]
    return [draw(name, source) for name in names], names


def make_model(seed: int) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A random Llava of 0.2 million parameters, and its processor."""
    words = ["<eos>", "<pad>", "<image>", "what", "?", ":", *COLOURS, *SHAPES]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", extra_special_tokens={"image_token": "<image>"}
    )
    shape = {"height": SIZE, "width": SIZE}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size=shape, crop_size=shape),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    torch.manual_seed(seed)
    common = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=SIZE, patch_size=PATCH, projection_dim=64, **common),
        text_config=LlamaConfig(vocab_size=len(words), max_position_embeddings=64, **common, **ids),
        image_token_index=2,
        vision_feature_layer=-1,
        **ids,
    )
    return LlavaForConditionalGeneration(config), processor


def encode(processor: LlavaProcessor, pictures: list[Image.Image]) -> dict[str, Tensor]:
    """Prompts about pictures."""
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what ?"}]}],
        add_generation_prompt=True,
    )
    given = processor(text=[text] * len(pictures), images=[[picture] for picture in pictures], return_tensors="pt")
    return {key: given[key] for key in ("input_ids", "attention_mask", "pixel_values")}


def pretrain(folder: Path, steps: int, seed: int) -> None:
    """Trains the model on faulty captions, and saves it."""
    model, processor = make_model(seed)
    pictures, names = make_pictures(4000, seed)
    source = random.Random(seed)
    captions = [source.choice([x for x in NAMES if x != n]) if source.random() < WRONG else n for n in names]
    inputs, answers = encode(processor, pictures), answer_ids(processor, captions)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in tqdm(range(steps), desc="Captions", unit=" steps"):
        chosen = torch.tensor([source.randrange(len(pictures)) for _ in range(64)])
        ids = torch.cat([inputs["input_ids"][chosen], answers[chosen]], dim=1)
        labels = torch.cat([torch.full_like(ids[:, :-3], -100), answers[chosen]], dim=1)
        pixels: dict[str, Tensor] = {"pixel_values": inputs["pixel_values"][chosen]}
        if step % 10 == 9:  # now and then without the picture: what shapes there are
            ids, labels, pixels = ids[:, -6:], labels[:, -6:], {}
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, **pixels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def answer_ids(processor: LlavaProcessor, names: list[str]) -> Tensor:
    """Tokens of answers, of shape `(B, 3)`: colour, shape, end."""
    return torch.tensor(processor.tokenizer([f"{name} <eos>" for name in names])["input_ids"])


@torch.no_grad()
def accuracy(model: LlavaForConditionalGeneration, processor: LlavaProcessor, seed: int) -> tuple[float, float]:
    """Accuracy on held-out pictures of answers sampled at temperature 1, and of the most probable ones."""
    pictures, names = make_pictures(500, seed + 10_000)
    inputs, answers = encode(processor, pictures), answer_ids(processor, names)[:, :2]
    ids = torch.cat([inputs["input_ids"], answers], dim=1)
    model.eval()
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=inputs["pixel_values"]).logits
    logits = logits[:, -3:-1]  # (B, 2, V)
    sampled = logits.log_softmax(-1).gather(2, answers[..., None]).sum(dim=(1, 2)).exp().mean().item()
    return sampled, (logits.argmax(-1) == answers).all(dim=1).float().mean().item()


class OtherImage:
    """The reward of each answer for the image of another prompt of the batch."""

    def __init__(self, reward: EndogenousReward) -> None:
        self.reward = reward
        self.__name__ = "other_image_reward"

    def __call__(self, prompts: list[Any], completions: list[Any], completion_ids: list[Any], **_: Any) -> Any:
        half = len(prompts) // 2  # another group's
        return self.reward(
            prompts=[*prompts[half:], *prompts[:half]], completions=completions, completion_ids=completion_ids
        )


def improve(arm: str, base: Path, folder: Path, steps: int, seed: int) -> tuple[float, float]:
    """Trains the model on one reward. Returns [`accuracy`]."""
    reward: Any = EndogenousReward(str(base), images="ignore" if arm == "text alone" else "read")
    if arm == "random":
        reward = RandomReward(seed)
    elif arm == "other image":
        reward = OtherImage(reward)
    pictures, _ = make_pictures(8 * steps, seed + 1)
    trainer = GRPOTrainer(
        str(base),
        reward_funcs=reward,
        args=GRPOConfig(
            str(folder), seed=seed, per_device_train_batch_size=64, num_generations=8, max_steps=steps,
            max_completion_length=3, learning_rate=5e-4, lr_scheduler_type="constant", beta=0.05,
            scale_rewards="none", temperature=1.0, bf16=False, use_cpu=True, report_to=[], save_strategy="no",
            disable_tqdm=True, dataloader_pin_memory=False, gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_dict({"prompt": [QUESTION] * len(pictures), "image": pictures}),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return accuracy(trainer.model, trainer.processing_class, seed)


def report(base: Path, rows: list[list[Any]], seed: int) -> str:
    """The page: the table, and rewards of right and wrong answers beside the pictures."""
    from markupsafe import Markup

    from endotrl.reporting import table

    reward = EndogenousReward(str(base))
    pictures, names = make_pictures(4, seed + 20_000)
    blocks = []
    for shown, name in zip(pictures, names, strict=True):
        answers = [name, NAMES[(NAMES.index(name) + 4) % len(NAMES)]]
        stats = reward.score([QUESTION] * 2, answers, images=[[shown]] * 2)
        buffer = BytesIO()
        shown.resize((160, 160), Image.Resampling.NEAREST).save(buffer, format="png")
        maps = [heat_map_row(reward, s, meta=m) for s, m in zip(stats, ("right", "wrong"), strict=True)]
        blocks.append(heat_maps([maps[0], replace(maps[1], details=figure(buffer.getvalue(), alt=f"A {name}"))]))
    return page(
        "A model that reads images, improved by its own reward",
        [
            ("Accuracy on held-out images", table(["trained on", "sampled", "most probable"], rows, decimals=3)),
            ("Rewards of answers", Markup("").join(blocks)),
        ],
    )


def main() -> None:
    """Trains the model and all arms, and writes the page."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--pretraining-steps", type=int, default=600, help="steps on 64 captions each")
    parser.add_argument("--steps", type=int, default=40, help="policy updates, each on 64 answers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("vision-demo.html"))
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        base = Path(name) / "base"
        pretrain(base, args.pretraining_steps, args.seed)
        frozen = LlavaForConditionalGeneration.from_pretrained(base)
        rows: list[list[Any]] = [
            ["faulty captions", *accuracy(frozen, LlavaProcessor.from_pretrained(base), args.seed)]
        ]
        for arm, label in tqdm(ARMS.items(), desc="GRPO", unit=" runs"):
            rows.append([label, *improve(arm, base, Path(name) / arm, args.steps, args.seed)])
        args.output.write_text(report(base, rows, args.seed), encoding="utf-8")
    gain, controls = rows[1][1] - rows[0][1], [row[1] - rows[0][1] for row in rows[2:]]
    verdict = "more than any control" if gain > max(0.0, *controls) else "no more than a control"
    console = Console()
    console.print(f"Its own reward changes its accuracy by {100 * gain:+.1f} points: {verdict}.")
    table_rows = [[f"{100 * sampled:.1f}%", f"{100 * greedy:.1f}%", label] for label, sampled, greedy in rows]
    console.print(terminal_table(["sampled", "most probable", "trained on"], table_rows, "Accuracy, held-out images"))
    console.print(f"{args.output}, {time.perf_counter() - start:.0f} s", soft_wrap=True)


if __name__ == "__main__":
    main()
