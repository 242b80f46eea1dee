# SPDX-License-Identifier: Apache-2.0
"""Isolation of rows: whether states depend on other rows, padding or earlier passes, tested once per model."""

import inspect
import logging
import math
from dataclasses import dataclass

import torch
from packaging.version import Version
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from .forward_pass import (
    Group,
    NotPackable,
    PackedRow,
    RopeLengths,
    backbone,
    execution_device,
    is_plain_linear,
    last_hidden_states,
    packed_hidden_states,
)


logger = logging.getLogger(__name__)

# Largest relative difference of states from two passes of one shape, in which rounding is the same.
SAME_SHAPE = 1e-3
NAMES_PRECISION = Version(torch.__version__) >= Version("2.9")  # where `allow_tf32` may raise


def probe_tokens(model: PreTrainedModel, count: int, skip: int = 0) -> list[int]:
    """Token ids for trying out a model: `count` of a fixed sequence that is spread over the vocabulary."""
    vocab_size = model.config.get_text_config().vocab_size
    return [position * 7919 % vocab_size for position in range(skip, skip + count)]


def rounding(model: PreTrainedModel) -> float:
    """Relative difference of states, up to which two passes of different shapes differ by rounding only."""
    device = execution_device(model, model.get_input_embeddings())
    return 1e-3 if multiplies_exactly(model.dtype, device) else 0.1


