# SPDX-License-Identifier: Apache-2.0
"""Model names (`"quickstart"`, paths and hub ids of models and adapters), and their config, tokenizer and renderer."""

import os
from collections.abc import Iterable

from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from ..rendering.images import Images, Placeholders
from ..rendering.policy import ProcessingClass, Reading
from ..rendering.renderer import Overlong, Renderer
from .adapters import adapter_config, adapter_vocab_size, optional_file
from .quickstart_model import quickstart_model_path


def resolve_model(name: str | os.PathLike[str]) -> str:
    """Path or hub id for a model name: `"quickstart"` is the demo's model, converted on first use."""
    return quickstart_model_path() if name == "quickstart" else os.fspath(name)


def load_config(
    model: str, trust_remote_code: bool = False, revision: str | None = None, what: str = "The frozen model"
) -> PretrainedConfig:
    """Config of a model by name; for an adapter, its base model's, with the adapter's name and vocabulary."""
    base, base_revision = base_model(model := resolve_model(model), revision)
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code, revision=base_revision)
    except Exception as error:  # many types, as each family validates its values in its own way
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{what} {base!r} needs code from its repository. Set `trust_remote_code` to `True` if you trust it."
            ) from error
        adapted = "" if base == model else f", the base model of the adapter {model!r},"
        raise OSError(
            f"{what} {base!r}{adapted} cannot be loaded. It must be a folder with a valid `config.json`, or a model "
            f"that you can access on the Hugging Face hub. Check the name. Reason: {error}"
        ) from error
    if base != model:
        config._name_or_path = model
        if vocab_size := adapter_vocab_size(model, revision):
            config.get_text_config().vocab_size = vocab_size
    return config


def base_model(model: str, revision: str | None = None) -> tuple[str, str]:
    """Name and revision of an adapter's base model; the given ones if they are not of an adapter."""
    adapter = adapter_config(model, revision)
    name, revision = (model, revision) if adapter is None else (adapter.base_model_name_or_path, adapter.revision)
    return name, revision or "main"


def load_tokenizer(model: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Tokenizer of a model, or of the base model of an adapter without one; `OSError` if there is none."""
    if not model:
        raise ValueError(
            "The model given was not loaded from a path or the hub, so its tokenizer cannot be found. Pass it as "
            "`processing_class`."
        )
    model, revision = resolve_model(model), "main"
    base, base_revision = base_model(model)
    if base != model and not optional_file(model, "tokenizer_config.json", None):
        model, revision = base, base_revision
    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code, revision=revision)
    except Exception as error:  # tokenizers raises plain `Exception` for a file that it cannot read
        raise OSError(
            f"The tokenizer of {model!r} cannot be loaded. If it is stored elsewhere, load it from there and pass it "
            f"as `processing_class`. Reason: {error}"
        ) from error


def load_processing_class(
    config: PretrainedConfig, trust_remote_code: bool = False, name: str | None = None
) -> ProcessingClass:
    """Tokenizer of a model with this config, or its processor if it reads images; `OSError` if there is none."""
    name = name or config._name_or_path
    if not reads_images(config):
        return load_tokenizer(name, trust_remote_code)
    try:
        return AutoProcessor.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # many types, as for a tokenizer; `ImportError` without torchvision
        raise OSError(
            f"{name!r} reads images, but its processor cannot be loaded. Pass the processor as `processing_class`, or "
            f"only the tokenizer to score text. Reason: {error}"
        ) from error


def reads_images(config: PretrainedConfig) -> bool:
    """Whether a config is of an image-text-to-text model."""
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and Placeholders.of(config).image is not None


def context_length(config: PretrainedConfig) -> int | None:
    """Maximum sequence length of a model, in tokens; `None` if it has no limit (such as state-space models)."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def model_renderer(
    config: PretrainedConfig,
    eos_token_ids: Iterable[int | None],
    reading: Reading,
    overlong: Overlong | None = None,
    images: Images = "read",
) -> Renderer:
    """Renderer for a model by its config; without `overlong`, rows may have any length."""
    return Renderer(
        eos_token_ids=[token_id for token_id in eos_token_ids if token_id is not None],
        vocab_size=config.get_text_config().vocab_size,
        max_length=None if overlong is None else context_length(config),
        overlong_prompt=overlong or "error",
        placeholders=Placeholders.of(config),
        images=images,
        **reading._asdict(),
    )


def load_generation_config(model: str, config: PretrainedConfig, revision: str | None = None) -> GenerationConfig:
    """Generation config of a model by name (for an adapter, its base model's), or else made from `config`."""
    model, revision = base_model(model, revision)
    try:
        return GenerationConfig.from_pretrained(model, revision=revision)
    except OSError:  # the file is optional
        return GenerationConfig.from_model_config(config)


def eos_token_ids(generation_config: GenerationConfig | None) -> list[int]:
    """Ids of the tokens that end a completion; empty if the config has none."""
    eos = None if generation_config is None else generation_config.eos_token_id
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
