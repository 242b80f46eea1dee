# SPDX-License-Identifier: Apache-2.0
"""
Heads of [`studies.sentence_reward`] as models, and layers below them trained, too, by [`~endotrl.SentenceRewardTrainer`]:
first the head, then all, as of https://huggingface.co/papers/2202.10054.
"""

import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from endotrl import SentenceReward, SentenceRewardModel, SentenceRewardTrainer
from endotrl.sentence import SentenceRewardConfig, SentenceRewardTrainerConfig

from .sentence_states import Pair


WHICH = "chosen", "rejected"
TRAINED_LAYERS = 5  # the highest of those below the head
TRAINING: dict[str, Any] = {
    "learning_rate": 3e-5,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 16,
    "warmup_steps": 10,
    "bf16": True,
}
CENTERING = 0.02  # of own values


def as_model(
    trained: tuple[Any, Tensor, Tensor], depth: int, path: str, differences: bool, dtype: torch.dtype
) -> SentenceRewardModel:
    """
    A head without attention, with the whitening of its states, on the lower layers of a language model. Its states have
    length 1: so do those of an RMSNorm without weights, but for a factor.
    """
    head, mean, matrix = trained
    lower = AutoModelForCausalLM.from_pretrained(path, num_hidden_layers=depth, dtype=dtype)
    nn.init.ones_(lower.model.norm.weight)
    config = SentenceRewardConfig(marker=False, aggregator="sum", differences=differences)
    model = SentenceRewardModel.from_backbone(lower, config)
    with torch.no_grad():
        weight = head.value.weight @ matrix.T
        model.sentence_head.value.weight.copy_(weight / model.config.hidden_size**0.5)
        model.sentence_head.value.bias.copy_(head.value.bias - weight @ mean)
    return model.eval()


def train_layers(model: SentenceRewardModel, path: str, pairs: Sequence[Pair], seed: int) -> SentenceReward:
    """Trains the layers below a head, and the head, on pairs."""
    rows = [
        {"prompt": pair.prompt, **{which: _message(text) for which, text in zip(WHICH, pair.answers, strict=True)}}
        for pair in pairs
    ]
    centering = 0.0 if model.config.differences else CENTERING
    frozen = model.config.get_text_config().num_hidden_layers - TRAINED_LAYERS
    tokenizer = AutoTokenizer.from_pretrained(path)
    with tempfile.TemporaryDirectory() as folder:
        args = SentenceRewardTrainerConfig(
            folder,
            freeze_layers=frozen,
            center_sentences_coefficient=centering,
            seed=seed,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **TRAINING,
        )
        SentenceRewardTrainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer).train()
    model.backbone.to(torch.bfloat16)
    return SentenceReward(model, tokenizer)


def judge_pairs(reward: SentenceReward, pairs: Sequence[Pair]) -> tuple[list[float], list[list[list[float]]]]:
    """Margins of pairs, and the worth of each sentence of both answers."""
    scores = reward.score(
        [pair.prompt for pair in pairs for _ in WHICH], [_message(text) for pair in pairs for text in pair.answers]
    )
    worth = [row.contributions.tolist() for row in scores]
    return [a.score - b.score for a, b in zip(scores[::2], scores[1::2], strict=True)], [
        list(both) for both in zip(worth[::2], worth[1::2], strict=True)
    ]


def _message(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]
