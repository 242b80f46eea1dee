# SPDX-License-Identifier: Apache-2.0
"""
Heads of [`studies.sentence_reward`] as models, and layers below them trained, too, by [`~endotrl.SentenceRewardTrainer`]:
first the head, then all, as of https://huggingface.co/papers/2202.10054.

    python -m studies.sentence_layers    # by the trainer alone, from a random head; 12 minutes on one core
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from endotrl import SentenceReward, SentenceRewardModel, SentenceRewardTrainer
from endotrl.frozen.quickstart_model import quickstart_model_path
from endotrl.rendering.messages import as_messages
from endotrl.sentence import SentenceRewardConfig, SentenceRewardTrainerConfig

from .sentence_states import Pair, load_pairs
from .sentence_statistics import accuracy, auc


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
# By the trainer alone
ALONE: dict[str, Any] = {
    "marker": False,
    "aggregator": "sum",
    "differences": False,
    "model_init_kwargs": {"num_hidden_layers": 13},
    "freeze_layers": 13 - TRAINED_LAYERS,
    "learning_rate": 1e-4,
    "num_train_epochs": 3,
}


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
    frozen = model.config.get_text_config().num_hidden_layers - TRAINED_LAYERS
    centering = 0.0 if model.config.differences else CENTERING
    return _train(model, path, pairs, freeze_layers=frozen, center_sentences_coefficient=centering, seed=seed)


def as_dataset(pairs: Sequence[Pair]) -> Dataset:
    """Pairs in TRL's format."""
    return Dataset.from_list(
        [{"prompt": p.prompt, **dict(zip(WHICH, map(as_messages, p.answers), strict=True))} for p in pairs]
    )


def _train(model: SentenceRewardModel | str, path: str, pairs: Sequence[Pair], **settings: Any) -> SentenceReward:
    tokenizer = AutoTokenizer.from_pretrained(path)
    with tempfile.TemporaryDirectory() as folder:
        args = SentenceRewardTrainerConfig(
            folder, use_cpu=True, save_strategy="no", report_to=[], disable_tqdm=True, **{**TRAINING, **settings}
        )
        trainer = SentenceRewardTrainer(model, args, train_dataset=as_dataset(pairs), processing_class=tokenizer)
        trainer.train()
    trained: Any = trainer.model
    trained.backbone.to(torch.bfloat16)
    return SentenceReward(trained, tokenizer)


def judge_pairs(reward: SentenceReward, pairs: Sequence[Pair]) -> tuple[list[float], list[list[list[float]]]]:
    """Margins of pairs, and the worth of each sentence of both answers."""
    scores = reward.score(
        [pair.prompt for pair in pairs for _ in WHICH], [as_messages(text) for pair in pairs for text in pair.answers]
    )
    worth = [row.contributions.tolist() for row in scores]
    return [a.score - b.score for a, b in zip(scores[::2], scores[1::2], strict=True)], [
        list(both) for both in zip(worth[::2], worth[1::2], strict=True)
    ]


def main() -> None:
    """Trains on the facts by the trainer alone, from a random head, and judges the held-out ones."""
    from .sentence_reward import training_pairs

    pairs, path = load_pairs("facts", Path()), quickstart_model_path()
    learned = [pairs[i] for i in training_pairs([{"part": pair.part} for pair in pairs], seed=0)]
    reward = _train(path, path, learned, center_sentences_coefficient=CENTERING, **ALONE)
    for part in ("dev", "test"):
        judged = [pair for pair in pairs if pair.part == part]
        margins, worth = judge_pairs(reward, judged)
        right = [flag for pair in judged for flags in pair.right or () for flag in flags]
        found = auc(torch.tensor([v for both in worth for row in both for v in row]), torch.tensor(right))
        Console().print(
            f"{part}: {accuracy(margins):.1%} of pairs in order, wrong sentences with an AUC of {found:.3f}"
        )


if __name__ == "__main__":
    main()
