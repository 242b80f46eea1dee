# SPDX-License-Identifier: Apache-2.0
"""The renderer of a frozen model: its context length, vocabulary and end tokens, from its config."""

from collections.abc import Iterable

from transformers import PretrainedConfig

from ..rendering.images import Images, Placeholders
from ..rendering.policy import Reading
from ..rendering.renderer import Overlong, Renderer


def context_length(config: PretrainedConfig) -> int | None:
    """Longest sequence that a model reads, in tokens. Not every family has a limit (state-space models have none)."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def model_renderer(
    config: PretrainedConfig,
    eos_token_ids: Iterable[int | None],
    reading: Reading,
    overlong: Overlong | None = None,
    images: Images = "read",
) -> Renderer:
    """
    Renderer for a model by its config and the tokens that end a response (`None` is left out). `overlong`: see
    [`~endotrl.rendering.renderer.fit`]; `None` if the caller looks after long rows.
    """
    return Renderer(
        eos_token_ids=[token_id for token_id in eos_token_ids if token_id is not None],
        vocab_size=config.get_text_config().vocab_size,
        max_length=None if overlong is None else context_length(config),
        overlong_prompt=overlong or "error",
        placeholders=Placeholders.of(config),
        images=images,
        **reading._asdict(),
    )
