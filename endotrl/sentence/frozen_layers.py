# SPDX-License-Identifier: Apache-2.0
"""Frozen lower layers of a reward model: run once over a dataset, with their states cached on disk."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
import transformers
from accelerate.utils import DistributedType
from datasets import Dataset, IterableDataset, Value, concatenate_datasets
from torch import Tensor, nn
from transformers import TrainingArguments

from ..frozen.loaded_model import eval_mode
from ..scoring.batching import plan_batches
from .encoding import pad_batch, pad_states
from .modeling import SentenceRewardModel


# Rows per file of states: the loss if a run dies while computing them.
ROWS_PER_FILE = 128
MAX_TOKENS_PER_BATCH = 4096
WHICH = ("chosen", "rejected")


class FrozenLayers:
    """
    The first layers of a reward model with everything below them, embeddings and marker: frozen, and not run in
    training. [`add_states`] caches their output for the rows of a dataset on disk, in the dtype in which the next
    layer gets it; [`replaced_by`] starts the model from there. Masks and positions are made by the model's own code.

    What is below is determined by a trial: all parameters that gradients do not reach from the states. If all layers
    are frozen, only the states at the ends of sentences are kept: nothing above reads others. `args` determine
    precision and device of training. Raises `ValueError` if there are no `count` layers, if the model's output changes
    when it starts there (layers that share weights or read more than the states), or if several processes train.
    """

    def __init__(self, model: SentenceRewardModel, count: int, args: TrainingArguments) -> None:
        if args.distributed_state.distributed_type != DistributedType.NO:
            raise ValueError("`freeze_layers` requires training in a single process. Launch one, or remove it.")
        number = model.config.get_text_config().num_hidden_layers
        lists = (module for module in model.backbone.modules() if isinstance(module, nn.ModuleList))
        layers: Any = next((module for module in lists if len(module) == number), ())
        if count > len(layers):
            raise ValueError(
                f"`freeze_layers` must be at most {len(layers)}, the number of layers of "
                f"{type(model.backbone).__name__}, got {count}."
            )
        self._model = model if hasattr(model, "hf_device_map") else model.to(args.device)
        self._layers = list(layers[:count])
        self._ends_only = count == number
        self._precision = torch.bfloat16 if args.bf16 else torch.float16
        self._autocast = args.bf16 or args.fp16
        self._in_tuple = False  # whether a layer returns its states as the first item of a tuple
        config = model.backbone.config
        settings = {**config.to_dict(), "pad_token_id": None}, config._attn_implementation, model.device.type, count
        versions = torch.__version__, transformers.__version__
        digest = hashlib.blake2b(repr((settings, versions, self._autocast, self._precision)).encode(), digest_size=16)
        for parameter in self._find_below():
            parameter.requires_grad_(False)
            digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        self.key = digest.hexdigest()

    def add_states(self, dataset: Dataset | IterableDataset, name: str) -> Dataset:
        """
        Adds `chosen_states` and `rejected_states` to a dataset of pairs encoded by [`PairEncoder`]: bytes of tensors
        of shape `(seq_len, D)`. Files are in the cache of `datasets`, keyed by frozen weights, rows and settings.
        """
        if isinstance(dataset, IterableDataset):
            raise ValueError(
                f"The {name} dataset is an `IterableDataset`, but `freeze_layers` needs a `Dataset`. Load it without "
                "streaming."
            )
        if "states_key" in dataset.column_names:
            if set(dataset.unique("states_key")) != {self.key}:
                raise ValueError(
                    f"The {name} dataset has the states of other frozen weights. Pass it as text or messages."
                )
            return dataset
        features = dataset.features.copy()
        features["states_key"] = Value("string")
        features.update({f"{which}_states": Value("large_binary") for which in WHICH})
        folder = Path(datasets.config.HF_DATASETS_CACHE) / "endotrl-states"
        folder.mkdir(parents=True, exist_ok=True)
        parts = []
        for start in range(0, len(dataset), ROWS_PER_FILE):
            part = dataset.select(range(start, min(start + ROWS_PER_FILE, len(dataset))))
            digest = hashlib.blake2b(f"{self.key}{part.features}".encode(), digest_size=16)
            for row in part:
                digest.update(repr(row).encode("utf-8", "surrogatepass"))
            parts.append(
                part.map(
                    self._with_states,
                    batched=True,
                    batch_size=ROWS_PER_FILE,
                    writer_batch_size=16,
                    features=features,
                    cache_file_name=str(folder / f"{digest.hexdigest()}.arrow"),
                    load_from_cache_file=True,
                    new_fingerprint=digest.hexdigest(),
                    desc=f"Running frozen layers on {name} dataset from row {start}",
                )
            )
        return concatenate_datasets(parts)

    @contextmanager
    def replaced_by(self, states: Tensor) -> Iterator[None]:
        """Context in which the layers return `states`, of shape `(batch_size, seq_len, D)`, and compute nothing."""
        before = [vars(layer).pop("forward", None) for layer in self._layers]  # where accelerate moves devices
        for layer in self._layers:
            layer.forward = lambda *args, **kwargs: (states,) if self._in_tuple else states
        try:
            yield
        finally:
            for layer, forward in zip(self._layers, before, strict=True):
                del layer.forward
                if forward is not None:
                    layer.forward = forward

    def _with_states(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """The changed columns of a batch of rows."""
        flat = [pair for which in WHICH for pair in zip(rows[f"{which}_ids"], rows[f"{which}_ends"], strict=True)]
        read: dict[int, _Row] = {}
        for batch in plan_batches([len(ids) for ids, _ in flat], MAX_TOKENS_PER_BATCH):
            recorded = self._record([flat[i] for i in batch])
            if not read:  # the longest
                self._check([flat[i] for i in batch], recorded)
            read.update(zip(batch, recorded, strict=True))
        half = len(flat) // 2
        columns: dict[str, list[Any]] = {"states_key": [self.key] * half}
        for first, which in zip((0, half), WHICH, strict=True):
            part = [read[i] for i in range(first, first + half)]
            columns[f"{which}_ids"], columns[f"{which}_ends"] = [row.ids for row in part], [row.ends for row in part]
            columns[f"{which}_states"] = [row.states.view(torch.uint8).numpy().tobytes() for row in part]
        return columns

    def _find_below(self) -> list[nn.Parameter]:
        """Parameters that the states depend on."""
        rows: list[tuple[list[int], list[int]]] = [([1, 2, 3, 4, 5, 6], [0, 5]), ([3, 2, 1], [1, 2])]
        parameters = [parameter for parameter in self._model.parameters() if parameter.is_floating_point()]
        trained = [parameter.requires_grad for parameter in parameters]
        recorded = self._record(rows)
        self.dtype = recorded[0].states.dtype  # of the cached states
        for parameter in parameters:
            parameter.requires_grad_(True)
        score = self._run_from(recorded).logits.sum()
        gradients = torch.autograd.grad(score, parameters, allow_unused=True)
        for parameter, was in zip(parameters, trained, strict=True):
            parameter.requires_grad_(was)
        below = [p for p, gradient in zip(parameters, gradients, strict=True) if gradient is None]
        shared = {id(p) for layer in self._layers for p in layer.parameters()} - set(map(id, below))
        if shared:
            raise ValueError(
                "The frozen layers share weights with others, which is unsupported. Remove `freeze_layers`."
            )
        self._check(rows, recorded)
        return below

    def _record(self, rows: Sequence[tuple[list[int], list[int]]]) -> list["_Row"]:
        """Runs the layers over rows of ids and ends, and nothing above."""
        reached: list[Tensor] = []

        def stop(module: nn.Module, args: Any, output: Any) -> None:
            self._in_tuple = isinstance(output, tuple)
            reached.append(output[0] if self._in_tuple else output)
            raise _Reached

        handle = self._layers[-1].register_forward_hook(stop)
        try:
            with torch.no_grad(), suppress(_Reached):
                self._run(rows)
        finally:
            handle.remove()
        states = reached[0].cpu()  # (B, T, D)
        if self._ends_only:
            return [
                _Row([ids[end] for end in ends], list(range(len(ends))), row[ends])
                for (ids, ends), row in zip(rows, states, strict=True)
            ]
        return [_Row(ids, ends, row[: len(ids)].clone()) for (ids, ends), row in zip(rows, states, strict=True)]

    @torch.no_grad()
    def _check(self, rows: Sequence[tuple[list[int], list[int]]], recorded: Sequence["_Row"]) -> None:
        """Raises `ValueError` if the model's output from the states differs from that of the whole model."""
        whole, started = self._run(rows), self._run_from(recorded)
        for name in ("sentence_rewards", "weights"):
            expected, given = whole[name], started[name]
            if not torch.allclose(given, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item()):
                raise ValueError(
                    f"{type(self._model.backbone).__name__} gives other `{name}` when it starts from the states of "
                    f"layer {len(self._layers)}: they differ by up to {(given - expected).abs().max().item():.3g}. "
                    "The layers above read more than these states. Remove `freeze_layers`."
                )

    def _run_from(self, recorded: Sequence["_Row"]) -> Any:
        with self.replaced_by(pad_states([row.states for row in recorded]).to(self._model.device)):
            return self._run([(row.ids, row.ends) for row in recorded])

    def _run(self, rows: Sequence[tuple[list[int], list[int]]]) -> Any:
        inputs = {key: tensor.to(self._model.device) for key, tensor in pad_batch(rows, pad_token_id=0).items()}
        with eval_mode(self._model), torch.autocast(self._model.device.type, self._precision, enabled=self._autocast):
            return self._model(**inputs)


class _Reached(Exception):
    """Raised after the last frozen layer."""


class _Row(NamedTuple):
    """Training input for a response: ids and ends, and their states, of shape `(seq_len, D)`."""

    ids: list[int]
    ends: list[int]
    states: Tensor