def multiplies_exactly(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of a dtype are rounded to float32 only: not under autocast, nor on a GPU that may use TF32."""
    matmul = torch.backends.cuda.matmul
    tf32 = device.type == "cuda" and (matmul.fp32_precision == "tf32" if NAMES_PRECISION else matmul.allow_tf32)
    return dtype == torch.float32 and not tf32 and not torch.is_autocast_enabled(device.type)


def relative_difference(states: Tensor, expected: Tensor) -> Tensor:
    """Relative difference of each state, of shape `(..., D)`, to the expected one, of shape `(...)`."""
    states, expected = states.float(), expected.float()
    length = expected.norm(dim=-1)
    # The state of a lone padding token may be 0.
    return (states - expected).norm(dim=-1) / length.clamp(min=length.mean() / 100)


@dataclass(frozen=True)
class PassRules:
    """Rows that may share a pass of a model, so that each gets the same states as alone."""

    longest_packable: float  # maximum tokens per packed row; longer ones are padded
    rope: RopeLengths  # rows of one pass must be of one `length_class`
    whole: bool  # whether a row must be run to its very end, as its states depend on its length or on later tokens
    alone: str | None  # reason why every row needs its own pass, if it does


def pass_rules(model: PreTrainedModel, longest_pass: int) -> PassRules:
    """Tests which rows may share a pass. `ValueError` if states depend on later tokens or earlier passes."""
    states = last_hidden_states(model, _batch(model))
    rope = RopeLengths.from_config(model.config)
    alone = why_alone(model, states)
    if alone is None:
        batch = _batch(model)
        batch[0, 8:] = torch.tensor(probe_tokens(model, 8, 64))
        if _differ(model, states[0, :8], last_hidden_states(model, batch)[0, :8]):
            raise ValueError(
                f"The hidden states of {type(model).__name__} depend on later tokens, so it is not a causal language "
                "model. Use a causal one, or check the config: some models are not causal with `is_decoder=False`."
            )
        alone = why_alone_by_length(model, rope, longest_pass)
    not_packable = alone or why_not_packable(model)
    if relative_difference(last_hidden_states(model, _batch(model))[0], states[0]).max() > SAME_SHAPE:
        raise ValueError(
            f"{type(model).__name__} gives different hidden states for the same tokens after other passes: it is "
            "random, or keeps state between passes, so its scores cannot be reproduced. Load the model without the "
            "layers that do this."
        )
    longest = 0 if not_packable else longest_packable(model.config)
    if longest < math.inf:
        how = f"completions do not share the pass of their prompt and rows are padded ({not_packable})"
        if alone:
            how = f"each completion needs its own pass ({alone})"
        elif longest:
            how = f"rows longer than its window of {longest:.0f} tokens do not share a prompt's pass and are padded"
        logger.info("With %s, %s. Results are the same, but scoring is slower.", type(model).__name__, how)
    return PassRules(longest, rope, whole=alone is not None or bool(rope.limits), alone=alone)


def longest_packable(config: PretrainedConfig) -> float:
    """Tokens up to which a model attends to all previous ones: its window or chunk; 0 if parts are not attention."""
    if config.sub_configs:
        return 0
    # `to_dict`, as each family has its own keys and a missing one means "no window".
    settings = config.to_dict()
    limit = math.inf
    layer_types = set(settings.get("layer_types") or ["full_attention", "sliding_attention"])
    if not layer_types <= {"full_attention", "sliding_attention", "chunked_attention"}:
        return 0
    for kind, key in (("sliding_attention", "sliding_window"), ("chunked_attention", "attention_chunk_size")):
        if kind in layer_types and settings.get(key) and settings.get("use_sliding_window", True):
            limit = min(limit, settings[key])
    return limit


def why_not_packable(model: PreTrainedModel) -> str | None:
    """Reason why a packed row of a few tokens does not reproduce each sequence alone, or `None`."""
    if not model.is_backend_compatible():
        return "its attention is a custom implementation"
    if longest_packable(model.config) == 0:
        return "not all of its layers are attention over text"
    tokens = probe_tokens(model, 24)
    groups = [Group(tokens[:5], [tokens[5:12], tokens[12:14]]), Group(tokens[14:18], [tokens[18:24], tokens[:3]])]
    row = PackedRow.of(groups)
    try:
        packed = packed_hidden_states(model, row)
    except NotPackable as error:
        return f"its attention has {error}"
    for g, group in enumerate(groups):
        for k, continuation in enumerate(group.continuations):
            alone = torch.tensor([[*group.prompt, *continuation]])
            expected = last_hidden_states(model, alone)[0, len(group.prompt) - 1 :]
            # They are equal up to rounding. A leak from a neighbour, or a wrong position, makes a difference as large
            # as the state.
            if relative_difference(packed[row.states(g, k)], expected).max() > rounding(model):
                return "its layers mix neighbouring sequences"
    return None


def why_alone(model: PreTrainedModel, states: Tensor | None = None) -> str | None:
    """Reason why a row depends on other rows of a batch, or `None`. `states` are of `_batch(model)`, if known."""
    states = last_hidden_states(model, _batch(model)) if states is None else states
    other_states = last_hidden_states(model, _batch(model, neighbours=64))
    differ = _differ(model, other_states[0], states[0])
    head = model.get_output_embeddings()
    if not differ and head is not None and not is_plain_linear(head):
        other_states[0] = states[0]
        logits, other_logits = (head(batch.flatten(0, 1))[: states.shape[1]] for batch in (states, other_states))
        differ = bool(relative_difference(other_logits, logits).max() > SAME_SHAPE)
    return "its layers share one scale or capacity among all tokens of a pass" if differ else None


def reads_padding(model: PreTrainedModel) -> bool:
    """Whether a batch padded on the left, without positions, gives each row the same states as alone."""
    if not RopeLengths.from_config(model.config).is_rotary:
        return False
    row, fillers, width = probe_tokens(model, 16), probe_tokens(model, 48, 16), 24
    ids = torch.tensor([[*fillers[:width], *row], probe_tokens(model, width + 16, 64)])
    mask = torch.ones_like(ids)
    mask[0, :width] = 0
    padded = last_hidden_states(model, ids, mask)[0, width:]
    ids[0, :width] = torch.tensor(fillers[width:])
    if _differ(model, padded, last_hidden_states(model, ids, mask)[0, width:]):
        return False
    if _distance(model, padded, last_hidden_states(model, torch.tensor([row]))[0]) > rounding(model):
        return False
    return _sees_distances(model, row)


def _sees_distances(model: PreTrainedModel, row: list[int]) -> bool:
    """Whether states stay the same if all positions are shifted."""
    if not _takes_positions(model):
        return True
    longest = _longest(model)
    shifts = torch.tensor([0, 1, (longest - len(row)) // 16, longest - len(row)]).clamp(min=0)
    positions = torch.arange(len(row))[None] + shifts[:, None]
    states = last_hidden_states(model, torch.tensor([row] * 4), None, positions)
    # Angles of large positions have larger rounding errors.
    allowed = max(3 * _distance(model, states[1], states[0]), 0.01)
    return not any(_distance(model, moved, states[0]) > allowed for moved in states[2:])


def why_alone_by_length(model: PreTrainedModel, rope: RopeLengths, longest_pass: int) -> str | None:
    """Reason why a row's states depend on the length of a pass in a way not covered by `rope`, or `None`."""
    if not rope.is_rotary or not _takes_positions(model):
        return None
    reason = "its rotary positions depend on the longest row of a pass"
    known = type(backbone(model)).__module__.startswith("transformers.")
    longest = _longest(model)
    # A neighbour with a distant last token. Other code may keep a table of positions.
    far = rope.limits[0] - 1 if rope.limits else 4 * longest if known else longest - 1
    ids = torch.tensor([probe_tokens(model, 4), probe_tokens(model, 4, 4)])
    positions = torch.arange(4).repeat(2, 1)
    near = last_hidden_states(model, ids, None, positions)[0]
    positions[1, 3] = max(3, far)
    if _differ(model, near, last_hidden_states(model, ids, None, positions)[0]):
        return reason
    if not rope.unknown and (known or not rope.limits):
        return None
    # Code that depends on the number of tokens shows it only with that many.
    length = max(4, min(longest_pass, 2 * longest if known else longest))
    extended = last_hidden_states(model, torch.tensor([probe_tokens(model, length)]))[0, :4]
    return reason if _distance(model, extended, last_hidden_states(model, ids[:1])[0]) > rounding(model) else None


def _batch(model: PreTrainedModel, neighbours: int = 16) -> Tensor:
    """A row of 16 tokens and three others, of shape `(4, 16)`; `neighbours` selects the tokens of these."""
    return torch.tensor([probe_tokens(model, 16), *(probe_tokens(model, 16, neighbours + 16 * k) for k in range(3))])


def _longest(model: PreTrainedModel) -> int:
    """Maximum number of positions; not every family has one."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**15


def _takes_positions(model: PreTrainedModel) -> bool:
    return "position_ids" in inspect.signature(backbone(model).forward).parameters


def _distance(model: PreTrainedModel, states: Tensor, expected: Tensor) -> float:
    """Maximum relative difference of states; the median if single states may be far off by rounding."""
    difference = relative_difference(states, expected)
    return float(difference.median() if _rounds_by_neighbours(model) else difference.max())


def _differ(model: PreTrainedModel, states: Tensor, expected: Tensor) -> bool:
    """Whether states of two passes of one shape differ by more than rounding."""
    allowed = rounding(model) if _rounds_by_neighbours(model) else SAME_SHAPE
    return _distance(model, states, expected) > allowed


def _rounds_by_neighbours(model: PreTrainedModel) -> bool:
    """Whether a token's rounding depends on others: in half precision, that changes the routing to experts."""
    settings = model.config.get_text_config().to_dict()
    if rounding(model) <= SAME_SHAPE or not any("expert" in key for key in settings):
        return False
    return (
        "quantization_config" not in model.config.to_dict()
        and all(type(weight) is nn.Parameter and weight.is_floating_point() for weight in model.parameters())
        and not any(isinstance(module, nn.Linear) and type(module) is not nn.Linear for module in model.modules())
    )
