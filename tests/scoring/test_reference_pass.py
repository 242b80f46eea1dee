# SPDX-License-Identifier: Apache-2.0
"""Rows of a trainer's own pass, found again by their ids: read where they have the states of the row alone."""

import pytest
import torch
from transformers import LlamaConfig

from endotrl.scoring.reference_pass import ReferenceRecorder, _is_given

from .families import FAMILIES, SIZES, OneScale, group_rows, make_model, make_rows, replace_linear, with_rope


@torch.no_grad()
def record(model, rows, left=5, **given):
    """What is found of each row. Trainers pad prompts on the left and completions on the right, without positions."""
    recorder = ReferenceRecorder(model, is_frozen=lambda: True, current_step=lambda: 0)
    prompt_width = max(len(row.prompt_ids) for row in rows) + left
    width = prompt_width + max(len(row.completion_ids) for row in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for k, row in enumerate(rows):
        start, end = prompt_width - len(row.prompt_ids), prompt_width + len(row.completion_ids)
        input_ids[k, start:end] = torch.tensor([*row.prompt_ids, *row.completion_ids])
        mask[k, start:end] = 1
    given = {key: torch.full_like(input_ids, value) for key, value in given.items()}
    model(input_ids=input_ids, attention_mask=mask, use_cache=False, **given)
    found = recorder.take([((*row.prompt_ids, *row.completion_ids), None) for row in rows])
    recorder.close()
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_read_is_that_of_the_row_alone(name):
    model, rows = make_model(FAMILIES[name]()), make_rows()
    head = model.get_output_embeddings()
    with torch.no_grad():
        for row, states in zip(rows, record(model, rows), strict=True):
            if states is not None:
                expected = model.base_model(torch.tensor([[*row.prompt_ids, *row.completion_ids]])).last_hidden_state
                torch.testing.assert_close(head(states), head(expected[0]), atol=5e-5, rtol=1e-5)


def one_scale():
    model = make_model(LlamaConfig(**SIZES))
    replace_linear(model.base_model, OneScale)
    return model


READS_PADDING = {
    "llama, untied head": True,
    "qwen3": True,
    "gemma3, sliding window": True,
    "mixtral, experts": True,
    "ministral3, attention scaled by position": False,
    "recurrentgemma, gated recurrence": False,
    "gpt2, learned positions": False,
    # They see the length of the pass.
    "phi3, longrope": False,
    "llama, dynamic": False,
}


@pytest.mark.parametrize(("name", "is_read"), READS_PADDING.items())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padded_rows(name, is_read, dtype):
    model = make_model(FAMILIES[name]()).to(dtype)
    assert {states is not None for states in record(model, group_rows())} == {is_read}


@pytest.mark.parametrize(
    ("make", "is_read"),
    [
        # Frequencies that depend on the pass, whatever the config says; one scale for all tokens of a pass.
        (lambda: with_rope("new", "positions"), False),
        (lambda: with_rope("default", "positions"), False),
        (one_scale, False),
        # Noise of training mode: the second has jitter in its router.
        (lambda: make_model(FAMILIES["mixtral, experts"]()).train(), True),
        (lambda: make_model(FAMILIES["phimoe, longrope and scales by length"]()).train(), False),
    ],
)
def test_models_whose_rows_depend_on_more_than_themselves(make, is_read):
    assert {states is not None for states in record(make(), make_rows())} == {is_read}


@pytest.mark.parametrize(
    ("given", "is_read"), [({}, True), ({"position_ids": 1}, False), ({"token_type_ids": 1}, False)], ids=str
)
def test_a_row_that_is_more_than_its_ids(given, is_read):
    (states,) = record(make_model(LlamaConfig(**SIZES)), group_rows()[:1], left=0, **given)
    assert (states is not None) == is_read


@pytest.mark.parametrize(("types", "is_given"), [([0, 0, 0], True), ([0, 1, 0], False), ([0, 0], False)], ids=str)
def test_token_types_of_a_row_without_images(types, is_given):
    given = {"token_type_ids": torch.tensor([types])}
    assert _is_given(None, given, {}, 0, torch.ones(3, dtype=torch.bool)) is is_given


def test_a_pause_within_a_pause():
    """The recorder tries its model in a pause of its own; what the reward runs after it is still not the trainer's."""
    model, ids = make_model(LlamaConfig(**SIZES)), torch.tensor([[5, 6, 7]])
    recorder = ReferenceRecorder(model, is_frozen=lambda: True, current_step=lambda: 0)
    with torch.no_grad(), recorder.paused():
        assert recorder._reads == (True, True)
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    assert recorder.take([((5, 6, 7), None)]) == [None]
