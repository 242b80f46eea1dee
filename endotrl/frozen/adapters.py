# SPDX-License-Identifier: Apache-2.0
"""PEFT adapters as frozen models: a base model with an adapter, from a folder or the hub."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import cached_file, is_peft_available
from transformers.utils.peft_utils import find_adapter_config_file

from ..checks import check_choice


def optional_file(name: str, file: str, revision: str | None) -> str | None:
    """Path of a file of a model by name; `None` if the model has no such file."""
    return cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)


def adapter_config(name: str, revision: str | None = None) -> Any:
    """The [`~peft.PeftConfig`] of an adapter by name; `None` if it is not an adapter, or is a model itself."""
    try:
        # A model with a config of its own is loaded from it, including its adapter (like a sentence reward model).
        if optional_file(name, "config.json", revision) or not find_adapter_config_file(name, revision=revision):
            return None
    except OSError:  # no model of that name either, which loading it will report
        return None
    if not is_peft_available():
        raise ImportError(f'{name!r} is an adapter, which requires PEFT. Install it: `pip install "endotrl[peft]"`.')
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(name, revision=revision or "main")
    if not config.base_model_name_or_path:
        raise ValueError(
            f"The `adapter_config.json` of {name!r} does not name the base model (`base_model_name_or_path`). Load "
            "the base model and the adapter yourself, and pass the `PeftModel`."
        )
    return config


def check_adapter(what: str, config: Any) -> None:
    """Raises `ValueError` for an adapter whose logits are not those of its base model's modules as they run."""
    if config.is_prompt_learning:
        raise ValueError(
            f"The adapter {what} ({config.peft_type.value}) prepends virtual tokens to the prompt, which endotrl "
            "cannot score after. Use an adapter that changes weights, such as LoRA."
        )
    if getattr(config, "alora_invocation_tokens", None):
        raise ValueError(
            f"The adapter {what} is an activated LoRA (`alora_invocation_tokens`), which starts at these tokens of "
            "each row, but endotrl can only score adapters that apply to all tokens. Use a plain LoRA."
        )
    if config.task_type not in (None, "CAUSAL_LM"):
        raise ValueError(
            f"The adapter {what} has the task type {config.task_type!r}, but the endogenous reward needs an adapter "
            "of a causal language model (`CAUSAL_LM`)."
        )


def adapter_vocab_size(name: str, revision: str | None = None) -> int | None:
    """Vocabulary size of the embeddings saved with an adapter; `None` if it leaves them unchanged."""
    path = optional_file(name, "adapter_model.safetensors", revision)
    if path is None:
        return None
    with safe_open(path, "pt") as weights:
        sizes = {
            weights.get_slice(key).get_shape()[0]
            for key in weights.keys()
            # Full matrices, not LoRA's low-rank factors.
            if key.endswith(("embed_tokens.weight", "lm_head.weight", "wte.weight")) and "lora" not in key
        }
    return max(sizes, default=None)


def load_with_adapter(
    name: str, config: Any, revision: str | None, **settings: Any
) -> tuple[PreTrainedModel, list[str]]:
    """The base model with the adapter enabled (merging would round it), and names of missing weights."""
    from peft import get_peft_model

    base, info = AutoModelForCausalLM.from_pretrained(
        config.base_model_name_or_path, revision=config.revision or "main", output_loading_info=True, **settings
    )
    vocab_size = adapter_vocab_size(name, revision)
    if vocab_size is not None and vocab_size != base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(vocab_size, mean_resizing=False)  # overwritten by the adapter
    config.inference_mode = True
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    result = model.load_adapter(name, "default", autocast_adapter_dtype=False, revision=revision or "main")
    # PEFT reports embeddings that it saves twice as unexpected.
    strange = [key for key in result.unexpected_keys if "lora_" in key]
    return model.get_base_model(), [*info["missing_keys"], *result.missing_keys, *strange]


class UsedAdapter:
    """The adapter of a [`~peft.PeftModel`] that makes the frozen model; by default the only active one."""

    def __init__(self, model: Any, name: str | None = None) -> None:
        active = list(model.active_adapters)
        if name is None and len(active) != 1:
            raise ValueError(f"The active adapters of the `PeftModel` are {active}. Select one with `adapter_name`.")
        name = active[0] if name is None else name
        check_choice("adapter_name", name, sorted(model.peft_config))
        check_adapter(repr(name), model.peft_config[name])
        self.model: Any = model
        self.name = name
        self._others = [other for other in model.peft_config if other != name]

    def without_others(self, weights: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        """Weights by name, without those of other adapters, which may be in training."""
        for key, value in weights:
            if not any(f".{other}." in f"{key}." for other in self._others):
                yield key, value

    @contextmanager
    def active(self) -> Iterator[None]:
        """Enables this adapter alone; on exit everything is restored, including what is trained."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        if any(layer.merged for layer in layers):
            raise RuntimeError(
                f"The model of the adapter {self.name!r} has an adapter merged into its weights. Unmerge it before "
                "scoring."
            )
        before, disabled = list(self.model.active_adapters), bool(layers and layers[0].disable_adapters)
        if before == [self.name] and not disabled:
            yield
            return
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.model.base_model.set_adapter(self.name)
        self.model.base_model.enable_adapter_layers()
        try:
            yield
        finally:
            self.model.base_model.set_adapter(before)
            if disabled:
                self.model.base_model.disable_adapter_layers()
            self.model.requires_grad_(False)
            for weight in trained:
                weight.requires_grad_(True)
