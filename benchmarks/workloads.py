# SPDX-License-Identifier: Apache-2.0
"""What is scored: token ids of real text, in the shapes of a GRPO group, of an evaluation and of long answers."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer

from endotrl.frozen.own_copy import OwnCopy
from endotrl.rendering.renderer import Rendered, Renderer


ROOT = Path(__file__).resolve().parents[1]
TEXTS = ("README.md", "docs/theory.md", "docs/trl.md", "docs/score.md", "LICENSE")
# 848 tokens in 8 completions: with the prompt, 1,104 tokens where a padded batch has 8 * (256 + 256) = 4,096.
GROUP_LENGTHS = (20, 40, 56, 72, 96, 128, 180, 256)


@dataclass(frozen=True)
class Workload:
    """
    Completions to score.

    Attributes:
        name (`str`), description (`str`):
            For tables.
        batches (`list[list[Rendered]]`):
            The micro-batches that a user would make.
    """

    name: str
    description: str
    batches: list[list[Rendered]]

    @property
    def rows(self) -> list[Rendered]:
        """All completions."""
        return [row for batch in self.batches for row in batch]


class TokenSource:
    """
    Slices of a text, drawn from a seed.

    Args:
        token_ids (`Sequence[int]`):
            The text.
        seed (`int`):
            Of the draws.
    """

    def __init__(self, token_ids: Sequence[int], seed: int) -> None:
        self._ids = list(token_ids)
        self.random = random.Random(seed)

    @classmethod
    def of_texts(cls, path: str, seed: int) -> "TokenSource":
        """This project's own documentation, read with a model's tokenizer."""
        tokenizer = AutoTokenizer.from_pretrained(path)
        ids: list[int] = []
        for name in TEXTS:
            ids += tokenizer((ROOT / name).read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
        return cls(ids, seed)

    @classmethod
    def of_vocabulary(cls, vocab_size: int, seed: int) -> "TokenSource":
        """Random tokens, for random models."""
        generator = random.Random(seed)
        return cls([generator.randrange(vocab_size) for _ in range(4096)], seed)

    def draw(self, length: int) -> list[int]:
        """A slice of `length` tokens; the text begins again at its end."""
        start = self.random.randrange(len(self._ids))
        return [self._ids[(start + i) % len(self._ids)] for i in range(length)]

    def group(self, prompt_length: int, lengths: Sequence[int]) -> list[Rendered]:
        """A prompt with completions of the given lengths, in tokens."""
        prompt = self.draw(prompt_length)
        return [Rendered(prompt, self.draw(length), list(range(length)), finished=True) for length in lengths]


def make_workloads(source: TokenSource, quick: bool, eval_prompts: int) -> list[Workload]:
    """The three workloads; with `quick`, in a size that only shows that they run."""
    lengths = (3, 8, 16) if quick else GROUP_LENGTHS
    prompt_length = 24 if quick else 256
    group = source.group(prompt_length, lengths)
    longest = 30 if quick else 450
    evaluation = [
        source.group(
            source.random.randint(longest // 11, longest // 4),
            [source.random.randint(longest // 9, longest) for _ in range(6)],
        )
        for _ in range(eval_prompts)
    ]
    long_prompt, long_completion = (8, 48) if quick else (128, 2048)
    return [
        Workload(
            "group",
            f"1 prompt of {prompt_length} tokens, {len(lengths)} completions of {lengths[0]} to {lengths[-1]}",
            [group],
        ),
        Workload(
            "eval", f"{eval_prompts} prompts, 6 responses of {longest // 9} to {longest} tokens each", evaluation
        ),
        Workload(
            "long",
            f"2 prompts of {long_prompt} tokens, one completion of {long_completion:,} each",
            [source.group(long_prompt, [long_completion]) for _ in range(2)],
        ),
    ]


def rm_bench_workload(file: Path, path: str, seed: int, prompts: int) -> Workload:
    """
    Prompts of RM-Bench with their six responses, rendered with the model's chat template.

    Args:
        file (`Path`):
            A file of the benchmark, such as `chat_filtered.json`.
        path (`str`):
            Checkpoint of the frozen model, with its tokenizer.
        seed (`int`):
            Of the draw of prompts.
        prompts (`int`):
            Number of prompts.
    """
    frozen = OwnCopy(path)
    config = frozen.config
    renderer = Renderer(
        AutoTokenizer.from_pretrained(path), frozen.eos_token_ids, config.vocab_size, config.max_position_embeddings
    )
    batches = []
    for item in random.Random(seed).sample(json.loads(file.read_text(encoding="utf-8")), prompts):
        responses = [*item["chosen"], *item["rejected"]]
        messages = [{"role": "user", "content": item["prompt"]}]
        batches.append(renderer.render([messages] * len(responses), responses))
    return Workload("eval", f"{prompts} prompts of RM-Bench ({file.name}), 6 responses each", batches)
