# SPDX-License-Identifier: Apache-2.0
"""Trainer of the sentence-level reward model on TRL's preference datasets."""

import copy
import logging
import math
import textwrap
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import RewardConfig, RewardTrainer
from trl.data_utils import get_dataset_column_names

from ..frozen.names import resolve_model
from ..learning_rates import has_one_learning_rate, set_learning_rate
from .configuration import SentenceRewardConfig
from .frozen_layers import FrozenLayers
from .modeling import SentenceRewardModel, new_modules
from .preferences import DataCollatorForSentencePreference, PairEncoder
from .segmentation import Segmenter
from .trainer_config import ADAPTER_TASK, SentenceRewardTrainerConfig


logger = logging.getLogger(__name__)

# In the model card.
QUICK_START = """```python
from endotrl import SentenceReward

reward = SentenceReward("{model}")
(scores,) = reward.score(["What is the capital of France?"], ["It is Paris. It was founded by the Gauls."])
print(scores.score, scores.contributions)
```"""


class SentenceRewardTrainer(RewardTrainer):
    r"""
    Trainer for sentence-level reward models (https://huggingface.co/papers/2503.04793) on preferences:

    $$
    \mathcal{L} = -\log \sigma(R(y^+) - R(y^-) - m)
    $$

    with the margin $m$ if the dataset has one, and the terms weighted by coefficients of `args`. It is TRL's
    [`~trl.RewardTrainer`] with a [`SentenceRewardModel`], and logs `largest_weight`, the mean over responses of
    $\max_i a_i$: near 1, the attention reads one place of each response, and a lower `attention_learning_rate` helps.
    Text is split into sentences once, in the cached preprocessing of the dataset, which adds a column `length` for
    `train_sampling_strategy="group_by_length"`.

    Args:
        model (`str`, [`SentenceRewardModel`] or [`~peft.PeftModel`]):
            Path or hub id of a causal language model, on which a reward model is built by `args`, or of a sentence
            reward model, which is trained further; or a loaded sentence reward model.
        args ([`SentenceRewardTrainerConfig`], *optional*):
            Configuration.
        segmenter ([`Segmenter`], *optional*):
            Splits text into sentences, instead of the one named by `args` or the model. A model trained with it is
            saved without it, and needs it as an argument again.
        **kwargs:
            The other arguments of [`~trl.RewardTrainer`]. The dataset has text or messages; an implicit prompt is the
            common prefix of chosen and rejected.

    Example:
    ```python
    >>> from datasets import load_dataset
    >>> from endotrl import SentenceRewardTrainer

    >>> trainer = SentenceRewardTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
    ... )
    >>> trainer.train()
    ```
    """

    _tag_names = ["trl", "endotrl", "sentence-reward"]
    _name = "Sentence Reward"
    _paper = {
        "title": "Sentence-level Reward Model can Generalize Better for Aligning LLM from Human Preference",
        "id": "2503.04793",
        "citation": textwrap.dedent("""\
            @article{qiu2025sentence,
                title        = {{Sentence-level Reward Model can Generalize Better for Aligning LLM from Human
                                Preference}},
                author       = {Wenjie Qiu and Yi-Chen Li and Xuqin Zhang and Tianyi Zhang and Yihang Zhang and
                                Zongzhang Zhang and Yang Yu},
                year         = 2025,
                eprint       = {arXiv:2503.04793},
            }"""),
    }

    def __init__(
        self,
        model: "str | SentenceRewardModel | Any",
        args: SentenceRewardTrainerConfig | None = None,
        segmenter: Segmenter | None = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = SentenceRewardTrainerConfig(f"{name.rstrip('/').split('/')[-1] or 'model'}-SentenceReward")
        if not isinstance(args, SentenceRewardTrainerConfig):
            raise TypeError(f"`args` must be a `SentenceRewardTrainerConfig`, got {type(args).__name__}.")
        if isinstance(model, str):
            set_seed(args.seed)  # the heads are initialized at random
            model = _load(model, args, kwargs.pop("quantization_config", None))
            args.model_init_kwargs = None  # used; TRL would warn that they have no effect on a loaded model
        given: Any = model
        has_adapter = isinstance(given, nn.Module) and is_peft_model(given)
        base_model = given.get_base_model() if has_adapter else given
        if not isinstance(base_model, SentenceRewardModel):
            raise TypeError(
                f"`model` must be a `SentenceRewardModel`, got {type(base_model).__name__}. Pass the path or hub id "
                "of a language model, or build a reward model on one with `SentenceRewardModel.from_backbone`."
            )
        if args.attention_learning_rate is not None and has_one_learning_rate(args):
            raise ValueError(
                "DeepSpeed's `optimizer` supports only one learning rate. Remove it from DeepSpeed's configuration, "
                "or remove `attention_learning_rate`."
            )
        if segmenter is not None:
            base_model.config.segmenter = "custom"
        self._sentence_config = base_model.config
        self._segmenter = segmenter
        new = new_modules(base_model.config)
        if kwargs.get("peft_config") is not None:
            from peft import PEFT_TYPE_TO_TUNER_MAPPING

            peft_config = copy.copy(kwargs["peft_config"])  # the caller's stays unchanged
            if peft_config.is_prompt_learning:
                raise ValueError(
                    f"`peft_config` is a {type(peft_config).__name__}, but prompt learning methods, which add virtual "
                    "tokens, are not supported. Use an adapter of weights, such as `LoraConfig()`."
                )
            if peft_config.task_type == "CAUSAL_LM":  # TRL's default
                peft_config.task_type = ADAPTER_TASK
            peft_config.modules_to_save = list(dict.fromkeys([*(peft_config.modules_to_save or []), *new]))
            if peft_config.target_modules is None and not vars(peft_config).get("target_parameters"):
                # PEFT looks up the type of the whole model, which it does not know. (IA)³ has no such table.
                tuner = PEFT_TYPE_TO_TUNER_MAPPING[peft_config.peft_type]
                defaults = getattr(tuner, "target_module_mapping", {})
                peft_config.target_modules = defaults.get(base_model.config.get_text_config().model_type)
            kwargs["peft_config"] = peft_config
        elif has_adapter and not set(new) <= set(given.active_peft_config.modules_to_save or []):
            raise ValueError(
                f"The adapter of `model` has `modules_to_save={given.active_peft_config.modules_to_save}`, but the "
                f"new modules must be trained with it. Use `modules_to_save={new}`, or pass `peft_config` instead."
            )
        if args.freeze_layers and (has_adapter or kwargs.get("peft_config") is not None):
            raise ValueError(
                f"`freeze_layers` is {args.freeze_layers}, but an adapter is trained, which changes the frozen layers "
                "as well. Remove one of the two."
            )
        self._frozen_layers = FrozenLayers(base_model, args.freeze_layers, args) if args.freeze_layers else None
        super().__init__(model=model, args=args, **kwargs)
        if kwargs.get("data_collator") is None:
            states_dtype = None if self._frozen_layers is None else self._frozen_layers.dtype
            padding = self.processing_class.pad_token_id, args.pad_to_multiple_of
            self.data_collator = DataCollatorForSentencePreference(*padding, states_dtype=states_dtype)

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase,
        args: RewardConfig,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        columns = get_dataset_column_names(dataset)
        if self._frozen_layers is not None and "states_key" in columns:
            return self._frozen_layers.add_states(dataset, dataset_name)  # if cached
        if "chosen_ids" not in columns:
            if not {"chosen", "rejected"} <= set(columns):
                raise ValueError(
                    f"The {dataset_name} dataset has the columns {columns}, but a preference dataset needs `chosen` "
                    "and `rejected`, and preferably `prompt`. Rename its columns, or build pairs from its rows."
                )
            encode = PairEncoder(processing_class, self._sentence_config, self._segmenter)
            map_kwargs: dict[str, Any] = {}  # `IterableDataset.map` supports neither
            if isinstance(dataset, Dataset):
                description = f"Splitting {dataset_name} dataset into sentences"
                map_kwargs = {"num_proc": args.dataset_num_proc, "desc": description}
            with PartialState().main_process_first():  # the others read it from the cache
                dataset = dataset.map(encode, **map_kwargs)
        elif not {"chosen_ends", "rejected_ends"} <= set(columns):
            raise ValueError(
                f"The {dataset_name} dataset has `chosen_ids`, but no `chosen_ends` and `rejected_ends`, so it was "
                "tokenized without sentences. Pass it as text or messages."
            )
        prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if isinstance(dataset, Dataset) and len(prepared) < len(dataset):
            message = (
                f"{len(dataset) - len(prepared)} of {len(dataset)} rows of the {dataset_name} dataset are longer than "
                f"`max_length={args.max_length}` tokens and markers"
            )
            if len(prepared) == 0:
                raise ValueError(f"{message}, so no rows are left. Increase `max_length`, or pass shorter rows.")
            logger.warning(f"{message} and are dropped.")
        return prepared if self._frozen_layers is None else self._frozen_layers.add_states(prepared, dataset_name)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        frozen = self._frozen_layers
        if frozen is not None and "states" not in inputs:
            raise ValueError(
                "The batch has no `states` of the frozen layers. Remove `data_collator`, which `freeze_layers` sets."
            )
        with nullcontext() if frozen is None else frozen.replaced_by(inputs.pop("states")):
            loss, outputs = super().compute_loss(model, inputs, True, *args, **kwargs)
        if self._sentence_config.aggregator == "attention":
            largest = self.accelerator.gather_for_metrics(outputs.weights.detach().amax(dim=1))
            self._metrics["train" if self.model.training else "eval"]["largest_weight"].append(largest.mean().item())
        if self.args.center_sentences_coefficient:
            rewards = outputs.sentence_rewards[:, 1:][inputs["sentence_ends"][:, 1:] >= 0]
            loss = loss + self.args.center_sentences_coefficient * rewards.square().sum() / max(len(rewards), 1)
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        created = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if created and self._sentence_config.aggregator == "attention" and not has_one_learning_rate(self.args):
            learning_rate = self.args.attention_learning_rate
            if learning_rate is None:
                learning_rate = self.args.learning_rate / (4 * math.sqrt(self._sentence_config.attention_dim))
            named_parameters = (self.model if model is None else model).named_parameters()
            attention = "query.weight", "key.weight"  # of the head, wherever PEFT has moved it
            set_learning_rate(
                optimizer,
                (p for name, p in named_parameters if "sentence_head." in name and name.endswith(attention)),
                learning_rate,
            )
        return optimizer

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        states = ["chosen_states", "rejected_states"] if self.args.freeze_layers else []
        columns = ["chosen_ends", "rejected_ends", self.args.length_column_name, *states]
        self._signature_columns += [column for column in columns if column not in self._signature_columns]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            # TRL's card shows how to use a sequence-classification model, which this is not.
            path = Path(self.args.output_dir) / "README.md"
            snippet = QUICK_START.format(model=self.hub_model_id or self.args.output_dir)
            before, _, rest = path.read_text("utf-8").partition("```python\n")
            path.write_text(before + snippet + rest.partition("```")[2], "utf-8")

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if is_peft_model(self.model):
            # Required by `SentenceRewardModel.from_pretrained` to build the model under the adapter.
            self._sentence_config.save_pretrained(self.args.output_dir if output_dir is None else output_dir)


def _load(model: str, args: SentenceRewardTrainerConfig, quantization_config: Any) -> PreTrainedModel:
    kwargs = {"dtype": "float32", **(args.model_init_kwargs or {})}  # float32 is TRL's default as well
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        kwargs["device_map"] = None
    model, trust = resolve_model(model), args.trust_remote_code
    if isinstance(AutoConfig.from_pretrained(model, trust_remote_code=trust), SentenceRewardConfig):
        return SentenceRewardModel.from_pretrained(model, **kwargs)
    return SentenceRewardModel.from_backbone(model, reward_model_config(args), trust_remote_code=trust, **kwargs)


def reward_model_config(args: SentenceRewardTrainerConfig) -> SentenceRewardConfig:
    """Configuration of a reward model built from a language model, by the trainer's configuration."""
    names = "marker", "aggregator", "differences", "attention_dim", "attention_init", "max_sentences", "segmenter"
    return SentenceRewardConfig(**{name: getattr(args, name) for name in names})
